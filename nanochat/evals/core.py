"""In-context tasks of an evaluation bundle, scored as in CORE of DCLM (arXiv 2406.11794) and nanochat (Nov 2025).

A bundle is a folder: core.yaml lists tasks (label, icl_task_type, dataset_uri, num_fewshot, continuation_delimiter),
eval_meta_data.csv gives each task's accuracy of guessing in percent, eval_data/<dataset_uri> holds items as JSONL.

- multiple_choice {query, choices, gold}: one context, several continuations; the lowest mean loss per token wins.
- schema {context_options, continuation, gold}: several contexts, one continuation; its lowest mean loss wins.
- language_modeling {context, continuation}: greedy decoding must give exactly the continuation.

Accuracies are centered, (accuracy - guessing) / (1 - guessing), and averaged. Only the mean over the 22 tasks of the
real bundle, all items, is called CORE. Our own model scores rows of up to ten contexts whole, as nanochat does. An item
whose longest row is longer than the scorer takes, that or the context of a model of transformers, loses as many tokens
from the beginning of each row, BOS among them, so that its choices keep the same context; nanochat crops each row of
such a model by itself, which differs by the few tokens that choices differ in length.
"""

import csv
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from nanochat.common import Runtime, UserError
from nanochat.evals.results import ResponseLog, is_near_chance
from nanochat.evals.scoring import Row, Score, Scorer, common_prefix

CORE_TASKS = frozenset("""
hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa piqa openbook_qa
lambada_openai hellaswag winograd winogrande bigbench_dyck_languages agi_eval_lsat_ar bigbench_cs_algorithms
bigbench_operators bigbench_repeat_copy_logic squad coqa boolq bigbench_language_identification """.split())

_REQUIRED_KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
_OPTIONS_KEY = {"multiple_choice": "choices", "schema": "context_options"}

# Tokenized and scored at a time: enough that batches are full, few enough to keep ten-shot prompts out of memory.
CHUNK_ITEMS = 256


@dataclass(frozen=True)
class BundleTask:
    label: str
    kind: str
    path: Path
    num_fewshot: int
    delimiter: str
    guessing: float  # accuracy in [0, 1)


@dataclass(frozen=True)
class Bundle:
    """`metric` is the bundle's own name for its score, None for CORE and everything without one."""

    folder: Path
    tasks: tuple[BundleTask, ...]
    metric: str | None = None

    @property
    def score_name(self) -> str:
        labels = {task.label for task in self.tasks}
        if labels == CORE_TASKS:
            return "CORE"
        if labels < CORE_TASKS:
            return f"CORE ({len(labels)} of {len(CORE_TASKS)}, not comparable)"
        return self.metric or f"score of {self.folder.name} (not CORE)"


@dataclass(frozen=True)
class TaskResult:
    """baseline: the accuracy of guessing. near_chance: no further from it than two standard errors."""

    label: str
    items: int
    accuracy: float
    baseline: float
    centered: float
    near_chance: bool
    seconds: float


@dataclass(frozen=True)
class BundleResult:
    name: str
    score: float
    tasks: tuple[TaskResult, ...]


# --- reading
# ----------------------------------------------------------------------------------------------------------


