"""Evaluation of bundles: prompts, what is scored, batching, centering, names; a sentence for every broken bundle."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import Runtime, UserError
from nanochat.evals import core
from nanochat.evals.core import (
    CORE_TASKS,
    Bundle,
    BundleTask,
    Row,
    encode_rows,
    evaluate_bundle,
    evaluate_task,
    few_shot_examples,
    load_bundle,
    load_items,
    render_prompts,
    score_rows,
)


class ByteTokenizer:
    bos_id = 256

    def encode(self, text):
        return list(text.encode("utf-8"))


class Bigram:
    """A model that knows the last token only; `widths` records the shapes of its forward passes."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table, self.shapes = table, []

    def __call__(self, x, targets=None, reduction="mean"):
        self.shapes.append(tuple(x.shape))
        logits = self.table[x]
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)


def random_model():
    return Bigram(torch.randn(257, 257, generator=torch.Generator().manual_seed(0)))


def follows(*pairs):
    """A bigram model that expects each pair's second letter after its first."""
    table = torch.zeros(257, 257)
    for a, b in pairs:
        table[ord(a), ord(b)] = 9.0
    return Bigram(table)


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


# --- what is scored ---------------------------------------------------------------------------------------------------


def scored(kind, prompts, max_len=1000):
    """(cropped text, scored text) per row; BOS shown as ^"""
    def show(ids):
        return "".join("^" if i == 256 else chr(i) for i in ids)

    rows = encode_rows(ByteTokenizer(), kind, prompts, max_len)
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


def test_long_rows_lose_their_beginning_and_keep_their_continuation():
    assert scored("multiple_choice", ["0123456789 yes", "0123456789 no"], 6) == [("89 yes", "yes"), ("789 no", "no")]
    assert scored("schema", ["0123456789 ran", "x ran"], 6) == [("89 ran", " ran"), ("^x ran", " ran")]
    # a continuation that fills the context is scored from its second token on
    assert scored("language_modeling", ["ab", "ab cdefgh"], 4) == [("efgh", "fgh")]


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_scores_are_mean_nats_per_token():
    model = random_model()
    log_p = torch.log_softmax(model.table.double(), -1)
    expected = -(log_p[1, 2] + log_p[2, 3]).item() / 2
    [score] = score_rows(model, [Row([256, 1, 2, 3], 2)], "schema", pad_id=256)
    assert score == pytest.approx(expected, rel=1e-6)


def test_language_modeling_needs_every_token_of_the_continuation():
    model = follows("ab", "bc")
    for text, verdict in [("xabc", 1.0), ("xabb", 0.0), ("xaac", 0.0), ("xbbc", 0.0)]:
        [score] = score_rows(model, [Row([256, *text.encode()], 3)], "language_modeling", pad_id=256)
        assert score == verdict, text


@pytest.mark.parametrize("kind", ["multiple_choice", "language_modeling"])
def test_batched_scores_equal_one_by_one(kind):
    rng = random.Random(0)
    texts = [[rng.choice(b"abcdef") for _ in range(rng.randrange(2, 40))] for _ in range(60)]
    rows = [Row([256, *text], rng.randrange(1, 3)) for text in texts]
    model = random_model()
    single = [score_rows(model, [row], kind, pad_id=256)[0] for row in rows]
    for batch_tokens in (1, 64, 300, 10**6):
        model.shapes.clear()
        assert score_rows(model, rows, kind, pad_id=256, batch_tokens=batch_tokens) == pytest.approx(single, rel=1e-12)
        assert all(n == 1 or n * width <= batch_tokens for n, width in model.shapes)
    assert model.shapes == [(60, max(len(row.ids) for row in rows) - 1)]


