"""The chat page in a real headless Chromium, before a fake that answers as the question says (`tests/chat_fake.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_fake import FakeGateway, fake_gateway
from chromium import Watched, chromium
from playwright.sync_api import Browser, Locator, Page, expect

from edge_client.gateway.page import FOLDER

OpenPage = Callable[..., Page]
PHONE = {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeGateway]:
    with fake_gateway() as gateway:
        yield gateway


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    """One of the test's own, to be stopped and started."""
    with fake_gateway() as started:
        yield started


@pytest.fixture
def open_page(browser: Browser, shared: FakeGateway) -> Iterator[OpenPage]:
    """Open the page in a profile of its own. What it asked for, and what the console said, is checked at the end."""
    watched = Watched(browser)

    def make(gateway: FakeGateway = shared, *, connected: bool = True, **options: Any) -> Page:
        page = watched.open(gateway.url, **options)
        if connected:
            expect(page.locator("#status")).to_have_attribute("data-state", "open")
        return page

    yield make
    watched.close()


def question(page: Page) -> Locator:
    return page.get_by_label("Your question")


def ask(page: Page, text: str) -> None:
    question(page).fill(text)
    question(page).press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant .body")


def expect_idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_an_answer_streams_in_and_is_counted(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "count 30 every 0.05")
    expect(answers(page)).to_contain_text("1 2 3")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(answers(page)).to_have_text(" ".join(str(number) for number in range(1, 31)))
    expect_idle(page)
    expect(page.locator(".message.user .body")).to_have_text("count 30 every 0.05")
    # Prompt: 5 rows; then one for each token but the last.
    expect(page.locator("#count-rows")).to_have_text("34")
    expect(page.locator("#count-up")).to_have_text("10.2 kB")
    expect(page.locator("#count-down")).to_have_text("9.0 kB")
    expect(page.locator("#count-words")).to_have_text("0")
    figures = page.locator("#figures")
    for name, value in {
        "Tokens a second": "100.0",
        "First token after": "10 ms",
        "Round trips": "30",
        "Tokens a trip": "1.00",
        "of them cached": "0",
    }.items():
        expect(figures.locator("div", has_text=name).locator("dd")).to_have_text(value)
    expect(page.locator(".message.assistant .under")).to_contain_text("30 tokens · 100.0 a second · 30 round trips")


def test_the_panel_says_what_is_set_and_what_noise_is_worth(open_page: OpenPage) -> None:
    page = open_page()
    panel = page.get_by_role("complementary", name="What left this computer")
    for words in (
        "raises an attacker's cost and is no proof of privacy",
        "Standard deviation 0.0251 on every number (mean-abs=0.02), rows clipped to length 17.3",
        "Rows of 128 numbers, one for each token, as fp16",
        "Blocks 1\u20136 of 8, with their keys and values, at http://127.0.0.1:8700",
        "Text, tokens, block 0, block 7 and the head",
    ):
        expect(panel).to_contain_text(words)
    picture = panel.get_by_role("img", name="What stays here and what goes to the server")
    for words in ("This computer", "Server", "block 0", "+ noise", "block 7", "blocks 1\u20136"):
        expect(picture).to_contain_text(words)
    with page.context.expect_page() as opened:
        panel.get_by_role("link", name="What the server can and cannot learn").click()
    expect(opened.value.get_by_role("heading", level=1)).to_have_text("What the server can and cannot learn")


def test_rows_fly_while_an_answer_comes_unless_motion_is_unwanted(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "count 40 every 0.05")
    expect(page.locator(".pic-row.pic-up").first).to_be_attached()
    expect(page.locator(".pic-row.pic-down").first).to_be_attached()
    # The newest word, and it stays on this side.
    expect(page.locator(".pic-word")).to_have_text("40")
    calm = open_page(reduced_motion="reduce")
    calm.evaluate(
        """() => {
          window.rows = 0;
          const count = (changes) => { rows += changes.flatMap((one) => [...one.addedNodes])
            .filter((node) => node.classList?.contains("pic-row")).length; };
          new MutationObserver(count).observe(document.querySelector(".picture svg"), {childList: true, subtree: true});
        }"""
    )
    ask(calm, "count 40 every 0.02")
    expect(calm.locator(".pic-word")).to_have_text("40")
    expect_idle(calm)
    assert calm.evaluate("window.rows") == 0
    assert calm.evaluate("document.getAnimations().length") == 0


