"""Prepare text for training: parquet shards, a pinned validation shard and a manifest.

    python -m scripts.dataset --data builtin
    python -m scripts.dataset --data FOLDER     # .parquet (column text), .jsonl ({"text": ...}), .txt
"""

import argparse

from nanochat.common import human_bytes, run_script
from nanochat.dataset import VAL_FILE, prepare, verify


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.dataset", description="Prepare text for training.")
    parser.add_argument("--data", default="builtin", metavar="SOURCE",
                        help="builtin (this Python's own documentation and source) or a folder of .parquet, .jsonl "
                             "and .txt files (default: builtin)")
    parser.add_argument("--max-chars", type=int, metavar="N", help="stop after N characters (default: take all)")
    parser.add_argument("--verify", action="store_true", help="compare every shard's sha256 with the manifest")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    dataset = prepare(args.data, max_chars=args.max_chars)
    if args.verify:
        verify(dataset)
    print(f"{dataset.folder}{' (verified)' if args.verify else ''}")
    for name, entry in dataset.manifest["files"].items():
        split = "val" if name == VAL_FILE else "train"
        print(f"  {name:<22} {split:<5} {entry['rows']:>9,} documents  {human_bytes(entry['bytes']):>10}")


if __name__ == "__main__":
    run_script(parse_args, main)
