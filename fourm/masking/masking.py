"""Samples in, masked batch out: draws budgets, then tokens, for a whole batch at once (Mizrahi et al. 2023, 4M)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fourm.masking.batch import MaskedBatch, Selection, Tokens, assemble
from fourm.masking.budgets import Budgets, MaskingConfig, Mixture
from fourm.masking.collect import Sample, Sequences, cut_patches, finish, gather, grid_ids, keys_of, present, sequences
from fourm.masking.hashing import mix, stream, uniform
from fourm.masking.spans import keep_within, next_token_pairs, span_inputs, span_targets
from fourm.modalities import Modality, TokenSpace

# What a sample's key is mixed with, so that no two uses share their draws.
CELLS, CHUNKS, KEEPING, SENTINEL = (np.uint64(number << 48) for number in range(1, 5))


class Masker:
    """Draws which tokens of a batch are given and which are asked; the `collate` of a loader.

    Args:
        space: The modality table.
        config: Budgets, mixture and seed.

    Raises:
        ValueError: A wrong config, or a text that could need more sentinels than its vocabulary has.
    """

    def __init__(self, space: TokenSpace, config: MaskingConfig):
        self.space = space
        self.config = config
        self.mixture = Mixture(space, config)
        self._grids = [name for name in space.names if space[name].grid]
        self._sequences = [name for name in space.names if not space[name].grid]
        self._chunk = np.array([row.chunk for row in space.modalities.values()])
        for name, row in space.modalities.items():
            check_sentinels(name, row)

    def __call__(self, samples: Sequence[Sample], draws: Sequence[tuple[int, int]]) -> MaskedBatch:
        """Masks B samples.

        Args:
            samples: Token samples, name to ids, image or vectors; a modality may be absent.
            draws: (epoch, index) of each sample, what all its randomness depends on.

        Returns:
            A batch of the widths N, M that the budgets allow at most.

        Raises:
            ValueError: An id outside of its vocabulary or an unfit image; names the sample. (`TokenDataset` has checked
                all that already.)
        """
        return assemble(self.space, keys_of(samples), self.select(samples, draws), self.mixture.widths)

    def select(self, samples: Sequence[Sample], draws: Sequence[tuple[int, int]]) -> Selection:
        """What is given and asked of B samples; arguments and errors as those of a call."""
        epoch, index = np.array(draws, dtype=np.int64).reshape(-1, 2).T
        keys = self.mixture.keys(epoch, index)
        budgets = self.mixture.draw(present(samples, self.space.names), epoch, index)
        return self._mask_grids(samples, budgets, keys) | self._mask_sequences(samples, budgets, keys)

    def _mask_grids(self, samples: Sequence[Sample], budgets: Budgets, keys: np.ndarray) -> Selection:
        numbers = [self.space.number[name] for name in self._grids]
        most_given, most_asked = budgets.input[:, numbers], budgets.target[:, numbers]
        rank = cell_ranks(self.space.length[numbers], mix(keys + CELLS))
        given, asked = choose_cells(rank, most_given, most_asked)
        return select_cells(self.space, samples, self._grids, given, asked)

    def _mask_sequences(self, samples: Sequence[Sample], budgets: Budgets, keys: np.ndarray) -> Selection:
        raw = sequences(self.space, samples, self._sequences)
        keys = mix(keys[raw.row] + raw.mod.astype(np.uint64))
        chunk = self._chunk[raw.mod]
        whole = finish(self.space, shuffle_chunks(raw, chunk, mix(keys + CHUNKS)))
        unit = chunk_numbers(raw.length, chunk, whole.ids.shape[1])
        most_given, most_asked, keep = (
            table[whole.row, whole.mod] for table in (budgets.input, budgets.target, budgets.keep)
        )
        kept = keep_within(whole.valid, unit, keep, most_given, mix(keys + KEEPING))
        draw = uniform(mix(keys + SENTINEL), 1)[:, 0]
        return select_spans(self.space, whole, kept, most_given > 0, most_asked, draw)


class MixedMasker:
    """Masks every sample as its data set is masked; the `collate` of a mixture.

    Args:
        maskers: One for each data set, of the same token space.
        ends: Where the samples of each data set end, as the mixture numbers them.
    """

    def __init__(self, maskers: Sequence[Masker], ends: Sequence[int]):
        self.maskers, self.ends = list(maskers), np.array(ends)
        self.widths = np.max([masker.mixture.widths for masker in self.maskers], axis=0).tolist()

    def __call__(self, samples: Sequence[Sample], draws: Sequence[tuple[int, int]]) -> MaskedBatch:
        """Masks B samples; as `Masker`."""
        number = self.ends.searchsorted([index for _, index in draws], side="right")
        rows = [np.flatnonzero(number == each) for each in np.unique(number)]  # of each data set
        groups = [
            self.maskers[number[own[0]]].select([samples[i] for i in own.tolist()], [draws[i] for i in own.tolist()])
            for own in rows
        ]
        space = self.maskers[0].space
        return assemble(space, keys_of(samples), Selection.of_groups(rows, groups), self.widths)


def select_cells(
    space: TokenSpace, samples: Sequence[Sample], names: Sequence[str], given: np.ndarray, asked: np.ndarray
) -> Selection:
    """Some cells of G grids and images as inputs, and some as targets.

    Args:
        space: The modality table.
        samples: B token samples.
        names: The G modalities.
        given: (B, G, cells of the largest grid) bool, cells that are given.
        asked: (B, G, cells of the largest grid) bool, cells that are asked.
    """
    numbers = np.array([space.number[name] for name in names], dtype=np.int64)
    ids = grid_ids(space, samples, names)
    inputs, targets = (
        Tokens(row, numbers[grid], cell, ids[row, grid, cell])
        for row, grid, cell in (np.nonzero(given), np.nonzero(asked))
    )
    contents = {}
    for name in names:
        if space[name].kind == "patches":
            own = inputs.mod == space.number[name]
            contents[name] = cut_patches(name, space[name], samples, inputs.row[own], inputs.pos[own])
    return Selection(inputs, targets, contents)


def select_spans(
    space: TokenSpace, whole: Sequences, kept: np.ndarray, given: np.ndarray, asked: np.ndarray, draw: np.ndarray
) -> Selection:
    """R texts with sentinels as inputs and what these stand for as targets; vectors with zeros for masked runs.

    Args:
        space: The modality table.
        whole: The sequences, ended and cut.
        kept: (R, T) bool, tokens that stay visible.
        given: (R,) bool, whether the sequence is an input at all.
        asked: (R,), the most ids its target may have; nothing is asked of vectors.
        draw: (R,), uniform in [0, 1), chooses where a target that is too long begins.
    """
    first_sentinel = np.array([row.first_sentinel for row in space.modalities.values()])[whole.mod]
    is_text = np.array([row.kind == "text" for row in space.modalities.values()])[whole.mod]
    sequence, position, value, sentinel = span_inputs(whole.ids, whole.valid & given[:, None], kept, first_sentinel)
    inputs = Tokens(whole.row[sequence], whole.mod[sequence], position, np.where(is_text[sequence], value, 0))
    contents = {}
    for name, vectors in whole.vectors.items():
        own = inputs.mod == space.number[name]
        contents[name] = gather(vectors, np.where(sentinel[own], 0, value[own]), space[name].dim)
    most = np.where(is_text, asked, 0)
    sequence, position, fed, value = next_token_pairs(
        *span_targets(whole.ids, whole.valid, kept, first_sentinel, most, draw)
    )
    return Selection(inputs, Tokens(whole.row[sequence], whole.mod[sequence], position, value, fed), contents)


def check_sentinels(name: str, modality: Modality) -> None:
    """Raises an error if masking every second unit of the longest text would run out of sentinels."""
    if modality.kind != "text":
        return
    units = modality.max_tokens if modality.chunk == 1 else -(-modality.max_tokens // modality.chunk) + 1
    needed = (units + 1) // 2 + 2  # one for each run, a closing one, and the unused [S_0]
    available = min(modality.sentinels, modality.vocab_size - modality.first_sentinel)
    if needed > available:
        raise ValueError(
            f"{name} has room for {available} sentinels from id {modality.first_sentinel} on, but texts of "
            f"{modality.max_tokens} tokens can need {needed}; add sentinels or lower max_tokens"
        )


def cell_ranks(length: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Draws the order in which the cells of G grids are taken.

    Args:
        length: (G,) cells of each grid, at most L.
        keys: (B,) uint64 seeds.

    Returns:
        (B, G, L) uint64, no two cells of a grid alike; cells outside of a grid come last.
    """
    cells = np.arange(length.max(initial=1), dtype=np.uint64)
    bits = np.uint64(int(cells[-1]).bit_length())
    rank = stream(keys, len(length) * len(cells)).reshape(len(keys), len(length), len(cells))
    rank = (rank >> bits << bits) | cells
    rank[:, cells >= length[:, None]] = np.uint64(2**64 - 1)
    return rank


