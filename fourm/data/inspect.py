"""What a folder of data holds and everything that is wrong with it, as a table and as a page with pictures."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image
from tqdm import tqdm

from fourm.checkpoint import read_json
from fourm.data.shards import EXTENSIONS, Column, Faults, check_tokens, index_folder
from fourm.data.tokens import CROPS
from fourm.modalities import Modality, TokenSpace

DRAWN = 2**18  # numbers behind a histogram, about
SPLITS = {"train", "val", "valid", "validation", "test"}


class Trouble(NamedTuple):
    """One thing that is wrong."""

    split: str
    modality: str
    reason: str
    message: str


class Collected(Faults):
    """Keeps all that is wrong with a modality instead of raising it."""

    def __init__(self, split: str, modality: str):
        super().__init__("skip")
        self.place, self.troubles = (split, modality), list[Trouble]()

    def meet(self, reason: str, message: str, cause: Exception | None = None) -> None:
        """Keeps it."""
        self.troubles.append(Trouble(*self.place, reason, message))


@dataclass
class Summary:
    """The values of one modality in one split.

    Attributes:
        split: Name of the split.
        found: Where they are.
        row: Of the modality table, for tokens.
        cropped: Pictures are of any size, as they are still to be cropped.
        dtype: What arrays must have; default: that of the first one.
        shapes: How many there are of each shape.
        types: How many there are of each dtype or Python type.
        ranges: Smallest, largest, sum and count of the numbers of each.
        drawn: Some of the numbers, for the histogram.
        lengths: Of texts in characters, of lists and token texts in items.
        ids: Token ids that occur.
        troubles: How many there are.
    """

    split: str
    found: Column
    row: Modality | None = None
    cropped: bool = False
    dtype: str = ""
    shapes: Counter[str] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[float, float, float, int]] = field(default_factory=list)
    drawn: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: set[int] = field(default_factory=set)
    troubles: int = 0

    def add(self, value: Any) -> None:
        """Counts a value; ValueError where there is something wrong with it."""
        self.types[str(getattr(value, "dtype", type(value).__name__))] += 1
        if not isinstance(value, np.ndarray):
            self.lengths += [len(value)] if hasattr(value, "__len__") else []
            if isinstance(value, str) and not value.strip():
                raise ValueError("the text is empty")
            return
        self.shapes["x".join(map(str, value.shape)) or "()"] += 1
        if self.row:
            check_tokens(self.row, value, self.cropped)
        finite = value[np.isfinite(value)] if value.dtype.kind == "f" else value.ravel()
        if self.row and self.row.discrete:
            finite = finite[finite >= 0]  # -1 is padding
            self.ids.update(np.unique(finite).tolist())
            self.lengths += np.atleast_1d((value >= 0).sum(-1)).tolist() if self.row.kind == "text" else []
        if finite.size:
            self.ranges.append((finite.min(), finite.max(), finite.sum(dtype=np.float64), finite.size))
            self.drawn.append(finite[:: finite.size * len(self.found.entries) // DRAWN + 1].copy())  # no view
        if not self.row and finite.size < value.size:
            raise ValueError(f"{value.size - finite.size:,} of {value.size:,} numbers are NaN or infinite")
        if not self.row and str(value.dtype) != (expected := self.dtype or next(iter(self.types))):
            raise ValueError(f"wrong type {value.dtype}, expected {expected}")

    def cells(self) -> dict[str, str]:
        """The line of the table."""
        low, high, total, count = zip(*self.ranges, strict=True) if self.ranges else ([], [], [], [])
        values = f"{min(low):.4g} to {max(high):.4g}, mean {sum(total) / sum(count):.4g}" if low else ""
        sizes = self.lengths
        lengths = f"{min(sizes)} to {max(sizes)}, mean {np.mean(sizes):.3g}" if sizes else ""
        if self.row and self.row.discrete:
            values += f", {len(self.ids):,} of {self.row.vocab_size:,} ids used"
            cut = sum(size > self.row.max_tokens for size in sizes)
            lengths += f", {cut:,} too long and cut" if cut else ""
        kinds = Counter(entry.extension for entry in self.found.entries.values())
        return {
            "split": self.split, "modality": self.found.modality, "samples": f"{len(self.found.entries):,}",
            "files": _most(kinds), "shape": _most(self.shapes), "type": _most(self.types),
            "values": values, "length": lengths, "trouble": f"{self.troubles:,}" if self.troubles else "",
        }  # fmt: skip

    def histogram(self) -> tuple[list[int], float, float]:
        """Of lengths where there are any, else of numbers: heights of bars in percent of the highest, left, right."""
        values = [np.array(self.lengths)] if self.lengths else self.drawn or [np.zeros(0)]
        counts, edges = np.histogram(np.concatenate(values).astype(np.float64), 40)
        return np.ceil(100 * counts / max(1, counts.max())).astype(int).tolist(), edges[0], edges[-1]


def _most(counts: Counter[str]) -> str:
    """What there is most of, and how much else there is."""
    names = [name for name, _ in counts.most_common()]
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others"


def splits(path: Path) -> list[Path]:
    """Folders of splits: those in `path`, or `path` itself where it holds folders of data.

    Keys may have folders of their own (`train/rgb/n01/x.png`), which only the usual names tell from splits.
    """

    def holds_data(folder: Path) -> bool:
        return any(child.suffix.lower()[1:] in ("tar", *EXTENSIONS) for child in folder.iterdir() if child.is_file())

    folders = sorted(child for child in path.iterdir() if child.is_dir() and child.name[0] != ".")
    if SPLITS & {folder.name for folder in folders}:
        return folders
    return [path] if path.absolute().name in SPLITS or any(map(holds_data, folders)) else folders


def beside(path: Path, name: str) -> Path:
    """A file in the root of the data, which for the folder of one split is that above it."""
    return path.absolute().parent / name if splits(path) == [path] and not (path / name).is_file() else path / name


def misaligned(split: str, columns: list[Column]) -> Iterator[Trouble]:
    """Every key that a modality lacks, and its first key in another place than in the first modality."""
    known = dict.fromkeys(itertools.chain.from_iterable(column.entries for column in columns))
    for column in columns:
        mine, first = column.entries, columns[0].entries
        for key in known:
            if key not in mine:
                holder = next(other for other in columns if key in other.entries).describe(key)
                yield Trouble(split, column.modality, "missing key", f"{holder}: not in {column.modality}")
        for key, other in zip(filter(first.__contains__, mine), filter(mine.__contains__, first), strict=True):
            if key != other:
                message = f"{column.describe(key)}: {columns[0].modality} has {other!r} in this place"
                yield Trouble(split, column.modality, "other order", message)
                break


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        path: The data.
        summaries: Of every modality of every split.
        troubles: All that is wrong.
        samples: Per split the modalities and, per shown key, a picture as a data URI or a text for each of them.
    """

    path: Path
    summaries: list[Summary] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    samples: dict[str, tuple[list[str], list[tuple[str, list[str]]]]] = field(default_factory=dict)

    def table(self) -> str:
        """The summaries as plain text."""
        lines = [summary.cells() for summary in self.summaries]
        rows = [list(lines[0]), *(list(line.values()) for line in lines)] if lines else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in padded)

    def reasons(self, examples: int = 3) -> Iterator[str]:
        """The troubles by split, modality and reason, each with its first examples."""
        for place, group in itertools.groupby(sorted(self.troubles), lambda trouble: trouble[:3]):
            messages = [trouble.message for trouble in group]
            yield f"{'/'.join(place[:2])}: {place[2]} ({len(messages):,})"
            yield from (f"    {message}" for message in messages[:examples])

    def write(self, output: Path) -> None:
        """Writes the page, one file without any other."""
        pages = Environment(loader=PackageLoader("fourm.data", "."), autoescape=select_autoescape(), trim_blocks=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(pages.get_template("inspect.html").render(found=self))


def inspect(path: str | Path, space: TokenSpace | None = None, samples: int = 6) -> Inspection:
    """Reads every value below a folder and says what there is and what is wrong; nothing raises.

    Args:
        path: Root of raw or token data with a folder for each split, or the folder of one split.
        space: The modality table of token data; None for raw data.
        samples: Samples shown of each split.
    """
    found = Inspection(Path(path))
    folders = splits(found.path)
    names = sorted({child.name for folder in folders for child in folder.iterdir() if child.is_dir()})
    names += [name for name in (space.names if space else ()) if name not in names]
    if not names:
        found.troubles.append(Trouble("", "", "no data", f"{path}: expected <split>/<modality>/ with shards or files"))
    card = beside(found.path, "card.json")
    rows = read_json(card).get("modalities", {}) if card.is_file() and not space else {}
    for folder in folders if names else ():
        faults = {name: Collected(folder.name, name) for name in names}
        columns = [index_folder(folder / name, faults[name]) for name in names]
        troubles = [trouble for name in names for trouble in faults[name].troubles]
        troubles += misaligned(folder.name, [column for column in columns if column.entries])
        for column in columns:
            row = space.modalities.get(column.modality) if space else None
            dtype = rows.get(column.modality, {}).get("dtype", "")
            summary = Summary(folder.name, column, row, CROPS in names, dtype)
            found.summaries.append(summary)
            for key in tqdm(column.entries, f"{folder.name}/{column.modality}", unit=" values", mininterval=1):
                try:
                    column.decode(key, column.read(key), summary.add)
                except ValueError as error:
                    troubles.append(Trouble(folder.name, column.modality, "value", str(error)))
            summary.troubles = sum(trouble.modality == column.modality for trouble in troubles)
        found.troubles += troubles
        keys = [key for key in columns[0].entries if all(key in column.entries for column in columns)]
        shown = keys[:: max(1, len(keys) // max(1, samples))][: max(0, samples)]
        found.samples[folder.name] = names, [(key, [_shown(column, key) for column in columns]) for key in shown]
    return found


def picture(value: Any) -> Image.Image | str:
    """A value to look at: pictures as they are, other numbers in two dimensions as shades, the rest in words."""
    if not isinstance(value, np.ndarray):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if value.ndim == 3 and value.shape[2] == 3 and value.dtype == np.uint8:
        return Image.fromarray(value)
    if value.ndim not in (2, 3) or not np.isfinite(value).any():
        return f"{value.dtype} {value.shape}: {np.array2string(value.ravel(), threshold=16)}"
    shades = value.astype(np.float64) if value.ndim == 2 else value.mean(-1, dtype=np.float64)
    low, high = np.nanmin(shades), np.nanmax(shades)
    colours = matplotlib.colormaps["gray" if value.dtype == np.uint8 else "viridis"]
    return Image.fromarray(np.round(255 * colours((shades - low) / max(high - low, 1e-12))[..., :3]).astype(np.uint8))


def _shown(column: Column, key: str) -> str:
    """A value as the page has it: the data URI of a picture, or words."""
    try:
        drawn = column.decode(key, column.read(key), picture)
    except ValueError as error:
        return str(error)
    if isinstance(drawn, str):
        return drawn if len(drawn) < 400 else f"{drawn[:400]} ..."
    drawn.thumbnail((128, 128))
    file = io.BytesIO()
    drawn.save(file, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
