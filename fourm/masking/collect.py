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
        ids: (R, T) ids of a text; for vectors 1 + the row of `vectors` (0 stands for a masked run).
        length: (R,) valid tokens.
        vectors: Per `vectors` modality the vectors of the whole batch one after another, (n, dim) float32.
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


def complain(name: str, sample: Sample, found: str, allowed: str) -> ValueError:
    """The error for a sample that does not fit its row of the modality table."""
    return ValueError(f"sample {sample.get('__key__', '?')!r}: {name} is {found}, expected {allowed}")


def present(samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """(B, len(names)) bool, which sample has which modality."""
    return np.array([[name in sample for name in names] for sample in samples], dtype=bool)


def check_ids(name: str, modality: Modality, sample: Sample) -> None:
    """Raises the error for ids of the wrong shape, type or range; nothing if they are right."""
    ids = np.asarray(sample[name])
    shape = f"({modality.length},)" if modality.kind == "grid" else "(length,)"
    allowed = f"integer ids of shape {shape} in [0, {modality.vocab_size})"
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or (modality.kind == "grid" and len(ids) != modality.length):
        raise complain(name, sample, f"{ids.dtype} of shape {ids.shape}", allowed)
    if ids.size and (ids.min() < 0 or ids.max() >= modality.vocab_size):
        raise complain(name, sample, f"ids in [{ids.min()}, {ids.max()}]", allowed)


def join_ids(name: str, modality: Modality, holders: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of one modality of several samples end to end (n,) int64, and how many each has.

    Raises:
        ValueError: Ids of the wrong shape, type or range; names the sample.
    """
    arrays = [np.asarray(sample[name]) for sample in holders]
    joined = np.concatenate(arrays) if all(array.ndim == 1 for array in arrays) else np.zeros(1)
    length = np.array([array.size for array in arrays])
    wrong_type = joined.dtype.kind not in "iu"
    wrong_length = modality.kind == "grid" and bool((length != modality.length).any())
    if wrong_type or wrong_length or (joined.size and (joined.min() < 0 or joined.max() >= modality.vocab_size)):
        for sample in holders:
            check_ids(name, modality, sample)
    return joined.astype(np.int64), length


def grid_ids(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """Ids of several grids side by side.

    Returns:
        (B, len(names), cells of the largest grid) int64, 0 where a grid is smaller or absent. Patches have no ids.

    Raises:
        ValueError: Ids of the wrong shape, type or range; names the sample.
    """
    cells = max((space[name].length for name in names), default=0)
    ids = np.zeros((len(samples), len(names), cells), dtype=np.int64)
    for column, name in enumerate(names):
        rows = [row for row, sample in enumerate(samples) if name in sample]
        if space[name].kind == "grid" and rows:
            joined, _ = join_ids(name, space[name], [samples[row] for row in rows])
            ids[rows, column, : space[name].length] = joined.reshape(len(rows), -1)
    return ids


def sequences(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> Sequences:
    """Every text (without its end token) and every sequence of vectors of a batch, cut at nothing yet.

    Raises:
        ValueError: A text or sequence of vectors of the wrong shape, type or range; names the sample.
    """
    row, mod, length, flat, vectors = [], [], [], [], {}
    for name in names:
        rows = [row for row, sample in enumerate(samples) if name in sample]
        if space[name].kind == "vectors":
            vectors[name] = np.zeros((0, space[name].dim), dtype=np.float32)
        if not rows:
            continue
        holders = [samples[row] for row in rows]
        if space[name].kind == "text":
            joined, lengths = join_ids(name, space[name], holders)
        else:
            vectors[name], lengths = join_vectors(name, space[name], holders)
            joined = 1 + np.arange(lengths.sum())
        row.append(rows)
        mod.append(np.full(len(rows), space.number[name]))
        length.append(lengths)
        flat.append(joined)
    if not row:
        nothing = np.zeros(0, dtype=np.int64)
        return Sequences(nothing, nothing, np.zeros((0, 1), dtype=np.int64), nothing, vectors)
    lengths = np.concatenate(length)
    ids = np.zeros((len(lengths), lengths.max() + 1), dtype=np.int64)  # one more, for the end token
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(flat)
    return Sequences(np.concatenate(row), np.concatenate(mod), ids, lengths, vectors)


def join_vectors(name: str, modality: Modality, holders: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of one modality of several samples end to end (n, dim) float32, and how many each has."""
    for sample in holders:
        if sample[name].ndim != 2 or sample[name].shape[1] != modality.dim:
            raise complain(name, sample, f"of shape {sample[name].shape}", f"vectors of shape (length, {modality.dim})")
    length = np.array([len(sample[name]) for sample in holders])
    return np.concatenate([sample[name] for sample in holders]).astype(np.float32), length


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
