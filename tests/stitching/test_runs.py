"""Runs: a model ends with the weights that did best, and a finished run counts for its own settings only."""

import dataclasses

import pytest
import torch

from fourm.model.connectors import Connector, ConnectorConfig
from fourm.stitching.pairs import Samples
from fourm.stitching.runs import Run
from fourm.training.optim import OptimConfig
from fourm.training.trainer import TrainConfig

TRAIN = TrainConfig(steps=6, batch_size=2, eval_every=2, save_every=0, log_every=0, spike_sigma=0, precision="fp32",
                    optim=OptimConfig(lr=0.1, warmup=0))  # fmt: skip


class Growing:
    def __init__(self):
        self.model = Connector(ConnectorConfig(kind="linear", input_dim=1, output_dim=1))

    def counts(self, batch):
        return torch.tensor([len(batch["keys"])])

    def loss(self, batch, counts):
        return {"loss": -self.model(batch["sides"]["a"]).sum()}


def test_a_run_keeps_its_best_and_is_made_once(tmp_path):
    seen, scores = [], iter([0.2, 0.9, 0.1])

    def watch(model):
        seen.append(model.network.weight.item())
        return {"score": next(scores)}, {"": 0.5 if len(seen) == 2 else 0.1}

    task, run = Growing(), Run(tmp_path, TRAIN, {"data": "these"}, "model")
    assert run.finished() is None
    best = run.fit(task, Samples({"a": torch.ones(3, 1)}, list("xyz")), watch)
    assert seen == sorted(set(seen)) and len(seen) == 3 and best.step == 4 and best.scores == {"": 0.5}
    assert task.model.network.weight.item() == seen[1]
    found = run.finish({"figure": 3}, task.model)
    assert found["figure"] == 3 and found["settings"]["train"]["steps"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "model", "result.json"]
    assert Run(tmp_path, TRAIN, {"data": "these"}, "model").finished() == found
    assert Run(tmp_path, TRAIN, {"data": "others"}, "model").finished() is None
    assert Run(tmp_path, dataclasses.replace(TRAIN, steps=7), {"data": "these"}, "model").finished() is None
    assert Run(tmp_path, TRAIN, {"data": "these"}, "space").finished() is None

    def broken(model):
        raise OSError("full")

    other = Run(tmp_path, TRAIN, {"data": "others"}, "model")
    with pytest.raises(OSError, match="full"):
        other.fit(Growing(), Samples({"a": torch.ones(3, 1)}, list("xyz")), broken)
    assert Run(tmp_path, TRAIN, {"data": "these"}, "model").finished() is None  # its model may be the other's by now
