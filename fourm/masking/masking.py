"""Samples in, masked batch out: draws budgets, then tokens, for a whole batch at once (Mizrahi et al. 2023, 4M)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fourm.masking.batch import MaskedBatch, Tokens, assemble
from fourm.masking.budgets import Budgets, MaskingConfig, Mixture
from fourm.masking.collect import Sample, Sequences, cut_patches, finish, grid_ids, present, sequences
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
        rows = list(space.modalities.values())
        self._chunk = np.array([row.chunk for row in rows])
        self._first_sentinel = np.array([row.first_sentinel for row in rows])
        self._is_text = np.array([row.kind == "text" for row in rows])
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
            ValueError: A sample that does not fit the modality table; names it.
        """
        epoch, index = np.array(draws, dtype=np.int64).reshape(-1, 2).T
        keys = self.mixture.keys(epoch, index)
        budgets = self.mixture.draw(present(samples, self.space.names), epoch, index)
        given, asked, contents = self._mask_grids(samples, budgets, keys)
        more_given, more_asked, vectors = self._mask_sequences(samples, budgets, keys)
        return assemble(
            self.space,
            tuple(str(sample.get("__key__", "")) for sample in samples),
            Tokens.join([given, more_given]),
            Tokens.join([asked, more_asked]),
            contents | vectors,
            self.mixture.widths,
        )

    def _mask_grids(
        self, samples: Sequence[Sample], budgets: Budgets, keys: np.ndarray
    ) -> tuple[Tokens, Tokens, dict[str, np.ndarray]]:
        """Cells that are given, cells that are asked (disjoint), and the pixels of given patches."""
        space = self.space
        numbers = np.array([space.number[name] for name in self._grids], dtype=np.int64)
        ids = grid_ids(space, samples, self._grids)
        given, asked = choose_cells(
            space.length[numbers], budgets.input[:, numbers], budgets.target[:, numbers], mix(keys + CELLS)
        )
        row, grid, cell = np.nonzero(given)
        contents = {}
        for name in self._grids:
            if space[name].kind == "patches":
                own = numbers[grid] == space.number[name]
                contents[name] = cut_patches(name, space[name], samples, row[own], cell[own])
        inputs = Tokens(row, numbers[grid], cell, ids[given])
        row, grid, cell = np.nonzero(asked)
        return inputs, Tokens(row, numbers[grid], cell, ids[asked]), contents

    def _mask_sequences(
        self, samples: Sequence[Sample], budgets: Budgets, keys: np.ndarray
    ) -> tuple[Tokens, Tokens, dict[str, np.ndarray]]:
        """Texts with sentinels and what these stand for; vectors with zeros in place of masked runs."""
        raw = sequences(self.space, samples, self._sequences)
        keys = mix(keys[raw.row] + raw.mod.astype(np.uint64))
        whole = finish(self.space, shuffle_chunks(raw, self._chunk[raw.mod], mix(keys + CHUNKS)))
        row, mod, ids, valid = whole.row, whole.mod, whole.ids, whole.valid
        unit = chunk_numbers(raw.length, self._chunk[mod], ids.shape[1])
        given_budget, asked_budget = budgets.input[row, mod], budgets.target[row, mod]
        kept = keep_within(valid, unit, budgets.keep[row, mod], given_budget, mix(keys + KEEPING))

        visible = valid & (given_budget > 0)[:, None]
        sequence, position, value, sentinel = span_inputs(ids, visible, kept, self._first_sentinel[mod])
        of = mod[sequence]
        inputs = Tokens(row[sequence], of, position, np.where(self._is_text[of], value, 0))
        contents = {}
        for name, vectors in whole.vectors.items():
            own = of == self.space.number[name]
            source = np.where(sentinel[own], 0, value[own])
            contents[name] = np.concatenate([np.zeros((1, vectors.shape[1]), dtype=np.float32), vectors])[source]

        asked_budget = np.where(self._is_text[mod], asked_budget, 0)
        chance = uniform(mix(keys + SENTINEL), 1)[:, 0]
        target, length = span_targets(ids, valid, kept, self._first_sentinel[mod], asked_budget, chance)
        sequence, position, fed, value = next_token_pairs(target, length)
        return inputs, Tokens(row[sequence], mod[sequence], position, value, fed), contents


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


def choose_cells(
    length: np.ndarray, given: np.ndarray, asked: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws disjoint random cells of G grids for B samples.

    Args:
        length: (G,) cells of each grid, at most L.
        given: (B, G) cells to give.
        asked: (B, G) cells to ask; `given + asked <= length`.
        keys: (B,) uint64 seeds.

    Returns:
        Two (B, G, L) bools: cells that are given, cells that are asked.
    """
    cells = np.arange(length.max(initial=1), dtype=np.uint64)
    highest = np.uint64(2**64 - 1)
    bits = np.uint64(int(cells[-1]).bit_length())
    rank = stream(keys, len(length) * len(cells)).reshape(len(keys), len(length), len(cells))
    rank = (rank >> bits << bits) | cells  # so that no two cells of a grid are equal
    rank[:, cells >= length[:, None]] = highest
    ordered = np.sort(rank, axis=2)

    def first(count: np.ndarray) -> np.ndarray:
        """The cells with the `count` lowest numbers."""
        limit = np.take_along_axis(ordered, np.minimum(count, len(cells) - 1)[..., None], axis=2)
        return rank < np.where(count[..., None] < len(cells), limit, highest)

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
