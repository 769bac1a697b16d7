"""Structured values to text and back: captions, metadata, palettes, places, boxes, people, SAM's instances (4M).

Numbers become words such as `v0=12`: the digit after `v` is a role, the number a bin. `to_text` and `from_text` are
inverses up to binning: a number comes back as the centre of its bin. `from_text` also reads what a model wrote, so it
skips malformed pieces and never raises on a string.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

NUMBER = re.compile(r"v(\d)=(\d{1,9})\b")
BOX = r"v0=(\d{1,9})\s+v1=(\d{1,9})\s+v2=(\d{1,9})\s+v3=(\d{1,9})\b"
WORD = r"\s+v\d=\d{1,9}\b"
NAME = r"((?:(?!v\d=).)+)"  # up to the next number
EMPTY = "none"
SAM_SIZE = (224, 224)  # height and width, in pixels, of what points and boxes of SAM's instances refer to


@dataclass(frozen=True)
class CodecConfig:
    """How one structured modality is written as text.

    Args:
        codec: A name in `CODECS`.
        bins: Bins per number; default: 4M's. A palette is exact with 256.
        fields: Smallest and largest value of each number, by name; the order gives the type ids (metadata).
        inner: Tokenizer of the ids that stand within values (people's poses, SAM's masks): a folder below the
            tokenizers' root or a Hugging Face hub id; default: none, and ids stay ids.
    """

    codec: str
    bins: int = 0
    fields: dict[str, tuple[float, float]] = field(default_factory=dict)
    inner: str = ""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec is {self.codec!r}, allowed are {', '.join(CODECS)}")
        object.__setattr__(self, "bins", self.bins or CODECS[self.codec].default_bins)
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


def rounded(value: float, steps: float, start: float, bins: int) -> int:
    """`value * steps + start` rounded to a whole number, the outer ones for numbers outside [0, bins)."""
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return min(max(round(value * steps + start), 0), bins - 1)


class CaptionCodec:
    """A caption is its own text. Other codecs write their values in other ways."""

    default_bins = 256

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
        for kind, index in re.findall(r"v1=(\d{1,9})\s+v0=(\d{1,9})\b", text):
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
        x, y = (to_bin(place[axis], 0, 1, self.bins) for axis in "xy")
        return f"v0={x} v1={y} {_name(place['name'])}"

    def from_text(self, text: str) -> list[dict[str, Any]]:
        """Every place with two coordinates and a name."""
        places = []
        for x, y, name in re.findall(rf"v0=(\d{{1,9}})\s+v1=(\d{{1,9}})\s+{NAME}", text, re.DOTALL):
            if max(int(x), int(y)) < self.bins and _tidy(name):
                centre = {"x": from_bin(int(x), 0, 1, self.bins), "y": from_bin(int(y), 0, 1, self.bins)}
                places.append({"name": _tidy(name), **centre})
        return places


class BoxesCodec(CaptionCodec):
    """Boxes around things: `v0=<xmin> v1=<ymin> v2=<xmax> v3=<ymax> <class>` each."""

    default_bins = 1000

    def to_text(self, value: Any) -> str:
        """Text of a list of {"boxes": (xmin, ymin, xmax, ymax), 0 to 1, "class_name"}, in its order."""
        return " ".join(
            f"{_box(thing['boxes'], self.bins - 1, self.bins)} {_name(thing['class_name'])}" for thing in value
        )

    def from_text(self, text: str) -> list[dict[str, Any]]:
        """Every box with four edges and a class."""
        return [
            {"boxes": [int(edge) / (self.bins - 1) for edge in edges], "class_name": _tidy(name)}
            for *edges, name in re.findall(rf"{BOX}\s+{NAME}", text, re.DOTALL)
            if max(map(int, edges)) < self.bins and _tidy(name)
        ]


# Groups of numbers of a person: how many; of how many ranges of length 1 the bins are; which share of them is below 0.
PERSON = {"global": (9, 2, 1 / 2), "camera": (3, 20, 1 / 20), "shape": (10, 6, 1 / 2)}


class PosesCodec(CaptionCodec):
    """People: `human <box> pose <8 ids> global <9 numbers> camera <3> shape <10>` each (39 words), or `none`.

    A person's `order` tells in which order its four groups come.
    """

    default_bins = 1000

    def to_text(self, value: Any) -> str:
        """Text of a list of people.

        Each has `box` (xmin, ymin, xmax, ymax from 0 to 1), `pose` (8 ids), `global` (3 x 3, from -1 to 1), `camera`
        (3, -1 to 19), `shape` (10, -3 to 3), and may have `order`. Numbers outside these ranges are clipped.
        """
        return " ".join(self._person(person) for person in value) or EMPTY

    def _person(self, person: Mapping[str, Any]) -> str:
        if person.get("pose") is None:
            raise ValueError("a person has no pose ids; a body that was flipped needs new ones from the pose tokenizer")
        groups = {"pose": _codes(person["pose"], 8)}
        for name, (count, ranges, below) in PERSON.items():
            values, top = np.ravel(person[name]).tolist(), self.bins - 1
            if len(values) != count:
                raise ValueError(f"expected {count} numbers for {name!r} of a person, got {len(values)}")
            groups[name] = " ".join(f"v0={rounded(x, top / ranges, top * below, self.bins)}" for x in values)
        ordered = " ".join(f"{name} {groups[name]}" for name in person.get("order", groups))
        return f"human {_box(person['box'], self.bins - 1, self.bins)} {ordered}"

    def from_text(self, text: str) -> list[dict[str, Any]]:
        """Every person that is whole."""
        groups = rf"((?:\s+(?:pose|{'|'.join(PERSON)})(?:{WORD})+)+)"
        people = (self._read(edges, rest) for *edges, rest in re.findall(rf"\bhuman\s+{BOX}{groups}", text))
        return [person for person in people if person]

    def _read(self, edges: list[str], rest: str) -> dict[str, Any] | None:
        top, words = self.bins - 1, re.findall(rf"([a-z]+)((?:{WORD})+)", rest)
        groups = {name: NUMBER.findall(numbers) for name, numbers in words}
        person: dict[str, Any] = {"box": [int(edge) / top for edge in edges], "order": tuple(groups)}
        person["pose"] = _ids(groups.pop("pose", []))
        if len(words) != 4 or len(person["pose"]) != 8 or max(map(int, edges)) > top:
            return None
        for name, (count, ranges, below) in PERSON.items():
            found = [int(number) for role, number in groups.get(name, ()) if role == "0" and int(number) <= top]
            if not len(found) == len(groups.get(name, ())) == count:
                return None
            person[name] = [(number - top * below) / (top / ranges) for number in found]
        return person | {"global": [person["global"][row : row + 3] for row in (0, 3, 6)]}


class InstancesCodec(CaptionCodec):
    """SAM's instances: `point v0=<y> v1=<x>` and what is there, `polygon <box> <16 ids>` each, or `none`.

    Points and boxes are in pixels of a view of `SAM_SIZE`.
    """

    default_bins = 1000

    def to_text(self, value: Any) -> str:
        """Text of a list of {"point": (x, y), "instances": [{"box": (xmin, ymin, xmax, ymax), "tokens": 16 ids}]}."""
        return " ".join(self._place(place["point"], place["instances"]) for place in value)

    def _place(self, point: Sequence[float], things: Sequence[Mapping[str, Any]]) -> str:
        x, y = (rounded(place, 1, 0, self.bins) for place in point)
        found = (f"polygon {_box(one['box'], 1, self.bins)} {_codes(one['tokens'], 16)}" for one in things)
        return f"point v0={y} v1={x} {' '.join(found) or EMPTY}"

    def from_text(self, text: str) -> list[dict[str, Any]]:
        """Every point, with the instances that have a box of some area and 16 ids."""
        places = []
        for piece in re.split(r"\bpoint\b", text)[1:]:
            point = re.match(r"\s+v0=(\d{1,9})\s+v1=(\d{1,9})\b", piece)
            if point and max(map(int, point.groups())) < self.bins:
                instances = [self._read(polygon) for polygon in re.split(r"\bpolygon\b", piece)[1:]]
                y, x = map(int, point.groups())
                places.append({"point": (x, y), "instances": [one for one in instances if one]})
        return places

    def _read(self, polygon: str) -> dict[str, Any] | None:
        match = re.fullmatch(rf"\s*{BOX}((?:{WORD}){{16}})\s*", polygon)
        if not match:
            return None
        xmin, ymin, xmax, ymax = box = [int(edge) for edge in match.groups()[:4]]
        tokens = _ids(NUMBER.findall(match[5]))
        whole = tokens and xmin < xmax < self.bins and ymin < ymax < self.bins
        return {"box": box, "tokens": tokens} if whole else None


def _whole(step: int) -> tuple[list[float], list[float]]:
    """Lower edges and values of 1000 bins of whole numbers."""
    return list(range(0, 1000 * step, step)), list(range(0, 1000 * step, step))


def _even(low: float, high: float) -> tuple[list[float], list[float]]:
    """Lower edges and middles of 49 bins, and one for `high` and above."""
    edges = np.linspace(low, high, 50).tolist()
    return edges, [(a + b) / 2 for a, b in pairwise(edges)] + [high]


def _between(*edges: float) -> tuple[list[float], list[float]]:
    """Lower edges and middles of bins of different widths."""
    return list(edges[:-1]), [(a + b) / 2 for a, b in pairwise(edges)]


# Name, lower edges and values of the bins of each type, in the order of their ids.
METADATA_21 = {
    "original_width": _whole(32),
    "original_height": _whole(32),
    "caption_n_chars": _whole(1),
    "caption_n_words": _whole(1),
    "caption_n_sentences": _whole(1),
    "n_humans": _whole(1),
    "n_sam_instances": _whole(1),
    "n_coco_instances": _whole(1),
    "coco_instance_diversity": _whole(1),
    "colorfulness": _even(0, 150),
    "brightness": _even(0, 255),
    "contrast": _even(0, 127),
    "saturation": _even(0, 255),
    "entropy": _even(0, 10),
    "walkability": _even(0, 1),
    "objectness": _even(0, 1),
    "semantic_diversity": _whole(1),
    "geometric_complexity": _even(0, 0.75),
    "occlusion_score": _even(0, 0.25),
    "watermark_score": _between(0, 0.5, 1),
    "aesthetic_score": _between(0, 4.5, 5.5, 10),
}


class Metadata21Codec(MetadataCodec):
    """The 21 types of 4M-21: `v1=<type> v0=<bin>` each."""

    default_bins = 1000

    def to_text(self, value: Any) -> str:
        """Text of a mapping from name to number, in its order; names that are not in the table are left out."""
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping from name to number, got {type(value).__name__}")
        kinds = {name: kind for kind, name in enumerate(METADATA_21)}
        return " ".join(f"v1={kinds[name]} v0={self._bin(name, value[name])}" for name in value if name in kinds)

    def _bin(self, name: str, number: float) -> int:
        if not math.isfinite(number):
            raise ValueError(f"expected a finite number for {name!r}, got {number}")
        return max(bisect(METADATA_21[name][0], number) - 1, 0)

    def from_text(self, text: str) -> dict[str, float]:
        """Name to the middle of its bin, or to its whole number; the first value of a type counts."""
        found: dict[str, float] = {}
        rows = list(METADATA_21.items())
        for kind, index in re.findall(r"v1=(\d{1,9})\s+v0=(\d{1,9})\b(?!\s+v0=)", text):
            name, (_, values) = rows[min(int(kind), len(rows) - 1)]
            if int(kind) < len(rows) and int(index) < len(values):
                found.setdefault(name, values[int(index)])
        return found


def _box(box: Sequence[float], steps: float, bins: int) -> str:
    """Words of xmin, ymin, xmax, ymax."""
    xmin, ymin, xmax, ymax = (rounded(float(edge), steps, 0, bins) for edge in box)
    return f"v0={xmin} v1={ymin} v2={xmax} v3={ymax}"


def _codes(ids: Sequence[int], count: int) -> str:
    """Words of ids below 1024; the upper half has a role of its own."""
    if len(ids) != count or not all(0 <= index < 1024 for index in ids):
        raise ValueError(f"expected {count} ids in [0, 1024), got {list(ids)}")
    return " ".join(f"v{index // 512}={index % 512}" for index in ids)


def _ids(words: Sequence[tuple[str, str]]) -> list[int]:
    """Inverse of `_codes` for the roles and numbers of words; nothing if one of them is none."""
    numbers = [(int(role), int(number)) for role, number in words]
    return [512 * role + number for role, number in numbers] if all(r < 2 and n < 512 for r, n in numbers) else []


def _name(name: str) -> str:
    """A name in one line; ValueError for one that is empty or would read as a number."""
    tidy = _tidy(name)
    if not tidy or NUMBER.search(tidy):
        raise ValueError(f"expected a name, without words such as 'v0=1', got {name!r}")
    return tidy


def _tidy(name: str) -> str:
    """One space between words, none around them."""
    return " ".join(name.split())


CODECS: dict[str, type[CaptionCodec]] = {
    "caption": CaptionCodec,
    "metadata": MetadataCodec,
    "metadata_21": Metadata21Codec,
    "palette": PaletteCodec,
    "places": PlacesCodec,
    "boxes": BoxesCodec,
    "human_poses": PosesCodec,
    "sam_instances": InstancesCodec,
}

# How the text modalities of 4M are written, by name; its one WordPiece file does not say.
CODECS_OF_4M: dict[str, CodecConfig] = {
    "caption": CodecConfig("caption"),
    "det": CodecConfig("boxes"),
    "metadata": CodecConfig("metadata_21"),
    "color_palette": CodecConfig("palette"),
    "human_poses": CodecConfig("human_poses", inner="EPFL-VILAB/4M_tokenizers_human-poses_1k_8"),
    "sam_instance": CodecConfig("sam_instances", inner="EPFL-VILAB/4M_tokenizers_sam-instance_1k_64"),
}
