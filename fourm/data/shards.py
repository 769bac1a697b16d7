"""Aligned shards on disk: one folder per modality, the same keys in the same order in each of them.

    root/<split>/<modality>/shard-000000.tar     with entries <key>.<ext> (the WebDataset layout)
    root/<split>/<modality>/<any folders>/<key>.<ext>     (plain folders; the key is then the path below <modality>)

Raw data and token data share this layout. `write_shards` writes it, `ShardDataset` reads raw values sample by sample,
`TokenDataset` holds the tokens of a whole split in memory for training. Names of tar members are only ever compared,
never used as paths, and nothing is unpickled.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import mmap
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fourm.modalities import Modality, TokenSpace

logger = logging.getLogger(__name__)

BLOCK = 512  # a tar file is a sequence of blocks of this many bytes


# Values and their bytes ----------------------------------------------------------------------------------------------


def _encode_image(value: Any, image_format: str, **options: Any) -> bytes:
    value = np.asarray(value)
    if value.dtype not in (np.uint8, np.uint16) or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        raise ValueError(f"an image is uint8 or uint16 (H, W) or uint8 (H, W, 3), got {value.dtype} {value.shape}")
    buffer = io.BytesIO()
    Image.fromarray(value).save(buffer, image_format, **options)
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


def _decode_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _encode_text(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {type(value).__name__}")
    return value.encode()


@dataclass(frozen=True)
class Codec:
    """How values of one file extension become bytes and come back."""

    kind: Literal["image", "array", "object", "text"]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


EXTENSIONS: dict[str, Codec] = {
    "png": Codec("image", lambda value: _encode_image(value, "PNG"), _decode_image),
    "jpg": Codec("image", lambda value: _encode_image(value, "JPEG", quality=95), _decode_image),
    "jpeg": Codec("image", lambda value: _encode_image(value, "JPEG", quality=95), _decode_image),
    "webp": Codec("image", lambda value: _encode_image(value, "WEBP", lossless=True), _decode_image),
    "npy": Codec("array", _encode_npy, _decode_npy),
    "json": Codec("object", lambda value: json.dumps(value, ensure_ascii=False).encode(), json.loads),
    "txt": Codec("text", _encode_text, bytes.decode),
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
    folder, stream = Path(root) / split, iter(samples)
    names: list[str] = []
    for number in itertools.count(first_shard):
        chunk = list(itertools.islice(stream, shard_size))
        if not chunk:
            return names
        names.append(shard_name(number))
        _write_shard(folder, names[-1], chunk, extensions or {})
    raise AssertionError("unreachable")


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


@dataclass
class Column:
    """Where the S values of one modality lie: value i is `size[i]` bytes at `offset[i]` of `paths[file[i]]`."""

    modality: str
    paths: list[Path]
    keys: list[str]
    extensions: list[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def take(self, rows: Sequence[int]) -> Column:
        """The same column with some of its rows, in the given order."""
        order = np.asarray(rows, dtype=np.int64)
        keys, extensions = [self.keys[i] for i in rows], [self.extensions[i] for i in rows]
        where = (self.file[order], self.offset[order], self.size[order])
        return Column(self.modality, self.paths, keys, extensions, *where)

    def describe(self, i: int) -> str:
        """Modality, shard and key of a row, for messages."""
        return f"{self.modality}, {self.paths[self.file[i]]}, key {self.keys[i]!r}"

    def read(self, i: int) -> bytes:
        """Bytes of row i."""
        with open(self.paths[self.file[i]], "rb") as stream:
            stream.seek(int(self.offset[i]))
            return stream.read(int(self.size[i]))

    def read_all(self) -> Iterator[bytes]:
        """Bytes of all rows in order, reading every file once."""
        data, current = b"", -1
        for file, offset, size in zip(self.file.tolist(), self.offset.tolist(), self.size.tolist(), strict=True):
            if file != current:
                data, current = self.paths[file].read_bytes(), file
            yield data[offset : offset + size]

    def decode(self, i: int) -> Any:
        """Value of row i; a ValueError says where the bytes are that could not be read."""
        try:
            return EXTENSIONS[self.extensions[i]].decode(self.read(i))
        except Exception as error:  # decoders of damaged bytes raise anything
            raise ValueError(f"{self.describe(i)}: cannot read .{self.extensions[i]}: {error}") from error


def _plain_entries(data: mmap.mmap) -> tuple[list[tuple[str, int, int]], bool] | None:
    """Names, offsets and sizes of a tar of plain entries and whether it is whole; None if `tarfile` must look at it."""
    entries: list[tuple[str, int, int]] = []
    position, end = 0, len(data)
    while True:
        header = data[position : position + BLOCK]
        if len(header) < BLOCK:
            return entries, False
        if not header.strip(b"\0"):
            return entries, True
        if header[257:262] != b"ustar" or header[156:157] not in b"0\0" or header[345] or header[124] > 0x7F:
            return None
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            return None
        start = position + BLOCK
        if start + size > end:
            return entries, False
        entries.append((header[:100].split(b"\0", 1)[0].decode(errors="replace"), start, size))
        position = start + math.ceil(size / BLOCK) * BLOCK


def _entries(path: Path, faults: Faults) -> list[tuple[str, int, int]]:
    """Names, offsets and sizes of the files in a tar; meets a fault if the tar is damaged."""
    if path.stat().st_size == 0:
        faults.meet("truncated", f"{path}: the file is empty")
        return []
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        plain = _plain_entries(data)
        end = len(data)
    if plain is not None:
        entries, whole = plain
        if not whole:
            last = f"after key {entries[-1][0]!r}" if entries else "before the first entry is complete"
            faults.meet("truncated", f"{path}: the tar is truncated, it ends {last}")
        return entries
    entries = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and member.offset_data + member.size <= end:
                    entries.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    faults.meet("tar", f"{path}: entry {member.name!r} is a link, a device or cut off, expected a file")
    except tarfile.TarError as error:
        faults.meet("tar", f"{path}: the tar is damaged after {len(entries)} entries: {error}", error)
    return entries


def _parse_name(name: str) -> tuple[str, str]:
    """Key (folders and all up to the first dot) and extension of an entry."""
    place, _, base = name.removeprefix("./").rpartition("/")
    key, _, extension = base.partition(".")
    return f"{place}/{key}" if place else key, extension.lower()


def _index(folder: Path, faults: Faults) -> Column:
    """Finds all values below one modality's folder."""
    shards = sorted(folder.glob("*.tar"))
    if shards:
        paths = shards
        found = [(number, *entry) for number, path in enumerate(paths) for entry in _entries(path, faults)]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        found = [(i, path.relative_to(folder).as_posix(), 0, path.stat().st_size) for i, path in enumerate(paths)]
    if not found:
        faults.meet("missing", f"{folder}: no samples, expected shard-*.tar or files")
    kinds = Counter(EXTENSIONS[ext].kind for _, name, _, _ in found if (ext := _parse_name(name)[1]) in EXTENSIONS)
    keys: dict[str, int] = {}
    extensions: list[str] = []
    where: tuple[array[int], array[int], array[int]] = (array("q"), array("q"), array("q"))
    for file, name, offset, size in found:
        key, extension = _parse_name(name)
        at = f"{paths[file]}, key {key!r}"
        if extension not in EXTENSIONS:
            faults.meet("extension", f"{at}: extension {extension!r} is unknown, allowed are {', '.join(EXTENSIONS)}")
            continue
        if EXTENSIONS[extension].kind != (usual := max(kinds, key=lambda kind: kinds[kind])):
            faults.meet("extension", f"{at}: wrong extension {extension!r}, most of the others are of kind {usual}")
            continue
        if key in keys:
            faults.meet("duplicate", f"{at}: the key is there twice, in {paths[where[0][keys[key]]].name} before")
            continue
        keys[key] = len(extensions)
        extensions.append(extension)
        for column, value in zip(where, (file, offset, size), strict=True):
            column.append(value)
    return Column(folder.name, paths, list(keys), extensions, *(np.array(column, np.int64) for column in where))


