"""Reinforcement learning: sample answers, reward them, push up the tokens of those better than their siblings.

On-policy, one update per batch of rollouts. A sampled token's loss is -log p x advantage, the advantage being the
answer's reward minus the mean reward of all answers to the same problem; the sum is divided by the number of sampled
tokens of the whole step. No KL term, no ratio, no clipping, no division by the standard deviation. Tokens of the prompt
and of tool output were not chosen by the model and carry no loss. Source: nanochat (Nov 2025), chat_rl.
"""

import hashlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from nanochat.common import Runtime, UserError
from nanochat.engine import Completion, Engine, SamplingParams
from nanochat.gpt import GPT
from nanochat.tasks import Task
from nanochat.tokenizer import Tokenizer

PASS_AT = 8  # pass@k is measured for k = 1..8
PAD_MULTIPLE = 16  # rows are padded to a multiple of this, so that few widths occur
MAX_SEED = 2**63 - 1

# P problems of this rank, S samples of each, B rows, T tokens


@dataclass(frozen=True)
class RolloutSettings:
    """How a step's answers are sampled. top_k 0 keeps the whole vocabulary, which alone is exactly on-policy.

    permute_advantages hands every answer the advantage of a random other one: the control that must not learn.
    """

    examples_per_step: int  # problems over all ranks
    num_samples: int  # answers per problem
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 42
    permute_advantages: bool = False

    def __post_init__(self):
        least = {"examples_per_step": 1, "num_samples": 2, "max_tokens": 1, "top_k": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                why = " (the only answer to a problem has advantage 0)" if name == "num_samples" else ""
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}{why}, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise UserError("--temperature must be a number above 0 (equal answers have advantage 0), got "
                            f"{self.temperature}")

    def params(self, *key: int) -> SamplingParams:
        """Return what the engine needs to answer one problem; `key` and the run's seed make its seed."""
        return SamplingParams(self.max_tokens, self.temperature, self.top_k or None, derive_seed(self.seed, *key),
                              self.num_samples)


@dataclass(frozen=True)
class Rollout:
    """One answer as a row to train on: ids of prompt and answer, which of them the model chose, the advantage."""

    ids: list[int]
    sampled: list[bool]
    advantage: float


