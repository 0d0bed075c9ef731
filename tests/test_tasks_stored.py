"""Tasks of the hub's files: exact names, a fixed shuffle, text read on first use, verdicts, mixtures, bad files."""

import json
from collections import Counter

import hub_shelf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_shelf import ARC, ARC_ROW, CHAT_ROW, GSM8K, GSM_ROW, HUMANEVAL, MMLU, MMLU_ROW, SMOLTALK

from nanochat.common import UserError
from nanochat.tasks import MIXTURES, STORED_TASKS, Answer, make_task, mixture_texts, parse_mixture
from nanochat.tasks.gsm8k import final_answer
from nanochat.tasks.humaneval import leading_imports, program_of

shelf = hub_shelf.shelf

GSM_TEST = (GSM8K, "main/test-00000-of-00001.parquet")
FILES = {
    ("SmolTalk", "train"): [(SMOLTALK, f"data/train-0000{i}-of-00004.parquet") for i in range(4)],
    ("SmolTalk", "val"): [(SMOLTALK, "data/test-00000-of-00001.parquet")],
    ("SmolTalk", "test"): [(SMOLTALK, "data/test-00000-of-00001.parquet")],
    ("MMLU", "train"): [(MMLU, "auxiliary_train/train-00000-of-00001.parquet")],
    ("MMLU", "val"): [(MMLU, "all/test-00000-of-00001.parquet")],
    ("MMLU", "test"): [(MMLU, "all/test-00000-of-00001.parquet")],
    ("ARC-Easy", "train"): [(ARC, "ARC-Easy/train-00000-of-00001.parquet")],
    ("ARC-Easy", "val"): [(ARC, "ARC-Easy/validation-00000-of-00001.parquet")],
    ("ARC-Easy", "test"): [(ARC, "ARC-Easy/test-00000-of-00001.parquet")],
    ("ARC-Challenge", "train"): [(ARC, "ARC-Challenge/train-00000-of-00001.parquet")],
    ("ARC-Challenge", "val"): [(ARC, "ARC-Challenge/validation-00000-of-00001.parquet")],
    ("ARC-Challenge", "test"): [(ARC, "ARC-Challenge/test-00000-of-00001.parquet")],
    ("GSM8K", "train"): [(GSM8K, "main/train-00000-of-00001.parquet")],
    ("GSM8K", "val"): [GSM_TEST],
    ("GSM8K", "test"): [GSM_TEST],
    ("HumanEval", "test"): [(HUMANEVAL, "openai_humaneval/test-00000-of-00001.parquet")],
}


def put_problems(shelf, n: int, row_group_size: int = 4):
    """Make GSM8K's test file n problems "0?" .. whose answers are their numbers."""
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(n)]
    return shelf.put(*GSM_TEST, rows, row_group_size=row_group_size)


def questions(task) -> list[str]:
    return [task[i]["messages"][0]["content"] for i in range(len(task))]


