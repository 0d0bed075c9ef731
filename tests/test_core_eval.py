"""Evaluation of bundles: prompts, what is scored, batching, centering, names; a sentence for every broken bundle."""

import json
import random
import re

import numpy as np
import pytest
import torch

from nanochat.common import Runtime, UserError
from nanochat.evals import core
from nanochat.evals.core import (
    CORE_TASKS,
    Bundle,
    BundleTask,
    evaluate_bundle,
    evaluate_task,
    few_shot_examples,
    load_bundle,
    load_items,
    render_prompts,
    to_rows,
)
from nanochat.evals.scoring import DenseScorer, Score

CPU = torch.device("cpu")


class ByteTokenizer:
    bos_id = 256

    def encode_batch(self, texts):
        ids = [list(text.encode("utf-8")) for text in texts]
        return np.array(sum(ids, []), np.uint32), np.cumsum([0, *map(len, ids)])


def bigram(table, max_len=99):
    """A scorer that knows the last token only."""
    return DenseScorer(lambda x: table[x], CPU, max_len, pad_id=256)


def random_scorer(max_len=99):
    return bigram(torch.randn(257, 257, generator=torch.Generator().manual_seed(0)), max_len)


def follows(*pairs):
    """A bigram scorer that expects each pair's second letter after its first."""
    table = torch.zeros(257, 257)
    for a, b in pairs:
        table[ord(a), ord(b)] = 9.0
    return bigram(table)


