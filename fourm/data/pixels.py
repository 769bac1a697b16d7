"""What can be said of a picture without a network: edges, palettes, a few numbers, normals of a depth map."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def picture(value: np.ndarray) -> np.ndarray:
    """A raw picture as uint8 (H, W, 3); grey ones (H, W) become three equal channels. ValueError for anything else."""
    value = np.asarray(value)
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        raise ValueError(f"expected a picture, uint8 (H, W, 3) or (H, W), got {value.dtype} {value.shape}")
    return np.repeat(value[..., None], 3, axis=2) if value.ndim == 2 else value


def luma(rgb: np.ndarray) -> np.ndarray:
    """Brightness (H, W) float32, 0 to 255, of pixels (H, W, 3), with the weights of ITU-R BT.601."""
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)


def canny(grey: np.ndarray, low: float = 24, high: float = 72) -> np.ndarray:
    """Edges (H, W) bool of a picture (H, W), after Canny (1986): blur, gradient, thin, and follow from strong to weak.

    Args:
        grey: Grey values 0..255.
        low: Gradient (Sobel) above which a pixel continues an edge.
        high: Gradient above which a pixel starts one.
    """
    from scipy.ndimage import binary_propagation

    padded = np.pad(grey.astype(np.float32), 3, mode="edge")
    for axis in (0, 1):
        shifted = [np.roll(padded, shift, axis) for shift in (-2, -1, 0, 1, 2)]
        padded = sum(w * part for w, part in zip((1, 4, 6, 4, 1), shifted, strict=True)) / np.float32(16)
    blurred = padded[2:-2, 2:-2]
    rows = blurred[:-2] + 2 * blurred[1:-1] + blurred[2:]
    columns = blurred[:, :-2] + 2 * blurred[:, 1:-1] + blurred[:, 2:]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    strength = np.pad(np.hypot(dx, dy), 1)
    height, width = grey.shape
    sector = np.rint(np.arctan2(dy, dx) / (np.pi / 4)).astype(np.int64) % 4
    thin = np.zeros(grey.shape, bool)
    centre = strength[1:-1, 1:-1]
    for number, (down, right) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        ahead = strength[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = strength[1 - down : 1 - down + height, 1 - right : 1 - right + width]
        thin |= (sector == number) & (centre > ahead) & (centre >= behind)
    return binary_propagation(thin & (centre > high), np.ones((3, 3)), thin & (centre > low))


def palette(rgb: np.ndarray, size: int = 7, least: float = 0.02) -> list[list[int]]:
    """Colours [r, g, b] of a picture (H, W, 3) by falling share: median cut, then k-means.

    Args:
        rgb: The picture.
        size: How many colours at most.
        least: Colours of a smaller share of the pixels are left out.
    """
    fewer = np.ascontiguousarray(rgb[::2, ::2])  # a quarter of the pixels: four times faster, equally good colours
    quantized = Image.fromarray(fewer).quantize(size, Image.Quantize.MEDIANCUT, kmeans=1)
    colours = np.reshape(quantized.getpalette() or [], (-1, 3))
    shares = sorted((-count, int(np.asarray(i))) for count, i in quantized.getcolors() or [])
    limit = least * fewer.shape[0] * fewer.shape[1]
    return [colours[i].tolist() for count, i in shares if -count >= limit]


def palettes(rgb: np.ndarray, largest: int = 7) -> list[dict[str, list[list[int]]]]:
    """4M's palettes of a picture (H, W, 3), `[{"1": [[r, g, b]], "2": ..., ...}]`; none larger than it has colours."""
    found = (palette(rgb, size, least=0) for size in range(1, largest + 1))
    return [{str(len(colours)): colours for colours in found}]


def statistics(rgb: np.ndarray) -> dict[str, float]:
    """Numbers about a picture (H, W, 3) under 4M-21's names.

    Width and height in pixels; mean and standard deviation of the luma; mean HSV saturation (0 to 255); entropy of the
    luma's histogram in bits; and the colourfulness of Hasler and Suesstrunk (2003).
    """
    image = Image.fromarray(rgb)
    grey, saturation = np.asarray(image.convert("L")), np.asarray(image.convert("HSV"))[..., 1]
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    red, green, blue = np.moveaxis(rgb.astype(np.float64), 2, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue]).reshape(2, -1)
    spread, offset = np.linalg.norm(opponents.std(1)), np.linalg.norm(opponents.mean(1))
    numbers = {
        "colorfulness": spread + 0.3 * offset,
        "brightness": grey.mean(),
        "contrast": grey.std(),
        "saturation": saturation.mean(),
        "entropy": -(shares * np.log2(np.maximum(shares, 1e-12))).sum(),
    }
    sides = {"original_width": rgb.shape[1], "original_height": rgb.shape[0]}
    return sides | {name: round(float(number), 4) + 0.0 for name, number in numbers.items()}


def depth_normals(depth: np.ndarray, fov: float) -> np.ndarray:
    """Unit normals (H, W, 3) of a depth map (H, W): x to the right, y up, z towards the camera.

    Args:
        depth: Distance from the plane of a pinhole camera, above 0, in any unit.
        fov: Its horizontal angle of view in degrees.
    """
    height, width = depth.shape
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    x, y = np.meshgrid(np.arange(width) - (width - 1) / 2, (height - 1) / 2 - np.arange(height))
    points = np.stack([x / focal, y / focal, -np.ones_like(x)], -1) * depth[..., None].astype(np.float64)
    down, right = np.gradient(points, axis=(0, 1))
    normal = np.cross(down, right)
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
