"""One run of a comparison: trained with the trainer, kept as it did best on the validation split, made only once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fourm import checkpoint, runtime
from fourm.checkpoint import read_json
from fourm.data.rewrite import write_durably
from fourm.stitching.pairs import SampleLoader, Samples
from fourm.training.tasks import Task
from fourm.training.trainer import TrainConfig, Trainer

# Figures of a model on the validation split, and the score of each of its parts by how the names of its weights begin.
Watch = Callable[[Any], tuple[dict[str, float], dict[str, float]]]


class Best:
    """Evaluator: keeps the weights that each part of a model did best with.

    Args:
        watch: What is measured.
        folder: Where they are kept.
        writes: Whether this process is the one of several that writes.

    Attributes:
        scores: The best ones, by part.
        weights: What they were reached with.
        step: When one was best last.
    """

    def __init__(self, watch: Watch, folder: Path, writes: bool = True):
        self.watch, self.folder, self.writes = watch, folder, writes
        self.scores, self.weights, self.step = dict[str, float](), dict[str, Tensor](), 0
        if found := checkpoint.latest(folder):
            opened = checkpoint.load(found)
            self.weights, self.scores = opened.tensors["model"], opened.state["scores"]
            self.step = opened.state["step"]

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """The figures."""
        figures, scores = self.watch(model)
        better = {part: score for part, score in scores.items() if score > self.scores.get(part, -1.0)}
        if better:
            state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(tuple(better))}
            self.weights |= {name: tensor.cpu().clone() for name, tensor in state.items()}
            self.scores, self.step = self.scores | better, step
            if self.writes:
                kept = {"scores": self.scores, "step": step}
                checkpoint.save(self.folder, step, {"model": self.weights}, kept, keep=1)
        return figures


class Run:
    """A run in its folder; a finished one, with `result.json`, is not made again.

    Args:
        folder: Its folder.
        train: How long and how.
        made: Fingerprints of what it is made with.
        kept: Name of the trained model's folder in it; default: none is kept.
    """

    def __init__(self, folder: Path, train: TrainConfig, made: Mapping[str, str], kept: str = ""):
        self.folder, self.train, self.made, self.kept = folder, train, made, kept
        self.settings = {**made, "train": json.loads(json.dumps(dataclasses.asdict(train)))}
        self.began = time.perf_counter()

    def finished(self) -> dict[str, Any] | None:
        """What it came to, if it was made before, with the same settings."""
        record = self.folder / "result.json"
        found = read_json(record) if record.is_file() and (self.folder / self.kept).exists() else {}
        return found if found.get("settings") == self.settings else None

    def fit(self, task: Task, samples: Samples, watch: Watch) -> Best:
        """Trains a task, and leaves its model with the weights that it did best with."""
        joined = runtime.accelerator()
        rank, processes, main = joined.process_index, joined.num_processes, joined.is_main_process
        loader = SampleLoader(samples, self.train.loader_batch(processes), self.train.seed, rank, processes)
        if main:
            (self.folder / "result.json").unlink(missing_ok=True)  # of another run, whose model is about to go
            if checkpoint.latest(self.folder) is None:  # what was best is of another run, too
                shutil.rmtree(self.folder / "best", ignore_errors=True)
        joined.wait_for_everyone()
        best = Best(watch, self.folder / "best", main)
        with contextlib.redirect_stdout(io.StringIO()):  # a comparison is a hundred of these
            Trainer(self.train, task, loader, {"val": best}, self.folder, fingerprints=self.made).fit()
        task.model.load_state_dict(task.model.state_dict() | best.weights)
        return best

    def finish(self, result: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """Writes down what it came to and the model that is kept, and removes what only the training needed."""
        seconds, joined = round(time.perf_counter() - self.began, 2), runtime.accelerator()
        found = {**result, "seconds": seconds, "settings": self.settings}
        joined.wait_for_everyone()
        if joined.is_main_process:
            if self.kept:
                model.save(self.folder / self.kept)
            write_durably(self.folder / "result.json", json.dumps(found))
            for path in [self.folder / "best", *self.folder.glob("checkpoint-*")]:
                shutil.rmtree(path)
        return found
