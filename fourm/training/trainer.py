"""The one loop: evaluate, save, stop?, step, log.

A run is a function of its config and data. Update k draws from generators seeded by (seed, k) and trains on the
loader's batches from `k * accumulate` on, so nothing but weights, optimiser state, counters and the last losses has to
be remembered, and a run that was interrupted goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import gather_object, send_to_device
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fourm import checkpoint, faults, runtime
from fourm.logbook import Logbook
from fourm.training.guard import LIMIT, Guard, Verdict
from fourm.training.optim import (
    OptimConfig,
    build_optimizers,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from fourm.training.parallel import Parallel, local, read
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
        permanent_every: Checkpoints of updates that this divides are never removed; 0 for none.
        non_finite: What an update with a loss or gradient that is not finite does: `raise` an error, `skip` the update,
            or `rewind` to the newest checkpoint, in case the machine was at fault, and skip it if it fails again.
        spike_sigma: Skip updates whose loss lies so many standard deviations above the mean of the last 128; 0: none.
        skip_steps: Updates to leave out, such as `1200:1300` or `7:8, 1200:1300`; their samples count as seen.
        accept_changes: Go on although data, tokenizers or modality table are not those the run was made with.
        seed: Of everything random.
        workers: Processes that load data.
        precision: Of matrix products; `auto` is bf16 wherever the hardware has it.
        compile: Compile the task with `torch.compile`; of a sharded model each block.
        checkpointing: Encoder and decoder blocks keep their inputs only, and compute the rest again for the backward
            pass: less memory for more time.
        trackers: What the log is mirrored to, beside `metrics.jsonl`.
        project: Name of the project there.
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
    permanent_every: int = 0
    non_finite: Literal["raise", "skip", "rewind"] = "raise"
    spike_sigma: float = 6.0
    skip_steps: str = ""
    accept_changes: bool = False
    seed: int = 0
    workers: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    checkpointing: bool = False
    trackers: list[Literal["wandb", "trackio", "tensorboard"]] = field(default_factory=list)
    project: str = "fourm"

    # Keys that may differ when a run goes on: its length, what is written down when, and by how many it is made.
    may_change: ClassVar[frozenset[str]] = frozenset(
        [
            "steps",
            "tokens",
            "eval_every",
            "save_every",
            "log_every",
            "keep",
            "permanent_every",
            "non_finite",
            "spike_sigma",
            "skip_steps",
            "accept_changes",
            "trackers",
            "project",
            "accumulate",
            "workers",
            "compile",
            "checkpointing",
        ]
    )

    @classmethod
    def of(cls, config: TrainConfig) -> TrainConfig:
        """Those keys of a verb's config that say how it trains."""
        return TrainConfig(**{each.name: getattr(config, each.name) for each in dataclasses.fields(TrainConfig)})

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
    """What DDP and FSDP wrap: its forward is the task's loss."""

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

    SIGTERM, which clusters send before they take a machine away, makes it save after the update it is in, and leave.

    Args:
        config: How long and how.
        task: What.
        loader: Batches of `config.loader_batch(processes)` samples for this process.
        evaluators: Held-out measurements by name; each figure is logged as `<name>/<figure>`. They get the moving
            average of the model where there is one, in evaluation mode and without gradients.
        folder: The run's folder.
        files: Text files to put into every checkpoint, such as the `config.json` that rebuilds the model.
        fingerprints: Of what the run is made with, by name, such as data; checkpoints made with others are refused.
        flops_per_token: Of products that a token's loss and gradients need, for the record; 0 if unknown.
        rest: Takes the gradients of weights that do not move, given how far the run is and its length.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        loader: Loader,
        evaluators: Mapping[str, Evaluator],
        folder: str | Path,
        files: Mapping[str, str] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        flops_per_token: float = 0.0,
        rest: Callable[[float, float], None] | None = None,
    ):
        self.config, self.task, self.loader = config, task, loader
        self.evaluators, self.folder, self.files = evaluators, Path(folder), files
        self.fingerprints, self.flops_per_token, self.rest = dict(fingerprints or {}), flops_per_token, rest
        self.accelerator = runtime.accelerator()
        self.device = self.accelerator.device
        config.loader_batch(self.accelerator.num_processes)
        if config.optim.lazy_tables and (self.accelerator.num_processes > 1 or config.compile):
            raise ValueError("optim.lazy_tables makes sparse gradients, which need one process and `compile: false`")
        self.dtype = runtime.autocast_dtype(config.precision, self.device)
        step = Step(task, self.dtype)
        wanted = (config.compile, config.checkpointing)
        self.parallel = Parallel(self.accelerator, step, task.model, self.dtype, *wanted)
        self.optimizers = build_optimizers(task.model, config.optim)
        self.ema = moving_average(self.parallel.storage(), config.ema) if config.ema else None
        self._final: nn.Module | None = None
        self.guard = Guard(config.spike_sigma, config.skip_steps)
        self.again: set[int] = set()  # updates the run was rewound for
        # What a forward pass in training may change, such as codebooks.
        self.buffers = [
            (module, name)
            for module in task.model.modules()
            for name, _ in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]
        self.step, self.tokens = 0, 0
        self.owed = False  # an evaluation
        self.metrics: dict[str, float] = {}
        self.window = Window()
        self.terminated = False  # this process was asked to stop
        self.stopping = False  # all know of it
        self.started = (time.perf_counter(), 0.0)

    def fit(self) -> dict[str, float]:
        """Trains to the end.

        Returns:
            The figures of the last evaluation.

        Raises:
            ValueError: A loss or gradient that is not finite, or a checkpoint of another run in the folder.
            SystemExit: With status 143, after SIGTERM.
        """
        config, writes = self.config, self.accelerator.is_main_process
        with (
            self._listening(),
            Logbook(self.folder, config.trackers, config.project, dataclasses.asdict(config), writes) as logbook,
            contextlib.ExitStack() as opened,
        ):
            self._resume(logbook)
            first = self.step
            self.started = (time.perf_counter(), self._progress)
            updates = opened.enter_context(contextlib.closing(self._updates(first)))
            if config.non_finite == "rewind" and not first:
                self._save()  # something to rewind to
            while True:
                stops = self.stopping and not self._done  # what is slow has to wait
                if (self.step > first or self.owed) and self._due(config.eval_every) and not stops:
                    self._evaluate(logbook)
                if self.step > first and (self._due(config.save_every) or stops):
                    self.owed = stops and self._due(config.eval_every)
                    self._save()
                if stops:
                    logbook.say(f"stopped after step {self.step}; the same command goes on from there")
                if stops or self._done:
                    break
                failed = self.step
                if not self._update(updates, logbook):  # the machine may have been at fault
                    opened.close()
                    self._resume(logbook)
                    logbook.write(self.step, {"rewound_from": failed})
                    first, self.started = self.step, (time.perf_counter(), self._progress)
                    updates = opened.enter_context(contextlib.closing(self._updates(first)))
                    continue
                if self._due(config.log_every) or self._due(config.save_every):
                    self._log(logbook)
        if not self._done:
            runtime.finish(self.accelerator, 143)
        self._final = self._whole()
        return self.metrics

    @contextlib.contextmanager
    def _listening(self) -> Generator[None, None, None]:
        """Notes SIGTERM instead of dying of it; only a program's first thread can."""

        def stop(*_: Any) -> None:
            self.terminated = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @property
    def final_model(self) -> nn.Module:
        """The model to keep: its moving average where there is one. If the model is sharded, of the end of `fit`."""
        return self._final or self._whole()

    def _whole(self) -> nn.Module:
        return self.parallel.whole(self.task.model if self.ema is None else self.ema.module)

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

    def _next(self, updates: Generator[tuple[list[Any], int], None, None]) -> tuple[list[Any], int, float]:
        """Batches of this process, their tokens, and the wait for them; all processes stop where one gets none."""
        began, broken = time.perf_counter(), None
        try:
            batches, tokens = next(updates)
        except Exception as error:  # whatever data do
            broken = error
        waited = time.perf_counter() - began
        lacking = int(self.accelerator.reduce(torch.tensor(int(broken is not None), device=self.device), "sum"))
        if broken is not None:
            raise broken
        if lacking:
            raise ValueError(f"step {self.step}: {lacking} other process(es) got no batch, and say why")
        return batches, tokens, waited

    def _update(self, updates: Generator[tuple[list[Any], int], None, None], logbook: Logbook) -> bool:
        """One update of the weights, on the batches of all processes; false if the run is to be rewound instead."""
        config, rank = self.config, self.accelerator.process_index
        faults.reach("step", self.step)
        began = time.perf_counter()
        batches, tokens, waited = self._next(updates)
        runtime.seed_everything(config.seed, "update", self.step, rank)

        counts = torch.stack([self.task.counts(batch) for batch in batches]).sum(0)
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        said = torch.tensor([tokens, self.terminated], dtype=exact, device=self.device)
        shared = self.accelerator.reduce(torch.cat([counts.to(exact), said]), "sum")
        counts, seen, self.stopping = shared[:-2].to(counts.dtype), int(shared[-2]), bool(shared[-1])
        if config.tokens and not seen:
            raise ValueError("the run's length is given in tokens, but its batches hold none; give `steps` instead")
        # Rates are those of the update's middle: neither the first nor the last update is made with rate 0.
        middle = self._progress + (seen if config.tokens else 1) / 2
        rate = learning_rate(config.optim, middle, self._length)
        set_learning_rate(self.optimizers, rate)
        parts: dict[str, float] = {}
        verdict: Verdict = "asked"
        if not self.guard.leaves_out(self.step):
            learned = [getattr(module, name).clone() for module, name in self.buffers]
            parts, losses = self._backward(batches, counts)
            if self.rest is not None:
                self.rest(self._progress, self._length)
            norm = float(clip_gradients(self.task.model, config.optim.clip))
            total = self.accelerator.reduce(torch.tensor(parts["loss"], device=self.device), "sum")
            verdict = self.guard.judge(float(total), norm)
        if verdict == "good":
            for optimizer in self.optimizers:
                optimizer.step()
        elif verdict != "asked":
            for (module, name), before in zip(self.buffers, learned, strict=True):
                getattr(module, name).copy_(before)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        bad = verdict in ("non_finite", "spike")
        if bad and not self._passes_over(verdict, float(total), norm, losses, batches, logbook):
            return False
        self.step, self.tokens = self.step + 1, self.tokens + seen
        seconds = time.perf_counter() - began
        if verdict == "good":
            if self.ema is not None:
                self.ema.update_parameters(self.task.model)
            self.window.add(parts, rate, norm, seen, seconds, waited)
        else:
            self.window.pass_over(seen, seconds, waited)
        return True

    def _backward(self, batches: list[Any], counts: Tensor) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Makes the gradients; figures of this process's part of the update, and of each of its batches."""
        self.task.model.train()
        spoilt = float("nan") if faults.spoils(self.step) else 1.0
        each: list[dict[str, float]] = []
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with self.parallel.batch(last):
                losses = self.parallel.step(batch, counts)
                losses["loss"] = losses["loss"] * spoilt
                # DDP and FSDP average gradients over processes; these losses are parts of a sum.
                self.accelerator.backward(losses["loss"] * self.accelerator.num_processes)
            values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
            each.append(dict(zip(losses, values, strict=True)))
        parts: dict[str, float] = {}
        for name, value in ((name, value) for losses in each for name, value in losses.items()):
            parts[name] = parts.get(name, 0.0) + value
        return parts, each

    def _passes_over(
        self,
        verdict: Verdict,
        loss: float,
        norm: float,
        losses: list[dict[str, float]],
        batches: list[Any],
        logbook: Logbook,
    ) -> bool:
        """Says what is wrong with this update, whichever process met it; false if the run is to be rewound.

        Raises:
            ValueError: It is not finite, and `non_finite` is `raise`; or too many updates in a row were not good.
        """
        suspects = [number for number, each in enumerate(losses) if not all(map(math.isfinite, each.values()))]
        if verdict == "non_finite" and math.isfinite(loss):  # only the gradient is not
            suspects = list(range(len(batches)))
        where = {name for number in suspects for name, value in losses[number].items() if not math.isfinite(value)}
        keys = [key for number in suspects for key in keys_of(batches[number])]
        met = gather_object([(sorted(where), keys)])
        names = sorted({name for each, _ in met for name in each})
        samples = [key for _, each in met for key in each]
        what = f"{', '.join(names) or 'the gradient'} is not finite" if verdict == "non_finite" else "the loss leaps"
        what += f" (loss {loss:.4g}, gradient norm {norm:.4g})"
        what += f"; samples: {', '.join(samples) or 'unnamed'}" if verdict == "non_finite" else ""
        if verdict == "non_finite" and self.config.non_finite == "raise":
            raise ValueError(f"step {self.step}: {what}")
        if self.guard.in_a_row > LIMIT:
            raise ValueError(f"step {self.step}: {what}; it is the {self.guard.in_a_row}th bad update in a row")
        rewinds = verdict == "non_finite" and self.config.non_finite == "rewind" and self.step not in self.again
        logbook.say(f"step {self.step} is {'tried again' if rewinds else 'skipped'}: {what}")
        if rewinds:
            self.again.add(self.step)
            return False
        event = {"left_out": self.step, "why": verdict, "modalities": names, "samples": samples, "loss_then": loss}
        logbook.write(self.step + 1, event)
        return True

    def _evaluate(self, logbook: Logbook) -> None:
        self.owed = False
        if not self.evaluators:
            return
        model = self._whole().eval()
        found: dict[str, Any] = {}
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for name, evaluator in self.evaluators.items():
                runtime.seed_everything(self.config.seed, "evaluate", name)
                found |= {f"{name}/{figure}": value for figure, value in evaluator(model, self.step).items()}
        pictures = {name: value for name, value in found.items() if isinstance(value, Image.Image)}
        self.metrics = {name: value for name, value in found.items() if name not in pictures}
        if pictures:
            logbook.pictures(self.step, pictures)
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
        record |= {
            "samples_per_second": record.pop("updates") * self.config.batch_size / seconds,
            "tokens_per_second": record.pop("new_tokens") / seconds,
            "tokens": self.tokens,
            "skipped": self.guard.skipped.total(),
        }
        if self.flops_per_token and (peak := runtime.peak_flops(self.device, self.dtype)):
            used = record["tokens_per_second"] * self.flops_per_token
            record["mfu"] = used / (peak * self.accelerator.num_processes)
        logbook.write(self.step, record)
        began, progress = self.started
        speed = (self._progress - progress) / (time.perf_counter() - began)
        left = max(0.0, self._length - self._progress) / speed
        logbook.progress(self.step, self._progress / self._length, record, left)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "metrics": self.metrics,
            "averaged": int(self.ema.n_averaged) if self.ema is not None else 0,
            "owed": self.owed,
            "window": self.window.state(),
            "guard": self.guard.state(),
            "fingerprints": self.fingerprints,
            "config": dataclasses.asdict(self.config),
        }
        checkpoint.save(
            self.folder,
            self.step,
            self._tensors(),
            state,
            self.files,
            self.config.keep,
            self.config.permanent_every,
            self.accelerator.is_main_process,
            self.parallel.agree,
            self.parallel.write,
        )

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds."""
        model = self.task.model
        tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, self.optimizers)}
        return tensors if self.ema is None else tensors | {"ema": self.ema.module.state_dict()}

    def _resume(self, logbook: Logbook) -> None:
        processes, dtype = self.accelerator.num_processes, str(self.dtype).removeprefix("torch.")
        logbook.say(f"{self.folder}: {processes} process{'es' * (processes > 1)} on {self.device.type}, {dtype}")
        path = self.parallel.latest(self.folder)
        if path is not None:
            state = checkpoint.read_json(path / "state.json")
            self._refuse_others(path, state)
            model = self.task.model
            model.load_state_dict(read(path / "model.safetensors", model.state_dict().get))
            if self.ema is not None:
                self.ema.module.load_state_dict(read(path / "ema.safetensors", self.ema.module.state_dict().get))
                self.ema.n_averaged.fill_(state["averaged"])
            owner = dict(model.named_parameters())
            moments = read(path / "optimizer.safetensors", lambda name: owner.get(name.partition("/")[2]))
            load_optimizer_tensors(model, self.optimizers, moments)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.step, self.tokens = state["step"], state["tokens"]
            self.metrics, self.owed = state["metrics"], state["owed"]
            self.guard.load_state(state["guard"])
            self.window = Window(state["window"], self.accelerator.is_main_process)
            logbook.say(f"going on from {path}")
        logbook.rewind(self.step)
        self.accelerator.wait_for_everyone()

    def _refuse_others(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raises a ValueError if a checkpoint is of another run, or of other data than this run has."""
        before = flat(defaults(self.config)) | flat(state["config"])
        now = flat(dataclasses.asdict(self.config))
        differing = [
            key
            for key in sorted(before | now)
            if before.get(key) != now.get(key) and not {key, key.partition(".")[0]} & self.config.may_change
        ]
        if differing:
            was, given = (", ".join(f"{key} {each.get(key)}" for key in differing) for each in (before, now))
            raise ValueError(f"{path} was made with {was}, this run has {given}; use another folder, or delete it")
        made = state["fingerprints"]
        changed = [name for name in sorted(made | self.fingerprints) if made.get(name) != self.fingerprints.get(name)]
        if changed and not self.config.accept_changes:
            each = ", ".join(f"{name} (was {made.get(name)}, is {self.fingerprints.get(name)})" for name in changed)
            raise ValueError(
                f"{path} was made with other data, tokenizers or modalities: {each}; use another folder, or go on all "
                "the same with `--accept_changes true`"
            )


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """The mean over updates of the weights and of what else a model learns, such as codebooks.

    Its decay rises to `decay`, so that short runs forget their start.
    """

    def follow(averages: Any, weights: Any, updates: Tensor | int) -> None:
        kept = min(decay, (1 + int(updates)) / (10 + int(updates)))
        averages, weights = (list(map(local, each)) for each in (averages, weights))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, weights, 1 - kept)
        else:  # counters and the like
            torch._foreach_copy_(averages, weights)

    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True)


