"""Long random traces of the real engine, scheduler and pool around a model that only reads what is in the pages.

The model writes each token and its position into its cell and answers with a hash of what the block table leads to. A
page that is lost, shared wrongly, not copied or stale changes the answer, which is known from the tokens alone.
"""

import random
import zlib
from collections import Counter
from concurrent.futures import Future

import pytest
import torch
from tiny_engine import VOCAB, byte_tokenizer, prompt_of

from nanochat.calculator import calculate
from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import GPTConfig

CONFIG = GPTConfig(sequence_len=60, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
END, PYTHON_START, PYTHON_END = (byte_tokenizer().special_id(f"<|{name}|>")
                                 for name in ("assistant_end", "python_start", "python_end"))


def next_token(tokens, version):
    """Any function of the whole sequence: text of few letters, a terminal or a call now and then."""
    code = zlib.crc32(bytes(version) + b"".join(t.to_bytes(2, "big") for t in tokens))
    if PYTHON_START in tokens and PYTHON_END not in tokens[len(tokens) - 1 - tokens[::-1].index(PYTHON_START):]:
        return PYTHON_END if code % 3 == 0 else ord("123+?"[code % 5])
    return END if code % 40 == 0 else PYTHON_START if code % 40 < 4 else ord("abcdefgh"[code % 8])


class Reader:
    """Stands in for a GPT."""

    config, dtype, device = CONFIG, torch.float64, torch.device("cpu")

    def __init__(self):
        self.version = 0
        self.kernels = self

    def forward_paged(self, batch, cache):
        kept = batch.slots >= 0
        cache.k[0].flatten(0, 2)[batch.slots[kept], 0] = batch.tokens[kept].double()
        cache.v[0].flatten(0, 2)[batch.slots[kept], 0] = batch.positions[kept].double()
        answers = []
        for s, context in enumerate(batch.context_lens.tolist()):
            at = torch.arange(context)
            pages, P = batch.block_tables[s].long(), cache.k[0].size(1)
            cells = pages[at // P] * P + at % P
            assert cache.v[0].flatten(0, 2)[cells, 0].tolist() == at.tolist()
            answers.append(next_token(cache.k[0].flatten(0, 2)[cells, 0].int().tolist(), self.version))
        owner = torch.searchsorted(batch.cu_seqlens_q, batch.out_rows, right=True) - 1
        logits = torch.full((len(batch.out_rows), VOCAB), -1e9)
        return logits.scatter(1, torch.tensor(answers)[owner][:, None], 0.0)

    @staticmethod
    def sample(logits, *_):
        return logits.argmax(-1), torch.zeros(len(logits))


def expected(prompt, params, version, answer):
    """(ids, mask, text, reason, stopped_by, calls before the text's end) of a completion, from the tokens alone."""
    tokens, mask, text, calls, P = list(prompt), [], "", [], len(prompt)

    def end(reason, stopped_by=None):
        return tokens[P:], mask, text, reason, stopped_by, [call for at, *call in calls if at <= len(text)]

    def full():
        return len(mask) == params.max_tokens or len(tokens) == CONFIG.sequence_len

    while not full():
        token = next_token(tokens, version)
        if token == END:
            return end("stop", END)
        tokens.append(token)
        mask.append(1)
        if "a" <= chr(token) <= "h" and token < 256:
            text += chr(token)
            if found := [stop for stop in params.stop if text.endswith(stop)]:
                text = text[:-max(map(len, found))]
                return end("stop", max(found, key=len))
        elif token == PYTHON_END and not full():
            said = tokens[P:]
            call = bytes(said[len(said) - said[::-1].index(PYTHON_START):-1]).decode("ascii")
            calls.append((len(text), call, answer(call)))
            forced = [] if answer(call) is None else [PYTHON_END + 1, *answer(call).encode("ascii"), PYTHON_END + 2]
            for token in forced:
                if not full():
                    tokens.append(token)
                    mask.append(0)
    return end("length" if len(mask) == params.max_tokens else "context")


class Calls:
    """Stands for the toolbox: arithmetic at once, the rest when the trace says so."""

    def __init__(self):
        self.out = []

    @staticmethod
    def answer(expression):
        return calculate(expression) or (str(len(expression)) if len(expression) > 2 else None)

    def call(self, expression):
        if (result := calculate(expression)) is not None:
            return result
        self.out.append((expression, Future()))
        return self.out[-1][1]

    def come_back(self, rng):
        if self.out:
            expression, future = self.out.pop(rng.randrange(len(self.out)))
            if future.set_running_or_notify_cancel():
                future.set_result(self.answer(expression))


def new_request(engine, rng):
    """Submit a prompt that often begins like an earlier one."""
    prompt = prompt_of(40, rng.randrange(3))[:rng.randint(1, 40)] + prompt_of(rng.randint(1, 15), rng.randrange(100))
    stop = tuple("".join(rng.choices("abcdefgh", k=rng.randint(1, 3))) for _ in range(rng.choice((0, 0, 1, 3))))
    return engine.submit(prompt, SamplingParams(rng.randint(1, 30), 0.0, n=rng.choice((1, 1, 1, 2, 4)), stop=stop))


def verify(request, version, seen):
    """Every sample is what it had to be, or a beginning of it; what was streamed is its text. Return what happened."""
    want = expected(request.prompt, request.params, version, Calls.answer)
    for i, c in enumerate(request.completions()):
        if c.finish_reason in ("abort", "timeout"):
            assert (c.ids, c.mask) == (want[0][:len(c.ids)], want[1][:len(c.ids)])
        else:
            assert (c.ids, c.mask, c.text, c.finish_reason, c.stopped_by, [list(call) for call in c.tool_calls]) == want
        events = [event for sample, event in seen if sample == i]
        assert "".join(event[1] for event in events if event[0] == "text") == c.text
        assert [event for event in events if event[0] == "finish"] == events[-1:] == [("finish", c.finish_reason)]
        assert [event[1:] for event in events if event[0] == "tool"] == c.tool_calls
    calls = [result for c in request.completions() for _, result in c.tool_calls]
    return [*("stop string" if isinstance(c.stopped_by, str) else c.finish_reason for c in request.completions()),
            *("refused call" if result is None else "answered call" for result in calls)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("options", [
    dict(page_size=4, n_pages=20, max_batch=5, step_tokens=16), dict(page_size=1, n_pages=64, max_batch=8),
    dict(page_size=16, n_pages=5, max_batch=3, step_tokens=9), dict(page_size=3, n_pages=40, prefix_cache=False),
    dict(page_size=4, n_pages=21, max_batch=5, overlap=True), dict(page_size=16, n_pages=6, max_batch=3, overlap=True),
])
def test_1700_random_operations_never_read_a_wrong_cell(options, tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat.engine.engine.TOOL_POLL_SECONDS", 0)
    rng, engine = random.Random(options["n_pages"]), Engine(Reader(), tokenizer, **options)
    engine.toolbox = calls = Calls()
    live, seen, ends = [], {}, Counter()
    for _ in range(1700):
        operation = rng.choices(("step", "submit", "abort", "late", "answer", "weights"), (70, 25, 3, 2, 12, 0.3))[0]
        if operation == "submit" and len(live) < 12:
            live.append(new_request(engine, rng))
            seen[live[-1]] = []
        elif operation == "abort" and live:
            engine.abort(rng.choice(live))
        elif operation == "late" and live:
            rng.choice(live).deadline = 0.0
        elif operation == "answer":
            calls.come_back(rng)
        elif operation == "weights":
            engine.reset()
        else:
            engine.step()
        engine.check()
        for request in live:
            seen[request] += request.take_events()
        for request in [request for request in live if request.done]:
            live.remove(request)
            ends.update(verify(request, engine.model.version, seen.pop(request)))
        if operation == "weights":
            assert not live
            engine.model.version += 1
            engine.sync_weights()
    engine.reset()
    engine.check()
    assert engine.pool.available == engine.pool.total
    kinds = ("stop", "stop string", "length", "context", "abort", "timeout", "answered call", "refused call")
    assert all(ends[kind] > 5 for kind in kinds) and ends["length"] > 30, ends
    assert engine.stats()["preemptions"] > 0 and engine.weights_version > 0
    assert (engine.stats()["cached_tokens"] > 0) == options.get("prefix_cache", True)
