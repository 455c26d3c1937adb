from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from split_llama.errors import UsageError
from split_llama.transport.trust import ENVIRONMENT, tls_context


@pytest.fixture(autouse=True)
def _no_certificates_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def authorities(context: ssl.SSLContext) -> int:
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    return context.cert_store_stats()["x509_ca"]


def test_without_a_file_the_systems_authorities_are_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert authorities(tls_context(None)) > 10
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nobody.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert authorities(tls_context(None)) == 0, "what the environment says is not widened"


def test_a_system_without_authorities_gets_those_of_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    read = ssl.create_default_context

    def bare(cafile: str | None = None) -> ssl.SSLContext:
        return read(cafile=cafile) if cafile is not None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    monkeypatch.setattr(ssl, "create_default_context", bare)
    assert authorities(tls_context(None)) > 10


def test_a_file_that_is_missing_or_holds_no_certificate_is_a_mistake_of_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--ca-certs .*nowhere.pem cannot be read: No such file"):
        tls_context(tmp_path / "nowhere.pem")
    (tmp_path / "text.pem").write_text("no certificate")
    with pytest.raises(UsageError, match=r"holds no certificates.*expected PEM"):
        tls_context(tmp_path / "text.pem")
    with pytest.raises(UsageError, match="cannot be read"):
        tls_context(tmp_path)
