"""The plan against what was measured here, and against arithmetic that is easy to check."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyllm import machine
from pyllm import plan as planning
from pyllm.config import PRESETS
from pyllm.distributed import Cluster
from pyllm.model import LlamaForCausalLM
from pyllm.optim import adamw, muon_and_adamw
from pyllm.packing import Batch
from pyllm.plan import GB, GPUS, Device, for_command, measured_step, plan, this_machine
from pyllm.train import Workers
from pyllm.train_config import TrainConfig
from pyllm.train_step import checkpoint_activations, gradients

WIDE = PRESETS["small"].replace(num_hidden_layers=3, vocab_size=2048)
DEEP = PRESETS["tiny"].replace(num_hidden_layers=6, vocab_size=512, tie_word_embeddings=False)
LAPTOP = Device("laptop", 1e11, 1e11, 16 * GB, 1e10, 1e9, 1e9, 1, 1.0, kind="cpu")


def measured_memory(config, train):
    """Bytes at the fullest moment of a step: parameters and optimiser states, and what torch's allocator saw on top."""
    model = LlamaForCausalLM(config).train()
    checkpoint_activations(model, train.checkpointing)
    if train.precision == "bfloat16":
        model.to(torch.bfloat16)
    optimizer = muon_and_adamw(model) if train.optimizer == "muon" else adamw(model)
    micro = train.micro_batch or train.batch
    ids = torch.randint(config.vocab_size, (micro, train.length + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, ids[:, 1:].numel())
    autocast = torch.bfloat16 if train.precision == "autocast" else None

    def step():
        optimizer.zero_grad()
        gradients(model, [batch] * (train.batch // micro), Cluster(torch.device("cpu")), Workers(), autocast)
        optimizer.step()

    step()
    optimizer.zero_grad()
    states = [t for one in optimizer.optimizers for state in one.state.values() for t in state.values()]
    before = sum(t.nbytes for t in (*model.parameters(), *states) if isinstance(t, torch.Tensor))
    return before + machine.peak_allocated(step)


@pytest.mark.parametrize(
    "config, changes",
    [
        (WIDE, {}),
        (WIDE, {"checkpointing": "selective"}),
        (WIDE, {"checkpointing": "full"}),
        (WIDE, {"micro_batch": 1}),
        (WIDE, {"batch": 1, "length": 64}),  # nearly all of it weights, gradients and moments
        (DEEP, {"length": 128}),
        (WIDE, {"precision": "autocast"}),
        (WIDE, {"precision": "bfloat16", "length": 64}),
        (WIDE, {"batch": 1, "length": 64, "optimizer": "muon"}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_memory_is_what_was_measured(config, changes):
    train = TrainConfig(**{"length": 128, "batch": 4, "precision": "float32", **changes})
    planned, measured = plan(config, train, LAPTOP).bytes / 1e6, measured_memory(config, train) / 1e6
    assert planned == pytest.approx(measured, rel=0.08)


@pytest.mark.slow
def test_time_is_what_was_measured():
    """Steps of three models that the calibration hasn't seen, on a machine that may be busy with something else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for config, changes in (
            (PRESETS["small"], {}),
            (PRESETS["small"].replace(hidden_size=384, intermediate_size=1024, num_attention_heads=6), {"batch": 2}),
            (WIDE, {"checkpointing": "full", "length": 512}),
        ):
            train = TrainConfig(**{"length": 256, "batch": 4, "precision": "float32", **changes})
            device = this_machine()
            ratio = measured_step(config, train) / plan(config, train, device).seconds
            assert 0.6 < ratio < 1.7, (changes, ratio)
    finally:
        torch.set_num_threads(before)


def test_time_is_a_roofline():
    """The products' share alone: useful operations at the matrix rate, and no op faster than its bytes."""
    train = TrainConfig(length=2048, batch=8, parallel="fsdp", micro_batch=1)
    config = PRESETS["llama-3-8b"]
    made = plan(config, train, dataclasses.replace(GPUS["h100"], reached=1.0))
    floor = train.batch * train.length * config.flops_per_token(train.length) / (8 * 989e12)
    assert floor < made.time["products and attention"] < 1.2 * floor
    slow = plan(config, train, dataclasses.replace(GPUS["h100"], bandwidth=1e9))
    assert slow.seconds > 20 * made.seconds


def test_sharding_divides_what_it_should():
    config, big = PRESETS["llama-3-70b"], TrainConfig(length=4096, batch=2048, micro_batch=1, parallel="fsdp")
    for nodes in (16, 256):
        made = plan(config, big, GPUS["h100"], nodes)
        assert made.memory["weights"] == pytest.approx(4 * config.num_parameters() / (8 * nodes))
        assert made.memory["optimizer (adamw)"] == pytest.approx(8 * config.num_parameters() / (8 * nodes))
    copies = plan(config, dataclasses.replace(big, parallel="ddp"), GPUS["h100"], 16)
    assert copies.memory["weights"] == 4 * config.num_parameters()
    assert "does not fit" in copies.verdict()
    whole, split = (plan(config, dataclasses.replace(big, tensor_parallel=n), GPUS["h100"], 16) for n in (1, 8))
    assert split.memory["activations"] < 0.45 * whole.memory["activations"]
    assert split.time["tensor parallelism"] > 0
    few, many = (plan(config, big, GPUS["h100"], nodes).tokens_per_second for nodes in (16, 256))
    assert 8 * few < many < 16.1 * few
    full = plan(config, dataclasses.replace(big, checkpointing="full"), GPUS["h100"], 16)
    assert full.bytes < whole.bytes
    assert full.time["products and attention"] > 1.3 * whole.time["products and attention"]


def test_thousands_of_gpus_and_the_words_for_them():
    text = for_command(TrainConfig(model="llama-3-8b", length=8192, batch=4096, parallel="fsdp"), "h100", 512)
    assert "4096 x H100 SXM in 512 nodes: 4096 data (fsdp) x 1 tensor" in text
    assert "10^12 tokens would take" in text
    assert "An estimate (data sheet rates, products at 70% of them); nothing was run." in text


def test_impossible_plans():
    for train, gpu, nodes, message in (
        ({"batch": 12}, "h100", 1, "--batch 12 must be a multiple of the 8 data ranks"),
        ({"tensor_parallel": 3}, "h100", 1, "--tensor-parallel 3 must divide the 8 GPUs"),
        ({"tensor_parallel": 4}, "h100", 1, "must divide the model's 2 key-value heads"),
        ({}, "h900", 1, "--gpu must be one of this, a100"),
        ({}, "h100", 0, "--nodes must be at least 1, got 0"),
        ({"model": "nothing"}, "h100", 1, "--model nothing is neither a config.json nor one of"),
    ):
        with pytest.raises(ValueError, match=message):
            for_command(TrainConfig(**train), gpu, nodes)


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(planning.machine, "matmul_peak", lambda *_: 5e10)
    monkeypatch.setattr(planning.machine, "copy_peak", lambda *_: 1e10)
    device = this_machine()
    assert device.overhead > 0
    assert device.memory > 1e8
    assert "rates measured here" in plan(WIDE, TrainConfig(), device).table()
