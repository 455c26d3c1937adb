"""The runner on a CUDA device: graphs, pinned staging and overlap give what plain PyTorch gives there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from serving.passes import HostPasses
from serving.steps import Step
from split_llama.config import BlockRange, ModelConfig
from split_llama.engine.engine import Engine
from split_llama.engine.low_rank import NO_ADAPTER, AdapterBank
from split_llama.errors import ServerFault
from split_llama.layers import RMSNorm, Segment
from split_llama.lora import TARGETS, Adapter, LoraConfig, lora_shapes
from split_llama.wire.codec import Codec, decode_rows, encode_rows
from split_llama.wire.frame import Frame
from split_llama.wire.step import build_step

BLOCKS = BlockRange(1, 4)
WIDTH = 512
TREE = (0b1, 0b11, 0b101, 0b1101, 0b10001)
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make_segment(device: torch.device, dtype: torch.dtype, **fields: Any) -> Segment:
    """Blocks with random weights, head_dim 128."""
    raw = {
        "model_type": "mistral",
        "hidden_size": WIDTH,
        "intermediate_size": 1376,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
    }
    segment = Segment(ModelConfig.from_hf(raw | fields), BLOCKS, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    for module in segment.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return segment


def random_adapter(segment: Segment, lora: LoraConfig) -> Adapter:
    generator = torch.Generator().manual_seed(lora.r)
    shapes = lora_shapes(segment.config, lora, segment.blocks)
    # So that an update is about half as large as what it is added to.
    scale = {name: shape[1] ** -0.5 for name, shape in shapes.items()}
    tensors = {name: torch.randn(shape, generator=generator) * scale[name] for name, shape in shapes.items()}
    return Adapter(lora, tensors)


class Rig:
    """Two engines over the same blocks: in plain PyTorch, and through the runner."""

    def __init__(self, device: torch.device, dtype: torch.dtype, **fields: Any) -> None:
        from serving.device.executor import TritonExecutor
        from serving.device.graphs import Most
        from serving.device.runner import Runner

        engine = {name: fields.pop(name) for name in ("kv_dtype",) if name in fields}
        graphs, adapters = fields.pop("graphs", True), fields.pop("adapters", ())
        segment = make_segment(device, dtype, **fields)
        bank = AdapterBank(segment, [random_adapter(segment, lora) for lora in adapters]) if adapters else None
        self.oracle, self.engine = (Engine(segment, num_pages=512, adapters=bank, **engine) for _ in range(2))
        most = Most(rows=2048, sequences=64)
        self.runner = Runner(segment, self.engine.cache, most, adapters=bank, graphs=graphs)
        self.engine.executor = TritonExecutor(self.runner)
        self.device, self.dtype = device, dtype

    def pair(self, blocks: BlockRange = BLOCKS, adapter: int = NO_ADAPTER) -> list[Any]:
        return [engine.sequence(blocks, 4096, adapter) for engine in (self.oracle, self.engine)]

    def compare(self, both: list[list[Any]]) -> None:
        states = torch.randn(sum(run.count for run in both[0]), WIDTH, device=self.device).to(self.dtype)
        want = self.oracle.run(self.oracle.plan(both[0]), states).float()
        got = self.engine.run(self.engine.plan(both[1]), states).float()
        assert got.isfinite().all()
        assert (got - want).norm() / want.norm() < ERRORS[self.dtype]

    def step(self, pairs: list[list[Any]], counts: list[int]) -> None:
        self.compare([[pair[side].append(n) for pair, n in zip(pairs, counts, strict=True)] for side in range(2)])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def no_hidden_waits(device: torch.device) -> Iterator[Callable[[bool], None]]:
    """Switch: whatever would make the host wait for the device without saying so raises."""

    def switch(on: bool) -> None:
        with warnings.catch_warnings():
            # It warns that it does not see everything.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
def test_a_graph_serves_other_lengths_than_it_was_captured_with(device: torch.device, dtype: torch.dtype) -> None:
    rig = Rig(device, dtype)
    pairs = [rig.pair() for _ in range(5)]
    rig.step(pairs, [3, 20, 1, 130, 7])
    for _ in range(3):
        rig.step(pairs, [1] * 5)
    captured = rig.runner.graphs.captured
    assert len(captured) == 1
    rig.step(pairs, [300, 100, 15, 64, 200])
    rig.step(pairs, [1] * 5)
    rig.step(pairs[:3], [1] * 3)
    for _ in range(3):
        rig.step([*pairs[:4], rig.pair()], [1] * 5)
    assert set(captured) <= set(rig.runner.graphs.captured)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
def test_rows_of_many_adapters_and_none(device: torch.device, dtype: torch.dtype, graphs: bool) -> None:
    rig = Rig(device, dtype, graphs=graphs, adapters=[LoraConfig(16, 8), LoraConfig(40, 20, target_modules=TARGETS)])
    pairs = [rig.pair(adapter=0), rig.pair(), rig.pair(BlockRange(2, 4), 1), rig.pair(adapter=1)]
    rig.step(pairs, [130, 5, 17, 1])
    for _ in range(4):
        rig.step(pairs, [1] * 4)
    rig.step(pairs[1:2], [1])


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 64}, {"model_type": "qwen3"}], ids=str)
def test_prompts_decodes_drafts_and_other_blocks(device: torch.device, fields: dict[str, Any], graphs: bool) -> None:
    rig = Rig(device, torch.bfloat16, graphs=graphs, **fields)
    pairs = [rig.pair(), rig.pair(BlockRange(2, 4)), rig.pair(BlockRange(1, 2))]
    drafting = rig.pair()
    rig.step([*pairs, drafting], [700, 90, 33, 17])
    for accepted in ((0, 2, 3), (0,), (0, 1)):
        rig.compare([[*(pair[side].append(1) for pair in pairs), drafting[side].append_draft(TREE)] for side in (0, 1)])
        for sequence in drafting:
            sequence.accept(accepted)
    rig.step([*pairs, drafting], [1] * 4)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_pages(device: torch.device, kv_dtype: torch.dtype) -> None:
    rig = Rig(device, torch.bfloat16, kv_dtype=kv_dtype)
    pairs = [rig.pair() for _ in range(3)]
    rig.step(pairs, [100, 5, 30])
    for _ in range(3):
        rig.step(pairs, [1] * 3)


def test_warm_up_leaves_pages_alone(device: torch.device) -> None:
    rig = Rig(device, torch.bfloat16)
    rig.engine.cache.k.fill_(7.0)
    rig.runner.warm_up(seconds=5.0)
    assert torch.all(rig.engine.cache.k == 7.0)
    assert rig.runner.graphs.captured


def make_step(seq: int, count: int, codec: Codec, scale: float = 1.0) -> Step:
    states = np.random.default_rng(seq).standard_normal((count, WIDTH)).astype(np.float32) * scale
    frame = build_step(handle=1, seq=seq, first=0, count=count, codec=codec, rows=encode_rows(codec, states))
    return Step.from_frame(frame, WIDTH, 2048, 0.0)


def test_passes_answer_what_passes_on_the_host_answer(device: torch.device) -> None:
    from serving.device.passes import DevicePasses

    rig = Rig(device, torch.float16)
    sides = (HostPasses(rig.oracle), DevicePasses(rig.runner))
    pairs = [rig.pair() for _ in Codec]
    for turn, count in enumerate((40, 1, 1, 1)):
        steps = [make_step(10 * turn + codec, count, codec) for codec in Codec]
        steps.append(make_step(10 * turn + 9, 1, Codec.FP32, scale=1e30))
        lost = rig.pair()
        outcomes = []
        for side, (passes, engine) in enumerate(zip(sides, (rig.oracle, rig.engine), strict=True)):
            runs = [*(pair[side].append(count) for pair in pairs), lost[side].append(1)]
            outcomes.append(passes.finish(passes.start(engine.plan(runs), passes.stage(steps), range(len(steps)))))
        for step, *replies in zip(steps[:-1], *(outcome.replies for outcome in outcomes), strict=False):
            rows = [np.empty((step.count, WIDTH), np.float32) for _ in replies]
            for reply, out in zip(replies, rows, strict=True):
                assert isinstance(reply, Frame)
                decode_rows(step.codec, reply.payload, out)
            assert np.linalg.norm(rows[1] - rows[0]) / np.linalg.norm(rows[0]) < 2e-2
        assert all(isinstance(outcome.replies[-1], ServerFault) for outcome in outcomes)


def test_the_host_waits_once_per_pass(
    device: torch.device, no_hidden_waits: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.device import device as module
    from serving.device.passes import DevicePasses

    rig = Rig(device, torch.bfloat16)
    rig.runner.warm_up(seconds=20.0)
    passes = DevicePasses(rig.runner)
    sequences = [rig.pair()[1] for _ in range(4)]
    waits: list[object] = []
    wait = module._CudaMark.wait

    def counted(mark: Any) -> None:
        waits.append(mark)
        wait(mark)

    monkeypatch.setattr(module._CudaMark, "wait", counted)
    # The first prompts and the first edits compile their kernels, which may wait.
    for turn, count in enumerate((20, 1, 1, 20, 1, 1)):
        steps = [make_step(10 * turn + index, count, Codec.INT8) for index in range(4)]
        plan = rig.engine.plan([sequence.append(count) for sequence in sequences])
        no_hidden_waits(turn >= 3)
        running = passes.start(plan, passes.stage(steps), range(4))
        assert not waits
        outcome = passes.finish(running)
        no_hidden_waits(False)
        assert len(waits) == 1
        waits.clear()
        assert all(isinstance(reply, Frame) for reply in outcome.replies)
        assert 0 < outcome.model_seconds < 60


def test_two_passes_in_flight_are_those_of_one_after_the_other(device: torch.device) -> None:
    from serving.device.passes import DevicePasses

    rig = Rig(device, torch.bfloat16)
    rig.runner.warm_up(seconds=20.0)
    steps = [make_step(seq, count, Codec.FP32) for seq, count in enumerate((50, 1, 1, 1, 1, 1))]
    answers = []
    for depth in (1, 2):
        passes, sequence = DevicePasses(rig.runner), rig.pair()[1]
        running, replies = [], []
        for step in steps:
            if len(running) == depth:
                replies += passes.finish(running.pop(0)).replies
            plan = rig.engine.plan([sequence.append(step.count)])
            running.append(passes.start(plan, passes.stage([step]), [0]))
        for one in running:
            replies += passes.finish(one).replies
        answers.append([bytes(reply.payload) for reply in replies])
    assert answers[0] == answers[1]
