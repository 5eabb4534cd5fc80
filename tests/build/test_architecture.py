"""The house rules that can be read from the source: floors, file sizes, what an import costs."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = [ROOT / line for line in subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout.split("\n") if line] or sorted(p for p in ROOT.rglob("*") if "build" not in p.parts)  # fmt: skip
PYTHON = [p for p in TREE if p.suffix == ".py" and p.exists() and p.parts[len(ROOT.parts)] in ("kernels", "pyllm")]

# Each module may import only from floors below its own. First match counts.
FLOORS = [
    (r"pyllm\.kernels\.(dispatch|extension|products|spec|triton_support|triton_math|triton_reduce)", 0),
    (r"pyllm\.kernels\.\w+\.(reference|triton_pairs|triton_common)", 1),
    (r"pyllm\.kernels\.\w+\.panels", 1.5),
    (r"pyllm\.kernels\.\w+\.(eager|yardstick|bindings\w*|checks|triton_\w+|gluon_\w+|\w+_reference)", 2),
    (r"pyllm\.kernels\.rope\.qk_norm", 2.5),  # a public function of its folder, beside the one in __init__
    (r"pyllm\.kernels\.cross_entropy\.step", 2.5),
    (r"pyllm\.kernels\.rope\.append", 3),  # an op of its own, in the folder of its formula
    (r"pyllm\.kernels\.describe", 2),
    (r"pyllm\.kernels\.\w+", 3),
    (r"pyllm\.kernels", 4),
    (r"pyllm\.(config|cache|outputs|rope|machine|masked|options|projection|sampling|text|exact|template|staging)", 5),
    (r"pyllm\.quantized", 5),
    (r"pyllm\.engine", 5.5),
    (r"pyllm\.(inputs|initialize|processors|tree|decode|stopping|stream|resize|hf_attention)", 6),
    (r"pyllm\.(beam|speculative|graph)", 7),
    (r"pyllm\.(generate|checkpoint)", 8),
    (r"pyllm\.model", 9),
    (r"pyllm\.(corpus|tokenizer|display)", 9),
    (r"pyllm\.(documents|complete|devices|train_config|train_log|sharding)", 9.2),
    (r"pyllm\.(shards|train_progress)", 9.4),
    (r"pyllm\.(packing|parallel)", 9.6),
    (r"pyllm\.(data|optim|lora|distributed|conversations|hf_modules)", 10),
    (r"pyllm\.(hollow|train_data|train_state)", 10.5),
    (r"pyllm\.(train|patching|chat|chat_format)", 11),
    (r"pyllm\.train_step", 11.5),
    (r"pyllm\.(compare|recipe|terminal|likelihood|train_run|plan)", 12),
    (r"pyllm\.hf\.modules", 11),
    (r"pyllm\.hf\.models", 12),
    (r"pyllm\.hf", 13),
    (r"pyllm\.choices", 13),
    (r"pyllm\.(questions|incontext|lm_eval)", 14),
    (r"pyllm\.(demo|finetune|evaluate)", 15),
    (r"pyllm\.tuning_cli", 16),
    (r"pyllm\.cli", 17),
    (r"pyllm\.__main__", 18),
    (r"pyllm", 19),  # the lazy package itself names everything and imports nothing
]


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = list(relative.parts)
    if parts[0] == "kernels":
        parts.insert(0, "pyllm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p): p for p in PYTHON}


def floor(module: str) -> float:
    for pattern, height in FLOORS:
        if re.fullmatch(pattern, module):
            return height
    raise AssertionError(f"{module} has no floor: add it to FLOORS, at the height its imports give it")


def imports(module: str, path: Path) -> set[str]:
    """pyllm's own modules that a file imports when it is loaded (not inside functions or under TYPE_CHECKING)."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                source = ".".join(filter(None, (base, node.module))) if node.level else node.module or ""
                found.update(f"{source}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                visit(node.body + node.orelse)
            elif isinstance(node, ast.Try | ast.With):
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    resolved = set()
    for name in found:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            resolved.add(name)
    return resolved - {module, "pyllm"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    for other in imports(module, MODULES[module]):
        inside_floor_0 = floor(module) == floor(other) == 0
        of_one_op = floor(module) == floor(other) == 2 and module.rpartition(".")[0] == other.rpartition(".")[0]
        assert floor(other) < floor(module) or inside_floor_0 or of_one_op, f"{module} imports {other}, not below it"


def test_ops_do_not_import_each_other():
    for module, path in MODULES.items():
        mine = re.match(r"pyllm\.kernels\.(rms_norm|rope|swiglu|attention|cross_entropy|linear)\b", module)
        for other in imports(module, path) if mine else ():
            theirs = re.match(r"pyllm\.kernels\.(rms_norm|rope|swiglu|attention|cross_entropy|linear)\b", other)
            assert theirs is None or theirs[1] == mine[1], f"{module} imports {other}"


def test_no_file_outgrows_a_sitting():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in TREE
        if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".inl") and path.is_file()
        for lines in [len(path.read_text().splitlines())]
        if lines > 450
    }
    assert not long, f"over 450 lines, divide by idea: {long}"


def test_compiled_sources_know_nothing_of_torch():
    sources = [p for p in TREE if "csrc" in p.parts and p.is_file()]
    assert sources
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_no_swallowed_import_errors():
    """An import that fails, or just anything, may not end in silence: the reason must reach the user."""
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler) or not all(isinstance(s, ast.Pass) for s in node.body):
                continue
            caught = "" if node.type is None else ast.unparse(node.type)
            broad = caught in ("", "Exception", "BaseException") or "Import" in caught or "NotFound" in caught
            assert not broad, f"{path.relative_to(ROOT)}:{node.lineno} swallows {caught or 'everything'}"


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE"):  # an installed package's bytecode is there already
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_pyllm_is_cheap_and_touches_nothing():
    """Under 0.2 s of CPU beyond torch, the median of five; neither Triton nor transformers nor a GPU is touched."""
    code = (
        "import time, torch, sys; t = time.process_time(); import pyllm, pyllm.kernels; pyllm.LlamaForCausalLM;"
        "print(time.process_time() - t);"
        "assert not torch.cuda.is_initialized();"
        "assert 'triton' not in sys.modules, 'triton';"
        "assert 'transformers' not in sys.modules, 'transformers'"
    )
    python(code)  # which leaves the bytecode behind
    cost = statistics.median(float(python(code)) for _ in range(5))
    assert cost < 0.2, f"importing pyllm costs {cost:.2f} s"


def test_every_package_is_installed():
    """An editable installation finds a folder that the list in pyproject.toml lacks; a wheel is without it."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^  "(pyllm[\w.]*)",$', text, re.MULTILINE))
    there = {
        ".".join(("pyllm", *p.parent.relative_to(ROOT / "pyllm").parts)) for p in (ROOT / "pyllm").glob("*/__init__.py")
    }
    there |= {f"pyllm.kernels.{p.parent.name}" for p in (ROOT / "kernels").glob("*/__init__.py")}
    assert there <= listed, there - listed


def test_version_is_one():
    import pyllm

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert declared[1] == pyllm.__version__
