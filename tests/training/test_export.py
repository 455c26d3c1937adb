"""Export: the folder in plain PEFT gives what A, B and C with their adapters give; whatever is wrong is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import load_peft, logits

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.errors import AdapterMismatch, CheckpointError, UsageError
from split_llama.load import load_embedding, load_head, load_segment
from split_llama.lora import Adapter, LoraConfig, adapter_bytes, init_lora, read_adapter, write_adapter
from training.commands.export import main
from training.compute.lora import Group
from training.compute.tape import Trunk, finish
from training.export import Part, merge_parts
from training.job_config import JobConfig

LORA = LoraConfig(r=4, alpha=8.0, dropout=0.1)
IDS = [1, 17, 93, 140, 5, 201, 33, 77]
CPU = torch.device("cpu")


def random_adapter(folder: Path, lora: LoraConfig = LORA, seed: int = 0) -> Adapter:
    """One over the whole model, `lora_B` too, so that it matters."""
    config = Checkpoint.open(folder).config
    tensors = init_lora(config, lora, BlockRange(0, config.num_hidden_layers), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return Adapter(lora, tensors)


def split_logits(folder: Path, partition: Partition, adapter: Adapter) -> torch.Tensor:
    """A, B and C, each with its part of the adapter, by what training runs."""
    checkpoint = Checkpoint.open(folder)
    count = checkpoint.config.num_hidden_layers
    x = load_embedding(checkpoint, dtype=torch.float32, device=CPU)(torch.tensor(IDS))
    for blocks in (partition.segment_a(count), partition.segment_b(count), partition.segment_c(count)):
        trunk = Trunk(load_segment(checkpoint, blocks, dtype=torch.float32, device=CPU), adapter.lora)
        group = Group((len(IDS),), adapter.part(blocks).tensors)
        x = finish(trunk.forward(x, [group], keep=False)).output
    found: torch.Tensor = load_head(checkpoint, dtype=torch.float32, device=CPU)(x)
    return found.detach()


class World:
    """A checkpoint, and what a job leaves: a client's folder with A and C, and the server's file with B."""

    def __init__(self, folder: Path, model: Path, lora: LoraConfig = LORA, partition: str = "1,1") -> None:
        self.model, self.out = model, folder / "merged"
        self.partition = Partition.parse(partition)
        self.adapter = random_adapter(model, lora)
        count = Checkpoint.open(model).config.num_hidden_layers
        a, self.b, c = (
            self.adapter.part(blocks)
            for blocks in (
                self.partition.segment_a(count),
                self.partition.segment_b(count),
                self.partition.segment_c(count),
            )
        )
        self.client, self.shared = folder / "client-1", folder / "b.safetensors"
        self.write_client(Adapter(lora, {**a.tensors, **c.tensors}))
        self.write_shared(self.b)

    def write_client(self, adapter: Adapter) -> None:
        write_adapter(self.client / "adapter", adapter, str(self.model))

    def write_shared(self, adapter: Adapter) -> None:
        self.shared.write_bytes(adapter_bytes(adapter, "the server's name of it"))

    def export(self, *more: str) -> int:
        return main(["--client", str(self.client), "--shared", str(self.shared), "--out", str(self.out), *more])


@pytest.fixture
def world(tmp_path: Path, tiny_checkpoint: Any) -> World:
    return World(tmp_path, tiny_checkpoint())


@pytest.mark.parametrize(
    ("family", "lora", "partition"),
    [
        ("llama", LORA, "1,1"),
        ("qwen3", LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj", "gate_proj", "down_proj")), "2,1"),
        ("mistral", LoraConfig(2, 6.0, 0.0, ("o_proj", "up_proj"), use_rslora=True), "1,2"),
    ],
)
def test_plain_peft_gives_the_logits_of_the_three_segments(
    tmp_path: Path, tiny_checkpoint: Any, family: str, lora: LoraConfig, partition: str
) -> None:
    world = World(tmp_path, tiny_checkpoint(family=family, layers=5), lora, partition)
    assert world.export() == 0
    expected = split_logits(world.model, world.partition, world.adapter)
    found = logits(load_peft(world.model, world.out), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    bare = split_logits(world.model, world.partition, Adapter(lora, {}))
    assert float((bare - expected).abs().max()) > 0.1, "the adapter has to matter"


@pytest.mark.parametrize("segments", ["B", "A,B", "A,C"])
def test_segments_without_adapters_stay_the_base(world: World, segments: str) -> None:
    wanted = segments.split(",")
    spans = {"A": BlockRange(0, 1), "B": BlockRange(1, 3), "C": BlockRange(3, 4)}
    kept = {name: tensor for each in wanted for name, tensor in world.adapter.part(spans[each]).tensors.items()}
    part = Adapter(LORA, kept)
    file = world.client.parent / "all.safetensors"
    file.write_bytes(adapter_bytes(part, str(world.model)))
    flags = ["--model", str(world.model), "--segments", segments, "--partition", "1,1"]
    assert main(["--shared", str(file), "--out", str(world.out), *flags]) == 0
    found = logits(load_peft(world.model, world.out), IDS)
    torch.testing.assert_close(found, split_logits(world.model, world.partition, part), rtol=1e-5, atol=1e-5)


def test_what_is_written_is_what_was_trained(world: World) -> None:
    world.export()
    written = read_adapter(world.out)
    assert written.lora == LoraConfig(4, 8.0)  # dropout is over
    assert set(written.tensors) == set(world.adapter.tensors)
    assert all(torch.equal(tensor, world.adapter.tensors[name]) for name, tensor in written.tensors.items())
    assert str(world.model) in (world.out / "adapter_config.json").read_text()


def test_parties_that_share_all_may_each_have_a_copy(world: World) -> None:
    world.write_shared(world.adapter)
    assert world.export() == 0
    assert set(read_adapter(world.out).tensors) == set(world.adapter.tensors)


def test_copies_that_differ_are_refused(world: World) -> None:
    tensors = dict(world.adapter.tensors)
    name = "model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[name] = tensors[name] + 1e-3
    world.write_shared(Adapter(LORA, tensors))
    with pytest.raises(AdapterMismatch, match=name):
        world.export()
    assert not world.out.exists()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(2, 8.0), "rank r"),
        (LoraConfig(4, 4.0), "alpha"),
        (LoraConfig(4, 8.0, 0.0, ("q_proj",)), "target_modules"),
        (LoraConfig(4, 8.0, use_rslora=True), "rank-stabilised"),
    ],
)
def test_parts_of_different_jobs_are_refused(world: World, lora: LoraConfig, message: str) -> None:
    config = Checkpoint.open(world.model).config
    world.write_shared(Adapter(lora, init_lora(config, lora, BlockRange(1, 3), 0)))
    with pytest.raises(AdapterMismatch, match=message):
        world.export()


def test_a_missing_block_is_named(world: World) -> None:
    world.write_shared(world.adapter.part(BlockRange(1, 2)))
    with pytest.raises(AdapterMismatch, match=r"no part has the adapter of block 2;"):
        world.export()


def test_a_surplus_block_is_named(world: World) -> None:
    with pytest.raises(AdapterMismatch, match=r"block 0, which belongs to no segment"):
        world.export("--segments", "B,C", "--partition", "1,1")


def test_a_tensor_that_is_missing_in_a_block_is_named(world: World) -> None:
    name = "model.layers.1.self_attn.v_proj.lora_A.weight"
    world.write_shared(Adapter(LORA, {key: tensor for key, tensor in world.b.tensors.items() if key != name}))
    with pytest.raises(AdapterMismatch, match=name):
        world.export()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(world: World, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in world.b.tensors.items()}
    name = "model.layers.2.self_attn.o_proj.lora_A.weight"
    tensors[name][0, 0] = value
    world.write_shared(Adapter(LORA, tensors))
    with pytest.raises(AdapterMismatch, match=name):
        world.export()


def test_an_adapter_of_another_model_is_refused(world: World, tiny_checkpoint: Any) -> None:
    other = tiny_checkpoint(hidden=48)
    with pytest.raises(AdapterMismatch, match="shape"):
        world.export("--model", str(other))


def test_a_folder_in_use_is_left_alone_unless_forced(world: World) -> None:
    world.out.mkdir()
    note = world.out / "note.txt"
    note.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        world.export()
    assert [path.name for path in world.out.iterdir()] == ["note.txt"]
    assert world.export("--force") == 0
    assert note.read_text() == "mine"
    assert len(read_adapter(world.out).tensors) == len(world.adapter.tensors)


def test_a_file_in_the_way_stays_whatever_is_said(world: World) -> None:
    world.out.write_text("a file")
    with pytest.raises(UsageError, match="not an empty folder"):
        world.export("--force")
    assert world.out.read_text() == "a file"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Give a run's folder"),
        (["--shared", "b", "--job", "j"], "give one of them"),
        (["--job", "j", "--server", "http://127.0.0.1:1"], "--job-key"),
    ],
)
def test_unclear_requests_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(["--out", str(tmp_path / "out"), *flags])


def test_a_model_nobody_names_is_asked_for(world: World) -> None:
    with pytest.raises(UsageError, match="--model"):
        main(["--shared", str(world.shared), "--out", str(world.out)])


def test_segments_without_a_partition_are_refused(world: World) -> None:
    with pytest.raises(UsageError, match="--partition"):
        world.export("--segments", "B")
    with pytest.raises(UsageError, match="'D'"):
        world.export("--segments", "D", "--partition", "1,1")


def test_a_damaged_file_is_refused(world: World) -> None:
    world.shared.write_bytes(world.shared.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        world.export()
    world.shared.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        world.export()


def test_merging_nothing_is_no_export(world: World) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        merge_parts([], Checkpoint.open(world.model).config, range(4))
    parts = [Part("b", world.b)]
    assert len(merge_parts(parts, Checkpoint.open(world.model).config, (1, 2)).tensors) == len(world.b.tensors)


class JobServer:
    """Answers for one job as a split-server does."""

    def __init__(self, config: JobConfig, adapter: bytes) -> None:
        self.config, self.adapter = config, adapter
        self.keys: list[str | None] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.keys.append(request.headers["X-FL-Job-Key"])
        status = {"id": "j1", "config": json.loads(self.config.model_dump_json()), "state": "done"}
        known = {"/v1/jobs/j1": json.dumps(status).encode(), "/v1/jobs/j1/adapter": self.adapter}
        body = known[request.path]
        request.send_response(200)
        request.send_header("Content-Type", "application/json" if body[:1] == b"{" else "application/octet-stream")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@contextmanager
def serving(job: JobServer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            job.answer(self)

        def log_message(self, *_: object) -> None:
            """Nobody wants to know."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("segments", [("A", "B", "C"), ("B",)])
