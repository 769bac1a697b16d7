"""From ids back to what they stand for, and from that to words and pictures.

`PICTURES` has a drawing for every kind of image-like modality and for every codec of texts.
"""

from __future__ import annotations

import copy
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fourm.data.transforms import paste_masks
from fourm.tokenization.inputs import KINDS
from fourm.tokenization.structured import SAM_SIZE

# (256, 3): 20 colours that are easy to tell apart, then hues a golden angle apart, each round of three darker.
_HUES = matplotlib.colormaps["hsv"](np.arange(236) * 0.618 % 1) * np.resize([1, 0.7, 0.45], (236, 1))
COLOURS: np.ndarray = np.round(255 * np.concatenate([matplotlib.colormaps["tab20"](np.arange(20)), _HUES])[:, :3])

# Ids within the values of a codec, and what stands beside them once the `inner` tokenizer has decoded them.
INNER = {"human_poses": ("pose", "body_pose"), "sam_instances": ("tokens", "mask")}

# The 24 joints of SMPL: the parent of each, and where it is from there (metres; x to the body's left, y up, z forwards)
# on somebody of average build who stands with the arms out. The first is the pelvis; right ones follow left ones.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
LEFT = {1: (0.06, -0.09, -0.02), 4: (0.04, -0.38, 0), 7: (-0.02, -0.42, -0.04), 10: (0.04, -0.06, 0.12),
        13: (0.08, 0.11, -0.02), 16: (0.12, 0.05, -0.01), 18: (0.26, -0.01, -0.03), 20: (0.27, 0.01, -0.01),
        22: (0.09, -0.01, -0.01)}  # fmt: skip
RIGHT = {joint + 1: (-x, y, z) for joint, (x, y, z) in LEFT.items()}
MIDDLE = {3: (0, 0.12, -0.04), 6: (0, 0.14, 0.03), 9: (0, 0.06, 0), 12: (0, 0.21, -0.03), 15: (0, 0.09, 0.05)}
PELVIS = np.array([0, -0.24, 0.03])  # from SMPL's origin, which its camera is aimed at


# Values --------------------------------------------------------------------------------------------------------------


def decode(
    ids: Mapping[str, Tensor | Sequence[Tensor]], tokenizers: Mapping[str, Any], **sampling: Any
) -> dict[str, Any]:
    """Hands the ids of every modality to its tokenizer, and ids within values to the tokenizer that made them.

    Args:
        ids: Per modality what `Sampler.generate` returns: (B, n) ids, or a list of B texts.
        tokenizers: Per modality anything with `decode(ids)`.
        sampling: Arguments of diffusion decoders, such as `steps` and `generator`.

    Returns:
        Per modality B raw values in their own units; see also `unfold`.
    """
    values = {}
    for name, rows in ids.items():
        diffuses = getattr(getattr(tokenizers[name], "config", None), "denoiser", "")
        values[name] = unfold(tokenizers[name], tokenizers[name].decode(rows, **(sampling if diffuses else {})))
    return values


def unfold(tokenizer: Any, values: Any) -> Any:
    """Adds to B values what the ids within them stand for, where the tokenizer knows (`TextTokenizer.inner`).

    People get a `body_pose`, the nearest rotations (23, 3, 3) to what the pose tokenizer says; instances get a `mask`,
    the probabilities (64, 64) of their pixels within the box. Both are lists, so that they can be written as JSON.
    """
    if getattr(tokenizer, "inner", None) is None:
        return values
    values, people = copy.deepcopy(values), tokenizer.config.codec == "human_poses"
    things = [thing for value in values for place in value for thing in ([place] if people else place["instances"])]
    folded, plain = INNER[tokenizer.config.codec]
    things = [thing for thing in things if plain not in thing and thing[folded] is not None]
    if things:
        ids = torch.tensor(np.array([thing[folded] for thing in things]))
        if people:
            found = rotations(tokenizer.inner.decode(ids).reshape(-1, 23, 3, 3)).round(4)
        else:
            found = tokenizer.inner.decode_probabilities(ids)[:, 0].astype(float).round(3)
        for thing, each in zip(things, found.tolist(), strict=True):
            thing[plain] = each
    return values


