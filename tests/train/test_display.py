"""What is drawn is what was measured."""

from __future__ import annotations

import io
import sys

import pytest

from pyllm import display
from pyllm.display import Display, LiveDisplay, Status, duration, make_display, picture, plot


def test_plot_has_its_shape():
    curve = [(float(i), 4.0 - i / 30) for i in range(100)]
    drawn = plot(curve, [(50.0, 2.4)], {"zlib -9": 2.0}, width=60, height=8).splitlines()
    assert len(drawn) == 10
    assert all(len(line) <= 60 for line in drawn)
    assert "".join(drawn).count("●") == 1
    assert sum("zlib -9" in line for line in drawn) == 1
    assert drawn[-1].strip().startswith("0:00")
    assert drawn[-1].endswith("1:39")


def test_plot_falls_from_left_to_right():
    curve = [(float(i), 3.0 - 0.01 * i) for i in range(101)]
    drawn = plot(curve, width=60, height=9).splitlines()[:9]
    first = [min((i for i, ch in enumerate(line[8:]) if ch != " "), default=None) for line in drawn]
    filled = [column for column in first if column is not None]
    assert filled == sorted(filled)
    assert filled[0] == 0
    assert filled[-1] > 40


def test_plot_in_ascii_and_with_too_little_to_draw():
    drawn = plot([(0.0, 2.0), (1.0, 1.0)], [(1.0, 1.0)], {"zip": 1.5}, unicode=False)
    assert drawn.isascii()
    assert "*" in drawn
    assert plot([(0.0, 1.0)]) == ""
    assert plot([(0.0, 1.0), (1.0, 1.0)])  # a flat line divides by no zero
    assert plot([(2.0, 1.0), (2.0, 3.0)])  # nor do points at one time


def test_duration_and_line():
    assert duration(0) == "0:00"
    assert duration(65.4) == "1:05"
    assert duration(119.9) == "2:00"
    line = Status(step=7, seconds=30, limit=120, fraction=0.25, loss=2.5, validation=1.95, speed=12345).line()
    for part in ("7", "2.500", "1.950", "12,345", "1:30 left"):
        assert part in line


def test_plain_lines_come_every_few_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "perf_counter", lambda: now[0])
    shown = Display()
    for _ in range(21):
        shown.update(Status())
        now[0] += 1.0
    assert len(capsys.readouterr().out.splitlines()) == 5  # at 0, 5, 10, 15 and 20 seconds


def test_pipe_gets_plain_lines(monkeypatch):
    assert type(make_display()) is Display  # pytest's capture is no terminal
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    assert isinstance(make_display(), LiveDisplay)
    assert type(make_display(plain=True)) is Display


def test_live_panel_draws(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    status = Status(step=3, fraction=0.5, loss=1.0, train_curve=[(0.0, 3.0), (9.0, 2.0)], validation_curve=[(9.0, 2.1)])
    with LiveDisplay({"zlib -9": 2.0}) as shown:
        shown.update(status, force=True)
        shown.sample(status, "def ", "f(x):\n    [bold]return[/bold] x")
    text = terminal.getvalue()
    assert "step     3" in text
    assert "[bold]return[/bold] x" in text  # the model's text is not read as markup


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    status = Status(train_curve=[(0.0, 3.0), (1.0, 2.0)], validation_curve=[(1.0, 2.1)])
    assert picture(tmp_path / "loss.png", status, {"zlib -9": 2.0}) == ""
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert picture(tmp_path / "empty.png", Status(), {"zlib -9": 2.0}) == ""


def test_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert "matplotlib can't be imported" in picture(tmp_path / "loss.png", Status(), {})
    assert not (tmp_path / "loss.png").exists()