def error_of(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


# --- files and order ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), list(FILES))
def test_a_task_asks_for_exactly_its_files(name, split, shelf):
    shelf.put_recipe()
    task = make_task(name, split)
    assert shelf.asked == FILES[name, split]
    assert len(task) == sum(len(hub_shelf.RECIPE[file]) for file in FILES[name, split])
    assert [message["role"] for message in task[len(task) - 1]["messages"]] == ["user", "assistant"]
    assert ("letters" in task[0]) == (task.kind == "categorical")


def test_every_split_of_every_task_is_listed_above():
    assert list(FILES) == [(name, split) for name, task in STORED_TASKS.items() for split in task.files]


def test_the_order_is_that_of_the_datasets_library_for_seed_42(shelf):
    put_problems(shelf, 10)
    assert questions(make_task("GSM8K", "test")) == [f"{i}?" for i in (5, 6, 0, 7, 3, 2, 4, 9, 1, 8)]


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_a_size_takes_the_first_of_the_same_order(size, shelf):
    put_problems(shelf, 10)
    whole, some = make_task("gsm8k", "test"), make_task("GSM8K", "val", size)
    assert len(some) == min(size, 10)
    assert questions(some) == questions(whole)[:size]
    for index in (-1, len(some)):
        with pytest.raises(IndexError):
            some[index]


def test_rows_run_on_over_files_and_row_groups(shelf):
    for i in range(4):
        rows = [{"messages": [{"role": "user", "content": f"{i}.{j}"}, {"role": "assistant", "content": "x"}]}
                for j in range(5 + i)]
        shelf.put(SMOLTALK, f"data/train-0000{i}-of-00004.parquet", rows, row_group_size=2)
    task = make_task("SmolTalk", "train")
    in_file_order = [f"{i}.{j}" for i in range(4) for j in range(5 + i)]
    assert questions(task) == [in_file_order[n] for n in np.random.default_rng(42).permutation(26)]
    assert questions(make_task("SmolTalk", "train", 4)) == questions(task)[:4]


def test_the_length_reads_no_text_and_a_part_reads_its_row_groups_only(shelf, monkeypatch):
    put_problems(shelf, 40, row_group_size=2)
    read, reading = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group",
                        lambda self, group, **options: read.append(group) or reading(self, group, **options))
    task = make_task("GSM8K", "test", 3)
    assert len(task) == 3 and not read
    got = questions(task)
    assert sorted(read) == sorted({int(question[:-1]) // 2 for question in got})
    assert task._rows[0].num_rows == 3


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "number"), [
    ("#### 72", "72"), ("so 5\n#### 1,234,567 apples", "1234567"), ("#### -3", "-3"), ("#### 2.50", "2.50"),
    ("#### 1 #### 2", "1"), ("####72", None), ("#### $72", None), ("72", None), ("", None),
])
def test_the_final_answer_follows_four_signs_and_a_space(text, number):
    assert final_answer(text) == number


def test_gsm8k_rewards_the_exact_number_alone(shelf):
    shelf.put(*GSM_TEST, [{"question": "?", "answer": "1+1 = <<1+1=2>>2\n#### 1,002"}])
    task = make_task("GSM8K", "test")
    for text, right in [("#### 1002", True), ("well\n#### 1,002 dollars", True), ("#### 1002.0", False),
                        ("#### 10020", False), ("1002", False), ("", False), ("####", False)]:
        assert task.evaluate(task[0], Answer(text)) is right, text
        assert task.reward(task[0], Answer(text)) == float(right)


@pytest.mark.parametrize("name", ["MMLU", "ARC-Easy", "ARC-Challenge"])
def test_multiple_choice_accepts_its_letter_alone(name, shelf):
    shelf.put_recipe()
    task = make_task(name, "test")
    right = {"MMLU": "C"}.get(name, "B")
    assert task.kind == "categorical" and task.baseline == 0.25 and task[0]["letters"] == ["A", "B", "C", "D"]
    assert task.evaluate(task[0], Answer(f" {right}\n"))
    assert not task.evaluate(task[0], Answer("A")) and not task.evaluate(task[0], Answer(f"{right}."))


@pytest.mark.parametrize(("answer", "program"), [
    ("def f():\n    return 1\n", "def f():\n    return 1"),
    ("Sure:\n```python\ndef f(): pass\n```\nand\n```python\n1/0\n```", "def f(): pass"),
    ("```\nx = 1\n```", "x = 1"),
    ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
    ("    return 1", "    return 1"),
])
def test_the_program_is_the_first_block_or_all(answer, program):
    assert program_of(answer) == program


@pytest.mark.parametrize(("prompt", "imports"), [
    ("import math\nfrom typing import List\n\n\ndef f():\n    import os\n", "import math\nfrom typing import List\n"),
    ("\n# why\nimport math\nX = 1\nimport os\n", "import math\n"),
    ("def f():\n    pass\n", ""),
    ("importance = 1\nimport os\n", ""),
])
def test_the_imports_at_the_top_of_the_prompt_are_kept(prompt, imports):
    assert leading_imports(prompt) == imports


