"""`kill -9` at any moment, also in the middle of a save: the next run goes on, and ends at the very same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train.run_helpers import config, write_corpus

from pyllm import train_run, train_state
from pyllm.model import LlamaForCausalLM
from pyllm.train_log import read_log

ROOT = Path(__file__).parents[2]
STEPS = 40


def start(given, slow_disk=0.0, largest_file=0):
    file = Path(given.out + ".toml")
    file.write_text(given.to_toml())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / "tests/train/kill_worker.py", file, str(slow_disk), str(largest_file)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def wait_for(condition, process):
    end = time.monotonic() + 240
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)


def weights(folder):
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What isn't tested here takes no time, and a run leaves this process's threads as they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run.machine, "matmul_peak", lambda *_: 1e11)
        patch.setattr(train_run, "picture", lambda *_: "")
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick):
    """A folder with the corpus, the weights of the run that nobody interrupted, and about how long a process takes."""
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder)
    began = time.monotonic()
    train_run.run(config(folder, steps=STEPS, save_every=3))
    return folder, weights(folder / "run"), 2 * (time.monotonic() - began) + 3


def trial(whole, out, kill, slow_disk):
    """Kill a run once, let it go on to the end, and compare."""
    folder, expected, _ = whole
    given = config(folder, steps=STEPS, save_every=3, out=str(out))
    process = start(given, slow_disk)
    kill(process, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    left = [p.name for p in (out / "checkpoints").glob("*")]
    assert train_run.run(given)["finished"]
    got = weights(out)
    for name, tensor in expected.items():
        assert (got[name] == tensor).all(), (name, left)
    assert [int(row["step"]) for row in read_log(out / "log.csv")] == list(range(1, STEPS + 1))
    assert not list((out / "checkpoints").glob("tmp-*")), "what the killed save left"
    return left


def during_a_save(which):
    """A moment at which the `which`-th save is under way: its folder is there and not renamed yet."""

    def kill(process, out):
        wait_for(lambda: any((out / "checkpoints").glob(f"tmp-{3 * which:08d}")), process)
        time.sleep(random.Random(which).random() * 0.05)

    return kill


def at(seconds):
    def kill(process, out):
        time.sleep(seconds)

    return kill


def test_killed_during_a_save(whole, tmp_path):
    left = trial(whole, tmp_path / "run", during_a_save(4), slow_disk=0.004)
    assert any(name.startswith("tmp-") for name in left), f"the kill missed the save: {left}"


@pytest.mark.slow
def test_killed_while_it_trains(whole, tmp_path):
    def kill(process, out):
        wait_for(lambda: len(read_log(out / "log.csv")) >= 17, process)

    left = trial(whole, tmp_path / "run", kill, slow_disk=0.0)
    assert left


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_killed_at_a_random_moment(whole, tmp_path, number):
    """From the start of the process to the end of the run; every second trial with a disk so slow that nearly all of
    the time is spent in saves, and every fifth within a save for certain."""
    draw = random.Random(number)
    slow = 0.004 * (number % 2)
    if number % 5 == 4:
        trial(whole, tmp_path / "run", during_a_save(draw.randint(1, 12)), 0.004)
    else:
        trial(whole, tmp_path / "run", at(draw.random() * (whole[2] + 200 * slow)), slow)


@pytest.mark.slow
def test_terminated_politely_it_saves_first(whole, tmp_path):
    folder, expected, _ = whole
    out = tmp_path / "run"
    given = config(folder, steps=STEPS, save_every=0, out=str(out))
    process = start(given)
    wait_for(lambda: len(read_log(out / "log.csv")) >= 5, process)
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == 0, errors
    (saved,) = train_state.checkpoints(out)
    assert 5 <= train_state.read_state(saved)["step"] < STEPS
    assert train_run.run(given)["finished"]
    got = weights(out)
    assert all((got[name] == tensor).all() for name, tensor in expected.items())


@pytest.mark.slow
def test_a_disk_that_is_really_full(whole, tmp_path):
    """The operating system writes no more than 60 kB to a file: an error that says so, and no half checkpoint."""
    folder, expected, _ = whole
    out = tmp_path / "run"
    given = config(folder, steps=STEPS, save_every=3, out=str(out))
    code, errors = finish(start(given, largest_file=60_000))
    assert code == 1
    assert "step 40 could not be written" in errors
    assert "File too large" in errors
    assert not list((out / "checkpoints").iterdir())
    assert train_run.run(given)["finished"]
    got = weights(out)
    assert all((got[name] == tensor).all() for name, tensor in expected.items())
