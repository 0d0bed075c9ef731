"""Nothing that a model, a user, a server or a file says runs on the chat page; nothing leaves it; it is small."""

import json
from pathlib import Path
from statistics import median

import pytest
from browser import browser as browser
from browser import fake, saying
from browser import visit as visit

from nanochat.common import UserError
from nanochat.server.static_files import FOLDER

RUN = "window.hacked=1,alert(1),fetch('https://example.com/')"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"<ScRiPt src=//example.com/x.js></sCrIpT><script>{RUN}//",
    f"<img src=x onerror=\"{RUN}\">",
    f"<img src=x onerror={RUN.replace(' ', '')}>",
    f"<IMG \"\"\"><SCRIPT>{RUN}</SCRIPT>\">",
    f"<img src='https://example.com/track.gif' onload=\"{RUN}\">",
    f"<svg onload=\"{RUN}\"></svg>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin=\"{RUN}\" attributeName=x dur=1s></svg>",
    f"<svg><a xlink:href=\"javascript:{RUN}\"><text x=20 y=20>x</text></a></svg>",
    f"<math><mtext></form><form><mglyph><style></math><img src onerror=\"{RUN}\">",
    f"<iframe src=\"javascript:{RUN}\"></iframe>",
    f"<iframe srcdoc=\"<script>parent.{RUN}</script>\"></iframe>",
    f"<object data=\"javascript:{RUN}\"></object><embed src=\"javascript:{RUN}\">",
    f"<body onload=\"{RUN}\"><input autofocus onfocus=\"{RUN}\">",
    f"<details open ontoggle=\"{RUN}\"><summary>x</summary></details>",
    f"<video><source onerror=\"{RUN}\"></video><audio src=x onerror=\"{RUN}\"></audio>",
    f"<marquee onstart=\"{RUN}\">x</marquee>",
    "<link rel=stylesheet href=//example.com/x.css><style>@import '//example.com/y.css';</style>",
    "<meta http-equiv=refresh content=\"0;url=https://example.com/\"><base href=https://example.com/>",
    f"<form action=\"javascript:{RUN}\"><button>x</button></form>",
    f"<template><script>{RUN}</script></template>",
    f"<noscript><p title=\"</noscript><img src=x onerror={RUN}>\"></noscript>",
    f"\"><img src=x onerror=\"{RUN}\">",
    f"'-{RUN}-'",
    f"</textarea><script>{RUN}</script>",
    f"</div></article></main><script>{RUN}</script>",
    f"<!--><script>{RUN}</script-->",
    f"<![CDATA[<script>{RUN}</script>]]>",
    f"[click](javascript:{RUN})",
    f"[click](JaVaScRiPt:{RUN})",
    f"[click](  javascript:{RUN} )",
    f"[click](java\nscript:{RUN})",
    f"[click](data:text/html,<script>{RUN}</script>)",
    f"[click](vbscript:{RUN})",
    f"[click](https://example.com/\"onmouseover=\"{RUN})",
    f"[<img src=x onerror=\"{RUN}\">](https://example.com/a)",
    f"![x](https://example.com/pixel.png \"onerror={RUN}\")",
    f"![x](x\" onerror=\"{RUN})",
    f"`<img src=x onerror=\"{RUN}\">` **<script>{RUN}</script>**",
    f"```html\" onclick=\"{RUN}\n<script>{RUN}</script>\n```",
    f"| <img src=x onerror=\"{RUN}\"> | b |\n|---|---|\n| <script>{RUN}</script> | [x](javascript:{RUN}) |",
    f"# <script>{RUN}</script>\n> <img src=x onerror=\"{RUN}\">\n\n- <svg onload=\"{RUN}\">",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;img src=x onerror={RUN}&#62; \\u003cscript\\u003e",
    f"\ue000\uf8ff\x00<script>{RUN}</script>\u202e\ufeff",
    f"<{'b<' * 200}script>{RUN}</script>",
    f"${{{RUN}}} {{{{constructor.constructor('{RUN}')()}}}} __proto__ {RUN}",
]
# what the page makes by itself; whatever else is in a message came out of a text
OURS = ("article,div,p,span,b,i,button,footer,svg,use,strong,em,code,pre,a,br,ul,ol,li,table,thead,tbody,tr,th,td,h3,"
        "h4,blockquote,hr")


def node(i, parent, role, text, **rest):
    extras = {"calls": [], "state": "done"} if role == "assistant" else {}
    return {"id": f"{i:016x}", "parent": parent, "role": role, "text": text, **extras, **rest}


