"""`pyllm finetune`: teach a saved model to answer, from conversations.

Conversations are rendered by the model's own chat template, and only what the assistant says is learned from. Several
are packed into one row of tokens without seeing each other. All weights are trained, or with LoRA small additions.
What is written is an ordinary folder with model and tokenizer, which appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import machine
from .chat_format import set_template, stop_at_turn_end
from .choices import Accuracy, Question, answer_questions
from .conversations import (
    Message,
    PackedBatches,
    Packs,
    encode,
    is_validation,
    make_packs,
    pack,
    preview,
    read_conversations,
)
from .display import Display, Status, duration, make_display, picture, plot
from .lora import LoRAConfig, add_lora, merged_state_dict, save_adapter
from .model import LlamaForCausalLM
from .optim import Together, linear
from .questions import UNSPECIFIC, docstring_pairs, examination, lessons
from .staging import Staging, check_replaceable
from .terminal import load
from .text import TokenBytes
from .tokenizer import CHAT_TOKENS, Tokenizer
from .train import Budget, Workers, train

BUILTIN = "builtin"
RECORD = "finetune.json"
VALIDATE_EVERY = 10.0  # seconds
SAMPLE_EVERY = 20.0
EXAM = 500  # held-out questions of the built-in data


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    model: str
    data: str = BUILTIN
    out: str | None = None  # default: the model's folder with "-tuned" behind it
    system: str | None = None  # system prompt for conversations that have none
    template: str = "auto"
    epochs: float = 3.0
    steps: int | None = None  # instead of epochs
    batch: int = 4  # packs in a step
    length: int | None = None  # tokens in a pack; default: what the model can read, at most 1024
    lr: float | None = None  # peak; default: see `default_lr`
    warmup: float = 0.05  # of the run
    weight_decay: float = 0.0
    validation: float = 0.05  # of the conversations, held out
    lora: LoRAConfig | None = None
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    backend: str = "auto"
    threads: int | None = None
    plain: bool = False


def default_lr(width: int, lora: bool) -> float:
    """Peak learning rate for AdamW: 4 / width^1.5, and with LoRA ten times that, but at most 1e-2.

    A curve through what is best for the demo's model (4e-3 at width 96; 1e-3 learns a third as much in three epochs)
    and what is usual for large ones (1.5e-5 at 4096). LoRA's is about ten times that of full fine-tuning (Schulman et
    al. 2025, "LoRA without regret").
    """
    return min(1e-2, (40.0 if lora else 4.0) / width**1.5)


class PackWorkers(Workers):
    """Workers that share out packs. The loss is the mean over all targets of the batch, however they are shared out."""

    def gradients(self, model: nn.Module, x: Any, autocast: torch.dtype | None = None) -> float:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.threads_each is not None:
            torch.set_num_threads(self.threads_each)
        total = max(1, x.count)

        def share(packs: Packs) -> tuple[float, tuple[Tensor | None, ...]]:
            loss = _loss(model, packs, total, autocast)
            return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)

        shares = [Packs(x.rows[i :: self.count], 0) for i in range(min(self.count, len(x.rows)))]
        losses, gradients = zip(*self.map(share, shares), strict=True)
        for p, *parts in zip(parameters, *gradients, strict=True):
            p.grad = None if parts[0] is None else sum(parts[1:], parts[0])
        return sum(losses)


def _loss(model: nn.Module, packs: Packs, total: int, autocast: torch.dtype | None = None) -> Tensor:
    """Sum of the surprise at the targets, over `total`."""
    losses = []
    for ids, targets, ends in packs.rows:
        with torch.autocast(ids.device.type, autocast) if autocast is not None else contextlib.nullcontext():
            out = model(
                ids[None], shift_labels=targets[None], cu_seqlens=ends, use_cache=False, num_items_in_batch=total,
                return_logits=False,
            )  # fmt: skip
        losses.append(out.loss)
    return torch.stack(losses).sum()


@torch.no_grad()
def validation_loss(model: nn.Module, packs: Sequence[Packs], workers: Workers) -> float:
    """Mean surprise per target, in nats."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = sum(part.count for part in packs)

    def part_loss(part: Packs) -> float:
        with torch.no_grad():  # a setting of each thread
            return float(_loss(model, part.to(device), total))

    found = sum(workers.map(part_loss, packs))
    model.train(was_training)
    return found


