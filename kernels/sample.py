"""Sample one token per row: temperature, top-k, top-p, min-p, a random number of (seed, position) alone.

A row's draw uses a counter-based generator keyed by its own seed and position, so its text does not depend on the
other rows of the batch. Temperature 0 is argmax. Of softmax(logits / temperature) top-k keeps the k largest, top-p of
those the fewest whose probabilities reach p, min-p what has at least that share of the largest; equals of the last one
kept stay. The log-probability returned is that of the chosen token under the distribution it was drawn from (under
softmax at temperature 1 for greedy rows).

Fused: a program per row reads its logits and writes one id, where eager sorts, masks and sums whole rows. Thresholds
are found without sorting, bit by bit: the largest float t for which enough tokens, or enough probability, lie at or
above t takes 32 passes over a row that stays in L2 (256 KiB at V = 65,536).
Numerics: probabilities fp32, their running sum fp64 as in eager; a draw within 1e-7 of a boundary may fall on the other
side of it. Source of the generator: SplitMix64 (Steele, Lea, Flood 2014). Limits: V < 2^31.
"""

import torch

from kernels.device import pick_tile, tl, triton
from kernels.registry import Op, custom_op, declare, register

# R rows, V vocab


@register("sample", "eager")
def sample_eager(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
                 min_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from logits (R, V) fp32 -> token ids (R,) int64 and log-probabilities (R,) fp32.

    temperature (R,) fp32, 0 = greedy; top_k (R,) int64, 0 = all; top_p (R,) fp32 in (0, 1], 1 = all; min_p (R,) fp32 in
    [0, 1), 0 = all; seed, position (R,) int64.
    """
    greedy = temperature == 0
    kept = kept_logits(logits, temperature, top_k, top_p, min_p)
    ids = logits.argmax(dim=-1)
    if not bool(greedy.all()):
        ids = torch.where(greedy, ids, _inverse_cdf(kept.softmax(dim=-1), uniform(seed, position)))
    return ids, kept.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]


def kept_logits(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
                min_p: torch.Tensor) -> torch.Tensor:
    """Return the scaled logits (R, V) whose softmax `sample_eager` draws from, -inf for what is not kept."""
    greedy = temperature == 0
    kept = logits / torch.where(greedy, 1.0, temperature)[:, None]
    kept = _keep_top_k(kept, torch.where(greedy, 0, top_k))
    kept = _keep_top_p(kept, torch.where(greedy, 1.0, top_p))
    return _keep_min_p(kept, torch.where(greedy, 0.0, min_p))


def _keep_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Set all but each row's top_k largest logits to -inf; ties with the k-th stay, 0 keeps all."""
    most = min(int(top_k.max()), logits.size(1))
    if most < 1:
        return logits
    largest = logits.topk(most, dim=-1).values  # 0.7 ms for 64 rows of 4,096 and k = 50; a sort took 11 ms
    threshold = largest.gather(1, top_k.clamp(1, most)[:, None] - 1)
    return logits.masked_fill((logits < threshold) & (top_k > 0)[:, None], float("-inf"))


def _keep_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf what lies below the last of the largest logits whose probabilities reach top_p; 1 keeps all."""
    if bool((top_p >= 1).all()):
        return logits
    descending = logits.sort(dim=-1, descending=True).values
    probabilities = descending.softmax(dim=-1).double()
    before = probabilities.cumsum(dim=-1) - probabilities
    last = (before < top_p[:, None]).sum(dim=-1).clamp(min=1) - 1
    below = logits < descending.gather(1, last[:, None])
    return logits.masked_fill(below & (top_p < 1)[:, None], float("-inf"))


def _keep_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf what has less than min_p times the largest probability; 0 keeps all."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None], float("-inf"))


def _inverse_cdf(probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return the first id whose cumulative probability exceeds u (R,), never one of probability 0."""
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, u[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # where the sum is complete; u * total may round up to total
    return torch.minimum(drawn, last)[:, 0].clamp(max=probabilities.size(1) - 1)  # NaN rows: any id will do


def uniform(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return uniforms in [0, 1) (R,) fp64 from 53 bits of a hash of (seed, position), both int64."""
    return (_mix(_mix(seed) + position) >> 11 & (1 << 53) - 1).double() * 2.0 ** -53


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64 words (Steele, Lea, Flood 2014); int64 products wrap as uint64's do."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right filling with zeros; torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


# --- Triton ---------------------------------------------------------------------------------------

# keyed (sm,); not tuned on a GPU yet
TILES = {(0,): dict(BLOCK_V=32, num_warps=1), (80,): dict(BLOCK_V=2048, num_warps=8)}


@triton.jit
def _finalizer(x):
    """SplitMix64 as `_mix`: its constants as signed words, shifts that fill with zeros."""
    x = x - 7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (-4658895280553007687)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (-7723592293110705685)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _sort_key(x):
    """Map fp32 to int64 from 0 to 2^32 - 1 in the same order."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _load_scaled(row_ptr, start, V, temperature, floor, BLOCK_V: tl.constexpr):
    """Return the ids of a block and their logits over the temperature, -inf where the key lies below `floor`."""
    ids = start + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + ids, mask=ids < V, other=float("-inf")) / temperature
    return ids, tl.where(_sort_key(x) >= floor, x, float("-inf"))


@triton.jit
def _mass(row_ptr, V, temperature, top, floor, threshold, BLOCK_V: tl.constexpr):
    """Return how many tokens have keys >= threshold, and the sum of their exp(x - top), among those kept by floor."""
    count, mass = 0, 0.0
    for start in range(0, V, BLOCK_V):
        ids, x = _load_scaled(row_ptr, start, V, temperature, floor, BLOCK_V)
        over = (_sort_key(x) >= threshold) & (x > float("-inf"))
        count += tl.sum(over.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(over, tl.exp(x - top), 0.0), axis=0)
    return count, mass


@triton.jit
def _threshold(row_ptr, V, temperature, top, floor, goal, BY_MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return the largest key at or above which lie at least `goal` tokens, or that much of the mass, bit by bit."""
    threshold = tl.zeros((), tl.int64)
    for i in range(32):
        candidate = threshold + (tl.full((), 1, tl.int64) << (31 - i))
        count, mass = _mass(row_ptr, V, temperature, top, floor, candidate, BLOCK_V)
        if BY_MASS:
            threshold = tl.where(mass >= goal, candidate, threshold)
        else:
            threshold = tl.where(count >= goal, candidate, threshold)
    return threshold


@triton.jit
def _sample_kernel(logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, ids_ptr,
                   log_probs_ptr, V, BLOCK_V: tl.constexpr):
    r = tl.program_id(0)
    row_ptr = logits_ptr + r.to(tl.int64) * V
    temperature = tl.load(temperature_ptr + r)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    floor = tl.zeros((), tl.int64)

    top, best = float("-inf"), 0
    for start in range(0, V, BLOCK_V):
        ids, x = _load_scaled(row_ptr, start, V, temperature, floor, BLOCK_V)
        highest = tl.max(x, axis=0)
        if highest > top:
            best = tl.min(tl.where(x == highest, ids, V), axis=0)
            top = highest

    k = tl.minimum(tl.load(top_k_ptr + r), V)
    if (k > 0) & (greedy == 0):
        floor = _threshold(row_ptr, V, temperature, top, floor, k, False, BLOCK_V)
    p = tl.load(top_p_ptr + r)
    if (p < 1) & (greedy == 0):
        count, kept = _mass(row_ptr, V, temperature, top, floor, floor, BLOCK_V)
        floor = tl.maximum(floor, _threshold(row_ptr, V, temperature, top, floor, p * kept, True, BLOCK_V))
    smallest = tl.where(greedy, 0.0, tl.load(min_p_ptr + r))
    floor = tl.maximum(floor, _sort_key(top + tl.log(smallest)))
    total = tl.zeros((), tl.float64)
    for start in range(0, V, BLOCK_V):
        ids, x = _load_scaled(row_ptr, start, V, temperature, floor, BLOCK_V)
        total += tl.sum(tl.exp(x - top).to(tl.float64), axis=0)

    chosen = best
    if greedy == 0:
        word = _finalizer(_finalizer(tl.load(seed_ptr + r)) + tl.load(position_ptr + r))
        u = ((word >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
        goal = u * total
        before = tl.zeros((), tl.float64)
        chosen, last = V, 0
        for start in range(0, V, BLOCK_V):
            ids, x = _load_scaled(row_ptr, start, V, temperature, floor, BLOCK_V)
            weight = tl.exp(x - top).to(tl.float64)
            reached = (before + tl.cumsum(weight, axis=0) > goal) & (weight > 0)
            chosen = tl.minimum(chosen, tl.min(tl.where(reached, ids, V), axis=0))
            last = tl.maximum(last, tl.max(tl.where(weight > 0, ids, 0), axis=0))
            before += tl.sum(weight, axis=0)
        chosen = tl.where(chosen < V, chosen, last)  # u times the sum may round up to the sum
    x = tl.load(row_ptr + chosen) / temperature
    tl.store(ids_ptr + r, chosen.to(tl.int64))
    tl.store(log_probs_ptr + r, x - top - tl.log(total.to(tl.float32)))


def _fake(logits, temperature, top_k, top_p, min_p, seed, position) -> tuple[torch.Tensor, torch.Tensor]:
    R = logits.size(0)
    return logits.new_empty(R, dtype=torch.int64), logits.new_empty(R, dtype=torch.float32)


@custom_op("sample", fake=_fake)
def _sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
            min_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    R, V = logits.shape
    per_row = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seed, position)]
    ids, log_probs = _fake(logits, *per_row)
    _sample_kernel[(R,)](logits.contiguous(), *per_row, ids, log_probs, V, **pick_tile(TILES, logits.device))
    return ids, log_probs


@register("sample", "triton", needs=("triton",), rank=40)
def sample_triton(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
                  min_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our kernel, one program per row; logits of any strides."""
    return _sample(logits.float(), temperature, top_k, top_p, min_p, seed, position)


def _inputs(case, dtype, device, generator) -> dict:
    R, V = case["R"], case["V"]
    logits = 3 * torch.randn(R, V, generator=generator)
    rows = torch.arange(R)
    if case.get("plain"):  # no filters, and equal logits in several blocks
        ones, zeros = torch.ones(R, device=device), torch.zeros(R, dtype=torch.int64, device=device)
        return {"logits": logits.round().to(device), "temperature": (rows % 3 > 0).float().to(device), "top_k": zeros,
                "top_p": ones, "min_p": 0 * ones, "seed": (rows + 5).to(device), "position": (rows * 31).to(device)}
    kind = rows % 5  # greedy, top-k alone, top-p alone, min-p alone, all of them
    has = [((kind == alone) | (kind == 4)).to(device) for alone in (1, 2, 3)]
    return {"logits": logits.to(device), "temperature": ((kind > 0) * (0.6 + 0.2 * kind)).to(device),
            "top_k": 5 * has[0].long(), "top_p": 1 - 0.3 * has[1].float(), "min_p": 0.1 * has[2].float(),
            "seed": (rows * 7919 - 3).to(device), "position": (rows + 11).to(device)}


OP = declare(Op(
    "sample",
    cases={"tiny": dict(R=5, V=40), "one": dict(R=1, V=7),
           "odd_plain": dict(R=9, V=107, plain=True), "d20_b64": dict(R=64, V=65536)},
    make_inputs=_inputs,
    bytes=lambda c, itemsize: c["R"] * c["V"] * 4,
    dtypes=(torch.float32,),
))
