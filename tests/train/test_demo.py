"""The demo end to end: everything is written, whatever ends it; and mistakes are answered with advice."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyllm import demo
from pyllm.cli import main
from pyllm.demo import Options, Recipe, choose_recipe
from pyllm.model import LlamaForCausalLM
from pyllm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
FILES = ["config.json", "log.csv", "model.safetensors", "sample.txt", "summary.json", "tokenizer.json"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of some Python files, to be quick."""
    folder = tmp_path_factory.mktemp("text")
    names = sorted(Path(os.__file__).parent.glob("*.py"))
    for name in names[20:110]:
        (folder / name.name).write_bytes(name.read_bytes()[:4000])
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model that takes milliseconds."""
    recipe = Recipe(vocab_size=300, hidden_size=32, layers=2, heads=2, intermediate_size=64, batch=4, length=32)
    monkeypatch.setattr(demo, "choose_recipe", lambda *where: recipe)


def options(text, out, **changes):
    return Options(**{"minutes": 1, "steps": 6, "text": str(text), "out": str(out), "threads": 1, **changes})


def rows(out):
    with open(out / "log.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_is_written_and_fits_together(text, tmp_path, capsys):
    out = tmp_path / "run"
    summary = demo.run(options(text, out))
    shown = capsys.readouterr().out
    assert {f.name for f in out.iterdir()} >= {*FILES, "loss.png"}
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == len(rows(out)) == 6
    assert summary["tokens"] == int(rows(out)[-1]["tokens"])
    for part in ("hardware", "kernels", "bits per byte", "zlib -9", "xz -9", "fused", "what next", str(out)):
        assert part in shown, part
    # The folder is the model that was judged.
    model, tokenizer = LlamaForCausalLM.from_pretrained(out), Tokenizer.load(out)
    from pyllm.corpus import text_corpus
    from pyllm.data import bits_per_byte, tokenize

    corpus = text_corpus(text)
    length = summary["recipe"]["length"]
    row = tokenize(corpus.validation, tokenizer)
    found = bits_per_byte(model, row, corpus.validation_bytes, length, length // 2)
    assert found == pytest.approx(summary["validation_bits_per_byte"], rel=1e-5)
    assert corpus.digest() == summary["corpus"]
    assert (out / "sample.txt").read_text().count("\ndef") >= 1


def test_same_seed_same_model(text, tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        demo.run(options(text, tmp_path / name, steps=3, seed=seed))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_ctrl_c_keeps_what_there_is(text, tmp_path, monkeypatch, capsys):
    real = demo.train

    def interrupted(*args, **kwargs):
        for done in real(*args, **kwargs):
            yield done
            if done.step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    out = tmp_path / "run"
    summary = demo.run(options(text, out, steps=50))
    assert not summary["finished"]
    assert summary["steps"] == len(rows(out)) == 3
    assert {f.name for f in out.iterdir()} >= set(FILES)
    assert "stopped by Ctrl-C" in capsys.readouterr().out
    assert main(["generate", str(out), "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def")


def test_ctrl_c_before_the_first_step(text, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(demo, "train", interrupted)
    summary = demo.run(options(text, tmp_path / "run"))
    assert summary["steps"] == summary["tokens"] == 0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "run")


def test_ctrl_c_while_judging_keeps_the_model(text, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "bits_per_byte", interrupted)
    summary = demo.run(options(text, tmp_path / "run"))
    assert "the model is saved" in capsys.readouterr().out
    assert summary["steps"] == 6
    assert "validation_bits_per_byte" not in summary
    assert {f.name for f in (tmp_path / "run").iterdir()} >= set(FILES)


def test_ctrl_c_while_reading_writes_nothing(text, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "text_corpus", interrupted)
    assert main(["demo", "--text", str(text), "--out", str(tmp_path / "run")]) == 130
    assert "stopped" in capsys.readouterr().err


def test_generate_is_repeatable_and_greedy_at_zero(text, tmp_path, capsys):
    out = tmp_path / "run"
    demo.run(options(text, out, steps=2))
    capsys.readouterr()

    def generate(*arguments):
        assert main(["generate", str(out), "--tokens", "8", *arguments]) == 0
        return capsys.readouterr().out

    assert generate("--seed", "1") == generate("--seed", "1")
    assert len({generate("--seed", str(seed)) for seed in range(5)}) > 1
    assert generate("--temperature", "0", "--seed", "1") == generate("--temperature", "0", "--seed", "2")
    assert generate("--prompt", "class A").startswith("class A")
    assert generate("--prompt", "class  ") == generate("--prompt", "class")  # the space is the model's to write


def test_eager_has_nothing_to_compare_with(text, tmp_path, capsys):
    summary = demo.run(options(text, tmp_path / "run", steps=2, backend="eager"))
    assert summary["comparison"] is None
    assert "nothing to compare" in capsys.readouterr().out


def test_sizes_grow_with_the_machine():
    def parameters(*arguments):
        recipe = choose_recipe(*arguments)
        return LlamaForCausalLM(recipe.config(0)).num_parameters()

    sizes = [parameters(*where) for where in ((0.1, False), (4, False), (16, False), (64, False), (4, True))]
    assert sizes == sorted(sizes)
    assert 300_000 < sizes[1] < 1_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--minutes", "0"], "--minutes must be positive, got 0.0"),
        (["demo", "--minutes", "nan"], "--minutes must be positive, got nan"),
        (["demo", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["demo", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["demo", "--prompt", ""], "--prompt must not be empty"),
        (["demo", "--backend", "fast"], "unknown backend 'fast'"),
        (["demo", "--backend", "cuda"], "--backend cuda,eager"),
        (["demo", "--text", "nowhere"], "neither a file nor a folder"),
        (["generate", "nowhere"], "has no config.json and no tokenizer.json; `pyllm demo --out nowhere`"),
        (["generate", "nowhere", "--tokens", "0"], "nowhere has no config.json"),
    ],
)
def test_mistakes_are_answered(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_holds_another_model_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "holds a model that no demo wrote" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_missing_packages_are_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else real(name))
    assert main(["demo"]) == 1
    assert "pip install tokenizers" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from pyllm.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip().endswith("False")
    for command in ("demo", "kernels", "generate"):
        assert command in found.stdout


def test_kernels_command(capsys):
    assert main(["kernels"]) == 0
    shown = capsys.readouterr().out
    assert "rms_norm" in shown
    assert "eager" in shown


@pytest.mark.slow
def test_the_command_on_the_real_corpus(tmp_path):
    transformers = pytest.importorskip("transformers")
    command = [sys.executable, "-m", "pyllm", "demo", "--minutes", "0.05", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    assert {f.name for f in (tmp_path / "run").iterdir()} >= {*FILES, "loss.png"}
    assert "\x1b[" not in found.stdout  # no terminal codes in a pipe
    commands = [line.strip() for line in found.stdout.split("what next:")[1].splitlines() if line.strip()]
    assert len(commands) == 3
    for command in (commands[0], commands[2], f"{commands[1]} --steps 2 --text {ROOT}"):
        again = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert again.returncode == 0, (command, again.stderr)
        assert again.stdout
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.randint(theirs.config.vocab_size, (1, 20))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_real_ctrl_c(text, tmp_path):
    command = [sys.executable, "-u", "-m", "pyllm", "demo", "--minutes", "5", "--out", "run", "--text", str(text)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopped by Ctrl-C" in rest
    assert "Traceback" not in errors
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
