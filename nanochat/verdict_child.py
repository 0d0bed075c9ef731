"""Text that both children of a verdict run (nanochat/verdict.py); it is read as a file there, the children import
nothing of ours.

`serve` runs in the untrusted child A, which knows neither test nor answers; `check` in the trusted child B, which sees
of A only plain values decoded from JSON. A line of JSON is one message over descriptor 3.
"""

import builtins
import json
import sys

MAX_MESSAGE = 64 * 2**20  # characters of one answer; B's memory limit holds the rest


def encode(value) -> list:
    """Return `value` as nested JSON lists, each [tag, ...]; a subclass counts as the builtin type it extends.

    Carries None, bool, int, float (bit for bit), complex, str, bytes, list, tuple, set, frozenset, dict, range and
    iterators (read to their end). TypeError for anything else.
    """
    if value is None:
        return ["none"]
    match value:
        case bool():
            return ["bool", bool(value)]
        case int():
            return ["int", hex(int(value))]  # of any length: decimal digits are limited to 4,300
        case float():
            return ["float", float.hex(value)]
        case complex():
            return ["complex", value.real.hex(), value.imag.hex()]
        case str():
            return ["str", str.__str__(value)]
        case bytes() | bytearray():
            return [_base(value), value.hex()]
        case range():
            return ["range", value.start, value.stop, value.step]
        case dict():
            return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
        case list() | tuple() | set() | frozenset():
            return [_base(value), [encode(item) for item in value]]
    if hasattr(type(value), "__next__"):
        return ["iterator", [encode(item) for item in value]]
    raise TypeError(f"a value of type {type(value).__name__} cannot be sent between processes")


def _base(value) -> str:
    return next(kind.__name__ for kind in (bytes, bytearray, list, tuple, set, frozenset) if isinstance(value, kind))


def decode(message):
    """Return the value of which `message` is the encoding. Raises on anything that is not one; runs nothing of it."""
    tag, *fields = message
    match tag:
        case "none":
            return None
        case "bool" | "str" | "range":
            return {"bool": bool, "str": str, "range": range}[tag](*fields)
        case "int":
            return int(fields[0], 16)
        case "float":
            return float.fromhex(fields[0])
        case "complex":
            return complex(*map(float.fromhex, fields))
        case "bytes" | "bytearray":
            return getattr(builtins, tag).fromhex(fields[0])
        case "dict":
            return {decode(key): decode(item) for key, item in fields[0]}
        case "list" | "tuple" | "set" | "frozenset":
            return getattr(builtins, tag)([decode(item) for item in fields[0]])
        case "iterator":
            return iter([decode(item) for item in fields[0]])
    raise ValueError(f"unknown tag {tag!r}")


class Channel:
    """Messages over descriptor 3."""

    def __init__(self):
        self.reader, self.writer = open(3, "rb", closefd=False), open(3, "wb", closefd=False)

    def send(self, message) -> None:
        self.writer.write(json.dumps(message).encode("ascii") + b"\n")
        self.writer.flush()

    def receive(self):
        """Return the next message. EOFError when the other side is gone or says more than MAX_MESSAGE."""
        line = self.reader.readline(MAX_MESSAGE)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


# --- A, untrusted -----------------------------------------------------------------------------------


def serve(program: str, entry_point: str) -> None:
    """Execute `program`, then answer calls of its function `entry_point` until the other side closes."""
    channel = Channel()
    module = type(sys)("program")  # not __main__: what stands under such a guard is not for a test
    sys.modules["program"] = module

    def answer(work) -> None:
        try:
            reply = ["value", work()]
        except BaseException as error:
            reply = ["raised", type(error).__name__, str(error)[:200]]
        channel.send(reply)

    def load() -> list:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        if not callable(getattr(module, entry_point)):
            raise TypeError(f"{entry_point} is not a function")
        return encode(None)

    answer(load)
    while True:
        try:
            arguments, named = decode(channel.receive())
        except EOFError:
            return
        answer(lambda: encode(getattr(module, entry_point)(*arguments, **named)))


# --- B, trusted -------------------------------------------------------------------------------------


class Unsendable(Exception):
    """The test calls the candidate with a value that only its own process can hold."""


class Candidate:
    """The function in A, called by value."""

    def __init__(self):
        self.channel, self.raised = Channel(), None

    def __call__(self, *arguments, **named):
        try:
            message = encode((arguments, named))
        except TypeError as error:
            raise Unsendable(str(error)) from None
        self.channel.send(message)
        return self.answer()

    def answer(self):
        """Return or raise what A says that its work gave."""
        kind, *fields = self.channel.receive()
        if kind == "value":
            return decode(*fields)
        name, text = map(str, fields)
        self.raised = f"the program raised {name}: {text}"
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            raise kind(text)
        raise RuntimeError(text)


PASSED, FAILED, GONE, UNSENDABLE, BROKEN = CODES = range(10, 15)  # how B exits; an interpreter's own codes are lower


def check(prompt: str, test: str, entry_point: str) -> None:
    """Judge the program in A by `test`, whose check(candidate) may use the names that `prompt` defines. Exits with
    one of the codes above, the reason printed last."""
    space = {"__name__": "test"}
    try:
        exec(compile(prompt, "<prompt>", "exec"), space)
        exec(compile(test, "<test>", "exec"), space)
        judge = space["check"]
    except Exception as error:
        leave(BROKEN, f"the problem's own text raised {error!r}")
    candidate = space[entry_point] = Candidate()  # tests call it by name as well
    try:
        candidate.answer()  # to loading the program
        judge(candidate)
    except (EOFError, ConnectionError):
        leave(GONE, "the program ended before its test")
    except Unsendable as error:
        leave(UNSENDABLE, str(error))
    except Exception as error:
        leave(FAILED, candidate.raised or f"{type(error).__name__}: {error}")
    leave(PASSED, "passed")


def leave(code: int, reason: str) -> None:
    print("\n" + json.dumps(reason[:300]), flush=True)
    sys.exit(code)


# --- where values cannot travel ---------------------------------------------------------------------


def run_together(program: str, test: str, entry_point: str, token: str) -> None:
    """Run program and test in one process and print `token` at the end, which the program could find and print too."""
    space = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), space)
    exec(compile(test, "<test>", "exec"), space)
    space["check"](space[entry_point])
    print("\n" + token)
