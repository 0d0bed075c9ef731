"""The report: fixed inputs give a fixed text, and whatever a crashed run left behind is rendered and named."""

import json
import re

import matplotlib.image
import numpy as np
import pytest

from nanochat import report as report_module
from nanochat.common import UserError
from nanochat.environment import dollars_per_gpu_hour, environment, gpus_here
from nanochat.plots import plot_stage, points, smoothed
from nanochat.report import Report, duration, value_text
from scripts.report import main, parse_args

FACTS = {"Generated": "2025-12-01T12:00:00+00:00", "Commit": "0123456789ab on main", "GPU": "no GPU"}


@pytest.fixture(autouse=True)
def one_commit_and_no_gpu(monkeypatch):
    monkeypatch.setattr(report_module, "git", lambda *args: "0123456789ab")
    monkeypatch.setattr(report_module, "gpus_here", lambda: (0, ""))
    monkeypatch.setattr(report_module, "_now", lambda: "2025-12-01T11:50:00+00:00")


@pytest.fixture
def report(own_base_dir):
    return Report()


def write_metrics(report, stage, rows):
    report.metrics.mkdir(parents=True, exist_ok=True)
    (report.metrics / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def loss_rows(n):
    return [{"step": step, "loss": 3 + 4 / step, "tok_per_s": 3800.0 + step % 7, "mfu": None} for step in range(1, n)]


def text_of(report, **options):
    return report.generate(facts=FACTS, **options).read_text(encoding="utf-8")


def block(text, heading):
    """Return what stands under a `## heading`, up to the next one."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {heading!r} in:\n{text}"
    return found[1].strip()


GOLDEN = """\
# Report of a tiny run

| | |
|---|---|
| Generated | 2025-12-01T12:00:00+00:00 |
| Commit | 0123456789ab on main |
| GPU | no GPU |
| Run started | 2025-12-01T11:50:00+00:00 |
| Kernels | attention=sdpa linear=eager |

## Scores

| Metric | BASE | MID | SFT | RL |
|---|---:|---:|---:|---:|
| CORE | n/a | - | - | - |
| val_bpb | 1.8125 | - | - | - |
| Sums | - | 0.2500 | 0.9700 | - |
| ChatCORE | - | 0.1000 | 0.5000 | - |

## Wall-clock

| Stage | Time | Dollars |
|---|---|---|
| base | 2m 30s | n/a |
| sft | 1m 05s | n/a |
| total | 3m 35s | n/a |

Dollars: n/a, no stage ran on a GPU of a known hourly price.

## Tokenizer evaluation

| Text | Bytes | Ratio |
|---|---:|---:|
| code | 12,345 | 3.2100 |
| a\\|b | 900 | n/a |

## Base training

| | |
|---|---|
| Parameters | 7,340,032 |
| Steps | 250 |
| Tokens per parameter | 0.0700 |
| Note | not converged by design |
| MFU | n/a |
| Kernels | attention=sdpa linear=eager |

### Samples

```text
&amp; is not touched here <|bos|>
The capital of France is
```

### Per task

| Task | Accuracy |
|---|---:|
| copy | 0.5000 |

![Base training: curves over the steps](base.png)

## SFT

Done &lt;\\|assistant_end\\|> in one go.

## SFT evaluation, tool off

| | |
|---|---|
| Accuracy | 0.1250 |

## My own section

| a |
|---:|
| 1 |

## Not run

- Tokenizer training
- Base evaluation
- Mid-training
- Mid evaluation
- SFT evaluation
- RL
- RL evaluation
"""


def test_fixed_inputs_give_a_fixed_report(report):
    report.reset("tiny")
    report.section("My own section", [{"a": 1}])
    report.section("SFT evaluation, tool off", {"Accuracy": 0.125})
    report.section("SFT", "Done <|assistant_end|> in one go.")
    report.section("Base training", {
        "Parameters": 7_340_032, "Steps": 250, "Tokens per parameter": 0.07, "Note": "not converged by design",
        "Samples": "&amp; is not touched here <|bos|>\nThe capital of France is\n", "MFU": None,
        "Per task": [{"Task": "copy", "Accuracy": np.float32(0.5)}], "Kernels": "attention=sdpa linear=eager"})
    report.section("Tokenizer evaluation", [{"Text": "code", "Bytes": 12_345, "Ratio": 3.21},
                                            {"Text": "a|b", "Bytes": 900}])
    report.scores("sft", {"Sums": 0.97, "ChatCORE": 0.5})
    report.scores("mid", {"ChatCORE": 0.1, "Sums": 0.25})
    report.scores("base", {"CORE": None})
    report.scores("base", {"val_bpb": 1.8125})
    report.time("base", 100)
    report.time("sft", 65)
    report.time("base", 50)
    write_metrics(report, "base", loss_rows(20))
    assert text_of(report) == GOLDEN


def test_a_report_of_nothing_lists_everything_as_not_run(report):
    text = text_of(report)
    assert text.startswith("# Report\n")
    assert block(text, "Scores") == "No stage was evaluated."
    assert block(text, "Wall-clock") == "No stage was timed."
    assert len(block(text, "Not run").splitlines()) == len(report_module.SECTIONS)
    assert "Could not be read" not in text


def test_a_run_that_crashed_shows_what_it_had(report):
    report.reset("tiny")
    write_metrics(report, "base", loss_rows(41))
    with open(report.metrics / "base.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 41, "lo')
    text = text_of(report)
    assert block(text, "Base training") == (
        "Not finished: the metrics end at step 40.\n\n![Base training: curves over the steps](base.png)")
    assert "- Base training" not in block(text, "Not run")
    assert block(text, "Could not be read") == "- base.jsonl has 1 line that cannot be read"
    assert (report.folder / "base.png").exists()


@pytest.mark.parametrize("name, raw, message", [
    ("section_sft.json", b'{"title": "SFT", ', "section_sft.json cannot be read (Expecting property name"),
    ("section_sft.json", b"\xff\xfe\x00", "section_sft.json cannot be read ("),
    ("section_sft.json", b"[1]", "section_sft.json must hold a dict, it holds a list"),
    ("section_sft.json", b'{"title": "SFT"}', "section_sft.json must hold a title and data"),
    ("scores_sft.json", b"{", "scores_sft.json cannot be read ("),
    ("timing.jsonl", b'{"stage": "base"}\nnull\n', "timing.jsonl has 2 lines that cannot be read"),
    ("run.json", b"3", "run.json must hold a dict, it holds a int"),
])
def test_a_damaged_file_is_named_and_the_rest_is_rendered(report, name, raw, message):
    report.section("Base training", {"Steps": 7})
    (report.folder / name).write_bytes(raw)
    text = text_of(report)
    assert block(text, "Could not be read").startswith(f"- {message}")
    assert "| Steps | 7 |" in block(text, "Base training")


def test_a_damaged_score_file_is_written_anew(report):
    report.scores("base", {"CORE": 0.1})
    (report.folder / "scores_base.json").write_bytes(b"{")
    report.scores("base", {"val_bpb": 2.0})
    assert "| val_bpb | 2.0000 | - | - | - |" in text_of(report)


def test_a_section_written_again_is_replaced(report):
    report.section("RL", {"Steps": 1})
    report.section("RL", {"Steps": 2})
    assert block(text_of(report), "RL") == "| | |\n|---|---|\n| Steps | 2 |"
    assert len(list(report.folder.glob("section_*"))) == 1


def test_what_is_added_to_a_section_replaces_only_what_it_has(report):
    report.add("SFT evaluation", {"Step": 5, "Score": 1, "Tasks": [{"task": "a", "n": 1}, {"task": "b", "n": 1}]})
    report.add("SFT evaluation", {"Step": 5, "Tasks": [{"task": "c", "n": 2}, {"task": "a", "n": 2}]})
    content = json.loads((report.folder / "section_sft-evaluation.json").read_text(encoding="utf-8"))
    assert content["data"] == {"Step": 5, "Score": 1, "Tasks": [{"task": "a", "n": 2}, {"task": "b", "n": 1},
                                                                {"task": "c", "n": 2}]}
    report.add("SFT evaluation", {"Step": 6, "Score": 3})  # of another model
    assert "Tasks" not in text_of(report) and "| Score | 3 |" in text_of(report)
    for broken in (b"{", b"[]", b'{"title": "x", "data": "text"}'):
        (report.folder / "section_sft-evaluation.json").write_bytes(broken)
        report.add("SFT evaluation", {"Step": 6, "Score": 4})
        assert "| Score | 4 |" in text_of(report)


def test_sections_of_different_commits_are_told(report, monkeypatch):
    report.section("SFT", "x")
    monkeypatch.setattr(report_module, "git", lambda *args: "fedcba987654")
    report.section("RL", "y")
    assert "| Sections come from commits | 0123456789ab, fedcba987654 |" in text_of(report)


def test_kernels_that_differ_between_stages_are_told_per_stage(report):
    report.section("SFT", {"Kernels": "linear=eager"})
    report.section("RL", {"Kernels": "linear=fp8"})
    text = text_of(report)
    assert "| Kernels, SFT | linear=eager |\n| Kernels, RL | linear=fp8 |" in text


@pytest.mark.parametrize("preset", ["d12", "d20", "d26", "d32"])
def test_published_figures_stand_beside_those_of_the_real_presets_only(report, preset):
    report.scores("base", {"CORE": 0.21})
    assert "nanochat" not in text_of(report, preset="tiny")
    text = text_of(report, preset=preset)
    assert "| Metric | BASE | MID | SFT | RL | for reference: nanochat (Nov 2025) d20, 8x H100 |" in text
    assert "| CORE | 0.2100 | - | - | - | BASE 0.2219 |" in text
    assert "| 30 layers, 24 h on 8x H100 | 40s | 70s | 20s |" in text
    report.time("base", 1)
    assert block(text_of(report, preset=preset), "Wall-clock").endswith("3h 51m without RL.")


def test_dollars_are_time_times_price(report, monkeypatch):
    monkeypatch.setattr(report_module, "gpus_here", lambda: (8, "NVIDIA H100 80GB HBM3"))
    report.time("base", 3 * 3600)
    report.time("sft", 900)
    monkeypatch.setattr(report_module, "gpus_here", lambda: (0, ""))  # rendered elsewhere
    text = block(text_of(report), "Wall-clock")
    assert "| base | 3h 00m | 72.00 |\n| sft | 15m 00s | 6.00 |\n| total | 3h 15m | 78.00 |" in text
    assert text.endswith("Dollars: 8 x NVIDIA H100 80GB HBM3 at $3.00 per GPU-hour.")


def test_every_attempt_is_paid_at_the_gpus_that_it_had(report, monkeypatch):
    monkeypatch.setattr(report_module, "gpus_here", lambda: (8, "NVIDIA H100 80GB HBM3"))
    report.time("base", 3600)
    monkeypatch.setattr(report_module, "gpus_here", lambda: (3, "NVIDIA A100-SXM4-80GB"))
    report.time("base", 3600)
    text = block(text_of(report), "Wall-clock")
    assert "| base | 2h 00m | 29.37 |" in text
    assert text.endswith("8 x NVIDIA H100 80GB HBM3 at $3.00, 3 x NVIDIA A100-SXM4-80GB at $1.79 per GPU-hour.")
    monkeypatch.setattr(report_module, "gpus_here", lambda: (1, "NVIDIA Unknown 9"))
    report.time("sft", 60)
    text = block(text_of(report), "Wall-clock")
    assert "| base | 2h 00m | 29.37 |\n| sft | 1m 00s | n/a |\n| total | 2h 01m | n/a |" in text


@pytest.mark.parametrize("row", [{"gpus": None, "gpu": "H100"}, {"gpus": 1, "gpu": 5}, {"gpus": "8"}, {}])
def test_a_timing_row_without_its_gpus_has_no_price(report, row):
    report.folder.mkdir(parents=True)
    (report.folder / "timing.jsonl").write_text(json.dumps({"stage": "base", "seconds": 60} | row) + "\n")
    assert "| base | 1m 00s | n/a |" in text_of(report)


def test_the_total_without_rl_stands_beside_nanochats(report):
    for stage in ("base-train", "rl-train", "rl-eval"):
        report.time(stage, 60)
    text = block(text_of(report, preset="d20"), "Wall-clock")
    assert "| total without RL | 1m 00s | n/a |\n| total | 3m 00s | n/a |" in text


def test_a_rehearsal_is_called_one_and_compared_with_nothing(report):
    report.reset("d20 rehearsal")
    report.scores("base", {"CORE": 0.21})
    report.time("base", 1)
    text = text_of(report)
    assert text.startswith("# Report of a d20 rehearsal run\n") and "nanochat" not in text


@pytest.mark.parametrize("name, expected", [("NVIDIA H100 80GB HBM3", 3), ("NVIDIA Unknown 9", None)])
def test_only_known_gpus_have_a_price(monkeypatch, name, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: name)
    assert gpus_here() == (2, name) and dollars_per_gpu_hour(name) == expected


def test_the_environment_is_told():
    facts = environment()
    assert facts["Python"].startswith("3.") and facts["torch"] and facts["CPU"].endswith(" cores")
    assert re.fullmatch(r"\d+ GiB", facts["RAM"])
    assert re.fullmatch(r"unknown|[0-9a-f]{12} on .*", facts["Commit"])
    assert facts["GPU"] == "no GPU" or "GiB" in facts["GPU"]


@pytest.mark.parametrize("value, text", [
    (None, "n/a"), (True, "yes"), (9_999, "9999"), (10_000, "10,000"), (-12_345, "-12,345"), (0.5, "0.5000"),
    (0.0, "0.0000"), (3e-5, "3.0e-05"), (12_345.678, "12,345.6780"), (float("nan"), "nan"), ([1, 0.5], "1, 0.5000"),
    ("x", "x")])
def test_values_are_shown_as_promised(value, text):
    assert value_text(value) == text


@pytest.mark.parametrize("seconds, text", [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599, "59m 59s"),
                                           (3600, "1h 00m"), (13_871, "3h 51m"), (7199, "2h 00m")])
def test_durations_are_shown_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text


def test_text_with_markdown_in_it_is_shown_as_it_is(report):
    report.section("RL", "a_b __init__(self) 3*4*5 `x` <b> &lt; _y_ | ~~z~~ \\n")
    shown = block(text_of(report), "RL")
    assert shown == r"a_b \_\_init\_\_(self) 3\*4\*5 \`x\` &lt;b> &amp;lt; \_y\_ \| \~\~z\~\~ \\n"


def test_a_code_block_is_not_ended_by_its_text(report):
    report.section("RL", "a\n```\nb ````` c")
    assert block(text_of(report), "RL") == "``````text\na\n```\nb ````` c\n``````"


# --- figures --------------------------------------------------------------------------------------

STAGE_ROWS = {
    "base": loss_rows(60) + [{"step": step, "val_bpb": 2 - step / 100} for step in (0, 30, 59)],
    "sft": loss_rows(60) + [{"step": 59, "val_loss": 3.1}],
    "rl": [{"step": step, "reward": 0.4 + step / 100, "loss": 0.1} for step in range(1, 30)]
    + [{"step": step, "pass_at_k": [0.4, 0.6, 0.7]} for step in (0, 15, 29)],
}


@pytest.mark.parametrize("stage, panels", [("base", 3), ("sft", 2), ("rl", 2)])
def test_figures_are_drawn_and_not_blank(report, stage, panels):
    report.folder.mkdir(parents=True)
    write_metrics(report, stage, STAGE_ROWS[stage])
    pixels = matplotlib.image.imread(report.plot(stage))[:, :, :3]
    height, width, _ = pixels.shape
    assert width > 400 * panels and height > 250
    for panel in range(panels):
        part = pixels[:, panel * width // panels : (panel + 1) * width // panels]
        colorful = (part.max(axis=2) - part.min(axis=2)) > 0.3  # curves are blue or orange, text and axes gray
        assert colorful.mean() > 0.002
        assert part.std() > 0.05


def test_a_curve_is_where_its_numbers_are(tmp_path):
    """A falling loss is drawn falling: the curve's ink is high on the left and low on the right."""
    rows = [{"step": step, "loss": 5 - step / 100} for step in range(1, 400)]
    assert plot_stage("Base", rows, tmp_path / "x.png")
    pixels = matplotlib.image.imread(tmp_path / "x.png")[:, :, :3]
    ink = (pixels[:, :, 2] - pixels[:, :, 0]) > 0.3
    columns = np.flatnonzero(ink.any(axis=0))
    left, right = (ink[:, columns[0] : columns[0] + 20], ink[:, columns[-1] - 20 : columns[-1]])
    assert np.flatnonzero(left.any(axis=1)).mean() + 100 < np.flatnonzero(right.any(axis=1)).mean()


def test_nothing_to_draw_draws_nothing(report, tmp_path):
    assert report.plot("mid") is None
    assert not plot_stage("Mid", [{"step": 1, "lr": 0.1}, {"step": 2, "loss": None}], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_points_and_smoothing():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1}]
    assert points(rows, "loss") == ([1, 4], [2.0, 1])
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 0.0], beta=0.5) == pytest.approx([1.0, 1 / 3])


