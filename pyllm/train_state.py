"""Checkpoints: everything that training needs to go on as if nothing had happened.

    checkpoints/step-00000100/
        config.json model.safetensors tokenizer.json ...   a folder in Hugging Face's layout, ready to use
        state/          weights and optimiser by torch.distributed.checkpoint: every rank writes its shards, and any
                        number of ranks can read them
        rng-0.pt ...    every rank's random number generators
        training.json   where the run stands; written last, with the size of every other file

A checkpoint is written under another name, flushed to the disk and then renamed: whatever happens in between, under a
checkpoint's name there is a whole checkpoint. Only then is an older one removed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from .distributed import Cluster
from .model import LlamaForCausalLM
from .optim import Together
from .tokenizer import Tokenizer

STATE = "training.json"
_NAME = re.compile(r"step-(\d{8})")


class SaveError(OSError):
    """A checkpoint could not be written. What was there before is untouched."""


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run's folder, oldest first."""
    inside = folder / "checkpoints"
    found = [p for p in inside.iterdir() if _NAME.fullmatch(p.name)] if inside.is_dir() else []
    return sorted(found)


def save(
    folder: Path,
    step: int,
    model: LlamaForCausalLM,
    optimizer: Together,
    tokenizer: Tokenizer,
    state: Mapping[str, Any],
    texts: Mapping[str, str],
    cluster: Cluster,
    keep: int,
) -> Path:
    """Write the checkpoint of a step, on all ranks together, and remove all but the newest `keep`.

    Args:
        state: what `training.json` is to hold.
        texts: further files by name.
    Raises:
        SaveError: the disk is full, the folder can't be written, ...: on every rank, with the first rank's reason.
    """
    final = folder / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f"tmp-{step:08d}")

    def attempt(work: Any) -> None:
        """One part of the work, after which all ranks go on, or all fail."""
        error: BaseException | None = None
        try:
            work()
        # Of safetensors, torch and the operating system: many types, one meaning. Those of dcp are BaseExceptions,
        # which pass by everybody who catches Exception.
        except (Exception, CheckpointException) as caught:
            error = caught
        reason = cluster.failure(None if error is None else _reason(error))
        if reason is not None:
            if cluster.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveError(f"the checkpoint of step {step} could not be written to {final}: {reason}") from error

    def make_room() -> None:
        if cluster.main:
            for left in final.parent.glob("tmp-*"):  # of a run that was killed while it saved
                shutil.rmtree(left)
            temporary.mkdir(parents=True)

    def write_shards() -> None:
        weights, moments = get_state_dict(model, optimizer.optimizers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a single process is told that it is one
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary / "state", **_alone(cluster))
        torch.save(_generators(), temporary / f"rng-{cluster.rank}.pt")

    def write_whole() -> None:
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if cluster.main:
            model.save_pretrained(temporary, state_dict=whole)
            tokenizer.save(temporary)
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")

    def finish() -> None:
        if cluster.main:
            sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in _files(temporary)}
            content = json.dumps({**state, "step": step, "world": cluster.world, "files": sizes}, indent=1)
            (temporary / STATE).write_text(content, encoding="utf-8")
            for path in (*_files(temporary), *(p for p in temporary.rglob("*") if p.is_dir()), temporary):
                _sync(path)
            if final.exists():  # of the same step, before it was trained again
                _remove(final)
            os.replace(temporary, final)
            _sync(final.parent)

    for work in (make_room, write_shards, write_whole, finish):
        attempt(work)
    if cluster.main:
        for old in checkpoints(folder)[:-keep]:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """First out of sight: a folder that is half removed must not look like a checkpoint."""
    gone = checkpoint.with_name(f"tmp-old-{checkpoint.name}")
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's `training.json` holds, after a look at its files.

    Raises:
        ValueError: no checkpoint, or a damaged one; says which file is wrong and what to do.
    """
    file = checkpoint / STATE
    if not file.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint of pyllm train: it has no {STATE}")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        sizes = state["files"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error!r}; remove {checkpoint} to go on from an older one") from error
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(
                f"{path} {what}: the checkpoint is damaged; remove {checkpoint} to go on from an older one"
            )
    return state


def load(checkpoint: Path, model: LlamaForCausalLM, optimizer: Together, cluster: Cluster) -> None:
    """Put a checkpoint's weights, optimiser states and random numbers in place, on as many ranks as there are now.

    Raises:
        ValueError: the files don't fit the model or the optimiser.
    """
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizer.optimizers]
    weights, moments = get_state_dict(model, optimizer.optimizers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint / "state", **_alone(cluster))
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{checkpoint} does not fit this model and optimizer ({_reason(error)}); another --out starts a new run"
        ) from error
    set_state_dict(model, optimizer.optimizers, model_state_dict=weights, optim_state_dict=moments)
    model.tie_weights()
    for one, groups in zip(optimizer.optimizers, settings, strict=True):  # a resumed run may have another weight decay
        for group, given in zip(one.param_groups, groups, strict=True):
            group.update(given)
    own = checkpoint / f"rng-{cluster.rank}.pt"
    if own.is_file():  # there is none for ranks that the saved run didn't have
        _restore_generators(torch.load(own, weights_only=True))


def _alone(cluster: Cluster) -> dict[str, Any]:
    return {"no_dist": True} if cluster.mesh is None else {}


def _reason(error: BaseException) -> str:
    """What happened, in one line. torch answers a full disk with "unexpected pos 704 vs 598", and dcp wraps
    that once more; the operating system's own words stand further back in the chain."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError):
            return str(behind)
        behind = behind.__cause__ or behind.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _generators() -> dict[str, Any]:
    name, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def _restore_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, words, *rest = states["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync(path: Path) -> None:
    """Have the disk hold what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
