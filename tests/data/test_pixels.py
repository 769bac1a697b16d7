"""Edges, palettes and numbers of pictures, against OpenCV, scikit-image and hand-computed values."""

import math

import numpy as np
import pytest

from fourm.data.pixels import canny, depth_normals, luma, palette, palettes, picture, statistics

# OpenCV 5.0's Canny (with the gradient's Euclidean norm) of the picture below, after the same 5 x 5 binomial blur.
OPENCV = (
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000e0000000000f1e00000000"
    "3803800000006000c0000000c0006000000180003000000100001000000300001800000200000800000200000800030200000800060400"
    "0008000c0400000800180400000800300200000800600200000800c0020000080180020000080300010000100600018000300c0000ffff"
    "e0180000000000300000000000600000180300c0000007fc0180000000000300000000000600000000000c000000000018000000000030"
    "0000000000600000000000c00000000000800000"
)


def drawn():
    y, x = np.mgrid[:40, :48]
    red = np.where((x - 17) ** 2 + (y - 19) ** 2 < 140, 200, 40) + 2 * y
    green = np.where(x + y > 62, 170, 60) + x
    blue = 90 + 50 * np.sin(x / 7) + 40 * np.cos(y / 5)
    return np.stack([red, green, blue], -1).astype(np.uint8)


def test_canny_is_opencvs():
    assert np.packbits(canny(luma(drawn()))).tobytes().hex() == OPENCV


def test_canny_draws_thin_lines_and_follows_weak_ones():
    grey = np.zeros((16, 16), np.float32)
    grey[:, 8:] = 100
    for image, lines in ((grey, lambda e: e.sum(1)), (grey.T, lambda e: e.sum(0))):
        edges = canny(image)
        assert (lines(edges) == 1).all() and edges.sum() == 16
    assert not canny(grey * 0.05).any()
    fading = grey * np.linspace(1, 0.15, 16)[:, None].astype(np.float32)
    assert canny(fading, low=24, high=72).any(1).all()
    assert not canny(fading, low=72, high=72)[14:].any()  # 2.5 times a step of 21 is well below 72


def test_statistics_are_those_of_opencv_and_scikit_image():
    found = statistics(drawn())
    assert (found["original_width"], found["original_height"]) == (48, 40)
    expected = {"brightness": 103.07135, "contrast": 32.81532, "entropy": 5.903997, "colorfulness": 112.99012}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert found["saturation"] == pytest.approx(151.573, abs=0.6)  # OpenCV rounds, Pillow rounds down


def test_statistics_by_hand():
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:4], halves[4:] = (255, 0, 0), (0, 0, 255)
    found = statistics(halves)
    # red - green is 255 or 0, (red + green) / 2 - blue is 127.5 or -255: half the difference is the deviation.
    spread, offset = math.hypot(127.5, 191.25), math.hypot(127.5, -63.75)
    assert found["colorfulness"] == pytest.approx(spread + 0.3 * offset, abs=1e-3)
    assert (found["saturation"], found["entropy"]) == (255, pytest.approx(1))
    assert (found["brightness"], found["contrast"]) == ((76 + 29) / 2, (76 - 29) / 2)
    grey = statistics(np.full((4, 4, 3), 90, np.uint8))
    assert [grey[name] for name in ("colorfulness", "saturation", "contrast", "entropy", "brightness")] == [
        0,
        0,
        0,
        0,
        90,
    ]


def test_palettes_have_their_size_and_no_colour_twice():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:4] = (200, 0, 0)
    assert palette(image) == [[0, 0, 0], [200, 0, 0]]
    [found] = palettes(image)
    assert list(found) == ["1", "2"] and found["2"] == [[0, 0, 0], [200, 0, 0]]
    [found] = palettes(drawn())
    assert [len(found[size]) for size in "1234567"] == [1, 2, 3, 4, 5, 6, 7]
    assert np.abs(np.subtract(found["1"][0], drawn()[::2, ::2].mean((0, 1)))).max() <= 1
    assert 1 <= len(palette(drawn())) <= 7


def test_normals_of_a_floor_a_wall_and_a_slope():
    wall = depth_normals(np.full((6, 8), 3.0), 60)
    np.testing.assert_allclose(wall, np.broadcast_to([0, 0, 1], wall.shape), atol=1e-9)
    # A pinhole of 90 degrees, 1 above a floor: depth is 1 / (how far below the horizon, in focal lengths).
    rows = (np.arange(64) + 0.5 - 32) / 32
    floor = depth_normals(np.repeat((1 / rows[40:])[:, None], 64, 1), 90)
    assert floor.shape == (24, 64, 3) and (np.abs(np.linalg.norm(floor, axis=-1) - 1) < 1e-9).all()
    tall = np.repeat((1 / np.maximum(rows, 0.1))[:, None], 64, 1)
    np.testing.assert_allclose(depth_normals(tall, 90)[45:-1], np.broadcast_to([0, 1, 0], (18, 64, 3)), atol=0.05)
    # A wall that recedes to the right, z = 2 + x / 2, faces right: in the picture, z is 2 / (1 - column / 2).
    columns = (np.arange(64) + 0.5 - 32) / 32
    turned = depth_normals(np.repeat((2 / (1 - columns * 0.5))[None], 64, 0), 90)[1:-1, 1:-1]
    np.testing.assert_allclose(
        turned, np.broadcast_to(np.array([0.5, 0, 1]) / math.hypot(0.5, 1), turned.shape), atol=0.02
    )


def test_pictures_are_uint8_with_three_channels():
    assert picture(np.full((2, 3), 7, np.uint8)).tolist() == np.full((2, 3, 3), 7).tolist()
    for wrong in (np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3), np.uint16), np.zeros((2, 3, 3))):
        with pytest.raises(ValueError, match="expected a picture"):
            picture(wrong)
