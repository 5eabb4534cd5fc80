"""A patched model trains as before: losses, Trainer, adapters, checkpointing, autocast, torch.compile."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import pyllm
from model.patch_reference import ERROR, MODELS, gradients, same_gradients, twins
from model.reference import error, prompts, transformers


@pytest.mark.parametrize("kwargs", [{"num_items_in_batch": 29}, {"num_items_in_batch": torch.tensor(7)}, {}])
def test_ways_to_reduce_the_loss(kwargs):
    theirs, ours = twins()
    pyllm.patch(ours)
    ids, _, labels = prompts()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    renamed = {"labels": labels.where(labels >= 0, 7), "ignore_index": 7}
    for how in ({"labels": labels}, {"labels": labels, "shift_labels": shifted.roll(1, 0)}, renamed):
        expected, da = gradients(theirs, ids, **how, **kwargs)
        for training in (True, False):
            loss, db = gradients(ours.train(training), ids, **how, **kwargs)
            assert abs(loss.loss - expected.loss) <= ERROR * expected.loss
            same_gradients(db, da)


def test_logits_when_asked_for():
    theirs, ours = twins()
    pyllm.patch(ours)
    ids, _, labels = prompts()
    expected = theirs(ids, labels=labels)
    for training in (True, False):
        ours.train(training)
        without, plain = (ours(ids, labels=labels, **how) for how in ({"return_logits": False}, {}))
        having = ours(ids, labels=labels, return_logits=True)
        assert without.logits is None
        assert (plain.logits is None) == training
        assert error(having.logits, expected.logits) < ERROR
        assert error(ours(ids).logits, expected.logits) < ERROR
        for out in (without, having, plain):
            assert abs(out.loss - expected.loss) <= ERROR * expected.loss
        as_tuple = ours(ids, labels=labels, return_logits=True, return_dict=False)
        assert type(as_tuple) is tuple
        assert torch.equal(as_tuple[1], having.logits)
        assert len(as_tuple) == len(theirs(ids, labels=labels, return_dict=False))
    with pytest.raises(ValueError, match="return_logits=False is not possible: there are no labels"):
        ours(ids, return_logits=False)
    with pytest.raises(ValueError, match="logits_to_keep is given"):
        ours(ids, labels=labels, logits_to_keep=3, return_logits=False)


def test_all_ignored_is_as_before():
    theirs, ours = twins()
    pyllm.patch(ours.train())
    ids, _, labels = prompts()
    nothing = torch.full_like(labels, -100)
    assert theirs(ids, labels=nothing).loss.isnan()
    assert ours(ids, labels=nothing).loss.isnan()
    assert ours(ids, labels=nothing, num_items_in_batch=3).loss == 0


def test_what_cannot_be_fused_is_left_to_transformers():
    theirs, ours = twins()
    pyllm.patch(ours.train())
    ids, _, labels = prompts()
    for model in (theirs, ours):
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    assert error(ours(ids, labels=labels).loss[None], theirs(ids, labels=labels).loss[None]) < ERROR
    theirs, ours = twins()
    pyllm.patch(ours.train())
    seen = []
    for model in (theirs, ours):
        model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out) or out * 2)
    a, b = (model(ids, labels=labels) for model in (theirs, ours))
    assert len(seen) == 2
    assert error(b.logits, a.logits) < ERROR
    assert abs(b.loss - a.loss) <= ERROR * a.loss
    wide = torch.nn.Linear(64, 131)
    with torch.no_grad():
        wide.weight.copy_(theirs.lm_head.weight)
    for model in (theirs, ours):
        model.lm_head = wide
    a, b = (model(ids, labels=labels) for model in (theirs, ours))
    assert b.logits is None
    assert abs(b.loss - a.loss) <= ERROR * a.loss


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    theirs, ours = twins(**MODELS["qwen3"])
    pyllm.patch(ours.train())
    ids, mask, labels = prompts("left")
    _, da = gradients(theirs, ids, attention_mask=mask, labels=labels)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, db = gradients(ours, ids, attention_mask=mask, labels=labels, use_cache=False)
    same_gradients(db, da)


def test_autocast():
    theirs, ours = twins()
    exact = copy.deepcopy(theirs).double()
    pyllm.patch(ours)
    ids, mask, labels = prompts("left")
    truth = exact(ids, attention_mask=mask).logits[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        a, da = gradients(theirs, ids, attention_mask=mask, labels=labels)
        b, db = gradients(ours, ids, attention_mask=mask, labels=labels)
    assert b.logits.dtype == a.logits.dtype
    off = [error(out.logits[mask.bool()].flatten(), truth.flatten()) for out in (a, b)]
    assert off[1] <= 1.1 * off[0]
    assert {name: g.dtype for name, g in db.items()} == {name: g.dtype for name, g in da.items()}


SLOW = pytest.mark.slow
KERNELS = ("rms_norm", "rope", "swiglu")


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("qwen3", None),
        pytest.param("llama", "left", marks=SLOW),
        pytest.param("mistral", None, marks=SLOW),
        pytest.param("mistral", "left", marks=SLOW),
        pytest.param("qwen2", "right", marks=SLOW),
    ],
)
def test_compiles_whole(name, padding):
    """fullgraph, forward and backward; and a model that was compiled before is traced again, with the kernels."""
    theirs, ours = twins(**MODELS[name])
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    ids, mask, labels = prompts(padding)
    real = slice(None) if mask is None else mask.bool()
    with torch.no_grad():
        compiled(ids, attention_mask=mask, use_cache=False)
        assert "pyllm" not in graphs[-1]
        pyllm.patch(compiled)
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        # Qwen3's norms of q and k and its RoPE are one op.
        assert {op for op in KERNELS if re.search(rf"torch\.ops\.pyllm\.(qk_norm_)?{op}", graphs[-1])} == set(KERNELS)
        assert error(logits[real], theirs(ids, attention_mask=mask, use_cache=False).logits[real]) < ERROR
    expected, da = gradients(theirs, ids, attention_mask=mask, labels=labels, use_cache=False)
    ours.train()
    ours.zero_grad()
    loss = compiled(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    assert abs(loss - expected.loss) <= ERROR * expected.loss
    same_gradients({name: p.grad for name, p in ours.named_parameters()}, da)
    torch._dynamo.reset()


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of 4 to 16 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 17, (), generator=generator))
        ids = torch.zeros(16, dtype=torch.int64)
        ids[:length] = torch.randint(3, 131, (length,), generator=generator)
        labels = ids.masked_fill(torch.arange(16) >= length, -100)
        rows.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})
    return rows


def train(model: Any, folder: Any, **options: Any) -> tuple[list[float], list[float], Any]:
    """Losses of 50 steps with gradient accumulation, evaluation losses, and a prediction."""
    pytest.importorskip("accelerate", reason="accelerate, which transformers' Trainer needs, is not installed")
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=50,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=25,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    rows = examples(64)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=transformers.default_data_collator,
    )
    trainer.log = lambda logs, *_: trainer.state.log_history.append(dict(logs))  # unrounded, and not printed
    trainer.train()
    history = trainer.state.log_history
    predicted = trainer.predict(rows[:4]).predictions
    losses, evaluations = ([entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss"))
    return losses, evaluations, torch.as_tensor(predicted)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_fifty_steps_of_trainer(name, tmp_path):
    theirs, ours = twins(**MODELS[name])
    pyllm.patch(ours)
    losses, evaluations, predicted = train(theirs.train(), tmp_path / "theirs")
    our_losses, our_evaluations, our_predicted = train(ours.train(), tmp_path / "ours")
    assert len(losses) == len(our_losses) == 50
    assert len(evaluations) >= 2
    assert losses[0] > losses[-1] + 0.5
    for a, b in zip(losses + evaluations, our_losses + our_evaluations, strict=True):
        assert abs(a - b) < 1e-4 * a
    assert our_predicted.shape == predicted.shape == (4, 16, 131)
    pyllm.unpatch(ours)
    for ours_weight, theirs_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert error(ours_weight.flatten(), theirs_weight.flatten()) < 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trainer_in_bfloat16_and_unpatched_afterwards(tmp_path):
    theirs, ours = twins()
    losses, _, _ = train(theirs.train(), tmp_path / "theirs", bf16=True)
    with pyllm.patched(ours.train()):
        our_losses, _, _ = train(ours, tmp_path / "ours", bf16=True)
    assert max(abs(a - b) / a for a, b in zip(losses, our_losses, strict=True)) < 0.02
    ids, _, labels = prompts()
    assert ours(ids, labels=labels).loss.isfinite()  # through the wrapper that accelerate leaves behind
    assert type(ours) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("order", ["adapter first", "patch first"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_lora(order, saved):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, other = twins(**MODELS["qwen2"])
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    ids, mask, labels = prompts("left")

    def adapted(model: Any) -> Any:
        torch.manual_seed(5)
        options = {"r": 4, "target_modules": targets, "modules_to_save": saved, "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(**options, task_type="CAUSAL_LM"))

    theirs = adapted(base)
    ours = pyllm.patch(adapted(other)) if order == "adapter first" else adapted(pyllm.patch(other))
    for training in (True, False):
        a, da = gradients(theirs.train(training), input_ids=ids, attention_mask=mask, labels=labels)
        b, db = gradients(ours.train(training), input_ids=ids, attention_mask=mask, labels=labels)
        assert abs(b.loss - a.loss) <= ERROR * a.loss
        assert (b.logits is None) == (training and saved is None)
        same_gradients(db, da)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(m.generate(input_ids=ids, attention_mask=mask, **options) for m in (theirs, ours)))
    theirs, ours = (model.merge_and_unload() for model in (theirs, ours))
    assert error(ours(ids).logits, theirs(ids).logits) < ERROR
    pyllm.unpatch(ours)
    assert all("pyllm" not in type(module).__module__ for module in ours.modules())
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
