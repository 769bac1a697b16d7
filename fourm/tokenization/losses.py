"""Reconstruction losses: values of a prediction (B, C, H, W) and its target, to be averaged within each image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine of the angle between the vectors along C: (B, C, H, W), (B, C, H, W) -> (B, H, W)."""
    return 1 - F.cosine_similarity(prediction, target, dim=1, eps=1e-6)


def cross_entropy(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Nats per pixel, times the weight of the true class.

    Args:
        prediction: (B, C, H, W) logits.
        target: (B, H, W) class numbers, int64.
        weight: (C,) weight of each class, or None for 1.
    """
    logits = prediction.movedim(1, -1)  # a softmax over the last axis is several times faster on a CPU
    nats = F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight=weight, reduction="none")
    return nats.view_as(target)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "l1": partial(F.l1_loss, reduction="none"),
    "mse": partial(F.mse_loss, reduction="none"),
    "smooth_l1": partial(F.smooth_l1_loss, reduction="none"),
    "cosine": cosine,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": partial(F.binary_cross_entropy_with_logits, reduction="none"),
}
