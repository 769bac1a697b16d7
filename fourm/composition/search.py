"""Weights of branches, chosen on samples that show several of their modalities together (DAMC's adjustment)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Score = Callable[[Mapping[str, float]], float]


def simplex(count: int, parts: int) -> list[tuple[float, ...]]:
    """All ways to share 1 among so many, in whole parts of it."""
    cuts = itertools.combinations_with_replacement(range(parts + 1), count - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, parts))) for cut in cuts]


def search(score: Score, branches: Sequence[str], step: float = 0.1) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights with the lowest loss: of all on a grid that add up to 1 for up to three branches, else one after another.

    Args:
        score: The loss of a model composed with some weights.
        branches: Their names.
        step: Of the grid, a whole part of 1.

    Returns:
        The weights, and `curve` (every trial), `best`, `uniform` (their losses) and `flat`: the share of trials whose
        loss lies within a tenth of the range of all.

    Raises:
        ValueError: Another step.
    """
    parts = round(1 / step)
    if not 0 < step <= 1 or abs(parts * step - 1) > 1e-6:
        raise ValueError(f"step is {step}, expected a whole part of 1 such as 0.1")
    tried: dict[tuple[float, ...], float] = {}

    def loss(point: tuple[float, ...]) -> float:
        if point not in tried:
            tried[point] = score(dict(zip(branches, point, strict=True)))
        return tried[point]

    best = start = (1 / len(branches),) * len(branches)
    loss(start)
    if len(branches) <= 3:
        best = min(
            [start, *(tuple(part / parts for part in point) for point in simplex(len(branches), parts))], key=loss
        )
    else:
        before: tuple[float, ...] = ()
        while before != best:
            before = best
            for place in range(len(branches)):
                line = [(*best[:place], part / parts, *best[place + 1 :]) for part in range(parts + 1)]
                best = min([best, *line], key=loss)
    losses = np.array(list(tried.values()))
    flat = float((losses <= losses.min() + 0.1 * np.ptp(losses)).mean())
    curve = [{"weights": list(point), "loss": value} for point, value in tried.items()]
    found = {"branches": list(branches), "best": tried[best], "uniform": tried[start], "flat": flat, "curve": curve}
    return dict(zip(branches, best, strict=True)), found


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The curve: a line for two branches, a triangle for three, else losses in the order of trials."""
    points, losses = (np.array([each[key] for each in found["curve"]]) for key in ("weights", "loss"))
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    names = found["branches"]
    if len(names) == 2:
        order = points[:, 0].argsort()
        axes.plot(points[order, 0], losses[order], "o-")
        axes.set(xlabel=f"weight of {names[0]}, the rest is {names[1]}'s", ylabel="loss, nats")
    elif len(names) == 3:
        dots = axes.scatter(points[:, 0], points[:, 1], c=losses, s=90, marker="h")
        figure.colorbar(dots, label="loss, nats")
        axes.set(xlabel=f"weight of {names[0]}", ylabel=f"weight of {names[1]}", title=f"the rest is {names[2]}'s")
    else:
        axes.plot(losses, ".")
        axes.set(xlabel="trial", ylabel="loss, nats")
    figure.savefig(path, dpi=100)
    plt.close(figure)