def conversation_of(payloads):
    """As it is stored: each payload as question, answer, tool call, its answer, and error; the first as title."""
    nodes = []
    for payload in payloads:
        call = {"input": payload, "output": payload, "at": 0}
        for role, rest in (("user", {}), ("assistant", {"calls": [call], "state": "failed", "error": payload})):
            nodes.append(node(len(nodes), nodes[-1]["id"] if nodes else None, role, payload, **rest))
    return {"id": "f" * 16, "title": payloads[0], "updated": 1, "nodes": nodes, "picked": {}}


def assert_harmless(page):
    assert page.evaluate("window.hacked") is None
    strange = page.evaluate("""ours => [...document.querySelectorAll('main :is(#messages, #title, #notice) *, li *')]
        .filter((it) => !it.matches(ours) || [...it.attributes].some(({name, value}) =>
            name.startsWith('on') || name === 'style' && !/^(text-align: \\w+;)?$/.test(value)
            || /^(src|href|action)$/.test(name) && !/^(#|https?:)/.test(value)))
        .map((it) => it.outerHTML)""", OURS)
    assert strange == []
    page.assert_clean()


def test_there_are_at_least_40_payloads():
    assert len(set(PAYLOADS)) >= 40


@pytest.mark.parametrize("policy", [pytest.param(True, marks=pytest.mark.slow), False], ids=["policy", "no-policy"])
def test_no_payload_runs_as_question_answer_tool_call_error_or_title(visit, policy):
    """Without the content security policy as well: it is the second line, not the first."""
    page = visit(fake(saying("x")), {"bypass_csp": not policy})
    page.evaluate("one => localStorage.setItem(`nanochat/conversation/${one.id}`, JSON.stringify(one))",
                  conversation_of(PAYLOADS))
    page.reload()
    page.locator("#conversations a").click()
    page.locator(".error").nth(len(PAYLOADS) - 1).wait_for()
    bubbles = page.evaluate("[...document.querySelectorAll('.bubble')].map((it) => it.textContent)")
    assert bubbles == PAYLOADS, "what a user wrote is shown as it is"
    assert page.evaluate("[...document.querySelectorAll('.error p')].map((it) => it.textContent)") == PAYLOADS
    assert page.title().startswith("<script>")
    assert page.locator("#messages a").count() > 0
    assert_harmless(page)
    assert page.locator("#messages a:not([rel='noopener noreferrer nofollow'])").count() == 0


def test_no_payload_runs_while_it_streams_or_as_the_servers_error(visit):
    """One in six, four characters an event, so that every prefix may be on the page; the slow test takes them all."""
    texts = iter(PAYLOADS[::6])
    engine = fake(lambda *_: saying(*(text[i:i + 4] for text in [next(texts)] for i in range(0, len(text), 4))),
                  step_seconds=0, context=100_000)
    page = visit(engine, {"bypass_csp": True})
    for payload in PAYLOADS[::6]:
        page.ask(payload)
        assert_harmless(page)
    engine.refuse = UserError(PAYLOADS[2])
    error = page.ask(PAYLOADS[2]).locator(".error p")
    assert error.evaluate("it => it.textContent") == PAYLOADS[2]
    assert_harmless(page)


@pytest.mark.slow
def test_each_payload_alone_is_harmless_in_a_stream_and_in_a_file(visit, tmp_path):
    texts = iter(PAYLOADS)
    page = visit(fake(lambda *_: saying(*next(texts)), step_seconds=0, context=10_000), {"bypass_csp": True})
    for i, payload in enumerate(PAYLOADS):
        page.button("New chat").click()
        page.ask(payload)
        assert_harmless(page)
        one = {**conversation_of([payload]), "id": f"{i:016x}"}
        (tmp_path / "file.json").write_text(exported(one), encoding="utf-8")
        page.button("Settings").click()
        page.locator("#file").set_input_files(tmp_path / "file.json")
        page.get_by_text("Imported 1").wait_for()
        page.keyboard.press("Escape")
        page.locator(f"#conversations a[href='#{one['id']}']").click()
        page.locator(".error").wait_for()
        assert_harmless(page)


FILES = {
    "no JSON": lambda one: "{",
    "another format": lambda one: json.dumps({"conversations": [one]}),
    "an id that is a path": lambda one: exported({**one, "id": "../../x"}),
    "an id of the prototype": lambda one: exported({**one, "nodes": [{**one["nodes"][0], "id": "__proto__"}]}),
    "a role of its own": lambda one: exported({**one, "nodes": [{**one["nodes"][0], "role": "admin"}]}),
    "text that is none": lambda one: exported({**one, "nodes": [{**one["nodes"][0], "text": {"a": 1}}]}),
    "an id twice": lambda one: exported({**one, "nodes": one["nodes"][:1] * 2}),
    "calls that are none": lambda one: exported({**one, "nodes": [{**one["nodes"][1], "calls": [1]}]}),
    "no nodes": lambda one: exported({**one, "nodes": None}),
}


