"""`python -m edge_client` is `edge-client`."""

import sys

from edge_client.cli import main

if __name__ == "__main__":
    sys.exit(main())
