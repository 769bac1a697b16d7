import errno
import json
import os
import resource
import shutil
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fourm import checkpoint

TENSORS = {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}, "optimizer": {"x/a": torch.ones(2)}}


def save(folder, step, keep=2):
    return checkpoint.save(folder, step, TENSORS, {"step": step, "third": 1 / 3}, {"config.json": "{}"}, keep)


def test_round_trip(tmp_path):
    tied = torch.randn(3, 4)
    groups = {"model": {"one": tied, "two": tied, "turned": tied.T, "empty": torch.zeros(0), "half": tied.bfloat16()}}
    path = checkpoint.save(tmp_path, 7, groups, {"third": 1 / 3, "none": None})
    loaded = checkpoint.load(path)
    assert path.name == "checkpoint-7" and loaded.state == {"third": 1 / 3, "none": None}
    for name, tensor in groups["model"].items():
        again = loaded.tensors["model"][name]
        assert again.dtype == tensor.dtype and torch.equal(again, tensor)


def test_newest_by_number_and_rotation(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (8, 9, 10, 100):
        save(tmp_path, step)
    assert checkpoint.latest(tmp_path).name == "checkpoint-100"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_damaged_file_is_named_and_the_previous_one_used(tmp_path, name, harm):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-1] if harm == "cut" else content)
    with pytest.warns(UserWarning, match=r"checkpoint-2 is not a complete checkpoint"):
        assert checkpoint.latest(tmp_path).name == "checkpoint-1"
    with pytest.raises(ValueError, match="checkpoint-2 is not a complete checkpoint"):
        checkpoint.load(tmp_path / "checkpoint-2")


def _die_at(point):
    """Ends the process, as a power cut would, at its point-th call to the file system that changes anything."""
    seen = 0

    def wrap(function):
        def counted(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == point:
                os._exit(9)
            return function(*args, **kwargs)

        return counted

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))
    checkpoint.save_file = wrap(checkpoint.save_file)


@pytest.mark.parametrize("step", [1, 2])  # the only checkpoint is replaced; another one is made
def test_killed_at_each_change_of_the_disk(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the order counts, not the disk
    survived, points = False, 0
    while not survived:
        points += 1
        folder = tmp_path / str(points)
        save(folder, 1, keep=1)
        child = os.fork()
        if child == 0:
            try:
                _die_at(points)
                save(folder, step, keep=1)
            except BaseException:
                os._exit(8)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9)
        survived = code == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing half-written bears a checkpoint's name
            found = checkpoint.latest(folder)
        loaded = checkpoint.load(found)
        assert loaded.state in ({"step": 1, "third": 1 / 3}, {"step": step, "third": 1 / 3})
        save(folder, 3, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{loaded.state['step']}", "checkpoint-3"]
    assert loaded.state["step"] == step and points > 15


def test_permanent_ones_stay_and_do_not_count(tmp_path):
    for step in range(1, 9):
        checkpoint.save(tmp_path, step, {}, {}, keep=2, permanent_every=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-3", "checkpoint-6", "checkpoint-7", "checkpoint-8"]
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, step, {}, {}, keep=0)
    assert len(list(tmp_path.iterdir())) == 7


def test_damaged_later_one_does_not_push_out_sound_ones(tmp_path):
    save(tmp_path, 4)
    (save(tmp_path, 8) / "model.safetensors").write_bytes(b"")
    save(tmp_path, 5, keep=1)  # the run went on from 4
    with pytest.warns(UserWarning, match="checkpoint-8 is not a complete checkpoint"):
        assert checkpoint.latest(tmp_path).name == "checkpoint-5"


def test_damaged_ones_do_not_count_once_the_run_goes_on(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoint-4" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="checkpoint-4 is not a complete"):
        assert checkpoint.latest(tmp_path, tidy=True).name == "checkpoint-2"
    save(tmp_path, 6)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-2", "checkpoint-6", "damaged-checkpoint-4"}


def test_no_sound_checkpoint_is_no_new_start(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
        (tmp_path / f"checkpoint-{step}" / checkpoint.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is complete \(checkpoint-4: .*checkpoint-2: .*delete them"):
        checkpoint.latest(tmp_path, tidy=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_no_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=40)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(checkpoint, "save_file", None)
    with pytest.raises(
        OSError, match=r"checkpoint-2 is not written: .*No space.* needs over 94 bytes, and 40 are free"
    ):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_disk_that_is_full_halfway(tmp_path):
    """safetensors' own error, on a disk that has less room than it says: a limit on the size of files does the same."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            checkpoint.save(tmp_path, 2, {"model": {"large": torch.zeros(2000)}}, {})
        except OSError as error:
            os._exit(error.errno if f"{tmp_path}/checkpoint-2 is not written" in str(error) else 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_several_processes_write_one(tmp_path):
    """Two processes, as threads: each writes a file."""
    world = threading.Barrier(2, timeout=20)
    votes = {}

    def process(rank, spoil=False):
        def agree(ok):
            votes[rank] = ok
            world.wait()
            together = all(votes.values())
            world.wait()
            return together

        def write(file, group):
            if rank == (file.stem == "part"):
                checkpoint.save_file(group, file)
                if rank and spoil:
                    raise OSError(5, "broken")

        groups = {"model": {"a": torch.ones(2)}, "part": {"b": torch.ones(3)}}
        try:
            checkpoint.save(tmp_path, 2 if spoil else 1, groups, {}, main=rank == 0, agree=agree, write=write)
        except OSError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, (0, 1))) == [None, None]
        errors = list(pool.map(process, (0, 1), (True, True)))
    assert "another process" in errors[0] and "broken" in errors[1]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    path = checkpoint.latest(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest) == ["model.safetensors", "part.safetensors", "state.json"]
    assert manifest["part.safetensors"] == checkpoint._fingerprint(path / "part.safetensors")
    (path / "part.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part.safetensors is missing"):
        checkpoint.load(path)


def test_pickle_in_the_place_of_tensors_is_refused(tmp_path):
    """A checkpoint whose manifest agrees with a pickle: refused as no safetensors file, and never run."""
    path = save(tmp_path, 1)
    torch.save({"a": torch.ones(1)}, path / "model.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model.safetensors"] = checkpoint._fingerprint(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoint.load(path)


def test_resolve(tmp_path):
    assert checkpoint.resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"neither an existing folder nor a hub id"):
        checkpoint.resolve(tmp_path / "nothing" / "here")


def test_resolve_hub_id(tmp_path, monkeypatch):
    def download(repository, revision, allow_patterns):
        assert (repository, revision) == ("owner/name", "v2")
        assert not any(pattern.endswith(("*", "bin", "pt", "pth", "pkl")) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert checkpoint.resolve("owner/name@v2") == tmp_path
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match="the hub does not give it"):
        checkpoint.resolve("owner/name")
