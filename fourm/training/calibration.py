"""Calibrates a trained model: one temperature per modality (Guo et al. 2017, section 4.2).

A small model that is trained long on little data is too sure of itself where it has never been, which costs bits
without changing what it finds most likely. Dividing the logits of each modality by one number mends most of that.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fourm.masking.batch import MaskedBatch
from fourm.model.fourm import FourM

# Temperatures to choose from; steps of 4 %.
GRID = torch.logspace(-1, 3, 101, base=2.0)


@torch.no_grad()
def calibrate(model: FourM, batches: Iterable[MaskedBatch]) -> dict[str, float]:
    """Sets `model.temperature` to what predicts held-out batches best.

    Args:
        model: The trained model; changed in place, and put into evaluation mode.
        batches: Of samples it was not trained on, on its device.

    Returns:
        The temperature of each modality that the batches ask for; that of others stays as it was.
    """
    model.eval()
    names = model.space.names
    before = model.temperature.clone()
    sums = torch.zeros(len(names), len(GRID))  # nats
    for batch in batches:
        for name, logits, ids, _ in model.scores(batch, model(batch)):
            number = model.space.number[name]
            logits = logits.float() * before[number]
            for column, temperature in enumerate(GRID.tolist()):
                sums[number, column] += F.cross_entropy(logits / temperature, ids, reduction="sum").cpu()
    asked = sums.sum(1) > 0
    chosen: Tensor = torch.where(asked, GRID[sums.argmin(1)], before.cpu())
    model.temperature.copy_(chosen)
    return {name: round(float(chosen[number]), 3) for number, name in enumerate(names) if asked[number]}
