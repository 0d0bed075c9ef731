"""The chat page in Chromium, in front of the real server with an engine whose every step is told."""

import json
import shutil
from contextlib import ExitStack, contextmanager

import pytest
from fake_engine import FakeEngine, live

from nanochat.server import Settings, create_app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "Chromium is missing, so the chat page is not tested: apt-get install chromium"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@contextmanager
def chromium():
    """Start the browser."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # as root it must be


@pytest.fixture(scope="module")
def browser():
    """One browser per test file: Playwright keeps an event loop in this thread, which other files want for theirs."""
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser):
    """visit(engine, context options, **server's settings) opens a server and the page on it; see `Page`.

    At the end no script may have failed, no dialog have opened, no other host have been asked, nothing have been
    refused by the content security policy.
    """
    with ExitStack() as stack:
        def open_page(engine, options=None, ready=True, **settings):
            factory = engine if callable(engine) else lambda: engine
            server = stack.enter_context(live(create_app(factory, Settings(**settings)), loaded=ready))
            context = browser.new_context(**(options or {}))
            context.set_default_timeout(30_000)  # a page's turn comes late beside other tests
            stack.callback(context.close)
            page = Page(context, server.url)
            stack.callback(page.assert_clean)
            page.open(ready)
            return page
        yield open_page


class Page:
    """A tab on the chat page, with names for what users do. Other names are Playwright's."""

    def __init__(self, context, url):
        self.context, self.url, self.faults = context, url, []
        self.tab = context.new_page()
        self.tab.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.tab.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.tab.on("console", lambda message: self.faults.append(message.text)
                    if "Content Security Policy" in message.text else None)
        self.tab.on("request", lambda request: self.faults.append(f"request to {request.url}")
                    if not request.url.startswith((url, "blob:")) else None)

    def __getattr__(self, name):
        return getattr(self.tab, name)

    def reload(self):
        self.tab.reload()
        self.tab.locator("body[data-ready]").wait_for(state="attached")

    def open(self, ready=True, at="/"):
        self.tab.goto(self.url + at)
        self.tab.locator("body[data-ready]").wait_for(state="attached")
        if ready:
            self.tab.locator("#notice:empty").wait_for(state="attached")
        return self

    def another_tab(self):
        return Page(self.context, self.url)

    def assert_clean(self):
        assert self.faults == []

    @property
    def prompt(self):
        return self.tab.get_by_role("textbox", name="Message", exact=True)

    def send(self, text):
        """Send a message; returns its answer's element."""
        self.prompt.fill(text)
        if self.tab.evaluate("matchMedia('(pointer: coarse)').matches"):
            self.tab.locator("#send").tap()
        else:
            self.tab.keyboard.press("Enter")
        return self.answers.last

    def ask(self, text):
        """Send a message and wait for the end of the answer; returns its element."""
        answer = self.send(text)
        self.button("Send").wait_for()
        return answer

    @property
    def answers(self):
        return self.tab.get_by_role("article", name="nanochat")

    @property
    def questions(self):
        return self.tab.get_by_role("article", name="You")

    def button(self, name):
        return self.tab.get_by_role("button", name=name, exact=True)

    def texts(self):
        """Return what is said, in order."""
        return self.tab.locator(".bubble, .text").all_inner_texts()

    def listed(self):
        """Return the titles of the conversations."""
        return self.tab.locator("#conversations a").all_inner_texts()

    def stored(self):
        """Return the conversations in the browser's storage."""
        values = self.tab.evaluate("Object.entries(localStorage).filter(([key]) => key.includes('/conversation/'))")
        return [json.loads(value) for _, value in values]


def saying(*pieces, finish="stop"):
    """A reply of pieces of text."""
    return [*(("text", piece) for piece in pieces), ("finish", finish)]


def echo(prompt, sample):
    """A reply that repeats the whole prompt, without special tokens' brackets."""
    return saying("You said: ", prompt.replace("<|", "[").replace("|>", "]"))


def paused(before, event, after=()):
    """A reply that waits in its middle for the event."""
    yield from before
    while not event.is_set():
        yield None
    yield from after or [("finish", "stop")]


def counting():
    """A reply that says which answer it is."""
    number = iter(range(1, 100))
    return lambda prompt, sample: saying(f"answer {next(number)}")


def prompt_of(engine, i=-1):
    """What the engine was asked, the last time by default."""
    return engine.tokenizer.decode(engine.submitted[i].prompt)


def fake(reply, **options):
    """An engine that takes 2 ms a step, so that a waiting reply does not spin."""
    return FakeEngine(reply, **{"step_seconds": 0.002, **options})
