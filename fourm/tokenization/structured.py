"""Structured values to text and back: captions, metadata, colour palettes and named places (4M, section 2.1).

Numbers become words such as `v0=12`: the digit after `v` is a role, the number a bin. `to_text` and `from_text` are
inverses up to binning (a number comes back as the centre of its bin). `from_text` also reads what a model wrote, so
it skips malformed pieces and never raises on a string.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NUMBER = re.compile(r"v(\d)=(\d+)")
EMPTY = "none"


@dataclass(frozen=True)
class CodecConfig:
    """How one structured modality is written as text.

    Args:
        codec: A name in `CODECS`.
        bins: Bins per number (metadata, palette, places). A palette is exact with 256.
        fields: Smallest and largest value of each number, by name; the order gives the type ids (metadata).
    """

    codec: str
    bins: int = 256
    fields: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec is {self.codec!r}, allowed are {', '.join(CODECS)}")
        if self.bins < 2:
            raise ValueError(f"bins is {self.bins}, expected 2 or more")
        for name, (low, high) in self.fields.items():
            if not low < high:
                raise ValueError(f"field {name!r} goes from {low} to {high}, expected the smaller number first")


def to_bin(value: float, low: float, high: float, bins: int) -> int:
    """The bin of a number; numbers outside [low, high] fall into the outer bins."""
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return min(max(math.floor((value - low) / (high - low) * bins), 0), bins - 1)


def from_bin(index: int, low: float, high: float, bins: int) -> float:
    """The centre of a bin."""
    return low + (index + 0.5) / bins * (high - low)


class CaptionCodec:
    """A caption is its own text. Other codecs write their values in other ways."""

    def __init__(self, config: CodecConfig):
        self.names, self.ranges, self.bins = list(config.fields), list(config.fields.values()), config.bins

    def to_text(self, value: Any) -> str:
        """The text of a value; ValueError where the value is not of the right form."""
        if not isinstance(value, str):
            raise ValueError(f"expected a string, got {type(value).__name__}")
        return value

    def from_text(self, text: str) -> Any:
        """The value of a text, as much of it as can be read."""
        return text.strip()


class MetadataCodec(CaptionCodec):
    """Named numbers: `v1=<type> v0=<bin>` each, in the order of the configured fields."""

    def to_text(self, value: Any) -> str:
        """Text of a mapping from name to number; names that are not configured are left out."""
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping from name to number, got {type(value).__name__}")
        return " ".join(
            f"v1={kind} v0={to_bin(value[name], *self.ranges[kind], self.bins)}"
            for kind, name in enumerate(self.names)
            if name in value
        )

    def from_text(self, text: str) -> dict[str, float]:
        """Name to bin centre; the first value of a type counts."""
        found: dict[str, float] = {}
        for kind, index in re.findall(r"v1=(\d+)\s+v0=(\d+)", text):
            if int(kind) < len(self.names) and int(index) < self.bins:
                found.setdefault(self.names[int(kind)], from_bin(int(index), *self.ranges[int(kind)], self.bins))
        return found


class PaletteCodec(CaptionCodec):
    """Colours: `v1=<how many> v0=<red> v0=<green> v0=<blue> ...`."""

    def to_text(self, value: Any) -> str:
        """Text of a list of [red, green, blue], each 0 to 255."""
        if not all(len(colour) == 3 and all(0 <= part <= 255 for part in colour) for colour in value):
            raise ValueError(f"expected a list of [red, green, blue] from 0 to 255, got {value}")
        parts = [f"v0={to_bin(part, 0, 256, self.bins)}" for colour in value for part in colour]
        return " ".join([f"v1={len(value)}", *parts])

    def from_text(self, text: str) -> list[list[int]]:
        """As many whole colours as announced and found."""
        numbers = [(role, int(number)) for role, number in NUMBER.findall(text)]
        parts = [number for role, number in numbers if role == "0" and number < self.bins]
        announced = next((number for role, number in numbers if role == "1"), len(parts))
        values = [math.floor(from_bin(number, 0, 256, self.bins)) for number in parts]
        return [values[start : start + 3] for start in range(0, 3 * min(announced, len(parts) // 3), 3)]


class PlacesCodec(CaptionCodec):
    """Named points: `v0=<x> v1=<y> <name>` each, or `none`."""

    def to_text(self, value: Any) -> str:
        """Text of a list of {"name", "x", "y"}, coordinates from 0 to 1."""
        return " ".join(self._place(place) for place in value) or EMPTY

    def _place(self, place: Mapping[str, Any]) -> str:
        name = _tidy(place["name"])
        if not name or NUMBER.search(name):
            raise ValueError(f"expected a place with a name, without words such as 'v0=1', got {place}")
        return f"v0={to_bin(place['x'], 0, 1, self.bins)} v1={to_bin(place['y'], 0, 1, self.bins)} {name}"

    def from_text(self, text: str) -> list[dict[str, Any]]:
        """Every place with two coordinates and a name."""
        places = []
        for x, y, name in re.findall(r"v0=(\d+)\s+v1=(\d+)\s+((?:(?!v\d=).)+)", text, re.DOTALL):
            if max(int(x), int(y)) < self.bins and _tidy(name):
                centre = {"x": from_bin(int(x), 0, 1, self.bins), "y": from_bin(int(y), 0, 1, self.bins)}
                places.append({"name": _tidy(name), **centre})
        return places


def _tidy(name: str) -> str:
    """One space between words, none around them."""
    return " ".join(name.split())


CODECS: dict[str, type[CaptionCodec]] = {
    "caption": CaptionCodec,
    "metadata": MetadataCodec,
    "palette": PaletteCodec,
    "places": PlacesCodec,
}
