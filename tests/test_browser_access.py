"""The chat page for keyboards, screen readers, dark rooms and slow readers, and the text that it makes of Markdown."""

import threading

import pytest
from browser import PHONE, fake, paused, saying
from browser import browser as browser
from browser import visit as visit
from fake_engine import endless

MARKDOWN = """# Title
Some **bold _both_** and *italic* with `code`, 2*3*4 and snake_case_name, [a link](https://example.com/a_(b)).
Next line

- one
  1. first
  2. second

     more
- two

> quoted
> still

| a | b |
|:--|--:|
| 1 | **2** |

```python
x = "<b>"

y
```
***
end ** not bold, `` a ` b ``, \\*stars\\*, https://example.com/x?y=1."""

HTML = """<h3>Title</h3><p>Some <strong>bold <em>both</em></strong> and <em>italic</em> with <code>code</code>, 2*3*4 \
and snake_case_name, <a href="https://example.com/a_(b)">a link</a>.<br>Next line</p>\
<ul><li>one<ol><li>first</li><li>second<p>more</p></li></ol></li><li>two</li></ul>\
<blockquote><p>quoted<br>still</p></blockquote>\
<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><strong>2</strong></td></tr></tbody></table>\
<pre><code>x = "&lt;b&gt;"\n\ny</code></pre><hr>\
<p>end ** not bold, <code>a ` b</code>, *stars*, <a href="https://example.com/x?y=1">https://example.com/x?y=1</a>.</p>"""


def test_markdown_becomes_elements_whole_and_in_pieces(visit):
    """Rendered after every character the end is the same as at once, and blocks that are complete stay as they are."""
    page = visit(fake(saying("x")))
    found = page.evaluate("""async (text) => {
        const { render } = await import("/static/markdown.js");
        const plain = (it) => {
            const copy = it.cloneNode(true);
            for (const bar of copy.querySelectorAll(".bar")) bar.remove();
            for (const box of copy.querySelectorAll(".code, .table")) box.replaceWith(...box.childNodes);
            return copy.innerHTML.replace(/ (class|style|tabindex|role|aria-label|rel|target|start)="[^"]*"/g, "");
        };
        const whole = document.createElement("div"), grown = document.createElement("div");
        render(whole, text);
        let title;
        for (let end = 0; end <= text.length; end++) {
            render(grown, text.slice(0, end));
            if (end === 40) title = grown.firstChild;
        }
        const [, cell] = whole.querySelectorAll("td");
        return [plain(whole), plain(grown), grown.firstChild === title, cell.style.textAlign];
    }""", MARKDOWN)
    assert found == [HTML, HTML, True, "right"]


PIECES = {
    "## Why C#": "<h3>Why C#</h3>",
    "## Closed ##": "<h3>Closed</h3>",
    "| op | is |\n|---|---|\n| `a \\| b` | or |":
        "<table><thead><tr><th>op</th><th>is</th></tr></thead>"
        "<tbody><tr><td><code>a | b</code></td><td>or</td></tr></tbody></table>",
    "```\na\n```js": "<pre><code>a\n```js</code></pre>",
    "(https://a.b/Bank_(c)), _https://a.b/c_": '<p>(<a href="https://a.b/Bank_(c)">https://a.b/Bank_(c)</a>), '
                                               '<em><a href="https://a.b/c">https://a.b/c</a></em></p>',
    "**un**do, 2**3**4": "<p><strong>un</strong>do, 2**3**4</p>",
    "- a\n\t- b\n\t\t- c\n- d": "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>",
    "- a\n\n\t```\n\tall:\n\t\tcc\n\t```": "<ul><li>a<pre><code>all:\n\tcc</code></pre></li></ul>",
    "Born in\n1986. A year.": "<p>Born in<br>1986. A year.</p>",
    "- born in\n1986. A year.": "<ul><li>born in<br>1986. A year.</li></ul>",
    "Do\n1. a\n2. b": "<p>Do</p><ol><li>a</li><li>b</li></ol>",
}


