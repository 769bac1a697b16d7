"""Faults on order, and what a save makes of each."""

import errno
import itertools
import os
import signal
import warnings

import pytest
import torch

from fourm import checkpoint, faults


def save(folder, step, keep=1):
    return checkpoint.save(folder, step, {"model": {"a": torch.full((9,), float(step))}}, {"step": step}, keep=keep)


@pytest.fixture
def order(monkeypatch):
    def set_variable(text):
        monkeypatch.setenv("FOURM_FAULT", text)
        monkeypatch.setattr(faults, "writes", itertools.count(1))

    monkeypatch.setenv("RANK", "1")
    return set_variable


def in_child(function, seconds=30.0):
    """How a fork of this process ends that calls a function; 17: still busy after so long."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(17))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_each_kind_at_its_step(order):
    faults.reach("step", 7)  # nothing ordered
    order("io@step:7, full@step:8,nan@step:9,kill@step:10,hang@step:11")
    faults.reach("step", 6)
    faults.reach("write")
    for step, code in ((7, errno.EIO), (8, errno.ENOSPC)):
        with pytest.raises(OSError, match="FOURM_FAULT") as raised:
            faults.reach("step", step)
        assert raised.value.errno == code
    faults.reach("step", 9)
    assert [faults.spoils(step) for step in (7, 8, 9, 10)] == [False, False, True, False]
    assert in_child(lambda: faults.reach("step", 9)) == 0
    assert in_child(lambda: faults.reach("step", 10)) == -signal.SIGKILL
    assert in_child(lambda: faults.reach("step", 11), 0.2) == 17


def test_only_on_its_rank(order):
    order("io@step:1@rank:0,nan@step:1@rank:1")
    faults.reach("step", 1)
    assert faults.spoils(1)


@pytest.mark.parametrize("text", ["kill", "kill@step", "explode@step:1", "nan@write:1", "io@step:-1", "io@step:1,"])
def test_unknown_order(order, text):
    order(text)
    with pytest.raises(ValueError, match=r"FOURM_FAULT holds .* allowed are kill, hang"):
        faults.reach("step", 0)


KILLED, FULL, BROKEN = ("kill", -signal.SIGKILL), ("full", errno.ENOSPC), ("io", errno.EIO)


# At step 1 the only checkpoint is replaced, at step 2 another one is made.
@pytest.mark.parametrize(("kind", "code", "step"), [(*KILLED, 1), (*KILLED, 2), (*FULL, 1), (*FULL, 2), (*BROKEN, 1)])
def test_save_survives_a_fault_at_each_write_point(tmp_path, order, monkeypatch, capfd, kind, code, step):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the order counts, not the disk
    for point in itertools.count(1):
        folder = tmp_path / str(point)
        order("")
        save(folder, 1)
        order(f"{kind}@write:{point}")

        def attempt(folder=folder):
            try:
                save(folder, step)
            except OSError as error:
                clear = f"{folder}/checkpoint-{step} is not written" in str(error) and (
                    kind != "full" or "it needs over 50 bytes, and" in str(error)
                )
                os._exit(error.errno if clear else 1)

        ended = in_child(attempt)
        left = sorted(path.name for path in folder.iterdir())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = checkpoint.load(checkpoint.latest(folder))
        assert found.state["step"] in (1, step) and (found.tensors["model"]["a"] == found.state["step"]).all()
        if kind != "kill":
            assert all(name.startswith("checkpoint-") or name.endswith((".removed", ".replaced")) for name in left)
        order("")
        save(folder, 3)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
        if ended == 0:
            if "FOURM_FAULT" not in capfd.readouterr().err:
                break
        else:
            assert ended == code
    assert point > 9 and found.state["step"] == step
