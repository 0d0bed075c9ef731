"""Conversations on the chat page: kept, deleted, in two tabs, in a storage that is full, and edits half typed."""

import threading

from browser import browser as browser
from browser import counting, fake, paused, prompt_of, saying
from browser import visit as visit
from fake_engine import endless, until


def start_edit(page, text):
    """Type into the last question, without sending it; returns the box."""
    page.questions.last.hover()
    page.questions.last.get_by_role("button", name="Edit message").click()
    box = page.get_by_role("textbox", name="Edit message")
    box.fill(text)
    return box


def test_a_half_typed_edit_outlives_a_branch_of_another_tab_and_is_sent_into_its_own(visit):
    engine = fake(counting())
    page = visit(engine)
    page.ask("first")
    page.ask("second")
    other = page.another_tab().open(at="/" + page.tab.url.rpartition("/")[2])
    box = start_edit(page, "mine")
    other.questions.first.hover()
    other.questions.first.get_by_role("button", name="Edit message").click()
    other.get_by_role("textbox", name="Edit message").fill("theirs")
    other.keyboard.press("Enter")
    other.get_by_text("answer 3").wait_for()
    page.questions.first.get_by_text("1/2").wait_for()
    assert page.texts() == ["first", "answer 1", "answer 2"] and box.input_value() == "mine"
    assert box.evaluate("it => it === document.activeElement")
    page.keyboard.press("Enter")
    page.get_by_text("answer 4").wait_for()
    page.button("Send").wait_for()
    assert page.texts() == ["first", "answer 1", "mine", "answer 4"] and "theirs" not in prompt_of(engine)
    box = start_edit(page, "given up")
    page.button("Next version").first.click()
    assert page.texts() == ["theirs", "answer 3"] and box.count() == 0


def test_a_half_typed_edit_outlives_the_model_getting_ready(visit):
    loaded = threading.Event()
    page = visit(lambda: loaded.wait(10) and fake(saying("x")), ready=False)
    question = {"id": "0" * 16, "parent": None, "role": "user", "text": "asked"}
    page.evaluate("one => localStorage.setItem('nanochat/conversation/' + one.id, JSON.stringify(one))",
                  {"id": "f" * 16, "title": "t", "updated": 1, "picked": {}, "nodes": [question]})
    page.reload()
    page.locator("#conversations a").click()
    box = start_edit(page, "typed")
    loaded.set()
    page.locator("#notice:empty").wait_for(state="attached")
    assert box.input_value() == "typed" and box.evaluate("it => it === document.activeElement")


def test_a_reload_keeps_conversations_place_and_draft(visit):
    page = visit(fake(counting()))
    page.ask("first")
    page.button("New chat").click()
    page.ask("second")
    page.prompt.fill("half a thou")
    page.reload()
    page.get_by_text("answer 2").wait_for()
    assert page.texts() == ["second", "answer 2"] and page.prompt.input_value() == "half a thou"
    assert page.listed() == ["second", "first"]
    page.get_by_role("link", name="first").click()
    page.get_by_text("answer 1").wait_for()
    assert page.texts() == ["first", "answer 1"] and page.prompt.input_value() == ""
    page.go_back()
    page.get_by_text("answer 2").wait_for()
    assert page.texts() == ["second", "answer 2"] and page.prompt.input_value() == "half a thou"
    page.button("New chat").click()
    page.prompt.fill("something new")
    page.reload()
    assert page.prompt.input_value() == "something new"


def test_conversations_are_renamed_and_deleted(visit):
    page = visit(fake(counting()))
    page.ask("first")
    page.button("New chat").click()
    page.ask("second")
    page.locator("#conversations li").last.hover()
    page.button("Rename first").click()
    page.get_by_role("textbox", name="Rename the conversation").fill("my own name")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="my own name").wait_for()
    assert page.listed() == ["second", "my own name"]
    page.locator("#conversations li").first.hover()
    page.button("Delete second").click()
    page.button("Cancel").click()
    assert len(page.listed()) == 2
    page.button("Delete second").click()
    page.button("Delete").click()
    page.get_by_text("What would you like to know?").wait_for()
    assert page.listed() == ["my own name"] and len(page.stored()) == 1


def test_after_a_deletion_the_keyboard_has_a_place_and_back_leads_to_what_is_left(visit):
    page = visit(fake(counting()))
    for text in ("first", "second", "third"):
        page.ask(text)
        page.button("New chat").click()
    page.get_by_role("link", name="third").click()
    page.get_by_text("answer 3").wait_for()
    for title in ("first", "third"):
        page.button(f"Delete {title}").focus()
        page.keyboard.press("Enter")
        page.button("Delete").focus()
        page.keyboard.press("Enter")
        page.get_by_role("link", name=title).wait_for(state="detached")
        assert page.evaluate("document.activeElement.id") == "new"
    for _ in range(4):  # new chat, the third that is gone, new chat, the second
        page.go_back()
    page.get_by_text("answer 2").wait_for()


