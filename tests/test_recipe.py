"""The recipe's stages as `python -m scripts.NAME` runs them, on a stand-in hub: mixtures, one pass, the report."""

import json

import hub_shelf
import pytest
import tiny_pipeline as tiny

from nanochat import finetune
from nanochat.common import UserError
from nanochat.report import Report
from nanochat.tasks import TaskMixture, exchange
from nanochat.tasks.common import Task
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

shelf = hub_shelf.shelf


class Chats(Task):
    """Conversations of 7 tokens each, every byte a token."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return exchange("q", "a")


@pytest.mark.parametrize("sample", [4000, 6])
@pytest.mark.parametrize(("n", "T", "rows"), [(12, 20, 4), (12, 19, 6), (12, 6, 12), (1, 20, 1)])
def test_one_pass_counts_packed_rows(n, T, rows, sample, monkeypatch):
    """A row of T inputs holds T + 1 tokens: three conversations of 7 in 21, two in 20, one in 7."""
    monkeypatch.setattr(finetune, "SAMPLE", sample)
    tokenizer = Tokenizer.train(["no merges"], 256 + len(SPECIAL_TOKENS))
    assert finetune.packed_rows(TaskMixture([Chats(n)]), tokenizer, T, seed=1) == rows


def section(slug: str) -> dict:
    return json.loads((Report().folder / f"section_{slug}.json").read_text(encoding="utf-8"))["data"]


def test_the_stages_run_on_the_hubs_tasks_and_report_what_they_read(shelf, tmp_path, capsys):
    shelf.put_recipe()
    tiny.prepare_base_dir(tmp_path / "run")
    tiny.train("base", tmp_path / "run", "--num-steps", "1")
    tiny.train("mid", tmp_path / "run", "--tasks", "recipe", "--num-steps", "-1", "--sequence-len", "48")
    mid = section("mid-training")
    plan = f"plan: {mid['Steps']} steps of 4 rows from 25 conversations: SmolTalk 14, MMLU 6, GSM8K 5\n"
    assert plan in capsys.readouterr().out
    assert {row["task"]: row["conversations"] for row in mid["Tasks"]} == {"SmolTalk": 14, "MMLU": 6, "GSM8K": 5}
    assert {row["task"]: row["conversations"] for row in mid["Validation"]} == {"SmolTalk": 3, "MMLU": 4, "GSM8K": 2}
    assert mid["Conversations"] == 25 and 1 <= mid["Steps"] < 25 // 4, "rows are counted, several conversations in one"

    tiny.train("sft", tmp_path / "run", "--tasks", "recipe,spelling=3", "--val-tasks", "GSM8K=1", "--num-steps", "-1")
    sft = section("sft")
    assert [(row["task"], row["conversations"]) for row in sft["Tasks"]] == [
        ("ARC-Easy", 7), ("ARC-Challenge", 7), ("GSM8K", 5), ("SmolTalk", 14), ("spelling", 3)]
    assert sft["Validation"] == [{"task": "GSM8K", "conversations": 1}]
    assert sft["Steps"] == 36 // 4, "one conversation per row"

    tiny.train("rl", tmp_path / "run", "--task", "gsm8k", "--num-steps", "-1")
    rl = section("rl")
    assert (rl["Task"], rl["Problems"], rl["Steps"]) == ("GSM8K", 5, 5 // 2)
    assert rl["Problems left out, too long for the context"] == 0
    assert len(rl["pass@k on 2 held-out problems"]) == 8


@pytest.mark.parametrize(("stage", "updates"), [("mid", 20), ("sft", 100)])
def test_an_evaluation_reads_as_many_rows_whatever_the_micro_batch(stage, updates, tmp_path, monkeypatch):
    """Per rank it is updates x micro-batches of an update, which more GPUs make fewer; at nanochat's 256 rows of 2,048
    tokens 20 x 524,288 tokens. A number of --eval-batches is taken as it is."""
    read = []
    monkeypatch.setattr(finetune, "mean_loss", lambda model, batches, n, runtime: float(read.append(n) or 1))
    assert tiny.FLAGS[stage][-2] == "--eval-batches"
    monkeypatch.setitem(tiny.FLAGS, stage, tiny.FLAGS[stage][:-2])
    tiny.prepare_base_dir(tmp_path / "run")
    tiny.train("base", tmp_path / "run", "--num-steps", "1")
    for flags, batches in ((("1", "4"), 4 * updates), (("2", "4"), 2 * updates), (("4", "4"), updates),
                           (("2", "8"), 4 * updates), (("2", "8", "--eval-batches", "3"), 3)):
        tiny.remove(tmp_path / "run" / "artifacts" / "checkpoints" / stage)
        tiny.train(stage, tmp_path / "run", "--source", "base", "--num-steps", "1", "--device-batch-size", flags[0],
                   "--rows-per-step", *flags[1:])
        assert set(read) == {batches}
        read.clear()


def test_files_alone_need_a_validation_and_are_resumed_as_the_same_tasks(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(hub_shelf.CHAT_ROW["messages"]), encoding="utf-8")
    tiny.prepare_base_dir(tmp_path / "run")
    tiny.train("base", tmp_path / "run", "--num-steps", "1")
    with pytest.raises(UserError, match="^--val-tasks must name held-out conversations where --tasks has files alone"):
        tiny.train("mid", tmp_path / "run", "--tasks", f"json:{own}")
    tiny.train("mid", tmp_path / "run", "--tasks", f"json:{own}", "--val-tasks", "spelling=5", "--num-steps", "2")
    assert section("mid-training")["Tasks"] == [{"task": f"json:{own}", "conversations": 1}]
    with pytest.raises(UserError, match="was made with tasks = json:.*own.jsonl, this run has spelling=5"):
        tiny.train("mid", tmp_path / "run", "--tasks", "spelling=5", "--num-steps", "2", "--resume", "auto")
