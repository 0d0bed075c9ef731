"""Long random traces of the real engine, scheduler and pool around a model that only reads what is in the pages.

The model writes each token and its position into its cell and answers with a hash of what the block table leads to. A
page that is lost, shared wrongly, not copied or stale changes the answer, which is known from the tokens alone.
"""

import random
import zlib

import pytest
import torch
from tiny_engine import VOCAB, byte_tokenizer, prompt_of

from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import GPTConfig

CONFIG = GPTConfig(sequence_len=60, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)


def next_token(tokens, version):
    """Any function of the whole sequence; a terminal now and then."""
    code = zlib.crc32(bytes(version) + b"".join(t.to_bytes(2, "big") for t in tokens))
    return VOCAB - 5 if code % 40 == 0 else code % 256  # VOCAB - 5 is <|assistant_end|>


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
        logits = torch.full((len(batch.out_rows), VOCAB), -1e9)
        for s, context in enumerate(batch.context_lens.tolist()):
            at = torch.arange(context)
            pages, P = batch.block_tables[s].long(), cache.k[0].size(1)
            cells = pages[at // P] * P + at % P
            assert cache.v[0].flatten(0, 2)[cells, 0].tolist() == at.tolist()
            logits[s, next_token(cache.k[0].flatten(0, 2)[cells, 0].int().tolist(), self.version)] = 0.0
        return logits

    @staticmethod
    def sample(logits, *_):
        return logits.argmax(-1), torch.zeros(len(logits))


def expected(prompt, max_tokens, version):
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, CONFIG.sequence_len):
        token = next_token(tokens, version)
        if token == VOCAB - 5:
            break
        tokens.append(token)
    return tokens[len(prompt):]


def new_request(engine, rng):
    """Submit a prompt that often begins like an earlier one."""
    prompt = prompt_of(40, rng.randrange(3))[:rng.randint(1, 40)] + prompt_of(rng.randint(1, 15), rng.randrange(100))
    return engine.submit(prompt, SamplingParams(rng.randint(1, 20), 0.0, n=rng.choice((1, 1, 1, 2, 4))))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("options", [
    dict(page_size=4, n_pages=20, max_batch=5, step_tokens=16), dict(page_size=1, n_pages=64, max_batch=8),
    dict(page_size=16, n_pages=5, max_batch=3, step_tokens=9), dict(page_size=3, n_pages=40, prefix_cache=False),
])
def test_2500_random_operations_never_read_a_wrong_cell(options, tokenizer):
    rng, engine = random.Random(options["n_pages"]), Engine(Reader(), tokenizer, tools="off", **options)
    live, finished, aborted = [], 0, 0
    for _ in range(2500):
        operation = rng.choices(("step", "submit", "abort", "weights"), (70, 25, 4, 0.3))[0]
        if operation == "submit" and len(live) < 12:
            live.append(new_request(engine, rng))
        elif operation == "abort" and live:
            engine.abort(live.pop(rng.randrange(len(live))))
            aborted += 1
        elif operation == "weights":
            engine.reset()
            engine.model.version += 1
            live = []
        else:
            engine.step()
        engine.check()
        for request in [request for request in live if request.done]:
            live.remove(request)
            for completion in request.completions():
                want = expected(request.prompt, request.params.max_tokens, engine.model.version)
                assert completion.ids == want
                finished += 1
    for request in live:
        engine.abort(request)
    engine.check()
    assert engine.pool.available == engine.pool.total
    assert finished > 100 and aborted > 20
    assert engine.stats()["preemptions"] > 0
    assert (engine.stats()["cached_tokens"] > 0) == options.get("prefix_cache", True)
