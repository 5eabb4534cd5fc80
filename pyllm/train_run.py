"""`pyllm train`: one run of pretraining, from the first look at the data to the last checkpoint.

A run is a folder. Started again with the same folder, it goes on from its newest checkpoint and takes the very same
steps that it would have taken: same rows, same weights, bit for bit on the same machine and number of processes.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import machine, train_state
from .complete import complete
from .config import LlamaConfig
from .display import Display, make_display, picture
from .distributed import Cluster, clip_gradients
from .hollow import fill
from .model import LlamaForCausalLM
from .optim import SCHEDULES, Together, adamw, muon_and_adamw
from .packing import Batch, PackedRows
from .shards import tokenizer_fingerprint
from .train import Workers
from .train_config import TrainConfig
from .train_data import build_model, load_shards, load_tokenizer, prepare
from .train_log import TrainLog
from .train_progress import Progress, Signals, Silent, difference
from .train_step import checkpoint_activations, compile_layers, gradients, micro_batches, surprise


class Run:
    """One process of a run; `go` goes through its parts in order."""

    def __init__(self, config: TrainConfig):
        self.config, self.out = config, Path(config.out)
        self.cluster = Cluster.join(config.parallel, config.tensor_parallel)
        self.stopping: str | None = None  # why the run is to end before its time
        self.step = self.rows = self.tokens = self.bad = self.skipped = 0
        self.seconds = 0.0
        if config.batch % self.cluster.data_world:
            raise ValueError(f"--batch {config.batch} must be a multiple of the {self.cluster.data_world} data ranks")
        self.per_rank = config.batch // self.cluster.data_world

    def go(self) -> dict[str, Any]:
        """The whole run; returns what summary.json holds."""
        try:
            self.prepare()
            self.build()
            self.resume()
            with (
                make_display({}, self.config.plain) if self.cluster.main else Silent() as self.display,
                Signals(self),
            ):
                if self.cluster.main:
                    self.introduce()
                self.train()
            return self.finish()
        finally:
            if hasattr(self, "workers"):
                self.workers.close()
            self.cluster.leave()

    def say(self, text: str = "") -> None:
        if self.cluster.main:
            print(text, flush=True)

    # Before the first step

    def prepare(self) -> None:
        """Tokenizer and data, by the first process; then everybody opens them."""
        error: Exception | None = None
        if self.cluster.main:
            try:
                prepare(self.config, self.say)
            except Exception as caught:
                error = caught
        reason = self.cluster.failure(None if error is None else str(error))
        if error is not None:
            raise error
        if reason is not None:
            raise ValueError(reason)
        self.tokenizer = load_tokenizer(self.config)
        self.shards, validation = load_shards(self.config, self.tokenizer)
        self.data = PackedRows(self.shards, self.config.length, self.config.seed)
        self.validation = None if validation is None else PackedRows(validation, self.config.length, shuffle=False)
        # From nats per target to bits per byte of text.
        self.bits = self.shards.tokens / max(1, self.shards.bytes) / math.log(2)

    def build(self) -> None:
        """Model, optimiser, threads."""
        config, cluster = self.config, self.cluster
        torch.manual_seed(config.seed)
        hollow = cluster.parallel == "fsdp" or cluster.tensor > 1  # split before there is anything to hold
        model, folder = build_model(config, self.tokenizer, hollow)
        self.model: LlamaForCausalLM = model
        self.model_config: LlamaConfig = self.model.config
        gpu = cluster.device.type == "cuda"
        precision = config.precision if config.precision != "auto" else "autocast" if gpu else "float32"
        sharded = cluster.parallel == "fsdp"
        if precision == "bfloat16" and not sharded:
            self.model.to(torch.bfloat16)
        self.autocast = torch.bfloat16 if precision == "autocast" and not sharded else None
        if not hollow:
            self.model.to(cluster.device)
        self.model.train()
        checkpoint_activations(self.model, config.checkpointing)
        if config.compile:
            compile_layers(self.model)
        self.called = cluster.wrap(self.model, half=sharded and precision != "float32")
        if hollow:
            fill(self.model, cluster, folder)
        self._threads(gpu)
        self.micro = config.micro_batch or -(-self.per_rank // self.workers.count)
        betas = (config.beta1, config.beta2)
        if config.optimizer == "muon":
            decay: dict[str, Any] = {"weight_decay": config.weight_decay, "betas": betas, "eps": config.eps}
            self.optimizer: Together = muon_and_adamw(self.model, config.matrix_lr, config.lr, **decay)
        else:
            self.optimizer = adamw(self.model, config.lr, config.weight_decay, betas, config.eps)
        how: dict[str, Any] = {"warmup": config.warmup, "final": config.final}
        how.update({"decay": config.decay} if config.schedule == "wsd" else {})
        self.schedule = functools.partial(SCHEDULES[config.schedule], **how)
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.peak = machine.matmul_peak(cluster.device, dtype) * cluster.world
        if self.validation is not None:
            self.validation_bytes = self._bytes_of_validation()

    def _threads(self, gpu: bool) -> None:
        """CPU threads: in one process as workers with a micro-batch each, else for torch's own use."""
        threads = self.config.threads or max(1, machine.cores() // self.cluster.local_world)
        self.threads = threads
        torch.set_num_threads(threads)
        alone = self.cluster.mesh is None and not gpu and not self.config.compile
        self.workers = Workers(threads) if alone else Workers()

    def _bytes_of_validation(self) -> int:
        """Bytes of text that the validation rows' targets stand for."""
        assert self.validation is not None
        # Never more rows than there are: a row that counts twice would tell nothing new.
        self.validation_rows = min(self.config.validation_rows, self.validation.per_epoch)
        ids = (self.validation.batch(row, 1).targets[0].tolist() for row in range(self.validation_rows))
        return sum(len(self.tokenizer.decode_bytes([i for i in row if i >= 0], skip_special=True)) for row in ids)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        model = {k: v for k, v in self.model_config.to_dict().items() if k not in ("dtype", "use_cache")}
        return {
            **self.config.must_match(),
            "model": json.loads(json.dumps(model)),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "data": self.shards.fingerprint(),
        }

    def resume(self) -> None:
        """Go on from a checkpoint, as the config says."""
        wanted, found = self.config.resume, train_state.checkpoints(self.out)
        self.resumed: Path | None = None
        if wanted == "no":
            if found:
                raise ValueError(
                    f"{self.out} holds checkpoints of an earlier run, {found[-1].name} the last; --resume auto goes on "
                    "from there, another --out starts anew"
                )
        elif wanted != "auto" or found:
            self.resumed = found[-1] if wanted == "auto" else Path(wanted)
            state = train_state.read_state(self.resumed)
            mine = self.identity()
            for name, value in state["identity"].items():
                if mine.get(name) != value:
                    raise ValueError(
                        f"{self.resumed} was made with another {difference(name, value, mine.get(name))}; change it "
                        "back, or start a new run with another --out"
                    )
            train_state.load(self.resumed, self.model, self.optimizer, self.cluster)
            self.step, self.rows, self.tokens = state["step"], state["rows"], state["tokens"]
            self.seconds, self.bad, self.skipped = state["seconds"], state["bad"], state["skipped"]
            if not self.config.micro_batch and state["world"] == self.cluster.world:
                self.micro = state["micro_batch"]  # a machine that is busy now must not change how sums are rounded
        self.status = Progress(steps=self.config.steps, step=self.step, seconds=self.seconds, skipped=self.skipped)
        if self.cluster.main:
            (self.out / "config.toml").write_text(self.config.to_toml(), encoding="utf-8")
            self.log = TrainLog(self.out, self.step)
            self.status.train_curve = self.log.curve("bits_per_byte")
            self.status.validation_curve = self.log.curve("validation_bits_per_byte")

    def introduce(self) -> None:
        config, cluster, say = self.config, self.cluster, self.display.say
        ranks = (
            f", {cluster.world} processes ({cluster.parallel}, {cluster.tensor} to a matrix)" if cluster.mesh else ""
        )
        say(f"hardware   {machine.describe()}{ranks}")
        held_out = "none" if self.validation is None else f"{self.validation.shards.bytes / 1e6:.1f} MB"
        say(
            f"data       {self.shards.bytes / 1e6:.1f} MB, {self.shards.tokens / 1e6:.1f} M tokens in "
            f"{self.shards.documents} documents; validation: {held_out}"
        )
        c = self.model_config
        say(
            f"model      {c.num_parameters() / 1e6:.2f} M parameters: {c.num_hidden_layers} layers, width "
            f"{c.hidden_size}, vocabulary {c.vocab_size}"
        )
        accumulation = -(-self.per_rank // self.micro)
        say(
            f"step       {config.batch} rows of {config.length} tokens: {self.micro} at a time x {accumulation} x "
            f"{cluster.data_world} rank(s), {self.workers.count} worker thread(s)"
        )
        say(f"machine    {self.peak / 1e9:,.0f} GFLOP/s in matrix products, measured; MFU is a share of this")
        if self.log.board is None:
            say("log        log.csv (for TensorBoard as well: pip install tensorboard)")
        if self.resumed is not None:
            say(f"resumed    from {self.resumed}, after {self.tokens:,} tokens")
        left = max(0, config.steps - self.step)
        say(
            f"\ntraining for {left} steps; Ctrl-C saves and stops\n"
            if left
            else "\nall steps are done: raise --steps to go on\n"
        )

    # The loop

    def train(self) -> None:
        """Step by step, until the end or until told to stop."""
        config, status, start = self.config, self.status, time.perf_counter() - self.seconds
        recent: deque[float] = deque(maxlen=20)
        times: deque[tuple[float, int, float]] = deque([(self.seconds, self.tokens, 0.0)], maxlen=20)
        work = 0.0  # useful operations since the start
        self.saved = self.step if self.resumed is not None else -1
        for batches in self._steps():
            self.optimizer.zero_grad()
            loss, count = gradients(self.called, batches, self.cluster, self.workers, self.autocast)
            norm = clip_gradients([p for p in self.model.parameters() if p.requires_grad], config.clip)
            scale = self.schedule((self.step + 0.5) / config.steps)
            good = math.isfinite(loss) and math.isfinite(norm)
            if good:
                self.optimizer.step(scale)
            self.step, self.rows, self.tokens = self.step + 1, self.rows + config.batch, self.tokens + count
            self.bad, self.skipped = (0, self.skipped) if good else (self.bad + 1, self.skipped + 1)
            self.seconds = time.perf_counter() - start
            work += self._operations(batches) * self.cluster.data_world
            times.append((self.seconds, self.tokens, work))
            (t0, n0, w0), (t1, n1, w1) = times[0], times[-1]
            if good:
                recent.append(loss)
                status.train_curve.append((self.seconds, loss * self.bits))
            status.step, status.seconds, status.fraction = self.step, self.seconds, self.step / config.steps
            status.loss = sum(recent) / max(1, len(recent))
            status.speed, status.mfu = (n1 - n0) / (t1 - t0), (w1 - w0) / (t1 - t0) / self.peak
            status.skipped = self.skipped
            last = self.step >= config.steps
            validated = self.validate() if last or _due(self.step, config.validate_every) else None
            self._record(loss, norm, scale, validated)
            self.display.update(status, force=last)
            if not good:
                self._complain(loss, norm)
            if _due(self.step, config.sample_every) or (last and config.sample_every):
                self.sample()
            if self._stop() or last or _due(self.step, config.save_every):
                self.save(final=last or self.stopping is not None)
            if self.stopping is not None:
                return
        self.save(final=True)

    def _steps(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step to come; the next ones are read while a step computes."""

        def read(step: int) -> list[Batch]:
            first = self.rows_at_start + (step - self.step_at_start) * self.config.batch
            return micro_batches(self.data, first + self.cluster.data_rank * self.per_rank, self.per_rank, self.micro)

        self.rows_at_start, self.step_at_start = self.rows, self.step
        with ThreadPoolExecutor(1, "pyllm-data") as reader:
            coming = reader.submit(read, self.step)
            for step in range(self.step, self.config.steps):
                batches = coming.result()
                if step + 1 < self.config.steps:
                    coming = reader.submit(read, step + 1)
                yield batches

    def _operations(self, batches: list[Batch]) -> float:
        """Useful operations of some batches: attention counts the pairs that documents and causality leave."""
        tokens = sum(batch.inputs.numel() for batch in batches)
        keys = sum(batch.pairs for batch in batches) / tokens  # a sequence of length L has (L + 1) / 2 on average
        return tokens * self.model_config.flops_per_token(max(1, round(2 * keys - 1)))

    def validate(self) -> tuple[float, float] | None:
        """Nats per target and bits per byte on the validation rows; always the same ones."""
        if self.validation is None:
            return None
        nats, count = surprise(
            self.called, self.validation, self.validation_rows, self.micro, self.cluster, self.workers, self.autocast
        )
        bits = nats / math.log(2) / max(1, self.validation_bytes)
        self.status.validation = bits
        self.status.validation_curve.append((self.seconds, bits))
        return nats / max(1, count), bits

    def _record(self, loss: float, norm: float, scale: float, validated: tuple[float, float] | None) -> None:
        if not self.cluster.main:
            return
        before = self.log.problem
        self.log.add(
            {
                "step": self.step,
                "seconds": round(self.seconds, 3),
                "tokens": self.tokens,
                "loss": loss,
                "bits_per_byte": loss * self.bits if math.isfinite(loss) else None,
                "validation_loss": None if validated is None else validated[0],
                "validation_bits_per_byte": None if validated is None else validated[1],
                "gradient_norm": norm,
                "learning_rate_scale": scale,
                "tokens_per_second": round(self.status.speed),
                "mfu": self.status.mfu,
            }
        )
        if self.log.problem is not None and before is None:
            self.display.say(f"log.csv can't be written ({self.log.problem}); its rows wait in memory")

    def _complain(self, loss: float, norm: float) -> None:
        """About a loss or gradient that is not finite; the weights have not been touched. Too often in a row: stop."""
        self.display.say(f"step {self.step}: loss {loss}, gradient norm {norm}: skipped, the weights stay as they were")
        if self.bad >= self.config.bad_steps:
            self.save(final=True)
            raise FloatingPointError(
                f"the loss or gradient was not finite in {self.bad} steps in a row, up to step {self.step}; the "
                f"weights before them are saved in {self.out / 'checkpoints'}. Try a lower --lr, a longer --warmup, or "
                "--backend eager to see whether a kernel is at fault"
            )

    def sample(self) -> None:
        """Let the model write a little."""
        config = self.config
        if self.cluster.tensor > 1 or not config.sample_tokens:
            return  # generation keeps a cache of plain tensors
        if self.cluster.main or self.cluster.parallel == "fsdp":  # where sharded, everybody has to take part
            text = complete(self.model, self.tokenizer, config.prompt, config.sample_tokens, config.seed)
            self.display.sample(self.status, config.prompt, text)

    def save(self, final: bool = False) -> None:
        """A checkpoint. One that can't be written stops nothing before the end: there may be room for the next."""
        if self.saved == self.step:
            return
        state = {
            "rows": self.rows, "tokens": self.tokens, "seconds": self.seconds, "bad": self.bad, "skipped": self.skipped,
            "micro_batch": self.micro, "identity": self.identity(), "versions": machine.versions(),
        }  # fmt: skip
        texts = {"config.toml": self.config.to_toml()}
        args = (self.out, self.step, self.model, self.optimizer, self.tokenizer, state, texts, self.cluster)
        try:
            train_state.save(*args, keep=self.config.keep)
        except train_state.SaveError as error:
            older = train_state.checkpoints(self.out)
            kept = f"the newest one is {older[-1]}" if older else "there is none yet"
            if final:
                raise train_state.SaveError(f"{error}. {kept[0].upper()}{kept[1:]}") from error
            self.display.say(f"{error}; {kept}. Training goes on, the next checkpoint may find room")
            return
        self.saved = self.step

    # Stopping

    def _stop(self) -> bool:
        """Whether any process was told to stop: all of them must, at the same step."""
        wanted = self.cluster.sum(torch.tensor([float(self.stopping is not None)], dtype=torch.float64))
        if float(wanted[0]) and self.stopping is None:
            self.stopping = "another process was told to stop"
        return self.stopping is not None

    def finish(self) -> dict[str, Any]:
        """The newest checkpoint's model in the run's own folder, the loss curve, and a summary."""
        status, done = self.status, self.step >= self.config.steps
        summary = {
            "finished": done,
            "step": self.step,
            "tokens": self.tokens,
            "training_seconds": round(self.seconds, 1),
            "loss": status.loss if math.isfinite(status.loss) else None,
            "validation_bits_per_byte": status.validation,
            "tokens_per_second": round(status.speed),
            "mfu": status.mfu,
            "skipped_steps": self.skipped,
            "parameters": self.model_config.num_parameters(),
            "processes": self.cluster.world,
            "hardware": machine.describe(),
            "versions": machine.versions(),
        }
        if not self.cluster.main:
            return summary
        Display().curve(status)
        self.log.close()
        newest = train_state.checkpoints(self.out)[-1]
        for file in newest.iterdir():
            if (
                file.is_file()
                and not file.name.startswith("rng-")
                and file.name not in (train_state.STATE, "config.toml")
            ):
                shutil.copyfile(file, self.out / f"{file.name}.tmp")
                os.replace(self.out / f"{file.name}.tmp", self.out / file.name)
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        why_not = picture(self.out / "loss.png", status, {})
        if self.stopping is not None:
            self.say(f"stopped ({self.stopping}) after step {self.step}; the same command goes on from there")
        curve = f"{why_not}\n" if why_not else ""
        self.say(f"{curve}written to {self.out}: the model, log.csv{'' if why_not else ', loss.png'}, summary.json")
        self.say(f'next: pyllm generate {self.out} --prompt "{self.config.prompt}"')
        return summary


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def run(config: TrainConfig) -> dict[str, Any]:
    """A run as a function."""
    return Run(config).go()
