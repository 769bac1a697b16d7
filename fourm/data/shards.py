"""Aligned shards on disk: one folder per modality, the same keys in the same order in each of them.

    root/<split>/<modality>/shard-000000.tar     with entries <key>.<ext> (the WebDataset layout)
    root/<split>/<modality>/<any folders>/<key>.<ext>     (plain folders; the key is then the path below <modality>)

Raw data and token data share this layout. `write_shards` writes it, `ShardDataset` reads raw values sample by sample,
`TokenDataset` (tokens.py) packs tokens for training. Names of tar members are only ever compared, never used as paths,
and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import tarfile
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fourm.modalities import Modality

logger = logging.getLogger(__name__)

# Values and their bytes ----------------------------------------------------------------------------------------------


def _encode_image(value: Any, image_format: str) -> bytes:
    value = np.asarray(value)
    if value.dtype not in (np.uint8, np.uint16) or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        raise ValueError(f"an image is uint8 or uint16 (H, W) or uint8 (H, W, 3), got {value.dtype} {value.shape}")
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if image_format == "TIFF" else {"quality": 95, "lossless": True}
    try:
        Image.fromarray(value).save(buffer, image_format, **options)  # other formats ignore foreign options
    except OSError as error:
        raise ValueError(f"{image_format} cannot hold {value.dtype} {value.shape}: {error}") from error
    return buffer.getvalue()


def _decode_image(data: bytes) -> np.ndarray:
    """Upright as its EXIF says; 16 bits and floats stay, everything else becomes uint8 (H, W) or (H, W, 3)."""
    Image.init()
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            array = np.array(image)
            return array if image.mode == "F" else _as_uint16(array)
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        return np.array(image)


def _as_uint16(array: np.ndarray) -> np.ndarray:
    if array.size and (array.min() < 0 or array.max() > 65535):
        raise ValueError(f"integers in [{array.min()}, {array.max()}], expected at most 16 bits")
    return array.astype(np.uint16)


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
    if data[:6] != b"\x93NUMPY":
        raise ValueError("the bytes are those of no .npy file")
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise ValueError(f"Object arrays are pickled; {PICKLE_ADVICE}") from error


def _encode_npz(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **value)
    return buffer.getvalue()


def _decode_npz(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        values = dict(arrays)
    if not all(isinstance(value, np.ndarray) for value in values.values()):
        raise ValueError("expected a zip of nothing but .npy files")
    return values


def _decode_wav(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as sound:
        if sound.getsampwidth() != 2:
            raise ValueError(f"samples of {8 * sound.getsampwidth()} bits, expected 16")
        channels = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").reshape(-1, sound.getnchannels())
    return channels.mean(1).round().astype(np.int16)


def _encode_wav(value: Any) -> bytes:
    raise ValueError("the sampling rate is not known; write sound as .npy")


@dataclass(frozen=True)
class Codec:
    """How values of one file extension become bytes and come back."""

    kind: Literal["image", "array", "arrays", "object", "text"]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "joblib")
PICKLE_ADVICE = "nothing is unpickled here; write them once more as .json, or as .npz with plain arrays"
IMAGES = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "ppm": "PPM", "pgm": "PPM", "bmp": "BMP",
          "tif": "TIFF", "tiff": "TIFF", "jpx": "JPEG2000"}  # fmt: skip

FORMATS = [*dict.fromkeys(IMAGES.values()), "GIF"]  # Pillow knows others too, such as programs in PostScript

# Those of 4M (its data/modality_transforms.py), without anything pickled.
EXTENSIONS: dict[str, Codec] = {
    **{
        extension: Codec("image", functools.partial(_encode_image, image_format=name), _decode_image)
        for extension, name in IMAGES.items()
    },
    "npy": Codec("array", _encode_npy, _decode_npy),
    "wav": Codec("array", _encode_wav, _decode_wav),  # mono int16 (samples,), the mean of the channels
    "npz": Codec("arrays", _encode_npz, _decode_npz),
    "json": Codec("object", _encode_json, json.loads),
    "json.gz": Codec(
        "object",
        lambda value: gzip.compress(_encode_json(value), mtime=0),
        lambda data: json.loads(gzip.decompress(data)),
    ),
    "txt": Codec("text", str.encode, bytes.decode),
}


class Encoded(NamedTuple):
    """A value that is written as the bytes it is."""

    extension: str
    data: bytes


def extension_of(value: Any) -> str:
    """The extension a raw value is written with unless told otherwise.

    2-D and (H, W, 3) arrays of uint8 or uint16 are `png`, other arrays `npy`, strings `txt`, anything else `json`.
    """
    if isinstance(value, Encoded):
        return value.extension
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


def add_value(tar: tarfile.TarFile, key: str, value: Any, extension: str | None = None) -> None:
    """Adds a value to an open tar, by default with the extension that `extension_of` says.

    Raises:
        ValueError: The extension cannot hold the value.
    """
    extension = extension or extension_of(value)
    try:
        data = value.data if isinstance(value, Encoded) else EXTENSIONS[extension].encode(value)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot write .{extension}: {error}") from error
    entry = tarfile.TarInfo(f"{key}.{extension}")
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


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
                try:
                    add_value(tar, sample["__key__"], sample[modality], extensions.get(modality))
                except ValueError as error:
                    raise ValueError(f"{path}, {sample['__key__']!r}: {error}") from error
        finished.append((aside, path))
    for aside, path in finished:
        aside.replace(path)


# Reading -------------------------------------------------------------------------------------------------------------


class Faults:
    """What happens to a bad sample: an error, or it is counted, logged and left out.

    Attributes:
        skipped: How often each reason was met.
        first: The first message.
    """

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}, allowed are 'raise' and 'skip'")
        self.skip = on_error == "skip"
        self.skipped: Counter[str] = Counter()
        self.first = ""

    def meet(self, reason: str, message: str, cause: Exception | None = None) -> None:
        """Raises `ValueError(message)`, or counts it under `reason`."""
        if not self.skip:
            raise ValueError(message) from cause
        self.skipped[reason] += 1
        self.first = self.first or message
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

    def decode(self, key: str, data: bytes, check: Callable[[Any], Any]) -> Any:
        """The value in `data`, as `check` returns it; the ValueError for bad bytes or values says where they are."""
        extension = self.entries[key].extension
        try:
            return check(EXTENSIONS[extension].decode(data))
        except Exception as error:  # decoders of damaged bytes raise anything
            raise ValueError(f"{self.describe(key)}: cannot use this .{extension}: {error}") from error


def tar_entries(path: Path, stream: BinaryIO, faults: Faults) -> list[tuple[str, int, int]]:
    """Names, offsets and sizes of the files in a tar; of a damaged one those before the damage."""
    entries, others, damage = list[tuple[str, int, int]](), list[str](), None
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not 0 <= member.size <= end - member.offset_data:  # with less than 0 `tarfile` goes in circles
                    raise tarfile.ReadError(f"entry {member.name!r} has {member.size} bytes")
                if member.isfile() and not member.issparse():
                    entries.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    others.append(member.name)
            stream.seek(tar.offset)  # `tarfile` takes a damaged header for the end
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("there is no end mark")
    except (tarfile.TarError, OverflowError, MemoryError, RecursionError, ValueError) as error:  # of malicious headers
        damage = error
    for name in others:
        faults.meet("damaged", f"{path}: entry {name!r} is a link, device or sparse, expected a file")
    if damage is not None:
        message = f"{path}: the tar is truncated or damaged after {len(entries)} entries: {damage}"
        faults.meet("damaged", message, damage)
    return entries


def card_part(path: str | Path, data: bytes, part: str) -> dict[str, Any]:
    """What the bytes of a data card say of one thing, by name; a ValueError names the file if that is no object."""
    try:
        card = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = card.get(part, {}) if isinstance(card, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no data card, expected a JSON object, and another one under {part!r} if any")
    return found


def parse_name(name: str) -> tuple[str, str]:
    """Key (folders and all up to the first dot) and extension of an entry."""
    place, _, base = name.removeprefix("./").rpartition("/")
    key, _, extension = base.partition(".")
    return f"{place}/{key}" if place else key, extension.lower()


def index_folder(folder: Path, faults: Faults) -> Column:
    """Finds all values below one modality's folder."""
    shards = sorted(folder.glob("*.tar"))
    files = [] if shards else sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    found = [(path.relative_to(folder).as_posix(), path, 0, path.stat().st_size) for path in files]
    for path in shards:
        with open(path, "rb") as stream:
            found += [(name, path, offset, size) for name, offset, size in tar_entries(path, stream, faults)]
    if not found:
        faults.meet("missing", f"{folder}: no samples, expected shard-*.tar or files")
    return by_key(folder.name, found, faults)


