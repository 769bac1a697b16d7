import itertools
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fourm.data.loader import Loader, Order
from fourm.data.mixture import MixedDataset


class ByEpoch:
    by_epoch = True

    def __len__(self):
        return 7

    def __getitem__(self, draw):
        return draw


def both(samples, draws):
    return samples, draws


def take(loader: Loader, count: int, start: int = 0) -> list:
    return list(itertools.islice(loader.batches(start), count))


def test_every_sample_once_an_epoch():
    loader = Loader(list(range(10, 17)), 3, both, seed=1)
    batches = take(loader, 14)  # 42 draws: six epochs of seven
    draws = [draw for _, draws in batches for draw in draws]
    assert Counter(draws) == Counter(itertools.product(range(6), range(7)))
    assert [epoch for epoch, _ in draws] == sorted(epoch for epoch, _ in draws)
    assert all(samples == [10 + i for _, i in draws] for samples, draws in batches)
    orders = [tuple(i for e, i in draws if e == epoch) for epoch in range(6)]
    assert len(set(orders)) == 6
    wanted = np.random.Generator(np.random.Philox(np.random.SeedSequence([1, 2]))).permutation(7)
    assert orders[2] == tuple(wanted)


def test_draws_reach_data_sets_by_epoch():
    samples, draws = take(Loader(ByEpoch(), 4, both, seed=0), 3)[2]
    assert samples == draws and {epoch for epoch, _ in draws} == {1}


def test_batch_larger_than_the_data():
    (_, draws), *_ = take(Loader([0, 1], 5, both, seed=0), 1)
    assert [epoch for epoch, _ in draws] == [0, 0, 1, 1, 2]


def test_workers_and_resuming_change_nothing():
    loaders = [Loader(list(range(11)), 4, both, seed=3, workers=workers) for workers in (0, 2)]
    one, two = (take(loader, 9) for loader in loaders)
    assert one == two
    assert take(loaders[0], 4, start=5) == one[5:] == take(loaders[1], 4, start=5)
    assert take(Loader(list(range(11)), 4, both, seed=4), 9) != one


def test_ranks_share_the_global_batch():
    whole = take(Loader(list(range(11)), 6, both, seed=3), 5)
    ranks = [take(Loader(list(range(11)), 2, both, seed=3, rank=rank, world_size=3), 5) for rank in range(3)]
    for step, (_, draws) in enumerate(whole):
        assert [draws[rank::3] for rank in range(3)] == [ranks[rank][step][1] for rank in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": []}, "empty"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
    ],
)
def test_wrong_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        Loader(**{"dataset": [1], "batch_size": 1, "collate": both, "seed": 0, **change})


# Topology: who reads which sample may change at any step, but not which samples a step has

GLOBAL = 12  # samples of a step; 23 to 97 samples make epochs that end within steps
CUTS = [(0, 3), (3, 4), (4, 9), (9, 10), (10, 17), (17, 26)]
TOPOLOGIES = [(1, 0), (2, 2), (4, 0), (1, 2), (4, 2), (2, 0)]  # processes, workers of each


class Shards:
    """Samples that are their own numbers, counted from `first`."""

    by_epoch = True

    def __init__(self, sizes, streamed=False, first=0):
        self.sizes, self.streamed, self.first = sizes, streamed, first

    def order(self, seed):
        return Order(self.sizes, seed, self.streamed)

    def prepare(self, indices):
        assert all(0 <= i < len(self) for i in indices)

    def __len__(self):
        return sum(self.sizes)

    def __getitem__(self, draw):
        return draw[0], draw[1] + self.first


MANY = [1 + i % 3 for i in range(150)]  # 300 samples in three windows
DATASETS = {
    "one shard": lambda: Shards([97]),
    "smaller than two steps": lambda: Shards([23]),
    "windows": lambda: Shards(MANY),
    "streamed": lambda: Shards([1 + i % 2 for i in range(130)], streamed=True),
    "mixture": lambda: MixedDataset([Shards([41]), Shards(MANY, first=41), Shards([7], first=341)], [5, 4, 1]),
}


def steps_of(dataset, first, last, world_size, workers, seed=5):
    """What all processes together read in each of some steps."""
    size = GLOBAL // world_size
    loaders = [Loader(dataset, size, both, seed, workers, rank, world_size) for rank in range(world_size)]
    ranks = [take(loader, last - first, first) for loader in loaders]
    for batches in zip(*ranks, strict=True):
        assert all(samples == draws and len(draws) == size for samples, draws in batches)
        yield [draw for group in zip(*(draws for _, draws in batches), strict=True) for draw in group]


@pytest.mark.parametrize("name", DATASETS)
def test_topology_changes_in_mid_epoch_lose_and_repeat_nothing(name):
    """Each part of the run has other processes and workers; each step has what the undisturbed run has, in order."""
    dataset = DATASETS[name]()
    undisturbed = list(steps_of(dataset, 0, CUTS[-1][1], 1, 0))
    changing = [
        step for cut, topology in zip(CUTS, TOPOLOGIES, strict=True) for step in steps_of(dataset, *cut, *topology)
    ]
    assert changing == undisturbed
    draws = [draw for step in changing for draw in step]
    assert len(set(draws)) == len(draws)  # no sample twice in an epoch
    parts = [(0, len(dataset))] if name != "mixture" else list(zip([0, *dataset.ends], dataset.ends, strict=False))
    for first, end in parts:  # every sample once in each epoch that is over
        own = [(epoch, i) for epoch, i in draws if first <= i < end]
        for epoch in range(max(epoch for epoch, _ in own)):
            assert sorted(i for at, i in own if at == epoch) == list(range(first, end))


@pytest.mark.parametrize(("world_size", "workers"), itertools.product((1, 2, 4), (0, 2)))
@pytest.mark.parametrize("name", ["windows", "mixture"])
def test_every_topology_reads_the_same_steps(name, world_size, workers):
    dataset = DATASETS[name]()
    for first, last in ((0, 2), (24, 27)):  # the start, and over the end of an epoch
        wanted = list(steps_of(dataset, first, last, 1, 0))
        assert list(steps_of(dataset, first, last, world_size, workers)) == wanted


def test_accumulated_batches_are_the_same_samples():
    """Half the batch, twice as often: what one process reads in an update with `accumulate: 2`."""
    dataset, wanted = DATASETS["windows"](), list(steps_of(DATASETS["windows"](), 0, 9, 1, 0))
    halves = [draws for _, draws in take(Loader(dataset, GLOBAL // 2, both, 5), 18)]
    assert [first + second for first, second in zip(halves[::2], halves[1::2], strict=True)] == wanted
    ranks = [take(Loader(dataset, GLOBAL // 4, both, 5, 0, rank, 2), 18) for rank in range(2)]
    updates = [sorted(d for rank in ranks for _, draws in rank[2 * k : 2 * k + 2] for d in draws) for k in range(9)]
    assert updates == [sorted(step) for step in wanted]


def test_workers_end_with_a_killed_parent():
    """A worker of a process that is killed at once, before torch's own watch has begun."""
    ours, theirs = os.pipe()
    parent = os.fork()
    if not parent:

        class Slow:
            def __len__(self):
                return 8

            def __getitem__(self, i):
                os.write(theirs, f"{os.getpid()} ".encode())
                time.sleep(60)

        next(Loader(Slow(), 1, lambda samples, draws: samples, seed=0, workers=1).batches())
        os._exit(0)
    os.close(theirs)
    worker = int(os.read(ours, 20).split()[0])
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(100):
        status = Path(f"/proc/{worker}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")
