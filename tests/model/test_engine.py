"""The decoding engine against the ordinary forward: the same logits from the same cache, whatever state that is in."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from typing import Any

import pytest
import torch
from harness.accuracy import assert_accurate
from ops.test_cpu_kernels import load
from torch import nn

from model.reference import pair, prompts, randomise
from pyllm import KVCache, LlamaConfig, LlamaForCausalLM, batch_invariant, engine
from pyllm.kernels import extension, use_backend
from pyllm.tree import TokenTree

pytestmark = pytest.mark.skipif(extension.cpu.module is None, reason=extension.cpu.reason)

V = 131
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}
# Sizes that fill vectors, and ones that leave rests of every kind: hidden, intermediate, heads, kv heads, head_dim.
SHAPES = [(64, 176, 4, 2, 16), (60, 101, 6, 2, 10), (37, 45, 3, 3, 6), (128, 96, 8, 1, 34), (48, 33, 5, 1, 8)]


def make(family: str = "llama", shape: tuple[int, ...] = SHAPES[0], **changes: Any) -> LlamaForCausalLM:
    C, F, H, Hkv, D = shape
    sizes = dict(
        vocab_size=V, hidden_size=C, intermediate_size=F, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=Hkv, head_dim=D, max_position_embeddings=2048, model_type=family,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig.from_dict({**sizes, **FAMILIES[family], **changes})).eval()
    randomise(model)
    return model


def numbers(R: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, V, (R, T), generator=torch.Generator().manual_seed(seed))


def filled(model: LlamaForCausalLM, R: int, S: int, padded: bool, window: int | None = None, less: int = 3) -> KVCache:
    """A cache after a prompt of R rows, each `less` tokens shorter than the one before if padded."""
    cache = KVCache(window=window)
    mask = torch.ones(R, S, dtype=torch.int64)
    for b in range(R):
        mask[b, : (less * b) % S] = 0
    with torch.no_grad():
        model(numbers(R, S), mask if padded else None, past_key_values=cache)
    return cache


def as_double(model: LlamaForCausalLM, cache: KVCache) -> tuple[LlamaForCausalLM, KVCache]:
    """The same in float64: the truth."""
    exact = copy.deepcopy(model).double()
    exact.backend = "eager"
    twin = copy.deepcopy(cache)
    twin.keys, twin.values = [k.double() for k in cache.keys], [v.double() for v in cache.values]
    return exact, twin


def positions_of(cache: KVCache, T: int) -> torch.Tensor | None:
    return None if cache.lengths is None else cache.lengths[:, None].long() + torch.arange(T)


@torch.no_grad()
def judge(model: LlamaForCausalLM, cache: KVCache, T: int, keep: int | None = None, seed: int = 1) -> torch.Tensor:
    """One step of the engine, judged by the rule of the harness against float64 from the same cache, with the model's
    own step as the measure; what it writes to the cache too."""
    keep = T if keep is None else keep
    ids = numbers(cache.batch_size or 0, T, seed)
    places = positions_of(cache, T)
    exact, true_cache = as_double(model, cache)
    eager_cache, before = copy.deepcopy(cache), copy.deepcopy(cache)
    starts = torch.full((len(ids),), cache.seen) if cache.lengths is None else cache.lengths.long()
    columns = starts[:, None] + torch.arange(T)
    if cache.window is not None:
        columns %= cache.window
    truth = exact(ids, None, places, true_cache, logits_to_keep=keep).logits
    with use_backend("eager"):
        yardstick = model(ids, None, places, eager_cache, logits_to_keep=keep).logits
    got = engine.step(model, ids, places, cache, keep)
    assert got is not None, engine.why_not(model)
    assert got.dtype == torch.float32
    assert_accurate("logits", got.to(yardstick.dtype), truth, yardstick, terms=max(model.config.intermediate_size, 64))
    assert (cache.seen, len(cache)) == (eager_cache.seen, len(eager_cache))
    for name in ("keys", "values"):
        for mine, eager, true, old in zip(
            *(getattr(c, name) for c in (cache, eager_cache, true_cache, before)), strict=True
        ):
            fresh = [x.gather(1, columns[..., None, None].expand(-1, -1, *x.shape[2:])) for x in (mine, true, eager)]
            assert_accurate(name, *(x.flatten(2) for x in fresh), terms=model.config.hidden_size)
            kept = torch.ones(mine.shape[:2], dtype=torch.bool).scatter(1, columns, False)[:, : old.shape[1]]
            assert torch.equal(mine[:, : old.shape[1]][kept], old[kept]), "something else was written"
    return got


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The tokens of every step that the engine takes."""
    taken: list[int] = []
    run = engine.Plan.run

    def count(self, model, ids, *rest):
        taken.append(ids.numel())
        return run(self, model, ids, *rest)

    monkeypatch.setattr(engine.Plan, "run", count)
    return taken