def write_bundle(folder, tasks, meta=None):
    """tasks: (label, type, shots, delimiter or None, items, guessing in percent)"""
    lines = ["icl_tasks:"]
    rows = ["Eval Task,Task Category,Random baseline,Description"]
    for label, kind, shots, delimiter, items, guessing in tasks:
        lines += [f"- label: {label}", f"  icl_task_type: {kind}", f"  dataset_uri: some/{label}.jsonl",
                  f"  num_fewshot: [{shots}]"]
        if delimiter is not None:
            lines.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        rows.append(f'{label},any,{guessing},"a task, with\na line break"')
        path = folder / "eval_data" / "some" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (folder / "core.yaml").write_text("\n".join(lines), encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text("\n".join(meta or rows), encoding="utf-8")
    return folder


def task_of(kind, delimiter=" ", shots=0, guessing=0.0, label="t", path=None):
    return BundleTask(label, kind, path, shots, delimiter, guessing)


MC = [{"query": f"Q{i}:", "choices": ["yes", "no"], "gold": i % 2} for i in range(4)]
SCHEMA = [{"context_options": [f"cat{i}", f"dog{i}"], "continuation": "ran", "gold": i % 2} for i in range(4)]
LM = [{"context": f" say {i} ", "continuation": f"{i} ok"} for i in range(4)]

# --- prompts ----------------------------------------------------------------------------------------------------------


def test_multiple_choice_prompts():
    prompts = render_prompts(task_of("multiple_choice", "\nAnswer: "), MC[0], [MC[1], MC[2]])
    shots = "Q1:\nAnswer: no\n\nQ2:\nAnswer: yes\n\n"
    assert prompts == [f"{shots}Q0:\nAnswer: yes", f"{shots}Q0:\nAnswer: no"]


def test_schema_prompts():
    prompts = render_prompts(task_of("schema"), SCHEMA[0], [SCHEMA[3]])
    assert prompts == ["dog3 ran\n\ncat0 ran", "dog3 ran\n\ndog0 ran"]


def test_language_modeling_prompts_trim_contexts_and_the_end_before_the_continuation():
    prompts = render_prompts(task_of("language_modeling"), LM[0], [LM[2], LM[1]])
    shots = "say 2 2 ok\n\nsay 1 1 ok\n\n"
    assert prompts == [f"{shots}say 0", f"{shots}say 0 0 ok"]


def test_prompts_without_examples_have_no_blank_line_in_front():
    assert render_prompts(task_of("multiple_choice"), MC[0], [])[0] == "Q0: yes"


def test_few_shot_examples_are_other_items_by_random_1234_plus_index():
    items = [{"n": n} for n in range(12)]
    for index in range(12):
        drawn = [item["n"] for item in few_shot_examples(items, index, 5)]
        others = [n for n in range(12) if n != index]
        assert drawn == random.Random(1234 + index).sample(others, 5)
        assert index not in drawn
    assert few_shot_examples(items, 3, 0) == []


# --- goldens: one item of each type, from its JSON to its verdict, derived by hand ------------------------------------


class PieceTokenizer:
    """Words with the space before them, line ends and marks, numbered as they come; 0 is BOS, shown as ^."""

    bos_id = 0

    def __init__(self):
        self.pieces = ["^"]

    def encode_batch(self, texts):
        ids = []
        for text in texts:
            ids.append([self._id(piece) for piece in re.findall(r" ?\w+|\n|[^\w\s]| ", text)])
        return np.array(sum(ids, []), np.uint32), np.cumsum([0, *map(len, ids)])

    def _id(self, piece):
        self.pieces += [] if piece in self.pieces else [piece]
        return self.pieces.index(piece)

    def show(self, ids):
        return "|".join(self.pieces[i] for i in ids)


class SayingScorer:
    """Remembers the rows it is given and gives prepared scores."""

    max_len = 99

    def __init__(self, scores):
        self.scores, self.rows = scores, []

    def score(self, rows):
        self.rows += rows
        return self.scores


# type, delimiter, items as in the file, rows of the first with one shot (context tokens, scored tokens), losses, right?
GOLDENS = [
    ("multiple_choice", "\nAnswer: ",
     [{"query": "Question: Is ice cold?", "choices": ["yes", "no, hot"], "gold": 0},
      {"query": "Question: Is fire cold?", "choices": ["yes", "no"], "gold": 1}],
     [("^|Question|:| Is| fire| cold|?|\n|Answer|:| no|\n|\n|Question|:| Is| ice| cold|?|\n|Answer|:", " yes"),
      ("^|Question|:| Is| fire| cold|?|\n|Answer|:| no|\n|\n|Question|:| Is| ice| cold|?|\n|Answer|:", " no|,| hot")],
     [1.0, 1.5], True),
    ("schema", " ",
     [{"context_options": ["The cup broke as the cup", "The cup broke as the stone"], "continuation": "was thin.",
       "gold": 1},
      {"context_options": ["Ann thanked Bob as Ann", "Ann thanked Bob as Bob"], "continuation": "had helped.",
       "gold": 1}],
     [("^|Ann| thanked| Bob| as| Bob| had| helped|.|\n|\n|The| cup| broke| as| the| cup", " was| thin|."),
      ("^|Ann| thanked| Bob| as| Bob| had| helped|.|\n|\n|The| cup| broke| as| the| stone", " was| thin|.")],
     [1.0, 1.5], False),
    ("language_modeling", " ",
     [{"context": "The capital of Peru is ", "continuation": "Lima, of course"},
      {"context": " The capital of Chile is", "continuation": "Santiago"}],
     [("^|The| capital| of| Chile| is| Santiago|\n|\n|The| capital| of| Peru| is", " Lima|,| of| course")],
     [0.5], True),
]


@pytest.mark.parametrize(("kind", "delimiter", "items", "rows", "losses", "right"), GOLDENS,
                         ids=[golden[0] for golden in GOLDENS])
def test_a_golden_item_of_each_type(kind, delimiter, items, rows, losses, right, tmp_path, monkeypatch):
    """Two items and one shot: what is shown and what is scored are then certain."""
    folder = write_bundle(tmp_path, [("golden", kind, 1, delimiter, items, 0)])
    monkeypatch.setattr(random.Random, "shuffle", lambda self, x: None)
    monkeypatch.setattr(core, "CHUNK_ITEMS", 1)
    tokenizer, scorer = PieceTokenizer(), SayingScorer([Score(nats, greedy=right) for nats in losses])
    evaluate_task(scorer, tokenizer, load_bundle(folder).tasks[0], log=(log := ListLog()))
    shown = [(tokenizer.show(row.ids[:row.start]), tokenizer.show(row.ids[row.start:])) for row in scorer.rows]
    assert shown[:len(rows)] == rows
    assert log[0] == {"task": "golden", "index": 0, "item": items[0], "correct": right, "nats": losses}


class ListLog(list):
    def add(self, rows):
        self.extend(rows)


# --- what is scored ---------------------------------------------------------------------------------------------------


def scored(kind, prompts, max_len=1000):
    """(cropped text, scored text) per row; BOS shown as ^"""
    def show(ids):
        return "".join("^" if i == 256 else chr(i) for i in ids)

    rows = to_rows(kind, core.encode_all(ByteTokenizer(), prompts), max_len)
    return [(show(row.ids), show(row.ids[row.start:])) for row in rows]


def test_choices_are_scored_after_their_common_prefix():
    assert scored("multiple_choice", ["Q: cat", "Q: dog", "Q: d"]) == [
        ("^Q: cat", "cat"), ("^Q: dog", "dog"), ("^Q: d", "d")]


def test_a_choice_that_begins_another_still_has_a_scored_token():
    assert scored("multiple_choice", ["Q: 1", "Q: 12"]) == [("^Q: 1", "1"), ("^Q: 12", "12")]
    assert scored("multiple_choice", ["same", "same"]) == [("^same", "e"), ("^same", "e")]


def test_schemas_are_scored_on_their_common_suffix():
    assert scored("schema", ["the cat ran", "a dog ran"]) == [("^the cat ran", " ran"), ("^a dog ran", " ran")]
    assert scored("schema", ["ran", "ran"]) == [("^ran", "ran"), ("^ran", "ran")]


def test_language_modeling_scores_the_continuation_in_one_row():
    assert scored("language_modeling", ["say", "say it"]) == [("^say it", " it")]


def test_an_item_too_long_loses_as_much_of_each_rows_beginning():
    assert scored("multiple_choice", ["0123456789 yes", "0123456789 no"], 6) == [("89 yes", "yes"), ("89 no", "no")]
    assert scored("multiple_choice", ["012 yes", "012 no"], 8) == [("^012 yes", "yes"), ("^012 no", "no")]
    assert scored("language_modeling", ["0123456789", "0123456789 yes"], 6) == [("89 yes", " yes")]


def test_one_token_stays_before_a_continuation():
    assert scored("schema", ["0123456789 ran", "x ran"], 6) == [("89 ran", " ran"), ("x ran", " ran")]
    assert scored("multiple_choice", ["ab", "acdefghi"], 4) == [("ab", "b"), ("fghi", "ghi")]
    # a continuation that fills the context is scored from its second token on
    assert scored("language_modeling", ["ab", "ab cdefgh"], 4) == [("efgh", "fgh")]


# --- tasks and bundles ------------------------------------------------------------------------------------------------


def test_the_three_types_are_judged(tmp_path):
    mc = [{"query": "a", "choices": ["c", "b"], "gold": 1}] * 3 + [{"query": "a", "choices": ["c", "b"], "gold": 0}]
    schema = [{"context_options": ["x", "a"], "continuation": "b", "gold": 1}] * 2
    lm = [{"context": "a", "continuation": "bb"}, {"context": "a", "continuation": "b"}]
    folder = write_bundle(tmp_path, [("mc", "multiple_choice", 0, "", mc, 50), ("schema", "schema", 0, "", schema, 50),
                                     ("lm", "language_modeling", 0, "", lm, 0)])
    seen = []
    result = evaluate_bundle(follows("ab"), ByteTokenizer(), load_bundle(folder), on_task=seen.append)
    assert [(t.label, t.items, t.accuracy, t.centered) for t in result.tasks] == [
        ("mc", 4, 0.75, 0.5), ("schema", 2, 1.0, 1.0), ("lm", 2, 0.5, 0.5)]
    assert result.score == pytest.approx(2 / 3)
    assert result.name == f"score of {tmp_path.name} (not CORE)"
    assert tuple(seen) == result.tasks


def test_ties_go_to_the_first_option():
    scores = [Score(nats, greedy=False) for nats in (1.5, 1.5, 2.0)]
    assert core.is_correct("schema", {"gold": 0}, scores)
    assert not core.is_correct("schema", {"gold": 1}, scores)


def test_a_limit_takes_the_first_items_after_the_fixed_shuffle(tmp_path, monkeypatch):
    items = [{"context": f"n{i}", "continuation": "ok"} for i in range(20)]
    [task] = load_bundle(write_bundle(tmp_path, [("lm", "language_modeling", 2, None, items, 0)])).tasks
    seen = []
    original = core.render_prompts
    monkeypatch.setattr(core, "render_prompts", lambda *args: seen.append(args) or original(*args))
    result = evaluate_task(random_scorer(), ByteTokenizer(), task, max_per_task=6)
    random.Random(1337).shuffle(items)
    assert result.items == 6
    assert [item for _, item, _ in seen] == items[:6]
    assert [examples for _, _, examples in seen] == [few_shot_examples(items[:6], i, 2) for i in range(6)]


def test_chunks_do_not_change_the_result(tmp_path, monkeypatch):
    items = [{"query": f"q{i}", "choices": ["ab", "ba", "b"], "gold": i % 3} for i in range(30)]
    [task] = load_bundle(write_bundle(tmp_path, [("mc", "multiple_choice", 1, None, items, 33)])).tasks
    whole = evaluate_task(random_scorer(), ByteTokenizer(), task).accuracy
    monkeypatch.setattr(core, "CHUNK_ITEMS", 7)
    assert evaluate_task(random_scorer(), ByteTokenizer(), task).accuracy == whole


def test_ranks_share_the_items(tmp_path):
    items = [{"query": f"q{i}", "choices": ["ab", "ba", "b"], "gold": i % 3} for i in range(31)]
    [task] = load_bundle(write_bundle(tmp_path, [("mc", "multiple_choice", 1, None, items, 33)])).tasks
    counts = []

    class Rank(Runtime):
        def all_reduce(self, tensor, op="sum"):
            counts.append(tensor.item())
            return tensor

    for rank in range(3):
        evaluate_task(random_scorer(), ByteTokenizer(), task, runtime=Rank(torch.device("cpu"), rank, 3))
    alone = evaluate_task(random_scorer(), ByteTokenizer(), task)
    assert sum(counts) == round(alone.accuracy * 31)


def test_only_the_22_tasks_are_called_core(tmp_path):
    def name(labels, metric=None):
        return Bundle(tmp_path / "b", tuple(task_of("schema", label=label) for label in labels), metric).score_name

    assert len(CORE_TASKS) == 22
    assert name(CORE_TASKS) == "CORE"
    assert name(CORE_TASKS, "mini score") == "CORE"
    assert name(sorted(CORE_TASKS)[:18]) == "CORE (18 of 22, not comparable)"
    assert name(["copying"], "mini score") == "mini score"
    assert name([*CORE_TASKS, "copying"]) == "score of b (not CORE)"


def test_core_on_a_part_of_the_items_says_so(tmp_path):
    """All 22 labels on one file of items."""
    tasks = [(label, "language_modeling", 0, None, LM, 0) for label in sorted(CORE_TASKS)]
    bundle = load_bundle(write_bundle(tmp_path, tasks))
    assert evaluate_bundle(random_scorer(), ByteTokenizer(), bundle).name == "CORE"
    limited = evaluate_bundle(random_scorer(), ByteTokenizer(), bundle, max_per_task=3)
    assert limited.name == "CORE (at most 3 items per task)"


def test_a_task_listed_twice_is_refused(tmp_path):
    folder = write_bundle(tmp_path, [("mc", "multiple_choice", 0, None, MC, 50)] * 2)
    with pytest.raises(UserError, match="core.yaml lists task mc twice"):
        load_bundle(folder)


# --- broken bundles ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tasks = [("mc", "multiple_choice", 2, None, MC, 50), ("lm", "language_modeling", 0, None, LM, 0)]
    return write_bundle(tmp_path, tasks)


def failure(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["core.yaml", "eval_meta_data.csv"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert failure(lambda: load_bundle(folder)) == (
        f"{folder / name} is missing or cannot be read: an evaluation bundle needs it")


def test_a_missing_data_file_is_named_before_anything_runs(folder):
    path = folder / "eval_data" / "some" / "lm.jsonl"
    path.unlink()
    assert failure(lambda: load_bundle(folder)) == f"file {path} of task lm is missing"


@pytest.mark.parametrize("column", ["Eval Task", "Random baseline"])
def test_a_missing_csv_column_is_named(folder, column):
    path = folder / "eval_meta_data.csv"
    path.write_text(path.read_text().replace(column, "other"))
    assert failure(lambda: load_bundle(folder)) == f"{path} needs a column {column!r}"


def test_a_missing_csv_row_is_named(folder):
    path = folder / "eval_meta_data.csv"
    path.write_text(path.read_text().replace("lm,any", "ml,any"))
    assert failure(lambda: load_bundle(folder)) == f"{path} has no row for task lm"


@pytest.mark.parametrize("value", ["", "half", "100", "-1"])
def test_a_baseline_must_be_a_percentage(folder, value):
    path = folder / "eval_meta_data.csv"
    path.write_text(path.read_text().replace("lm,any,0", f"lm,any,{value}"))
    assert failure(lambda: load_bundle(folder)) == (
        f"{path}: the random baseline of lm must be a percentage below 100, not {value!r}")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("icl_tasks:", "tasks:", "must list the tasks under 'icl_tasks'"),
    ("icl_tasks:", "icl_tasks: [", ":2 is not YAML"),
    ("  num_fewshot: [2]\n", "", ": task mc needs the key 'num_fewshot'"),
    ("num_fewshot: [2]", "num_fewshot: 2", ": task mc needs num_fewshot as a list of one count, not 2"),
    ("type: multiple_choice", "type: quiz",
     ": task mc has type 'quiz', known are multiple_choice, schema, language_modeling"),
    ("icl_tasks:\n", "icl_tasks:\n- mc\n", ": a task must be a mapping, not 'mc'"),
])
def test_a_wrong_core_yaml_is_explained(folder, old, new, message):
    path = folder / "core.yaml"
    path.write_text(path.read_text().replace(old, new))
    text = failure(lambda: load_bundle(folder))
    assert text == f"{path} {message}" or text == f"{path}{message}"


@pytest.mark.parametrize(("kind", "item", "message"), [
    ("multiple_choice", {"query": "q", "choices": ["a", "b"]}, "a multiple_choice item needs the key 'gold'"),
    ("multiple_choice", {"choices": ["a", "b"], "gold": 0}, "a multiple_choice item needs the key 'query'"),
    ("schema", {"context_options": ["a", "b"], "gold": 0}, "a schema item needs the key 'continuation'"),
    ("language_modeling", {"continuation": "a"}, "a language_modeling item needs the key 'context'"),
    ("language_modeling", ["context", "continuation"], "a language_modeling item needs the key 'context'"),
    ("multiple_choice", {"query": "q", "choices": ["a"], "gold": 0}, "'choices' must be a list of two or more texts"),
    ("multiple_choice", {"query": "q", "choices": "ab", "gold": 0}, "'choices' must be a list of two or more texts"),
    ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": 2},
     "'gold' must be an index into 'choices', not 2"),
    ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": True},
     "'gold' must be an index into 'choices', not True"),
    ("schema", {"context_options": ["a", 1], "continuation": "x", "gold": 0}, "schema items hold texts only"),
    ("language_modeling", {"context": None, "continuation": "x"}, "language_modeling items hold texts only"),
    ("language_modeling", {"context": "a", "continuation": "  "}, "the continuation is empty"),
])
def test_an_item_that_cannot_be_scored_is_named_by_file_and_line(tmp_path, kind, item, message):
    path = tmp_path / "items.jsonl"
    options = ["a", "b"]
    good = {"query": "q", "choices": options, "context_options": options, "context": "c", "continuation": "x"}
    good["gold"] = 0
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(item) + "\n")
    assert failure(lambda: load_items(task_of(kind, path=path))) == f"{path}:3: {message}"


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"context": "a", "continuation": "b"}\n{"context":\n')
    task = task_of("language_modeling", path=path)
    assert failure(lambda: load_items(task)) == f"{path}:2 is not JSON: Expecting value"
    path.write_bytes(b"\xff\xfe")
    assert failure(lambda: load_items(task_of("schema", path=path))) == f"{path} is not UTF-8 (byte 0)"
    path.write_text("\n\n")
    assert failure(lambda: load_items(task_of("schema", path=path))) == f"{path} has no items"


@pytest.mark.parametrize(("limit", "message"), [
    (2, "task mc needs more items than its 2 few-shot examples, and has 2 with at most 2 per task"),
    (None, "task mc needs more items than its 5 few-shot examples, and has 4"),
])
def test_too_few_items_for_the_few_shot_examples(folder, limit, message):
    if limit is None:
        path = folder / "core.yaml"
        path.write_text(path.read_text().replace("[2]", "[5]"))
    bundle = load_bundle(folder)
    text = failure(lambda: evaluate_bundle(random_scorer(), ByteTokenizer(), bundle, max_per_task=limit))
    assert text == message
