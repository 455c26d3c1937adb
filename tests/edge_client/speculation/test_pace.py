"""The pace: never much slower than without guesses, near the best fixed choice with them, calm in bad weather."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.speculation.calibration import Calibration
from edge_client.speculation.cost import RobustLine
from edge_client.speculation.pace import FIRST_GUESSES, LEAST_CHANCE, MOST_GUESSES, NOT_NOW, DraftPace, Round, Wish
from tests.edge_client.speculation.links import Drafting, Link, run

LINKS = {
    "loopback": Link(trip=0.0002, row=0.00005),
    "loopback, slow server": Link(trip=0.002, row=0.0005),
    "20 ms": Link(trip=0.02, row=0.0001),
    "20 ms, slow server": Link(trip=0.02, row=0.002),
    "80 ms": Link(trip=0.08, row=0.0001),
    "80 ms, slow server": Link(trip=0.08, row=0.004),
}
ROUNDS = 500


def best_fixed(link: Link, drafting: Drafting) -> float:
    choices = [Wish(0, 0.0)] + [Wish(*each) for each in itertools.product((1, 2, 4, 8, 16, 32), (0.0, 0.1, 0.3))]
    return max(run(link, drafting, ROUNDS, lambda: choice) for choice in choices)  # noqa: B023 (called at once)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("link", LINKS)
def test_it_is_near_the_best_fixed_choice(link: str, rate: float) -> None:
    drafting, pace = Drafting(rate), DraftPace()
    assert run(LINKS[link], drafting, ROUNDS, pace.wish, pace) >= 0.9 * best_fixed(LINKS[link], drafting)


@pytest.mark.parametrize("claims", [0.3, 2.0])
@pytest.mark.parametrize("link", LINKS)
def test_a_drafter_that_boasts_or_is_shy_is_seen_through(link: str, claims: float) -> None:
    drafting, pace = Drafting(0.8, claims), DraftPace()
    assert run(LINKS[link], drafting, ROUNDS, pace.wish, pace) >= 0.8 * best_fixed(LINKS[link], drafting)


@pytest.mark.parametrize("link", LINKS)
def test_guesses_that_are_never_right_cost_little(link: str) -> None:
    for claims in (0.0, 1.0):
        wrong, pace = Boasting(0.0, claims), DraftPace()
        plain = run(LINKS[link], wrong, ROUNDS, lambda: Wish(0, 0.0))
        assert run(LINKS[link], wrong, ROUNDS, pace.wish, pace) >= 0.94 * plain


class Boasting(Drafting):
    """Claims 0.9 for what is never right."""

    def propose(self, wish: Wish, draw: random.Random) -> tuple[list[float], list[int], list[int]]:
        count = min(wish.max_guesses, 16)
        chances = [0.9**depth for depth in range(1, count + 1) if 0.9**depth >= wish.min_chance]
        return chances, list(range(-1, len(chances) - 1)), []


def test_text_that_becomes_predictable_is_noticed_after_a_rest() -> None:
    link, pace = LINKS["20 ms"], DraftPace()
    run(link, Boasting(0.0), 200, pace.wish, pace)
    assert pace.is_resting
    later = run(link, Drafting(0.8), 1500, pace.wish, pace)
    assert later >= 2 * run(link, Drafting(0.8), 1500, lambda: Wish(0, 0.0))


def test_the_first_round_goes_without_and_the_next_ones_ask_for_little() -> None:
    pace = DraftPace()
    assert pace.wish() == NOT_NOW
    observe(pace, 1, 0.02)
    assert 0 < pace.wish().max_guesses <= FIRST_GUESSES
    assert pace.plain_speed() == pytest.approx(50)
    assert pace.speed() == 0


def test_a_pace_that_knows_its_link_wants_just_the_guesses_that_pay() -> None:
    """The rule of the module's docstring: at least a row's cost times tokens per second."""
    pace, draw = DraftPace(), random.Random(3)
    for _ in range(300):
        wish = pace.wish()
        count = min(wish.max_guesses, draw.randint(1, 12))
        chances = [0.8 * 0.9**i for i in range(count)]
        accepted = list(itertools.takewhile(lambda i: draw.random() < (0.8 if i == 0 else 0.9), range(count)))
        observe(pace, 1 + count, 0.02 + 0.002 * count, chances, accepted, 0.001 if wish.max_guesses else 0.0)
    assert pace.wish().min_chance == pytest.approx(0.002 * pace.speed(), rel=0.3)


def test_a_successor_begins_where_its_forerunner_is() -> None:
    link, pace = LINKS["80 ms, slow server"], DraftPace()
    run(link, Drafting(0.8), 200, pace.wish, pace)
    heir = pace.successor()
    assert heir.wish().max_guesses == MOST_GUESSES
    assert heir.plain_speed() == pytest.approx(pace.plain_speed())
    before = pace.speed()
    run(link, Boasting(0.0), 60, heir.wish, heir)
    assert heir.is_resting
    assert (pace.speed(), pace.is_resting) == (before, False)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 1e3), st.floats(0, 10), st.lists(st.floats(0, 1), max_size=63), st.integers(0, 63)),
        max_size=60,
    )
)
def test_whatever_it_sees_its_wish_can_be_asked(
    rounds: list[tuple[float, float, list[float], int]],
) -> None:
    pace = DraftPace()
    for seconds, drafting, chances, right in rounds:
        accepted = range(min(right, len(chances)))
        observe(pace, 1 + len(chances), seconds, chances, list(accepted), drafting)
        wish = pace.wish()
        assert 0 <= wish.max_guesses <= MOST_GUESSES
        assert LEAST_CHANCE <= wish.min_chance <= 1


def observe(
    pace: DraftPace,
    rows: int,
    seconds: float,
    chances: list[float] | None = None,
    accepted: list[int] | None = None,
    drafting: float = 0.0,
) -> None:
    stated = chances or []
    assert rows == 1 + len(stated)
    pace.observe(Round(stated, accepted or [], seconds, drafting))


def test_the_line_is_found_under_outliers() -> None:
    line, draw = RobustLine(0.96, 0.02), random.Random(1)
    for step in range(200):
        rows = draw.choice((0, 0, 4, 8, 20))
        late = 0.3 if step % 15 == 0 else 0.0
        line.observe(rows, 0.02 + 0.001 * rows + draw.gauss(0, 0.0005) + late)
    assert line.base == pytest.approx(0.02, rel=0.12)
    assert line.slope == pytest.approx(0.001, rel=0.25)


def test_a_link_that_changes_is_followed() -> None:
    line = RobustLine(0.96, 0.02)
    for _ in range(100):
        line.observe(0, 0.02)
    for _ in range(60):
        line.observe(0, 0.08)
    assert line.base == pytest.approx(0.08, rel=0.15)


def test_one_late_first_packet_is_forgotten_soon() -> None:
    line = RobustLine(0.96, 0.02)
    for seconds in (2.0, *[0.02] * 6):
        line.observe(0, seconds)
    assert line.base == pytest.approx(0.02, rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 63), st.floats(0, 100)), min_size=1, max_size=80))
def test_a_line_never_falls_and_never_breaks(seen: list[tuple[int, float]]) -> None:
    line = RobustLine(0.96, 0.02)
    for rows, seconds in seen:
        line.observe(rows, seconds)
        assert line.slope >= 0
        assert line.base >= 0
        assert math.isfinite(line.at(63))


@given(st.lists(st.lists(st.floats(0, 1), max_size=20), max_size=30), st.data())
def test_calibration_keeps_the_order_of_chances(rounds: list[list[float]], data: st.DataObject) -> None:
    calibration = Calibration(0.96)
    for chances in rounds:
        right = data.draw(st.lists(st.sampled_from(range(len(chances))), unique=True)) if chances else []
        calibration.observe(chances, right)
    actual = calibration.actual()
    assert actual == sorted(actual, reverse=True)
    assert all(0 <= chance <= 1 for chance in actual)
    assert all(calibration.stated_for(a) <= calibration.stated_for(b) for a, b in itertools.pairwise((0.05, 0.2, 0.6)))


def test_calibration_learns_what_claims_are_worth() -> None:
    calibration, draw = Calibration(0.99), random.Random(5)
    for _ in range(400):
        chances = [0.9, 0.6, 0.3]
        calibration.observe(chances, [i for i, chance in enumerate(chances) if draw.random() < chance**2])
    assert calibration.ratio() == pytest.approx((0.81 + 0.36 + 0.09) / 1.8, rel=0.2)
    assert calibration.stated_for(0.36) == pytest.approx(0.6, rel=0.35)
    calibration.forget(0.01)
    assert calibration.ratio() == pytest.approx(1.0, abs=0.3)


def test_a_drafter_that_is_slow_only_at_first_is_kept() -> None:
    """A second for the first proposal, then a millisecond: seen on a busy machine."""
    pace = DraftPace()
    observe(pace, 1, 0.02)
    for took in (1.0, 0.001, 0.001, 0.001, 0.001):
        assert pace.wish().max_guesses > 0
        observe(pace, 9, 0.021, [0.8**depth for depth in range(1, 9)], [0, 1], took)
    assert pace.speed() > 2 * pace.plain_speed()


def test_a_rest_ends_although_others_draft_meanwhile() -> None:
    """In a pass with other sessions, what their drafting took is observed here too."""
    pace = DraftPace()
    for _ in range(2):
        observe(pace, 1, 0.02, drafting=1e-6)
    while not pace.is_resting:
        observe(pace, 9, 0.04, [0.8**depth for depth in range(1, 9)], [], 0.01)
    rounds = 0
    while pace.is_resting:
        observe(pace, 1, 0.02, drafting=0.01)
        rounds += 1
    assert 0 < rounds < 200
    assert pace.wish().max_guesses > 0
