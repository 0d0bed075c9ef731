"""metrics.jsonl: one JSON object per step, appended as the run goes, cut back to the checkpoint on resume."""

import json
from pathlib import Path

from nanochat.common import UserError, atomic_write, base_dir


def metrics_path(stage: str) -> Path:
    return base_dir() / "metrics" / f"{stage}.jsonl"


class MetricsLog:
    """Appends rows of a stage on rank 0; every row is flushed so that a killed run leaves what it had."""

    def __init__(self, stage: str, *, resume_step: int | None = None, enabled: bool = True, wandb_run=None):
        self.path, self.wandb_run, self.file = metrics_path(stage), wandb_run, None
        if enabled:
            kept = [] if resume_step is None else rows_until(self.path, resume_step)
            atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self.file = self.path.open("a", encoding="utf-8")

    def add(self, **row) -> None:
        """Append one row; values are JSON numbers, texts, lists or None."""
        if self.file is None:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in row.items() if v is not None and k != "step"}, step=row["step"])

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def rows_until(path: Path, step: int) -> list[dict]:
    """Return the whole rows of steps up to `step`; a last line cut short by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            rows.append(row)
    return rows


def start_wandb(name: str | None, stage: str, config: dict):
    """Start a Weights & Biases run when a name was given; UserError when the package is missing."""
    if not name:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--wandb {name} needs the package wandb, which is not installed "
                        "(.venv/bin/pip install wandb)") from error
    return wandb.init(project=f"nanochat-{stage}", name=name, config=config)
