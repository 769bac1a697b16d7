"""Two models on the same held-out samples: bits per target token, and the paired interval of their difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fourm.evaluation.matrix import bits_per_row, chosen_rows, raw_sources, raw_targets
from fourm.evaluation.metrics import bootstrap_ratio
from fourm.masking.transfer import transfer_batch
from fourm.model.fourm import FourM


@dataclass(frozen=True)
class Versus:
    """The same prediction by both models.

    Args:
        target: Raw modality that is predicted, with the same tokens for both.
        source: What the model is given; several as `rgb+relief`.
        other: What the other one is given; default: the same.
    """

    target: str
    source: str
    other: str = ""


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared.

    Args:
        model: Folder or hub id of the other model; nothing for no comparison.
        pairs: The predictions.
        n: Test samples; all where there are fewer.
        batch_size: Samples per pass.
        seed: Of their choice.
    """

    model: str = ""
    pairs: Sequence[Versus] = ()
    n: int = 512
    batch_size: int = 32
    seed: int = 0


@torch.inference_mode()
def bits_of(model: FourM, samples: Sequence[Any], sources: Sequence[str], target: str, batch_size: int) -> np.ndarray:
    """Bits of each sample's target and its number of tokens, (2, B); grids in one pass, texts teacher-forced.

    Args:
        model: In evaluation mode.
        samples: B token samples.
        sources: Raw modalities that are given.
        target: Raw modality that is predicted.
        batch_size: Samples per pass.

    Raises:
        ValueError: The model has no such source or target.
    """
    given, asked, found = raw_sources(model.space), raw_targets(model.space), []
    if unknown := [name for name in sources if name not in given] + [target] * (target not in asked):
        raise ValueError(f"{', '.join(unknown)}: the model is given {', '.join(given)}, predicts {', '.join(asked)}")
    for start in range(0, len(samples), batch_size):
        rows = samples[start : start + batch_size]
        batch = transfer_batch(model.space, rows, [given[name] for name in sources], [asked[target]])
        batch = batch.to(next(model.parameters()).device)
        count = (batch.target_mod >= 0).sum(1).cpu().numpy()
        found.append(np.stack([bits_per_row(model, batch, model(batch)), count]))
    return np.concatenate(found, axis=1)


def compare(model: FourM, other: FourM, tokens: Any, config: ComparisonConfig) -> dict[str, dict[str, Any]]:
    """What the model saves over the other one, in bits per target token; more is better.

    Returns:
        `{"rgb+features->climate, other rgb": {"bits", "other_bits", "saved_bits", "ci95", "n"}}`, the interval from
        redrawing the samples, the same for both.
    """
    rows = chosen_rows(len(tokens), min(config.n, len(tokens)), config.seed)
    samples, found = [tokens[row] for row in rows], {}
    for pair in config.pairs:
        theirs = pair.other or pair.source
        (bits, count), (other_bits, _) = (
            bits_of(each.eval(), samples, source.split("+"), pair.target, config.batch_size)
            for each, source in ((model, pair.source), (other, theirs))
        )
        found[f"{pair.source}->{pair.target}, other {theirs}"] = {
            "bits": float(bits.sum() / count.sum()),
            "other_bits": float(other_bits.sum() / count.sum()),
            "saved_bits": float((other_bits - bits).sum() / count.sum()),
            "ci95": list(bootstrap_ratio(other_bits - bits, count, seed=config.seed)),
            "n": len(samples),
        }
    return found
