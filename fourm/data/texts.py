"""Texts as a data set of one modality: rows of local files or of a Hugging Face data set, tokenized chunk by chunk.

For training on texts alone beside other data (4M-21 adds C4). Rows are read as a stream, in their order, and packed
like any other shard, so each text is tokenized once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.utils import infer_compression

from fourm.data.shards import Faults, check_tokens
from fourm.data.tokens import FileSource, Reader, digest, row_stamp, user_cache
from fourm.modalities import Modality

CHUNK = 1000  # rows of a shard
FILES = (".txt", ".jsonl", ".json", ".parquet")


class TextSource(FileSource):
    """A source of a `TokenDataset`.

    Args:
        text: A file with a text in each line that is not blank (.txt), an object in each line (.jsonl, .json), both
            also compressed, or a table (.parquet); else the id of a data set on the Hugging Face hub.
        modality: Name of the modality that the texts become.
        row: Its row of the modality table.
        encode: Texts to ids, (length,) each.
        encoder: Differs where `encode` gives other ids.
        name: Configuration of a hub data set.
        split: Split of a hub data set.
        field: Where a row of a table holds the text.
        samples: How many rows are used, the first ones; must be given for the hub, default for files: all.

    Raises:
        ValueError: No such file, one of another kind, no number of samples, or the package `datasets` is needed and not
            installed.
    """

    streamed = True

    def __init__(
        self,
        text: str,
        modality: str,
        row: Modality,
        encode: Callable[[Sequence[str]], list[np.ndarray]],
        encoder: str,
        name: str | None = None,
        split: str = "train",
        field: str = "text",
        samples: int | None = None,
    ):
        self.name, self.names, self.row, self.encode, self.field = text, [modality], row, encode, field
        self.subset, self.split, self.encoder = name, split, encoder
        path, packed = Path(text), infer_compression(text)
        self.suffix = Path(path.stem).suffix if packed else path.suffix
        self.local = path.is_file() or bool(packed) or self.suffix in FILES
        if self.local and not path.is_file():
            raise ValueError(f"{text}: there is no such file")
        if self.local and (self.suffix not in FILES or (packed and self.suffix == ".parquet")):
            raise ValueError(f"{text}: expected a file .txt, .jsonl or .json, also compressed such as .gz, or .parquet")
        if not self.local and samples is None:
            raise ValueError(
                f"{text}: no file, so a data set of the hub, read as a stream; `samples` must say how many rows"
            )
        state = path.stat() if self.local else None
        self.version = digest(str(state and (state.st_size, state.st_mtime_ns)))
        self.listed = str(state and state.st_size)
        self.cache = user_cache(f"{path.resolve() if self.local else text}|{name}|{split}|{field}|{encoder}")
        self._stream: tuple[int, Iterator[Any]] = (0, self._rows(0))
        rows = sum(1 for _ in self._rows(0)) if samples is None else samples
        sizes = self.sizes = [min(CHUNK, rows - start) for start in range(0, rows, CHUNK)]
        self.shards = [f"rows-{shard * CHUNK:010d}-{size}" for shard, size in enumerate(sizes)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": (-1, iter(()))}

    def fingerprints(self) -> dict[str, str]:
        """Hash of the text tokenizer, the field, and what is read of the hub."""
        hub = {} if self.local else {"data set of the hub": f"{self.name}, {self.subset}, {self.split}"}
        return {f"tokenizer of {self.names[0]}": self.encoder, "field": self.field, **hub}

    def stamp(self, shard: int, name: str) -> str:
        """File-name suffix: hash of the modality row, dot, hash of the source file."""
        return f"{row_stamp(self.row)}.{self.version}"

    def read(self, shard: int, name: str, faults: Faults, bad: list[str]) -> Reader:
        """Number of the row as the key, and its ids."""
        start, size = shard * CHUNK, int(self.shards[shard].rpartition("-")[2])
        at, stream = self._stream
        stream = stream if at == start else self._rows(start)
        rows = {f"{start + i:010d}": row for i, row in enumerate(itertools.islice(stream, size))}
        self._stream = (start + size, stream)
        if len(rows) < size:
            raise ValueError(f"{self.name}: has only {start + len(rows)} rows, `samples` asks for more")

        def meet(key: str, error: ValueError) -> None:
            faults.meet("unreadable", f"{name}, {self.name}, row {key} ({str(rows[key])[:40]!r}): {error}", error)
            bad.append(key)

        texts = dict[str, str]()
        for key, row in rows.items():
            try:
                texts[key] = self._text(row)
            except ValueError as error:
                meet(key, error)
        for key, ids in zip(texts, self.encode(list(texts.values())), strict=True):
            try:
                yield key, check_tokens(self.row, ids)
            except ValueError as error:
                meet(key, error)

    def _rows(self, start: int) -> Iterator[Any]:
        """Rows from one on: lines of a file, or objects by field."""
        if self.local and self.suffix != ".parquet":
            try:
                with fsspec.open(self.name, "rt", encoding="utf-8", compression="infer") as lines:
                    yield from itertools.islice((line.strip() for line in lines if line.strip()), start, None)
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.name} is not text: {error}") from error
            return
        try:
            import datasets  # an extra: only those who read such data need it
        except ImportError as error:
            raise ValueError(f"{self.name} is read by the package `datasets`: pip install fourm[hf]") from error
        if self.local:
            rows = datasets.load_dataset("parquet", data_files=self.name, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
        yield from rows.skip(start)

    def _text(self, row: Any) -> str:
        if self.suffix == ".txt":
            return row
        row = json.loads(row) if isinstance(row, str) else row
        text = row.get(self.field) if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            fields = ", ".join(row) if isinstance(row, Mapping) else "none"
            raise ValueError(f"there is no text in {self.field!r}, the fields of the row are {fields}")
        return text
