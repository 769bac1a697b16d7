"""Bad samples are left out up to a limit that all workers and processes share; beyond it everybody stops."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fourm.data.loader import WINDOW, Loader
from fourm.data.mixture import MixedDataset
from fourm.data.shards import write_shards
from fourm.data.tokens import TokenDataset
from fourm.modalities import Modality, TokenSpace

SPACE = TokenSpace({name: Modality("grid", vocab_size=10, grid=(2, 3)) for name in ("a", "b")})
SHARDS = 3 * WINDOW  # of one sample each, so that every one is opened by a single process
LIMIT, BAD = 9, 14  # 5 % of 192 samples; the half of `BAD` is allowed
BROKEN = set(np.random.default_rng(1).permutation(SHARDS)[:BAD].tolist())
SCRIPT = Path(__file__).parents[1] / "training/ranks.py"


@pytest.fixture
def folder(tmp_path):
    """Shards of which `BAD` hold a broken sample, where opening does not look."""
    rng = np.random.default_rng(0)
    rows = [{"__key__": f"s{i}", "a": rng.integers(0, 10, 6), "b": rng.integers(0, 10, 6)} for i in range(SHARDS)]
    write_shards(tmp_path, "train", rows, 1, extensions={"a": "npy", "b": "npy"})
    for number in BROKEN:
        path = tmp_path / f"train/b/shard-{number:06d}.tar"
        path.write_bytes(path.read_bytes().replace(b"NUMPY", b"BUMPY"))
    return tmp_path / "train"


def keys(samples, draws):
    return [sample["__key__"] for sample in samples]


def drawn(samples, draws):
    return [i for _, i in draws]


def lost(data: TokenDataset) -> int:
    return sum(record["lost"] for record in data._left_out())


def epoch(loader: Loader) -> list[str]:
    steps = -(-SHARDS // (loader.batch_size * loader.world_size))
    return list(itertools.chain.from_iterable(itertools.islice(loader.batches(), steps)))


def test_below_the_limit_others_take_their_place(folder):
    data = TokenDataset(folder, SPACE, "skip", max_bad=0.1)
    for workers in (0, 2):
        read = epoch(Loader(data, 8, keys, seed=1, workers=workers))
        assert len(read) == SHARDS and len(set(read)) == SHARDS - BAD
        assert data.skipped == {"unreadable": BAD} and lost(data) == BAD


@pytest.mark.parametrize("workers", [0, 2])
def test_limit_of_all_workers_together(folder, workers):
    data, given = TokenDataset(folder, SPACE, "skip", max_bad=LIMIT / SHARDS), []
    with pytest.raises(ValueError, match=rf"samples are bad .*max_bad 0\.0468\d* allows {LIMIT}"):
        for batch in itertools.islice(Loader(data, 4, drawn, seed=1, workers=workers).batches(), SHARDS):
            given += batch
    assert len(BROKEN.intersection(given)) <= LIMIT and lost(data) > LIMIT
    with pytest.raises(ValueError, match=f"allows {LIMIT}"):  # nor does a restart count from 0
        TokenDataset(folder, SPACE, "skip", max_bad=LIMIT / SHARDS)


def test_limit_of_a_data_set_in_a_mixture(folder, tmp_path):
    sound = [{"__key__": f"t{i}", "a": np.zeros(6, int), "b": np.zeros(6, int)} for i in range(1000)]
    write_shards(tmp_path, "sound", sound, 1000, extensions={"a": "npy", "b": "npy"})
    options = (SPACE, "skip", LIMIT / SHARDS)
    data = MixedDataset([TokenDataset(tmp_path / "sound", *options), TokenDataset(folder, *options)], [0.5, 0.5])
    with pytest.raises(ValueError, match=rf"train: {LIMIT + 1} of {SHARDS} samples are bad"):
        list(itertools.islice(Loader(data, 4, keys, seed=1).batches(), 200))
    assert data.skipped == {"unreadable": LIMIT + 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_stops_at_the_first(folder, workers):
    data = TokenDataset(folder, SPACE)
    with pytest.raises(ValueError, match=r"b, .*shard-\d+\.tar, key 's\d+': cannot use this \.npy"):
        epoch(Loader(data, 4, keys, seed=1, workers=workers))


def test_nothing_but_bad_samples_is_an_end(folder):
    for path in (folder / "b").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"NUMPY", b"BUMPY"))
    data = TokenDataset(folder, SPACE, "skip", max_bad=1.0)
    with pytest.raises(ValueError, match="no good samples"):
        data[0, 0]


def test_two_processes_stop_at_their_common_limit(folder, tmp_path):
    """Half of the bad samples is allowed, so neither would stop by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(LIMIT / SHARDS), str(tmp_path / "run")],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in started]
    own = [line for line in said if "samples are bad" in line and f"allows {LIMIT}" in line]
    others = [line for line in said if "1 other process(es) got no batch" in line]
    assert own and len(own) + len(others) == 2, said
    assert all(process.returncode == 3 for process in started)