class FittingProblems(Task):
    """The problems of a task whose prompts leave room for an answer in a context of `context` tokens.

    `left_out` counts the others. nanochat's context of 2,048 holds all of GSM8K, the tiny preset's of 256 all but 9.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, context: int):
        if task.kind != "generative":
            raise UserError(f"--task must be one whose answers are sampled and rewarded, {task.name} is {task.kind}")
        self.name, self.kind, self.evaluate, self.reward = task.name, task.kind, task.evaluate, task.reward
        self._task = task
        self._numbers = [i for i in range(len(task)) if len(tokenizer.render_for_completion(task[i])) < context]
        self.left_out = len(task) - len(self._numbers)
        if not self._numbers:
            raise UserError(f"task {task.name} must have a problem of fewer tokens than the context of {context}, "
                            f"all {len(task)} are longer")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict:
        return self._task[self._numbers[index]]


class RolloutBatches:
    """A step's micro-batches (nanochat.train.Batches): answers to the next problems, sampled with the current weights.

    Problems come in the task's order, over and over; rank r takes every W-th of a step. Rows of similar length share
    a micro-batch of up to `rows_per_batch`.
    """

    def __init__(self, task: Task, engine: Engine, settings: RolloutSettings, rows_per_batch: int,
                 runtime: Runtime, state: dict | None = None):
        if settings.examples_per_step % runtime.world_size:
            raise UserError(f"--examples-per-step must be a multiple of ranks {runtime.world_size}, got "
                            f"{settings.examples_per_step}")
        self.task, self.engine, self.settings = task, engine, settings
        self.rows_per_batch, self.runtime = rows_per_batch, runtime
        self._next = 0 if state is None else state["next_problem"]
        self._metrics: dict = {}

    def micro_batches(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return (x, y, weight) of this rank's answers: y = -1 on tokens not sampled, weight the advantages (B, T)."""
        started = time.perf_counter()
        first, per_step = self._next, self.settings.examples_per_step
        step = first // per_step
        numbers = range(first + self.runtime.rank, first + per_step, self.runtime.world_size)
        conversations = [self.task[number % len(self.task)] for number in numbers]
        self.engine.sync_weights()
        answers = sample_answers(self.engine, conversations, [self.settings.params(step, n) for n in numbers])
        rewards = torch.tensor([[self.task.reward(conversation, answer) for answer in samples]
                                for conversation, samples in zip(conversations, answers, strict=True)],
                               dtype=torch.float64)  # (P, S)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten().tolist()
        if self.settings.permute_advantages:
            random.Random(derive_seed(self.settings.seed, step, self.runtime.rank)).shuffle(advantages)
        self._next += per_step
        prompts = [self.engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
        self._metrics = self._measure(rewards, answers, time.perf_counter() - started) | self._gap(prompts, answers)
        pairs = [(prompt, answer) for prompt, samples in zip(prompts, answers, strict=True) for answer in samples]
        rows = [to_rollout(*pair, advantage) for pair, advantage in zip(pairs, advantages, strict=True)]
        return self._collate(self._with_gradient(rows))

    def metrics(self) -> dict:
        """Return the step's mean reward, the part of the problems answered both better and worse, lengths, and how far
        the engine's log-probabilities are from training's: mean and max of |difference| in nats per sampled token, over
        the first answer to each problem."""
        return self._metrics

    def state_dict(self) -> dict:
        return {"next_problem": self._next}

    def close(self) -> None:
        self.engine.reset()

    def _measure(self, rewards: torch.Tensor, answers: list[list[Completion]], seconds: float) -> dict:
        tokens = sum(sum(answer.mask) for samples in answers for answer in samples)
        stopped = sum(answer.finish_reason == "stop" for samples in answers for answer in samples)
        mixed = int((rewards.amax(dim=1) > rewards.amin(dim=1)).sum())
        sums = torch.tensor([float(rewards.sum()), tokens, stopped, rewards.numel(), mixed, len(rewards)],
                            dtype=torch.float64, device=self.runtime.device)
        reward, tokens, stopped, n_answers, mixed, n_problems = self.runtime.all_reduce(sums).tolist()
        return {"reward": reward / n_answers, "mixed": mixed / n_problems, "stopped": stopped / n_answers,
                "answer_tokens": tokens / n_answers, "rollout_s": seconds}

    def _gap(self, prompts: list[list[int]], answers: list[list[Completion]]) -> dict:
        gaps = [logprob_gap(self.engine.source, prompt, samples[0], self.settings)
                for prompt, samples in zip(prompts, answers, strict=True) if samples[0].ids]
        gaps = torch.cat(gaps or [torch.zeros(0)]).to(self.runtime.device, torch.float64)
        total, count = self.runtime.all_reduce(torch.stack([gaps.sum(), gaps.new_tensor(len(gaps))])).tolist()
        largest = self.runtime.all_reduce(gaps.amax() if len(gaps) else gaps.new_zeros(()), "max")
        return {"logprob_gap": total / max(count, 1), "logprob_gap_max": float(largest)}

    def _with_gradient(self, rows: list[Rollout]) -> list[Rollout]:
        """Leave out rows of advantage 0, at first more than half of them: they have no gradient.

        The trainer divides by the sampled tokens that it sees, so the advantages are scaled by (these / all), over all
        ranks, and the result is that of all rows. At least one row stays.
        """
        kept = [row for row in rows if row.advantage] or rows[:1]
        counts = torch.tensor([sum(sum(row.sampled) for row in some) for some in (kept, rows)], dtype=torch.float64,
                              device=self.runtime.device)
        n_kept, n_all = self.runtime.all_reduce(counts).tolist()
        scale = n_kept / max(n_all, 1)
        return sorted((replace(row, advantage=row.advantage * scale) for row in kept), key=lambda row: len(row.ids))

    def _collate(self, rows: Sequence[Rollout]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        chunks = (rows[i : i + self.rows_per_batch] for i in range(0, len(rows), self.rows_per_batch))
        context, pad_id = self.engine.model.config.sequence_len, self.engine.tokenizer.bos_id
        batches = [collate(chunk, context, pad_id) for chunk in chunks]
        return [tuple(tensor.to(self.runtime.device) for tensor in batch) for batch in batches]


def sample_answers(engine: Engine, conversations: Sequence[dict],
                   params: list[SamplingParams]) -> list[list[Completion]]:
    """Answer every conversation in one call of the engine; UserError when one cannot be answered."""
    prompts = [engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
    answers = engine.generate(prompts, params)
    for prompt, samples in zip(prompts, answers, strict=True):
        for answer in samples:
            if answer.finish_reason == "error":
                raise UserError(f"rl: a problem of {len(prompt)} tokens could not be answered: {answer.error}")
    return answers


@torch.no_grad()
def logprob_gap(model: GPT, prompt: list[int], answer: Completion, settings: RolloutSettings) -> torch.Tensor:
    """Return |log p by the training forward - log p by the engine| of each sampled token, (n,) fp32.

    Both are of the distribution drawn from, which keeps all that equal the k-th likeliest. A token at that edge, which
    rounding put outside here, is compared too: only the sum that normalizes is cut to the top k.
    """
    ids = torch.tensor([*prompt, *answer.ids], device=model.device)
    logits = model(ids[None, :-1])[0, len(prompt) - 1:].float() / settings.temperature
    least = logits.topk(min(settings.top_k or logits.size(-1), logits.size(-1))).values[:, -1:]
    normalizer = logits.where(logits >= least, -math.inf).logsumexp(-1)
    log_probs = logits.gather(1, ids[len(prompt):, None])[:, 0] - normalizer
    gaps = (log_probs - torch.tensor(answer.logprobs, device=model.device)).abs()
    return gaps[torch.tensor(answer.mask, device=model.device) > 0]


def to_rollout(prompt: list[int], answer: Completion, advantage: float) -> Rollout:
    """Join prompt and answer. An answer that a token ended gets it back: the model chose it, and must learn when."""
    stop = [answer.stopped_by] if isinstance(answer.stopped_by, int) else []
    sampled = [False] * len(prompt) + [bool(m) for m in answer.mask] + [True] * len(stop)
    return Rollout([*prompt, *answer.ids, *stop], sampled, advantage)


def collate(rows: Sequence[Rollout], context: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad rows on the right -> x, y int64 and weight fp32, all (B, T) with T at most `context`."""
    longest = max(len(row.ids) - 1 for row in rows)
    width = min(context, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
    x = torch.full((len(rows), width), pad_id)
    y = torch.full((len(rows), width), -1)
    weight = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        n = len(row.ids) - 1
        ids = torch.tensor(row.ids)
        x[i, :n] = ids[:-1]
        y[i, :n] = ids[1:].where(torch.tensor(row.sampled[1:]), -1)
        weight[i, :n] = row.advantage
    return x, y, weight


# --- pass@k ---------------------------------------------------------------------------------------


def evaluate_pass_at_k(task: Task, engine: Engine, settings: RolloutSettings, runtime: Runtime) -> list[float]:
    """Return pass@1 .. pass@8 over all problems of `task`, at temperature 1 with the same seeds at every call.

    The unbiased estimate from 8 samples per problem: the chance that k of them drawn at random hold a right answer
    (reward above 0). pass@1 is so the mean over all 8, less noisy than the first sample alone.
    """
    numbers = range(runtime.rank, len(task), runtime.world_size)
    engine.sync_weights()
    sums = torch.zeros(PASS_AT, dtype=torch.float64)
    if len(numbers):
        params = [SamplingParams(settings.max_tokens, 1.0, settings.top_k or None, derive_seed(number), PASS_AT)
                  for number in numbers]
        conversations = [task[number] for number in numbers]
        for conversation, samples in zip(conversations, sample_answers(engine, conversations, params), strict=True):
            right = sum(task.reward(conversation, answer) > 0 for answer in samples)
            sums += torch.tensor([pass_at(k, PASS_AT, right) for k in range(1, PASS_AT + 1)], dtype=torch.float64)
    return (runtime.all_reduce(sums.to(runtime.device)) / len(task)).tolist()


def pass_at(k: int, n: int, right: int) -> float:
    """Return the probability that k of n samples, `right` of them right, contain a right one."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def derive_seed(*key: int) -> int:
    """Return a seed from 0 to 2^63 - 1 that depends on every number of the key; equal on every machine."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED


def rollout_identity(settings: RolloutSettings) -> dict:
    """Return what a resumed run must sample alike; the run's seed is part of every stage's identity already."""
    return {name: value for name, value in asdict(settings).items() if name != "seed"}
