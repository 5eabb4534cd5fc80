"""What a mutation trial of SwiGLU, RoPE and cross-entropy runs: python row_trials.py _simt.so OP...

The generic numerics rule in float32 and bfloat16 over an op's cases and some that reach into every branch of the
kernels (vectors and single elements, several blocks a row, far strides), on the SIMT machine under its memory checker.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import simt_builder  # noqa: E402
from harness.accuracy import check  # noqa: E402
from harness.layouts import far_apart  # noqa: E402
from harness.machines import Checked  # noqa: E402
from harness.mutants import caught  # noqa: E402

from pyllm.kernels import OPS, extension  # noqa: E402

# Besides the op's own cases.
MORE = {
    "swiglu": {"wide": dict(shape=(3, 1040)), "tall": dict(shape=(37, 24)), "odd": dict(shape=(5, 1031))},
    "swiglu_packed": {"wide": dict(shape=(3, 2080))},
    "apply_rope": {"wide": dict(B=2, T=3, H=5, Hkv=2, D=64), "short": dict(B=1, T=2, H=3, Hkv=1, D=24, R=16)},
    "cross_entropy": {
        "several blocks a row": dict(shape=(1, 8200)), "odd": dict(shape=(5, 1031)), "long": dict(shape=(9, 5000)),
    },
}  # fmt: skip
FAR = {"swiglu": ("gate", "up"), "apply_rope": ("q",), "cross_entropy": ("logits",)}


def cases(op: str) -> dict:
    """All of them, as far as the op's `inputs` takes their parameters."""
    return {**OPS[op].cases, **{k: v for k, v in MORE.get(op, {}).items() if takes(op, v)}}


def takes(op: str, parameters: dict) -> bool:
    try:
        OPS[op].inputs(**parameters, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    except TypeError:
        return False
    return True


def far(op: str, backend: str) -> None:
    """Rows more than 2^31 elements apart."""
    spec = OPS[op]
    case = next(iter(spec.cases.values()))
    inputs = spec.inputs(**case, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(5))

    def call(**given):
        laid = {k: far_apart(v, 1 if op == "apply_rope" else 0) if k in FAR[op] else v for k, v in given.items()}
        return spec.function(**laid, backend=backend)

    check(spec, call, inputs)


def trial(op: str) -> str:
    impl = OPS[op].op.impls["cuda"]
    also = functools.partial(far, op) if op in FAR else None
    return caught(op, "cuda", impl, dtypes=(torch.float32, torch.bfloat16), cases=cases(op), also=also)


def main() -> None:
    torch.set_num_threads(1)
    module = Checked(simt_builder.load(Path(sys.argv[1]), "_simt"))
    extension.cuda.module, extension.cuda.device_type, extension.cuda.reason = module, "cpu", ""
    module.listen()
    for op in sys.argv[2:]:
        if said := trial(op):
            print(f"CAUGHT by {op}: {' '.join(said.split())[:600]}")
            return
    print("NOTHING NOTICED")


if __name__ == "__main__":
    main()
