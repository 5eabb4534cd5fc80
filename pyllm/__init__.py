"""pyllm: hand-written kernels, and the Llama-family model, training and generation that stand on them.

Nothing is imported until it is used: `import pyllm` costs milliseconds and needs neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import KVCache
    from .config import PRESETS, LlamaConfig
    from .exact import batch_invariant
    from .generate import GenerationConfig
    from .kernels import BackendError, use_backend
    from .model import LlamaForCausalLM, LlamaModel
    from .patching import patch, patched, unpatch
    from .stream import TextIteratorStreamer, TextStreamer
    from .tokenizer import Tokenizer

__version__ = "0.1.0"

# Public name -> the submodule that defines it.
_NAMES = {
    "BackendError": "kernels",
    "GenerationConfig": "generate",
    "KVCache": "cache",
    "LlamaConfig": "config",
    "LlamaForCausalLM": "model",
    "LlamaModel": "model",
    "PRESETS": "config",
    "TextIteratorStreamer": "stream",
    "TextStreamer": "stream",
    "Tokenizer": "tokenizer",
    "batch_invariant": "exact",
    "patch": "patching",
    "patched": "patching",
    "unpatch": "patching",
    "use_backend": "kernels",
}
_SUBMODULES = frozenset(
    {"cache", "chat", "checkpoint", "config", "engine", "generate", "kernels", "model", "stream", "tokenizer"}
)

__all__ = [
    "PRESETS",
    "BackendError",
    "GenerationConfig",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaModel",
    "TextIteratorStreamer",
    "TextStreamer",
    "Tokenizer",
    "batch_invariant",
    "patch",
    "patched",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    globals()[name] = value  # the next lookup is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_SUBMODULES})
