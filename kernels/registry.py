"""Which implementations of an op exist, which run here, and the choice a run makes once at start-up.

Every op file registers its backends with `@register(op, backend)`, the eager reference first, and ends with
`OP = declare(Op(...))`. `KernelConfig.parse` reads what the user asked for, `resolve` turns it into a frozen
`Kernels` with one callable per op. A backend that the user names runs or the program ends with a sentence; only
`auto` chooses, and it says what it passed over and why. Nothing is decided per call.
"""

import difflib
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from kernels import device as device_module
from kernels.device import HAS_TRITON, device_name, interpreter_on, sm

BEST_TABLE = Path(__file__).with_name("best.json")  # GPU name -> op -> backend; bench/compare.py --write-best writes it

RMS_NORM_EPS = 1.1920929e-07  # fp32's epsilon in every dtype; torch's default in fp64 is 2.2e-16


class KernelError(ValueError):
    """A request for kernels that cannot be met; the message is one sentence for the user."""


class KernelUnavailable(KernelError):
    """The named backend exists but does not run here."""


# --- ops and backends -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """What parity tests and benches need to know of an op, whatever its backends.

    cases: named sizes, the keys tagged by their use ("tiny", "odd_...", "d20").
    make_inputs(case, dtype, device, generator) -> keyword arguments for a call of any backend.
    flops(case), bytes(case, itemsize): work and least memory traffic of one forward call; None where meaningless.
    grad_inputs: names of the inputs that get gradients; mutates: names of the inputs written in place.
    internal: only other backends call it; eager, at no cost, while no chosen backend does.
    """

    name: str
    cases: Mapping[str, Mapping]
    make_inputs: Callable[..., dict]
    flops: Callable[[Mapping], float] | None = None
    bytes: Callable[[Mapping, int], float] | None = None
    grad_inputs: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    internal: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation of an op and what it needs.

    needs: "cuda", "triton" (CUDA of sm80 or later, or the interpreter), "fp8" (sm89 or later, or the CPU), "sm90".. or
        the name of a Python package.
    uses: other ops whose resolved callable is passed as keyword argument of the same name.
    bypasses: ops that the reference uses and this backend does not: it yields to eager when the user names one of them.
    check(shapes) -> the broken rule in words, or None; shapes is what the caller of `resolve` knows (head_dim, ...).
    rank: `auto` takes the available backend of lowest rank.
    sqnr: dB that outputs and gradients must keep, for a backend that quantizes, in place of check.py's 2x rule.
    """

    op: str
    name: str
    fn: Callable
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    bypasses: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] | None = None
    check: Callable[[Mapping], str | None] | None = None
    rank: int = 100
    sqnr: tuple[float, float] | None = None


NAMESPACE = "kernels"  # of our operators: torch.ops.kernels.*
OPS: dict[str, Op] = {}
BACKENDS: dict[str, dict[str, Backend]] = {}


def register(op: str, name: str, **properties) -> Callable[[Callable], Callable]:
    """Register the decorated callable as backend `name` of `op` and return it unchanged."""

    def add(fn: Callable) -> Callable:
        backends = BACKENDS.setdefault(op, {})
        if name in backends:
            raise ValueError(f"kernel backend {op}={name} is registered twice")
        if not backends and name != "eager":
            raise ValueError(f"op {op}: the eager reference must be registered first, got {name}")
        backends[name] = Backend(op, name, fn, **properties)
        return fn

    return add


