"""The programs that evaluate models, run whole on an untrained one-layer model."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.dataset import prepare
from nanochat.evals.chat import CHAT_CORE_TASKS, run_chat_eval
from nanochat.tasks import TASKS, make_task
from scripts import base_eval, chat_eval

ROOT = Path(chat_eval.__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base directory with text, tokenizer and checkpoints of a one-layer model, made once."""
    from kernels import KernelConfig, resolve
    from nanochat.checkpoint import save_checkpoint
    from nanochat.dataset import iter_texts
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
    for p in model.parameters():  # initial logits are all alike
        torch.nn.init.normal_(p, std=0.3)
    for stage in ("base", "sft"):
        state = {"stage": stage, "step": 2, "n_steps": 2, "model_config": asdict(config),
                 "tokenizer_fingerprint": tokenizer.fingerprint, "kernels": kernels.names,
                 "args": {"data": str(text), "total_batch_size": 320, "tasks": "arithmetic=9,spelling=4"}}
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
    part, mini = " (640 tokens)", "mini score (at most 8 items per task)"
    scores = read(base / "report" / "scores_base.json")
    assert set(scores) == {"val_bpb" + part, "train_bpb" + part, mini}
    assert 0 < scores["val_bpb" + part] < 20
    section = read(base / "report" / "section_base-evaluation.json")["data"]
    unigram = section["unigram validation bpb" + part]
    assert section["below unigram %" + part] == pytest.approx(100 * (1 - scores["val_bpb" + part] / unigram))
    tasks = section[f"Tasks of {mini}"]
    assert [row["label"] for row in tasks][:2] == ["repeat_choice", "syntax_choice"]
    assert len(section["Samples"]) == len(base_eval.PROMPTS)
    assert tasks[0]["baseline"] == 0.25 and tasks[4]["near_chance"] is True
    assert f"{mini}: " in capsys.readouterr().out


def test_base_eval_does_only_what_it_is_asked(base):
    run(base_eval, "--eval", "bundle", "--max-per-task", "5")
    assert set(read(base / "report" / "scores_base.json")) == {"mini score (at most 5 items per task)"}


def test_bits_per_byte_of_the_default_tokens_have_the_plain_name(base, tmp_path):
    (tmp_path / "other").mkdir()
    for i in range(20):
        (tmp_path / "other" / f"{i}.txt").write_text(f"Other text {i}. " * 400)
    prepare(str(tmp_path / "other"))
    flags = ["--eval", "bpb", "--device-batch-size", "2", "--unigram-tokens", "0"]
    run(base_eval, *flags, "--eval-tokens", "6400")  # 20 steps of 320
    full = read(base / "report" / "scores_base.json")
    assert set(full) == {"val_bpb", "train_bpb"}
    run(base_eval, *flags, "--data", str(tmp_path / "other"))
    both = read(base / "report" / "scores_base.json")
    assert set(both) - set(full) == {f"{split}_bpb (on {tmp_path / 'other'})" for split in ("val", "train")}
    assert both | full == both


def test_a_part_evaluated_again_leaves_the_rest_of_the_section(base):
    path = base / "report" / "section_base-evaluation.json"
    run(base_eval, "--eval", "bundle", "--max-per-task", "5")
    before = read(path)["data"]
    run(base_eval, "--eval", "samples")
    after = read(path)["data"]
    assert set(after) - set(before) == {"Samples"} and after | before == after


def test_chat_eval_writes_scores_and_section(base, capsys):
    run(chat_eval, "-i", "sft", "--max-problems", "3", "--max-tokens", "4")
    run(chat_eval, "-i", "sft", "--max-problems", "2", "--max-tokens", "4", "--tasks", "arithmetic", "--tools", "off")
    scores = read(base / "report" / "scores_sft.json")
    few = " (at most 3 problems, at most 4 tokens)"
    means, two = few.replace("problems", "problems per task"), ", tool off (at most 2 problems, at most 4 tokens)"
    assert set(scores) == {*(name + few for name in TASKS if name != "choice"), "choice (at most 3 problems)",
                           *(f"{name}, expression right{few}" for name in ("arithmetic", "sums", "arithmetic-hard")),
                           "ChatCORE (generated tasks)" + means, "arithmetic" + two,
                           "arithmetic, expression right" + two}
    section = read(base / "report" / "section_sft-evaluation.json")["data"]
    tasks = section["Tasks" + means]
    assert [row["task"] for row in tasks] == list(TASKS)
    assert {row["problems"] for row in tasks} == {3}
    assert {row["near chance"] for row in tasks if row["task"] == "spelling"} == {True}
    assert section["Tools"] == "calculator"
    assert read(base / "report" / "section_sft-evaluation-tool-off.json")["data"]["Tools"] == "off"
    assert f"ChatCORE (generated tasks){means}: " in capsys.readouterr().out


