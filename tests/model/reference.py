"""Models of transformers, with the same random weights as pyllm's, and how far the two are apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm import LlamaForCausalLM

# Relative errors of float32. The same arithmetic in another order stays some times below them.
LOGITS = 1e-5
GRADIENTS = 1e-5

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


def config(family: str = "llama", **changes: Any) -> Any:
    """A small config of transformers."""
    head_dim = {"head_dim": 16} if family == "qwen3" else {}
    return getattr(transformers, CONFIGS[family])(**{**SIZES, **head_dim, **changes})


def pair(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, LlamaForCausalLM]:
    """transformers' model and pyllm's, with the same weights."""
    theirs = original(config(family, **changes))
    randomise(theirs)
    ours = LlamaForCausalLM(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def original(settings: Any) -> Any:
    """transformers' own model for its config: by its class, since pyllm.hf takes over the Auto classes."""
    name = type(settings).__name__.replace("Config", "ForCausalLM")
    theirs = getattr(transformers, name)._from_config(settings, dtype=torch.float32).eval()
    assert type(theirs).__module__.startswith("transformers.")
    return theirs


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights under which every part matters: the default ones leave norms at 1, biases at 0 and attention even."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
        else:
            parameter.add_(noise * 0.3)


def prompts(padding: str | None = None, batch: int = 3, length: int = 17) -> tuple[Tensor, Tensor | None, Tensor]:
    """ids (3, 17), an attention mask for the side that is padded, and labels that skip padding and two more."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)
    labels = ids.clone()
    labels[0, 3:5] = -100
    if padding is None:
        return ids, None, labels
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        short = 5 * row
        if padding == "left":
            mask[row, :short] = 0
        else:
            mask[row, -short:] = 0
    return ids, mask, labels.masked_fill(mask == 0, -100)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest relative L2 error of a row, of (..., n) tensors."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)).max())


def losses_and_gradients(
    model: Any, ids: Tensor, mask: Tensor | None, labels: Tensor, **kwargs: Any
) -> tuple[Any, Any]:
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=labels, use_cache=False, **kwargs)
    out.loss.backward()
    return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare(theirs: Any, ours: Any, ids: Tensor, mask: Tensor | None, labels: Tensor) -> None:
    """Every logit of a real token, the loss in both forms, and every gradient."""
    a, da = losses_and_gradients(theirs, ids, mask, labels)
    b, db = losses_and_gradients(ours, ids, mask, labels)
    real = slice(None) if mask is None else mask.bool()
    assert error(b.logits[real], a.logits[real]) < LOGITS
    assert b.loss.dtype == torch.float32
    assert abs(b.loss - a.loss) <= LOGITS * abs(a.loss)
    c, dc = losses_and_gradients(ours, ids, mask, labels, return_logits=False)
    assert c.logits is None
    assert abs(c.loss - a.loss) <= LOGITS * abs(a.loss)
    apart = {name for name in da for d in (db, dc) if distance(d[name], da[name]) > GRADIENTS * da[name].norm()}
    if apart:
        # Sums that cancel (of q and k, where attention is all on one key) are noise in both models: the truth decides.
        _, truth = losses_and_gradients(copy.deepcopy(theirs).double(), ids, mask, labels)
        noise = 1e-6 * max(float(gradient.norm()) for gradient in truth.values())
        for name in apart:
            allowed = max(GRADIENTS * truth[name].norm(), 2 * distance(da[name], truth[name]), noise)
            assert max(distance(d[name], truth[name]) for d in (db, dc)) <= allowed, name


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())
