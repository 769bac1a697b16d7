"""Modalities as data: one row describes one modality, `TokenSpace` lays all rows out in one token space.

A model never hears the name of a modality. It sees three integers per token: a row of the one token table, a row of
the one position table, and the index of the modality. This file is where names become those integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

KINDS = ("grid", "text", "patches", "vectors")


@dataclass(frozen=True)
class Modality:
    """One row of the modality table.

    The four kinds: `grid` (h x w ids, predicted in parallel), `text` (ids in order, span-masked, predicted left to
    right), `patches` (pixels, input only) and `vectors` (a sequence of float vectors, input only).

    Args:
        kind: One of `grid`, `text`, `patches`, `vectors`.
        vocab_size: Number of ids (grid, text).
        vocab: Name of the vocabulary slice. Rows with the same name share one slice; default: the modality's own name.
        grid: Rows and columns of tokens (grid, patches).
        max_tokens: Longest sequence (text, vectors); text is truncated to it.
        patch_size: Side of a pixel patch (patches).
        channels: Channels of the image (patches).
        mean: Subtracted from pixels in [0, 1], one value per channel (patches).
        std: Divides the pixels after `mean` was subtracted (patches).
        dim: Width of one vector (vectors).
        chunk: Text is masked in groups of this many ids, and the groups come in random order where it is above 1
            (metadata: pairs of type and value).
        eos: Id that ends a text.
        first_sentinel: Id of the sentinel `[S_0]`; `[S_i]` follows i ids later. Spans use `[S_1]`, `[S_2]`, ...
        sentinels: How many sentinels there are.
        learned_positions: Learn the position table instead of sines and cosines.
        decoder_positions: Positions from here on are 0 to the decoder (4M's `human_poses`); 0: none are.
        input: May be given to the encoder.
        output: May be predicted (grid, text only).
        source: Name of the raw modality it is made from; default: the modality's own name.
        tokenizer: Folder of its tokenizer below the tokenizers' root, or a Hugging Face hub id; default: `source`.
    """

    kind: Literal["grid", "text", "patches", "vectors"]
    vocab_size: int = 0
    vocab: str | None = None
    grid: tuple[int, int] | None = None
    max_tokens: int = 0
    patch_size: int = 0
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dim: int = 0
    chunk: int = 1
    eos: int = 3
    first_sentinel: int = 4
    sentinels: int = 200
    learned_positions: bool = False
    decoder_positions: int = 0
    input: bool = True
    output: bool = True
    source: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        needed = {"grid": ("vocab_size", "grid"), "text": ("vocab_size", "max_tokens"),
                  "patches": ("grid", "patch_size"), "vectors": ("dim", "max_tokens")}  # fmt: skip
        if self.kind not in needed:
            raise ValueError(f"kind is {self.kind!r}, allowed are {', '.join(KINDS)}")
        missing = [field for field in needed[self.kind] if not getattr(self, field)]
        if missing:
            raise ValueError(f"a modality of kind {self.kind!r} needs {' and '.join(missing)}")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid is {self.grid}, expected two positive numbers (rows, columns)")

    @property
    def length(self) -> int:
        """Rows of the position table it owns: cells of the grid, or the longest sequence.

        A text can fill `max_tokens` ids with a sentinel around every one of them.
        """
        if self.grid is not None:
            return self.grid[0] * self.grid[1]
        return 2 * self.max_tokens + 2 if self.kind == "text" else self.max_tokens

    @property
    def discrete(self) -> bool:
        """Whether its tokens are ids (grid, text) rather than float vectors (patches, vectors)."""
        return self.kind in ("grid", "text")

    @property
    def predicted(self) -> bool:
        """Whether the decoder may be asked for it."""
        return self.output and self.discrete

    @property
    def width(self) -> int:
        """Floats in one token of a continuous modality."""
        return self.channels * self.patch_size**2 if self.kind == "patches" else self.dim


class TokenSpace:
    """All modalities in one token space.

    Vocabularies lie end to end in one token table of `vocab_size` rows, positions end to end in one table of
    `positions` rows. Arrays indexed by modality number (`vocab_offset`, `position_offset`, `length`, `is_grid`) let
    callers work on all modalities at once.

    Args:
        modalities: Rows by name; their order is the order of modality numbers.

    Raises:
        ValueError: An empty table, a name that is a path, or modalities that share a vocabulary but differ in its size.
    """

    def __init__(self, modalities: Mapping[str, Modality]):
        if not modalities:
            raise ValueError("the modality table is empty, expected at least one modality")
        for name in modalities:
            if not name or name[0] == "." or any(letter in name for letter in "/\\\0"):
                raise ValueError(f"modality {name!r}: files are called by the name, it must not be a path")
        self.modalities = dict(modalities)
        self.names = list(self.modalities)
        self.number = {name: number for number, name in enumerate(self.names)}
        rows = list(self.modalities.values())

        self.vocabularies: dict[str, slice] = {}
        for name, row in self.modalities.items():
            if not row.discrete:
                continue
            vocab, start = row.vocab or name, self.vocab_size
            known = self.vocabularies.setdefault(vocab, slice(start, start + row.vocab_size))
            if known.stop - known.start != row.vocab_size:
                raise ValueError(
                    f"{name} has vocab_size {row.vocab_size}, but the shared vocabulary {vocab!r} already has "
                    f"{known.stop - known.start} ids; they must agree"
                )
        self.length = np.array([row.length for row in rows])
        self.position_offset = np.concatenate([[0], np.cumsum(self.length)[:-1]])
        self.positions = int(self.length.sum())
        self.vocab_offset = np.array(
            [self.vocabularies[row.vocab or name].start if row.discrete else 0 for name, row in self.modalities.items()]
        )
        self.is_grid = np.array([row.kind in ("grid", "patches") for row in rows])

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        return max((ids.stop for ids in self.vocabularies.values()), default=0)

    def vocabulary(self, name: str) -> slice:
        """Rows of the token table that hold the ids of a grid or text modality."""
        return self.vocabularies[self[name].vocab or name]

    def __getitem__(self, name: str) -> Modality:
        if name not in self.modalities:
            raise ValueError(f"unknown modality {name!r}, known are {', '.join(self.names)}")
        return self.modalities[name]

    def __len__(self) -> int:
        return len(self.names)

    def inputs(self) -> list[str]:
        """Names of modalities the encoder may be given."""
        return [name for name, row in self.modalities.items() if row.input]

    def outputs(self) -> list[str]:
        """Names of modalities the decoder may be asked for."""
        return [name for name, row in self.modalities.items() if row.predicted]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The table as plain data: every row with the fields that differ from their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(Modality)}
        return {
            name: {
                field: list(value) if isinstance(value, tuple) else value
                for field, value in dataclasses.asdict(row).items()
                if value != defaults[field]
            }
            for name, row in self.modalities.items()
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Mapping[str, Any]]) -> TokenSpace:
        """Inverse of `to_dict`; also reads a table out of YAML. Unknown fields are errors that name the row."""
        allowed = [field.name for field in dataclasses.fields(Modality)]
        rows = {}
        for name, fields in table.items():
            unknown = sorted(set(fields) - set(allowed))
            if unknown:
                raise ValueError(f"modality {name!r} has unknown fields {unknown}, allowed are {', '.join(allowed)}")
            try:
                values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
                rows[name] = Modality(**values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"modality {name!r}: {error}") from error
        return cls(rows)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TokenSpace:
        """Reads a table from a YAML file: a mapping from name to row."""
        try:
            table = yaml.safe_load(Path(path).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not plain YAML: {error}") from error
        if not isinstance(table, Mapping) or not all(isinstance(row, Mapping) for row in table.values()):
            raise ValueError(f"{path}: expected a mapping from modality name to its fields")
        return cls.from_dict(table)

    def subset(self, names: Iterable[str]) -> TokenSpace:
        """A space of its own for some of the modalities, in the given order."""
        return TokenSpace({name: self[name] for name in names})
