"""Pairs of latents: two sides of the same samples, in splits, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fourm.evaluation.retrieval import mutual_knn
from fourm.runtime import accelerator, generator
from fourm.stitching.encoders import load
from fourm.stitching.latents import Latents, Source, compute

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
        a_layers: Layers of `a` to choose from (see `choose_layers`), instead of the one its name has.
        b_layers: Those of `b`.
    """

    data: str
    a: Source
    b: Source
    latents: str
    batch_size: int = 64
    limit: int = 0
    a_layers: Sequence[str] = field(default_factory=list)
    b_layers: Sequence[str] = field(default_factory=list)


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
        encoder = load(side.encoder, accelerator().device, side.size)
        for split in SPLITS:
            limit = config.limit if split == "train" else 0
            stored = compute(side, config.data, split, config.latents, encoder, config.batch_size, limit=limit)
            found[split].append(stored)
    return {split: (a, b) for split, (a, b) in found.items()}


def load_pairs(config: PairsConfig) -> dict[str, Pairs]:
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
        pairs[split] = Pairs(a.read(), b.read(), a.ids)
    return pairs


def choose_layers(config: PairsConfig, k: int = 10) -> tuple[PairsConfig, dict[str, float]]:
    """The pair of layers that agree most on who is near whom among the training pairs, as STRUCTURE (2025) chooses.

    Args:
        config: With `a_layers`, `b_layers` or both; without them nothing is computed.
        k: Neighbours that are compared.

    Returns:
        The pairs with these layers, and `mutual_knn` of all pairs of layers by `<layer of a> <layer of b>`.

    Raises:
        ValueError: The encoder's name has no place for a layer.
    """
    if not config.a_layers and not config.b_layers:
        return config, {}
    latents, sides = {}, {}
    for side, layers in (("a", config.a_layers), ("b", config.b_layers)):
        source: Source = getattr(config, side)
        name = source.encoder.partition("@")[0]
        if layers and name.startswith("fourm:"):
            raise ValueError(f"{side}_layers is {list(layers)}, but {source.encoder} has none to choose; leave it out")
        sides[side] = [dataclasses.replace(source, encoder=f"{name}@{layer}") for layer in layers] or [source]
        for each in sides[side]:
            stored = compute(each, config.data, "train", config.latents, None, config.batch_size,
                             device=accelerator().device, limit=config.limit)  # fmt: skip
            latents[each] = stored.read()
    pairs = [(a, b) for a in sides["a"] for b in sides["b"]]
    found = {(a, b): mutual_knn(latents[a], latents[b], k) for a, b in pairs}
    a, b = max(pairs, key=lambda pair: found[pair])
    said = {f"{a.encoder} {b.encoder}": value for (a, b), value in found.items()}
    return dataclasses.replace(config, a=a, b=b, a_layers=[], b_layers=[]), said


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
