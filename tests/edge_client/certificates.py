"""A private authority and certificates signed by it, made by the `openssl` command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_certificates(folder: Path, *, address: str = "IP:127.0.0.1", days: int = 30) -> Path:
    """Write ca.pem, server.pem and server.key, the server's for `address`; skips where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", *CURVE, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "30")
    (folder / "names").write_text(f"subjectAltName={address}")
    openssl("req", *CURVE, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=test server")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days), "-extfile", "names")
    openssl("x509", "-req", "-in", "server.csr", *signing, "-out", "server.pem")
    return folder