def test_stop_keeps_what_came_and_frees_the_rest(open_page: OpenPage, gateway: FakeGateway) -> None:
    page = open_page(gateway)
    ask(page, "count 10000 every 0.02")
    expect(answers(page)).to_contain_text("5")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("You stopped this answer.")).to_be_visible()
    expect(answers(page)).to_contain_text("1 2 3 4 5")
    expect_idle(page)
    assert gateway.service.begun == gateway.service.ended == 1
    expect(question(page)).to_be_focused()


def test_two_conversations_answer_at_once(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "count 60 every 0.05")
    expect(answers(page)).to_contain_text("2")
    page.get_by_role("button", name="New conversation", exact=True).first.click()
    expect(answers(page)).to_have_count(0)
    ask(page, "say the other one")
    expect(answers(page)).to_have_text("the other one")
    # The first goes on meanwhile, and its list entry says so.
    entry = page.locator(".conversation", has_text="count 60")
    expect(entry.get_by_role("img", name="An answer is being written")).to_be_visible()
    entry.get_by_role("button", name="count 60 every 0.05").first.click()
    expect(answers(page)).to_contain_text("58 59 60")
    expect(answers(page)).to_have_count(1)
    expect(page.get_by_role("img", name="An answer is being written")).to_have_count(0)
    page.locator(".conversation", has_text="say the other").get_by_role("button").first.click()
    expect(answers(page)).to_have_text("the other one")


def test_the_keyboard_does_it_all(open_page: OpenPage) -> None:
    page = open_page()
    expect(question(page)).to_be_focused()
    page.keyboard.type("count 9")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("count 10000 every 0.02")
    assert page.locator(".message").count() == 0
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .body")).to_have_text("count 9\ncount 10000 every 0.02")
    expect(answers(page)).to_contain_text("3")
    page.keyboard.press("Escape")
    expect(page.get_by_text("You stopped this answer.")).to_be_visible()
    # All that can be done has its place in the order of Tab, and shows where the focus is.
    page.locator("body").press("Tab")
    seen = set()
    for _ in range(40):
        focused = page.evaluate(
            """() => {
              const one = document.activeElement;
              if (one === document.body) return ["BODY", "none"];
              const name = one.getAttribute("aria-label") || one.textContent.trim() || one.id;
              return [name, getComputedStyle(one).outlineStyle];
            }"""
        )
        seen.add(focused[0])
        # Behind the last one the focus is with the browser; the question's field shows it by the line around it.
        assert focused[1] != "none" or focused[0] in ("BODY", "question"), focused
        page.keyboard.press("Tab")
    for name in (
        "New conversation",
        "Rename: count 9",
        "Delete: count 9",
        "keep",
        "Settings of this conversation",
        "Copy the question",
        "Change the question and ask again",
        "Copy the answer",
        "Ask again",
        "What the server can and cannot learn",
    ):
        assert name in seen, (name, seen)


def test_a_screen_reader_hears_whole_sentences_once(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "say One sentence. Another one. And the rest")
    region = page.locator("[aria-live=polite]").filter(has_text="rest")
    expect(region).to_have_text("One sentence.Another one.And the rest")
    assert page.locator("#announce").get_attribute("aria-live") == "polite"
    for control in page.locator("button:visible, input:visible, textarea:visible").all():
        name = control.evaluate("one => one.getAttribute('aria-label') || one.textContent || one.labels[0].textContent")
        assert name.strip(), control


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(open_page: OpenPage, scheme: Any) -> None:
    page = open_page(color_scheme=scheme)
    ask(page, "say hello")
    expect(answers(page)).to_have_text("hello")
    expect_idle(page)
    dark = luminance(page, "body", "backgroundColor") < 0.1
    assert dark == (scheme == "dark")
    for selector in (
        ".assistant .body",
        ".user .body",
        ".assistant .under .small",
        "#status-text",
        ".hint",
        "#keep-note",
        ".honest",
        ".honest a",
        ".facts dt",
        ".facts dd",
        ".counters dt",
        "#count-words",
        "#new",
    ):
        assert contrast(page, selector) >= 4.5, selector


def luminance(page: Page, selector: str, kind: str) -> float:
    found: float = page.evaluate(
        """([selector, kind]) => {
          let one = document.querySelector(selector), colour = getComputedStyle(one)[kind];
          while (kind === "backgroundColor" && one.parentElement && /, 0\\)|transparent/.test(colour)) {
            one = one.parentElement; colour = getComputedStyle(one)[kind];
          }
          const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
            .map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        }""",
        [selector, kind],
    )
    return found


def contrast(page: Page, selector: str) -> float:
    """As WCAG 2 counts it."""
    ink, paper = (luminance(page, selector, kind) for kind in ("color", "backgroundColor"))
    return (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)


