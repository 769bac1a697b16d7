"""Token, position and modality embeddings of one side (encoder or decoder) of the model.

One table each for all modalities of the side: a token is three row numbers, and embedding a batch is three gathers,
whatever the number of modalities. Only tokens that were kept are ever embedded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.modalities import TokenSpace


def sincos(positions: Tensor, dim: int) -> Tensor:
    """(P,) -> (P, dim): sines, then cosines, of falling frequencies (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    exponent = torch.arange(half, device=positions.device) / half
    frequency = 1 / 10000.0**exponent  # in float32, as the tables of 4M checkpoints
    angle = positions.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_table(space: TokenSpace, dim: int, decoder: bool = False) -> Tensor:
    """(positions, dim) sine-cosine rows of all modalities: 2-D for grids (row half, column half), 1-D for sequences."""
    tables = []
    for row in space.modalities.values():
        place = torch.arange(row.length)
        if row.grid is None:
            known = row.decoder_positions if decoder and row.decoder_positions else row.length
            tables.append(sincos(place * (place < known), dim))
        else:
            columns = row.grid[1]
            tables.append(torch.cat([sincos(place // columns, dim // 2), sincos(place % columns, dim // 2)], dim=1))
    return torch.cat(tables)


class Embeddings(nn.Module):
    """Embeds the kept tokens of one side. Its tables hold the rows of that side's modalities only.

    Args:
        space: All modalities.
        dim: Width D, a multiple of 4.
        names: Those that occur on this side.
        decoder: Whether it is the decoder's.
        rows: Modalities that have a row of the modality table; default: `names`.
    """

    positions: Tensor
    learned_rows: Tensor
    shift: Tensor
    modality_row: Tensor

    def __init__(
        self,
        space: TokenSpace,
        dim: int,
        names: Sequence[str],
        decoder: bool = False,
        rows: Sequence[str] | None = None,
    ):
        super().__init__()
        self.space, self.names = space, list(names)
        self.vocabularies: dict[str, slice] = {}  # rows of this side's token table
        self.learned: dict[str, slice] = {}  # rows of this side's learned positions
        shift = np.zeros(len(space) + 1, np.int64)  # the last entry answers for empty slots (-1)
        learned: list[int] = []
        size = 0
        for name in self.names:
            row, number = space[name], space.number[name]
            if row.discrete:
                own = self.vocabularies.setdefault(row.vocab or name, slice(size, size + row.vocab_size))
                size = max(size, own.stop)
                shift[number] = space.vocab_offset[number] - own.start
            if row.learned_positions:
                self.learned[name] = slice(len(learned), len(learned) + row.length)
                learned += range(space.position_offset[number], space.position_offset[number] + row.length)
        self.tokens = nn.Embedding(size, dim)
        self.shares_head = False
        self.register_buffer("shift", torch.from_numpy(shift) if shift.any() else None, persistent=False)
        rows = self.names if rows is None else rows
        self.modality = nn.Parameter(torch.empty(len(rows), dim))
        modality_row = np.array([rows.index(name) if name in rows else 0 for name in space.names] + [0])
        self.register_buffer("modality_row", torch.from_numpy(modality_row), persistent=False)
        self.register_buffer("positions", position_table(space, dim, decoder), persistent=False)
        self.register_buffer("learned_rows", torch.tensor(learned, dtype=torch.long), persistent=False)
        self.learned_positions = nn.Parameter(torch.empty(len(learned), dim)) if learned else None
        self.project = nn.ModuleDict(
            {
                name: nn.Linear(space[name].width, dim, bias=space[name].kind == "vectors")
                for name in self.names
                if not space[name].discrete
            }
        )

    def vocabulary(self, name: str) -> slice:
        """Rows of this side's token table that hold the ids of a grid or text modality."""
        return self.vocabularies[self.space[name].vocab or name]

    def position_table(self) -> Tensor:
        """(positions, D) rows of all modalities, learned ones in their places."""
        if self.learned_positions is None:
            return self.positions
        return self.positions.index_copy(0, self.learned_rows, self.learned_positions.to(self.positions.dtype))

    def place(self, pos: Tensor, mod: Tensor, table: Tensor | None = None) -> Tensor:
        """Where a token stands and what it is: (...) position rows and modality numbers -> (..., D), 0 if empty.

        `table` is `position_table()`, from one who calls often.
        """
        table = self.position_table() if table is None else table
        return (F.embedding(pos, table) + F.embedding(self.modality_row[mod], self.modality)) * (mod >= 0).unsqueeze(-1)

    def look_up(self, ids: Tensor, mod: Tensor, table: Tensor | None = None) -> Tensor:
        """Rows of the space's token table (...) and their modality numbers -> (..., D); anything if -1 or empty.

        `table` is the token table, or a view of it.
        """
        if not self.vocabularies:
            return self.modality.new_zeros(*ids.shape, self.modality.shape[1])
        ids = ids if self.shift is None else ids - self.shift[mod]
        # A head that shares the table makes a dense gradient; ours is a few rows to add to it.
        sparse = self.tokens.sparse or (self.shares_head and not torch.compiler.is_compiling())
        return F.embedding(ids.clamp(min=0), self.tokens.weight if table is None else table, sparse=sparse)

    def content(self, ids: Tensor, mod: Tensor, rows: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> Tensor:
        """What the tokens say: (B, N) ids, and (K, width) rows for (K,) slots of B * N -> (B, N, D), 0 if empty."""
        x = self.look_up(ids, mod) * (mod >= 0).unsqueeze(-1)
        for name, values in rows.items():
            projected = self.project[name](values)
            x = x.flatten(0, 1).index_copy(0, slots[name], projected.to(x.dtype)).view(x.shape)
        return x
