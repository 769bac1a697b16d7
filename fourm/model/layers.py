"""Blocks of the encoder-decoder, leaf to root. Attribute names are those of 4M checkpoints.

T tokens of all rows end to end, K of the context; B rows of N tokens where a text is decoded; D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.model.attention import Blocks, attend
from fourm.model.config import FourMConfig


class LayerNorm(nn.Module):
    """Layer norm with eps 1e-6 whose bias can be switched off; the state dict holds a zero bias either way."""

    bias: Tensor

    def __init__(self, dim: int, bias: bool):
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(dim))
        if bias:
            self.bias = nn.Parameter(torch.zeros(dim))
        else:
            self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis, in float32 under autocast."""
        return F.layer_norm(x, (self.dim,), self.weight.float(), self.bias.float(), eps=1e-6)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * D) -> `parts` tensors (B, H, N, D / H)."""
    batch, length, width = x.shape
    return x.view(batch, length, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D / H) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


remakes: ContextVar[bool] = ContextVar("remakes", default=True)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, `remade` remakes nothing: for blocks that are computed again as a whole, whose hooks it would shadow."""
    token = remakes.set(False)
    try:
        yield
    finally:
        remakes.reset(token)


@contextmanager
def remade(*cheap: tuple[Tensor, Callable[[], Tensor]]) -> Iterator[None]:
    """What is computed inside does not keep these tensors for the backward pass.

    Args:
        cheap: Tensors, and how each is made again, of what is kept in any case.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and remakes.get()):
        yield
        return
    makers = {tensor.untyped_storage().data_ptr(): make for tensor, make in cheap}

    def pack(saved: Tensor) -> Tensor | tuple[Callable[[], Tensor], torch.Size]:
        make = makers.get(saved.untyped_storage().data_ptr()) if saved.is_contiguous() else None
        return saved if make is None else (make, saved.shape)

    def unpack(kept: Tensor | tuple[Callable[[], Tensor], torch.Size]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0]().view(kept[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class HeadNorm(nn.Module):
    """Normalises queries and keys per head before their product (QK-norm), if asked to."""

    def __init__(self, dim: int, heads: int, enabled: bool, bias: bool):
        super().__init__()
        self.enabled = enabled
        self.q_norm = LayerNorm(dim // heads, bias) if enabled else nn.Identity()
        self.k_norm = LayerNorm(dim // heads, bias) if enabled else nn.Identity()

    def normed(self, *packed: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, stacked along axis 1 as they come; three tensors if two of them are normed."""
        if not self.enabled:
            return packed
        q, k, v = (part for tensor in packed for part in tensor.split(1, 1))
        return self.q_norm(q), self.k_norm(k), v


class SelfAttention(HeadNorm):
    """Self-attention with one packed projection."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, proj_bias: bool, qk_norm: bool, norm_bias: bool):
        super().__init__(dim, heads, qk_norm, norm_bias)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> queries, keys, values (B, H, N, D / H)."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, blocks: Blocks) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.proj(attend(blocks, *self.normed(self.qkv(x).unflatten(1, (3, self.heads, -1)))))


class CrossAttention(HeadNorm):
    """Attention of decoder tokens to the encoder's context."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, proj_bias: bool, qk_norm: bool, norm_bias: bool):
        super().__init__(dim, heads, qk_norm, norm_bias)
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, D) -> keys, values (B, H, K, D / H)."""
        k, v = split_heads(self.kv(context), 2, self.heads)
        return self.k_norm(k), v

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, D), for keys and values that `project` made; `mask` (B, 1, N, K)."""
        (q,) = split_heads(self.q(x), 1, self.heads)
        return self.proj(merge_heads(F.scaled_dot_product_attention(self.q_norm(q), keys, values, attn_mask=mask)))

    def forward(self, x: Tensor, context: Tensor, blocks: Blocks) -> Tensor:
        """(T, D), (K, D) -> (T, D)."""
        q, kv = (
            layer(y).unflatten(1, (parts, self.heads, -1))
            for layer, y, parts in ((self.q, x, 1), (self.kv, context, 2))
        )
        return self.proj(attend(blocks, *self.normed(q, kv)))


class Mlp(nn.Module):
    """Two linear layers around GELU, or the SiLU-gated form of it (SwiGLU, Shazeer 2020)."""

    def __init__(self, dim: int, ratio: float, gated: bool, bias: bool):
        super().__init__()
        self.hidden = hidden = int(2 * int(dim * ratio) / 3) if gated else int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.fc3 = nn.Linear(dim, hidden, bias=bias) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.fc3 is None:
            return self.fc2(F.gelu(self.fc1(x)))
        missing = -self.hidden % 8
        if missing and x.is_cuda and isinstance(self.fc1, nn.Linear):
            return self.widened(x, missing)
        gate, value = self.fc1(x), self.fc3(x)
        product = SiluGate.apply(gate, value)
        with remade((product, lambda: F.silu(gate).mul_(value))):
            return self.fc2(product)

    def widened(self, x: Tensor, missing: int) -> Tensor:
        """The same with so many zeros beside the hidden units: tensor cores want multiples of 8 (1365 of them are not).

        Only the copies of a forward pass are wider, not the weights; CPUs gain nothing from it.
        """
        assert self.fc3 is not None
        gate, value = (
            F.linear(
                x,
                F.pad(layer.weight, (0, 0, 0, missing)),
                None if layer.bias is None else F.pad(layer.bias, (0, missing)),
            )
            for layer in (self.fc1, self.fc3)
        )
        product = SiluGate.apply(gate, value)
        with remade((product, lambda: F.silu(gate).mul_(value))):
            return F.linear(product, F.pad(self.fc2.weight, (0, missing)), self.fc2.bias)