def choose_cells(rank: np.ndarray, given: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Takes disjoint cells of G grids for B samples.

    Args:
        rank: (B, G, L) numbers; the lowest are given, the next ones asked.
        given: (B, G) cells to give.
        asked: (B, G) cells to ask; `given + asked` is at most the number of cells of the grid.

    Returns:
        Two (B, G, L) bools: cells that are given, cells that are asked.
    """
    ordered, cells = np.sort(rank, axis=2), rank.shape[2]

    def first(count: np.ndarray) -> np.ndarray:
        """The cells with the `count` lowest numbers."""
        limit = np.take_along_axis(ordered, np.minimum(count, cells - 1)[..., None], axis=2)
        return (rank < limit) | (count[..., None] >= cells)

    chosen = first(given)
    return chosen, first(given + asked) & ~chosen


def shuffle_chunks(raw: Sequences, chunk: np.ndarray, keys: np.ndarray) -> Sequences:
    """Puts the chunks of every text with chunk > 1 in random order; an incomplete last chunk stays where it is."""
    rows = np.flatnonzero(chunk > 1)
    if not len(rows):
        return raw
    size, width = chunk[rows, None], raw.ids.shape[1]
    token = np.arange(width)
    complete = token < raw.length[rows, None] // size
    order = np.where(complete, uniform(keys[rows], width), 1 + token).argsort(axis=1)
    source = np.take_along_axis(order, token // size, axis=1) * size + token % size
    ids = raw.ids.copy()
    ids[rows] = np.take_along_axis(ids[rows], np.minimum(source, width - 1), axis=1)
    return dataclasses.replace(raw, ids=ids)


def chunk_numbers(length: np.ndarray, chunk: np.ndarray, width: int) -> np.ndarray:
    """(R, width), the chunk of each token; an end token, at `length`, is a chunk of its own."""
    token, size = np.arange(width), chunk[:, None]
    return np.where(token == length[:, None], -(-length[:, None] // size), token // size)