def load_bundle(folder: Path) -> Bundle:
    """Read core.yaml and the guessing accuracies. UserError for a missing file, column, row or key."""
    folder = Path(folder)
    config_path = folder / "core.yaml"
    try:
        config = yaml.safe_load(_read(config_path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{config_path}{f':{mark.line + 1}' if mark else ''} is not YAML") from None
    entries = config.get("icl_tasks") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{config_path} must list the tasks under 'icl_tasks'")
    guessing = _read_guessing(folder / "eval_meta_data.csv")
    tasks = tuple(_bundle_task(folder, config_path, entry, guessing) for entry in entries)
    labels = [task.label for task in tasks]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{config_path} lists task {label} twice")
    return Bundle(folder, tasks, config.get("metric"))


def _bundle_task(folder: Path, config_path: Path, entry: object, guessing: dict[str, float]) -> BundleTask:
    if not isinstance(entry, dict):
        raise UserError(f"{config_path}: a task must be a mapping, not {entry!r}")
    for key in ("label", "icl_task_type", "dataset_uri", "num_fewshot"):
        if key not in entry:
            raise UserError(f"{config_path}: task {entry.get('label', '?')} needs the key {key!r}")
    label, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"]
    if kind not in _REQUIRED_KEYS:
        raise UserError(f"{config_path}: task {label} has type {kind!r}, known are {', '.join(_REQUIRED_KEYS)}")
    if not (isinstance(shots, list) and shots and isinstance(shots[0], int) and shots[0] >= 0):
        raise UserError(f"{config_path}: task {label} needs num_fewshot as a list of one count, not {shots!r}")
    if label not in guessing:
        raise UserError(f"{folder / 'eval_meta_data.csv'} has no row for task {label}")
    path = folder / "eval_data" / entry["dataset_uri"]
    if not path.is_file():
        raise UserError(f"file {path} of task {label} is missing")
    return BundleTask(label, kind, path, shots[0], entry.get("continuation_delimiter", " "), guessing[label])


def _read_guessing(path: Path) -> dict[str, float]:
    """Task label -> accuracy of guessing in [0, 1)."""
    rows = list(csv.DictReader(io.StringIO(_read(path), newline="")))
    for column in ("Eval Task", "Random baseline"):
        if not rows or rows[0].get(column) is None:
            raise UserError(f"{path} needs a column {column!r}")
    guessing = {}
    for row in rows:
        try:
            guessing[row["Eval Task"]] = percent = float(row["Random baseline"]) / 100
        except (TypeError, ValueError):
            percent = -1.0
        if not 0 <= percent < 1:
            raise UserError(f"{path}: the random baseline of {row['Eval Task']} must be a percentage below 100, "
                            f"not {row['Random baseline']!r}")
    return guessing


def load_items(task: BundleTask) -> list[dict]:
    """The task's items in file order. UserError naming file and line for an item that its type cannot
    score."""
    items = []
    for number, line in enumerate(_read(task.path).split("\n"), start=1):
        if line.strip():
            items.append(_checked_item(line, task.kind, f"{task.path}:{number}"))
    if not items:
        raise UserError(f"{task.path} has no items")
    return items


def _checked_item(line: str, kind: str, where: str) -> dict:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg}") from None
    for key in _REQUIRED_KEYS[kind]:
        if not isinstance(item, dict) or key not in item:
            raise UserError(f"{where}: a {kind} item needs the key {key!r}")
    options_key = _OPTIONS_KEY.get(kind)
    texts = [item[key] for key in _REQUIRED_KEYS[kind] if key not in (options_key, "gold")]
    if options_key:
        options = item[options_key]
        if not isinstance(options, list) or len(options) < 2:
            raise UserError(f"{where}: {options_key!r} must be a list of two or more texts")
        if type(item["gold"]) is not int or not 0 <= item["gold"] < len(options):
            raise UserError(f"{where}: 'gold' must be an index into {options_key!r}, not {item['gold']!r}")
        texts += options
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {kind} items hold texts only")
    if not item.get("continuation", "text").strip():
        raise UserError(f"{where}: the continuation is empty")
    return item


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"{path} is missing or cannot be read: an evaluation bundle needs it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None


# --- prompts
# ----------------------------------------------------------------------------------------------------------


def render_prompts(task: BundleTask, item: dict, examples: Sequence[dict]) -> list[str]:
    """The texts to tokenize: one per option; for language modeling the prompt without and with its
    continuation."""
    shots = "".join(_solved(task, example) + "\n\n" for example in examples)
    if task.kind == "multiple_choice":
        return [shots + item["query"] + task.delimiter + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [shots + context + task.delimiter + item["continuation"] for context in item["context_options"]]
    prompt = shots + item["context"].strip() + task.delimiter
    # Stripped: the space before the continuation belongs to the continuation's first token.
    return [prompt.strip(), prompt + item["continuation"]]


def _solved(task: BundleTask, example: dict) -> str:
    """A few-shot example with its right answer."""
    if task.kind == "multiple_choice":
        return example["query"] + task.delimiter + example["choices"][example["gold"]]
    if task.kind == "schema":
        return example["context_options"][example["gold"]] + task.delimiter + example["continuation"]
    return example["context"].strip() + task.delimiter + example["continuation"]


def few_shot_examples(items: Sequence[dict], index: int, count: int) -> list[dict]:
    """`count` items other than `index`, drawn by Random(1234 + index)."""
    drawn = random.Random(1234 + index).sample(range(len(items) - 1), count)
    return [items[i + (i >= index)] for i in drawn]


def to_rows(kind: str, sequences: Sequence[np.ndarray], max_len: int) -> list[Row]:
    """Rows to score out of the tokens of an item's prompts: an option each, or for language modeling one.

    Where the continuation starts is read off the tokens: after the common prefix, or where the common suffix
    begins. At least one token is scored, even when one choice begins with another (nanochat has NaN there).
    """
    if kind == "schema":
        length = min(_common_prefix_of([ids[::-1] for ids in sequences]), min(map(len, sequences)) - 1)
        starts = [len(ids) - length for ids in sequences]
    else:
        start = _common_prefix_of(sequences)
        sequences = sequences[1:] if kind == "language_modeling" else sequences
        starts = [min(start, min(map(len, sequences)) - 1)] * len(sequences)
    excess = max(map(len, sequences)) - max_len
    return [_cropped(ids, start, excess, max_len) for ids, start in zip(sequences, starts, strict=True)]


def _cropped(ids: np.ndarray, start: int, excess: int, max_len: int) -> Row:
    """Cut `excess` tokens from the beginning, but leave one before the continuation unless that is too long itself."""
    cut = max(0, min(excess, start - 1), len(ids) - max_len)
    return Row(ids[cut:], max(start - cut, 1))


def _common_prefix_of(sequences: Sequence[np.ndarray]) -> int:
    return min(common_prefix(sequences[0], ids) for ids in sequences[1:])


# --- evaluation
# ----------------------------------------------------------------------------------------------------------


def evaluate_bundle(scorer: Scorer, tokenizer, bundle: Bundle, *, max_per_task: int | None = None,
                    runtime: Runtime | None = None, log: ResponseLog | None = None,
                    on_task: Callable[[TaskResult], None] = lambda result: None) -> BundleResult:
    """Run every task; `on_task` is called after each. The score is the mean of the centered accuracies."""
    results = []
    for task in bundle.tasks:
        results.append(evaluate_task(scorer, tokenizer, task, max_per_task=max_per_task, runtime=runtime, log=log))
        on_task(results[-1])
    name = bundle.score_name
    if max_per_task is not None:
        name += f" (at most {max_per_task} items per task)"
    return BundleResult(name, sum(r.centered for r in results) / len(results), tuple(results))


def evaluate_task(scorer: Scorer, tokenizer, task: BundleTask, *, max_per_task: int | None = None,
                  runtime: Runtime | None = None, log: ResponseLog | None = None) -> TaskResult:
    """Accuracy on a task's items (the first `max_per_task` after the fixed shuffle), spread over all ranks.

    `tokenizer` has bos_id and encode_batch, as ours does.
    """
    started = time.perf_counter()
    runtime = runtime or Runtime(torch.device("cpu"))
    items = load_items(task)
    random.Random(1337).shuffle(items)
    items = items[:max_per_task]
    if len(items) <= task.num_fewshot:
        limit = "" if max_per_task is None else f" with at most {max_per_task} per task"
        raise UserError(f"task {task.label} needs more items than its {task.num_fewshot} few-shot examples, "
                        f"and has {len(items)}{limit}")
    own = range(runtime.rank, len(items), runtime.world_size)
    verdicts = []
    with tqdm(total=len(own), desc=task.label, disable=None if runtime.is_main else True, leave=False) as bar:
        for first in range(0, len(own), CHUNK_ITEMS):
            chunk = own[first : first + CHUNK_ITEMS]
            verdicts += _examine(scorer, tokenizer, task, items, chunk)
            bar.update(len(chunk))
    if log is not None:
        log.add(verdicts)
    correct = torch.tensor(sum(verdict["correct"] for verdict in verdicts), dtype=torch.int64, device=runtime.device)
    accuracy = runtime.all_reduce(correct).item() / len(items)
    centered = (accuracy - task.guessing) / (1 - task.guessing)
    return TaskResult(task.label, len(items), accuracy, task.guessing, centered,
                      is_near_chance(accuracy, task.guessing, len(items)), time.perf_counter() - started)


def _examine(scorer: Scorer, tokenizer, task: BundleTask, items: list[dict], chunk: Sequence[int]) -> list[dict]:
    """The verdict on each item of the chunk, as the log has it."""
    prompts = [render_prompts(task, items[index], few_shot_examples(items, index, task.num_fewshot)) for index in chunk]
    encoded = iter(encode_all(tokenizer, [text for texts in prompts for text in texts]))
    rows = [to_rows(task.kind, [next(encoded) for _ in texts], scorer.max_len) for texts in prompts]
    scores = iter(scorer.score([row for own in rows for row in own]))
    verdicts = []
    for index, own in zip(chunk, rows, strict=True):
        mine = [next(scores) for _ in own]
        verdicts.append({"task": task.label, "index": index, "item": items[index],
                         "correct": is_correct(task.kind, items[index], mine), "nats": [score.nats for score in mine]})
    return verdicts


def encode_all(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text, BOS first."""
    ids, offsets = tokenizer.encode_batch(list(texts))
    return [np.concatenate(([tokenizer.bos_id], ids[a:b])).astype(np.int64)
            for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def is_correct(kind: str, item: dict, scores: Sequence[Score]) -> bool:
    """The verdict on an item from the scores of its rows; of equal losses the first wins."""
    if kind == "language_modeling":
        return scores[0].greedy
    losses = [score.nats for score in scores]
    return losses.index(min(losses)) == item["gold"]
