"""Encoder and decoder bodies of image tokenizers: patches to latents and back.

B images, C channels, H x W pixels, p pixels a side of a patch, n = (H / p) * (W / p) tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of encoder and decoder.

    Args:
        patch_size: Pixels a side that become one token.
        width: Features per token.
        heads: Attention heads (vit).
        mlp_ratio: Hidden width of the MLPs over `width`.
        encoder: Blocks of the encoder: `vit` (attention over all tokens), `conv` (3x3 neighbours) or `mlp` (the token
            alone: ids then depend on their own patch only, which makes them easiest to predict).
        encoder_depth: Number of them.
        decoder: Blocks of the decoder.
        decoder_depth: Number of them.
    """

    patch_size: int = 8
    width: int = 128
    heads: int = 4
    mlp_ratio: float = 2.0
    encoder: Literal["vit", "conv", "mlp"] = "mlp"
    encoder_depth: int = 1
    decoder: Literal["vit", "conv", "mlp"] = "vit"
    decoder_depth: int = 1

    def __post_init__(self) -> None:
        for name, value in (("encoder", self.encoder), ("decoder", self.decoder)):
            if value not in BLOCKS:
                raise ValueError(f"{name} is {value!r}, allowed are {', '.join(BLOCKS)}")


class MlpBlock(nn.Module):
    """A residual MLP on each token alone."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, D) to (B, n, D)."""
        return tokens + self.mlp(self.norm(tokens))


class ConvBlock(MlpBlock):
    """A residual MLP on each token after a depthwise 3x3 convolution over the grid (ConvNeXt)."""

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.conv = nn.Conv2d(config.width, config.width, 3, padding=1, groups=config.width)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, D) to (B, n, D)."""
        mixed = self.conv(tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return tokens + self.mlp(self.norm(mixed))


class VitBlock(nn.Module):
    """Pre-norm self-attention over all tokens, then an MLP (timm)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.block = Block(config.width, config.heads, mlp_ratio=config.mlp_ratio, qkv_bias=True)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, D) to (B, n, D)."""
        return self.block(tokens)


BLOCKS: dict[str, Callable[[BackboneConfig], nn.Module]] = {"vit": VitBlock, "conv": ConvBlock, "mlp": MlpBlock}


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts (B, C, H, W) into row-major patches (B, n, C * p * p), channel slowest."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (B, n, C * p * p) to (B, C, H, W)."""
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), patch_size)


class _Body(nn.Module):
    """Blocks over a grid of tokens with a learned vector per position."""

    def __init__(self, config: BackboneConfig, block: str, depth: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(0.02 * torch.randn(1, grid[0] * grid[1], config.width))
        self.blocks = nn.ModuleList(BLOCKS[block](config) for _ in range(depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens, self.grid)
        return self.norm(tokens)


class Encoder(nn.Module):
    """Pixels (B, C, H, W) to latents (B, n, d)."""

    def __init__(self, config: BackboneConfig, channels: int, latent_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.patch_size = config.patch_size
        self.patches = nn.Linear(channels * config.patch_size**2, config.width)
        self.body = _Body(config, config.encoder, config.encoder_depth, grid)
        self.latents = nn.Linear(config.width, latent_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, n, d)."""
        return self.latents(self.body(self.patches(patchify(images, self.patch_size))))


class Decoder(nn.Module):
    """Quantized latents (B, n, d) to pixels (B, C, H, W)."""

    def __init__(self, config: BackboneConfig, channels: int, latent_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.patch_size, self.grid = config.patch_size, grid
        self.latents = nn.Linear(latent_dim, config.width)
        self.body = _Body(config, config.decoder, config.decoder_depth, grid)
        self.patches = nn.Linear(config.width, channels * config.patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, n, d) to (B, C, H, W)."""
        return unpatchify(self.patches(self.body(self.latents(latents))), self.patch_size, self.grid)
