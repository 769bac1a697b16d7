import itertools
from collections import Counter

import numpy as np
import pytest

from fourm.data.loader import Loader


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
