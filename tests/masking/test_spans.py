"""Span masking against the reference's own results and against a slow, plain version."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fourm.masking.masking import chunk_numbers
from fourm.masking.spans import keep_within, next_token_pairs, span_inputs, span_targets

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "masking"
UNLIMITED = 2**31


def examples(name: str) -> list[dict]:
    if not FIXTURES.exists():
        pytest.skip(f"{FIXTURES} is absent")
    return json.loads((FIXTURES / name).read_text())["examples"]


def split(units: list, masked: list[int], budget: int = UNLIMITED, draw: float = 0.0) -> tuple[list[int], list[int]]:
    """Input and target ids of one sequence, whose units are ids or chunks of ids."""
    chunks = [unit if isinstance(unit, list) else [unit] for unit in units]
    ids = np.array([[id for chunk in chunks for id in chunk]], dtype=np.int64)
    kept = np.array([[not hide for chunk, hide in zip(chunks, masked, strict=True) for _ in chunk]])
    valid, sentinel = np.ones_like(kept), np.array([4])
    _, position, given, _ = span_inputs(ids, valid, kept, sentinel)
    assert position.tolist() == list(range(len(position)))
    target, length = span_targets(ids, valid, kept, sentinel, np.array([budget]), np.array([draw]))
    assert (target[0, length[0] :] == 0).all()
    return given.tolist(), target[0, : length[0]].tolist()


def test_spans_equal_the_reference() -> None:
    for example in examples("span_masking.json"):
        given, asked = split(example["unit_ids"], example["masked"])
        assert given == example["input_ids"], example["text"]
        assert asked == example["target_ids"], example["text"]


def units_of(example: dict, tokenizer: Tokenizer) -> list:
    """Ids or chunks of ids of a `sequence_mask.json` example, cut to its greatest length."""
    text = example["sequence"]
    if isinstance(text, str):
        return ([*tokenizer.encode(text).ids, 3])[: example["max_tokens"]]
    units, room = [], example["max_tokens"]
    for chunk in [*[tokenizer.encode(part).ids for part in text], [3]]:
        room -= len(chunk)
        if room < 0:
            break
        units.append(chunk)
    return units


def test_budgets_and_truncation_equal_the_reference() -> None:
    cases, truncated = examples("sequence_mask.json"), 0
    tokenizer = Tokenizer.from_file(str(FIXTURES.parent / "text_tokenizer_4m_wordpiece_30k.json"))
    for example in cases:
        budget = UNLIMITED if example["target_budget"] is None else example["target_budget"]
        draw = example["sentinel_draw"]
        chance = (draw["value"] + 0.5) / draw["high"] if draw else 0.0
        given, asked = split(units_of(example, tokenizer), example["masked_last_attempt"], budget, chance)
        assert (given if example["input_budget"] else []) == example["input_ids"]
        assert asked == example["target_ids"]
        truncated += draw is not None
    assert truncated > 20


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
