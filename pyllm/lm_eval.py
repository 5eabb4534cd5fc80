"""pyllm's models in EleutherAI's lm-evaluation-harness (`pip install lm-eval`), under the name "pyllm".

    python -m pyllm.lm_eval --model pyllm --model_args pretrained=FOLDER --tasks arc_easy,lambada_openai

or, from Python, after `import pyllm.lm_eval`: `lm_eval.simple_evaluate(model="pyllm", model_args="pretrained=FOLDER")`.
The harness brings tasks, prompts and metrics; the numbers that they are made of are those of `pyllm.likelihood`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("pyllm.lm_eval is an adapter for the package lm_eval: pip install lm-eval") from error

from .chat import opening
from .choices import text_item
from .data import nats
from .likelihood import Request, likelihoods, window_batch
from .terminal import load


@register_model("pyllm")
class PyllmLM(LM):
    """A saved model, as the harness asks for one.

    Args:
        pretrained: folder with config.json, model.safetensors and tokenizer.json.
        backend: what runs the kernels.
        batch_size: contexts in a forward pass; "auto" takes 32.
        max_gen_toks: tokens of a generated answer, where the task doesn't say.
    """

    def __init__(
        self,
        pretrained: str,
        backend: str = "auto",
        batch_size: int | str = 32,
        max_gen_toks: int = 256,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        ignored = {"max_batch_size"}  # the harness always passes it
        if left := sorted(name for name in unknown if name not in ignored):
            raise ValueError(f"pyllm: unknown model argument {left[0]!r}; known: pretrained, backend, max_gen_toks")
        self.path, self.max_gen_toks = pretrained, int(max_gen_toks)
        self.batch = 32 if str(batch_size).startswith("auto") else int(batch_size)
        self.model, self.tokenizer = load(Path(pretrained), backend)
        if device is not None and torch.device(device).type != self.model.device.type:
            self.model.to(device)
        self._device = self.model.device

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of ln p, whether greedy) of each request's `args`: (context, continuation)."""
        pairs: list[Request] = []
        for context, continuation in (request.args for request in requests):
            # The harness's convention: spaces at the end of a context belong to the first word of the continuation.
            bare = context.rstrip()
            if bare:
                context, continuation = bare, context[len(bare) :] + continuation
            if not context and not opening(self.tokenizer):
                pairs.append((self._start(), tuple(self.tokenizer.encode(continuation))))
                continue
            item = text_item(self.tokenizer, context, [continuation], 0)
            pairs.append((item.context, item.choices[0]))
        found = [(one.logprob, one.greedy) for one in likelihoods(self.model, pairs, self.batch)]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of ln p over all tokens of each request's `args`: (text,), each with as much context as there can be."""
        window = self.model.config.max_position_embeddings
        found = []
        for (text,) in (request.args for request in requests):
            row = torch.tensor([*self._start(), *self.tokenizer.encode(text)])
            found.append(-nats(self.model, row, window, batch=window_batch(self.model, window)))
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text behind each request's context up to one of its `until` strings; `args`: (context, options)."""
        found = []
        for context, given in (request.args for request in requests):
            options = dict(given)
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            limit = int(options.pop("max_gen_toks", options.pop("max_new_tokens", self.max_gen_toks)))
            if not options.get("do_sample") or not options.get("temperature", 1.0):
                options = {"do_sample": False}
            room = self.model.config.max_position_embeddings
            limit = min(limit, room - 1)
            ids = [*opening(self.tokenizer), *self.tokenizer.encode(context, allow_special=True)] or self._start()
            ids = ids[-(room - limit) :]
            inputs = torch.tensor([ids], device=self.model.device)
            row = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=limit,
                stop_strings=until or None,
                tokenizer=self.tokenizer,
                pad_token_id=0,
                **options,
            )
            text = self.tokenizer.decode(row[0, len(ids) :].tolist())
            text = text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]
            found.append(text)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return found

    def _start(self) -> list[int]:
        """What stands before a text that has nothing before it."""
        if start := opening(self.tokenizer):
            return start
        named = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        ids = [id for id in named if id is not None]
        if not ids:
            raise ValueError(f"pyllm: {self.path} has no token that begins or ends a text, so none can be its context")
        return ids[:1]

    # Chats

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
