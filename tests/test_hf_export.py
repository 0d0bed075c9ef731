"""nanochat/hf_export.py and scripts.tok_export: what other libraries make of our files is what we make of the text."""

import base64
import json
from pathlib import Path

import jinja2
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanochat import hf_export
from nanochat.common import UserError, run_script
from nanochat.hf_export import export, huggingface_files
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import tok_export

TEXTS = ["the cat sat on the mat, and that's that.\n\nBe brief. 12+30 is 42; it is the 3rd line <|of|> 5 < 6 |> 7."]
HOSTILE = [*SPECIAL_TOKENS, *(name[:-1] for name in SPECIAL_TOKENS[:3]), "<", "<|", "|>", "bos|>", "{{", "{%- x %}"]
contents = st.lists(st.sampled_from([*"the cat12.\n '", "\r\n", "  ", "한", "🙂", "\u0301", "\xa0", "\x00", *HOSTILE]),
                    max_size=12).map("".join)
parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]),
                                        "text": contents}), max_size=4)


def alternating(system, contents):
    """A conversation of a system message, unless None, and of user and assistant in turns."""
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


conversations = st.builds(
    lambda system, turns: alternating(system, [content for turn in turns for content in turn]),
    st.none() | contents, st.lists(st.tuples(contents, contents | parts), min_size=1, max_size=3))


def disarmed(conversation):
    """The conversation as a template can spell it: text parts in a row are one, names of special tokens are broken."""
    def text(content):
        for name in SPECIAL_TOKENS:
            content = content.replace(name, "< " + name[1:])
        return content

    def join(parts):
        joined = []
        for part in parts:
            if joined and part["type"] == joined[-1]["type"] == "text":
                joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
            else:
                joined.append(part)
        return [part | {"text": text(part["text"])} for part in joined]

    return {"messages": [message | {"content": (text if isinstance(message["content"], str) else join)(
        message["content"])} for message in conversation["messages"]]}


class Exported:
    """The exported files as other libraries use them."""

    def __init__(self, files):
        self.encoder = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        self.config = json.loads(files["tokenizer_config.json"])
        self.templates = [environment.from_string(self.config["chat_template"]) for environment in (
            ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True), jinja2.Environment())]

    def text(self, conversation, **flags):
        def refuse(message):
            raise jinja2.TemplateError(message)

        first, second = (template.render(messages=conversation["messages"], raise_exception=refuse, **flags)
                         for template in self.templates)
        assert first == second
        return first

    def ids(self, conversation, **flags):
        return self.encoder.encode(self.text(conversation, **flags), add_special_tokens=False).ids


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 305)


@pytest.fixture(scope="module")
def exported(tokenizer):
    return Exported(huggingface_files(tokenizer))


# --- the chat template ------------------------------------------------------------------------------


def test_the_template_gives_the_ids_of_render_conversation(tokenizer, exported):
    tool_call = [{"type": "text", "text": "Let me see. "}, {"type": "python", "text": "12+30"},
                 {"type": "python_output", "text": "42"}, {"type": "text", "text": "\nIt is 42."}]
    conversation = alternating("  Be brief.\n", ["the cat?\n", tool_call, "\n the mat <|of|>", "that. "])
    assert exported.ids(conversation) == tokenizer.render_conversation(conversation)[0]
    asked = {"messages": conversation["messages"][:-1]}
    assert exported.ids(asked, add_generation_prompt=True) == tokenizer.render_for_completion(asked)
    assert exported.ids(conversation, add_generation_prompt=True) == tokenizer.render_for_completion(asked)
    assert exported.text(alternating(None, ["a", "b"])) == (
        "<|bos|><|user_start|>a<|user_end|><|assistant_start|>b<|assistant_end|>")


@settings(max_examples=250, deadline=None)
@given(conversations)
def test_on_any_content_only_the_names_of_special_tokens_are_spelled_differently(tokenizer, exported, conversation):
    ids = exported.ids(conversation)
    assert ids == tokenizer.render_conversation(disarmed(conversation))[0]
    assert exported.ids(conversation, add_generation_prompt=True) == tokenizer.render_for_completion(
        disarmed(conversation))
    # and nobody's text became a special token
    ours = tokenizer.render_conversation(conversation)[0]
    assert [id for id in ids if id >= tokenizer.bos_id] == [id for id in ours if id >= tokenizer.bos_id]


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_special_token_in_content_is_broken_by_a_space(tokenizer, exported, name):
    broken = "< " + name[1:]
    split = [{"type": "text", "text": name[:4]}, {"type": "text", "text": name[4:]}]  # two parts that make one name
    for content in (f"a{name}{name}\n", split, [{"type": "python", "text": name}]):
        text = exported.text(alternating(name, [name, content]))
        assert text.startswith(f"<|bos|><|user_start|>{broken}\n\n{broken}<|user_end|><|assistant_start|>")
        assert broken in text.split("<|assistant_start|>")[1]
    # what would happen without: the library finds the name anywhere in a text
    assert exported.encoder.encode(f"a{name}").ids == [*tokenizer.encode("a"), tokenizer.special_id(name)]


