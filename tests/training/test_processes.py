"""Two real processes over gloo."""

import importlib.util
from pathlib import Path

import pytest

from fourm import checkpoint, logbook

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory, launch):
    """A folder in which two processes have trained, started as a launcher starts them, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    outputs = launch(2, TINY, folder)
    return folder, outputs


@pytest.mark.parametrize("how", ["good", "shards"])
def test_two_processes_equal_one(tmp_path, two, how):
    """With accumulation, and with samples of a kind that only one process has: the other leaves a head unused.

    A head that no process uses rests, and does not decay.
    """
    spec = importlib.util.spec_from_file_location("tiny_alone", TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    alone = tiny.train(tmp_path, dropout=0.0, ema=0.9, evaluators=tiny.held_out(3))
    folder, outputs = two
    assert "2 processes on cpu" in outputs[0] and "step 12 " in outputs[0] and "step" not in outputs[1]
    one, other = checkpoint.load(tmp_path / "checkpoint-12"), checkpoint.load(folder / how / "checkpoint-12")
    for group in one.tensors:
        for name, tensor in one.tensors[group].items():
            error = (tensor - other.tensors[group][name]).abs().max().item()
            assert error <= 1e-4 * tensor.abs().max().item() + 1e-6, (group, name, error)
    assert other.state["metrics"] == pytest.approx(alone.metrics, rel=1e-4) and "val/loss/1" in alone.metrics
    fields = ("loss", "loss/0", "loss/1", "grad_norm")
    for a, b in zip(logbook.read(tmp_path), logbook.read(folder / how), strict=True):
        if "loss" in a:
            assert [a[field] for field in fields] == pytest.approx([b[field] for field in fields], rel=1e-4)


def test_all_processes_stop_where_one_has_a_bad_sample(two):
    folder, _ = two
    messages = [(folder / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]  # both name the batch of the one that has it, 0048 is the other's
    assert messages[0].startswith("step 6: loss, loss/") and "is not finite" in messages[0]
    assert "0055" in messages[0] and "0048" not in messages[0]
    assert checkpoint.latest(folder / "bad").name == "checkpoint-4"
