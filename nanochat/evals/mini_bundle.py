"""The mini bundle: a generated evaluation bundle in the format of the real one, for models too small for CORE.

Seven tasks of the three types on what a few hundred steps on Python's documentation can teach: continuing a repetition
or a count, the syntax around a keyword, a or an. Its score is called "mini score"; it says nothing about CORE.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import yaml

from nanochat.common import atomic_write, base_dir
from nanochat.tasks.words import COMMON

ITEMS = 100  # per task; the standard error of an accuracy is at most 5 points

_NAMES = "item value name key path line node data text result other index size start file code func obj field".split()

# (text before, how Python goes on, how it does not), with {} for a name
_SYNTAX = (
    ("    def {}(", "self):", "import):", "else):", "while):"),
    ("        for {} in", " range(10):", " def range:", " import 10:", " raise:"),
    ("        if {} is", " not None:", " def None:", " import:", " class not:"),
    ("        self.{} =", " {}", " import {}", " while {}", " except {}"),
    ("        raise", " ValueError({})", " def {}", " import {}", " else {}"),
    ("        return", " self.{}", " def.{}", " import.{}", " except.{}"),
    ("        except", " ValueError:", " import:", " def:", " else:"),
    ("from {}", " import *", " def *", " return *", " else *"),
    ("    if not", " {}:", " def {}:", " import:", " except:"),
    ("        while", " True:", " import:", " def:", " except:"),
)
# (the line that the ending belongs to, another one, the ending)
_ENDINGS = (
    ("for {}", "def {}", "in self.items():"),
    ("if {}", "import {}", "is None:"),
    ("from {}", "return {}", "import *"),
    ("    return {}", "class {}", "+ 1"),
    ("if {}", "def {}", "== 0:"),
    ("with open({})", "import {}", "as f:"),
    ("except ValueError", "def {}", "as err:"),
    ("while {}", "from {}", "< 10:"),
)
_VOWEL_NOUNS = "integer object exception error iterator argument instance iterable element address item".split()
_CONSONANT_NOUNS = "string list tuple function class file method module dictionary number sequence value".split()
_BEFORE_NOUNS = ("Return {}", "This is {}", "It must be {}", "Create {}", "If it is {}", "Convert it to {}")
# (context, continuation) with {} for a name; the continuation follows one space
_COMPLETIONS = (
    ("if {} is not", "None:"), ("while", "True:"), ("from {}", "import"), ("for {}", "in"), ("self.{} =", "{}"),
    ("if {} is", "None:"), ("try:\n    {}()\nexcept", "ValueError:"), ("def {}(self):\n    return", "self."),
)


def write_mini_bundle(folder: Path | None = None) -> Path:
    """Write the bundle's files, by default under base_dir()/"mini_bundle"; files already right are left alone."""
    folder = folder or base_dir() / "mini_bundle"
    for name, text in _files().items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
            atomic_write(path, text)
    return folder


def _files() -> dict[str, str]:
    """Path inside the bundle -> text"""
    entries, meta, files = [], ["Eval Task,Task Type,#shots,#datapoints,Random baseline,Description"], {}
    for label, kind, shots, delimiter, guessing, description, draw in _TASKS:
        uri = f"mini/{label}.jsonl"
        entries.append({"label": label, "dataset_uri": uri, "num_fewshot": [shots], "icl_task_type": kind,
                        "continuation_delimiter": delimiter})
        meta.append(f"{label},{kind.replace('_', ' ')},{shots},{ITEMS},{guessing},{description}")
        files[f"eval_data/{uri}"] = "".join(json.dumps(item) + "\n" for item in _draw_items(label, draw))
    files["eval_meta_data.csv"] = "\n".join(meta) + "\n"
    files["core.yaml"] = yaml.safe_dump({"metric": "mini score", "icl_tasks": entries}, sort_keys=False)
    return files


def _draw_items(label: str, draw: Callable[[random.Random], dict]) -> list[dict]:
    """ITEMS different items, the same in every run"""
    rng = random.Random(f"mini bundle/{label}")
    items: dict[str, dict] = {}
    while len(items) < ITEMS:
        item = draw(rng)
        items.setdefault(json.dumps(item), item)
    return list(items.values())


def _options(rng: random.Random, right: str, wrong: list[str]) -> tuple[list[str], int]:
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def _repetition(rng: random.Random) -> tuple[str, str, list[str]]:
    """(words that take turns, the next word, three words that are not in it)"""
    words = rng.sample(COMMON, 6)
    cycle = words[: rng.choice((2, 3))]
    length = rng.randrange(2 * len(cycle), 3 * len(cycle) + 1)
    return " ".join(cycle[i % len(cycle)] for i in range(length)), cycle[length % len(cycle)], words[3:]


def _repeat_choice(rng: random.Random) -> dict:
    text, right, wrong = _repetition(rng)
    choices, gold = _options(rng, right, wrong)
    return {"query": text, "choices": choices, "gold": gold}


def _repeat(rng: random.Random) -> dict:
    text, right, _ = _repetition(rng)
    return {"context": text, "continuation": right}


def _count(rng: random.Random) -> dict:
    first, step, length = rng.randrange(1, 60), rng.choice((1, 1, 1, 2, 10)), rng.randrange(4, 7)
    *shown, following = (str(first + step * i) for i in range(length + 1))
    return {"context": " ".join(shown), "continuation": following}


def _syntax_choice(rng: random.Random) -> dict:
    name = rng.choice(_NAMES)
    query, right, *wrong = (text.format(name) for text in rng.choice(_SYNTAX))
    choices, gold = _options(rng, right, wrong)
    return {"query": query, "choices": choices, "gold": gold}


def _ending(rng: random.Random) -> dict:
    name = rng.choice(_NAMES)
    right, wrong, ending = (text.format(name) for text in rng.choice(_ENDINGS))
    contexts, gold = _options(rng, right, [wrong])
    return {"context_options": contexts, "continuation": ending, "gold": gold}


def _article(rng: random.Random) -> dict:
    right, wrong, nouns = rng.choice((("an", "a", _VOWEL_NOUNS), ("a", "an", _CONSONANT_NOUNS)))
    before = rng.choice(_BEFORE_NOUNS)
    contexts, gold = _options(rng, before.format(right), [before.format(wrong)])
    return {"context_options": contexts, "continuation": f"{rng.choice(nouns)}.", "gold": gold}


def _completion(rng: random.Random) -> dict:
    name = rng.choice(_NAMES)
    context, continuation = (text.format(name) for text in rng.choice(_COMPLETIONS))
    return {"context": context, "continuation": continuation}


# label, type, shots, delimiter, guessing in percent, description, how an item is drawn
_TASKS = (
    ("repeat_choice", "multiple_choice", 2, " ", 25, "which word continues a repetition", _repeat_choice),
    ("syntax_choice", "multiple_choice", 0, "", 25, "which ending is Python", _syntax_choice),
    ("syntax_schema", "schema", 0, " ", 50, "which beginning fits the end of a line of Python", _ending),
    ("article_schema", "schema", 0, " ", 50, "a or an before a noun", _article),
    ("repeat", "language_modeling", 2, " ", 0, "the next word of a repetition", _repeat),
    ("count", "language_modeling", 2, " ", 0, "the next number of a count", _count),
    ("syntax", "language_modeling", 3, " ", 0, "the next word of a line of Python", _completion),
)
