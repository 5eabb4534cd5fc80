"""Builds pyllm's compiled modules: `pyllm.kernels._cpu` always, `pyllm.kernels._cuda` where nvcc is.

Both are plain pybind11 modules that take raw pointers: no torch at build time, one build for every torch, no CUDA
driver or runtime library needed to import them. One build.ninja makes both: parallel, and incremental by header.

PYLLM_BUILD       auto (default): CUDA where nvcc is found; cpu: never; cuda: an error without nvcc
PYLLM_CUDA_ARCHS  GPU architectures, "80;90;100" by default; the newest also goes in as PTX for cards to come
CUDA_HOME, CXX, CXXFLAGS, MAX_JOBS  as usual
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Every <op>_cpu.cpp is compiled once per instruction set; bind_cpu.cpp chooses when the module is imported.
ISA_FLAGS = {"base": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    ISA_FLAGS["avx512"] += ["-mfma", "-mf16c", "-mprefer-vector-width=512"]

# Kernels in the instructions that sm_90 alone has: for that GPU they are compiled, whatever else is built.
SM90A = "_sm90a_cuda.cu"

RULES = """\
ninja_required_version = 1.5
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $in
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = NVCC $in
rule link
  command = $cxx -shared -o $out $in $flags
  description = LINK $out
"""


def say(text: str) -> None:
    """One plain line per compiled part. pip shows it with -v; `pyllm kernels` says the same afterwards."""
    print(f"pyllm: {text}", file=sys.stderr, flush=True)


def find_nvcc() -> tuple[Path | None, str]:
    """(nvcc, "") or (None, why not). CUDA_HOME alone where it is set; else PATH, /usr/local/cuda, NVIDIA's wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin/nvcc")
        return (nvcc, "") if nvcc.is_file() else (None, f"CUDA_HOME={home} has no bin/nvcc")
    candidates = [Path(found) for found in [shutil.which("nvcc")] if found]
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    candidates += [nvcc for entry in sys.path for nvcc in sorted(Path(entry or ".", "nvidia").glob("cu1*/bin/nvcc"))]
    found = next((c for c in candidates if c.is_file()), None)
    return found, "" if found else "no nvcc on PATH or in /usr/local/cuda, and CUDA_HOME is not set"


