"""Files to documents to shards: nothing lost, nothing silently misread."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from pyllm import documents
from pyllm.documents import Item, read
from pyllm.shards import TRAIN, VALIDATION, TokenShards, tokenise, tokenizer_fingerprint
from pyllm.tokenizer import Tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}  # ü{'!' * (i % 7)}\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 320)


def items(texts=TEXTS):
    return [Item(text.encode()) for text in texts]


@pytest.mark.parametrize("shard_tokens", [1, 100, 1 << 20])
def test_what_is_written_is_read_back(tokenizer, tmp_path, shard_tokens):
    """Every document on one side, in order, over one shard or many."""
    tokenise(items(), tokenizer, tmp_path / "data", 0.2, {"from": "here"}, shard_tokens)
    found, total = [], 0
    for side in (TRAIN, VALIDATION):
        shards = TokenShards.open(tmp_path / "data" / side, tokenizer)
        assert len(shards.rows) == (shards.documents if shard_tokens == 1 else len(shards.headers))
        row, firsts = shards.read(0, shards.tokens)
        assert (row[firsts] == tokenizer.eos_token_id).all()
        found += [tokenizer.decode(part[1:].tolist()) for part in np.split(row, firsts[1:])]
        total += shards.bytes
    assert sorted(found) == sorted(TEXTS)
    assert total == sum(len(text.encode()) for text in TEXTS)
    assert json.loads((tmp_path / "data/source.json").read_text()) == {"from": "here"}


def test_reading_goes_round(tokenizer, tmp_path):
    tokenise(items(), tokenizer, tmp_path / "data", 0.0, shard_tokens=50)
    shards = TokenShards.open(tmp_path / "data/train")
    whole, firsts = shards.read(0, shards.tokens)
    for start, count in ((0, 1), (49, 3), (shards.tokens - 2, 5), (7, 2 * shards.tokens + 3), (5 * shards.tokens, 4)):
        got, begins = shards.read(start, count)
        where = (start + np.arange(count)) % shards.tokens
        assert np.array_equal(got, whole[where])
        assert np.array_equal(begins, np.flatnonzero(np.isin(where, firsts)))


def test_wide_vocabulary_is_uint32_and_a_beginning_of_its_own_masks_ends(tmp_path):
    class Wide:
        vocab_size, bos_token_id, eos_token_id = 70_000, 69_998, 69_999

        class backend:  # noqa: N801
            @staticmethod
            def to_str():
                return "wide"

        @staticmethod
        def encode_batch(texts):
            return [[] for _ in texts]

        @staticmethod
        def decode_bytes(ids, skip_special):
            return bytes(len(ids))

    tokenise([Item(ids=np.array([66_000, 5])), Item(ids=np.array([7]))], Wide(), tmp_path / "data", 0.0)
    shards = TokenShards.open(tmp_path / "data/train", Wide())
    assert shards.rows[0].dtype == np.dtype("<u4")
    assert shards.masked_ends
    assert shards.read(0, 7)[0].tolist() == [69_998, 66_000, 5, 69_999, 69_998, 7, 69_999]
    with pytest.raises(ValueError, match="token id 70000 is outside the vocabulary of 70000"):
        tokenise([Item(ids=np.array([70_000]))], Wide(), tmp_path / "bad", 0.0)
    assert not (tmp_path / "bad").exists()


def test_the_split_follows_from_the_content(tokenizer, tmp_path):
    """Whatever the order, and the same text twice on one side twice; about the share that was asked for."""
    sides = {text: Item(text.encode()).is_validation(0.3) for text in TEXTS}
    assert {text: Item(text.encode()).is_validation(0.3) for text in reversed(TEXTS)} == sides
    many = [Item(str(i).encode()).is_validation(0.3) for i in range(4000)]
    assert sum(many) / 4000 == pytest.approx(0.3, abs=0.03)
    assert not any(Item(text.encode()).is_validation(0.0) for text in TEXTS)


def test_formats(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("hello\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one", "n": 1}\n\n{"text": "two"}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n')
    np.save(tmp_path / "d.npy", np.array([5, 6, 0, 7], dtype=np.int32))
    np.array([1, 2, 3], dtype="<u2").tofile(tmp_path / "e.bin")
    found = list(read([tmp_path], end=0))
    assert [item.text.decode() for item in found[:4]] == ["hello\n", "one", "two", "three"]
    assert [item.ids.tolist() for item in found[4:]] == [[5, 6], [7], [1, 2, 3]]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert [item.text for item in read([tmp_path / "a.parquet"])] == [b"one", b"two"]
    with pytest.raises(ValueError, match="no column 'body', only text"):
        list(read([tmp_path / "a.parquet"], "body"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"a\.parquet needs the package pyarrow: pip install pyarrow"):
        list(read([tmp_path / "a.parquet"]))


def test_long_text_is_cut_at_line_ends_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    text = "".join(f"line {i}\n" for i in range(200)) + "no newline"
    (tmp_path / "a.txt").write_text(text)
    pieces = [item.text.decode() for item in read([tmp_path / "a.txt"])]
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_text_that_is_not_utf8_survives(tokenizer, tmp_path):
    data = b"caf\xe9 \xff\xfe ok"
    tokenise([Item(data), Item(b""), Item(b"x")], tokenizer, tmp_path / "data", 0.0)
    row, firsts = TokenShards.open(tmp_path / "data/train").read(0, 1000)
    parts = np.split(row, firsts[1:3])
    assert tokenizer.decode_bytes(parts[0][1:].tolist()) == data
    assert len(parts[1]) == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', r"a\.jsonl, line 2 is not valid JSON .*oops"),
        ("a.jsonl", b'{"text": "ok"}\n["no"]\n', r"line 2 needs a string under 'text', got list"),
        ("a.jsonl", b'{"body": "ok"}\n', r"line 1 needs a string under 'text', got keys \['body'\] \(--text-key\)"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1 needs a string under 'text'"),
        ("a.jsonl", b"\n\n", r"a\.jsonl holds no document, only blank lines"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.npy", b"no numpy at all", r"a\.npy is not a numpy array"),
        ("a.bin", b"odd", r"must hold uint16 ids, but its size of 3 bytes is odd"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read([tmp_path / name]))


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        list(read([tmp_path / "nowhere"]))
    with pytest.raises(ValueError, match="holds no file of a known kind"):
        list(read([tmp_path]))
    np.save(tmp_path / "a.npy", np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"must be a 1-D array of integers, got float64 of shape \(2, 2\)"):
        list(read([tmp_path / "a.npy"]))


def test_damaged_shards(tokenizer, tmp_path):
    def fresh():
        tokenise(items(), tokenizer, tmp_path / "data", 0.0)
        return tmp_path / "data/train"

    folder = fresh()
    whole = (folder / "00000.tokens").read_bytes()
    (folder / "00000.tokens").write_bytes(whole[:-6])
    with pytest.raises(ValueError, match=rf"00000\.tokens is cut short: {len(whole) - 6} bytes, .* needs {len(whole)}"):
        TokenShards.open(folder)
    (folder / "00000.tokens").unlink()
    with pytest.raises(ValueError, match=r"00000\.tokens is missing"):
        TokenShards.open(folder)
    folder = fresh()
    (folder / "00000.json").write_text('{"format": "pyl')
    with pytest.raises(ValueError, match=r"00000\.json is not the header of a shard"):
        TokenShards.open(folder)
    (folder / "00000.json").write_text('{"format": "pyllm-tokens-9", "tokens": 1, "documents": 1}')
    with pytest.raises(ValueError, match="of format 'pyllm-tokens-9'"):
        TokenShards.open(folder)
    with pytest.raises(ValueError, match="holds no shards"):
        TokenShards.open(tmp_path)


def test_another_tokenizer_is_refused(tokenizer, tmp_path):
    tokenise(items(), tokenizer, tmp_path / "data", 0.0)
    other = Tokenizer.train(TEXTS, 300)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    with pytest.raises(ValueError, match=r"made by another tokenizer \(\w+, 320 tokens\) than .*, 300 tokens\)"):
        TokenShards.open(tmp_path / "data/train", other)


def test_an_interrupted_tokenisation_leaves_nothing_that_looks_finished(tokenizer, tmp_path):
    def broken():
        yield Item(b"first")
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        tokenise(broken(), tokenizer, tmp_path / "data", 0.0)
    assert not (tmp_path / "data").exists()
    tokenise(items(), tokenizer, tmp_path / "data", 0.0)
    before = (tmp_path / "data/train/00000.tokens").read_bytes()
    with pytest.raises(OSError, match="disk gone"):
        tokenise(broken(), tokenizer, tmp_path / "data", 0.0)
    assert (tmp_path / "data/train/00000.tokens").read_bytes() == before
    with pytest.raises(ValueError, match="no document to train on"):
        tokenise([], tokenizer, tmp_path / "other", 0.0)
