"""GPUs as `pyllm train --plan` knows them: what data sheets say, and how they are connected."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Device:
    """One GPU (or this computer) and what connects it.

    Attributes:
        flops, flops32: operations per second of bfloat16 and float32 products.
        memory: bytes; bandwidth: bytes/s to it.
        link: bytes/s to GPUs of the same node, one direction; network: to those of others.
        per_node: GPUs of a node.
        reached: share of `flops` that large products reach; 1 where `flops` was measured.
        kind: "cuda" or "cpu", as torch calls it.
        overhead: what a real step takes over its roofline; measured for this computer.
    """

    name: str
    flops: float
    flops32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    reached: float = 0.7
    overhead: float = 1.0
    kind: str = "cuda"


# Data sheets: dense bfloat16, float32 products in tf32, NVLink per direction, one 400 Gb/s adapter a GPU (A100: 200).
GPUS = {
    "a100": Device("A100 SXM 80 GB", 312e12, 156e12, 80 * GB, 2.04e12, 300 * GB, 25 * GB),
    "h100": Device("H100 SXM", 989e12, 495e12, 80 * GB, 3.35e12, 450 * GB, 50 * GB),
    "h200": Device("H200 SXM", 989e12, 495e12, 141 * GB, 4.8e12, 450 * GB, 50 * GB),
    "b200": Device("B200 SXM", 2250e12, 1125e12, 180 * GB, 8.0e12, 900 * GB, 50 * GB),
    "mi300x": Device("MI300X", 1307e12, 654e12, 192 * GB, 5.3e12, 448 * GB, 50 * GB),
}