def test_a_long_answer_is_followed_unless_the_reader_scrolls_up(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 800, "height": 500})
    scroll = page.locator("#scroll")
    gap = "one => one.scrollHeight - one.scrollTop - one.clientHeight"
    ask(page, "say " + "line\n\n" * 40)
    ask_and_wait(page, "say " + "line\n\n" * 40 + "end")
    assert scroll.evaluate(gap) < 5
    ask(page, "count 100 every 0.02")
    scroll.evaluate("one => one.scrollTo(0, 0)")
    expect_idle(page)
    assert scroll.evaluate("one => one.scrollTop") == 0
    # The window gets lower: what was at the end stays there.
    scroll.evaluate("one => one.scrollTo(0, one.scrollHeight)")
    page.wait_for_timeout(100)
    page.set_viewport_size({"width": 800, "height": 360})
    page.wait_for_timeout(100)
    assert scroll.evaluate(gap) < 5


def test_a_phone_shows_all_without_scrolling_sideways(open_page: OpenPage) -> None:
    page = open_page(viewport=PHONE, has_touch=True)
    ask(page, "say " + "long" * 60 + " `" + "x" * 200 + "`\n```\n" + "y" * 300 + "\n```")
    expect(answers(page)).to_contain_text("yyy")
    expect_sideways(page)
    for opener, drawer in (("Conversations", "#side"), ("What left this computer", "#panel")):
        page.get_by_role("button", name=opener).click()
        expect(page.locator(drawer)).to_be_in_viewport()
        expect_sideways(page)
        assert page.evaluate("drawer => document.activeElement.closest(drawer) !== null", drawer)
        assert page.locator(drawer).evaluate("one => one.scrollWidth <= one.clientWidth")
        page.keyboard.press("Escape")
        expect(page.locator(drawer)).not_to_be_in_viewport()
        expect(page.get_by_role("button", name=opener)).to_be_focused()
    page.get_by_role("button", name="Settings of this conversation").click()
    expect_sideways(page)
    # A finger finds every button of the chat.
    page.keyboard.press("Escape")
    for control in page.locator(".bar button:visible, .composer button:visible").all():
        box = control.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 38


def expect_sideways(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.evaluate("document.getElementById('scroll').scrollWidth") <= 320


def test_a_closed_drawer_takes_no_focus(open_page: OpenPage) -> None:
    page = open_page(viewport=PHONE)
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.drawer') === null")


NASTY = (
    "say <img src=x onerror=alert(1)> <script>alert(2)</script> **<b onclick=alert(3)>x</b>** "
    "[link](javascript:alert(4)) ![pic](https://example.invalid/x.png) `<i>` https://example.invalid/"
)


def test_text_of_a_model_stays_text(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, NASTY)
    expect(answers(page)).to_contain_text("example.invalid/x.png")
    expect_idle(page)
    body = answers(page)
    assert body.locator("img, script, a, b, i, iframe").count() == 0
    expect(body).to_contain_text("<img src=x onerror=alert(1)>")
    expect(body.locator("strong")).to_have_text("<b onclick=alert(3)>x</b>")
    expect(page.locator(".message.user .body")).to_have_text(NASTY)
    # And so in the list, in the title and after a new name.
    expect(page.get_by_role("heading", level=1)).to_contain_text("<img")
    page.get_by_role("button", name=re.compile("^Rename:")).click()
    page.keyboard.type("<img src=x onerror=alert(5)>")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("<img src=x onerror=alert(5)>")
    assert page.locator("img:not([src='icon.svg'])").count() == 0


def test_markdown_becomes_elements(open_page: OpenPage) -> None:
    page = open_page()
    line = "Some *soft* and **strong** `code` with snake_case_words and 2 * 3 * 4."
    ask(page, f"say # Head\n{line}\n\n- one\n- two\n\n3. three\n\n```py\na < b\n```")
    body = answers(page)
    expect(body.locator("h3")).to_have_text("Head")
    expect(body.locator("em")).to_have_text("soft")
    expect(body.locator("strong")).to_have_text("strong")
    expect(body.locator("p code")).to_have_text("code")
    expect(body.locator("ul li")).to_have_text(["one", "two"])
    expect(body.locator("ol")).to_have_attribute("start", "3")
    expect(body.locator("pre")).to_have_text("a < b")
    expect(body).to_contain_text("snake_case_words and 2 * 3 * 4.")


def test_a_reload_forgets_unless_asked_to_keep(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "say secret words")
    expect(answers(page)).to_have_text("secret words")
    expect_idle(page)
    expect(page.locator("#keep-note")).to_contain_text("memory only")
    assert page.evaluate("JSON.stringify([Object.entries(localStorage), Object.entries(sessionStorage)])") == "[[],[]]"
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    assert page.get_by_text("secret words").count() == 0

    ask(page, "say kept words")
    expect_idle(page)
    page.get_by_label("Keep on this computer").check()
    expect(page.locator("#keep-note")).to_contain_text("plain text")
    ask(page, "say more of them")
    expect(answers(page)).to_have_text(["kept words", "more of them"])
    expect_idle(page)
    page.reload()
    expect(answers(page)).to_have_text(["kept words", "more of them"])
    expect(page.get_by_label("Keep on this computer")).to_be_checked()
    page.get_by_label("Keep on this computer").uncheck()
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    expect(page.locator("#empty")).to_be_visible()


@pytest.mark.parametrize(
    "kept",
    [
        "",
        "{",
        "null",
        "[3, null]",
        '[{"id": "a", "title": "t", "messages": [null, {"id": "b"}]}]',
        '[{"messages": []}]',
    ],
)
def test_what_was_kept_and_cannot_be_read_is_no_hindrance(open_page: OpenPage, kept: str) -> None:
    page = open_page()
    page.get_by_label("Keep on this computer").check()
    page.evaluate("kept => localStorage.setItem(Object.keys(localStorage)[0], kept)", kept)
    # Another page of this origin, so that leaving this one saves nothing over it.
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("#status")).to_have_attribute("data-state", "open")
    ask(other, "say on")
    expect(answers(other)).to_have_text("on")


