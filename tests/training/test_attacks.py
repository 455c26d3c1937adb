"""Attacks: clean rows are recovered, shuffled rows are not, and what they compute is the model's own A."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft_oracle import ALL, base_model, load_peft, peft_quiet, write_random_adapter

from edge_client.tokenizer import EdgeTokenizer
from split_llama.demo import demo_model_path
from split_llama.errors import UsageError
from split_llama.lora import read_adapter
from training.attacks.measure import BUILT_IN, Intercepted, Recovery, make_attack, run_attack, shuffled
from training.attacks.public import PublicModel
from training.attacks.vocabulary import VocabularyMatching

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")


def a_output(folder: Path, p: int, ids: list[int]) -> torch.Tensor:
    """A's output by transformers."""
    with peft_quiet(), torch.inference_mode():
        states = base_model(folder)(torch.tensor([ids]), output_hidden_states=True).hidden_states
    found: torch.Tensor = states[p][0].clone()
    return found


def texts(vocab: int, count: int = 3, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [[1, *torch.randint(4, vocab, (length,), generator=generator).tolist()] for _ in range(count)]


def intercepted(folder: Path, p: int, sigma: float = 0.0) -> list[Intercepted]:
    generator = torch.Generator().manual_seed(1)
    seen = []
    for ids in texts(PublicModel.open(folder, p).config.vocab_size):
        rows = a_output(folder, p, ids)
        noise = sigma * torch.randn(rows.shape, generator=generator)
        noise[0] = 0
        seen.append(Intercepted(tuple(ids), rows + noise))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("p", [1, 2])
def test_vocabulary_matching_recovers_clean_rows_of_every_family(tiny_checkpoint, family: str, p: int) -> None:
    folder = tiny_checkpoint(family=family)  # mistral's window of 16 is shorter than the texts
    public = PublicModel.open(folder, p)
    recovery = run_attack("x", VocabularyMatching(public), intercepted(folder, p), public.bos_token_id)
    assert recovery == Recovery(72, 72)


@pytest.mark.parametrize("p", [1, 2])
def test_an_adapter_in_the_first_blocks_hinders_only_who_does_not_have_it(
    tiny_checkpoint, tmp_path: Path, p: int
) -> None:
    folder = tiny_checkpoint()
    adapter = write_random_adapter(tmp_path / "adapter", folder, target_modules=list(ALL))
    model = load_peft(folder, adapter)
    seen = []
    for ids in texts(320):
        with torch.inference_mode():
            rows = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[p][0]
        seen.append(Intercepted(tuple(ids), rows.clone()))
    knowing = VocabularyMatching(PublicModel.open(folder, p, read_adapter(adapter)))
    assert run_attack("x", knowing, seen, 1) == Recovery(72, 72)
    assert run_attack("x", VocabularyMatching(PublicModel.open(folder, p)), seen, 1).share < 0.5


def test_vocabulary_matching_in_pieces_finds_the_same(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint()
    public = PublicModel.open(folder, 2)
    seen = intercepted(folder, 2, sigma=1.5)
    whole = [VocabularyMatching(public).recover(text.rows) for text in seen]
    monkeypatch.setattr("training.attacks.vocabulary.CANDIDATES", 50)
    assert [VocabularyMatching(public).recover(text.rows) for text in seen] == whole


@pytest.mark.parametrize("name", BUILT_IN)
def test_shuffled_rows_are_not_recovered(tiny_checkpoint, name: str) -> None:
    folder = tiny_checkpoint()
    public = PublicModel.open(folder, 1)
    seen = intercepted(folder, 1)
    mixed = shuffled(seen, public.bos_token_id)
    assert all(torch.equal(text.rows[0], other.rows[0]) for text, other in zip(seen, mixed, strict=True))
    assert run_attack(name, make_attack(name, public), mixed, public.bos_token_id).share < 0.2


def test_nearest_embedding_reads_bare_embeddings(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    public = PublicModel.open(folder, 0)
    for name in BUILT_IN:
        assert run_attack(name, make_attack(name, public), intercepted(folder, 0), 1) == Recovery(72, 72)


def test_strong_noise_hinders_and_weak_noise_does_not(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    public = PublicModel.open(folder, 1)
    attack = VocabularyMatching(public)
    shares = [run_attack("x", attack, intercepted(folder, 1, sigma), 1).share for sigma in (0.025, 3.0)]
    assert shares[0] == 1.0
    assert shares[1] < 0.8


def test_the_demo_model_at_the_usual_noise_is_read() -> None:
    """As docs/privacy.md says of `mean-abs=0.02`."""
    folder = demo_model_path()
    public = PublicModel.open(folder, 1)
    ids = EdgeTokenizer.open(folder).encode("Emma takes the red ball and walks to the kitchen.")
    rows = a_output(folder, 1, ids)
    rows[1:] += 0.025 * torch.randn(rows[1:].shape, generator=torch.Generator().manual_seed(0))
    found = VocabularyMatching(public).recover(rows)
    assert found[1:] == ids[1:]


class Echo:
    """A plug-in that knows the first token only."""

    def __init__(self, public: PublicModel) -> None:
        self.token = public.bos_token_id

    def recover(self, rows: torch.Tensor) -> list[int]:
        rows.zero_()  # its argument is its own
        return [self.token or 0] * len(rows)


class Short(Echo):
    """Gives too few ids."""

    def recover(self, rows: torch.Tensor) -> list[int]:
        return [1]


class Fails(Echo):
    """Has a bug."""

    def recover(self, rows: torch.Tensor) -> list[int]:
        raise ValueError("a bug of its own")


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("attacks_of_a_user")
    for plugin in (Echo, Short, Fails):
        setattr(module, plugin.__name__, plugin)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_plug_in_attacks(tiny_checkpoint, plugins: str) -> None:
    folder = tiny_checkpoint()
    public, seen = PublicModel.open(folder, 1), intercepted(folder, 1)
    before = [text.rows.clone() for text in seen]
    name = f"{plugins}:Echo"
    assert run_attack(name, make_attack(name, public), seen, 1) == Recovery(0, 72)
    assert all(torch.equal(text.rows, rows) for text, rows in zip(seen, before, strict=True))


@pytest.mark.parametrize(("kind", "message"), [("Short", "25 token ids"), ("Fails", "a bug of its own")])
def test_a_broken_plug_in_is_named(tiny_checkpoint, plugins: str, kind: str, message: str) -> None:
    folder = tiny_checkpoint()
    public, name = PublicModel.open(folder, 1), f"{plugins}:{kind}"
    with pytest.raises(UsageError, match=message) as caught:
        run_attack(name, make_attack(name, public), intercepted(folder, 1), 1)
    assert name in caught.value.message


def test_the_attack_of_the_page_runs(tiny_checkpoint) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
    (code,) = [
        code for code in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M) if "class" in code
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    folder = tiny_checkpoint()
    public, seen = PublicModel.open(folder, 0), intercepted(folder, 0)
    found = names["FirstRow"](public).recover(seen[0].rows)
    assert found == [seen[0].ids[1]] * len(seen[0].ids)


def test_an_unknown_attack_is_refused_with_the_nearest(tiny_checkpoint) -> None:
    with pytest.raises(UsageError, match="did you mean 'vocabulary-matching'"):
        make_attack("vocabulary-match", PublicModel.open(tiny_checkpoint(), 1))
