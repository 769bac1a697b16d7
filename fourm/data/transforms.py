"""Raw samples to aligned raw samples: one crop and one flip for everything that lies in an image (4M, section 2.1).

A sample has a table of crop settings; a `View` is one of its rows, and every modality of the sample is transformed with
the same view. What comes out is raw again (uint8 pixels, uint16 depth, people, boxes), as tokenizers bring their own
preprocessing. Arrays that were made once per crop (token ids, aligned captions, SAM instances) give their row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from fourm.runtime import derive_seed

RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic")}
Transform = Callable[[Any, "View"], Any]

# Crops ---------------------------------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """A row of crop settings, in pixels of the original image. What lies outside of that is black."""

    top: int
    left: int
    height: int
    width: int
    hflip: bool = False


def centre_crop(height: int, width: int) -> Crop:
    """The largest square, in the middle."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


def padded_square(height: int, width: int) -> Crop:
    """The smallest square around the image, which stands in its top left corner."""
    side = max(height, width)
    return Crop(0, 0, side, side)


def random_crop(
    height: int,
    width: int,
    generator: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333),
) -> Crop:
    """A crop of random area and aspect ratio, as torchvision's `RandomResizedCrop` draws it.

    Args:
        height: Of the image.
        width: Of the image.
        generator: Draws area, aspect ratio, top, left, in this order.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width over height.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w)
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def jittered_square(
    height: int, width: int, generator: np.random.Generator, scale: tuple[float, float] = (0.1, 2.0)
) -> Crop:
    """A square that shows the image's longer side at a random scale, at a random place, padded below and at the right.

    Args:
        height: Of the image.
        width: Of the image.
        generator: Draws scale, top, left, in this order.
        scale: Smallest and largest scale.
    """
    side = round(max(height, width) / generator.uniform(*scale))
    top, left = (round(max(0, length - side) * generator.random()) for length in (height, width))
    return Crop(top, left, side, side)


def crop_settings(
    height: int,
    width: int,
    crops: int,
    seed: int,
    key: str,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333),
    hflip: float = 0.5,
) -> np.ndarray:
    """The crops of one sample: the centre square, then random ones.

    Args:
        height: Of the image.
        width: Of the image.
        crops: How many; more of them begin with the same ones.
        seed: Decides the crops, together with the key.
        key: Name of the sample.
        scale: As in `random_crop`.
        ratio: As in `random_crop`.
        hflip: Share of the random crops that are flipped.

    Returns:
        (crops, 5) int64: top, left, height, width, hflip.
    """
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "crops", key)))
    rows = [centre_crop(height, width)]
    for _ in range(crops - 1):
        rows.append(random_crop(height, width, generator, scale, ratio)._replace(hflip=generator.random() < hflip))
    return np.array(rows, dtype=np.int64)


@dataclass(frozen=True)
class View:
    """What a sample shows of its image, and the seed of its random choices.

    Args:
        crop: Which part.
        height: Of the original image.
        width: Of the original image.
        index: Row of the crop settings, for values that were made per crop.
        seed: Decides query points, palette sizes and the like, for each modality on its own.
    """

    crop: Crop
    height: int
    width: int
    index: int = 0
    seed: int = 0

    @classmethod
    def of(cls, settings: np.ndarray, index: int, height: int, width: int, seed: int = 0, key: str = "") -> View:
        """The view of one row of crop settings; ValueError where there is no such row."""
        if settings.ndim != 2 or settings.shape[1] != 5 or not 0 <= index < len(settings):
            raise ValueError(f"crop {index} was asked of crop settings {settings.shape}, expected (more crops, 5)")
        top, left, high, wide, hflip = settings[index].tolist()
        return cls(Crop(top, left, high, wide, bool(hflip)), height, width, index, derive_seed(seed, key, index))

    @property
    def whole(self) -> bool:
        """Whether it shows all of the image."""
        return self.crop == (0, 0, self.height, self.width, False)

    def generator(self, name: str) -> np.random.Generator:
        """Random numbers of one modality."""
        return np.random.Generator(np.random.Philox(derive_seed(self.seed, name)))


def transform_sample(sample: Mapping[str, Any], transforms: Mapping[str, Transform], view: View) -> dict[str, Any]:
    """The sample's modalities as they are in the view; `__key__` and modalities without transform stay as they are.

    Raises:
        ValueError: A value its transform refuses; names modality and sample.
    """
    transformed = dict(sample)
    for name, transform in transforms.items():
        if name not in sample:
            raise ValueError(f"sample {sample.get('__key__', '?')!r} has no {name!r}, only {', '.join(sample)}")
        try:
            transformed[name] = transform(sample[name], view)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{name}, sample {sample.get('__key__', '?')!r}: {error}") from error
    return transformed


# Types that Pillow cannot resize, and others for them.
RESIZABLE: dict[str, type] = {"bool": np.uint8, "int64": np.int32, "uint32": np.int32, "float16": np.float32}

# Images --------------------------------------------------------------------------------------------------------------


def crop_image(image: np.ndarray, view: View, size: tuple[int, int], resample: str) -> np.ndarray:
    """The view of an image (H, W) or (H, W, 3) of any type Pillow has, resized to `size` (height, width).

    Raises:
        ValueError: The image is not of the size the view expects, or of a type Pillow does not have.
    """
    if image.shape[:2] != (view.height, view.width):
        raise ValueError(f"expected an image of {view.height}x{view.width} pixels, got {image.dtype} {image.shape}")
    top, left, height, width, hflip = view.crop
    try:
        cut = Image.fromarray(image.astype(RESIZABLE.get(str(image.dtype), image.dtype), copy=False)).crop(
            (left, top, left + width, top + height)
        )
    except TypeError as error:
        raise ValueError(f"cannot resize an image of {image.dtype} {image.shape}: {error}") from error
    pixels = np.array(cut.resize((size[1], size[0]), RESAMPLING[resample]))
    return np.ascontiguousarray(pixels[:, ::-1]) if hflip else pixels


@dataclass(frozen=True)
class Picture:
    """RGB pictures, uint8 (H, W, 3); grey ones (H, W) become three equal channels.

    Args:
        size: Height and width of the result.
        resample: A name in `RESAMPLING`.
    """

    size: tuple[int, int] = (224, 224)
    resample: str = "bicubic"

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The view of a picture."""
        return crop_image(
            np.repeat(raw[..., None], 3, axis=2) if raw.ndim == 2 else raw, view, self.size, self.resample
        )


