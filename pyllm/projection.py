"""Where the model's linear layers are computed: by their module, or by a kernel where torch is slow at their dtype."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .kernels import linear
from .kernels.linear import pays


def project(module: nn.Module, x: Tensor, backend: str | None = None) -> Tensor:
    """module(x); by `pyllm.kernels.linear` where that is faster and the module does nothing that would be missed.

    A CPU without instructions for bfloat16 multiplies matrices of it 4 to 60 times slower than of float32
    (`kernels/products.py` has the measurement). LoRA layers, FSDP units, quantised layers, hooks and parametrisations
    are all more than a plain nn.Linear: they are called.
    """
    if type(module) is nn.Linear and pays(x, module.weight) and _is_plain(module):
        return linear(x, module.weight, module.bias, backend=backend)
    return module(x)


def _is_plain(module: nn.Linear) -> bool:
    """Whether calling the module is its product and nothing else: forward and parameters as torch made them."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or type(module.weight) is not nn.Parameter
        or _has_any_global_hook()
    )
