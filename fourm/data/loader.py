"""Batches in an order that depends on nothing but the seed and the step.

Step k takes the next `batch_size * world_size` draws of an endless row: the samples of epoch 0 in random order, those
of epoch 1 in another, and so on. Nothing is dropped between epochs, so every sample is seen exactly once in each.
Because step k can be computed without the steps before it, training resumes by asking for the batches from there on.

Data of many shards are shuffled twice: the shards, and the samples within windows of `WINDOW` shards, so that only two
windows have to be at hand.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

Draw = tuple[int, int]  # epoch and index of a sample
Collate = Callable[[list[Any], list[Draw]], Any]
WINDOW = 64  # shards whose samples are mixed
GRACE = 30  # seconds between SIGTERM and the end of a worker


class Order:
    """Which sample a draw takes; every sample once an epoch.

    Args:
        sizes: Samples of each shard.
        seed: Decides the order.
        streamed: Leave the shards in their order, and mix only within windows.
    """

    def __init__(self, sizes: Sequence[int], seed: int, streamed: bool = False):
        self.sizes, self.seed, self.streamed = np.array(sizes), seed, streamed
        self.samples = int(self.sizes.sum())
        self._first = self.sizes.cumsum() - self.sizes
        self._shards = functools.lru_cache(maxsize=2)(self._shuffle_shards)
        self._window = functools.lru_cache(maxsize=3)(self._shuffle_window)

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *place])))

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in their order, and how many samples there are up to the end of each window."""
        count = len(self.sizes)
        mixed = count > WINDOW and not self.streamed
        shards = self._rng(epoch).permutation(count) if mixed else np.arange(count)
        ends = self.sizes[shards].cumsum()
        return shards, np.append(ends[WINDOW - 1 : -1 : WINDOW], ends[-1])

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """Samples of a window in their order."""
        shards = self._shards(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
        if len(self.sizes) <= WINDOW:
            return self._rng(epoch).permutation(self.samples)
        indices = [np.arange(self._first[shard], self._first[shard] + self.sizes[shard]) for shard in shards]
        return self._rng(epoch, 1 + window).permutation(np.concatenate(indices))

    def _place(self, draw: int) -> tuple[int, int, int]:
        """Epoch, window, and place within the window."""
        epoch, place = divmod(draw, self.samples)
        ends = self._shards(epoch)[1]
        window = int(ends.searchsorted(place, side="right"))
        return epoch, window, place - (int(ends[window - 1]) if window else 0)

    def __call__(self, draw: int) -> Draw:
        """Epoch and sample of a draw, counted from 0 without end."""
        epoch, window, place = self._place(draw)
        return epoch, int(self._window(epoch, window)[place])

    def ahead(self, draw: int) -> list[int]:
        """A sample of each shard of this window and the next, in the order they are needed."""
        epoch, window, _ = self._place(draw)
        last = window + 1 == len(self._shards(epoch)[1])
        windows = [(epoch, window), (epoch + 1, 0) if last else (epoch, window + 1)]
        shards = [self._shards(epoch)[0][window * WINDOW : (window + 1) * WINDOW] for epoch, window in windows]
        return [int(self._first[shard]) for shard in np.concatenate(shards) if self.sizes[shard]]


@dataclass
class _Batches:
    """Turns draws into a batch; this is what runs in the workers."""

    dataset: Any
    collate: Collate

    def __getitem__(self, work: tuple[list[Draw], list[int]]) -> Any:
        draws, ahead = work
        if ahead:
            self.dataset.prepare(ahead)
        by_epoch = getattr(self.dataset, "by_epoch", False)
        return self.collate([self.dataset[draw if by_epoch else draw[1]] for draw in draws], draws)


def _end_with(parent: int, _: int) -> None:
    """Has a worker end with the process it works for, no sooner and no later.

    Clusters send SIGTERM to all processes of a group, of which the one that trains goes on for a while; and when that
    is killed, torch's own watch may not have begun.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of prctl.h
        if os.getppid() != parent:
            os._exit(1)


def _unchanged(batch: Any) -> Any:
    return batch


class Loader:
    """Endless batches of a data set.

    Args:
        dataset: Has a length and is indexed by number, or by (epoch, number) if its attribute `by_epoch` is true. May
            have a method `order(seed)`, which then takes the place of an `Order` of one shard, and a method `prepare`
            that is told which samples are to be expected.
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
        self.batch_size, self.workers = batch_size, workers
        self.rank, self.world_size = rank, world_size
        self.order = dataset.order(seed) if hasattr(dataset, "order") else Order([len(dataset)], seed)

    def draws(self, step: int) -> list[Draw]:
        """Epochs and indices of the samples that this process takes in a step."""
        first = step * self.batch_size * self.world_size + self.rank
        return [self.order(first + i * self.world_size) for i in range(self.batch_size)]

    def _work(self, step: int) -> tuple[list[Draw], list[int]]:
        """The draws of a step, and what a data set of many shards may expect."""
        first = step * self.batch_size * self.world_size
        return self.draws(step), self.order.ahead(first) if hasattr(self.batches_of.dataset, "prepare") else []

    def batches(self, start_step: int = 0) -> Iterator[Any]:
        """Batches from a step on, without end."""
        # With `batch_size=None` the DataLoader hands each item of the sampler (the draws of a step) to the data set.
        loader: DataLoader[Any] = DataLoader(
            self.batches_of,  # type: ignore[arg-type]
            sampler=map(self._work, itertools.count(start_step)),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=functools.partial(_end_with, os.getpid()),
        )
        return iter(loader)