@dataclass(frozen=True)
class Map(Picture):
    """Maps of one channel (H, W): depth in uint16 or float32, edges in uint8."""

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The view of a map."""
        return crop_image(raw, view, self.size, self.resample)


@dataclass(frozen=True)
class Normals(Picture):
    """Surface normals coded as uint8 (H, W, 3); a flip turns their x around."""

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The view of normals."""
        pixels = crop_image(raw, view, self.size, self.resample)
        if view.crop.hflip:
            pixels[..., 0] = 255 - pixels[..., 0]
        return pixels


@dataclass(frozen=True)
class Classes(Picture):
    """Class ids (H, W) of an integer type.

    Args:
        mapping: Ids to replace by others, before anything else.
    """

    resample: str = "nearest"
    mapping: dict[int, int] = field(default_factory=dict)

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The view of class ids."""
        ids = raw.copy()
        for old, new in self.mapping.items():
            ids[raw == old] = new
        return crop_image(ids, view, self.size, self.resample)


@dataclass(frozen=True)
class Mask(Picture):
    """Masks of valid pixels (H, W), bool or 0 and 1 or 0 and 255: the greater one is valid.

    Args:
        pool: Side of the blocks that are valid only as a whole.
    """

    resample: str = "nearest"
    pool: int = 1

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The view of a mask, bool (H, W)."""
        valid = crop_image(raw, view, self.size, self.resample) == (255 if raw.max(initial=0) > 1 else 1)
        height, width = self.size
        blocks = valid.reshape(height // self.pool, self.pool, width // self.pool, self.pool).all((1, 3))
        return blocks.repeat(self.pool, axis=0).repeat(self.pool, axis=1)


@dataclass(frozen=True)
class Features:
    """Feature maps of the whole image, float (h, w, D) for any h and w; the view's are interpolated.

    Vectors (D,) stay, and of those that were made per crop, (crops, D) or (crops, h, w, D), the view's is taken.

    Args:
        size: Height and width of the result in cells.
    """

    size: tuple[int, int] = (14, 14)

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The view of a feature map."""
        if raw.ndim != 3:
            return raw if raw.ndim == 1 else of_crop(raw, view)
        top, left, height, width, hflip = view.crop
        rows, columns = ((np.arange(cells) + 0.5) / cells for cells in self.size)
        columns = columns[::-1] if hflip else columns
        x, y = np.meshgrid((left + columns * width) / view.width, (top + rows * height) / view.height)
        grid = torch.from_numpy(2 * np.stack([x, y], axis=-1)[None] - 1).float()
        maps = torch.from_numpy(np.asarray(raw, dtype=np.float32)).permute(2, 0, 1)[None]
        return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[0].permute(1, 2, 0).numpy()


# Boxes and people ----------------------------------------------------------------------------------------------------


def crop_boxes(boxes: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) as xmin, ymin, xmax, ymax, 0 to 1 in the image, to 0 to 1 in the view.

    Returns:
        Boxes (n, 4), cut off at the border, and the share of each one's area that is left (n,).
    """
    top, left, height, width, hflip = view.crop
    pixels = boxes * [view.width, view.height, view.width, view.height]
    whole = (pixels - [left, top, left, top]) / [width, height, width, height]
    seen = whole.clip(0, 1)
    areas, left_over = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (whole, seen))
    share = np.divide(left_over, areas, out=np.zeros(len(boxes)), where=areas > 0)
    if hflip:
        seen[:, [0, 2]] = 1 - seen[:, [2, 0]]
    return seen, share


