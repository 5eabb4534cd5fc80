"""Bugs planted in the decoding engine's C++: the checks of test_engine.py and test_quantized.py must catch each."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from harness.mutants import in_a_process

from model import test_engine, test_quantized
from pyllm.kernels import extension

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("decode/decode_cpu.cpp", "decode/packed_linear_cpu.cpp", "bind_cpu_decode.cpp")
compiler = shutil.which("c++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
    pytest.mark.skipif(extension.cpu.module is None, reason=extension.cpu.reason),
]


class Bug(NamedTuple):
    name: str
    file: str
    text: str
    instead: str


BUGS = [
    Bug("no epsilon", "attend.h", "/ float(n) + eps)", "/ float(n))"),
    Bug("keys not rotated", "attend.h", "(b * c + a * s) * scale", "(b * c - a * s) * scale"),
    Bug("values written early", "attend.h", "values + column * stride", "values + (column - 1) * stride"),
    Bug("window one too wide", "attend.h", "s.first[row] + t + 1 - l.window", "s.first[row] + t - l.window"),
    Bug("a token sees the next", "attend.h", "min64(high, s.first[row] + t + 1)", "min64(high, s.first[row] + s.T)"),
    Bug("the mask of the first beam for all", "attend.h", "+ t * cache.mask_query", ""),
    Bug("last value of an odd count dropped", "attend.h", "if (c < count) even", "if (c + 1 < count) even"),
    Bug("parts not rescaled", "attend.h", "top == part[D] ? 1.f :", "true ? 1.f :"),
    Bug("sum of one part only", "attend.h", "sum += weight * part[D + 1]", "sum = weight * part[D + 1]"),
    Bug("the first row's length for all", "decode_cpu.cpp", "h, s.ends[m / s.T], to", "h, s.ends[0], to"),
    Bug("no query norm", "attend.h", "(l.q_norm)", "(nullptr)"),
    Bug("bias left out", "product.h", "if (!bias) return;", "return;"),
    Bug("up without down's order", "decode_cpu.cpp", "silu(gate) * up", "silu(up) * gate"),
    Bug("logits of the first tokens", "decode_cpu.cpp", "(s.T - s.keep) + k % s.keep", "k % s.keep"),
    Bug("rest of a row skipped", "product.h", "for (; i < K; i +=", "for (; i + kFloatLanes <= K; i +="),
    Bug("odd outputs left out", "product.h", "for (; r < outputs; r++) dots", "for (; r + 1 < outputs; r++) dots"),
    Bug("pairs in plain order", "product.h", "to[i + j] = x[i + 2 * j];", "to[i + j] = x[i + j];"),
    Bug("other order alone", "product.h", "even[r][b] + odd[r][b]", "even[r][b] + odd[r][b] * (B > 1 ? 1 : 1 - 1e-7f)"),
    Bug("no offset of 8", "quantized.h", "-8 * sum[b * groups + g]", "-7 * sum[b * groups + g]"),
    Bug("nibbles swapped", "quantized.h", "(eight >> (4 * j)) & 15", "(eight >> (4 * (j ^ 1))) & 15"),
    Bug("inputs of 8 bits", "quantized.h", "32767.f", "127.f"),
    Bug("scale of the first group", "quantized.h", "load(scales + g * kBlock", "load(scales + 0 * kBlock"),
    Bug("NaN lost", "quantized.h", "* (1.f / 32767.f) + nan", "* (1.f / 32767.f)"),
    Bug("no bias", "packed_linear_cpu.cpp", "if (a.w.bias) v +=", "if (false) v +="),
]  # fmt: skip


def build(folder: Path, bug: Bug | None) -> Path:
    """The module, with the bug in it."""
    for directory in ("common", "decode"):
        shutil.copytree(CSRC / directory, folder / directory)
    for name in ("bind_cpu.h", "bind_cpu_decode.cpp"):
        shutil.copy(CSRC / name, folder / name)
    if bug is not None:
        file = folder / "decode" / bug.file
        source = file.read_text()
        assert bug.text in source, f"{bug.name}: the source has changed, this text isn't there: {bug.text!r}"
        file.write_text(source.replace(bug.text, bug.instead))
    import pybind11

    made = folder / "engine_module.so"
    avx2 = getattr(extension.cpu.module, "isa", "base") != "base"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp", f"-DPYLLM_ISA={'avx2' if avx2 else 'base'}", "-w"]
    flags += ["-mavx2", "-mfma", "-mf16c"] if avx2 else []
    flags += [f"-I{d}" for d in (folder, pybind11.get_include(), sysconfig.get_path("include"))]
    sources = [Path(__file__).with_name("engine_module.cpp"), *(folder / name for name in SOURCES)]
    assert compiler is not None
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(made)], check=True)
    return made


CHECKS: list[Callable[[], None]] = [
    lambda: test_engine.test_a_step_equals_the_models("qwen3", torch.float32),
    lambda: test_engine.test_a_step_equals_the_models("qwen2", torch.float32),
    lambda: test_engine.test_a_step_equals_the_models("llama", torch.bfloat16),
    lambda: test_engine.test_long_caches("mistral", 300),
    lambda: test_engine.test_rings(6),
    lambda: test_engine.test_trees("mistral"),
    lambda: test_engine.check_rows((1,)),
    test_engine.test_epsilon,
    lambda: test_quantized.check_products("int8"),
    lambda: test_quantized.check_products("int4"),
    test_quantized.test_special_numbers_come_through,
    lambda: test_quantized.test_logits_are_those_of_the_rounded_weights("int4", "llama"),
]


class Both:
    """The module with the bug, and behind it the real one, which has the ops."""

    def __init__(self, first: ModuleType, second: Any):
        self.first, self.second = first, second

    def __getattr__(self, name: str) -> Any:
        return getattr(self.first if hasattr(self.first, name) else self.second, name)


def trial(module: Path) -> str:
    """What the checks say of a module; empty when they find nothing."""
    spec = importlib.util.spec_from_file_location("engine_module", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    extension.cpu.module = Both(loaded, extension.cpu.module)
    for check in CHECKS:
        try:
            check()
        except Exception as found:
            return f"{type(found).__name__}: {found}"
    return ""


def test_planted_bugs_are_caught(tmp_path):
    chosen: list[Bug | None] = [None, *BUGS]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(build, tmp_path / str(i), bug) for i, bug in enumerate(chosen)]
    said = {}
    for bug, job in zip(chosen, jobs, strict=True):
        module = job.result()
        said["nothing" if bug is None else bug.name] = in_a_process(lambda module=module: trial(module))
    assert said.pop("nothing") == ""
    missed = [name for name, text in said.items() if not text]
    assert not missed, missed
