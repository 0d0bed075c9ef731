"""report.md: what a run did, on what, how well and how long, written down stage by stage as the run goes.

    report/section_<slug>.json     one file per section, written when its stage ends
           scores_<stage>.json     {metric: value} of base, mid, sft, rl
           timing.jsonl            one row per attempt at a stage: stage, seconds, started, finished, gpus, gpu (kind)
           run.json                when the run started and with which preset
           report.md, <stage>.png  rendered from the above and from ../metrics/<stage>.jsonl

`generate` copes with whatever is there: a crashed run gets the report of what it had, a file that cannot be read is
named in it.
"""

import json
import math
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

from nanochat.common import UserError, atomic_write, base_dir, duration
from nanochat.environment import dollars_per_gpu_hour, environment, git, gpus_here

STAGES = {"base": "Base training", "mid": "Mid-training", "sft": "SFT", "rl": "RL"}
SECTIONS = ("Tokenizer training", "Tokenizer evaluation", "Base training", "Base evaluation", "Mid-training",
            "Mid evaluation", "SFT", "SFT evaluation", "RL", "RL evaluation")  # fmt: skip

# nanochat's own speedrun on 8x H100, as its README of November 2025 reports it (RL was run on GSM8K only)
NANOCHAT_D20 = {
    "CORE": "BASE 0.2219",
    "ARC-Challenge": "MID 0.2875, SFT 0.2807",
    "ARC-Easy": "MID 0.3561, SFT 0.3876",
    "GSM8K": "MID 0.0250, SFT 0.0455, RL 0.0758",
    "HumanEval": "MID 0.0671, SFT 0.0854",
    "MMLU": "MID 0.3111, SFT 0.3151",
    "ChatCORE": "MID 0.0730, SFT 0.0884",
}
NANOCHAT_D20_TIME = "nanochat (Nov 2025) d20 on 8x H100: 3h 51m without RL."
REAL_PRESETS = ("d12", "d20", "d26", "d32")
# from nanochat's announcement of October 2025; no repository holds these runs
PUBLISHED_ELSEWHERE = [
    {"Published, other model": "30 layers, 24 h on 8x H100", "MMLU": "40s", "ARC-Easy": "70s", "GSM8K": "20s"},
    {"Published, other model": "$1000 tier: 41.6 h on 8x H100, no scores", "MMLU": "-", "ARC-Easy": "-", "GSM8K": "-"},
]

Table = list[dict]


