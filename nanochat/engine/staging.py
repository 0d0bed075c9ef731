"""The tensors of one step, packed into one block of memory at fixed places: a single copy takes them to the device.

The block of a bucket is never replaced, so a CUDA graph captured with its tensors finds the next step's values there.
On a CPU the device's block is the host's and nothing is copied.
"""

import numpy as np
import torch

from nanochat.engine.request import Row
from nanochat.gpt import PagedBatch

# N new tokens of S sequences, R draws

ALIGN = 128  # bytes; what the compiled forward may assume of its inputs
MIN_TOP_P = 1e-30  # keeps the likeliest alone as any smaller one does, which fp32 might round to 0: that is no top_p
BATCH_FIELDS = {"tokens": np.int64, "positions": np.int64, "slots": np.int64, "cu_seqlens_q": np.int32,
                "context_lens": np.int32, "out_rows": np.int64}
DRAW_FIELDS = {"temperature": np.float32, "top_k": np.int64, "top_p": np.float32, "min_p": np.float32,
               "seed": np.int64, "position": np.int64}
FIELDS = BATCH_FIELDS | DRAW_FIELDS

Span = tuple[Row, int, int]  # n tokens of the row from the one at `first` on: (row, first, n)


class Step:
    """Room for N tokens of S sequences and R draws; what a step does not fill is padding."""

    def __init__(self, tables: torch.Tensor, N: int, S: int, R: int):
        self.S = S
        self.drawing: list[Row] = []
        lengths = {"tokens": N, "positions": N, "slots": N, "cu_seqlens_q": S + 1, "context_lens": S, "out_rows": R,
                   **dict.fromkeys(DRAW_FIELDS, R)}
        dtypes = {name: torch.from_numpy(np.empty(0, dtype)).dtype for name, dtype in FIELDS.items()}
        ends, end = {}, 0
        for name, n in lengths.items():
            ends[name] = (end, end + n * dtypes[name].itemsize)
            end = -(-ends[name][1] // ALIGN) * ALIGN
        self._host = torch.zeros(end, dtype=torch.uint8)
        self._device = self._host if tables.device.type == "cpu" else torch.zeros_like(self._host, device=tables.device)
        views = [{name: block[slice(*ends[name])].view(dtypes[name]) for name in FIELDS}
                 for block in (self._host, self._device)]
        self.host = {name: view.numpy() for name, view in views[0].items()}
        self.batch = PagedBatch(block_tables=tables[:S], **{name: views[1][name] for name in BATCH_FIELDS})
        self.draw = tuple(views[1][name] for name in DRAW_FIELDS)
        self.host["slots"][:] = -1
        self.host["cu_seqlens_q"][:] = np.minimum(np.arange(S + 1), N)
        self.host["top_p"][:] = 1

    def send(self) -> None:
        """Bring everything to the device."""
        upload(self._host, self._device)

    def fill(self, spans: list[Span], tables: np.ndarray, page_size: int, unknown: dict[Row, int]) -> None:
        """Lay the spans end to end, one sequence each; tables (S, pages) are theirs.

        A row's token that is drawn but not known yet, at the end of its tokens, becomes -1 - unknown[row].
        """
        first, counts = (np.array(column) for column in zip(*((first, n) for _, first, n in spans), strict=True))
        ends, contexts = counts.cumsum(), first + counts
        N, S, host = int(ends[-1]), len(spans), self.host
        owner = np.repeat(np.arange(S), counts)
        positions = np.arange(N) + np.repeat(contexts - ends, counts)
        tokens: list[int] = []
        for row, at, n in spans:
            tokens += row.tokens[at:at + n]
            if at + n > len(row.tokens):
                tokens.append(-1 - unknown[row])
        pages = tables[owner, positions // page_size].astype(np.int64)
        for name, values, padding in (("tokens", tokens, 0), ("positions", positions, 0),
                                      ("slots", pages * page_size + positions % page_size, -1)):
            host[name][:N], host[name][N:] = values, padding
        host["context_lens"][:S], host["context_lens"][S:] = contexts, 0
        host["cu_seqlens_q"][1:S + 1] = ends
        host["cu_seqlens_q"][S + 1:] = N + np.arange(1, self.S - S + 1)  # a token of padding for each

    def fill_draws(self, drawing: list[Row], out_rows: np.ndarray) -> None:
        """Let each row of `drawing` draw from the logits of one of the N tokens."""
        host, R = self.host, len(drawing)
        host["out_rows"][:R] = out_rows
        host["position"][:R] = [row.length for row in drawing]
        if drawing == self.drawing:  # decoding: the rows of the step before
            return
        params = [row.request.params for row in drawing]
        values = {"temperature": [p.temperature for p in params], "top_k": [p.top_k or 0 for p in params],
                  "top_p": [max(p.top_p, MIN_TOP_P) for p in params], "min_p": [p.min_p for p in params],
                  "seed": [row.seed for row in drawing]}
        for name, own in values.items():
            host[name][:R], host[name][R:] = own, name == "top_p"  # padding draws greedily, from everything
        self.drawing = list(drawing)


def upload(host: torch.Tensor, device: torch.Tensor) -> None:
    """Copy to the device without waiting for it; the host may write its tensor again at once.

    The data goes through memory of the caching allocator, pinned and not given out again before the copy is done.
    """
    if device.device.type == "cuda":
        host = torch.empty_like(host, pin_memory=True).copy_(host)
    if device is not host:
        device.copy_(host, non_blocking=True)


def placed(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device, its own on a CPU, without waiting for it."""
    if device.type == "cpu":
        return host
    there = torch.empty_like(host, device=device)
    upload(host, there)
    return there
