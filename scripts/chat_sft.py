"""Supervised fine-tuning: one conversation per row, padded, loss on the assistant's own tokens only.

python -m scripts.chat_sft
"""

import argparse

from nanochat.common import run_script
from nanochat.finetune import add_finetune_flags, finetune


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_finetune_flags(parser, source="mid", rows=32, device_batch_size=4, eval_every=100, lr_scale=0.02)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    finetune("sft", "SFT", args, pack=False, warmdown=1.0, momentum_steps=0)


if __name__ == "__main__":
    run_script(parse_args, main)
