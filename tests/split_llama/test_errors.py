from __future__ import annotations

import re

import pytest

from split_llama import errors
from split_llama.errors import (
    ConnectionRefused,
    FlLlamaError,
    RemoteError,
    ServerUnreachable,
    all_errors,
    error_for_close,
    error_for_code,
)

CLASSES = list(all_errors())


def test_every_class_has_its_own_wire_code() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all("code" in vars(cls) and 0 < cls.code < 2**16 for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_has_an_http_status_and_an_exit_code(cls: type[FlLlamaError]) -> None:
    assert "status" in vars(cls)
    assert 400 <= cls.status < 600
    assert cls.exit_code in (2, 3, 4)


def test_fatal_classes_have_their_own_close_code_and_the_others_none() -> None:
    fatal = list(all_errors(ConnectionRefused))
    codes = [cls.close_code for cls in fatal]
    assert len(set(codes)) == len(codes)
    assert all("close_code" in vars(cls) and cls.close_code is not None for cls in fatal)
    assert all(code == 1009 or 4000 <= (code or 0) <= 4999 for code in codes)
    assert all(cls.close_code is None for cls in CLASSES if cls not in fatal)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_codes_lead_back_to_their_class(cls: type[FlLlamaError]) -> None:
    error = error_for_code(cls.code, "why", retry_after_ms=5)
    assert type(error) is cls
    assert (error.message, error.retry_after_ms) == ("why", 5)
    if cls.close_code is not None:
        assert type(error_for_close(cls.close_code, "why")) is cls


def test_an_unknown_code_keeps_its_number() -> None:
    error = error_for_code(9999, "why")
    assert type(error) is RemoteError
    assert "9999" in error.message


def test_any_other_close_code_means_a_lost_link() -> None:
    error = error_for_close(1006, "")
    assert type(error) is ServerUnreachable
    assert "1006" in error.message


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: list[tuple[str, str]] = []
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ((?:│   |    )*(?:├── |└── )?)([A-Z]\w+)(?:\s{2,}|$)", line)
        if match:
            depth = len(match[1]) // 4
            stack[depth:] = [match[2]]
            drawn.append((match[2], stack[depth - 1] if depth else "Exception"))
    assert sorted(drawn) == sorted((cls.__name__, cls.__bases__[0].__name__) for cls in CLASSES)
