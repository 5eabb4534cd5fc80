"""What a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree

if TYPE_CHECKING:
    from .cache import KVCache


@dataclass
class ModelOutput:
    """Attributes that are also keys and positions, as in Hugging Face: None fields don't count as either."""

    def _present(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self._present().values())

    def keys(self) -> list[str]:
        return list(self._present())

    def values(self) -> list[Any]:
        return list(self._present().values())

    def items(self) -> list[tuple[str, Any]]:
        return list(self._present().items())

    def get(self, name: str, default: Any = None) -> Any:
        return self._present().get(name, default)

    def __getitem__(self, key: int | slice | str) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, name: object) -> bool:
        return name in self._present()


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """What the layers computed: last_hidden_state (B, T, C), and for all layers hidden_states, L + 1 tensors."""

    last_hidden_state: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """loss () float32, logits (B, T or kept, V)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _register(cls: type[ModelOutput]) -> None:
    """Make an output transparent to what looks for tensors in it: FSDP's hooks, torch.export."""
    names = [field.name for field in dataclasses.fields(cls)]
    _pytree.register_pytree_node(
        cls,
        lambda out: ([getattr(out, name) for name in names], None),
        lambda values, _: cls(**dict(zip(names, values, strict=True))),
        serialized_type_name=f"pyllm.{cls.__name__}",
    )


_register(BaseModelOutputWithPast)
_register(CausalLMOutputWithPast)
