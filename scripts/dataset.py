"""Prepare text for training: parquet shards, a pinned validation shard and a manifest.

    python -m scripts.dataset --data builtin
    python -m scripts.dataset --data FOLDER                    # .parquet (column text), .jsonl ({"text": ...}), .txt
    python -m scripts.dataset --data fineweb-edu --shards 240  # download them; what is here already is kept
"""

import argparse

from nanochat import flags
from nanochat.common import human_bytes, run_script
from nanochat.dataset import prepare, verify


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.dataset", description="Prepare text for training.")
    parser.add_argument("--data", default="builtin", metavar="SOURCE",
                        help="builtin (this Python's own documentation and source), fineweb-edu (downloaded) or a "
                             "folder of .parquet, .jsonl and .txt files (default: builtin)")
    parser.add_argument("--max-chars", type=int, metavar="N", help="stop after N characters (default: take all)")
    parser.add_argument("--shards", type=flags.positive_int, metavar="N",
                        help="of fineweb-edu: the first N training shards, 100 MB each, and the validation shard "
                             "(default: all 1,823)")
    parser.add_argument("--workers", type=flags.positive_int, default=8, metavar="N",
                        help="downloads at once (default: 8)")
    parser.add_argument("--skip-corrupt", action="store_true",
                        help="pass over row groups of parquet files that cannot be read, and count them")
    parser.add_argument("--verify", action="store_true", help="compare every shard's sha256 with the manifest")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    dataset = prepare(args.data, max_chars=args.max_chars, shards=args.shards, workers=args.workers,
                      skip_corrupt=args.skip_corrupt)
    if args.verify:
        verify(dataset)
    print(f"{dataset.folder}{' (verified)' if args.verify else ''}")
    for name, entry in dataset.manifest["files"].items():
        split = "val" if name == dataset.val.name else "train"
        print(f"  {name:<22} {split:<5} {entry['rows']:>9,} documents  {human_bytes(entry['bytes']):>10}")


if __name__ == "__main__":
    run_script(parse_args, main)