def exported(one):
    return json.dumps({"format": "nanochat conversations", "version": 1, "conversations": [one]})


def test_files_that_are_no_export_are_refused_whole(visit, tmp_path):
    page = visit(fake(saying("x")))
    page.button("Settings").click()
    one = conversation_of(["hi"])
    file = tmp_path / "file.json"
    for name, make in FILES.items():
        file.write_text(make(one), encoding="utf-8")
        page.evaluate("document.getElementById('settings-news').textContent = ''")
        page.locator("#file").set_input_files(file)
        page.get_by_text("nothing was imported").wait_for()
        assert page.stored() == [], name
    file.write_text(exported(one), encoding="utf-8")
    page.locator("#file").set_input_files(file)
    page.get_by_text("Imported 1").wait_for()


def test_storage_that_is_damaged_is_left_alone_and_the_page_works(visit):
    page = visit(fake(saying("fine")))
    page.evaluate("""() => {localStorage['nanochat/conversation/0123456789abcdef'] = '{"id":';
                            localStorage['nanochat/settings'] = 'x'; localStorage['nanochat/theme'] = 'pink'}""")
    page.reload()
    assert page.ask("hi").locator(".text").inner_text() == "fine"
    assert page.listed() == ["hi"]
    assert page.evaluate("localStorage['nanochat/conversation/0123456789abcdef']") == '{"id":'


def test_markdown_of_any_shape_is_shown_without_stalling(visit):
    texts = ["*a " * 10_000, "**a*b_c" * 5_000, "[" * 20_000, "`" * 20_000, "` `` ``` " * 4_000, ">" * 20_000,
             "- " * 10_000, "\n".join(" " * i + "- x" for i in range(300)), "|a" * 10_000 + "\n" + "|-" * 10_000,
             "https://a" * 4_000, "[a](https://" * 3_000, "- - " * 8_000 + "x", "1. x\n\n" * 4_000]
    seconds = seconds_of(visit(fake(saying("x"))), texts)
    assert max(seconds) < 5, "30 kB take about 0.05 s; work that grows faster than the text would take minutes"


def seconds_of(page, texts):
    """Seconds to render each of the texts."""
    return page.evaluate("""async (texts) => {
        const { render } = await import("/static/markdown.js");
        return texts.map((text) => {
            const start = performance.now();
            render(document.createElement("div"), text);
            return (performance.now() - start) / 1000;
        });
    }""", texts)


LINES = {
    "hashes": lambda n: "# " + "#" * n + "x",
    "blanks": lambda n: "| a |\n" + " " * n + "x|",
    "a fence": lambda n: "```" + "a" * n + "`",
    "blanks of a fence": lambda n: "```" + " " * n + "`",
    "dots of an address": lambda n: "https://" + "." * n + "a",
    "parentheses of an address": lambda n: "https://a" + ")" * n,
    "tabs": lambda n: "- a\n" + "\t" * n + "x",
    "dashes": lambda n: "| a |\n|" + "-" * n + "x|",
    "escaped pipes": lambda n: "|a|\n|-|\n" + "\\|" * n,
    "emphasis": lambda n: "**a*b_c" * (n // 10),
    "backticks": lambda n: "`` ` ``` " * (n // 10),
}


def test_twice_the_line_takes_twice_the_time(visit):
    """Four times would be quadratic work. Times below 20 ms tell nothing: quadratic work takes seconds here."""
    page, n = visit(fake(saying("x"))), 60_000
    for name, line in LINES.items():
        once, twice = (median(seconds_of(page, [line(size)] * 5)) for size in (n, 2 * n))
        assert twice < max(3.2 * once, 0.02), f"{name}: {once:.3f} s for {n}, {twice:.3f} s for twice that"


def test_the_page_is_plain_files_of_less_than_80_kb_without_inline_code_or_other_hosts():
    files = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert sum(map(len, (text.encode() for text in files.values()))) < 80_000
    for name, text in files.items():
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text, name
        allowed = ("http://www.w3.org/2000/svg",)
        assert not [word for word in text.split() if "://" in word and name.endswith((".html", ".css"))
                    and not any(one in word for one in allowed)], name
    assert Path(FOLDER / "index.html").is_file() and "style=" not in files["index.html"]
