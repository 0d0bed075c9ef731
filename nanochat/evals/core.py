"""In-context tasks of an evaluation bundle, scored as in CORE of DCLM (arXiv 2406.11794) and nanochat (Nov 2025).

A bundle is a folder: core.yaml lists tasks (label, icl_task_type, dataset_uri, num_fewshot, continuation_delimiter),
eval_meta_data.csv gives each task's accuracy of guessing in percent, eval_data/<dataset_uri> holds items as JSONL.

- multiple_choice {query, choices, gold}: one context, several continuations; the lowest mean loss per token wins.
- schema {context_options, continuation, gold}: several contexts, one continuation; its lowest mean loss wins.
- language_modeling {context, continuation}: greedy decoding must give exactly the continuation.

Accuracies are centered, (accuracy - guessing) / (1 - guessing), and averaged. Only the mean over the 22 tasks of the
real bundle is called CORE. Rows longer than the model's context lose their beginning.
"""

import csv
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from nanochat.common import Runtime, UserError

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

# Tokens per forward pass. The logits of 8,192 tokens take 2 GiB at a vocabulary of 65,536.
BATCH_TOKENS = 8192
# Items tokenized at a time: enough to sort by length, few enough to keep ten-shot prompts of one task out of
# memory.
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
    label: str
    items: int
    accuracy: float
    centered: float
    seconds: float


@dataclass(frozen=True)
class BundleResult:
    name: str
    score: float
    tasks: tuple[TaskResult, ...]


@dataclass(frozen=True)
class Row:
    """One token sequence; ids[start:] is the continuation that is scored, 1 <= start < len(ids)."""

    ids: list[int]
    start: int


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
    others = [i for i in range(len(items)) if i != index]
    return [items[i] for i in random.Random(1234 + index).sample(others, count)]


def encode_rows(tokenizer, kind: str, prompts: Sequence[str], max_len: int) -> list[Row]:
    """Rows to score, BOS first, at most `max_len` tokens: an option each, or for language modeling one.

    Where the continuation starts is read off the tokens: after the common prefix, or where the common suffix
    begins. At least one token is scored, even when one choice begins with another (nanochat has NaN there).
    """
    sequences = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    if kind == "language_modeling":
        return [_cropped(sequences[1], _common_prefix(sequences), max_len)]
    limit = min(map(len, sequences)) - 1
    if kind == "schema":
        length = min(_common_prefix([ids[::-1] for ids in sequences]), limit)
        return [_cropped(ids, len(ids) - length, max_len) for ids in sequences]
    start = min(_common_prefix(sequences), limit)
    return [_cropped(ids, start, max_len) for ids in sequences]


def _cropped(ids: list[int], start: int, max_len: int) -> Row:
    cut = max(0, len(ids) - max_len)
    return Row(ids[cut:], min(max(start - cut, 1), len(ids) - cut - 1))


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


# --- scoring
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_rows(model, rows: Sequence[Row], kind: str, *, pad_id: int, batch_tokens: int = BATCH_TOKENS) -> list[float]:
    """Score each row: mean nats per token of the continuation, or for language modeling 1.0 if greedy gives
    it, else 0.0.

    Rows of similar length share a forward pass; padding stands right of a row and cannot reach it.
    """
    scores = [0.0] * len(rows)
    for batch in _batches(rows, batch_tokens):
        x, y = _collate([rows[i] for i in batch], pad_id)
        x, y = x.to(model.device), y.to(model.device)
        if kind == "language_modeling":
            values = ((model(x).argmax(-1) == y) | (y < 0)).all(1)
        else:
            losses = model(x, y, reduction="none").view(y.shape)
            values = losses.double().sum(1) / (y >= 0).sum(1)
        for i, value in zip(batch, values.tolist(), strict=True):
            scores[i] = float(value)
    return scores


def _batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Row numbers by length, grouped so that rows times longest stays within `batch_tokens` (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        if batches and (len(batches[-1]) + 1) * len(rows[i].ids) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _collate(rows: Sequence[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, T) int64 right-padded, y (N, T) int64 with -1 outside of the continuations"""
    width = max(len(row.ids) for row in rows) - 1
    x = torch.full((len(rows), width), pad_id)
    y = torch.full((len(rows), width), -1)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        x[i, : len(ids) - 1] = ids[:-1]
        y[i, row.start - 1 : len(ids) - 1] = ids[row.start :]
    return x, y


def is_correct(kind: str, item: dict, scores: Sequence[float]) -> bool:
    """The verdict on an item from the scores of its rows; of equal losses the first wins."""
    if kind == "language_modeling":
        return scores[0] == 1.0
    return scores.index(min(scores)) == item["gold"]


def evaluate_task(model, tokenizer, task: BundleTask, *, max_len: int, max_per_task: int | None = None,
                  batch_tokens: int = BATCH_TOKENS, runtime: Runtime | None = None) -> TaskResult:
    """Accuracy on a task's items (the first `max_per_task` after the fixed shuffle), spread over all
    ranks."""
    started = time.perf_counter()
    runtime = runtime or Runtime(model.device)
    items = load_items(task)
    random.Random(1337).shuffle(items)
    items = items[:max_per_task]
    if len(items) <= task.num_fewshot:
        limit = "" if max_per_task is None else f" with at most {max_per_task} per task"
        raise UserError(f"task {task.label} needs more items than its {task.num_fewshot} few-shot examples, "
                        f"and has {len(items)}{limit}")
    own = range(runtime.rank, len(items), runtime.world_size)
    correct = 0
    with tqdm(total=len(own), desc=task.label, disable=None if runtime.is_main else True, leave=False) as bar:
        for first in range(0, len(own), CHUNK_ITEMS):
            chunk = own[first : first + CHUNK_ITEMS]
            correct += _count_correct(model, tokenizer, task, items, chunk, max_len, batch_tokens)
            bar.update(len(chunk))
    total = torch.tensor(correct, dtype=torch.int64, device=runtime.device)
    accuracy = runtime.all_reduce(total).item() / len(items)
    centered = (accuracy - task.guessing) / (1 - task.guessing)
    return TaskResult(task.label, len(items), accuracy, centered, time.perf_counter() - started)


def _count_correct(model, tokenizer, task: BundleTask, items: list[dict], chunk: Sequence[int], max_len: int,
                   batch_tokens: int) -> int:
    rows, owners = [], []
    for index in chunk:
        prompts = render_prompts(task, items[index], few_shot_examples(items, index, task.num_fewshot))
        encoded = encode_rows(tokenizer, task.kind, prompts, max_len)
        owners.append((index, len(rows), len(rows) + len(encoded)))
        rows += encoded
    scores = score_rows(model, rows, task.kind, pad_id=tokenizer.bos_id, batch_tokens=batch_tokens)
    return sum(is_correct(task.kind, items[index], scores[a:b]) for index, a, b in owners)


def evaluate_bundle(model, tokenizer, bundle: Bundle, *, max_len: int, max_per_task: int | None = None,
                    batch_tokens: int = BATCH_TOKENS, runtime: Runtime | None = None,
                    on_task: Callable[[TaskResult], None] = lambda result: None) -> BundleResult:
    """Run every task; `on_task` is called after each. The score is the mean of the centered accuracies."""
    results = []
    for task in bundle.tasks:
        results.append(evaluate_task(model, tokenizer, task, max_len=max_len, max_per_task=max_per_task,
                                     batch_tokens=batch_tokens, runtime=runtime))
        on_task(results[-1])
    return BundleResult(bundle.score_name, sum(r.centered for r in results) / len(results), tuple(results))
