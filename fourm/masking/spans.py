"""Span masking: runs of masked tokens become sentinels in the input, and the target spells them out.

As in T5, but each token is masked on its own (Mizrahi et al. 2023, 4M). Vectorised over R sequences padded to T tokens.
"""

from __future__ import annotations

import numpy as np

from fourm.masking.hashing import uniform


def runs(masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of masked tokens begin (R, T) bool, and the number of the current or last run, from 1 (R, T)."""
    first = masked.copy()
    first[:, 1:] &= ~masked[:, :-1]
    return first, first.cumsum(axis=1)


def input_lengths(kept: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(R,), tokens of the input: kept ones, and one sentinel per run of masked ones."""
    first, _ = runs(valid & ~kept)
    return (kept & valid).sum(axis=1) + first.sum(axis=1)


def keep_within(
    valid: np.ndarray, unit: np.ndarray, keep: np.ndarray, budget: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """Draws which tokens stay visible, again and again until each input fits its budget.

    Every unit (a token, or a chunk of tokens) stays with the same probability; after every failed attempt that
    probability is multiplied by 0.9. With a budget of 0 nothing stays.

    Args:
        valid: (R, T), where a token is.
        unit: (R, T), number of the unit a token belongs to.
        keep: (R,), probability of the first attempt.
        budget: (R,), the most tokens the input may have, sentinels included.
        keys: (R,) uint64, seeds.

    Returns:
        (R, T) bool, tokens that stay visible.
    """
    kept, width = np.zeros_like(valid), valid.shape[1]
    open_rows = np.flatnonzero((budget > 0) & valid.any(axis=1))
    keep, attempt, tries = keep.copy(), 0, 1
    while len(open_rows):
        chance = np.full((len(open_rows), tries), 0.9)
        chance[:, 0] = keep[open_rows]
        chance = np.multiply.accumulate(chance, axis=1)
        seeds = keys[open_rows, None] + (np.arange(attempt, attempt + tries, dtype=np.uint64) << np.uint64(32))
        draws = np.take_along_axis(uniform(seeds, width), unit[open_rows, None], axis=2)
        room = valid[open_rows, None]
        tried = (draws < chance[..., None]) & room
        needed = input_lengths(tried.reshape(-1, width), np.broadcast_to(room, tried.shape).reshape(-1, width))
        fits = needed.reshape(-1, tries) <= budget[open_rows, None]
        done = fits.any(axis=1)
        kept[open_rows[done]] = tried[done, fits[done].argmax(axis=1)]
        keep[open_rows] = chance[:, -1] * 0.9
        open_rows, attempt, tries = open_rows[~done], attempt + tries, 8  # few need more than one, but some need many
    return kept


def span_inputs(
    ids: np.ndarray, valid: np.ndarray, kept: np.ndarray, first_sentinel: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs: kept tokens, with one sentinel ([S_1], [S_2], ...) for each run of masked ones.

    Args:
        ids: (R, T).
        valid: (R, T), where a token is.
        kept: (R, T), tokens that stay visible.
        first_sentinel: (R,), id of `[S_0]`.

    Returns:
        Sequence number, position, id, and whether it is a sentinel, of each input token; each (tokens,), in order.
    """
    first, run = runs(valid & ~kept)
    given = (kept & valid) | first
    row, token = np.nonzero(given)
    position = (given.cumsum(axis=1) - 1)[row, token]
    sentinel = first[row, token]
    return row, position, np.where(sentinel, first_sentinel[row] + run[row, token], ids[row, token]), sentinel


def span_targets(
    ids: np.ndarray,
    valid: np.ndarray,
    kept: np.ndarray,
    first_sentinel: np.ndarray,
    budget: np.ndarray,
    draw: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Targets: for each run of masked tokens its sentinel and the tokens; at last the next unused sentinel.

    A target above its budget begins at a random sentinel (not the last) and is cut to the budget; if less than the
    budget follows that sentinel, it begins at the earliest sentinel from which all the rest fits.

    Args:
        ids: (R, T).
        valid: (R, T), where a token is.
        kept: (R, T), tokens that stay visible.
        first_sentinel: (R,), id of `[S_0]`.
        budget: (R,), the most ids a target may have.
        draw: (R,), uniform in [0, 1), chooses the sentinel.

    Returns:
        ids (R, W), 0 behind the end, and how many are valid (R,).
    """
    masked = valid & ~kept
    first, run = runs(masked)
    total = run[:, -1] + masked.sum(axis=1) + 1
    row, token = np.nonzero(masked)
    place = (masked.cumsum(axis=1) + run - 1)[row, token]
    target = np.zeros((len(ids), total.max(initial=1)), dtype=np.int64)
    target[row, place] = ids[row, token]
    begins = first[row, token]
    sentinel = np.zeros(target.shape, dtype=bool)
    sentinel[row[begins], place[begins] - 1] = True
    sentinel[np.arange(len(ids)), total - 1] = True
    number = sentinel.cumsum(axis=1)
    target = np.where(sentinel, first_sentinel[:, None] + number, target)

    chosen = 1 + np.floor(draw * run[:, -1]).astype(np.int64)
    begin = (sentinel & (number == chosen[:, None])).argmax(axis=1)
    place_of = np.arange(target.shape[1])
    earliest = (sentinel & (place_of >= (total - budget)[:, None])).argmax(axis=1)
    begin = np.where(total - begin >= budget, begin, earliest)
    begin = np.where(total <= budget, 0, begin)
    shifted = np.take_along_axis(target, np.minimum(begin[:, None] + place_of, target.shape[1] - 1), axis=1)
    length = np.minimum(total - begin, budget)
    return np.where(place_of < length[:, None], shifted, 0), length


def next_token_pairs(target: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Teacher forcing: L ids are L - 1 predictions, each of an id from the ids before it.

    Args:
        target: (R, W) ids.
        length: (R,), how many are valid.

    Returns:
        Sequence number, position, id that is fed and id to predict, each (predictions,), in order.
    """
    row, position = np.nonzero(np.arange(1, target.shape[1] + 1) < length[:, None])
    return row, position, target[row, position], target[row, position + 1]
