"""Headless Chromium by remote control, and an eye on what a page asks for and complains about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
# Without the last four it looks for hosts of its maker.
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser for the block; skips where there is none."""
    if not CHROMIUM.is_file():
        pytest.skip(f"no browser: {CHROMIUM} is missing (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """Opens pages in profiles of their own; `close` fails for requests elsewhere, and for errors and violations."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self._faults: list[str] = []

    def open(self, url: str, *, expects_lost_connection: bool = False, **options: Any) -> Page:
        context = self._browser.new_context(**options)
        self._contexts.append(context)
        home = urlsplit(url).netloc

        def asked(request: Request) -> None:
            parts = urlsplit(request.url)
            if parts.scheme not in ("data", "blob") and parts.netloc != home:
                self._faults.append(f"asked {request.url}")

        def said(message: ConsoleMessage) -> None:
            lost = "WebSocket connection" in message.text or "Failed to load resource" in message.text
            if message.type in ("error", "warning") and not (lost and expects_lost_connection):
                self._faults.append(f"console: {message.text}")

        context.on("request", asked)
        context.on("console", said)
        context.on("weberror", lambda fault: self._faults.append(f"uncaught: {fault.error}"))
        page = context.new_page()
        page.on("dialog", lambda dialog: self._faults.append(f"a dialog: {dialog.message}"))
        page.on("websocket", lambda socket: urlsplit(socket.url).netloc == home or self._faults.append(socket.url))
        page.goto(url)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        assert not self._faults
