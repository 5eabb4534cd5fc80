"""The options of `pyllm finetune` and `pyllm evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

FINETUNE_EXAMPLE = """\
examples:
  pyllm finetune pyllm-demo                        questions about Python's docstrings
  pyllm finetune MODEL talks.jsonl --epochs 2      a line each: {"messages": [{"role": "user", "content": "Hi"}, ...]}
  pyllm finetune MODEL talks.jsonl --lora 16       small additions to frozen weights, also saved in PEFT's format
"""
EVALUATE_EXAMPLE = """\
examples:
  pyllm evaluate pyllm-demo                                  everything that is built in
  pyllm evaluate MODEL --text book.txt --window 512          perplexity and bits per byte
  pyllm evaluate MODEL --choices exam.jsonl --shots 0 5   lines {"question": ..., "choices": [...], "answer": 0}
  pyllm evaluate MODEL --task mapping                        learning in context
"""
_RAW = argparse.RawDescriptionHelpFormatter


def add_finetune(commands: Any, backend: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "finetune", help="teach a saved model to answer, from conversations",
        epilog=FINETUNE_EXAMPLE, formatter_class=_RAW,
    )  # fmt: skip
    add = parser.add_argument
    add("model", help="folder with config.json, model.safetensors and tokenizer.json")
    add("data", nargs="?", default=None, help="JSONL of conversations, or builtin (the default): Python's docstrings")
    add("--data", dest="data_flag", metavar="DATA", help="the same as a flag")
    add("--out", metavar="DIR", help="where to write (default: the model's folder with -tuned behind it)")
    add("--system", metavar="TEXT", help="system prompt for conversations that have none")
    add(
        "--template", default="auto", metavar="NAME",
        help="auto (the model's own, else one that its vocabulary has tokens for), chatml (tokens are added where "
        "missing), transcript, or a jinja2 file",
    )  # fmt: skip
    add("--epochs", type=float, default=3.0, help="passes over the data (default: 3)")
    add("--steps", type=int, help="a number of steps instead of epochs")
    add("--batch", type=int, default=4, help="packed rows in a step (default: 4)")
    add("--length", type=int, help="tokens in a row (default: what the model can read, at most 1024); longer "
        "conversations lose their end")  # fmt: skip
    add("--lr", type=float, help="peak learning rate (default: 4 / width^1.5, with LoRA ten times that)")
    add("--warmup", type=float, default=0.05, help="share of the run in which the rate rises (default: 0.05)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default: 0)")
    add("--validation", type=float, default=0.05, help="share of conversations held out (default: 0.05)")
    add("--lora", type=int, metavar="RANK", help="train additions of this rank, and leave the weights as they are")
    add("--lora-alpha", type=float, metavar="X", help="their scale is X / RANK (default: twice the rank)")
    add("--lora-dropout", type=float, default=0.0, metavar="P", help="share of their inputs dropped (default: 0)")
    add("--lora-targets", metavar="NAMES", help="matrices, with commas (default: all of the layers')")
    add("--checkpointing", action="store_true", help="less memory: compute activations again in the backward pass")
    add("--compile", action="store_true", help="torch.compile; pays off in long runs")
    add("--threads", type=int, help="CPU threads (default: all cores)")
    add("--seed", type=int, default=0, help="of order, additions and dropout (default: 0)")
    add("--plain", action="store_true", help="plain lines, also in a terminal")
    backend(parser)
    return parser


def add_evaluate(commands: Any, backend: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate", help="perplexity, multiple choice and learning in context of a saved model",
        epilog=EVALUATE_EXAMPLE, formatter_class=_RAW,
    )  # fmt: skip
    add = parser.add_argument
    add("model", help="folder with config.json, model.safetensors and tokenizer.json")
    add("--text", action="append", default=[], metavar="FILE", help="text to measure perplexity on, or builtin")
    add("--choices", action="append", default=[], metavar="FILE", help="JSONL of questions, or builtin")
    add("--task", action="append", default=[], metavar="NAME", help="in-context task: mapping, recall or rule")
    add("--shots", type=int, nargs="+", default=[0], metavar="K", help="examples before a question (default: 0)")
    add("--shots-from", metavar="FILE", help="JSONL that the examples come from (default: the other questions)")
    add("--task-shots", type=int, nargs="+", default=[0, 1, 2, 4, 8], metavar="K",
        help="examples in a task (default: 0 1 2 4 8)")  # fmt: skip
    add("--chat", action="store_true", help="ask in the model's chat template")
    add("--system", metavar="TEXT", help="system prompt, with --chat")
    add("--window", type=int, help="tokens read at a time (default: what the model can read, at most 1024)")
    add("--stride", type=int, help="how far windows advance (default: half a window)")
    add("--limit", type=int, help="questions, and episodes of a task (default: all, and 200)")
    add("--out", default="pyllm-evaluation", metavar="DIR", help="where to write (default: pyllm-evaluation)")
    add("--seed", type=int, default=0, help="of examples and episodes (default: 0)")
    backend(parser)
    return parser


def finetune(chosen: argparse.Namespace) -> None:
    from .finetune import BUILTIN, Options, run
    from .lora import TARGETS, LoRAConfig

    if chosen.data is not None and chosen.data_flag is not None:
        raise ValueError(f"data is given twice: {chosen.data} and --data {chosen.data_flag}")
    lora = None
    if chosen.lora is not None:
        alpha = 2.0 * chosen.lora if chosen.lora_alpha is None else chosen.lora_alpha
        targets = TARGETS if chosen.lora_targets is None else tuple(chosen.lora_targets.split(","))
        lora = LoRAConfig(chosen.lora, alpha, chosen.lora_dropout, targets)
    elif chosen.lora_alpha is not None or chosen.lora_dropout or chosen.lora_targets is not None:
        raise ValueError("--lora-alpha, --lora-dropout and --lora-targets need --lora RANK")
    same = (
        "model", "out", "system", "template", "epochs", "steps", "batch", "length", "lr", "warmup", "weight_decay",
        "validation", "checkpointing", "compile", "seed", "backend", "threads", "plain",
    )  # fmt: skip
    options = {name: getattr(chosen, name) for name in same}
    run(Options(data=chosen.data or chosen.data_flag or BUILTIN, lora=lora, **options))


def evaluate(chosen: argparse.Namespace) -> None:
    from .evaluate import Options, run

    same = ("model", "shots_from", "chat", "system", "window", "stride", "limit", "out", "seed", "backend")
    run(
        Options(
            text=tuple(chosen.text),
            choices=tuple(chosen.choices),
            tasks=tuple(chosen.task),
            shots=tuple(chosen.shots),
            task_shots=tuple(chosen.task_shots),
            **{name: getattr(chosen, name) for name in same},
        )
    )
