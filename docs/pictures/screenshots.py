"""Take docs/pictures/chat-*.png from the real page: a real gateway, a split-server 80 ms away, and the demo model.

`python docs/pictures/screenshots.py`; needs the `dev` extra and Debian's Chromium at /usr/bin/chromium.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

from chromium import chromium  # noqa: E402 - found only now
from live_gateway import live_gateway  # noqa: E402
from live_server import live_server  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from loadtest.proxy_process import proxy_process  # noqa: E402

STORY = (
    "Mia is in the kitchen. Tom is in the garden. There is a ball in the kitchen. Mia takes the ball. "
    "Mia goes to the garden. Who has the ball?"
)
QUESTIONS = (STORY, "Is Tom in the kitchen?", "Tom goes to the hall. Summarize the story.")
ROUND_TRIP_MS = "80"
WORDS_BEFORE_THE_PICTURE = 8
PICTURES = {
    "desktop": {"viewport": {"width": 1440, "height": 900}},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True},
}


def main() -> None:
    """Start everything, play a short conversation in each window, and take its picture while the last answer comes."""
    with (
        tempfile.TemporaryDirectory() as work,
        live_server("demo") as server,
        proxy_process(server, "--rtt", ROUND_TRIP_MS) as far,
        chromium() as browser,
    ):
        for name, window in PICTURES.items():
            # One each, or the later windows would find the conversation on the server.
            places = ["--cache-dir", f"{work}/cache", "--state-dir", f"{work}/state"]
            with live_gateway("--server", far, "--threads", "1", *places) as gateway:
                take(browser, gateway, name, window)


def take(browser: Browser, gateway: str, name: str, window: dict[str, object]) -> None:
    """Play the conversation in one window."""
    page = browser.new_page(**window)  # type: ignore[arg-type]
    page.goto(gateway)
    expect(page.locator("#status")).to_have_attribute("data-state", "open")
    ask(page, "Tell me a story.")
    wait_for_the_end(page)
    new_conversation(page)
    for question in QUESTIONS[:-1]:
        ask(page, question)
        wait_for_the_end(page)
    ask(page, QUESTIONS[-1])
    expect(page.locator(".message.assistant .body").last).to_have_text(some_words(WORDS_BEFORE_THE_PICTURE))
    save(page, f"chat-{name}.png")
    if name == "phone":
        wait_for_the_end(page)
        page.get_by_role("button", name="What left this computer").click()
        page.wait_for_timeout(400)
        save(page, "chat-phone-panel.png")
    page.close()


def save(page: Page, name: str) -> None:
    """Take the picture, without a pointer or a focus in it."""
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.screenshot(path=HERE / name)


def some_words(count: int) -> re.Pattern[str]:
    """Match at least so many words."""
    return re.compile(rf"(\S+\s+){{{count}}}")


def wait_for_the_end(page: Page) -> None:
    """Wait until the answer is complete."""
    expect(page.get_by_role("button", name="Stop")).to_be_hidden(timeout=30_000)


def ask(page: Page, text: str) -> None:
    """Ask, and wait for the first word."""
    count = page.locator(".message.assistant").count()
    page.get_by_label("Your question").fill(text)
    page.get_by_label("Your question").press("Enter")
    expect(page.locator(".message.assistant .body").nth(count)).not_to_be_empty()


def new_conversation(page: Page) -> None:
    """Open the list where the window is narrow, and begin anew."""
    opener = page.get_by_role("button", name="Conversations")
    if opener.is_visible():
        opener.click()
    page.get_by_role("button", name="New conversation", exact=True).first.click()


if __name__ == "__main__":
    main()
