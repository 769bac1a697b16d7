"""Reconstruction losses. Each maps a prediction (B, C, H, W) and its target to one number per image, (B,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _per_image(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def l1(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean absolute difference; both (B, C, H, W)."""
    return _per_image((prediction - target).abs())


def mse(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared difference; both (B, C, H, W)."""
    return _per_image((prediction - target).square())


def smooth_l1(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Quadratic below a difference of 1, linear above; both (B, C, H, W)."""
    return _per_image(F.smooth_l1_loss(prediction, target, reduction="none"))


def cosine(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """One minus the cosine of the angle between the vectors along C; both (B, C, H, W)."""
    return _per_image(1 - F.cosine_similarity(prediction, target, dim=1, eps=1e-6))


def cross_entropy(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Nats per pixel, times the weight of the true class.

    Args:
        prediction: (B, C, H, W) logits.
        target: (B, H, W) class numbers, int64.
        weights: (C,) weight of each class, or None for 1. The mean is over pixels, not over weights.
    """
    logits = prediction.movedim(1, -1)  # a softmax over the last axis is several times faster on a CPU
    nats = F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight=weights, reduction="none")
    return _per_image(nats.view_as(target))


LOSSES: dict[str, Loss] = {
    "l1": l1,
    "mse": mse,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
    "cross_entropy": cross_entropy,
}


def class_weights(values: tuple[float, ...], classes: int, device: torch.device) -> Tensor | None:
    """The configured weights as a tensor (C,), None if there are none.

    Raises:
        ValueError: Not one weight per class.
    """
    if not values:
        return None
    if len(values) != classes:
        raise ValueError(f"{len(values)} class weights for {classes} classes, expected one for each")
    return torch.tensor(values, dtype=torch.float32, device=device)
