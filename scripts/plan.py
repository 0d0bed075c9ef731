"""What a run will take, before renting: python3 -m scripts.plan --depth 20 --gpus 8 --gpu h100

Without --depth it prints every tier. Needs no installed package.
"""

import argparse
import signal

from nanochat.plan import (
    BATCH_TOKENS,
    CROPPED,
    GIB,
    SHARD_BYTES,
    TIERS,
    TOKENS_PER_PARAMETER,
    USABLE,
    Machine,
    Shape,
    known_gpus,
    memory_by_part,
    micro_batch,
    stages,
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
    parser.add_argument("--micro-batch", action="store_true", help="print only the rows that fit a GPU, for scripts")
    args = parser.parse_args(argv)
    if args.micro_batch and args.depth is None:
        parser.error("--micro-batch needs --depth")
    return args


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no mistake
    machine = Machine.of(args.gpu, args.gpus, args.memory_gib, args.dollars_per_gpu_hour)
    if args.micro_batch:
        print(micro_batch(Shape(args.depth), machine.gpus, machine.memory_gib))
    elif args.depth:
        print_plan(Shape(args.depth), machine)
    else:
        print_tiers(machine)


def print_tiers(machine: Machine) -> None:
    print(f"every tier on {describe(machine)}: projections, see --depth for what they follow from\n")
    print(f"{'tier':<6}{'parameters':>12}{'tokens':>9}{'FLOPs':>11}{'shards':>8}{'micro-batch':>13}"
          f"{'GiB/GPU':>9}{'hours':>8}{'dollars':>9}")
    for depth in TIERS:
        shape = Shape(depth)
        rows = micro_batch(shape, machine.gpus, machine.memory_gib)
        hours = total_hours(shape, machine)
        memory = sum(memory_by_part(shape, machine.gpus, rows).values()) / GIB
        print(f"d{depth:<5}{shape.parameters / 1e6:>11,.0f}M{shape.tokens / 1e9:>8.1f}B"
              f"{shape.tokens * shape.flops_per_token:>11.2e}{shape.shards:>8}{rows:>13}{memory:>9.0f}"
              f"{number(hours, '8.1f'):>8}{number(dollars(hours, machine), '9,.0f'):>9}")


def print_plan(shape: Shape, machine: Machine) -> None:
    rows = micro_batch(shape, machine.gpus, machine.memory_gib)
    steps = shape.tokens // BATCH_TOKENS
    print(f"d{shape.depth} on {describe(machine)}: a projection; what was measured says so\n")
    print(f"model        {shape.parameters:,} parameters: {shape.embedding / 1e6:.1f}M embedding, as many in the head, "
          f"{shape.matrices / 1e6:.1f}M in {shape.depth} layers of width {shape.width}")
    print(f"pretraining  {shape.tokens / 1e9:.2f}B tokens, {TOKENS_PER_PARAMETER} per parameter: {steps:,} steps of "
          f"{BATCH_TOKENS:,}; {shape.flops_per_token:.3e} FLOPs per token, "
          f"{shape.tokens * shape.flops_per_token:.2e} in all")
    print(f"data         {shape.shards} FineWeb-EDU shards, {shape.shards * SHARD_BYTES / 1e9:.0f} GB, "
          f"{CROPPED:.0%} of the tokens cropped by packing (assumed)")
    print(f"\nmemory of one GPU in pretraining, {rows} rows of {shape.context:,} at a time (estimate)")
    parts = memory_by_part(shape, machine.gpus, rows)
    for name, size in parts.items():
        print(f"  {name:<28}{size / GIB:>8.1f} GiB")
    total = sum(parts.values()) / GIB
    room = machine.memory_gib and USABLE * machine.memory_gib
    fits = "" if room is None else f" of {machine.memory_gib:g}" + ("" if total <= room else ": DOES NOT FIT")
    print(f"  {'in all':<28}{total:>8.1f} GiB{fits}")
    print(f"\n{'stage':<28}{'hours':>8}{'dollars':>9}   from")
    for stage in stages(shape, machine):
        print(f"{stage.name:<28}{number(stage.hours, '8.2f'):>8}"
              f"{number(dollars(stage.hours, machine), '9,.2f'):>9}   {stage.basis}")
    hours = total_hours(shape, machine)
    print(f"{'in all':<28}{number(hours, '8.2f'):>8}{number(dollars(hours, machine), '9,.2f'):>9}")
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