def test_a_program_is_judged_by_running_the_problems_tests_with_the_prompts_imports(shelf):
    test = "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(16) == 4\n"
    shelf.put(*FILES["HumanEval", "test"][0], [hub_shelf.CODE_ROW | {
        "prompt": 'import math\n\n\ndef root(n):\n    """Root."""\n',
        "canonical_solution": "    return math.isqrt(n)\n", "test": test, "entry_point": "root"}])
    task = make_task("HumanEval", "test")
    canonical = task[0]["messages"][-1]["content"]
    for text, right in [(canonical, True), ("Use it:\n```python\ndef root(n):\n    return math.isqrt(n)\n```\n", True),
                        ("def root(n):\n    return 3", False), ("", False)]:
        assert task.evaluate(task[0], Answer(text)) is right, text


@pytest.mark.parametrize("name", ["SmolTalk", "json:own.jsonl"])
def test_conversations_without_right_answers_are_not_examined(name, shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text(json.dumps(CHAT_ROW["messages"]), encoding="utf-8")
    shelf.put_recipe()
    task = make_task(name, "test")
    assert task.kind == "dialogue"
    assert error_of(task.evaluate, task[0], Answer("x")) == (
        f"a task to be examined on must have right answers, {name} is conversations to train on")


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "training", "validation"), [
    ("mid", {"SmolTalk": 14, "MMLU": 6, "GSM8K": 5}, {"SmolTalk": 3, "MMLU": 4, "GSM8K": 2}),
    ("sft", {"ARC-Easy": 7, "ARC-Challenge": 7, "GSM8K": 5, "SmolTalk": 14}, {"SmolTalk": 3}),
])
def test_the_recipes_mixtures_hold_every_row(stage, training, validation, shelf):
    shelf.put_recipe()
    texts = mixture_texts(stage, "recipe")
    for text, split, counts in ((texts[0], "train", training), (texts[1], "val", validation)):
        mixture = parse_mixture(text, split)
        assert {part["task"]: part["conversations"] for part in mixture.counts()} == counts
        assert len(mixture) == sum(counts.values())
        rows = Counter(json.dumps(mixture[i]) for i in range(len(mixture)))
        assert rows == Counter(json.dumps(task[i]) for task in mixture.tasks for i in range(len(task)))


def test_the_recipe_takes_as_many_as_nanochat():
    assert MIXTURES["mid"]["recipe"] == ("SmolTalk,MMLU,GSM8K", "SmolTalk,MMLU=5200,GSM8K=420")
    assert MIXTURES["sft"]["recipe"] == ("ARC-Easy,ARC-Challenge,GSM8K,SmolTalk=10000", "SmolTalk")


def test_a_stored_task_given_twice_counts_twice(shelf):
    put_problems(shelf, 6)
    mixture = parse_mixture("GSM8K=2, gsm8k=2", "val")
    assert Counter(mixture[i]["messages"][0]["content"] for i in range(4)) == {"3?": 2, "2?": 2}


@pytest.mark.parametrize(("tasks", "held_out", "want"), [
    ("tiny", None, MIXTURES["mid"]["tiny"]),
    ("spelling=5", None, ("spelling=5", "spelling=5")),
    ("recipe,spelling=5", None, ("SmolTalk,MMLU,GSM8K,spelling=5", "SmolTalk,MMLU=5200,GSM8K=420,spelling=5")),
    ("recipe, json:a.jsonl, json:a.jsonl", None,
     ("SmolTalk,MMLU,GSM8K,json:a.jsonl,json:a.jsonl", "SmolTalk,MMLU=5200,GSM8K=420")),
    ("json:a.jsonl", "SmolTalk=7", ("json:a.jsonl", "SmolTalk=7")),
    ("json:a.jsonl", "json:b.jsonl,recipe", ("json:a.jsonl", "json:b.jsonl,SmolTalk,MMLU=5200,GSM8K=420")),
])
def test_named_mixtures_stand_for_their_texts(tasks, held_out, want):
    assert mixture_texts("mid", tasks, held_out) == want


