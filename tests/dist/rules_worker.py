"""One rank of test_rules: every sharding rule of every op, forward and backward, against the op on whole tensors."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm import sharding
from pyllm.kernels import OPS, linear_cross_entropy
from pyllm.kernels.dispatch import Op
from pyllm.kernels.extension import cpu

# Those of generation, which isn't sharded, and the one that the model calls for plain parameters only.
WITHOUT_RULES = {"attention_decode", "rope_append_kv", "linear", "sample"}


class Calls(TorchDispatchMode):
    """What is asked of our registered ops, with the answers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "pyllm":
            self.found.append((func, args, out if isinstance(out, tuple) else (out,)))
        return out


def calls_of(spec, case):
    """The forward and the backward call behind a public function, in eager PyTorch but through the registered op."""
    spec.op.impls["registered"] = spec.op.impls["eager"]
    inputs = spec.inputs(**spec.cases[case], dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    for name in spec.grads:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].requires_grad_()
    with Calls() as calls:
        out = spec.function(**inputs)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)) for o in outs]
        sum((o * w).sum() for o, w in zip(outs, weights, strict=True)).backward()
    return [(f, [a.detach() if isinstance(a, torch.Tensor) else a for a in args], out) for f, args, out in calls.found]


def is_shard(p):
    return p is not None and p.is_shard()


@torch.no_grad()
def errors_of(func, args, expected, mesh):
    """For each rule: how far the op on parts is from the op on the whole."""
    whole = [distribute_tensor(a, mesh, [Replicate()]) if isinstance(a, torch.Tensor) else a for a in args]
    specs = [a._spec if isinstance(a, DTensor) else a for a in whole]
    for outputs, inputs in sharding.RULES[func._schema.name.split("::")[1]](*specs):
        assert len(inputs) == len(args)
        parts = [
            distribute_tensor(a, mesh, [p]) if isinstance(a, torch.Tensor) else a
            for a, p in zip(args, inputs, strict=True)
        ]
        found = func(*parts)
        found = found if isinstance(found, tuple) else (found,)
        # torch sets a rule aside where a dimension has less than one row a rank; then it gathers, which is right too.
        possible = all(a.shape[p.dim] >= mesh.size() for a, p in zip(args, inputs, strict=True) if is_shard(p))
        for i, (got, want, placement) in enumerate(zip(found, expected, outputs, strict=True)):
            assert got.placements == (placement,) or not possible, (func, i, got.placements, placement)
            a, b = (
                t.double().nan_to_num(neginf=-1e3) for t in (got.full_tensor(), want)
            )  # lse of rows that see nothing
            error = float((a - b).norm() / b.norm().clamp(min=1e-9))
            yield error if want.numel() else 0.0, f"{func} output {i} of rule {outputs} <- {inputs}"


def step(mesh):
    """The loss by the C++ kernel, which on a single rank would compute its gradients in the forward pass."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 16, generator=generator), torch.randn(300, 16, generator=generator)
    target = torch.randint(300, (64,), generator=generator)
    target[5:40] = -100  # so that ranks differ in how many rows count
    found = []
    for place in (lambda t, p: t, lambda t, p: distribute_tensor(t, mesh, [p])):
        a, b = place(x, Shard(0)).detach().requires_grad_(), place(w, Replicate()).detach().requires_grad_()
        linear_cross_entropy(a, b, place(target, Shard(0)), backend="cpu").backward()
        found.append([t.full_tensor() if isinstance(t, DTensor) else t for t in (a.grad, b.grad)])
    for got, want in zip(*found, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-5


def main(planted: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    if planted:
        sharding._total = lambda p: sharding.R
    sharding.register_rules()
    if cpu.module is not None and not planted:
        step(mesh)
    Op.select = lambda self, *args: "registered"
    tried, wrong = set(), []
    for name, spec in OPS.items():
        if name in WITHOUT_RULES:
            continue
        for case in spec.cases:
            for func, args, expected in calls_of(spec, case):
                for error, what in errors_of(func, args, expected, mesh):
                    tried.add(func._schema.name.split("::")[1])
                    if not error < 1e-5:
                        wrong.append(what)
    assert tried == set(sharding.RULES), set(sharding.RULES) ^ tried
    if planted:
        assert {"rms_norm_bwd", "add_rms_norm_bwd", "linear_cross_entropy_bwd", "qk_norm_rope_bwd"} <= {
            what.split(".")[1] for what in wrong
        }, wrong
    else:
        assert not wrong, wrong
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:] == ["planted"])