@dataclass(frozen=True)
class Boxes:
    """Detections: `{"instances": [{"boxes": [xmin, ymin, xmax, ymax], "class_name": ..., "score": ...}, ...]}`.

    A list of boxes stays as it is in a view of the whole image.

    Args:
        threshold: Smallest score.
        max_count: How many to keep, those of the highest scores; default: all.
        order: By distance of the top left corner to that of the view, largest area, highest score, or random.
        min_visibility: Smallest share of a box's area that is within the view; what is fully outside always goes.
    """

    threshold: float = 0.6
    max_count: int | None = None
    order: Literal["distance", "area", "score", "random"] = "distance"
    min_visibility: float = 0.0

    def __call__(self, raw: Any, view: View) -> list[dict[str, Any]]:
        """The boxes in the view, 0 to 1 within it."""
        if isinstance(raw, list) and view.whole:
            return raw
        things = raw if isinstance(raw, list) else raw["instances"]
        found = [{"score": 1.0} | one for one in things if one.get("score", 1.0) >= self.threshold]
        boxes, share = crop_boxes(np.array([one["boxes"] for one in found], dtype=float).reshape(-1, 4), view)
        score = np.array([one["score"] for one in found], dtype=float)
        kept = np.flatnonzero((share > 0) & (share >= self.min_visibility))
        if self.max_count is not None and len(kept) > self.max_count:
            kept = kept[np.argsort(-score[kept], kind="stable")[: self.max_count]]
        xmin, ymin, xmax, ymax = boxes[kept].T
        ranks = {
            "distance": xmin**2 + ymin**2,
            "area": -(xmax - xmin) * (ymax - ymin),
            "score": -score[kept],
            "random": view.generator("boxes").random(len(kept)),
        }
        chosen = kept[np.argsort(ranks[self.order], kind="stable")]
        return [found[i] | {"boxes": boxes[i].tolist()} for i in chosen]


