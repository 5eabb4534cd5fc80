"""Decoding on CPUs: one call computes a whole step of the model, and matrices of 8 and 4 bits.

Not ops of `OPS`: a step needs the model's structure, which `pyllm/engine.py` knows. Weight formats are in
`reference.py`, the compiled side in `bindings.py`.
"""

from __future__ import annotations

from .bindings import FLOATS, Matrix, cache_row, decode_step, layer_row, packed_linear, table, why_not
from .reference import FORMATS, pack, unpack

__all__ = [
    "FLOATS",
    "FORMATS",
    "Matrix",
    "cache_row",
    "decode_step",
    "layer_row",
    "pack",
    "packed_linear",
    "table",
    "unpack",
    "why_not",
]
