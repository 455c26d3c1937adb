from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_llama.draft_tree import check_path, check_tree
from split_llama.errors import BadRequest, BadStates, RequestRefused
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.frame import HEADER_SIZE, Flag, Frame, Kind, frame_limit
from split_llama.wire.step import build_step, max_rows, parse_step, reply_rows

WIDTH = 64


def rows_of(count: int, codec: Codec = Codec.FP16) -> bytes:
    return (
        bytes(range(256)) * count * row_bytes(codec, WIDTH) if count == 0 else b"\1" * (count * row_bytes(codec, WIDTH))
    )


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    bits = [1]
    for node in range(1, draw(st.integers(1, 64))):
        bits.append(bits[draw(st.integers(0, node - 1))] | 1 << node)
    return bits


@given(
    tree=st.none() | trees(),
    accept=st.none() | st.sets(st.integers(1, 255), max_size=20).map(lambda nodes: (0, *sorted(nodes))),
    codec=st.sampled_from(Codec),
)
def test_a_step_comes_back_as_it_went(tree: list[int] | None, accept: tuple[int, ...] | None, codec: Codec) -> None:
    count = len(tree) if tree else 3
    rows = rows_of(count, codec)
    frame = build_step(handle=5, seq=2, first=9, count=count, codec=codec, rows=rows, tree=tree, accept=accept)
    parsed = parse_step(Frame.decode(frame.encode()), WIDTH)
    assert parsed.tree == (tuple(tree) if tree else None)
    assert parsed.accept == accept
    assert parsed.rows == rows
    assert bool(frame.flags & Flag.DRAFT) == (tree is not None)


def test_a_one_token_step_is_a_header_and_its_row() -> None:
    frame = build_step(handle=1, seq=1, first=0, count=1, codec=Codec.FP16, rows=rows_of(1))
    assert len(frame.encode()) == HEADER_SIZE + row_bytes(Codec.FP16, WIDTH)


@given(
    codec=st.integers(0, 255),
    flags=st.integers(0, 255),
    aux=st.integers(0, 2**16 - 1) | st.integers(0, 9),
    count=st.integers(0, 2**32 - 1) | st.integers(0, 3),
    payload=st.binary(max_size=700),
)
def test_any_step_parses_or_is_refused(codec: int, flags: int, aux: int, count: int, payload: bytes) -> None:
    frame = Frame(Kind.STEP, codec, flags, aux, count=count, payload=payload)
    try:
        parsed = parse_step(frame, WIDTH)
    except RequestRefused:
        return
    assert len(parsed.rows) == count * row_bytes(Codec(codec), WIDTH)


PLAIN = build_step(handle=1, seq=1, first=0, count=2, codec=Codec.FP16, rows=rows_of(2))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"flags": 64}, "unknown flags 0x40"),
        ({"flags": Flag.REPLY_LAST | Flag.REPLY_NONE}, "exclude"),
        ({"flags": Flag.TREE}, "TREE needs DRAFT"),
        ({"flags": Flag.TREE | Flag.DRAFT, "count": 65}, "at most 64 nodes, 65 came"),
        ({"aux": 3}, "aux counts accepted nodes"),
        ({"flags": Flag.ACCEPT, "aux": 256}, "at most 255"),
        ({"count": 0}, "at least one row"),
    ],
)
def test_malformed_steps_are_refused_by_name(change: dict[str, int], expected: str) -> None:
    with pytest.raises(BadRequest, match=expected):
        parse_step(dataclasses.replace(PLAIN, **change), WIDTH)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3, 2**32 - 1])
def test_the_count_must_match_the_payload(count: int) -> None:
    with pytest.raises(BadStates, match="256 bytes came"):
        parse_step(dataclasses.replace(PLAIN, count=count), WIDTH)


def test_another_width_and_an_unknown_codec_are_bad_states() -> None:
    with pytest.raises(BadStates, match="2 rows of 32 values"):
        parse_step(PLAIN, 32)
    with pytest.raises(BadStates, match="unknown codec 200"):
        parse_step(dataclasses.replace(PLAIN, codec=200), WIDTH)


@pytest.mark.parametrize("accept", [(), (1, 2), (0, 2, 1), (0, 1, 1), tuple(range(256))])
def test_accepted_nodes_ascend_from_the_root(accept: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest):
        build_step(handle=1, seq=1, first=0, count=2, codec=Codec.FP16, rows=rows_of(2), accept=accept)


def test_padding_behind_accepted_nodes_must_be_zero() -> None:
    frame = build_step(handle=1, seq=1, first=0, count=1, codec=Codec.FP16, rows=rows_of(1), accept=(0, 1))
    payload = bytearray(frame.payload)
    payload[7] = 1
    with pytest.raises(BadRequest, match="padding"):
        parse_step(dataclasses.replace(frame, payload=bytes(payload)), WIDTH)


@given(tree=trees())
def test_every_tree_of_earlier_parents_is_valid(tree: list[int]) -> None:
    check_tree(tree)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        [0],
        [2],
        [1, 2],  # a second root
        [1, 1],  # own bit missing
        [1, 0b111],  # a later node
        [1, 0b11, 0b110],  # not closed under ancestors
        [1, 0b11, 0b101, 0b1111],  # two parents
        [1] + [1 | 1 << node for node in range(1, 65)],
    ],
)
def test_what_is_no_tree_is_refused(tree: list[int]) -> None:
    with pytest.raises(BadRequest, match="tree"):
        check_tree(tree)


def test_a_path_follows_parents_in_a_tree_and_order_in_a_chain() -> None:
    tree = [1, 0b11, 0b101, 0b1101]
    check_path((0, 2, 3), 4, tree)
    check_path((0, 1), 4, None)
    for accept, pending in [
        ((0, 1, 3), tree),
        ((0, 3), tree),
        ((0, 2, 4), tree),
        ((0, 2), None),
        ((0, 1, 2, 3, 4), None),
    ]:
        with pytest.raises(BadRequest):
            check_path(accept, 4, pending)


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("width", [1, 64, 4096, 8192, 16384, 20000])
def test_max_rows_fit_a_frame_with_anything_beside_them(codec: Codec, width: int) -> None:
    limit = frame_limit(width)
    count = min(64, max_rows(codec, width, limit))
    rows = bytes(count * row_bytes(codec, width))
    tree = [(1 << node + 1) - 1 for node in range(count)]
    frame = build_step(
        handle=1, seq=1, first=0, count=count, codec=codec, rows=rows, tree=tree, accept=tuple(range(255))
    )
    assert frame.size <= limit


def test_flags_choose_the_rows_of_the_reply() -> None:
    assert [reply_rows(flags, 5) for flags in (0, Flag.REPLY_LAST, Flag.REPLY_NONE, Flag.DRAFT)] == [5, 1, 0, 5]
