"""Take in a NanoChat model of transformers: python -m scripts.import_hf FOLDER|owner/name

The model becomes the checkpoint of a stage and its tokenizer that of the base directory, which must have none yet, or
the same. Chat, evaluations, and further training then use it as if it had been trained here.
"""

import argparse

from nanochat.common import print0, run_script
from nanochat.hf_import import import_model
from nanochat.load import STAGES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.import_hf",
                                     description="Take in a NanoChat model of transformers.")
    parser.add_argument("source", help="a folder, or a model of the Hugging Face hub as owner/name")
    parser.add_argument("--stage", default="sft", choices=STAGES, help="which stage's checkpoint it becomes")
    parser.add_argument("--revision", default="main", help="of a model on the hub: branch, tag or commit")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    print0(import_model(args.source, args.stage, args.revision))
    print0(f"talk to it: .venv/bin/python -m scripts.chat_cli --stage {args.stage}")


if __name__ == "__main__":
    run_script(parse_args, main)
