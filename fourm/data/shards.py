"""Aligned shards on disk: one folder per modality, the same keys in the same order in each of them.

    root/<split>/<modality>/shard-000000.tar     with entries <key>.<ext> (the WebDataset layout)
    root/<split>/<modality>/<any folders>/<key>.<ext>     (plain folders; the key is then the path below <modality>)

Raw data and token data share this layout. `write_shards` writes it, `ShardDataset` reads raw values sample by sample,
`TokenDataset` holds the tokens of a whole split in memory for training. Names of tar members are only ever compared,
never used as paths, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import itertools
import json
import logging
import math
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from fourm.modalities import Modality, TokenSpace

logger = logging.getLogger(__name__)

# Values and their bytes ----------------------------------------------------------------------------------------------


def _encode_image(value: Any, image_format: str) -> bytes:
    value = np.asarray(value)
    if value.dtype not in (np.uint8, np.uint16) or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        raise ValueError(f"an image is uint8 or uint16 (H, W) or uint8 (H, W, 3), got {value.dtype} {value.shape}")
    buffer = io.BytesIO()
    Image.fromarray(value).save(buffer, image_format, quality=95, lossless=True)  # formats ignore foreign options
    return buffer.getvalue()


def _decode_image(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "RGB", "I;16"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        return np.array(image)


def _encode_npy(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def _encode_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@functools.lru_cache
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    return dtype, shape, not fortran and not dtype.hasobject


def _decode_npy(data: bytes) -> np.ndarray:
    """As `np.load`, but ten times quicker, as a data set has few different headers."""
    if data[:8] == b"\x93NUMPY\x01\x00":
        end = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape, plain = _npy_header(data[8:end])
        if plain:
            return np.frombuffer(data, dtype, math.prod(shape), end).reshape(shape).copy()
    return np.load(io.BytesIO(data), allow_pickle=False)


@dataclass(frozen=True)
class Codec:
    """How values of one file extension become bytes and come back."""

    kind: Literal["image", "array", "object", "text"]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


EXTENSIONS: dict[str, Codec] = {
    "png": Codec("image", lambda value: _encode_image(value, "PNG"), _decode_image),
    "jpg": Codec("image", lambda value: _encode_image(value, "JPEG"), _decode_image),
    "jpeg": Codec("image", lambda value: _encode_image(value, "JPEG"), _decode_image),
    "webp": Codec("image", lambda value: _encode_image(value, "WEBP"), _decode_image),
    "npy": Codec("array", _encode_npy, _decode_npy),
    "json": Codec("object", _encode_json, json.loads),
    "json.gz": Codec(
        "object",
        lambda value: gzip.compress(_encode_json(value), mtime=0),
        lambda data: json.loads(gzip.decompress(data)),
    ),
    "txt": Codec("text", str.encode, bytes.decode),
}


def extension_of(value: Any) -> str:
    """The extension a raw value is written with unless told otherwise.

    2-D and (H, W, 3) arrays of uint8 or uint16 are `png`, other arrays `npy`, strings `txt`, anything else `json`.
    """
    if isinstance(value, str):
        return "txt"
    if not isinstance(value, np.ndarray):
        return "json"
    grey = value.dtype in (np.uint8, np.uint16) and value.ndim == 2
    return "png" if grey or (value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3) else "npy"


# Writing -------------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """File name of a shard, the same in every modality folder."""
    return f"shard-{number:06d}.tar"


def write_shards(
    root: str | Path,
    split: str,
    samples: Iterable[Mapping[str, Any]],
    shard_size: int,
    first_shard: int = 0,
    extensions: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes samples as aligned shards; a shard appears under its name only when it is whole.

    The same samples give the same bytes (entries carry no time).

    Args:
        root: Folder of the data set.
        split: Folder below it, such as `train`.
        samples: Dicts with `__key__` and one value per modality; all have the same modalities.
        shard_size: Samples in a shard.
        first_shard: Number of the first shard.
        extensions: Extension by modality, where `extension_of` would choose another (token ids of dtype uint8).

    Returns:
        Names of the shards written.

    Raises:
        ValueError: A sample without key, with a repeated or impossible key, with other modalities than the first, or a
            value its extension cannot hold.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, expected at least 1")
    stream, names = iter(samples), list[str]()
    while chunk := list(itertools.islice(stream, shard_size)):
        names.append(shard_name(first_shard + len(names)))
        _write_shard(Path(root) / split, names[-1], chunk, extensions or {})
    return names


def _write_shard(folder: Path, name: str, samples: list[Mapping[str, Any]], extensions: Mapping[str, str]) -> None:
    modalities = [modality for modality in samples[0] if modality != "__key__"]
    keys = set()
    for sample in samples:
        key = sample.get("__key__")
        if not isinstance(key, str) or not key or "." in key or key in keys:
            raise ValueError(f"{folder}, {name}: {key!r} is not a new, non-empty key without dots")
        keys.add(key)
        if set(sample) != set(samples[0]):
            raise ValueError(
                f"{folder}, {name}, sample {key!r}: has {sorted(sample)}, but the first has {sorted(samples[0])}"
            )
    finished = []
    for modality in modalities:
        path = folder / modality / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(name + ".tmp")
        with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                extension = extensions.get(modality) or extension_of(sample[modality])
                try:
                    data = EXTENSIONS[extension].encode(sample[modality])
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{path}, {sample['__key__']!r}: cannot write .{extension}: {error}") from error
                entry = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        finished.append((aside, path))
    for aside, path in finished:
        aside.replace(path)


# Reading -------------------------------------------------------------------------------------------------------------


class Faults:
    """What happens to a bad sample: an error, or it is counted, logged and left out.

    Attributes:
        skipped: How often each reason was met.
    """

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}, allowed are 'raise' and 'skip'")
        self.skip = on_error == "skip"
        self.skipped: Counter[str] = Counter()

    def meet(self, reason: str, message: str, cause: Exception | None = None) -> None:
        """Raises `ValueError(message)`, or counts it under `reason`."""
        if not self.skip:
            raise ValueError(message) from cause
        self.skipped[reason] += 1
        logger.warning("skipped (%s): %s", reason, message)


class Entry(NamedTuple):
    """Where the bytes of one value lie."""

    extension: str
    path: Path
    offset: int
    size: int


@dataclass
class Column:
    """The values of one modality by key."""

    modality: str
    entries: dict[str, Entry]

    def describe(self, key: str) -> str:
        """Modality, shard and key, for messages."""
        return f"{self.modality}, {self.entries[key].path}, key {key!r}"

    def read(self, key: str) -> bytes:
        """Bytes of one value."""
        entry = self.entries[key]
        with open(entry.path, "rb") as stream:
            stream.seek(entry.offset)
            return stream.read(entry.size)

    def read_all(self, keys: Sequence[str]) -> Iterator[bytes]:
        """Bytes of several values in order, reading every shard once."""
        for path, entries in itertools.groupby((self.entries[key] for key in keys), key=lambda entry: entry.path):
            data = path.read_bytes()
            for _, _, offset, size in entries:
                yield data[offset : offset + size]

    def decode(self, key: str, data: bytes, check: Callable[[Any], Any]) -> Any:
        """The value in `data`, as `check` returns it; the ValueError for bad bytes or values says where they are."""
        extension = self.entries[key].extension
        try:
            return check(EXTENSIONS[extension].decode(data))
        except Exception as error:  # decoders of damaged bytes raise anything
            raise ValueError(f"{self.describe(key)}: cannot use this .{extension}: {error}") from error


def _tar_entries(path: Path, faults: Faults) -> list[tuple[str, int, int]]:
    """Names, offsets and sizes of the files in a tar; of a damaged one those before the damage."""
    entries = []
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    entries.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    faults.meet("damaged", f"{path}: entry {member.name!r} is a link or a device, expected a file")
            stream.seek(tar.offset)  # `tarfile` takes a damaged header for the end
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("there is no end mark")
    except tarfile.TarError as error:
        faults.meet("damaged", f"{path}: the tar is truncated or damaged after {len(entries)} entries: {error}", error)
    end = path.stat().st_size
    return [entry for entry in entries if entry[1] + entry[2] <= end]


def _parse_name(name: str) -> tuple[str, str]:
    """Key (folders and all up to the first dot) and extension of an entry."""
    place, _, base = name.removeprefix("./").rpartition("/")
    key, _, extension = base.partition(".")
    return f"{place}/{key}" if place else key, extension.lower()


def _index(folder: Path, faults: Faults) -> Column:
    """Finds all values below one modality's folder."""
    shards = sorted(folder.glob("*.tar"))
    files = [] if shards else sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    found = [(path.relative_to(folder).as_posix(), path, 0, path.stat().st_size) for path in files]
    found += [(name, path, offset, size) for path in shards for name, offset, size in _tar_entries(path, faults)]
    if not found:
        faults.meet("missing", f"{folder}: no samples, expected shard-*.tar or files")
    kinds = Counter(codec.kind for name, *_ in found if (codec := EXTENSIONS.get(_parse_name(name)[1])))
    column = Column(folder.name, {})
    for name, path, offset, size in found:
        key, extension = _parse_name(name)
        at = f"{folder.name}, {path}, key {key!r}"
        if extension not in EXTENSIONS:
            faults.meet("extension", f"{at}: extension {extension!r} is unknown, allowed are {', '.join(EXTENSIONS)}")
        elif EXTENSIONS[extension].kind != (usual := kinds.most_common(1)[0][0]):
            faults.meet("extension", f"{at}: wrong extension {extension!r}, most of the others are of kind {usual}")
        elif key in column.entries:
            faults.meet("duplicate", f"{at}: the key is there twice, in {column.entries[key].path.name} before")
        else:
            column.entries[key] = Entry(extension, path, offset, size)
    return column


