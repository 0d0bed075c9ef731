"""Loaders: documents or conversations -> x, y of token ids on the device, endless, resumable, for any world size.

Rows come from one global stream that is cut into consecutive blocks of B rows; rank r's i-th batch is block i W + r.
So the order does not depend on W, and W ranks read what one rank with W times the accumulation reads. Every rank
tokenizes all documents and keeps its own blocks: eight H100s at d20 train on 1.04M tokens/s, with what is cropped
about 2M to encode, and one core did 18M here. So the ranks agree on every row without talking to each other.
"""

from collections.abc import Iterator

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.dataset import Dataset, Documents
from nanochat.packing import OnePerRow, Prefetcher, Row, RowPacker

IGNORED = -1  # target that the loss skips


class _Loader:
    """Batches of a packer's rows, prepared in a background thread and copied to the device."""

    def __init__(self, packer: RowPacker | OnePerRow, n_documents: int, batch_size: int, seq_len: int, *, pad_id: int,
                 pad_multiple: int | None, rank: int, world_size: int, device, settings: dict):
        self._n_documents = n_documents
        self._settings = settings
        self._position = packer.state_dict()
        self._copy = _DeviceCopy(torch.device(device))
        self._blocks = Prefetcher(_blocks(packer, batch_size, seq_len, pad_id, pad_multiple, rank, world_size))

    def __iter__(self):
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        block, self._position = next(self._blocks)
        return self._copy(block)

    def state_dict(self) -> dict:
        """Return the position after the batches handed out so far, the same on every rank, JSON-able.

        Given as `state=` to a loader of the same data, T and global batch, it continues with the next batch.
        """
        return {**self._position, "settings": dict(self._settings)}

    @property
    def stats(self) -> dict:
        """Counts over all ranks and epochs so far: rows, documents, tokens (trained targets), cropped_documents,
        cropped_tokens (read but in no row), epoch."""
        return {**self._position["counters"], "epoch": self.epoch}

    @property
    def epoch(self) -> int:
        """Whole passes over the documents so far."""
        return self._position["counters"]["documents"] // self._n_documents

    @property
    def epoch_fraction(self) -> float:
        """Part of the current pass handed out so far, in [0, 1)."""
        return self._position["counters"]["documents"] % self._n_documents / self._n_documents

    def close(self) -> None:
        """End the background thread; next() then raises."""
        self._blocks.close()


class PretrainLoader(_Loader):
    """Rows of T + 1 tokens, each starting with BOS, best-fit packed from whole documents with the last one cropped.

    next() -> x, y (B, T) int64; y is x shifted by one and every target is real. A document cropped or longer than a
    row loses the rest, counted in `stats`. The split is repeated forever.
    """

    def __init__(self, dataset: Dataset, split: str, tokenizer, batch_size: int, seq_len: int, *, rank: int = 0,
                 world_size: int = 1, device="cpu", state: dict | None = None):
        _check_shape(batch_size, seq_len, rank, world_size)
        documents = Documents(dataset, split)
        if not len(documents):
            raise UserError(f"data {dataset.name} must have at least one document to load from {split}, it has none")
        settings = {"data": dataset.fingerprint, "split": split, "seq_len": seq_len}
        _check_settings(state, settings)
        packer = RowPacker(_TextStream(documents, tokenizer), seq_len + 1, crop=True, state=state)
        super().__init__(packer, len(documents), batch_size, seq_len, pad_id=tokenizer.bos_id, pad_multiple=None,
                         rank=rank, world_size=world_size, device=device, settings=settings)


class ConversationLoader(_Loader):
    """Conversations of a task, shuffled anew each epoch by (shuffle_seed, epoch).

    pack=True (mid-training): whole conversations best-fit packed into rows of T, every token trained, the rest of a
    row padded. pack=False (SFT): one conversation per row, trained where its mask is 1, rows as long as the longest,
    rounded up to `pad_multiple` and at most T. next() -> x, y (B, T') int64 with y = -1 where not trained.
    Conversations longer than T are cropped and counted.
    """

    def __init__(self, task, tokenizer, batch_size: int, seq_len: int, *, pack: bool, shuffle_seed: int, rank: int = 0,
                 world_size: int = 1, device="cpu", state: dict | None = None, pad_multiple: int = 64):
        _check_shape(batch_size, seq_len, rank, world_size)
        if not len(task):
            raise UserError("a task must have at least one conversation to load, it has none")
        settings = {"conversations": len(task), "shuffle_seed": shuffle_seed, "pack": pack, "seq_len": seq_len}
        _check_settings(state, settings)
        stream = _ConversationStream(task, tokenizer, shuffle_seed)
        packer = (RowPacker(stream, seq_len + 1, crop=False, state=state) if pack
                  else OnePerRow(stream, seq_len + 1, state=state))
        super().__init__(packer, len(task), batch_size, seq_len, pad_id=tokenizer.bos_id,
                         pad_multiple=None if pack else pad_multiple, rank=rank, world_size=world_size, device=device,
                         settings=settings)


