"""`pyllm generate` and `pyllm chat`: a model's words in the terminal, as they come."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .chat import Chat, checked, opening
from .model import LlamaForCausalLM
from .text import TextPieces
from .tokenizer import Tokenizer

HELP = """\
/help            this list
/reset           forget the conversation, keep the system prompt
/system [TEXT]   show the system prompt, or replace it and start over
/save FILE       write the conversation: one JSON line, as `messages`
/exit            leave (Ctrl-D too)
Ctrl-C stops a reply and keeps what there is of it. A line that ends in \\ goes on in the next."""


def load(folder: Path, backend: str) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Model and tokenizer of a folder, on the GPU where there is one."""
    tokenizer = Tokenizer.load(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.backend = backend
    if torch.cuda.is_available():
        model.to("cuda")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "do they belong together?"
        )
    return model.eval(), tokenizer


def write(text: str) -> None:
    """What a model says. A terminal would obey control characters, so it gets none but tabs and line breaks."""
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    print(text, end="", flush=True)


def complete(folder: Path, backend: str, prompt: str, options: dict[str, Any]) -> None:
    """Print a prompt and its continuation. Spaces at the prompt's end are left to the model: in most vocabularies a
    space belongs to the word behind it."""
    model, tokenizer = load(folder, backend)
    prompt = prompt.rstrip(" ") or prompt
    ids = opening(tokenizer) + tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt is empty, and this tokenizer has no token that starts a text")
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(f"--prompt has {len(ids)} tokens, and the model can read {len(ids) + room}")
    options = checked(options)
    options["max_new_tokens"] = min(options["max_new_tokens"], room)
    inputs = torch.tensor([ids], device=model.device)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(inputs), "tokenizer": tokenizer, **options}
    text, start, count = TextPieces(tokenizer), time.perf_counter(), 0
    write(prompt)
    try:
        if options.get("num_beams", 1) > 1:  # nothing is final before the end
            row = model.generate(inputs, **given)[0, len(ids) :].tolist()
            count = len(row)
            write(text.put(row))
        else:
            for id in model.stream(inputs, text=False, **given):
                count += 1
                write(text.put([id]))
    finally:  # Ctrl-C keeps what there is
        write(text.end() + "\n")
    if sys.stderr.isatty():
        print(f"[{rate(count, start)}]", file=sys.stderr)


def rate(tokens: int, start: float) -> str:
    """How many, and how fast since start."""
    return f"{tokens} tokens, {tokens / max(time.perf_counter() - start, 1e-9):.1f} tokens/s"


def converse(folder: Path, backend: str, system: str | None, options: dict[str, Any]) -> None:
    """A conversation, line by line; from a pipe the same without prompts."""
    model, tokenizer = load(folder, backend)
    saved = model.generation_config
    if options["temperature"] is None and (saved is None or saved.temperature is None):
        options = {**options, "temperature": 0.7}
    chat = Chat(model, tokenizer, system, **checked(options))
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # line editing and history, where Python was built with it
            import readline  # noqa: F401
        print(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters. /help lists the commands.")
    if chat.plain:
        print("This model was not taught to chat: it continues a transcript, as well as it can.")
    while (line := ask()) is not None:
        if line.startswith("/"):
            if not command(chat, line):
                return
        elif line.strip():
            answer(chat, line)


def ask() -> str | None:
    """What the user says; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            lines = []
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def answer(chat: Chat, line: str) -> None:
    """Print the reply as it comes. Ctrl-C ends it and keeps what there is."""
    start, shown, note = time.perf_counter(), False, ""
    try:
        for piece in chat.reply(line):
            write(piece if shown else piece.lstrip())
            shown = shown or bool(piece.strip())
    except KeyboardInterrupt:
        note = " (stopped)"
    except ValueError as error:
        print(f"pyllm chat: {error}", file=sys.stderr)
        return
    if chat.dropped:
        note += f" (the {chat.dropped} oldest messages no longer fit)"
    print(f"\n[{rate(chat.tokens, start)}{note}]", flush=True)


def command(chat: Chat, line: str) -> bool:
    """Do what a line that starts with a slash says; False: leave."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return False
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        chat.reset()
        print("(forgotten)")
    elif name == "/system":
        if rest:
            chat.system = rest
            chat.reset()
        print(f"(system prompt: {chat.system or 'none'})")
    elif name == "/save":
        if not rest:
            print("/save needs a file: /save talk.jsonl")
            return True
        try:
            Path(rest).expanduser().write_text(json.dumps({"messages": chat.messages}) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"not saved: {error}")
        else:
            print(f"({len(chat.messages)} messages in {rest})")
    else:
        print(f"{name} is no command; /help lists them")
    return True
