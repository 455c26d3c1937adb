"""The parts of a client by themselves: its folder, its data, its settings, what it adds up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from edge_client.settings import EdgeSettings
from split_llama.errors import UsageError
from split_llama.settings import load_settings
from training.client.data import DataPart
from training.client.pipeline import Micro, add_up
from training.client.setup import ClientFolder
from training.compute.batch import Batch
from training.settings import SECTION, TrainSettings


def test_a_folder_keeps_its_clients_secret_to_itself(tmp_path: Path) -> None:
    with ClientFolder.open(tmp_path, "ann", "job-1") as first:
        assert len(first.secret) == 64
        assert (first.path / "member.json").stat().st_mode & 0o077 == 0
        with (
            pytest.raises(UsageError, match="another process is at work"),
            ClientFolder.open(tmp_path, "ann", "job-1"),
        ):
            pass
    with ClientFolder.open(tmp_path, "ann", "job-1") as again:
        assert again.secret == first.secret
    with pytest.raises(UsageError, match="holds a client of job job-1"), ClientFolder.open(tmp_path, "ann", "job-2"):
        pass
    with ClientFolder.open(tmp_path, "bob", "job-2") as other:
        assert other.secret != first.secret
    (tmp_path / "client-ann" / "member.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"), ClientFolder.open(tmp_path, "ann", "job-1"):
        pass


def test_shares_of_a_file_are_all_of_it_once(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"prompt": "p{n}", "response": "r"}}\n' for n in range(7)))
    shares = [DataPart("pairs", file, index, 3).read() for index in range(3)]
    assert sorted(example.prompt for share in shares for example in share) == [f"p{n}" for n in range(7)]
    assert len(DataPart("pairs", file).read()) == 7


@pytest.mark.parametrize("text", ["1", "a/2", "1/", "/2", "-1/2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="INDEX/OF"):
        DataPart.parse_share(text)
    with pytest.raises(UsageError, match="INDEX < OF"):
        DataPart("demo", None, *DataPart.parse_share("2/2"))


def test_micro_batches_are_added_in_their_order_without_the_bad_ones() -> None:
    batch = Batch.of([[1, 2, 3]], [[-100, 2, 3]])
    micros = [
        Micro(2.0, batch, {"w": torch.tensor([1.0])}),
        Micro(None, batch, None, "no number"),
        Micro(4.0, batch, {"w": torch.tensor([2.0])}),
    ]
    share = add_up(micros)
    assert (share.loss, share.targets, share.tokens, share.samples) == (None, 4, 6, 2)
    assert share.grads is not None
    assert share.grads["w"].item() == 3.0
    assert share.faults == ("no number",)
    assert add_up(micros[::2]).loss == 6.0
    assert add_up(micros[1:2]).grads is None
    # Adding must not write into what a micro-batch has.
    assert micros[0].grads is not None
    assert micros[0].grads["w"].item() == 1.0


def test_flags_go_before_environment_before_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[train]\nnoise = "0.1"\ndevice = "cpu"\nthreads = 3\n')
    environ = {"FL_LLAMA_TRAIN_NOISE": "0.2", "FL_LLAMA_TRAIN_THREADS": "2"}
    loaded = load_settings(TrainSettings, SECTION, {"noise": "0.3"}, environ=environ, config_file=file)
    assert (loaded.settings.noise, loaded.settings.threads, loaded.settings.device) == ("0.3", 2, "cpu")
    file.write_text('[train]\nnoize = "0.1"\n')
    with pytest.raises(UsageError, match="did you mean 'noise'"):
        load_settings(TrainSettings, SECTION, {}, environ={}, config_file=file)


@pytest.mark.parametrize(
    ("name", "value"), [("gradient_noise", -1), ("gradient_clip", 0), ("noise", "x"), ("clip", "0")]
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name.replace("_", ".")):
        load_settings(TrainSettings, SECTION, {name: value}, environ={}, config_file=Path(os.devnull))


def test_the_connection_has_the_clients_settings_and_the_jobs() -> None:
    settings = TrainSettings(server="http://a:1", api_key="k", noise="0", threads=2)
    edge = settings.edge("2,1", "int8")
    assert isinstance(edge, EdgeSettings)
    assert (edge.server, edge.api_key, edge.noise, edge.threads) == ("http://a:1", "k", "0", 2)
    assert (edge.partition, edge.codec, edge.speculate) == ("2,1", "int8", "off")
