"""Chat with a trained model in the terminal, or answer one prompt and leave.

    python -m scripts.chat_cli                                  # /clear starts over, /quit leaves
    python -m scripts.chat_cli -p "What is 37 plus 85?"         # the answer alone on stdout
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator

from nanochat.checkpoint import find_checkpoint
from nanochat.common import UserError, base_dir, run_script
from nanochat.engine import Engine, SamplingParams
from nanochat.engine.flags import add_engine_flags, engine_options
from nanochat.engine.tools import TOOLS
from nanochat.load import add_checkpoint_flags, add_device_flags, load_model, stage_folder

CHAT_STAGES = ("rl", "sft", "mid")  # newest first


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a trained model.")
    parser.add_argument("-p", "--prompt", default=None, help="answer this one prompt and exit")
    parser.add_argument("--stage", default="sft", choices=[*CHAT_STAGES, "base", "auto"],
                        help="whose checkpoint; auto is the newest of rl, sft, mid; base continues the text as it is")
    add_checkpoint_flags(parser)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest tokens, 0: among all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the fewest that reach this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="draw among those with this share of the likeliest's")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same conversation, same answers")
    parser.add_argument("--tools", default="calculator", choices=TOOLS,
                        help="who answers the model's calls; python runs in the sandbox what the calculator refuses")
    parser.add_argument("--allow-weak-sandbox", action="store_true",
                        help="run them even where the sandbox is below level 3 (python -m nanochat.sandbox --probe)")
    parser.add_argument("--show-tools", action=argparse.BooleanOptionalAction, default=True,
                        help="show calls as [37+85 -> 122]; with --prompt they go to stderr")
    add_engine_flags(parser)
    add_device_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    params = SamplingParams(args.max_tokens, args.temperature, args.top_k or None, args.seed, top_p=args.top_p,
                            min_p=args.min_p)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        stage = newest_stage(args.depth) if args.stage == "auto" else args.stage
        model, tokenizer, state = load_model(stage, device=args.device, kernels=args.kernels, dtype=args.dtype,
                                             depth=args.depth, step=args.step)
    engine = Engine(model, tokenizer, tools=args.tools, allow_weak_sandbox=args.allow_weak_sandbox, max_batch=1,
                    **engine_options(args))
    chat = Chat(engine, params, plain=stage == "base")
    if args.prompt is not None:
        answer_once(chat, args.prompt, args.show_tools)
    else:
        print(f"{stage} model of {model.config.n_layer} layers, step {state['step']}, context "
              f"{engine.context} tokens. /clear starts over, /quit leaves.")
        converse(chat, args.show_tools)


def newest_stage(depth: int | None) -> str:
    """Return the last chat stage of the recipe that has a checkpoint. Raises UserError when none has."""
    for stage in CHAT_STAGES:
        with contextlib.suppress(UserError):  # no folder of this stage
            if find_checkpoint(stage_folder(stage, depth)) is not None:
                return stage
    raise UserError(f"--stage auto needs a checkpoint of {', '.join(CHAT_STAGES)} in {base_dir() / 'checkpoints'}, "
                    "found none; run `bash speedrun.sh` first")


class Chat:
    """A conversation as the token ids of its turns, each from <|user_start|> to <|assistant_end|>.

    plain: no turns; every text is continued as a document of its own, as a base model expects.
    """

    def __init__(self, engine: Engine, params: SamplingParams, plain: bool = False):
        self.engine, self.params, self.plain = engine, params, plain
        self.turns: list[list[int]] = []

    def clear(self) -> None:
        self.turns = []

    def reply(self, text: str) -> Iterator[tuple]:
        """Yield the engine's events for the next answer, after ("note", str) when old turns had to go.

        What was said is remembered, also when the caller stops early. Raises UserError for a prompt too long.
        """
        said = self._render(text)
        dropped = self._make_room(len(said))
        if dropped:
            them, fit, are = ("turn", "fits", "is") if dropped == 1 else (f"{dropped} turns", "fit", "are")
            yield "note", (f"the oldest {them} no longer {fit} the context of {self.engine.context} tokens "
                           f"and {are} forgotten")
        prompt = [self.engine.tokenizer.bos_id, *(id for turn in self.turns for id in turn), *said]
        request = self.engine.submit(prompt, self.params)
        try:
            for _, event in self.engine.events(request):
                if event == ("finish", "error"):
                    raise UserError(request.rows[0].error)
                yield event
        finally:
            self.engine.abort(request)
            (completion,) = request.completions()
            if not self.plain and not completion.error:
                end = self.engine.tokenizer.special_id("<|assistant_end|>")
                self.turns.append([*said, *completion.ids, end])

    def _render(self, text: str) -> list[int]:
        """Return the ids that ask for the next answer, without the leading <|bos|>."""
        tokenizer, context = self.engine.tokenizer, self.engine.context
        if self.plain:
            said = tokenizer.encode(text)
        else:
            said = tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})[1:]
        if 1 + len(said) >= context:
            raise UserError(f"a prompt must leave room for an answer in the context of {context} tokens, "
                            f"got {1 + len(said)}")
        return said

    def _make_room(self, said: int) -> int:
        """Forget the oldest turns until a quarter of the context, or max_tokens, is left; return how many went."""
        answer = min(self.params.max_tokens, self.engine.context // 4)
        before = len(self.turns)
        while self.turns and 1 + sum(map(len, self.turns)) + said + answer > self.engine.context:
            self.turns.pop(0)
        return before - len(self.turns)


def answer_once(chat: Chat, prompt: str, show_tools: bool) -> None:
    """Print the answer on stdout; what else there is to say goes to stderr once it is complete."""
    asides = []
    for kind, *values in chat.reply(prompt):
        if kind == "text":
            print(values[0], end="", flush=True)
        else:
            asides.append(aside(chat, kind, values, show_tools))
    print()
    for line in filter(None, asides):
        print(line.strip(), file=sys.stderr)


def converse(chat: Chat, show_tools: bool) -> None:
    """Read prompts until /quit or end of input. Ctrl-C ends an answer; at the prompt it ends the program."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 must not end the chat
    while True:
        try:
            text = input("\nyou: ").strip()
        except EOFError:
            return print()
        if text in ("/quit", "/exit"):
            return
        if text == "/clear":
            chat.clear()
            print("(a new conversation)")
        elif text.startswith("/"):
            print(f"(unknown command {text}; /clear starts over, /quit leaves)")
        elif text:
            print_reply(chat, text, show_tools)


def print_reply(chat: Chat, text: str, show_tools: bool) -> None:
    print("model: ", end="", flush=True)
    try:
        for kind, *values in chat.reply(text):
            print(values[0] if kind == "text" else aside(chat, kind, values, show_tools), end="", flush=True)
        print()
    except UserError as error:
        print(f"error: {error}")
    except KeyboardInterrupt:
        print(" (interrupted)")


def aside(chat: Chat, kind: str, values: list, show_tools: bool) -> str:
    """Return what to show for an event that is not text, "" for nothing."""
    if kind == "tool":
        expression, result = values
        return f"[{expression} -> {'refused' if result is None else result}]" if show_tools else ""
    if kind == "note":
        return f"({values[0]}) "
    limits = {"length": f"--max-tokens {chat.params.max_tokens}", "context": f"the context of {chat.engine.context}"}
    return f" (cut off by {limits[values[0]]})" if values[0] in limits else ""


if __name__ == "__main__":
    run_script(parse_args, main)
