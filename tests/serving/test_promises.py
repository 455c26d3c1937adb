"""Promised pages: whatever happens, they are there, and who was promised some gets them."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serving.promises import Promises

KEYS = st.integers(0, 4)


class PromiseMachine(RuleBasedStateMachine):
    """Sessions take pages, give them back and are promised more, in any order; nobody takes what is not free for it."""

    @initialize(pages=st.integers(0, 30))
    def start(self, pages: int) -> None:
        self.promises: Promises[int] = Promises()
        self.free = pages
        self.held = dict.fromkeys(range(5), 0)

    @rule(key=KEYS, pages=st.integers(0, 12), next_pages=st.integers(0, 12))
    def take(self, key: int, pages: int, next_pages: int) -> None:
        if pages > self.promises.free_for(key, self.free):
            return
        self.free -= pages
        self.held[key] += pages
        self.renew(key, next_pages)

    @rule(key=KEYS, next_pages=st.integers(0, 12))
    def take_what_was_promised(self, key: int, next_pages: int) -> None:
        promised, free = self.promises.of(key), self.free
        self.take(key, promised, next_pages)
        assert self.free == free - promised, "nobody can take what was promised to another"

    @rule(key=KEYS, pages=st.integers(0, 12))
    def give_back(self, key: int, pages: int) -> None:
        pages = min(pages, self.held[key])
        self.held[key] -= pages
        self.free += pages

    @rule(key=KEYS, pages=st.integers(0, 12))
    def renew(self, key: int, pages: int) -> None:
        others = {other: self.promises.of(other) for other in range(5) if other != key}
        spare = self.free - sum(others.values())
        self.promises.renew(key, pages, self.free)
        assert self.promises.of(key) == min(pages, spare)
        assert all(self.promises.of(other) == promised for other, promised in others.items())

    @rule(key=KEYS)
    def forget(self, key: int) -> None:
        self.promises.forget(key)
        assert self.promises.of(key) == 0

    @invariant()
    def every_promise_can_be_kept(self) -> None:
        if not hasattr(self, "promises"):
            return
        self.promises.check_integrity(self.free)
        assert self.promises.total == sum(self.promises.of(key) for key in range(5))
        assert set(self.promises) == {key for key in range(5) if self.promises.of(key)}


TestPromises = PromiseMachine.TestCase
TestPromises.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
