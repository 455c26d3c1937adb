from __future__ import annotations

import pytest

from split_llama.errors import UsageError
from split_llama.transport.address import ServerAddress, authorization


@pytest.mark.parametrize(
    ("url", "stream", "frames"),
    [
        ("http://gpu:8700", "ws://gpu:8700/v1/stream", "http://gpu:8700/v1/frames"),
        ("https://gpu/team/llama/", "wss://gpu/team/llama/v1/stream", "https://gpu/team/llama/v1/frames"),
        ("wss://[::1]:8700", "wss://[::1]:8700/v1/stream", "https://[::1]:8700/v1/frames"),
        (" ws://gpu:1 ", "ws://gpu:1/v1/stream", "http://gpu:1/v1/frames"),
    ],
)
def test_urls_come_from_what_the_user_types(url: str, stream: str, frames: str) -> None:
    address = ServerAddress.parse(url)
    assert (address.stream, address.frames) == (stream, frames)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gpu:8700",
        "localhost",
        "ftp://gpu",
        "http://",
        "http://gpu:port",
        "http://gpu:99999",
        "http://[::1",
        "http://g/?a=1",
    ],
)
def test_a_bad_address_is_a_usage_error_with_the_form_expected(url: str) -> None:
    with pytest.raises(UsageError, match="expected http://HOST:PORT"):
        ServerAddress.parse(url)


def test_a_password_in_the_address_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        ServerAddress.parse("http://me:hunter2@gpu:8700")
    assert "hunter2" not in str(caught.value)


def test_keys_that_fit_no_header_are_refused_and_not_repeated() -> None:
    assert authorization(None) == {}
    assert authorization("fl-1") == {"Authorization": "Bearer fl-1"}
    for key in ("", "two words", "line\n", "schlüssel"):
        with pytest.raises(UsageError) as caught:
            authorization(key)
        assert not key or key not in str(caught.value)
