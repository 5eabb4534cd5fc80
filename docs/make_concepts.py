"""The figures of docs/concepts.md, computed by the ops that they explain: python docs/make_concepts.py [--out DIR]"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer
from pyllm.corpus import python_corpus
from pyllm.kernels import apply_rope, attention, swiglu
from pyllm.optim import muon_and_adamw

GREY, BLUE, RED, GREEN, SAND = "#c9ced6", "#2f6fb5", "#c1452f", "#3c8d5a", "#e3b23c"
LINE = 'def mean(values):  # Lovelace\'s "first" one\n    return sum(values) / len(values)'


def tokens(folder: Path) -> None:
    """A vocabulary learned from Python's own source, and what it makes of two lines."""
    texts = [document.data for document in python_corpus().train[:400]]
    tokenizer = Tokenizer.train(texts, vocab_size=2048)
    figure, axis = plt.subplots(figsize=(9, 1.7))
    colours = ("#dbe7f5", "#f7e6c4", "#d9efdf", "#f6d9d3")
    column = row = number = 0
    for id in tokenizer.encode(LINE):
        for part in tokenizer.decode([id]).splitlines(keepends=True):
            shown = part.replace("\n", "↵")
            axis.add_patch(Rectangle((column, -row - 0.42), len(shown), 0.84, color=colours[number % 4], lw=0))
            for i, character in enumerate(shown):
                axis.text(column + i + 0.5, -row, character, ha="center", va="center", family="monospace", fontsize=12)
            column += len(shown)
            if part.endswith("\n"):
                column, row = 0, row + 1
        number += 1
    axis.set_xlim(0, max(map(len, LINE.split("\n"))) + 1)
    axis.set_ylim(-row - 0.6, 0.6)
    axis.axis("off")
    axis.set_title(f"{len(LINE)} characters, {number} tokens; a colour is a token", fontsize=10, loc="left")
    save(figure, folder / "tokens.png")


def cross_entropy(folder: Path) -> None:
    """-log p over p, with the worked example."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    p = torch.linspace(0.01, 1, 400)
    axis.plot(p, -p.log(), color=BLUE, lw=2)
    for probability, name in ((0.7, "second word"), (0.2, "third word"), (0.1, "first word")):
        loss = float(
            F.cross_entropy(torch.tensor([[0.1, 0.7, 0.2]]).log(), torch.tensor([(0.1, 0.7, 0.2).index(probability)]))
        )
        axis.plot([probability, probability], [0, loss], color=GREY, lw=1, zorder=0)
        axis.plot(probability, loss, "o", color=RED)
        axis.annotate(
            f"{name}: p = {probability}, loss {loss:.3f}", (probability, loss), (8, 4), textcoords="offset points"
        )
    plain(axis, "probability given to what came", "loss in nats")
    axis.set_ylim(0, 4.7)
    save(figure, folder / "cross_entropy.png")


def masks(folder: Path) -> None:
    """Which keys each query sees, read off the attention op itself: a weight is there, or it is zero."""
    T = 12
    cu = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    cases: tuple[tuple[str, dict], ...] = (
        ("encoder: all", {}),
        ("decoder: causal", {"causal": True}),
        ("sliding window of 4", {"causal": True, "window": 4}),
        ("three documents, packed", {"causal": True, "cu_seqlens_q": cu, "cu_seqlens_k": cu}),
    )
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1))
    for axis, (title, options) in zip(axes, cases, strict=True):
        q = torch.zeros(1, T, 1, T)
        v = torch.eye(T).view(1, T, 1, T)  # the output of a query is then its row of weights
        if "cu_seqlens_q" in options:
            weights = attention(q[0], q[0], v[0], **options)[:, 0]
        else:
            weights = attention(q, q, v, **options)[0, :, 0]
        axis.imshow(weights > 0, cmap=matplotlib.colors.ListedColormap(["white", BLUE]), vmin=0, vmax=1)
        axis.set_xticks(torch.arange(-0.5, T).tolist(), [], minor=False)
        axis.set_yticks(torch.arange(-0.5, T).tolist(), [])
        axis.grid(color=GREY, lw=0.5)
        axis.tick_params(length=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("key", fontsize=9)
    axes[0].set_ylabel("query", fontsize=9)
    save(figure, folder / "masks.png")


def heads(folder: Path) -> None:
    """Eight query heads, and the key-value heads that serve them."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.3))
    for axis, (title, kv) in zip(axes, (("multi-head", 8), ("grouped-query", 2), ("multi-query", 1)), strict=True):
        for h in range(8):
            served = h // (8 // kv)
            x = (served + 0.5) * 8 / kv - 0.5
            axis.plot([h, x], [1, 0], color=GREY, lw=1.2, zorder=0)
            axis.plot(h, 1, "o", color=BLUE, ms=11)
            axis.plot(x, 0, "s", color=RED, ms=13)
        axis.set_title(f"{title}: {kv} key-value head{'s' * (kv > 1)}", fontsize=10)
        axis.set_xlim(-0.7, 7.7)
        axis.set_ylim(-0.4, 1.4)
        axis.axis("off")
    axes[0].text(-0.9, 1, "q", fontsize=12, color=BLUE, ha="right", va="center")
    axes[0].text(-0.9, 0, "k, v", fontsize=12, color=RED, ha="right", va="center")
    save(figure, folder / "heads.png")


