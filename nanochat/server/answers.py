"""From the engine's events to OpenAI's JSON: whole answers, and chunks of Server-Sent Events."""

import json
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator

from nanochat.server.errors import ApiError
from nanochat.server.job import Job

FINISH = {"stop": "stop", "length": "length", "context": "length"}
BROKEN = {"timeout": ("the request took longer than the server allows", "timeout"),
          "abort": ("the request was cancelled", "cancelled"),
          "error": ("the model gave numbers that are not finite, so there is no answer", "engine_error")}
LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Answer:
    """One answer on its way to a client.

    seed: the one drawn or given. include_usage: send the token counts in a last chunk of their own.
    """

    id_prefix = kind = chunk_kind = ""

    def __init__(self, job: Job, tokenizer, model: str, include_usage: bool):
        self.job, self.tokenizer, self.include_usage = job, tokenizer, include_usage
        self.head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    # --- what the two APIs differ in ---

    def opening(self, index: int) -> dict | None:
        """Return the choice of the chunk that comes before all text."""

    def piece(self, index: int, text: str, tokens: list[tuple]) -> dict:
        """Return the choice of a chunk with text."""
        raise NotImplementedError

    def tool_call(self, index: int, call: dict) -> dict:
        """Return the choice of a chunk with a tool call that has been answered."""
        raise NotImplementedError

    def closing(self, index: int, reason: str) -> dict:
        """Return the choice of the chunk after all text."""
        raise NotImplementedError

    def choice(self, index: int, reason: str, pieces: list[tuple[str, list]], calls: list[dict]) -> dict:
        """Return a whole choice."""
        raise NotImplementedError

    # --- what they share ---

    async def whole(self) -> dict:
        """Return the complete answer. Raises ApiError when a choice cannot be completed."""
        pieces, calls, reasons = defaultdict(list), defaultdict(list), {}
        async for index, kind, value in self._events():
            if kind == "piece":
                pieces[index].append(value)
            elif kind == "tool":
                calls[index].append(value)
            else:
                reasons[index] = value
        choices = [self.choice(i, reasons[i], pieces[i], calls[i]) for i in range(self.job.choices)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage(), **self.extras()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer as Server-Sent Events; a failure becomes an error event. [DONE] comes last, always."""
        try:
            for index in range(self.job.choices):
                if choice := self.opening(index):
                    yield self._chunk(choice, **({} if index else {"seed": self.job.params.seed}))
            async for index, kind, value in self._events():
                if kind == "piece":
                    yield self._chunk(self.piece(index, *value))
                elif kind == "tool":
                    yield self._chunk(self.tool_call(index, value))
                else:
                    last = self.job.completions and not self.include_usage
                    yield self._chunk(self.closing(index, value), **(self.extras() if last else {}))
            if self.include_usage:
                yield _event({**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage(),
                              **self.extras()})
        except ApiError as error:
            yield _event(error.body())
        yield b"data: [DONE]\n\n"

    def _chunk(self, choice: dict, **extras) -> bytes:
        usage = {"usage": None} if self.include_usage else {}
        return _event({**self.head, "object": self.chunk_kind, "choices": [choice], **usage, **extras})

    async def _events(self) -> AsyncIterator[tuple]:
        """Yield (choice, "piece", (text, tokens)), (choice, "tool", call) and (choice, "finish", reason)."""
        tokens = defaultdict(list)
        async for index, (kind, *values) in self.job:
            if kind == "token":
                tokens[index].append(values)
            elif kind == "text":
                yield index, "piece", (values[0], tokens.pop(index, []))
            elif kind == "tool":
                yield index, "tool", {"input": values[0], "output": values[1]}
            else:
                if left := tokens.pop(index, []):
                    yield index, "piece", ("", left)
                if values[0] in BROKEN:
                    raise ApiError(503, *BROKEN[values[0]])
                yield index, "finish", FINISH[values[0]]

    def usage(self) -> dict:
        """Return the token counts: each prompt once, completions with what tools said."""
        completions = self.job.completions
        prompts = completions[::self.job.params.n]
        prompt, completion = sum(c.prompt_tokens for c in prompts), sum(c.completion_tokens for c in completions)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in prompts)}}

    def extras(self) -> dict:
        """Return what OpenAI does not send: the seed and the timings, under llama.cpp's names."""
        return {"seed": self.job.params.seed, "timings": timings(self.job)}

    # --- log-probabilities ---

    def token(self, id: int, logprob: float) -> dict:
        """Return a token as chat answers show it."""
        data = self.tokenizer.decode_bytes([id])
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": [*data]}


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index):
        return self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index, text, tokens):
        return self._delta(index, {"content": text}, tokens)

    def tool_call(self, index, call):
        return self._delta(index, {"tool_trace": [call]})

    def closing(self, index, reason):
        return self._delta(index, {}, reason=reason)

    def choice(self, index, reason, pieces, calls):
        message = {"role": "assistant", "content": "".join(text for text, _ in pieces), "refusal": None,
                   "tool_trace": calls}
        return {"index": index, "message": message, "finish_reason": reason,
                "logprobs": self._logprobs([token for _, tokens in pieces for token in tokens])}

    def _delta(self, index, delta, tokens=(), reason=None):
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens):
        if self.job.params.logprobs is None:
            return None
        return {"content": [{**self.token(id, logprob), "top_logprobs": [self.token(*one) for one in best]}
                            for id, logprob, best in tokens], "refusal": None}