class Report:
    """The report of one run, in `folder` (default: base_dir()/report)."""

    def __init__(self, folder: Path | None = None):
        self.folder = Path(folder) if folder is not None else base_dir() / "report"
        self.metrics = self.folder.parent / "metrics"

    # --- written as the run goes ---

    def reset(self, preset: str | None = None) -> None:
        """Start an empty report; the one that was there becomes report.previous."""
        previous = self.folder.with_name(self.folder.name + ".previous")
        if self.folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(self.folder, previous)
        atomic_write(self.folder / "run.json", _json({"started": _now(), "preset": preset}))

    def section(self, name: str, data: dict | Table | str) -> None:
        """Write or replace the section `name`.

        data: a dict (a two-column table; a value that is a list of dicts becomes a table of its own, a text of several
        lines a block of its own), a list of dicts (a table), or a text.
        """
        content = {"title": name, "written": _now(), "commit": git("rev-parse", "--short=12", "HEAD"), "data": data}
        atomic_write(self._path(name), _json(content))

    def add(self, name: str, data: dict) -> None:
        """Like `section`, but what an earlier evaluation of the same "Step" wrote stays where `data` has no newer."""
        before = _read(self._path(name), dict, problems=[]) or {}
        before = before["data"] if _is_section(before) and isinstance(before["data"], dict) else {}
        self.section(name, _merged(before, data) if before.get("Step") == data.get("Step") else data)

    def _path(self, name: str) -> Path:
        return self.folder / f"section_{_slug(name)}.json"

    def scores(self, stage: str, values: dict[str, float | None]) -> None:
        """Add metrics of a stage (base, mid, sft or rl) to the score table; a metric given again is replaced."""
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
        path = self.folder / f"scores_{stage}.json"
        before = _read(path, dict, problems=[]) or {}
        atomic_write(path, _json(before | values))

    def time(self, stage: str, seconds: float) -> None:
        """Append the wall-clock of a stage that ended just now."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", stage):
            raise UserError(f"a stage is named with a-z, 0-9, _ and -, got {stage!r}")
        if not (math.isfinite(seconds) and seconds >= 0):
            raise UserError(f"seconds of a stage must be a number from 0, got {seconds}")
        finished = datetime.now().astimezone()
        started = datetime.fromtimestamp(finished.timestamp() - seconds).astimezone()
        gpus, kind = gpus_here()
        row = {"stage": stage, "seconds": seconds, "started": started.isoformat(timespec="seconds"),
               "finished": finished.isoformat(timespec="seconds"), "gpus": gpus, "gpu": kind}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "timing.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    # --- rendered at the end, or whenever one wants to look ---

    def plot(self, stage: str) -> Path | None:
        """Draw a stage's metrics into <stage>.png; None when it has none."""
        rows = _read_rows(self.metrics / f"{stage}.jsonl", "step", problems=[])
        if not rows:
            return None
        from nanochat.plots import plot_stage  # matplotlib costs a second, which trainers need not wait for

        path = self.folder / f"{stage}.png"
        return path if plot_stage(STAGES[stage], rows, path) else None

    def generate(self, *, preset: str | None = None, facts: dict[str, str] | None = None,
                 copy_to: Path | None = None) -> Path:
        """Render report.md and its figures; return its path.

        preset: default the one given to `reset`. facts: the environment table, default this machine's.
        copy_to: a folder that gets report.md, and the figures in report/ beside it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        problems: list[str] = []
        run = _read(self.folder / "run.json", dict, problems) or {}
        content = _Content(self.folder, self.metrics, problems)
        figures = {stage: path for stage in STAGES if (path := self.plot(stage))}
        facts = (facts or environment()) | {"Run started": run.get("started")}

        def text(image_folder: str) -> str:
            images = {stage: image_folder + path.name for stage, path in figures.items()}
            return _render(content, facts, preset or run.get("preset"), images)

        atomic_write(self.folder / "report.md", text(""))
        if copy_to is not None:
            _copy(Path(copy_to), text("report/"), figures)
        return self.folder / "report.md"


def _copy(folder: Path, text: str, figures: dict[str, Path]) -> None:
    """Write report.md into `folder` and the figures into its report/; figures of an earlier report go."""
    try:
        for stage in STAGES:
            if stage in figures:
                atomic_write(folder / "report" / f"{stage}.png", figures[stage].read_bytes())
            else:
                (folder / "report" / f"{stage}.png").unlink(missing_ok=True)
        atomic_write(folder / "report.md", text)
    except OSError as error:
        raise UserError(f"the report's copy needs a folder that can be written, got {folder} "
                        f"({error.strerror})") from error


class _Content:
    """Everything a run wrote down, read tolerantly: what cannot be read is added to `problems`."""

    def __init__(self, folder: Path, metrics: Path, problems: list[str]):
        self.sections = {}
        for path in sorted(folder.glob("section_*.json")):
            content = _read(path, dict, problems)
            if content is not None and _is_section(content):
                self.sections[path.stem.removeprefix("section_")] = content
            elif content is not None:
                problems.append(f"{path.name} must hold a title and data")
        self.problems = problems
        self.scores = {stage: _read(folder / f"scores_{stage}.json", dict, problems) or {} for stage in STAGES}
        self.timing = _read_rows(folder / "timing.jsonl", "seconds", problems)
        self.last_steps = {}
        for stage in STAGES:
            rows = _read_rows(metrics / f"{stage}.jsonl", "step", problems)
            if rows:
                self.last_steps[stage] = max(row["step"] for row in rows)


def _is_section(content: dict) -> bool:
    return isinstance(content.get("title"), str) and isinstance(content.get("data"), dict | list | str)


def _merged(before: dict, data: dict) -> dict:
    """Return `data` over `before`; the rows of a table are told apart by their first column."""
    def rows(values: dict, key: str) -> dict:
        return {str(next(iter(row.values()), "")): row for row in values[key]}

    tables = [key for key in data if _is_table(data[key]) and _is_table(before.get(key))]
    return before | data | {key: list((rows(before, key) | rows(data, key)).values()) for key in tables}


# --- files ----------------------------------------------------------------------------------------


def _slug(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise ValueError(f"a section's name needs a letter or digit, got {name!r}")
    return slug


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _json(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n"


def _plain(value):
    """Turn numpy and torch scalars into numbers, anything else into its text."""
    return value.item() if hasattr(value, "item") else str(value)


def _read(path: Path, kind: type, problems: list[str]):
    """Return a JSON file's content; None when it is absent, or broken, which is added to `problems`."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return None
    if not isinstance(content, kind):
        problems.append(f"{path.name} must hold a {kind.__name__}, it holds a {type(content).__name__}")
        return None
    return content


