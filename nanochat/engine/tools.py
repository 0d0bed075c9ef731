"""Reads a completion as it grows: what is visible text, and when the model asks for the calculator.

`<|python_start|>37+85<|python_end|>` asks; the answer `<|output_start|>122<|output_end|>` is forced upon the model.
A refused expression forces nothing and the model goes on, as in nanochat (Nov 2025). What stands inside either span
is not for the reader, whether the tool runs or not.
"""

from nanochat.calculator import calculate


class Transcript:
    """Follows one completion token by token.

    events: ("text", str) and ("tool", expression, result or None) in order; calls: [(expression, result or None)].
    """

    def __init__(self, tokenizer, tools: str = "calculator"):
        self.events: list[tuple] = []
        self.calls: list[tuple[str, str | None]] = []
        self._tokenizer, self._tools = tokenizer, tools
        self._decoder = tokenizer.stream_decoder()
        self._inside = None  # the span we are in: None, "python" or "output"
        self._expression: list[int] = []
        names = ("python_start", "python_end", "output_start", "output_end")
        self._marks = {tokenizer.special_id(f"<|{name}|>"): name for name in names}

    @property
    def text(self) -> str:
        return "".join(event[1] for event in self.events if event[0] == "text")

    def push(self, token: int) -> list[int]:
        """Take the next token; return the tokens to force after it, mostly none."""
        mark = self._marks.get(token)
        if mark is None:
            if self._inside == "python":
                self._expression.append(token)
            elif self._inside is None:
                self._say(self._decoder.push(token))
            return []
        self.finish()
        if mark == "python_end" and self._inside == "python":
            self._inside = None
            return self._answer() if self._tools == "calculator" else []
        self._inside = {"python_start": "python", "output_start": "output"}.get(mark)
        self._expression = []
        return []

    def finish(self) -> None:
        """Give out what the decoder holds back of an unfinished character."""
        self._say(self._decoder.flush())

    def _say(self, text: str) -> None:
        if text:
            self.events.append(("text", text))

    def _answer(self) -> list[int]:
        expression = self._tokenizer.decode(self._expression)
        result = calculate(expression)
        self.calls.append((expression, result))
        self.events.append(("tool", expression, result))
        if result is None:
            return []
        start, end = (self._tokenizer.special_id(f"<|output_{edge}|>") for edge in ("start", "end"))
        return [start, *self._tokenizer.encode(result), end]