MIRROR = np.array([[1, -1, -1], [-1, 1, 1], [-1, 1, 1]])  # a rotation seen in a mirror that turns x around
# Which of SMPL's 23 body joints is the mirror image of each: hips, knees, ankles, feet, collars and arms come in pairs.
MIRRORED_JOINTS = [1, 0, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11, 13, 12, 14, 16, 15, 18, 17, 20, 19, 22, 21]
GROUPS = ("pose", "global", "camera", "shape")


def mirror_body(poses: np.ndarray) -> np.ndarray:
    """SMPL body poses (n, 23, 3, 3) in a mirror: left joints take the mirrored rotations of right ones."""
    return poses[:, MIRRORED_JOINTS] * MIRROR


@dataclass(frozen=True)
class Poses:
    """People as HMR 2.0 gives them (`bbox_xyxy`, `pred_smpl_params`, `pred_cam`, `pose_tokenized`); empty for nobody.

    A flip mirrors box, orientation, body and camera. The pose tokens of a mirrored body are others, so they have to be
    made again: by `encode`, or left out.

    Args:
        encode: Body poses (n, 207) float32 to their ids (n, 8).
    """

    encode: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, raw: Any, view: View) -> list[dict[str, Any]]:
        """People in the view; a list of people stays as it is in a view of the whole image.

        Returns:
            For each: `box` (4,) 0 to 1 within the view, `global` (3, 3), `body_pose` (23, 3, 3), `shape` (10,),
            `camera` (3,), `pose` (8,) ids or None, and `order`, the random order of the four groups in its text.
        """
        if not raw or (isinstance(raw, list) and view.whole):
            return raw or []
        pixels = np.array(raw["bbox_xyxy"], dtype=float).reshape(-1, 4)
        boxes, share = crop_boxes(pixels / [view.width, view.height, view.width, view.height], view)
        seen, people, smpl = share > 0, len(boxes), raw["pred_smpl_params"]
        rotation = np.array(smpl["global_orient"], dtype=float).reshape(people, 3, 3)[seen]
        body = np.array(smpl["body_pose"], dtype=float).reshape(people, 23, 3, 3)[seen]
        shape = np.array(smpl["betas"], dtype=float).reshape(people, 10)[seen]
        camera = np.array(raw["pred_cam"], dtype=float).reshape(people, 3)[seen]
        tokens = np.array(raw["pose_tokenized"]).reshape(people, 8)[seen] if "pose_tokenized" in raw else None
        if view.crop.hflip:
            rotation, body, camera, tokens = rotation * MIRROR, mirror_body(body), camera * [1, -1, 1], None
        if tokens is None and self.encode and len(body):
            tokens = self.encode(body.reshape(-1, 207).astype(np.float32))
        generator = view.generator("human_poses")
        return [
            {"box": boxes[seen][i], "global": rotation[i], "body_pose": body[i], "shape": shape[i], "camera": camera[i],
             "pose": None if tokens is None else tokens[i], "order": tuple(generator.permutation(GROUPS).tolist())}
            for i in range(len(body))
        ]  # fmt: skip


@dataclass(frozen=True)
class BodyPose:
    """What the pose tokenizer learns from: the body of the first person."""

    def __call__(self, raw: Mapping[str, Any], view: View) -> np.ndarray:
        """(207,) float32; zeros for nobody."""
        if not raw:
            return np.zeros(207, dtype=np.float32)
        body = np.array(raw["pred_smpl_params"]["body_pose"][:1], dtype=np.float32).reshape(1, 23, 3, 3)
        return (mirror_body(body) if view.crop.hflip else body).astype(np.float32).reshape(-1)


# Polygons ------------------------------------------------------------------------------------------------------------