class _TextStream:
    """Documents as tokens, BOS first, in the same order every epoch."""

    def __init__(self, documents: Documents, tokenizer):
        self._documents, self._tokenizer = documents, tokenizer

    def __len__(self) -> int:
        return len(self._documents)

    def fetch(self, numbers: list[int]) -> list[Row]:
        ids, offsets = self._tokenizer.encode_batch([self._documents[n % len(self)] for n in numbers])
        bos = np.array([self._tokenizer.bos_id])
        return [Row(np.concatenate((bos, ids[start:stop].astype(np.int64))))
                for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]


class _ConversationStream:
    """Rendered conversations; epoch e is a permutation drawn from (seed, e)."""

    def __init__(self, task, tokenizer, seed: int):
        self._task, self._tokenizer, self._seed = task, tokenizer, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._task)

    def fetch(self, numbers: list[int]) -> list[Row]:
        return [self._render(number) for number in numbers]

    def _render(self, number: int) -> Row:
        epoch, position = divmod(number, len(self))
        if epoch != self._epoch:
            # RandomState and not default_rng: numpy froze its streams, so a run resumes under any numpy
            self._order = np.random.RandomState([self._seed, epoch]).permutation(len(self))
            self._epoch = epoch
        ids, mask = self._tokenizer.render_conversation(self._task[int(self._order[position])])
        return Row(np.array(ids, np.int64), np.array(mask, bool))


def _blocks(packer: RowPacker | OnePerRow, batch_size: int, seq_len: int, pad_id: int, pad_multiple: int | None,
            rank: int, world_size: int) -> Iterator[tuple[torch.Tensor, dict]]:
    """Yield this rank's blocks, (2, B, T') int64 of x and y, and the packer's state after all ranks' blocks."""
    while True:
        rows = [packer.next_row() for _ in range(batch_size * world_size)]
        own = rows[rank * batch_size: (rank + 1) * batch_size]
        width = seq_len
        if pad_multiple:
            longest = max(1, *(len(row.ids) - 1 for row in own))
            width = min(seq_len, -(-longest // pad_multiple) * pad_multiple)
        yield torch.from_numpy(_collate(own, width, pad_id)), packer.state_dict()


def _collate(rows: list[Row], width: int, pad_id: int) -> np.ndarray:
    block = np.empty((2, len(rows), width), np.int64)
    block[0], block[1] = pad_id, IGNORED
    for x, y, row in zip(*block, rows, strict=True):
        n = len(row.ids) - 1
        x[:n] = row.ids[:-1]
        y[:n] = row.ids[1:] if row.trained is None else np.where(row.trained[1:], row.ids[1:], IGNORED)
    return block


class _DeviceCopy:
    """Copies (2, B, T) blocks to a device; on CUDA through two pinned buffers, without waiting for the copy.

    The device's type is compared, never its name: "cuda:0" is a CUDA device too, and unpinned memory makes every
    copy wait for the GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pinned: list[torch.Tensor | None] = [None, None]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def __call__(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._device.type == "cuda":
            block = self._through_pinned(block)
        x, y = block
        return x, y

    def _through_pinned(self, block: torch.Tensor) -> torch.Tensor:
        turn, self._turn = self._turn, 1 - self._turn
        pinned = self._pinned[turn]
        if pinned is None or pinned.numel() < block.numel():
            pinned = self._pinned[turn] = torch.empty(block.numel(), dtype=block.dtype, pin_memory=True)
        elif self._copied[turn] is not None:
            self._copied[turn].synchronize()  # of the batch before the last: long done
        staged = pinned[: block.numel()].view(block.shape)
        staged.copy_(block)
        on_device = staged.to(self._device, non_blocking=True)
        self._copied[turn] = torch.cuda.Event()
        self._copied[turn].record(torch.cuda.current_stream(self._device))
        return on_device


def _check_shape(batch_size: int, seq_len: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    if seq_len < 1:
        raise UserError(f"the sequence length must be at least 1, got {seq_len}")
    if not 0 <= rank < world_size:
        raise UserError(f"rank must be in 0..{world_size - 1}, got {rank}")


def _check_settings(state: dict | None, settings: dict) -> None:
    """Refuse a position in other data or other rows: it would silently repeat or lose documents."""
    for key, value in settings.items():
        if state is not None and state["settings"].get(key) != value:
            raise UserError(f"to resume, the loader must have the same {key} as the checkpoint, {value} is not "
                            f"{state['settings'].get(key)}")