def test_an_answer_whose_conversation_another_tab_deletes_is_stopped(visit):
    engine = fake(lambda *_: endless(("text", "and on ")), context=100_000)
    page = visit(engine)
    page.send("go on").get_by_text("and on and on").wait_for()
    other = page.another_tab().open(at="/" + page.tab.url.rpartition("/")[2])
    other.locator("#conversations li").first.hover()
    other.button("Delete go on").click()
    other.button("Delete").click()
    until(lambda: len(engine.aborted) == 1)
    page.get_by_text("What would you like to know?").wait_for()
    assert page.stored() == []


def test_what_is_typed_in_a_conversation_is_deleted_with_it(visit):
    page = visit(fake(counting()))
    page.ask("first")
    page.prompt.fill("half a secret")
    page.button("Settings").click()
    page.button("Delete all").click()
    page.get_by_role("dialog", name="Delete all conversations?").get_by_role("button", name="Delete all").click()
    page.get_by_text("All conversations are deleted.").wait_for()
    assert page.evaluate("Object.keys(sessionStorage)") == []


def test_an_export_comes_back_by_import_and_a_wrong_file_changes_nothing(visit, tmp_path):
    page = visit(fake(counting()))
    page.ask("first")
    page.button("Settings").click()
    with page.expect_download() as download:
        page.button("Export").click()
    download.value.save_as(tmp_path / "all.json")
    page.button("Delete all").click()
    page.get_by_role("dialog", name="Delete all conversations?").get_by_role("button", name="Delete all").click()
    page.get_by_text("All conversations are deleted.").wait_for()
    assert page.stored() == []
    (tmp_path / "wrong.json").write_text('{"conversations": [{"id": 1}]}')
    page.locator("#file").set_input_files(tmp_path / "wrong.json")
    page.get_by_text("nothing was imported").wait_for()
    assert page.stored() == []
    for _ in range(2):  # again adds nothing
        page.locator("#file").set_input_files(tmp_path / "all.json")
        page.get_by_text("Imported 1").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("link", name="first").click()
    page.get_by_text("answer 1").wait_for()
    assert page.texts() == ["first", "answer 1"] and len(page.stored()[0]["nodes"]) == 2


def test_two_tabs_keep_each_others_messages(visit):
    page = visit(fake(counting()))
    page.ask("first")
    other = page.another_tab().open(at="/" + page.tab.url.rpartition("/")[2])
    other.get_by_text("answer 1").wait_for()
    page.ask("from one")
    other.get_by_text("answer 2").wait_for()
    other.ask("from the other")
    page.get_by_text("answer 3").wait_for()
    assert page.texts() == other.texts() == ["first", "answer 1", "from one", "answer 2", "from the other", "answer 3"]
    other.button("New chat").click()
    other.ask("elsewhere")
    page.get_by_role("link", name="elsewhere").wait_for()
    assert len(page.stored()) == 2 and page.texts()[-1] == "answer 3"
    other.assert_clean()


def test_an_answer_goes_on_while_another_conversation_is_read(visit):
    go = threading.Event()
    page = visit(fake(lambda prompt, _: paused([("text", "slow ")], go, saying("done")) if "long" in prompt
                      else saying("quick")))
    page.send("long one").get_by_text("slow").wait_for()
    page.button("New chat").click()
    page.ask("short one")
    assert page.texts() == ["short one", "quick"]
    go.set()
    page.get_by_role("link", name="long one").click()
    page.get_by_text("slow done").wait_for()


def test_a_storage_that_is_full_is_told_and_the_page_goes_on(visit):
    page = visit(fake(counting()))
    page.evaluate("() => {Storage.prototype.setItem = () => {throw new DOMException('x', 'QuotaExceededError')}}")
    page.ask("first")
    page.get_by_text("The browser's storage is full").wait_for()
    page.ask("second")
    assert page.texts() == ["first", "answer 1", "second", "answer 2"]


def test_deleting_makes_room_for_what_a_full_storage_could_not_take(visit):
    page = visit(fake(counting()))
    page.ask("first")
    page.button("New chat").click()
    page.evaluate("""() => {window.whole = Storage.prototype.setItem;
        Storage.prototype.setItem = () => {throw new DOMException('x', 'QuotaExceededError')}}""")
    page.ask("second")
    page.get_by_text("The browser's storage is full").wait_for()
    page.evaluate("() => {Storage.prototype.setItem = whole}")
    page.locator("#conversations li").last.hover()
    page.button("Delete first").click()
    page.button("Delete").click()
    page.locator("#notice:empty").wait_for(state="attached")
    assert [one["title"] for one in page.stored()] == ["second"]
    page.reload()
    page.get_by_text("answer 2").wait_for()
