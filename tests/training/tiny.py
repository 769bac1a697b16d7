"""A task and a loader small enough to check by hand, for this process or for one that a test starts."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fourm import runtime
from fourm.training.optim import OptimConfig
from fourm.training.tasks import HeldOutLoss
from fourm.training.trainer import TrainConfig, Trainer


class TinyLoader:
    """Epochs of 40 samples end to end; batch k of all processes together is a slice of that row."""

    def __init__(self, batch_size, rank=0, world_size=1, samples=40, spoil=None):
        self.size, self.rank, self.world, self.samples, self.spoil = batch_size, rank, world_size, samples, spoil

    def batches(self, start_step=0):
        step = start_step
        while True:
            whole = self.size * self.world
            drawn = [self.sample(i) for i in range(step * whole, (step + 1) * whole)][self.rank :: self.world]
            x, kind = np.stack([x for x, _ in drawn]), np.array([kind for _, kind in drawn])
            if self.spoil == step and self.rank == self.world - 1:
                x[-1] = np.nan
            keys = tuple(f"{i:04}" for i in range(step * whole, (step + 1) * whole))[self.rank :: self.world]
            yield {"x": torch.from_numpy(x), "kind": torch.from_numpy(kind), "keys": keys}
            step += 1

    def sample(self, i):
        order = np.random.Generator(np.random.Philox(key=(7, i // self.samples))).permutation(self.samples)
        draw = np.random.Generator(np.random.Philox(key=(8, int(order[i % self.samples]))))
        return draw.standard_normal(6).astype(np.float32), int(draw.integers(0, 3) == 0)


class TinyModel(nn.Module):
    """Two kinds of sample, each with its own head: a batch without a kind leaves parameters without a gradient."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm, self.dropout = nn.LayerNorm(6), nn.Dropout(dropout)
        self.kinds = nn.Embedding(2, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(6, 1)])  # nothing needs the third

    def forward(self, x, kind):
        for block in self.blocks:
            x = x + torch.tanh(block(x + self.kinds(kind)))
        return self.dropout(self.norm(x))


class TinyTask:
    """Squared error; the loss is the mean over kinds of each kind's mean."""

    def __init__(self, dropout=0.0):
        self.model = TinyModel(dropout)

    def counts(self, batch):
        return torch.bincount(batch["kind"], minlength=2).float()

    def loss(self, batch, counts):
        hidden, parts = self.model(batch["x"], batch["kind"]), {}
        for kind in batch["kind"].unique().tolist():
            here = batch["kind"] == kind
            wanted = batch["x"][here].prod(-1, keepdim=True)
            parts[f"loss/{kind}"] = (self.model.heads[kind](hidden[here]) - wanted).square().sum() / counts[kind]
        return {"loss": sum(parts.values()) / 2} | {name: part.detach() for name, part in parts.items()}


def train(folder, rank=0, world_size=1, dropout=0.2, spoil=None, evaluators=None, **settings):
    """Trains the tiny task from the same start; the trainer, with the last figures in `metrics`."""
    optim = OptimConfig(lr=0.02, name=settings.pop("optimizer", "adamw"), weight_decay=0.1)
    settings = {"steps": 12, "batch_size": 8, "save_every": 4, "eval_every": 5, "log_every": 3} | settings
    config = TrainConfig(optim=optim, precision="fp32", **settings)
    runtime.seed_everything(0, "init")
    loader = TinyLoader(config.loader_batch(world_size), rank, world_size, spoil=spoil)
    trainer = Trainer(config, TinyTask(dropout), loader, evaluators or {}, folder)
    trainer.fit()
    return trainer


def held_out(batches):
    """An evaluator of its own model."""
    return {"val": HeldOutLoss(TinyTask(), TinyLoader(5), batches)}


if __name__ == "__main__":  # one of several processes
    folder, joined = Path(sys.argv[1]), runtime.accelerator()
    rank, world_size = joined.process_index, joined.num_processes
    for name, sharded in (("shards", "true"), ("good", "false")):
        os.environ["ACCELERATE_USE_FSDP"] = sharded
        train(folder / name, rank, world_size, dropout=0.0, accumulate=2, ema=0.9, evaluators=held_out(3))
    try:
        train(folder / "bad", rank, world_size, spoil=6)
    except ValueError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))
    runtime.finish(joined)
