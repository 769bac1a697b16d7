"""Reconstruction losses: values of a prediction (B, C, H, W) and its target, to be averaged within each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from fourm.encoders import tensors_only


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


def per_image(errors: Tensor, valid: Tensor | None = None) -> Tensor:
    """Means (B,) of errors (B, [C,] H, W) over the pixels of each image, or over its valid ones, (B, H, W), only."""
    if valid is None:
        return errors.flatten(1).mean(1)
    errors = errors.mean(1) if errors.ndim > valid.ndim else errors
    return (errors * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


@dataclass(frozen=True)
class PerceptualConfig:
    """A loss between what a network that others trained sees in two pictures.

    Args:
        model: `lpips:vgg` or `lpips:alex` (Zhang et al. 2018; package `lpips`), `timm:<model>`, or nothing for no such
            loss.
        weight: Of its mean over images beside the mean of the reconstruction loss. (4M divides a `timm` loss by the
            batch twice, so that its weight w has the effect of w over the samples of a GPU here.)
        layers: Blocks or stages of a `timm` model whose features are compared.
        loss: Between features: one minus the `cosine`, or `l1`.
    """

    model: str = ""
    weight: float = 1.0
    layers: tuple[int, ...] = (2, 5, 8, 11)
    loss: Literal["cosine", "l1"] = "cosine"

    def __post_init__(self) -> None:
        if self.model and self.model.partition(":")[0] not in ("lpips", "timm"):
            raise ValueError(f"perceptual model is {self.model!r}, allowed are lpips:vgg, lpips:alex, timm:<model>")


class Perceptual(nn.Module):
    """The network of a `PerceptualConfig`, frozen; without `pretrained` its weights are random."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PerceptualConfig, pretrained: bool = True):
        super().__init__()
        self.config = config
        kind, _, name = config.model.partition(":")
        self.network: Any
        self.size: tuple[int, int] | None = None
        if kind == "lpips":
            try:
                import lpips
            except ImportError as error:
                raise ValueError(f"{config.model} needs the package lpips: pip install fourm[perceptual]") from error
            with tensors_only():
                self.network = lpips.LPIPS(net=name, pnet_rand=not pretrained, verbose=False)
        else:
            options: dict[str, Any] = {"features_only": True, "out_indices": config.layers}
            with tensors_only():
                self.network = timm.create_model(name, pretrained=pretrained, **options)
            data = resolve_model_data_config(self.network)
            self.size = data["input_size"][1:]
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(data[key]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) from 0 to 1, twice, to (B,)."""
        if self.size is None:
            return self.network(output, target, normalize=True).flatten()
        first, second = (self._maps(pictures) for pictures in (output, target))
        compare = LOSSES[self.config.loss]
        return torch.stack([per_image(compare(a, b)) for a, b in zip(first, second, strict=True)]).mean(0)

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        resized = F.interpolate(pictures, self.size, mode="bilinear", antialias=True)
        return self.network((resized - self.mean) / self.std)
