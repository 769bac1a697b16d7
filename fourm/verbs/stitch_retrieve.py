"""`fourm stitch retrieve`: what belongs to a text or a picture, found through joined encoders."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fourm.data.inspect import picture
from fourm.data.labels import captions
from fourm.data.shards import ShardDataset
from fourm.evaluation.results import drawing
from fourm.evaluation.retrieval import search
from fourm.stitching.encoders import latents
from fourm.stitching.latents import Latents, Source, check
from fourm.stitching.teacher import open_side


@dataclass(kw_only=True)
class Config:
    """What is looked for, and where.

    Args:
        query: A text, or the path of a picture.
        space: Folder of a trained space, such as `runs/stitch/fusemix-emoji/space`.
        side: Which side of it the query is of, `a` or `b`; what is found is of the other.
        k: How many are shown.
        split: Whose samples are searched.
        output: The picture; default: `retrieved.png` beside the space, where `fourm stitch report` finds it.
    """

    query: str
    space: str
    side: str
    k: int = 6
    split: str = "test"
    output: str = ""


class Shown(NamedTuple):
    """A picture or text, what stands above it, and whether it is the right one."""

    value: Any
    title: str
    right: bool = False


@torch.inference_mode()
def run(config: Config) -> None:
    """Prints names and cosines of what is nearest, and draws it."""
    space, here, encoder = open_side(config.space, config.side)
    pairs, other = space.card["pairs"], "b" if config.side == "a" else "a"
    there = Source(**pairs[other])
    stored = Latents(Path(pairs["latents"]) / there.name / config.split)
    check(stored.folder, stored.card, space.card["made"][other])
    own, data = (ShardDataset(Path(pairs["data"]) / config.split, [side.modality]) for side in (here, there))
    value = read_query(config.query, own[0][here.modality], f"side {config.side} is of {here.modality}")
    vector = space(config.side, latents(encoder, [value], here.pooling)[0][None])
    scores, found = search(vector, space(other, stored.read()), config.k)
    row = [Shown(value, "query")]
    for number, score in zip(found[0].tolist(), scores[0].tolist(), strict=True):
        print(f"{score:.3f}  {stored.ids[number]}")
        row.append(Shown(data.sample(stored.ids[number])[there.modality], f"{score:.2f}"))
    output = Path(config.output or Path(config.space).parent / "retrieved.png")
    draw([row], output)
    print(output)


def read_query(query: str, example: Any, side: str) -> Any:
    """The text or the picture (H, W, 3) that is asked for.

    Args:
        query: A text, or the path of a picture.
        example: A raw value of the query's side.
        side: Which that is, for errors.

    Raises:
        ValueError: The side wants something else, or the picture cannot be read.
    """
    is_file = os.path.isfile(query)  # Path.is_file raises where a text is too long to be a name
    if isinstance(example, str | list | dict):
        if is_file:
            raise ValueError(f"query is the file {query}, but {side}, texts; give a text")
        return query
    if not isinstance(example, np.ndarray) or example.dtype != np.uint8:
        raise ValueError(f"{side}, neither pictures nor texts; queries are a text or the path of a picture")
    if not is_file:
        raise ValueError(f"query is {query!r:.80}, but {side}, pictures, and there is no such file")
    try:
        return np.asarray(Image.open(query).convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"query is {query}, which is no picture") from None


def draw(rows: Sequence[Sequence[Shown]], path: Path) -> None:
    """Pictures and texts in rows of the same length; what is right has a green title."""
    with drawing(path, len(rows), len(rows[0]), (2 * len(rows[0]), 2.4 * len(rows))) as grid:
        for axes, shown in zip(grid.flat, (each for row in rows for each in row), strict=True):
            mark = {"color": "green", "fontweight": "bold"} if shown.right else {}
            axes.set_title(shown.title, fontsize=9, **mark)
            axes.axis("off")
            drawn = picture(shown.value) if isinstance(shown.value, np.ndarray) else captions(shown.value)[0]
            if isinstance(drawn, str):
                axes.text(0.5, 0.5, textwrap.fill(drawn, 22), ha="center", va="center", fontsize=8)
            else:
                axes.imshow(np.asarray(drawn))
