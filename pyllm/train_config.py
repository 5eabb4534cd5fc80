"""Everything that `pyllm train` can be told, as one dataclass. Its fields are the command's flags and the file's keys.

    pyllm train --model small --length 512        a flag: --field-name
    pyllm train --config run.toml                 a file, TOML or YAML, whose keys are the fields' names
    pyllm train --config run.toml --lr 1e-3       flags win over the file

What a run resolved to is written to its folder as config.toml, which is such a file again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import PRESETS

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "linear")
PRECISIONS = ("auto", "float32", "autocast", "bfloat16")
CHECKPOINTING = ("none", "selective", "full")
PARALLEL = ("auto", "ddp", "fsdp")


def _flag(default: Any, help: str, group: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"help": help, "group": group, "choices": choices}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """One run of training.

    Raises:
        ValueError: a value out of its bounds, or values that don't go together; the message names the flags.
    """

    data: tuple[str, ...] = _flag(
        ("python",), "files or folders (.txt .md .py .jsonl .parquet .npy .bin); python: the built-in corpus", "data"
    )
    text_key: str = _flag("text", "where JSON lines and parquet have their text", "data")
    validation: float = _flag(0.05, "share of documents to validate on, chosen by their hash", "data")
    tokenizer: str = _flag("", "tokenizer.json or its folder; empty: the model's, else trained on the data", "data")
    vocab_size: int = _flag(2048, "tokens of a tokenizer that is trained on the data", "data")
    out: str = _flag("pyllm-train", "folder of the run", "data")

    model: str = _flag("tiny", f"{', '.join(PRESETS)}, a config.json, or a folder with weights to go on from", "model")
    backend: str = _flag("auto", "of the kernels: auto, triton, cuda, cpu, eager, or several with commas", "model")

    length: int = _flag(256, "tokens of a row", "step")
    batch: int = _flag(16, "rows of a step, on all ranks together", "step")
    micro_batch: int = _flag(
        0, "rows at a time on a rank, the rest by accumulation; 0: as they fit the threads", "step"
    )
    steps: int = _flag(500, "steps of the whole run", "step")

    optimizer: str = _flag("adamw", "muon: for the layers' matrices, AdamW for the rest", "optimizer", OPTIMIZERS)
    lr: float = _flag(3e-3, "peak learning rate of AdamW", "optimizer")
    matrix_lr: float = _flag(0.02, "peak learning rate of Muon", "optimizer")
    weight_decay: float = _flag(0.1, "decoupled, on matrices only", "optimizer")
    beta1: float = _flag(0.9, "AdamW's first beta", "optimizer")
    beta2: float = _flag(0.95, "AdamW's second beta", "optimizer")
    eps: float = _flag(1e-8, "AdamW's epsilon", "optimizer")
    schedule: str = _flag("cosine", "of the learning rate, after a linear warm-up", "optimizer", SCHEDULES)
    warmup: float = _flag(0.03, "share of the run to warm up in", "optimizer")
    decay: float = _flag(0.2, "share of the run in which wsd (warm-up, stable, decay) comes down", "optimizer")
    final: float = _flag(0.1, "learning rate at the end, as a share of the peak", "optimizer")
    clip: float = _flag(1.0, "largest norm of the gradient; 0: no limit", "optimizer")
    bad_steps: int = _flag(
        5, "stop after so many steps in a row with a loss or gradient that is not finite", "optimizer"
    )

    precision: str = _flag(
        "auto",
        "autocast: bfloat16 products, float32 weights (auto on GPUs); bfloat16: weights too",
        "speed",
        PRECISIONS,
    )
    checkpointing: str = _flag(
        "none", "compute activations again in backward; selective: all but matrix products and attention", "speed",
        CHECKPOINTING,
    )  # fmt: skip
    compile: bool = _flag(False, "torch.compile the layers", "speed")
    threads: int = _flag(0, "CPU threads; 0: every core, or in torchrun its share", "speed")
    parallel: str = _flag(
        "auto", "of torchrun's ranks: ddp copies the model, fsdp shards it (auto: ddp)", "speed", PARALLEL
    )
    tensor_parallel: int = _flag(1, "ranks that share each matrix", "speed")

    validate_every: int = _flag(50, "steps between validations; 0: only at the end", "report")
    validation_rows: int = _flag(32, "rows to validate on", "report")
    sample_every: int = _flag(100, "steps between samples; 0: none", "report")
    sample_tokens: int = _flag(60, "tokens of a sample", "report")
    prompt: str = _flag("def ", "what samples begin with", "report")
    plain: bool = _flag(False, "plain lines, also in a terminal", "report")

    save_every: int = _flag(100, "steps between checkpoints; 0: only at the end", "checkpoints")
    keep: int = _flag(2, "checkpoints to keep", "checkpoints")
    resume: str = _flag(
        "auto", "auto: go on from the folder's newest checkpoint; no: start; or a checkpoint", "checkpoints"
    )
    seed: int = _flag(0, "of weights, order of the data and samples", "checkpoints")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _typed(spec, getattr(self, spec.name)))
            choices = spec.metadata["choices"]
            if choices and getattr(self, spec.name) not in choices:
                raise ValueError(
                    f"--{_dashed(spec.name)} must be one of {', '.join(choices)}, got {getattr(self, spec.name)!r}"
                )
        for name in (
            "length",
            "batch",
            "steps",
            "vocab_size",
            "tensor_parallel",
            "keep",
            "validation_rows",
            "bad_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{_dashed(name)} must be at least 1, got {getattr(self, name)}")
        positive_or_zero = ("micro_batch", "lr", "matrix_lr", "weight_decay", "eps", "clip", "threads")
        for name in (*positive_or_zero, "validate_every", "sample_every", "sample_tokens", "save_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{_dashed(name)} must be 0 or more, got {getattr(self, name)}")
        for name in ("validation", "warmup", "decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{_dashed(name)} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"--final must be between 0 and 1, got {self.final}")
        if self.compile and self.checkpointing == "selective":
            raise ValueError(
                "--compile does not go with --checkpointing selective: what is cheap to compute again the compiler "
                "computes again already; take none or full"
            )
        if not self.data:
            raise ValueError("--data needs at least one file, folder or 'python'")

    @classmethod
    def read(cls, file: str | None, changes: Mapping[str, Any]) -> TrainConfig:
        """From a TOML or YAML file, or from nothing, with some fields changed."""
        values = {} if file is None else load_file(Path(file))
        known = {spec.name for spec in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{file}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**{**values, **changes})

    def to_toml(self) -> str:
        """A file that `read` makes the same config of."""
        lines: list[str] = []
        group = None
        for spec in dataclasses.fields(self):
            if spec.metadata["group"] != group:
                group = spec.metadata["group"]
                lines.append(f"\n# {group}" if lines else f"# {group}")
            lines.append(f"{spec.name} = {_toml(getattr(self, spec.name))}")
        return "\n".join(lines) + "\n"

    def must_match(self) -> dict[str, Any]:
        """The fields that a checkpoint continues with only when they are unchanged."""
        names = ("length", "batch", "optimizer", "seed", "precision")
        return {name: getattr(self, name) for name in names}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _typed(spec: Any, value: Any) -> Any:
    """A value of the field's type; a file may say 1 for 1.0, or one path for a list of them."""
    default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()
    if isinstance(default, tuple):
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"--{_dashed(spec.name)} must be a list of strings, got {value!r}")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"--{_dashed(spec.name)} must be a number, got {value!r}") from None
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"--{_dashed(spec.name)} must be of type {type(default).__name__}, got {value!r}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value)  # for text, numbers and booleans JSON's spelling is TOML's


