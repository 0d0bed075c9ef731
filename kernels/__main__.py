"""Print which backend of which op runs here: python -m kernels [--json] [--device cuda]."""

import argparse
import json
import sys

import torch

from kernels.device import device_name
from kernels.registry import BACKENDS, OPS, KernelConfig, KernelError, resolve, why_not

COMPUTE_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def table(device: torch.device) -> list[dict]:
    """Return a row per op and backend: op, backend, why_not (None = available), auto (what `auto` takes)."""
    dtype = COMPUTE_DTYPE[device.type]
    taken = resolve(KernelConfig.parse("auto"), device, dtype).names
    return [{"op": op, "backend": name, "why_not": why_not(backend, device, dtype), "auto": taken.get(op) == name}
            for op in OPS for name, backend in BACKENDS[op].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--device", choices=COMPUTE_DTYPE, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA GPU that torch can see, found none", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device(args.device)
    rows = table(device)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{device_name(device)}, {COMPUTE_DTYPE[device.type]}; * marks what --kernels auto takes")
    width = max(len(row["op"]) for row in rows)
    for row in rows:
        mark = "*" if row["auto"] else " "
        print(f"{mark} {row['op']:<{width}}  {row['backend']:<8} {row['why_not'] or 'available'}")


if __name__ == "__main__":
    try:
        main()
    except KernelError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
