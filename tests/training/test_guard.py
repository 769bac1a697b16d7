"""Updates that are not made: a run that skips k equals one that never had it."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fourm import checkpoint, logbook
from fourm.training.guard import LIMIT, WINDOW, Guard

spec = importlib.util.spec_from_file_location("tiny_guard", Path(__file__).with_name("tiny.py"))
tiny = sys.modules["tiny_guard"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def weights(trainer):
    saved = checkpoint.load(checkpoint.latest(trainer.folder))
    return {
        f"{group}/{name}": t.numpy().tobytes() for group, all_of in saved.tensors.items() for name, t in all_of.items()
    }


@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_update_leaves_no_trace(tmp_path, policy, optimizer):
    """Skipped or tried again and skipped, the result is that of a run which was told to leave the update out."""
    settings = {"ema": 0.9, "optimizer": optimizer}
    bad = tiny.train(tmp_path / "bad", spoil=6, non_finite=policy, **settings)
    without = tiny.train(tmp_path / "without", skip_steps="6:7", **settings)
    assert weights(bad) == weights(without) and bad.step == 12
    assert bad.guard.skipped == {"non_finite": 1} and without.guard.skipped == {"asked": 1}
    (event,) = [record for record in logbook.read(tmp_path / "bad") if "left_out" in record]
    assert event["left_out"] == 6 and event["why"] == "non_finite" and "0055" in event["samples"]
    assert event["modalities"] and all(name.startswith("loss") for name in event["modalities"])
    assert [r["skipped"] for r in logbook.read(tmp_path / "without") if "lr" in r] == [0, 0, 0, 1, 1, 1]


def test_rewind_mends_a_fault_of_the_machine(tmp_path, monkeypatch):
    """A loss that is only once not finite: the run equals one in which nothing happened."""
    flips = iter([False] * 6 + [True] + [False] * 99)
    monkeypatch.setattr("fourm.training.trainer.faults.spoils", lambda step: next(flips))
    mended = tiny.train(tmp_path / "mended", non_finite="rewind", ema=0.9)
    monkeypatch.undo()
    assert weights(mended) == weights(tiny.train(tmp_path / "whole", ema=0.9))
    mended, whole = (logbook.read(tmp_path / name) for name in ("mended", "whole"))
    assert [r["loss"] for r in mended if "loss" in r] == [r["loss"] for r in whole if "loss" in r]
    assert [(r["step"], r["rewound_from"]) for r in mended if "rewound_from" in r] == [(4, 6)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rewind_before_the_first_checkpoint(tmp_path, optimizer):
    """Also Muon's momentum, which is made in the first update, is taken back."""
    bad = tiny.train(tmp_path / "bad", spoil=2, non_finite="rewind", optimizer=optimizer)
    assert weights(bad) == weights(tiny.train(tmp_path / "without", skip_steps="2:3", optimizer=optimizer))


def test_buffers_learned_in_a_bad_update_are_put_back(tmp_path, monkeypatch):
    """A batch norm's averages take NaN up in the forward pass already."""

    class Task(tiny.TinyTask):
        def __init__(self, dropout=0.0):
            super().__init__(dropout)
            self.model.norm = torch.nn.BatchNorm1d(6)

    monkeypatch.setattr(tiny, "TinyTask", Task)
    bad = tiny.train(tmp_path / "bad", spoil=6, non_finite="skip")
    assert weights(bad) == weights(tiny.train(tmp_path / "without", skip_steps="6:7"))
    assert torch.isfinite(bad.task.model.norm.running_mean).all()


def test_data_that_stay_bad_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fourm.training.trainer.faults.spoils", lambda step: step >= 5)
    with pytest.raises(ValueError, match=rf"step 15: loss is not finite.*samples: 0120.*the {LIMIT + 1}th bad update"):
        tiny.train(tmp_path, steps=100, non_finite="skip")


def test_spike_by_hand():
    """Losses of mean 2 and deviation 0.1: 2.599 passes at 6 sigma, 2.601 does not; the first 127 are not judged."""
    guard = Guard(6.0)
    rise = [guard.judge(2.0 + 0.1 * (-1) ** i, 1.0) for i in range(WINDOW)]
    assert set(rise) == {"good"} and np.std(guard.losses) == pytest.approx(0.1)
    state = guard.state()
    assert guard.judge(2.601, 1.0) == "spike" and guard.skipped["spike"] == 1
    guard.load_state(state)
    assert guard.judge(2.599, 1.0) == "good" and guard.judge(-50.0, 1.0) == "good"  # a fall is no spike
    early = Guard(6.0)
    assert [early.judge(loss, 1.0) for loss in [1.0] * (WINDOW - 1) + [1e6]] == ["good"] * WINDOW
    still = Guard(6.0)
    assert {still.judge(0.5, 1.0) for _ in range(WINDOW)} == {still.judge(0.5001, 1.0)} == {"good"}
    assert still.judge(0.6, 1.0) == "spike"
    assert Guard(0.0).judge(float("inf"), 1.0) == Guard().judge(1.0, float("nan")) == "non_finite"


