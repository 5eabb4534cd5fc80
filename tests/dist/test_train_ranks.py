"""Several ranks train as one process does: DDP, FSDP2, tensor parallelism, and checkpoints between them (gloo)."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dist.ranks import ROOT, free_port, launch
from dist.train_worker import record
from train.run_helpers import config, write_corpus

from pyllm import train_run, train_state
from pyllm.model import LlamaForCausalLM
from pyllm.train_log import read_log

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

STEPS = 20


def given(folder: Path, name: str, **changes):
    """20 steps of 8 rows, two at a time. A small learning rate: what is compared is arithmetic, not how far Adam can
    magnify a rounding error of a gradient that is nearly zero."""
    values = dict(out=str(folder / name), steps=STEPS, micro_batch=2, lr=1e-3, save_every=10, validate_every=10, keep=9)
    return config(folder, **{**values, **changes})


def train(world: int, *configs) -> None:
    launch(world, [ROOT / "tests/dist/train_worker.py", *(json.dumps(dataclasses.asdict(c)) for c in configs)])


def alone(folder: Path) -> None:
    """The run that all others are compared with: no processes but this one, no torch.distributed."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run.machine, "matmul_peak", lambda *_: 1e11)
        patch.setattr(train_run, "picture", lambda *_: "")
        record(given(folder, "one"))
    torch.set_num_threads(before)


def compare(folder: Path, name: str, expected: str = "one", first: int = 0) -> None:
    """Every step's loss and gradients from step `first` on, the validation loss, and the weights at the end."""
    one, other = read_log(folder / expected / "log.csv"), read_log(folder / name / "log.csv")
    assert len(one) == len(other) == STEPS
    for a, b in zip(one, other, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5), (name, a["step"])
        assert float(b["gradient_norm"]) == pytest.approx(float(a["gradient_norm"]), rel=1e-4), (name, a["step"])
        assert (a["validation_loss"] == "") == (b["validation_loss"] == "")
        if a["validation_loss"]:
            assert float(b["validation_loss"]) == pytest.approx(float(a["validation_loss"]), rel=1e-5)
    found = torch.load(folder / name / "gradients.pt")
    wanted = torch.load(folder / expected / "gradients.pt")[first:]
    assert len(found) == len(wanted)
    for step, (a, b) in enumerate(zip(wanted, found, strict=True)):
        near = 1e-6 if step == 0 else 1e-5  # after the first step the weights have gone apart, too
        for p in a:
            assert float((b[p] - a[p]).norm()) <= near * float(a[p].norm()), (name, step, p)
    a, b = (LlamaForCausalLM.from_pretrained(folder / n).state_dict() for n in (expected, name))
    for p in a:
        torch.testing.assert_close(b[p], a[p], rtol=1e-4, atol=1e-5)


def test_two_ranks_equal_one(tmp_path):
    """DDP, FSDP2 and tensor parallelism on two ranks; and a run that one process began goes on on two, sharded."""
    write_corpus(tmp_path)
    alone(tmp_path)
    half = tmp_path / "one/checkpoints/step-00000010"
    configs = {
        "ddp": given(tmp_path, "ddp", parallel="ddp"),
        "fsdp": given(tmp_path, "fsdp", parallel="fsdp"),
        "tensor": given(tmp_path, "tensor", tensor_parallel=2),
        "more": given(tmp_path, "more", parallel="fsdp", resume=str(half)),
    }
    (tmp_path / "more").mkdir()
    lines = (tmp_path / "one/log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "more/log.csv").write_text("".join(lines[:11]))
    train(2, *configs.values())
    for name in ("ddp", "fsdp", "tensor"):
        compare(tmp_path, name)
    compare(tmp_path, "more", first=10)


@pytest.mark.slow
def test_four_ranks_equal_one_and_world_sizes_mix(tmp_path):
    """Four ranks in every arrangement, FSDP2 of tensor parallelism among them; then their shards go on on 1 and 2."""
    write_corpus(tmp_path)
    alone(tmp_path)
    four = {
        "ddp": given(tmp_path, "ddp", parallel="ddp"),
        "fsdp": given(tmp_path, "fsdp", parallel="fsdp", micro_batch=1),
        "both": given(tmp_path, "both", parallel="fsdp", tensor_parallel=2),
    }
    train(4, *four.values())
    for name in four:
        compare(tmp_path, name)

    lines = (tmp_path / "one/log.csv").read_text().splitlines(keepends=True)
    later = {}
    for source in four:
        name = f"{source}-later"
        half = tmp_path / source / "checkpoints/step-00000010"
        assert len(list((half / "state").glob("*.distcp"))) == 4  # every rank wrote its own
        later[name] = given(tmp_path, name, parallel="fsdp", resume=str(half))
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text("".join(lines[:11]))
    train(2, *later.values())
    for name in later:
        compare(tmp_path, name, first=10)
    for source in four:  # and on a single process, without torchrun
        out = tmp_path / f"{source}-alone"
        out.mkdir()
        (out / "log.csv").write_text("".join(lines[:11]))
        before = torch.get_num_threads()
        record(given(tmp_path, out.name, resume=str(tmp_path / source / "checkpoints/step-00000010")))
        torch.set_num_threads(before)
        compare(tmp_path, out.name, first=10)


@pytest.mark.slow
def test_sharded_muon_and_half_precision(tmp_path):
    """Muon under FSDP2 gathers whole matrices and so equals one process's; bfloat16 with float32 sums learns."""
    write_corpus(tmp_path)
    torch.set_num_threads(1)
    record(given(tmp_path, "one", optimizer="muon"))
    half = given(tmp_path, "half", parallel="fsdp", precision="bfloat16", lr=1e-2, sample_every=20, sample_tokens=4)
    train(
        2,
        given(tmp_path, "muon", optimizer="muon", parallel="fsdp"),
        given(tmp_path, "tensor-muon", optimizer="muon", tensor_parallel=2),
        half,
    )
    compare(tmp_path, "muon")
    compare(tmp_path, "tensor-muon")
    rows = read_log(tmp_path / "half/log.csv")
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    assert LlamaForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float32  # the masters


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command of the README, and that a rank's error ends all ranks with its message."""
    write_corpus(tmp_path)
    (tmp_path / "run.toml").write_text(given(tmp_path, "run", parallel="fsdp", steps=3).to_toml())

    def torchrun(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
             "-m", "pyllm", "train", "--config", tmp_path / "run.toml", *options],
            capture_output=True, text=True, timeout=400, cwd=ROOT,
        )  # fmt: skip

    done = torchrun()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 3/3") == 1  # one rank speaks
    assert "2 processes (fsdp, 1 to a matrix)" in done.stdout
    assert train_state.read_state(train_state.checkpoints(tmp_path / "run")[-1])["world"] == 2
    failed = torchrun("--batch", "7")
    assert failed.returncode != 0
    assert "--batch 7 must be a multiple of the 2 data ranks" in failed.stderr
    failed = torchrun("--model", "nowhere", "--out", str(tmp_path / "other"))
    assert failed.returncode != 0
    assert "--model nowhere is neither a file" in failed.stderr
