"""The chat program: what goes to stdout, what it remembers, what it forgets, and its sentences."""

import builtins
import io

import pytest
import torch
from tiny_engine import CONFIG, byte_tokenizer, random_model, tool_script
from tiny_engine import one_thread as one_thread

from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError, base_dir, run_script
from nanochat.engine import Engine, SamplingParams
from scripts import chat_cli

QUESTION = "What is 37 plus 85?"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def answering(tokenizer, question, expression="37+85", result="122", answer="It is 122."):
    """A model whose answer to `question` as the first turn calls the tool and then says `answer`."""
    model = random_model()
    start = len(tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]}))
    model.script = tool_script(tokenizer, start, expression)
    resumed = start + len(model.script) + (len(result) + 2 if result else 0)
    model.script |= dict(enumerate([*tokenizer.encode(answer), tokenizer.special_id("<|assistant_end|>")], resumed))
    return model


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """The program with a model that answers QUESTION, at temperature 0."""
    def load(stage, **options):
        print("kernels: all of them")
        return answering(tokenizer, QUESTION), tokenizer, {"step": 7}

    monkeypatch.setattr(chat_cli, "load_model", load)

    def program(*flags):
        chat_cli.main(chat_cli.parse_args(["--temperature", "0", *flags]))
    return program


def chat_of(tokenizer, **changes):
    params = SamplingParams(**{"max_tokens": 10, "temperature": 0.0} | changes)
    return chat_cli.Chat(Engine(random_model(), tokenizer, max_batch=1), params)


def say(chat, text):
    """Reply to `text`; return the notes and the ids of the prompt that the model saw."""
    seen = []
    submit = chat.engine.submit
    chat.engine.submit = lambda prompt, params: seen.append(prompt) or submit(prompt, params)
    notes = [values[0] for kind, *values in chat.reply(text) if kind == "note"]
    chat.engine.submit = submit
    return notes, seen[0]


# --- one prompt -----------------------------------------------------------------------------------


def test_one_prompt_prints_the_answer_alone_and_the_call_on_stderr(scripted, capsys):
    scripted("-p", QUESTION)
    out, err = capsys.readouterr()
    assert out == "It is 122.\n"
    assert err == "kernels: all of them\n[37+85 -> 122]\n"


def test_calls_can_be_hidden_and_the_tool_turned_off(scripted, capsys):
    scripted("-p", QUESTION, "--no-show-tools")
    assert "[" not in capsys.readouterr().err
    scripted("-p", QUESTION, "--tools", "off", "--max-tokens", "7")
    assert capsys.readouterr() == ("\n", "kernels: all of them\n(cut off by --max-tokens 7)\n")


def test_programs_run_in_the_sandbox_which_must_be_a_strong_one(monkeypatch, tokenizer, capsys):
    model = answering(tokenizer, QUESTION, "len('abc')", "3", "three")
    monkeypatch.setattr(chat_cli, "load_model", lambda stage, **options: (model, tokenizer, {"step": 7}))
    monkeypatch.setattr("nanochat.sandbox.level", lambda: 1)
    flags = ["-p", QUESTION, "--temperature", "0", "--tools", "python"]
    with pytest.raises(UserError, match="tools python needs a sandbox of level 3, this machine has level 1"):
        chat_cli.main(chat_cli.parse_args(flags))
    chat_cli.main(chat_cli.parse_args([*flags, "--allow-weak-sandbox"]))
    assert capsys.readouterr() == ("three\n", "[len('abc') -> 3]\n")


@pytest.mark.parametrize("flags, options", [("", ("auto", False)), ("--kv fp8 --batch-invariant", ("fp8", True))])
def test_flags_reach_the_engine(monkeypatch, tokenizer, flags, options):
    engines = []
    monkeypatch.setattr(chat_cli, "load_model", lambda stage, **_: (random_model(), tokenizer, {"step": 7}))
    monkeypatch.setattr(chat_cli, "answer_once", lambda chat, *_: engines.append(chat.engine))
    chat_cli.main(chat_cli.parse_args(["-p", "hi", *flags.split()]))
    assert (engines[0].runner.kv_dtype, engines[0].runner.batch_invariant) == options


