"""The table that the CPU kernels are held to: its lines, as data. `python -m benchmarks cpu` measures and prints it.

A line is a piece of work, in one dtype, and the ratios over its rivals that are promised for it. What runs is public:
`pyllm.kernels` and `pyllm.LlamaForCausalLM`; its rivals are Hugging Face's modules in eager PyTorch, torch's own fused
ops, torch.compile of the eager form, and `transformers`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import EAGER, TORCH
from pyllm.kernels import OPS

Call = Callable[[], Any]


@dataclass
class Contest:
    """Who does a line's work.

    Attributes:
        ours: the call that is timed; or why there is none.
        rivals: name to call, or to the reason why it is missing.
        bytes, flops: what must be moved and computed, whoever does it; 0 where nobody has counted.
        backend: what runs ours.
        unit: what a call's time is divided by: tokens, for decoding.
        memory: the rival whose peak memory is compared with ours.
    """

    ours: Call | str
    rivals: dict[str, Call | str]
    bytes: int = 0
    flops: int = 0
    backend: str = ""
    unit: int = 1
    memory: str | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table, in one dtype.

    Attributes:
        name: what --only searches.
        contest: contest(dtype, quick) makes the contenders; quick: smaller, without torch.compile.
        targets: rival to the ratio of its time over ours that is promised; "memory": of peak memory.
        share: of the time that all lines have.
    """

    name: str
    dtype: torch.dtype
    contest: Callable[[torch.dtype, bool], Contest]
    targets: Mapping[str, float] = field(default_factory=dict)
    share: float = 1.0