class DropPath(nn.Module):
    """Leaves out a block's branch for some of the samples in training (stochastic depth, Huang et al. 2016)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, blocks: Blocks) -> Tensor:
        """(T, D) -> (T, D); what is kept is scaled up."""
        if not (self.rate and self.training):
            return x
        kept = torch.rand(len(blocks.queries), 1, device=x.device) >= self.rate
        return x * (kept.to(x.dtype) / (1 - self.rate))[blocks.block]


class SiluGate(torch.autograd.Function):
    """silu(a) * b, which remembers a and b only."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """(..., H), (..., H) -> (..., H)."""
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a and b."""
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), F.silu(a).mul_(grad)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: FourMConfig, drop_path: float):
        super().__init__()
        attention = (config.dim, config.heads, config.qkv_bias, config.proj_bias, config.qk_norm, config.norm_bias)
        self.norm1 = LayerNorm(config.dim, config.norm_bias)
        self.attn = SelfAttention(*attention)
        self.norm2 = LayerNorm(config.dim, config.norm_bias)
        self.mlp = Mlp(config.dim, config.mlp_ratio, config.gated_mlp, config.mlp_bias)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, blocks: Blocks) -> Tensor:
        """(T, D) -> (T, D)."""
        normed = self.norm1(x)
        with remade((normed, partial(self.norm1, x))):
            x = x + self.drop_path(self.attn(normed, blocks), blocks)
        normed = self.norm2(x)
        with remade((normed, partial(self.norm2, x))):
            return x + self.drop_path(self.mlp(normed), blocks)


class DecoderBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to a context this block normalises itself, and MLP."""

    def __init__(self, config: FourMConfig, drop_path: float):
        super().__init__()
        attention = (config.dim, config.heads, config.qkv_bias, config.proj_bias, config.qk_norm, config.norm_bias)
        self.norm1 = LayerNorm(config.dim, config.norm_bias)
        self.self_attn = SelfAttention(*attention)
        self.query_norm = LayerNorm(config.dim, config.norm_bias)
        self.context_norm = LayerNorm(config.dim, config.norm_bias)
        self.cross_attn = CrossAttention(*attention)
        self.norm2 = LayerNorm(config.dim, config.norm_bias)
        self.mlp = Mlp(config.dim, config.mlp_ratio, config.gated_mlp, config.mlp_bias)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor, own: Blocks, cross: Blocks) -> Tensor:
        """(T, D), (K, D) -> (T, D); `own` blocks are those of the tokens themselves."""
        normed = self.norm1(x)
        with remade((normed, partial(self.norm1, x))):
            x = x + self.drop_path(self.self_attn(normed, own), own)
        normed, seen = self.query_norm(x), self.context_norm(context)
        with remade((normed, partial(self.query_norm, x)), (seen, partial(self.context_norm, context))):
            x = x + self.drop_path(self.cross_attn(normed, seen, cross), own)
        normed = self.norm2(x)
        with remade((normed, partial(self.norm2, x))):
            return x + self.drop_path(self.mlp(normed), own)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) -> cross-attention keys and values, which stay the same for every token that is decoded."""
        return self.cross_attn.project(self.context_norm(context))

    def step(self, x: Tensor, state: DecoderState, step: int, cross_mask: Tensor | None) -> Tensor:
        """One new token (B, 1, D) -> (B, 1, D) at place `step` of a sequence; remembers its keys and values."""
        q, k, v = self.self_attn.project(self.norm1(x))
        state.keys[:, :, step : step + 1], state.values[:, :, step : step + 1] = k, v
        seen = F.scaled_dot_product_attention(q, state.keys[:, :, : step + 1], state.values[:, :, : step + 1])
        x = x + self.self_attn.proj(merge_heads(seen))
        x = x + self.cross_attn.attend(self.query_norm(x), state.cross_keys, state.cross_values, cross_mask)
        return x + self.mlp(self.norm2(x))


class DecoderState:
    """What one decoder block remembers while a sequence grows: (B, H, length, D / H) keys and values."""

    def __init__(self, cross_keys: Tensor, cross_values: Tensor, length: int):
        batch, heads, _, width = cross_keys.shape
        self.cross_keys, self.cross_values = cross_keys.contiguous(), cross_values.contiguous()  # read at every token
        self.keys = cross_keys.new_empty(batch, heads, length, width)
        self.values = torch.empty_like(self.keys)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (R,) of the batch."""
        self.cross_keys, self.cross_values = self.cross_keys[rows], self.cross_values[rows]
        self.keys, self.values = self.keys[rows], self.values[rows]
