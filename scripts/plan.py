"""What a run will take, before renting: python3 -m scripts.plan --depth 20 --gpus 8 --gpu h100

Without --depth it prints every tier. Needs no installed package.
"""

import argparse
import signal
import sys

from nanochat.plan import (
    BATCH_TOKENS,
    CROPPED,
    GIB,
    RL_BATCH_PROBLEMS,
    SFT_BATCH_ROWS,
    SFT_DEVICE_ROWS,
    SFT_TOLERANCE,
    SHARD_BYTES,
    TIERS,
    TOKENS_PER_PARAMETER,
    USABLE,
    Machine,
    Shape,
    known_gpus,
    memory_by_part,
    nearest_batch,
    pretraining_batch,
    stages,
    steps_of,
    total_hours,
)


def positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} above 0"  # argparse says: invalid "int above 0" value
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=positive(int), default=None, help="layers; default: every tier")
    parser.add_argument("--gpus", type=positive(int), default=8, help="GPUs in all; over 8 means several nodes")
    parser.add_argument("--gpu", default="h100", help="kind of GPU: " + ", ".join(g["name"] for g in known_gpus()))
    parser.add_argument("--memory-gib", type=positive(float), default=None, help="memory of one GPU")
    parser.add_argument("--dollars-per-gpu-hour", type=positive(float), default=None,
                        help="price of one GPU; default: nanochat's, where it has one")
    parser.add_argument("--batches", action="store_true",
                        help="print only, for scripts: rows of a GPU at a time and rows of a step, of pretraining then "
                        "of SFT, and problems of an RL step")
    parser.add_argument("--must-fit", action="store_true", help="end with an error when pretraining does not fit a GPU")
    args = parser.parse_args(argv)
    for flag, given in (("--batches", args.batches), ("--must-fit", args.must_fit)):
        if given and args.depth is None:
            parser.error(f"{flag} needs --depth")
    return args


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no mistake
    machine = Machine.of(args.gpu, args.gpus, args.memory_gib, args.dollars_per_gpu_hour)
    try:
        if args.batches:
            print_batches(Shape(args.depth), machine)
        elif args.depth:
            print_plan(Shape(args.depth), machine)
        else:
            print_tiers(machine)
        if args.must_fit:
            check_fit(Shape(args.depth), machine)
    except ValueError as error:  # nanochat's UserError would need what is not installed yet
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def print_batches(shape: Shape, machine: Machine) -> None:
    sft = nearest_batch(SFT_BATCH_ROWS, machine.gpus, SFT_DEVICE_ROWS, SFT_TOLERANCE)
    _, problems = nearest_batch(RL_BATCH_PROBLEMS, machine.gpus, 1, 0)
    print(*pretraining_batch(shape, machine), *sft, problems)


def needed_gib(shape: Shape, machine: Machine) -> float:
    rows, _ = pretraining_batch(shape, machine)
    return sum(memory_by_part(shape, machine.gpus, rows).values()) / GIB


def room_gib(machine: Machine) -> float:
    return float("inf") if machine.memory_gib is None else USABLE * machine.memory_gib


def check_fit(shape: Shape, machine: Machine) -> None:
    """Raise ValueError when pretraining needs more of a GPU than it has."""
    if needed_gib(shape, machine) > room_gib(machine):
        raise ValueError(f"d{shape.depth} must fit a GPU: pretraining needs {needed_gib(shape, machine):.1f} GiB "
                         f"(estimate), and {room_gib(machine):.1f} of {machine.memory_gib:g} can be used")


def print_tiers(machine: Machine) -> None:
    rows = {depth: pretraining_batch(Shape(depth), machine)[0] for depth in TIERS}
    print(f"every tier on {describe(machine)}: projections, see --depth for what they follow from\n")
    print(f"{'tier':<6}{'parameters':>12}{'tokens':>9}{'FLOPs':>11}{'shards':>8}{'micro-batch':>13}"
          f"{'GiB/GPU':>9}{'hours':>9}{'dollars':>12}")
    for depth in TIERS:
        shape = Shape(depth)
        hours, memory = total_hours(shape, machine), needed_gib(shape, machine)
        print(f"d{depth:<5}{shape.parameters / 1e6:>11,.0f}M{shape.tokens / 1e9:>8.1f}B"
              f"{shape.tokens * shape.flops_per_token:>11.2e}{shape.shards:>8}{rows[depth]:>13}"
              f"{memory:>9.0f} {number(hours, '.1f'):>8} {number(dollars(hours, machine), ',.0f'):>11}")


def print_plan(shape: Shape, machine: Machine) -> None:
    rows, step_rows = pretraining_batch(shape, machine)
    batch = step_rows * shape.context
    moved = "" if batch == BATCH_TOKENS else f" (nanochat's is {BATCH_TOKENS:,})"
    print(f"d{shape.depth} on {describe(machine)}: a projection; what was measured says so\n")
    print(f"model        {shape.parameters:,} parameters: {shape.embedding / 1e6:.1f}M embedding, as many in the head, "
          f"{shape.matrices / 1e6:.1f}M in {shape.depth} layers of width {shape.width}")
    print(f"pretraining  {shape.tokens / 1e9:.2f}B tokens, {TOKENS_PER_PARAMETER} per parameter: "
          f"{steps_of(shape, step_rows):,} steps of {batch:,}{moved}; {shape.flops_per_token:.3e} FLOPs per token, "
          f"{shape.tokens * shape.flops_per_token:.2e} in all")
    print(f"data         at least {shape.shards} FineWeb-EDU shards, {shape.shards * SHARD_BYTES / 1e9:.0f} GB, "
          f"{CROPPED:.0%} of the tokens cropped by packing (assumed)")
    print(f"\nmemory of one GPU in pretraining, {rows} rows of {shape.context:,} at a time (estimate)")
    parts = memory_by_part(shape, machine.gpus, rows)
    for name, size in parts.items():
        print(f"  {name:<28}{size / GIB:>8.1f} GiB")
    total = needed_gib(shape, machine)
    fits = "" if machine.memory_gib is None else f" of {machine.memory_gib:g}"
    fits += ": DOES NOT FIT" if total > room_gib(machine) else ""
    print(f"  {'in all':<28}{total:>8.1f} GiB{fits}")
    print(f"\n{'stage':<28}{'hours':>9}{'dollars':>12}   from")
    for stage in stages(shape, machine):
        print(f"{stage.name:<28} {number(stage.hours, '.2f'):>8}"
              f" {number(dollars(stage.hours, machine), ',.2f'):>11}   {stage.basis}")
    hours = total_hours(shape, machine)
    print(f"{'in all':<28} {number(hours, '.2f'):>8} {number(dollars(hours, machine), ',.2f'):>11}")
    print("\nnot in these hours: validation within mid-training and SFT, checkpoints, start-up and compilation")
    if machine.gpus > 8:
        print(f"\n{machine.gpus} GPUs are {-(-machine.gpus // 8)} nodes of 8: the traffic between them is not in these "
              "hours, see docs/scaling.md")


def describe(machine: Machine) -> str:
    memory = "unknown memory" if machine.memory_gib is None else f"{machine.memory_gib:g} GiB"
    price = ("no known price" if machine.dollars_per_hour is None
             else f"${machine.dollars_per_hour:.2f} per GPU-hour")
    return f"{machine.gpus}x {machine.kind} ({memory}, {price})"


def dollars(hours: float | None, machine: Machine) -> float | None:
    return None if None in (hours, machine.dollars_per_hour) else hours * machine.gpus * machine.dollars_per_hour


def number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


if __name__ == "__main__":
    main(parse_args())