# --- the program ----------------------------------------------------------------------------------


def run(*argv):
    main(parse_args(list(argv)))


def test_the_program_resets_times_and_generates(report, tmp_path, capsys):
    run("reset", "--preset", "tiny")
    run("time", "--stage", "base_train", "--seconds", "61.5")
    write_metrics(report, "base", loss_rows(20))
    target = tmp_path / "checkout"
    run("generate", "--copy-to", str(target))
    assert str(report.folder / "report.md") in capsys.readouterr().out
    for folder in (report.folder, target):
        text = (folder / "report.md").read_text(encoding="utf-8")
        assert text.startswith("# Report of a tiny run\n") and "| base_train | 1m 02s | n/a |" in text
        image = re.search(r"!\[.*\]\((.*)\)", text)[1]
        assert matplotlib.image.imread(folder / image).std() > 0.01
    assert (target / "report" / "base.png").exists()
    (report.metrics / "base.jsonl").unlink()
    run("generate", "--copy-to", str(target))
    assert not (target / "report" / "base.png").exists()


def test_reset_keeps_the_previous_report(report):
    for number in (1, 2, 3):
        run("reset")
        report.section("RL", {"Run": number})
    previous = json.loads((report.folder.with_name("report.previous") / "section_rl.json").read_text(encoding="utf-8"))
    assert previous["data"] == {"Run": 2}
    run("reset")
    assert sorted(path.name for path in report.folder.iterdir()) == ["run.json"]


@pytest.mark.parametrize("argv, message", [
    (["time", "--stage", "a b", "--seconds", "1"], "a stage is named with a-z, 0-9, _ and -, got 'a b'"),
    (["time", "--stage", "base", "--seconds", "-1"], "seconds of a stage must be a number from 0, got -1.0"),
    (["time", "--stage", "base", "--seconds", "nan"], "seconds of a stage must be a number from 0, got nan"),
])
def test_a_wrong_time_is_refused(report, argv, message):
    with pytest.raises(UserError) as caught:
        run(*argv)
    assert str(caught.value) == message
    assert not (report.folder / "timing.jsonl").exists()


def test_a_copy_that_cannot_be_written_is_told_and_the_report_is_there(report, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="needs a folder that can be written, got .*/file "):
        run("generate", "--copy-to", str(tmp_path / "file"))
    assert (report.folder / "report.md").exists()


def test_scores_of_an_unknown_stage_are_refused(report):
    with pytest.raises(ValueError, match="stage must be one of base, mid, sft, rl, got 'chat'"):
        report.scores("chat", {"x": 1.0})
