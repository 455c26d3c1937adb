"""`python -m loadtest` is `split-loadtest`."""

from loadtest.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
