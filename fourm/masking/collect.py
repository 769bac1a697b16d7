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
        ids: (R, T) ids of a text; for vectors rows of `vectors` (0 stands for a masked run).
        length: (R,) valid tokens.
        vectors: Per `vectors` modality a row of zeros and the vectors of the whole batch, (1 + n, dim) float32.
    """

    row: np.ndarray
    mod: np.ndarray
    ids: np.ndarray
    length: np.ndarray
    vectors: dict[str, np.ndarray]

    @property
    def valid(self) -> np.ndarray:
        """(R, T), where a token is."""
        return np.arange(self.ids.shape[1]) < self.length[:, None]


def present(samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """(B, len(names)) bool, which sample has which modality."""
    return np.array([[name in sample for name in names] for sample in samples], dtype=bool)


def grid_ids(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """Ids of several grids side by side.

    Returns:
        (B, len(names), cells of the largest grid) int64, 0 where a grid is smaller or absent. Patches have no ids.
    """
    cells = max((space[name].length for name in names), default=0)
    ids = np.zeros((len(samples), len(names), cells), dtype=np.int64)
    for column, name in enumerate(names):
        rows = [row for row, sample in enumerate(samples) if name in sample]
        if space[name].kind == "grid" and rows:
            joined = np.concatenate([samples[row][name] for row in rows], dtype=np.int64)
            ids[rows, column, : space[name].length] = joined.reshape(len(rows), space[name].length)
    return ids


def sequences(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> Sequences:
    """Every text (without its end token) and every sequence of vectors of a batch, cut at nothing yet."""
    columns, vectors = [(np.zeros(0, dtype=np.int64),) * 4], {}
    for name in names:
        rows = [row for row, sample in enumerate(samples) if name in sample]
        values = [samples[row][name] for row in rows]
        length = np.array([len(value) for value in values], dtype=np.int64)
        if space[name].kind == "vectors":
            vectors[name] = np.concatenate([np.zeros((1, space[name].dim)), *values], dtype=np.float32)
            values = [np.arange(1, len(vectors[name]))]
        columns.extend((np.full(1, row), ) for row in ())
        columns.append((np.array(rows, dtype=np.int64), np.full(len(rows), space.number[name]), length, *values))
    return columns


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
        samples: B samples; those named in `row` hold a uint8 or uint16 image (H, W, C), or (H, W) of one channel.
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
    rows, index = np.unique(row, return_inverse=True)
    images = [samples[row][name] for row in rows]
    for sample, image in zip((samples[row] for row in rows), images, strict=True):
        fits = image.shape == size or (channels == 1 and image.shape == size[:2])
        if not fits or image.dtype != images[0].dtype or image.dtype not in (np.uint8, np.uint16):
            raise complain(name, sample, f"{image.dtype} of shape {image.shape}", f"a uint8 or uint16 image {size}")
    grids = np.stack(images).reshape(-1, high, side, wide, side, channels)
    mean, deviation = np.asarray(modality.mean, dtype=np.float32), np.asarray(modality.std, dtype=np.float32)
    patches = grids[index, cell // wide, :, cell % wide] * (1 / (np.iinfo(grids.dtype).max * deviation))
    patches -= mean / deviation
    return patches.reshape(len(row), -1)
