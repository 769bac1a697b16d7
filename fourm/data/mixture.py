"""Several data sets as one, each with its share of the draws.

Every block of `BLOCK` draws holds each data set exactly as often as its weight says, in an order of the block's own. So
which data set a draw takes, and how many it took before, follows from the number of the draw alone.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from fourm.data.loader import Draw, Order

BLOCK = 1000


def quotas(weights: Sequence[float]) -> list[int]:
    """Draws of a block that each data set gets: its share, rounded by largest remainders.

    Raises:
        ValueError: No weights, or one that is less than a thousandth of all.
    """
    if not weights or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(f"the weights of the data sets are {list(weights)}, expected numbers above 0")
    shares = np.array(weights) / sum(weights) * BLOCK
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: BLOCK - counts.sum()]] += 1
    if counts.min() < 1:
        raise ValueError(f"the weights of the data sets are {list(weights)}, the least is not one of {BLOCK} draws")
    return counts.tolist()


class MixedOrder:
    """Which sample a draw takes. Data sets are shuffled and repeated each on its own, so their epochs differ.

    Args:
        orders: Of each data set.
        weights: Relative shares.
        seed: Decides the order within the blocks.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int):
        self.orders, self.quotas, self.seed = list(orders), quotas(weights), seed
        self.starts = [0, *accumulate(order.samples for order in orders)]
        self._block = functools.lru_cache(maxsize=4)(self._shuffle_block)

    def _shuffle_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set of each draw of a block, and how often it was drawn in the block before."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, block, BLOCK])))
        chosen = rng.permutation(np.repeat(np.arange(len(self.quotas)), self.quotas))
        before = np.empty(BLOCK, dtype=np.int64)
        for number, quota in enumerate(self.quotas):
            before[chosen == number] = np.arange(quota)
        return chosen, before

    def _own(self, draw: int) -> tuple[int, int]:
        """Data set of a draw, and the number of the draw among those of that data set."""
        block, place = divmod(draw, BLOCK)
        chosen, before = self._block(block)
        number = int(chosen[place])
        return number, block * self.quotas[number] + int(before[place])

    def __call__(self, draw: int) -> Draw:
        """Epoch of the data set, and sample as the mixture numbers them."""
        number, own = self._own(draw)
        epoch, index = self.orders[number](own)
        return epoch, self.starts[number] + index

    def ahead(self, draw: int) -> list[int]:
        """A sample of each shard that will be needed next, of all data sets."""
        block = draw // BLOCK
        pairs = zip(self.starts[:-1], self.orders, self.quotas, strict=True)
        return [start + index for start, order, quota in pairs for index in order.ahead(block * quota)]


class MixedDataset:
    """Samples of several data sets, numbered end to end.

    Args:
        datasets: `TokenDataset`s; samples may lack modalities that those of others have.
        weights: How often each is drawn, relative to the others.

    Attributes:
        ends: Where the samples of each data set end.

    Raises:
        ValueError: Weights that are not above 0.
    """

    by_epoch = True

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float]):
        self.datasets, self.weights = list(datasets), list(weights)
        self.ends = list(accumulate(map(len, self.datasets)))
        quotas(weights)

    @property
    def skipped(self) -> dict[str, int]:
        """Faults by reason."""
        return dict(sum((Counter(dataset.skipped) for dataset in self.datasets), Counter[str]()))

    def fingerprints(self) -> dict[str, str]:
        """What differs where the shares, or the samples of a data set do; data sets count from 1."""
        each = [dataset.fingerprints() for dataset in self.datasets]
        named = {f"{name} of data set {i}": value for i, own in enumerate(each, 1) for name, value in own.items()}
        return {"weights of the data sets": ", ".join(map(str, quotas(self.weights))), **named}

    def order(self, seed: int) -> MixedOrder:
        """The order of training."""
        return MixedOrder([dataset.order(seed) for dataset in self.datasets], self.weights, seed)

    def prepare(self, indices: Sequence[int]) -> None:
        """Tells each data set which of its samples are to be expected."""
        for dataset, end in zip(self.datasets, self.ends, strict=True):
            dataset.prepare([i - end + len(dataset) for i in indices if end - len(dataset) <= i < end])

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, draw: int | tuple[int, int]) -> dict[str, Any]:
        i = draw[1] if isinstance(draw, tuple) else draw
        number = bisect_right(self.ends, i)
        own = i - self.ends[number] + len(self.datasets[number])
        return self.datasets[number][(draw[0], own) if isinstance(draw, tuple) else own]
