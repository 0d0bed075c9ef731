"""Choosing kernels: what auto takes, and the exact sentence for every request that cannot be met."""

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
import torch

from kernels import KernelConfig, KernelError, Kernels, KernelUnavailable, resolve
from kernels.check import small_cases
from kernels.registry import BACKENDS, OPS, Op, declare, register, why_not

CPU = torch.device("cpu")


def resolved(text: str) -> Kernels:
    return resolve(KernelConfig.parse(text), CPU, torch.float32)


@pytest.fixture
def scratch():
    """Let a test register backends and forget them afterwards."""
    saved = {op: dict(backends) for op, backends in BACKENDS.items()}, dict(OPS)
    yield
    BACKENDS.clear()
    BACKENDS.update(saved[0])
    OPS.clear()
    OPS.update(saved[1])


@pytest.mark.parametrize("text, sentence", [
    ("fast", "--kernels fast: expected a preset (auto, eager, triton, best) and then op=backend pairs, got 'fast'"),
    ("eagr", "--kernels eagr: expected a preset (auto, eager, triton, best) and then op=backend pairs, got 'eagr' "
             "(did you mean eager?)"),
    ("auto,eager", "--kernels auto,eager: expected a preset (auto, eager, triton, best) and then op=backend pairs, "
                   "got 'eager' (did you mean eager?)"),
    ("atention=sdpa", f"--kernels atention=sdpa: unknown op 'atention' (did you mean attention?); "
                      f"ops are {', '.join(BACKENDS)}"),
    ("auto,relu2=sdpa", "--kernels auto,relu2=sdpa: relu2 has no backend 'sdpa'; it has eager, triton, liger"),
    ("relu2=eager,relu2=auto", "--kernels relu2=eager,relu2=auto: relu2 is named twice"),
])
def test_unknown_words_are_refused_by_name(text, sentence):
    with pytest.raises(KernelError) as error:
        KernelConfig.parse(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize("text, sentence", [
    ("best", "--kernels best: best needs a table measured on this GPU, there is none for this cpu; use --kernels auto"),
    ("triton", "--kernels triton: no op has a triton backend in this version; use --kernels auto"),
])
def test_presets_that_cannot_be_met_are_refused(text, sentence, scratch):
    for backends in BACKENDS.values():
        backends.pop("triton", None)
    with pytest.raises(KernelUnavailable) as error:
        resolved(text)
    assert str(error.value) == sentence


def test_auto_takes_sdpa_on_the_cpu_and_eager_means_every_op():
    assert resolved("auto").names["attention"] == "sdpa"
    assert set(resolved("eager").names.values()) == {"eager"}
    assert resolved("eager,attention=sdpa").names["attention"] == "sdpa"
    assert resolved("attention=eager").names["attention"] == "eager"


def test_a_named_backend_that_needs_cuda_is_refused_and_auto_says_why_it_passed_it_over(scratch):
    BACKENDS["relu2"].pop("triton")  # available or not with the interpreter
    register("relu2", "quick", needs=("cuda",), rank=1)(lambda x: x)
    with pytest.raises(KernelUnavailable) as error:
        resolved("relu2=quick")
    assert str(error.value) == ("--kernels relu2=quick: needs a CUDA GPU, this is cpu. Available here: eager. "
                                "Use --kernels relu2=eager or relu2=auto.")
    kernels = resolved("auto")
    assert kernels.names["relu2"] == "eager"
    (line,) = [line for line in kernels.describe().splitlines() if "relu2=quick" in line]  # one line per reason
    assert line.startswith("kernels: auto passed over ") and line.endswith(": needs a CUDA GPU, this is cpu")


def test_auto_never_takes_an_interpreted_kernel(scratch, monkeypatch):
    monkeypatch.setattr("kernels.registry.interpreter_on", lambda: True)
    register("relu2", "interpreted", needs=("triton",), rank=1)(lambda x: x)
    assert resolved("auto").names["relu2"] == "eager"
    assert resolved("relu2=interpreted").names["relu2"] == "interpreted"


def test_dtype_package_capability_and_shape_rules_become_reasons(scratch):
    def rule(shapes):
        return None if shapes["head_dim"] == 128 else f"head_dim must be 128, got {shapes['head_dim']}"

    register("relu2", "picky", dtypes=(torch.bfloat16,), needs=("no_such_package",), check=rule)(lambda x: x)
    backend = BACKENDS["relu2"]["picky"]
    assert why_not(backend, CPU) == "package no_such_package is not importable"
    backend = dataclasses.replace(backend, needs=())
    assert why_not(backend, CPU, torch.float32) == "takes bfloat16, got float32"
    assert why_not(backend, CPU, torch.bfloat16, {"head_dim": 64}) == "head_dim must be 128, got 64"
    assert why_not(backend, CPU, torch.bfloat16, {"head_dim": 128}) is None
    assert why_not(dataclasses.replace(backend, needs=("sm90",)), CPU) == "needs sm90+, this is cpu"


def test_a_backend_gets_the_resolved_ops_it_uses(scratch):
    seen = []

    def spy(q, k, cos, sin):
        seen.append(q.shape)
        return q, k

    register("qk_norm_rope", "spy")(spy)
    kernels = resolved("qk_norm_rope=spy,attention=sdpa")
    q = torch.randn(1, 3, 2, 8)
    kernels.attention(q, q, q, torch.ones(3, 4), torch.zeros(3, 4))
    assert seen == [q.shape]


def test_registering_twice_or_before_eager_is_an_error(scratch):
    with pytest.raises(ValueError, match="relu2=eager is registered twice"):
        register("relu2", "eager")(lambda x: x)
    with pytest.raises(ValueError, match="the eager reference must be registered first, got triton"):
        register("new_op", "triton")(lambda x: x)
    with pytest.raises(ValueError, match="declared without a backend"):
        declare(Op("no_such", {}, dict))


def test_every_op_is_complete():
    names = [f.name for f in dataclasses.fields(Kernels) if f.name not in ("names", "notes", "requested")]
    assert sorted(OPS) == sorted(BACKENDS) == sorted(names)
    for name, op in OPS.items():
        assert next(iter(BACKENDS[name])) == "eager"
        assert small_cases(op) and any(case.startswith("d20") for case in op.cases)
        for backend in BACKENDS[name].values():
            own = [p for p in inspect.signature(backend.fn).parameters if p not in backend.uses]
            eager = BACKENDS[name]["eager"]
            assert own == [p for p in inspect.signature(eager.fn).parameters if p not in eager.uses]


def test_kernels_are_frozen_and_described():
    kernels = resolved("eager,attention=sdpa")
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernels.relu2 = None
    assert kernels.describe().startswith("kernels: rms_norm=eager qk_norm_rope=eager attention=sdpa")
    assert kernels.describe().endswith('(requested: "eager,attention=sdpa")')


def test_python_m_kernels_prints_the_table_and_json():
    command = [sys.executable, "-m", "kernels", "--device", "cpu"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "* attention        sdpa     available" in text
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert {(row["op"], row["backend"]) for row in rows} == {(op, b) for op in OPS for b in BACKENDS[op]}
