"""Retrieval across modalities: ranks, recall in both directions, intervals of differences, and training-free scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KS = (1, 5, 10)


def similarities(queries: Tensor, items: Tensor) -> Tensor:
    """Cosines (Q, N)."""
    return F.normalize(queries, dim=-1) @ F.normalize(items, dim=-1).T


def ranks(scores: Tensor, truth: Tensor | None = None) -> Tensor:
    """How many items come before the right one, (Q,): all that are not worse, and all if its score is NaN.

    Args:
        scores: (Q, N), higher is better.
        truth: (Q,) which item is right; default: that of the same number.
    """
    rows = torch.arange(len(scores), device=scores.device)
    right = scores[rows, rows if truth is None else truth][:, None]
    return scores.shape[1] - 1 - (scores < right).sum(1)


def search(queries: Tensor, items: Tensor, k: int, block: int = 65536) -> tuple[Tensor, Tensor]:
    """The k nearest of N items by cosine.

    Args:
        queries: (Q, D).
        items: (N, D), also memory-mapped ones.
        k: How many.
        block: Items that are looked at together.

    Returns:
        Cosines (Q, k), falling, and numbers of items (Q, k).
    """
    best, chosen = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(items), block):
        found = similarities(queries, items[start : start + block])
        numbers = torch.arange(start, start + found.shape[1]).expand(len(queries), -1)
        best, chosen = torch.cat([best, found], 1), torch.cat([chosen, numbers], 1)
        best, places = best.topk(min(k, best.shape[1]))
        chosen = chosen.gather(1, places)
    return best, chosen


def recalls(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """The share of queries whose right item is among the first k, by `R@k`."""
    return {f"R@{k}": float((ranks < k).double().mean()) for k in ks}


class BothWays(NamedTuple):
    """Ranks (n,) of n pairs in both directions."""

    a_to_b: Tensor
    b_to_a: Tensor

    def figures(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """`R@k` as the mean of both directions, each direction's under its name, and the median ranks."""
        each = {name: recalls(found, ks) for name, found in self._asdict().items()}
        found = {f"R@{k}": sum(one[f"R@{k}"] for one in each.values()) / 2 for k in ks}
        for name, values in each.items():
            found |= {f"{name}/{figure}": value for figure, value in values.items()}
            found[f"{name}/median_rank"] = float(np.median(self._asdict()[name].cpu())) + 1
        return found

    def hits(self, k: int = 1) -> np.ndarray:
        """(n,) the share of both directions in which a pair is among the first k."""
        return ((self.a_to_b < k).double() + (self.b_to_a < k).double()).cpu().numpy() / 2


def both_ways(scores: Tensor) -> BothWays:
    """Ranks in both directions, of cosines (n, n) or other scores of all a with all b."""
    return BothWays(ranks(scores), ranks(scores.T))


class Interval(NamedTuple):
    """A mean difference and its 95 % percentile interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, draws: int = 4000, seed: int = 0, redraw_runs: bool = False
) -> Interval:
    """The mean of `first - second` when queries are redrawn with replacement, both arms with the same queries.

    Args:
        first: (n,) a figure of each query, or (runs, n) of several runs.
        second: The other arm's, of the same runs and queries.
        draws: Bootstrap draws.
        seed: Of the redrawing.
        redraw_runs: Redraw the runs, too, so that the interval is also one over seeds.
    """
    rng, differences = np.random.default_rng(seed), np.atleast_2d(np.asarray(first) - np.asarray(second))
    runs, n = differences.shape
    queries = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n  # (draws, n)
    chosen = (
        rng.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs
        if redraw_runs
        else np.full((draws, runs), 1 / runs)
    )
    low, high = np.quantile(((queries @ differences.T) * chosen).sum(1), [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


def mutual_knn(a: Tensor, b: Tensor, k: int = 10) -> float:
    """Share of the k nearest neighbours (by cosine) that n samples have in common in two spaces (Huh et al. 2024)."""
    near = [similarities(z, z).fill_diagonal_(-torch.inf).topk(k).indices for z in (a, b)]
    return float((near[0][:, :, None] == near[1][:, None]).any(2).double().mean())


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of (n, Da) and (n, Db), 0 to 1 (Kornblith et al. 2019)."""
    a, b = (z.double() - z.double().mean(0) for z in (a, b))
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))