def test_what_all_share_is_fetched_from_the_server(world: World, segments: tuple[str, ...]) -> None:
    config = JobConfig.parse({"partition": "1,1", "lora": {"r": 4, "alpha": 8.0, "segments": list(segments)}})
    job = JobServer(config, world.shared.read_bytes())
    client = ["--client", str(world.client)] if "A" in segments else []
    with serving(job) as url:
        fixed = ["--server", url, "--job", "j1", "--job-key", "flj-secret", "--model", str(world.model)]
        assert main([*fixed, *client, "--out", str(world.out)]) == 0
    assert set(job.keys) == {"flj-secret"}
    expected = world.adapter if "A" in segments else world.b
    assert set(read_adapter(world.out).tensors) == set(expected.tensors)


def test_a_base_that_cannot_be_opened_is_asked_for(world: World) -> None:
    write_adapter(world.client / "adapter", read_adapter(world.client / "adapter"), "./moved-away")
    with pytest.raises(UsageError, match=r"'./moved-away' as their base.*--model"):
        world.export()


class Run:
    """What `split-train run` leaves, of clients that have A and C of their own or share them."""

    def __init__(self, world: World, shared: str = "B", segments: tuple[str, ...] = ("A", "B", "C")) -> None:
        self.folder, self.world = world.out.parent / "run", world
        lora = {"r": 4, "alpha": 8.0, "segments": list(segments)}
        job = JobConfig.parse({"partition": "1,1", "clients": 2, "shared": shared, "lora": lora})
        facts = {"job": "j1", "model": str(world.model), "config": job.model_dump(mode="json")}
        self.folder.mkdir()
        (self.folder / "job.json").write_text(json.dumps(facts))
        own = read_adapter(world.client / "adapter")
        for name, scale in (("0", 1.0), ("1", 2.0 if shared == "B" else 1.0)):
            tensors = {key: scale * tensor for key, tensor in own.tensors.items()}
            write_adapter(self.folder / f"client-{name}" / "adapter", Adapter(LORA, tensors), "a name of the server's")

    def share(self, adapter: Adapter) -> None:
        (self.folder / "shared.safetensors").write_bytes(adapter_bytes(adapter, "x"))

    def export(self, *more: str) -> Adapter:
        assert main([str(self.folder), "--out", str(self.world.out), *more]) == 0
        return read_adapter(self.world.out)


