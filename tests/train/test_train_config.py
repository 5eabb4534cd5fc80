"""One dataclass, three ways in: flags, TOML, YAML; and a log that survives what happens to logs."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import sys
import types

import pytest

from pyllm import train_log
from pyllm.cli import main
from pyllm.train_config import TrainConfig, add_flags, add_plan_flags, from_flags
from pyllm.train_log import COLUMNS, TrainLog, read_log


def flags(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    add_plan_flags(parser)
    return from_flags(parser.parse_args(arguments))


def test_every_field_is_a_flag_with_its_default():
    assert flags() == TrainConfig()
    changed = {
        str: lambda spec: (spec.metadata["choices"] or ("x", "y"))[-1],
        int: lambda spec: 7,
        float: lambda spec: 0.25,
    }
    for spec in dataclasses.fields(TrainConfig):
        name = "--" + spec.name.replace("_", "-")
        if spec.name == "data":
            assert flags(name, "a", "b").data == ("a", "b")
        elif isinstance(spec.default, bool):
            assert getattr(flags(name), spec.name) is True
            assert getattr(flags(name.replace("--", "--no-")), spec.name) is False
        else:
            value = changed[type(spec.default)](spec)
            assert getattr(flags(name, str(value)), spec.name) == value
        assert spec.metadata["help"]


def test_files_say_the_same_and_flags_win(tmp_path):
    toml, yaml = tmp_path / "a.toml", tmp_path / "a.yaml"
    toml.write_text('data = ["x", "y"]\nlr = 1e-4\nclip = 2\ncompile = true\nout = "it\'s \\"here\\""\n')
    yaml.write_text('data: [x, y]\nlr: 1e-4\nclip: 2\ncompile: true\nout: it\'s "here"\n')
    expected = TrainConfig(data=("x", "y"), lr=1e-4, clip=2.0, compile=True, out='it\'s "here"')
    assert flags("--config", str(toml)) == flags("--config", str(yaml)) == expected
    assert flags("--config", str(toml), "--lr", "0.5", "--no-compile").lr == 0.5
    (tmp_path / "b.toml").write_text(expected.to_toml())
    assert flags("--config", str(tmp_path / "b.toml")) == expected
    assert TrainConfig.read(None, {}) == TrainConfig()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optimizer": "sgd"}, "--optimizer must be one of adamw, muon, got 'sgd'"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"lr": -1.0}, "--lr must be 0 or more, got -1.0"),
        ({"lr": float("nan")}, "--lr must be 0 or more, got nan"),
        ({"validation": 1.0}, "--validation must be at least 0 and below 1"),
        ({"final": 2.0}, "--final must be between 0 and 1"),
        ({"data": ()}, "--data needs at least one file"),
        ({"data": [1]}, "--data must be a list of strings"),
        ({"micro_batch": "four"}, "--micro-batch must be of type int, got 'four'"),
        ({"compile": 1}, "--compile must be of type bool"),
        ({"lr": "fast"}, "--lr must be a number, got 'fast'"),
        ({"compile": True, "checkpointing": "selective"}, "--compile does not go with --checkpointing selective"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_wrong_files(tmp_path):
    def read(name, text):
        (tmp_path / name).write_text(text)
        return TrainConfig.read(str(tmp_path / name), {})

    with pytest.raises(ValueError, match=r"a\.toml: unknown key 'learning_rate'; known are .*lr"):
        read("a.toml", "learning_rate = 1")
    with pytest.raises(ValueError, match=r"a\.toml is not valid TOML"):
        read("a.toml", "lr = = 1")
    with pytest.raises(ValueError, match=r"a\.yaml is not valid YAML"):
        read("a.yaml", "a: [")
    with pytest.raises(ValueError, match=r"a\.yaml must hold keys and values, got list"):
        read("a.yaml", "- 1")
    with pytest.raises(ValueError, match=r"nowhere\.toml does not exist"):
        TrainConfig.read(str(tmp_path / "nowhere.toml"), {})


def test_the_command_reports_errors_in_one_line(capsys, tmp_path):
    assert main(["train", "--steps", "0"]) == 1
    assert capsys.readouterr().err == "pyllm train: --steps must be at least 1, got 0\n"
    assert main(["train", "--data", str(tmp_path / "no.txt"), "--out", str(tmp_path / "run")]) == 1
    assert "no.txt does not exist; give files, folders or 'python'" in capsys.readouterr().err
    assert main(["train", "--plan", "--gpu", "h100", "--batch", "16", "--model", "llama-3.2-1b"]) == 0
    assert "nothing was run" in capsys.readouterr().out


def row(step, **values):
    return {"step": step, "seconds": 0.5 * step, "tokens": 10 * step, "loss": 1.0 / step, **values}


def test_a_log_goes_on_where_the_checkpoint_stands(tmp_path):
    log = TrainLog(tmp_path, 0)
    for step in range(1, 6):
        log.add(row(step, validation_loss=3.0 if step == 2 else None))
    log.close()
    with open(tmp_path / "log.csv", "a") as file:
        file.write("6,3.0,6")  # the process died here
    assert [r["step"] for r in read_log(tmp_path / "log.csv")] == ["1", "2", "3", "4", "5"]
    log = TrainLog(tmp_path, 3)
    log.add(row(4, loss=9.0))
    rows = read_log(tmp_path / "log.csv")
    assert [(r["step"], r["loss"]) for r in rows] == [("1", "1"), ("2", "0.5"), ("3", "0.333333"), ("4", "9")]
    assert log.curve("validation_loss") == [(1.0, 3.0)]
    assert list(rows[0]) == list(COLUMNS)
    assert read_log(tmp_path / "nothing.csv") == []


def test_a_full_disk_loses_no_row(tmp_path, monkeypatch):
    log = TrainLog(tmp_path, 0)
    log.add(row(1))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train_log.csv, "DictWriter", full)
        log.add(row(2))
        log.add(row(3))
        assert "No space left" in str(log.problem)
    log.add(row(4))
    assert log.problem is None
    assert [r["step"] for r in read_log(tmp_path / "log.csv")] == ["1", "2", "3", "4"]


def test_tensorboard_gets_the_same_numbers_where_it_is_installed(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            self.made, self.scalars = (folder, purge_step), []

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.scalars.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(train_log.importlib.util, "find_spec", lambda name: name == "tensorboard")
    log = TrainLog(tmp_path, 2)
    log.add(row(3, validation_loss=None))
    log.close()
    assert log.board.made == (str(tmp_path / "tensorboard"), 3)  # what an earlier run wrote from step 3 on is dropped
    assert log.board.scalars == [("seconds", 1.5, 3), ("loss", 1 / 3, 3), "closed"]
