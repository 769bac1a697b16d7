"""Encoder and decoder bodies of image tokenizers: patches to latents and back.

B images, C channels, H x W pixels, p pixels a side of a patch, n = (H / p) * (W / p) tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

OUT_CONVS = 2


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of encoder and decoder.

    Args:
        patch_size: Pixels a side that become one token; 1 for maps of features.
        width: Features per token.
        heads: Attention heads (vit).
        mlp_ratio: Hidden width of the MLPs over `width`.
        encoder: Blocks of the encoder: `vit` (attention over all tokens), `conv` (3x3 neighbours), `mlp` (the token
            alone: ids then depend on their own patch only, which makes them easiest to predict) or `linear` (as
            `mlp`, but one layer, not residual).
        encoder_depth: Number of them.
        decoder: Blocks of the decoder.
        decoder_depth: Number of them.
        decoder_patch_size: Pixels a side that a token becomes; 0 for `patch_size`. Like the next three it is the
            decoder's own value.
        decoder_width: 0 for `width`.
        decoder_heads: 0 for `heads`.
        decoder_mlp_ratio: 0 for `mlp_ratio`.
        positions: `learned` vectors for one grid, fixed `sincos` that are interpolated to any grid, or `none`.
        position_grid: Grid that the fixed positions of the encoder are computed on; default: that of the tokens.
        decoder_position_grid: The same for the decoder.
        qkv_bias: Biases in the attention's projections (vit).
        final_norm: A layer norm after the last block.
        post_mlp: A residual MLP with tanh after it (ViT-VQGAN, Yu et al. 2021).
        outer_linear: One more linear layer between blocks and latents.
        out_conv: Two residual 7x7 convolutions over the decoded pixels (ConvNeXt).
    """

    patch_size: int = 8
    width: int = 128
    heads: int = 4
    mlp_ratio: float = 2.0
    encoder: Literal["vit", "conv", "mlp", "linear"] = "mlp"
    encoder_depth: int = 1
    decoder: Literal["vit", "conv", "mlp", "linear"] = "vit"
    decoder_depth: int = 1
    decoder_patch_size: int = 0
    decoder_width: int = 0
    decoder_heads: int = 0
    decoder_mlp_ratio: float = 0.0
    positions: Literal["learned", "sincos", "none"] = "learned"
    position_grid: tuple[int, int] | None = None
    decoder_position_grid: tuple[int, int] | None = None
    qkv_bias: bool = True
    final_norm: bool = True
    post_mlp: bool = False
    outer_linear: bool = False
    out_conv: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("encoder", self.encoder, tuple(BLOCKS)),
            ("decoder", self.decoder, tuple(BLOCKS)),
            ("positions", self.positions, ("learned", "sincos", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
        if self.positions == "sincos" and (self.width % 4 or self.decoder_width % 4):
            raise ValueError(f"width {self.width}, decoder_width {self.decoder_width}: sincos needs multiples of 4")

    @property
    def of_decoder(self) -> BackboneConfig:
        """The decoder's own values in the place of the encoder's."""
        return dataclasses.replace(
            self,
            patch_size=self.decoder_patch_size or self.patch_size,
            width=self.decoder_width or self.width,
            heads=self.decoder_heads or self.heads,
            mlp_ratio=self.decoder_mlp_ratio or self.mlp_ratio,
            position_grid=self.decoder_position_grid,
        )


class LinearBlock(nn.Module):
    """A linear layer on each token alone."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.linear = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, D) to (B, n, D)."""
        return self.linear(self.norm(tokens))


class MlpBlock(nn.Module):
    """A residual MLP on each token alone."""

    def __init__(self, config: BackboneConfig, activation: type[nn.Module] = nn.GELU, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), act_layer=activation)

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
        self.block = Block(config.width, config.heads, config.mlp_ratio, qkv_bias=config.qkv_bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, D) to (B, n, D)."""
        return self.block(tokens)


BLOCKS: dict[str, Callable[[BackboneConfig], nn.Module]] = {
    "vit": VitBlock,
    "conv": ConvBlock,
    "mlp": MlpBlock,
    "linear": LinearBlock,
}


class OutConv(nn.Module):
    """A residual MLP on each pixel after a depthwise 7x7 convolution, scaled by `gamma` (ConvNeXt)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, 4 * channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W). Of one channel the norm leaves its bias: the block then adds a constant."""
        mixed = self.mlp(self.norm(self.conv(images).permute(0, 2, 3, 1)))
        return images + (self.gamma * mixed).permute(0, 3, 1, 2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts (B, C, H, W) into row-major patches (B, n, C * p * p), channel slowest."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (B, n, C * p * p) to (B, C, H, W)."""
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), patch_size)


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of the row, then of the column (1, D, rows, columns)."""
    waves = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * waves for side in grid)
    row, column = (torch.cat([angles.sin(), angles.cos()], 1).T for angles in (rows, columns))  # (D / 2, side)
    table = [row[:, :, None].expand(-1, -1, grid[1]), column[:, None].expand(-1, grid[0], -1)]
    return torch.cat(table)[None].float()


class _Body(nn.Module):
    """Blocks over a grid of tokens with a vector per position."""

    positions: Tensor | None

    def __init__(self, config: BackboneConfig, block: str, depth: int, grid: tuple[int, int]):
        super().__init__()
        if config.positions == "sincos":
            self.register_buffer("positions", sincos(config.position_grid or grid, config.width))
        elif config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(1, grid[0] * grid[1], config.width))
        else:
            self.positions = None
        self.blocks = nn.ModuleList(BLOCKS[block](config) for _ in range(depth))
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()
        self.post_mlp = MlpBlock(config, nn.Tanh, eps=1e-6) if config.post_mlp else None

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.positions is not None:
            tokens = tokens + self._table(self.positions, grid)
        for block in self.blocks:
            tokens = block(tokens, grid)
        tokens = self.norm(tokens)
        if self.post_mlp is not None:
            with torch.autocast(tokens.device.type, enabled=False):
                tokens = self.post_mlp(tokens.float(), grid)
        return tokens

    def _table(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        if table.ndim == 3:  # learned, for one grid
            return table
        if table.shape[2:] != grid:
            table = F.interpolate(table, grid, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Pixels (B, C, H, W) to latents (B, n, d)."""

    def __init__(self, config: BackboneConfig, channels: int, latent_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.patch_size = config.patch_size
        self.patches = nn.Linear(channels * config.patch_size**2, config.width)
        self.body = _Body(config, config.encoder, config.encoder_depth, grid)
        self.outer = nn.Linear(config.width, config.width) if config.outer_linear else nn.Identity()
        self.latents = nn.Linear(config.width, latent_dim)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, n, D), what the latents are made from."""
        height, width = images.shape[2:]
        grid = (height // self.patch_size, width // self.patch_size)
        return self.outer(self.body(self.patches(patchify(images, self.patch_size)), grid))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, n, d)."""
        return self.latents(self.features(images))


class Decoder(nn.Module):
    """Quantized latents (B, n, d) to pixels (B, C, H, W)."""

    def __init__(self, config: BackboneConfig, channels: int, latent_dim: int, grid: tuple[int, int]):
        super().__init__()
        config = config.of_decoder
        self.patch_size = config.patch_size
        self.latents = nn.Linear(latent_dim, config.width)
        self.outer = nn.Linear(config.width, config.width) if config.outer_linear else nn.Identity()
        self.body = _Body(config, config.decoder, config.decoder_depth, grid)
        self.patches = nn.Linear(config.width, channels * config.patch_size**2)
        self.convs = nn.Sequential(*(OutConv(channels) for _ in range(OUT_CONVS if config.out_conv else 0)))

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, n, d) of a grid of tokens to (B, C, H, W)."""
        patches = self.patches(self.body(self.outer(self.latents(latents)), grid))
        return self.convs(unpatchify(patches, self.patch_size, grid))
