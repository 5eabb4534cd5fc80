"""A whole run: it learns, it leaves what it should, it goes on where it stopped, and it loses nothing to errors."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
import torch
from train.run_helpers import config, write_corpus

from pyllm import train_run, train_state
from pyllm.display import Display
from pyllm.model import LlamaForCausalLM
from pyllm.tokenizer import Tokenizer
from pyllm.train_config import TrainConfig
from pyllm.train_log import read_log
from pyllm.train_run import Run, run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.setattr(train_run.machine, "matmul_peak", lambda *_: 1e11)
    monkeypatch.setattr(train_run, "picture", lambda *_: "")
    before = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(before)


def weights(path):
    return LlamaForCausalLM.from_pretrained(path).state_dict()


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class StopAt(Display):
    """Stops a run as Ctrl-C does, at a step."""

    def __init__(self, run, step):
        super().__init__()
        self.run, self.step = run, step

    def update(self, status, force=False):
        if status.step == self.step:
            self.run.stopping = "SIGINT"


def interrupted(given, step, monkeypatch):
    """The run of a config, stopped after a step."""
    one = Run(given)
    with monkeypatch.context() as patch:
        patch.setattr(train_run, "make_display", lambda *_: StopAt(one, step))
        summary = one.go()
    assert not summary["finished"]
    assert summary["step"] == step


def test_a_run_and_what_it_leaves(folder, capsys):
    given = config(folder, steps=60, lr=1e-2, sample_every=30, sample_tokens=5)
    summary = run(given)
    out = folder / "run"
    rows = read_log(out / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert float(rows[0]["loss"]) == pytest.approx(math.log(320), abs=0.2)
    assert float(rows[-1]["loss"]) < 0.75 * float(rows[0]["loss"])
    assert [row["step"] for row in rows if row["validation_loss"]] == [str(step) for step in range(5, 61, 5)]
    assert float(rows[-1]["validation_loss"]) < 0.8 * float(rows[4]["validation_loss"])
    assert int(rows[-1]["tokens"]) == 60 * 8 * 32
    assert [p.name for p in train_state.checkpoints(out)] == ["step-00000056", "step-00000060"]  # --keep 2
    assert_same(out, out / "checkpoints/step-00000060")
    assert Tokenizer.load(out).vocab_size == summary_of(out)["tokenizer"]
    assert TrainConfig.read(str(out / "config.toml"), {}) == config(
        folder, steps=60, lr=1e-2, sample_every=30, sample_tokens=5
    )
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    shown = capsys.readouterr().out
    assert "step 60/60 | loss" in shown
    assert "bits/byte" in shown and "tokens/s | MFU" in shown
    assert "the model continues 'def '" in shown
    assert "bits per byte over time" in shown


def summary_of(out):
    model = json.loads((out / "config.json").read_text())
    assert model["vocab_size"] == 320
    return {"tokenizer": Tokenizer.load(out / "tokenizer").vocab_size}


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "schedule": "wsd", "precision": "autocast"}])
def test_stopped_and_resumed_is_bitwise_uninterrupted(folder, monkeypatch, options):
    whole = config(folder, out=str(folder / "whole"), **options)
    run(whole)
    parts = config(folder, **options)
    interrupted(parts, 3, monkeypatch)  # between two checkpoints, and again
    interrupted(parts, 7, monkeypatch)
    assert run(parts)["finished"]
    assert_same(folder / "whole", folder / "run")
    one, other = read_log(folder / "whole/log.csv"), read_log(folder / "run/log.csv")
    assert [(r["step"], r["loss"], r["tokens"], r["gradient_norm"]) for r in one] == [
        (r["step"], r["loss"], r["tokens"], r["gradient_norm"]) for r in other
    ]


def test_a_run_can_be_made_longer_and_a_finished_one_stays(folder, capsys):
    run(config(folder, steps=4))
    before = (folder / "run/checkpoints/step-00000004/training.json").read_bytes()
    assert run(config(folder, steps=4))["finished"]
    assert "all steps are done" in capsys.readouterr().out
    assert (folder / "run/checkpoints/step-00000004/training.json").read_bytes() == before
    assert run(config(folder, steps=6))["step"] == 6


def test_threads_and_micro_batches_change_no_bit_that_they_must_not(folder):
    """The same micro-batches by one thread and by two: the sums are taken in the same order."""
    run(config(folder, micro_batch=2, out=str(folder / "one")))
    run(config(folder, micro_batch=2, threads=2))
    assert_same(folder / "one", folder / "run")


def test_validation_counts_every_byte(folder):
    """Bits per byte by hand: every validation target's surprise, over the bytes these targets stand for."""
    one = Run(config(folder, steps=1, batch=4, validation_rows=1000))
    one.go()
    rows = one.validation
    assert one.validation_rows == rows.per_epoch  # no row twice
    model = LlamaForCausalLM.from_pretrained(folder / "run")
    nats = targets = size = 0
    for row in range(rows.per_epoch):
        batch = rows.batch(row, 1)
        logits = model(batch.inputs, cu_seqlens=batch.cu_seqlens).logits[0].double().log_softmax(-1)
        nats -= float(logits[torch.arange(32), batch.targets[0]].sum().detach())
        targets += 32
        size += len(one.tokenizer.decode_bytes(batch.targets[0].tolist(), skip_special=True))
    last = read_log(folder / "run/log.csv")[-1]
    assert float(last["validation_loss"]) == pytest.approx(nats / targets, rel=1e-5)
    assert float(last["validation_bits_per_byte"]) == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_half_precision_learns(folder, precision):
    run(config(folder, steps=30, lr=1e-2, precision=precision, validate_every=0))
    rows = read_log(folder / "run/log.csv")
    assert float(rows[-1]["loss"]) < 0.85 * float(rows[0]["loss"])
    stored = json.loads((folder / "run/config.json").read_text())["dtype"]
    assert stored == ("bfloat16" if precision == "bfloat16" else "float32")


