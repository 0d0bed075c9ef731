"""The ops of the model, each with an eager reference and the backends that may replace it.

Importing this package registers every op; the list is explicit so that a reader finds the files.
"""

from kernels import (  # noqa: F401 - imported for registration
    attention,
    cross_entropy,
    fp8_cast,
    linear,
    linear_relu2,
    muon_update,
    newton_schulz,
    paged_append,
    paged_attention,
    qk_norm_rope,
    relu2,
    rms_norm,
    sample,
)
from kernels.registry import KernelConfig, KernelError, Kernels, KernelUnavailable, resolve

__all__ = ["KernelConfig", "KernelError", "KernelUnavailable", "Kernels", "resolve"]
