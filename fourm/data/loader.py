"""Batches in an order that depends on nothing but the seed and the step.

Step k takes the next `batch_size * world_size` draws of an endless row: the samples of epoch 0 in random order, those
of epoch 1 in another, and so on. Nothing is dropped between epochs, so every sample is seen exactly once in each.
Because step k can be computed without the steps before it, training resumes by asking for the batches from there on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

Draw = tuple[int, int]  # epoch and index of a sample
Collate = Callable[[list[Any], list[Draw]], Any]


@dataclass
class _Batches:
    """Turns draws into a batch; this is what runs in the workers."""

    dataset: Any
    collate: Collate

    def __getitem__(self, draws: list[Draw]) -> Any:
        by_epoch = getattr(self.dataset, "by_epoch", False)
        return self.collate([self.dataset[draw if by_epoch else draw[1]] for draw in draws], draws)


def _unchanged(batch: Any) -> Any:
    return batch


class Loader:
    """Endless batches of a data set.

    Args:
        dataset: Has a length and is indexed by number, or by (epoch, number) if its attribute `by_epoch` is true.
        batch_size: Samples in a batch of this process; all processes together take `batch_size * world_size`.
        collate: Makes a batch from samples and their draws (epoch, index); must be picklable where workers are spawned.
        seed: Decides the order.
        workers: Processes that prepare batches ahead; 0 prepares them in this one. The batches are the same.
        rank: Number of this process among those that train together; it takes every `world_size`-th draw.
        world_size: Processes that train together.

    Raises:
        ValueError: An empty data set, or numbers out of range.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate: Collate,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(dataset) == 0:
            raise ValueError("the data set is empty, expected at least one sample")
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size is {batch_size} (at least 1), workers is {workers} (at least 0)")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} as world_size is {world_size}")
        self.batches_of = _Batches(dataset, collate)
        self.samples, self.batch_size = len(dataset), batch_size
        self.seed, self.workers = seed, workers
        self.rank, self.world_size = rank, world_size
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        return rng.permutation(self.samples)

    def draws(self, step: int) -> list[Draw]:
        """Epochs and indices of the samples that this process takes in a step."""
        first = step * self.batch_size * self.world_size + self.rank
        places = (divmod(first + i * self.world_size, self.samples) for i in range(self.batch_size))
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in places]

    def batches(self, start_step: int = 0) -> Iterator[Any]:
        """Batches from a step on, without end."""
        # With `batch_size=None` the DataLoader hands each item of the sampler (the draws of a step) to the data set.
        loader: DataLoader[Any] = DataLoader(
            self.batches_of,  # type: ignore[arg-type]
            sampler=map(self.draws, itertools.count(start_step)),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)
