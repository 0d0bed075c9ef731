"""Write the tokenizer for other libraries: python -m scripts.tok_export --format huggingface

huggingface: tokenizer.json, tokenizer_config.json with the chat template, special_tokens_map.json, for `tokenizers`,
transformers, vLLM and SGLang. tiktoken: tokenizer.tiktoken with the ranks, encoding.json with the pattern and the
special tokens.
"""

import argparse
from pathlib import Path

from nanochat.common import base_dir, run_script
from nanochat.hf_export import FORMATS, export
from nanochat.tokenizer import Tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.tok_export",
                                     description="Write the tokenizer for other libraries.")
    parser.add_argument("--format", default="huggingface", choices=FORMATS,
                        help="whose files to write (default: huggingface)")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="new, empty or with an earlier export (default: export/FORMAT in the base directory)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    folder = args.out or base_dir() / "export" / args.format
    for path in export(Tokenizer.load(base_dir() / "tokenizer"), folder, args.format):
        print(path)


if __name__ == "__main__":
    run_script(parse_args, main)
