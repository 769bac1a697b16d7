"""How soon our recipe reaches the loss that the reference's recipe ends with: `python tools/time_to_loss.py`.

Both recipes train models of the same shape on the same data, in processes of one thread, each on a core of its own.
Both are judged by the held-out loss under the reference's masking, on the same batches, without calibration; ours
trains on that masking, too. Time is the CPU time of a process without evaluations: the wall-clock of an idle core.
The length of both runs is fixed beforehand: ours has to end, its schedule complete, at or below the loss that the
reference ends with. Needs the data of `make demo`. Results stay in `runs/bench/time_to_loss` and are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

from fourm import runtime
from fourm.cli import read
from fourm.data.loader import Loader
from fourm.modalities import TokenSpace
from fourm.model.fourm import FourM
from fourm.training.tasks import HeldOutLoss, MaskedTask
from fourm.training.trainer import Trainer
from fourm.verbs.train import Config, open_data

Curve = list[tuple[int, float, float]]  # updates, seconds, loss
RUNS, CHART = Path("runs/bench/time_to_loss"), Path(__file__).with_suffix(".png")
RECIPES = {
    "reference": ["--config=configs/train/earth-reference.yaml"],
    "ours": ["--config=configs/train/earth.yaml"],
}
# Options by size, with the lengths.
TINY = ["--model.size=tiny", "--model.decoder_depth=6"]
SIZES: dict[str, dict[str, list[str]]] = {
    "nano": {"reference": ["--steps=800"], "ours": ["--steps=160"]},
    "tiny": {"reference": ["--steps=120", *TINY], "ours": ["--steps=26", *TINY]},
}
# Ours, with one thing changed.
ABLATIONS = {
    "adamw": ["--optim.name=adamw", "--optim.lr=2e-3", "--optim.weight_decay=0.05"],
    "zero-init": ["--model.zero_init=true"],
    "cosine": ["--optim.schedule=cosine"],
    "padded": ["--model.packed=false"],
    "qk-norm": ["--model.qk_norm=true"],
    "token-loss": ["--loss=token"],
    "batch-16": ["--steps=320", "--batch_size=16"],
    "momentum-0.9": ["--optim.momentum=0.9"],
    "lr-0.01": ["--optim.lr=1e-2"],
}


class Job(NamedTuple):
    """One run: a recipe or ablation, a size of the model, and a seed."""

    name: str
    size: str
    seed: int

    @property
    def options(self) -> list[str]:
        """Of `fourm train`."""
        recipe = self.name if self.name in RECIPES else "ours"
        return [*RECIPES[recipe], f"--seed={self.seed}", *SIZES[self.size][recipe], *ABLATIONS.get(self.name, ())]

    @property
    def folder(self) -> Path:
        """Where the run and its result stand."""
        return RUNS / f"{self.size}-{self.name}-{self.seed}"


class Clock:
    """Evaluator: the held-out loss, and the CPU time that training took up to it."""

    def __init__(self, held_out: HeldOutLoss, folder: Path):
        self.held_out, self.folder = held_out, folder
        self.curve: Curve = []
        self.elsewhere = time.process_time()

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measures at a step."""
        began = time.process_time()
        figures = self.held_out(model, step)
        seconds, loss = began - self.elsewhere, figures["loss"]
        self.curve.append((step, seconds, loss))
        tqdm.write(f"{self.folder.name}: {step} updates, {seconds:.0f} s, {loss:.3f} nats", sys.stderr)
        self.elsewhere += time.process_time() - began
        return figures


def take_core(cores: Any) -> None:
    """Gives this process one of the cores, and torch one thread."""
    os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)


def train(job: Job) -> Curve:
    """Runs a job, unless it was: its curve."""
    result = job.folder / "curve.json"
    if result.exists():
        return [tuple(point) for point in json.loads(result.read_text())]
    reference = read(Config, RECIPES["reference"], "train")
    config = read(Config, job.options, "train")
    config = dataclasses.replace(config, masking=reference.masking, save_every=0, eval_every=-(-config.steps // 6))
    space = TokenSpace.from_yaml(config.modalities)
    runtime.seed_everything(config.seed, "model")
    model = FourM(config.model, space)
    (data, masker), (val, val_masker) = open_data(config, space, "train"), open_data(reference, space, "val")
    held_out = HeldOutLoss(MaskedTask(model), Loader(val, reference.batch_size, val_masker, 0), reference.val_batches)
    loader = Loader(data, config.batch_size, masker, config.seed)
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "output.txt").open("w") as output:
        clock = Clock(held_out, job.folder)
        with contextlib.redirect_stdout(output):
            Trainer(config, MaskedTask(model, config.loss), loader, {"val": clock}, job.folder).fit()
    result.write_text(json.dumps(clock.curve))
    return clock.curve


def run(jobs: Sequence[Job]) -> dict[Job, Curve]:
    """Runs jobs in their order, always one on each of two cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        cores = manager.Queue()
        for core in sorted(os.sched_getaffinity(0))[:2]:
            cores.put(core)
        with ProcessPoolExecutor(cores.qsize(), context, take_core, (cores,)) as pool:
            futures = {pool.submit(train, job): job for job in jobs}
            return {futures[done]: done.result() for done in tqdm(as_completed(futures), total=len(jobs), unit="runs")}


def show(curves: dict[Job, Curve]) -> None:
    """Prints what each run took and came to."""
    for job, curve in sorted(curves.items(), key=lambda item: (item[0].size, item[0].seed)):
        _, limit, target = curves[job._replace(name="reference")][-1]
        steps, seconds, loss = curve[-1]
        crossings = [f"after {passed:.0f} s ({passed / limit:.0%})" for _, passed, loss in curve if loss <= target]
        print(
            f"{job.size} seed {job.seed} {job.name:13} {steps:4} updates {seconds:5.0f} s ({seconds / limit:4.0%}), "
            f"{loss:.3f} nats; {target:.3f} {[*crossings, 'not reached'][0]}"
        )


def draw(curves: dict[Job, Curve], sizes: Sequence[str]) -> None:
    """Loss over time: a panel for each size, a line for each run."""
    figure, panels = plt.subplots(1, len(sizes), figsize=(9, 3.4), layout="constrained", squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        for name, colour in (("reference", "tab:gray"), ("ours", "tab:orange")):
            runs = [curve for job, curve in sorted(curves.items()) if (job.name, job.size) == (name, size)]
            for number, curve in enumerate(runs):
                _, seconds, losses = zip(*curve, strict=True)
                axes.plot([each / 60 for each in seconds], losses, color=colour, label="" if number else name)
                axes.plot(seconds[-1] / 60, losses[-1], "o", color=colour)
            if name == "reference":
                axes.axhline(sum(curve[-1][2] for curve in runs) / len(runs), color="black", linewidth=0.8, ls=":")
        axes.set_title(f"earth, {size}, {len(runs)} seeds")
        axes.set_xlabel("minutes of one core")
    panels[0, 0].set_ylabel("held-out loss, nats")
    panels[0, 0].legend()
    figure.savefig(CHART, dpi=80)


def main() -> None:
    """Runs, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablate", nargs="+", choices=ABLATIONS, default=[], help="runs these too, draws nothing")
    options = parser.parse_args()
    names = [*RECIPES, *options.ablate]
    curves = run([Job(name, size, seed) for seed in options.seeds for size in options.sizes for name in names])
    show(curves)
    if not options.ablate:
        draw(curves, options.sizes)


if __name__ == "__main__":
    main()