def toolkit(nvcc: Path) -> tuple[Path, Path | None]:
    """(include folder, folder of libcudart_static.a) as nvcc itself reports them, whatever wrapper it is behind."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = next((line[7:].strip() for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")), None)
    home = Path(top).resolve() if top else nvcc.resolve().parents[1]
    libs = (home / d for d in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"))
    return home / "include", next((lib for lib in libs if (lib / "libcudart_static.a").exists()), None)


def extensions() -> list[Extension]:
    """The modules to build, as PYLLM_BUILD and this machine have it."""
    wanted = os.environ.get("PYLLM_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"PYLLM_BUILD must be auto, cpu or cuda, got {wanted!r}")
    say(f"building pyllm.kernels._cpu for {platform.machine()}: {', '.join(ISA_FLAGS)}, chosen at run time")
    found = [Extension("pyllm.kernels._cpu", [*sources("bind_cpu*.cpp", ""), *sources("*_cpu.cpp")])]
    if wanted == "cpu":
        say("skipping pyllm.kernels._cuda: PYLLM_BUILD=cpu")
        return found
    nvcc, why_not = find_nvcc()
    if nvcc is not None and toolkit(nvcc)[1] is None:
        why_not = f"{nvcc} has no libcudart_static.a beside it"
    if why_not and wanted == "cuda":
        raise SystemExit(f"PYLLM_BUILD=cuda, but {why_not}: install the CUDA toolkit, or set CUDA_HOME to it")
    if why_not:
        say(f"skipping pyllm.kernels._cuda: {why_not}; GPUs are served by Triton")
        return found
    say(f"building pyllm.kernels._cuda for sm_{', sm_'.join(archs())} with {nvcc}")
    kernels = [s for s in sources("*_cuda.cu") if "90" in archs() or not s.endswith(SM90A)]
    return [*found, Extension("pyllm.kernels._cuda", [*sources("bind_cuda*.cpp", ""), *kernels])]


def sources(pattern: str, under: str = "*/") -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.glob(f"{under}{pattern}"))


def archs() -> list[str]:
    return os.environ.get("PYLLM_CUDA_ARCHS", "80;90;100").replace(",", ";").strip(";").split(";")


class NinjaBuildExt(build_ext):
    """Writes one build.ninja for all modules and runs it."""

    def build_extensions(self) -> None:
        import pybind11

        self.out = Path(self.build_temp).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.cxx = os.environ.get("CXX") or "c++"
        self.includes = [f"-I{d}" for d in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
        lines = [RULES]
        for ext in self.extensions:
            lines += self.cuda_module(ext) if ext.name.endswith("_cuda") else self.cpu_module(ext)
        (self.out / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([ninja(), "-C", str(self.out), *jobs, *(["-v"] if self.verbose > 1 else [])], check=True)

    def cxx_flags(self) -> list[str]:
        # Hidden symbols and per-ISA namespaces keep AVX code from standing in for the portable one.
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
        given = shlex.split(os.environ.get("CXXFLAGS", ""))
        return [*flags, "-Wno-unknown-pragmas", "-DNDEBUG", *self.includes, *given]

    def cpu_module(self, ext: Extension) -> list[str]:
        lines, objects = [], []
        for source in ext.sources:
            variants = ISA_FLAGS if source.endswith("_cpu.cpp") and "bind" not in source else {"": []}
            for isa, isa_flags in variants.items():
                defines = [f"-DPYLLM_ISA={isa}"] if isa else ["-DPYLLM_X86_64"] * X86 + ["-O2"]
                flags = [*self.cxx_flags(), "-fopenmp", *isa_flags, *defines]
                objects.append(self.out / f"{ext.name}.{Path(source).stem}.{isa or 'all'}.o")
                lines.append(f"build {esc(objects[-1])}: cxx {esc(ROOT / source)}\n  cxx = {self.cxx}")
                lines.append(f"  flags = {words(*flags)}")
        return [*lines, *self.link(ext, objects, ["-fopenmp"])]

    def cuda_module(self, ext: Extension) -> list[str]:
        nvcc, why_not = find_nvcc()
        assert nvcc is not None, why_not
        include, lib = toolkit(nvcc)
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs()]
        gencode += [f"-gencode=arch=compute_{archs()[-1]},code=compute_{archs()[-1]}"]
        hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
        nvcc_flags = [
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "--expt-relaxed-constexpr",
            "-Xfatbin=-compress-all",
        ]
        nvcc_flags += [f"-I{CSRC}", *os.environ.get("PYLLM_NVCC_FLAGS", "").split()]
        nvcc_flags += ["-DPYLLM_SM90A"] * ("90" in archs())
        lines, objects = [], []
        for source in ext.sources:
            objects.append(self.out / f"{ext.name}.{Path(source).stem}.o")
            target = f"build {esc(objects[-1])}: "
            if source.endswith(".cu"):
                flags = [*nvcc_flags, *(hopper if source.endswith(SM90A) else gencode)]
                lines.append(f"{target}nvcc {esc(ROOT / source)}\n  nvcc = {words(nvcc)}\n  flags = {words(*flags)}")
            else:
                archs_define = f'-DPYLLM_CUDA_ARCHS="{",".join(archs())}"'
                flags = [*self.cxx_flags(), "-O2", f"-I{include}", archs_define]
                lines.append(f"{target}cxx {esc(ROOT / source)}\n  cxx = {self.cxx}\n  flags = {words(*flags)}")
        static = [f"-L{lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        return [*lines, *self.link(ext, objects, static)]

    def link(self, ext: Extension, objects: list[Path], flags: list[str]) -> list[str]:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        return [f"build {esc(target)}: link {esc(*objects)}\n  cxx = {self.cxx}\n  flags = {words(*flags)}"]


def esc(*paths: Path) -> str:
    """Ninja's spelling of a list of paths; ninja itself quotes them for the shell."""
    return " ".join(str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for p in paths)


def words(*args: object) -> str:
    """Ninja's spelling of a list of words that end in a shell command."""
    return shlex.join(map(str, args)).replace("$", "$$")


def ninja() -> str:
    """The program that the wheel `ninja` brings, else the one on PATH."""
    try:
        import ninja as module
    except ImportError as missing:
        if shutil.which("ninja") is None:
            raise SystemExit(f"ninja is neither a module ({missing}) nor on PATH: pip install ninja") from missing
        return "ninja"
    return os.path.join(module.BIN_DIR, "ninja")


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
