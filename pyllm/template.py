"""Chat templates: programs in jinja2 that write a conversation as the one text that a model reads.

A model's own template stands in its `tokenizer_config.json`. It comes from somewhere else, so it runs in jinja2's
sandbox. The environment is the one that Hugging Face gives templates, with its `{% generation %}` blocks: what stands
between `{% generation %}` and `{% endgeneration %}` is what the assistant said, and what it is to learn from.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Span = tuple[int, int]  # characters [begin, end) of a text

# ChatML, as many open models use it.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# For vocabularies without tokens that open and close a turn: a transcript, in which the end of text ends each answer.
TRANSCRIPT = (
    "{{ eos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n"
    "{% else %}Assistant:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[str, list[Span]]:
    """The text of a conversation, and where in it the `{% generation %}` blocks are.

    Args:
        template: jinja2 source.
        add_generation_prompt: end with what stands before an answer of the assistant.
        variables: of the template, such as `eos_token`.
    Raises:
        ValueError: the template has an error, or refuses the conversation.
        jinja2.exceptions.SecurityError: it tries to reach out of the sandbox.
    """
    from jinja2.exceptions import SecurityError, TemplateError

    opens, closes = _marks(messages)
    try:
        marked = _compiled(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            _generation_marks=(opens, closes),
            **variables,
        )
    except SecurityError:
        raise
    except (TemplateError, TypeError) as error:
        raise ValueError(f"chat template: {error}") from error
    text, spans = "", []
    for i, piece in enumerate(marked.split(opens)):
        said, _, after = piece.partition(closes) if i else ("", "", piece)
        if i:
            spans.append((len(text), len(text) + len(said)))
        text += said + after
    return text, spans


def _marks(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Two characters of a private-use plane that no message has."""
    used = str([list(message.values()) for message in messages])
    base = next(code for code in range(0xF0000, 0xFFFFD, 2) if chr(code) not in used and chr(code + 1) not in used)
    return chr(base), chr(base + 1)


@functools.lru_cache(maxsize=16)  # compiling costs milliseconds, and a data set has a million conversations
def _compiled(template: str) -> Any:
    try:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateSyntaxError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install jinja2") from error

    class Generation(Extension):
        """`{% generation %}`. The marks travel inside the text: that survives `set` blocks and macros, too."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, context: Any, caller: Callable[[], str]) -> str:
            opens, closes = context["_generation_marks"]
            return opens + caller() + closes

    def raise_exception(message: str) -> None:
        raise ValueError(f"chat template: {message}")

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # jinja2's own escapes for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error}") from error
