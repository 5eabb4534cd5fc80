"""LoRA: fine-tuning by small additions to frozen matrices.

    y = x W^T + s (dropout(x) A^T) B^T,     A (r, in), B (out, r), s = alpha / r

W stays as it is; A and B, of rank r far below the size of W, are learned. B starts at zero, so that the model starts
as itself. Gradients and optimiser states exist for A and B only. Afterwards W + s B A is an ordinary matrix again:
a merged model costs nothing extra, and every kernel works on it.

Adapters are saved in the format of Hugging Face's PEFT (adapter_config.json and adapter_model.safetensors).

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapper around the model
# Settings of PEFT's that change what an adapter computes, with the only values that are supported.
_UNSUPPORTED: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
    "use_qalora": False,
    "exclude_modules": None,
}


@dataclass(frozen=True)
class LoRAConfig:
    """An adapter's settings, with PEFT's names.

    Args:
        r: rank of the additions.
        lora_alpha: their scale is lora_alpha / r (with use_rslora lora_alpha / sqrt(r)).
        lora_dropout: share of the additions' inputs that is dropped in training.
        target_modules: last parts of the names of the matrices to adapt.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"LoRA: the rank must be at least 1, got {self.r}")
        if not self.lora_alpha > 0:
            raise ValueError(f"LoRA: alpha must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoRA: dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if not self.target_modules:
            raise ValueError("LoRA: target_modules is empty, nothing would be learned")

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Module):
    """A frozen linear layer and the addition that is learned. It has no `weight`: whoever would bypass it must fail.

    Attributes:
        base: the layer, (out, in).
        lora_A: (r, in), float32 also where the layer is half precision; lora_B: (out, r).
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.dropout = config.scale, config.lora_dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, dtype=dtype, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, dtype=dtype, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the dtype of the base layer's result."""
        out = self.base(x)
        narrow = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)  # (..., in)
        return out + (F.linear(F.linear(narrow, self.lora_A), self.lora_B) * self.scale).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A, rounded once to W's dtype."""
        weight = self.base.weight
        return (weight.to(self.lora_A.dtype) + self.scale * (self.lora_B @ self.lora_A)).to(weight.dtype)


def add_lora(model: nn.Module, config: LoRAConfig | None = None) -> LoRAConfig:
    """Freeze a model and give its target matrices something to learn, in place.

    Raises:
        ValueError: it has adapters already, or a target is none of its linear layers.
    """
    config = config or LoRAConfig()
    if any(True for _ in adapted(model)):
        raise ValueError("LoRA: the model has adapters already; merge them first")
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.target_modules
    ]
    found = {name.rpartition(".")[2] for name, _ in chosen}
    if missing := sorted(set(config.target_modules) - found):
        known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"LoRA: target {missing[0]!r} is no linear layer of the model; known: {', '.join(known)}")
    if "lm_head" in found:  # its matrix is read by the fused loss, and may be the embedding's
        raise ValueError("LoRA: target 'lm_head' is not supported; adapt the matrices of the layers")
    model.requires_grad_(False)
    for name, module in chosen:
        _replace(model, name, LoRALinear(module, config).train(module.training))
    return config


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def merge_lora(model: nn.Module) -> None:
    """Put the additions into the matrices, in place; the model is an ordinary one again, and trainable."""
    layers = list(adapted(model))
    if not layers:
        raise ValueError("LoRA: the model has no adapters to merge")
    for name, layer in layers:
        with torch.no_grad():
            layer.base.weight.copy_(layer.merged())
        _replace(model, name, layer.base)
    model.requires_grad_(True)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights with the additions put in, by their ordinary names; the model itself stays as it is."""
    layers = dict(adapted(model))
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, last = name.rpartition(".")
        if owner in layers:
            continue  # lora_A, lora_B
        parent = owner.removesuffix(".base")
        if parent != owner and parent in layers:
            state[f"{parent}.{last}"] = layers[parent].merged() if last == "weight" else tensor
        else:
            state[name] = tensor
    return state


def save_adapter(model: nn.Module, config: LoRAConfig, path: str | os.PathLike[str], base: str | None = None) -> None:
    """Write the additions as PEFT does: adapter_config.json and adapter_model.safetensors.

    Args:
        base: folder or name of the model that they belong to.
    """
    layers = dict(adapted(model))
    if not layers:
        raise ValueError("LoRA: the model has no adapters to save")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"{_PREFIX}{name}.lora_{part}.weight": getattr(layer, f"lora_{part}").detach().contiguous().cpu()
        for name, layer in layers.items()
        for part in "AB"
    }
    save_file(state, folder / f"{WEIGHTS}.tmp", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(config.target_modules),
        "use_rslora": config.use_rslora,
        "init_lora_weights": True,
        "inference_mode": True,
        **{name: value for name, value in _UNSUPPORTED.items() if name in ("bias", "fan_in_fan_out", "use_dora")},
    }
    (folder / f"{CONFIG}.tmp").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(folder / f"{WEIGHTS}.tmp", folder / WEIGHTS)
    os.replace(folder / f"{CONFIG}.tmp", folder / CONFIG)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> LoRAConfig:
    """Give a model the additions of a folder that PEFT or `save_adapter` wrote, in place.

    Raises:
        ValueError: it is no LoRA, has settings that are not supported, or tensors that don't fit the model.
    """
    folder = Path(path)
    config = _read_config(folder, model)
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            given = {name.removeprefix(_PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not safetensors: {error}") from error
    # All is checked against the model before the model is touched.
    modules = dict(model.named_modules())
    layers = {n: m for n, m in modules.items() if n.rpartition(".")[2] in config.target_modules}
    wanted: dict[str, tuple[int, int]] = {}
    for name, module in layers.items():
        if isinstance(module, nn.Linear):
            wanted[f"{name}.lora_A.weight"] = (config.r, module.in_features)
            wanted[f"{name}.lora_B.weight"] = (module.out_features, config.r)
    if different := sorted(set(wanted) ^ set(given)):
        kind = "has no place in the model" if different[0] in given else "is missing"
        raise ValueError(f"{file}: tensor {different[0]!r} {kind}; does the adapter belong to this model?")
    for name, tensor in given.items():
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, the model {wanted[name]}")
    add_lora(model, config)
    with torch.no_grad():
        for name, layer in adapted(model):
            layer.lora_A.copy_(given[f"{name}.lora_A.weight"])
            layer.lora_B.copy_(given[f"{name}.lora_B.weight"])
    return config


def _read_config(folder: Path, model: nn.Module) -> LoRAConfig:
    file = folder / CONFIG
    try:
        settings: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; the folder of a LoRA adapter has one") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type must be LORA, got {settings.get('peft_type')!r}")
    for name, only in _UNSUPPORTED.items():
        value = settings.get(name, only)
        if value != only and (value or only):  # an empty list is as good as none
            raise ValueError(f"{file}: {name} = {value!r} is not supported, only {only!r}")
    targets = settings.get("target_modules")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if targets == "all-linear":
        targets = [name.rpartition(".")[2] for name in names if name != "lm_head"]
    elif isinstance(targets, str):  # a regular expression for whole names
        targets = [name.rpartition(".")[2] for name in names if re.fullmatch(targets, name)]
    if not isinstance(targets, Sequence) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{file}: target_modules must be a list of names, got {targets!r}")
    return LoRAConfig(
        r=settings.get("r", 8),
        lora_alpha=settings.get("lora_alpha", 8),
        lora_dropout=settings.get("lora_dropout", 0.0),
        target_modules=tuple(sorted({target.rpartition(".")[2] for target in targets})),
        use_rslora=bool(settings.get("use_rslora", False)),
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
