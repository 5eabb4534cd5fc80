"""Weights of 8 and 4 bits: what is stored, what it is multiplied with, and how far the logits are from the model's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from ops.test_cpu_kernels import load
from torch import nn

from model.reference import error, pair, prompts
from model.test_engine import SHAPES, make, numbers, positions_of
from pyllm import KVCache, LlamaConfig, LlamaForCausalLM, engine
from pyllm.kernels import extension
from pyllm.kernels.decode import pack, unpack
from pyllm.quantized import PackedLinear, is_quantized

needs_cpp = pytest.mark.skipif(extension.cpu.module is None, reason=extension.cpu.reason)
SIZES = [(16, 32), (1, 1), (131, 60), (33, 101), (48, 256), (100, 31)]
INPUTS = 2.0**-16 * 1.1  # what a product's inputs are rounded to, of the largest of their group of 32
# What weights of so many bits cost, relative: one product, and the logits of a four-layer model fresh from its
# initialisation, where the errors of all layers add up. docs/generation.md states them.
PRODUCT = {"int8": 0.01, "int4": 0.11}
LOGITS = {"int8": 0.04, "int4": 0.4}


def matrix(N: int, K: int) -> torch.Tensor:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(N + K))
    w[N // 2] *= 1e-3
    w[:, K // 3] *= 20
    w[0] = 0
    return w


@pytest.mark.parametrize("N, K", SIZES)
def test_int8_is_off_by_half_a_step(N, K):
    w = matrix(N, K)
    found = unpack(*pack(w, "int8"), N, K)
    step = w.abs().amax(1, keepdim=True) / 127
    assert found.shape == w.shape
    assert bool(((found - w).abs() <= step * 0.50001).all())
    assert torch.equal(found[0], w[0])


@pytest.mark.parametrize("N, K", SIZES)
def test_int4_is_off_by_half_a_step(N, K):
    w = matrix(N, K)
    found = unpack(*pack(w, "int4"), N, K)
    groups = F.pad(w, (0, -K % 32)).view(N, -1, 32)
    step = (groups.abs().amax(2, keepdim=True) / 8).expand_as(groups).reshape(N, -1)[:, :K]
    # The largest element's opposite is one step out of reach, and the step itself is a bfloat16.
    assert bool(((found - w).abs() <= step * 1.04).all())
    near = (w.abs() <= step * 7.4) & (step > 0)
    assert bool(((found - w).abs()[near] <= (step * 0.54)[near]).all())
    # What has been rounded once is not rounded again.
    assert torch.equal(unpack(*pack(found, "int4"), N, K), found)


@needs_cpp
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products(kind, isa, monkeypatch):
    """Against the unpacked matrix in float64: rows from one to more than fit a tile, ragged sizes, strides, dtypes."""
    try:
        monkeypatch.setattr(extension.cpu, "module", load(isa))
    except ImportError:
        pytest.skip(f"this CPU has no {isa}")
    check_products(kind)


def check_products(kind: str) -> None:
    for N, K in SIZES:
        linear = nn.Linear(K, N, bias=N % 2 == 1)
        with torch.no_grad():
            linear.weight.copy_(matrix(N, K))
        packed = PackedLinear(linear, kind)
        for rows in (1, 2, 3, 5, 8, 21):
            wide = torch.randn(rows, K + 5, generator=torch.Generator().manual_seed(rows)) * 3
            wide[:, K:] = torch.nan  # which a read beyond the row would find
            wide[0, : K // 2] *= 1e4
            with torch.no_grad():
                x = wide[:, :K]
                bias = None if linear.bias is None else linear.bias.double()
                truth = F.linear(x.double(), packed.weight.double(), bias)
                scale = F.linear(x.double().abs(), packed.weight.double().abs())
                top = F.pad(x.double().abs(), (0, -K % 32)).view(rows, -1, 32).amax(2).repeat_interleave(32, 1)[:, :K]
                allowed = INPUTS * F.linear(top, packed.weight.double().abs()) + 4e-6 * scale + 1e-6
                got = packed(x)
                assert bool(((got - truth).abs() <= allowed).all())
                assert torch.equal(packed(x[-1:]), got[-1:])  # a row is its own
                for dtype in (torch.bfloat16, torch.float16):
                    half = x / 1e3
                    truth = F.linear(half.to(dtype).double(), packed.weight.double())
                    mine = copy.deepcopy(packed).to(dtype)
                    mine.bias = None
                    rounding = torch.finfo(dtype).eps * truth.abs() + allowed / 900 + 6e-8
                    assert bool(((mine(half.to(dtype)) - truth).abs() <= rounding).all())


@needs_cpp
def test_special_numbers_come_through():
    packed = PackedLinear(nn.Linear(64, 20), "int4")
    x = torch.ones(4, 64)
    x[0, 3], x[1, 40], x[2] = torch.nan, torch.inf, 0
    with torch.no_grad():
        y = packed(x)
    assert bool(y[:2].isnan().all())
    torch.testing.assert_close(y[2], packed.bias.detach())
    assert bool(y[3].isfinite().all())


@needs_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_logits_are_those_of_the_rounded_weights(kind, family):
    """From prompts and from the step."""
    for shape in SHAPES[:3]:
        for dtype in (torch.float32, torch.bfloat16):
            plain = make(family, shape).to(dtype)
            packed = copy.deepcopy(plain).quantize(kind)
            rounded = copy.deepcopy(plain)
            names = dict(rounded.named_modules())
            for name, module in packed.named_modules():
                if isinstance(module, PackedLinear):
                    names[name].weight = nn.Parameter(module.weight)
            assert packed.lm_head.kind == "int8"
            caches = [KVCache() for _ in range(2)]
            ids, new = numbers(3, 9), numbers(3, 2, 5)
            own, same = (
                model(ids, past_key_values=cache).logits for model, cache in zip((packed, rounded), caches, strict=True)
            )
            close = 1e-3 if dtype == torch.float32 else 0.08
            assert error(own, same) < close  # prompts
            got = engine.step(packed, new, positions_of(caches[0], 2), caches[0], 2)
            assert got is not None
            assert error(got, rounded(new, past_key_values=caches[1]).logits) < close


@needs_cpp
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_the_stated_error(kind):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )
    packed = copy.deepcopy(plain).quantize(kind)
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        own, rounded = (model.model.layers[0].get_submodule(name) for model in (plain, packed))
        x = torch.randn(64, own.in_features)
        assert PRODUCT[kind] / 3 < error(rounded(x), own(x)) < PRODUCT[kind]
    ids = torch.randint(3, 1000, (2, 33), generator=torch.Generator().manual_seed(1))
    caches = KVCache(), KVCache()
    own, rounded = (
        model(ids[:, :32], past_key_values=c).logits for model, c in zip((plain, packed), caches, strict=True)
    )
    assert LOGITS[kind] / 4 < error(rounded, own) < LOGITS[kind]
    own = plain(ids[:, 32:], past_key_values=caches[0]).logits
    rounded = engine.step(packed, ids[:, 32:], None, caches[1], 1)
    assert LOGITS[kind] / 4 < error(rounded, own) < LOGITS[kind]


@needs_cpp
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_and_threads_do_not_matter(kind):
    model = make("llama", (256, 300, 8, 2, 32), vocab_size=1000).quantize(kind)
    ids = torch.randint(3, 1000, (9, 6), generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    with torch.no_grad():
        try:
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                cache = KVCache()
                model(ids[:, :5], past_key_values=cache)
                found.append(engine.step(model, ids[:, 5:], None, cache, 1))
                assert torch.equal(found[-1], found[0])
        finally:
            torch.set_num_threads(before)
        for rows in ([3], [8, 1], [0, 2, 4], list(range(7))):
            cache = KVCache()
            model(ids[rows, :5], past_key_values=cache)
            cache.keys = [k[rows].contiguous() for k in _keys(model, ids)[0]]
            cache.values = [v[rows].contiguous() for v in _keys(model, ids)[1]]
            assert torch.equal(engine.step(model, ids[rows, 5:], None, cache, 1), found[0][rows])


def _keys(model, ids):
    cache = KVCache()
    model(ids[:, :5], past_key_values=cache)
    return cache.keys, cache.values


@needs_cpp
def test_generation_and_files(tmp_path):
    theirs, ours = pair(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    ids, mask, _ = prompts("left")
    for kind in ("int8", "int4"):
        model = LlamaForCausalLM.from_pretrained(tmp_path, quantize=kind)
        assert is_quantized(model)
        assert not model.training
        assert engine.why_not(model) == []
        options = {"max_new_tokens": 8, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
        first = model.generate(ids, mask, **options)
        out = first.sequences
        for more in ({"use_cache": False}, {"prefill_chunk_size": 3}):
            for a, b in zip(first.logits[:2], model.generate(ids, mask, **options, **more).logits, strict=False):
                assert error(a, b) < 1e-3
        beams = model.generate(ids, mask, max_new_tokens=8, eos_token_id=None, num_beams=3)
        assert beams.shape == out.shape
        with pytest.raises(ValueError, match="quantised, and no longer what a checkpoint holds"):
            model.save_pretrained(tmp_path / kind)
        assert not (tmp_path / kind).exists()
        twin = copy.deepcopy(ours).quantize(kind)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.generate(ids, mask, max_new_tokens=8, eos_token_id=None), out)
    large = make("llama", (256, 512, 4, 4, 64))
    whole = large.get_memory_footprint()
    assert large.quantize("int4").get_memory_footprint() < 0.2 * whole


def test_what_it_is_not_for(tmp_path):
    model = make()
    with pytest.raises(ValueError, match="quantize must be one of int8, int4, got 'int3'"):
        model.quantize("int3")
    with pytest.raises(ValueError, match="got 'fp8'"):
        LlamaForCausalLM.from_pretrained(tmp_path / "nowhere", quantize="fp8")
    with pytest.raises(ValueError, match="for CPUs, got cuda"):
        LlamaForCausalLM.from_pretrained(tmp_path / "nowhere", quantize="int8", device="cuda")
    with pytest.raises(ValueError, match="for CPUs, got meta"):
        LlamaForCausalLM(model.config).to("meta").quantize("int8")
    model.model.layers[1].mlp.up_proj = nn.Sequential()
    with pytest.raises(ValueError, match=r"mlp\.up_proj must be an nn\.Linear, got Sequential"):
        model.quantize("int8")
    assert not is_quantized(model)  # all or nothing
    twice = make()
    twice.lm_head = PackedLinear(twice.lm_head, "int8")
    with pytest.raises(ValueError, match=r"lm_head must be an nn\.Linear, got PackedLinear"):
        twice.quantize("int4")
    with pytest.raises(ValueError, match="finite"):
        pack(torch.full((4, 4), torch.inf), "int8")


@needs_cpp
def test_gradients_reach_the_inputs():
    linear = nn.Linear(40, 24)
    packed = PackedLinear(linear, "int8")
    x = torch.randn(3, 40, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(3, -1))
    with torch.no_grad():
        torch.testing.assert_close(packed(x), F.linear(x, packed.weight, packed.bias), rtol=1e-3, atol=1e-3)
