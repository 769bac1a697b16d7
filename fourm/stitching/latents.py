"""Latents of frozen encoders, computed once: as the encoder gives them, memory-mapped, with ids and a card.

    <folder>/<source>/<split>/latents.npy    (n, D) vectors, (n, h, w, D) maps, or (sum of L, D) states of tokens
                              ids.json       names of the n samples, and of token states where each sample starts
                              card.json      what they were made with, and statistics of each dimension

They are computed in a hidden folder, chunk after chunk; the same call after a kill goes on after the last whole chunk
and ends with the same bytes. Latents made with anything else than what is asked for are refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fourm.checkpoint import flush, read_json
from fourm.data.rewrite import write_durably
from fourm.data.shards import ShardDataset
from fourm.encoders import Encoder
from fourm.stitching.encoders import Pooling, latents, load


@dataclass(frozen=True, kw_only=True)
class Source:
    """An encoder, and what of it: one side of pairs, one row of a zoo.

    Args:
        modality: Folder of the raw data.
        encoder: Name as in `fourm.encoders`, with its layer, or `fourm:<model>`.
        pooling: See `fourm.stitching.encoders.latents`.
        size: Pixels of the shorter side, or most tokens; default: the encoder's own.
        dtype: What the numbers are stored as.
    """

    modality: str
    encoder: str
    pooling: Pooling = "own"
    size: int = 0
    dtype: Literal["float32", "float16"] = "float32"

    @property
    def name(self) -> str:
        """A name for a folder."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:6]
        encoder = re.sub(r"[^\w@.]+", "-", self.encoder)[-48:].strip("-")
        return f"{self.modality}-{encoder}-{self.pooling}-{digest}"


class Latents:
    """Stored latents of one split.

    Args:
        folder: The split's folder.

    Attributes:
        raw: The memory-mapped array.
        ids: Names of the samples.
        offsets: Of token states, the rows (n + 1,) between which each sample's lie; else None.
        card: What they were made with, and the `mean` and `std` of each dimension.

    Raises:
        ValueError: There are none, or they are not whole.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "card.json").is_file():
            raise ValueError(f"{self.folder} holds no finished latents")
        self.card = read_json(self.folder / "card.json")
        names = read_json(self.folder / "ids.json")
        self.ids: list[str] = names["ids"]
        self.offsets: list[int] | None = names["offsets"]
        self.raw = np.load(self.folder / "latents.npy", mmap_mode="r", allow_pickle=False)
        if list(self.raw.shape) != self.card["shape"]:
            raise ValueError(f"{self.folder}: latents.npy is {self.raw.shape}, but the card says {self.card['shape']}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.raw.shape[-1]

    def item(self, i: int) -> Tensor:
        """The latents of one sample, float32."""
        rows = slice(*self.offsets[i : i + 2]) if self.offsets else i
        return torch.from_numpy(np.array(self.raw[rows], np.float32))

    def read(self, rows: Sequence[int] | None = None) -> Tensor:
        """Vectors (n, D) or maps (n, h, w, D), float32, of some samples or all.

        Args:
            rows: Which.

        Raises:
            ValueError: Token states are of different lengths; take `item`.
        """
        if self.offsets:
            raise ValueError(f"{self.folder} holds states of tokens, of a different number each; read them one by one")
        return torch.from_numpy(np.array(self.raw if rows is None else self.raw[rows], np.float32))


def compute(
    source: Source,
    data: str | Path,
    split: str,
    folder: str | Path,
    encoder: Encoder | None = None,
    batch_size: int = 64,
    chunk: int = 256,
    device: str | torch.device = "cpu",
    limit: int = 0,
) -> Latents:
    """Opens the latents of a split, after making those that are not there yet.

    Args:
        source: Of what, and by which encoder.
        data: Root of the raw data.
        split: Which folder of it.
        folder: Where all latents are kept.
        encoder: `source.encoder`, if it is loaded already.
        batch_size: Samples that are encoded at once.
        chunk: Samples after which what is done is written down.
        device: Where the encoder runs, unless it is loaded already.
        limit: Samples at most, the first ones; 0 for all.

    Raises:
        ValueError: There are others, made with another encoder or other data; says what is different.
    """
    dataset = ShardDataset(Path(data) / split, [source.modality])
    encoder = encoder or load(source.encoder, device, source.size)
    wanted = {**asdict(source), **encoder.fingerprint(), "split": split, **dataset.fingerprints()}
    wanted["n"] = min(len(dataset), limit or len(dataset))
    place = Path(folder) / source.name / split
    if place.exists():
        found = Latents(place)
        check(place, found.card, wanted)
        return found
    aside = place.with_name(f".{split}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    _fill(aside, wanted, dataset, encoder, batch_size, chunk)
    aside.rename(place)
    flush(place.parent)
    return Latents(place)


def check(where: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError that names both sides where what latents were made with is not what is wanted."""
    if differing := [key for key in wanted if made.get(key) != wanted[key]]:
        was, asked = (", ".join(f"{key} {side.get(key)}" for key in differing) for side in (made, wanted))
        raise ValueError(f"{where} was made with {was}; asked for is {asked}; use another folder, or delete it")


