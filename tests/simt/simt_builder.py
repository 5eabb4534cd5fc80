"""Builds the CUDA kernels for the SIMT machine: the same .cu files, run by the CPU, as a Python module `_simt`.

The module has the functions of `pyllm.kernels._cuda` and takes pointers to CPU memory, so a test puts it in that
module's place. Objects and modules are cached under build/simt by the content of everything they were made from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
MACHINE = Path(__file__).resolve().parent / "machine"
CACHE = ROOT / "build" / "simt"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def why_not() -> str | None:
    """The reason why nothing can be built here, None when it can."""
    compiler = shlex.split(_compiler())[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not on PATH"
    if os.name != "posix" or not Path("/proc").is_dir():
        return "the SIMT machine needs Linux"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def build_simt(csrc: Path = CSRC) -> ModuleType:
    """The module of all kernels in `csrc`, built if need be."""
    kernels = sorted(csrc.glob("*/*_cuda.cu"))
    return load(link("_simt", [*kernels, *sorted(csrc.glob("bind_cuda*.cpp"))], csrc), "_simt")


def load(path: Path, name: str) -> ModuleType:
    """Imports a module from a file; two builds of one module may live side by side."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def link(name: str, sources: Sequence[Path], csrc: Path = CSRC, cache: Path = CACHE) -> Path:
    """Compiles `sources` and the machine, links them into a Python module `name`, returns its path.

    Objects that are in the main cache already are taken from there, so that another `cache` costs only what differs.
    """
    everything = [*sources, *sorted(MACHINE.glob("*.cpp"))]
    jobs = {source: _command(source, csrc) for source in everything}
    keys = {source: _key(command, source, _headers(source, csrc)) for source, command in jobs.items()}
    cache.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256("".join(keys[s] for s in everything).encode()).hexdigest()[:16]
    target = cache / whole / f"{name}{SUFFIX}"
    if target.exists():
        return target

    def compile_one(source: Path) -> Path:
        ready = CACHE / f"{keys[source]}.o"
        if ready.exists():
            return ready
        out = cache / f"{keys[source]}.o"
        _run([*jobs[source], str(source)], out)
        return out

    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, everything))
    target.parent.mkdir(exist_ok=True)
    _run([*shlex.split(_compiler()), "-shared", *map(str, objects), "-ldl", "-lpthread"], target)
    return target


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


@functools.cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, check=True).stdout


def _command(source: Path, csrc: Path) -> list[str]:
    compiler = _compiler()
    flags = ["-std=c++17", "-g", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fvisibility=hidden", "-c"]
    flags += [f"-I{csrc}", f"-I{MACHINE}", f"-I{MACHINE / 'cuda'}"]
    if source.suffix == ".cu":
        # Every access of a kernel calls a __tsan_* function, which checker.cpp defines; libtsan is not linked.
        flags += ["-O1", "-fsanitize=thread", "-DPYLLM_SM90A", "-x", "c++"]
        if "clang" not in _compiler_version(compiler):
            flags.insert(-2, "--param=tsan-instrument-func-entry-exit=0")
    elif source.parent == MACHINE:
        flags += ["-O2"]
    else:
        import pybind11

        includes = (pybind11.get_include(), sysconfig.get_path("include"))
        flags += ["-O1", "-g0", "-DPYLLM_SIMT_MODULE", "-DPYLLM_SM90A", *(f"-I{d}" for d in includes)]
    return [*shlex.split(compiler), *flags]


def _headers(source: Path, csrc: Path) -> str:
    """Digest of all that a source includes, and of the headers that those include; the system's apart."""
    found: dict[str, Path] = {}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        for name in re.findall(r'^#include ["<]([^">]+)[">]', file.read_text(), re.MULTILINE):
            for folder in (file.parent, csrc, MACHINE, MACHINE / "cuda"):
                path = (folder / name).resolve()
                if path.is_file() and str(path) not in found:
                    found[str(path)] = path
                    waiting.append(path)
                    break
    return _digest(found.values())


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: (path.name, path.read_bytes())):  # wherever they lie
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _key(command: list[str], source: Path, headers: str) -> str:
    """Names an object by what it is made from, not by where that lies."""
    plain = [word for word in command if not word.startswith("-I")]
    parts = [_compiler_version(_compiler()), SUFFIX, *plain, source.name, source.read_text(), headers]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _run(command: list[str], out: Path) -> None:
    """Runs a compiler; its output appears whole or not at all, whoever else builds at the same time."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        part = Path(scratch) / out.name
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
        part.replace(out)
