"""MuonAdamW: Muon for the block matrices, AdamW for embedding and head, for 1..W ranks without a DDP wrapper.

Parameters live in banks: one tensor (n, ...) per shape holds all its matrices, one more holds their gradients, and
the model's parameters are views into them, so nothing is stacked or copied in a step. Each rank owns an equal slice
of every bank along the first dimension, padded with zero rows to a multiple of W, and keeps state for its slice only.

A step has three phases. 1: launch a reduce-scatter of every bank's gradients. 2: per group, wait for its gradients,
update the owned slice, launch its all-gather. 3: wait for the gathers. Gradients are summed, not averaged: the caller
scales its loss by 1 / (ranks * accumulation), or by 1 / global token count, which also makes W = 2 bit-equal to one
process that accumulates the same two micro-batches.

What changes from step to step (rates, momentum, bias corrections) is in 0-D tensors on the device: a compiled update
is compiled once per shape, and nothing waits for the GPU.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from kernels import Kernels
from kernels.newton_schulz import COEFFICIENTS
from nanochat.gpt import GPT

ADAM_BETAS = (0.8, 0.95)
ADAM_EPS = 1e-10


@dataclass
class Bank:
    """Storage of equally shaped pieces: matrices (n, rows, cols) for Muon, rows (n, cols) for AdamW."""

    name: str
    data: torch.Tensor  # (n padded to a multiple of W, ...) fp32
    grad: torch.Tensor  # as data
    size: int  # pieces per rank

    @classmethod
    def of_matrices(cls, name: str, params: list[nn.Parameter], world_size: int) -> "Bank":
        """Move equally shaped matrices into one bank; they become views of it."""
        bank = cls._empty(name, len(params), params[0].shape, world_size, params[0])
        for i, p in enumerate(params):
            bank._adopt(p, bank.data[i], bank.grad[i])
        return bank

    @classmethod
    def of_rows(cls, name: str, param: nn.Parameter, world_size: int) -> "Bank":
        """Move one matrix into a bank of its rows."""
        n = param.size(0)
        bank = cls._empty(name, n, param.shape[1:], world_size, param)
        bank._adopt(param, bank.data[:n], bank.grad[:n])
        return bank

    @classmethod
    def _empty(cls, name: str, n: int, shape: torch.Size, world_size: int, like: torch.Tensor) -> "Bank":
        size = -(-n // world_size)
        data, grad = (torch.zeros((size * world_size, *shape), dtype=like.dtype, device=like.device) for _ in "dg")
        return cls(name, data, grad, size)

    @staticmethod
    def _adopt(p: nn.Parameter, view: torch.Tensor, grad: torch.Tensor) -> None:
        view.copy_(p.data)
        p.data, p.grad = view, grad

    def owned(self, rank: int) -> torch.Tensor:
        """Return the slice of the data that `rank` updates."""
        return self.data[rank * self.size:(rank + 1) * self.size]


class PhaseTimer:
    """Time between marks, summed per phase: by events on a GPU, where nothing waits before `milliseconds`."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple] = []  # (phase that ends here, event or seconds)

    def start(self) -> None:
        self.marks.clear()
        self.mark("")

    def mark(self, phase: str) -> None:
        """End `phase`, which began at the mark before."""
        now = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.marks.append((phase, now))

    def milliseconds(self) -> dict[str, float]:
        """Return phase -> milliseconds since `start`; on a GPU this waits for the last mark."""
        if self.on_gpu and self.marks:
            self.marks[-1][1].synchronize()
        totals: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            took = begin.elapsed_time(end) if self.on_gpu else 1e3 * (end - begin)
            totals[phase] = totals.get(phase, 0.0) + took
        return totals


