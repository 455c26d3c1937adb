"""Examples to token ids: the loss on answers only, whole answers, and the edge's own prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TinyModel, write_model
from transformers import AutoTokenizer, LlamaForCausalLM

from edge_client.chat_template import ChatTemplate
from split_llama.demo import demo_model_path
from split_llama.errors import UsageError
from training.demo.world import NAMES, PLACES
from training.tasks.encoding import ChatFormat, Encoder
from training.tasks.examples import IGNORED, Dialogue, Example, Message, Passage, Sample

DEMO = Encoder.open(demo_model_path(), 64)
STORY = "Mia is in the hall. Tom is in the park."
EXAMPLE = Example(f"{STORY}\nQuestion: Where is Mia?\nAnswer:", " Mia is in the hall.")
DIALOGUE = Dialogue(
    (
        Message("system", "Answer in one short sentence."),
        Message("user", f"{STORY} Where is Mia?"),
        Message("assistant", "Mia is in the hall."),
        Message("user", "Where is Tom?"),
        Message("assistant", "Tom is in the park."),
    )
)


def _encoder(length: int) -> Encoder:
    return Encoder(DEMO.tokenizer, DEMO.end_ids, length, DEMO.chat)


def _text(ids: tuple[int, ...] | list[int], encoder: Encoder = DEMO) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


def _learned(sample: Sample, encoder: Encoder = DEMO) -> str:
    return _text([label for label in sample.labels if label != IGNORED], encoder)


def _only(samples: list[Sample]) -> Sample:
    (sample,) = samples
    assert all(label in (IGNORED, token) for token, label in zip(sample.token_ids, sample.labels, strict=True))
    return sample


def test_only_the_answer_and_its_end_are_learned() -> None:
    sample = _only(DEMO.samples(EXAMPLE))
    assert _text(sample.token_ids) == f"<s>{EXAMPLE.prompt}{EXAMPLE.answer}</s>"
    assert _learned(sample) == f"{EXAMPLE.answer}</s>"
    assert sample.targets == 7


def test_the_prompt_of_training_is_the_prompt_of_the_edge() -> None:
    sample = _only(DEMO.samples(EXAMPLE))
    prompt = DEMO.prompt(EXAMPLE, 16)
    assert sample.token_ids[: len(prompt)] == tuple(prompt)
    assert set(sample.labels[: len(prompt)]) == {IGNORED}
    assert IGNORED not in sample.labels[len(prompt) :]


def test_the_loss_is_that_of_transformers() -> None:
    """Labels are what transformers expects: a trained model finds its own wording likely, and only that is counted."""
    model = LlamaForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    sample = _only(DEMO.samples(EXAMPLE))
    ids, labels = torch.tensor([sample.token_ids]), torch.tensor([sample.labels])
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    likely = out.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-sample.targets :]
    assert out.loss.item() == pytest.approx(-likely.mean().item(), abs=1e-6)
    assert out.loss.item() < 0.1


def test_every_turn_of_the_assistant_is_learned() -> None:
    sample = _only(DEMO.samples(DIALOGUE))
    assert _learned(sample) == "Mia is in the hall.<|end|>Tom is in the park.<|end|>"
    rendered = AutoTokenizer.from_pretrained(demo_model_path()).apply_chat_template(
        [{"role": m.role, "content": m.content} for m in DIALOGUE.messages], tokenize=False
    )
    # What the template writes behind the last answer is of no use.
    assert _text(sample.token_ids) + "\n" == rendered


def test_the_prompt_of_a_dialogue_ends_with_the_answers_header() -> None:
    prompt = DEMO.prompt(DIALOGUE, 8)
    sample = _only(DEMO.samples(DIALOGUE))
    assert _text(prompt).endswith("Where is Tom?<|end|>\n<|assistant|>\n")
    assert sample.token_ids[: len(prompt)] == tuple(prompt)


@pytest.mark.parametrize("name", ["llama2-tokenizer", "stories260K"])
def test_tokenizers_with_a_leading_space(name: str, data_dir: Path) -> None:
    encoder = Encoder.open(data_dir / name, 128)
    sample = _only(encoder.samples(EXAMPLE))
    prompt = encoder.prompt(EXAMPLE, 16)
    assert sample.token_ids[: len(prompt)] == tuple(prompt)
    assert _learned(sample, encoder).strip() == "Mia is in the hall.</s>"
    assert sample.labels[-1] == encoder.tokenizer.token_id("</s>")


def test_a_llama2_chat_is_learned_turn_by_turn(data_dir: Path) -> None:
    encoder = Encoder.open(data_dir / "llama2-tokenizer", 256)
    sample = _only(encoder.samples(DIALOGUE))
    assert _learned(sample, encoder).count("</s>") == 2
    words = encoder.tokenizer.decode([label for label in sample.labels if label != IGNORED])
    assert words.split() == "Mia is in the hall. Tom is in the park.".split()


def test_a_template_without_end_tokens_gets_one() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    format_ = ChatFormat(
        ChatTemplate.compile(template), ChatTemplate.compile("{% set add_generation_prompt = false %}" + template), {}
    )
    encoder = Encoder(DEMO.tokenizer, DEMO.end_ids, 64, format_)
    sample = _only(encoder.samples(Dialogue((Message("user", "Where is Tom?"), Message("assistant", "In the hall.")))))
    assert _text(sample.token_ids).endswith("assistant: In the hall.\n</s>")
    assert _learned(sample).strip().startswith("In the hall")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = (
        "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    format_ = ChatFormat(ChatTemplate.compile(template), ChatTemplate.compile(template), {})
    with pytest.raises(UsageError, match="give dialogues with one answer each"):
        Encoder(DEMO.tokenizer, DEMO.end_ids, 64, format_).samples(DIALOGUE)


def test_plain_text_is_learned_whole_in_windows() -> None:
    text = " ".join(f"{name} is in the {place}." for name in NAMES for place in PLACES)
    samples = _encoder(32).samples(Passage(text))
    assert "".join(_learned(sample) for sample in samples) == text
    assert all(sample.token_ids[0] == DEMO.tokenizer.bos_token_id for sample in samples)
    assert all(sample.labels[0] == IGNORED for sample in samples)
    assert {len(sample.token_ids) for sample in samples[:-1]} == {32}
    assert sum(sample.targets for sample in samples) == len(DEMO.tokenizer.encode(text, special_tokens=False))


WORDS = st.lists(st.sampled_from((*NAMES, *PLACES)), min_size=1, max_size=40).map(" ".join)


@settings(deadline=None)
@given(prompt=WORDS, answer=WORDS, length=st.integers(4, 64))
def test_a_cut_takes_the_prompts_beginning_and_never_the_answer(prompt: str, answer: str, length: int) -> None:
    example = Example(prompt, f" {answer}")
    whole = _only(_encoder(10_000).samples(example))
    found = _encoder(length).encode([example, Example("Tom", " Mia")])
    cut = [sample for sample in found.samples if sample.targets == whole.targets]
    fits, room = len(whole.token_ids) <= length, length - whole.targets
    assert found.left_out == (0 if fits or room >= 2 else 1)
    assert found.shortened == int(not fits and room >= 2)
    if fits or room >= 2:
        sample = cut[0]
        assert len(sample.token_ids) == min(length, len(whole.token_ids))
        assert sample.token_ids[0] == whole.token_ids[0]
        assert sample.token_ids[1:] == whole.token_ids[1:][-(length - 1) :]
        assert [x for x in sample.labels if x != IGNORED] == [x for x in whole.labels if x != IGNORED]


@pytest.mark.parametrize("length", range(3, 60))
def test_a_dialogue_is_cut_from_the_left(length: int) -> None:
    whole = _only(DEMO.samples(DIALOGUE))
    samples = _encoder(length).samples(DIALOGUE)
    last = "Tom is in the park.<|end|>"
    tokens = len(DEMO.tokenizer.encode(last, special_tokens=False))
    assert bool(samples) == (length >= tokens + 2)
    for sample in samples:
        assert len(sample.token_ids) == min(length, len(whole.token_ids))
        # An answer whose question is cut off in part stays; one that is itself cut is not learned.
        assert _learned(sample) in (last, f"Mia is in the hall.<|end|>{last}")
        assert sample.labels[1] == IGNORED


def test_prompts_leave_room_for_the_answer() -> None:
    prompt = _encoder(20).prompt(EXAMPLE, 8)
    assert len(prompt) == 12
    assert prompt[0] == DEMO.tokenizer.bos_token_id
    assert prompt[1:] == DEMO.prompt(EXAMPLE, 8)[-11:]
    with pytest.raises(UsageError, match="leaves no room for a prompt in 20"):
        _encoder(20).prompt(EXAMPLE, 19)


def test_what_does_not_fit_is_counted() -> None:
    long = Example("Where?", " Mia" * 40)
    found = _encoder(24).encode([EXAMPLE, long, Example("Tom", " Mia")])
    assert (len(found.samples), found.shortened, found.left_out) == (2, 1, 1)
    with pytest.raises(UsageError, match="none of the 2 examples fits"):
        _encoder(24).encode([long, long])


def test_models_that_cannot_be_trained_on_a_task_are_refused(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(UsageError, match="max_length must be at least 3"):
        _encoder(2)
    with pytest.raises(UsageError, match="no EOS token"):
        Encoder(DEMO.tokenizer, (), 64, DEMO.chat)
    with pytest.raises(UsageError, match="no chat template; give it prompts and responses"):
        Encoder.open(data_dir / "stories260K", 64).samples(DIALOGUE)


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2"])
def test_end_ids_of_tiny_models(family: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / family, TinyModel(family=family))
    encoder = Encoder.open(folder, 64)
    eos = encoder.tokenizer.token_id(encoder.tokenizer.special_tokens["eos_token"])
    assert encoder.end_ids[0] == eos
    assert _only(encoder.samples(Example("a", " b"))).labels[-1] == eos
