"""Keys, rate limits and the size of the KV cache."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import keys as keys_module
from serving.keys import ANONYMOUS, COMMAND_LINE, KeyFile, KeyRing
from serving.limits import NO_LIMITS, Limits, TokenBucket
from serving.memory import plan_pages
from serving.slices import RangeNotSatisfiable, parse_range
from split_llama.errors import LimitExceeded, ModelError, Unauthenticated, UsageError


def test_the_file_holds_hashes_and_is_private(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "deep" / "keys.json")
    key = file.create("alice", Limits(2, 100))
    assert key not in file.path.read_text()
    if sys.platform != "win32":
        assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    ring = KeyRing(key_file=file.path)
    principal = ring.authenticate(f"Bearer {key}")
    assert (principal.owner, principal.limits) == ("alice", Limits(2, 100))
    assert list(file.path.parent.iterdir()) == [file.path], "no temporary file is left"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong", "Bearer \u00e9"])
def test_everything_else_is_turned_away(header: str | None) -> None:
    ring = KeyRing("right")
    assert ring.authenticate("bearer right").owner == COMMAND_LINE
    with pytest.raises(Unauthenticated):
        ring.authenticate(header)


def test_without_keys_everybody_is_anonymous() -> None:
    assert KeyRing().authenticate(None).owner == ANONYMOUS


def test_an_empty_key_file_lets_nobody_in(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated):
        KeyRing(key_file=tmp_path / "none.json").authenticate(None)


def test_changes_are_noticed_and_a_broken_file_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys_module, "RECHECK_SECONDS", 0.0)
    file = KeyFile(tmp_path / "keys.json")
    first = file.create("first", NO_LIMITS)
    ring = KeyRing(key_file=file.path)
    second = file.create("second", NO_LIMITS)
    assert ring.authenticate(f"Bearer {second}").owner == "second"
    file.path.write_text("{")
    assert ring.authenticate(f"Bearer {first}").owner == "first"
    assert "keys kept as they were" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "keys": [{}]}',
        b'{"version": 1, "keys": [{"name": "a", "sha256": "zz", "created": ""}]}',
        b'{"version": 1, "keys": [{"name": "a", "sha256": "00", "created": "", "max_sessions": -1}]}',
        b'{"version": 1, "keys": [{"name": "a", "sha256": "00", "created": "", "extra": 1}]}',
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys.json").write_bytes(content)
    with pytest.raises(UsageError, match="key"):
        KeyFile(tmp_path / "keys.json").read()


@pytest.mark.parametrize("name", ["", ANONYMOUS, COMMAND_LINE])
def test_reserved_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="reserved"):
        KeyFile(tmp_path / "keys.json").create(name, NO_LIMITS)


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        KeyFile(tmp_path / "file" / "keys.json")._write([])


def test_the_file_is_json_of_version_1(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.create("a", NO_LIMITS)
    document = json.loads(file.path.read_text())
    assert document["version"] == 1
    assert set(document["keys"][0]) == {"name", "sha256", "created", "max_sessions", "max_tokens_per_minute"}


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 300)), max_size=50))
def test_the_rate_holds_over_any_time(per_minute: int, takes: list[tuple[float, int]]) -> None:
    bucket, now, taken, largest = TokenBucket(per_minute, 0.0), 0.0, 0, 0
    for wait, rows in takes:
        now += wait
        refusal = None
        try:
            bucket.take(rows, now)
        except LimitExceeded as error:
            refusal = error
        if refusal is None:
            taken, largest = taken + rows, max(largest, rows)
        else:
            # Waiting as long as told is enough.
            assert bucket.level(now + refusal.retry_after_ms / 1000) >= min(rows, per_minute) - 1e-6
        assert taken <= per_minute * (1 + now / 60) + largest + 1e-6


def test_pages_from_memory() -> None:
    sizes = {"page_bytes": 1000, "page_size": 16, "max_model_len": 100}
    budget = plan_pages(free=100_000, fraction=0.5, max_sequences=4, **sizes)
    assert (budget.num_pages, budget.num_slots) == (28, 448)
    assert plan_pages(free=20_000, fraction=0.5, max_sequences=4, **sizes).num_pages == 10
    with pytest.raises(ModelError, match=r"--max-model-len \(at most 80 fits\)"):
        plan_pages(free=10_000, fraction=0.5, max_sequences=4, **sizes)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 100))
def test_ranges(first: int, last: int, size: int) -> None:
    body = bytes(range(size))
    try:
        part = parse_range(f"bytes={first}-{last}", size)
    except RangeNotSatisfiable:
        assert first >= size
        return
    if last < first:
        assert part is None
    else:
        assert part is not None
        assert body[part.start : part.stop] == body[first : last + 1]