def inside(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which of the points (p, 2) lie in a polygon (k, 2) or on its edge; integers, so it is exact. (p,) bool."""
    a, b = polygon[:, None].astype(np.int64), np.roll(polygon, -1, axis=0)[:, None].astype(np.int64)
    to_b, to_point = b - a, points[None].astype(np.int64) - a  # (k, 1, 2), (k, p, 2)
    cross = to_b[..., 0] * to_point[..., 1] - to_b[..., 1] * to_point[..., 0]
    along = (to_b * to_point).sum(-1)
    on_edge = (cross == 0) & (along >= 0) & (along <= (to_b**2).sum(-1))
    passes = ((a[..., 1] > points[:, 1]) != (b[..., 1] > points[:, 1])) & ((cross > 0) == (to_b[..., 1] > 0))
    return on_edge.any(0) | (passes.sum(0) % 2 == 1)


def crop_polygon(polygon: np.ndarray, crop: Crop) -> np.ndarray | None:
    """What is left of a polygon (k, 2) of integers x, y, in pixels of the crop.

    As in 4M: corners are added where edges meet the border (rounded down), the others are drawn to it, and those that
    then lie outside the polygon go.

    Returns:
        (k, 2) int64, or None where no corner is inside the crop, off its border.
    """
    low, high = np.array([crop.left, crop.top]), np.array([crop.left + crop.width, crop.top + crop.height])
    corners = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
    sides = np.roll(corners, -1, axis=0) - corners
    after = np.roll(polygon, -1, axis=0)
    matrix = np.empty((len(polygon), 4, 2, 2))
    matrix[..., 0], matrix[..., 1] = sides, (polygon - after)[:, None]
    target = (polygon[:, None] - corners).astype(float)
    cuts = matrix[..., 0, 0] * matrix[..., 1, 1] != matrix[..., 0, 1] * matrix[..., 1, 0]
    shares = np.full(target.shape, -1.0)  # along the side, along the edge
    shares[cuts] = np.linalg.solve(matrix[cuts], target[cuts][..., None])[..., 0]
    meets = ((shares >= 0) & (shares <= 1)).all(-1)
    along = np.where(meets, shares[..., 1], 0)[..., None]
    crossings = (along * after[:, None] + (1 - along) * polygon[:, None]).astype(np.int64)
    there = np.pad(meets, ((0, 0), (1, 0)), constant_values=True)
    extended = np.concatenate([polygon[:, None], crossings], axis=1)[there]
    if not ((extended > low) & (extended < high)).all(1).any():
        return None
    clipped = extended.clip(low, high)
    return clipped[inside(extended, clipped)] - low


def _corners(points: Any) -> np.ndarray:
    """A contour, (k, 2) or (k, 1, 2) of x and y, as (k, 2) int64."""
    return np.asarray(points, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class InstanceMasks:
    """SAM's instances (`[{"points": contour}, ...]`, pixels of the whole image) as one mask each, in its own box.

    Args:
        size: Height and width that the view is resized to.
        mask_size: Side of a mask.
        max_count: How many instances to keep, at random; default: all.
        min_area: Smallest area of a box, as a share of the view.
    """

    size: tuple[int, int] = (224, 224)
    mask_size: int = 64
    max_count: int | None = 20
    min_area: float = 0.0005

    def polygons(self, contours: Sequence[Any], view: View) -> list[np.ndarray]:
        """Contours in pixels of the result, each (k, 2); those that are outside or tiny are left out."""
        scale = np.array([self.size[1] / view.crop.width, self.size[0] / view.crop.height])
        found = []
        for contour in contours:
            cropped = crop_polygon(_corners(contour), view.crop)
            if cropped is None:
                continue
            polygon = np.round(scale * cropped).astype(np.int64)
            extent = np.ptp(polygon, axis=0)
            if extent.all() and extent.prod() / (self.size[0] * self.size[1]) >= self.min_area:
                found.append(np.array([self.size[1], 0]) + polygon * [-1, 1] if view.crop.hflip else polygon)
        return found

    def __call__(self, raw: Sequence[Mapping[str, Any]], view: View) -> dict[str, Any]:
        """The instances in the view.

        Returns:
            `masks` (n, mask_size, mask_size) bool, `boxes` (n, 4) int64 as xmin, ymin, xmax, ymax, and `polygons`.
        """
        kept = np.arange(len(raw))
        if self.max_count is not None and len(raw) > self.max_count:
            kept = np.sort(view.generator("sam_masks").choice(len(raw), self.max_count, replace=False))
        polygons = self.polygons([raw[i]["points"] for i in kept.tolist()], view)
        masks = np.zeros((len(polygons), self.mask_size, self.mask_size), dtype=bool)
        boxes = np.zeros((len(polygons), 4), dtype=np.int64)
        for i, polygon in enumerate(polygons):
            low, high = polygon.min(0), polygon.max(0)
            canvas = Image.new("1", (self.mask_size, self.mask_size))
            within = ((polygon - low) / (high - low) * self.mask_size).astype(int)
            ImageDraw.Draw(canvas).polygon(list(map(tuple, within.tolist())), fill=1, outline=1)
            masks[i], boxes[i] = np.array(canvas), (*low, *high)
        return {"masks": masks, "boxes": boxes, "polygons": polygons}


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture that instances make, small ones over large ones (inverse of `InstanceMasks`).

    As in 4M, masks with a contrast below 0.9 are left out (so are those that fill their box), and those that are almost
    the same (Dice above 0.8) in almost the same box (IoU above 0.9) count as one.

    Args:
        masks: (n, h, w), 0 to 1.
        boxes: (n, 4) as xmin, ymin, xmax, ymax, in pixels.
        size: Height and width of the picture.

    Returns:
        (H, W) int64: the number of the instance at each pixel, from 1 for the largest; 0 for none.
    """
    labels, groups = np.zeros(size, dtype=np.int64), list[list[int]]()
    masks, boxes = np.asarray(masks, dtype=np.float32), np.asarray(boxes)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in np.argsort(-areas, kind="stable").tolist():
        if np.ptp(masks[i]) < 0.9:
            continue
        first = [group[0] for group in groups]
        both = np.minimum(boxes[first, 2:], boxes[i, 2:]) - np.maximum(boxes[first, :2], boxes[i, :2])
        overlap = both.clip(0).prod(1)
        iou = overlap / (areas[first] + areas[i] - overlap)
        shared = (masks[first] * masks[i]).sum((1, 2)) + 0.01
        dice = 2 * shared / (masks[first].sum((1, 2)) + masks[i].sum() + 0.01)
        same = np.flatnonzero((dice > 0.8) & (iou > 0.9))
        groups[same[0]].append(i) if len(same) else groups.append([i])
    for number, group in enumerate(groups, start=1):
        xmin, ymin, xmax, ymax = boxes[group].mean(0).astype(int).tolist()
        mean = torch.from_numpy(masks[group].mean(0))[None, None]
        resized = F.interpolate(mean, (ymax - ymin, xmax - xmin), mode="bicubic")[0, 0].numpy()
        window = labels[ymin:ymax, xmin:xmax]
        window[resized[: window.shape[0], : window.shape[1]] > 0.5] = number
    return labels


# What was made once per crop -----------------------------------------------------------------------------------------


def of_crop(values: Sequence[Any] | np.ndarray, view: View) -> Any:
    """The value of the view's crop; a single one is that of all crops."""
    if len(values) > 1 and view.index >= len(values):
        raise ValueError(f"there are {len(values)} values, but crop {view.index} was asked")
    return values[view.index if len(values) > 1 else 0]


@dataclass(frozen=True)
class Tokens:
    """Ids, one row per crop."""

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """The row of the view's crop."""
        return of_crop(raw, view)


@dataclass(frozen=True)
class Caption:
    """A caption: a string, `{"caption": string}`, or a list of such.

    Args:
        choose: Of a list: that of the view's crop, the first, or a random one.
    """

    choose: Literal["crop", "first", "random"] = "crop"

    def __call__(self, raw: Any, view: View) -> str:
        """The caption."""
        if isinstance(raw, Sequence) and not isinstance(raw, str):
            if not raw:
                raise ValueError("the list of captions is empty")
            raw = of_crop(raw, view) if self.choose == "crop" else raw[_drawn(raw, view, self.choose)]
        caption = raw["caption"] if isinstance(raw, Mapping) else raw
        if not isinstance(caption, str):
            raise ValueError(f"expected a caption, got {type(caption).__name__}")
        return caption


def _drawn(captions: Sequence[Any] | np.ndarray, view: View, choose: str) -> int:
    """Number of the first caption or a random one, the same for a caption and its embedding."""
    return int(view.generator("caption").integers(len(captions))) if choose == "random" else 0


@dataclass(frozen=True)
class Vectors:
    """Embedded captions: `emb` (captions, L, D), of which those marked in `mask_valid` (captions, L) count.

    Or (captions, L, D) alone, filled up with rows of NaN. Plain vectors (L, D) stay.

    Args:
        choose: Of several captions, as in `Caption`.
    """

    choose: Literal["crop", "first", "random"] = "crop"

    def __call__(self, raw: Any, view: View) -> np.ndarray:
        """(valid, D), those of the view's crop."""
        if isinstance(raw, Mapping):
            emb, valid = raw["emb"], raw["mask_valid"].astype(bool)
        elif raw.ndim == 3:
            emb, valid = raw, ~np.isnan(raw).all(-1)
        else:
            return raw
        if self.choose == "crop":
            return of_crop(emb, view)[of_crop(valid, view)]
        return emb[_drawn(emb, view, self.choose)][valid[_drawn(emb, view, self.choose)]]


@dataclass(frozen=True)
class Instances:
    """SAM's instances with their ids, asked for at some points.

    There is one `{"points": polygons, "bbox": boxes, "token_ids": ids}` per crop, in its pixels, or contours in
    the whole image (see `InstanceMasks`). Boxes are ymin, xmin, ymax, xmax.

    Args:
        points: Number of query points, or of those along a side of the grid.
        grid: Ask at a grid rather than at random points.
        size: Height and width of the crop in pixels.
        encode: Masks (n, mask_size, mask_size) bool to their ids (n, 16), for contours.
        mask_size: Side of a mask.
    """

    points: int = 7
    grid: bool = False
    size: tuple[int, int] = (224, 224)
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    mask_size: int = 64

    def query_points(self, generator: np.random.Generator) -> np.ndarray:
        """(points, 2) or, of a grid, (points * points, 2) integers x, y."""
        if not self.grid:
            return generator.integers((self.size[1], self.size[0]), size=(self.points, 2))
        rows, columns = (np.linspace(0, side, self.points + 2)[1:-1].astype(int) for side in self.size)
        return np.stack(np.meshgrid(columns, rows, indexing="ij"), axis=-1).reshape(-1, 2)

    def at(self, instances: Mapping[str, Any], points: np.ndarray) -> list[dict[str, Any]]:
        """What is at the points (n, 2): for each its `point` (x, y) and the `instances` around it.

        An instance has its `box` (xmin, ymin, xmax, ymax) and its `tokens`.
        """
        polygons = [_corners(polygon[0]) for polygon in instances["points"]]
        hits = np.array([inside(polygon, points) for polygon in polygons], dtype=bool).reshape(-1, len(points))
        boxes = np.array(instances["bbox"]).reshape(-1, 4).astype(int)[:, [1, 0, 3, 2]].tolist()
        tokens = np.array(instances["token_ids"], dtype=int).tolist()
        return [
            {"point": tuple(point), "instances": [{"box": boxes[i], "tokens": tokens[i]} for i in np.flatnonzero(hit)]}
            for point, hit in zip(points.tolist(), hits.T, strict=True)
        ]

    def of_view(self, raw: Sequence[Mapping[str, Any]], view: View) -> Mapping[str, Any]:
        """The instances of the view's crop; contours are cropped and get their ids."""
        if raw and "token_ids" in raw[0]:
            return of_crop(raw, view)
        if raw and self.encode is None:
            raise ValueError("SAM's contours have no ids; the codec has to name the tokenizer of masks as `inner`")
        found = InstanceMasks(self.size, self.mask_size, max_count=None)(raw, view)
        ids = self.encode(found["masks"]).tolist() if self.encode and found["polygons"] else []
        boxes = found["boxes"][:, [1, 0, 3, 2]].tolist()
        return {"points": [[polygon.tolist()] for polygon in found["polygons"]], "bbox": boxes, "token_ids": ids}

    def __call__(self, raw: Any, view: View) -> list[dict[str, Any]]:
        """As `at`, for the view's crop; points and the instances at each come in random order.

        A list of points with instances stays as it is in a view of the whole image.
        """
        if raw and "point" in raw[0] and view.whole:
            return raw
        generator = view.generator("sam_instances")
        found = self.at(self.of_view(raw, view), np.unique(self.query_points(generator), axis=0))
        for one in found:
            generator.shuffle(one["instances"])
        return [found[i] for i in generator.permutation(len(found))]


@dataclass(frozen=True)
class Palette:
    """Colour palettes by their size, `[{"1": [[r, g, b]], "2": ...}]`. A single palette stays."""

    def __call__(self, raw: Any, view: View) -> list[list[int]]:
        """A palette of random size."""
        if not raw or not isinstance(raw[0], Mapping):
            return raw
        return raw[0][view.generator("palette").choice(sorted(raw[0]))]


@dataclass(frozen=True)
class Metadata:
    """Numbers by name."""

    def __call__(self, raw: Mapping[str, float], view: View) -> dict[str, float]:
        """The same in random order: which ones are left where the text is cut is random too."""
        names = sorted(raw)
        return {names[i]: raw[names[i]] for i in view.generator("metadata").permutation(len(names))}


@dataclass(frozen=True)
class Places:
    """Named points, `[{"name": ..., "x": ..., "y": ...}]`, 0 to 1 in the image."""

    def __call__(self, raw: Sequence[Mapping[str, Any]], view: View) -> list[dict[str, Any]]:
        """The points in the view, 0 to 1 within it."""
        if view.whole:
            return list(map(dict, raw))
        top, left, height, width, hflip = view.crop
        x, y = (np.array([one[axis] for one in raw], dtype=float) for axis in "xy")
        x, y = (x * view.width - left) / width, (y * view.height - top) / height
        seen = np.flatnonzero((x >= 0) & (x < 1) & (y >= 0) & (y < 1)).tolist()
        return [dict(raw[i]) | {"x": float(1 - x[i] if hflip else x[i]), "y": float(y[i])} for i in seen]


@dataclass(frozen=True)
class Sound:
    """Waves (samples,), which have no place in the image."""

    def __call__(self, raw: np.ndarray, view: View) -> np.ndarray:
        """All of it."""
        return raw


# By input kind of the tokenizer, or by text codec; and those of values that are not tokens yet.
TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "image": Picture,
    "field": Map,
    "depth": Map,
    "normal": Normals,
    "classes": Classes,
    "mask": Mask,
    "features": Features,
    "spectrogram": Sound,
    "boxes": Boxes,
    "human_poses": Poses,
    "body_pose": BodyPose,
    "sam_instances": Instances,
    "sam_masks": InstanceMasks,
    "tokens": Tokens,
    "caption": Caption,
    "vectors": Vectors,
    "palette": Palette,
    "metadata_21": Metadata,
    "places": Places,
}