class FineTuning:
    """One run; `run` goes through its parts in order."""

    def __init__(self, options: Options):
        for name, value, low in (
            ("--epochs", options.epochs, 1e-9),
            ("--steps", options.steps, 1),
            ("--batch", options.batch, 1),
            ("--length", options.length, 8),
            ("--lr", options.lr, 1e-30),
            ("--threads", options.threads, 1),
            ("--weight-decay", options.weight_decay, 0),
        ):
            if value is not None and not value >= low:
                raise ValueError(f"{name} must be {'positive' if low < 1 else f'at least {low}'}, got {value}")
        if not 0 <= options.warmup < 1:
            raise ValueError(f"--warmup must be at least 0 and below 1, got {options.warmup}")
        if not 0 <= options.validation < 1:
            raise ValueError(f"--validation must be at least 0 and below 1, got {options.validation}")
        self.options = options
        folder = Path(options.model)
        self.out = Path(options.out) if options.out is not None else folder.with_name(f"{folder.name}-tuned")
        if self.out.resolve() == folder.resolve():
            raise ValueError(f"--out {self.out} is the model's own folder; choose another one")
        check_replaceable(self.out, RECORD)
        self.status = Status()
        self.log: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.questions: list[Question] = []

    def run(self) -> dict[str, Any]:
        """The whole run; returns what finetune.json holds."""
        options = self.options
        torch.manual_seed(options.seed)
        self.device_model()
        self.read()
        with Staging(self.out) as staging:  # now, so that a folder that can't be written fails before the work
            self.workers = PackWorkers(self.threads())
            try:
                before = self.examine()
                finished = self.learn()
                after = self.examine() if finished else None
                self.finish(staging, before, after, finished)
            finally:
                self.workers.close()
        self.report(before, after)
        return self.summary

    # The parts

    def device_model(self) -> None:
        """Model and tokenizer, with a chat template."""
        options = self.options
        self.model, self.tokenizer = load(Path(options.model), options.backend)
        self.dtype = self.model.dtype
        device = self.model.device
        self.autocast = torch.bfloat16 if device.type == "cuda" and self.dtype != torch.float16 else None
        how = set_template(self.model, self.tokenizer, options.template, options.lora is not None)
        say(f"model      {options.model}: {self.model.num_parameters() / 1e6:.2f} M parameters, {self.dtype}, {device}")
        say(f"template   {how}")
        if options.lora is None:
            self.model.float()  # small updates would be lost in half precision; saved in the dtype it came in
        else:
            add_lora(self.model, options.lora)
            names = ", ".join(options.lora.target_modules)
            say(
                f"LoRA       rank {options.lora.r}, alpha {options.lora.lora_alpha:g}, on {names}: "
                f"{self.model.num_parameters(only_trainable=True) / 1e6:.3f} M parameters to learn, the rest is frozen"
            )
        if options.checkpointing:
            self.model.gradient_checkpointing_enable()

    def read(self) -> None:
        """The conversations, as packed batches and a validation side; shows what is learned from."""
        options = self.options
        room = self.model.config.max_position_embeddings
        self.length = min(room, 1024) if options.length is None else options.length
        if self.length > room:
            raise ValueError(f"--length {self.length} is more than the model can read, {room}")
        if options.data == BUILTIN:
            pairs = docstring_pairs()
            conversations = lessons(pairs)
            self.questions = examination(pairs, EXAM, options.seed)
            if options.system is not None:
                conversations = [[{"role": "system", "content": options.system}, *talk] for talk in conversations]
        else:
            conversations = read_conversations(options.data, options.system)
        examples = [encode(self.tokenizer, talk) for talk in conversations]
        if not any(example.count for example in examples):
            shown = preview(self.tokenizer, examples[0], color=False, limit=300)
            raise ValueError(
                f"{options.data}: no token is the assistant's, so nothing can be learned. Rendered: {shown}"
            )
        long = sum(len(example.ids) > self.length for example in examples)
        examples = [example.cut(self.length) for example in examples]
        empty = sum(example.count == 0 for example in examples)
        learned = [example for example in examples if example.count]
        if not learned:
            raise ValueError(
                f"{options.data}: cut to {self.length} tokens, no conversation has an answer left to learn from; "
                "raise --length"
            )
        sides = [is_validation(t, options.validation) for t, e in zip(conversations, examples, strict=True) if e.count]
        training = [e for e, held in zip(learned, sides, strict=True) if not held] or learned
        held = [e for e, held in zip(learned, sides, strict=True) if held] if training is not learned else []
        self.batches = PackedBatches(training, self.length, options.batch, options.seed)
        self.steps = options.steps or max(1, round(options.epochs * self.batches.steps_per_epoch()))
        self.held = [make_packs(held, [group]) for group in pack(held, self.length)]
        table = TokenBytes(self.tokenizer)
        learned_ids = [i for e in training for i, s in zip(e.ids[1:], e.supervised[1:], strict=True) if s]
        self.bits = len(learned_ids) / math.log(2)  # from nats per target to bits per byte of answers
        self.bits /= max(1, sum(len(table[i]) for i in learned_ids if i not in table.special))
        tokens = sum(len(e.ids) for e in training)
        say(
            f"data       {options.data}: {len(training)} conversations to learn from, {len(held)} held out; "
            f"{tokens} tokens, of which {len(learned_ids)} are the assistant's and learned from"
        )
        if long:
            say(
                f"           {long} are longer than {self.length} tokens: their ends are cut off"
                + (f", and {empty} that have no answer left are dropped" if empty else "")
            )
        packs = pack(training, self.length)
        say(
            f"packing    {len(packs)} rows of up to {self.length} tokens, {tokens / (len(packs) * self.length):.0%} "
            f"full; {options.batch} rows a step, {self.steps} steps"
        )
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        legend = "in green" if color else "between ⟦ and ⟧"
        say(f"\nan example; {legend} is what the model learns to say:\n{preview(self.tokenizer, training[0], color)}\n")

    def threads(self) -> int | None:
        if self.options.threads is not None:
            return self.options.threads
        if self.options.compile or (self.options.lora is not None and self.options.lora.lora_dropout):
            return None  # no workers: compiling is not for several threads, nor is one generator of random numbers
        return 1 if self.model.device.type == "cuda" else min(machine.cores(), self.options.batch)

    def learn(self) -> bool:
        """Train; False when Ctrl-C came first."""
        options, status, model = self.options, self.status, self.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr = options.lr or default_lr(model.config.hidden_size, options.lora is not None)
        adamw = torch.optim.AdamW(
            parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=options.weight_decay, fused=True
        )
        called = cast(nn.Module, torch.compile(model, dynamic=True)) if options.compile else model
        schedule = functools.partial(linear, warmup=options.warmup)
        how: dict[str, Any] = {"schedule": schedule, "autocast": self.autocast, "workers": self.workers}
        recent: deque[float] = deque(maxlen=20)
        validated = sampled = 0.0
        last_loss = 0.0
        with make_display({}, options.plain) as display:
            self.validate()
            display.say(f"training for {self.steps} steps; Ctrl-C ends it early and keeps what there is")
            try:
                batches = cast(Any, self.batches)
                for done in train(called, batches, Together(adamw), Budget(steps=self.steps), **how):
                    recent.append(done.loss)
                    status.step, status.seconds, status.fraction = done.step, done.seconds, done.fraction
                    status.loss = sum(recent) / len(recent)
                    status.speed = done.tokens / done.seconds  # targets
                    status.train_curve.append((done.seconds, done.loss * self.bits))
                    last = done.fraction >= 1
                    if last or done.seconds - validated >= VALIDATE_EVERY:
                        validated = done.seconds
                        last_loss = self.validate()
                    self.log.append(
                        {
                            "step": done.step,
                            "seconds": round(done.seconds, 3),
                            "targets": done.tokens,
                            "loss": round(done.loss, 5),
                            "validation_loss": round(last_loss, 5) if validated == done.seconds else "",
                            "learning_rate": self.lr * done.scale,
                        }
                    )
                    display.update(status, force=last)
                    if (done.seconds - sampled >= SAMPLE_EVERY or last) and self.questions:
                        sampled = done.seconds
                        self.sample(display)
            except KeyboardInterrupt:
                display.say(f"\nstopped by Ctrl-C after {duration(status.seconds)}; saving what there is")
                return False
        return True

    def validate(self) -> float:
        """Mean nats per held-out target; also noted in the status, in bits per byte."""
        if not self.held:
            return math.nan
        found = validation_loss(self.model, self.held, self.workers)
        self.status.validation = found * self.bits
        self.status.validation_curve.append((self.status.seconds, found * self.bits))
        return found

    def examine(self) -> Accuracy | None:
        """Of the built-in data: how many held-out questions are answered right, of four choices each."""
        if not self.questions:
            return None
        say(f"asking {len(self.questions)} held-out questions with four choices each ...")
        found = answer_questions(
            self.model, self.tokenizer, self.questions, chat=True, system=self.options.system, unspecific=UNSPECIFIC
        )
        say(
            f"    right: {found.contrast:.1%} by what the question adds to an answer's probability, "
            f"{found.accuracy:.1%} by probability alone, {found.chance:.0%} by guessing\n"
        )
        return found

    def sample(self, display: Display) -> None:
        """An answer to a held-out question, in the model's own words."""
        question = self.questions[0]
        messages: list[Message] = [{"role": "user", "content": question.question}]
        if self.options.system is not None:
            messages.insert(0, {"role": "system", "content": self.options.system})
        said = answer(self.model, self.tokenizer, messages, 60)
        display.sample(self.status, question.question, f"{question.question}\n{said}")

    def finish(self, staging: Staging, before: Accuracy | None, after: Accuracy | None, finished: bool) -> None:
        """Write model, tokenizer and records, and make the folder appear."""
        options, folder = self.options, staging.folder
        model = self.model
        stop_at_turn_end(model, self.tokenizer, self.batches.examples[0])
        state = merged_state_dict(model) if options.lora is not None else model.state_dict()
        model.save_pretrained(folder, state_dict={name: tensor.to(self.dtype) for name, tensor in state.items()})
        self.tokenizer.save(folder)
        if options.lora is not None:
            save_adapter(model, options.lora, folder / "adapter", os.path.abspath(options.model))
            self.tokenizer.save(folder / "adapter")
        with open(folder / "log.csv", "w", newline="", encoding="utf-8") as file:
            columns = ["step", "seconds", "targets", "loss", "validation_loss", "learning_rate"]
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.log)
        self.no_picture = picture(folder / "loss.png", self.status, {})
        curve = self.status.validation_curve
        self.summary = {
            "finished": finished,
            "steps": self.status.step,
            "seconds": round(self.status.seconds, 1),
            "learning_rate": self.lr,
            "length": self.length,
            "validation_bits_per_byte": {"before": curve[0][1], "after": curve[-1][1]} if curve else None,
            "held_out_questions": None
            if before is None
            else {name: dataclasses.asdict(a) for name, a in (("before", before), ("after", after)) if a is not None},
            "parameters": model.num_parameters(),
            "trainable": model.num_parameters(only_trainable=True),
            "hardware": machine.describe(),
            "versions": machine.versions(),
            "options": dataclasses.asdict(options),
        }
        (folder / RECORD).write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        staging.publish()

    def report(self, before: Accuracy | None, after: Accuracy | None) -> None:
        drawn = Display({}).unicode
        say(plot(self.status.train_curve, self.status.validation_curve, {}, unicode=drawn))
        say("bits per byte of answers over time (line: training, dots: held out)\n")
        if before is not None and after is not None:
            say(
                f"held-out questions answered right, of {after.count} with four choices each: "
                f"{before.contrast:.1%} before, {after.contrast:.1%} after"
            )
        say(self.no_picture or f"the loss curve is {self.out / 'loss.png'}")
        say(f"written to {self.out}/; talk with it: pyllm chat {shlex.quote(str(self.out))}")


def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, messages: Sequence[Message], tokens: int) -> str:
    """The model's reply, greedily."""
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages, True), allow_special=True)
    inputs = torch.tensor([ids], device=model.device)
    was_training = model.training
    model.eval()
    ends = {tokenizer.eos_token_id, tokenizer.token_id(CHAT_TOKENS[1])} - {None}
    tokens = min(tokens, model.config.max_position_embeddings - len(ids))
    row = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False,
        eos_token_id=sorted(id for id in ends if id is not None) or None, pad_token_id=0,
    )  # fmt: skip
    model.train(was_training)
    return tokenizer.decode(row[0, len(ids) :].tolist()).strip()


def say(text: str = "") -> None:
    print(text, flush=True)


def run(options: Options) -> dict[str, Any]:
    """Fine-tuning as a function."""
    return FineTuning(options).run()
