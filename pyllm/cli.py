"""The command `pyllm`. Heavy imports wait until a command needs them, so that `pyllm --help` answers at once."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from . import tuning_cli

# Package to import -> what it is for, in the order in which a demo needs them.
DEMO_NEEDS = {"tokenizers": "the tokenizer", "safetensors": "saving the model"}
DEMO_LIKES = {"rich": "the live display", "matplotlib": "the picture of the loss"}


class CommandError(Exception):
    """Ends the command with a message and no traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal in plain ASCII shows "?" and does not fail
    try:
        chosen.run(chosen)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `pyllm kernels | head`
        sys.stderr.close()
        return 1
    except (CommandError, ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if chosen.debug:
            raise
        print(f"pyllm {chosen.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyllm", description="Hand-written kernels, and a Llama that stands on them.")
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="command")

    demo = commands.add_parser("demo", help="train a small Llama on this machine in two minutes, without downloads")
    demo.add_argument("--minutes", type=float, default=2.0, help="time to train (default: 2)")
    demo.add_argument("--out", default="pyllm-demo", metavar="DIR", help="where to write (default: pyllm-demo)")
    demo.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (default: 0)")
    demo.add_argument("--threads", type=int, help="CPU threads (default: measured)")
    demo.add_argument("--steps", type=int, help="stop after this many steps, if the time lasts: a repeatable run")
    demo.add_argument("--text", metavar="PATH", help="learn from a folder or file of your own instead")
    demo.add_argument("--prompt", default="def ", help="what samples begin with (default: 'def ')")
    demo.add_argument("--plain", action="store_true", help="plain lines, also in a terminal")
    _backend(demo)
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train", help="train a model on text of your own or on the built-in corpus; also under torchrun",
        epilog="example: pyllm train --model small --length 512 --data books/ notes.jsonl --out run1",
    )  # fmt: skip
    from .train_config import add_flags, add_plan_flags  # light: no torch

    add_flags(train)
    add_plan_flags(train)
    train.set_defaults(run=_train)

    kernels = commands.add_parser("kernels", help="which op runs as what on this machine, and why")
    kernels.set_defaults(run=_kernels)

    generate = commands.add_parser("generate", help="continue a text with a saved model")
    generate.add_argument("model", help="folder with config.json, model.safetensors and tokenizer.json")
    generate.add_argument("--prompt", default="def ", help="the text to continue (default: 'def ')")
    _decoding(generate, tokens=120, temperature=0.6)
    generate.add_argument("--beams", type=int, dest="num_beams", help="beam search with so many beams")
    generate.add_argument("--stop", action="append", dest="stop_strings", metavar="TEXT", help="stop after this text")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk with a saved model")
    chat.add_argument("model", help="folder with config.json, model.safetensors and tokenizer.json")
    chat.add_argument("--system", metavar="TEXT", help="instructions that stand before the conversation")
    _decoding(chat, tokens=512)
    chat.set_defaults(run=_chat)

    tuning_cli.add_finetune(commands, _backend).set_defaults(run=_finetune)
    tuning_cli.add_evaluate(commands, _backend).set_defaults(run=_evaluate)
    return parser


def _decoding(parser: argparse.ArgumentParser, tokens: int, temperature: float | None = None) -> None:
    """The options of `generate` that commands share; dest is Hugging Face's name. No temperature: the model's own."""
    add = parser.add_argument
    add(
        "--tokens", type=int, default=tokens, dest="max_new_tokens",
        help=f"how many tokens to write at most (default: {tokens})",
    )  # fmt: skip
    default = "the model's own, else 0.7" if temperature is None else temperature
    add("--temperature", type=float, default=temperature, help=f"0 takes the likeliest token (default: {default})")
    add("--top-k", type=int, help="draw from the k likeliest tokens; 0: from all (default: the model's own, else 50)")
    add("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    add("--min-p", type=float, help="leave out tokens less likely than this times the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: avoid what was said before")
    add("--seed", type=int, default=0, help="another seed, another text (default: 0)")
    _backend(parser)


def _backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", default="auto", help="auto, triton, cuda, cpu, eager, or several with commas (default: auto)"
    )


def _demo(chosen: argparse.Namespace) -> None:
    _require(DEMO_NEEDS)
    for package, purpose in DEMO_LIKES.items():
        if importlib.util.find_spec(package) is None:
            print(f"without the package {package} there is no {purpose.removeprefix('the ')}: pip install {package}")
    from .demo import Options, run

    names = ("minutes", "out", "seed", "backend", "threads", "steps", "text", "prompt", "plain")
    run(Options(**{name: getattr(chosen, name) for name in names}))


def _train(chosen: argparse.Namespace) -> None:
    from .train_config import from_flags

    config = from_flags(chosen)
    if chosen.plan:
        from .plan import for_command

        print(for_command(config, chosen.gpu, chosen.nodes))
        return
    _require(DEMO_NEEDS)
    from .train_run import run

    run(config)


def _kernels(chosen: argparse.Namespace) -> None:
    from . import engine
    from .kernels import describe

    print(describe())
    print(engine.describe())


_DECODING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _generate(chosen: argparse.Namespace) -> None:
    folder = _model_folder(chosen)
    from .terminal import complete

    options = {name: getattr(chosen, name) for name in (*_DECODING, "num_beams", "stop_strings")}
    if chosen.num_beams is not None and chosen.num_beams > 1:
        options["temperature"] = 0  # the best sequence is looked for, nothing is drawn
    complete(folder, chosen.backend, chosen.prompt, options)


def _chat(chosen: argparse.Namespace) -> None:
    folder = _model_folder(chosen)
    from .terminal import converse

    converse(folder, chosen.backend, chosen.system, {name: getattr(chosen, name) for name in _DECODING})


def _finetune(chosen: argparse.Namespace) -> None:
    _saved_model(chosen)
    tuning_cli.finetune(chosen)


def _evaluate(chosen: argparse.Namespace) -> None:
    _saved_model(chosen)
    tuning_cli.evaluate(chosen)


def _saved_model(chosen: argparse.Namespace) -> Path:
    """The folder, after what can be checked before anything heavy is imported."""
    folder = Path(chosen.model)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise CommandError(
            f"{folder} has no {' and no '.join(missing)}; `pyllm demo --out {folder}` makes such a folder"
        )
    _require(DEMO_NEEDS)
    return folder


def _model_folder(chosen: argparse.Namespace) -> Path:
    """The folder of a model that is to write something."""
    folder = _saved_model(chosen)
    if chosen.max_new_tokens < 1:
        raise CommandError(f"--tokens must be at least 1, got {chosen.max_new_tokens}")
    if chosen.temperature is not None and not chosen.temperature >= 0:
        raise CommandError(f"--temperature must be 0 or more, got {chosen.temperature}")
    return folder


def _require(packages: dict[str, str]) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        purposes = ", ".join(f"{package} for {packages[package]}" for package in missing)
        raise CommandError(f"needs {purposes}; install with: pip install {' '.join(missing)}")


def _version() -> str:
    from . import __version__

    return f"pyllm {__version__}"