def test_a_users_content_may_be_text_parts(exported):
    as_parts = alternating("s", [[{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]])
    assert exported.text(as_parts) == exported.text(alternating("s", ["the cat"]))


@pytest.mark.parametrize("messages", [
    [], [("assistant", "x")], [("system", "x")], [("system", "x"), ("assistant", "y")], [("tool", "x")],
    [("user", "x"), ("user", "y")], [("user", "x"), ("system", "y")], [("user", None)], [("user", 5)],
    [("user", {"type": "text", "text": "x"})], [("system", None), ("user", "x")], [("user", "x"), ("assistant", None)],
    [("user", [{"type": "python", "text": "1"}])], [("user", "x"), ("assistant", [{"type": "image", "text": ""}])],
    [("user", "x"), ("assistant", [{"type": "text", "text": 5}])],
    [("user", "x"), ("assistant", [{"type": "python", "text": None}])],
])
def test_what_ours_refuses_the_template_refuses(tokenizer, exported, messages):
    conversation = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(UserError):
        tokenizer.render_conversation(conversation)
    with pytest.raises(jinja2.TemplateError):
        exported.text(conversation)


def test_a_completion_without_a_user_message_is_refused(exported):
    for messages in ([("assistant", "x")], [("system", "x"), ("assistant", "y")]):
        with pytest.raises(jinja2.TemplateError, match="must hold a user message"):
            exported.text({"messages": [{"role": role, "content": content} for role, content in messages]},
                          add_generation_prompt=True)


def test_the_config_names_every_special_token_with_its_id(tokenizer, exported):
    config = exported.config
    assert {int(id): token["content"] for id, token in config["added_tokens_decoder"].items()} == {
        tokenizer.special_id(name): name for name in SPECIAL_TOKENS}
    assert all(token["special"] and not token["normalized"] for token in config["added_tokens_decoder"].values())
    assert (config["bos_token"], config["eos_token"]) == ("<|bos|>", "<|assistant_end|>")
    assert {config["bos_token"], config["eos_token"], *config["additional_special_tokens"]} == set(SPECIAL_TOKENS)
    assert config["clean_up_tokenization_spaces"] is False
    names = json.loads(huggingface_files(tokenizer)["special_tokens_map.json"])
    assert names == {key: config[key] for key in names} and len(names) == 4


# --- files ------------------------------------------------------------------------------------------


def contents_of(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def test_an_export_is_written_whole_and_an_earlier_one_replaced(tokenizer, tmp_path):
    folder = tmp_path / "deep" / "out"
    assert export(tokenizer, folder) == [folder / name for name in huggingface_files(tokenizer)]
    assert contents_of(folder) == huggingface_files(tokenizer)
    other = Tokenizer.train(TEXTS, 300)
    export(other, folder)
    assert contents_of(folder) == huggingface_files(other)
    (tmp_path / "empty").mkdir()
    export(other, tmp_path / "empty")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (folder.stat().st_mode & 0o777, (folder / "tokenizer.json").stat().st_mode & 0o777) == (0o755, 0o644)


def test_a_folder_with_anything_else_is_left_as_it_is(tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError) as error:
        export(tokenizer, tmp_path / "out")
    assert str(error.value) == ("the export needs a folder that is empty, new or holds an earlier export, "
                                f"{tmp_path}/out holds model.safetensors")
    assert contents_of(tmp_path / "out") == {"model.safetensors": "mine", "tokenizer.json": "mine"}
    with pytest.raises(UserError, match="the export needs a folder, .*model.safetensors is none"):
        export(tokenizer, tmp_path / "out" / "model.safetensors")


def test_a_failed_write_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "atomic_write", full)
    with pytest.raises(UserError, match="cannot be written to .* \\(No space left on device\\)"):
        export(tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        export(tokenizer, tmp_path / "out", "gguf")
    assert str(error.value) == "the format must be one of huggingface, tiktoken, got 'gguf'"
    assert not list(tmp_path.iterdir())


# --- the program ------------------------------------------------------------------------------------


def run(*argv):
    run_script(lambda: tok_export.parse_args(list(argv)), tok_export.main)


def test_the_program_writes_what_tiktoken_needs(tokenizer, own_base_dir, tmp_path, capsys):
    tokenizer.save()
    run("--format", "tiktoken", "--out", str(tmp_path / "out"))
    files = contents_of(tmp_path / "out")
    assert capsys.readouterr().out.split() == [f"{tmp_path}/out/tokenizer.tiktoken", f"{tmp_path}/out/encoding.json"]
    lines = (line.split() for line in files["tokenizer.tiktoken"].splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = tiktoken.Encoding(**json.loads(files["encoding.json"]), mergeable_ranks=ranks)
    for text in (TEXTS[0], "<|bos|> 한국어 🙂\r\n  x\u0301"):
        assert encoding.encode_ordinary(text) == tokenizer.encode(text)
    assert encoding.encode("<|bos|>", allowed_special="all") == [tokenizer.bos_id]
    assert encoding.n_vocab == tokenizer.vocab_size


def test_the_program_writes_for_hugging_face_into_the_base_directory(tokenizer, own_base_dir, tmp_path, capsys):
    tokenizer.save()
    run()
    assert contents_of(own_base_dir / "export" / "huggingface") == huggingface_files(tokenizer)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit):
        run("--out", str(tmp_path / "file"))
    assert capsys.readouterr().err == f"error: the export needs a folder, {tmp_path}/file is none\n"
