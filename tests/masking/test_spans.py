"""Span masking row by row and by hand (tools/fixtures/masking.py compares it with the reference)."""

import numpy as np
import pytest

from fourm.masking.masking import chunk_numbers
from fourm.masking.spans import keep_within, next_token_pairs, span_inputs, span_targets


def test_spans_by_hand() -> None:
    """70 [71 72] 73 [74], [S_0] = 4; a target that is too long begins at the drawn sentinel, or where the rest fits."""
    ids = np.arange(70, 75)[None]
    kept, valid = np.array([[True, False, False, True, False]]), np.ones((1, 5), dtype=bool)
    _, position, given, sentinel = span_inputs(ids, valid, kept, np.array([4]))
    assert given.tolist() == [70, 5, 73, 6]
    assert position.tolist() == [0, 1, 2, 3]
    assert sentinel.tolist() == [False, True, False, True]
    for budget, draw, expected in (
        (9, 0.0, [5, 71, 72, 6, 74, 7]),
        (6, 0.9, [5, 71, 72, 6, 74, 7]),
        (5, 0.0, [5, 71, 72, 6, 74]),
        (3, 0.9, [6, 74, 7]),
        (4, 0.9, [6, 74, 7]),
        (0, 0.0, []),
    ):
        target, length = span_targets(ids, valid, kept, np.array([4]), np.array([budget]), np.array([draw]))
        assert target[0, : length[0]].tolist() == expected, (budget, draw)
        assert not target[0, length[0] :].any()


def test_padding_does_not_matter() -> None:
    """Rows of different lengths, masks and budgets give what each gives alone."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 13, 200)
    ids = rng.integers(100, 999, (200, 12))
    valid = np.arange(12) < length[:, None]
    kept = rng.random((200, 12)) < rng.random((200, 1))  # also set in the padding, where it must not count
    sentinel, budget, draw = rng.integers(0, 9, 200), rng.integers(0, 16, 200), rng.random(200)
    row, _, given, is_sentinel = span_inputs(ids, valid, kept, sentinel)
    assert (is_sentinel == (given < 50)).all()
    target, total = span_targets(ids, valid, kept, sentinel, budget, draw)
    for number, size in enumerate(length):
        one = slice(number, number + 1)
        alone = (ids[one, :size], valid[one, :size], kept[one, :size], sentinel[one])
        assert given[row == number].tolist() == span_inputs(*alone)[2].tolist()
        other, other_total = span_targets(*alone, budget[one], draw[one])
        assert target[number, : total[number]].tolist() == other[0, : other_total[0]].tolist()


def test_keep_within_fits_every_budget_and_keeps_chunks_whole() -> None:
    rng = np.random.default_rng(1)
    length, chunk = rng.integers(1, 30, 500), rng.integers(1, 4, 500)
    valid = np.arange(30) < length[:, None]
    unit = chunk_numbers(length - 1, chunk, 30)
    budget = rng.integers(0, 30, 500)
    kept = keep_within(valid, unit, rng.random(500), budget, np.arange(500, dtype=np.uint64))
    assert not (kept & ~valid).any()
    row, _, _, _ = span_inputs(np.zeros_like(unit), valid, kept, np.zeros(500, dtype=int))
    assert (np.bincount(row, minlength=500) <= np.maximum(budget, 1)).all()  # budget 0: nothing kept, one sentinel
    assert not kept[budget == 0].any()
    for number in range(500):
        for part in range(unit[number].max() + 1):
            assert len(set(kept[number, valid[number] & (unit[number] == part)])) <= 1


@pytest.mark.parametrize(("chance", "expected"), [(0.0, 0), (0.25, 0.25), (1.0, 1)])
def test_keep_probability(chance: float, expected: float) -> None:
    valid = np.ones((400, 50), dtype=bool)
    unit = np.broadcast_to(np.arange(50), valid.shape)
    keys = np.arange(400, dtype=np.uint64)
    kept = keep_within(valid, unit, np.full(400, chance), np.full(400, 999), keys)
    assert abs(kept.mean() - expected) <= 4 * np.sqrt(expected * (1 - expected) / kept.size)


def test_keep_probability_falls_by_a_tenth_until_it_fits() -> None:
    """A budget of 1 leaves room for one sentinel only (of 9 tokens), or for the only token of a text."""
    valid = np.arange(9) < np.array([[9], [1]] * 50)
    unit = np.broadcast_to(np.arange(9), valid.shape)
    kept = keep_within(valid, unit, np.ones(100), np.ones(100, dtype=int), np.arange(100, dtype=np.uint64))
    assert not kept[::2].any()
    assert kept[1::2, 0].all()


def test_chunk_numbers() -> None:
    """An end token is a chunk of its own, also behind an incomplete chunk."""
    numbers = chunk_numbers(np.array([4, 3, 3]), np.array([2, 2, 1]), 5)
    assert numbers[0].tolist() == [0, 0, 1, 1, 2]
    assert numbers[1, :4].tolist() == [0, 0, 1, 2]
    assert numbers[2, :4].tolist() == [0, 1, 2, 3]


def test_next_token_pairs() -> None:
    target = np.array([[5, 70, 71, 6], [5, 0, 0, 0], [5, 80, 0, 0], [0, 0, 0, 0]])
    row, position, fed, asked = next_token_pairs(target, np.array([4, 1, 2, 0]))
    assert row.tolist() == [0, 0, 0, 2]
    assert position.tolist() == [0, 1, 2, 0]
    assert fed.tolist() == [5, 70, 71, 5]
    assert asked.tolist() == [70, 71, 6, 80]