def test_an_answer_that_was_kept_half_says_so(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_label("Keep on this computer").check()
    ask(page, "count 1000 every 0.05")
    expect(answers(page)).to_contain_text("3")
    page.reload()
    expect(answers(page)).to_contain_text("1 2 3")
    expect(page.get_by_role("alert")).to_contain_text("was lost while this was written")


def test_two_tabs_keep_what_either_of_them_has(open_page: OpenPage) -> None:
    first = open_page()
    first.get_by_label("Keep on this computer").check()
    ask(first, "say from the first")
    expect_idle(first)
    second = first.context.new_page()
    first.wait_for_function("() => localStorage.length && JSON.parse(Object.values(localStorage)[0]).length === 1")
    second.goto(first.url)
    expect(answers(second)).to_have_text("from the first")
    second.get_by_role("button", name="New conversation", exact=True).first.click()
    expect(second.locator("#status")).to_have_attribute("data-state", "open")
    ask(second, "say from the second")
    expect_idle(second)
    expect(first.locator(".conversation", has_text="from the second")).to_be_visible()
    ask(first, "say and more")
    expect(answers(first)).to_have_text(["from the first", "and more"])
    expect_idle(first)
    second.locator(".conversation", has_text="from the first").get_by_role("button").first.click()
    expect(answers(second)).to_have_text(["from the first", "and more"])


def test_rename_and_delete(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "say one")
    expect_idle(page)
    page.get_by_role("button", name="New conversation", exact=True).first.click()
    ask(page, "say two")
    expect_idle(page)
    page.get_by_role("button", name="Rename: say two").click()
    page.keyboard.type("My title")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("My title")
    page.get_by_role("button", name="Rename: My title").press("Enter")
    page.keyboard.type("never mind")
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", level=1)).to_have_text("My title")
    page.get_by_role("button", name="Delete: My title").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator(".conversation")).to_have_count(2)
    page.get_by_role("button", name="Delete: My title").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".conversation")).to_have_count(1)
    expect(answers(page)).to_have_text("one")


def test_the_last_question_can_be_changed_and_asked_again(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "say first")
    ask_and_wait(page, "say second")
    edits = page.get_by_role("button", name="Change the question and ask again")
    expect(edits).to_have_count(1)
    question(page).fill("a draft")
    edits.click()
    expect(question(page)).to_have_value("say second")
    page.keyboard.press("Escape")
    expect(question(page)).to_have_value("a draft")
    edits.click()
    ask(page, "say third")
    expect(answers(page)).to_have_text(["first", "third"])
    expect(page.locator(".message.user .body")).to_have_text(["say first", "say third"])
    page.get_by_role("button", name="Ask again", exact=True).click()
    expect(answers(page)).to_have_text(["first", "third"])
    expect_idle(page)


def ask_and_wait(page: Page, text: str) -> None:
    expect_idle(page)
    ask(page, text)
    expect_idle(page)


def test_copy_gives_the_text_as_it_came(open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "say **bold** text")
    expect_idle(page)
    page.get_by_role("button", name="Copy the answer").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "**bold** text "


