"""Every frozen encoder by name, a `FourM` among them, and what is taken of its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fourm.data.labels import by_size, captions
from fourm.encoders import Encoder, load_encoder
from fourm.model.image_encoder import ImageEncoder

Pooling = Literal["own", "mean", "max", "first", "none"]
POOL: dict[str, Callable[[Tensor], Tensor]] = {  # of (L, D)
    "mean": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "first": lambda parts: parts[0],
}


class FourMEncoder(Encoder):
    """The encoder of a `FourM` that knows pixels.

    Args:
        name: What it is loaded by.
        network: The encoder.
    """

    network: ImageEncoder

    def __init__(self, name: str, network: ImageEncoder):
        super().__init__(name, network)
        self.dim = network.config.dim

    def preparation(self) -> str:
        """The row of the modality table."""
        return repr(self.network.image)

    def features(self, inputs: Sequence[np.ndarray]) -> Tensor:
        """Maps (B, h, w, dim) of uint8 pictures (H, W, 3)."""
        assert self.network.image.grid is not None
        return self.network.features(inputs).unflatten(1, self.network.image.grid)

    def pooled(self, inputs: Sequence[np.ndarray]) -> Tensor:
        """The means (B, dim) of the maps."""
        return self.features(inputs).mean((1, 2))


def load(name: str, device: str | torch.device = "cpu", size: int = 0) -> Encoder:
    """As `load_encoder`, which see, and `fourm:<folder or hub id>[@<modality>]` for the pixels of a `FourM`.

    Raises:
        ValueError: There is no such encoder, what it needs is not here, or it has no size to choose.
    """
    if not name.startswith("fourm:"):
        return load_encoder(name, device, size)
    if size:
        raise ValueError(f"{name}: size is {size}, but its inputs have a fixed one; allowed is 0, the encoder's own")
    where, _, modality = name.removeprefix("fourm:").partition("@")
    return FourMEncoder(name, ImageEncoder.from_pretrained(where, modality or None)).to(device)


def latents(encoder: Encoder, inputs: Sequence[Any], pooling: Pooling = "own") -> list[Tensor]:
    """What a frozen encoder says of each input; the layer is a part of its name.

    Args:
        encoder: The encoder.
        inputs: Raw values: pictures (uint8, grey or RGB, of any sizes), texts (of several captions the first), or
            whatever else the encoder takes.
        pooling: `own`: the encoder's own vector (D,); `mean`, `max`, or `first` (of texts) of its features (D,);
            `none`: all of them, a map (h, w, D) or token states (L, D).

    Raises:
        ValueError: An unknown pooling, or one this encoder cannot give.
    """
    if pooling not in ("own", "none", *POOL):
        raise ValueError(f"pooling is {pooling!r}, allowed are own, none, {', '.join(POOL)}")

    def compute(values: Sequence[Any]) -> Any:
        if pooling == "own":
            return list(encoder.pooled(values))
        features = list(encoder.features(values))
        if pooling == "none":
            return features
        if pooling == "first" and features[0].ndim != 2:
            raise ValueError(f"pooling is 'first', but the features of {encoder.name} are maps, without a first one")
        return [POOL[pooling](parts.flatten(0, -2)) for parts in features]

    if isinstance(inputs[0], str | list):
        return compute([captions(value)[0] for value in inputs])
    pictures = isinstance(inputs[0], np.ndarray) and inputs[0].dtype == np.uint8
    return list(by_size(compute)(inputs) if pictures else compute(inputs))
