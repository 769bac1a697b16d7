"""How much branches get into each other's way: what they added to each layer, compared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import torch

from fourm.composition.merge import MergeConfig, Shared, uniform
from fourm.model.fourm import FourM

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def sign_dissimilarity(deltas: torch.Tensor) -> float:
    """(N, ...) -> 1 less the mean of |sum| / sum of sizes, where any is not 0: 0 if all signs agree (soft SSD)."""
    sizes = deltas.abs().sum(0)
    some = sizes > 0
    return 1 - float((deltas.sum(0).abs()[some] / sizes[some]).mean()) if some.any() else 0.0


@torch.no_grad()
def interference(base: FourM, branches: Mapping[str, FourM]) -> dict[str, dict[str, float]]:
    """Per shared tensor that all branches moved: `cosine a|b` of each pair, and `ssd` (see `sign_dissimilarity`).

    Of decoupled adapters it is the set that all other modalities share, which is what is merged.

    Args:
        base: What all were trained from.
        branches: By name.
    """
    shared = Shared(base, branches, MergeConfig(), uniform(list(branches), "naive"))
    found = {}
    for name in shared.names:
        deltas = torch.stack([shared.delta(name, branch) for branch in branches])
        flat = deltas.flatten(1)
        lengths = flat.norm(dim=1)
        if lengths.all():
            cosines = flat @ flat.T / lengths[:, None] / lengths
            pairs = itertools.combinations(enumerate(branches), 2)
            figures = {f"cosine {a}|{b}": float(cosines[i, j]) for (i, a), (j, b) in pairs}
            found[name] = figures | {"ssd": sign_dissimilarity(deltas)}
    return found


def draw(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A row per tensor, a column per figure."""
    columns = list(next(iter(found.values())))
    values = np.array([[figures[column] for column in columns] for figures in found.values()])
    size = (2.5 + 0.9 * len(columns), 1.2 + 0.17 * len(found))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(found)), [name.removesuffix(".weight") for name in found], fontsize=6)
    figure.colorbar(image)
    figure.savefig(path, dpi=100)
    plt.close(figure)