def test_settings_reach_the_answer(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name="Settings of this conversation").click()
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0")
    expect(page.get_by_label("Longest answer")).to_have_attribute("placeholder", "256")
    page.get_by_label("Temperature").fill("-1")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_have_text("Temperature: expected a number from 0 to 100.")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0,7")
    page.get_by_label("Longest answer").fill("33")
    page.get_by_label("Seed").fill("5")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    ask(page, "settings")
    for part in ("max_new_tokens=33", "temperature=0.7", "seed=5"):
        expect(answers(page)).to_contain_text(part)
    ask_and_wait(page, "system")
    expect(answers(page).last).to_have_text("Be brief.")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ServerUnreachable", "The server that runs the middle blocks cannot be reached."),
        ("ContextExceeded", "This conversation has grown longer than the model can hold."),
        ("LimitExceeded", "Too many answers are being made at the same time."),
        ("BadStates", "The answer could not be made."),
    ],
)
@pytest.mark.parametrize("verb", ["fail", "break"])
def test_an_error_says_what_happened_and_what_to_do(open_page: OpenPage, verb: str, error: str, words: str) -> None:
    page = open_page()
    ask(page, f"{verb} {error}")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(words)
    alert.get_by_text("What the gateway says").click()
    expect(alert).to_contain_text(f"{error}: the words of the gateway")
    if verb == "break":
        expect(answers(page)).to_have_text("one two")
    # And then it can be asked again.
    alert.get_by_role("button", name="Ask again").click()
    expect(alert).to_have_count(1)
    expect_idle(page)
    ask_and_wait(page, "say fine")
    expect(answers(page).last).to_have_text("fine")


def test_a_lost_gateway_is_told_calmly_and_comes_back(open_page: OpenPage, gateway: FakeGateway) -> None:
    page = open_page(gateway, expects_lost_connection=True)
    ask(page, "count 10000 every 0.02")
    expect(answers(page)).to_contain_text("3")
    gateway.stop()
    expect(page.get_by_role("status")).to_have_text("The gateway does not answer. Is edge-client serve running?")
    expect(page.get_by_role("button", name="Try now")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("The connection to the gateway was lost")
    question(page).fill("say typed meanwhile")
    question(page).press("Enter")
    expect(question(page)).to_have_value("say typed meanwhile")
    gateway.start()
    expect(page.locator("#status")).to_have_attribute("data-state", "open", timeout=20_000)
    expect(page.locator("#notice")).to_be_hidden()
    question(page).press("Enter")
    expect(answers(page).last).to_have_text("typed meanwhile")


def test_a_gateway_with_a_key_is_asked_with_it(open_page: OpenPage) -> None:
    with fake_gateway(key="sesame-1") as guarded:
        page = open_page(guarded, connected=False, expects_lost_connection=True)
        dialog = page.get_by_role("dialog", name="This gateway asks for a key")
        expect(dialog).to_be_visible()
        for wrong in ("wrong", "sésame", "a b"):
            page.get_by_label("Key", exact=True).fill(wrong)
            page.get_by_role("button", name="Connect").click()
            expect(page.get_by_role("alert")).to_contain_text("does not know this key")
        page.get_by_label("Key", exact=True).fill("sesame-1")
        page.get_by_role("button", name="Connect").click()
        expect(page.locator("#status")).to_have_attribute("data-state", "open")
        ask(page, "say in")
        expect(answers(page)).to_have_text("in")
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        page.close()


def test_the_files_ask_for_nothing_elsewhere() -> None:
    for path in FOLDER.glob("*.*"):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            continue
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text))
        assert found <= {"http://www.w3.org"}, path
        if path.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", text), path
        if path.suffix == ".js":
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text
            ), path


def test_the_page_on_privacy_says_what_the_docs_say() -> None:
    docs = Path(__file__).resolve().parents[3] / "docs" / "privacy.md"
    said = plain(re.sub(r"[*`]|\[([^]]*)\]\([^)]*\)", r"\1", docs.read_text(encoding="utf-8")))
    html = (FOLDER / "privacy.html").read_text(encoding="utf-8")
    paragraphs = [plain(re.sub("<[^>]+>", "", found)) for found in re.findall(r"<(?:p|li)>(.*?)</(?:p|li)>", html)]
    quoted = [found for found in paragraphs if "docs/privacy.md has the table" not in found and "Back to" not in found]
    assert len(quoted) >= 6
    for paragraph in quoted:
        # Closing full stops may replace what is left out.
        assert paragraph.rstrip(".") in said, paragraph


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
