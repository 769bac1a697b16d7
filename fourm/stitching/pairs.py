"""Sides of the same samples, of which two make pairs: their latents by split, and batches of them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fourm.evaluation.retrieval import mutual_knn
from fourm.runtime import accelerator, generator
from fourm.stitching.encoders import load
from fourm.stitching.latents import Source, compute

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
class Samples:
    """Vectors (n, D) of n samples on each side, and the samples' names; pairs have the sides `a` and `b`."""

    sides: dict[Any, Tensor]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> Samples:
        """Some of them."""
        places = torch.tensor(rows, dtype=torch.long)
        return Samples({side: z[places] for side, z in self.sides.items()}, [self.ids[row] for row in rows])

    def subset(self, n: int, seed: int) -> Samples:
        """n of them, drawn; those of a smaller n are among those of a larger one. 0 takes all."""
        order = torch.randperm(len(self), generator=generator(seed, "subset")).tolist()
        if n > len(self):
            raise ValueError(f"{n} samples are asked for, there are {len(self)}")
        return self.take(order[: n or None])


def load_samples(
    data: str, latents: str, sources: Mapping[Any, Source], batch_size: int = 64, limit: int = 0
) -> dict[str, Samples]:
    """Samples by split, with their latents made where they are not there, by one of several processes.

    Args:
        data: Root of the raw data, with the splits train, val and test.
        latents: Folder of the stored latents.
        sources: What each side is.
        batch_size: Samples an encoder takes at once.
        limit: Training samples at most; 0 for all.

    Raises:
        ValueError: The sides have other samples, or are not vectors.
    """
    found: dict[str, Samples] = {}
    joined = accelerator()
    with joined.main_process_first():
        for side, source in sources.items():
            encoder = load(source.encoder, joined.device, source.size)
            for split in SPLITS:
                most = limit if split == "train" else 0
                stored = compute(source, data, split, latents, encoder, batch_size, limit=most)
                samples = found.setdefault(split, Samples({}, stored.ids))
                shape, others = list(stored.raw.shape), sorted(set(stored.ids) ^ set(samples.ids))[:3]
                if len(shape) != 2 or stored.offsets:
                    raise ValueError(f"{stored.folder} has {shape} numbers, expected a vector a sample")
                if stored.ids != samples.ids:
                    said = f"{stored.folder} has {len(stored)} samples and the first side {len(samples)}"
                    raise ValueError(
                        f"{said}; only one of them has {others}" if others else f"{said}, in another order"
                    )
                samples.sides[side] = stored.read()
    return found


def fingerprint(splits: Mapping[str, Samples], beside: Any) -> str:
    """A short hash of all vectors, and of what JSON can hold beside them."""
    found = hashlib.sha256(json.dumps(beside).encode())
    for z in (z for split in splits.values() for z in split.sides.values()):
        found.update(z.numpy().data)
    return found.hexdigest()[:12]


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
    latents, sides, joined = {}, {}, accelerator()
    with joined.main_process_first():
        for side, layers in (("a", config.a_layers), ("b", config.b_layers)):
            source: Source = getattr(config, side)
            name = source.encoder.partition("@")[0]
            if layers and name.startswith("fourm:"):
                raise ValueError(
                    f"{side}_layers is {list(layers)}, but {source.encoder} has none to choose; leave it out"
                )
            sides[side] = [dataclasses.replace(source, encoder=f"{name}@{layer}") for layer in layers] or [source]
            for each in sides[side]:
                stored = compute(each, config.data, "train", config.latents, None, config.batch_size,
                                 device=joined.device, limit=config.limit)  # fmt: skip
                latents[each] = stored.read()
    pairs = [(a, b) for a in sides["a"] for b in sides["b"]]
    found = {(a, b): mutual_knn(latents[a], latents[b], k) for a, b in pairs}
    a, b = max(pairs, key=lambda pair: found[pair])
    said = {f"{a.encoder} {b.encoder}": value for (a, b), value in found.items()}
    return dataclasses.replace(config, a=a, b=b, a_layers=[], b_layers=[]), said


class SampleLoader:
    """Batches for the trainer: each is drawn anew, without replacement, so that no sample is its own negative.

    Args:
        samples: The training samples.
        batch_size: Samples in a batch of this process.
        seed: Decides the draws.
        rank: Number of this process.
        world_size: Processes that train together; they draw different samples.

    Raises:
        ValueError: There are fewer samples than all processes draw.
    """

    def __init__(self, samples: Samples, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if batch_size * world_size > len(samples):
            raise ValueError(f"batches have {batch_size * world_size} samples, but there are {len(samples)}")
        self.samples, self.batch_size, self.seed, self.rank = samples, batch_size, seed, rank

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """`sides` (B, D) by name, `keys`, `step`: the batch's number, and `draw`: a number in [0, 1) of its own."""
        for step in itertools.count(start_step):
            rng = generator(self.seed, "batch", step)
            order = torch.randperm(len(self.samples), generator=rng)
            taken = self.samples.take(order[self.rank * self.batch_size :][: self.batch_size].tolist())
            draw = float(torch.rand((), generator=rng))
            yield {"sides": taken.sides, "keys": tuple(taken.ids), "step": step, "draw": draw}
