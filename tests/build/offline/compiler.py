"""Compiles a Triton kernel for a GPU that isn't there, and reads back what the compiler made.

NVIDIA: registers, stack and spills from cuobjdump, instructions from nvdisasm's machine code (SASS). AMD: from the
assembly that Triton keeps. Every number is one that a budget (`triton_budget.json`) may limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import tma
from .overlap import overlap_by_role

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
COUNTED = {
    "LDG.128": r"\bLDG\.E\S*\.128",
    "STG.128": r"\bSTG\.E\S*\.128",
    "LDL": r"\bLDL\b",  # loads and stores of spilled registers
    "STL": r"\bSTL\b",
    "FP64": r"\bD(ADD|MUL|FMA)\b",  # a double slipped in: 1/64 of the speed
    "HMMA": r"\bHMMA\b",  # mma.sync
    "HGMMA": r"\bHGMMA\b",  # wgmma
    "UTMALDG": r"\bUTMALDG\b",  # TMA loads
    "LDGSTS": r"\bLDGSTS\b",  # cp.async
    "USETMAXREG": r"\bUSETMAXREG\b",  # registers handed from one role of warps to another
}


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    name: str  # "sm_90", "gfx942"

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def arch(self) -> int:
        """sm_90's 90; 0 on AMD."""
        return 0 if self.amd else int(self.name.removeprefix("sm_"))

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.amd else 32

    @property
    def triton(self) -> GPUTarget:
        return GPUTarget("hip", self.name, 64) if self.amd else GPUTarget("cuda", self.arch, 32)


@dataclass(frozen=True)
class Config:
    """One configuration that a launcher may launch.

    Attributes:
        name: what budgets match, after "<target> <op> ": "fwd bf16 2048".
        kernel: the @triton.jit function.
        types: of its arguments: "*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>"; "i32/16" is an i32 that is a
            multiple of 16, as Triton itself sees one at a call with round sizes. Pointers are multiples of 16.
        constants: values of its constexpr arguments (and None for an absent tensor).
        warps, stages: as launched; stages None is Triton's default.
        options: further compile options.
        gluon: the kernel is a @gluon.jit function.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gluon: bool = False


def compiled(config: Config, target: Target) -> dict[str, float]:
    """Everything measured of a configuration."""
    source: Callable[..., Any] = ASTSource
    if config.gluon:  # here, because a Triton without Gluon can still compile everything else
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    names = config.kernel.arg_names
    types, constants = config.types, config.constants
    signature = {n: "constexpr" if n in constants else types[n].split("/")[0] for n in names}
    round_ = [i for i, n in enumerate(names) if n not in constants and (types[n][0] == "*" or "/16" in types[n])]
    made = triton.compile(
        source(
            fn=config.kernel,
            signature=signature,
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in round_},
        ),
        target=target.triton,
        options={
            "num_warps": config.warps,
            **({} if config.stages is None else {"num_stages": config.stages}),
            **config.options,
        },
    )
    found = amd(made.asm["amdgcn"]) if target.amd else nvidia(made.asm["cubin"])
    if target.arch >= 90:
        found["tma_mismatches"] = tma.mismatches(made.asm["ttgir"], getattr(made.metadata, "tensordesc_meta", None))
    found["shared"] = made.metadata.shared
    found["threads"] = made.metadata.num_warps * target.lanes
    return found


def nvidia(cubin: bytes) -> dict[str, float]:
    """Resources and counted instructions of a cubin; kept beside Triton's own cache, since disassembling is slow."""
    here = Path(__file__).parent
    key = hashlib.sha256(cubin + b"".join((here / f).read_bytes() for f in ("compiler.py", "overlap.py"))).hexdigest()
    kept = Path(os.environ.get("TRITON_CACHE_DIR", tempfile.gettempdir())) / f"{key[:40]}.measured.json"
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert resources, usage
    registers, stack, local = map(int, resources.groups())
    found: dict[str, float] = dict(registers=registers, stack=stack, local=local)
    counts: Counter[str] = Counter()
    for line in sass.splitlines():
        if re.match(r"\s+/\*[0-9a-f]+\*/", line):
            counts["instructions"] += 1
            for name, pattern in COUNTED.items():
                counts[name] += bool(re.search(pattern, line))
    found |= {name: counts[name] for name in ("instructions", *COUNTED)}
    found["spills"] = found["LDL"] + found["STL"] + local
    found["wide_loads"], found["wide_stores"] = found["LDG.128"] + found["LDGSTS"], found["STG.128"]
    found["overlap"] = overlap_by_role(sass)
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(found))
    scratch.replace(kept)  # two processes may measure the same
    return found


def amd(assembly: str) -> dict[str, float]:
    """The same of AMD's assembly: stack is scratch memory, spills counts registers."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found[1])

    return dict(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        local=0,
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        instructions=len(re.findall(r"^\t[a-z]\w+", assembly, re.MULTILINE)),
        FP64=len(re.findall(r"\bv_(add|mul|fma)_f64", assembly)),
        wide_loads=len(re.findall(r"\b(global|buffer)_load_dwordx4", assembly)),
        wide_stores=len(re.findall(r"\b(global|buffer)_store_dwordx4", assembly)),
        MFMA=len(re.findall(r"\bv_mfma_", assembly)),
    )
