"""Tokens of one split for training, of any size: every shard is packed once, then read through the page cache.

A packed file holds one modality of one shard, checked and ready: it is a safetensors file of `values` (all items end to
end), `rows` (where each crop begins), `starts` (which crop is the first of each sample) and `notes` (keys and faults,
JSON). Its name says what it was made from, so a changed shard is packed anew. It is written aside and renamed, by
one process while the others wait, and mapped into memory by all of them.

    <root>/.packed/<split>/<modality>/<shard>.<row of the table>.<contents>.safetensors
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import threading
from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
from braceexpand import braceexpand
from filelock import FileLock, Timeout
from tqdm import tqdm

from fourm.checkpoint import read_json
from fourm.data.loader import WINDOW, Order
from fourm.data.shards import (
    EXTENSIONS,
    Faults,
    aligned_keys,
    by_key,
    card_part,
    check_tokens,
    parse_name,
    tar_entries,
)
from fourm.data.transforms import Map, Picture, View
from fourm.modalities import Modality, TokenSpace

FORMAT = 1  # of packed files; part of their names
CROPS = "crop_settings"  # the folder beside the modalities
FOLDER_SHARD = 4096  # samples of plain folders that make a shard
HEADER = 4096  # bytes in front of the values, known last

# Packed files --------------------------------------------------------------------------------------------------------

Info = dict[str, Any]  # what a file system says of a file
Reader = Iterator[tuple[str, list[np.ndarray]]]  # keys, and the crops of each


def write_packed(path: Path, samples: Reader, vocab: int, faults: Faults, bad: list[str]) -> None:
    """Packs samples as they come.

    Args:
        path: The file.
        samples: Keys and crops, (items, ...) each.
        vocab: Ids are below it; 0 for values that are no ids, and then of one type.
        faults: What was met meanwhile; noted with the keys.
        bad: Keys that were met so.
    """
    keys, rows, starts = list[str](), array("q", [0]), array("q", [0])
    dtype: np.dtype[Any] = np.dtype("u1")
    item: tuple[int, ...] = ()
    with open(path, "wb", buffering=2**20) as stream:
        stream.seek(HEADER)
        for key, crops in samples:
            if not keys:
                dtype, item = crops[0].dtype.newbyteorder("="), crops[0].shape[1:]
                dtype = np.dtype("i4") if vocab and np.iinfo(dtype).max < vocab - 1 else dtype
            for crop in crops:
                stream.write(np.ascontiguousarray(crop, dtype).data)
                rows.append(rows[-1] + len(crop))
            starts.append(len(rows) - 1)
            keys.append(key)
        end = stream.tell() - HEADER
        kind = f"{dtype.kind.upper()}{8 * dtype.itemsize}"  # as safetensors calls it
        header = {"values": {"dtype": kind, "shape": [rows[-1], *item], "data_offsets": [0, end]}}
        notes = json.dumps({"keys": keys, "bad": bad, "skipped": faults.skipped, "first": faults.first}).encode()
        notes += b" " * (-(end + len(notes)) % 8)
        for name, kind, data in (("notes", "U8", notes), ("rows", "I64", rows), ("starts", "I64", starts)):
            size = memoryview(data).nbytes
            header[name] = {"dtype": kind, "shape": [len(data)], "data_offsets": [end, end + size]}
            end += stream.write(data)
        stream.seek(0)
        stream.write((HEADER - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER - 8))


class Packed:
    """A packed file, mapped into memory.

    Attributes:
        values: (items, ...).
        notes: JSON of keys and faults.
    """

    def __init__(self, path: Path):
        def tensor(name: str) -> np.ndarray:
            entry = header[name]
            kind, shape, (begin, _) = entry["dtype"], entry["shape"], entry["data_offsets"]
            dtype = np.dtype(f"{kind[0].lower()}{int(kind[1:]) // 8}")
            return np.frombuffer(self._map, dtype, math.prod(shape), size + begin).reshape(shape)

        try:
            with open(path, "rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # copied only if somebody writes
            size = 8 + int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8:size])
            self.values, notes, rows, starts = map(tensor, ("values", "notes", "rows", "starts"))
            self.notes = notes.tobytes()
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} is not a packed file: {error}; delete it, and it is made anew") from error
        self._rows, self._starts = rows.data, starts.data  # views of memory give integers quicker than arrays

    def __len__(self) -> int:
        return len(self._starts) - 1

    def crops(self) -> np.ndarray:
        """Crops of each sample, (samples,)."""
        return np.diff(self._starts)

    def lengths(self) -> bytes:
        """Differs where items belong to other crops or samples."""
        return spread_bytes(np.asarray(self._rows), 1) + spread_bytes(np.asarray(self._starts), 1)

    def get(self, crop: int, i: int) -> np.ndarray:
        """Value of sample i, (items, ...), of the crop, counted on from the first after the last."""
        start, stop = self._starts[i], self._starts[i + 1]
        row = start + crop % (stop - start)
        return self.values[self._rows[row] : self._rows[row + 1]]


# Where tokens come from ----------------------------------------------------------------------------------------------


class FileSource:
    """Token shards below a folder, here or at any place that fsspec reads. Other sources are derived from it.

    Args:
        path: `root/<split>`, also `s3://`, `hf://` or `https://`; or `root/[rgb,caption]/shard-{00..99}.tar` as in 4M.
            What is not there for a modality `name@size` is looked for in the folder `name`.
        space: The modalities.

    Attributes:
        name: For messages.
        names: What is packed: modalities, and crop settings if there are any.
        shards: Names of the shards.
        sizes: Samples of each shard, where that is known without reading.
        streamed: Shards are best read in their order.
        listed: Differs where the files have other names or sizes, as far as they were listed with their sizes.
        cache: Folder of the packed files.

    Raises:
        ValueError: Nothing there, a modality without folder, or a file system whose package is not installed.
    """

    names: list[str]
    shards: list[str]
    sizes: list[int] | None = None
    streamed = False
    listed: str
    cache: Path

    def __init__(self, path: str, space: TokenSpace):
        self.name, self.space = path, space
        brackets = re.fullmatch(r"(.+?)/*\[([^\]]+)\]/(.+)", path)
        self._url = brackets[1] if brackets else path.rstrip("/")
        fs, root = self._open()
        named = {name.strip() for name in brackets[2].split(",")} if brackets else set()
        found = {base(info["name"]) for info in listed(fs, root) if info["type"] == "directory"}
        present = sorted((named | {CROPS}) & found if named and found else named | found)  # not every server can list
        self._folder = {name: name if name in present else name.partition("@")[0] for name in (*space.names, CROPS)}
        missing = [name for name in space.names if self._folder[name] not in present]
        if missing:
            there = f"there are {', '.join(present)}" if present else "there is none"
            raise ValueError(f"{path}: no folder for modality {', '.join(missing)}, {there}")
        cropped = CROPS in present and any(row.kind == "patches" for row in space.modalities.values())
        self.names = [*space.names, *([CROPS] if cropped else [])]
        self._files: dict[str, dict[str, dict[str, Info]]] = {}  # by modality, shard, and name below the folder
        number: dict[str, int] = {}  # of the samples of plain folders
        for name in self.names:
            folder = f"{root}/{self._folder[name]}"
            files = {base(info["name"]): info for info in listed(fs, folder) if info["type"] == "file"}
            if brackets:
                asked = list(braceexpand(brackets[3]))
                lost = [file for file in asked if files and file not in files]
                if lost:
                    raise ValueError(f"{path}: {name} lacks {len(lost)} of {len(asked)} shards, such as {lost[0]}")
                files = {file: files.get(file, {"name": f"{folder}/{file}"}) for file in asked}
            shards = self._files[name] = {file: {file: files[file]} for file in sorted(files) if file.endswith(".tar")}
            if shards:
                continue
            below = fs.find(folder, detail=True)
            names = [where[len(folder) + 1 :] for where in below]
            for file in sorted(names, key=lambda file: file.split("/")):
                if not base(file).startswith("."):
                    place = number.setdefault(parse_name(file)[0], len(number)) // FOLDER_SHARD
                    shards.setdefault(f"files-{place:06d}", {})[file] = below[f"{folder}/{file}"]
        self.shards = sorted({shard for shards in self._files.values() for shard in shards})
        if not self.shards:
            raise ValueError(f"{path}: no samples, expected shard-*.tar or files")
        tars = [name for name, shards in self._files.items() if any(file.endswith(".tar") for file in shards)]
        plain = [name for name, shards in self._files.items() if shards and name not in tars]
        if tars and plain:
            raise ValueError(
                f"{path}: there are tars in {', '.join(tars)} and plain files in {', '.join(plain)}, "
                "expected all modalities as tars, or all as plain files"
            )
        self.listed = self._listed()
        beside = Path(root).parent
        if "file" in fs.protocol and os.access(beside, os.W_OK):
            self.cache = beside / ".packed" / base(root)
        else:
            self.cache = user_cache(fs.unstrip_protocol(root))

    def fingerprints(self) -> dict[str, str]:
        """Hash of the tokenizer of each modality, as far as the card of the tokens names them."""
        fs, root = self._open()
        card = f"{root.rpartition('/')[0]}/card.json"
        made = card_part(card, fs.cat_file(card), "tokenizers") if fs.exists(card) else {}
        return {f"tokenizer of {name}": digest(str(made[name])) for name in self.names if name in made}

    def _listed(self) -> str:
        found = hashlib.sha256()
        for name in self.names:
            for files in self._files[name].values():
                found.update("".join(f"{name} {file} {info.get('size')}\n" for file, info in files.items()).encode())
        return found.hexdigest()

    def _open(self) -> tuple[Any, str]:
        """The file system, which must be opened anew in every process, and the path on it."""
        try:
            return fsspec.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}; `pip install fourm[remote]` brings s3:// and https://") from error

    def stamp(self, shard: int, name: str) -> str:
        """File-name suffix: hash of the modality row, dot, hash of what the file system says of the source files."""
        stamps = []
        for file, info in self._files[name].get(self.shards[shard], {}).items():
            if info.get("size") is None:  # lists of web servers are links only
                info.update(self._open()[0].info(info["name"]))
            date = "mtime" if "mtime" in info else "created"
            marks = ("size", date, "ETag", "blob_id", "LastModified", "Last-Modified")
            stamps.append(str((file, *map(info.get, marks))))
        return f"{row_stamp(self.space.modalities.get(name), CROPS in self.names)}.{digest(*stamps)}"

    def bytes_of(self, name: str) -> int:
        """Size of all files of a modality."""
        return sum(info.get("size") or 0 for files in self._files[name].values() for info in files.values())

    def read(self, shard: int, name: str, faults: Faults, bad: list[str]) -> Reader:
        """Keys and checked crops; of an image that is still to be cropped its bytes."""
        fs, _ = self._open()
        files = self._files[name].get(self.shards[shard], {})
        where = {Path(info["name"]): info["name"] for info in files.values()}
        found, tars = list[tuple[str, Path, int, int]](), dict[Path, bytes]()
        for file, path in zip(files, where, strict=True):
            if file.endswith(".tar"):
                tars[path] = fs.cat_file(where[path])
                entries = tar_entries(path, io.BytesIO(tars[path]), faults)
                found += [(member, path, offset, size) for member, offset, size in entries]
            else:
                found.append((file, path, 0, 0))
        column, row = by_key(name, found, faults), self.space.modalities.get(name)
        encoded = row is not None and row.kind == "patches" and CROPS in self.names
        types: set[np.dtype] = set()

        def check(value: Any) -> list[np.ndarray]:
            crops = check_crops(value) if row is None else check_tokens(row, value, encoded)
            types.add(crops[0].dtype)
            if len(types) > 1 and not (row and row.discrete):
                raise ValueError(f"wrong type {types.pop()}, the others are {types.pop()}")
            return crops

        for key, (_, path, offset, size) in column.entries.items():
            data = tars[path][offset : offset + size] if path in tars else fs.cat_file(where[path])
            try:
                crops = column.decode(key, data, check)
            except ValueError as error:
                faults.meet("unreadable", str(error), error)
                bad.append(key)
            else:
                yield key, [np.frombuffer(data, np.uint8)] if encoded else crops


def check_crops(value: Any) -> list[np.ndarray]:
    """The rows of crop settings, (5,) each."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.shape[1:] != (5,) or not len(value):
        raise ValueError("expected integers (crops, 5): top, left, height, width, hflip")
    return list(value.astype(np.int64))


