"""What a user does on the chat page, in a real Chromium against the real server."""

import json
import re
import threading

from browser import PHONE, counting, echo, fake, paused, prompt_of, saying
from browser import browser as browser
from browser import visit as visit
from fake_engine import endless, until

from nanochat.common import UserError
from scripts import screenshots

# --- streaming ------------------------------------------------------------------------------------


def test_text_is_on_the_page_in_many_pieces_while_the_answer_is_still_being_written(visit):
    go = threading.Event()
    words = [f"word{i} " for i in range(20)]
    page = visit(fake(lambda *_: paused([("text", word) for word in words], go, saying("the end")),
                      step_seconds=0.02))
    page.tab.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver(() => seen.add(document.querySelector('.text')?.textContent))
            .observe(document.getElementById('messages'), {subtree: true, childList: true, characterData: true});
    }""")
    answer = page.send("hello")
    answer.get_by_text("word19").wait_for()
    assert "the end" not in answer.inner_text() and page.button("Stop").is_visible()
    assert page.locator("#log").get_attribute("aria-busy") == "true"
    go.set()
    page.button("Send").wait_for()
    assert page.texts() == ["hello", "".join(words) + "the end"]
    assert page.evaluate("seen.size") >= 5, "the text came in too few pieces"
    assert page.locator("#log").get_attribute("aria-busy") == "false"


def test_an_answer_says_its_tokens_its_rate_and_when_its_first_token_came(visit):
    facts = visit(fake(saying("one", "two", "three"))).ask("hi").locator(".facts")
    assert re.fullmatch(r"3 tokens · [\d.,]+ tokens/s · first token after \d+ ms", facts.inner_text())
    assert re.fullmatch(r"seed \d+", facts.get_attribute("title"))


def test_tool_calls_stand_where_they_were_made_and_a_cut_off_answer_says_so(visit):
    engine = fake([("text", "It is "), ("tool", "12*3", "36"), ("text", " 36, not "), ("tool", "1/0", None),
                   ("finish", "length")])
    answer = visit(engine).ask("12*3?")
    assert answer.locator(".text").inner_text() == "It is python: 12*3 → 36 36, not python: 1/0 → refused"
    assert "cut off at the most tokens allowed" in answer.inner_text()


def test_a_stopped_answer_keeps_its_text_and_frees_its_row(visit):
    engine = fake(lambda *_: endless(("text", "and on ")))
    page = visit(engine)
    for stop in (page.button("Stop").click, lambda: page.keyboard.press("Escape")):
        page.send("go on").get_by_text("and on and on").wait_for()
        stop()
        page.answers.last.get_by_text("stopped").wait_for()
        assert page.texts()[-1].startswith("and on and on")
        assert page.prompt.evaluate("it => it === document.activeElement")
    until(lambda: len(engine.aborted) == 2)
    assert [one["state"] for one in page.stored()[0]["nodes"] if one["role"] == "assistant"] == ["stopped"] * 2
    said = page.texts()
    page.reload()
    assert page.texts() == said


def test_events_cut_into_single_bytes_arrive_whole(visit):
    text = "Grüße, 你好, 👩‍🚀 and \u2028 and **bold**"
    page = visit(fake(saying(*text)))
    page.add_init_script("""const whole = fetch; window.fetch = async (...request) => {
        const response = await whole(...request);
        const transform = (chunk, out) => {for (const byte of chunk) out.enqueue(Uint8Array.of(byte))};
        return new Response(response.body.pipeThrough(new TransformStream({transform})), response);
    }""")
    page.open()
    answer = page.ask("hi").locator(".text")
    assert answer.evaluate("it => it.textContent") == text.replace("**", "")
    assert answer.locator("strong").inner_text() == "bold"


def test_events_are_the_same_wherever_the_network_cuts_them(visit):
    """Line ends of all three kinds, characters of 2 to 4 bytes, comments; cut at every byte and into single ones."""
    page = visit(fake(echo))
    found = page.evaluate("""async () => {
        const { events } = await import("/static/api.js");
        const sent = ["data: é€👩\\n\\n: ping\\n\\n", "data:x\\r\\ndata: y\\r\\n\\r\\n",
                      "event: z\\rdata: \\u2028\\r\\rdata: lost"].join("");
        const bytes = new TextEncoder().encode(sent);
        const read = async (chunks) => {
            const stream = new ReadableStream({start(c) {for (const chunk of chunks) c.enqueue(chunk); c.close()}});
            return JSON.stringify(await Array.fromAsync(events(stream)));
        };
        const all = [await read(Array.from(bytes, (b) => Uint8Array.of(b)))];
        for (let cut = 0; cut <= bytes.length; cut++) all.push(await read([bytes.slice(0, cut), bytes.slice(cut)]));
        return [...new Set(all)];
    }""")
    assert [json.loads(one) for one in found] == [["é€👩", "x\ny", "\u2028"]]


# --- branches -------------------------------------------------------------------------------------


def test_the_whole_conversation_is_sent_in_turns(visit):
    engine = fake(counting())
    page = visit(engine)
    page.ask("first")
    page.ask("second")
    assert page.texts() == ["first", "answer 1", "second", "answer 2"]
    said = prompt_of(engine)
    assert [said.index(text) for text in ("first", "answer 1", "second")] == sorted(
        said.index(text) for text in ("first", "answer 1", "second"))


def test_an_edited_message_starts_a_branch_and_the_old_one_stays(visit):
    engine = fake(counting())
    page = visit(engine)
    page.ask("first")
    page.ask("second")
    page.questions.first.hover()
    page.questions.first.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Edit message").fill("other")
    page.button("Send").first.click()
    page.get_by_text("answer 3").wait_for()
    page.get_by_text("2/2").wait_for()
    assert page.texts() == ["other", "answer 3"] and "first" not in prompt_of(engine)
    page.button("Previous version").click()
    assert page.texts() == ["first", "answer 1", "second", "answer 2"]
    assert page.button("Next version").evaluate("it => it === document.activeElement")
    page.reload()
    assert page.texts() == ["first", "answer 1", "second", "answer 2"]
    page.button("Next version").click()
    assert page.texts() == ["other", "answer 3"]


def test_answering_again_keeps_both_answers_and_sends_the_question_alone(visit):
    engine = fake(counting())
    page = visit(engine)
    page.ask("why")
    page.button("Answer again").click()
    page.get_by_text("answer 2").wait_for()
    page.get_by_text("2/2").wait_for()
    assert "answer 1" not in prompt_of(engine)
    page.button("Previous version").click()
    assert page.texts() == ["why", "answer 1"]
    page.ask("and then")
    assert page.texts() == ["why", "answer 1", "and then", "answer 3"] and "answer 2" not in prompt_of(engine)


def test_an_edit_is_given_up_with_escape(visit):
    page = visit(fake(counting()))
    page.ask("first")
    page.questions.last.hover()
    page.button("Edit message").click()
    page.get_by_role("textbox", name="Edit message").fill("other")
    page.keyboard.press("Escape")
    assert page.texts() == ["first", "answer 1"] and len(page.stored()[0]["nodes"]) == 2


# --- settings -------------------------------------------------------------------------------------


def test_settings_reach_the_server_and_survive_a_reload(visit):
    engine = fake(echo)
    page = visit(engine)
    page.ask("plain")
    page.button("Settings").click()
    assert page.get_by_label("Temperature").get_attribute("placeholder") == "0.6"
    values = {"System prompt": "Be brief", "Temperature": "0.25", "Max tokens": "77", "Top-k": "5", "Top-p": "0.5",
              "Seed": "1234"}
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    page.button("Save").click()
    page.reload()
    page.button("Send").wait_for()
    assert "Be brief" in page.ask("again").inner_text()
    plain, params = (request.params for request in engine.submitted)
    assert (plain.temperature, plain.top_k, plain.max_tokens) == (0.6, 50, 512)
    assert (params.temperature, params.top_k, params.top_p, params.seed, params.max_tokens) == (0.25, 5, 0.5, 1234, 77)
    page.button("Settings").click()
    page.get_by_label("Temperature").fill("3")
    page.button("Save").click()
    assert page.get_by_role("dialog", name="Settings").is_visible(), "a temperature of 3 must not be saved"


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_context_that_is_nearly_full_is_told(visit):
    page = visit(fake(saying("x"), context=100))
    page.ask("a" * 50)
    assert page.locator("#notice").inner_text() == ""
    page.ask("b" * 30)
    page.get_by_text("of the model's context. A new chat has room.").wait_for()
    error = page.ask("c" * 50).locator(".error p")
    assert "prompt and answer must fit the context of 100 tokens" in error.evaluate("it => it.textContent")


def test_a_refusal_is_shown_in_the_servers_words_and_tried_again(visit):
    engine = fake(saying("fine"), refuse=UserError("the moon is in the wrong phase"))
    page = visit(engine)
    error = page.ask("hi").locator(".error p")
    assert error.evaluate("it => it.textContent") == "the moon is in the wrong phase"
    engine.refuse = None
    page.ask("another question")
    assert "hi" not in prompt_of(engine), "a question without an answer is left out"
    page.button("Answer again").first.click()
    page.get_by_text("2/2").wait_for()
    assert page.texts() == ["hi", "fine"]


def test_failures_are_shown_in_the_servers_words(visit):
    engine = fake([("text", "half"), ("finish", "error")], failing_steps=1)
    page = visit(engine)
    sentences = ["the engine failed at this request or one beside it; see the log",
                 "the model gave numbers that are not finite, so there is no answer"]
    for sentence in sentences:
        error = page.ask("hi").locator(".error")
        assert error.locator("p").evaluate("it => it.textContent") == sentence
        assert error.get_by_role("button", name="Try again").is_visible()
    assert page.texts()[-1] == "half"


def test_a_server_that_is_gone_is_told_and_found_again(visit):
    page = visit(fake(counting()))
    page.context.set_offline(True)
    page.send("hi").get_by_text("the server cannot be reached").wait_for()
    page.locator("#notice", has_text="the server cannot be reached").wait_for()
    page.context.set_offline(False)
    page.locator("#notice:empty").wait_for(state="attached")
    page.button("Try again").click()
    page.get_by_text("answer 1").wait_for()


def test_a_stream_that_breaks_off_is_told(visit):
    page = visit(fake(echo))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body='data: {"choices":[{"delta":{"content":"half"}}]}\n\n'))
    answer = page.ask("hi")
    assert answer.locator(".text").inner_text() == "half"
    assert "the connection ended before the answer did" in answer.inner_text().lower()


def test_while_the_model_is_loaded_the_page_says_so_and_keeps_what_is_typed(visit):
    loaded = threading.Event()
    page = visit(lambda: loaded.wait(10) and fake(saying("ready")), ready=False)
    page.get_by_text("the model is being loaded").wait_for()
    page.send("early")
    assert page.button("Send").is_disabled() and page.answers.count() == 0
    loaded.set()
    page.locator("#send:enabled").click()
    page.get_by_text("ready").wait_for()
    assert page.texts() == ["early", "ready"]


def test_a_server_with_a_token_asks_for_it_until_it_is_right(visit):
    page = visit(fake(saying("hello")), ready=False, token="open sesame")
    dialog = page.get_by_role("dialog", name="This server asks for a token")
    dialog.wait_for()
    page.keyboard.press("Escape")
    page.locator("#notice", has_text="asks for its token").wait_for()
    page.send("asked again")
    for token in ("wrong", "open\u200b sesame", " open sesame\n"):
        dialog.wait_for()
        asked = "this one has U+200B at place 5." if token[0] == " " else "Authorization: Bearer"
        dialog.get_by_text(asked).wait_for()
        dialog.locator("input").fill(token)
        page.keyboard.press("Enter")
    page.locator("#notice:empty").wait_for(state="attached")
    assert not dialog.is_visible() and "hello" in page.ask("hi").inner_text()
    page.reload()
    page.locator("#notice:empty").wait_for(state="attached")
    assert not dialog.is_visible()


def test_on_a_phone_enter_breaks_the_line_and_the_button_sends(visit):
    page = visit(fake(saying("x")), PHONE)
    page.prompt.fill("one")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    assert page.prompt.input_value() == "one\ntwo" and page.texts() == []
    page.button("Send").tap()
    page.answers.last.locator(".facts").wait_for()
    assert page.texts() == ["one\ntwo", "x"]


def test_pictures_are_taken_of_answers_that_come_at_once(visit, tmp_path, monkeypatch):
    """Stop is on the page for less than a frame then, so nobody may wait for it."""
    monkeypatch.setattr(screenshots, "ANSWER_MS", 10_000)
    page = visit(fake(saying("x"), step_seconds=0))
    page.add_init_script("""addEventListener('DOMContentLoaded',
        () => document.getElementById('stop').style.display = 'none')""")
    screenshots.take(page, page.url, ["one", "two"], tmp_path / "x.png")
    assert page.texts() == ["one", "x", "two", "x"] and (tmp_path / "x.png").stat().st_size > 1000


def test_the_page_fits_a_phone_and_its_menu_opens_and_closes(visit):
    page = visit(fake(saying("word " * 100, "\n\n```\n" + "x" * 200 + "\n```")), PHONE)
    page.ask("a question " * 20)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390
               for box in (item.bounding_box() for item in page.locator("article").all()))
    link = page.locator("#conversations a")
    assert not link.is_visible()
    page.button("Show conversations").click()
    page.keyboard.press("Escape")
    link.wait_for(state="hidden")
    page.button("Show conversations").click()
    page.button("New chat").click()
    link.wait_for(state="hidden")
    page.get_by_text("What would you like to know?").wait_for()
