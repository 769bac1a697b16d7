"""Batches without chance: some modalities wholly given, others wholly asked (evaluation, fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fourm.masking.batch import MaskedBatch, Tokens, assemble
from fourm.masking.collect import Sample, cut_patches, finish, grid_ids, sequences
from fourm.masking.spans import next_token_pairs, span_targets
from fourm.modalities import TokenSpace


def transfer_batch(
    space: TokenSpace, samples: Sequence[Sample], inputs: Sequence[str], targets: Sequence[str]
) -> MaskedBatch:
    """Packs samples so that `inputs` are fully visible and `targets` fully masked.

    A text is given as its tokens and the end token, and asked as `[S_1]`, tokens, end token, `[S_2]`: every token is
    predicted, from those before it.

    Args:
        space: The modality table.
        samples: B token samples that hold all of these modalities.
        inputs: Modalities to give; none is allowed, the encoder then has one empty slot.
        targets: Modalities to ask for; none is allowed too.

    Raises:
        ValueError: A modality that is unknown, in both lists, absent from a sample, or that cannot be given or asked.
    """
    check(space, samples, inputs, targets)
    given, contents = whole_inputs(space, samples, sorted(inputs, key=space.number.__getitem__))
    asked = whole_targets(space, samples, sorted(targets, key=space.number.__getitem__))
    keys = tuple(str(sample.get("__key__", "")) for sample in samples)
    return assemble(space, keys, given, asked, contents)


def check(space: TokenSpace, samples: Sequence[Sample], inputs: Sequence[str], targets: Sequence[str]) -> None:
    """Raises the errors of `transfer_batch`."""
    both = sorted(set(inputs) & set(targets))
    if both:
        raise ValueError(f"{', '.join(both)}: given and asked at once; inputs and targets must not overlap")
    unfit = [name for name in inputs if not space[name].input]
    if unfit:
        raise ValueError(f"{', '.join(unfit)}: not an input, allowed are {', '.join(space.inputs())}")
    unfit = [name for name in targets if not space[name].predicted]
    if unfit:
        raise ValueError(f"{', '.join(unfit)}: cannot be predicted, allowed are {', '.join(space.outputs())}")
    for sample in samples:
        missing = [name for name in (*inputs, *targets) if name not in sample]
        if missing:
            raise ValueError(f"sample {sample.get('__key__', '?')!r} has no {', '.join(missing)}")


def whole_grids(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> Tokens:
    """Every cell of several grids or images."""
    numbers = np.array([space.number[name] for name in names], dtype=np.int64)
    ids = grid_ids(space, samples, names)
    inside = np.arange(ids.shape[2]) < space.length[numbers][:, None]
    row, column, cell = np.nonzero(np.broadcast_to(inside, ids.shape))
    return Tokens(row, numbers[column], cell, ids[row, column, cell])


def whole_inputs(
    space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]
) -> tuple[Tokens, dict[str, np.ndarray]]:
    """All tokens of some modalities as inputs, and the contents of the continuous ones."""
    grids = [name for name in names if space[name].grid]
    cells = whole_grids(space, samples, grids)
    contents = {}
    for name in grids:
        if space[name].kind == "patches":
            own = cells.mod == space.number[name]
            contents[name] = cut_patches(name, space[name], samples, cells.row[own], cells.pos[own])
    texts = finish(space, sequences(space, samples, [name for name in names if not space[name].grid]))
    row, position = np.nonzero(texts.valid)
    mod, ids = texts.mod[row], texts.ids[row, position]
    for name, vectors in texts.vectors.items():
        own = mod == space.number[name]
        contents[name] = vectors[ids[own] - 1]
        ids[own] = 0
    return Tokens.join([cells, Tokens(texts.row[row], mod, position, ids)]), contents


def whole_targets(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> Tokens:
    """All tokens of some modalities as targets."""
    cells = whole_grids(space, samples, [name for name in names if space[name].grid])
    texts = finish(space, sequences(space, samples, [name for name in names if not space[name].grid]))
    sentinel = np.array([row.first_sentinel for row in space.modalities.values()])[texts.mod]
    unlimited, nothing = np.full(len(texts.mod), 2**31), np.zeros(len(texts.mod))
    target, length = span_targets(texts.ids, texts.valid, np.zeros_like(texts.valid), sentinel, unlimited, nothing)
    row, position, fed, asked = next_token_pairs(target, length)
    return Tokens.join([cells, Tokens(texts.row[row], texts.mod[row], position, asked, fed)])
