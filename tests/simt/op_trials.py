"""What a mutation trial runs for all ops but RMSNorm: python op_trials.py _simt.so OP...

OP may be "hopper:attention": then by the kernel for Hopper, where it can.

The generic numerics rule in float32 and bfloat16 over an op's cases and some that reach into every branch of the
kernels (vectors and single elements, several blocks a row, far strides), on the SIMT machine under its memory checker.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import simt_builder  # noqa: E402
from harness import hopper  # noqa: E402
from harness.accuracy import check  # noqa: E402
from harness.draws import check_draws  # noqa: E402
from harness.layouts import far_apart  # noqa: E402
from harness.machines import Checked  # noqa: E402
from harness.mutants import caught  # noqa: E402

from pyllm.kernels import OPS, extension  # noqa: E402
from pyllm.kernels.attention import bindings_cuda  # noqa: E402
from pyllm.kernels.cross_entropy import reference  # noqa: E402

# Besides the op's own cases.
MORE = {
    "swiglu": {"wide": dict(shape=(3, 1040)), "tall": dict(shape=(37, 24)), "odd": dict(shape=(5, 1031))},
    "swiglu_packed": {"wide": dict(shape=(3, 2080))},
    "apply_rope": {"wide": dict(B=2, T=3, H=5, Hkv=2, D=64), "short": dict(B=1, T=2, H=3, Hkv=1, D=24, R=16)},
    "qk_norm_rope": {
        "wide": dict(B=2, T=9, H=5, Hkv=2, D=64), "half": dict(B=1, T=3, H=3, Hkv=1, D=48, R=16),
        "more heads than a block has": dict(B=1, T=2, H=37, Hkv=1, D=256),
    },
    "rope_append_kv": {},
    "cross_entropy": {
        "several blocks a row": dict(shape=(1, 8200)), "odd": dict(shape=(5, 1031)), "long": dict(shape=(9, 5000)),
    },
    "linear_cross_entropy": {
        "panels": dict(shape=(50, 24), V=150, bias=True, weighted=True, label_smoothing=0.1, ignored=0.3),
        "plain panels": dict(shape=(40, 8), V=131, reduction="none"),
    },
    "sample": {
        "more than one bin holds": dict(shape=(2, 9000), levels=1, top_k=8000, top_p=0.3701),
        "wide": dict(shape=(2, 5003), temperature=0.9, top_k=1000, top_p=0.7, min_p=0.001),
        "the last bin": dict(shape=(3, 600), temperature=0.01, top_k=100),
        "half the mass": dict(shape=(40, 65), top_p=0.5),
    },
    "attention": {
        "far": dict(B=1, T=150, S=150, H=2, Hkv=1, D=8, causal=True, window=70),
        "far, one by one": dict(B=1, T=150, S=150, H=1, Hkv=1, D=9, causal=True, window=70),
        "far, few rows": dict(B=1, T=16, S=16, H=1, Hkv=1, D=8),
        # 3200 terms in a gradient of k: what an accumulator drops adds up.
        "many queries": dict(B=1, T=400, S=20, H=8, Hkv=1, D=8),
        # The first query that sees key 64 is 63, the last one that sees key 63 is 64: each alone in its tile.
        "edges of tiles": dict(B=1, T=80, S=81, H=2, Hkv=1, D=8, causal=True, window=3),
        "D 96": dict(B=1, T=17, S=70, H=2, Hkv=1, D=96, causal=True),
        "D 128": dict(B=2, T=70, S=70, H=2, Hkv=2, D=128, causal=True, softcap=9.0),
        "D 256": dict(B=1, T=35, S=35, H=2, Hkv=1, D=256, window=(9, 3), sinks=True),
        "D 33": dict(B=1, T=20, S=20, H=1, Hkv=1, D=33, causal=True),
        "long packed": dict(lengths=(70, 0, 65, 130, 3), H=2, Hkv=1, D=16, causal=True),
    },
    "attention_decode": {
        "D 96": dict(B=2, T=1, S=150, H=4, Hkv=2, D=96),
        "D 128": dict(B=1, T=3, S=90, H=8, Hkv=1, D=128, window=40),
        "D 256": dict(B=1, T=1, S=70, H=2, Hkv=1, D=256, softcap=9.0),
    },
}  # fmt: skip
# Inputs whose rows are put far apart, and along which dimension.
FAR: dict[str, tuple[tuple[str, ...], int]] = {
    "swiglu": (("gate", "up"), 0), "apply_rope": (("q",), 1), "cross_entropy": (("logits",), 0),
    "attention": (("q", "k"), 1), "attention_decode": (("k_cache", "v_cache"), 1),
    "sample": (("logits",), 0),
}  # fmt: skip


# Inputs that are put where vectors don't fit, and the dimension whose stride is odd.
SKEWED = {"swiglu": (("up", 1),), "apply_rope": (("q", 2), ("cos", 1))}


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
    spec, (names, dim) = OPS[op], FAR[op]
    own = [case for name, case in MORE[op].items() if name.startswith("far")]
    for case in own or [next(iter(spec.cases.values()))]:
        inputs = spec.inputs(**case, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(5))

        def call(**given):
            laid = {k: far_apart(v, dim) if k in names else v for k, v in given.items()}
            return spec.function(**laid, backend=backend)

        check(spec, call, inputs)


def skewed(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values, their stride along `dim` no multiple of a vector; along the later ones it stays dense."""
    buffer = x.new_zeros((*x.shape[:dim], x.shape[dim:].numel() + 1))
    return buffer[..., :-1].view(x.shape).copy_(x)


