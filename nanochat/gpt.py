"""The model: a decoder-only Transformer whose every heavy step is a call through the resolved kernels.

nanochat's architecture of Nov 2025, weight-compatible with the transformers library's NanoChat: untied embeddings, no
bias, a norm after the embedding, pre-norm blocks, rotary positions and then weightless QK-norm, squared-ReLU MLP of 4C,
a final norm and logits capped by 15 tanh(z / 15). Depth is the one dial: C = 64 depth, heads of 128.

Master weights are fp32; activations are in `GPT.dtype` and each op casts what it needs, so there is no autocast.
Weights cast once with `cast_weights` (inference) make those casts free.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import Kernels
from kernels.cross_entropy import softcapped_logits
from kernels.linear import FP8_LAYERS
from kernels.qk_norm_rope import rotary_table

# B batch, T tokens, N ragged tokens, H query heads, K kv heads, D head dim, C model dim, V vocab, P page size


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model. `window_pattern` is tiled over the layers: L sees everything, S a quarter of the context.

    Raises ValueError, naming the rule and the value, for a shape that cannot be built.
    """

    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    window_pattern: str = "L"

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd must be n_head times an even head dim, got {self.n_embd} and {self.n_head} heads")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head must divide n_head = {self.n_head}, got {self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise ValueError(f"window_pattern must be letters L and S, got {self.window_pattern!r}")

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int, **kwargs) -> "GPTConfig":
        """Derive the shape from the depth: C = 64 depth, one head per 128 dimensions, at least one."""
        n_embd = 64 * depth
        n_head = max(1, n_embd // 128)
        return cls(sequence_len, vocab_size, depth, n_head, kwargs.pop("n_kv_head", n_head), n_embd, **kwargs)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def window(self, layer: int) -> int:
        """Return how many earlier keys layer `layer` sees, -1 for all; the last layer always sees all."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.n_layer - 1
        return -(-self.sequence_len // 4 // 128) * 128 if short else -1

    def shapes(self) -> dict:
        """Return what a kernel backend may ask about the model when it is chosen."""
        return {**asdict(self), "head_dim": self.head_dim}


# --- paged inputs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of all live sequences: per layer (pages, P, K, D) in the compute dtype.

    With fp8 they are codes of e4m3, uint8, and v_scales (pages, P, K) fp32 undo those of the values.
    """

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    v_scales: list[torch.Tensor | None]

    @classmethod
    def allocate(cls, config: GPTConfig, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device,
                 fp8: bool = False) -> "PagedCache":
        def layers(*shape: int, dtype: torch.dtype) -> list[torch.Tensor]:
            return [torch.zeros(n_pages, page_size, *shape, dtype=dtype, device=device) for _ in range(config.n_layer)]

        K, D = config.n_kv_head, config.head_dim
        k, v = (layers(K, D, dtype=torch.uint8 if fp8 else dtype) for _ in "kv")
        return cls(k, v, layers(K, dtype=torch.float32) if fp8 else [None] * config.n_layer)

    @property
    def layers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        return zip(self.k, self.v, self.v_scales, strict=True)


@dataclass(frozen=True)
class PagedBatch:
    """One ragged step: the new tokens of S sequences laid end to end.

    tokens, positions, slots (N,) int64; block_tables (S, max_pages), cu_seqlens_q (S + 1,), context_lens (S,) int32;
    out_rows (R,) int64 are the rows whose logits are wanted. alone: attention computes each sequence as if it were
    the only one, to the last bit.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    out_rows: torch.Tensor
    alone: bool = False


# --- layers ---------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer without bias that multiplies through the resolved `linear` kernel.

    fp8 says whether it runs in fp8; then `quantize` must follow every change of the weight.
    """

    def __init__(self, in_features: int, out_features: int, kernels: Kernels):
        super().__init__(in_features, out_features, bias=False)
        self.kernels = kernels
        self.fp8 = False
        self._codes: tuple | None = None

    def reset_parameters(self) -> None:
        """Leave the weights as they are: `init_weights` or a checkpoint fills them."""

    @torch.no_grad()
    def quantize(self) -> None:
        codes = self.kernels.fp8_cast(self.weight)
        if self._codes is None:
            self._codes = codes
        for kept, new in zip(self._codes, codes, strict=True):
            kept.copy_(new)  # where a captured graph looks for them

    @property
    def codes(self) -> tuple | None:
        """Return the weight in fp8, None where the layer does not run in it."""
        if self.fp8 and self._codes is None:
            raise RuntimeError("an fp8 layer must be quantized after its weight is set: call GPT.quantize_weights()")
        return self._codes if self.fp8 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.linear(x, self.weight, self.codes)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.window = config.window(layer)
        self.heads = (config.n_head, config.n_kv_head, config.head_dim)
        H, K, D = self.heads
        self.c_q = Linear(config.n_embd, H * D, kernels)
        self.c_k = Linear(config.n_embd, K * D, kernels)
        self.c_v = Linear(config.n_embd, K * D, kernels)
        self.c_proj = Linear(H * D, config.n_embd, kernels)

    def _qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        H, K, D = self.heads
        shape = x.shape[:-1]
        return self.c_q(x).view(*shape, H, D), self.c_k(x).view(*shape, K, D), self.c_v(x).view(*shape, K, D)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self._qkv(x)  # (B, T, H or K, D)
        y = self.kernels.attention(q, k, v, cos, sin, self.window)
        return self.c_proj(y.flatten(-2))

    def forward_paged(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor,
                      v_pages: torch.Tensor, v_scales: torch.Tensor | None, batch: PagedBatch,
                      rows: torch.Tensor | slice) -> torch.Tensor:
        q, k, v = self._qkv(x)  # (N, H or K, D)
        q = self.kernels.paged_append(q, k, v, cos, sin, k_pages, v_pages, batch.slots, v_scales)
        y = self.kernels.paged_attention(q, k_pages, v_pages, batch.block_tables, batch.cu_seqlens_q,
                                         batch.context_lens, self.window, v_scales, batch.alone)
        return self.c_proj(y[rows].flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, kernels)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc, proj = self.c_fc, self.c_proj
        return self.kernels.linear_relu2(x, fc.weight, proj.weight, fc.codes, proj.codes)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.attn = Attention(config, layer, kernels)
        self.mlp = MLP(config, kernels)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.kernels.rms_norm(x), cos, sin)
        return x + self.mlp(self.kernels.rms_norm(x))

    def forward_paged(self, x: torch.Tensor, *args, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Return the block's output of `rows` (R,), by default of all; keys and values of all x (N, C) are appended."""
        x = x[rows] + self.attn.forward_paged(self.kernels.rms_norm(x), *args, rows)
        return x + self.mlp(self.kernels.rms_norm(x))


# --- the model ------------------------------------------------------------------------------------


class GPT(nn.Module):
    """The language model. Weights are uninitialized until `init_weights` or a checkpoint fills them."""

    def __init__(self, config: GPTConfig, kernels: Kernels, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.kernels, self.dtype = config, kernels, dtype
        shape = config.vocab_size, config.n_embd
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(*shape, _weight=torch.empty(shape)),
            "h": nn.ModuleList([Block(config, layer, kernels) for layer in range(config.n_layer)]),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, kernels)
        # Computing on the meta device, under which `build` runs this, would import torch._dynamo: 1.5 s per program.
        cos, sin = rotary_table(config.sequence_len, config.head_dim, device=torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.fp8_layers = [layer for block in self.transformer["h"] for name, layer in block.named_modules()
                           if name in FP8_LAYERS and kernels.names["linear"] == "fp8"]
        for layer in self.fp8_layers:
            layer.fp8 = True
        self.register_load_state_dict_post_hook(lambda model, keys: model.quantize_weights())

    @classmethod
    def build(cls, config: GPTConfig, kernels: Kernels, dtype: torch.dtype, device: torch.device,
              seed: int | None = None) -> "GPT":
        """Build on `device`; with a seed the weights are initialized, without one they wait for a checkpoint."""
        with torch.device("meta"):
            model = cls(config, kernels, dtype)
        model.to_empty(device=device)
        model.cos, model.sin = rotary_table(config.sequence_len, config.head_dim, device=device)
        if seed is not None:
            model.init_weights(seed)
        return model

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw nanochat's initial weights on the CPU, so that every device starts from the same numbers.

        Embedding N(0, 1); matrices N(0, min(1, sqrt(out/in)) / sqrt(in)); every projection back into the residual
        stream and the head 0, so that at step 0 the blocks are the identity and all logits are equal.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name == "transformer.wte.weight":
                std = 1.0
            elif name.endswith("c_proj.weight") or name == "lm_head.weight":
                std = 0.0
            else:
                fan_out, fan_in = p.shape
                std = min(1.0, (fan_out / fan_in) ** 0.5) / fan_in ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std if std else torch.zeros(()))
        self.quantize_weights()

    def quantize_weights(self) -> None:
        """Cast the weights of the fp8 layers anew; whoever changes weights does it, once for all micro-batches."""
        for layer in self.fp8_layers:
            layer.quantize()

    @contextmanager
    def without_fp8(self) -> Iterator[None]:
        """Run every layer in the compute dtype inside, so that an evaluation measures the weights, not the training."""
        for layer in self.fp8_layers:
            layer.fp8 = False
        try:
            yield
        finally:
            for layer in self.fp8_layers:
                layer.fp8 = True

    def cast_weights(self) -> "GPT":
        """Cast every weight to the compute dtype, for inference; training keeps fp32 masters."""
        for p in self.parameters():
            p.data = p.data.to(self.dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.transformer["wte"].weight.device

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                reduction: str = "mean") -> torch.Tensor:
        """Run idx (B, T) int64; return logits (B, T, V) fp32, or with targets (B, T) the loss.

        Targets of -1 are ignored. reduction "mean" and "sum" give a scalar, "none" (B * T,).
        """
        T = idx.size(1)
        if T > self.config.sequence_len:
            raise ValueError(f"a row must fit the context of {self.config.sequence_len} tokens, got {T}")
        cos, sin = self.cos[:T], self.sin[:T]
        x = self._embed(idx)
        for block in self.transformer["h"]:
            x = block(x, cos, sin)
        x = self.kernels.rms_norm(x)
        if targets is None:
            return softcapped_logits(x, self.lm_head.weight)
        return self.kernels.cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                          reduction=reduction)

    def forward_paged(self, batch: PagedBatch, cache: PagedCache) -> torch.Tensor:
        """Append one ragged step to the cache; return the softcapped logits (R, V) fp32 of batch.out_rows."""
        return softcapped_logits(self.hidden_paged(batch, cache), self.lm_head.weight)

    def hidden_paged(self, batch: PagedBatch, cache: PagedCache,
                     rotary: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Append one ragged step to the cache; return what the head reads (R, C), where logits would be too many.

        rotary: cos and sin (positions, D/2) for positions beyond the context, by default those of the context.
        """
        cos, sin = rotary or (self.cos, self.sin)
        cos, sin = cos[batch.positions], sin[batch.positions]
        x = self._embed(batch.tokens)
        *layers, (last, last_pages) = zip(self.transformer["h"], cache.layers, strict=True)
        for block, pages in layers:
            x = block.forward_paged(x, cos, sin, *pages, batch)
        x = last.forward_paged(x, cos, sin, *last_pages, batch, rows=batch.out_rows)  # nobody reads the other rows
        return self.kernels.rms_norm(x)

    def _embed(self, idx: torch.Tensor) -> torch.Tensor:
        x = F.embedding(idx, self.transformer["wte"].weight).to(self.dtype)
        return self.kernels.rms_norm(x)

    # --- sizes ---

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self, causal: bool = False) -> float:
        """Return training FLOPs per token at full context, forward and backward.

        nanochat's count, the default, takes every (query, key) pair; `causal` counts only those that attention needs.
        """
        c = self.config
        matmul = self.num_params() - self.transformer["wte"].weight.numel()
        keys = sum(self._mean_keys(layer, causal) for layer in range(c.n_layer))
        return 6 * matmul + 12 * c.n_head * c.head_dim * keys

    def _mean_keys(self, layer: int, causal: bool) -> float:
        T, window = self.config.sequence_len, self.config.window(layer)
        w = T if window < 0 else min(window + 1, T)  # most keys that a query sees
        return (w * T - w * (w - 1) / 2) / T if causal else w
