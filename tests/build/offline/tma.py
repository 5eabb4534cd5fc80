"""TMA copies and the barriers that count their bytes, read from Triton's last IR before LLVM (ttgir).

A barrier that expects other than what lands either never opens, or opens early: no result of a compiler shows it, and a
GPU shows it by hanging. Triton's own automatic warp specialisation has been seen to make such code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

BITS = {"f16": 16, "bf16": 16, "f32": 32, "i8": 8, "f8E4M3FN": 8, "f8E5M2": 8}
DESCRIPTOR = r"tensordesc<tensor<([\dx]+)x(\w+)"


def mismatches(ttgir: str, descriptors: Sequence[dict[str, Any]] | None) -> int:
    """How many barriers expect other bytes than what is copied for them, and descriptors other boxes.

    descriptors: of the kernel's arguments, as the launcher encodes them (metadata.tensordesc_meta).
    """
    expected: dict[str, int] = {}
    copied: dict[str, int] = {}
    wrong = 0
    head = next((line for line in ttgir.splitlines() if "tt.func public" in line), "")
    arguments = re.findall(DESCRIPTOR, head)
    known = set(arguments) | {m for line in ttgir.splitlines() if "make_tensor_desc" in line
                              for m in re.findall(DESCRIPTOR, line)}  # fmt: skip
    for line in ttgir.splitlines():
        if m := re.search(r"barrier_expect (%[\w#]+), (\d+)", line):
            wrong += expected.get(m[1], 0) != copied.pop(m[1], 0)
            expected[m[1]] = int(m[2])
        elif m := re.search(r"async_tma_copy_global_to_local %[\w#]+\[[^]]*\] %[\w#]+, (%[\w#]+),", line):
            box = re.search(DESCRIPTOR, line)
            target = re.search(r"-> !ttg\.memdesc<([\dx]+)x(\w+),", line)
            assert box and target, line
            wrong += box.groups() != target.groups() or box.groups() not in known
            copied[m[1]] = copied.get(m[1], 0) + math.prod(dims(box[1])) * BITS[box[2]] // 8
    wrong += sum(size != copied.get(barrier, 0) for barrier, size in expected.items())
    wrong += sum(barrier not in expected for barrier in copied)
    wrong += bool(descriptors) and len(descriptors or ()) != len(arguments)
    for (shape, _), encoded in zip(arguments, descriptors or (), strict=False):
        box, message = dims(shape), list(encoded["block_size"])
        wrong += box[:-1] != message[:-1] or box[-1] % message[-1] != 0
    return wrong


def dims(text: str) -> list[int]:
    return [int(n) for n in text.split("x")]