class Window:
    """What the updates since the last record came to.

    Args:
        state: What a window of an earlier process came to, for all processes.
        main: Whether this is the process that goes on with it.
    """

    def __init__(self, state: Mapping[str, Any] | None = None, main: bool = True) -> None:
        self._open()
        if state is not None:
            vars(self).update(state, parts=[dict(part) if main else {} for part in state["parts"]])

    def _open(self) -> None:
        self.parts: list[dict[str, float]] = []
        self.rate = self.norm = self.seconds = self.waited = 0.0
        self.tokens = self.updates = 0

    def add(
        self, parts: dict[str, float], rate: float, norm: float, tokens: int, seconds: float, waited: float
    ) -> None:
        """Counts one update: its losses, rate, gradient norm, tokens, duration, and the wait for data in it."""
        self.parts.append(parts)
        self.rate, self.norm = rate, norm
        self.pass_over(tokens, seconds, waited)

    def pass_over(self, tokens: int, seconds: float, waited: float) -> None:
        """Counts one update that was not made."""
        self.updates += 1
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on, as JSON can hold it; all processes must ask for it."""
        parts: list[dict[str, float]] = [{} for _ in self.parts]
        for name, value in self._sums().items():
            update, _, figure = name.partition("/")
            parts[int(update)][figure] = value
        return {**vars(self), "parts": parts}

    def _sums(self) -> dict[str, float]:
        """Figures of each update over all processes, as `<update>/<figure>`."""
        return add_up({f"{i}/{name}": part for i, each in enumerate(self.parts) for name, part in each.items()})

    def close(self) -> dict[str, Any]:
        """Means over updates, of each figure where it occurred; empty if there was no update. Starts anew."""
        if not self.updates:
            return {}
        values: dict[str, list[float]] = {}
        for name, value in self._sums().items():
            values.setdefault(name.partition("/")[2], []).append(value)
        record = {name: sum(each) / len(each) for name, each in sorted(values.items())}
        if self.parts:
            record |= {"lr": self.rate, "grad_norm": self.norm}
        record |= {
            "seconds": self.seconds,
            "data_wait": self.waited / self.seconds,
            "updates": self.updates,
            "new_tokens": self.tokens,
        }
        self._open()
        return record


def defaults(config: Any) -> dict[str, Any]:
    """Defaults of a config's fields, and of configs in it: what a run had that began before a field was there."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            found[each.name] = defaults(value)
        elif each.default is not dataclasses.MISSING:
            found[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            found[each.name] = each.default_factory()
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value of a nested config as JSON, by its dotted key."""
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: json.dumps(value)}
    return found
