"""Train the tokenizer: python -m scripts.tok_train --data builtin --vocab-size 4096

Byte-pair encoding on the documents of the training split, each cut to --doc-cap characters so that a few long ones do
not rule the vocabulary. Written to tokenizer/tokenizer.bpe under the base directory.
"""

import argparse
import sys
import time
import warnings

import numpy as np
from tqdm import tqdm

from nanochat import flags
from nanochat.common import UserError, base_dir, run_script
from nanochat.dataset import iter_texts, open_dataset
from nanochat.report import Report
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

ROUND_TRIP = "Hello, world! It's 2025 -- don't panic.\r\n\tprint(x ** 2)  # naïve café, 한국어, 日本語, ١٢٣ 🙂\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.tok_train", description="Train the tokenizer.")
    parser.add_argument("--data", default="builtin", metavar="SOURCE",
                        help="builtin, fineweb-edu (the shards that are here) or a folder, prepared by scripts.dataset "
                             "(default: builtin)")
    parser.add_argument("--vocab-size", type=int, default=65536, metavar="N",
                        help="ids in all: 256 bytes, the merges, 9 special tokens (default: 65536)")
    parser.add_argument("--max-chars", type=float, default=2e9, metavar="N",
                        help="characters of text to learn from (default: 2e9)")
    parser.add_argument("--doc-cap", type=int, default=10_000, metavar="N",
                        help="characters taken of one document (default: 10000)")
    parser.add_argument("--memory-limit", type=flags.positive_int, default=None, metavar="MB",
                        help="memory for counting pieces, beyond which counts go to temporary files (default: none)")
    return parser.parse_args(argv)


class Progress:
    """A bar for each phase of the training: bytes read and counted, then merges."""

    UNITS = {"count": ("counting", "B", True), "merge": ("merging", "", False)}

    def __init__(self):
        self.phase, self.bar = None, None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self.phase:
            self.close()
            name, unit, scale = self.UNITS[phase]
            self.bar = tqdm(desc=name, total=total or None, unit=unit, unit_scale=scale, disable=None)
            self.phase = phase
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def main(args: argparse.Namespace) -> None:
    for flag, value in (("--max-chars", args.max_chars), ("--doc-cap", args.doc_cap)):
        if not 1 <= value < float("inf"):
            raise UserError(f"{flag} must be at least 1, got {value:g}")
    dataset = open_dataset(args.data)
    texts = iter_texts(dataset, "train", max_chars=int(args.max_chars), doc_cap=args.doc_cap)
    limit = args.memory_limit and args.memory_limit * 1_000_000
    progress = Progress()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            tokenizer = Tokenizer.train(texts, args.vocab_size, progress, memory_limit=limit)
        finally:
            progress.close()
    seconds = time.perf_counter() - start
    notes = [str(warning.message) for warning in caught]
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP)) != ROUND_TRIP:
        raise RuntimeError("the new tokenizer does not give a text back as it was; nothing was saved")
    path = tokenizer.save(base_dir() / "tokenizer")

    lengths = tokenizer.token_bytes()[:-len(SPECIAL_TOKENS)].astype(np.float64)
    report = tokenizer.training_report
    phases = ", ".join(f"{phase} {spent:.2f}" for phase, spent in report["seconds"].items())
    facts = {
        "Data": dataset.name, "Documents": report["documents"], "Bytes": report["bytes"],
        "Different pieces": report["unique_pieces"], "Runs spilled to disk": report["spilled_runs"],
        "Characters taken of one document, at most": args.doc_cap,
        "Vocabulary": tokenizer.vocab_size, "Special tokens": len(SPECIAL_TOKENS),
        "Seconds": round(seconds, 2), "Seconds by phase": phases,
        "MB per second": round(report["bytes"] / seconds / 1e6, 1),
        "Bytes per token in the vocabulary": f"min {lengths.min():.0f}, mean {lengths.mean():.2f}, "
                                             f"max {lengths.max():.0f}, std {lengths.std():.2f}",
        "Fingerprint": tokenizer.fingerprint,
        **({"Note": "; ".join(notes)} if notes else {}),
    }
    print(f"trained a vocabulary of {tokenizer.vocab_size:,} tokens on {report['documents']:,} documents "
          f"({report['bytes'] / 1e6:,.1f} MB) in {seconds:.1f} s: {path}")
    Report().section("Tokenizer training", facts)


if __name__ == "__main__":
    run_script(parse_args, main)