def custom_op(name: str, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Make the decorated launcher the operator torch.ops.kernels.<name>: opaque to torch.compile, no graph break.

    fake(*same arguments) -> outputs of the right shape, dtype and device without computing. It is not `triton_op`,
    whose kernels do not run in the interpreter inside a compiled graph. While kernels are compiled without a GPU the
    launcher itself runs on meta tensors, so that what gets compiled is what would be launched.
    """

    def add(fn: Callable) -> Callable:
        def trace(*args, **kwargs):
            return (fake if device_module.META_SM is None else fn)(*args, **kwargs)

        op = torch.library.custom_op(f"{NAMESPACE}::{name}", fn, mutates_args=mutates)
        op.register_fake(trace)
        return op

    return add


def misfit(name: str, size: int, step: int) -> str | None:
    """Return the broken rule in words when `size` is no multiple of `step`, else None."""
    return f"{name} must be a multiple of {step}, got {size}" if size % step else None


def declare(op: Op) -> Op:
    """Add the description of an op whose backends are registered."""
    if op.name not in BACKENDS:
        raise ValueError(f"op {op.name} is declared without a backend")
    OPS[op.name] = op
    return op


def why_not(backend: Backend, device: torch.device, dtype: torch.dtype | None = None,
            shapes: Mapping | None = None) -> str | None:
    """Return the reason why `backend` cannot run here as a clause, or None when it can."""
    for need in backend.needs:
        reason = _unmet(need, device)
        if reason:
            return reason
    if dtype is not None and backend.dtypes is not None and dtype not in backend.dtypes:
        return f"takes {', '.join(map(_dtype_name, backend.dtypes))}, got {_dtype_name(dtype)}"
    if shapes is not None and backend.check is not None:
        return backend.check(shapes)
    return None


def _unmet(need: str, device: torch.device) -> str | None:
    if need == "cuda":
        return None if device.type == "cuda" else f"needs a CUDA GPU, this is {device.type}"
    if need == "triton":
        if not HAS_TRITON:
            return "package triton is not importable"
        if device.type == "cuda":
            return _unmet("sm80", device)
        runs = interpreter_on() or device.type == "meta"
        return None if runs else f"Triton needs a CUDA GPU, this is {device.type}"
    if need == "fp8":  # the CPU computes the same numbers, slowly
        return None if device.type == "cpu" else _unmet("sm89", device)
    if need.startswith("sm") and need[2:].isdigit():
        have = sm(device)
        if have is None:
            return f"needs {need}+, this is {device.type}"
        return None if have >= int(need[2:]) else f"needs {need}+, this is sm{have}"
    try:
        found = importlib.util.find_spec(need) is not None
    except ImportError:  # need is package.module: the package is missing or broken
        found = False
    return None if found else f"package {need} is not importable"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the user's request ---------------------------------------------------------------------------

PRESETS = ("auto", "eager", "triton", "best")


@dataclass(frozen=True)
class KernelConfig:
    """A parsed `--kernels` text: a preset and the ops named beside it."""

    text: str = "auto"
    preset: str = "auto"
    chosen: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, fp8: bool = False) -> "KernelConfig":
        """Parse "PRESET" or "PRESET,op=backend,..." or "op=backend,..."; fp8 adds linear=fp8.

        Raises KernelError naming what is unknown, or the other backend that the text names for linear.
        """
        preset, chosen = "auto", {}
        for position, word in enumerate(w.strip() for w in text.split(",")):
            op, equals, name = word.partition("=")
            if not equals:
                if position or word not in PRESETS:
                    raise KernelError(f"--kernels {text}: expected a preset ({', '.join(PRESETS)}) and then "
                                      f"op=backend pairs, got {word!r}{_nearest(word, PRESETS)}")
                preset = word
                continue
            if op not in BACKENDS:
                raise KernelError(f"--kernels {text}: unknown op {op!r}{_nearest(op, BACKENDS)}; "
                                  f"ops are {', '.join(BACKENDS)}")
            if name != "auto" and name not in BACKENDS[op]:
                raise KernelError(f"--kernels {text}: {op} has no backend {name!r}{_nearest(name, BACKENDS[op])}; "
                                  f"it has {', '.join(BACKENDS[op])}")
            if op in chosen:
                raise KernelError(f"--kernels {text}: {op} is named twice")
            chosen[op] = name
        if fp8 and chosen.setdefault("linear", "fp8") != "fp8":
            raise KernelError(f"--fp8 is linear=fp8, but --kernels {text} names linear={chosen['linear']}; "
                              "leave one of them out")
        return cls(f"{text},linear=fp8" if fp8 and "linear=fp8" not in text else text, preset, chosen)


def _nearest(word: str, names) -> str:
    close = difflib.get_close_matches(word, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# --- the resolved choice --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kernels:
    """One callable per op, chosen once. `names` maps op to backend, `notes` says what `auto` passed over."""

    rms_norm: Callable
    qk_norm_rope: Callable
    attention: Callable
    relu2: Callable
    linear_relu2: Callable
    linear: Callable
    fp8_cast: Callable
    cross_entropy: Callable
    newton_schulz: Callable
    muon_update: Callable
    paged_append: Callable
    paged_attention: Callable
    sample: Callable
    names: Mapping[str, str]
    notes: tuple[str, ...] = ()
    requested: str = "auto"

    def describe(self) -> str:
        """Return the line that start-up prints, followed by one line per downgrade."""
        pairs = " ".join(f"{op}={name}" for op, name in self.names.items())
        return "\n".join([f'kernels: {pairs} (requested: "{self.requested}")', *self.notes])


def resolve(config: KernelConfig, device: torch.device, dtype: torch.dtype, shapes: Mapping | None = None) -> Kernels:
    """Choose a backend per op for this device, dtype and model shape.

    Raises KernelUnavailable when a backend that the user named, in a pair or by preset, does not run here.
    """
    names, notes, passed_over = {}, [], {}
    measured = _measured_choices(config, device) if config.preset == "best" else {}
    if config.preset == "triton" and not any("triton" in backends for backends in BACKENDS.values()):
        raise KernelUnavailable(f"--kernels {config.text}: no op has a triton backend in this version; "
                                "use --kernels auto")
    op_fields = [f.name for f in fields(Kernels) if f.name not in ("names", "notes", "requested")]
    for op in sorted(op_fields, key=lambda op: OPS[op].internal):  # an internal op's callers first
        if OPS[op].internal and op not in config.chosen and not _called(op, names):
            names[op] = "eager"
            continue
        wanted = config.chosen.get(op) or measured.get(op) or _preset_choice(config.preset, op)
        if wanted == "auto":
            wanted, better = _automatic(op, device, dtype, shapes)
            for pair, reason in better:
                passed_over.setdefault(reason, []).append(pair)
        elif reason := why_not(BACKENDS[op][wanted], device, dtype, shapes):
            usable = [n for n, b in BACKENDS[op].items() if why_not(b, device, dtype, shapes) is None]
            raise KernelUnavailable(f"--kernels {op}={wanted}: {reason}. Available here: {', '.join(usable)}. "
                                    f"Use --kernels {op}={usable[-1]} or {op}=auto.")
        names[op] = wanted
        named = [f"{other}={config.chosen[other]}" for other in BACKENDS[op][wanted].bypasses
                 if config.chosen.get(other, "auto") != "auto"]
        if named and op in config.chosen:
            raise KernelError(f"--kernels {config.text}: {op}={wanted} does not call {named[0]}; leave one of them out")
        if named:
            notes.append(f"kernels: {op}=eager, because {op}={wanted} would not call {named[0]}")
            names[op] = "eager"
    notes += [f"kernels: auto passed over {', '.join(pairs)}: {reason}" for reason, pairs in passed_over.items()]
    bound = {op: _bind(op, names) for op in op_fields}
    return Kernels(**bound, names=names, notes=tuple(notes), requested=config.text)


def _called(op: str, names: Mapping[str, str]) -> bool:
    return any(op in BACKENDS[caller][name].uses for caller, name in names.items())


def _preset_choice(preset: str, op: str) -> str:
    if preset == "triton":
        return "triton" if "triton" in BACKENDS[op] else "eager"
    return "auto" if preset == "best" else preset  # best.json holds only the ops that were measured


def _measured_choices(config: KernelConfig, device: torch.device) -> dict[str, str]:
    """Return op -> backend as measured on GPUs of this very name; an H200's table is not an H100's."""
    tables = json.loads(BEST_TABLE.read_text(encoding="utf-8"))
    name = device_name(device) if device.type == "cuda" else device.type
    if name not in tables:
        raise KernelUnavailable(f"--kernels {config.text}: best needs a table measured on this GPU, there is none "
                                f"for this {name}; use --kernels auto")
    for op, backend in tables[name].items():
        if backend not in BACKENDS.get(op, {}):
            raise KernelUnavailable(f"--kernels {config.text}: {BEST_TABLE.name} has {op}={backend} for this {name}, "
                                    "which this version lacks; measure again or use --kernels auto")
    return tables[name]


def _automatic(op: str, device: torch.device, dtype, shapes) -> tuple[str, list[tuple[str, str]]]:
    """Return the best available backend, and (op=backend, reason) of each better one that does not run here.

    An interpreted kernel is never taken here: it is about 1000x slower and must be asked for by name.
    """
    passed_over = []
    for backend in sorted(BACKENDS[op].values(), key=lambda b: b.rank):
        reason = why_not(backend, device, dtype, shapes)
        if reason is None and "triton" in backend.needs and device.type != "cuda":
            reason = "auto never takes an interpreted kernel"
        if reason is None:
            return backend.name, passed_over
        passed_over.append((f"{op}={backend.name}", reason))
    raise KernelUnavailable(f"--kernels {op}=auto: no backend runs here")


def _bind(op: str, names: Mapping[str, str]) -> Callable:
    backend = BACKENDS[op][names[op]]
    if not backend.uses:
        return backend.fn
    return functools.partial(backend.fn, **{used: _bind(used, names) for used in backend.uses})


def callable_of(op: str, name: str) -> Callable:
    """Return one backend ready to call, the ops it uses bound to their eager references (for tests and benches)."""
    return _bind(op, {**dict.fromkeys(BACKENDS, "eager"), op: name})