def test_an_answer_cut_off_by_the_context_says_so(scripted, capsys):
    scripted("-p", "x" * 90)
    assert capsys.readouterr().err.endswith("(cut off by the context of 96)\n")


def test_a_refused_call_is_shown_as_refused(monkeypatch, tokenizer, capsys):
    model = answering(tokenizer, QUESTION, "37+eval", None, "no")
    monkeypatch.setattr(chat_cli, "load_model", lambda stage, **options: (model, tokenizer, {"step": 7}))
    chat_cli.main(chat_cli.parse_args(["-p", QUESTION, "--temperature", "0"]))
    assert capsys.readouterr() == ("no\n", "[37+eval -> refused]\n")


def test_a_prompt_longer_than_the_context_is_one_sentence_and_exit_2(scripted, capsys):
    with pytest.raises(SystemExit) as exit:
        run_script(lambda: ("-p", "x" * 93), lambda flags: scripted(*flags))
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == (
        "error: a prompt must leave room for an answer in the context of 96 tokens, got 97")


@pytest.mark.parametrize("flags, sentence", [
    (["--temperature", "-1"], "temperature must be a finite number of at least 0, got -1.0"),
    (["--max-tokens", "-2"], "max_tokens must be at least 0, got -2"),
    (["--top-k", "-1"], "top_k must be at least 1, or None for all, got -1"),
    (["--seed", "-1"], "seed must be from 0 to 2^63 - 1, got -1"),
])
def test_flags_out_of_range(flags, sentence):
    with pytest.raises(UserError) as error:
        chat_cli.main(chat_cli.parse_args(["-p", "hi", *flags]))
    assert str(error.value) == sentence


# --- a saved model --------------------------------------------------------------------------------


def save_stage(stage, tokenizer, step=3, depth=2):
    tokenizer.save()
    model = random_model()
    state = {"stage": stage, "step": step, "model_config": vars(CONFIG), "args": {}, "kernels": {},
             "tokenizer_fingerprint": tokenizer.fingerprint}
    save_checkpoint(base_dir() / "checkpoints" / stage / f"d{depth}", step, {"model": model.state_dict()}, state)
    return model


def test_a_saved_checkpoint_answers_with_its_own_weights(tokenizer, capsys):
    model = save_stage("sft", tokenizer)
    chat_cli.main(chat_cli.parse_args(["-p", "hi", "--temperature", "0", "--max-tokens", "8", "--device", "cpu"]))
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "hi"}]})
    (want,), = Engine(model, tokenizer).generate([prompt], SamplingParams(max_tokens=8, temperature=0.0))
    assert capsys.readouterr().out == want.text + "\n"


def test_base_continues_the_text_as_it_is(tokenizer, capsys):
    model = save_stage("base", tokenizer)
    chat_cli.main(chat_cli.parse_args(["-p", "The cat", "--stage", "base", "--temperature", "0", "--max-tokens", "8",
                                       "--device", "cpu"]))
    prompt = [tokenizer.bos_id, *tokenizer.encode("The cat")]
    (want,), = Engine(model, tokenizer).generate([prompt], SamplingParams(max_tokens=8, temperature=0.0))
    assert capsys.readouterr().out == want.text + "\n"


def test_auto_takes_the_newest_chat_stage(tokenizer):
    save_stage("base", tokenizer)
    with pytest.raises(UserError, match="--stage auto needs a checkpoint of rl, sft, mid in .*, found none"):
        chat_cli.newest_stage(None)
    for stage in ("mid", "sft", "rl"):
        save_stage(stage, tokenizer)
        assert chat_cli.newest_stage(None) == stage
    with pytest.raises(UserError, match="--stage auto"):
        chat_cli.newest_stage(4)