def test_new_level_is_accepted_soon():
    guard = Guard(6.0)
    rng = np.random.default_rng(0)
    for loss in 2 + 0.1 * rng.standard_normal(WINDOW):
        guard.judge(float(loss), 1.0)
    verdicts = [guard.judge(float(loss), 1.0) for loss in 8 + 0.1 * rng.standard_normal(20)]
    assert verdicts[0] == "spike" and verdicts[5:] == ["good"] * 15


def test_spike_is_skipped_and_logged(tmp_path):
    """Update 140 sees targets a hundred times as large."""

    class Loader(tiny.TinyLoader):
        def batches(self, start_step=0):
            for step, batch in enumerate(super().batches(start_step), start_step):
                yield batch | {"x": batch["x"] * (100 if step == 140 else 1)}

    loader, tiny.TinyLoader = tiny.TinyLoader, Loader
    try:
        trained = tiny.train(tmp_path, steps=150, log_every=10, save_every=50)
    finally:
        tiny.TinyLoader = loader
    (event,) = [record for record in logbook.read(tmp_path) if "left_out" in record]
    assert (event["left_out"], event["why"]) == (140, "spike") and trained.guard.skipped == {"spike": 1}


@pytest.mark.parametrize("text", ["5:5", "7:3", "a:b", "1:2:3", "-1", "5", "5:6,"])
def test_steps_written_wrongly(text):
    with pytest.raises(ValueError, match=r"skip_steps has .*, expected updates such as '1200:1300'"):
        Guard(skip_steps=text)


def test_termination_saves_and_goes_on_bit_for_bit(tmp_path):
    """Weights and records, of the update it was asked in too; its evaluation waits for the next start."""
    kill_at = [4]

    def evaluate(model, step):
        if step in kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"step": float(step)}

    settings = {"evaluators": {"val": evaluate}, "save_every": 100, "log_every": 6, "eval_every": 1}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        tiny.train(tmp_path / "parts", **settings)
    assert left.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.latest(tmp_path / "parts").name == "checkpoint-5"
    assert not any(r["step"] == 5 for r in logbook.read(tmp_path / "parts"))
    kill_at.clear()
    assert weights(tiny.train(tmp_path / "parts", **settings)) == weights(tiny.train(tmp_path / "whole", **settings))
    figures = ("step", "loss", "loss/0", "grad_norm", "val/step")
    parts, whole = ([[r.get(f) for f in figures] for r in logbook.read(tmp_path / each)] for each in ("parts", "whole"))
    assert parts == whole and [r[0] for r in whole if r[1]] == [6, 12]


def test_termination_of_the_whole_group(tmp_path):
    """As clusters do it: workers are asked to stop as well, and must not take the run with them."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny
from fourm.data.loader import Loader

class Samples(tiny.TinyLoader):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, kind = self.sample(i)
        return {{"x": torch.from_numpy(x), "kind": kind}}

def collate(samples, draws):
    return {{"x": torch.stack([s["x"] for s in samples]), "kind": torch.tensor([s["kind"] for s in samples])}}

tiny.TinyLoader = lambda size, *rest, **more: Loader(Samples(size), size, collate, 0, workers=2)
tiny.train({str(tmp_path)!r}, steps=100000, save_every=0, log_every=50)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout is not None
    while "step 50 " not in run.stdout.readline():
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGTERM)
    rest = run.communicate(timeout=60)[0]
    assert run.returncode == 143 and "the same command goes on" in rest
    assert checkpoint.latest(tmp_path) is not None


def test_checkpoint_of_other_data_is_refused(tmp_path, monkeypatch):
    whole = tiny.Trainer

    def with_prints(prints):
        monkeypatch.setattr(tiny, "Trainer", lambda *given: whole(*given, fingerprints=prints))

    with_prints({"data": "aaa", "modalities": "bbb"})
    tiny.train(tmp_path, steps=4)
    with_prints({"data": "ccc", "modalities": "bbb"})
    with pytest.raises(ValueError, match=r"other data.*: data \(was aaa, is ccc\);.*--accept_changes true"):
        tiny.train(tmp_path, steps=8)
    assert tiny.train(tmp_path, steps=8, accept_changes=True).step == 8
    assert tiny.train(tmp_path, steps=10).step == 10  # accepted is accepted
