"""pyllm.kernels: the ops of a Llama-family model, each in several backends.

    rms_norm, add_rms_norm, apply_rope, qk_norm_rope, rope_append_kv, swiglu, swiglu_packed, attention,
    attention_decode, cross_entropy, linear_cross_entropy, linear, sample

One folder an op: `reference.py` (the formula, in eager PyTorch), Triton kernels, bindings to C++ and CUDA, and the
public function in `__init__.py`. `OPS` is the table of them all; `dispatch.py` chooses.
"""

from __future__ import annotations

if __name__ == "pyllm.kernels":
    from . import describe as _describe
    from .attention import SPECS as ATTENTION_SPECS
    from .attention import attention, attention_decode
    from .cross_entropy import SPECS as CROSS_ENTROPY_SPECS
    from .cross_entropy import cross_entropy, linear_cross_entropy
    from .dispatch import BACKENDS, BackendError, use_backend
    from .linear import SPECS as LINEAR_SPECS
    from .linear import linear
    from .rms_norm import SPECS as RMS_NORM_SPECS
    from .rms_norm import add_rms_norm, rms_norm
    from .rope import SPECS as ROPE_SPECS
    from .rope import apply_rope, qk_norm_rope
    from .rope.append import SPECS as ROPE_APPEND_SPECS
    from .rope.append import rope_append_kv
    from .sampling import SPECS as SAMPLING_SPECS
    from .sampling import sample
    from .spec import Spec
    from .swiglu import SPECS as SWIGLU_SPECS
    from .swiglu import swiglu, swiglu_packed

    OPS: dict[str, Spec] = {
        **RMS_NORM_SPECS,
        **ROPE_SPECS,
        **ROPE_APPEND_SPECS,
        **SWIGLU_SPECS,
        **ATTENTION_SPECS,
        **CROSS_ENTROPY_SPECS,
        **LINEAR_SPECS,
        **SAMPLING_SPECS,
    }

    def describe(device: str | None = None) -> str:
        """The table op x backend on this machine: available, or why not, and what the automatic choice takes."""
        return _describe.describe(OPS, device)

    __all__ = [
        "BACKENDS",
        "OPS",
        "BackendError",
        "add_rms_norm",
        "apply_rope",
        "attention",
        "attention_decode",
        "cross_entropy",
        "describe",
        "linear",
        "linear_cross_entropy",
        "qk_norm_rope",
        "rms_norm",
        "rope_append_kv",
        "sample",
        "swiglu",
        "swiglu_packed",
        "use_backend",
    ]
else:
    # With the repository's root on sys.path, `import kernels` finds this folder instead of the public package of that
    # name. It must not register every op a second time, and must not look like that package to libraries that probe
    # for it: transformers imports it for its version and would die of an exception, but turns away a version this old.
    __version__ = "0.0.0"

    def __getattr__(name: str) -> object:
        raise ImportError(f"{name}: this package is imported as pyllm.kernels, not as {__name__}")
