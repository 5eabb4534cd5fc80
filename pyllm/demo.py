"""`pyllm demo`: a Llama that learns to write Python on this machine, from text that Python brings along.

Tokenizer, model, training, samples, loss curve, a comparison of the fused kernels with eager PyTorch, and a folder
with everything in it that `transformers` reads too. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import lzma
import math
import os
import shlex
import shutil
import sys
import time
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import machine
from .compare import Comparison, compare
from .complete import complete
from .corpus import Corpus, python_corpus, text_corpus
from .data import Batches, QuickValidation, bits_per_byte, tokenize
from .display import Display, Status, duration, make_display, picture
from .kernels import OPS, use_backend
from .kernels.describe import availability
from .kernels.dispatch import parse
from .kernels.extension import cpu
from .model import LlamaForCausalLM
from .optim import linear, muon_and_adamw
from .recipe import Recipe, choose_recipe, start_at_zero
from .tokenizer import Tokenizer
from .train import Budget, Workers, train

VALIDATE_EVERY = 6.0  # seconds
SAMPLE_EVERY = 15.0
SAMPLE_TOKENS = 80


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    minutes: float = 2.0
    out: str = "pyllm-demo"
    seed: int = 0
    backend: str = "auto"
    threads: int | None = None
    steps: int | None = None
    text: str | None = None
    prompt: str = "def "
    plain: bool = False


class Demo:
    """One run of the demo; `run` goes through its parts in order."""

    def __init__(self, options: Options):
        if not options.minutes > 0:
            raise ValueError(f"--minutes must be positive, got {options.minutes}")
        if options.steps is not None and options.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {options.steps}")
        if options.threads is not None and options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        if not options.prompt:
            raise ValueError("--prompt must not be empty")
        parse(options.backend)
        out = Path(options.out)
        if (out / "config.json").exists() and not (out / "summary.json").exists():
            raise ValueError(f"--out {out} holds a model that no demo wrote; choose another folder")
        self.options = options
        self.out = out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.autocast = torch.bfloat16 if self.device.type == "cuda" else None
        self.status = Status(limit=options.minutes * 60)
        self.log: list[dict[str, Any]] = []
        self.samples: list[str] = []
        self.summary: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """The whole demo; returns what summary.json holds."""
        began = time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)  # first, so that a folder that can't be written fails at once
        self.introduce()
        self.prepare()
        finished = self.learn()
        self.save()  # before anything that might still go wrong
        comparison = None
        try:
            self.judge(finished)
            comparison = self.side_by_side() if finished else None
        except KeyboardInterrupt:
            say("\nstopped by Ctrl-C; the model is saved, the rest of the measurements is left out")
        self.workers.close()
        self.finish(finished, comparison, time.perf_counter() - began)
        return self.summary

    # The parts

    def introduce(self) -> None:
        say("pyllm demo: train a small Llama on this machine's own Python sources\n")
        say(f"hardware   {machine.describe()}")
        say(f"software   {', '.join(f'{name} {version}' for name, version in machine.versions().items())}")
        say(f"kernels    {self.kernels()}")

    def kernels(self) -> str:
        """Which backend runs which op here, and why the others don't."""
        native = "cuda" if self.device.type == "cuda" else "cpu"
        label = {"cpu": f"C++ ({cpu.module.isa})"} if cpu.module is not None else {}
        by_choice: dict[str, list[str]] = {}
        without: list[str] = []  # ops that have no native kernel
        reasons: dict[str, str] = {}
        with use_backend(self.options.backend):
            for row in availability(OPS, self.device.type):
                by_choice.setdefault(row.chosen, []).append(row.op)
                for backend, why in row.reasons.items():
                    if why and not why[0].startswith(f"no {backend} kernel"):
                        reasons.setdefault(backend, why[0])
                    elif why and backend == native:
                        without.append(row.op)
        if "none" in by_choice:
            raise ValueError(
                f"--backend {self.options.backend} cannot run {', '.join(by_choice['none'])} here "
                f"({'; '.join(f'{name}: {why}' for name, why in reasons.items()) or 'no such kernel'}). "
                f"Let eager PyTorch take over where it can't: --backend {self.options.backend},eager"
            )
        lines = [f"{label.get(choice, choice)}: {', '.join(ops)}" for choice, ops in by_choice.items()]
        if set(without) & set(by_choice.get("eager", ())):
            lines[list(by_choice).index("eager")] += f" (no {native} kernel for these yet)"
        lines += [f"not {backend}: {why}" for backend, why in reasons.items()]
        return "\n           ".join([*lines, "(`pyllm kernels` has the whole table)"])

    def prepare(self) -> None:
        """Text, tokenizer, model, optimiser, threads."""
        options = self.options
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        self.corpus: Corpus = python_corpus() if options.text is None else text_corpus(options.text)
        validation = b"".join(document.data for document in self.corpus.validation)
        # What general-purpose compressors make of the same bytes: the yardsticks for a model's bits per byte.
        self.levels = {
            "zlib -9": 8 * len(zlib.compress(validation, 9)) / len(validation),
            "xz -9": 8 * len(lzma.compress(validation, preset=9)) / len(validation),
        }
        say(
            f"text       {self.corpus.source}: {self.corpus.train_bytes / 1e6:.1f} MB in {len(self.corpus.train)} "
            f"pieces to learn from, {len(validation) / 1e6:.1f} MB in {len(self.corpus.validation)} others to judge by"
        )
        recipe: Recipe = choose_recipe(machine.cores() * options.minutes, self.device.type == "cuda")
        self.tokenizer = Tokenizer.train((d.data for d in self.corpus.train), recipe.vocab_size)
        assert self.tokenizer.eos_token_id is not None
        recipe = dataclasses.replace(recipe, vocab_size=self.tokenizer.vocab_size)  # fewer where text is very uniform
        self.recipe = recipe
        self.train_row = tokenize(self.corpus.train, self.tokenizer)
        self.validation_row = tokenize(self.corpus.validation, self.tokenizer)
        self.bytes_per_token = self.corpus.train_bytes / len(self.train_row)
        say(
            f"tokenizer  byte-level BPE, {recipe.vocab_size} tokens, {self.bytes_per_token:.2f} bytes per token, "
            f"{len(self.train_row) / 1e6:.1f} M tokens ({time.perf_counter() - start:.0f} s)"
        )
        self.model = LlamaForCausalLM(recipe.config(self.tokenizer.eos_token_id), backend=options.backend)
        start_at_zero(self.model)
        self.model.to(self.device)
        self.quick = QuickValidation(self.validation_row, self.tokenizer, recipe.length)
        say(
            f"model      {self.model.num_parameters() / 1e6:.2f} M parameters: {recipe.layers} layers, width "
            f"{recipe.hidden_size}, {recipe.heads} heads; batches of {recipe.batch} x {recipe.length} tokens"
        )
        say(f"threads    {self.choose_threads()}")

    def choose_threads(self) -> str:
        """Make the workers, as many as a trial finds fastest unless told; says what was found."""
        self.threads, self.workers = 1, Workers(1)
        if self.options.threads is not None:
            self.threads = self.options.threads
            self.workers = Workers(self.threads)
            return f"{self.options.threads}, as asked for"
        cores = machine.cores()
        candidates = sorted({n for n in (1, 2, 4, 8, 16) if n < cores} | {min(cores, 16)})
        if self.device.type == "cuda":
            return "1, as the GPU does the work"
        if len(candidates) == 1:
            return "1, as there is one core"
        x = next(iter(Batches(self.train_row, self.recipe.batch, self.recipe.length)))
        # Measured and not assumed: on a busy machine, or where two "cores" are halves of one, fewer can be faster.
        teams = {n: Workers(n) for n in candidates}
        times = machine.medians({n: functools.partial(team.gradients, self.model, x) for n, team in teams.items()})
        self.model.zero_grad(set_to_none=True)
        # The most threads that are about as fast as the best: whatever keeps the other cores busy now may end soon.
        best = max(n for n in times if times[n] <= 1.15 * min(times.values()))
        for n, team in teams.items():
            if n != best:
                team.close()
        self.threads, self.workers = best, teams[best]
        found = ", ".join(f"{n}: {x[:, 1:].numel() / seconds:,.0f} tokens/s" for n, seconds in times.items())
        return f"{best}, by a short trial ({found})"

    def learn(self) -> bool:
        """Train until the time is up; False when Ctrl-C came first."""
        recipe, status = self.recipe, self.status
        optimizer = muon_and_adamw(self.model, recipe.matrix_lr, recipe.other_lr)
        batches = Batches(self.train_row, recipe.batch, recipe.length, self.options.seed)
        budget = Budget(self.options.minutes * 60, self.options.steps)
        how: dict[str, Any] = {"schedule": linear, "autocast": self.autocast, "workers": self.workers}
        bits = 1 / math.log(2) / self.bytes_per_token  # from nats per token to bits per byte
        recent: deque[float] = deque(maxlen=50)
        speeds: deque[tuple[float, int]] = deque(maxlen=200)
        validated = sampled = 0.0
        with make_display(self.levels, self.options.plain) as display:
            display.say(
                f"\ntraining for {duration(status.limit)} minutes; Ctrl-C ends it early and keeps what there is\n"
            )
            try:
                for done in train(self.model, batches, optimizer, budget, **how):
                    recent.append(done.loss)
                    speeds.append((done.seconds, done.tokens))
                    status.step, status.seconds, status.fraction = done.step, done.seconds, done.fraction
                    status.loss = sum(recent) / len(recent)
                    status.train_curve.append((done.seconds, done.loss * bits))
                    if len(speeds) > 1:
                        (t0, n0), (t1, n1) = speeds[0], speeds[-1]
                        status.speed = (n1 - n0) / (t1 - t0)
                    last = done.fraction >= 1
                    if last or done.seconds - validated >= VALIDATE_EVERY:
                        validated = done.seconds
                        status.validation = self.validate()
                        status.validation_curve.append((done.seconds, status.validation))
                    self.record(done, bits)
                    display.update(status, force=last)
                    if done.seconds - sampled >= SAMPLE_EVERY and not last:
                        sampled = done.seconds
                        self.sample(display)
            except KeyboardInterrupt:
                display.say(f"\nstopped by Ctrl-C after {duration(status.seconds)}; saving what there is")
                self.seconds = budget.seconds
                return False
            self.seconds = budget.seconds
            self.sample(display)
        return True

    def validate(self) -> float:
        """Bits per byte on the quick subset."""
        self.model.eval()
        found = self.quick(self.model, self.workers.map)
        self.model.train()
        return found

    def record(self, done: Any, bits: float) -> None:
        """One row of log.csv."""
        curve = self.status.validation_curve
        fresh = curve[-1][1] if curve and curve[-1][0] == done.seconds else None
        self.log.append(
            {
                "step": done.step,
                "seconds": round(done.seconds, 3),
                "tokens": done.tokens,
                "loss": round(done.loss, 5),
                "train_bits_per_byte": round(done.loss * bits, 5),
                "validation_bits_per_byte": "" if fresh is None else round(fresh, 5),
                "tokens_per_second": round(self.status.speed),
                "learning_rate_scale": round(done.scale, 5),
            }
        )

    def sample(self, display: Display) -> None:
        """Let the model write a little."""
        # Blank lines in front: where a new function usually begins.
        text = complete(
            self.model, self.tokenizer, self.options.prompt, SAMPLE_TOKENS, self.options.seed, before="\n\n\n"
        )
        self.samples.append(f"# after {duration(self.status.seconds)}\n{text}\n")
        display.sample(self.status, self.options.prompt, text)

    def judge(self, finished: bool) -> None:
        """Bits per byte on all of the validation text, beside what compressors need for it."""
        Display(self.levels).curve(self.status)
        result: dict[str, Any] = {"quick_validation_bits_per_byte": self.status.validation}
        if finished:
            say("judging on the whole validation text ...")
            num_bytes, length = self.corpus.validation_bytes, self.recipe.length
            self.model.eval()
            row, stride = self.validation_row, length // 2
            final = bits_per_byte(self.model, row, num_bytes, length, stride, apply=self.workers.map)
            result["validation_bits_per_byte"] = final
            say(f"\nbits per byte of {num_bytes / 1e6:.1f} MB of text that the model has never seen:")
            rows = {**self.levels, "this model": final}
            for name, value in sorted(rows.items(), key=lambda row: -row[1]):
                say(f"    {name:<12}{value:6.3f}  {'#' * round(20 * value)}")
            verdict = "below" if final < self.levels["zlib -9"] else "not yet below"
            say(f"the model is {verdict} zlib -9, which needs {self.levels['zlib -9']:.3f}")
        self.summary.update(result, **{f"{k.split()[0]}_bits_per_byte": v for k, v in self.levels.items()})

    def side_by_side(self) -> Comparison | None:
        with use_backend(self.options.backend):
            chosen = {row.chosen for row in availability(OPS, self.device.type)}
        if chosen <= {"eager"}:
            say("\nfused against eager: nothing to compare, as every op runs as eager PyTorch here (`pyllm kernels`)")
            return None
        x = next(iter(Batches(self.validation_row, self.recipe.batch, self.recipe.length)))
        say("\nfused kernels against eager PyTorch, same weights, same batch, in turns:")
        found = compare(self.model, x, self.options.backend, autocast=self.autocast, workers=self.workers)
        say("\n".join("    " + line for line in found.table().splitlines()))
        return found

    def save(self) -> None:
        """The model as Hugging Face's folder, the tokenizer, and the run's records."""
        out = self.out
        self.model.save_pretrained(out)
        self.tokenizer.save(out)
        (out / "sample.txt").write_text("\n".join(self.samples), encoding="utf-8")
        with open(out / "log.csv", "w", newline="", encoding="utf-8") as file:
            columns = ["step", "seconds", "tokens", "loss", "train_bits_per_byte", "validation_bits_per_byte"]
            writer = csv.DictWriter(file, [*columns, "tokens_per_second", "learning_rate_scale"])
            writer.writeheader()
            writer.writerows(self.log)
        self.no_picture = picture(out / "loss.png", self.status, self.levels)

    def finish(self, finished: bool, comparison: Comparison | None, seconds: float) -> None:
        tokens = self.log[-1]["tokens"] if self.log else 0
        self.summary.update(
            finished=finished,
            steps=self.status.step,
            tokens=tokens,
            training_seconds=round(self.seconds, 1),
            all_seconds=round(seconds, 1),
            tokens_per_second=round(tokens / self.seconds) if self.seconds else 0,
            parameters=self.model.num_parameters(),
            hardware=machine.describe(),
            threads=self.threads,
            versions=machine.versions(),
            corpus=self.corpus.digest(),
            train_bytes=self.corpus.train_bytes,
            validation_bytes=self.corpus.validation_bytes,
            recipe=dataclasses.asdict(self.recipe),
            options=dataclasses.asdict(self.options),
            comparison=None
            if comparison is None
            else {**dataclasses.asdict(comparison), "speedup": comparison.speedup},
        )
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        say(
            f"\nwritten to {self.out}/: model.safetensors, config.json, tokenizer.json, log.csv, "
            "sample.txt, summary.json"
        )
        say(self.no_picture or f"the loss curve is {self.out / 'loss.png'}")
        command, out = own_command(), shlex.quote(str(self.out))
        say(f"""
what next:
    {command} generate {out} --prompt "class "
    {command} demo --minutes 10 --out {shlex.quote(f"{self.out}-10")}
    {command} kernels""")


def own_command() -> str:
    """How to call this command again from the same shell: a virtual environment need not be activated."""
    found = shutil.which("pyllm")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "pyllm"
    if shutil.which("python") == sys.executable:
        return "python -m pyllm"
    try:
        python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    except ValueError:  # on another drive
        python = sys.executable
    return f"{shlex.quote(python)} -m pyllm"


def say(text: str = "") -> None:
    print(text, flush=True)


def run(options: Options) -> dict[str, Any]:
    """The demo as a function."""
    return Demo(options).run()