def test_a_missing_stage_is_named():
    with pytest.raises(UserError, match="stage sft has no checkpoint in .*; train it first"):
        chat_cli.main(chat_cli.parse_args(["-p", "hi"]))


# --- a conversation -------------------------------------------------------------------------------


def test_earlier_turns_are_remembered_token_by_token(tokenizer):
    chat = chat_of(tokenizer, max_tokens=4)
    _, first = say(chat, "one")
    (turn,) = chat.turns
    assert turn[: len(first) - 1] == first[1:] and turn[-1] == tokenizer.special_id("<|assistant_end|>")
    _, second = say(chat, "two")
    assert second[: len(turn) + 1] == [tokenizer.bos_id, *turn] and second.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(second).endswith("<|assistant_end|><|user_start|>two<|user_end|><|assistant_start|>")
    chat.clear()
    assert say(chat, "one")[1] == first


def test_the_oldest_turns_go_when_the_context_is_full(tokenizer):
    chat = chat_of(tokenizer, max_tokens=6)
    notes = [say(chat, "x" * 10)[0] for _ in range(3)]
    assert notes == [[], [], []] and [len(turn) for turn in chat.turns] == [20, 20, 20]
    newest = chat.turns[-1]
    notes, prompt = say(chat, "y" * 60)  # with 3 more around it, and 6 to come
    assert notes == ["the oldest 2 turns no longer fit the context of 96 tokens and are forgotten"]
    assert prompt[:21] == [tokenizer.bos_id, *newest] and len(prompt) == 84
    chat.turns = [newest] * 3
    notes, prompt = say(chat, "y" * 46)  # exactly fits beside one turn less
    assert notes == ["the oldest turn no longer fits the context of 96 tokens and is forgotten"]
    assert len(prompt) == 90 and len(chat.turns) == 3


def test_a_prompt_too_long_forgets_nothing(tokenizer):
    chat = chat_of(tokenizer)
    say(chat, "one")
    kept = list(chat.turns)
    with pytest.raises(UserError, match="context of 96 tokens, got 104"):
        list(chat.reply("x" * 100))
    assert chat.turns == kept


def test_an_answer_with_an_error_is_not_remembered(tokenizer):
    chat = chat_of(tokenizer)
    with torch.no_grad():
        chat.engine.model.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="logits must be finite"):
        list(chat.reply("one"))
    assert chat.turns == []


# --- at the terminal ------------------------------------------------------------------------------


def test_a_session_at_the_terminal(scripted, capsys, monkeypatch):
    lines = [QUESTION, "", "/help", "/clear", QUESTION, "x" * 200, "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    scripted()
    out = capsys.readouterr().out
    assert out.startswith("sft model of 2 layers, step 7, context 96 tokens.")
    assert out.count("model: [37+85 -> 122]It is 122.\n") == 2
    assert "(unknown command /help; /clear starts over, /quit leaves)" in out and "(a new conversation)" in out
    assert "error: a prompt must leave room for an answer in the context of 96 tokens, got 204\n" in out


def test_end_of_input_leaves(scripted, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    scripted()
    assert capsys.readouterr().out.endswith("you: \n")


def test_a_line_that_is_not_utf8_does_not_end_the_chat(scripted, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/caf\xe9\n/quit\n"), encoding="utf-8"))
    scripted()
    assert "(unknown command /caf\ufffd; /clear starts over, /quit leaves)" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(tokenizer, capsys, monkeypatch):
    chat = chat_cli.Chat(Engine(answering(tokenizer, QUESTION), tokenizer), SamplingParams(temperature=0.0))
    step, lines = chat.engine.step, iter([QUESTION, "/quit"])

    def interrupted():
        if chat.engine.stats()["steps"] == 9:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(chat.engine, "step", interrupted)
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    chat_cli.converse(chat, show_tools=True)
    assert capsys.readouterr().out == "model: [37+85 -> 122]It (interrupted)\n"
    assert tokenizer.decode(chat.turns[0]).endswith("<|output_end|>It<|assistant_end|>")
    assert chat.engine.pool.live == 0 and not chat.engine.running
