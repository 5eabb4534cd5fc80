"""What a training run would need: memory and time per step, from arithmetic alone, for one laptop or a thousand nodes.

Memory is counted tensor by tensor: what this model's ops keep for the backward pass, what each way of sharding leaves
on a rank. Time is a roofline: every op takes as long as its useful operations at the matrix rate or its bytes at the
memory's bandwidth, whichever is longer (`Spec.cost`); communication is bytes over the slowest link it crosses, plus a
latency per hop. Where fsdp's or ddp's messages can hide behind computing, only what sticks out is counted.

It is an estimate, made to choose a layout by. For this machine the rates are measured, and a test holds the result
against real steps; for GPUs they are data sheets' figures times what large matrix products usually reach of them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from . import machine
from .config import PRESETS, LlamaConfig
from .devices import GB, GPUS, Device
from .kernels import OPS
from .train_config import TrainConfig

HOP = 5e-6  # seconds that a message takes to the next rank, however small it is


def this_machine() -> Device:
    """This computer: rates measured, and one small model's steps against their roofline. Takes a few seconds."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    half, full = (machine.matmul_peak(kind, dtype) for dtype in (torch.bfloat16, torch.float32))
    copy = machine.copy_peak(kind)
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = Device(
            properties.name, half, full, properties.total_memory, copy, 25 * GB, 25 * GB, 1, 1.0, kind="cuda"
        )
    else:
        device = Device(machine.cpu_name(), half, full, machine.memory(), copy, 5 * GB, 1 * GB, 1, 1.0, kind="cpu")
    model = PRESETS["small"].replace(num_hidden_layers=2, vocab_size=2048)
    train = TrainConfig(length=256, batch=4, precision="autocast" if kind == "cuda" else "float32")
    return dataclasses.replace(device, overhead=measured_step(model, train) / plan(model, train, device).seconds)


