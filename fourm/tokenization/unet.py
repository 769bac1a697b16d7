"""The U-Net of Dhariwal & Nichol (2021, "ADM") over patches, as 4M's diffusion decoders use it.

The image is cut into patches whose pixels become channels, beside which the condition's channels are laid. Attribute
names are those of 4M checkpoints. B images, C channels of the image, D channels of the condition.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNETS: dict[str, dict[str, Any]] = {
    "unet_patched": {"patch_size": 4, "model_channels": 256, "num_res_blocks": 3, "attention_resolutions": (4, 8),
                     "channel_mult": (1, 2, 2, 2)},
}  # fmt: skip


def timestep_embedding(steps: Tensor, dim: int) -> Tensor:
    """Numbers (B,) to float32 (B, dim): cosines, then sines, of wavelengths 2 pi to 20,000 pi."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=steps.device) * (-math.log(10_000) / half))
    angles = steps.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Two convolutions told the timestep, with a residual that may be resampled."""

    def __init__(self, channels: int, out_channels: int, time_dim: int, scale_shift: bool,
                 resample: Literal["up", "down"] | None = None):  # fmt: skip
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(  # the identity is where checkpoints count a dropout
            nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Identity(),
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )  # fmt: skip
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else F.avg_pool2d(x, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, channels, H, W), (B, time_dim) to (B, out_channels, H', W')."""
        h = self.in_layers[2](self._resampled(self.in_layers[:2](x)))
        shift = self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(self._resampled(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over all cells; queries, keys and values of one head lie together in `qkv`."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same."""
        cells = x.flatten(2)
        parts = self.qkv(self.norm(cells)).unflatten(1, (self.heads, 3, -1)).transpose(3, 4)
        seen = F.scaled_dot_product_attention(*parts.unbind(2))
        return x + self.proj_out(seen.transpose(2, 3).flatten(1, 2)).view_as(x)


def downsample(channels: int) -> nn.Module:
    """Halves the sides."""
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def upsample(channels: int) -> nn.Module:
    """Doubles the sides."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=conv))


class Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks are told the timestep."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, channels, H, W), (B, time_dim) to (B, channels', H', W')."""
        for layer in self:
            x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
        return x


class PatchedUNet(nn.Module):
    """Denoiser of images under a condition, which is laid beside the patches (4M's `unet_patched`).

    Args:
        channels: Channels of the image.
        cond_channels: Channels of the condition.
        patch_size: Side of a patch in pixels.
        model_channels: Width that `channel_mult` multiplies.
        num_res_blocks: Residual blocks per level on the way down.
        attention_resolutions: Downsampling factors, counted from the patches, at which there is attention.
        channel_mult: Width of each level.
        num_heads: Attention heads.
        use_scale_shift_norm: The timestep scales and shifts the second norm instead of being added before it.
        resblock_updown: Residual blocks change the resolution instead of convolutions.
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        patch_size: int = 4,
        model_channels: int = 256,
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (8, 16),
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        num_heads: int = 1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
    ):
        super().__init__()
        self.channels, self.patch_size, self.model_channels = channels, patch_size, model_channels
        self.multiple = patch_size * 2 ** (len(channel_mult) - 1)
        pixels, time_dim = channels * patch_size**2, 4 * model_channels
        widths = [mult * model_channels for mult in channel_mult]

        def res(inner: int, outer: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
            return ResBlock(inner, outer, time_dim, use_scale_shift_norm, resample)

        def attention(level: int) -> list[nn.Module]:
            return [AttentionBlock(widths[level], num_heads)] if 2**level in attention_resolutions else []

        self.time_embed = nn.Sequential(nn.Linear(model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        width = widths[0]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(pixels + cond_channels, width, 3, padding=1)])])
        skips = [width]
        for level, outer in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage([res(width, outer), *attention(level)]))
                width = outer
                skips.append(width)
            if level < len(widths) - 1:
                down = res(width, width, "down") if resblock_updown else downsample(width)
                self.input_blocks.append(Stage([down]))
                skips.append(width)
        self.middle_block = Stage([res(width, width), AttentionBlock(width, num_heads), res(width, width)])
        self.output_blocks = nn.ModuleList()
        for level, outer in reversed(list(enumerate(widths))):
            for block in range(num_res_blocks + 1):
                layers: list[nn.Module] = [res(width + skips.pop(), outer), *attention(level)]
                width = outer
                if level and block == num_res_blocks:
                    layers.append(res(width, width, "up") if resblock_updown else upsample(width))
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), _zero(nn.Conv2d(width, pixels, 3, padding=1)))

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor, cond_mask: Tensor | None = None,
                resolution: Tensor | None = None) -> Tensor:  # fmt: skip
        """What the diffusion process has the decoder predict.

        Args:
            noisy: (B, C, H, W).
            timesteps: (B,) integers.
            condition: (B, D, h, w), brought to the grid of patches by its nearest cells.
            cond_mask: (B, h, w), true where the condition is replaced by zeros.
            resolution: Not supported.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: H or W does not fit the levels, or a resolution is given.
        """
        if any(side % self.multiple for side in noisy.shape[2:]):
            raise ValueError(f"image sides are {tuple(noisy.shape[2:])}, expected multiples of {self.multiple}")
        if resolution is not None:
            raise ValueError("this U-Net has no resolution embedding, pass resolution=None")
        if cond_mask is not None:
            condition = condition.masked_fill(cond_mask.unsqueeze(1), 0.0)
        x = F.pixel_unshuffle(noisy, self.patch_size)
        x = torch.cat([x, F.interpolate(condition.to(x.dtype), x.shape[2:], mode="nearest")], dim=1)
        time = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, time)
            skips.append(x)
        x = self.middle_block(x, time)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), time)
        return F.pixel_shuffle(self.out(x), self.patch_size)
