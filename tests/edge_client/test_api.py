"""The Python API against a real server: tokens, logits and states as transformers has them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import live_server
from tiny_models import TinyModel, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_client import SplitModelForCausalLM
from edge_client.api import GenerateOutput
from edge_client.api.batch import Batch
from split_llama.errors import ContextExceeded, DeadlineExceeded, ServerUnreachable, UsageError

PROMPTS = [[1, 5, 9, 70, 33], [1, 8], [1, 301, 40, 7, 7, 12, 90, 41, 250]]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("api") / "tiny", TinyModel())


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with live_server(folder, "--dtype", "float32", "--allowed-partitions", "0,0") as url:
        yield url


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("api-state")
    plain = {"noise": "0", "codec": "fp32", "device": "cpu", "threads": 1}
    return plain | {"cache_dir": base / "cache", "state_dir": base / "state"}


@pytest.fixture(scope="module")
def model(url: str, state: dict[str, Any]) -> Iterator[SplitModelForCausalLM]:
    with SplitModelForCausalLM.from_server(url, partition=(2, 1), **state) as model:
        yield model


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batch = Batch.read(rows)
    return batch.ids(pad), batch.mask()


@pytest.mark.parametrize("pad", [0, 3])
def test_a_left_padded_batch_equals_transformers(model: SplitModelForCausalLM, whole: Any, pad: int) -> None:
    ids, mask = padded(PROMPTS, pad)
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=40, pad_token_id=pad)
    theirs = whole.generate(ids, attention_mask=mask, max_new_tokens=40, pad_token_id=pad, do_sample=False)
    assert isinstance(ours, torch.Tensor)
    assert ours.tolist() == theirs.tolist()


def test_lists_max_length_and_other_ends(model: SplitModelForCausalLM, whole: Any) -> None:
    whole_ids = whole.generate(torch.tensor(PROMPTS[:1]), max_length=30, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(PROMPTS[0], max_length=30, eos_token_id=None), whole_ids)
    end = int(whole_ids[0, 12])
    theirs = whole.generate(torch.tensor(PROMPTS[:1]), max_length=30, eos_token_id=[end], pad_token_id=0)
    assert torch.equal(model.generate(PROMPTS[:1], max_length=30, eos_token_id=end), theirs)


def test_repetition_penalty_and_stop_strings_equal_transformers(
    model: SplitModelForCausalLM, whole: Any, folder: Path
) -> None:
    ids = torch.tensor(PROMPTS[:1])
    options: dict[str, Any] = {"max_new_tokens": 40, "repetition_penalty": 1.3, "eos_token_id": None}
    theirs = whole.generate(ids, pad_token_id=0, **options)
    assert torch.equal(model.generate(ids, **options), theirs)
    pieces = [model.tokenizer.decode(theirs[0, at : at + 2]) for at in range(10, 40)]
    stop = next(piece for piece in pieces if piece.isascii() and len(piece.strip()) > 2)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    theirs = whole.generate(ids, pad_token_id=0, stop_strings=stop, tokenizer=tokenizer, **options)
    assert theirs.shape[1] < 45
    assert torch.equal(model.generate(ids, stop_strings=stop, **options), theirs)


def test_logits_scores_and_final_states_are_close_to_transformers(model: SplitModelForCausalLM, whole: Any) -> None:
    ids, mask = padded(PROMPTS)
    asked: dict[str, Any] = {
        "max_new_tokens": 12,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    ours = model.generate(ids, mask, **asked)
    theirs = whole.generate(ids, attention_mask=mask, **asked)
    assert isinstance(ours, GenerateOutput)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.logits is not None
    assert ours.scores is not None
    assert ours.hidden_states is not None
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), **TOLERANCE)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), **TOLERANCE)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 12
    assert [len(step) for step in ours.hidden_states] == [1] * 12
    for our_step, their_step in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        seen = mask.bool() if our_step[-1].shape[1] > 1 else torch.ones(len(PROMPTS), 1, dtype=torch.bool)
        torch.testing.assert_close(our_step[-1][seen], their_step[-1][seen], **TOLERANCE)
    assert [stats.prompt_tokens for stats in ours.stats] == [len(prompt) for prompt in PROMPTS]
    assert ours.finish_reasons == ("length",) * 3


def test_scores_when_sampling_are_what_was_drawn_from(model: SplitModelForCausalLM) -> None:
    out = model.generate(
        PROMPTS[:2],
        max_new_tokens=15,
        do_sample=True,
        temperature=1.4,
        top_k=5,
        repetition_penalty=1.2,
        seed=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert isinstance(out, GenerateOutput)
    assert out.scores is not None
    for step, scores in enumerate(out.scores):
        for row, token in enumerate(out.sequences[:, len(PROMPTS[0]) + step].tolist()):
            if not scores[row].isnan().any():
                assert int(scores[row].isfinite().sum()) == 5
                assert scores[row, token].isfinite()


def test_forward_and_hidden_states_are_close_to_transformers(model: SplitModelForCausalLM, whole: Any) -> None:
    ids, mask = padded(PROMPTS)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        theirs = whole(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    seen = mask.bool()
    torch.testing.assert_close(model(ids, mask).logits[seen], theirs.logits[seen], **TOLERANCE)
    states = model.hidden_states(ids, mask)
    assert torch.equal(states.attention_mask, mask)
    # Partition 2,1 of 4 blocks: A ends behind block 2, B behind block 3.
    torch.testing.assert_close(states.before_noise[seen], theirs.hidden_states[2][seen], **TOLERANCE)
    torch.testing.assert_close(states.sent, states.before_noise, **TOLERANCE)
    torch.testing.assert_close(states.received[seen], theirs.hidden_states[3][seen], **TOLERANCE)
    torch.testing.assert_close(states.final[seen], theirs.hidden_states[4][seen], **TOLERANCE)
    torch.testing.assert_close(states.logits[seen], theirs.logits[seen], **TOLERANCE)
    assert not states.sent[~seen].any()


def test_hidden_states_show_noise_and_codec(url: str, state: dict[str, Any]) -> None:
    long = [1, *range(10, 180)]
    with SplitModelForCausalLM.from_server(url, **state | {"noise": 0.05, "codec": "int8"}) as noisy:
        states = noisy.hidden_states([long])
        again = noisy.hidden_states([long])
        released = noisy.rows_released
        spec = noisy.edge.noise
    assert torch.equal(states.sent, again.sent)
    assert released == len(long) - 1
    assert torch.equal(states.sent[0, 0], states.before_noise[0, 0])
    assert spec.clip is not None
    clipped = states.before_noise[0, 1:] * (spec.clip / states.before_noise[0, 1:].norm(dim=-1, keepdim=True)).clamp(
        max=1
    )
    added = states.sent[0, 1:] - clipped
    assert abs(float(added.std()) / 0.05 - 1) < 0.1


def test_sampled_sequences_repeat_with_their_seed_and_send_the_prompt_once(model: SplitModelForCausalLM) -> None:
    prompt = [1, *range(100, 160)]
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3}
    first = model.generate([prompt, PROMPTS[0]], seed=11, return_dict_in_generate=True, **options)
    assert isinstance(first, GenerateOutput)
    assert first.sequences.shape[0] == 6
    assert torch.equal(first.sequences, model.generate([prompt, PROMPTS[0]], seed=11, **options))
    assert len({tuple(row) for row in first.sequences[:3].tolist()}) > 1
    assert [stats.cached_tokens for stats in first.stats[:3]] == [len(prompt) - 1] * 3


def test_a_prompt_that_goes_on_sends_what_is_new(model: SplitModelForCausalLM) -> None:
    ids = model.generate([[1, *range(200, 240)]], max_new_tokens=10, eos_token_id=None)
    assert isinstance(ids, torch.Tensor)
    longer = torch.cat((ids, torch.tensor([[5, 6, 7]])), dim=1)
    out = model.generate(longer, max_new_tokens=2, eos_token_id=None, return_dict_in_generate=True)
    assert isinstance(out, GenerateOutput)
    assert out.stats[0].cached_tokens == ids.shape[1] - 1
    assert out.stats[0].rows_up == 1 + 3 + 1


class Collect:
    def __init__(self) -> None:
        self.pieces: list[list[Any]] = []
        self.threads: set[int] = set()
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.threads.add(threading.get_ident())
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_each_token_in_the_callers_thread(model: SplitModelForCausalLM) -> None:
    streamer = Collect()
    ids = model.generate(PROMPTS[:1], max_new_tokens=9, eos_token_id=None, streamer=streamer)
    assert isinstance(ids, torch.Tensor)
    assert streamer.pieces == [PROMPTS[:1], *([token] for token in ids[0, 5:].tolist())]
    assert streamer.threads == {threading.get_ident()}
    assert streamer.ended == 1
    with pytest.raises(UsageError, match="one sequence"):
        model.generate(PROMPTS, streamer=streamer)


def test_a_streamer_that_fails_ends_the_answer(model: SplitModelForCausalLM) -> None:
    class Full(Collect):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.pieces) == 3:
                raise OSError("no space")

    streamer = Full()
    with pytest.raises(OSError, match="no space"):
        model.generate(PROMPTS[:1], max_new_tokens=200, eos_token_id=None, streamer=streamer)
    assert streamer.ended == 1
    assert model.generate(PROMPTS[:1], max_new_tokens=3) is not None


def test_the_tokenizer_has_transformers_ids(model: SplitModelForCausalLM, folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder), padding_side="left", pad_token="</s>")
    texts = ["bada gun", "x", "Ein Wörtchen 🐈 mehr"]
    ours = model.tokenizer(texts)
    expected = theirs(texts, padding=True, return_tensors="pt")
    assert torch.equal(ours["attention_mask"], expected["attention_mask"])
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert model.tokenizer.batch_decode(ours["input_ids"]) == texts
    messages = [{"role": "user", "content": "bada?"}]
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert torch.equal(model.tokenizer.apply_chat_template(messages), chat)
    # Both kinds of tokenizer feed generate alike.
    assert torch.equal(model.generate(**ours, max_new_tokens=5), model.generate(**expected, max_new_tokens=5))


def test_mistakes_are_named(model: SplitModelForCausalLM, url: str) -> None:
    with pytest.raises(TypeError, match="'max_new_token'; did you mean 'max_new_tokens'"):
        model.generate(PROMPTS, max_new_token=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'partion'; did you mean 'partition'"):
        SplitModelForCausalLM.from_server(url, partion="1,1")
    with pytest.raises(UsageError, match="codec"):
        SplitModelForCausalLM.from_server(url, codec="fp8")
    with pytest.raises(UsageError, match="pad on the left"):
        model.generate([[1, 5, 0]], attention_mask=[[1, 1, 0]])
    with pytest.raises(UsageError, match="no padding"):
        model.generate([[1, 5], [0, 0]], attention_mask=[[1, 1], [0, 0]])
    with pytest.raises(UsageError, match="whole numbers"):
        model.generate([[1.5]])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="vocabulary"):
        model.generate([[1, 320]])
    with pytest.raises(UsageError, match="do_sample=True"):
        model.generate(PROMPTS, num_return_sequences=2)
    with pytest.raises(UsageError, match="max_length is 5"):
        model.generate(PROMPTS[:1], max_length=5)
    with pytest.raises(ContextExceeded):
        model.generate([[1] * 256])
    with pytest.warns(UserWarning, match="temperature without do_sample"):
        model.generate(PROMPTS[:1], temperature=0.5, max_new_tokens=1)


def test_without_input_ids_an_answer_begins_at_bos(model: SplitModelForCausalLM) -> None:
    ids = model.generate(max_new_tokens=3, eos_token_id=None)
    assert isinstance(ids, torch.Tensor)
    assert torch.equal(ids, model.generate([[1]], max_new_tokens=3, eos_token_id=None))


def test_closed_and_unreachable_models(url: str, state: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    model = SplitModelForCausalLM.from_server(url, **state)
    model.close()
    model.close()
    assert_ended(before)
    with pytest.raises(UsageError, match="closed"):
        model.generate(PROMPTS)
    with pytest.raises(ServerUnreachable):
        SplitModelForCausalLM.from_server("http://127.0.0.1:9", reconnect_seconds=0, **state)
    assert_ended(before)


def test_a_failure_while_closing_ends_the_thread_all_the_same(url: str, state: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    model = SplitModelForCausalLM.from_server(url, **state)

    async def fail() -> None:
        raise OSError("no")

    model._stack.push_async_callback(fail)
    with pytest.raises(OSError, match="no"):
        model.close()
    assert_ended(before)


def assert_ended(before: set[threading.Thread]) -> None:
    """All threads begun since `before` end; one may still be on its last line."""
    begun = set(threading.enumerate()) - before
    for thread in begun:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in begun), begun


def test_a_deadline_ends_an_answer_and_the_model_goes_on(url: str, state: dict[str, Any]) -> None:
    with SplitModelForCausalLM.from_server(url, request_timeout=0.005, **state) as hurried:
        with pytest.raises(DeadlineExceeded):
            hurried.generate(PROMPTS, max_new_tokens=240, eos_token_id=None)
        assert hurried(PROMPTS[:1]).logits.shape == (1, 5, 320)


def test_several_threads_may_ask_at_once(model: SplitModelForCausalLM) -> None:
    expected = [model.generate([prompt], max_new_tokens=20, eos_token_id=None) for prompt in PROMPTS]
    found: dict[int, Any] = {}

    def ask(at: int) -> None:
        found[at] = model.generate([PROMPTS[at]], max_new_tokens=20, eos_token_id=None)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[at], expected[at]) for at in range(3))


def test_the_package_is_imported_without_torch() -> None:
    code = (
        "import sys, edge_client; assert 'torch' not in sys.modules; edge_client.SplitModelForCausalLM; "
        "assert 'torch' in sys.modules; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
