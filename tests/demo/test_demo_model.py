"""The committed demo model: its size, its tokenizer, its chat template, and that it answers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from split_llama.demo import demo_model_path
from training.demo.corpus import BOS, Message, render_chat
from training.demo.evaluate import MAX_ANSWER_TOKENS, STYLES, cases, grade

MODEL = demo_model_path()
CHAT = [
    Message(role="system", content="You answer questions about a story."),
    Message(role="user", content="Mia is in the garden. Tom is in the park. Where is Mia?"),
    Message(role="assistant", content="Mia is in the garden."),
    Message(role="user", content="Mia goes to the barn. Where is Mia?"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_it_is_small_and_deep_enough() -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    parameters = sum(tensor.numel() for tensor in load_file(MODEL / "model.safetensors").values())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert parameters <= 4_000_000
    assert config["num_hidden_layers"] >= 6
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 16 * 2**20


def test_the_folder_holds_what_a_checkpoint_holds() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in MODEL.iterdir()} == names


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == BOS + text
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids[1:]


def test_common_words_are_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("Mia goes to the kitchen. Tom picks up the ball.").ids) == 1 + 6 + 6


def test_transformers_reads_the_same_tokenizer_and_template(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    for text in ("Mia is in the garden.", "Once", "naïve 🦙\n", ""):
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == BOS + render_chat(CHAT)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(render_chat(CHAT)).ids


def test_chat_turns_end_the_answer(tokenizer: Tokenizer) -> None:
    ends = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert set(ends) == {tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<|end|>")}


def answers(
    prompts: list[str], sigma: float = 0.0, max_new_tokens: int = MAX_ANSWER_TOKENS, model: Path = MODEL
) -> list[str]:
    pytest.importorskip("transformers")
    from training.demo.generate import Generator

    return Generator.load(model, sigma).answers(prompts, max_new_tokens)


@pytest.mark.parametrize("sigma", [0.0, 0.025])
def test_it_answers_questions_about_stories_it_never_saw(sigma: float) -> None:
    asked = [case for style in STYLES for case in cases(11, 60, "pair", style)]
    tallies = grade(asked, answers([case.prompt for case in asked], sigma))
    # A small sample of what docs/demo-model.md reports: far above chance, with room for its own spread.
    assert tallies["where/who"].accuracy >= 0.9
    assert tallies["yes/no"].accuracy >= 0.85


def test_it_follows_a_chat() -> None:
    assert answers([render_chat(CHAT)]) == ["Mia is in the barn."]


def test_it_tells_a_story_that_ends() -> None:
    (story,) = answers(["Once"], max_new_tokens=400)
    assert 40 < len(story) < 1500
    assert story.rstrip().endswith(".")