def load_file(path: Path) -> dict[str, Any]:
    """A TOML or YAML file as a dict."""
    if not path.is_file():
        raise ValueError(f"--config {path} does not exist")
    if path.suffix.lower() in (".yaml", ".yml"):
        if importlib.util.find_spec("yaml") is None:
            raise ImportError(f"--config {path} needs the package pyyaml: pip install pyyaml (TOML needs none)")
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    else:
        if sys.version_info < (3, 11):
            if importlib.util.find_spec("tomli") is None:
                raise ImportError(
                    f"--config {path}: before Python 3.11 TOML needs the package tomli: pip install tomli"
                )
            import tomli as toml
        else:
            import tomllib as toml

        try:
            values = toml.loads(path.read_text(encoding="utf-8"))
        except toml.TOMLDecodeError as error:
            raise ValueError(f"--config {path} is not valid TOML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold keys and values, got {type(values).__name__}")
    return values


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag per field. Flags that are not given are absent from the result, so that a file can say something else."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML or YAML with any of the options below; flags win over it"
    )
    groups: dict[str, Any] = {}
    for spec in dataclasses.fields(TrainConfig):
        name, default = spec.metadata["group"], spec.default
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        how: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "help": spec.metadata["help"]}
        if default is dataclasses.MISSING:
            assert spec.default_factory is not dataclasses.MISSING
            default = spec.default_factory()
            how.update(nargs="+", metavar="PATH")
        elif isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = type(default)
            how.update({"choices": spec.metadata["choices"]} if spec.metadata["choices"] else {"metavar": "X"})
        if not isinstance(default, bool):
            shown = " ".join(default) if isinstance(default, tuple) else default
            how["help"] += f" (default: {shown!s})" if shown != "" else ""
        group.add_argument(f"--{_dashed(spec.name)}", **how)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `--plan`, which say something about other machines and belong to no run."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--plan", action="store_true", help="print memory and time of a step on any machines; runs nothing"
    )
    group.add_argument("--gpu", default="this", help="a100, h100, h200, b200, mi300x or this (default: this computer)")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="with 8 GPUs each (default: 1)")


def from_flags(chosen: argparse.Namespace) -> TrainConfig:
    """The config that a command line asks for."""
    names = {spec.name for spec in dataclasses.fields(TrainConfig)}
    return TrainConfig.read(chosen.config, {k: v for k, v in vars(chosen).items() if k in names})
