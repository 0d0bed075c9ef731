"""The generated bundle is one that the evaluator of the real bundle reads, and is not called CORE."""

import pytest

from nanochat.evals.core import few_shot_examples, load_bundle, load_items, render_prompts
from nanochat.evals.mini_bundle import ITEMS, write_mini_bundle


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_has_all_three_types_under_its_own_name(tmp_path):
    bundle = load_bundle(write_mini_bundle(tmp_path))
    assert bundle.score_name == "mini score"
    assert {task.kind for task in bundle.tasks} == {"multiple_choice", "schema", "language_modeling"}
    for task in bundle.tasks:
        items = load_items(task)
        assert len(items) == ITEMS
        assert len({str(item) for item in items}) == ITEMS
        if "gold" in items[0]:
            options = len(items[0].get("choices") or items[0]["context_options"])
            assert task.guessing == 1 / options
            golds = [item["gold"] for item in items]
            assert all(ITEMS / options / 2 < golds.count(i) < ITEMS / options * 1.6 for i in range(options))
        else:
            assert task.guessing == 0.0


def test_it_is_written_to_the_base_folder_and_is_the_same_every_time(tmp_path, own_base_dir):
    folder = write_mini_bundle()
    assert folder == own_base_dir / "mini_bundle"
    assert files(folder) == files(write_mini_bundle(tmp_path / "other"))


def test_whole_files_are_left_alone_and_damaged_ones_written_again(tmp_path):
    write_mini_bundle(tmp_path)
    whole, (first, second, *_) = files(tmp_path), sorted(tmp_path.rglob("*.jsonl"))
    first.write_text("half a li")
    second.unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path != first}
    write_mini_bundle(tmp_path)
    assert files(tmp_path) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_repetitions_and_counts_go_on_as_they_began(tmp_path):
    tasks = {task.label: task for task in load_bundle(write_mini_bundle(tmp_path)).tasks}
    for item in load_items(tasks["repeat"]):
        words = item["context"].split() + [item["continuation"]]
        assert any(words[period:] == words[:-period] for period in (2, 3))
    for item in load_items(tasks["repeat_choice"]):
        words = item["query"].split()
        assert item["choices"][item["gold"]] in words
        assert sum(choice in words for choice in item["choices"]) == 1
    for item in load_items(tasks["count"]):
        numbers = [int(n) for n in item["context"].split()] + [int(item["continuation"])]
        assert len({b - a for a, b in zip(numbers, numbers[1:], strict=False)}) == 1


def test_articles_agree_with_their_nouns(tmp_path):
    tasks = {task.label: task for task in load_bundle(write_mini_bundle(tmp_path)).tasks}
    for item in load_items(tasks["article_schema"]):
        right = item["context_options"][item["gold"]].split()[-1]
        assert right == ("an" if item["continuation"][0] in "aeiou" else "a")


@pytest.mark.parametrize("label", ["syntax_choice", "syntax_schema"])
def test_right_lines_of_syntax_parse_and_wrong_ones_do_not(tmp_path, label):
    tasks = {task.label: task for task in load_bundle(write_mini_bundle(tmp_path)).tasks}
    for item in load_items(tasks[label]):
        right, *wrong = by_rightness(render_prompts(tasks[label], item, []), item["gold"])
        assert parses(right), right
        assert not any(parses(line) for line in wrong), wrong


def test_completions_are_python(tmp_path):
    task = next(t for t in load_bundle(write_mini_bundle(tmp_path)).tasks if t.label == "syntax")
    for item in load_items(task):
        assert parses(render_prompts(task, item, [])[1]), item


def test_prompts_fit_a_small_context(tmp_path):
    for task in load_bundle(write_mini_bundle(tmp_path)).tasks:
        items = load_items(task)
        for index, item in enumerate(items):
            for prompt in render_prompts(task, item, few_shot_examples(items, index, task.num_fewshot)):
                assert len(prompt.encode()) < 255  # fits 256 tokens even when every byte is one


def by_rightness(options, gold):
    return [options[gold], *options[:gold], *options[gold + 1:]]


def parses(line):
    """Whether the text can stand somewhere in Python: alone, as a header, after try or an if."""
    import textwrap

    line = textwrap.dedent(line)
    body = "\n    pass" if line.endswith(":") else ""
    for text in (line + body, f"try:\n    pass\n{line}{body}", f"{line} x in y: pass", f"{line} x", f"{line}x"):
        try:
            compile(text, "line", "exec", dont_inherit=True, flags=0x400)  # parse only: return may stand anywhere
        except SyntaxError:
            continue
        return True
    return False
