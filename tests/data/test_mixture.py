import itertools
from collections import Counter

import numpy as np
import pytest

from fourm.data.loader import Loader, Order
from fourm.data.mixture import BLOCK, MixedDataset, quotas


class Numbers:
    """Samples of one data set; remembers what it was told to prepare."""

    def __init__(self, name: str, sizes: list[int]):
        self.name, self.sizes, self.prepared, self.skipped = name, sizes, set(), {"odd": 1}

    def order(self, seed):
        return Order(self.sizes, seed)

    def prepare(self, indices):
        self.prepared |= set(indices)

    def __len__(self):
        return sum(self.sizes)

    def __getitem__(self, draw):
        return (self.name, *draw) if isinstance(draw, tuple) else (self.name, draw)


def both(samples, draws):
    return samples, draws


def mixed(weights=(0.6, 0.3, 0.1)) -> MixedDataset:
    return MixedDataset([Numbers("a", [700]), Numbers("b", [50, 50]), Numbers("c", [3] * 100)], weights)


def take(loader: Loader, count: int, start: int = 0) -> list:
    return list(itertools.islice(loader.batches(start), count))


def test_every_block_has_the_shares_and_every_data_set_its_epochs():
    samples = [sample for batch, _ in take(Loader(mixed(), 50, both, seed=1), 100) for sample in batch]
    for block in range(5):
        counts = Counter(name for name, *_ in samples[block * BLOCK : (block + 1) * BLOCK])
        assert counts == {"a": 600, "b": 300, "c": 100}
    for name, size in (("a", 700), ("b", 100), ("c", 300)):
        own = [draw for each, *draw in samples if each == name]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == [[epoch, i] for i in range(size)]
        order = Loader(Numbers(name, [size] if name != "c" else [3] * 100), 1, both, seed=1).order
        assert own == [list(order(draw)) for draw in range(len(own))]  # each as it would be alone
    kinds = [[name for name, *_ in samples[start : start + BLOCK]] for start in (0, BLOCK)]
    assert kinds[0] != kinds[1] and set(kinds[0][:50]) == {"a", "b", "c"}


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_and_ranks_change_nothing(workers):
    whole = take(Loader(mixed(), 12, both, seed=3), 120)
    assert take(Loader(mixed(), 12, both, seed=3, workers=workers), 4, start=100) == whole[100:104]
    ranks = [take(Loader(mixed(), 4, both, seed=3, rank=rank, world_size=3), 9) for rank in range(3)]
    for step, (samples, _) in enumerate(whole[:9]):
        assert [samples[rank::3] for rank in range(3)] == [ranks[rank][step][0] for rank in range(3)]


def test_data_sets_hear_of_their_own_next_shards():
    data = mixed()
    take(Loader(data, 10, both, seed=0), 3)
    assert [len(each.prepared) for each in data.datasets] == [1, 2, 100]
    assert data.datasets[2].prepared == set(range(0, 300, 3))  # two windows
    assert data.skipped == {"odd": 3}


def test_numbers_of_samples_tell_the_data_set():
    data = mixed()
    assert len(data) == 1100 and data.ends == [700, 800, 1100]
    assert [data[2, i] for i in (0, 699, 700, 799, 800)] == [
        ("a", 2, 0), ("a", 2, 699), ("b", 2, 0), ("b", 2, 99), ("c", 2, 0),
    ]  # fmt: skip
    assert data[750] == ("b", 50)  # without an epoch


@pytest.mark.parametrize(
    ("weights", "counts"),
    [((1, 1, 1), [334, 333, 333]), ((2,), [1000]), ((0.6, 0.2, 0.2), [600, 200, 200]), ((0.9985, 0.0015), [999, 1])],
)
def test_quotas(weights, counts):
    got = quotas(weights)
    assert sum(got) == BLOCK and np.abs(np.array(got) - counts).max() <= 1


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [10000, 1]])
def test_wrong_weights(weights):
    with pytest.raises(ValueError, match="weights of the data sets are"):
        quotas(weights)
