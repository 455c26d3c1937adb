from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.runner import shares
from loadtest.workload import Lengths, Vocabulary, Workload, parse_lengths, split_evenly

SMALL = Vocabulary(50, bos=1, special=frozenset({0, 1, 2}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", Lengths("fixed", 8, 8)),
        ("fixed:8", Lengths("fixed", 8, 8)),
        ("uniform:2-9", Lengths("uniform", 2, 9)),
        ("lognormal:64,0.8,512", Lengths("lognormal", 1, 512, 64.0, 0.8)),
    ],
)
def test_lengths_are_read(text: str, expected: Lengths) -> None:
    assert parse_lengths(text) == expected


BAD_LENGTHS = """0 -3 x 1.5 fixed: uniform:9-2 uniform:0-2 uniform:3 uniform:1-99999999999 zipf:3
lognormal:8,1 lognormal:8,nan,9 lognormal:0,1,9 lognormal:inf,1,9 lognormal:8,-1,9 lognormal:8,1,0""".split()


@pytest.mark.parametrize("text", ["", *BAD_LENGTHS])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lognormal:MEDIAN,SIGMA,MAX"):
        parse_lengths(text)


lengths = st.one_of(
    st.integers(1, 300).map(lambda n: f"{n}"),
    st.tuples(st.integers(1, 99), st.integers(0, 99)).map(lambda pair: f"uniform:{pair[0]}-{sum(pair)}"),
    st.tuples(st.floats(1, 1e5), st.floats(0, 99), st.integers(1, 300)).map(
        lambda t: f"lognormal:{t[0]},{t[1]},{t[2]}"
    ),
)


@given(lengths, st.integers())
def test_draws_stay_within_their_limits(text: str, seed: int) -> None:
    drawn = parse_lengths(text)
    source = random.Random(seed)
    assert all(drawn.low <= drawn.draw(source) <= drawn.longest for _ in range(20))


def test_lognormal_has_its_median() -> None:
    source = random.Random(1)
    drawn = sorted(parse_lengths("lognormal:64,0.5,4096").draw(source) for _ in range(2001))
    assert 60 <= drawn[1000] <= 68


@given(st.integers(), st.integers(-5, 1000), lengths, lengths)
def test_a_request_depends_on_seed_and_number_only(seed: int, index: int, prompt: str, answer: str) -> None:
    first = Workload(seed, parse_lengths(prompt), parse_lengths(answer), SMALL)
    second = Workload(seed, parse_lengths(prompt), parse_lengths(answer), SMALL)
    first.request(index + 1)
    request = first.request(index)
    assert request == second.request(index)
    assert request != Workload(seed + 1, parse_lengths(prompt), parse_lengths(answer), SMALL).request(index)


@given(st.integers(), lengths)
def test_random_prompts_begin_with_bos_and_hold_no_other_special_token(seed: int, prompt: str) -> None:
    drawn = parse_lengths(prompt)
    ids = Workload(seed, drawn, parse_lengths("1"), SMALL).request(0).prompt_ids
    assert drawn.low <= len(ids) <= drawn.longest
    assert ids[0] == 1
    assert all(3 <= token < 50 for token in ids[1:])


def test_prompts_of_a_file_are_taken_in_turn() -> None:
    workload = Workload(0, parse_lengths("9"), parse_lengths("4"), SMALL, [[5, 6], [7]])
    assert [workload.request(index).prompt_ids for index in range(3)] == [(5, 6), (7,), (5, 6)]
    assert len({workload.request(index).seed for index in range(3)}) == 3


@given(st.integers(0, 500), st.integers(1, 9))
def test_processes_share_all_requests(requests: int, processes: int) -> None:
    taken = [index for process in range(processes) for index in shares(process, processes, requests)]
    assert sorted(taken) == list(range(requests))


def test_without_a_number_of_requests_there_is_no_end() -> None:
    endless = shares(1, 2, None)
    assert [next(endless) for _ in range(3)] == [1, 3, 5]


@given(st.integers(0, 500), st.integers(1, 9))
def test_clients_are_spread_evenly(total: int, parts: int) -> None:
    split = split_evenly(total, parts)
    assert sum(split) == total
    assert max(split) - min(split) <= 1
