"""Who contributes to which step, when sets meet, and which steps everybody keeps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_llama.errors import UsageError
from training.job_config import JobConfig
from training.strategy import (
    ClientBatch,
    Sequential,
    ServerHierarchical,
    averages,
    checkpoint_due,
    contributors,
    last_average,
    make_strategy,
)

PRESENT = st.frozensets(st.integers(0, 20), min_size=1, max_size=8)


@given(PRESENT, st.integers(1, 5))
def test_sequential_gives_each_client_the_same_number_of_steps_in_a_row(
    present: frozenset[int], turn_steps: int
) -> None:
    strategy = Sequential(turn_steps)
    turns = [contributors(strategy, step, present) for step in range(1, 2 * len(present) * turn_steps + 1)]
    expected = [frozenset({index}) for index in sorted(present) for _ in range(turn_steps)]
    assert turns == expected * 2
    assert not strategy.averages(1)


@given(PRESENT, st.integers(1, 1000))
def test_the_others_take_everybody(present: frozenset[int], step: int) -> None:
    for strategy in (ClientBatch(), ServerHierarchical(3)):
        assert contributors(strategy, step, present) == present
    assert not ClientBatch().own_sets
    assert ServerHierarchical().own_sets


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("sequential", Sequential(3)),
        ("client-batch", ClientBatch()),
        ("server-hierarchical", ServerHierarchical(7)),
    ],
)
def test_made_by_name(name: str, made: object) -> None:
    assert make_strategy(JobConfig(strategy=name, turn_steps=3, average_every=7)) == made


def test_sets_meet_every_so_often_and_at_the_end() -> None:
    config = JobConfig(strategy="server-hierarchical", average_every=4, steps=10)
    strategy = make_strategy(config)
    assert [step for step in range(1, 11) if averages(config, strategy, step)] == [4, 8, 10]
    assert [last_average(config, strategy, step) for step in (0, 3, 4, 9, 10)] == [0, 0, 4, 8, 10]
    shared = JobConfig(strategy="client-batch", average_every=4, steps=10)
    assert not any(averages(shared, make_strategy(shared), step) for step in range(1, 11))


@pytest.mark.parametrize("strategy", ["sequential", "client-batch"])
def test_checkpoints_of_a_shared_set(strategy: str) -> None:
    config = JobConfig(strategy=strategy, steps=10, checkpoint_every=4)
    assert [step for step in range(1, 11) if checkpoint_due(config, step)] == [4, 8, 10]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 60))
def test_checkpoints_of_own_sets_lie_where_they_meet(average_every: int, checkpoint_every: int, steps: int) -> None:
    config = JobConfig(
        strategy="server-hierarchical", average_every=average_every, checkpoint_every=checkpoint_every, steps=steps
    )
    strategy = make_strategy(config)
    due = [step for step in range(1, steps + 1) if checkpoint_due(config, step, strategy)]
    assert all(averages(config, strategy, step) for step in due)
    assert due[-1] == steps
    # No more than a checkpoint's distance and a meeting's lie between two of them.
    gaps = [later - earlier for earlier, later in zip([0, *due], due, strict=False)]
    assert all(gap < checkpoint_every + average_every for gap in gaps)
    # And no more of them than were asked for.
    assert len(due) <= steps // checkpoint_every + 1


class Odd:
    """A plug-in: only clients with odd numbers."""

    own_sets = False

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    def contributors(self, step: int, present: frozenset[int]) -> frozenset[int]:
        return frozenset(index for index in present if index % 2)

    def averages(self, step: int) -> bool:
        return False


class Careless(Odd):
    own_sets: Any = "yes"


class Picky(Odd):
    own_sets = True


@pytest.fixture
def plugin_module(monkeypatch: pytest.MonkeyPatch) -> str:
    import sys
    import types

    module = types.ModuleType("fl_llama_test_strategies")
    for each in (Odd, Careless, Picky):
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_plugin_is_made_with_the_configuration(plugin_module: str) -> None:
    config = JobConfig(strategy=f"{plugin_module}:Odd", checkpoint_every=3, steps=7)
    strategy = make_strategy(config)
    assert isinstance(strategy, Odd)
    assert strategy.config is config
    assert contributors(strategy, 1, frozenset({0, 1, 2, 3})) == {1, 3}
    assert [step for step in range(1, 8) if checkpoint_due(config, step)] == [3, 6, 7]


def test_a_plugin_that_cannot_be_worked_with_is_refused(plugin_module: str) -> None:
    with pytest.raises(UsageError, match="own_sets"):
        make_strategy(JobConfig(strategy=f"{plugin_module}:Careless"))
    with pytest.raises(UsageError, match=r"chose the clients \[\] for step 1"):
        contributors(Odd(JobConfig()), 1, frozenset({0, 2}))
    with pytest.raises(UsageError, match=r"leaves \[0, 2\] out"):
        contributors(Picky(JobConfig()), 1, frozenset({0, 1, 2}))
    with pytest.raises(UsageError, match="there is no module"):
        make_strategy(JobConfig(strategy="no_such_module_of_ours:Thing"))
