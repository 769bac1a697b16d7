"""Attention inside blocks of flat lists of tokens, such as those of one sample: no empty slot is computed.

T queries, K keys, S blocks, H heads, W width of a head. A query sees one stretch of the keys.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# On CPU: blocks of more keys than this are left to torch; scores per head of blocks that share a product.
LONG, SHARED = 512, 2**16


class Group(NamedTuple):
    """Neighbouring blocks of the same size: their number, queries and keys, and what is added to the scores."""

    size: int
    rows: slice
    columns: slice
    bias: Tensor | None


class Padding(NamedTuple):
    """Blocks as rows: their lengths, where queries (T,) and keys go, which keys (all?), who sees whom (S, 1, L, L)."""

    lengths: tuple[int, int]
    rows: Tensor
    columns: Tensor
    source: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which keys every query sees; made once for all layers.

    Attributes:
        queries: S numbers of queries, T in all.
        keys: S numbers of keys that they may see.
        starts: The first key of each block.
        device: Of the tokens.
        backend: `sdpa`, `flex` or `xformers`.
        ranges: (T,) first key of each query and (T,) the one after its last, if not all keys of its block.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    starts: Sequence[int]
    device: torch.device
    backend: str = "sdpa"
    ranges: tuple[Tensor, Tensor] | None = None

    @classmethod
    def even(cls, rows: int, queries: int, keys: int, device: torch.device, backend: str = "sdpa") -> Blocks:
        """Blocks of the same size, end to end."""
        return cls([queries] * rows, [keys] * rows, [row * keys for row in range(rows)], device, backend)

    @cached_property
    def block(self) -> Tensor:
        """(T,) the block of every query."""
        return self._spread(self.queries)

    @cached_property
    def key_ranges(self) -> tuple[Tensor, Tensor]:
        """As `ranges`, in any case."""
        if self.ranges is not None:
            return self.ranges
        first = self._tensor(self.starts)[self.block]
        return first, first + self._tensor(self.keys)[self.block]

    @cached_property
    def groups(self) -> list[Group]:
        """The blocks, as few products as they take."""
        joined: list[tuple[int, int, int, int, int]] = []
        for row, queries, column, keys in zip(offsets(self.queries), self.queries, self.starts, self.keys, strict=True):
            size, first_row, first_column, *shape = joined[-1] if joined else (0, 0, 0, -1, -1)
            fits = [queries, keys] == shape and column == first_column + size * keys
            if fits and (size + 1) * queries * keys <= SHARED:
                joined[-1] = (size + 1, first_row, first_column, queries, keys)
            else:
                joined.append((1, row, column, queries, keys))
        return [self._group(*entry) for entry in joined]

    def _group(self, size: int, row: int, column: int, queries: int, keys: int) -> Group:
        rows, columns = slice(row, row + size * queries), slice(column, column + size * keys)
        if self.ranges is None:
            return Group(size, rows, columns, None)
        first, last = (edge[rows].view(size, queries, 1) for edge in self.ranges)
        key = torch.arange(columns.start, columns.stop, device=self.device).view(size, 1, keys)
        hidden = (key < first) | (key >= last)
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf) if hidden.any() else None
        return Group(size, rows, columns, bias)

    @cached_property
    def padding(self) -> Padding:
        """The blocks as rows of equal length."""
        lengths = max(self.queries), max(self.keys)
        rows = self.block * lengths[0] + self._within(self.queries)
        block, place, start = self._spread(self.keys), self._within(self.keys), self._tensor(self.starts)
        mask = None
        if self.ranges is not None or min(self.keys) < lengths[1]:
            count = len(self.queries) * lengths[0]  # an empty slot sees all there is: softmax of nothing may be NaN
            first, last = (
                torch.full((count,), other, device=self.device).index_copy(0, rows, edge).view(-1, lengths[0], 1)
                for other, edge in zip((0, torch.iinfo(torch.int64).max), self.key_ranges, strict=True)
            )
            key = (start[:, None] + torch.arange(lengths[1], device=self.device))[:, None]
            mask = ((key >= first) & (key < last))[:, None]
        source = None if list(self.starts) == offsets(self.keys) else start[block] + place
        return Padding(lengths, rows, block * lengths[1] + place, source, mask)

    @cached_property
    def flex_mask(self) -> Any:
        """The mask of FlexAttention."""
        first, last = self.key_ranges

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first[query]) & (key < last[query])

        return _flex(self.device.type == "cuda")[0](visible, None, None, len(first), self.end, device=self.device)

    @property
    def end(self) -> int:
        """One after the last key of any block."""
        return max(start + keys for start, keys in zip(self.starts, self.keys, strict=True))

    @cached_property
    def xformers_calls(self) -> list[tuple[Tensor, Tensor, Any]]:
        """Queries, their keys run after run, and the mask of xformers: of those who see all of a run, and causal ones.

        A run is queries side by side, of one block, whose keys start at the same place.
        """
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask, BlockDiagonalMask

        first, last = self.key_ranges
        _, run, count = torch.unique_consecutive(
            torch.stack([self.block, first]), dim=1, return_inverse=True, return_counts=True
        )
        end = count.cumsum(0)
        begin, stop = end - count, last[end - 1]
        keys, causal = stop - first[begin], last[begin] < stop
        calls = []
        for kind, own in ((BlockDiagonalMask, ~causal & (keys > 0)), (BlockDiagonalCausalFromBottomRightMask, causal)):
            if own.any():
                lengths = keys[own].tolist()
                key = torch.repeat_interleave(first[begin][own], keys[own]) + self._within(lengths)
                mask = kind.from_seqlens(count[own].tolist(), lengths, device=self.device)
                calls.append((own[run].nonzero()[:, 0], key, mask))
        return calls

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def _spread(self, lengths: Sequence[int]) -> Tensor:
        """The number of its block, for each of so many tokens a block."""
        return torch.repeat_interleave(self._tensor(lengths), output_size=sum(lengths))

    def _within(self, lengths: Sequence[int]) -> Tensor:
        """The place in its block, for each of so many tokens a block."""
        return torch.arange(sum(lengths), device=self.device) - self._tensor(offsets(lengths))[self._spread(lengths)]


def offsets(lengths: Sequence[int]) -> list[int]:
    """Where stretches of these lengths start that lie end to end."""
    return list(accumulate(lengths, initial=0))[:-1]


def attend(blocks: Blocks, *packed: Tensor) -> Tensor:
    """Scaled dot-product attention inside blocks. Queries that see no key get zeros.

    Args:
        blocks: Who sees whom.
        packed: Queries (T, H, W), keys (K, H, W) and values (K, H, W), stacked along axis 1 as a projection makes them:
            (T, 3, H, W), or (T, 1, H, W) and (K, 2, H, W), or three tensors.

    Returns:
        (T, H * W).

    Raises:
        ValueError: The backend cannot run here; says what can.
    """
    backend = {"sdpa": _sdpa, "flex": _flex_attention, "xformers": _xformers}[blocks.backend]
    if not (sum(blocks.queries) and sum(blocks.keys)):
        nothing = 0.0 * sum(tensor.sum() for tensor in packed)  # every weight gets its gradient, if one of zeros
        return _split(packed)[0].flatten(1) * 0 + nothing
    return backend(blocks, *packed).flatten(1)


def _split(packed: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values, each (tokens, H, W)."""
    return [part for tensor in packed for part in tensor.unbind(1)]


