"""The next prompt keeps the ids of earlier answers, whatever the tokenizer would make of their text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, END_OF_TURN, write_tokenizer

from edge_client.chat_template import ChatTemplate
from edge_client.tokenizer import EdgeTokenizer
from edge_client.transcript import Known, known_answer, next_ids

TRIMMING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] {{ message['content'] }} "
    "[/INST]{% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'].split('</think>')[-1] }}<|end|>"
    "{% endfor %}assistant:"
)
END, EOS = 3, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> EdgeTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return EdgeTokenizer.open(folder)


class Chat:
    """Renders and tokenises as the terminal chat does; answers are given."""

    def __init__(self, template: str, tokenizer: EdgeTokenizer) -> None:
        self.template = ChatTemplate.compile(template)
        self.tokenizer = tokenizer
        self.messages: list[dict[str, str]] = []
        self.known: list[Known] = []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special_tokens=False)

    def ask(self, message: str) -> tuple[str, list[int]]:
        self.messages.append({"role": "user", "content": message})
        rendering = self.template.render(self.messages, self.tokenizer.special_tokens)
        return rendering, next_ids(rendering, self.known, self.encode)

    def turn(self, message: str, answer: list[int], end: list[int]) -> list[int]:
        """Ask, and take `answer`; give all ids that the session then holds."""
        rendering, ids = self.ask(message)

        def show(tokens: Sequence[int]) -> str:
            stream = self.tokenizer.stream(ids)
            return "".join(map(stream.push, tokens)) + stream.flush()

        text = show(answer)
        self.messages.append({"role": "assistant", "content": text})
        self.known.append(known_answer(rendering, ids, text, [*answer, *end], end_ids=(END, EOS), show=show))
        return [*ids, *answer]


def letters(tokenizer: EdgeTokenizer, text: str) -> list[int]:
    """Ids of single letters: never what the tokenizer would choose for a word."""
    return [tokenizer.encode(letter, special_tokens=False)[0] for letter in text]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMING, LLAMA2, PLAIN])
@pytest.mark.parametrize("end", [[END], [EOS], []])
def test_answers_keep_their_ids_over_many_turns(tokenizer: EdgeTokenizer, template: str, end: list[int]) -> None:
    chat = Chat(template, tokenizer)
    draw = random.Random(5)
    held: list[int] = []
    for turn in range(6):
        word = "".join(draw.choice(["ba", "gun", " ti", "do"]) for _ in range(8)).strip()
        held_now = chat.turn(f"message {turn}", letters(tokenizer, word), end)
        assert held_now[: len(held)] == held
        held = held_now
    rendering, ids = chat.ask("the end")
    assert ids[: len(held)] == held
    # The model did not make the space that a template sets before an answer.
    anew = tokenizer.decode(chat.encode(rendering))
    assert tokenizer.decode(ids) == (anew.replace("[/INST] ", "[/INST]") if template == LLAMA2 else anew)
    # It is worth something: tokenised anew the answers come out otherwise.
    assert chat.encode(rendering)[: len(held)] != held


def test_what_follows_is_the_templates_own(tokenizer: EdgeTokenizer) -> None:
    chat = Chat(CHAT_TEMPLATE, tokenizer)
    held = chat.turn("a", letters(tokenizer, "bada"), [EOS])
    _, ids = chat.ask("b")
    assert ids == held + chat.encode("<|end|><user>b<|end|><assistant>")
    assert ids.count(EOS) == 0
    assert ids.count(END) == 3


def test_trimmed_space_does_not_cost_the_ids(tokenizer: EdgeTokenizer) -> None:
    chat = Chat(TRIMMING, tokenizer)
    held = chat.turn("a", letters(tokenizer, " bada \n"), [END])
    _, ids = chat.ask("b")
    assert ids == held + chat.encode("<|end|><user>b<|end|><assistant>")


def test_a_template_that_leaves_text_out_is_followed(tokenizer: EdgeTokenizer) -> None:
    chat = Chat(FORGETFUL, tokenizer)
    first = chat.turn("a", letters(tokenizer, "bada"), [END])
    chat.turn("b", letters(tokenizer, "<think>x</think>gun"), [END])
    rendering, ids = chat.ask("c")
    assert "<think>" not in tokenizer.decode(ids)
    assert tokenizer.decode(ids) == tokenizer.decode(chat.encode(rendering))
    assert ids[: len(first)] == first


def test_another_system_message_begins_anew(tokenizer: EdgeTokenizer) -> None:
    chat = Chat(CHAT_TEMPLATE, tokenizer)
    chat.turn("a", letters(tokenizer, "bada"), [END])
    chat.messages.insert(0, {"role": "system", "content": "be brief"})
    rendering, ids = chat.ask("b")
    assert ids == chat.encode(rendering)


def test_an_answer_cut_at_a_stop_string_is_tokenised_as_shown(tokenizer: EdgeTokenizer) -> None:
    made = letters(tokenizer, "bada STOP")
    known = known_answer("r", [7], "bada", made, end_ids=(EOS,), show=tokenizer.decode)
    assert known == Known("r", "", (7,))
    assert next_ids("rbada", [known], chat_encode := lambda text: tokenizer.encode(text, special_tokens=False)) == [
        7,
        *chat_encode("bada"),
    ]


def test_bytes_that_are_no_characters_keep_their_ids(tokenizer: EdgeTokenizer) -> None:
    chat = Chat(CHAT_TEMPLATE, tokenizer)
    odd = tokenizer.encode("猫🐈é", special_tokens=False)
    draw = random.Random(2)
    made = [draw.choice([*odd, *letters(tokenizer, "badu")]) for _ in range(60)]
    held = chat.turn("a", made, [])
    assert "\ufffd" in chat.messages[-1]["content"]
    _, ids = chat.ask("b")
    assert ids[: len(held)] == held


def test_the_word_for_an_end_is_a_token(tokenizer: EdgeTokenizer) -> None:
    assert tokenizer.token_id(END_OF_TURN) == END


def test_known_ids_of_the_bundled_and_the_shared_tokenizers(data_dir: Path) -> None:
    """A tokenizer that sets a space before the text does so once, not before every turn."""
    tokenizer = EdgeTokenizer.open(data_dir / "llama2-tokenizer")
    chat = Chat(LLAMA2, tokenizer)
    held = chat.turn("Hello", tokenizer.encode("I see a dog", special_tokens=False), [EOS])
    rendering, ids = chat.ask("Where?")
    assert ids[: len(held)] == held
    assert ids[len(held) :] == chat.encode(rendering)[-len(ids) + len(held) :]
