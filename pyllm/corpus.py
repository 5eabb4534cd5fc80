"""The text the demo learns from: Python source and prose that every Python installation already carries.

A language model needs megabytes of text, and a first run should not need a download. The standard library is about
12 MB of careful, commented Python; with its tests and its data tables left out, 9 to 10 MB remain, and the help pages
behind `help("for")` (module `pydoc_data.topics`) add half a megabyte of English.

What is left out, and why:
- tests: Debian and others ship them separately, so keeping them would make the corpus differ between machines;
- tables (`encodings/`, HTML entities, locale aliases): one long line of "LATIN SMALL LETTER ..." after the other. A
  small model trained on them writes nothing else;
- duplicates: a file that is also in the training text would make the validation loss look better than it is.

The split into training and validation text is by whole files and by a hash of the file's name: nobody picks the files,
the same file lands on the same side in every Python version, and no half of a file gives away its other half.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

VALIDATION_SHARE = 1 / 10  # of the files; about 1 MB, enough that no single file decides the result
MIN_BYTES = 200  # an empty `__init__.py` teaches nothing
NEAR_DUPLICATE = 0.5  # a file sharing more than this share of its long lines with an earlier one is dropped

SKIP_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "lib-dynload",
        "ensurepip",
    }
)
SKIP_FILES = frozenset(
    {
        "html/entities.py",  # one character name a line
        "locale.py",  # half of it is a table of locale aliases
        "stringprep.py",  # ranges of code points
        "pydoc_data/topics.py",  # escaped prose: read through `_topics` instead
    }
)
TEXT_SUFFIXES = frozenset({".py", ".txt", ".md", ".rst"})


@dataclass(frozen=True)
class Document:
    """One text and the name it is known by (its path below the corpus's root, with forward slashes)."""

    name: str
    data: bytes


@dataclass
class Corpus:
    """Training and validation documents, and a line on where they came from."""

    source: str
    train: list[Document] = field(default_factory=list)
    validation: list[Document] = field(default_factory=list)

    @property
    def train_bytes(self) -> int:
        return sum(len(document.data) for document in self.train)

    @property
    def validation_bytes(self) -> int:
        return sum(len(document.data) for document in self.validation)

    def digest(self) -> str:
        """A fingerprint of every name and byte on both sides: equal digests mean the same experiment."""
        state = hashlib.sha256()
        for side in (self.train, self.validation):
            for document in side:
                for part in (document.name.encode(), document.data):
                    state.update(len(part).to_bytes(8, "little") + part)
            state.update(b"|")
        return state.hexdigest()[:16]


def python_corpus(stdlib: str | os.PathLike[str] | None = None) -> Corpus:
    """The running interpreter's standard library as a corpus; `stdlib` names another one's folder."""
    root = Path(stdlib) if stdlib is not None else Path(sysconfig.get_paths()["stdlib"])
    documents = list(_read_files(root, frozenset({".py"})))
    # The help topics quote each other (and are one file), so they stay together, on the training side.
    corpus = split(documents, f"Python standard library in {root}", train_only=_topics(root))
    total = corpus.train_bytes + corpus.validation_bytes
    if total < 1_000_000:
        raise ValueError(
            f"corpus: the standard library in {root} holds {total} bytes of Python source, at least "
            f"1000000 are needed; this interpreter seems to ship compiled modules only. "
            "Use an ordinary Python build, or give a folder of your own text: pyllm demo --text FOLDER"
        )
    return corpus


def read_python(root: Path) -> Iterator[Document]:
    """The Python files below a folder that a corpus would take, duplicates included, sorted by name."""
    return _read_files(root, frozenset({".py"}))


def text_corpus(path: str | os.PathLike[str]) -> Corpus:
    """A folder of the user's own text (.py .txt .md .rst), or one file cut into pieces, as a corpus."""
    root = Path(path)
    if root.is_file():
        documents = _cut(root.name, root.read_bytes())
    elif root.is_dir():
        documents = list(_read_files(root, TEXT_SUFFIXES))
    else:
        raise ValueError(f"corpus: {root} is neither a file nor a folder; give one that holds text")
    corpus = split(documents, source=f"text in {root}")
    total = corpus.train_bytes + corpus.validation_bytes
    if total < 200_000 or not corpus.validation:
        raise ValueError(
            f"corpus: {root} holds {total} bytes of text in {len(documents)} usable pieces, at least 200000 bytes "
            f"in about 40 pieces are needed to train and to validate; files counted: {' '.join(sorted(TEXT_SUFFIXES))}"
        )
    return corpus


def split(
    documents: Iterable[Document],
    source: str = "",
    train_only: Iterable[Document] = (),
    share: float = VALIDATION_SHARE,
) -> Corpus:
    """Drop duplicates, then send each document to one side by the hash of its name.

    `train_only` joins the training side. What of the validation side it mostly repeats, before or after it in order, is
    dropped as well.
    """
    corpus = Corpus(source)
    for document in drop_duplicates(documents):
        (corpus.validation if _is_validation(document.name, share) else corpus.train).append(document)
    corpus.train.extend(train_only)
    learned = {line for document in corpus.train for line in _long_lines(document)}
    corpus.validation = [d for d in corpus.validation if not _mostly(_long_lines(d), learned)]
    return corpus


def drop_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents in order, without those that mostly repeat earlier ones."""
    seen: set[bytes] = set()
    whole: set[bytes] = set()
    for document in documents:
        lines = _long_lines(document)
        if document.data not in whole and not _mostly(lines, seen):
            whole.add(document.data)
            seen |= lines
            yield document


def _long_lines(document: Document) -> set[bytes]:
    # Lines of 30 characters and more rarely coincide by accident: many shared ones mean a copy, such as a vendored
    # module or an old version kept for compatibility.
    return {line for line in map(bytes.strip, document.data.splitlines()) if len(line) >= 30}


def _mostly(lines: set[bytes], seen: set[bytes]) -> bool:
    return len(lines & seen) > NEAR_DUPLICATE * len(lines)


def _is_validation(name: str, share: float) -> bool:
    # hashlib and not hash(): Python salts hash() of strings anew in every process.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def _read_files(root: Path, suffixes: frozenset[str]) -> Iterator[Document]:
    """Text files below `root`, sorted by name so that the order does not depend on the file system."""
    found: list[tuple[str, Path]] = []
    for folder, subfolders, files in os.walk(root):
        kept = (name for name in subfolders if not name.startswith((".", "config-")))
        subfolders[:] = [name for name in kept if name not in SKIP_FOLDERS]
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            # _sysconfigdata_*.py holds this machine's build flags: a table, and different everywhere.
            if path.suffix in suffixes and relative not in SKIP_FILES and not name.startswith(("_sysconfigdata", ".")):
                found.append((relative, path))
    for relative, path in sorted(found):
        try:
            data = path.read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # unreadable, dangling or in an old encoding: not worth stopping for
        if len(data) >= MIN_BYTES:
            yield Document(relative, data)


def _topics(root: Path) -> Iterator[Document]:
    """The help pages behind `help("for")`, read from the source file without running it."""
    path = root / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # some distributions leave pydoc_data out
    pages: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    pages[str(key.value)] = value.value
    # Longest first: short pages are often sections of long ones and then count as duplicates.
    longest_first = sorted(pages.items(), key=lambda page: (-len(page[1]), page[0]))
    documents = (Document(f"pydoc_data/topics/{name}", text.encode()) for name, text in longest_first)
    yield from sorted((d for d in drop_duplicates(documents) if len(d.data) >= MIN_BYTES), key=lambda d: d.name)


def _cut(name: str, data: bytes, size: int = 8192) -> list[Document]:
    """One long file as pieces of about `size` bytes, cut at line ends so that both sides of a split get some."""
    pieces, start = [], 0
    while start < len(data):
        end = data.find(b"\n", start + size) + 1 or len(data)
        pieces.append(Document(f"{name}:{start}", data[start:end]))
        start = end
    return pieces
