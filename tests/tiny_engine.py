"""A random model of 200K parameters that can be made sure of some tokens, and the engine's oracle.

The oracle computes the whole sequence again for every token with the dense forward, one prompt at a time.
"""

import dataclasses

import pytest
import torch

from kernels import KernelConfig, resolve
from nanochat.calculator import calculate
from nanochat.engine import Engine, SamplingParams
from nanochat.engine.request import row_seed
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

CPU = torch.device("cpu")
KERNELS = resolve(KernelConfig.parse("eager"), CPU, torch.float32)
VOCAB = 256 + len(SPECIAL_TOKENS)
CONFIG = GPTConfig(sequence_len=96, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=128)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For modules that import it: on matrices this small a second thread only spins (20 s, not 130, on busy cores)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ScriptedGPT(GPT):
    """Sure of script[p] at position p, whatever came before; elsewhere a random model. Counts its forwards."""

    script: dict[int, int] = {}

    def forward(self, idx, *args):
        logits = super().forward(idx, *args)
        for position, token in self.script.items():
            if 0 < position <= idx.size(1):
                logits[:, position - 1, token] += 100
        return logits

    def forward_paged(self, batch, cache):
        logits = super().forward_paged(batch, cache)
        for row, position in enumerate((batch.positions[batch.out_rows] + 1).tolist()):
            if position in self.script:
                logits[row, self.script[position]] += 100
        self.computed = [*getattr(self, "computed", []), len(batch.tokens)]
        return logits


def byte_tokenizer() -> Tokenizer:
    return Tokenizer.train(["no merges"], VOCAB)


def random_model(dtype: torch.dtype = torch.float32, **shape) -> ScriptedGPT:
    """A model whose zero-initialized matrices are random too: a flat model would say the same whatever it reads."""
    model = ScriptedGPT.build(dataclasses.replace(CONFIG, **shape), KERNELS, dtype, CPU, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.cast_weights()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def tool_script(tokenizer: Tokenizer, start: int, expression: str) -> dict[int, int]:
    """The script that calls the tool from position `start` on."""
    ids = [tokenizer.special_id("<|python_start|>"), *tokenizer.encode(expression),
           tokenizer.special_id("<|python_end|>")]
    return dict(enumerate(ids, start))


def recomputed(model: GPT, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams, sample: int = 0,
               tools: str = "calculator", guess: list[int] = (),
               answer=calculate) -> tuple[list[int], list[int], str]:
    """Return (ids, mask, finish_reason) of one sample without any cache; `answer` stands for the tool.

    As long as the outcome follows `guess`, one forward over all of it serves every position (the model is causal).
    """
    python_start, python_end, output_start, output_end = (
        tokenizer.special_id(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end"))
    seed = torch.tensor([row_seed(params.seed, sample)])
    ids, mask, forced = list(prompt), [], []
    known, logits = [], None
    while True:
        said = ids[len(prompt):]
        if len(said) == params.max_tokens:
            return said, mask, "length"
        if len(ids) == model.config.sequence_len:
            return said, mask, "context"
        if forced:
            ids.append(forced.pop(0))
            mask.append(0)
            continue
        if known[:len(ids)] != ids:
            known = [*prompt, *guess] if list(guess[:len(said)]) == said else list(ids)
            with torch.inference_mode():
                logits = model(torch.tensor([known]))[0]
        token, _ = model.kernels.sample(logits[None, len(ids) - 1], torch.tensor([float(params.temperature)]),
                                        torch.tensor([params.top_k or 0]), torch.tensor([params.top_p]),
                                        torch.tensor([params.min_p]), seed, torch.tensor([len(ids)]))
        if token.item() in (tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>")):
            return said, mask, "stop"
        ids.append(token.item())
        mask.append(1)
        said = ids[len(prompt):]
        if tools != "off" and ids[-1] == python_end and python_start in said:
            opened = len(said) - 1 - said[::-1].index(python_start)
            expression = said[opened + 1:-1]
            if python_end not in expression:
                result = answer(tokenizer.decode(expression))
                forced = [] if result is None else [output_start, *tokenizer.encode(result), output_end]


def assert_recomputed(engine, results, prompts, params, answer=calculate):
    """Every sample's tokens, mask and end are those of full recomputation."""
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for prompt, p, samples in zip(prompts, params, results, strict=True):
        assert len(samples) == p.n
        for i, c in enumerate(samples):
            want = recomputed(engine.model, engine.tokenizer, prompt, p, i, engine.tools, c.ids, answer)
            assert (c.ids, c.mask, c.finish_reason) == want


def assert_idle(engine):
    engine.check()
    assert engine.pool.available == engine.pool.total and not engine.running and not engine.waiting


# --- fixtures, for modules that import them ---


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return random_model()


class CheckedEngine(Engine):
    """Verifies after every step that no page is lost, and gives up on a run that never ends."""

    def step(self):
        super().step()
        self.check()
        assert self.stats()["steps"] < 5000


@pytest.fixture
def make(model, tokenizer):
    def engine(**options):
        return CheckedEngine(options.pop("model", model), tokenizer, **options)
    return engine
