"""The corpus is large, the same every time, and its two sides share nothing."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pyllm.corpus import Document, drop_duplicates, python_corpus, split, text_corpus


@pytest.fixture(scope="module")
def corpus():
    return python_corpus()


def test_finds_enough_text(corpus):
    assert corpus.train_bytes + corpus.validation_bytes > 5_000_000
    assert 0.03 < corpus.validation_bytes / corpus.train_bytes < 0.25
    assert any(b"def " in d.data for d in corpus.validation)


def test_leaves_out_tests_and_tables(corpus):
    names = [d.name for d in (*corpus.train, *corpus.validation)]
    assert len(names) == len(set(names))
    for name in names:
        assert not {"test", "tests", "encodings", "site-packages"} & set(name.split("/")), name
    assert "html/entities.py" not in names


def test_same_digest_in_another_process(corpus):
    code = "from pyllm.corpus import python_corpus; print(python_corpus().digest())"
    root = Path(__file__).parents[2]
    # Another hash seed: an order or a split that came from hash() would differ.
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=root, env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert found.stdout.strip() == corpus.digest()


def test_no_leak_between_the_sides(corpus):
    train = {line.strip() for d in corpus.train for line in d.data.splitlines() if len(line.strip()) >= 30}
    for document in corpus.validation:
        lines = {line.strip() for line in document.data.splitlines() if len(line.strip()) >= 30}
        assert len(lines & train) <= 0.5 * max(1, len(lines)), document.name


def test_duplicates_go():
    text = "".join(f"a line that is long enough, number {i}\n" for i in range(20)).encode()
    mostly = text + b"and one more line that is new to this one\n"
    other = text[: len(text) // 4] + "".join(f"here is some other text, number {i}\n" for i in range(20)).encode()
    kept = drop_duplicates([Document("a", text), Document("b", text), Document("c", mostly), Document("d", other)])
    assert [d.name for d in kept] == ["a", "d"]


def test_split_depends_on_the_name_alone():
    documents = [Document(f"file{i}.py", f"text {i}".encode()) for i in range(400)]
    one, two = split(documents), split(reversed(documents))
    assert {d.name for d in one.validation} == {d.name for d in two.validation}
    assert 15 < len(one.validation) < 75  # a tenth of 400
    assert not {d.name for d in one.validation} & {d.name for d in one.train}


def test_works_where_the_standard_library_is_split(tmp_path):
    """Debian ships some folders in other packages, and pydoc_data may be missing altogether."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for file in stdlib.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "dangling.py").symlink_to(tmp_path / "gone.py")
    (tmp_path / "latin1.py").write_bytes(b"# caf\xe9\n" * 100)
    corpus = python_corpus(tmp_path)
    names = {d.name for d in (*corpus.train, *corpus.validation)}
    assert "argparse.py" in names
    assert not names & {"dangling.py", "latin1.py"}


def test_too_little_text_says_what_to_do(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n" * 100)
    with pytest.raises(ValueError, match=r"holds 600 bytes.*--text"):
        python_corpus(tmp_path)
    with pytest.raises(ValueError, match="200000 bytes"):
        text_corpus(tmp_path)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        text_corpus(tmp_path / "nothing")


def test_own_text_from_one_file(tmp_path):
    file = tmp_path / "book.txt"
    lines = [f"line {i} of a long book that nobody has written, chapter {i // 100}\n" for i in range(10000)]
    file.write_text("".join(lines))
    corpus = text_corpus(file)
    whole = corpus.train_bytes + corpus.validation_bytes
    assert whole == file.stat().st_size
    assert corpus.validation