# The step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_the_models(family, dtype):
    """Families, dtypes, sizes with every kind of rest; one token and several; rows alike and padded."""
    dice = random.Random(f"{family} {dtype}")
    for shape in SHAPES:
        model = make(family, shape).to(dtype)
        R, T, padded = dice.choice((1, 2, 3, 5)), dice.choice((1, 2, 4)), dice.random() < 0.5
        cache = filled(model, R, 7, padded)
        judge(model, cache, T)
        judge(model, cache, 1, seed=2)


def test_epsilon():
    model = make("qwen3", rms_norm_eps=0.3)
    judge(model, filled(model, 2, 5, False), 1)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    try:
        monkeypatch.setattr(extension.cpu, "module", load(isa))
    except ImportError:
        pytest.skip(f"this CPU has no {isa}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, R, T in ((SHAPES[1], 3, 2), (SHAPES[0], 7, 1), (SHAPES[2], 1, 1)):
            model = make("qwen3", shape).to(dtype)
            judge(model, filled(model, R, 5, R == 3), T)


@pytest.mark.parametrize("family, window", [("llama", None), ("mistral", 300), ("mistral", 700)])
def test_long_caches(family, window):
    """Over several chunks of columns, and windows that begin within one."""
    changes = {} if window is None else {"sliding_window": window}
    model = make(family, **changes)
    cache = filled(model, 3, 600, padded=True)
    judge(model, cache, 1)
    judge(model, cache, 3, keep=2)
    judge(model, filled(model, 3, 600, padded=True, less=170), 2)
    cache = filled(model, 1, 254, padded=False)
    for seed in range(4):  # over a chunk's edge
        judge(model, cache, 1, seed=seed)


@pytest.mark.parametrize("window", [6, 40, 300])
def test_rings(window):
    model = make("mistral", sliding_window=window)
    for padded in (False, True):
        cache = filled(model, 3, window - 2, padded, window)
        for seed in range(5):  # full after two
            judge(model, cache, 1, seed=seed)
        assert cache.keys[0].shape[1] == window + 1
        with torch.no_grad():
            assert engine.step(model, numbers(3, 2), None, cache, 1) is None  # several at once: the model's


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_trees(family):
    """Beams: tokens of one row that don't all see each other."""
    model = make(family, SHAPES[1])
    for padded in (False, True):
        cache = filled(model, 2, 9, padded)
        tree = TokenTree(cache, 3, 100)
        for seed in range(8):
            if seed:
                tree.reorder(torch.tensor([[0, 0, 2], [2, 1, 0]]))
            twin = copy.deepcopy(cache)
            exact, true_cache = as_double(model, cache)
            ids = numbers(2, 3, seed)
            places = tree.grow()
            for other in (twin, true_cache):
                assert other.tree is not None
                other.tree.grow()
            got = engine.step(model, ids, places, cache, 3)
            assert got is not None
            with use_backend("eager"):
                yardstick = model(ids, None, places, twin).logits
            assert_accurate("logits", got, exact(ids, None, places, true_cache).logits, yardstick, terms=101)


def test_what_is_computed_does_not_depend_on_mates_padding_or_threads():
    """Bit for bit: alone or in any batch, padded or not, with one, two and four threads."""
    check_rows((1, 2, 4))


def check_rows(thread_counts: tuple[int, ...]) -> None:
    model = make("qwen3", (256, 300, 8, 2, 32), vocab_size=1000)  # large enough for threads
    ids = torch.randint(3, 1000, (9, 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache()
    new = torch.randint(3, 1000, (9, 2), generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    found = []
    with torch.no_grad():
        model(ids, past_key_values=cache)
        try:
            for threads in thread_counts:
                torch.set_num_threads(threads)
                together = copy.deepcopy(cache)
                found.append(engine.step(model, new, None, together, 2))
                assert torch.equal(found[-1], found[0])
        finally:
            torch.set_num_threads(before)
        for rows in ([0], [1, 0], [2, 4, 1], [8, 7, 6, 5], [3, 1, 4, 0, 5], list(range(8))):
            some = copy.deepcopy(cache)
            some.reorder(torch.tensor(rows))
            assert torch.equal(engine.step(model, new[rows], None, some, 2), found[0][rows])
            one = copy.deepcopy(cache)
            one.reorder(torch.tensor(rows))
            for t in range(2):  # and one token after the other
                assert torch.equal(engine.step(model, new[rows, t : t + 1], None, one, 1)[:, 0], found[0][rows, t])
        padded = copy.deepcopy(cache)
        padded.lengths = torch.full((9,), 12, dtype=torch.int32)  # rows that might differ, and don't
        assert torch.equal(engine.step(model, new, positions_of(padded, 2), padded, 2), found[0])


# Generation


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_uses_it_and_says_the_same(family, steps):
    _, ours = pair(family, **({"sliding_window": 6} if family == "mistral" else {}))
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": 20, "eos_token_id": None}
    for more, fed in (({}, [3] * 19), ({"num_beams": 4}, [12] * 19), ({"do_sample": True, "seed": 3}, [3] * 19)):
        fast = ours.generate(ids, mask, **options, **more)
        assert steps == fed
        with use_backend("eager"):
            assert torch.equal(ours.generate(ids, mask, **options, **more), fast)
        assert steps == fed
        steps.clear()
    one = {**options, "prompt_lookup_num_tokens": 3}
    fast = ours.generate(ids[:1], **one)
    assert steps
    assert torch.equal(fast, ours.generate(ids[:1], **options))
    assert list(ours.stream(ids[:1], **options)) == fast[0, 17:].tolist()


def test_a_long_text_costs_one_token_a_step(steps):
    ours = make()
    ours.generate(numbers(2, 17), max_new_tokens=256, eos_token_id=None)
    assert steps == [2] * 255


@torch.no_grad()
def test_model_and_engine_take_turns():
    """On one cache, that grows meanwhile."""
    model = make("mistral", sliding_window=20)
    ids = numbers(2, 40)
    cache, plain = KVCache(), KVCache()
    model(ids[:, :5], past_key_values=cache)
    with use_backend("eager"):
        expected = [model(ids[:, :5], past_key_values=plain)]
        expected += [model(ids[:, t : t + 1], past_key_values=plain) for t in range(5, 40)]
    for t in range(5, 40):
        if t % 3:
            got = engine.step(model, ids[:, t : t + 1], None, cache, 1)
        else:
            got = model(ids[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(got, expected[t - 4].logits, rtol=0, atol=2e-4)


# What it must notice


@torch.no_grad()
def test_changed_weights_are_seen():
    model = make()
    cache = filled(model, 2, 5, False)
    judge(model, cache, 1)
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight.mul_(-1.5)  # in place
    judge(model, cache, 1)
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight * 2)  # another tensor
    judge(model, cache, 1)
    model.model.norm.weight.data = model.model.norm.weight * 3
    judge(model, cache, 1)
    attention.o_proj = nn.Linear(64, 64)  # another module, with a bias
    judge(model, cache, 1)
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)
    judge(model, cache, 1)
    model.to(torch.bfloat16)
    assert engine.step(model, numbers(2, 1), None, cache, 1) is None  # the cache is float32
    judge(model, filled(model, 2, 5, False), 1)


class Adapter(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def _hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def _adapter(model):
    model.model.layers[0].self_attn.o_proj = Adapter(model.model.layers[0].self_attn.o_proj)


def _subclass(model):
    model.model.layers[1].mlp.up_proj.__class__ = Louder


def _patched(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x, step: type(mlp).forward(mlp, x, step) * 2


def _strided(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.t().contiguous().t() * 2)


def _transposed(model):
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.t()  # square: the same address and shape


def _head(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:100].clone())


def _biased(model):
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.zeros(1))


CHANGES = {
    "hooks": _hook,
    "self_attn.o_proj is a": _adapter,
    "up_proj is a": _subclass,
    "forward of its own": _patched,
    "not an ordinary contiguous tensor": _strided,
    "self_attn.o_proj.weight is not an ordinary contiguous": _transposed,
    "lm_head has another size": _head,
    "model.layers.1 has other sizes": _biased,
    "differ in eps": lambda model: setattr(model.model.norm, "eps", 0.5),
    "is torch.float64": lambda model: model.model.layers[0].input_layernorm.double(),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_it_cannot_do_is_left_to_the_model(reason, steps):
    """It is noticed between two tokens of one text, and the reason is told."""
    model = make()
    ids = numbers(1, 5)
    text = model.stream(ids, max_new_tokens=12, eos_token_id=None)
    for _ in range(4):
        next(text)
    assert engine.why_not(model) == []
    assert len(steps) == 3
    with torch.no_grad():
        CHANGES[reason](model)
    if reason != "is torch.float64":  # which the ordinary forward refuses, too
        assert len(list(text)) == 8
    assert len(steps) == 3, "the engine went on"
    assert any(reason in found for found in engine.why_not(model)), engine.why_not(model)


def test_circumstances():
    model = make()
    assert engine.why_not(model) == []
    assert "one call to C++" in engine.describe()
    with use_backend("eager"):
        assert engine.why_not(model) == ["backend 'eager' was chosen"]
        assert "one op at a time: backend 'eager'" in engine.describe()
    with batch_invariant():
        assert "dispatch mode" in engine.why_not(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.why_not(model) == ["autocast is on"]
    model.backend = "cpu,eager"
    assert engine.why_not(model) == []
    model.double()
    assert engine.why_not(model) == ["dtype torch.float64 is not served"]
    cache = filled(make(), 1, 5, False)
    assert engine.step(make(), numbers(1, 1), None, cache, 1) is None  # gradients are on here
    assert cache.seen == 5


def test_without_the_compiled_module(monkeypatch, steps):
    monkeypatch.setattr(extension.cpu, "module", None)
    monkeypatch.setattr(extension.cpu, "reason", "not built")
    model = make()
    model.generate(numbers(1, 4), max_new_tokens=3, eos_token_id=None)
    assert not steps
    assert engine.why_not(model) == ["not built"]


@torch.no_grad()
def test_errors_are_the_models():
    model = make()
    full = KVCache(6, growable=False)
    model(numbers(1, 6), past_key_values=full)
    with pytest.raises(ValueError, match="has room for 6 tokens"):
        engine.step(model, numbers(1, 1), None, full, 1)
    cache = filled(model, 2, 5, False)
    with pytest.raises(ValueError, match=r"input_ids must be within \[0, 131\), got 131"):
        engine.step(model, torch.tensor([[4], [V]]), None, cache, 1)
    assert cache.seen == 5
    assert engine.step(model, numbers(3, 1), None, cache, 1) is None  # the model tells what is wrong
    many = filled(model, 9, 5, False)
    assert engine.step(model, numbers(9, 8), None, many, 1) is None


def test_a_model_can_be_freed_and_copied():
    model = make()
    model.generate(numbers(1, 4), max_new_tokens=3, eos_token_id=None)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
        judge(twin, filled(twin, 1, 4, False), 1)
        judge(model, filled(model, 1, 4, False), 1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(engine._plans) <= 2