def test_own_conversations_are_read_line_by_line(tmp_path):
    first, second = CHAT_ROW["messages"], [{"role": "system", "content": "s"}, *CHAT_ROW["messages"]]
    lines = [json.dumps(first), "", json.dumps({"messages": second}), "  "]
    (tmp_path / "a=b.jsonl").write_bytes("\r\n".join(lines).encode())
    task = make_task(f"json:{tmp_path}/a=b.jsonl", "train")
    assert [task[i]["messages"] for i in range(len(task))] == [first, second]
    assert len(parse_mixture(f"json:{tmp_path}/a=b.jsonl=1,json:{tmp_path}/a=b.jsonl", "train")) == 3
    for index in (-1, 2):
        with pytest.raises(IndexError):
            task[index]


# --- bad input ------------------------------------------------------------------------------------


def test_a_missing_column_and_a_column_of_another_type_are_named(shelf):
    file = shelf.put(*GSM_TEST, [{"question": "?", "work": "#### 1"}])
    assert error_of(make_task, "GSM8K", "test") == f"{file} must have a column answer of text, it has question, work"
    shelf.put(*GSM_TEST, [{"question": "?", "answer": 1}])
    assert error_of(make_task, "GSM8K", "test") == f"{file} must have a column answer of text, it has int64"
    file = shelf.put(MMLU, "auxiliary_train/train-00000-of-00001.parquet", [MMLU_ROW])
    assert error_of(make_task, "MMLU", "train") == (
        f"{file} must have a column train of {{question: text, choices: [text], answer: integer}}, "
        "it has question, subject, choices, answer")
    file = shelf.put(ARC, "ARC-Easy/test-00000-of-00001.parquet", [ARC_ROW | {"choices": [["a", "b"]]}])
    assert error_of(make_task, "ARC-Easy", "test") == (
        f"{file} must have a column choices of {{text: [text], label: [text]}}, it has "
        "list<element: list<element: string>>")
    file = shelf.put(SMOLTALK, "data/test-00000-of-00001.parquet", [{"messages": [{"role": "user"}]}])
    assert error_of(make_task, "SmolTalk", "test").startswith(
        f"{file} must have a column messages of [{{role: text, content: text}}], it has list<")


def test_large_types_and_further_columns_are_read_too(shelf):
    schema = pa.schema([("answer", pa.large_string()), ("question", pa.large_string()), ("more", pa.int8())])
    shelf.put(*GSM_TEST, pa.Table.from_pylist([GSM_ROW | {"more": 1}], schema=schema))
    assert questions(make_task("GSM8K", "test")) == ["2 and 3?"]


def test_an_empty_task_is_refused(shelf):
    file = shelf.put(*GSM_TEST, pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}))
    assert error_of(make_task, "GSM8K", "test") == (
        f"task GSM8K must have at least one row in split test, {file} has none")


def test_damaged_files_are_named_with_the_row_group(shelf):
    file = put_problems(shelf, 40)
    data = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(3).column(0).dictionary_page_offset
    data[start : start + 60] = b"\xff" * 60
    file.write_bytes(data)
    assert error_of(make_task("GSM8K", "test").__getitem__, 0).startswith(f"row group 3 of {file} must be readable (")
    file.write_bytes(data[:-20])
    assert error_of(make_task, "GSM8K", "test").startswith(f"{file} must be a whole parquet file (")


def test_empty_cells_are_refused(shelf):
    file = shelf.put(*GSM_TEST, [GSM_ROW, {"question": None, "answer": "#### 1"}])
    assert error_of(make_task("GSM8K", "test").__getitem__, 0) == (
        f"row group 0 of {file} must have no empty cell, column question has 1")
    file = shelf.put(ARC, "ARC-Easy/test-00000-of-00001.parquet",
                     [ARC_ROW, ARC_ROW | {"choices": {"text": None, "label": ["A"]}}])
    assert error_of(make_task("ARC-Easy", "test").__getitem__, 0) == (
        f"row group 0 of {file} must have no empty cell, column choices.text has 1")


