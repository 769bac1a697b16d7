"""Quantizers: continuous latents to ids and back, behind one call.

Each row of `QUANTIZERS` wraps one layer of `vector-quantize-pytorch`. FSQ (Mentzer et al. 2023) needs no codebook and
is the default; VQ learns its codes by moving averages and replaces codes that nothing falls on, which suits fields
that are mostly empty; LFQ (Yu et al. 2023) and SimVQ (Zhu et al. 2024) scale to large vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize


@dataclass(frozen=True)
class QuantizerConfig:
    """How latents become ids.

    Args:
        type: One of `fsq`, `vq`, `lfq`, `simvq`.
        levels: Values per latent dimension (fsq); the vocabulary is their product.
        codebook_size: Number of codes (vq, simvq; a power of two for lfq).
        dim: Width of the latent (vq, simvq).
        cosine: Compare directions only (vq).
        decay: Of the moving averages of the codes (vq).
        dead_code: A code whose moving average of hits a step falls below this is replaced by a random latent (vq).
        weight: Of the quantizer's own loss: commitment (vq, simvq) or commitment and entropy (lfq).
    """

    type: Literal["fsq", "vq", "lfq", "simvq"] = "fsq"
    levels: tuple[int, ...] = (8, 8, 8)
    codebook_size: int = 512
    dim: int = 16
    cosine: bool = False
    decay: float = 0.95
    dead_code: float = 1.0
    weight: float = 0.25

    def __post_init__(self) -> None:
        if self.type not in QUANTIZERS:
            raise ValueError(f"quantizer type is {self.type!r}, allowed are {', '.join(QUANTIZERS)}")
        if self.type == "fsq" and (not self.levels or min(self.levels) < 3):
            raise ValueError(f"levels is {list(self.levels)}, expected at least one number, each 3 or more")
        if self.type == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size is {self.codebook_size}, lfq needs a power of two")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return math.prod(self.levels) if self.type == "fsq" else self.codebook_size

    @property
    def latent_dim(self) -> int:
        """Width of the latent that is quantized."""
        return {"fsq": len(self.levels), "lfq": self.codebook_size.bit_length() - 1}.get(self.type, self.dim)


def _vq(config: QuantizerConfig) -> VectorQuantize:
    return VectorQuantize(
        dim=config.dim,
        codebook_size=config.codebook_size,
        decay=config.decay,
        use_cosine_sim=config.cosine,
        kmeans_init=True,
        threshold_ema_dead_code=config.dead_code,
        commitment_weight=config.weight,
    )


QUANTIZERS: dict[str, Callable[[QuantizerConfig], nn.Module]] = {
    "fsq": lambda config: FSQ(levels=list(config.levels)),
    "vq": _vq,
    "lfq": lambda config: LFQ(
        codebook_size=config.codebook_size, entropy_loss_weight=config.weight, commitment_loss_weight=config.weight
    ),
    "simvq": lambda config: SimVQ(dim=config.dim, codebook_size=config.codebook_size, commitment_weight=config.weight),
}


class Quantizer(nn.Module):
    """One quantizer layer. B images, n latents an image, d = `config.latent_dim`."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.layer: Any = QUANTIZERS[config.type](config)
        # Fixed levels stay unused unless the latents spread over them; a learned codebook follows the latents.
        fixed = config.type in ("fsq", "lfq")
        self.norm = nn.BatchNorm1d(config.latent_dim, affine=False) if fixed else nn.Identity()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes latents; gradients pass straight through.

        Args:
            z: (B, n, d) latents.

        Returns:
            Quantized latents (B, n, d), ids (B, n) int64, and the quantizer's own loss (scalar, 0 for FSQ).
        """
        with torch.autocast(z.device.type, enabled=False):  # nearest codes and moving averages need full precision
            z = self.norm(z.float().flatten(0, 1)).view_as(z)
            quantized, ids, *loss = self.layer(z)
        return quantized, ids.long(), sum((part.sum() for part in loss), z.new_zeros(()))

    def codes(self, ids: Tensor) -> Tensor:
        """Latents (B, n, d) of ids (B, n): exactly what `forward` returned for them."""
        if self.config.type == "vq":
            return self.layer.get_output_from_indices(ids)
        return self.layer.indices_to_codes(ids)
