"""Tensor parallelism: each rank holds a slice of every matrix and of the work that it does.

    column-wise   q, k, v, gate, up     a rank computes some heads, some of the F intermediate units
    row-wise      o, down               and multiplies them in: the results of all ranks add up to the layer's
    by vocabulary embedding, output

Between the blocks the residual stream is split by tokens ("sequence parallelism"), so that norms and what they keep
for backward are shared out as well: the sum behind a block becomes a reduce-scatter, and its twin in front of the next
one an all-gather, which together move no more than one all-reduce would.

The model is not rewritten: its parameters become DTensors, hooks move activations between the two layouts, and the
rules in `sharding.py` let every op of ours run on its rank's part.

Source: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198 (sequence parallelism).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from .kernels import linear_cross_entropy
from .model import LlamaForCausalLM
from .sharding import register_rules

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj")


def placement(name: str) -> Any:
    """How the parameter of this name is split."""
    module, kind = name.split(".")[-2:]
    if module in COLUMNS:
        return Shard(0)
    if module in ROWS and kind == "weight":
        return Shard(1)
    return Replicate()


def tensor_parallel(model: LlamaForCausalLM, mesh: Any) -> LlamaForCausalLM:
    """Split a model over the ranks of a 1-D mesh, in place. All ranks must come with the same weights.

    Raises:
        ValueError: heads, intermediate units or the vocabulary don't divide among the ranks.
    """
    ranks, config = mesh.size(), model.config
    sizes = {"num_key_value_heads": config.kv_heads, "intermediate_size": config.intermediate_size}
    for name, size in {**sizes, "vocab_size": config.vocab_size}.items():
        if size % ranks:
            raise ValueError(f"tensor parallelism: {name} = {size} must be a multiple of the {ranks} ranks")
    register_rules()
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            split = nn.Parameter(
                distribute_tensor(p.detach(), mesh, [placement(f"{path}.{name}")]), requires_grad=p.requires_grad
            )
            module.register_parameter(name, split)
    model.tie_weights()

    def laid_out(x: Any, where: Any) -> Any:
        if x is None:
            return None
        x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        return x.redistribute(mesh, [where])

    def by_tokens(module: nn.Module, args: Any) -> Any:  # (x, residual) of a norm
        return tuple(laid_out(x, Shard(1)) if isinstance(x, Tensor) else x for x in args)

    def whole(module: nn.Module, args: Any) -> Any:  # (x, step) of a block
        return laid_out(args[0], Replicate()), *args[1:]

    def embedded(module: nn.Module, args: Any, out: Any) -> Any:
        # At once: where a row belongs to another rank's vocabulary is remembered for a single reduction only.
        return laid_out(out, Shard(1))

    def angles(module: nn.Module, args: Any, out: Any) -> Any:
        return tuple(laid_out(x, Replicate()) for x in out)

    model.model.embed_tokens.register_forward_hook(embedded)
    model.model.rotary_emb.register_forward_hook(angles)
    model.model.norm.register_forward_pre_hook(by_tokens)
    layers: Any = model.model.layers
    for layer in layers:
        layer.input_layernorm.register_forward_pre_hook(by_tokens)
        layer.post_attention_layernorm.register_forward_pre_hook(by_tokens)
        layer.self_attn.register_forward_pre_hook(whole)
        layer.mlp.register_forward_pre_hook(whole)
    setattr(model, "linear_loss", sharded_loss)  # noqa: B010  (its type is that of the whole op)
    return model


def sharded_loss(x: Any, weight: Any, targets: Tensor, **options: Any) -> Tensor:
    """`linear_cross_entropy` with reduction "sum", each rank on its share of the rows against the whole vocabulary.

    The output matrix is gathered, as FSDP would; its gradient is a sum over the ranks' rows, and says so (`Partial`):
    `Replicate` in its place would silently drop what the other ranks found.
    """
    mesh = weight.device_mesh
    rows = x.redistribute(mesh, [Shard(0)]).to_local(grad_placements=[Shard(0)])
    whole = weight.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
    mine = DTensor.from_local(targets, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(0)]).to_local()
    total: Any = linear_cross_entropy(rows, whole, mine, **options)
    return DTensor.from_local(total, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()


def local(x: Any) -> Any:
    """A whole tensor of a DTensor, and anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
