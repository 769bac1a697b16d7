"""UViT (Hoogeboom et al. 2023, "simple diffusion"): a convolutional U-Net around a transformer told the timestep.

Residual blocks and resampling are those of diffusers; attribute names are those of 4M checkpoints. diffusers registers
the convolution of `downsample_mid` under two names, `Conv2d_0` and `conv`; both are in the state dict, as in 4M's own.
B images, C channels of the image, D channels of the condition, n cells of the transformer, d its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from timm.layers import Attention, Mlp, build_sincos2d_pos_embed
from torch import Tensor, nn

from fourm.tokenization.unet import timestep_embedding

F8: dict[str, Any] = {"block_out_channels": (128, 256)}
F16: dict[str, Any] = F8 | {"downsample_before_mid": True}
LARGE: dict[str, Any] = {"mid_layers": 24, "mid_num_heads": 16, "mid_dim": 1024}
UVITS: dict[str, dict[str, Any]] = {
    "uvit_b_p4_f16": F16,
    "uvit_l_p4_f16": F16 | LARGE,
    "uvit_h_p4_f16": F16 | {"mid_layers": 32, "mid_num_heads": 16, "mid_dim": 1280},
    "uvit_b_p4_f16_longskip": F16 | {"mid_layers": 13, "mid_use_long_skip": True},
    "uvit_l_p4_f16_longskip": F16 | LARGE | {"mid_layers": 25, "mid_use_long_skip": True},
    "uvit_b_p4_f8": F8,
    "uvit_l_p4_f8": F8 | LARGE,
    "uvit_b_p4_f16_extraconv": {},
    "uvit_l_p4_f16_extraconv": LARGE,
}


class CrossAttention(nn.Module):
    """Attention of cells to the condition; where all of it is masked, the result is the output bias alone."""

    def __init__(self, dim: int, context_dim: int, heads: int, qkv_bias: bool, dropout: float):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n, d), (B, m, D) to (B, n, d); `mask` (B, 1, 1, m) is true where attention is allowed."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj_drop(self.proj(seen.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Transformer block whose norms the timestep scales, shifts and gates (adaLN-zero, Peebles & Xie 2022)."""

    def __init__(self, dim: int, heads: int, time_dim: int, mlp_ratio: float, qkv_bias: bool, dropout: float,
                 context_dim: int | None, skip: bool):  # fmt: skip
        super().__init__()
        self.crosses = context_dim is not None
        self.parts = 3 if self.crosses else 2
        self.norm1 = nn.LayerNorm(dim)
        attention = Attention(dim, heads, qkv_bias=qkv_bias, proj_drop=dropout)
        if context_dim is None:
            self.attn = attention
        else:
            self.self_attn = attention
            self.cross_attn = CrossAttention(dim, context_dim, heads, qkv_bias, dropout)
            self.query_norm = nn.LayerNorm(dim)
            self.context_norm = nn.LayerNorm(context_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=(0.0, dropout))
        self.adaLN_modulation = nn.Linear(time_dim, 2 * self.parts * dim)
        self.adaLN_gate = nn.Linear(time_dim, self.parts * dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None, skip: Tensor | None) -> Tensor:
        """(B, n, d) and SiLU of the time embedding (B, 1, time_dim) to (B, n, d); `skip` (B, n, d) where expected."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        adapt = self.adaLN_modulation(time).chunk(2 * self.parts, dim=-1)  # shift, scale of each part
        gate = self.adaLN_gate(time).chunk(self.parts, dim=-1)
        attention = self.self_attn if self.crosses else self.attn
        x = x + gate[0] * attention(self.norm1(x) * (1 + adapt[1]) + adapt[0])
        if self.crosses:
            query = self.query_norm(x) * (1 + adapt[3]) + adapt[2]
            x = x + gate[1] * self.cross_attn(query, self.context_norm(context), mask)
        return x + gate[-1] * self.mlp(self.norm2(x) * (1 + adapt[-1]) + adapt[-2])


class Transformer(nn.Module):
    """Blocks over the cells of the coarsest level; the condition is added to the cells or attended to."""

    def __init__(self, unet_dim: int, cond_dim: int, crosses: bool, layers: int, dim: int, side: int, long_skip: bool,
                 **block: Any):  # fmt: skip
        super().__init__()
        self.crosses, self.long_skip = crosses, long_skip
        positions = build_sincos2d_pos_embed([side, side], dim, interleave_sin_cos=True)
        self.mid_pos_emb = nn.Parameter(positions.T.reshape(1, dim, side, side), requires_grad=False)
        if not crosses:
            self.mask_token = nn.Parameter(torch.zeros(dim))
        self.mid_block = nn.ModuleList(
            Block(dim, context_dim=cond_dim if crosses else None, skip=long_skip and index > layers // 2, **block)
            for index in range(layers)
        )
        if not crosses:
            self.mid_cond_proj = nn.Linear(cond_dim, dim)
        self.mid_proj_in = nn.Linear(unet_dim, dim)
        self.mid_proj_out = nn.Linear(dim, unet_dim)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, cond_mask: Tensor | None) -> Tensor:
        """Features (B, unet_dim, h, w) to the same; `condition` and `cond_mask` as in `UViT.forward`."""
        size = x.shape[2:]
        cells = self.mid_proj_in(x.flatten(2).transpose(1, 2))  # (B, n, d)
        context, mask = condition.to(cells.dtype), None
        if self.crosses:
            mask = None if cond_mask is None else ~cond_mask.flatten(1)[:, None, None]
            context = context.flatten(2).transpose(1, 2)
        else:
            context = self.mid_cond_proj(F.interpolate(context, size, mode="nearest").flatten(2).transpose(1, 2))
            if cond_mask is not None:
                hidden = F.interpolate(cond_mask.unsqueeze(1).float(), size, mode="nearest").flatten(1) > 0.5
                context = torch.where(hidden.unsqueeze(2), self.mask_token.to(context.dtype), context)
            cells = cells + context
        positions = F.interpolate(self.mid_pos_emb, size, mode="nearest" if self.crosses else "bicubic")
        cells = cells + positions.flatten(2).transpose(1, 2)
        time = F.silu(time).unsqueeze(1)
        skips: list[Tensor] = []
        for block in self.mid_block:
            cells = block(cells, time, context, mask, skips.pop() if block.skip_linear is not None else None)
            if self.long_skip and len(skips) < len(self.mid_block) // 2 and block.skip_linear is None:
                skips.append(cells)
        return self.mid_proj_out(cells).transpose(1, 2).unflatten(2, size)


class UViT(nn.Module):
    """Denoiser of images under a condition (4M's `uvit_*`).

    Args:
        channels: Channels of the image.
        cond_channels: Channels of the condition.
        patch_size: Side of the patches the first convolution makes.
        block_out_channels: Width of each convolutional level; all but the last halve the sides.
        layers_per_block: Residual blocks per level on the way down.
        downsample_before_mid: Halve the sides once more before the transformer.
        mid_layers: Blocks of the transformer; odd with long skips.
        mid_num_heads: Its heads.
        mid_dim: Its width.
        mid_mlp_ratio: Hidden width of its MLPs over `mid_dim`.
        mid_qkv_bias: Biases of queries, keys and values.
        mid_hw_posemb: Side of its stored table of positions.
        mid_use_long_skip: Blocks of its second half also see the output of their mirror image.
        res_embedding: The size of the original image is embedded beside the timestep.
        conditioning: `concat` adds the condition to the cells, `xattn` lets them attend to it.
        dropout: After attention and MLPs of the transformer.
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        patch_size: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512),
        layers_per_block: int = 2,
        downsample_before_mid: bool = False,
        mid_layers: int = 12,
        mid_num_heads: int = 12,
        mid_dim: int = 768,
        mid_mlp_ratio: float = 4,
        mid_qkv_bias: bool = True,
        mid_hw_posemb: int = 32,
        mid_use_long_skip: bool = False,
        res_embedding: bool = False,
        conditioning: str = "concat",
        dropout: float = 0.0,
    ):
        super().__init__()
        if conditioning not in ("concat", "xattn"):
            raise ValueError(f"conditioning is {conditioning!r}, allowed for a UViT are concat, xattn")
        if mid_use_long_skip and mid_layers % 2 == 0:
            raise ValueError(f"mid_layers is {mid_layers}, expected an odd number with long skips")
        widths = list(block_out_channels)
        last, time_dim = widths[-1], 4 * widths[0]
        self.channels, self.patch_size, self.time_width, self.depth = (
            channels,
            patch_size,
            widths[0],
            layers_per_block + 1,
        )
        self.conv_in = nn.Conv2d(channels, widths[0], patch_size, stride=patch_size)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)
        self.height_embedding = TimestepEmbedding(widths[0], time_dim) if res_embedding else None
        self.width_embedding = TimestepEmbedding(widths[0], time_dim) if res_embedding else None
        inputs = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            DownBlock2D(inner, outer, time_dim, num_layers=layers_per_block, resnet_eps=1e-5,
                        add_downsample=level < len(widths) - 1)
            for level, (inner, outer) in enumerate(zip(inputs, widths, strict=True))
        )  # fmt: skip
        before = [last, *reversed(widths[1:])]
        self.up_blocks = nn.ModuleList(
            UpBlock2D(inner, previous, outer, time_dim, num_layers=layers_per_block + 1, resnet_eps=1e-5,
                      add_upsample=level < len(widths) - 1)
            for level, (inner, previous, outer)
            in enumerate(zip(reversed(inputs), before, reversed(widths), strict=True))
        )  # fmt: skip
        self.downsample_mid = Downsample2D(last, use_conv=True) if downsample_before_mid else None
        self.mid_block = Transformer(
            last, cond_channels, conditioning == "xattn", mid_layers, mid_dim, mid_hw_posemb, mid_use_long_skip,
            heads=mid_num_heads, time_dim=time_dim, mlp_ratio=mid_mlp_ratio, qkv_bias=mid_qkv_bias, dropout=dropout,
        )  # fmt: skip
        self.upsample_mid = Upsample2D(last, use_conv=True) if downsample_before_mid else None
        self.conv_norm_out = nn.GroupNorm(32, widths[0], eps=1e-5)
        self.conv_out = nn.ConvTranspose2d(widths[0], channels, patch_size, stride=patch_size)
        self._init_weights()

    def _init_weights(self) -> None:
        """Linear layers Xavier-uniform (q, k, v each on its own), the end of every residual branch zero, as in 4M."""
        for name, module in self.named_modules():
            if name.endswith(("adaLN_gate", "conv2")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                stacked = 3 if name.endswith("qkv") else 2 if name.endswith("kv") else 1
                bound = math.sqrt(6 / (module.out_features // stacked + module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor, cond_mask: Tensor | None = None,
                resolution: Tensor | None = None) -> Tensor:  # fmt: skip
        """What the diffusion process has the decoder predict.

        Args:
            noisy: (B, C, H, W).
            timesteps: (B,) integers.
            condition: (B, D, h, w); with `concat` it is brought to the transformer's grid by its nearest cells.
            cond_mask: (B, h, w), true where the condition is replaced by a learned token or not attended to.
            resolution: (B, 2) height and width of the original image in pixels, or None to leave it open.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: H or W is no multiple of the patch size, or there is no embedding for `resolution`.
        """
        if any(side % self.patch_size for side in noisy.shape[2:]):
            raise ValueError(f"image sides are {tuple(noisy.shape[2:])}, expected multiples of {self.patch_size}")
        time = self.time_embedding(timestep_embedding(timesteps, self.time_width).to(noisy.dtype))
        if resolution is not None:
            if self.height_embedding is None or self.width_embedding is None:
                raise ValueError("this UViT has no resolution embedding, pass resolution=None")
            height, width = (timestep_embedding(sides, self.time_width).to(noisy.dtype) for sides in resolution.T)
            time = time + self.height_embedding(height) + self.width_embedding(width)
        x = self.conv_in(noisy)
        skips = [x]
        for down in self.down_blocks:
            x, states = down(x, time)
            skips.extend(states)
        size = x.shape[2:]
        x = x if self.downsample_mid is None else self.downsample_mid(x)
        x = self.mid_block(x, time, condition, cond_mask)
        x = x if self.upsample_mid is None else self.upsample_mid(x, size)
        for up in self.up_blocks:
            states = tuple(skips[-self.depth :])
            del skips[-self.depth :]
            x = up(x, states, time, skips[-1].shape[2:] if skips else None)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
