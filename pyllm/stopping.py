"""When a row is done: an end token, a text it was told to stop at, the time, or whatever the caller says.

Names: B rows, t tokens so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .options import GenerationConfig
from .text import TokenBytes

Criterion = Callable[[Tensor, Any], Any]


class StopStrings:
    """Rows whose newest token completes one of some strings, wherever in the token the string ends.

    The comparison is of bytes, so that neither cuts between tokens nor characters of several bytes matter.
    """

    def __init__(self, strings: str | list[str], tokenizer: Any):
        self.strings = [s.encode() for s in ([strings] if isinstance(strings, str) else strings)]
        self.longest = max(map(len, self.strings))
        self.tokens = TokenBytes(tokenizer)

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        # Every token has a byte at least, or none that matters.
        rows = ids[:, -(self.longest + 1) :].tolist()
        return torch.tensor([self.ends(row) for row in rows], device=ids.device)

    def ends(self, ids: list[int]) -> bool:
        """Whether one of the strings ends within the last of these tokens."""
        last = self.tokens[ids[-1]]
        tail = last
        for id in reversed(ids[:-1]):
            if len(tail) - len(last) >= self.longest:
                break
            tail = self.tokens[id] + tail
        before = len(tail) - len(last)
        return any(tail.find(s, max(0, before - len(s) + 1)) >= 0 for s in self.strings)


class Stopping:
    """All criteria of a call.

    Args:
        custom: functions of ids (B, t) and scores that return a bool for all rows or one each, as in transformers.
    """

    def __init__(self, config: GenerationConfig, tokenizer: Any, custom: Iterable[Criterion], device: torch.device):
        self.eos = torch.tensor(config.eos_ids, device=device) if config.eos_ids else None
        self.criteria = list(custom)
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("generate: stop_strings needs tokenizer=, which knows the text of every token")
            self.criteria.insert(0, StopStrings(config.stop_strings, tokenizer))
        if config.max_time is not None:
            end = time.monotonic() + config.max_time
            self.criteria.append(lambda ids, scores: time.monotonic() > end)

    def __bool__(self) -> bool:
        """Whether a row may end before the others do."""
        return self.eos is not None or bool(self.criteria)

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        """Which rows are done with their newest token, (B,) bool."""
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if self.eos is not None:
            done = torch.isin(ids[:, -1], self.eos)
        for criterion in self.criteria:
            done = done | torch.as_tensor(criterion(ids, scores), device=ids.device)
        return done
