"""Shards to shards: borders, bytes, several processes, bad samples, being killed."""

import multiprocessing
import os

import numpy as np
import pytest

from fourm.data.rewrite import rewrite
from fourm.data.shards import ShardDataset, write_shards

NAMES = ["double", "text"]


def doubled(samples):
    if any(sample["x"][0] < 0 for sample in samples):
        raise ValueError("a negative number")
    return [{"__key__": s["__key__"], "double": 2 * s["x"], "text": str(s["x"][0])} for s in samples]


def source(tmp_path, values=range(10), on_error="raise"):
    write_shards(tmp_path / "raw", "train", [{"__key__": f"k{i}", "x": np.array([i])} for i in values], shard_size=4)
    return ShardDataset(tmp_path / "raw/train", on_error=on_error)


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def run(dataset, output, function=doubled, **options):
    return rewrite(dataset, output, "train", NAMES, function, **{"shard_size": 3, "batch_size": 2} | options)


def test_shards_keep_their_borders_and_bytes_do_not_depend_on_workers_or_processes(tmp_path):
    dataset = source(tmp_path)
    done = run(dataset, tmp_path / "one")
    assert (done.samples, done.written, done.made, done.kept) == (10, 10, 3, 0)
    made = ShardDataset(tmp_path / "one/train")
    assert made.keys == dataset.keys and made[9]["double"].tolist() == [18] and made[9]["text"] == "9"
    for rank in range(2):
        run(dataset, tmp_path / "two", rank=rank, world_size=2, workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert list(contents(tmp_path / "one")) == [f"train/{n}/shard-00000{i}.tar" for n in NAMES for i in range(3)]


def test_plain_folders_are_cut_by_shard_size(tmp_path):
    for i in range(5):
        path = tmp_path / f"raw/train/x/a/{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.array([i]))
    run(ShardDataset(tmp_path / "raw/train"), tmp_path / "out")
    made = ShardDataset(tmp_path / "out/train")
    assert made.keys == [f"a/{i}" for i in range(5)]
    assert len(list((tmp_path / "out").rglob("*.tar"))) == 4


def test_only_what_is_missing_is_made(tmp_path):
    dataset = source(tmp_path)
    run(dataset, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out/train/text/shard-000001.tar").unlink()
    done = run(dataset, tmp_path / "out")
    assert (done.samples, done.written, done.made, done.kept) == (10, 4, 1, 2)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_raise_or_are_listed(tmp_path, workers):
    dataset = source(tmp_path, [0, 1, -2, 3, 4, 5])

    def prepare(samples):
        if "k5" in [sample["__key__"] for sample in samples]:
            raise ValueError("not this one")
        return samples

    with pytest.raises(ValueError, match="a negative number"):
        run(dataset, tmp_path / "out", workers=workers)
    assert not list((tmp_path / "out").rglob("*.tar"))
    for kept in (0, 2):
        done = run(dataset, tmp_path / "out", workers=workers, prepare=prepare, on_error="skip")
        assert (done.samples, done.skipped, done.kept) == (4, {"unusable": 2}, kept)
    assert ShardDataset(tmp_path / "out/train").keys == ["k0", "k1", "k3", "k4"]
    listed = (tmp_path / "out/train/double/shard-000000.skipped.jsonl").read_text()
    assert listed == '{"key": "k-2", "reason": "unusable", "message": "a negative number"}\n'


def test_a_shard_with_too_many_bad_samples_gets_no_name(tmp_path):
    with pytest.raises(ValueError, match=r"2 or more of 4 samples .*max_bad 0.01 allows 1; the first: a negative"):
        run(source(tmp_path, [0, 1, -2, -3]), tmp_path / "out", on_error="skip")
    assert not list((tmp_path / "out").rglob("*.tar"))
    dataset = ShardDataset(tmp_path / "raw/train")
    assert run(dataset, tmp_path / "out", on_error="skip", max_bad=0.5).samples == 2


@pytest.mark.parametrize(("change", "first"), [("write", "a"), ("unlink", "f")])
def test_kept_shards_of_another_source_are_refused(tmp_path, change, first):
    folder = tmp_path / "raw/train/x"
    folder.mkdir(parents=True)
    for name in "bcdef":
        np.save(folder / f"{name}.npy", np.array([1]))
    run(ShardDataset(folder.parent), tmp_path / "out", shard_size=2)
    np.save(folder / "a.npy", np.array([1])) if change == "write" else (folder / "f.npy").unlink()
    with pytest.raises(ValueError, match=rf"shard-.*the source has changed since, .*'{first}'.*delete shard-0"):
        run(ShardDataset(folder.parent), tmp_path / "out", shard_size=2)


def die_at(dataset, output, count):
    calls = iter(range(count))

    def function(samples):
        if next(calls, None) is None:
            os.kill(os.getpid(), 9)
        return doubled(samples)

    run(dataset, output, function)


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    dataset = source(tmp_path)
    run(dataset, tmp_path / "whole")
    for count in (1, 1, 3):
        process = multiprocessing.get_context("fork").Process(target=die_at, args=(dataset, tmp_path / "out", count))
        process.start()
        process.join()
        assert process.exitcode == -9
        for path in (tmp_path / "out").rglob("*.tar"):
            assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / "out")).read_bytes()
    run(dataset, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