def test_pieces_of_markdown_lose_nothing(visit):
    found = visit(fake(saying("x"))).evaluate("""async (texts) => {
        const { render } = await import("/static/markdown.js");
        return texts.map((text) => {
            const made = document.createElement("div");
            render(made, text);
            for (const bar of made.querySelectorAll(".bar")) bar.remove();
            for (const box of made.querySelectorAll(".code, .table")) box.replaceWith(...box.childNodes);
            return made.innerHTML.replace(/ (class|style|tabindex|role|aria-label|rel|target|start)="[^"]*"/g, "");
        });
    }""", list(PIECES))
    assert dict(zip(PIECES, found)) == PIECES


def test_a_tool_call_in_an_address_hides_none_that_follow(visit):
    reply = [("text", "[a](https://b/"), ("tool", "1+1", "2"), ("text", ")\n\n"), ("tool", "2+2", "4"),
             ("text", " https://c/"), ("tool", "3+3", "6"), ("finish", "stop")]
    text = visit(fake(reply)).ask("hi").locator(".text")
    said = "[a](https://b/python: 1+1 → 2) python: 2+2 → 4 https://c/python: 3+3 → 6"
    assert text.inner_text().split() == said.split()
    assert text.locator("a").all_inner_texts() == ["https://b/", "https://c/"]


def test_code_is_copied_with_the_tool_call_that_stands_in_it(visit):
    page = visit(fake([("text", "```\nx = "), ("tool", "1+1", "2"), ("text", "\n```"), ("finish", "stop")]))
    page.evaluate("() => {navigator.clipboard.writeText = async (text) => {window.copied = text}}")
    page.ask("hi")
    page.button("Copy code").click()
    assert page.evaluate("copied") == page.locator("pre").inner_text() == "x = python: 1+1 → 2"


def axe(page):
    """Violations of axe-core's rules, as rule: elements."""
    from axe_playwright_python.sync_playwright import Axe
    violations = Axe().run(page.tab).response["violations"]
    return {one["id"]: [node["html"] for node in one["nodes"]] for one in violations}


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_axe_finds_no_violation_on_a_large_screen(visit, scheme):
    engine = fake([("tool", "1+1", "2"), *saying(MARKDOWN)])
    page = visit(engine, {"color_scheme": scheme, "reduced_motion": "reduce"})
    assert axe(page) == {}
    page.ask("a question")
    page.button("Answer again").click()
    page.get_by_text("2/2").wait_for()
    engine.reply = lambda *_: [("finish", "error")]
    page.ask("what fails")
    assert axe(page) == {}
    page.button("Settings").click()
    assert axe(page) == {}


def test_axe_finds_no_violation_on_a_dark_phone(visit):
    page = visit(fake(saying(MARKDOWN)), {**PHONE, "color_scheme": "dark", "reduced_motion": "reduce"})
    page.ask("a question")
    assert axe(page) == {}
    page.button("Show conversations").click()
    assert axe(page) == {}


def test_dark_follows_the_system_and_the_switch(visit):
    page = visit(fake(saying("x")), {"color_scheme": "dark"})

    def brightness():
        return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")

    assert brightness() < 60
    page.button("Switch between light and dark").click()
    assert brightness() > 200
    page.reload()
    assert brightness() > 200
    page.button("Switch between light and dark").click()
    assert brightness() < 60
    page.emulate_media(color_scheme="light")
    assert brightness() > 200, "back at the system's own, the page follows it"


