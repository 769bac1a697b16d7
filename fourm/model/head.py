"""The tied or untied head and its cross-entropy as one operation, for vocabularies that are much wider than the model.

Scores, probabilities and their gradients of one modality live in one buffer, a chunk of tokens at a time, and the
gradient of the table is written once. (Liger Kernel, Hsu et al. 2024, section 3.2, does the same for one vocabulary.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of one chunk, in bytes.
CHUNK = 2**24


class Segment(NamedTuple):
    """Tokens of one modality: their number, and the rows of the table that score its ids."""

    tokens: int
    rows: slice


def linear_cross_entropy(
    hidden: Tensor, table: Tensor, ids: Tensor, segments: Sequence[Segment], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of tokens that are sorted by modality.

    Args:
        hidden: (K, D) states.
        table: (V, D), a row scores an id.
        ids: (K,) ids within the vocabulary of each token's modality.
        segments: S modalities, in the order of their tokens; they add up to K tokens.
        weights: (S,) of the sums.

    Returns:
        The weighted sum, and (S,) the sums themselves, without gradient. In nats.
    """
    if not torch.is_grad_enabled():
        hidden, table = hidden.detach(), table.detach()
    loss, sums = _LinearCrossEntropy.apply(hidden, table, ids, segments, weights)
    return loss, sums


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, ids: Tensor, segments: Sequence[Segment], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_table = torch.empty_like(table) if ctx.needs_input_grad[1] else None
        sums = hidden.new_zeros(len(segments), dtype=torch.float32)
        written: set[int] = set()
        start = 0
        with torch.autocast(device, enabled=False):
            for number, (tokens, rows) in enumerate(segments):
                head = table[rows].to(dtype)
                size = max(1, CHUNK // (4 * len(head)))
                for first in range(start, start + tokens, size):
                    chunk = slice(first, min(first + size, start + tokens))
                    states, targets = hidden[chunk].to(dtype), ids[chunk, None]
                    scores = (states @ head.T).float()
                    scores.sub_(scores.amax(1, keepdim=True))
                    truth = scores.gather(1, targets)
                    total = scores.exp_().sum(1, keepdim=True)
                    sums[number] += (total.log() - truth).sum()
                    if grad_hidden is None and grad_table is None:
                        continue
                    # The gradient of the scores, in their place: weighted probabilities minus the truth.
                    weight = weights[number]
                    scores.mul_(weight / total).scatter_add_(1, targets, -weight.expand_as(total))
                    slope = scores.to(dtype)
                    if grad_hidden is not None:
                        grad_hidden[chunk] = slope @ head
                    if grad_table is not None:
                        _add_product(grad_table[rows], slope.T, states, fresh=rows.start not in written)
                        written.add(rows.start)
                    del scores, slope  # before the next chunk's are made
                start += tokens
        if grad_table is not None:
            _zero_others(grad_table, [rows for _, rows in segments if rows.start in written])
        ctx.grads = grad_hidden, grad_table  # not saved tensors: nobody else owns them, so they may be added to
        ctx.mark_non_differentiable(sums)
        return (sums * weights).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_table = ctx.grads
        ctx.grads = None
        if grad.device.type != "cpu" or grad != 1:  # spares a pass over the table where asking costs nothing
            grad_hidden, grad_table = (None if g is None else g.mul_(grad) for g in (grad_hidden, grad_table))
        return grad_hidden, grad_table, None, None, None


class _TwoUses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return table.view_as(table), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor | None, whole: Tensor | None) -> Tensor | None:
        if rows is None or whole is None:
            return rows if whole is None else whole
        return whole.add_(rows)


def two_uses(table: Tensor) -> tuple[Tensor, Tensor]:
    """The table to look rows up in, and the same table as a head.

    The sparse gradient of the first is added to the dense one of the second in its place; autograd itself would make a
    third of their size.
    """
    return (table, table) if torch.compiler.is_compiling() else _TwoUses.apply(table)


def _add_product(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """out (+)= left @ right; `out` keeps its own dtype."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=0 if fresh else 1, out=out)
    elif fresh:
        out.copy_(left @ right)
    else:
        out.add_(left @ right)


def _zero_others(table: Tensor, written: Sequence[slice]) -> None:
    """Zeros the rows outside of the slices."""
    end = 0
    for rows in [*sorted(written, key=lambda rows: rows.start), slice(len(table), len(table))]:
        table[end : rows.start].zero_()
        end = rows.stop