def test_batched_verdicts_equal_one_by_one_on_a_transformer(tmp_path):
    from kernels import KernelConfig, resolve
    from nanochat.gpt import GPT, GPTConfig

    config = GPTConfig(sequence_len=64, vocab_size=257, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    kernels = resolve(KernelConfig.parse("eager"), torch.device("cpu"), torch.float32, config.shapes())
    model = GPT(config, kernels)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    items = [{"query": f"Q{i} {'x' * (i % 7)}", "choices": ["yes", "no", "maybe so"], "gold": i % 3} for i in range(40)]
    folder = write_bundle(tmp_path, [("mc", "multiple_choice", 2, None, items, 33)])
    [task] = load_bundle(folder).tasks
    run = {n: evaluate_task(model, ByteTokenizer(), task, max_len=64, batch_tokens=n) for n in (1, 4096)}
    assert run[1].accuracy == run[4096].accuracy
    assert 0 < run[1].accuracy < 1


# --- tasks and bundles ------------------------------------------------------------------------------------------------


def test_the_three_types_are_judged(tmp_path):
    mc = [{"query": "a", "choices": ["c", "b"], "gold": 1}] * 3 + [{"query": "a", "choices": ["c", "b"], "gold": 0}]
    schema = [{"context_options": ["x", "a"], "continuation": "b", "gold": 1}] * 2
    lm = [{"context": "a", "continuation": "bb"}, {"context": "a", "continuation": "b"}]
    folder = write_bundle(tmp_path, [("mc", "multiple_choice", 0, "", mc, 50), ("schema", "schema", 0, "", schema, 50),
                                     ("lm", "language_modeling", 0, "", lm, 0)])
    seen = []
    result = evaluate_bundle(follows("ab"), ByteTokenizer(), load_bundle(folder), max_len=99, on_task=seen.append)
    assert [(t.label, t.items, t.accuracy, t.centered) for t in result.tasks] == [
        ("mc", 4, 0.75, 0.5), ("schema", 2, 1.0, 1.0), ("lm", 2, 0.5, 0.5)]
    assert result.score == pytest.approx(2 / 3)
    assert result.name == f"score of {tmp_path.name} (not CORE)"
    assert tuple(seen) == result.tasks


def test_ties_go_to_the_first_option():
    assert core.is_correct("schema", {"gold": 0}, [1.5, 1.5, 2.0])
    assert not core.is_correct("schema", {"gold": 1}, [1.5, 1.5, 2.0])


def test_a_limit_takes_the_first_items_after_the_fixed_shuffle(tmp_path, monkeypatch):
    items = [{"context": f"n{i}", "continuation": "ok"} for i in range(20)]
    [task] = load_bundle(write_bundle(tmp_path, [("lm", "language_modeling", 2, None, items, 0)])).tasks
    seen = []
    original = core.render_prompts
    monkeypatch.setattr(core, "render_prompts", lambda *args: seen.append(args) or original(*args))
    result = evaluate_task(random_model(), ByteTokenizer(), task, max_len=99, max_per_task=6)
    random.Random(1337).shuffle(items)
    assert result.items == 6
    assert [item for _, item, _ in seen] == items[:6]
    assert [examples for _, _, examples in seen] == [few_shot_examples(items[:6], i, 2) for i in range(6)]


def test_chunks_do_not_change_the_result(tmp_path, monkeypatch):
    items = [{"query": f"q{i}", "choices": ["ab", "ba", "b"], "gold": i % 3} for i in range(30)]
    [task] = load_bundle(write_bundle(tmp_path, [("mc", "multiple_choice", 1, None, items, 33)])).tasks
    whole = evaluate_task(random_model(), ByteTokenizer(), task, max_len=99).accuracy
    monkeypatch.setattr(core, "CHUNK_ITEMS", 7)
    assert evaluate_task(random_model(), ByteTokenizer(), task, max_len=99).accuracy == whole


def test_ranks_share_the_items(tmp_path):
    items = [{"query": f"q{i}", "choices": ["ab", "ba", "b"], "gold": i % 3} for i in range(31)]
    [task] = load_bundle(write_bundle(tmp_path, [("mc", "multiple_choice", 1, None, items, 33)])).tasks
    counts = []

    class Rank(Runtime):
        def all_reduce(self, tensor, op="sum"):
            counts.append(tensor.item())
            return tensor

    for rank in range(3):
        evaluate_task(random_model(), ByteTokenizer(), task, max_len=99, runtime=Rank(torch.device("cpu"), rank, 3))
    alone = evaluate_task(random_model(), ByteTokenizer(), task, max_len=99)
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
    text = failure(lambda: evaluate_bundle(random_model(), ByteTokenizer(), bundle, max_len=99, max_per_task=limit))
    assert text == message
