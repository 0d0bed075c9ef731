"""Serve a trained model in the browser and to OpenAI's clients.

    python -m scripts.chat_web                                  # then open the address it prints
    python -m scripts.chat_web --host 0.0.0.0 --token SECRET    # for other machines, which must send the token
"""

import argparse
import ipaddress
import os
from functools import partial

import torch

from nanochat.common import UserError, pick_device, run_script
from nanochat.engine import Engine
from nanochat.engine.flags import add_engine_flags, engine_options
from nanochat.engine.tools import TOOLS
from nanochat.flags import count as whole
from nanochat.flags import fraction, positive_float, positive_int, rate
from nanochat.load import add_checkpoint_flags, add_device_flags, load_model
from nanochat.server import Defaults, Settings, create_app
from nanochat.server.serve import listen, serve
from scripts.chat_cli import CHAT_STAGES, newest_stage


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a trained model in the browser and to OpenAI's clients.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; one that others reach needs a token")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at, 0: any that is free")
    parser.add_argument("--token", default=os.environ.get("NANOCHAT_TOKEN"),
                        help="what clients must send as `Authorization: Bearer ...`; default: $NANOCHAT_TOKEN")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="a name besides localhost under which clients may ask; may be repeated")
    parser.add_argument("--stage", default="auto", choices=[*CHAT_STAGES, "base", "auto"],
                        help=f"whose checkpoint; auto is the newest of {', '.join(CHAT_STAGES)}")
    add_checkpoint_flags(parser)
    add_device_flags(parser)
    add_engine_flags(parser)
    parser.add_argument("--tools", default="calculator", choices=TOOLS, help="what answers the model's calls")
    parser.add_argument("--max-batch", type=positive_int, default=64, help="most answers computed at once, per GPU")
    parser.add_argument("--queue", type=positive_int, default=64, help="most requests waiting; more get a 429")
    parser.add_argument("--queue-timeout", type=positive_float, default=30.0, help="seconds a request may wait")
    parser.add_argument("--log-text", action="store_true", help="log what is said; by default only counts and times")
    for name, kind, what in (("temperature", rate, "0 always takes the likeliest token"),
                             ("top-k", whole, "draw among the k likeliest tokens, 0: among all"),
                             ("top-p", fraction, "draw among the fewest that reach this probability"),
                             ("min-p", fraction, "draw among those with this share of the likeliest's"),
                             ("max-tokens", positive_int, "most tokens of an answer, as far as the context has room")):
        default = getattr(Defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default,
                            help=f"where a request does not say: {what} (default {default})")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    check_access(args.host, args.token)
    stage = newest_stage(args.depth) if args.stage == "auto" else args.stage
    defaults = Defaults(args.temperature, args.top_k, args.top_p, args.min_p, args.max_tokens)
    names = frozenset(name.lower() for name in (*args.allow_host, args.host))
    settings = Settings(token=args.token, allowed_hosts=names, queue=args.queue, queue_timeout=args.queue_timeout,
                        log_text=args.log_text, defaults=defaults)
    app = create_app([partial(make_engine, stage, device, args) for device in devices(args.device)], settings)
    with listen(args.host, args.port) as listener:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"stage {stage} at http://{host}:{listener.getsockname()[1]}", flush=True)
        serve(app, listener)


def check_access(host: str, token: str | None) -> None:
    """Raise UserError when other machines could use the server without a token, or the token cannot be sent."""
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise UserError("--token must be printable ASCII without spaces around it")
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = False
    if not own and token is None:
        raise UserError(f"--host {host} lets other machines in, so it needs --token or NANOCHAT_TOKEN")


def devices(name: str) -> list[str]:
    """Return the devices to put an engine on: every GPU when the user leaves the choice to us."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(device)]


def make_engine(stage: str, device: str, args: argparse.Namespace) -> Engine:
    """Load the checkpoint; runs in the engine's thread, whose current GPU is then the model's."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # A core for the event loop: threads that must share one spin, and the tiny model drops from 30 to 11 tokens/s.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    model, tokenizer, _ = load_model(stage, device=device, kernels=args.kernels, dtype=args.dtype, depth=args.depth,
                                     step=args.step)
    return Engine(model, tokenizer, tools=args.tools, max_batch=args.max_batch, **engine_options(args))


if __name__ == "__main__":
    run_script(parse_args, main)