# --- ops -------------------------------------------------------------------------------------------------------------
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a form of its own: another dtype or shape shall not make it general."""
    return torch.compile(lambda **inputs: function(**inputs), dynamic=False)


def step(function: Callable[..., Any], inputs: dict[str, Any], grads: tuple[str, ...], upstream: list[Tensor]) -> Call:
    """Forward, then backward with fixed gradients."""
    leaves = [inputs[name] for name in grads]

    def call() -> Any:
        out = function(**inputs)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, upstream)

    return call


def op(
    name: str, case: dict[str, Any], small: dict[str, Any], drop: tuple[str, ...] = (), memory: str | None = None
) -> Callable[[torch.dtype, bool], Contest]:
    """Forward and backward of an op of `pyllm.kernels`.

    Args:
        case, small: parameters of the op's `inputs`, and those of --quick.
        drop: inputs that stay at their defaults, for the rivals' sake.
    """

    def contest(dtype: torch.dtype, quick: bool) -> Contest:
        spec = OPS[name]
        made = spec.inputs(**(small if quick else case), dtype=dtype, generator=torch.Generator().manual_seed(1))
        inputs = {k: v for k, v in made.items() if k not in drop}
        grads = tuple(grad for grad in spec.grads if inputs.get(grad) is not None)
        for grad in grads:
            inputs[grad] = inputs[grad].requires_grad_()
        out = spec.function(**inputs)
        upstream = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]
        timed = functools.partial(step, inputs=inputs, grads=grads, upstream=upstream)
        rivals: dict[str, Call | str] = {"eager": timed(EAGER[name])}
        if name in TORCH:
            rivals["torch"] = timed(TORCH[name])
        rivals["compile"] = "left out by --quick" if quick else timed(compiled(EAGER[name]))
        args = [inputs.get(a.name, None if a.default_value is None else a.default_value) for a in
                spec.op.fwd._schema.arguments[:-1]]  # fmt: skip
        costs = [spec.cost(inputs, backward) for backward in (False, True)]
        return Contest(
            timed(spec.function), rivals, sum(c.bytes for c in costs), sum(c.flops for c in costs),
            spec.op.select(None, torch.device("cpu"), *args), memory=memory,
        )  # fmt: skip

    return contest


# --- models ----------------------------------------------------------------------------------------------------------
TRAIN: dict[str, Any] = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
DECODE: dict[str, Any] = TRAIN | dict(
    vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
)  # 100 M parameters
TINY: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
PROMPT = 16


def pair(sizes: dict[str, Any], dtype: torch.dtype, attention: str = "sdpa") -> tuple[Any, Any]:
    """(transformers' model, ours) with the same random weights."""
    import transformers

    from pyllm import LlamaForCausalLM

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    ours = LlamaForCausalLM(theirs.config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def training(model: Any, ids: Tensor, forward: Callable[..., Any] | None = None) -> Call:
    """A step: loss, gradients, AdamW in torch's fused form (for all alike)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    extra = {} if type(model).__module__.startswith("transformers") else {"return_logits": False}

    def call() -> None:
        (model if forward is None else forward)(input_ids=ids, labels=ids, use_cache=False, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def train_step(dtype: torch.dtype, quick: bool) -> Contest:
    """512 wide, 8 layers, vocabulary 8192, 4 sequences of 512 tokens."""
    if importlib.util.find_spec("transformers") is None:
        return Contest("transformers is not installed", {})
    sizes, shape = (TRAIN | TINY, (2, 32)) if quick else (TRAIN, (4, 512))
    ids = torch.randint(3, sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    eager, ours = pair(sizes, dtype, "eager")
    sdpa, _ = pair(sizes, dtype)
    rivals: dict[str, Call | str] = {"transformers": training(eager, ids), "transformers sdpa": training(sdpa, ids)}
    if quick:
        rivals["compile"] = "left out by --quick"
    elif dtype == torch.float32:
        model, _ = pair(sizes, dtype)
        rivals["compile"] = training(model, ids, torch.compile(model, dynamic=False))
    return Contest(training(ours, ids), rivals, backend=ours.backend)


def generation(quantize: str | None = None, **options: Any) -> Callable[[torch.dtype, bool], Contest]:
    """Greedy or beam search by `generate`, 32 tokens after a prompt of 16; the time of a token."""

    def contest(dtype: torch.dtype, quick: bool) -> Contest:
        if importlib.util.find_spec("transformers") is None:
            return Contest("transformers is not installed", {})
        new = 8 if quick else 32
        sizes = DECODE | TINY if quick else DECODE
        theirs, ours = (model.eval() for model in pair(sizes, dtype))
        ids = torch.randint(3, sizes["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        how = dict(max_new_tokens=new, do_sample=False, **options)
        rivals: dict[str, Call | str] = {
            "transformers": lambda: theirs.generate(ids, attention_mask=mask, pad_token_id=0, **how)
        }
        if quantize is not None:
            if not hasattr(ours, "quantize"):
                return Contest("LlamaForCausalLM has no quantize()", rivals)
            ours = ours.quantize(quantize) or ours
        weights = sum(p.nbytes for p in theirs.parameters()) - theirs.get_input_embeddings().weight.nbytes
        return Contest(lambda: ours.generate(ids, mask, **how), rivals, weights * new, backend="auto", unit=new)

    return contest


# --- the table -------------------------------------------------------------------------------------------------------
_F32, _BF16 = torch.float32, torch.bfloat16
_ROPE, _ATTENTION = ("interleaved", "rotary_dim"), ("window", "softcap")
RMS_NORM = op("rms_norm", dict(shape=(2048, 2048)), dict(shape=(64, 256)))
ADD_RMS_NORM = op("add_rms_norm", dict(shape=(2048, 2048)), dict(shape=(64, 256)))
APPLY_ROPE = op("apply_rope", dict(B=1, T=2048, H=32, Hkv=8, D=64), dict(B=1, T=64, H=8, Hkv=2, D=64), _ROPE)
QK_NORM = op("qk_norm_rope", dict(B=1, T=2048, H=32, Hkv=8, D=64), dict(B=1, T=64, H=8, Hkv=2, D=64),
             (*_ROPE, "offset"))  # fmt: skip
SWIGLU = op("swiglu", dict(shape=(2048, 5632)), dict(shape=(64, 704)))
CROSS_ENTROPY = op("cross_entropy", dict(shape=(2048, 32000)), dict(shape=(64, 1000)))


def attention(T: int) -> Callable[[torch.dtype, bool], Contest]:
    sizes = dict(B=1, T=T, S=T, H=32, Hkv=8, D=64, causal=True)
    return op("attention", sizes, sizes | dict(T=64, S=64, H=4, Hkv=2), _ATTENTION)


def linear(rows: int) -> Callable[[torch.dtype, bool], Contest]:
    case, small = dict(shape=(rows, 512), V=32000), dict(shape=(32, 64), V=1000)
    return op("linear_cross_entropy", case, small, memory="eager")


LINES = [
    Line("rms_norm 2048x2048", _F32, RMS_NORM, {"eager": 3.5, "compile": 1.9}),
    Line("rms_norm 2048x2048", _BF16, RMS_NORM, {"eager": 7.0, "compile": 1.9}),
    Line("add_rms_norm 2048x2048", _F32, ADD_RMS_NORM, share=0.7),
    Line("add_rms_norm 2048x2048", _BF16, ADD_RMS_NORM, share=0.7),
    Line("apply_rope 2048 tokens 32/8x64", _F32, APPLY_ROPE, {"eager": 7.0, "compile": 2.9}),
    Line("apply_rope 2048 tokens 32/8x64", _BF16, APPLY_ROPE, {"eager": 9.0, "compile": 2.9}),
    Line("qk_norm_rope 2048 tokens 32/8x64", _F32, QK_NORM, share=0.7),
    Line("qk_norm_rope 2048 tokens 32/8x64", _BF16, QK_NORM, share=0.7),
    Line("swiglu 2048x5632", _F32, SWIGLU, {"eager": 2.3, "compile": 1.6}),
    Line("swiglu 2048x5632", _BF16, SWIGLU, {"eager": 2.0, "compile": 1.6}),
    Line("cross_entropy 2048x32000", _F32, CROSS_ENTROPY, {"eager": 2.7, "compile": 4.0}, share=2),
    Line("cross_entropy 2048x32000", _BF16, CROSS_ENTROPY, {"eager": 2.3, "compile": 4.0}, share=2),
    Line("attention T512 32/8x64", _F32, attention(512), {"torch": 2.0, "compile": 1.5}),
    Line("attention T512 32/8x64", _BF16, attention(512), {"torch": 10.0, "compile": 1.5}, share=2),
    Line("attention T2048 32/8x64", _F32, attention(2048), {"torch": 1.5, "compile": 1.5}, share=3),
    Line("attention T2048 32/8x64", _BF16, attention(2048), {"torch": 10.0, "compile": 1.5}, share=4),
    Line("linear_cross_entropy 1024x512x32000", _F32, linear(1024), {"eager": 1.2, "compile": 1.1, "memory": 4.0},
         share=3),
    Line("linear_cross_entropy 128x512x32000", _BF16, linear(128), {"eager": 20.0, "compile": 1.1, "memory": 4.0},
         share=3),
    Line("train step 512x8 V8192 4x512", _F32, train_step,
         {"transformers": 1.35, "transformers sdpa": 1.15, "compile": 1.15}, share=10),
    Line("train step 512x8 V8192 4x512", _BF16, train_step, {"transformers": 10.0}, share=8),
    Line("decode 100M batch 1", _F32, generation(), {"transformers": 3.0}, share=2),
    Line("decode 100M batch 1", _BF16, generation(), {"transformers": 4.0}, share=2),
    Line("decode 100M batch 1 int8", _F32, generation("int8"), {"transformers": 8.0}, share=2),
    Line("beam 4, 100M", _F32, generation(num_beams=4), {"transformers": 4.0}, share=2),
]  # fmt: skip
