"""The figure of docs/generation.md: one prompt, every strategy, and the probabilities that each leaves to choose from.

python docs/make_generation.py FOLDER     # a model that `pyllm demo` wrote; writes docs/generation.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from pyllm import LlamaForCausalLM, Tokenizer
from pyllm.chat import opening
from pyllm.text import to_text

PROMPT = "    try:\n       "
NEW = 24
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "4 beams": {"num_beams": 4},
    "sampling, T = 1": {"do_sample": True, "top_k": 0},
    "T = 0.5": {"do_sample": True, "top_k": 0, "temperature": 0.5},
    "top-k 5": {"do_sample": True, "top_k": 5},
    "top-p 0.8": {"do_sample": True, "top_k": 0, "top_p": 0.8},
    "min-p 0.1": {"do_sample": True, "top_k": 0, "min_p": 0.1},
    "repetition penalty 1.3": {"repetition_penalty": 1.3},
}
SHOWN = 12  # tokens per panel
GREY, BLUE = "#c9ced6", "#2f6fb5"


@torch.no_grad()
def outcomes(model: LlamaForCausalLM, tokenizer: Tokenizer) -> tuple[list[str], torch.Tensor, dict[str, Any]]:
    """The likeliest next tokens, their probabilities, and per strategy (what it makes of these, a text, the log
    probability that the model itself gives to it)."""
    ids = torch.tensor([opening(tokenizer) + tokenizer.encode(PROMPT)])
    plain = (
        model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
        .logits[0][0]
        .softmax(-1)
    )
    top = plain.topk(SHOWN).indices
    found = {}
    for name, options in STRATEGIES.items():
        out = model.generate(
            ids, max_new_tokens=NEW, seed=1, return_dict_in_generate=True, output_scores=True, eos_token_id=None,
            **options,
        )  # fmt: skip
        new = out.sequences[0, ids.shape[1] :]
        logits = model(out.sequences[:1]).logits[0, ids.shape[1] - 1 : -1]
        said = float(logits.log_softmax(-1).gather(1, new[:, None]).sum())
        found[name] = (out.scores[0][0].softmax(-1)[top], to_text(tokenizer, new.tolist()), said)
    return [repr(to_text(tokenizer, [i]))[1:-1] for i in top.tolist()], plain[top], found


def printable(text: str) -> str:
    """What every font has."""
    return "".join(c if " " <= c <= "~" or c == "\n" else "·" for c in text)


def draw(tokens: list[str], plain: torch.Tensor, found: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(4, 2, figsize=(11, 13), constrained_layout=True)
    figure.suptitle(f"what comes after {PROMPT!r}", fontsize=13, family="monospace")
    highest = max(float(left.max()) for left, _, _ in found.values())
    for axis, (name, (left, text, said)) in zip(axes.flat, found.items(), strict=True):
        place = range(len(tokens))
        axis.bar(place, plain, 0.8, color=GREY, label="the model")
        axis.bar(place, left, 0.45, color=BLUE, label="left to choose from")
        axis.set_xticks(place, map(printable, tokens), rotation=60, family="monospace", fontsize=8)
        axis.set_title(f"{name}   (log probability of what it wrote: {said:.1f})", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, highest * 1.5)
        axis.text(
            0.99, 0.97, printable(text.rstrip("\n")), transform=axis.transAxes, ha="right", va="top",
            multialignment="left", family="monospace", fontsize=7.5, linespacing=1.15, parse_math=False,
            bbox={"fc": "white", "ec": GREY, "lw": 0.6},
        )  # fmt: skip
    axes.flat[0].legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model that `pyllm demo` wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("generation.png"))
    chosen = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(chosen.folder).eval()
    draw(*outcomes(model, Tokenizer.load(chosen.folder)), chosen.out)
    print(f"written: {chosen.out}")


if __name__ == "__main__":
    main()
