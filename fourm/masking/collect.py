"""From samples (one dict each) to arrays of a whole batch, which the rest of the room works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourm.modalities import Modality, TokenSpace

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Sequences:
    """All sequences of a batch, each modality of each sample a row of its own: R rows, padded to T tokens.

    Attributes:
        row: (R,) number of the sample in the batch.
        mod: (R,) modality number.
        ids: (R, T) ids of a text; for vectors their number in `vectors`, from 1 (0 stands for a masked run).
        length: (R,) valid tokens.
        vectors: Per `vectors` modality those of each sample, (length, dim).
    """

    row: np.ndarray
    mod: np.ndarray
    ids: np.ndarray
    length: np.ndarray
    vectors: dict[str, list[np.ndarray]]

    @property
    def valid(self) -> np.ndarray:
        """(R, T), where a token is."""
        return np.arange(self.ids.shape[1]) < self.length[:, None]


def keys_of(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Names of the samples."""
    return tuple(str(sample.get("__key__", "")) for sample in samples)


def present(samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """(B, len(names)) bool, which sample has which modality."""
    return np.array([[name in sample for name in names] for sample in samples], dtype=bool)


def contents(samples: Sequence[Sample], name: str, space: TokenSpace) -> tuple[list[int], list[np.ndarray]]:
    """Numbers of the samples that hold a grid, text or sequence of vectors, and what they hold.

    Raises:
        ValueError: Contents of the wrong type or shape; names the sample.
    """
    kinds, shape = {
        "grid": ("iu", (space[name].length,)), "text": ("iu", (None,)), "vectors": ("f", (None, space[name].dim)),
    }[space[name].kind]  # fmt: skip
    rows = [row for row, sample in enumerate(samples) if name in sample]
    values = [samples[row][name] for row in rows]
    for dtype, got in {(value.dtype, value.shape) for value in values}:
        if dtype.kind not in kinds or len(got) != len(shape) or shape[-1] not in (None, got[-1]):
            wrong = [samples[row] for row, value in zip(rows, values, strict=True) if value.shape == got]
            key = next(sample.get("__key__", "?") for sample in wrong if sample[name].dtype == dtype)
            expected = "floats" if kinds == "f" else "integer ids"
            raise ValueError(f"sample {key!r}: {name} is {dtype} of shape {got}, expected {expected} {shape}")
    return rows, values


def grid_ids(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """Ids of several grids side by side.

    Returns:
        (B, len(names), cells of the largest grid) int64, 0 where a grid is smaller or absent. Patches have no ids.
    """
    cells = max((space[name].length for name in names), default=0)
    ids = np.zeros((len(samples), len(names), cells), dtype=np.int64)
    for column, name in enumerate(names):
        if space[name].kind == "grid":
            rows, values = contents(samples, name, space)
            if rows:
                ids[rows, column, : space[name].length] = values
    return ids


def sequences(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> Sequences:
    """Every text (without its end token) and every sequence of vectors of a batch, cut at nothing yet."""
    nothing = np.zeros(0, dtype=np.int64)
    columns, vectors = [(nothing, nothing, nothing, nothing)], {}
    for name in names:
        rows, values = contents(samples, name, space)
        lengths = np.array([len(value) for value in values], dtype=np.int64)
        if space[name].kind == "vectors":
            vectors[name], values = values, [np.arange(1, 1 + lengths.sum())]
        flat = np.concatenate([nothing, *values], dtype=np.int64)
        columns.append((np.array(rows, dtype=np.int64), np.full(len(rows), space.number[name]), lengths, flat))
    row, mod, length, flat = (np.concatenate(column) for column in zip(*columns, strict=True))
    ids = np.zeros((len(length), length.max(initial=0) + 1), dtype=np.int64)  # one more, for the end token
    ids[np.arange(ids.shape[1]) < length[:, None]] = flat
    return Sequences(row, mod, ids, length, vectors)


def gather(vectors: list[np.ndarray], numbers: np.ndarray, dim: int) -> np.ndarray:
    """Some of the vectors of a batch, without touching the others.

    Args:
        vectors: Those of each sample, (length, dim).
        numbers: (K,), from 1 through all samples; 0 for a vector of zeros.
        dim: Width of a vector.

    Returns:
        (K, dim) float32.
    """
    rows = np.zeros((len(numbers), dim), dtype=np.float32)
    ends = np.cumsum([len(each) for each in vectors], dtype=np.int64)
    place = np.flatnonzero(numbers)
    sample = ends.searchsorted(numbers[place])
    for number in np.unique(sample):
        own = place[sample == number]
        rows[own] = vectors[number][numbers[own] - 1 - (ends[number] - len(vectors[number]))]
    return rows


def finish(space: TokenSpace, raw: Sequences) -> Sequences:
    """Ends every text with its end token and cuts all sequences to `max_tokens`.

    A text that is too long loses its end token; one that is masked in chunks keeps whole chunks (4M, data/masking.py).
    """
    rows = list(space.modalities.values())
    eos, longest, chunk = np.array([(row.eos, row.max_tokens, row.chunk) for row in rows])[raw.mod].T
    is_text = np.array([row.kind == "text" for row in rows])[raw.mod]
    ids = raw.ids.copy()
    ids[is_text, raw.length[is_text]] = eos[is_text]
    length = raw.length + is_text
    length = np.where(length > longest, np.minimum(raw.length, longest // chunk * chunk), length)
    return Sequences(raw.row, raw.mod, ids[:, : length.max(initial=1)], length, raw.vectors)


def cut_patches(
    name: str, modality: Modality, samples: Sequence[Sample], row: np.ndarray, cell: np.ndarray
) -> np.ndarray:
    """Cuts and normalises some patches of some images.

    Args:
        name: Name of the modality.
        modality: Its row of the table.
        samples: B samples; those named in `row` hold a uint8 image (H, W, C), or (H, W) of one channel.
        row: (K,) sample of each patch, in ascending order.
        cell: (K,) which patch of the grid, row by row.

    Returns:
        (K, patch_size * patch_size * channels) float32: pixel rows, pixel columns, channels (fastest).

    Raises:
        ValueError: An image of the wrong size or type; names the sample.
    """
    assert modality.grid is not None
    (high, wide), side, channels = modality.grid, modality.patch_size, modality.channels
    if not len(row):
        return np.zeros((0, modality.width), dtype=np.float32)
    size = (high * side, wide * side, channels)
    patches = np.empty((len(row), side, side, channels), dtype=np.float32)
    numbers, starts = np.unique(row, return_index=True)
    for number, start, stop in zip(numbers.tolist(), starts, [*starts[1:], len(row)], strict=True):
        sample, own = samples[number], slice(start, stop)
        image = sample[name]
        if image.dtype != np.uint8 or image.shape not in (size, size[:2] if channels == 1 else size):
            found = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"sample {sample.get('__key__', '?')!r}: {name} is {found}, expected a uint8 image {size}")
        cut = image.reshape(high, side, wide, side, channels)
        patches[own] = cut[cell[own] // wide, :, cell[own] % wide]
    mean, deviation = np.asarray(modality.mean, dtype=np.float32), np.asarray(modality.std, dtype=np.float32)
    patches *= 1 / (255 * deviation)
    patches -= mean / deviation
    return patches.reshape(len(row), -1)
