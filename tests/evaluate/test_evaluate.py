"""`pyllm evaluate`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os

import pytest
import torch

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer
from pyllm.choices import Question, answer_questions
from pyllm.cli import main
from pyllm.likelihood import perplexity
from pyllm.questions import docstring_pairs, examination, first_sentence, is_held_out, lessons

TEXT = "Question: What is the sum of größer numbers?\nAnswer: the sum of numbers\n" * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(vocab_size=300, initializer_range=0.2, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(path)
    return path


def test_the_command(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    rows = [{"question": f"q{i}", "choices": ["the sum", "numbers"], "answer": i % 2} for i in range(8)]
    (tmp_path / "exam.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    text, exam = str(tmp_path / "text.txt"), str(tmp_path / "exam.jsonl")
    command = ["evaluate", str(folder), "--text", text, "--choices", exam, "--shots", "0", "2", "--task", "recall"]
    command += ["--task-shots", "0", "2", "--limit", "6", "--window", "64", "--stride", "16", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    record = json.loads((out / "evaluation.json").read_text())
    assert (out / "in_context.png").stat().st_size > 10_000
    assert not (out / "evaluation.json.tmp").exists()
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), Tokenizer.load(folder)
    expected = perplexity(model, tokenizer, TEXT, 64, 16)
    assert record["text"][text]["perplexity"] == pytest.approx(expected.perplexity)
    assert record["text"][text]["loss_by_position"][0][:2] == [1, 1]
    questions = [Question(row["question"], tuple(row["choices"]), row["answer"]) for row in rows[:6]]
    found = record["choices"][exam]
    assert [row["shots"] for row in found] == [0, 2]
    assert found[1]["accuracy"] == answer_questions(model, tokenizer, questions, shots=2).accuracy
    assert [row["count"] for row in record["tasks"]["recall"]] == [6, 6]
    for part in ("at least 48 tokens of context", f"{expected.perplexity:.3f}", "loss by tokens", "best possible"):
        assert part in shown, part


def test_chat_questions(folder, tmp_path):
    chatty = tmp_path / "chatty"
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), Tokenizer.load(folder)
    from pyllm.chat_format import set_template

    set_template(model, tokenizer, "transcript")
    model.save_pretrained(chatty)
    tokenizer.save(chatty)
    command = [
        "evaluate",
        str(chatty),
        "--choices",
        "builtin",
        "--chat",
        "--limit",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert 1 <= record["choices"]["builtin"][0]["count"] <= 5
    assert record["choices"]["builtin"][0]["contrast"] is not None
    assert not (tmp_path / "out" / "in_context.png").exists()  # nothing that has a curve


def test_mistakes(folder, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "empty").write_text("\n")
    out = ["--out", str(tmp_path / "out")]
    for given, message in (
        (["--choices", str(tmp_path / "bad.jsonl")], "bad.jsonl, line 1: needs"),
        (["--choices", "none.jsonl"], "there is no file none.jsonl"),
        (["--text", "none.txt"], "there is no file none.txt"),
        (["--text", str(tmp_path / "empty")], "holds no text"),
        (["--task", "magic"], "--task must be one of mapping, recall, rule, got 'magic'"),
        (["--task", "rule", "--limit", "0"], "--limit must be at least 1"),
        (["--task", "rule", "--task-shots", "-1"], "must not be negative"),
    ):
        assert main(["evaluate", str(folder), *given, *out]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "blocked").write_text("")
    assert main(["evaluate", str(folder), "--task", "rule", "--out", str(tmp_path / "blocked" / "out")]) == 1
    assert "blocked" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err


# The built-in questions


@pytest.fixture(scope="module")
def pairs():
    return docstring_pairs()


def test_questions_of_this_python(pairs):
    assert len(pairs) > 2000
    known = dict(pairs)
    assert known["os.path.join"].startswith("Join two or more pathname components, inserting '/' as needed.")
    assert len(set(known.values())) == len(pairs)  # no sentence twice
    assert not any(part.startswith("_") for name, _ in pairs for part in name.split("."))


def test_held_out_answers_are_never_taught(pairs):
    taught = {talk[-1]["content"] for talk in lessons(pairs)}
    exam = examination(pairs)
    assert len(exam) + len(taught) == len(pairs)
    assert 0.07 < len(exam) / len(pairs) < 0.13
    assert not taught & {choice for question in exam for choice in question.choices}
    assert exam == examination(pairs)
    known = {f"What does `{name}` do?": sentence for name, sentence in pairs if is_held_out(name)}
    places = [0] * 4
    for question in exam:
        assert question.choices[question.answer] == known[question.question]
        assert len(set(question.choices)) == 4
        places[question.answer] += 1
    assert min(places) > 0.15 * len(exam)
    assert len(examination(pairs, 50)) <= 50
    longest = sum(max(q.choices, key=len) == q.choices[q.answer] for q in exam) / len(exam)
    assert longest < 0.4  # length gives nothing away


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("Return the sum\nof numbers. More here.", "Return the sum of numbers."),
        ("Return the sum of numbers", "Return the sum of numbers."),
        ("Return things, e.g. numbers, as a list. More.", "Return things, e.g. numbers, as a list."),
        ("lower case is no sentence.", None),
        ("Too short.", None),
        ("f(x) -> the number", None),
        ("Return " + "very " * 40 + "much.", None),
        ("Größer as a sentence.", None),
    ],
)
def test_first_sentences(text, sentence):
    assert first_sentence(text) == sentence


def test_a_python_without_sources(tmp_path):
    (tmp_path / "small.py").write_text('def f():\n    """Return the sum of numbers."""\n' * 10)
    with pytest.raises(ValueError, match="at least 500 are needed"):
        docstring_pairs(tmp_path)


@pytest.mark.slow
def test_fine_tuning_lifts_the_accuracy_of_the_demo(tmp_path, capsys):
    """The demo's recipe for a fixed number of steps, then the built-in questions: held-out ones before and after."""
    from pyllm import demo, finetune

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base, out = tmp_path / "demo", tmp_path / "tuned"
    demo.run(demo.Options(minutes=30, steps=700, threads=1, seed=0, out=str(base), plain=True))
    summary = finetune.run(finetune.Options(str(base), out=str(out), seed=0, threads=1, plain=True))
    found = summary["held_out_questions"]
    before, after = found["before"], found["after"]
    with capsys.disabled():
        print(
            f"\n{before['count']} held-out questions, four choices: {before['contrast']:.1%} before, "
            f"{after['contrast']:.1%} after {summary['steps']} steps in {summary['seconds']:.0f} s; "
            f"by probability alone {before['accuracy']:.1%} and {after['accuracy']:.1%}"
        )
    assert after["contrast"] > before["contrast"] + 0.1
    assert after["accuracy"] > before["accuracy"]