def measured_step(config: LlamaConfig, train: TrainConfig, steps: int = 4) -> float:
    """Seconds of a real step with random weights and tokens on this computer, in one process: the best of a few."""
    from .distributed import Cluster
    from .model import LlamaForCausalLM
    from .optim import adamw
    from .packing import Batch
    from .train import Workers
    from .train_step import checkpoint_activations, gradients

    cluster = Cluster(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = LlamaForCausalLM(config, train.backend).to(cluster.device).train()
    checkpoint_activations(model, train.checkpointing)
    optimizer = adamw(model)
    ids = torch.randint(config.vocab_size, (train.batch, train.length + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, ids[:, 1:].numel())
    autocast = torch.bfloat16 if train.precision == "autocast" else None

    def step() -> None:
        optimizer.zero_grad()
        gradients(model, [batch], cluster, Workers(), autocast)
        optimizer.step()
        if cluster.device.type == "cuda":
            torch.cuda.synchronize()

    return machine.best(step, steps)


@dataclass
class Plan:
    """What `plan` found, for each rank.

    Attributes:
        memory: bytes by purpose, at the step's peak.
        time: seconds of a step by purpose.
    """

    device: Device
    config: LlamaConfig
    train: TrainConfig
    ranks: int
    data: int
    micro: int
    accumulation: int
    memory: dict[str, float] = field(default_factory=dict)
    time: dict[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return sum(self.time.values())

    @property
    def tokens_per_second(self) -> float:
        return self.train.batch * self.train.length / self.seconds

    @property
    def mfu(self) -> float:
        """Useful operations over what all ranks could do at their full rate."""
        rate = self.device.flops if self._half else self.device.flops32
        return self.tokens_per_second * self.config.flops_per_token(self.train.length) / (rate * self.ranks)

    @property
    def _half(self) -> bool:
        return _precision(self.train, self.device) != "float32"

    def table(self) -> str:
        """As lines to print."""
        c, t, d = self.config, self.train, self.device
        nodes = -(-self.ranks // d.per_node)
        parallel = f"{self.data} data ({_parallel(t, self.ranks)}) x {t.tensor_parallel} tensor"
        split = f"{self.micro} at a time x {self.accumulation} x {self.data}"
        lines = [
            f"model      {c.num_parameters() / 1e9:,.3g} B parameters, {c.num_hidden_layers} layers of {c.hidden_size}",
            f"machines   {self.ranks} x {d.name} in {nodes} node{'s' if nodes > 1 else ''}: {parallel}",
            f"step       {t.batch} rows of {t.length} tokens: {split}",
            "",
            f"memory of each, GB (it has {d.memory / GB:,.1f})",
            *(f"    {name:<44}{size / GB:10.2f}" for name, size in self.memory.items()),
            f"    {'in all':<44}{self.bytes / GB:10.2f}   {self.verdict()}",
            "",
            "time of a step, ms",
            *(f"    {name:<44}{seconds * 1e3:10.1f}" for name, seconds in self.time.items()),
            f"    {'in all':<44}{self.seconds * 1e3:10.1f}",
            "",
            f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.0%}; "
            f"10^12 tokens would take {1e12 / self.tokens_per_second / 86400:,.1f} days",
        ]
        how = (
            f"rates measured here, steps at {1 / d.overhead:.0%} of them"
            if d.reached == 1
            else f"data sheet rates, products at {d.reached:.0%} of them"
        )
        lines.append(f"An estimate ({how}); nothing was run.")
        return "\n".join(lines)

    def verdict(self) -> str:
        """Whether it fits, with room for what allocators lose."""
        share = self.bytes / self.device.memory
        if share > 1:
            return "does not fit: more ranks, --parallel fsdp, --checkpointing full or a smaller --micro-batch"
        return "fits" if share < 0.9 else "may fit: allocators need room as well"


def plan(config: LlamaConfig, train: TrainConfig, device: Device, nodes: int = 1) -> Plan:
    """The needs of training a model on so many nodes.

    Raises:
        ValueError: a layout that the ranks, heads or rows don't allow.
    """
    ranks, tensor = nodes * device.per_node, train.tensor_parallel
    if ranks % tensor:
        raise ValueError(f"--tensor-parallel {tensor} must divide the {ranks} GPUs of {nodes} node(s)")
    if tensor > 1 and config.kv_heads % tensor:
        raise ValueError(f"--tensor-parallel {tensor} must divide the model's {config.kv_heads} key-value heads")
    data = ranks // tensor
    if train.batch % data:
        raise ValueError(f"--batch {train.batch} must be a multiple of the {data} data ranks")
    per_rank = train.batch // data
    micro = min(train.micro_batch or per_rank, per_rank)
    made = Plan(device, config, train, ranks, data, micro, -(-per_rank // micro))
    made.memory = _memory(made)
    made.time = _time(made)
    return made


def _precision(train: TrainConfig, device: Device) -> str:
    if train.precision != "auto":
        return train.precision
    return "autocast" if device.kind == "cuda" else "float32"


def _parallel(train: TrainConfig, ranks: int) -> str:
    if ranks == train.tensor_parallel:
        return "none"
    if train.parallel == "auto":
        return "fsdp" if train.tensor_parallel > 1 else "ddp"
    return train.parallel


# Memory


def _memory(p: Plan) -> dict[str, float]:
    """What is there at the step's fullest moment. There are three candidates: the loss, when every activation is kept
    and a block of logits comes on top; the backward pass of the last layer, when that one is computed again or its
    gradients are under way; and the end, when all gradients are there and all activations gone."""
    c, train = p.config, p.train
    precision, tensor, kind = _precision(train, p.device), train.tensor_parallel, _parallel(train, p.ranks)
    parameters = c.num_parameters() / tensor
    shards = p.data if kind == "fsdp" else 1
    width = 2 if precision == "bfloat16" and kind != "fsdp" else 4  # of a weight as it is stored
    half = 4 if precision == "float32" else 2  # of a value that products read
    matrices, output = c.num_hidden_layers * _layer_parameters(c) / tensor, c.vocab_size * c.hidden_size / tensor
    moments = 2 * parameters - (matrices if train.optimizer == "muon" else 0)
    always = {
        "weights": parameters / shards * width,
        f"optimizer ({train.optimizer})": moments / shards * width,
    }
    if kind == "fsdp":  # whole at a time: the ends, a layer that computes, the next on its way, a layer's gradient
        one, ends = _layer_parameters(c) / tensor, parameters - matrices
        always["gathered weights and a layer's gradient"] = (2 * ends + 3 * one) * half
    elif precision == "autocast":
        always["weights rounded for products"] = matrices * 2

    tokens = p.micro * train.length
    kept, last, working = activations(c, precision, train.checkpointing, tensor)
    gradients = parameters / shards * width
    # ddp's buckets are there from the start, and so are the gradients of earlier micro-batches.
    before = gradients if kind == "ddp" or p.accumulation > 1 else 0.0
    widened = 4 * output if half == 2 else 0.0
    loss = {"gradients": before, "activations": tokens * (kept + last)}
    loss["the loss's block of logits"] = loss_block(tokens, c, p.device.kind) + widened
    layer = {"gradients": max(before, output / shards * width), "activations": tokens * kept}
    layer["a layer's backward pass"] = tokens * working
    # The embedding's gradient comes last, and is added to the output matrix's where the two are one.
    end = {"gradients": gradients}
    end["the embedding's gradient"] = output / shards * width * (2 if c.tie_word_embeddings else 1)
    if train.optimizer == "muon" and kind != "fsdp":  # matrices of one shape are stacked: gate and up of every layer
        stacked = 2 * c.num_hidden_layers * c.hidden_size * c.intermediate_size / tensor
        end["Muon's stacked matrices"] = 4 * stacked * width
    fullest: dict[str, float] = max((loss, layer, end), key=lambda moment: sum(moment.values()))
    return {**always, **fullest}


def activations(c: LlamaConfig, precision: str, checkpointing: str, tensor: int = 1) -> tuple[float, float, float]:
    """Bytes per token: kept by the layers for backward; kept by what follows them; and, while a layer's backward pass
    runs, those of its activations that are computed again and of its gradients.

    A layer keeps: the stream before each of its two norms, and each norm's output, which the products read; q, k and v
    as attention read them, its output, lse; gate, up and their SwiGLU. Nothing else: outputs of o and down are added to
    the stream and gone, RoPE keeps angles only, norms one number a row.
    """
    L, C, F, D = c.num_hidden_layers, c.hidden_size, c.intermediate_size / tensor, c.width
    H, Hkv = c.num_attention_heads / tensor, c.kv_heads / tensor
    e = 4 if precision == "float32" else 2  # of a value that products read
    stream = (2 if precision == "bfloat16" else 4) / tensor  # of the residual stream, float32 under autocast
    layer = 2 * C * stream + 2 * C * e + (2 * H + 2 * Hkv) * D * e + 3 * F * e + 4 * H + 8 / tensor
    last = C * stream + C * e + 24  # final norm: what it read and gave; loss, lse, ids, targets
    gradients = 2 * F * e + 2 * C * e
    if checkpointing == "none":
        return L * layer, last, gradients
    if (
        checkpointing == "full"
    ):  # what the block before gave, and the stream that it is to join; the first has no stream
        return (2 * L - 1) * C * stream, last, layer + gradients
    # Every product's output, the last of which the next layer reads, attention's output and lse; and the stream.
    products = ((H + 2 * Hkv) * D + H * D + 2 * C + 2 * F) * e + 4 * H
    again = (H + Hkv) * D * e + 2 * C * stream + 2 * C * e + F * e
    return L * (products + C * stream), last, again + gradients


def loss_block(tokens: int, c: LlamaConfig, kind: str) -> float:
    """Bytes that `linear_cross_entropy` holds at its fullest moment: a block of logits with their gradient. The C++
    kernel writes the one over the other, but makes the gradients of input and matrix in the forward pass."""
    if kind == "cpu":
        from .kernels.cross_entropy.bindings import chunks as blocks

        rows = max((block.stop - block.start for block in blocks(tokens, c.vocab_size)), default=0)
        return 4.0 * (rows * c.vocab_size + (tokens + c.vocab_size) * c.hidden_size)
    from .kernels.cross_entropy.reference import chunks

    rows = max((end - begin for begin, end in chunks(tokens, c.vocab_size)), default=0)
    return 3 * 4.0 * rows * c.vocab_size


def _layer_parameters(c: LlamaConfig) -> int:
    more = c.replace(num_hidden_layers=c.num_hidden_layers + 1)
    return more.num_parameters() - c.num_parameters()


def _matrices(c: LlamaConfig) -> int:
    """Parameters of the layers' matrices."""
    return c.num_parameters(embeddings=False)


# Time


def _time(p: Plan) -> dict[str, float]:
    c, train, d = p.config, p.train, p.device
    half = _precision(train, d) != "float32"
    rate = (d.flops if half else d.flops32) * d.reached
    products, others = _ops(p, torch.bfloat16 if half else torch.float32)
    recomputed = {"none": (0.0, 0.0), "selective": (0.0, 1.0), "full": (1.0, 1.0)}[train.checkpointing]

    def total(ops: list[tuple[Any, Any]], again: float) -> float:
        def spent(cost: Any) -> float:
            return max(cost.flops / rate, cost.bytes / d.bandwidth)

        return sum((1 + again) * spent(forward) + spent(backward) for forward, backward in ops)

    steps = p.accumulation
    time = {
        "products and attention": d.overhead * steps * total(products, recomputed[0]),
        "norms, RoPE, SwiGLU": d.overhead * steps * total(others, recomputed[1]),
    }
    mine = c.num_parameters() / train.tensor_parallel / (p.data if _parallel(train, p.ranks) == "fsdp" else 1)
    time["optimizer"] = 7 * 4 * mine / d.bandwidth  # reads weight, gradient, two moments; writes three of them
    hidden = sum(time.values()) - time["optimizer"]
    time["data parallelism, what computing can't hide"] = max(0.0, _data_traffic(p) - hidden)
    time["tensor parallelism"] = _tensor_traffic(p)
    return {name: seconds for name, seconds in time.items() if seconds or name == "products and attention"}


def _ops(p: Plan, dtype: torch.dtype) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """(forward, backward) costs of a micro-batch's products and attention, and of everything else."""
    c, tensor, B, T = p.config, p.train.tensor_parallel, p.micro, p.train.length
    C, F, D = c.hidden_size, c.intermediate_size // tensor, c.width
    H, Hkv, L = c.num_attention_heads // tensor, c.kv_heads // tensor, c.num_hidden_layers

    def empty(*shape: int) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    def both(name: str, times: int = 1, **inputs: Any) -> list[tuple[Any, Any]]:
        cost = OPS[name].cost
        return [tuple(_times(cost(inputs, backward), times) for backward in (False, True))]

    def product(inner: int, outer: int) -> tuple[Any, Any]:
        """A linear layer: one product forward, two backward."""
        moved = (B * T * (inner + outer) + inner * outer) * dtype.itemsize
        cost = _cost(moved, 2 * B * T * inner * outer)
        return _times(cost, L), _times(cost, 2 * L)

    x, angles = empty(B, T, C), torch.empty(T, D // 2, device="meta")
    q, k = empty(B, T, H, D), empty(B, T, Hkv, D)
    target = torch.empty(B * T // tensor, dtype=torch.int64, device="meta")
    products = [product(C, (H + 2 * Hkv) * D), product(H * D, C), product(C, 2 * F), product(F, C)]
    for window in sorted(set(c.windows), key=str):
        products += both("attention", c.windows.count(window), q=q, k=k, v=k, causal=True, window=window)
    rows = empty(B * T // tensor, C)
    products += both("linear_cross_entropy", input=rows, linear_weight=empty(c.vocab_size, C), target=target)
    part = empty(B, max(1, T // tensor), C)
    others = both("add_rms_norm", 2 * L, x=part, residual=part, weight=empty(C))
    others += both("apply_rope", L, q=q, k=k, cos=angles, sin=angles, rotary_dim=D)
    others += both("swiglu", L, gate=empty(B, T, F), up=empty(B, T, F))
    others += [(_cost(2 * x.numel() * dtype.itemsize, 0), _cost(3 * x.numel() * dtype.itemsize, 0))]  # embedding
    return products, others


def _cost(bytes: float, flops: float) -> Any:
    from .kernels.spec import Cost

    return Cost(int(bytes), int(flops))


def _times(cost: Any, n: int) -> Any:
    return cost._replace(bytes=cost.bytes * n, flops=cost.flops * n)


def _ring(size: float, ranks: int, p: Plan, stride: int) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes in all; an all-reduce is one of each.

    stride: ranks of the group are so far apart. What leaves a node does so by the adapters of all its GPUs that are in
    the group, which are at work at the same time.
    """
    if ranks == 1:
        return 0.0
    d = p.device
    inside = ranks * stride <= d.per_node
    speed = d.link if inside else min(d.link, d.network * max(1, d.per_node // stride))
    return size * (ranks - 1) / ranks / speed + HOP * math.ceil(math.log2(ranks))


def _data_traffic(p: Plan) -> float:
    """Seconds that gradients, and under fsdp parameters, are under way in a step."""
    c, train, kind = p.config, p.train, _parallel(p.train, p.ranks)
    if p.data == 1 or kind == "none":
        return 0.0
    half = 4 if _precision(train, p.device) == "float32" else 2
    parameters = c.num_parameters() / train.tensor_parallel
    if kind == "ddp":  # once a step, whatever is accumulated
        return 2 * _ring(4 * parameters, p.data, p, train.tensor_parallel)
    layers = c.num_hidden_layers + 1
    gather = layers * _ring(half * parameters / layers, p.data, p, train.tensor_parallel)
    scatter = layers * _ring(4 * parameters / layers, p.data, p, train.tensor_parallel)
    return p.accumulation * (2 * gather + scatter)  # parameters are gathered for forward and again for backward


def _tensor_traffic(p: Plan) -> float:
    """Seconds of the all-gathers and reduce-scatters around each block: computing waits for them."""
    c, tensor = p.config, p.train.tensor_parallel
    if tensor == 1:
        return 0.0
    half = 4 if _precision(p.train, p.device) == "float32" else 2
    once = _ring(p.micro * p.train.length * c.hidden_size * half, tensor, p, 1)
    again = 0.5 if p.train.checkpointing == "full" else 0.0
    # Two blocks a layer, each with one of both forward and one of both backward.
    return p.accumulation * c.num_hidden_layers * 8 * once * (1 + again)


def for_command(train: TrainConfig, gpu: str, nodes: int) -> str:
    """`pyllm train --plan` as text. The model is one of the presets or a config.json; no data is looked at.

    Raises:
        ValueError: an unknown GPU or model.
    """
    if gpu != "this" and gpu not in GPUS:
        raise ValueError(f"--gpu must be one of this, {', '.join(GPUS)}, got {gpu!r}")
    if nodes < 1:
        raise ValueError(f"--nodes must be at least 1, got {nodes}")
    if train.model in PRESETS:
        config = PRESETS[train.model]
    else:
        import json
        from pathlib import Path

        file = Path(train.model) / "config.json" if Path(train.model).is_dir() else Path(train.model)
        if not file.is_file():
            raise ValueError(f"--model {train.model} is neither a config.json nor one of {', '.join(PRESETS)}")
        config = LlamaConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    device = this_machine() if gpu == "this" else GPUS[gpu]
    return plan(config, train, device, nodes).table()
