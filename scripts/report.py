"""Keep and render the report of a run: python -m scripts.report reset|time|generate"""

import argparse
from pathlib import Path

from nanochat.common import print0, run_script
from nanochat.report import Report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    reset = commands.add_parser("reset", help="start an empty report; the old one becomes report.previous")
    reset.add_argument("--preset", default=None, help="the preset of the run that starts, such as tiny or d20")
    time = commands.add_parser("time", help="note the wall-clock of a stage that ended just now")
    time.add_argument("--stage", required=True, help="name of the stage")
    time.add_argument("--seconds", type=float, required=True, help="how long it took")
    generate = commands.add_parser("generate", help="render report.md from what the stages wrote so far")
    generate.add_argument("--preset", default=None, help="the preset of the run; default: the one given to reset")
    generate.add_argument("--copy-to", type=Path, default=Path("."),
                          help="folder that gets report.md, with the figures in report/ (default: here)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    report = Report()
    if args.command == "reset":
        report.reset(args.preset)
    elif args.command == "time":
        report.time(args.stage, args.seconds)
    else:
        path = report.generate(preset=args.preset, copy_to=args.copy_to)
        print0(f"report: {path}, copied to {args.copy_to / 'report.md'}")


if __name__ == "__main__":
    run_script(parse_args, main)
