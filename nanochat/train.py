"""The training loop of every stage: base, mid, SFT and RL differ in their batches, schedule and evaluation only.

One step: fetch the micro-batches, count the supervised tokens of all ranks, run each micro-batch with the summed loss
divided by that count, update. Dividing by the global count makes the loss a mean over tokens whatever the split over
ranks and micro-batches. A step ends with one log line, a metrics row and, when due, an evaluation and a checkpoint.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from kernels.device import peak
from nanochat.checkpoint import find_checkpoint, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from nanochat.common import Runtime, UserError, duration, print0
from nanochat.gpt import GPT
from nanochat.metrics import MetricsLog
from nanochat.optim import MuonAdamW

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved on SIGTERM, run again to go on
EMA = 0.9  # smoothing of the loss that is printed and reported


class Batches(Protocol):
    """Where a stage's micro-batches come from."""

    def micro_batches(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Return this rank's (x, y, weight) of one step: int64 (B, T), y = -1 ignored; weight fp32 (B, T) or None."""

    def metrics(self) -> dict:
        """Return numbers about the last step's batches for its metrics row."""

    def state_dict(self) -> dict:
        """Return the JSON-able position after the batches handed out."""

    def close(self) -> None: ...


class LoaderBatches:
    """A step's micro-batches from a loader of (x, y)."""

    def __init__(self, loader, accumulation: int):
        self.loader, self.accumulation = loader, accumulation

    def micro_batches(self):
        return [(*next(self.loader), None) for _ in range(self.accumulation)]

    def metrics(self) -> dict:
        return {"epoch": self.loader.stats["epoch"]}

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def close(self) -> None:
        self.loader.close()


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor over the steps: linear warm-up, constant, linear warm-down to `final`."""

    n_steps: int
    warmup: float = 0.0  # fractions of n_steps
    warmdown: float = 0.2
    final: float = 0.0
    initial: float = 1.0  # factor on everything, "init_lr_frac"
    momentum_steps: int = 300  # Muon momentum rises from 0.85 to 0.95 over these; 0 = 0.95 at once

    def lr(self, step: int) -> float:
        """Return the factor of update number `step`, counted from 0."""
        warmup, warmdown = round(self.warmup * self.n_steps), round(self.warmdown * self.n_steps)
        if step < warmup:
            return self.initial * (step + 1) / warmup
        left = self.n_steps - step
        if left > warmdown:
            return self.initial
        return self.initial * (self.final + (1 - self.final) * left / warmdown)

    def momentum(self, step: int) -> float:
        rise = min(step / self.momentum_steps, 1.0) if self.momentum_steps else 1.0
        return 0.85 + 0.10 * rise


@dataclass
class Progress:
    """What a checkpoint keeps of the loop besides tensors and the data position."""

    step: int = 0
    smooth_loss: float = 0.0
    best_val_bpb: float | None = None
    train_seconds: float = 0.0
    tokens: int = 0
    evaluated_step: int = -1


class StopRequest:
    """Remembers SIGTERM or SIGINT until the step is over; a second signal ends the process at once."""

    def __init__(self):
        self.received: int | None = None
        self.previous = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}

    def _remember(self, number, frame):
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Trainer:
    """Runs a stage from its first step, or from a checkpoint, to its last.

    identity: what a resumed run must have in common with the one that saved (compared key by key).
    evaluate(step) -> numbers for the metrics row, e.g. {"val_bpb": ...}; called every eval_every steps and last.
    """

    def __init__(self, stage: str, folder: Path, model: GPT, optimizer: MuonAdamW, runtime: Runtime, schedule: Schedule,
                 *, identity: dict, args: dict, fingerprint: str, forward: Callable | None = None,
                 evaluate: Callable[[int], dict] | None = None, eval_every: int = -1, save_every: int = -1,
                 wandb_run=None):
        self.stage, self.folder, self.model, self.optimizer = stage, folder, model, optimizer
        self.runtime, self.schedule, self.identity, self.args = runtime, schedule, identity, args
        self.fingerprint, self.forward = fingerprint, model if forward is None else forward  # compiled: no truth value
        self.evaluate, self.eval_every, self.save_every = evaluate, eval_every, save_every
        self.wandb_run = wandb_run
        self.progress = Progress()
        self.data_state: dict | None = None
        self.resumed_from: int | None = None
        self.last_loss = float("nan")

    # --- resuming ---

    def restore(self, resume: str) -> bool:
        """Take over the newest whole checkpoint with resume="auto"; return whether the stage is already finished.

        With resume="none" an existing checkpoint is an error, so that nothing is overwritten.
        """
        path = find_checkpoint(self.folder)
        if path is None:
            return False
        if resume == "none":
            raise UserError(f"{self.folder} already holds checkpoint {path.name}; use --resume auto to go on from it "
                            "or move the folder away to start over")
        tensors, state = load_checkpoint(path, groups=("model", "optim", "rng"), rank=self.runtime.rank,
                                         world_size=self.runtime.world_size)
        self._check_identity(path, state["identity"])
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optim"])
        set_rng_state(tensors["rng"])
        self.progress = Progress(**state["progress"])
        self.data_state = state["data"]
        self.resumed_from = self.progress.step
        print0(f"{self.stage}: resumed from {path} at step {self.progress.step} of {self.schedule.n_steps}")
        return self.finished

    def _check_identity(self, path: Path, saved: dict) -> None:
        for key in dict.fromkeys((*self.identity, *saved)):
            if self.identity.get(key) != saved.get(key):
                raise UserError(f"checkpoint {path} was made with {key} = {saved.get(key)}, this run has "
                                f"{self.identity.get(key)}; resume with the same or move the folder away")

    # --- the loop ---

    def run(self, batches: Batches, when_done: Callable[[], None] | None = None) -> None:
        """Train to the last step; on SIGTERM save at the step's end and exit with EXIT_STOPPED.

        when_done runs on rank 0 just before the last checkpoint, so that a kill never leaves a finished stage without
        its report section.
        """
        log = MetricsLog(self.stage, resume_step=self.resumed_from, enabled=self.runtime.is_main,
                         wandb_run=self.wandb_run)
        stop = StopRequest()
        try:
            while True:
                self._evaluate_if_due(log)
                if self.finished and when_done is not None and self.runtime.is_main:
                    when_done()
                if self._due(self.save_every) and self.progress.step != self.resumed_from:
                    self.save(batches)
                if self.finished:
                    break
                if self._one_step(batches, log, stop.received is not None) and not self.finished:
                    self.save(batches)
                    print0(f"{self.stage}: stopped by a signal after step {self.progress.step}, saved; "
                           "--resume auto goes on from there")
                    raise SystemExit(EXIT_STOPPED)
        finally:
            stop.restore()
            log.close()
            batches.close()

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.schedule.n_steps

    def _due(self, every: int) -> bool:
        return self.finished or (every > 0 and self.progress.step > 0 and self.progress.step % every == 0)

    def _one_step(self, batches: Batches, log: MetricsLog, stop: bool) -> bool:
        """Run one step; return whether any rank was asked to stop."""
        started = time.perf_counter()
        micro_batches = batches.micro_batches()
        counted = sum((y >= 0).sum() for _, y, _ in micro_batches)
        own = sum(x.numel() for x, _, _ in micro_batches)  # padded widths, so other ranks may have other numbers
        agreed = torch.stack([counted, *torch.tensor([own, int(stop)], device=counted.device)])
        n_supervised, tokens, stopping = self.runtime.all_reduce(agreed)
        loss = self._backward(micro_batches, n_supervised.clamp(min=1))
        self._check_finite(loss)
        step = self.progress.step
        lr = self.schedule.lr(step)
        self.optimizer.step(lr, self.schedule.momentum(step))
        self.optimizer.zero_grad()
        self.runtime.synchronize()
        seconds = time.perf_counter() - started
        self._record(log, loss, lr, seconds, int(tokens), {"supervised_tokens": int(n_supervised), **batches.metrics()})
        return bool(stopping)

    def _backward(self, micro_batches, n_supervised: torch.Tensor) -> float:
        total = torch.zeros((), device=self.model.device)
        for x, y, weight in micro_batches:
            if weight is None:
                loss = self.forward(x, y, reduction="sum") / n_supervised
            else:
                loss = (self.forward(x, y, reduction="none") * weight.flatten()).sum() / n_supervised
            loss.backward()
            total += loss.detach()
        return float(self.runtime.all_reduce(total))

    def _check_finite(self, loss: float) -> None:
        """The loss is reduced over ranks, so every rank stops at the same step, before the update."""
        if loss - loss != 0:  # true for inf and nan only
            raise UserError(f"{self.stage}: the loss must be finite, got {loss} at step {self.progress.step}; stopped "
                            f"before the update, saved checkpoints in {self.folder} are intact")

    def _record(self, log: MetricsLog, loss: float, lr: float, seconds: float, tokens: int, extra: dict) -> None:
        p = self.progress
        p.smooth_loss = EMA * p.smooth_loss + (1 - EMA) * loss
        p.step, p.train_seconds, p.tokens = p.step + 1, p.train_seconds + seconds, p.tokens + tokens
        self.last_loss = loss
        tok_per_s = tokens / seconds
        mfu = self.mfu(tok_per_s)
        log.add(step=p.step, loss=loss, smooth_loss=self.smooth_loss, lr=lr, ms=seconds * 1e3, tok_per_s=tok_per_s,
                mfu=mfu, **extra)
        eta = p.train_seconds / p.step * (self.schedule.n_steps - p.step)
        shown = "".join(f" | {k} {v:.3f}" for k, v in extra.items() if isinstance(v, float))
        print0(f"{self.stage} {p.step:05d}/{self.schedule.n_steps:05d} ({100 * p.step / self.schedule.n_steps:.1f}%) | "
               f"loss {loss:.4f}{shown} | lr {lr:.3f} | {seconds * 1e3:,.0f} ms | {tok_per_s:,.0f} tok/s | "
               f"mfu {'n/a' if mfu is None else f'{mfu:.1f}%'} | eta {duration(eta)}")

    @property
    def smooth_loss(self) -> float:
        """Return the moving average of the loss, corrected for its start at 0."""
        return self.progress.smooth_loss / (1 - EMA ** self.progress.step) if self.progress.step else float("nan")

    def mfu(self, tok_per_s: float) -> float | None:
        """Return percent of the GPUs' dense bf16 peak by nanochat's FLOP count, None where the peak is unknown."""
        rate = peak(self.runtime.device, "bf16")
        if rate is None:
            return None
        return 100 * self.model.estimate_flops() * tok_per_s / (rate * self.runtime.world_size)

    def _evaluate_if_due(self, log: MetricsLog) -> None:
        """Evaluate at step 0, every eval_every steps and last; once per step, also across a resume."""
        step = self.progress.step
        if self.evaluate is None or self.eval_every < 0 or step == self.progress.evaluated_step:
            return
        if step and not self._due(self.eval_every):
            return
        with self.model.without_fp8():
            row = self.evaluate(step)
        self.progress.evaluated_step = step
        if "val_bpb" in row:
            best = self.progress.best_val_bpb
            self.progress.best_val_bpb = row["val_bpb"] if best is None else min(best, row["val_bpb"])
        log.add(step=self.progress.step, **row)
        numbers = " | ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
        print0(f"{self.stage} {self.progress.step:05d} evaluation | {numbers}")

    def save(self, batches: Batches) -> Path:
        """Write a checkpoint of the current step; every rank takes part."""
        state = {
            "stage": self.stage, "step": self.progress.step, "n_steps": self.schedule.n_steps,
            "model_config": asdict(self.model.config), "tokenizer_fingerprint": self.fingerprint,
            "kernels": dict(self.model.kernels.names), "args": self.args, "identity": self.identity,
            "progress": asdict(self.progress), "data": batches.state_dict(),
        }
        tensors = {"model": self.model.state_dict(), "optim": self.optimizer.state_dict(), "rng": rng_state()}
        return save_checkpoint(self.folder, self.progress.step, tensors, state, rank=self.runtime.rank,
                               world_size=self.runtime.world_size)
