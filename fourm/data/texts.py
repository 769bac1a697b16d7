"""Texts as a data set of one modality: rows of local files or of a Hugging Face data set, tokenized chunk by chunk.

For training on texts alone beside other data (4M-21 adds C4). Rows are read as a stream, in their order, and packed
like any other shard, so each text is tokenized once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from fourm.data.shards import Faults, check_tokens
from fourm.data.tokens import FileSource, Reader, digest, row_stamp, user_cache
from fourm.modalities import Modality

CHUNK = 1000  # rows of a shard
FILES = (".txt", ".jsonl", ".parquet", ".gz", ".xz", ".bz2", ".zst")


class TextSource(FileSource):
    """A source of a `TokenDataset`.

    Args:
        text: A file with a text in each line that is not blank (.txt), an object in each line (.jsonl), both also
            compressed, or a table (.parquet); else the id of a data set on the Hugging Face hub.
        modality: Name of the modality that the texts become.
        row: Its row of the modality table.
        encode: Texts to ids, (length,) each.
        encoder: Differs where `encode` gives other ids.
        name: Configuration of a hub data set.
        split: Split of a hub data set.
        field: Where a row of a table holds the text.
        samples: How many rows are used, the first ones; must be given for the hub, default for files: all.

    Raises:
        ValueError: No such file, no number of samples, or the package `datasets` is needed and not installed.
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
        self.subset, self.split = name, split
        self.local = text.endswith(FILES)
        if self.local and not Path(text).is_file():
            raise ValueError(f"{text}: there is no such file")
        if not self.local and samples is None:
            raise ValueError(f"{text}: a data set of the hub is read as a stream; `samples` must say how many rows")
        state = Path(text).stat() if self.local else None
        version = (state.st_size, state.st_mtime_ns) if state else (name, split)
        self.version = digest(str(version), field, encoder)
        self.cache = user_cache(f"{Path(text).resolve() if self.local else text}|{name}|{split}|{field}")
        self._stream: tuple[int, Iterator[str]] = (0, self._rows(0))
        rows = sum(1 for _ in self._rows(0)) if samples is None else samples
        sizes = self.sizes = [min(CHUNK, rows - start) for start in range(0, rows, CHUNK)]
        self.shards = [f"rows-{shard * CHUNK:010d}-{size}" for shard, size in enumerate(sizes)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": (-1, iter(()))}

    def stamp(self, shard: int, name: str) -> str:
        """How ids are checked, a dot, and what they are made from."""
        return f"{row_stamp(self.row)}.{self.version}"

    def read(self, shard: int, name: str, faults: Faults, bad: list[str]) -> Reader:
        """Number of the row as the key, and its ids."""
        start, size = shard * CHUNK, int(self.shards[shard].rpartition("-")[2])
        at, rows = self._stream
        rows = rows if at == start else self._rows(start)
        texts = list(itertools.islice(rows, size))
        self._stream = (start + size, rows)
        if len(texts) < size:
            raise ValueError(f"{self.name}: has only {start + len(texts)} rows, `samples` asks for more")
        for number, (text, ids) in enumerate(zip(texts, self.encode(texts), strict=True), start=start):
            key = f"{number:010d}"
            try:
                yield key, check_tokens(self.row, ids)
            except ValueError as error:
                faults.meet("unreadable", f"{name}, {self.name}, row {key} ({text[:40]!r}): {error}", error)
                bad.append(key)

    def _rows(self, start: int) -> Iterator[str]:
        """Texts from a row on."""
        if self.local and ".parquet" not in self.name:
            with fsspec.open(self.name, "rt", encoding="utf-8", compression="infer") as lines:
                filled = itertools.islice((line for line in lines if line.strip()), start, None)
                plain = ".jsonl" not in self.name
                yield from (line.strip() if plain else self._text(json.loads(line)) for line in filled)
            return
        try:
            import datasets  # an extra: only those who read such data need it
        except ImportError as error:
            raise ValueError(f"{self.name} is read by the package `datasets`: pip install fourm[hf]") from error
        if self.local:
            rows = datasets.load_dataset("parquet", data_files=self.name, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
        yield from map(self._text, rows.skip(start))

    def _text(self, row: Any) -> str:
        text = row.get(self.field)
        if not isinstance(text, str):
            raise ValueError(f"{self.name}: a row has no text in {self.field!r}, its fields are {', '.join(row)}")
        return text
