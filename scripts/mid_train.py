"""Mid-training: teach a base model the chat format and the tool tokens on packed conversations.

python -m scripts.mid_train
"""

import argparse

from nanochat.common import run_script
from nanochat.finetune import add_finetune_flags, finetune


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_finetune_flags(parser, source="base", rows=256, device_batch_size=32, eval_every=150, lr_scale=1.0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    finetune("mid", "Mid-training", args, pack=True, warmdown=0.2, momentum_steps=300)


if __name__ == "__main__":
    run_script(parse_args, main)