def _read_rows(path: Path, number: str, problems: list[str]) -> Table:
    """Return the rows of a .jsonl file that have the number `number`; lines that are none, such as the last of a
    killed run, are counted in `problems`."""
    rows, broken = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and _is_number(row.get(number)):
            rows.append(row)
        else:
            broken += 1
    if broken:
        problems.append(f"{path.name} has {broken} line{'s' * (broken > 1)} that cannot be read")
    return rows


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# --- Markdown -------------------------------------------------------------------------------------


def _render(content: _Content, facts: dict, preset: str | None, images: dict[str, str]) -> str:
    """Return report.md: environment, scores, wall-clock, then the sections in the order of the pipeline."""
    facts = facts | _kernels(content) | _commits(content)
    blocks = [f"# Report of a {preset} run" if preset else "# Report", _two_columns(facts)]
    blocks += ["## Scores", _score_table(content.scores, preset)]
    blocks += ["## Wall-clock", _wall_clock(content.timing, preset)]
    slugs = {_slug(name): name for name in SECTIONS}
    missing = []
    for slug in sorted({*slugs, *content.sections}, key=lambda slug: (_place(slug, list(slugs)), slug)):
        stage = next((stage for stage, title in STAGES.items() if _slug(title) == slug), None)
        section = content.sections.get(slug)
        if section is None and stage not in content.last_steps:
            missing.append(slugs[slug])
            continue
        blocks.append(f"## {section['title'] if section else STAGES[stage]}")
        if section:
            blocks += _body(section["data"])
        else:
            blocks.append(f"Not finished: the metrics end at step {value_text(content.last_steps[stage])}.")
        if stage in images:
            blocks.append(f"![{STAGES[stage]}: curves over the steps]({images[stage]})")
    if missing:
        blocks += ["## Not run", "\n".join(f"- {name}" for name in missing)]
    if content.problems:
        blocks += ["## Could not be read", "\n".join(f"- {_escape(problem)}" for problem in content.problems)]
    return "\n\n".join(blocks) + "\n"


def _place(slug: str, known: list[str]) -> int:
    """Return where a section belongs: at its own place, after the one whose name it extends, or at the end."""
    fits = [index for index, name in enumerate(known) if f"{slug}-".startswith(f"{name}-")]
    return max(fits, key=lambda index: len(known[index]), default=len(known))


def _kernels(content: _Content) -> dict[str, str]:
    """Return the kernels of the stages, in one row when all ran on the same."""
    used = {stage: content.sections[_slug(title)]["data"].get("Kernels") for stage, title in STAGES.items()
            if isinstance(content.sections.get(_slug(title), {}).get("data"), dict)}
    used = {stage: names for stage, names in used.items() if names}
    if len(set(used.values())) == 1:
        return {"Kernels": next(iter(used.values()))}
    return {f"Kernels, {STAGES[stage]}": names for stage, names in used.items()}


def _commits(content: _Content) -> dict[str, str]:
    """Return a row only when the sections were written by different commits."""
    commits = sorted({str(section.get("commit")) for section in content.sections.values()})
    return {"Sections come from commits": ", ".join(commits)} if len(commits) > 1 else {}


