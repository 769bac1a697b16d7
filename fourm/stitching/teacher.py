"""A teacher for `fourm label`: vectors in a trained shared space, which a model takes as a `vectors` modality."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourm.encoders import Encoder
from fourm.stitching.encoders import latents, load
from fourm.stitching.latents import Source, check
from fourm.stitching.space import SharedSpace


@functools.cache
def open_side(folder: str, side: str) -> tuple[SharedSpace, Source, Encoder]:
    """A trained space, and the encoder of one of its sides.

    Raises:
        ValueError: There is no such side, or the encoder here is not the one that the space was trained with.
    """
    space = SharedSpace.load(folder)
    if side not in space.connectors:
        raise ValueError(f"side is {side!r}, allowed are {', '.join(space.connectors)}")
    source = Source(**space.card["pairs"][side])
    encoder = load(source.encoder, size=source.size)
    check(Path(folder), space.card["made"][side], encoder.fingerprint())
    return space, source, encoder


@torch.inference_mode()
def shared(values: Sequence[Any], space: str, side: str) -> list[np.ndarray]:
    """What the encoder of one side says of raw values, through its connector: unit vectors (1, D) each, float16.

    Args:
        values: Pictures or texts, whatever the side is of.
        space: Folder of a trained space, such as `fourm stitch fusemix` writes.
        side: `a` or `b`.
    """
    trained, source, encoder = open_side(space, side)
    vectors = trained(side, torch.stack(latents(encoder, values, source.pooling)))
    return list(vectors[:, None].half().numpy())