def odd_places(op: str, backend: str) -> None:
    """One input alone in memory that vectors don't fit."""
    spec = OPS[op]
    for name, dim in SKEWED[op]:
        for dtype in DTYPES:
            case = MORE[op]["wide"]
            inputs = spec.inputs(**case, dtype=dtype, generator=torch.Generator().manual_seed(9))

            def call(**given):
                return spec.function(**{**given, name: skewed(given[name], dim)}, backend=backend)  # noqa: B023

            check(spec, call, inputs)


def as_they_come(op: str, backend: str) -> dict:
    """All cases, in rows of whole vectors where D is; the last one's inputs."""
    spec = OPS[op]
    for case in cases(op).values():
        for dtype in DTYPES:
            inputs = spec.inputs(**case, dtype=dtype, generator=torch.Generator().manual_seed(7))
            check(spec, functools.partial(spec.function, backend=backend), inputs)
    return inputs


def attention_besides(op: str, backend: str) -> None:
    """Packed inputs once more with rows behind the last sequence; lengths of a cache in both widths; lse's gradient."""
    spec, inputs = OPS[op], as_they_come(op, backend)
    if op == "attention_decode":
        wide = {**inputs, "cache_seqlens": inputs["cache_seqlens"].long()}
        check(spec, functools.partial(spec.function, backend=backend), wide)
        return
    check(spec, functools.partial(spec.function, backend=backend, return_lse=True), {**inputs, "return_lse": True})
    rest = {k: v[:-1] if k.startswith("cu_seqlens") else v for k, v in inputs.items()}
    check(spec, functools.partial(spec.function, backend=backend), rest)


DTYPES = (torch.float32, torch.bfloat16)


def trial(op: str) -> str:
    def also(backend: str) -> None:
        if op.startswith("attention"):
            attention_besides(op, backend)
        if op == "qk_norm_rope":
            as_they_come(op, backend)
        if op == "sample":
            check_draws(backend)
        if op in SKEWED:
            odd_places(op, backend)
        if op in FAR:
            far(op, backend)

    return caught(op, "cuda", OPS[op].op.impls["cuda"], dtypes=DTYPES, cases=cases(op), also=also)


HOPPER = "hopper:attention"


def hopper_trial() -> str:
    """Attention again with PYLLM_HOPPER, in bfloat16; the kernel is seen to run."""
    kernel = bindings_cuda.why_not_hopper
    ran = []

    def why_not_hopper(*tensors: torch.Tensor) -> list[str]:
        ran.append(not (reasons := kernel(*tensors)))
        return reasons

    bindings_cuda.why_not_hopper, os.environ["PYLLM_HOPPER"] = why_not_hopper, "1"
    try:
        spec = OPS["attention"]
        every = {**cases("attention"), **hopper.CASES}
        for case in every.values():
            inputs = spec.inputs(**case, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(11))
            check(spec, functools.partial(spec.function, backend="cuda"), inputs, given=hopper.apart(inputs))
        hopper.check_neighbours()
        far("attention", "cuda")
        assert sum(ran) >= len(every), f"only {sum(ran)} of {len(ran)} calls went to the kernel for Hopper"
        return ""
    except Exception as found:  # whatever a bug provokes
        return f"{type(found).__name__}: {found}"
    finally:
        bindings_cuda.why_not_hopper = kernel
        del os.environ["PYLLM_HOPPER"]


def main() -> None:
    torch.set_num_threads(1)
    module = Checked(simt_builder.load(Path(sys.argv[1]), "_simt"))
    extension.cuda.module, extension.cuda.device_type, extension.cuda.reason = module, "cpu", ""
    module.listen()
    reference.LOGITS_BYTES = 4 * 16 * 64  # several panels of logits, of rows and of classes
    for word in sys.argv[2:]:
        if said := hopper_trial() if word == HOPPER else trial(word):
            print(f"CAUGHT by {word}: {' '.join(said.split())[:600]}")
            return
    print("NOTHING NOTICED")


if __name__ == "__main__":
    main()