def listed(fs: Any, folder: str) -> list[Info]:
    """What is in a folder; nothing where there is none."""
    try:
        return fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def base(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def digest(*parts: str) -> str:
    """Twelve letters that differ where the parts differ."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def spread_bytes(values: np.ndarray, run: int) -> bytes:
    """The bytes of at most 2**16 values, in runs that are spread evenly, the first and the last included."""
    flat = values.reshape(-1)
    if flat.size <= 2**16:
        return flat.tobytes()
    starts = np.linspace(0, flat.size - run, 2**16 // run).astype(np.int64)
    return flat[starts[:, None] + np.arange(run)].tobytes()


def row_stamp(row: Modality | None, *more: Any) -> str:
    """Differs where values are checked or packed in another way."""
    fields = ("kind", "vocab_size", "grid", "max_tokens", "patch_size", "channels", "dim", "chunk")
    return digest(str(FORMAT), *(str(getattr(row, each, None)) for each in fields), *map(str, more))


def user_cache(url: str) -> Path:
    """Where data are packed that cannot be packed beside their source."""
    home = Path(os.environ.get("FOURM_CACHE") or "~/.cache/fourm").expanduser()
    return home / "packed" / f"{re.sub(r'[^-_.A-Za-z0-9]+', '-', base(url))}-{digest(url)}"


# The data set --------------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A shard that can be read: keys of the good samples, and per modality their place in a packed file (None: i)."""

    keys: list[str]
    columns: dict[str, tuple[Packed, list[int] | None]]


class TokenDataset:
    """Tokens of one split for training, of any size.

    `dataset[epoch, i]` or `dataset[i]` is `{"__key__": key, modality: tokens}`: grid (tokens,) ids, text (length,) ids
    without end, cut to `max_tokens`, patches uint8 (H, W, C), vectors (length, dim). Of a sample with several crops it
    is crop `(epoch + i) % crops` of every modality, so that an epoch shows all kinds; `dataset[i]` is crop 0. Where
    there are `crop_settings`, images are cropped by them when they are asked for. The arrays are views of the packed
    files: do not write into them.

    Up to `WINDOW` shards are packed at opening, and bad samples left out. More are packed when they are needed or soon
    will be; at opening only the smallest modality of each, for the number of samples. A bad sample then gives way to
    another one of its shard.

    Args:
        source: `root/<split>` with one folder per modality of the space (see `FileSource`), or a source of another
            kind.
        space: The modalities; ids are checked against their vocabularies, shapes against their grids.
        on_error: `raise` a ValueError that names shard, key and modality; or `skip`: log, count, leave the sample out.
        max_bad: Share of the samples that may be left out, by all processes of a machine together; one may in any case.

    Attributes:
        sizes: Samples of each shard.

    Raises:
        ValueError: As `ShardDataset`; ids outside the vocabulary, of the wrong dtype or number; samples whose
            modalities have different numbers of crops; too many bad samples, or no good one at all.
    """

    by_epoch = True  # tells the loader to ask for (epoch, index)

    def __init__(
        self,
        source: str | Path | FileSource,
        space: TokenSpace,
        on_error: Literal["raise", "skip"] = "raise",
        max_bad: float = 0.01,
    ):
        self.source = FileSource(str(source), space) if isinstance(source, str | Path) else source
        self.space, self.on_error, self.max_bad = space, on_error, max_bad
        self._opened: OrderedDict[int, Opened] = OrderedDict()
        self._found = 0  # samples in the shards that were opened, bad ones too
        self._records: dict[str, dict[str, Any]] = {}  # of shards with faults
        self._number = {name: number for number, name in enumerate(self.source.shards)}
        self._asked: set[int] = set()
        shards = range(len(self.source.shards))
        if len(shards) <= WINDOW:
            self._pack(shards, self.source.names, describe=self.source.name)
            self.sizes = [len(self._open(shard).keys) for shard in shards]
        else:
            self.sizes = self.source.sizes or self._count()
        self._ends = list(accumulate(self.sizes))
        self._check_bad(self._found or len(self))
        if not self._ends[-1]:
            raise ValueError(f"{self.source.name}: no good samples, skipped are {self.skipped}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict(), "_asked": set()}

    @functools.cached_property
    def keys(self) -> list[str]:
        """Names of the samples; of many shards this packs all of them."""
        return [key for shard in range(len(self.sizes)) for key in self._open(shard).keys]

    @property
    def skipped(self) -> dict[str, int]:
        """Faults by reason, whichever process of this machine met them."""
        return dict(sum((Counter(record["faults"]) for record in self._left_out()), Counter[str]()))

    def _left_out(self) -> list[dict[str, Any]]:
        """Of each shard with faults how many samples are left out, as any process of this machine wrote it down."""
        folder = self.source.cache / "left_out"
        for name in {*os.listdir(folder)} - self._records.keys() if folder.is_dir() else ():
            shard = self._number.get(name.rsplit(".", 2)[0])
            ours = shard is not None and name == self._record(shard)
            self._records[name] = read_json(folder / name) if ours else {"lost": 0, "faults": {}}
        return list(self._records.values())

    def fingerprints(self) -> dict[str, str]:
        """What differs where the samples do, by name; the same for a copy.

        The samples are their number, keys, lengths and values. Of each modality of a shard at most 2**16 values count,
        spread evenly: single ids, or runs of 64 where they are pixels or floats. Of more than `WINDOW` shards those of
        the first count, and of the others number, names and sizes of the files, where the file system lists sizes (web
        servers do not): other tokens of the same size in bytes are not noticed there.
        """
        source, parts = self.source, list[str]()
        few = len(self.sizes) <= WINDOW
        for shard in range(len(self.sizes) if few else 1):
            opened = self._open(shard)
            parts += opened.keys
            for name, (packed, _) in opened.columns.items():
                row = self.space.modalities.get(name)
                values = spread_bytes(packed.values, 1 if row is None or row.discrete else 64)
                parts += [hashlib.sha256(each).hexdigest() for each in (values, packed.lengths())]
        data = digest(*source.names, *source.shards, *map(str, self.sizes), *parts, *([] if few else [source.listed]))
        return {"data": data, "modalities": ", ".join(self.space.names), **source.fingerprints()}

    def _record(self, shard: int) -> str:
        """Name of the file that holds the faults of a shard."""
        stamps = [name + self.source.stamp(shard, name) for name in self.source.names]
        return f"{self.source.shards[shard]}.{digest(*stamps)}.json"

    def _target(self, shard: int, name: str) -> Path:
        """The packed file of a modality."""
        file = f"{self.source.shards[shard]}.{self.source.stamp(shard, name)}.safetensors"
        return self.source.cache / name / file

    def _count(self) -> list[int]:
        """Samples of each shard, from the smallest modality."""
        smallest = min(self.space.names, key=lambda n: (self.source.bytes_of(n), self.space[n].kind == "patches"))
        shards = range(len(self.source.shards))
        self._pack(shards, [smallest], describe=f"{self.source.name}, {smallest}")
        self._pack(shards, [smallest], wait=True)
        return [len(Packed(self._target(shard, smallest))) for shard in shards]

    def prepare(self, indices: Sequence[int]) -> None:
        """Starts to pack the shards of some samples in the background, those that no other process is packing."""
        if len(self.sizes) > WINDOW:
            shards = [bisect_right(self._ends, i) for i in indices]
            new = [shard for shard in shards if shard not in self._asked]
            self._asked.update(new)
            if new:
                threading.Thread(target=self._pack_ahead, args=(new,), daemon=True).start()

    def _pack_ahead(self, shards: Sequence[int]) -> None:
        with contextlib.suppress(ValueError):  # whoever opens the shard will raise it
            self._pack(shards, self.source.names)

    def _pack(
        self, shards: Sequence[int], names: Sequence[str], wait: bool = False, describe: str | None = None
    ) -> None:
        """Packs what is missing; of what another process is packing it waits for the end, or goes past it."""
        missing = [shard for shard in shards if not all(self._target(shard, name).exists() for name in names)]
        streamed = self.source.streamed
        for group in tqdm([missing] * bool(missing) if streamed else [[shard] for shard in missing],
                          describe, unit=" shards", mininterval=1, delay=1, disable=not describe):  # fmt: skip
            self.source.cache.mkdir(parents=True, exist_ok=True)
            lock = f"{'stream' if streamed else self.source.shards[group[0]]}.lock"
            with contextlib.suppress(Timeout), FileLock(self.source.cache / lock, timeout=-1 if wait else 0):
                for shard, name in itertools.product(group, names):
                    if not self._target(shard, name).exists():
                        self._write(shard, name)

    def _write(self, shard: int, name: str) -> None:
        """Packs one modality of a shard, and removes what was packed of its former contents."""
        target, faults, bad = self._target(shard, name), Faults(self.on_error), list[str]()
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        row = self.space.modalities.get(name)
        try:
            write_packed(aside, self.source.read(shard, name, faults, bad), row.vocab_size if row else 0, faults, bad)
            same_row = target.name.removesuffix(".safetensors").rpartition(".")[0]
            for old in target.parent.glob(f"{glob.escape(same_row)}.*.safetensors"):
                old.unlink(missing_ok=True)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def _open(self, shard: int) -> Opened:
        """Maps a shard and aligns its modalities."""
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        source, faults = self.source, Faults(self.on_error)
        first, last = shard, shard + 1
        if source.streamed:  # packed in its order
            first = shard - shard % WINDOW
            last = min(first + WINDOW, len(source.shards))
        self._pack(range(first, last), source.names, wait=True)
        packed = {name: Packed(self._target(shard, name)) for name in source.names}
        notes = {name: json.loads(each.notes) for name, each in packed.items()}
        bad: set[str] = set()
        for each in notes.values():
            if each["skipped"] and not faults.skip:
                raise ValueError(each["first"])
            faults.skipped.update(each["skipped"])
            bad.update(each["bad"])

        def describe(name: str, key: str) -> str:
            return f"{name}, {source.name}, {source.shards[shard]}, key {key!r}"

        keys = aligned_keys(
            {name: [key for key in each["keys"] if key not in bad] for name, each in notes.items()}, describe, faults
        )
        places = {name: {key: i for i, key in enumerate(each["keys"])} for name, each in notes.items()}
        crops = np.stack([each.crops()[[places[name][key] for key in keys]] for name, each in packed.items()])
        odd = ((crops != 1) & (crops != crops.max(axis=0, initial=1))).any(axis=0)
        for i in np.flatnonzero(odd):
            numbers = ", ".join(f"{name} {count}" for name, count in zip(packed, crops[:, i], strict=True) if count > 1)
            faults.meet("crops", f"{describe(self.space.names[0], keys[i])}: numbers of crops differ: {numbers}")
        keys = [key for key, wrong in zip(keys, odd, strict=True) if not wrong]
        total = len(bad.union(*places.values()))
        columns = {
            name: (each, None if notes[name]["keys"] == keys else [places[name][key] for key in keys])
            for name, each in packed.items()
        }
        self._opened[shard], self._found = Opened(keys, columns), self._found + total
        if len(self._opened) > 2 * WINDOW:
            self._opened.popitem(last=False)
        if faults.skipped and not (record := source.cache / "left_out" / self._record(shard)).exists():
            record.parent.mkdir(exist_ok=True)
            aside = record.with_name(f".{record.name}.{os.getpid()}")
            aside.write_text(json.dumps({"lost": total - len(keys), "faults": faults.skipped}))
            aside.replace(record)
            if len(source.shards) > WINDOW:
                self._check_bad(len(self))
        return self._opened[shard]

    def _check_bad(self, samples: int) -> None:
        lost = sum(record["lost"] for record in self._left_out())
        if self.on_error == "skip" and lost > max(1, self.max_bad * samples):
            raise ValueError(
                f"{self.source.name}: {lost} of {samples} samples are bad ({self.skipped}), max_bad {self.max_bad} "
                f"allows {int(max(1, self.max_bad * samples))}"
            )

    def order(self, seed: int) -> Order:
        """The order of training."""
        return Order(self.sizes, seed, self.source.streamed)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, draw: int | tuple[int, int]) -> dict[str, Any]:
        i = range(len(self))[draw[1] if isinstance(draw, tuple) else draw]
        crop = draw[0] + i if isinstance(draw, tuple) else 0
        shard = bisect_right(self._ends, i)
        place = i - self._ends[shard] + self.sizes[shard]
        for other in range(shard, shard + len(self.sizes)):
            if (opened := self._open(other % len(self.sizes))).keys:
                break
        else:
            raise ValueError(f"{self.source.name}: no good samples, skipped are {self.skipped}")
        place %= len(opened.keys)
        sample: dict[str, Any] = {"__key__": opened.keys[place]}
        for name, (packed, places) in opened.columns.items():
            sample[name] = packed.get(crop, place if places is None else places[place])
        return self._crop(sample) if CROPS in sample else sample

    def _crop(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Crops the images of a sample, all in the same way."""
        settings = sample.pop(CROPS)[None]
        for name, row in self.space.modalities.items():
            if row.kind == "patches" and row.grid:
                data = sample[name].tobytes()
                image = EXTENSIONS["npy" if data[:6] == b"\x93NUMPY" else "png"].decode(data)
                size = (row.grid[0] * row.patch_size, row.grid[1] * row.patch_size)
                image = image[..., 0] if image.shape[2:] == (1,) else image
                view = View.of(settings, 0, *image.shape[:2])
                sample[name] = Map(size)(image, view)[..., None] if row.channels == 1 else Picture(size)(image, view)
        return sample