def rotations(matrices: np.ndarray) -> np.ndarray:
    """The nearest rotations to matrices (..., 3, 3), float64."""
    left, _, right = np.linalg.svd(np.asarray(matrices, dtype=float))
    left[..., -1] *= np.sign(np.linalg.det(left @ right))[..., None]
    return left @ right


def words(value: Any) -> str:
    """A raw value of a text modality in words; nothing for what is better drawn."""
    if not value:
        return "none"
    if isinstance(value, Mapping):
        return "\n".join(f"{name.replace('_', ' ')} {number:.4g}" for name, number in value.items())
    if isinstance(value, str):
        return value
    places = (item for item in value if isinstance(item, Mapping) and "name" in item)
    return "\n".join(f"{item['name']} {item['x']:.2f} {item['y']:.2f}" for item in places)


# Pictures ------------------------------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """How one value is drawn; see `picture`."""

    tokenizer: Any
    size: int
    scale: Any
    background: Any

    def canvas(self) -> Image.Image:
        """The background, or an empty sheet."""
        return self.fit(np.full((1, 1), 245) if self.background is None else np.asarray(self.background))

    def fit(self, pixels: np.ndarray, way: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
        """(H, W) or (H, W, 1 or 3) in 0..255 as an RGB picture of the wanted height."""
        height, width = pixels.shape[:2]
        pixels = np.broadcast_to(pixels.reshape(height, width, -1), (height, width, 3)).astype(np.uint8)
        return Image.fromarray(pixels).resize((max(1, round(width * self.size / height)), self.size), way)


def picture(tokenizer: Any, raw: Any, size: int = 256, scale: Any = None, background: Any = None) -> Image.Image:
    """Draws one raw value.

    Args:
        tokenizer: Its modality's `ImageTokenizer` or `TextTokenizer`; None for what has none (pixels, vectors).
        raw: What `decode` returns for one row.
        size: Height of the picture in pixels; arrays keep their aspect ratio.
        scale: What the colours span, so that several values are coloured alike. Of a field or depth: the numbers drawn
            darkest and brightest; default: a field's smallest and largest, depth's quantiles of 2 and 98 %. Of
            features: what `principal_axes` says of several maps; default: of this one.
        background: Picture (H, W, 3) under boxes, people, instances and places.

    Returns:
        An RGB picture: images and normals as they are; fields and depth through a colour map; each class in its colour;
        three principal components of features as red, green and blue, a single vector as cells that are red above zero
        and blue below; captions and metadata in words; a palette as swatches; boxes with their classes; people as stick
        figures (an average body's joints: SMPL's mesh, whose licence keeps it out of here, and the person's shape are
        left out); instances in a colour each; places as points. Parts of a value are drawn as far as they go.
    """
    settings = getattr(getattr(tokenizer, "config", None), "input", None)
    if tokenizer is None:
        kind = "image" if np.asarray(raw).dtype == np.uint8 else "features"
    else:
        kind = tokenizer.config.codec if settings is None else settings.kind
    return PICTURES[kind](raw, Drawing(tokenizer, size, scale, background))


def common_scale(tokenizer: Any, values: Any) -> Any:
    """The `scale` with which `picture` colours values (B, ...) of a field, or maps of features, alike; else None."""
    kind = getattr(getattr(getattr(tokenizer, "config", None), "input", None), "kind", "")
    if kind == "field":
        return float(np.nanmin(values)), float(np.nanmax(values))
    return principal_axes(np.asarray(values)) if kind == "features" and np.ndim(values[0]) == 3 else None


def sheet(titles: Sequence[str], rows: Sequence[Sequence[Image.Image]], across: int = 9) -> Image.Image:
    """Pictures in rows under their titles; columns beyond `across` go on below."""
    width, height = (max(image.size[side] for row in rows for image in row) + 8 for side in (0, 1))
    lines = -(-len(titles) // across) * len(rows)
    page = Image.new("RGB", (min(across, len(titles)) * width, lines * (height + 20)), "white")
    for number, row in enumerate(rows):
        for column, (title, image) in enumerate(zip(titles, row, strict=True)):
            x, y = column % across * width, (column // across * len(rows) + number) * (height + 20)
            ImageDraw.Draw(page).text((x, y + 4), title, fill="black")
            page.paste(image, (x, y + 20))
    return page


def _image(raw: Any, how: Drawing) -> Image.Image:
    whole = how.size % len(raw) == 0
    return how.fit(np.asarray(raw), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _numbers(raw: Any, how: Drawing, colours: str, cut: float) -> Image.Image:
    """Numbers (H, W) through a colour map."""
    values = np.asarray(raw, dtype=np.float64)
    low, high = how.scale or np.quantile(values, [cut, 1 - cut])
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return how.fit(np.round(255 * matplotlib.colormaps[colours](share)[..., :3]))


def _classes(raw: Any, how: Drawing) -> Image.Image:
    """Class ids in colours, with the names of large areas where there is room."""
    settings, ids = how.tokenizer.config.input, np.asarray(raw).astype(np.int64)
    if settings.classes == 2:  # values such as 0 and 255 are a picture already; else the second is the darker
        return how.fit(ids if settings.values else COLOURS[1 - ids])
    order = np.argsort(settings.values) if settings.values else np.arange(settings.classes)
    ids = order[np.searchsorted(np.take(settings.values, order), ids)] if settings.values else ids
    drawn = how.fit(COLOURS[ids % len(COLOURS)])
    for number in np.flatnonzero(np.bincount(ids.ravel()) > ids.size / 20) if settings.names and how.size > 200 else ():
        y, x = np.median(np.argwhere(ids == number), axis=0) * how.size / len(ids)
        _label(drawn, (x, y), settings.names[number], how.size, "mm")
    return drawn


def principal_axes(vectors: np.ndarray) -> tuple[np.ndarray, ...]:
    """What turns vectors (..., C) into colours: their mean (C,), three principal axes (C, 3), and the 1 and 99 %
    quantiles (3,) along them."""
    flat = np.asarray(vectors, dtype=np.float64).reshape(-1, np.shape(vectors)[-1])
    mean, axes = flat.mean(0), np.zeros((flat.shape[1], 3))
    found = np.linalg.svd(flat - mean, full_matrices=False)[2][:3]
    largest = np.take_along_axis(found, np.abs(found).argmax(1)[:, None], 1)
    axes[:, : len(found)] = (found * np.where(largest < 0, -1, 1)).T  # the sign of an axis is arbitrary
    return mean, axes, *np.quantile((flat - mean) @ axes, [0.01, 0.99], axis=0)


def _features(raw: Any, how: Drawing) -> Image.Image:
    values = np.asarray(raw, dtype=np.float64)
    if values.ndim == 1:
        side, bound = int(np.ceil(len(values) ** 0.5)), np.quantile(np.abs(values), 0.99)
        cells = np.pad(values, (0, -len(values) % side)).reshape(-1, side)
        return _numbers(cells, how._replace(scale=(-bound, bound)), "coolwarm", 0)
    mean, axes, low, high = how.scale or principal_axes(values)
    share = ((values - mean) @ axes - low) / np.maximum(high - low, 1e-12)
    pixels = np.round(255 * share.clip(0, 1))
    return how.fit(pixels if values.ndim == 3 else pixels[None]).resize((how.size, how.size))  # a sequence as stripes


def _caption(raw: Any, how: Drawing) -> Image.Image:
    """Words in a square, smaller where they are many; what is too long even so is cut."""
    sheet = Image.new("RGB", (how.size, how.size), "white")
    draw = ImageDraw.Draw(sheet)
    for share in (16, 20, 26, 34):
        font, place = ImageFont.load_default(how.size / share), (how.size / 20, how.size / 20)
        text = "\n".join(piece for line in words(raw).split("\n") for piece in textwrap.wrap(line, int(1.65 * share)))
        if draw.multiline_textbbox(place, text, font)[3] < 0.97 * how.size:
            break
    draw.text(place, text, fill="black", font=font)
    return sheet


def _metadata(raw: Any, how: Drawing) -> Image.Image:
    """A table of names and numbers."""
    sheet, row = how._replace(background=None).canvas(), how.size / max(16, len(raw) + 1)
    for number, (name, value) in enumerate(raw.items(), start=1):
        for share, side, text in ((0.05, "ls", name.replace("_", " ")), (0.95, "rs", f"{value:,.5g}")):
            _label(sheet, (share * how.size, number * row), text, 16 * row, side, "black", 0)
    return _or_none(raw, sheet, how)


def _swatches(raw: Any, how: Drawing) -> Image.Image:
    """Colours from left to right."""
    columns = np.arange(how.size) * len(raw) // how.size
    return how.fit(np.tile(np.array(raw)[columns], (how.size, 1, 1))) if len(raw) else _caption("", how)


def _places(raw: Any, how: Drawing) -> Image.Image:
    sheet = how.canvas()
    for place in raw:
        x, y = place["x"] * sheet.width, place["y"] * sheet.height
        ImageDraw.Draw(sheet).circle((x, y), how.size / 60, fill="crimson", outline="white")
        _label(sheet, (x, y + how.size / 40), place["name"], how.size, "ma")
    return _or_none(raw, sheet, how)


def _boxes(raw: Any, how: Drawing) -> Image.Image:
    sheet = how.canvas()
    for thing in raw:
        colour = COLOURS[2 * zlib.crc32(thing["class_name"].encode()) % 20]  # the same for the same class
        _frame(sheet, thing["boxes"], thing["class_name"], colour, how.size)
    return _or_none(raw, sheet, how)


def joints(person: Mapping[str, Any]) -> np.ndarray:
    """Where the 24 joints of SMPL are in front of the camera, for a person with a `body_pose` (23, 3, 3).

    The skeleton is that of an average body, whatever the person's shape; a turned joint takes along those behind it.

    Returns:
        (24, 3) metres: x to the right, y down, z away, before the camera's shift.
    """
    turned, places, bones = [np.asarray(person["global"], dtype=float)], [PELVIS], LEFT | RIGHT | MIDDLE
    for joint, rotation in enumerate(np.asarray(person["body_pose"], dtype=float), start=1):
        parent = PARENTS[joint]
        places.append(places[parent] + turned[parent] @ bones[joint])
        turned.append(turned[parent] @ rotation)
    return np.array(places)


def project(person: Mapping[str, Any]) -> np.ndarray:
    """The joints (24, 2) of a person in the view, as x and y from 0 to 1.

    HMR 2.0's camera (scale, x, y) belongs to the square around the person's box; it is taken as weak-perspective.
    """
    low, high = np.reshape(person["box"], (2, 2))
    scale, *shift = person["camera"]
    return (low + high + scale * (joints(person)[:, :2] + shift) * max(high - low)) / 2


def _people(raw: Any, how: Drawing) -> Image.Image:
    """A box each and, where the body's pose is known, a stick figure: left limbs dark, right ones bright."""
    sheet = how.canvas()
    for number, person in enumerate(*unfold(how.tokenizer, [raw])):
        colour = COLOURS[2 * number % 20]
        _frame(sheet, person["box"], "", colour, how.size)
        if person.get("body_pose") is None:
            continue
        places = project(person).clip(-4, 5) * sheet.size
        for joint, parent in enumerate(PARENTS[1:], start=1):
            fill = _rgb(colour * (0.6 if joint in LEFT else 1.3 if joint in RIGHT else 1))
            ImageDraw.Draw(sheet).line([*places[parent], *places[joint]], fill, max(1, round(how.size / 80)))
        ImageDraw.Draw(sheet).circle(tuple(places[15]), how.size / 60, _rgb(colour))  # the head
    return _or_none(raw, sheet, how)


def _instances(raw: Any, how: Drawing) -> Image.Image:
    """Masks in a colour each over the background, boxes where there are no masks, and the points asked at."""
    sheet, (places,) = how.canvas(), unfold(how.tokenizer, [raw])
    things = [thing for place in places for thing in place["instances"]]
    if things and "mask" in things[0]:
        masks, boxes = (np.array([thing[key] for thing in things]) for key in ("mask", "box"))
        labels = paste_masks(masks, boxes, SAM_SIZE)
        colours, inside = (
            how.fit(part).resize(sheet.size) for part in (COLOURS[(labels - 1) % 256], 166 * (labels > 0))
        )
        sheet.paste(colours, mask=inside.convert("L"))
    else:
        for number, thing in enumerate(things):
            _frame(sheet, np.divide(thing["box"], [*SAM_SIZE[::-1]] * 2), "", COLOURS[2 * number % 20], how.size)
    for place in places:
        at = np.divide(place["point"], SAM_SIZE[::-1]) * sheet.size
        ImageDraw.Draw(sheet).circle(tuple(at), how.size / 100, fill="white", outline="black")
    return _or_none(raw, sheet, how)


def _rgb(colour: np.ndarray) -> Any:
    return tuple(colour.clip(0, 255).astype(int).tolist())


def _frame(sheet: Image.Image, box: Any, name: str, colour: np.ndarray, size: int) -> None:
    """A box with its name in the top left corner; edges from 0 to 1 in any order."""
    (left, top), (right, bottom) = np.sort(np.reshape(box, (2, 2)), axis=0) * sheet.size
    ImageDraw.Draw(sheet).rectangle((left, top, right, bottom), outline=_rgb(colour), width=max(1, size // 100))
    _label(sheet, (left + size / 80, top + size / 80), name, size)


def _label(sheet: Image.Image, place: tuple[float, float], text: str, size: float, anchor: str = "la",
           fill: str = "white", stroke: float = 1 / 160) -> None:  # fmt: skip
    font = ImageFont.load_default(size / 20)
    ImageDraw.Draw(sheet).text(place, text, fill, font, anchor, stroke_width=round(size * stroke), stroke_fill="black")


def _or_none(raw: Any, sheet: Image.Image, how: Drawing) -> Image.Image:
    """Says so where there is nothing."""
    if not raw:
        _label(sheet, (sheet.width / 2, sheet.height / 2), "none", how.size, "mm")
    return sheet


def _spectrogram(raw: Any, how: Drawing) -> Image.Image:
    """Time to the right, pitch upwards, loudness as brightness."""
    loudness = KINDS["spectrogram"].to_network(np.asarray(raw)[None], how.tokenizer.config.input)[0, 0]
    return how.fit(np.round(255 * matplotlib.colormaps["magma"]((loudness.flip(0).numpy() + 1) / 2)[..., :3]))


PICTURES: dict[str, Callable[[Any, Drawing], Image.Image]] = {
    "image": _image,
    "normal": _image,
    "mask": lambda raw, how: how.fit(255 * np.uint8(np.asarray(raw) > 0)),
    "field": partial(_numbers, colours="viridis", cut=0),
    "depth": partial(_numbers, colours="turbo", cut=0.02),
    "classes": _classes,
    "features": _features,
    "spectrogram": _spectrogram,
    "caption": _caption,
    "metadata": _metadata,
    "metadata_21": _metadata,
    "palette": _swatches,
    "places": _places,
    "boxes": _boxes,
    "human_poses": _people,
    "sam_instances": _instances,
}
