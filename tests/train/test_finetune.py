"""Fine-tuning end to end: what is learned, what is written, and that nothing is lost when something is wrong."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer, finetune
from pyllm.chat_format import grow_vocabulary, set_template, stop_at_turn_end
from pyllm.cli import main
from pyllm.conversations import encode, make_packs
from pyllm.finetune import Options, PackWorkers, default_lr
from pyllm.lora import LoRAConfig, load_adapter
from pyllm.staging import Staging, check_replaceable
from pyllm.tokenizer import CHAT_TOKENS

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "log.csv", "finetune.json"}


def talks(count=40):
    draw = random.Random(0)
    for i in range(count):
        word = draw.choice(["red", "blue", "green"])
        asked = f"say {word}" if i % 2 else f"say {word} {i}"
        yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": word.upper()}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small untrained model with a vocabulary that has no chat tokens, as the demo writes it."""
    folder = tmp_path_factory.mktemp("base")
    text = "User: say red\nAssistant: RED\nsay blue BLUE say green GREEN the red\n" * 20
    tokenizer = Tokenizer.train([text], vocab_size=290)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = PRESETS["tiny"].replace(vocab_size=290, bos_token_id=end, eos_token_id=end)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks()))
    return file


def options(base, data, out, **changes):
    given = {"epochs": 1000, "steps": 25, "batch": 2, "length": 64, "lr": 1e-2, "threads": 1, "plain": True}
    given["validation"] = 0.2
    return Options(str(base), str(data), str(out), **{**given, **changes})


def weights(folder):
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


def reply(folder, text):
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), Tokenizer.load(folder)
    return finetune.answer(model, tokenizer, [{"role": "user", "content": text}], 10)


def test_it_learns_to_answer(base, data, tmp_path, capsys):
    out = tmp_path / "tuned"
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    summary = finetune.run(options(base, data, out))
    shown = capsys.readouterr().out
    assert {file.name for file in out.iterdir()} >= {*FILES, "loss.png"}
    assert summary == json.loads((out / "finetune.json").read_text())
    assert summary["finished"]
    bits = summary["validation_bits_per_byte"]
    assert bits["after"] < 0.3 * bits["before"]
    assert [reply(out, f"say {word}") for word in ("red", "blue", "green")] == ["RED", "BLUE", "GREEN"]
    assert f"Assistant:⟦ {next(talks())['messages'][1]['content']}<|endoftext|>⟧" in shown
    for part in ("conversations to learn from", "packing", "step    25", f"pyllm chat {out}"):
        assert part in shown, part
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    # The template goes along, to other readers as well.
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": "say blue"}], add_generation_prompt=True, tokenize=False
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = theirs(prompt, return_tensors="pt").input_ids
    row = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert theirs.decode(row) == " BLUE<|endoftext|>"


def test_same_seed_same_model(base, data, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        finetune.run(options(base, data, tmp_path / name, steps=3, seed=seed))
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_lora(base, data, tmp_path):
    out = tmp_path / "tuned"
    config = LoRAConfig(r=4, lora_alpha=8)
    summary = finetune.run(options(base, data, out, lora=config, lr=3e-2, steps=40, template="transcript"))
    bits = summary["validation_bits_per_byte"]
    assert bits["after"] < 0.9 * bits["before"]
    old, merged = weights(base), weights(out)
    assert torch.equal(merged["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], old["model.norm.weight"])
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], old["model.layers.0.self_attn.q_proj.weight"]
    )
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    model = LlamaForCausalLM.from_pretrained(base)
    load_adapter(model, out / "adapter")
    ids = torch.arange(20)[None]
    whole = LlamaForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)


def test_chatml_adds_its_tokens(base, data, tmp_path):
    out = tmp_path / "tuned"
    finetune.run(options(base, data, out, template="chatml", steps=80))
    tokenizer, model = Tokenizer.load(out), LlamaForCausalLM.from_pretrained(out)
    assert tokenizer.token_id("<|im_end|>") == 291
    assert model.config.vocab_size == 292 == tokenizer.vocab_size
    assert reply(out, "say green") == "GREEN"
    assert model.generation_config.eos_token_id == [0, 291]
    from pyllm.chat import Chat

    chat = Chat(model, tokenizer, None, max_new_tokens=10, do_sample=False)
    assert not chat.plain
    assert "".join(chat.reply("say red")) == "RED"
    with pytest.raises(ValueError, match=r"with LoRA the embeddings of new ones would never be learned"):
        finetune.run(options(base, data, tmp_path / "other", template="chatml", lora=LoRAConfig()))


