"""Chat tasks are judged by letters or by sampled answers; the programs that evaluate models, run whole on tiny ones."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from nanochat.common import Runtime, UserError
from nanochat.engine import SamplingParams
from nanochat.evals.chat import ChatResult, answer_letters, chat_core, run_chat_eval
from nanochat.tasks import TASKS, Answer, make_task
from nanochat.tasks.common import reference_text
from scripts import base_eval, chat_eval


class CharTokenizer:
    """One token per character; BOS in front, a closing mark where the answer begins."""

    bos_id, ask = 0, 1

    def encode(self, text):
        return [ord(c) for c in text]

    def render_for_completion(self, conversation):
        return [self.bos_id, *self.encode(conversation["messages"][0]["content"]), self.ask]


class LetterModel:
    """Answers each question with a given letter; other tokens and other positions get louder noise."""

    device = torch.device("cpu")

    class config:
        sequence_len = 512

    def __init__(self, answers):
        self.answers, self.shapes = answers, []  # question -> letter

    def __call__(self, x):
        self.shapes.append(tuple(x.shape))
        logits = torch.zeros(*x.shape, 128)
        logits[..., ord("Z")] = 99.0  # likelier than any letter, and not one of them
        for row, ids in enumerate(x.tolist()):
            end = ids.index(CharTokenizer.ask) if CharTokenizer.ask in ids else len(ids) - 1
            text = "".join(map(chr, ids[1:end]))
            logits[row, end, ord(self.answers.get(text, "A"))] = 5.0
            logits[row, end + 1 :, ord("D")] = 9.0
        return logits


class ScriptedEngine:
    """Gives prepared completions, n per prompt, and remembers what it was asked."""

    def __init__(self, model, answers):
        self.model, self.tokenizer, self.answers, self.asked = model, CharTokenizer(), answers, []

    def generate(self, prompts, params, progress=False):
        self.asked += [(prompt, params) for prompt in prompts]
        return [self.answers["".join(map(chr, prompt[1:-1]))] for prompt in prompts]


def question(conversation):
    return conversation["messages"][0]["content"]


def right_answers(task):
    return {question(task[i]): reference_text(task[i]) for i in range(len(task))}


def test_letters_are_read_at_the_last_prompt_token_and_compared_among_themselves():
    task = make_task("choice", "test", 30)
    conversations = [task[i] for i in range(30)]
    model = LetterModel(right_answers(task))
    expected = [reference_text(c) for c in conversations]
    assert set(expected) == set("ABCD")
    for batch_size in (1, 7, 64):
        model.shapes.clear()
        assert answer_letters(model, CharTokenizer(), conversations, batch_size) == expected
        assert max(rows for rows, _ in model.shapes) == min(batch_size, 30)


def test_only_the_conversations_own_letters_count():
    task = make_task("choice", "test", 1)
    conversation = task[0] | {"letters": ["C", "D"]}
    model = LetterModel({question(conversation): "B"})
    assert answer_letters(model, CharTokenizer(), [conversation], 4) == ["C"]  # B is not offered; C and D tie


def test_a_prompt_longer_than_the_context_loses_its_beginning():
    task = make_task("choice", "test", 3)
    model = LetterModel({})
    model.config = type("config", (), {"sequence_len": 40})
    answer_letters(model, CharTokenizer(), [task[i] for i in range(3)], 8)
    assert model.shapes == [(3, 40)]


def test_categorical_accuracy_counts_right_letters():
    task = make_task("choice", "test", 40)
    answers = right_answers(task)
    for text in [question(task[i]) for i in range(10)]:
        answers[text] = {"A": "B", "B": "C", "C": "D", "D": "A"}[answers[text]]
    engine = ScriptedEngine(LetterModel(answers), {})
    result = run_chat_eval(task, engine, params=SamplingParams(), batch_size=8)
    assert (result.task, result.problems, result.correct, result.expressions) == ("choice", 40, 30, None)
    assert result.accuracy == 0.75
    assert result.centered == pytest.approx(0.5 / 0.75)
    assert engine.asked == []
    assert result.example["question"] == question(task[0])


def arithmetic_engine(task, change=lambda i, answer: [answer]):
    answers = {}
    for i in range(len(task)):
        parts = task[i]["messages"][-1]["content"]
        answers[question(task[i])] = change(i, Answer(parts[2]["text"], [(parts[0]["text"], parts[1]["text"])]))
    return ScriptedEngine(LetterModel({}), answers)


def test_generative_accuracy_and_expressions_are_counted():
    task = make_task("arithmetic", "test", 20)

    def change(i, answer):
        if i < 5:
            return [Answer("I do not know.", answer.tool_calls)]
        if i < 8:
            return [Answer(answer.text, [("1+1", "2")])]
        return [Answer(answer.text, []) if i == 8 else answer]

    params = SamplingParams(max_tokens=30, temperature=0.0)
    engine = arithmetic_engine(task, change)
    result = run_chat_eval(task, engine, params=params)
    assert (result.correct, result.expressions, result.problems, result.errors) == (15, 16, 20, 0)
    assert engine.asked == [(CharTokenizer().render_for_completion(task[i]), params) for i in range(20)]
    assert result.example["answer"].endswith("] I do not know.")


def test_any_right_sample_counts():
    task = make_task("arithmetic", "test", 10)
    engine = arithmetic_engine(task, lambda i, answer: [Answer("no"), answer if i < 7 else Answer("no")])
    assert run_chat_eval(task, engine, params=SamplingParams(n=2)).correct == 7


def test_problems_the_engine_cannot_serve_are_wrong_and_counted():
    class Failed(Answer):
        finish_reason = "error"

    task = make_task("arithmetic", "test", 10)
    engine = arithmetic_engine(task, lambda i, answer: [answer if i else Failed("")])
    result = run_chat_eval(task, engine, params=SamplingParams())
    assert (result.correct, result.errors) == (9, 1)


def test_a_limit_takes_the_first_problems():
    task = make_task("arithmetic", "test", 20)
    engine = arithmetic_engine(task)
    assert run_chat_eval(task, engine, params=SamplingParams(), max_problems=6).problems == 6
    assert len(engine.asked) == 6
    assert run_chat_eval(task, engine, params=SamplingParams(), max_problems=60).problems == 20


@pytest.mark.parametrize("name", ["arithmetic", "choice"])
def test_ranks_share_the_problems(name):
    task, sums = make_task(name, "test", 11), []

    class Rank(Runtime):
        def all_reduce(self, tensor, op="sum"):
            sums.append(tensor.tolist())
            return tensor

    engine = arithmetic_engine(task, lambda i, a: [a if i < 6 else Answer("")]) if name == "arithmetic" else (
        ScriptedEngine(LetterModel(right_answers(task)), {}))
    for rank in range(2):
        run_chat_eval(task, engine, params=SamplingParams(), runtime=Rank(torch.device("cpu"), rank, 2))
    alone = run_chat_eval(task, engine, params=SamplingParams())
    assert sum(correct for correct, _, _ in sums) == alone.correct == (6 if name == "arithmetic" else 11)


def test_a_rank_without_problems_takes_part():
    task = make_task("arithmetic", "test", 1)
    result = run_chat_eval(task, arithmetic_engine(task), params=SamplingParams(),
                           runtime=type("Alone", (Runtime,), {"all_reduce": lambda self, t, op="sum": t})(
                               torch.device("cpu"), 1, 2))
    assert (result.correct, result.example) == (0, {})


def test_the_mean_needs_every_task():
    results = [ChatResult("a", 4, 3, 0.5, 1.0), ChatResult("b", 4, 1, 0.0, 1.0)]
    assert chat_core(results, ["a", "b"]) == pytest.approx((0.5 + 0.25) / 2)
    assert chat_core(results, ["a", "b", "c"]) is None
    assert chat_core(results[:1], ["a", "b"]) is None


# --- the programs, on an untrained model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base directory with text, tokenizer and checkpoints of a one-layer model, made once."""
    from kernels import KernelConfig, resolve
    from nanochat.checkpoint import save_checkpoint
    from nanochat.dataset import iter_texts, prepare
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import Tokenizer

    text, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("trained")
    for i in range(40):
        (text / f"{i}.txt").write_text("\n".join(f"Line {j} of file {i}: {j * i} words." for j in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        dataset = prepare(str(text))
        tokenizer = Tokenizer.train(iter_texts(dataset, "train"), 300)
        tokenizer.save()
    config = GPTConfig(sequence_len=160, vocab_size=300, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    kernels = resolve(KernelConfig.parse("eager"), torch.device("cpu"), torch.float32, config.shapes())
    model = GPT.build(config, kernels, torch.float32, torch.device("cpu"), seed=1)
    for stage in ("base", "sft"):
        state = {"stage": stage, "step": 2, "n_steps": 2, "model_config": asdict(config),
                 "tokenizer_fingerprint": tokenizer.fingerprint, "kernels": kernels.names,
                 "args": {"data": str(text), "total_batch_size": 320}}
        save_checkpoint(folder / "checkpoints" / stage / "d1", 2, {"model": model.state_dict()}, state)
    return folder


@pytest.fixture
def base(trained, own_base_dir):
    shutil.copytree(trained, own_base_dir)
    return own_base_dir


def run(program, *argv):
    program.main(program.parse_args([*argv, "--device", "cpu", "--kernels", "eager"]))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_base_eval_writes_scores_and_section(base, capsys):
    run(base_eval, "--eval-tokens", "640", "--device-batch-size", "2", "--unigram-tokens", "500", "--max-per-task", "8")
    scores = read(base / "report" / "scores_base.json")
    assert set(scores) == {"val_bpb", "train_bpb", "mini score"}
    assert 0 < scores["val_bpb"] < 20
    section = read(base / "report" / "section_base-evaluation.json")["data"]
    unigram = section["unigram validation bpb"]
    assert section["below unigram %"] == pytest.approx(100 * (1 - scores["val_bpb"] / unigram))
    assert [row["label"] for row in section["Bundle"]][:2] == ["repeat_choice", "syntax_choice"]
    assert len(section["Samples"]) == len(base_eval.PROMPTS)
    assert "mini score: " in capsys.readouterr().out


def test_base_eval_does_only_what_it_is_asked(base):
    run(base_eval, "--eval", "bundle", "--max-per-task", "5")
    assert set(read(base / "report" / "scores_base.json")) == {"mini score"}


def test_chat_eval_writes_scores_and_section(base, capsys):
    run(chat_eval, "-i", "sft", "--max-problems", "3", "--max-tokens", "4")
    run(chat_eval, "-i", "sft", "--max-problems", "2", "--max-tokens", "4", "--tasks", "arithmetic", "--tools", "off")
    scores = read(base / "report" / "scores_sft.json")
    assert set(scores) == {"arithmetic", "arithmetic, expression right", "arithmetic-hard", "spelling", "identity",
                           "sums", "sums, expression right",
                           "arithmetic-hard, expression right", "choice", "ChatCORE (generated tasks)",
                           "arithmetic, tool off", "arithmetic, expression right, tool off"}
    section = read(base / "report" / "section_sft-evaluation.json")["data"]
    assert [row["task"] for row in section["Tasks"]] == list(TASKS)
    assert {row["problems"] for row in section["Tasks"]} == {3}
    assert section["Tools"] == "calculator"
    assert read(base / "report" / "section_sft-evaluation-tool-off.json")["data"]["Tools"] == "off"
    assert "ChatCORE (generated tasks): " in capsys.readouterr().out


def test_without_all_tasks_there_is_no_chatcore(base):
    run(chat_eval, "-i", "sft", "--max-problems", "2", "--max-tokens", "4", "--tasks", "spelling,choice")
    assert set(read(base / "report" / "scores_sft.json")) == {"spelling", "choice"}


@pytest.mark.parametrize(("program", "argv", "message"), [
    (base_eval, ["--eval", "bpb,core"], "--eval takes bpb, bundle, samples with commas between, got 'core'"),
    (base_eval, ["--eval-tokens", "0"], "--eval-tokens must be at least 1, got 0"),
    (base_eval, ["--max-per-task", "-3"], "--max-per-task must be at least 1, got -3"),
    (base_eval, ["--bundle", "/no/such/folder"],
     "/no/such/folder/core.yaml is missing or cannot be read: an evaluation bundle needs it"),
    (base_eval, ["--max-per-task", "2", "--eval", "bundle"],
     "task repeat_choice needs more items than its 2 few-shot examples, and has 2 with at most 2 per task"),
    (chat_eval, ["-i", "sft", "--tasks", "arithmetic,chess"],
     "unknown task 'chess': choose from arithmetic, sums, arithmetic-hard, spelling, identity, choice"),
    (chat_eval, ["-i", "sft", "--max-problems", "0"], "--max-problems must be at least 1, got 0"),
    (chat_eval, ["-i", "sft", "--temperature", "-1"], "temperature must be a finite number of at least 0, got -1.0"),
])
def test_user_mistakes_are_one_sentence(base, program, argv, message):
    with pytest.raises(UserError) as error:
        run(program, *argv)
    assert str(error.value) == message


def test_the_stage_is_said_once(capsys):
    assert chat_eval.parse_args(["mid"]).stage == chat_eval.parse_args(["-i", "mid"]).stage == "mid"
    for argv in ([], ["sft", "-i", "rl"], ["base"]):
        with pytest.raises(SystemExit) as stopped:
            chat_eval.parse_args(argv)
        assert stopped.value.code == 2
    assert "say one stage, mid, sft, rl" in capsys.readouterr().err


def test_a_stage_without_a_checkpoint_is_named(base):
    with pytest.raises(UserError, match="^stage rl has no checkpoint in .*; train it first$"):
        run(chat_eval, "-i", "rl")