@pytest.mark.parametrize(("task", "row", "why"), [
    ("GSM8K", {"question": "?", "answer": "no number"}, "a solution must end in #### and a number, this one has none"),
    ("MMLU", MMLU_ROW | {"answer": 4}, "the answer of a problem must be from 0 to 3, got 4"),
    ("MMLU", MMLU_ROW | {"choices": ["a", "b"]}, "a problem must have a question, a letter for each choice and one of "
     "them as the answer, got 2 choices, letters A, B, C, D and answer 'C'"),
    ("ARC-Easy", ARC_ROW | {"answerKey": "E"}, "a problem must have a question, a letter for each choice and one of "
     "them as the answer, got 4 choices, letters A, B, C, D and answer 'E'"),
    ("SmolTalk", {"messages": CHAT_ROW["messages"][::-1]}, "message 0 must be from the user (user and assistant take "
     "turns, a system message comes first), got assistant"),
    ("SmolTalk", {"messages": CHAT_ROW["messages"] + [{"role": "tool", "content": "x"}]},
     "message 2 must have the role user, assistant or system, got {'role': 'tool', 'content': 'x'}"),
])
def test_a_bad_row_is_named_with_its_file(task, row, why, shelf):
    shelf.put_recipe()
    repo, path = FILES[task, "test"][0]
    good = hub_shelf.RECIPE[repo, path][0]
    file = shelf.put(repo, path, [{**dict.fromkeys(good), **good}, good, row])
    made = make_task(task, "test")
    errors = []
    for i in range(3):
        try:
            made[i]
        except UserError as error:
            errors.append(str(error))
    assert errors == [f"row 2 of {file}: {why}"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_row_of_a_later_file_is_counted_from_that_files_start(place, shelf):
    shelf.put_recipe()
    rows = [CHAT_ROW] * 3
    rows[place] = {"messages": [], "source": ""}
    file = shelf.put(SMOLTALK, "data/train-00002-of-00004.parquet", rows)
    task = make_task("SmolTalk", "train")
    with pytest.raises(UserError) as caught:
        for i in range(len(task)):
            task[i]
    assert str(caught.value).startswith(f"row {place} of {file}: a conversation must be ")


@pytest.mark.parametrize(("line", "why"), [
    ("[", "Expecting value: line 1 column 2 (char 1)"),
    ('"text"', 'a conversation must be {"messages": [...]} with at least one message, got \'text\''),
    ("[]", 'a conversation must be {"messages": [...]} with at least one message, got {\'messages\': []}'),
    ('[{"role": "assistant", "content": "x"}]', "message 0 must be from the user (user and assistant take turns, a "
     "system message comes first), got assistant"),
    ('[{"role": "user", "content": "x"}]',
     "a conversation to train on must end with the assistant, this one ends with the user"),
    ('[{"role": "user", "content": 1}, {"role": "assistant", "content": "x"}]',
     "the content of user message 0 must be text, got 1"),
])
def test_a_bad_line_of_own_conversations_is_named(line, why, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(CHAT_ROW['messages'])}\n\n{line}\n", encoding="utf-8")
    assert error_of(make_task, f"json:{path}", "train") == f"{path} line 3: {why}"


def test_files_of_own_conversations_must_exist_and_hold_some(tmp_path):
    path = tmp_path / "own.jsonl"
    assert error_of(make_task, f"json:{path}", "train") == (
        f"{path} must be a readable file of conversations (No such file or directory)")
    path.write_text("\n\n", encoding="utf-8")
    assert error_of(make_task, f"json:{path}", "train") == f"{path} must have at least one conversation, it has none"
    path.write_bytes(b"\xff\xfe[\n")
    assert error_of(make_task, f"json:{path}", "train").startswith(f"{path} line 1: ")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: make_task("HumanEval", "train"), "unknown split 'train' of task HumanEval: choose from test"),
    (lambda: make_task("GSM8K", "val", 0), "task GSM8K needs at least one problem, not 0"),
    (lambda: parse_mixture("GSM8K,chess=3", "train"), "unknown task 'chess': choose from arithmetic, sums, "
     "arithmetic-hard, spelling, identity, choice, SmolTalk, MMLU, ARC-Easy, ARC-Challenge, GSM8K, HumanEval or "
     "json:FILE"),
    (lambda: mixture_texts("mid", "json:a,json:b"),
     "--val-tasks must name held-out conversations where --tasks has files alone, got json:a,json:b"),
])
def test_mistakes_are_one_sentence(make, message):
    assert error_of(make) == message