def test_without_validation(folder, capsys):
    summary = run(config(folder, steps=2, validation=0.0))
    assert summary["validation_bits_per_byte"] is None
    assert "validation: none" in capsys.readouterr().out
    assert all(not row["validation_loss"] for row in read_log(folder / "run/log.csv"))


def test_training_goes_on_from_a_models_folder(folder):
    run(config(folder, steps=2))
    start = Run(config(folder, model=str(folder / "run"), out=str(folder / "more"), steps=1, lr=0.0))
    start.go()
    assert_same(folder / "run", folder / "more")  # a learning rate of 0 leaves them as they came


# What goes wrong


def poisoned(monkeypatch, steps):
    """Gradients that are not finite at some steps."""
    true, seen = train_run.gradients, []

    def gradients(model, *args):
        loss, count = true(model, *args)
        seen.append(loss)
        if len(seen) in steps:
            next(model.parameters()).grad[0, 0] = float("inf" if len(seen) % 2 else "nan")
        return loss, count

    monkeypatch.setattr(train_run, "gradients", gradients)


def test_a_bad_step_is_skipped(folder, monkeypatch, capsys):
    poisoned(monkeypatch, {3, 4})
    summary = run(config(folder))
    assert summary["finished"]
    assert summary["skipped_steps"] == 2
    assert "step 3: loss" in capsys.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder / "run").values())
    assert [row["gradient_norm"] for row in read_log(folder / "run/log.csv")][2:4] == ["inf", "nan"]


def test_bad_steps_in_a_row_stop_the_run_and_lose_nothing(folder, monkeypatch):
    run(config(folder, out=str(folder / "good"), steps=12))
    given = config(folder, bad_steps=3, save_every=100)
    poisoned(monkeypatch, {6, 7, 8})
    with pytest.raises(
        FloatingPointError, match=r"not finite in 3 steps in a row, up to step 8; .* saved in .*--backend eager"
    ):
        run(given)
    state = train_state.read_state(train_state.checkpoints(folder / "run")[-1])
    assert (state["step"], state["bad"], state["skipped"]) == (8, 3, 3)
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder / "run/checkpoints/step-00000008").values())
    assert run(given)["finished"]  # from there: the poison is gone, and the count of bad steps starts again


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["dcp.save", "torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_stops_nothing_until_the_end(folder, monkeypatch, capsys, where):
    """Some saves fail, the run goes on; then there is room again."""
    run(config(folder, out=str(folder / "good")))
    interrupted(config(folder), 4, monkeypatch)
    module, name = where.split(".")
    target = getattr(train_state, module) if module != "torch" else torch
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full_disk)
        with pytest.raises(
            OSError, match=r"step 12 could not be written .*No space left on device.*newest one is .*step-00000004"
        ):
            run(config(folder))
    assert "step 8 could not be written" in capsys.readouterr().out
    assert [p.name for p in (folder / "run/checkpoints").iterdir()] == ["step-00000004"]
    assert run(config(folder))["finished"]
    assert_same(folder / "good", folder / "run")


