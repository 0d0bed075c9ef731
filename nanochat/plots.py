"""The report's figures, drawn from metrics.jsonl: one PNG per stage, its panels side by side."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator, StrMethodFormatter  # noqa: E402

STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "lines.linewidth": 1.6, "legend.edgecolor": "none"}
MAIN, ACCENT = "#1f5fa8", "#d1602a"
PANEL_INCHES, DPI = (4.0, 2.7), 110


def plot_stage(title: str, rows: list[dict], path: Path) -> bool:
    """Draw what a stage's metrics rows hold into the PNG `path`; False when there is nothing to draw.

    rows: metrics.jsonl in order; a panel takes the rows that carry its number.
    """
    panels = [draw for has, draw in _PANELS if has(rows)]
    if not panels:
        return False
    with plt.rc_context(STYLE):
        width, height = PANEL_INCHES
        figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), height), squeeze=False)
        for draw, ax in zip(panels, axes[0], strict=True):
            draw(rows, ax)
            ax.set_title(f"{title}: {ax.get_title('left')}", loc="left")
        figure.tight_layout()
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return True


def points(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of the rows whose `key` is a finite number."""
    chosen = [row for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    return [row["step"] for row in chosen], [row[key] for row in chosen]


def smoothed(values: list[float], beta: float = 0.9) -> list[float]:
    """Return the moving average that starts unbiased: sum of beta^age-weighted values over the sum of weights."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = beta * average + (1 - beta) * value, beta * weight + (1 - beta)
        out.append(average / weight)
    return out


def _loss(rows: list[dict], ax: Axes) -> None:
    _noisy(rows, "loss", ax)
    steps, values = points(rows, "val_loss")
    if steps:
        ax.plot(steps, values, "o-", color=ACCENT, markersize=4, label="validation")
    _label(ax, "loss", "step", "nats per token")


def _reward(rows: list[dict], ax: Axes) -> None:
    _noisy(rows, "reward", ax)
    ax.set_ylim(0, 1.02)
    _label(ax, "reward of the rollouts", "step", "mean reward")


def _noisy(rows: list[dict], key: str, ax: Axes) -> None:
    steps, values = points(rows, key)
    ax.plot(steps, values, color=MAIN, alpha=0.3, linewidth=0.8, label="each step")
    ax.plot(steps, smoothed(values), color=MAIN, label="average of the last ~10")


def _val_bpb(rows: list[dict], ax: Axes) -> None:
    steps, values = points(rows, "val_bpb")
    ax.plot(steps, values, "o-" if len(steps) < 40 else "-", color=ACCENT, markersize=4)
    ax.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(0, 7), textcoords="offset points", ha="right")
    _label(ax, "validation", "step", "bits per byte")


def _mfu(rows: list[dict], ax: Axes) -> None:
    steps, values = points(rows, "mfu")
    ax.plot(steps, values, color=MAIN)
    ax.set_ylim(0, 1.1 * max(values))
    _label(ax, "model FLOPs utilization", "step", "% of dense bf16 peak")


def _throughput(rows: list[dict], ax: Axes) -> None:
    steps, values = points(rows, "tok_per_s")
    ax.plot(steps, values, color=MAIN)
    ax.set_ylim(0, 1.1 * max(values))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _label(ax, "throughput", "step", "tokens per second")


def _pass_at_k(rows: list[dict], ax: Axes) -> None:
    measured = [row for row in rows if row.get("pass_at_k")]
    ends = measured[:1] + measured[1:][-1:]  # before and now; all of them would be clutter
    for row, color in zip(ends, (ACCENT, MAIN), strict=False):
        ks = range(1, len(row["pass_at_k"]) + 1)
        ax.plot(ks, row["pass_at_k"], "o-", color=color, markersize=4, label=f"step {row['step']}")
    ax.set_ylim(0, 1.02)
    _label(ax, "pass@k on held-out problems", "k samples", "share solved")


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()


def _holds(key: str) -> Callable[[list[dict]], bool]:
    return lambda rows: bool(points(rows, key)[0])


_PANELS = (
    (_holds("reward"), _reward),
    (lambda rows: any(row.get("pass_at_k") for row in rows), _pass_at_k),
    (lambda rows: _holds("loss")(rows) and not _holds("reward")(rows), _loss),  # a policy-gradient loss says nothing
    (_holds("val_bpb"), _val_bpb),
    (_holds("mfu"), _mfu),
    (lambda rows: _holds("tok_per_s")(rows) and not _holds("mfu")(rows), _throughput),
)