def _aligned_keys(columns: list[Column], faults: Faults) -> list[str]:
    """The keys that all columns have; a key that one lacks, or another order, is a fault."""
    keys = {column.modality: list(column.entries) for column in columns}
    first = columns[0]
    if all(other == keys[first.modality] for other in keys.values()):
        return keys[first.modality]
    common = set.intersection(*(set(column.entries) for column in columns))
    for key in dict.fromkeys(itertools.chain(*keys.values())):
        if key not in common:
            holder = next(column for column in columns if key in column.entries)
            lacking = ", ".join(column.modality for column in columns if key not in column.entries)
            faults.meet("misaligned", f"{holder.describe(key)}: missing in {lacking}")
    for column in columns[1:]:
        for key, twin in zip(keys[first.modality], column.entries, strict=False):
            if key != twin and not faults.skip:
                raise ValueError(f"{column.describe(twin)}: wrong order, {first.modality} has {key!r} in this place")
    return [key for key in first.entries if key in common]


class ShardDataset:
    """Raw values of one split, sample by sample, from aligned shards or plain folders.

    Opening reads only the headers of the tars and checks that all modalities have the same keys in the same order.
    `dataset[i]` is `{"__key__": key, modality: value}`: images are uint8 or uint16 arrays (H, W) or (H, W, 3), `npy`
    are arrays, `json` objects, `txt` strings. Arrays must have the dtype that the data card beside the split states
    (`modalities.<name>.dtype`), else that of the modality's first sample.

    Args:
        folder: `root/<split>`.
        modalities: Which modality folders to read; default: all.
        on_error: `raise` a ValueError that names shard and key; or `skip`: log and count the sample, leave it out if it
            is found at opening, else give the next good one in its place.

    Attributes:
        keys: Names of the samples.
        skipped: Number of skipped samples by reason (in this process).

    Raises:
        ValueError: No such folder, or a sample that is missing, extra, repeated, truncated or of the wrong extension.
    """

    def __init__(
        self,
        folder: str | Path,
        modalities: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ):
        self.folder = Path(folder)
        present = sorted(path.name for path in self.folder.iterdir() if path.is_dir()) if self.folder.is_dir() else []
        self.modalities = list(modalities) if modalities is not None else present
        missing = sorted(set(self.modalities) - set(present))
        if missing or not self.modalities:
            there = f"there are {', '.join(present)}" if present else "there is none"
            raise ValueError(f"{self.folder}: no folder for modality {', '.join(missing) or '(any)'}, {there}")
        self._faults = Faults(on_error)
        self._bad: set[str] = set()
        columns = [_index(self.folder / name, self._faults) for name in self.modalities]
        self.keys = _aligned_keys(columns, self._faults)
        self.columns = {column.modality: column for column in columns}
        card = self.folder.parent / "card.json"
        rows = json.loads(card.read_text()).get("modalities", {}) if card.is_file() else {}
        self._dtypes = {name: rows[name]["dtype"] for name in self.modalities if "dtype" in rows.get(name, {})}

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped samples by reason."""
        return dict(self._faults.skipped)

    def __len__(self) -> int:
        return len(self.keys)

    def _value(self, name: str, key: str) -> Any:
        column = self.columns[name]

        def check(value: Any) -> Any:
            if isinstance(value, np.ndarray) and str(value.dtype) != (expected := self._dtype(name)):
                raise ValueError(f"wrong type {value.dtype}, expected {expected}")
            return value

        return column.decode(key, column.read(key), check)

    def _dtype(self, name: str) -> str:
        """What the card states, else the dtype of the first sample that can be read."""
        column, keys = self.columns[name], iter(self.keys)
        while name not in self._dtypes:
            with contextlib.suppress(ValueError):
                self._dtypes[name] = column.decode(key := next(keys), column.read(key), lambda value: str(value.dtype))
        return self._dtypes[name]

    def __getitem__(self, i: int) -> dict[str, Any]:
        first = range(len(self))[i]
        for step in range(len(self)):
            key = self.keys[(first + step) % len(self)]
            if key in self._bad:
                continue
            try:
                return {"__key__": key, **{name: self._value(name, key) for name in self.modalities}}
            except ValueError as error:
                self._faults.meet("unreadable", str(error), error)
                self._bad.add(key)
        raise ValueError(f"{self.folder}: none of {len(self)} samples can be read")


# Tokens in memory ----------------------------------------------------------------------------------------------------


def _check_tokens(row: Modality, value: Any) -> np.ndarray:
    """The tokens of one sample in the shape they are stored in, or a ValueError that says what is wrong with them.

    grid (crops, tokens), text (length,), vectors (length, dim), patches (1, height, width, channels).
    """
    if row.kind == "patches":
        size = *(side * row.patch_size for side in row.grid or ()), row.channels
        value = value[..., None] if value.ndim == 2 else value
        if value.dtype != np.uint8 or value.shape != size:
            raise ValueError(f"expected a uint8 image {size}, got {value.dtype} {value.shape}")
        return value[None]
    if row.kind == "vectors":
        if value.dtype.kind != "f" or value.ndim != 2 or value.shape[1] != row.dim:
            raise ValueError(f"expected float vectors (length, {row.dim}), got {value.dtype} {value.shape}")
        return value[: row.max_tokens].astype(np.float32)
    if value.dtype.kind not in "iu":
        raise ValueError(f"expected integer ids, got {value.dtype} {value.shape}")
    if value.size and (value.min() < 0 or value.max() >= row.vocab_size):
        raise ValueError(f"ids in [{value.min()}, {value.max()}], expected [0, {row.vocab_size})")
    if row.kind == "text":
        if value.ndim != 1:
            raise ValueError(f"expected ids of shape (length,), got {value.dtype} {value.shape}")
        return value[: row.max_tokens // row.chunk * row.chunk]
    value = value[None] if value.ndim == 1 else value
    if value.ndim != 2 or len(value) < 1 or value.shape[1] != row.length:
        raise ValueError(f"expected ids (crops, {row.length}) or ({row.length},), got {value.dtype} {value.shape}")
    return value


class TokenDataset:
    """Tokens of one split, all in memory, for training.

    `dataset[epoch, i]` (or `dataset[i]` for epoch 0) is `{"__key__": key, modality: tokens}`: grid (tokens,) ids of
    crop `epoch % crops`, text (length,) ids without end, cut to `max_tokens`, patches uint8 (H, W, C), vectors
    (length, dim) float32. The arrays are views of the memory: do not write into them.

    Args:
        folder: `root/<split>` with one folder per modality of the space.
        space: The modalities; ids are checked against their vocabularies, shapes against their grids.
        on_error: `raise` a ValueError that names shard, key and modality; or `skip`: log, count, leave the sample out.

    Attributes:
        keys: Names of the samples.
        skipped: Number of skipped samples by reason.

    Raises:
        ValueError: As `ShardDataset`; ids outside the vocabulary, of the wrong dtype or number; no good sample at all.
    """

    by_epoch = True  # tells the loader to ask for (epoch, index)

    def __init__(self, folder: str | Path, space: TokenSpace, on_error: Literal["raise", "skip"] = "raise"):
        shards = ShardDataset(folder, space.names, on_error)
        self._faults = shards._faults
        tokens = {name: self._read(shards.columns[name], space[name], shards.keys) for name in space.names}
        self.keys = [key for key in shards.keys if all(key in values for values in tokens.values())]
        if not self.keys:
            raise ValueError(f"{folder}: no good samples, skipped are {self.skipped}")
        self._packed = {
            name: Packed.of([tokens[name][key] for key in self.keys], space[name].grid is not None)
            for name in space.names
        }

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped samples by reason."""
        return dict(self._faults.skipped)

    def _read(self, column: Column, row: Modality, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The good tokens of one modality by key."""
        values = {}
        for key, data in zip(keys, column.read_all(keys), strict=True):
            try:
                values[key] = column.decode(key, data, functools.partial(_check_tokens, row))
            except ValueError as error:
                self._faults.meet("unreadable", str(error), error)
        return values

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, draw: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = draw if isinstance(draw, tuple) else (0, draw)
        i = range(len(self))[i]
        return {"__key__": self.keys[i], **{name: packed.get(epoch, i) for name, packed in self._packed.items()}}


@dataclass
class Packed:
    """Values of different lengths, end to end; with `crops` the values are rows to choose from."""

    values: np.ndarray
    starts: array[int]
    crops: bool

    @classmethod
    def of(cls, values: list[np.ndarray], crops: bool) -> Packed:
        """Packs the checked tokens of one modality."""
        starts = array("q", itertools.accumulate((len(value) for value in values), initial=0))
        return cls(np.concatenate(values), starts, crops)

    def get(self, epoch: int, i: int) -> np.ndarray:
        """Value of sample i; the crop follows the epoch."""
        start, stop = self.starts[i], self.starts[i + 1]
        return self.values[start + epoch % (stop - start)] if self.crops else self.values[start:stop]