def test_without_all_tasks_there_is_no_chatcore(base):
    run(chat_eval, "-i", "sft", "--max-problems", "2", "--max-tokens", "4", "--tasks", "spelling,choice")
    assert set(read(base / "report" / "scores_sft.json")) == {"spelling (at most 2 problems, at most 4 tokens)",
                                                              "choice (at most 2 problems)"}


@pytest.fixture
def five(monkeypatch):
    """ChatCORE's tasks as stand-ins of at most 4 problems; returns what was asked of each: size and longest answer."""
    asked = {}

    def make(name, split, size):
        made = make_task("choice" if name.startswith(("ARC", "MMLU")) else "spelling", split, min(size or 4, 4))
        made.name, asked[name] = name, [size]
        return made

    def examine(task, engine, scorer, *, params, **rest):
        asked[task.name] += [params.max_tokens]
        return run_chat_eval(task, engine, scorer, params=replace(params, max_tokens=4), **rest)

    monkeypatch.setattr(chat_eval, "make_task", make)
    monkeypatch.setattr(chat_eval, "run_chat_eval", examine)
    return asked


def test_chatcore_is_the_mean_of_its_five_tasks(base, five):
    run(chat_eval, "-i", "sft", "-a", "|".join(CHAT_CORE_TASKS))
    scores = read(base / "report" / "scores_sft.json")
    assert set(scores) == {*CHAT_CORE_TASKS, "ChatCORE"}
    centered = [(scores[name] - 0.25) / 0.75 for name in CHAT_CORE_TASKS[:3]]
    assert scores["ChatCORE"] == pytest.approx(sum(centered) / 5)  # nothing generated is right
    assert five == dict.fromkeys(CHAT_CORE_TASKS, [None, 512])


def test_chatcore_on_a_part_of_the_problems_says_so(base, five):
    run(chat_eval, "-i", "sft", "-a", "|".join(CHAT_CORE_TASKS), "-x", "3", "-m", "5")
    names = set(read(base / "report" / "scores_sft.json"))
    few = " (at most 3 problems, at most 5 tokens)"
    assert names == {"ChatCORE (at most 3 problems per task, at most 5 tokens)", "GSM8K" + few, "HumanEval" + few,
                     *(f"{name} (at most 3 problems)" for name in ("ARC-Easy", "ARC-Challenge", "MMLU"))}
    assert five == dict.fromkeys(CHAT_CORE_TASKS, [3, 5])


def test_a_restricted_run_leaves_the_full_runs_scores(base, five):
    run(chat_eval, "-i", "sft", "-a", "|".join(CHAT_CORE_TASKS))
    full = read(base / "report" / "scores_sft.json")
    tables = read(base / "report" / "section_sft-evaluation.json")["data"]
    for flags, name in ((["-a", "GSM8K", "-n", "8", "-t", "1"], "GSM8K (any of 8, temperature 1)"),
                        (["-a", "MMLU", "-n", "8", "-t", "1", "-x", "2"], "MMLU (at most 2 problems)"),
                        (["-a", "HumanEval", "-x", "999", "-t", "0.5"], "HumanEval (temperature 0.5)")):
        run(chat_eval, "-i", "sft", *flags)
        scores = read(base / "report" / "scores_sft.json")
        assert name in scores and scores | full == scores
        section = read(base / "report" / "section_sft-evaluation.json")["data"]
        assert section | tables == section
    assert len(scores) == len(full) + 3
    run(chat_eval, "-i", "sft", "-a", "GSM8K")  # the same again, alone: the other tasks stay in the table
    section = read(base / "report" / "section_sft-evaluation.json")["data"]
    assert [row["task"] for row in section["Tasks"]] == list(CHAT_CORE_TASKS)
    assert set(read(base / "report" / "scores_sft.json")) == set(scores)


def test_generated_tasks_are_endless_and_get_limits_of_their_own(base, five):
    run(chat_eval, "-i", "sft", "-a", "spelling|MMLU")
    assert five == {"spelling": [200, 128], "MMLU": [None, 512]}
    run(chat_eval, "-i", "sft", "-a", "spelling", "-x", "2", "-m", "7")
    assert five["spelling"] == [2, 7]


def test_without_the_tool_there_is_no_chatcore(base, five):
    run(chat_eval, "-i", "sft", "-a", "|".join(CHAT_CORE_TASKS), "--tools", "off")
    assert set(read(base / "report" / "scores_sft.json")) == {f"{name}, tool off" for name in CHAT_CORE_TASKS}


