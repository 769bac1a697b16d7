"""Two real processes over gloo."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fourm import checkpoint, logbook

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder in which two processes have trained, started as a launcher starts them, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(TINY), str(folder), rank, "2"],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return folder, outputs


def test_two_processes_equal_one(tmp_path, two):
    """With accumulation, and with samples of a kind that only one process has: the other leaves a head unused."""
    spec = importlib.util.spec_from_file_location("tiny_alone", TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    alone = tiny.train(tmp_path, dropout=0.0, ema=0.9, evaluators=tiny.held_out(3))
    folder, outputs = two
    assert "2 processes on cpu" in outputs[0] and "step 12/12" in outputs[0] and "step" not in outputs[1]
    one, other = checkpoint.load(tmp_path / "checkpoint-12"), checkpoint.load(folder / "good" / "checkpoint-12")
    for group in one.tensors:
        for name, tensor in one.tensors[group].items():
            error = (tensor - other.tensors[group][name]).abs().max().item()
            assert error <= 1e-4 * tensor.abs().max().item() + 1e-6, (group, name, error)
    assert other.state["metrics"] == pytest.approx(alone.metrics, rel=1e-4) and "val/loss/1" in alone.metrics
    fields = ("loss", "loss/0", "loss/1", "grad_norm")
    for a, b in zip(logbook.read(tmp_path), logbook.read(folder / "good"), strict=True):
        if "loss" in a:
            assert [a[field] for field in fields] == pytest.approx([b[field] for field in fields], rel=1e-4)


def test_all_processes_stop_where_one_has_a_bad_sample(two):
    folder, _ = two
    messages = [(folder / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert "loss" in messages[1] and "0055" in messages[1] and "another process" in messages[0]
    assert all(message.startswith("step 6: ") and "is not finite" in message for message in messages)
    assert checkpoint.latest(folder / "bad").name == "checkpoint-4"