def test_everything_can_be_done_by_keyboard(visit):
    """Without a mouse: to the message box, ask, copy, edit, answer again, switch versions, rename, new chat."""
    page = visit(fake(saying("sa", "id")))

    def focused():
        return page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent")

    def tab_to(name, key="Tab"):
        for _ in range(40):
            if focused().strip() == name:
                return
            page.keyboard.press(key)
        raise AssertionError(f"{key} never reaches {name}")

    tab_to("Skip to the message box", "Shift+Tab")
    page.keyboard.press("Enter")
    assert focused() == "Message"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.get_by_text("tokens/s").wait_for()
    assert page.texts() == ["one\ntwo", "said"] and focused() == "Message"
    tab_to("Answer again", "Shift+Tab")
    page.keyboard.press("Enter")
    page.get_by_text("2/2").wait_for()
    tab_to("Previous version", "Shift+Tab")
    page.keyboard.press("Space")
    page.get_by_text("1/2").wait_for()
    tab_to("Edit message", "Shift+Tab")
    page.keyboard.press("Enter")
    assert focused() == "Edit message" and page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    page.get_by_text("one\ntwo!").wait_for()
    page.button("Send").wait_for()
    tab_to("Rename one", "Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("renamed")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="renamed").wait_for()
    assert page.listed() == ["renamed"] and focused() == "Rename renamed"
    page.keyboard.press("Control+Shift+O")
    assert focused() == "Message" and page.texts() == []
    tab_to("Settings", "Shift+Tab")
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Settings").wait_for()
    page.keyboard.press("Escape")
    assert focused() == "Settings"


def test_the_send_button_pressed_by_keyboard_leaves_the_focus_in_the_message_box(visit):
    page = visit(fake(saying("x")))
    page.prompt.fill("hi")
    page.keyboard.press("Tab")
    assert page.button("Send").evaluate("it => it === document.activeElement")
    page.keyboard.press("Enter")
    page.answers.last.locator(".facts").wait_for()
    assert page.prompt.evaluate("it => it === document.activeElement")


def test_the_enter_that_ends_a_composition_does_not_send(visit):
    page = visit(fake(saying("x", "y")))
    page.prompt.fill("にほん")
    for options in ("isComposing: true", "keyCode: 229"):
        page.prompt.evaluate("it => it.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, "
                             f"cancelable: true, {options}}}))")
    assert page.texts() == [] and page.prompt.input_value() == "にほん"
    page.keyboard.press("Enter")
    page.get_by_text("tokens/s").wait_for()
    assert page.texts() == ["にほん", "xy"]


def test_a_reader_who_scrolls_up_is_left_alone_until_he_comes_back(visit):
    page = visit(fake(lambda *_: endless(("text", "line\n\n")), step_seconds=0.01))
    log = page.locator("#log")
    page.send("go on")

    def height():
        return log.evaluate("it => it.scrollHeight")

    def grow():
        before = height()
        while height() < before + 200:
            page.tab.wait_for_timeout(20)

    while height() < 1500:
        page.tab.wait_for_timeout(20)
    assert log.evaluate("it => it.scrollHeight - it.clientHeight - it.scrollTop") < 60
    log.hover()
    page.mouse.wheel(0, -30)
    page.button("Go to the latest message").wait_for()
    place = log.evaluate("it => it.scrollTop")
    grow()
    assert log.evaluate("it => it.scrollTop") == place
    page.button("Go to the latest message").click()
    grow()
    assert log.evaluate("it => it.scrollHeight - it.clientHeight - it.scrollTop") < 60
    assert page.button("Go to the latest message").is_hidden()


@pytest.mark.parametrize("secure", [pytest.param(True, marks=pytest.mark.slow), False], ids=["clipboard", "plain-http"])
def test_messages_and_code_are_copied_as_they_were_written(visit, secure):
    text = "**bold**\n\n```js\nlet x;\n\nx++;\n```"
    page = visit(fake(saying(text)), {"permissions": ["clipboard-read", "clipboard-write"]})
    if not secure:
        page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.open()
    page.ask("copy me")
    page.answers.last.get_by_role("button", name="Copy message").click()
    page.prompt.focus()
    page.keyboard.press("Control+V")
    assert page.prompt.input_value() == text
    page.button("Copy code").click()
    page.prompt.fill("")
    page.keyboard.press("Control+V")
    assert page.prompt.input_value() == "let x;\n\nx++;"


def test_screen_readers_hear_when_an_answer_begins_and_ends(visit):
    go = threading.Event()
    page = visit(fake(lambda *_: paused([], go, saying("said"))))
    answer = page.send("hi")
    answer.get_by_role("img", name="Thinking").wait_for()
    assert page.get_by_role("log", name="Messages").get_attribute("aria-busy") == "true"
    go.set()
    page.locator("#status", has_text="The answer is complete").wait_for()
    assert page.get_by_role("log", name="Messages").get_attribute("aria-live") == "polite"