@pytest.mark.parametrize(("args", "generated"), [
    ({"tasks": "arithmetic=4000,choice=3"}, True), ({"tasks": "tiny"}, True), ({"task": "arithmetic-hard"}, True),
    ({"tasks": "tiny,json:mine.jsonl"}, True), ({"tasks": "json:mine.jsonl=9, tiny"}, True),
    ({"tasks": "json:mine.jsonl"}, True), ({"tasks": "recipe,json:mine.jsonl"}, False),
    ({"tasks": "recipe"}, False), ({"tasks": "arithmetic=4000,GSM8K"}, False), ({"task": "GSM8K"}, False), ({}, False)])
def test_a_model_is_examined_on_what_it_was_tuned_on(args, generated):
    assert chat_eval.default_tasks({"args": args}) == list(TASKS if generated else CHAT_CORE_TASKS)


def test_nanochats_flags_are_known_short_and_long():
    short = "-i rl -a GSM8K|MMLU -t 0.5 -m 9 -n 3 -k 7 -b 2 -x 11 --step 8"
    long = ("--stage rl --task-name GSM8K|MMLU --temperature 0.5 --max-new-tokens 9 --num-samples 3 --top-k 7 "
            "--batch-size 2 --max-problems 11 --step 8")
    args = vars(chat_eval.parse_args(short.split()))
    assert vars(chat_eval.parse_args(long.split())) == args
    assert args | {"stage": "rl", "tasks": "GSM8K|MMLU", "temperature": 0.5, "max_tokens": 9, "num_samples": 3,
                   "top_k": 7, "device_batch_size": 2, "max_problems": 11, "step": 8} == args


def test_responses_are_saved_to_a_new_file(base, tmp_path):
    answers, verdicts = tmp_path / "answers.jsonl", tmp_path / "verdicts.jsonl"
    run(chat_eval, "-i", "sft", "-a", "choice,spelling", "-x", "3", "-m", "4", "--save-responses", str(answers))
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [(row["task"], row["index"]) for row in rows] == [
        (name, i) for name in ("choice", "spelling") for i in range(3)]
    run(base_eval, "--eval", "bundle", "--max-per-task", "4", "--save-responses", str(verdicts))
    rows = [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7 * 4 and {len(row["nats"]) for row in rows if row["task"] == "repeat_choice"} == {4}
    with pytest.raises(UserError, match="^--save-responses must name a new file, "):
        run(base_eval, "--eval", "bundle", "--save-responses", str(answers))


@pytest.mark.slow  # two processes import torch
@pytest.mark.parametrize("words", ["chat_eval -i sft -a arithmetic|choice -x 7 -n 2 -t 1 -m 6",
                                   "base_eval --eval bundle --max-per-task 5"])
def test_two_ranks_find_what_one_finds(base, tmp_path, words):
    name, *flags = [*words.split(), "--device", "cpu", "--kernels", "eager", "--save-responses"]

    def results(log):
        scores = [read(path) for path in sorted((base / "report").glob("scores_*.json"))]
        shutil.rmtree(base / "report")
        return scores, [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]

    program = {"chat_eval": chat_eval, "base_eval": base_eval}[name]
    program.main(program.parse_args([*flags, str(tmp_path / "1.jsonl")]))
    alone, alone_rows = results(tmp_path / "1.jsonl")
    launched = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                               "-m", f"scripts.{name}", *flags, str(tmp_path / "2.jsonl")], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert launched.returncode == 0, launched.stderr
    shared, shared_rows = results(tmp_path / "2.jsonl")
    assert alone == shared and len(alone_rows) in (14, 35)
    for mine, other in zip(alone_rows, shared_rows, strict=True):
        assert mine.pop("nats", 0) == pytest.approx(other.pop("nats", 0), rel=1e-5)
        assert mine == other


@pytest.mark.parametrize(("program", "argv", "message"), [
    (base_eval, ["--eval", "bpb,core"], "--eval takes bpb, bundle, samples with commas between, got 'core'"),
    (base_eval, ["--eval-tokens", "0"], "--eval-tokens must be at least 1, got 0"),
    (base_eval, ["--max-per-task", "-3"], "--max-per-task must be at least 1, got -3"),
    (base_eval, ["--bundle", "/no/such/folder"],
     "/no/such/folder/core.yaml is missing or cannot be read: an evaluation bundle needs it"),
    (base_eval, ["--hf-path", "gpt2", "--eval", "bpb"],
     "--hf-path can be examined on the bundle alone, --eval asks for bpb"),
    (base_eval, ["--max-per-task", "2", "--eval", "bundle"],
     "task repeat_choice needs more items than its 2 few-shot examples, and has 2 with at most 2 per task"),
    (chat_eval, ["-i", "sft", "--tasks", "arithmetic,chess"],
     "unknown task 'chess': choose from arithmetic, sums, arithmetic-hard, spelling, identity, choice, "
     "SmolTalk, MMLU, ARC-Easy, ARC-Challenge, GSM8K, HumanEval or json:FILE"),
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