def _sdpa(blocks: Blocks, *packed: Tensor) -> Tensor:
    """Torch's own attention over padded blocks; on CPU, products of blocks as they are, which is faster."""
    if blocks.device.type == "cpu" and max(blocks.keys) <= LONG and not torch.is_autocast_enabled("cpu"):
        return _BlockAttention.apply(blocks, *packed)
    (rows, columns), row, column, source, mask = blocks.padding
    query, key, value = _split(packed)
    key, value = (x[: blocks.end] if source is None else x[source] for x in (key, value))

    def pad(x: Tensor, place: Tensor, length: int) -> Tensor:
        padded = x.new_zeros(len(blocks.queries) * length, *x.shape[1:])
        return padded.index_put((place,), x).unflatten(0, (-1, length)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(query, row, rows), pad(key, column, columns), pad(value, column, columns), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(0, 1)[row]


class _BlockAttention(torch.autograd.Function):
    """Torch's attention forward; the backward pass makes the probabilities again, by plain products.

    Gradients are written where the packed projection wants them.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, *packed: Tensor) -> Tensor:
        query, key, value = _split(packed)
        out = torch.empty(query.shape, dtype=query.dtype)
        for size, rows, columns, bias in blocks.groups:
            q, k, v = (x.unflatten(0, (size, -1)).transpose(1, 2) for x in (query[rows], key[columns], value[columns]))
            seen = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias[:, None].to(q.dtype))
            _put(out[rows], seen.flatten(0, 1), size)
        ctx.save_for_backward(*packed)
        ctx.blocks = blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks, packed = ctx.blocks, ctx.saved_tensors
        make = torch.zeros_like if sum(blocks.keys) < len(packed[-1]) else torch.empty_like
        grads = [make(x) for x in packed]
        query, key, value = _split(packed)
        grad_query, grad_key, grad_value = _split(grads)
        scale = grad.shape[2] ** -0.5
        for size, rows, columns, bias in blocks.groups:
            q, k, v, out = (_heads(x, size) for x in (query[rows], key[columns], value[columns], grad[rows]))
            p = _product(q, k.mT, scale)
            if bias is not None:
                p.unflatten(0, (size, -1)).add_(bias[:, None])
            torch.softmax(p, -1, out=p)
            _put(grad_value[columns], torch.bmm(p.mT, out), size)
            slope = torch.bmm(out, v.mT)
            torch.ops.aten._softmax_backward_data.out(slope, p, -1, p.dtype, grad_input=slope)
            _put(grad_query[rows], _product(slope, k, scale), size)
            _put(grad_key[columns], _product(slope.mT, q, scale), size)
        return None, *grads


def _heads(x: Tensor, size: int) -> Tensor:
    """(size * L, H, W) -> (size * H, L, W)."""
    return x.unflatten(0, (size, len(x) // size)).transpose(1, 2).flatten(0, 1)


def _put(out: Tensor, x: Tensor, size: int) -> None:
    """Writes (size * H, L, W) into (size * L, H, W)."""
    out.unflatten(0, (size, x.shape[1])).copy_(x.unflatten(0, (size, -1)).transpose(1, 2))


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right."""
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


@cache
def _flex(compiled: bool) -> tuple[Any, Any]:
    """`create_block_mask` and `flex_attention`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    parts = create_block_mask, flex_attention
    return (torch.compile(parts[0]), torch.compile(parts[1])) if compiled else parts


def _flex_attention(blocks: Blocks, *packed: Tensor) -> Tensor:
    if blocks.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in packed):
        raise ValueError("attention: flex trains on CUDA only, on CPU it runs forward; use attention: sdpa")
    query, key, value = _split(packed)
    parts = (x.to(value.dtype).transpose(0, 1)[None] for x in (query, key[: blocks.end], value[: blocks.end]))
    out = _flex(blocks.device.type == "cuda")[1](*parts, block_mask=blocks.flex_mask)
    return out[0].transpose(0, 1)


def _xformers(blocks: Blocks, *packed: Tensor) -> Tensor:
    if blocks.device.type != "cuda" or importlib.util.find_spec("xformers") is None:
        raise ValueError(
            f"attention: xformers needs CUDA and `pip install xformers`, the model is on {blocks.device.type}; "
            "use attention: sdpa"
        )
    return _memory_efficient(blocks, *packed)


def _memory_efficient(blocks: Blocks, *packed: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    query, key, value = _split(packed)
    out = value.new_zeros(query.shape)
    for rows, columns, mask in blocks.xformers_calls:
        q, k, v = query[rows].to(value.dtype)[None], key[columns].to(value.dtype)[None], value[columns][None]
        out = out.index_copy(0, rows, memory_efficient_attention(q, k, v, attn_bias=mask)[0])
    return out
