"""`fourm stitch retrieve`: what belongs to a text or a picture, found through joined encoders."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fourm.data.inspect import picture
from fourm.data.labels import captions
from fourm.data.shards import ShardDataset
from fourm.evaluation.retrieval import search
from fourm.stitching.encoders import latents, load
from fourm.stitching.latents import Latents, Source, check
from fourm.stitching.space import SharedSpace


@dataclass(kw_only=True)
class Config:
    """What is looked for, and where.

    Args:
        query: A text, or the path of a picture.
        space: Folder of a trained space, such as `runs/stitch/fusemix-emoji/space`.
        side: Which side of it the query is of, `a` or `b`; what is found is of the other.
        k: How many are shown.
        split: Whose samples are searched.
        output: The picture.
    """

    query: str
    space: str
    side: str
    k: int = 6
    split: str = "test"
    output: str = "retrieved.png"


@torch.inference_mode()
def run(config: Config) -> None:
    """Prints names and cosines of what is nearest, and draws it."""
    if config.side not in ("a", "b"):
        raise ValueError(f"side is {config.side!r}, allowed are a, b")
    space = SharedSpace.load(config.space)
    pairs, made = space.card["pairs"], space.card["made"]
    other = "b" if config.side == "a" else "a"
    here, there = Source(**pairs[config.side]), Source(**pairs[other])
    stored = Latents(Path(pairs["latents"]) / there.name / config.split)
    check(stored.folder, stored.card, made[other])
    encoder = load(here.encoder, size=here.size)
    check(Path(config.space), made[config.side], encoder.fingerprint())
    value: Any = config.query
    if Path(config.query).is_file():
        value = np.asarray(Image.open(config.query).convert("RGB"))
    vector = space(config.side, latents(encoder, [value], here.pooling)[0][None])
    scores, found = search(vector, space(other, stored.read()), config.k)
    data = ShardDataset(Path(pairs["data"]) / config.split, [there.modality])
    keys = [stored.ids[row] for row in found[0].tolist()]
    values = [data.sample(key)[there.modality] for key in keys]
    for key, score in zip(keys, scores[0].tolist(), strict=True):
        print(f"{score:.3f}  {key}")
    titles = [f"{score:.2f}" for score in scores[0].tolist()]
    draw([value, *values], ["query", *titles], Path(config.output))
    print(config.output)


def draw(values: list[Any], titles: list[str], path: Path) -> None:
    """Pictures and texts in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, len(values), figsize=(2 * len(values), 2.4), squeeze=False)
    for axes, value, title in zip(row[0], values, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.axis("off")
        if isinstance(value, np.ndarray):
            axes.imshow(np.asarray(picture(value)))
        else:
            axes.text(0.5, 0.5, textwrap.fill(captions(value)[0], 22), ha="center", va="center", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