def by_key(modality: str, found: Sequence[tuple[str, Path, int, int]], faults: Faults) -> Column:
    """Values by key, from names (of tar members or files), where they lie, offsets and sizes."""
    kinds = Counter(codec.kind for name, *_ in found if (codec := EXTENSIONS.get(parse_name(name)[1])))
    column = Column(modality, {})
    for name, path, offset, size in found:
        key, extension = parse_name(name)
        at = f"{modality}, {path}, key {key!r}"
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            faults.meet("name", f"{at}: the name {name!r} leads out of its folder")
        elif extension not in EXTENSIONS:
            advice = f" ({PICKLE_ADVICE})" if extension in PICKLES else ""
            allowed = ", ".join(EXTENSIONS)
            faults.meet("extension", f"{at}: extension {extension!r} is unknown{advice}, allowed are {allowed}")
        elif EXTENSIONS[extension].kind != (usual := kinds.most_common(1)[0][0]):
            faults.meet("extension", f"{at}: wrong extension {extension!r}, most of the others are of kind {usual}")
        elif key in column.entries:
            faults.meet("duplicate", f"{at}: the key is there twice, in {column.entries[key].path.name} before")
        else:
            column.entries[key] = Entry(extension, path, offset, size)
    return column


def aligned_keys(keys: Mapping[str, list[str]], describe: Callable[[str, str], str], faults: Faults) -> list[str]:
    """The keys that all modalities have; a key that one lacks, or another order, is a fault.

    Args:
        keys: Keys of each modality.
        describe: Says where a modality has a key.
        faults: What happens then.
    """
    first, *others = keys
    if all(keys[other] == keys[first] for other in others):
        return keys[first]
    has = {modality: set(names) for modality, names in keys.items()}
    common = set.intersection(*has.values())
    for key in dict.fromkeys(itertools.chain(*keys.values())):
        if key not in common:
            holder = next(modality for modality in keys if key in has[modality])
            lacking = ", ".join(modality for modality in keys if key not in has[modality])
            faults.meet("misaligned", f"{describe(holder, key)}: missing in {lacking}")
    for other in others:
        for key, twin in zip(keys[first], keys[other], strict=False):
            if key != twin and not faults.skip:
                raise ValueError(f"{describe(other, twin)}: wrong order, {first} has {key!r} in this place")
    return [key for key in keys[first] if key in common]


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
        columns = [index_folder(self.folder / name, self._faults) for name in self.modalities]
        self.columns = {column.modality: column for column in columns}
        keys = {column.modality: list(column.entries) for column in columns}
        self.keys = aligned_keys(keys, lambda name, key: self.columns[name].describe(key), self._faults)
        card = self.folder.parent / "card.json"
        rows = card_part(card, card.read_bytes(), "modalities") if card.is_file() else {}
        own = {name: rows[name] for name in self.modalities if isinstance(rows.get(name), dict)}
        self._dtypes = {name: row["dtype"] for name, row in own.items() if "dtype" in row}

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped samples by reason."""
        return dict(self._faults.skipped)

    def fingerprints(self) -> dict[str, str]:
        """What differs where samples were added, taken away, or are of another size in bytes.

        Of each modality the bytes of 64 samples, spread evenly, count too. Other bytes of the same size in the rest
        are not noticed.
        """
        found = hashlib.sha256()
        spread = np.linspace(0, len(self.keys) - 1, min(64, len(self.keys))).astype(int)
        for name, column in self.columns.items():
            found.update("".join(f"{name} {key} {column.entries[key].size}\n" for key in self.keys).encode())
            for i in spread:
                found.update(column.read(self.keys[i]))
        return {"data": found.hexdigest()[:12]}

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

    def sample(self, key: str) -> dict[str, Any]:
        """The sample of a key; ValueError where it cannot be read."""
        return {"__key__": key, **{name: self._value(name, key) for name in self.modalities}}

    def __getitem__(self, i: int) -> dict[str, Any]:
        first = range(len(self))[i]
        for step in range(len(self)):
            key = self.keys[(first + step) % len(self)]
            if key in self._bad:
                continue
            try:
                return self.sample(key)
            except ValueError as error:
                self._faults.meet("unreadable", str(error), error)
                self._bad.add(key)
        raise ValueError(f"{self.folder}: none of {len(self)} samples can be read")


# Tokens --------------------------------------------------------------------------------------------------------------


def check_tokens(row: Modality, value: Any, cropped: bool = False) -> list[np.ndarray]:
    """The crops of one sample's tokens, or a ValueError that says what is wrong with them.

    Args:
        row: Of the modality table.
        value: grid (crops, tokens) or (tokens,); text (crops, length) or (length,), ending with -1 where shorter;
            vectors (crops, length, dim) or (length, dim), ending with NaN where shorter; an image of patches; 4M's
            `t5_caption`, arrays `emb` and `mask_valid`.
        cropped: An image may have any size, as it is still to be cropped.

    Returns:
        Per crop: ids (tokens,) or (length,), vectors (length, dim), or pixels (height, width, channels).
    """
    if row.kind == "vectors" and isinstance(value, dict) and {"emb", "mask_valid"} <= set(value):
        value = np.where(value["mask_valid"][..., None], value["emb"], np.nan)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"expected an array, got {type(value).__name__}")
    found = f"{value.dtype} {value.shape}"
    if row.kind == "patches":
        high, wide = (side * row.patch_size for side in row.grid or ())
        value = value[..., None] if value.ndim == 2 else value
        grey = cropped and value.shape[2:] == (1,)  # cropping makes it three channels
        size = (*value.shape[:2], 1 if grey else row.channels) if cropped else (high, wide, row.channels)
        if value.dtype != np.uint8 or value.shape != size or not value.size:
            expected = f"of {row.channels} channels" if cropped else str((high, wide, row.channels))
            raise ValueError(f"expected a uint8 image {expected}, got {found}")
        return [value]
    if row.kind == "vectors":
        value = value[None] if value.ndim == 2 else value
        if value.dtype.kind != "f" or value.ndim != 3 or not len(value) or value.shape[2] != row.dim:
            raise ValueError(f"expected float vectors (crops, length, {row.dim}) or (length, {row.dim}), got {found}")
        value = value.astype(np.float32) if value.dtype.itemsize > 4 else value
        return [_before(~np.isnan(each).all(1), each)[: row.max_tokens] for each in value]
    if value.dtype.kind not in "iu":
        raise ValueError(f"expected integer ids, got {found}")
    if row.kind == "text":
        crops = value[None] if value.ndim == 1 else value
        if crops.ndim != 2 or not len(crops):
            raise ValueError(f"expected ids (crops, length) or (length,), got {found}")
        longest = row.max_tokens // row.chunk * row.chunk
        ids = [_before(each >= 0, each) if value.ndim == 2 else each for each in crops]
        rows = [each[:longest] for each in ids]
    else:
        value = value[None] if value.ndim == 1 else value
        if value.ndim != 2 or len(value) < 1 or value.shape[1] != row.length:
            raise ValueError(f"expected ids (crops, {row.length}) or ({row.length},), got {found}")
        ids = rows = list(value)
    every = np.concatenate(ids)
    if every.size and (every.min() < 0 or every.max() >= row.vocab_size):
        raise ValueError(f"ids in [{every.min()}, {every.max()}], expected [0, {row.vocab_size})")
    return rows


def _before(valid: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The part of a value in front of its padding; valid (length,), value (length, ...)."""
    length = int(valid.sum())
    if not valid[:length].all() or not np.isfinite(value[:length]).all():
        raise ValueError("padding or NaN lies between the tokens, expected it at the end")
    return value[:length]
