"""Reads a completion as it grows - what is visible text, where a stop string ends it, when the model asks for a tool -
and answers the model's calls.

`<|python_start|>37+85<|python_end|>` asks; the answer `<|output_start|>122<|output_end|>` is forced upon the model.
A refused expression forces nothing and the model goes on, as in nanochat (Nov 2025). What stands inside either span
is not for the reader, whether the tool runs or not.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS

TOOLS = ("calculator", "python", "off")
SANDBOX_LEVEL = 3  # the least at which model-written code is run
TOOL_SECONDS = 5.0
MAX_RESULT_CHARS = 256  # of a program's output; the calculator's results have 64 at most
MAX_CALLS = 4  # programs at once

# As at the interactive prompt: an expression prints its value, anything else is run.
PROGRAM = """\
source = {source!r}
try:
    code = compile(source, "<tool>", "eval")
except SyntaxError:
    exec(compile(source, "<tool>", "exec"), {{"__name__": "__main__"}})
else:
    value = eval(code, {{"__name__": "__main__"}})
    if value is not None:
        print(value)
"""


class Transcript:
    """Follows one completion token by token.

    events, in order: ("token", *details) where `push` got details and the token is text, ("text", str),
    ("tool", expression, result or None) and at last ("finish", reason). Text that may become one of the `stop` strings
    is held back, with all events behind it, until it is clear; a stop string is searched in visible text alone.
    stopped_by: the one that was found; nothing behind it is told.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.events: list[tuple] = []
        self.stopped_by: str | None = None
        self._tokenizer, self._stop = tokenizer, stop
        self._longest_tail = max(map(len, stop), default=1) - 1
        self._decoder = tokenizer.stream_decoder()
        self._inside = None  # the span we are in: None, "python" or "output"
        self._expression: list[int] = []
        self._specials = {tokenizer.special_id(name): name for name in SPECIAL_TOKENS}
        self._held = ""  # visible text not given out yet
        self._given = 0  # characters that were
        self._later: deque[tuple[int, tuple]] = deque()  # (characters before it, event)

    @property
    def text(self) -> str:
        return "".join(event[1] for event in self.events if event[0] == "text")

    @property
    def calls(self) -> list[tuple[str, str | None]]:
        return [event[1:] for event in self.events if event[0] == "tool"]

    def push(self, token: int, details: tuple = ()) -> str | None:
        """Take the next token; return the expression when it closes a call."""
        mark = self._specials.get(token)
        if mark not in ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"):
            if self._inside == "python":
                self._expression.append(token)
            elif self._inside is None:
                self._say(self._decoder.push(token), ("token", *details) if details and mark is None else None)
            return None
        self._say(self._decoder.flush())
        expression, self._expression = self._expression, []
        called = mark == "<|python_end|>" and self._inside == "python"
        self._inside = {"<|python_start|>": "python", "<|output_start|>": "output"}.get(mark)
        return self._tokenizer.decode(expression) if called else None

    def answer(self, expression: str, result: str | None) -> list[int]:
        """Note a call's result; return the tokens to force, none when it was refused."""
        self._say("", ("tool", expression, result))
        if result is None:
            return []
        start, end = (self._tokenizer.special_id(f"<|output_{edge}|>") for edge in ("start", "end"))
        return [start, *self._tokenizer.encode(result), end]

    def finish(self, reason: str) -> None:
        """Give out what is held back, an unfinished character too."""
        self._say(self._decoder.flush())
        self._give(len(self._held))
        self.events.append(("finish", reason))

    def _say(self, text: str, event: tuple | None = None) -> None:
        """Add visible text, behind `event` if there is one, and give out what cannot be part of a stop string."""
        if self.stopped_by is not None:
            return
        if event is not None:
            self._later.append((self._given + len(self._held), event))
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            _, cut, self.stopped_by = min(found)  # what ends first, however the text is cut into tokens
            self._held, end = self._held[:cut], self._given + cut
            self._later = deque((at, event) for at, event in self._later
                                if at < end or (at == end and event[0] == "tool"))  # a token at the end begins the stop
            self._give(cut)
        else:
            self._give(len(self._held) - self._tail())

    def _tail(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        lengths = range(min(self._longest_tail, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)

    def _give(self, n: int) -> None:
        """Give out n characters of what is held, and the events that stand before or between them."""
        end, everything = self._given + n, n == len(self._held)
        while self._later and (self._later[0][0] < end or everything):
            at, event = self._later.popleft()
            self._text(at - self._given)
            self.events.append(event)
        self._text(end - self._given)

    def _text(self, n: int) -> None:
        if n:
            self.events.append(("text", self._held[:n]))
            self._held, self._given = self._held[n:], self._given + n


class Toolbox:
    """Answers calls: arithmetic at once, and with mode "python" what the calculator refuses in the sandbox.

    Raises UserError for an unknown mode, and for "python" on a machine whose sandbox is weaker than level 3 unless
    `allow_weak_sandbox`.
    """

    def __init__(self, mode: str = "calculator", allow_weak_sandbox: bool = False):
        if mode not in TOOLS:
            raise UserError(f"tools must be one of {', '.join(TOOLS)}, got {mode!r}")
        self.mode = mode
        self._workers: ThreadPoolExecutor | None = None
        if mode == "python":
            from nanochat.sandbox import level  # probes the machine
            if level() < SANDBOX_LEVEL and not allow_weak_sandbox:
                raise UserError(f"tools python needs a sandbox of level {SANDBOX_LEVEL}, this machine has level "
                                f"{level()} (see python -m nanochat.sandbox --probe): allow the weak one or take "
                                "tools calculator")
            self._workers = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="tool")

    def call(self, expression: str) -> str | None | Future:
        """Return the result, None when the expression is refused, or a future of either."""
        result = calculate(expression) if self.mode != "off" else None
        if result is not None or self._workers is None:
            return result
        return self._workers.submit(run_program, expression)


def run_program(source: str) -> str | None:
    """Run untrusted Python in the sandbox -> what it printed, cut to 256 characters; None if it failed or was mute."""
    from nanochat.sandbox import Limits, run
    result = run(PROGRAM.format(source=source), limits=Limits(seconds=TOOL_SECONDS))
    said = result.stdout.strip()[:MAX_RESULT_CHARS]
    return said if said and result.ended == "exit" and result.code == 0 else None
