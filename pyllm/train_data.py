"""What a run needs before its first step: a tokenizer, shards of tokens, and a model that fits both."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .checkpoint import INDEX, WEIGHTS
from .config import PRESETS, LlamaConfig
from .documents import fingerprint, read
from .model import LlamaForCausalLM
from .shards import TRAIN, VALIDATION, TokenShards, tokenise, tokenizer_fingerprint
from .tokenizer import Tokenizer
from .train_config import TrainConfig

TOKENIZER_BYTES = 50_000_000  # of text that a tokenizer is trained on; more changes few of its merges

Say = Callable[[str], None]


def prepare(config: TrainConfig, say: Say) -> None:
    """Make tokenizer and shards in the run's folder, unless they are there already. For one process only."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _prepare_tokenizer(config, say)
    if _ready_made(config) is not None:
        return
    folder = out / "data"
    description = {
        "sources": fingerprint(config.data),
        "text_key": config.text_key,
        "validation": config.validation,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    if _is_current(folder, description, out):
        return
    say(f"tokenising {' '.join(config.data)} ...")
    tokenise(
        read(config.data, config.text_key, tokenizer.eos_token_id), tokenizer, folder, config.validation, description
    )


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer that `prepare` has made or that the config names."""
    return Tokenizer.load(_tokenizer_folder(config) or Path(config.out) / "tokenizer")


def load_shards(config: TrainConfig, tokenizer: Tokenizer) -> tuple[TokenShards, TokenShards | None]:
    """Training and validation shards; None where no document fell to validation."""
    folder = _ready_made(config) or Path(config.out) / "data"
    train = TokenShards.open(folder / TRAIN, tokenizer)
    has_validation = any((folder / VALIDATION).glob("[0-9]*.json"))
    return train, TokenShards.open(folder / VALIDATION, tokenizer) if has_validation else None


def build_model(
    config: TrainConfig, tokenizer: Tokenizer, hollow: bool = False
) -> tuple[LlamaForCausalLM, Path | None]:
    """The model to train, with random weights or those of the folder that the config names; and that folder.

    Args:
        hollow: on the meta device, without weights: `hollow.fill` brings them.
    Raises:
        ValueError: no such model, or one that doesn't fit the tokenizer or the rows' length.
    """
    path, place = Path(config.model), torch.device("meta") if hollow else contextlib.nullcontext()
    if config.model in PRESETS:
        preset = PRESETS[config.model]
        model_config = preset.replace(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=max(preset.max_position_embeddings, config.length),
            bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype=None,
        )
        with place:
            return LlamaForCausalLM(model_config, backend=config.backend), None
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"--model {config.model} is neither a file, a folder with config.json, nor one of {', '.join(PRESETS)}"
        )
    try:
        model_config = LlamaConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"--model {file}: {error}") from error
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, --model {config.model} only {model_config.vocab_size}; "
            "do they belong together?"
        )
    if config.length > model_config.max_position_embeddings:
        raise ValueError(
            f"--length {config.length} is more than --model {config.model} can read "
            f"(max_position_embeddings = {model_config.max_position_embeddings})"
        )
    weights = path if path.is_dir() and ((path / WEIGHTS).is_file() or (path / INDEX).is_file()) else None
    if weights is not None and not hollow:
        return LlamaForCausalLM.from_pretrained(path, dtype="float32", backend=config.backend), weights
    with place:
        return LlamaForCausalLM(model_config.replace(dtype=None), backend=config.backend), weights


def _tokenizer_folder(config: TrainConfig) -> Path | None:
    """Where a tokenizer that isn't to be trained is."""
    if config.tokenizer:
        return Path(config.tokenizer)
    path = Path(config.model)
    return path if config.model not in PRESETS and (path / "tokenizer.json").is_file() else None


def _prepare_tokenizer(config: TrainConfig, say: Say) -> Tokenizer:
    given = _tokenizer_folder(config)
    if given is not None:
        return Tokenizer.load(given)
    if _ready_made(config) is not None:
        raise ValueError(
            f"--data {config.data[0]} holds tokens already: say which tokenizer made them with --tokenizer"
        )
    folder = Path(config.out) / "tokenizer"
    sources = fingerprint(config.data)
    description = {"sources": sources, "text_key": config.text_key, "vocab_size": config.vocab_size}
    if _is_current(folder, description, Path(config.out)):
        return Tokenizer.load(folder)
    say(f"training a tokenizer of {config.vocab_size} tokens ...")
    tokenizer = Tokenizer.train(_sample(config), config.vocab_size)
    tokenizer.save(folder)
    (folder / "source.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def _sample(config: TrainConfig) -> Iterator[bytes]:
    """Text to train a tokenizer on: the first TOKENIZER_BYTES of what the model will be trained on."""
    size = 0
    for item in read(config.data, config.text_key):
        if item.ids is not None:
            raise ValueError("--data holds token files: say which tokenizer made them with --tokenizer")
        if not item.is_validation(config.validation):
            size += len(item.text)
            yield item.text
            if size >= TOKENIZER_BYTES:
                return


def _ready_made(config: TrainConfig) -> Path | None:
    """The folder of shards that --data names, if that is what it names."""
    if len(config.data) == 1 and (Path(config.data[0]) / TRAIN / "00000.json").is_file():
        return Path(config.data[0])
    return None


def _is_current(folder: Path, description: dict[str, Any], out: Path) -> bool:
    """Whether a folder was made of what is described. If it was made of something else, it may be replaced only while
    no checkpoint depends on it."""
    try:
        found = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # not there, or cut short by a crash: either way the work is to be done
    if found != description and any(out.glob("checkpoints/step-*")):
        changed = [name for name in description if found.get(name) != description[name]]
        raise ValueError(
            f"the {folder.name} of the checkpoints in {out} was made with other {', '.join(changed)}; change it back, "
            "or start a new run with another --out"
        )
    return found == description
