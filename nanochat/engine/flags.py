"""Command-line flags of the engine, for every program that has one."""

import argparse

from nanochat.engine.runner import KV_DTYPES


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv", default="auto", choices=KV_DTYPES,
                        help="keys and values in the compute dtype, or in fp8 at about half the memory")
    parser.add_argument("--batch-invariant", action="store_true",
                        help="fixed shapes: a row's logits are the same to the last bit in any batch; slower")


def engine_options(args: argparse.Namespace) -> dict:
    """Return what those flags say to Engine(...)."""
    return {"kv_dtype": args.kv, "batch_invariant": args.batch_invariant}