def test_a_run_of_private_ends_is_exported_client_by_client(world: World) -> None:
    run = Run(world)
    run.share(world.b)
    with pytest.raises(UsageError, match=r"--client 0\|1"):
        run.export()
    first, second = run.export("--client", "0"), run.export("--client", "1", "--force")
    for name, tensor in world.adapter.tensors.items():
        assert torch.equal(first.tensors[name], tensor)
        assert torch.equal(second.tensors[name], tensor if name in world.b.tensors else 2 * tensor)
    with pytest.raises(UsageError, match="no client '2'"):
        run.export("--client", "2", "--force")


def test_a_run_that_shares_all_needs_no_client(world: World) -> None:
    run = Run(world, shared="A,B,C")
    run.share(world.adapter)
    assert set(run.export().tensors) == set(world.adapter.tensors)
    assert set(run.export("--client", "1", "--force").tensors) == set(world.adapter.tensors)


def test_a_run_of_the_ends_alone_has_nothing_shared(world: World) -> None:
    exported = Run(world, segments=("A", "C")).export("--client", "0")
    assert set(exported.tensors) == set(world.adapter.tensors) - set(world.b.tensors)


def test_a_run_under_way_is_left_alone(world: World) -> None:
    run = Run(world)
    with pytest.raises(UsageError, match="not come to its end"):
        run.export("--client", "0")
    (run.folder / "job.json").unlink()
    with pytest.raises(UsageError, match=r"no job\.json"):
        run.export()
    with pytest.raises(UsageError, match="leave out --shared"):
        run.export("--shared", str(world.shared))