class MuonAdamW:
    """Optimizer of a GPT.

    Learning rates are nanochat's; those of AdamW are scaled by (C / 768)^-0.5. `lr_scale` multiplies all of them.
    Gradients accumulate in the banks until `zero_grad`; never set `param.grad = None`.
    orthogonalization: Newton-Schulz coefficients, a key of kernels.newton_schulz.COEFFICIENTS.
    compiled: run the updates through torch.compile.
    timed: keep the last step's time by phase in `timer` (reduce, adamw, momentum, newton_schulz, update, gather); the
    marks between a Muon update's phases keep it from being compiled.
    """

    def __init__(self, model: GPT, kernels: Kernels, *, matrix_lr: float = 0.02, embedding_lr: float = 0.2,
                 head_lr: float = 0.004, weight_decay: float = 0.0, lr_scale: float = 1.0, rank: int = 0,
                 world_size: int = 1, orthogonalization: str = "quintic", compiled: bool = False,
                 timed: bool = False):
        self.model, self.rank, self.world_size = model, rank, world_size
        self.weight_decay = weight_decay
        self.step_count = 0
        width_scale = (model.config.n_embd / 768) ** -0.5
        self.matrix_lr = matrix_lr * lr_scale
        self.adam = [
            (Bank.of_rows("lm_head", model.lm_head.weight, world_size), head_lr * width_scale * lr_scale),
            (Bank.of_rows("wte", model.transformer["wte"].weight, world_size), embedding_lr * width_scale * lr_scale),
        ]
        self.muon = _muon_groups(model, world_size)
        self.state = {}
        for bank in self.banks():
            names = ("momentum",) if bank.data.dim() == 3 else ("exp_avg", "exp_avg_sq")
            for name in names:
                self.state[f"{bank.name}.{name}"] = torch.zeros_like(bank.owned(rank))
        names = ("lr", "momentum", "decay", "debias1", "debias2", *(bank.name for bank, _ in self.adam))
        self.scalars = {name: torch.zeros((), device=model.device) for name in names}  # a bank's name: its rate
        self.timer = PhaseTimer(model.device) if timed else None
        self.coefficients = COEFFICIENTS[orthogonalization]
        self.use(kernels, compiled)

    def use(self, kernels: Kernels, compiled: bool = False) -> None:
        """Run the updates on these kernels from now on."""
        self.kernels = kernels
        newton_schulz = self._between(functools.partial(kernels.newton_schulz, coefficients=self.coefficients))
        # fp32 Newton-Schulz on CPU, bf16 on the tensor cores of a GPU
        dtype = torch.float32 if self.model.device.type == "cpu" else torch.bfloat16
        self._update_adam = _adam_update
        self._update_muon = functools.partial(kernels.muon_update, compute_dtype=dtype, newton_schulz=newton_schulz)
        if compiled:
            compile_whole = functools.partial(torch.compile, fullgraph=True, dynamic=False)
            self._update_adam = compile_whole(self._update_adam)
            self._update_muon = self._update_muon if self.timer else compile_whole(self._update_muon)

    def banks(self) -> list[Bank]:
        """Return all banks, the largest messages first."""
        return [bank for bank, _ in self.adam] + [bank for group in self.muon for bank in group]

    def zero_grad(self) -> None:
        for bank in self.banks():
            bank.grad.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return this rank's slice of the state; `step` is an int64 scalar."""
        return {**self.state, "step": torch.tensor(self.step_count)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` of the same rank and world size gave; ValueError names what does not fit."""
        for name, have in self.state.items():
            if name not in state or state[name].shape != have.shape:
                got = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"optimizer state {name} must have shape {tuple(have.shape)}, got {got}")
            have.copy_(state[name])
        self.step_count = int(state["step"])

    @torch.no_grad()
    def step(self, lr_factor: float = 1.0, momentum: float = 0.95) -> None:
        """Update all parameters from the summed gradients; lr_factor is the schedule's, momentum is Muon's."""
        self.step_count += 1
        self._set_scalars(lr_factor, momentum)
        if self.timer:
            self.timer.start()
        reduced = {bank.name: self._reduce_scatter(bank) for bank in self.banks()}
        gathers = []
        for bank, _ in self.adam:
            grad = _wait(reduced[bank.name])
            self._mark("reduce")
            self._adam_step(bank, grad)
            self._mark("adamw")
            gathers.append(self._all_gather(bank))
        for group in self.muon:
            grads = [_wait(reduced[bank.name]) for bank in group]
            self._mark("reduce")
            self._muon_step(group, grads)
            self._mark("update")
            gathers += [self._all_gather(bank) for bank in group]
        for gather in gathers:
            _wait(gather)
        self._mark("gather")
        self.model.quantize_weights()

    def _set_scalars(self, lr_factor: float, momentum: float) -> None:
        beta1, beta2 = ADAM_BETAS
        values = {"lr": self.matrix_lr * lr_factor, "momentum": momentum, "decay": self.weight_decay,
                  "debias1": 1 - beta1 ** self.step_count, "debias2": 1 - beta2 ** self.step_count,
                  **{bank.name: lr * lr_factor for bank, lr in self.adam}}
        for name, value in values.items():
            self.scalars[name].fill_(value)

    def _mark(self, phase: str) -> None:
        if self.timer:
            self.timer.mark(phase)

    def _between(self, newton_schulz: Callable) -> Callable:
        """Return newton_schulz, with marks around it when timed: what runs before it in muon_update is "momentum"."""
        if not self.timer:
            return newton_schulz

        def timed(batch, norm=None):
            self._mark("momentum")
            result = newton_schulz(batch, norm=norm)
            self._mark("newton_schulz")
            return result

        return timed

    # --- updates of the owned slice ---

    def _adam_step(self, bank: Bank, grad: torch.Tensor) -> None:
        s = self.scalars
        self._update_adam(bank.owned(self.rank), grad, self.state[f"{bank.name}.exp_avg"],
                          self.state[f"{bank.name}.exp_avg_sq"], s[bank.name], s["decay"], s["debias1"], s["debias2"])

    def _muon_step(self, group: list[Bank], grads: list[torch.Tensor]) -> None:
        s = self.scalars
        self._update_muon([bank.owned(self.rank) for bank in group], grads,
                          [self.state[f"{bank.name}.momentum"] for bank in group], s["lr"], s["momentum"], s["decay"])

    # --- communication; each returns (handle or None, result, what must stay alive until waited for) ---

    def _reduce_scatter(self, bank: Bank):
        if self.world_size == 1:
            return None, bank.grad, None
        mine = torch.empty_like(bank.owned(self.rank))
        handle = dist.reduce_scatter_tensor(mine, bank.grad, op=dist.ReduceOp.SUM, async_op=True)
        return handle, mine, bank.grad

    def _all_gather(self, bank: Bank):
        if self.world_size == 1:
            return None, bank.data, None
        mine = bank.owned(self.rank).clone()  # gloo does not promise that input may overlap output
        return dist.all_gather_into_tensor(bank.data, mine, async_op=True), bank.data, mine


def _adam_update(p, grad, exp_avg, exp_avg_sq, lr, decay, debias1, debias2) -> None:
    """AdamW in place on p and its moments, all of one shape; the others are 0-D tensors."""
    beta1, beta2 = ADAM_BETAS
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    denominator = (exp_avg_sq / debias2).sqrt_().add_(ADAM_EPS)
    p.mul_(1 - lr * decay).sub_(exp_avg.div(denominator).mul_(lr / debias1))


def _wait(pending) -> torch.Tensor:
    handle, result, _ = pending
    if handle is not None:
        handle.wait()
    return result


def _muon_groups(model: GPT, world_size: int) -> list[list[Bank]]:
    """Bank the block matrices by shape; banks of one shape up to transposition form a group (one NS batch)."""
    by_shape: dict[tuple, list[nn.Parameter]] = {}
    for p in model.transformer["h"].parameters():
        by_shape.setdefault(tuple(p.shape), []).append(p)
    groups: dict[tuple, list[Bank]] = {}
    for shape, params in by_shape.items():
        bank = Bank.of_matrices("x".join(map(str, shape)), params, world_size)
        groups.setdefault(tuple(sorted(shape)), []).append(bank)
    return list(groups.values())