class TextAnswer(Answer):
    """An answer of /v1/completions."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args):
        super().__init__(*args)
        self._offset = defaultdict(int)  # characters of each choice so far

    def piece(self, index, text, tokens):
        return self._choice(index, [(text, tokens)])

    def tool_call(self, index, call):
        return {**self._choice(index), "tool_trace": [call]}

    def closing(self, index, reason):
        return self._choice(index, reason=reason)

    def choice(self, index, reason, pieces, calls):
        return {**self._choice(index, pieces, reason), "tool_trace": calls}

    def _choice(self, index, pieces=(), reason=None):
        return {"index": index, "text": "".join(text for text, _ in pieces), "logprobs": self._logprobs(index, pieces),
                "finish_reason": reason}

    def _logprobs(self, index, pieces):
        if self.job.params.logprobs is None:
            return None
        tokens, offsets = [], []
        for text, new in pieces:  # tokens come right before the text they begin: all of a piece begin with it
            tokens += new
            offsets += [self._offset[index]] * len(new)
            self._offset[index] += len(text)
        return {"tokens": [self._name(id) for id, _, _ in tokens],
                "token_logprobs": [max(logprob, LEAST_LOGPROB) for _, logprob, _ in tokens],
                "top_logprobs": [{self._name(id): max(logprob, LEAST_LOGPROB) for id, logprob in best}
                                 for _, _, best in tokens],
                "text_offset": offsets}

    def _name(self, id):
        """Return a token's text, or its bytes where they are no text: keys must differ."""
        data = self.tokenizer.decode_bytes([id])
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def timings(job: Job) -> dict:
    """Return times in milliseconds and rates, llama.cpp's names first.

    prompt: from the engine's first step for it to the first token; predicted: from there to the end, so that the rate
    counts what came after each choice's first token.
    """
    prompts = job.completions[::job.params.n]
    times = [completion.times for completion in job.completions]
    started = min(time.started or time.done for time in times)
    done = max(time.done for time in times)
    first = min((time.first_token for time in times if time.first_token), default=done)
    prompt_n = sum(c.prompt_tokens - c.cached_tokens for c in prompts)
    predicted_n = sum(c.completion_tokens for c in job.completions)
    later = sum(max(c.completion_tokens - 1, 0) for c in job.completions)
    return {"cache_n": sum(c.cached_tokens for c in prompts),
            "prompt_n": prompt_n, "prompt_ms": _ms(first - started),
            "prompt_per_second": _rate(prompt_n, first - started),
            "predicted_n": predicted_n, "predicted_ms": _ms(done - first),
            "predicted_per_second": _rate(later, done - first),
            "queue_ms": _ms(started - job.queued), "time_to_first_token_ms": _ms(first - job.queued)}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _rate(n: int, seconds: float) -> float:
    return round(n / seconds, 3) if seconds > 0 else 0.0


def _event(data: dict) -> bytes:
    """Return one event; ASCII, because some clients take U+2028 in it for the end of a line."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"
