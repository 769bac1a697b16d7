"""Batches without chance: some modalities wholly given, others wholly asked (evaluation, fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fourm.masking.batch import MaskedBatch, Selection, assemble
from fourm.masking.collect import Sample, finish, keys_of, sequences
from fourm.masking.masking import select_cells, select_spans
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
    return assemble(space, keys_of(samples), select_whole(space, samples, inputs, targets))


def select_whole(
    space: TokenSpace, samples: Sequence[Sample], inputs: Sequence[str], targets: Sequence[str]
) -> Selection:
    """What `transfer_batch` packs, with the same arguments and errors."""
    check(space, samples, inputs, targets)
    names = sorted([*inputs, *targets], key=space.number.__getitem__)
    is_target = np.array([name in targets for name in space.names])
    grids = [name for name in names if space[name].grid]
    numbers = np.array([space.number[name] for name in grids], dtype=np.int64)
    inside = np.arange(space.length[numbers].max(initial=0)) < space.length[numbers][:, None]
    inside = np.broadcast_to(inside, (len(samples), *inside.shape))
    asked = is_target[numbers][:, None]
    cells = select_cells(space, samples, grids, inside & ~asked, inside & asked)

    whole = finish(space, sequences(space, samples, [name for name in names if name not in grids]))
    asked = is_target[whole.mod]
    kept = np.broadcast_to(~asked[:, None], whole.ids.shape)
    nothing = np.zeros(len(asked))
    return cells | select_spans(space, whole, kept, ~asked, np.where(asked, 2**31, 0), nothing)


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
