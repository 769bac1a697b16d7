"""The one loop: evaluate, save, stop?, step, log.

A run is a function of its config and data. Update k draws from generators seeded by (seed, k) and trains on the
loader's batches from `k * accumulate` on, so nothing but weights, optimiser state and counters has to be remembered,
and a run that was interrupted goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fourm import checkpoint, runtime
from fourm.logbook import Logbook, amount, duration
from fourm.training.optim import (
    OptimConfig,
    build_optimizers,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from fourm.training.tasks import Evaluator, Loader, Task, add_up, keys_of, tokens_in


@dataclass(kw_only=True)
class TrainConfig:
    """How long and how a task is trained.

    Args:
        steps: Updates to make.
        tokens: Given and asked tokens to train on, padding not counted; replaces `steps`.
        batch_size: Samples of one update, over all processes and accumulated batches.
        accumulate: Batches a process adds up for one update.
        optim: How the model is updated.
        ema: Decay of the moving average of the weights, rising to it from 0; 0 for none.
        eval_every: Updates between evaluations; there is one at the end in any case.
        save_every: Updates between checkpoints; there is one at the end in any case.
        log_every: Updates between records of the training loss.
        keep: Checkpoints to leave; 0 leaves all.
        seed: Of everything random.
        workers: Processes that load data.
        precision: Of matrix products; `auto` is bf16 wherever the hardware has it.
        compile: Compile the task with `torch.compile`.
        wandb: Project to mirror the log to.
    """

    steps: int = 1000
    tokens: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: float = 0.0
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 20
    keep: int = 2
    seed: int = 0
    workers: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    wandb: str | None = None

    # Keys that may differ when a run goes on: its length, what is written down when, and by how many it is made.
    may_change: ClassVar[frozenset[str]] = frozenset(
        [
            "steps",
            "tokens",
            "eval_every",
            "save_every",
            "log_every",
            "keep",
            "wandb",
            "accumulate",
            "workers",
            "compile",
        ]
    )

    def loader_batch(self, processes: int) -> int:
        """Samples of one batch of one process, so that an update has `batch_size` in all.

        Raises:
            ValueError: The samples cannot be shared out evenly.
        """
        size, rest = divmod(self.batch_size, processes * self.accumulate)
        if rest or not size:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared out evenly to {processes} processes with "
                f"accumulate {self.accumulate}; use a multiple of {processes * self.accumulate}"
            )
        return size


class Step(nn.Module):
    """What DDP wraps: its forward is the task's loss."""

    def __init__(self, task: Task, dtype: torch.dtype):
        super().__init__()
        self.model = task.model
        self.task, self.dtype = task, dtype

    def forward(self, batch: Any, counts: Tensor) -> dict[str, Tensor]:
        """The task's loss; products in `dtype`, weights and sums in float32."""
        with torch.autocast(counts.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.task.loss(batch, counts)


class Trainer:
    """Trains a task, and goes on from the newest checkpoint in the run's folder if there is one.

    Args:
        config: How long and how.
        task: What.
        loader: Batches of `config.loader_batch(processes)` samples for this process.
        evaluators: Held-out measurements by name; each figure is logged as `<name>/<figure>`. They get the moving
            average of the model where there is one, in evaluation mode and without gradients.
        folder: The run's folder.
        files: Text files to put into every checkpoint, such as the `config.json` that rebuilds the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        loader: Loader,
        evaluators: Mapping[str, Evaluator],
        folder: str | Path,
        files: Mapping[str, str] | None = None,
    ):
        self.config, self.task, self.loader = config, task, loader
        self.evaluators, self.folder, self.files = evaluators, Path(folder), files
        self.accelerator = runtime.accelerator()
        self.device = self.accelerator.device
        config.loader_batch(self.accelerator.num_processes)
        if config.optim.lazy_tables and (self.accelerator.num_processes > 1 or config.compile):
            raise ValueError("optim.lazy_tables makes sparse gradients, which need one process and `compile: false`")
        self.dtype = runtime.autocast_dtype(config.precision, self.device)
        step = Step(task, self.dtype)
        if config.compile:
            step.compile()
        self.forward = self.accelerator.prepare(step)
        self.optimizers = build_optimizers(task.model, config.optim)
        self.ema = moving_average(task.model, config.ema) if config.ema else None
        self.step, self.tokens = 0, 0
        self.metrics: dict[str, float] = {}
        self.window = Window()
        self.started = (time.perf_counter(), 0.0)

    def fit(self) -> dict[str, float]:
        """Trains to the end.

        Returns:
            The figures of the last evaluation.

        Raises:
            ValueError: A loss or gradient that is not finite, or a checkpoint of another run in the folder.
        """
        config, writes = self.config, self.accelerator.is_main_process
        with Logbook(self.folder, config.wandb, dataclasses.asdict(config), writes) as logbook:
            self._resume(logbook)
            first = self.step
            self.started = (time.perf_counter(), self._progress)
            with contextlib.closing(self._updates(first)) as updates:
                while True:
                    if self.step > first and self._due(config.eval_every):
                        self._evaluate(logbook)
                    if self.step > first and self._due(config.save_every):
                        self._save()
                    if self._done:
                        break
                    self._update(updates)
                    if self._due(config.log_every) or self._due(config.save_every):
                        self._log(logbook)
        return self.metrics

    @property
    def final_model(self) -> nn.Module:
        """The model to keep: its moving average where there is one."""
        return self.task.model if self.ema is None else self.ema.module

    @property
    def _progress(self) -> float:
        """How far the run is, in the unit of its length."""
        return self.tokens if self.config.tokens else self.step

    @property
    def _length(self) -> float:
        return self.config.tokens or self.config.steps

    @property
    def _done(self) -> bool:
        return self._progress >= self._length

    def _due(self, every: int) -> bool:
        return self._done or (every > 0 and self.step % every == 0)

    def _updates(self, first: int) -> Generator[tuple[list[Any], int], None, None]:
        """This process's batches of one update after another, on the device, and how many tokens they hold."""
        batches = self.loader.batches(first * self.config.accumulate)
        while True:
            group = [next(batches) for _ in range(self.config.accumulate)]
            yield [send_to_device(batch, self.device) for batch in group], sum(map(tokens_in, group))

    def _update(self, updates: Generator[tuple[list[Any], int], None, None]) -> None:
        """One update of the weights, on the batches of all processes."""
        config, rank = self.config, self.accelerator.process_index
        began = time.perf_counter()
        batches, tokens = next(updates)
        waited = time.perf_counter() - began
        runtime.seed_everything(config.seed, "update", self.step, rank)

        counts = torch.stack([self.task.counts(batch) for batch in batches]).sum(0)
        counts = self.accelerator.reduce(counts, "sum")
        seen = int(self.accelerator.reduce(torch.tensor(tokens, device=self.device), "sum"))
        if config.tokens and not seen:
            raise ValueError("the run's length is given in tokens, but its batches hold none; give `steps` instead")
        # Rates are those of the update's middle: neither the first nor the last update is made with rate 0.
        middle = self._progress + (seen if config.tokens else 1) / 2
        rate = learning_rate(config.optim, middle, self._length)
        set_learning_rate(self.optimizers, rate)

        self.task.model.train()
        parts: dict[str, float] = {}
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.forward):
                losses = self.forward(batch, counts)
                # DDP averages gradients over processes; these losses are parts of a sum.
                self.accelerator.backward(losses["loss"] * self.accelerator.num_processes)
            values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
            for name, value in zip(losses, values, strict=True):
                parts[name] = parts.get(name, 0.0) + value
        norm = float(clip_gradients(self.task.model, config.optim.clip))
        self._refuse_non_finite(parts, norm, batches)

        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + seen
        if self.ema is not None:
            self.ema.update_parameters(self.task.model)
        self.window.add(parts, rate, norm, seen, time.perf_counter() - began, waited)

    def _refuse_non_finite(self, parts: dict[str, float], norm: float, batches: list[Any]) -> None:
        """Stops all processes before the update if the loss of any, or the common gradient, is not finite."""
        total = self.accelerator.reduce(torch.tensor(parts["loss"], device=self.device), "sum")
        if math.isfinite(float(total)) and math.isfinite(norm):
            return
        where = [name for name, value in parts.items() if not math.isfinite(value)]
        keys = [key for batch in batches for key in keys_of(batch)]
        raise ValueError(
            f"step {self.step}: {', '.join(where) or 'the loss of another process or the gradient'} is not finite "
            f"(gradient norm {norm:g}); samples of this process: {', '.join(keys) or 'unnamed'}"
        )

    def _evaluate(self, logbook: Logbook) -> None:
        model = self.final_model.eval()
        self.metrics = {}
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for name, evaluator in self.evaluators.items():
                runtime.seed_everything(self.config.seed, "evaluate", name)
                self.metrics |= {f"{name}/{figure}": value for figure, value in evaluator(model, self.step).items()}
        if self.metrics:
            logbook.write(self.step, self.metrics)
            brief = [f"{name} {value:.4g}" for name, value in self.metrics.items() if name.count("/") == 1]
            logbook.say(f"step {self.step}  " + "  ".join(brief))

    def _log(self, logbook: Logbook) -> None:
        """Writes the means since the last record."""
        record = self.window.close()
        if not record:
            return
        seconds = record["seconds"]
        rates = {
            "samples_per_second": record.pop("updates") * self.config.batch_size / seconds,
            "tokens_per_second": record.pop("new_tokens") / seconds,
        }
        logbook.write(self.step, {**record, "tokens": self.tokens, **rates})
        began, progress = self.started
        speed = (self._progress - progress) / (time.perf_counter() - began)
        per_token = f", {amount(rates['tokens_per_second'])} tokens/s" if self.tokens else ""
        length = f" ({self.tokens / self._length:.0%})" if self.config.tokens else f"/{self.config.steps}"
        logbook.say(
            f"step {self.step}{length}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{amount(rates['samples_per_second'])} samples/s{per_token}  data {record['data_wait']:.0%}  "
            f"{duration(max(0.0, self._length - self._progress) / speed)} left"
        )

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.task.model.state_dict(),
                "optimizer": optimizer_tensors(self.task.model, self.optimizers),
            }
            if self.ema is not None:
                tensors["ema"] = self.ema.module.state_dict()
            state = {
                "step": self.step,
                "tokens": self.tokens,
                "metrics": self.metrics,
                "config": dataclasses.asdict(self.config),
            }
            checkpoint.save(self.folder, self.step, tensors, state, self.files, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _resume(self, logbook: Logbook) -> None:
        processes, dtype = self.accelerator.num_processes, str(self.dtype).removeprefix("torch.")
        logbook.say(f"{self.folder}: {processes} process{'es' * (processes > 1)} on {self.device.type}, {dtype}")
        path = checkpoint.latest(self.folder)
        if path is not None:
            saved = checkpoint.load(path)
            before, now = flat(saved.state["config"]), flat(dataclasses.asdict(self.config))
            differing = [
                key
                for key in sorted(before | now)
                if before.get(key) != now.get(key) and not {key, key.partition(".")[0]} & self.config.may_change
            ]
            if differing:
                was, given = (", ".join(f"{key} {each.get(key)}" for key in differing) for each in (before, now))
                raise ValueError(f"{path} was made with {was}, this run has {given}; use another folder, or delete it")
            self.task.model.load_state_dict(saved.tensors["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(saved.tensors["ema"])
                self.ema.n_averaged.fill_(saved.state["step"])
            load_optimizer_tensors(self.task.model, self.optimizers, saved.tensors["optimizer"])
            self.step, self.tokens = saved.state["step"], saved.state["tokens"]
            self.metrics = saved.state["metrics"]
            logbook.say(f"going on from {path}")
        logbook.rewind(self.step)
        self.accelerator.wait_for_everyone()


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """The mean over updates of the weights and of what else a model learns, such as codebooks.

    Its decay rises to `decay`, so that short runs forget their start.
    """

    def follow(averages: Any, weights: Any, updates: Tensor | int) -> None:
        kept = min(decay, (1 + int(updates)) / (10 + int(updates)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, weights, 1 - kept)
        else:  # counters and the like
            torch._foreach_copy_(averages, weights)

    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True)


class Window:
    """What the updates since the last record came to."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self.parts: list[dict[str, float]] = []
        self.rate = self.norm = self.seconds = self.waited = 0.0
        self.tokens = 0

    def add(
        self, parts: dict[str, float], rate: float, norm: float, tokens: int, seconds: float, waited: float
    ) -> None:
        """Counts one update: its losses, rate, gradient norm, tokens, duration, and the wait for data in it."""
        self.parts.append(parts)
        self.rate, self.norm = rate, norm
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited

    def close(self) -> dict[str, Any]:
        """Means over updates, of each figure where it occurred; empty if there was no update. Starts anew."""
        if not self.parts:
            return {}
        of_process = {f"{update}/{name}": part for update, each in enumerate(self.parts) for name, part in each.items()}
        values: dict[str, list[float]] = {}
        for name, value in add_up(of_process).items():
            values.setdefault(name.partition("/")[2], []).append(value)
        record = {name: sum(each) / len(each) for name, each in sorted(values.items())} | {
            "lr": self.rate,
            "grad_norm": self.norm,
            "seconds": self.seconds,
            "data_wait": self.waited / self.seconds,
            "updates": len(self.parts),
            "new_tokens": self.tokens,
        }
        self._open()
        return record


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value of a nested config as JSON, by its dotted key."""
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: json.dumps(value)}
    return found
