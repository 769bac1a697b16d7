"""Pairs of latents: two sides of the same samples, in splits, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourm.runtime import generator
from fourm.stitching.encoders import load
from fourm.stitching.latents import Latents, Normalise, Source, compute

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Two sides of the same samples.

    Args:
        data: Root of the raw data, with the splits train, val and test.
        a: One side.
        b: The other.
        latents: Folder of the stored latents.
        batch_size: Samples an encoder takes at once.
        limit: Training pairs at most; 0 for all.
    """

    data: str
    a: Source
    b: Source
    latents: str
    batch_size: int = 64
    limit: int = 0


@dataclass(frozen=True)
class Pairs:
    """Vectors of n samples on two sides, (n, Da) and (n, Db), and the samples' names."""

    a: Tensor
    b: Tensor
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> Pairs:
        """Some of them."""
        return Pairs(self.a[rows], self.b[rows], [self.ids[row] for row in rows])

    def subset(self, n: int, seed: int) -> Pairs:
        """n of them, drawn; those of a smaller n are among those of a larger one. 0 takes all."""
        order = torch.randperm(len(self), generator=generator(seed, "subset")).tolist()
        if n > len(self):
            raise ValueError(f"{n} pairs are asked for, there are {len(self)}")
        return self.take(order[: n or None])


def open_sides(config: PairsConfig) -> dict[str, tuple[Latents, Latents]]:
    """The stored latents of both sides by split, made where they are not there."""
    found: dict[str, list[Latents]] = {split: [] for split in SPLITS}
    for side in (config.a, config.b):
        encoder = load(side.encoder, size=side.size)
        for split in SPLITS:
            limit = config.limit if split == "train" else 0
            stored = compute(side, config.data, split, config.latents, encoder, config.batch_size, limit=limit)
            found[split].append(stored)
    return {split: (a, b) for split, (a, b) in found.items()}


def load_pairs(config: PairsConfig, normalise: Normalise = "none") -> dict[str, Pairs]:
    """Pairs of vectors by split.

    Raises:
        ValueError: The sides have other samples, or are not vectors.
    """
    pairs = {}
    for split, (a, b) in open_sides(config).items():
        if a.ids != b.ids:
            raise ValueError(f"{split}: {config.a.modality} and {config.b.modality} have not the same samples")
        if a.raw.ndim != 2 or b.raw.ndim != 2 or a.offsets or b.offsets:
            raise ValueError(f"pairs are of vectors, but pooling is {config.a.pooling!r} and {config.b.pooling!r}")
        pairs[split] = Pairs(a.read(None, normalise), b.read(None, normalise), a.ids)
    return pairs


class PairLoader:
    """Batches for the trainer: every one is drawn anew, without replacement, so that no pair is its own negative.

    Args:
        pairs: The training pairs.
        batch_size: Pairs in a batch of this process.
        seed: Decides the draws.
        rank: Number of this process.
        world_size: Processes that train together; they draw different pairs.

    Raises:
        ValueError: There are fewer pairs than all processes draw.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if batch_size * world_size > len(pairs):
            raise ValueError(f"batches have {batch_size * world_size} pairs, but there are {len(pairs)}")
        self.pairs, self.batch_size, self.seed, self.rank, self.world_size = pairs, batch_size, seed, rank, world_size

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Dicts of `a` (B, Da), `b` (B, Db) and `keys`."""
        step = start_step
        while True:
            order = torch.randperm(len(self.pairs), generator=generator(self.seed, "batch", step))
            taken = self.pairs.take(order[self.rank * self.batch_size :][: self.batch_size].tolist())

            yield {"a": taken.a, "b": taken.b, "keys": tuple(taken.ids)}
            step += 1
