"""Whom TLS trusts: the system's authorities, those the environment names, or those of a file. The same everywhere."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from split_llama.errors import UsageError

ENVIRONMENT = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def tls_context(ca_certs: Path | None) -> ssl.SSLContext:
    """Make the context that trusts the certificates in `ca_certs` (PEM) and no others.

    Without it, those that `SSL_CERT_FILE` or `SSL_CERT_DIR` name are trusted, or the system's; where the system has
    none, those that come with httpx. Left to themselves, httpx and websockets would choose differently. Raises
    `UsageError`.
    """
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except ssl.SSLError as error:
        raise UsageError(
            f"--ca-certs {ca_certs} holds no certificates that can be read ({error.reason or error}): expected PEM, "
            "one or more -----BEGIN CERTIFICATE----- blocks"
        ) from error
    except OSError as error:
        raise UsageError(f"--ca-certs {ca_certs} cannot be read: {error.strerror or error}") from error
    if not context.cert_store_stats()["x509_ca"] and not any(os.environ.get(name) for name in ENVIRONMENT):
        import httpx

        return httpx.create_ssl_context()
    return context
