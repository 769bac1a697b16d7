"""From ids back to what they stand for, and from that to pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CLASS_COLOURS: np.ndarray = np.round(255 * np.asarray(matplotlib.colormaps["tab20"](np.arange(20)))[:, :3])  # (20, 3)


def decode(ids: Mapping[str, Tensor | Sequence[Tensor]], tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """Hands the ids of every modality to its tokenizer.

    Args:
        ids: Per modality what `Sampler.generate` returns: (B, n) ids, or a list of B texts.
        tokenizers: Per modality anything with `decode(ids)`.

    Returns:
        Per modality B raw values in their own units.

    Raises:
        ValueError: A modality without tokenizer.
    """
    missing = sorted(set(ids) - set(tokenizers))
    if missing:
        raise ValueError(f"no tokenizer for {', '.join(missing)}, there are {', '.join(sorted(tokenizers)) or 'none'}")
    return {name: tokenizers[name].decode(values) for name, values in ids.items()}


def kind_of(tokenizer: Any) -> str:
    """What `picture` calls the raw values of a tokenizer: the kind of its input, or its codec."""
    config = tokenizer.config
    return config.codec if hasattr(config, "codec") else config.input.kind


def picture(kind: str, raw: Any, size: int = 256, low: float | None = None, high: float | None = None) -> Image.Image:
    """Draws one raw value.

    Args:
        kind: `image`, `normal`, `field`, `classes` (the tokenizer's input kind), or `caption`, `metadata`, `palette`,
            `places` (the codec of a text tokenizer).
        raw: What `decode` returns for one row.
        size: Height of the picture in pixels; arrays keep their aspect ratio.
        low: Value of a field drawn darkest; default: its lowest.
        high: Value of a field drawn brightest; default: its highest.

    Returns:
        An RGB picture.

    Raises:
        ValueError: An unknown kind.
    """
    if kind == "field":
        return _resize(_field(np.asarray(raw), low, high), size)
    if kind in ARRAYS:
        return _resize(ARRAYS[kind](np.asarray(raw)), size)
    if kind in DRAWINGS:
        return DRAWINGS[kind](raw, size)
    raise ValueError(f"kind is {kind!r}, allowed are {', '.join(['field', *ARRAYS, *DRAWINGS])}")


def _resize(pixels: np.ndarray, size: int) -> Image.Image:
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((max(1, round(width * size / height)), size), Image.Resampling.NEAREST)


def _field(raw: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """(H, W) numbers through a colour map to (H, W, 3) uint8; NaN and infinities are black."""
    finite = np.isfinite(raw)
    seen = raw[finite] if finite.any() else np.zeros(1)
    low, high = seen.min() if low is None else low, seen.max() if high is None else high
    share = (np.where(finite, raw, low).astype(np.float64) - low) / max(high - low, 1e-12)
    colours = matplotlib.colormaps["viridis"](np.clip(share, 0, 1))[..., :3]
    return np.round(255 * colours * finite[..., None]).astype(np.uint8)


def _rgb(raw: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 to (H, W, 3)."""
    return np.broadcast_to(raw.reshape(*raw.shape[:2], -1), (*raw.shape[:2], 3)).astype(np.uint8)


def _classes(raw: np.ndarray) -> np.ndarray:
    """(H, W) class ids to colours; beyond 20 classes they come again, each round darker."""
    ids = raw.astype(np.int64)
    shade = 0.75 ** (ids // len(CLASS_COLOURS))
    return np.round(CLASS_COLOURS[ids % len(CLASS_COLOURS)] * shade[..., None]).astype(np.uint8)


ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"image": _rgb, "normal": _rgb, "classes": _classes}


def _text(raw: Any, size: int) -> Image.Image:
    """A string in a square, wrapped, as large as it fits."""
    canvas = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(canvas)
    margin = size // 20
    for points in range(max(8, size // 9), 7, -1):
        font = ImageFont.load_default(points)
        columns = max(1, int((size - 2 * margin) / (0.55 * points)))
        lines = [piece for line in str(raw).split("\n") for piece in textwrap.wrap(line, columns) or [""]]
        text = "\n".join(lines)
        box = pen.multiline_textbbox((margin, margin), text, font=font)
        if max(box[2:]) <= size - margin:
            break
    pen.multiline_text((margin, margin), text, fill="black", font=font)
    return canvas


def _metadata(raw: Mapping[str, Any], size: int) -> Image.Image:
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in raw.items()}
    return _text("\n".join(f"{name}: {value}" for name, value in values.items()), size)


def _palette(raw: Sequence[Sequence[int]], size: int) -> Image.Image:
    """Swatches from left to right; white if there are none."""
    colours = np.asarray(raw if len(raw) else [[255, 255, 255]]).clip(0, 255).astype(np.uint8)
    columns = np.arange(size) * len(colours) // size
    return Image.fromarray(np.broadcast_to(colours[columns], (size, size, 3)).copy())


def _places(raw: Sequence[Mapping[str, Any]], size: int) -> Image.Image:
    """Named dots."""
    canvas = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(canvas)
    radius, font = max(2, size // 60), ImageFont.load_default(max(8, size // 18))
    for place in raw:
        x, y = float(place["x"]) * size, float(place["y"]) * size
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="crimson")
        right = pen.textlength(place["name"], font=font) + x + 2 * radius
        pen.text((x + 2 * radius - max(0, right - size), y), place["name"], fill="black", font=font)
    return canvas


DRAWINGS: dict[str, Callable[[Any, int], Image.Image]] = {
    "caption": _text,
    "metadata": _metadata,
    "palette": _palette,
    "places": _places,
}
