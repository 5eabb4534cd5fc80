"""Any bytes in, the same bytes out; special tokens only where they are meant."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllm.tokenizer import END_OF_TEXT, Tokenizer

TEXT = (
    'def add(self, a, b):\n    """The sum of two numbers."""\n    return a + b\n\n\n'
    "class Box:\n    def __init__(self, items):\n        self.items = list(items)\n\n"
    "    def __len__(self):\n        return len(self.items)\n"
) * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=320)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_round_trip(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_text_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_bytes(text.encode()) == ids


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.sampled_from([END_OF_TEXT, "<|", "|>", "endoftext", "é", "\u2028", "\r\n", " ", "\t", "x"])))
def test_special_tokens_in_a_text_are_text(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special=False) == text


def test_special_tokens_on_request(tokenizer):
    assert tokenizer.encode(END_OF_TEXT, allow_special=True) == [tokenizer.eos_token_id] == [0]
    assert END_OF_TEXT not in tokenizer.decode([0])
    assert tokenizer.decode([0], skip_special=False) == END_OF_TEXT
    assert tokenizer.encode(END_OF_TEXT) != [0]  # and the request is not remembered


def test_lone_surrogate(tokenizer):
    assert tokenizer.decode_bytes(tokenizer.encode("a\ud800b")) == "a\ud800b".encode("utf-8", "surrogatepass")


def test_learns_merges(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer) == 320
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 2.5
    ids = tokenizer.encode("é" * 5)
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")  # half a character


def test_batch_equals_one_by_one(tokenizer):
    texts = [TEXT[:50], "", "\x00 \xff", END_OF_TEXT]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic(tokenizer, tmp_path):
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    again = Tokenizer.train_files([file], vocab_size=320)
    assert again.backend.to_str() == tokenizer.backend.to_str()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.eos_token_id == tokenizer.eos_token_id


def test_transformers_reads_it(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT[:200] + " naïve ,  x"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eos_token_id


def test_chat_template(tokenizer, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    own = Tokenizer.load(tmp_path)
    assert own.apply_chat_template(messages[1:]) == f"[user] Hi{END_OF_TEXT}"
    refusing = Tokenizer(tokenizer.backend, {"chat_template": "{{ raise_exception('no system role') }}"})
    with pytest.raises(ValueError, match="no system role"):
        refusing.apply_chat_template(messages)


def test_templates_run_in_a_sandbox(tokenizer):
    from jinja2.exceptions import SecurityError

    nosy = Tokenizer(tokenizer.backend, {"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"})
    with pytest.raises(SecurityError):
        nosy.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train([TEXT], vocab_size=200)
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="id 320 is not in the vocabulary"):
        tokenizer.decode([320])
    with pytest.raises(ValueError, match="encode takes a str, got bytes"):
        tokenizer.encode(b"bytes")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
