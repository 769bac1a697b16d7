"""What needs no training: a ridge map and ASIF, their one or two numbers chosen on the validation split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fourm.evaluation.retrieval import both_ways, similarities
from fourm.stitching.pairs import Samples


def ridge(train: Samples, test: Samples, strength: float) -> Tensor:
    """Scores (n, n) by linear least squares in both directions: the sum of both cosines.

    Args:
        train: The pairs it is fitted to.
        test: n pairs.
        strength: Penalty of the weights, in units of the total variance.
    """
    total: Any = 0
    for source, target in (("a", "b"), ("b", "a")):
        x, y = train.sides[source].double(), train.sides[target].double()
        means = x.mean(0), y.mean(0)
        x, y = x - means[0], y - means[1]
        penalty = strength * x.square().sum() / len(x) * torch.eye(min(x.shape), dtype=x.dtype)
        if len(x) <= x.shape[1]:
            weights = x.T @ torch.linalg.solve(x @ x.T + penalty, y)
        else:
            weights = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
        guesses = (test.sides[source].double() - means[0]) @ weights
        scores = similarities(guesses, test.sides[target].double() - means[1])
        total = total + (scores if source == "a" else scores.T)
    return total


def asif(train: Samples, test: Samples, neighbours: int, power: float) -> Tensor:
    """Scores (n, n) by likeness to training pairs, of which each sample keeps its nearest (2210.01738).

    Args:
        train: The anchors.
        test: n pairs.
        neighbours: Anchors kept.
        power: Of the likenesses.
    """
    relative = []
    for side in ("a", "b"):
        anchors, z = train.sides[side], test.sides[side]
        values, places = similarities(z, anchors).clamp(min=0).topk(min(neighbours, len(anchors)))
        relative.append(z.new_zeros(len(z), len(anchors)).scatter(1, places, values**power))
    return similarities(*relative)


BASELINES: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, Sequence[float]]]] = {
    "ridge": (ridge, {"strength": (0.001, 0.01, 0.1, 1.0, 10.0)}),
    "asif": (asif, {"neighbours": (10, 30, 100, 300, 1000), "power": (1.0, 4.0, 8.0)}),
}
LARGEST = 20_000  # pairs they are fitted to at most


def mean_recall(figures: Mapping[str, float]) -> float:
    """What is selected by: the mean of R@1, R@5 and R@10 of both directions."""
    return sum(figures[f"R@{k}"] for k in (1, 5, 10)) / 3


def choose(name: str, train: Samples, val: Samples) -> dict[str, float]:
    """The settings of a baseline that are best on the validation split."""
    function, grid = BASELINES[name]
    choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return max(choices, key=lambda choice: mean_recall(both_ways(function(train, val, **choice)).figures()))