def test_half_precision_stays_in_its_dtype(base, data, tmp_path):
    half = tmp_path / "half"
    LlamaForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(half)
    Tokenizer.load(base).save(half)
    finetune.run(options(half, data, tmp_path / "tuned", steps=2, backend="eager"))
    assert weights(tmp_path / "tuned")["model.norm.weight"].dtype == torch.bfloat16


def test_system_prompts_checkpointing_and_truncation(base, data, tmp_path, capsys):
    long = {"messages": [{"role": "user", "content": "say red " * 40}, {"role": "assistant", "content": "RED"}]}
    partly = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "red " * 60}]}
    data.write_text(data.read_text() + json.dumps(long) + "\n" + json.dumps(partly) + "\n")
    given = {"system": "Shout.", "checkpointing": True, "threads": 2, "length": 40}
    finetune.run(options(base, data, tmp_path / "tuned", steps=2, **given))
    shown = capsys.readouterr().out
    assert "Shout.\n\nUser: say" in shown
    assert "2 are longer than 40 tokens: their ends are cut off, and 1 that have no answer left are dropped" in shown


def test_every_split_of_the_work_is_the_same_gradient(base):
    """One pack a time or all together, on one worker or three: the mean over all targets, to 1e-6."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(base).train(), Tokenizer.load(base)
    set_template(model, tokenizer)
    examples = [encode(tokenizer, talk["messages"]) for talk in talks(7)]
    splits = [[range(7)], [[i] for i in range(7)], [[0, 1, 2, 3, 4], [5, 6]]]
    found = []
    for groups in splits:
        for threads in (1, 3):
            workers = PackWorkers(threads)
            packs = make_packs(examples, groups)
            loss = workers.gradients(model, packs)
            found.append((loss, [p.grad.clone() for p in model.parameters()]))
            workers.close()
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for one, other in zip(gradients, found[0][1], strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm() + 1e-9


def test_growing_the_vocabulary():
    for tied in (True, False):
        model = LlamaForCausalLM(PRESETS["tiny"].replace(tie_word_embeddings=tied)).eval()
        before = model(torch.arange(9)[None]).logits
        grow_vocabulary(model, 100)
        assert model.config.vocab_size == 128  # there is room
        grow_vocabulary(model, 131)
        after = model(torch.arange(9)[None]).logits
        assert after.shape[-1] == 131
        torch.testing.assert_close(after[..., :128], before)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model(torch.tensor([[130, 1]]), labels=torch.tensor([[130, 129]])).loss > 0


def test_templates_by_name(base, tmp_path):
    model, tokenizer = LlamaForCausalLM.from_pretrained(base), Tokenizer.load(base)
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert set_template(model, tokenizer, str(file)) == str(file)
    assert tokenizer.apply_chat_template([{"content": "x"}]) == "x|"
    assert set_template(model, tokenizer, "auto") == "the model's own"
    with pytest.raises(ValueError, match="auto, chatml, transcript or a file, got 'nonsense'"):
        set_template(model, tokenizer, "nonsense")
    mute = Tokenizer.train(["x"], vocab_size=258, special_tokens=CHAT_TOKENS)
    mute.config.clear()
    assert set_template(model, mute) == "ChatML"
    with pytest.raises(ValueError, match="needs a token that ends a text"):
        set_template(model, mute, "transcript")
    model.generation_config = None
    stop_at_turn_end(
        model, mute, encode(mute, [{"role": "assistant", "content": "x"}])
    )  # the last set template: chatml
    assert model.generation_config is not None


# Mistakes: nothing is written, and nothing that was there is lost.


def listing(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": -1.0}, "--lr must be positive, got -1.0"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"length": 4}, "--length must be at least 8"),
        ({"length": 129}, "--length 129 is more than the model can read, 128"),
        ({"warmup": 1.0}, "--warmup must be"),
        ({"validation": 1.0}, "--validation must be"),
        ({"data": "none.jsonl"}, r"there is no file none\.jsonl"),
        ({"template": "none"}, "--template must be"),
        ({"lora": LoRAConfig(target_modules=("x",))}, "target 'x' is no linear layer"),
        ({"length": 8}, "cut to 8 tokens, no conversation has an answer left"),
    ],
)
def test_a_mistake_leaves_nothing_behind(base, data, tmp_path, changes, message):
    given = {**vars(options(base, data, tmp_path / "tuned")), **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune.run(Options(**given))
    assert listing(tmp_path) == [("talks.jsonl", data.stat().st_size)]


def test_places_that_must_not_be_written(base, data, tmp_path):
    with pytest.raises(ValueError, match="is the model's own folder"):
        finetune.run(options(base, data, base))
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds files, but no finetune\.json"):
        finetune.run(options(base, data, other))
    with pytest.raises(ValueError, match="is a file"):
        finetune.run(options(base, data, other / "precious.txt"))
    assert listing(other) == [("precious.txt", 1)]
    if os.geteuid() != 0:  # root may write everywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            finetune.run(options(base, data, closed / "tuned"))
    (tmp_path / "blocked").write_text("")
    with pytest.raises(OSError, match="blocked"):
        finetune.run(options(base, data, tmp_path / "blocked" / "tuned"))


def test_a_failure_while_writing_keeps_what_was_there(base, data, tmp_path, monkeypatch):
    out = tmp_path / "tuned"
    finetune.run(options(base, data, out, steps=1))
    before = listing(out)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "picture", full)  # late, when the model is in the staging folder already
    with pytest.raises(OSError, match="No space left"):
        finetune.run(options(base, data, out, steps=2))
    assert listing(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"talks.jsonl", "tuned"}
    monkeypatch.undo()
    finetune.run(options(base, data, out, steps=2))
    assert json.loads((out / "finetune.json").read_text())["steps"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"talks.jsonl", "tuned"}


def test_ctrl_c_keeps_what_there_is(base, data, tmp_path, monkeypatch, capsys):
    real = finetune.train

    def interrupted(*args, **kwargs):
        for done in real(*args, **kwargs):
            yield done
            if done.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", interrupted)
    summary = finetune.run(options(base, data, tmp_path / "tuned"))
    assert not summary["finished"]
    assert summary["steps"] == 2
    assert "stopped by Ctrl-C" in capsys.readouterr().out
    weights(tmp_path / "tuned")


def test_a_tokenizer_of_another_model(base, data, tmp_path):
    wrong = tmp_path / "wrong"
    LlamaForCausalLM(PRESETS["tiny"]).save_pretrained(wrong)
    Tokenizer.load(base).save(wrong)
    with pytest.raises(ValueError, match="the tokenizer has 290 tokens, the model 128"):
        finetune.run(options(wrong, data, tmp_path / "tuned"))


def test_no_supervised_token_is_an_error(base, data, tmp_path):
    silent = tmp_path / "silent.jinja"
    silent.write_text("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(ValueError, match=r"no token is the assistant's, so nothing can be learned\. Rendered: say"):
        finetune.run(options(base, data, tmp_path / "tuned", template=str(silent)))


def test_staging(tmp_path):
    out = tmp_path / "out"
    with Staging(out) as staging:
        (staging.folder / "a").write_text("1")
        staging.publish()
    with Staging(out) as staging:
        (staging.folder / "a").write_text("2")  # and never published
    assert (out / "a").read_text() == "1"
    with Staging(out) as staging:
        (staging.folder / "a").write_text("3")
        staging.publish()
    assert (out / "a").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_replaceable(out, "a")
    check_replaceable(tmp_path / "none", "a")


def test_learning_rates_by_size():
    assert default_lr(96, False) == pytest.approx(4.3e-3, rel=0.02)
    assert default_lr(4096, False) == pytest.approx(1.5e-5, rel=0.03)
    assert default_lr(4096, True) == pytest.approx(1.5e-4, rel=0.03)


# The command


def test_the_command(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--steps", "2", "--batch", "2", "--length", "64", "--plain", "--threads", "1"]
    assert main(["finetune", str(base), str(data), "--out", "tuned", "--lora", "2", *given]) == 0
    assert (tmp_path / "tuned" / "adapter" / "adapter_model.safetensors").exists()
    assert "rank 2, alpha 4" in capsys.readouterr().out
    data.write_text(data.read_text() + '{"messages": [{"role": "robot", "content": ""}]}\n')
    assert main(["finetune", str(base), str(data), "--out", "other"]) == 1
    assert "talks.jsonl, line 41: message 1 has the unknown role 'robot'" in capsys.readouterr().err
    assert main(["finetune", str(base), str(data), "--data", "x"]) == 1
    assert "data is given twice" in capsys.readouterr().err
    assert main(["finetune", str(base), "--lora-alpha", "3"]) == 1
    assert "need --lora RANK" in capsys.readouterr().err
    assert main(["finetune", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
