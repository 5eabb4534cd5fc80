"""Byte-level BPE: text to token ids and back, losing nothing.

*Byte-level*: the 256 bytes are tokens themselves, so any input can be written, whatever its language or encoding.
*Byte-pair encoding* (Sennrich et al. 2016, arXiv:1508.07909): start from bytes, then join again and again the two
neighbouring tokens that occur together most often. After a thousand such merges of Python source, `self.` and
`return` are one token each, and a token stands for almost three bytes.

The work is done by Hugging Face's `tokenizers` library, and the file is its `tokenizer.json`, which `transformers`
reads as well. This class adds what the library leaves open: bytes that are no valid UTF-8 survive, special tokens in
a user's text stay text unless asked for, and chats are rendered by the template that the model came with.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .template import CHATML, Span, render
from .text import byte_alphabet

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")

# Where BPE may never merge across: text is cut into words with a space before them, numbers, punctuation and spaces.
# This is GPT-2's pattern. Patterns that let punctuation join words or line breaks (".append", "):\n    ") give 4% fewer
# tokens for the same Python source, but each of them is a rarer, harder guess: a model trained on the demo's text for
# the same time needs 4% more bits for it.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

DEFAULT_CHAT_TEMPLATE = CHATML  # a model's own template in tokenizer_config.json takes its place


class Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        backend: a `tokenizers.Tokenizer`.
        config: what `tokenizer_config.json` says; used are `chat_template`, `eos_token` and `bos_token`.
    """

    def __init__(self, backend: Any, config: Mapping[str, Any] | None = None):
        self.backend = backend
        self.config: dict[str, Any] = dict(config or {})
        self._special = {id: token.content for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._bytes: list[bytes] | None = None

    # Making, loading, saving

    @classmethod
    def train(
        cls,
        texts: Iterable[str | bytes],
        vocab_size: int = 4096,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        progress: bool = False,
    ) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` tokens, the 256 bytes and the special tokens included.

        The special tokens get the first ids. Bytes that aren't valid UTF-8 teach no merges, but can be encoded.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise ValueError(
                f"tokenizer: vocab_size must be at least {smallest} (256 bytes and {len(special_tokens)} special "
                f"tokens), got {vocab_size}"
            )
        lib = _library()
        backend = lib.Tokenizer(lib.models.BPE())
        backend.pre_tokenizer = lib.pre_tokenizers.Sequence(
            [
                lib.pre_tokenizers.Split(lib.Regex(PATTERN), behavior="isolated"),
                lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=sorted(byte_alphabet()[1]),
            show_progress=progress,
        )
        backend.train_from_iterator((_as_text(text) for text in texts), trainer)
        return cls(backend, {"eos_token": special_tokens[0]} if special_tokens else None)

    @classmethod
    def train_files(cls, paths: Iterable[str | os.PathLike[str]], vocab_size: int = 4096, **options: Any) -> Tokenizer:
        """`train` on files, read one after the other."""
        return cls.train((Path(path).read_bytes() for path in paths), vocab_size, **options)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a `tokenizer.json` or the folder that holds one (and perhaps a `tokenizer_config.json`)."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer: {file} does not exist; a folder with a tokenizer.json is needed")
        try:
            backend = _library().Tokenizer.from_file(str(file))
        except ImportError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: {file} is not a tokenizer.json that can be read: {error}") from error
        config_file = file.with_name("tokenizer_config.json")
        try:
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"tokenizer: {config_file} is not valid JSON: {error}") from error
        template = file.with_name("chat_template.jinja")  # where newer versions of transformers keep it
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, config)

    from_pretrained = load  # the name that users of transformers look for

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, readable by `transformers.AutoTokenizer`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.config}
        files = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        if (folder / "chat_template.jinja").exists():  # an earlier save's, which readers would prefer to ours
            files["chat_template.jinja"] = self.chat_template
        for name, text in files.items():
            (folder / f"{name}.tmp").write_text(text, encoding="utf-8")
            os.replace(folder / f"{name}.tmp", folder / name)

    # Facts

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""
        return int(self.backend.get_vocab_size())

    def __len__(self) -> int:
        return self.vocab_size

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its text, or None."""
        return self.backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._named("eos_token", END_OF_TEXT)

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts a text, if the model has one."""
        return self._named("bos_token", None)

    def _named(self, key: str, default: str | None) -> int | None:
        name = self.config.get(key, default)
        if isinstance(name, Mapping):  # older files hold {"content": "</s>", "lstrip": ...}
            name = name.get("content")
        return None if name is None else self.backend.token_to_id(name)

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that are marks rather than text, such as "<|endoftext|>"."""
        return list(self._special.values())

    def add_special_tokens(self, tokens: Iterable[str]) -> int:
        """Add marks to the vocabulary, behind what is there; returns how many were new. The model must grow along."""
        added = int(self.backend.add_special_tokens(list(tokens)))
        self._special = {id: t.content for id, t in self.backend.get_added_tokens_decoder().items() if t.special}
        self._bytes = None
        return added

    # Text to ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. Nothing is added in front or behind.

        Args:
            allow_special: read "<|endoftext|>" and its like as the special token. By default it is text like any
                other, so that a user's input cannot end a document or open another speaker's turn.
        """
        self.backend.encode_special_tokens = not allow_special
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"tokenizer: encode takes a str, got {kind}; bytes go to encode_bytes") from None
            # A lone surrogate, as in some file names: it has no UTF-8 form that Rust accepts, so keep its bytes.
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def encode_offsets(self, text: str, allow_special: bool = False) -> tuple[list[int], list[Span]]:
        """As `encode`, with the characters of the text that each token stands for, [begin, end)."""
        self.backend.encode_special_tokens = not allow_special
        encoding = self.backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, by several threads."""
        self.backend.encode_special_tokens = True
        return [list(encoding.ids) for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes. Where they are valid UTF-8, the same as `encode`; other bytes become one token each."""
        ids: list[int] = []
        for part in _utf8_parts(data):
            ids.extend(self.encode(part) if isinstance(part, str) else (self._byte_id(byte) for byte in part))
        return ids

    def _byte_id(self, byte: int) -> int:
        id = self.backend.token_to_id(byte_alphabet()[0][byte])
        if id is None:
            raise ValueError(f"tokenizer: byte {byte:#04x} has no token of its own: not a byte-level vocabulary")
        return int(id)

    # Ids to text

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes that ids stand for: `decode_bytes(encode_bytes(data)) == data` for any data."""
        table = self._byte_table()
        parts = []
        for id in ids:
            if not 0 <= id < len(table):
                raise ValueError(f"tokenizer: id {id} is not in the vocabulary of {len(table)} tokens")
            if not (skip_special and id in self._special):
                parts.append(table[id])
        return b"".join(parts)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text that ids stand for; a character cut in half by the end of the ids shows as U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def _byte_table(self) -> list[bytes]:
        if self._bytes is None:
            to_byte = byte_alphabet()[1]
            self._bytes = []
            added = self.backend.get_added_tokens_decoder()
            for id in range(self.vocab_size):
                token = self.backend.id_to_token(id)
                if token is None:
                    self._bytes.append(b"")  # a hole in the numbering
                elif id in added:
                    self._bytes.append(token.encode())
                elif all(character in to_byte for character in token):
                    self._bytes.append(bytes(to_byte[character] for character in token))
                else:
                    raise ValueError(f"tokenizer: token {id} {token!r} is not written in the byte-level alphabet")
        return self._bytes

    # Chats

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """A conversation as the text that the model was taught: [{"role": "user", "content": "..."}, ...].

        The template is the model's own (`chat_template` in tokenizer_config.json), or ChatML; see `pyllm.template`.
        """
        return self.render_chat(messages, add_generation_prompt, **variables)[0]

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False, **variables: Any
    ) -> tuple[str, list[Span]]:
        """As `apply_chat_template`, with the characters that the template's `{% generation %}` blocks wrote."""
        names = {key: self.config.get(key) for key in ("bos_token", "eos_token", "pad_token")}
        tokens = {k: (v.get("content") if isinstance(v, Mapping) else v) or "" for k, v in names.items()}
        return render(self.chat_template, messages, add_generation_prompt, **{**tokens, **variables})

    @property
    def chat_template(self) -> str:
        """The template's source: of several named ones the one called default."""
        template = self.config.get("chat_template") or DEFAULT_CHAT_TEMPLATE
        if isinstance(template, str):
            return template
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"tokenizer: of the chat templates {', '.join(sorted(named))} none is called default")
        return named["default"]


def _utf8_parts(data: bytes) -> Iterator[str | bytes]:
    """Cut bytes into the longest stretches that are valid UTF-8 (as str) and those that are not (as bytes).

    Python's "surrogateescape" turns a byte b that fits nowhere into U+DC00 + b, which no valid UTF-8 decodes to.
    """
    for part in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
        if part:
            yield part.encode("utf-8", "surrogateescape") if "\udc80" <= part[0] <= "\udcff" else part


def _as_text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", "replace")


@functools.cache
def _library() -> Any:
    try:
        import tokenizers
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: F401  (attributes used above)
    except ImportError as error:
        raise ImportError("pyllm.Tokenizer needs the package tokenizers: pip install tokenizers") from error
    return tokenizers
