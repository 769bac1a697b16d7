import json
import os
import warnings

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


def test_killed_at_each_write_point(tmp_path):
    survived, points = False, 0
    while not survived:
        points += 1
        folder = tmp_path / str(points)
        save(folder, 1, keep=1)
        child = os.fork()
        if child == 0:
            try:
                _die_at(points)
                save(folder, 2, keep=1)
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
        assert checkpoint.load(found).state == {"step": int(found.name[-1]), "third": 1 / 3}
        save(folder, 3, keep=1)
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3"]
    assert found.name == "checkpoint-2" and points > 15


def test_full_disk_leaves_the_old_ones(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.load(checkpoint.latest(tmp_path)).state["step"] == 1


def test_pickle_in_the_place_of_tensors_is_refused(tmp_path):
    """A checkpoint whose manifest agrees with a pickle: refused as no safetensors file, and never run."""
    path = save(tmp_path, 1)
    torch.save({"a": torch.ones(1)}, path / "model.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model.safetensors"] = checkpoint._fingerprint(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
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
