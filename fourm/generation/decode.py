"""From ids back to what they stand for, and from that to words and pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fourm.tokenization.autoencoder import InputConfig

CLASS_COLOURS: np.ndarray = np.round(255 * np.asarray(matplotlib.colormaps["tab20"](np.arange(20)))[:, :3])  # (20, 3)


def decode(ids: Mapping[str, Tensor | Sequence[Tensor]], tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """Hands the ids of every modality to its tokenizer.

    Args:
        ids: Per modality what `Sampler.generate` returns: (B, n) ids, or a list of B texts.
        tokenizers: Per modality anything with `decode(ids)`.

    Returns:
        Per modality B raw values in their own units.
    """
    return {name: tokenizers[name].decode(values) for name, values in ids.items()}


def words(value: Any) -> str:
    """A raw value of a text modality in words; nothing for a palette, which is better drawn."""
    if not value:
        return "none"
    if isinstance(value, Mapping):
        return "\n".join(f"{name.replace('_', ' ')} {number:.4g}" for name, number in value.items())
    if isinstance(value, str):
        return value
    return "\n".join(f"{item['name']} {item['x']:.2f} {item['y']:.2f}" for item in value if isinstance(item, Mapping))


def picture(
    tokenizer: Any, raw: Any, size: int = 256, low: float | None = None, high: float | None = None
) -> Image.Image:
    """Draws one raw value.

    Args:
        tokenizer: Its modality's `ImageTokenizer` or `TextTokenizer`; None for the pixels of a picture.
        raw: What `decode` returns for one row.
        size: Height of the picture in pixels; arrays keep their aspect ratio.
        low: Value of a field drawn darkest; default: its lowest.
        high: Value of a field drawn brightest; default: its highest.

    Returns:
        An RGB picture: images and normals as they are, fields through a colour map, each class in its colour, a
        palette as swatches, other values in words.
    """
    settings = InputConfig() if tokenizer is None else getattr(tokenizer.config, "input", None)
    if settings is None:
        return _text(words(raw), size) if words(raw) else _swatches(raw, size)
    pixels = np.asarray(raw)
    if settings.kind == "field":
        pixels = _field(pixels, low, high)
    elif settings.kind == "classes" and not settings.values:  # with values such as 0 and 255 it is a picture already
        pixels = _classes(1 - pixels if settings.classes == 2 else pixels)  # of two classes the second is the darker
    height, width = pixels.shape[:2]
    pixels = np.broadcast_to(pixels.reshape(height, width, -1), (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((max(1, round(width * size / height)), size), Image.Resampling.NEAREST)


def _field(raw: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """(H, W) numbers through a colour map to (H, W, 3)."""
    low, high = raw.min() if low is None else low, raw.max() if high is None else high
    share = (raw.astype(np.float64) - low) / max(high - low, 1e-12)
    return np.round(255 * matplotlib.colormaps["viridis"](np.clip(share, 0, 1))[..., :3])


def _classes(raw: np.ndarray) -> np.ndarray:
    """(H, W) class ids to colours (H, W, 3); beyond 20 classes they come again, each round darker."""
    shade = 0.75 ** (raw // len(CLASS_COLOURS))
    return np.round(CLASS_COLOURS[raw % len(CLASS_COLOURS)] * shade[..., None])


def _text(text: str, size: int) -> Image.Image:
    """Words in a square; what is too long for it is cut."""
    canvas = Image.new("RGB", (size, size), "white")
    lines = "\n".join(piece for line in text.split("\n") for piece in textwrap.wrap(line, 26))
    ImageDraw.Draw(canvas).text((size / 20, size / 20), lines, fill="black", font=ImageFont.load_default(size / 16))
    return canvas


def _swatches(colours: Sequence[Sequence[int]], size: int) -> Image.Image:
    """Colours from left to right."""
    columns = np.arange(size) * len(colours) // size
    return Image.fromarray(np.tile(np.asarray(colours, dtype=np.uint8)[columns], (size, 1, 1)))