def _difference(first: Column, other: Column) -> str:
    """The first place where two columns do not have the same key, in words."""
    shards, others = ({path.name for path in column.paths if path.suffix == ".tar"} for column in (first, other))
    if shards and others and shards != others:
        name = min(shards ^ others)
        have, lack = (first, other) if name in shards else (other, first)
        return f"{lack.modality}, {lack.paths[0].parent}: shard {name} is missing, {have.modality} has it"
    pairs = itertools.zip_longest(first.keys, other.keys)
    i = next(i for i, (key, twin) in enumerate(pairs) if key != twin)
    if i < len(first.keys) and first.keys[i] not in set(other.keys):
        return f"{first.describe(i)}: the key is missing in {other.modality}"
    if i < len(other.keys) and other.keys[i] not in set(first.keys):
        return f"{other.describe(i)}: extra key, it is missing in {first.modality}"
    return f"{other.describe(i)}: wrong order, {first.modality} has {first.keys[i]!r} in this place"


def _align(columns: list[Column], faults: Faults) -> list[Column]:
    """Checks that all columns have the same keys in the same order, or leaves out the keys that not all have."""
    wrong = [column for column in columns[1:] if column.keys != columns[0].keys]
    if not wrong:
        return columns
    if not faults.skip:
        raise ValueError(_difference(columns[0], wrong[0]))
    rows = [{key: i for i, key in enumerate(column.keys)} for column in columns]
    for key in dict.fromkeys(itertools.chain.from_iterable(rows)):
        lacking = [column.modality for column, known in zip(columns, rows, strict=True) if key not in known]
        if lacking:
            known, column = next((known, column) for known, column in zip(rows, columns, strict=True) if key in known)
            faults.meet("misaligned", f"{column.describe(known[key])}: missing in {', '.join(lacking)}")
    common = [key for key in columns[0].keys if all(key in known for known in rows)]
    return [column.take([known[key] for key in common]) for column, known in zip(columns, rows, strict=True)]


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
        self._bad: set[int] = set()
        columns = [_index(self.folder / name, self._faults) for name in self.modalities]
        self.columns = {column.modality: column for column in _align(columns, self._faults)}
        self.keys = self.columns[self.modalities[0]].keys
        self._dtypes = self._stated_dtypes()

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped samples by reason."""
        return dict(self._faults.skipped)

    def _stated_dtypes(self) -> dict[str, str]:
        card = self.folder.parent / "card.json"
        rows = json.loads(card.read_text()).get("modalities", {}) if card.is_file() else {}
        return {name: rows[name]["dtype"] for name in self.modalities if "dtype" in rows.get(name, {})}

    def __len__(self) -> int:
        return len(self.keys)

    def _value(self, name: str, i: int) -> Any:
        column = self.columns[name]
        value = column.decode(i)
        if not isinstance(value, np.ndarray):
            return value
        if name not in self._dtypes:
            self._dtypes[name] = str((value if i == 0 else column.decode(0)).dtype)
        if str(value.dtype) != self._dtypes[name]:
            raise ValueError(f"{column.describe(i)}: wrong type {value.dtype}, expected {self._dtypes[name]}")
        return value

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        for row in ((i + step) % len(self) for step in range(len(self))):
            if row in self._bad:
                continue
            try:
                return {"__key__": self.keys[row], **{name: self._value(name, row) for name in self.modalities}}
            except ValueError as error:
                self._faults.meet("unreadable", str(error), error)
                self._bad.add(row)
        raise ValueError(f"{self.folder}: none of {len(self)} samples can be read")


# Tokens in memory ----------------------------------------------------------------------------------------------------


class NpyParser:
    """Reads npy bytes much faster than `np.load`, by remembering the few different headers it has seen."""

    def __init__(self) -> None:
        self.headers: dict[bytes, tuple[np.dtype, tuple[int, ...], int, int]] = {}

    def __call__(self, data: bytes) -> np.ndarray:
        """The array in `data` (read-only, sharing its memory); never unpickles."""
        if data[:8] != b"\x93NUMPY\x01\x00":
            return _decode_npy(data)
        end = 10 + int.from_bytes(data[8:10], "little")
        header = data[10:end]
        if header not in self.headers:
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(data[8:end]))
            if fortran or dtype.hasobject:
                return _decode_npy(data)
            self.headers[header] = (dtype, shape, math.prod(shape), end)
        dtype, shape, count, end = self.headers[header]
        return np.frombuffer(data, dtype, count, end).reshape(shape)


def _check_tokens(row: Modality, value: Any) -> np.ndarray:
    """The tokens of one sample in the shape they are stored in, or a ValueError that says what is wrong with them.

    grid (crops, tokens), text (length,), vectors (length, dim), patches (height, width, channels).
    """
    if row.kind == "patches":
        height, width = (side * row.patch_size for side in row.grid or (0, 0))
        value = value[..., None] if value.ndim == 2 else value
        if value.dtype != np.uint8 or value.shape != (height, width, row.channels):
            expected = f"uint8 ({height}, {width}, {row.channels})"
            raise ValueError(f"expected an image {expected}, got {value.dtype} {value.shape}")
        return value
    if row.kind == "vectors":
        if value.dtype.kind != "f" or value.ndim != 2 or value.shape[1] != row.dim:
            raise ValueError(f"expected float vectors (length, {row.dim}), got {value.dtype} {value.shape}")
        return value[: row.max_tokens].astype(np.float32)
    if value.dtype.kind not in "iu":
        raise ValueError(f"expected integer ids, got {value.dtype}")
    if row.kind == "text":
        if value.ndim != 1:
            raise ValueError(f"expected ids of shape (length,), got {value.shape}")
        return value[: row.max_tokens // row.chunk * row.chunk]
    value = value[None] if value.ndim == 1 else value
    if value.ndim != 2 or len(value) < 1 or value.shape[1] != row.length:
        raise ValueError(f"expected ids of shape (crops, {row.length}) or ({row.length},), got {value.shape}")
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
        bad: set[int] = set()
        tokens = {name: self._read(shards.columns[name], space[name], bad) for name in space.names}
        kept = [i for i in range(len(shards)) if i not in bad]
        if not kept:
            raise ValueError(f"{folder}: no good samples ({len(bad)} bad ones, reasons: {self.skipped})")
        self.keys = [shards.keys[i] for i in kept]
        self._stores: list[tuple[str, Stacked | Ragged]] = []
        for name in space.names:
            values = tokens.pop(name)
            self._stores.append((name, _store(space[name], [values[i] for i in kept])))

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped samples by reason."""
        return dict(self._faults.skipped)

    def _read(self, column: Column, row: Modality, bad: set[int]) -> list[np.ndarray]:
        """All tokens of one modality; numbers of samples that are no good are added to `bad`."""
        parse, values = NpyParser(), []
        for i, data in enumerate(column.read_all()):
            try:
                extension = column.extensions[i]
                value = parse(data) if extension == "npy" else EXTENSIONS[extension].decode(data)
                values.append(_check_tokens(row, value))
            except Exception as error:  # damaged bytes raise anything
                self._faults.meet("unreadable", f"{column.describe(i)}: {error}", error)
                values.append(np.zeros(0, np.uint8))
                bad.add(i)
        good = [value.ravel() for i, value in enumerate(values) if i not in bad]
        if not row.discrete or not good or not _outside(np.concatenate(good), row):
            return values
        for i, value in enumerate(values):
            if i not in bad and _outside(value, row):
                span = f"[{value.min()}, {value.max()}]"
                message = f"{column.describe(i)}: ids in {span}, expected [0, {row.vocab_size})"
                self._faults.meet("range", message)
                bad.add(i)
        return values

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, draw: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = draw if isinstance(draw, tuple) else (0, int(draw))
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        sample: dict[str, Any] = {"__key__": self.keys[i]}
        for name, store in self._stores:
            sample[name] = store.get(epoch, i)
        return sample