def rope(folder: Path) -> None:
    """The first number of each turned pair over positions; and scores of equal vectors by distance, from two places."""
    D, T = 64, 256
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    ones = torch.zeros(1, T, 1, D)
    ones[..., : D // 2] = 1  # every pair points along its first axis
    q, k = (t[0, :, 0] for t in apply_rope(ones, ones, angles.cos(), angles.sin()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
    shown = q[:64, : D // 2].T
    left.imshow(shown, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    left.set_xlabel("position")
    left.set_ylabel("pair: fast hands above")
    left.set_title("cosine of each pair's angle", fontsize=10, loc="left")
    for place, style in ((0, "-"), (100, "--")):
        right.plot((q[place] @ k[place : place + 150].T) / (D // 2), style, color=(BLUE if place == 0 else SAND), lw=2,
                   label=f"query at position {place}")  # fmt: skip
    right.legend(frameon=False)
    plain(right, "distance of the key", "score")
    right.set_title("the same curve from everywhere", fontsize=10, loc="left")
    save(figure, folder / "rope.png")


def activations(folder: Path) -> None:
    """silu as the op computes it, with up = 1."""
    z = torch.linspace(-5, 5, 400)
    figure, axis = plt.subplots(figsize=(6, 3.4))
    axis.axhline(0, color=GREY, lw=0.8)
    axis.plot(z, F.relu(z), color=GREY, lw=2, label="relu")
    axis.plot(z, F.gelu(z), color=SAND, lw=2, label="gelu")
    axis.plot(z, swiglu(z, torch.ones_like(z)), color=BLUE, lw=2, label="silu, the gate of SwiGLU")
    axis.legend(frameon=False)
    axis.set_ylim(-0.6, 3)
    axis.set_xlim(-5, 3)
    plain(axis, "z", "")
    save(figure, folder / "swiglu.png")


def norms(folder: Path) -> None:
    """A batch of token vectors; the numbers that share one mean or root mean square are blue."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9))
    names = ("batch norm: mean and variance", "layer norm: mean and variance", "RMS norm: root mean square")
    for axis, title in zip(axes, names, strict=True):
        grid = torch.zeros(6, 10)
        if title.startswith("batch"):
            grid[:, 3] = 1
        else:
            grid[2, :] = 1
        axis.imshow(
            grid, cmap=matplotlib.colors.ListedColormap(["white", BLUE if grid[0, 3] or "layer" in title else GREEN])
        )
        axis.set_xticks(torch.arange(-0.5, 10).tolist(), [])
        axis.set_yticks(torch.arange(-0.5, 6).tolist(), [])
        axis.grid(color=GREY, lw=0.8)
        axis.tick_params(length=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("feature", fontsize=9)
    axes[0].set_ylabel("token", fontsize=9)
    save(figure, folder / "norms.png")


def in_context(folder: Path, steps: int = 300) -> None:
    """Loss by position on 16 random letters that come twice, before and after the model has learned to look."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(PRESETS["tiny"].replace(vocab_size=32, tie_word_embeddings=False))
    optimizer = muon_and_adamw(model)

    def rows(n: int) -> torch.Tensor:
        half = torch.rand(n, 32).argsort(1)[:, :16]
        return torch.cat([half, half], 1)

    @torch.no_grad()
    def by_position() -> torch.Tensor:
        x = rows(512)
        logits = model(x).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(-1, 31).mean(0)

    figure, axis = plt.subplots(figsize=(7, 3.4))
    axis.axvspan(15.5, 31, color="#eef3fa", lw=0)
    for step in range(steps + 1):
        if step in (0, 60, steps):
            shade = {0: GREY, 60: SAND, steps: BLUE}[step]
            axis.plot(range(1, 32), by_position(), "-o", ms=3, color=shade, label=f"after {step} steps")
        loss = model(x := rows(32), labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    axis.text(8, 0.25, "first time: a guess", ha="center")
    axis.text(23.5, 0.25, "again: known", ha="center")
    axis.legend(frameon=False, loc="center left")
    plain(axis, "position in a row of new random letters", "loss in nats")
    axis.set_ylim(0, None)
    save(figure, folder / "in_context.png")


def plain(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: plt.Figure, file: Path) -> None:
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


FIGURES: tuple[Callable[[Path], None], ...] = (
    tokens, cross_entropy, masks, heads, rope, activations, norms, in_context,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "concepts", help="folder for the figures")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        figure(folder)


if __name__ == "__main__":
    main()
