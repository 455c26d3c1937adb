"""The whole road: a browser, `edge-client serve`, a split-server with the demo model, all as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Watched, chromium
from live_gateway import live_gateway
from live_server import live_server
from playwright.sync_api import expect

STORY = "Mia is in the kitchen. Tom is in the garden. There is a ball in the kitchen. Mia takes the ball."
QUESTIONS = ("Who has the ball?", "Mia goes to the garden. Where is Mia?")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with live_server("demo") as url:
        yield url


def flags(server: str, folder: Path) -> list[str]:
    places = ["--cache-dir", str(folder / "cache"), "--state-dir", str(folder / "state")]
    return ["--server", server, "--threads", "1", "--device", "cpu", *places]


def generate(server: str, folder: Path, prompt: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "edge_client", "generate", "--chat", "--prompt", prompt, "--json", "--quiet"]
    made = subprocess.run([*command, *flags(server, folder)], capture_output=True, check=True, timeout=120)
    report: dict[str, Any] = json.loads(made.stdout)
    return report


def test_the_browser_gets_the_answer_that_the_command_gives(server: str, tmp_path: Path) -> None:
    first = f"{STORY} {QUESTIONS[0]}"
    expected = generate(server, tmp_path, first)
    with live_gateway(*flags(server, tmp_path)) as gateway, chromium() as browser:
        watched = Watched(browser)
        page = watched.open(gateway)
        expect(page.locator("#status-text")).to_contain_text("of 8 on the server")
        field = page.get_by_label("Your question")
        field.fill(first)
        field.press("Enter")
        answer = page.locator(".message.assistant .body")
        expect(answer).to_have_text(expected["text"].strip())
        figures = page.locator("#figures")
        expect(figures.locator("div", has_text="Prompt tokens").locator("dd")).to_have_text(
            str(expected["prompt_tokens"])
        )
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        tokens = figures.locator("div").filter(has=page.get_by_text("Tokens", exact=True)).locator("dd")
        expect(tokens).to_have_text(str(expected["completion_tokens"]))
        # A second turn: what the server has of the conversation is not sent again.
        field.fill(QUESTIONS[1])
        field.press("Enter")
        expect(answer.nth(1)).to_contain_text("Mia")
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        cached = figures.locator("div", has_text="of them cached").locator("dd").inner_text()
        assert int(cached) >= expected["prompt_tokens"]
        watched.close()


def test_a_gateway_with_keys_lets_the_page_in_with_one(server: str, tmp_path: Path) -> None:
    with live_gateway(*flags(server, tmp_path), "--gateway-key", "sesame-1") as gateway, chromium() as browser:
        watched = Watched(browser)
        page = watched.open(gateway, expects_lost_connection=True)
        page.get_by_label("Key", exact=True).fill("sesame-1")
        page.get_by_role("button", name="Connect").click()
        expect(page.locator("#status")).to_have_attribute("data-state", "open")
        page.get_by_label("Your question").fill("Hello")
        page.get_by_label("Your question").press("Enter")
        expect(page.locator(".message.assistant .body")).to_contain_text("Hello")
        watched.close()
