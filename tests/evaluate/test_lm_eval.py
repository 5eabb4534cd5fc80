"""The adapter for lm-evaluation-harness: against the real one where it is installed, else its documented interface."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer
from pyllm.data import nats
from pyllm.likelihood import likelihoods

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TEXT = "The capital of France is Paris. größer\n\nQuestion: 1 + 1?\nAnswer: 2\n" * 30


class Hook:
    def __init__(self):
        self.kept = []

    def add_partial(self, kind, request, result):
        self.kept.append((kind, request, result))


@pytest.fixture
def adapter(monkeypatch):
    """pyllm.lm_eval over a stand-in: `LM` and `register_model` as the harness's documentation has them."""
    registry: dict[str, type] = {}

    class LM:
        def __init__(self):
            self.cache_hook = Hook()

    def register_model(*names):
        def keep(cls):
            registry.update(dict.fromkeys(names, cls))
            return cls

        return keep

    fakes = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    fakes["lm_eval.api.registry"] = types.ModuleType("lm_eval.api.registry")
    fakes["lm_eval.api.model"].LM = LM
    fakes["lm_eval.api.registry"].register_model = register_model
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "pyllm.lm_eval", raising=False)
    module = importlib.import_module("pyllm.lm_eval")
    assert registry == {"pyllm": module.PyllmLM}
    yield module.PyllmLM
    sys.modules.pop("pyllm.lm_eval", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    torch.manual_seed(0)
    LlamaForCausalLM(PRESETS["tiny"].replace(vocab_size=300, initializer_range=0.3)).save_pretrained(path)
    tokenizer.save(path)
    return path


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_log_likelihoods(adapter, folder):
    lm = adapter(pretrained=str(folder), batch_size="auto:4", max_batch_size=64)
    model, tokenizer = lm.model, lm.tokenizer
    end = tokenizer.eos_token_id
    pairs = [("The capital is", " Paris"), ("The capital is ", "Paris"), ("", "größer"), ("Answer:", " 2")]
    found = lm.loglikelihood(requests(*pairs))
    assert found[0] == found[1]  # a space at the end of the context belongs to the continuation
    plain = [
        ([end, *tokenizer.encode("The capital is")], tokenizer.encode(" Paris")),
        ([end], tokenizer.encode("größer")),
        ([end, *tokenizer.encode("Answer:")], tokenizer.encode(" 2")),
    ]
    for one, expected in zip([found[0], found[2], found[3]], likelihoods(model, plain), strict=True):
        assert one[0] == pytest.approx(expected.logprob, rel=1e-5)
        assert one[1] == expected.greedy
    assert [kept[:2] for kept in lm.cache_hook.kept] == [("loglikelihood", pair) for pair in pairs]


def test_rolling_log_likelihoods(adapter, folder):
    lm = adapter(pretrained=str(folder))
    texts = ["Paris", TEXT[:1500]]
    found = lm.loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, one in zip(texts, found, strict=True):
        row = torch.tensor([lm.tokenizer.eos_token_id, *lm.tokenizer.encode(text)])
        assert one == pytest.approx(-nats(lm.model, row, 128), rel=1e-6)
    assert found[1] < found[0] < 0


def test_generation(adapter, folder):
    lm = adapter(pretrained=str(folder))
    whole, cut, short = lm.generate_until(
        requests(
            ("The capital", {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
            ("The capital", {"until": ["\n\n", "the"], "max_gen_toks": 12}),
            ("x" * 500, {"max_gen_toks": 3}),
        )
    )
    ids = torch.tensor([[lm.tokenizer.eos_token_id, *lm.tokenizer.encode("The capital")]])
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    row = lm.model.generate(ids, max_new_tokens=12, **how)[0, ids.shape[1] :]
    assert whole == lm.tokenizer.decode(row.tolist())
    stop = next((at for at in (whole.find("\n\n"), whole.find("the")) if at >= 0), None)
    assert cut == whole[:stop]
    assert short  # a prompt that is too long loses its beginning
    piece = whole[2:4]
    assert (
        lm.generate_until(requests(("The capital", {"until": piece, "max_gen_toks": 12})))[0] == whole.split(piece)[0]
    )


def test_the_rest_of_the_interface(adapter, folder):
    lm = adapter(pretrained=str(folder), backend="eager")
    assert lm.model.backend == "eager"
    assert lm.apply_chat_template([{"role": "user", "content": "x"}]).endswith("<|im_start|>assistant\n")
    assert "message.role" in lm.chat_template(True)
    assert lm.tokenizer_name
    with pytest.raises(ValueError, match="unknown model argument 'dtyp'"):
        adapter(pretrained=str(folder), dtyp="float16")


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness():
    with pytest.raises(ImportError, match="pip install lm-eval"):
        importlib.import_module("pyllm.lm_eval")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs lm_eval: pip install lm-eval")
@pytest.mark.filterwarnings("ignore")
def test_the_real_harness(folder, tmp_path):
    """A task of our own through `simple_evaluate`: its accuracy is `pyllm evaluate`'s."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import pyllm.lm_eval  # noqa: F401  (registers "pyllm")
    from pyllm.choices import Question, answer_questions

    words = TEXT.split()[:6]
    asked = [Question(f"What is {word}?", ("Paris", "the", "größer of it"), i % 3) for i, word in enumerate(words)]
    rows = [{"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in asked]
    (tmp_path / "exam.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "exam",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "exam.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = lm_eval.simple_evaluate(
        model="pyllm", model_args=f"pretrained={folder}", tasks=[task], task_manager=TaskManager(), bootstrap_iters=0
    )
    ours = answer_questions(LlamaForCausalLM.from_pretrained(folder), Tokenizer.load(folder), asked)
    assert found["results"]["exam"]["acc,none"] == pytest.approx(ours.accuracy)
