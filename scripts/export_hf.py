"""Write a trained model for transformers, vLLM and SGLang: python -m scripts.export_hf sft my-model

The folder holds safetensors, config.json, generation_config.json, the tokenizer with its chat template and a model card
with the scores of the run's report, if they are of this checkpoint.
"""

import argparse
import json
from pathlib import Path

from nanochat import flags
from nanochat.common import print0, run_script
from nanochat.gpt import GPTConfig
from nanochat.hf_model import DTYPES, export_model, model_card
from nanochat.load import STAGES, add_checkpoint_flags, read_stage
from nanochat.report import Report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.export_hf",
                                     description="Write a trained model for transformers, vLLM and SGLang.")
    parser.add_argument("stage", choices=STAGES, help="whose checkpoint")
    parser.add_argument("folder", type=Path, help="new or empty")
    add_checkpoint_flags(parser)
    parser.add_argument("--dtype", default="float32", choices=DTYPES,
                        help="of the weights; float32 is exact, bfloat16 half as large")
    parser.add_argument("--shard-gb", type=flags.positive_float, default=5.0, help="largest file of weights, in GB")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    tensors, state, tokenizer = read_stage(args.stage, depth=args.depth, step=args.step)
    config = GPTConfig(**state["model_config"])
    origin = f"Stage {args.stage}, step {state['step']}, weights in {args.dtype}."
    card = model_card(args.folder.resolve().name, config, origin, _scores(args.stage, state["step"]),
                      chats=args.stage != "base")
    for path in export_model(tensors, config, tokenizer, args.folder, card, dtype=args.dtype,
                             shard_bytes=int(args.shard_gb * 1e9)):
        print0(path)


def _scores(stage: str, step: int) -> dict[str, float]:
    """Return the report's scores of a stage; none when the run was not evaluated, or at another step."""
    folder = Report().folder
    try:
        evaluation = json.loads((folder / f"section_{stage}-evaluation.json").read_text(encoding="utf-8"))
        scores = json.loads((folder / f"scores_{stage}.json").read_text(encoding="utf-8"))
        evaluated = evaluation["data"]["Step"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        print0(f"note: the scores in {folder} cannot be read ({error}), the card goes without")
        return {}
    if evaluated != step:
        print0(f"note: the report's scores are of step {evaluated}, the card goes without")
        return {}
    return {task: value for task, value in scores.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    run_script(parse_args, main)
