"""pyllm's models against transformers' on random configs: logits, losses, every gradient, greedy tokens, bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.random_models import batches, configs
from model.reference import compare, original, randomise
from pyllm import LlamaForCausalLM

hf = pytest.importorskip("pyllm.hf", reason="pyllm.hf needs transformers 5")
hf.unregister()  # other tests load what pyllm saved through the Auto classes

# The same examples every time: a failure stays one until it is understood.
pytestmark = pytest.mark.filterwarnings("ignore:generate. up to")
HOW: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


FORMS = ("pyllm", "pyllm.hf")


def models(config: Any, form: str) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours with the same."""
    theirs = original(config)
    randomise(theirs)
    if form == "pyllm":
        ours: Any = LlamaForCausalLM(config).eval()
    else:
        cls = getattr(hf, type(theirs).__name__)
        ours = cls._from_config(copy.deepcopy(config), attn_implementation="pyllm", dtype=torch.float32).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def logits_and_gradients(data: st.DataObject) -> None:
    config = data.draw(configs())
    theirs, ours = models(config, data.draw(st.sampled_from(FORMS)))
    compare(theirs, ours, *data.draw(batches(config.vocab_size)))


@settings(max_examples=25, **HOW)
@given(st.data())
def test_logits_and_gradients(data):
    logits_and_gradients(data)


@pytest.mark.slow
@settings(max_examples=400, **HOW)
@given(st.data())
def test_logits_and_gradients_of_many(data):
    logits_and_gradients(data)


def greedy(data: st.DataObject) -> None:
    config = data.draw(configs())
    theirs, ours = models(config, data.draw(st.sampled_from(FORMS)))
    ids, mask, _ = data.draw(batches(config.vocab_size))
    if mask is not None and not bool(mask[:, -1].all()):
        mask = mask.flip(1)  # prompts are padded on the left
    count = data.draw(st.integers(1, 16))
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["use_cache"] = data.draw(st.booleans())
    if config.rope_parameters["rope_type"] == "dynamic":
        options["use_cache"] = False  # with it, transformers keeps keys that were rotated at other speeds
    mask = torch.ones_like(ids) if mask is None else mask
    a = theirs.generate(ids, attention_mask=mask, **options)
    b = ours.generate(ids, attention_mask=mask, **options)
    assert a.shape == b.shape
    for row in (a != b).any(1).nonzero().flatten().tolist():
        at = int((a[row] != b[row]).nonzero()[0])
        assert_tie(theirs, a[row, :at], mask[row], int(a[row, at]), int(b[row, at]))


@torch.no_grad()
def assert_tie(model: Any, ids: Tensor, mask: Tensor, one: int, other: int) -> None:
    """Two tokens may only differ where float32 can't tell their logits apart."""
    mask = torch.cat((mask, mask.new_ones(len(ids) - len(mask))))
    positions = (mask.cumsum(0) - 1).clamp(min=0)
    model = model.double()
    logits = model(ids[None], attention_mask=mask[None], position_ids=positions[None], use_cache=False).logits[0, -1]
    assert abs(logits[one] - logits[other]) < 1e-5 * logits.norm(), (one, other, logits[one], logits[other])


@settings(max_examples=12, **HOW)
@given(st.data())
def test_greedy_tokens(data):
    greedy(data)


@pytest.mark.slow
@settings(max_examples=150, **HOW)
@given(st.data())
def test_greedy_tokens_of_many(data):
    greedy(data)


@torch.no_grad()
def bfloat16_errors(form: str, data: st.DataObject) -> tuple[float, float]:
    """Squared errors of ours and of theirs in bfloat16, against theirs in float64 with the same weights."""
    config = data.draw(configs())
    theirs, ours = models(config, form)
    ids, mask, _ = data.draw(batches(config.vocab_size))
    real = slice(None) if mask is None else mask.bool()
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    exact = original(config).double()
    exact.load_state_dict({name: weight.double() for name, weight in theirs.state_dict().items()})
    truth = exact(ids, attention_mask=mask).logits[real]
    found = (model(ids, attention_mask=mask).logits[real].double() for model in (ours, theirs))
    ours_error, theirs_error = (float((logits - truth).square().sum() / truth.square().sum()) for logits in found)
    return ours_error, theirs_error


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_no_worse_than_theirs(form):
    """Over many models: one alone is a matter of luck, where both round to the same 8 bits."""
    errors = []

    @settings(max_examples=12, **HOW)
    @given(st.data())
    def collect(data):
        errors.append(bfloat16_errors(form, data))

    collect()
    ratios = torch.tensor(errors, dtype=torch.float64)
    ratios = (ratios[:, 0] / ratios[:, 1]).sqrt()
    assert ratios.log().mean().exp() <= 1
    assert ratios.max() < 2