def _fill(
    aside: Path, wanted: Mapping[str, Any], dataset: ShardDataset, encoder: Encoder, batch_size: int, chunk: int
) -> None:
    """Encodes all that is not in the hidden folder yet, and completes it."""
    progress, path, modality, n = aside / "progress.json", aside / "latents.npy", wanted["modality"], wanted["n"]
    done: dict[str, Any] = {
        "wanted": dict(wanted),
        "chunk": [batch_size, chunk],
        "bytes": 0,
        "samples": 0,
        "lengths": [],  # of token states
        "shape": None,
    }
    if progress.is_file():
        before = read_json(progress)
        check(aside, before["wanted"] | {"chunk": before["chunk"]}, {**wanted, "chunk": done["chunk"]})
        done = before
    bar = tqdm(total=n, initial=done["samples"], desc=aside.parent.name, unit=" samples", mininterval=1)
    with path.open("r+b" if done["bytes"] else "w+b") as file, bar:
        file.truncate(done["bytes"])
        file.seek(done["bytes"])
        for start in range(done["samples"], n, chunk):
            for first in range(start, min(n, start + chunk), batch_size):
                rows = range(first, min(n, start + chunk, first + batch_size))
                values = [dataset[row][modality] for row in rows]
                for key, each in zip(rows, latents(encoder, values, wanted["pooling"]), strict=True):
                    array = each.float().cpu().numpy().astype(wanted["dtype"])
                    shape = list(array.shape[1:]) if array.ndim == 2 else list(array.shape)
                    done["shape"] = done["shape"] or shape
                    if shape != done["shape"] or not np.isfinite(array).all():
                        name = f"{modality}, key {dataset.keys[key]!r}"
                        raise ValueError(
                            f"{name}: its latents are {array.shape} or not finite, expected {done['shape']}"
                        )
                    if not file.tell():
                        _write_header(file, wanted["dtype"], (0, *shape))
                    file.write(array.tobytes())
                    if array.ndim == 2:
                        done["lengths"].append(len(array))
                bar.update(len(rows))
                done["samples"] += len(rows)
            _flush(file)
            write_durably(progress, json.dumps(done | {"bytes": file.tell()}))
        total = sum(done["lengths"]) if done["lengths"] else n
        file.seek(0)
        _write_header(file, wanted["dtype"], (total, *done["shape"]))
        _flush(file)
    offsets = [0, *itertools.accumulate(done["lengths"])] if done["lengths"] else None
    write_durably(aside / "ids.json", json.dumps({"ids": dataset.keys[:n], "offsets": offsets}))
    raw = np.load(path, mmap_mode="r", allow_pickle=False)
    write_durably(aside / "card.json", json.dumps({**wanted, "shape": raw.shape, **statistics(raw)}, indent=1))
    progress.unlink()


def statistics(raw: np.ndarray, block: int = 4096) -> dict[str, list[float]]:
    """`mean` and `std` of each of the last axis' dimensions."""
    mean = raw.mean(tuple(range(raw.ndim - 1)), dtype=np.float64)
    blocks = (raw[start : start + block].reshape(-1, raw.shape[-1]) for start in range(0, len(raw), block))
    squares = sum(((values - mean) ** 2).sum(0) for values in blocks)
    return {"mean": mean.tolist(), "std": np.sqrt(squares / (raw.size // raw.shape[-1])).tolist()}


def _write_header(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
    """The header of an .npy file; numpy leaves room in it for the first number to grow."""
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
