"""Passes on the device answer what passes on the host answer, from payload to reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from serving.passes import HostPasses, Outcome
from serving.steps import Step
from split_llama.errors import NonFiniteStates, ServerFault
from split_llama.wire.codec import Codec, decode_rows, encode_rows
from split_llama.wire.frame import Flag, Frame
from split_llama.wire.step import build_step

WIDTH = 32
MakeRig = Callable[..., Any]


class Pair:
    """The same steps through passes on the host and on the device."""

    def __init__(self, rig: Any) -> None:
        from serving.device.passes import DevicePasses

        self.rig = rig
        self.host, self.device = HostPasses(rig.oracle), DevicePasses(rig.runner)
        self.seq = 0

    def step(self, states: np.ndarray[Any, Any], codec: Codec, flags: int = 0, tree: tuple[int, ...] = ()) -> Step:
        self.seq += 1
        frame = build_step(
            handle=1,
            seq=self.seq,
            first=self.seq,
            count=len(states),
            codec=codec,
            rows=encode_rows(codec, states),
            flags=flags,
            tree=tree or None,
        )
        return Step.from_frame(frame, WIDTH, 1000, 0.0)

    def random(self, count: int, codec: Codec = Codec.FP32, flags: int = 0) -> Step:
        rows = np.random.default_rng(self.seq).standard_normal((count, WIDTH)).astype(np.float32)
        return self.step(rows, codec, flags)

    def run(self, steps: list[Step], both: list[list[Any]], kept: list[int] | None = None) -> tuple[Outcome, Outcome]:
        """Run steps whose runs are `both[0]` on the host, `both[1]` on the device."""
        kept = list(range(len(steps))) if kept is None else kept
        outcomes = []
        for passes, engine, runs in zip(
            (self.host, self.device), (self.rig.oracle, self.rig.device), both, strict=True
        ):
            staged = passes.stage(steps)
            outcomes.append(passes.finish(passes.start(engine.plan(runs), staged, kept)))
        return outcomes[0], outcomes[1]


def check_same(steps: list[Step], want: Outcome, got: Outcome) -> None:
    """Replies are alike in all but the last digits, or one level of int8."""
    assert got.model_seconds >= 0
    for step, on_host, on_device in zip(steps, want.replies, got.replies, strict=True):
        assert isinstance(on_host, Frame)
        assert isinstance(on_device, Frame)
        assert on_device.header() == on_host.header()
        rows = [np.empty((step.num_replies, WIDTH), np.float32) for _ in range(2)]
        for reply, out in zip((on_host, on_device), rows, strict=True):
            if len(reply.payload):
                decode_rows(step.codec, reply.payload, out)
        tolerance = {Codec.FP32: 2e-4, Codec.FP16: 1e-2, Codec.BF16: 1e-1, Codec.INT8: 1e-1}[step.codec]
        np.testing.assert_allclose(rows[1], rows[0], rtol=tolerance / 10, atol=tolerance)


@pytest.mark.parametrize("kernels", [True, False])
def test_every_codec_and_every_kind_of_reply(make_rig: MakeRig, kernels: bool) -> None:
    pair = Pair(make_rig(kernels=kernels))
    sequences = [pair.rig.pair() for _ in range(4)]
    flags = [0, int(Flag.REPLY_LAST), int(Flag.REPLY_NONE), 0]
    for count in (3, 1, 1):
        steps = [pair.random(count, codec, flag) for codec, flag in zip(Codec, flags, strict=True)]
        both = [[sequence[side].append(count) for sequence in sequences] for side in range(2)]
        check_same(steps, *pair.run(steps, both))
    assert len(pair.rig.runner.graphs.captured) == 1


def test_a_bad_step_is_left_out_and_the_others_run(make_rig: MakeRig) -> None:
    pair = Pair(make_rig())
    sequences = [pair.rig.pair() for _ in range(2)]
    bad = pair.random(2)
    spoilt = np.frombuffer(bad.rows, np.float32).copy()
    spoilt[5] = np.inf
    bad.rows = spoilt.tobytes()
    steps = [pair.random(2, Codec.FP16), bad, pair.random(3, Codec.INT8)]
    errors = pair.device.stage(steps).errors
    assert [isinstance(error, NonFiniteStates) for error in errors] == [False, True, False]
    both = [[sequences[0][side].append(2), sequences[1][side].append(3)] for side in range(2)]
    check_same([steps[0], steps[2]], *pair.run(steps, both, kept=[0, 2]))


def test_two_steps_of_a_session_share_a_run(make_rig: MakeRig) -> None:
    pair = Pair(make_rig())
    sequence = pair.rig.pair()
    steps = [pair.random(2, Codec.FP16), pair.random(3, Codec.FP32, int(Flag.REPLY_LAST))]
    both = [[side.append(5)] for side in sequence]
    check_same(steps, *pair.run(steps, both))


def test_outputs_that_are_not_finite_fail_their_step_alone(make_rig: MakeRig) -> None:
    pair = Pair(make_rig(dtype=torch.float16))
    sequences = [pair.rig.pair() for _ in range(3)]
    states = np.random.default_rng(1).standard_normal((2, WIDTH)).astype(np.float32)
    # Finite on the wire, too large for the blocks.
    steps = [pair.step(states, Codec.FP32), pair.step(states * 1e30, Codec.FP32), pair.step(states, Codec.BF16)]
    both = [[sequence[side].append(2) for sequence in sequences] for side in range(2)]
    want, got = pair.run(steps, both)
    for outcome in (want, got):
        assert [isinstance(reply, ServerFault) for reply in outcome.replies] == [False, True, False]
    assert str(got.replies[1]) == str(want.replies[1])


def test_two_passes_run_at_a_time(make_rig: MakeRig) -> None:
    rig = make_rig()
    pair = Pair(rig)
    sequence = rig.pair()
    want, running = [], []
    steps = [pair.random(count) for count in (5, 1, 1, 1, 1)]
    for step in steps:
        staged = pair.host.stage([step])
        want.append(pair.host.finish(pair.host.start(rig.oracle.plan([sequence[0].append(step.count)]), staged, [0])))
    got = []
    for step in steps:
        staged = pair.device.stage([step])
        if len(running) == pair.device.depth:
            got.append(pair.device.finish(running.pop(0)))
        running.append(pair.device.start(rig.device.plan([sequence[1].append(step.count)]), staged, [0]))
    got += [pair.device.finish(one) for one in running]
    for step, one, other in zip(steps, want, got, strict=True):
        check_same([step], one, other)


def test_steps_staged_too_long_ago_are_not_run(make_rig: MakeRig) -> None:
    rig = make_rig()
    pair = Pair(rig)
    staged = [pair.device.stage([pair.random(1)]) for _ in range(4)]
    plan = rig.device.plan([rig.pair()[1].append(1)])
    with pytest.raises(AssertionError, match="too long ago"):
        pair.device.start(plan, staged[0], [0])
    running = pair.device.start(plan, staged[3], [0])
    assert isinstance(pair.device.finish(running).replies[0], Frame)


def test_a_pass_waits_for_the_device_once(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.device import device

    waits = []
    monkeypatch.setattr(device._HostMark, "wait", lambda mark: waits.append(mark))
    rig = make_rig()
    pair = Pair(rig)
    sequence = rig.pair()[1]
    for count in (4, 1, 1):
        staged = pair.device.stage([pair.random(count)])
        running = pair.device.start(rig.device.plan([sequence.append(count)]), staged, [0])
        assert waits == []
        pair.device.finish(running)
        assert len(waits) == 1
        waits.clear()


def test_a_draft_tree_and_its_accept(make_rig: MakeRig) -> None:
    pair = Pair(make_rig())
    sequence = pair.rig.pair()
    tree = (0b1, 0b11, 0b101, 0b1101)
    check_same([step := pair.random(9)], *pair.run([step], [[side.append(9)] for side in sequence]))
    rows = np.random.default_rng(9).standard_normal((4, WIDTH)).astype(np.float32)
    draft = pair.step(rows, Codec.FP32, tree=tree)
    check_same([draft], *pair.run([draft], [[side.append_draft(tree)] for side in sequence]))
    for side in sequence:
        side.accept((0, 2, 3))
    check_same([step := pair.random(1)], *pair.run([step], [[side.append(1)] for side in sequence]))
