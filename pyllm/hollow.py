"""Models that no rank could hold whole: split while they are hollow, without memory, and filled a module at a time.

`torch.device("meta")` makes a model of shapes alone. Split over the ranks (`Cluster.wrap`) it gets memory for each
rank's own part; then rank 0 draws or reads one module after the other and sends it round, and every rank keeps its part
of it. So a rank needs its part and one module, and the weights are those that a single process would have begun with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from .checkpoint import read_generation_config, read_weights
from .distributed import Cluster
from .initialize import initialize
from .model import LlamaDecoderLayer, LlamaForCausalLM


def fill(model: LlamaForCausalLM, cluster: Cluster, folder: Path | None = None) -> None:
    """Memory and values for a model on the meta device that has been split.

    Args:
        folder: whose weights to take; None: drawn as `LlamaForCausalLM.init_weights` would, from torch's generator.
    Raises:
        ValueError: the folder's weights are damaged or don't fit; on every rank.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.to_empty(device=cluster.device)
    error: Exception | None = None
    chunks: Iterator[dict[str, Any]] = iter(())
    if cluster.main:
        try:
            chunks = iter(_drawn(model, shapes) if folder is None else _read(model, folder))
        except Exception as caught:
            error = caught
    reason = cluster.failure(None if error is None else str(error))
    if error is not None:
        raise error
    if reason is not None:
        raise ValueError(reason)
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    for _ in _modules(model):
        set_model_state_dict(model, next(chunks) if cluster.main else {}, options=how)
    model.tie_weights()
    if folder is not None:
        model.generation_config = read_generation_config(folder)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those with parameters of their own, in the order in which `init_weights` comes by them; a tied one once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            yield path, module


def _drawn(model: LlamaForCausalLM, shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Tensor]]:
    c = model.config
    # A single process's model draws twice, since torch's modules begin with numbers of their own: so the generator
    # has to come by those, too.
    nn.Embedding(c.vocab_size, c.hidden_size, c.pad_token_id)
    for layer in range(c.num_hidden_layers):
        LlamaDecoderLayer(c, layer)
    nn.Linear(c.hidden_size, c.vocab_size, bias=False)
    for path, module in _modules(model):
        chunk = {}
        for name, p in module.named_parameters(recurse=False):
            full = torch.empty(shapes[f"{path}.{name}"], dtype=p.dtype)  # on the CPU, as a single process draws it
            initialize(module, name, full, c.initializer_range)
            chunk[f"{path}.{name}"] = full
        yield chunk


def _read(model: LlamaForCausalLM, folder: Path) -> Iterator[dict[str, Tensor]]:
    state: dict[str, Any] = read_weights(folder, model, dtype=None)  # mapped into memory, not read yet

    def chunks() -> Iterator[dict[str, Tensor]]:
        for path, module in _modules(model):
            yield {
                f"{path}.{name}": state[f"{path}.{name}"].to(p.dtype)
                for name, p in module.named_parameters(recurse=False)
            }

    return chunks()
