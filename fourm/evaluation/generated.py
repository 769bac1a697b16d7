"""Retrieval through generated global tokens: any modality -> tokens of a vector -> the vector -> the nearest samples.

4M-21 (2406.09406) retrieves so with DINOv2's and ImageBind's global features, whose tokens it writes in one step.
Here, too; but several draws of the tokens are decoded and averaged, as one says less than the model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fourm.evaluation.matrix import aligned_samples, raw_sources, raw_targets
from fourm.evaluation.metrics import bootstrap_ratio
from fourm.evaluation.retrieval import KS, ranks, recalls, similarities
from fourm.evaluation.tasks import TasksConfig, draw_pictures
from fourm.generation.decode import picture, sheet
from fourm.model.fourm import FourM

SHOWN = 5  # hits beside a query
SIDE = 96  # pixels of a drawing


@dataclass(frozen=True)
class RetrievalConfig:
    """What is searched, and how queries are made of it.

    Args:
        target: Raw modality of vectors that the model predicts as tokens; nothing for no retrieval.
        n: Test samples that are searched, each of which is looked for; all where there are fewer.
        draws: Vectors that are averaged for a query.
        space: Folder of a shared space (`fourm stitch fusemix`) in which vectors are compared, too.
        side: Which side of it these vectors are of.
        picture: Raw modality with the pictures that are drawn of what is found.
        batch_size: Samples per pass.
        seed: Of choices and draws.
    """

    target: str = ""
    n: int = 1024
    draws: int = 32
    space: str = ""
    side: str = "a"
    picture: str = "rgb"
    batch_size: int = 64
    seed: int = 0


def centred(queries: Tensor, items: Tensor) -> Tensor:
    """Cosines (Q, N) after each side's mean is taken off, as an unsure model's queries are all near their mean."""
    return similarities(queries - queries.mean(0), items - items.mean(0))


def figures(queries: Tensor, items: Tensor, seed: int = 0) -> dict[str, Any]:
    """Recalls with their intervals over queries, and the median rank: each of N queries looks for its own item."""
    found = ranks(centred(queries, items))
    ones = np.ones(len(found))
    intervals = {f"R@{k}_ci95": list(bootstrap_ratio((found < k).double().numpy(), ones, seed=seed)) for k in KS}
    return {**recalls(found), **intervals, "median_rank": float(np.median(found)) + 1}


def retrieve(
    model: FourM, tokenizers: Mapping[str, Any], raw: Any, tokens: Any, config: RetrievalConfig,
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, Any], Image.Image]:  # fmt: skip
    """Looks for each test sample among all of them by the vector that is generated from each of its modalities.

    Args:
        model: The model.
        tokenizers: By name of the model modality.
        raw: `ShownDataset` of the test split.
        tokens: `TokenDataset` of the same samples in the same order.
        config: What is searched.
        project: Vectors (B, D) into another space in which they are compared, too (`shared`).

    Returns:
        `{"n", "chance": {"R@1", ...}, "bound": figures of the tokenizer's own vectors, "sources": {source: figures,
        and its figures as "shared"}}`, and a sheet with a query of each source and what it finds.

    Raises:
        ValueError: The model does not predict the target, or does not know the picture.
    """
    sources, targets = raw_sources(model.eval().space), raw_targets(model.space)
    if config.target not in targets:
        raise ValueError(f"retrieval.target is {config.target!r}, the model predicts {', '.join(targets)}")
    if config.picture not in sources:
        raise ValueError(f"retrieval.picture is {config.picture!r}, the model knows {', '.join(sources)}")
    name = targets[config.target]
    scenes, samples = aligned_samples(raw, tokens, min(config.n, len(tokens)), config.seed)
    stored, tokenizer = np.stack([scene[config.target] for scene in scenes]), tokenizers[name]
    items, n = torch.from_numpy(stored.astype(np.float32)), len(scenes)
    how = TasksConfig(draws=config.draws, batch_size=config.batch_size, seed=config.seed)
    spaces = {"": (lambda vectors: vectors)} | ({"shared": project} if project else {})
    found: dict[str, Any] = {"n": n, "chance": {f"R@{k}": k / n for k in KS}, "bound": {}, "sources": {}}
    rows = []

    def score(queries: Tensor, into: dict[str, Any]) -> None:
        for space, of in spaces.items():
            scored = figures(of(queries), of(items), config.seed)
            into |= {space: scored} if space else scored

    score(torch.from_numpy(tokenizer.decode(tokenizer.encode(stored))), found["bound"])
    for source, given in tqdm(sources.items(), desc="retrieval", unit="source"):
        if given == name:
            continue
        queries = torch.from_numpy(draw_pictures(model, tokenizer, samples, [given], name, how))
        score(queries, found["sources"].setdefault(source, {}))
        hits = centred(queries, items)[0].topk(min(SHOWN, n)).indices.tolist()
        query = picture(tokenizers.get(given), scenes[0][source], SIDE, None, scenes[0][config.picture])
        shown = [picture(None, scenes[hit][config.picture], SIDE) for hit in hits]
        rows.append(sheet([source, *("itself" if hit == 0 else "" for hit in hits)], [[query, *shown]]))
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        page.paste(row, (0, sum(above.height for above in rows[:number])))
    return found, page