def _outside(ids: np.ndarray, row: Modality) -> bool:
    return ids.size > 0 and bool(ids.min() < 0 or ids.max() >= row.vocab_size)


@dataclass
class Stacked:
    """Values of one shape: (samples, crops, ...)."""

    values: np.ndarray

    def get(self, epoch: int, i: int) -> np.ndarray:
        """Value of sample i; the crop follows the epoch."""
        return self.values[i, epoch % self.values.shape[1]]


@dataclass
class Ragged:
    """Values of different lengths, end to end; with `crops` the values are rows to choose from."""

    values: np.ndarray
    starts: array[int]
    crops: bool

    def get(self, epoch: int, i: int) -> np.ndarray:
        """Value of sample i; the crop follows the epoch."""
        start, stop = self.starts[i % (len(self.starts) - 1)], self.starts[i % (len(self.starts) - 1) + 1]
        return self.values[start + epoch % (stop - start)] if self.crops else self.values[start:stop]


def _store(row: Modality, values: list[np.ndarray]) -> Stacked | Ragged:
    """Packs the checked tokens of one modality."""
    if row.kind == "patches":
        return Stacked(np.stack(values)[:, None])
    if row.kind == "grid" and len({len(value) for value in values}) == 1:
        return Stacked(np.stack(values))
    starts = array("q", itertools.accumulate((len(value) for value in values), initial=0))
    return Ragged(np.concatenate(values), starts, row.kind == "grid")
