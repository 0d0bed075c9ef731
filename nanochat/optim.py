"""MuonAdamW: Muon for the block matrices, AdamW for embedding and head, for 1..W ranks without a DDP wrapper.

Parameters live in banks: one tensor (n, ...) per shape holds all its matrices, one more holds their gradients, and
the model's parameters are views into them, so nothing is stacked or copied in a step. Each rank owns an equal slice
of every bank along the first dimension, padded with zero rows to a multiple of W, and keeps state for its slice only.

A step has three phases. 1: launch a reduce-scatter of every bank's gradients. 2: per group, wait for its gradients,
update the owned slice, launch its all-gather. 3: wait for the gathers. Gradients are summed, not averaged: the caller
scales its loss by 1 / (ranks * accumulation), or by 1 / global token count, which also makes W = 2 bit-equal to one
process that accumulates the same two micro-batches.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from kernels import Kernels
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


class MuonAdamW:
    """Optimizer of a GPT.

    Learning rates are nanochat's; those of AdamW are scaled by (C / 768)^-0.5. `lr_scale` multiplies all of them.
    Gradients accumulate in the banks until `zero_grad`; never set `param.grad = None`.
    """

    def __init__(self, model: GPT, kernels: Kernels, *, matrix_lr: float = 0.02, embedding_lr: float = 0.2,
                 head_lr: float = 0.004, weight_decay: float = 0.0, lr_scale: float = 1.0, rank: int = 0,
                 world_size: int = 1):
        self.model, self.kernels, self.rank, self.world_size = model, kernels, rank, world_size
        self.weight_decay = weight_decay
        self.step_count = 0
        # fp32 Newton-Schulz on CPU, bf16 on the tensor cores of a GPU
        self.muon_dtype = torch.float32 if model.device.type == "cpu" else torch.bfloat16
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
        reduced = {bank.name: self._reduce_scatter(bank) for bank in self.banks()}
        gathers = []
        for bank, lr in self.adam:
            self._adam_step(bank, _wait(reduced[bank.name]), lr * lr_factor)
            gathers.append(self._all_gather(bank))
        for group in self.muon:
            self._muon_step(group, [_wait(reduced[bank.name]) for bank in group], lr_factor, momentum)
            gathers += [self._all_gather(bank) for bank in group]
        for gather in gathers:
            _wait(gather)
        self.model.quantize_weights()

    # --- updates of the owned slice ---

    def _adam_step(self, bank: Bank, grad: torch.Tensor, lr: float) -> None:
        p = bank.owned(self.rank)
        exp_avg, exp_avg_sq = self.state[f"{bank.name}.exp_avg"], self.state[f"{bank.name}.exp_avg_sq"]
        beta1, beta2 = ADAM_BETAS
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.lerp_(grad.square(), 1 - beta2)
        debias1, debias2 = 1 - beta1 ** self.step_count, 1 - beta2 ** self.step_count
        denominator = (exp_avg_sq / debias2).sqrt_().add_(ADAM_EPS)
        p.mul_(1 - lr * self.weight_decay).addcdiv_(exp_avg, denominator, value=-lr / debias1)

    def _muon_step(self, group: list[Bank], grads: list[torch.Tensor], lr_factor: float, momentum: float) -> None:
        params = [bank.owned(self.rank) for bank in group]
        buffers = [self.state[f"{bank.name}.momentum"] for bank in group]
        lr, momentum, decay = (torch.tensor(x, dtype=torch.float32, device=params[0].device)
                               for x in (self.matrix_lr * lr_factor, momentum, self.weight_decay))
        self.kernels.muon_update(params, grads, buffers, lr, momentum, decay, self.muon_dtype)

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
