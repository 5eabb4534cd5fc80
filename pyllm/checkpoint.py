"""Folders in Hugging Face's layout: config.json, generation_config.json and safetensors, one file or several.

What is written here loads in transformers and the other way round, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import LlamaConfig
from .options import GenerationConfig
from .quantized import check_format, is_quantized

if TYPE_CHECKING:
    from .model import LlamaForCausalLM

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_NO_EFFECT = {"low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "torch_dtype"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def from_pretrained(
    cls: type[LlamaForCausalLM],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Mapping[str, Any] | torch.device | str | None = None,
    config: LlamaConfig | Mapping[str, Any] | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    **options: Any,
) -> LlamaForCausalLM:
    """A model with the weights of a folder, in evaluation mode.

    On a CPU, in the dtype that they are stored in, the weights are the files, mapped into memory: loading copies
    nothing, and pages are read when they are first used. Saving replaces files and never writes into them.

    Args:
        path: the folder, or the name of a repository on the Hugging Face Hub (needs huggingface_hub and a network).
        dtype: of the weights; None or "auto" takes config.json's, else the one they are stored in.
        device: where to put them.
        device_map: the same as Hugging Face writes it: {"": device}, a device, or "auto", a GPU if there is one.
        config: instead of the folder's config.json.
        backend: as for LlamaForCausalLM.
        quantize: "int8" or "int4": keep the matrices in so many bits, for inference on a CPU (`model.quantize`).
        options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` for the Hub; `torch_dtype`, the
            old name of dtype; `low_cpu_mem_usage`, `use_safetensors` and `trust_remote_code` change nothing here.
    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: a file is damaged, or a tensor is missing, left over or has another shape; names tensor and file.
            An option that is not supported. Or quantize is neither, or the device isn't a CPU.
    """
    if "torch_dtype" in options:
        dtype = options.pop("torch_dtype") if dtype is None else dtype
    device = _device(device, device_map)
    if quantize is not None:
        check_format(quantize, device)
    hub = {name: options.pop(name) for name in _HUB if name in options}
    for name in set(options) - _NO_EFFECT:
        hint = "; pyllm's attention is always its own, and backend= chooses kernels" if name.startswith("attn") else ""
        raise ValueError(f"from_pretrained: {name} = {options[name]!r} is not supported{hint}")
    folder = _folder(path, hub)
    config = LlamaConfig.of(config if config is not None else _json(folder / "config.json"))
    wanted = _dtype(dtype if dtype not in (None, "auto") else config.dtype)
    with torch.device("meta"):
        model = cls(config, backend)
    state = read_weights(folder, model, dtype=wanted, device=device)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb.to_empty(device=model.device)  # not in the files; rebuilds itself when moved
    model.config = model.model.config = config.replace(dtype=model.dtype)
    model.generation_config = read_generation_config(folder)
    if quantize is not None:
        del state  # which would keep the memory of every matrix
        model.quantize(quantize)
    return model.eval()


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What a folder says about generation, if it does."""
    file = folder / "generation_config.json"
    return GenerationConfig.from_dict(_json(file)) if file.exists() else None


def read_weights(
    folder: Path, model: LlamaForCausalLM, *, dtype: torch.dtype | None, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """The tensors of a folder by name, exactly those that the model has, with the shapes that it has.

    A tied output matrix may be in the file or not; if it is, it must equal the embedding.
    """
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    state: dict[str, Tensor] = {}
    for file, expected in _files(folder).items():
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                names = set(opened.keys())
                if expected is not None and not expected <= names:
                    raise ValueError(f"{file} lacks {min(expected - names)!r}, which {INDEX} says it holds")
                for name in sorted(names):
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # written by early transformers; follows from the config
                    if name not in shapes:
                        raise ValueError(
                            f"{file}: tensor {name!r} has no place in a {model.config.model_type} model with "
                            f"{model.config.num_hidden_layers} layers; does config.json belong to these weights?"
                        )
                    shape = tuple(opened.get_slice(name).get_shape())
                    if shape != tuple(shapes[name]):
                        raise ValueError(
                            f"{file}: tensor {name!r} has shape {shape}, but config.json makes it {tuple(shapes[name])}"
                        )
                    if name in state:
                        raise ValueError(f"{file}: tensor {name!r} is in another file of {folder} as well")
                    state[name] = opened.get_tensor(name)
                    if not state[name].is_floating_point():
                        raise ValueError(
                            f"{file}: tensor {name!r} must be floating point, got {state[name].dtype}; "
                            "quantized weights are not supported"
                        )
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not safetensors (was a download cut short?): {error}") from error
    if tied and "lm_head.weight" in state and "model.embed_tokens.weight" in state:
        if not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
            raise ValueError(
                f"{folder}: config.json ties lm_head.weight to model.embed_tokens.weight, but the files hold two "
                "different tensors; set tie_word_embeddings to false to use both"
            )
        del state["lm_head.weight"]
    missing = sorted(set(shapes) - set(state) - ({"lm_head.weight"} if tied else set()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder}: tensor {missing[0]!r}{more} is in none of {[f.name for f in _files(folder)]}")
    dtype = dtype or next(iter(state.values())).dtype
    return {name: tensor.to(device, dtype) for name, tensor in state.items()}


def save_pretrained(
    model: LlamaForCausalLM,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    state_dict: Mapping[str, Tensor] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Write config.json, generation_config.json and the weights.

    All files are written under other names first, and only when the last one is on the disk they take the places of
    older ones: a save that fails, or is killed, leaves what was there.

    Args:
        path: the folder, made if needed; weights of an earlier save in it are replaced.
        max_shard_size: bytes, or a number with KB, MB or GB: weights beyond it go into several files and an index.
        state_dict: instead of the model's own, for weights that were gathered from several processes.
        safe_serialization: True; pickles are not written.
    Raises:
        ValueError: the model is quantised, or pickles are asked for.
    """
    if not safe_serialization:
        raise ValueError("save_pretrained: safe_serialization = False is not supported, only safetensors are written")
    if state_dict is None and is_quantized(model):
        raise ValueError("save_pretrained: the weights are quantised, and no longer what a checkpoint holds")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if adapter := next((name for name in state if name.endswith((".lora_A", ".lora_B"))), None):
        raise ValueError(f"{adapter} is an adapter's: call pyllm.lora.merge_lora, or pass state_dict=merged_state_dict")
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    shards = _shards(state, _bytes(max_shard_size))
    total = len(shards)
    names = [WEIGHTS] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    texts = _texts(model, state)
    if total > 1:
        index = {
            "metadata": {
                "total_parameters": sum(tensor.numel() for tensor in state.values()),
                "total_size": sum(tensor.nbytes for tensor in state.values()),
            },
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        texts[INDEX] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    files = [*names, *texts]
    try:
        for name, shard in zip(names, shards, strict=True):
            contents = {key: tensor.detach().contiguous().cpu() for key, tensor in shard.items()}
            save_file(contents, folder / f"{name}.tmp", metadata={"format": "pt"})
        for name, text in texts.items():
            (folder / f"{name}.tmp").write_text(text, encoding="utf-8")
        for name in files:
            with open(folder / f"{name}.tmp", "rb") as written:
                os.fsync(written.fileno())
    except BaseException:
        for name in files:
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        raise
    for name in files:
        os.replace(folder / f"{name}.tmp", folder / name)
    for old in folder.iterdir():  # what an earlier save left would be read in place of, or beside, the new
        stale = _SHARD.fullmatch(old.name) or old.name == WEIGHTS or (old.name == INDEX and total == 1)
        if stale and old.name not in names:
            old.unlink()


def _texts(model: LlamaForCausalLM, state: Mapping[str, Tensor]) -> dict[str, str]:
    """config.json and generation_config.json."""
    config = model.config.replace(dtype=next(iter(state.values())).dtype)
    generation = model.generation_config
    if generation is None:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = GenerationConfig(**ids)
    return {
        "config.json": json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n",
        "generation_config.json": generation.to_json(),
    }


def _device(device: torch.device | str | None, device_map: Any) -> torch.device | str | None:
    """One device, from either way to name it."""
    if device_map is None:
        return device
    if device is not None:
        raise ValueError(f"from_pretrained: device = {device!r} and device_map = {device_map!r} are the same; give one")
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        if len(places) != 1 or "disk" in places:
            raise ValueError(
                f"from_pretrained: device_map must name one device, {{'': device}}, got {dict(device_map)}; "
                "over several, torchrun and FSDP shard a model"
            )
        device_map = next(iter(device_map.values()))
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"from_pretrained: device_map must name a device, got {device_map!r}: {error}") from error


def _folder(path: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = os.fspath(path)
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(f"{name} is not a folder, nor owner/name as on the Hugging Face Hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no folder {name}; to download it from the Hugging Face Hub, install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **hub))
    except Exception as error:  # offline, unknown, gated: many types, one remedy
        raise FileNotFoundError(
            f"there is no folder {name}, and it could not be downloaded from the Hugging Face Hub "
            f"({type(error).__name__}: {error}); check the name, the network and, for gated models, `hf auth login`"
        ) from error


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, with the tensors that the index puts in each; in transformers' order of preference."""
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).exists():
        other = sorted(f.name for f in folder.glob("*.bin"))
        hint = f"; {other[0]} is a pickle: load it in transformers and save_pretrained it once" if other else ""
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    found: dict[Path, set[str] | None] = {}
    weight_map = _json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
        raise ValueError(
            f"{folder / INDEX} must map tensors to files beside it as 'weight_map', got {weight_map!s:.99}"
        )
    for tensor, name in weight_map.items():
        tensors = found.setdefault(folder / name, set())
        assert tensors is not None
        tensors.add(tensor)
    for file, tensors in found.items():
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; {INDEX} says it holds {min(tensors or {'nothing'})!r}")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _shards(state: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in order, a new shard whenever the next would exceed the limit."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"max_shard_size must be a number of bytes or like '5GB', got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype or its name, got {dtype!r}")
    return found