def _score_table(scores: dict[str, dict], preset: str | None) -> str:
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    if not names:
        return "No stage was evaluated."
    names.sort(key=lambda name: (name.startswith("ChatCORE"), name != "CORE"))  # the rest stays as it came
    rows = [{"Metric": name} | {stage.upper(): scores[stage].get(name, "-") for stage in STAGES} for name in names]
    if preset not in REAL_PRESETS:
        return _table(rows)
    for row in rows:
        row["for reference: nanochat (Nov 2025) d20, 8x H100"] = NANOCHAT_D20.get(row["Metric"], "-")
    return _table(rows) + "\n\n" + _table(PUBLISHED_ELSEWHERE)


def _wall_clock(timing: Table, preset: str | None) -> str:
    """Return the table of time and dollars; the attempts at a stage are added up, each on the GPUs that it had."""
    if not timing:
        return "No stage was timed."
    attempts: dict[str, Table] = {}
    for row in timing:
        attempts.setdefault(str(row.get("stage")), []).append(row)
    before_rl = [row for row in timing if not str(row.get("stage")).startswith("rl")]
    sums = attempts | ({"total without RL": before_rl} if len(before_rl) < len(timing) else {}) | {"total": timing}
    rows = [{"Stage": name, "Time": duration(sum(row["seconds"] for row in some)), "Dollars": _dollars(some)}
            for name, some in sums.items()]
    prices = {f"{row['gpus']} x {row['gpu']} at ${_price(row):.2f}": None for row in timing if _price(row)}
    counted = (f"Dollars: {_escape(', '.join(prices))} per GPU-hour." if prices else
               "Dollars: n/a, no stage ran on a GPU of a known hourly price.")
    notes = [counted, NANOCHAT_D20_TIME] if preset in REAL_PRESETS else [counted]
    return _table(rows) + "\n\n" + " ".join(notes)


def _dollars(timing: Table) -> str:
    if not all(map(_price, timing)):
        return "n/a"
    return f"{sum(row['seconds'] / 3600 * row['gpus'] * _price(row) for row in timing):.2f}"


def _price(row: dict) -> float | None:
    """Return the dollars per hour of one of the GPUs that a timed stage ran on; None when they are unknown."""
    known = type(row.get("gpus")) is int and row["gpus"] > 0 and isinstance(row.get("gpu"), str)
    return dollars_per_gpu_hour(row["gpu"]) if known else None


def _body(data: dict | Table | str) -> list[str]:
    """Return the Markdown blocks of a section's data."""
    if isinstance(data, str):
        return [_text(data)]
    if isinstance(data, list):
        return [_table(data)]
    plain = {key: value for key, value in data.items() if not _is_block(value)}
    blocks = [_two_columns(plain)] if plain else []
    for key, value in data.items():
        if _is_block(value):
            blocks += [f"### {key}", _table(value) if isinstance(value, list) else _text(value)]
    return blocks


def _is_block(value) -> bool:
    """Say whether a value needs a block of its own: a table, or a text of several lines."""
    return _is_table(value) or isinstance(value, str) and "\n" in value.strip()


def _is_table(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _text(text: str) -> str:
    """Return one line as a paragraph, several as a code block that no text inside can end."""
    text = text.strip()
    if "\n" not in text:
        return _escape(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _two_columns(values: dict) -> str:
    return "\n".join(["| | |", "|---|---|"] + [f"| {_escape(key)} | {_cell(value)} |" for key, value in values.items()])


def _table(rows: Table) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {column for column in columns
               if all(_is_number(row.get(column)) or row.get(column) in (None, "-") for row in rows)}
    lines = [columns, ["---:" if column in numeric else "---" for column in columns]]
    lines = ["| " + " | ".join(map(_escape, lines[0])) + " |", "|" + "|".join(lines[1]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows])


def _cell(value) -> str:
    return _escape(value_text(value))


def _escape(text: str) -> str:
    """Keep a text as it is inside a table cell: code and special tokens are full of |, <, * and __."""
    text = " ".join(str(text).replace("&", "&amp;").replace("<", "&lt;").split())
    return re.sub(r"[\\`*|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)  # _ between letters needs no escape


def value_text(value) -> str:
    """Return a value as the report shows it: 4 decimals, commas from 10,000 on, n/a for None."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if value and abs(value) < 5e-5:  # 4 decimals would show 0.0000
            return f"{value:.1e}"
        return f"{value:,.4f}" if abs(value) >= 10_000 else f"{value:.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return str(value)