def test_an_unwritable_folder_fails_before_any_work(folder):
    (folder / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        run(config(folder, out=str(folder / "file/run")))
    if os.geteuid() != 0:  # root may write anywhere
        (folder / "locked").mkdir(mode=0o555)
        with pytest.raises(PermissionError):
            run(config(folder, out=str(folder / "locked/run")))


def test_checkpoints_of_another_run_are_refused(folder):
    run(config(folder, steps=2))
    other = json.loads((folder / "model.json").read_text()) | {"intermediate_size": 96}
    (folder / "other.json").write_text(json.dumps(other))
    for change, message in (
        ({"length": 16}, r"another length \(32, now 16\)"),
        ({"batch": 4}, r"another batch \(8, now 4\)"),
        ({"optimizer": "muon"}, r"another optimizer \(adamw, now muon\)"),
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"model": str(folder / "other.json")}, r"another model: intermediate_size \(64, now 96\)"),
        ({"validation": 0.1}, r"the data of the checkpoints in .* was made with other validation"),
        ({"vocab_size": 300}, r"the tokenizer of the checkpoints in .* was made with other vocab_size"),
        ({"resume": "no"}, r"holds checkpoints of an earlier run, step-00000002 the last"),
        ({"resume": str(folder)}, r"is no checkpoint of pyllm train"),
    ):
        with pytest.raises(ValueError, match=message):
            run(config(folder, **{"steps": 3, **change}))
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match="was made with other sources"):
        run(config(folder, steps=3))
    assert train_state.read_state(folder / "run/checkpoints/step-00000002")["step"] == 2


def test_a_damaged_checkpoint_is_named_and_an_older_one_goes_on(folder):
    run(config(folder, steps=8))
    newest = folder / "run/checkpoints/step-00000008"
    file = next((newest / "state").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"distcp has \d+ bytes instead of \d+: the checkpoint is damaged; remove .*00008"
    ):
        run(config(folder, steps=9))
    (newest / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training\.json is damaged"):
        run(config(folder, steps=9))
    assert run(config(folder, steps=9, resume=str(folder / "run/checkpoints/step-00000004")))["finished"]


def test_models_that_do_not_fit(folder):
    small = json.loads((folder / "model.json").read_text()) | {"vocab_size": 300}
    (folder / "small.json").write_text(json.dumps(small))
    for change, message in (
        ({"model": str(folder / "small.json")}, r"the tokenizer has 315 tokens, --model .*small\.json only 300"),
        ({"model": "gpt-7"}, r"--model gpt-7 is neither a file, .* nor one of .*tiny"),
        ({"length": 300}, r"--length 300 is more than --model .* can read \(max_position_embeddings = 256\)"),
        ({"parallel": "ddp"}, r"--parallel ddp needs torchrun"),
        ({"tensor_parallel": 2}, r"--tensor-parallel 2 needs as many processes"),
    ):
        with pytest.raises(ValueError, match=message):
            run(config(folder, **change))


def test_ready_made_tokens_need_their_tokenizer(folder):
    run(config(folder, steps=1))
    data = (str(folder / "run/data"),)
    with pytest.raises(ValueError, match="say which tokenizer made them with --tokenizer"):
        run(config(folder, data=data, out=str(folder / "b")))
    assert run(config(folder, data=data, out=str(folder / "b"), tokenizer=str(folder / "run"), steps=1))["finished"]
    assert not (folder / "b/data").exists()
    assert_same(folder / "run", folder / "b")
    Tokenizer.train(["other words"], 300).save(folder / "other")
    with pytest.raises(ValueError, match="made by another tokenizer"):
        run(config(folder, data=data, out=str(folder / "c"), tokenizer=str(folder / "other")))
