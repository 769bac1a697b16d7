"""Token, position and modality embeddings of one side (encoder or decoder) of the model.

One table each for all modalities: a token is three row numbers, and embedding a batch is three gathers, whatever the
number of modalities. Only tokens that were kept are ever embedded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.modalities import TokenSpace


def sincos(positions: Tensor, dim: int) -> Tensor:
    """(P,) -> (P, dim): sines, then cosines, of falling frequencies (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.to(torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def position_table(space: TokenSpace, dim: int) -> Tensor:
    """(positions, dim) sine-cosine rows of all modalities: 2-D for grids (row half, column half), 1-D for sequences."""
    tables = []
    for row in space.modalities.values():
        place = torch.arange(row.length)
        if row.grid is None:
            tables.append(sincos(place, dim))
        else:
            columns = row.grid[1]
            tables.append(torch.cat([sincos(place // columns, dim // 2), sincos(place % columns, dim // 2)], dim=1))
    return torch.cat(tables)


class Embeddings(nn.Module):
    """Embeds the kept tokens of one side.

    Args:
        space: The modalities.
        dim: Width D, a multiple of 4.
        continuous: Whether patches and vectors are projected here too (encoder).
    """

    positions: Tensor
    learned_rows: Tensor

    def __init__(self, space: TokenSpace, dim: int, continuous: bool):
        super().__init__()
        self.tokens = nn.Embedding(space.vocab_size, dim)
        self.modality = nn.Parameter(torch.empty(len(space), dim))
        learned = [
            torch.arange(start, start + row.length)
            for start, row in zip(space.position_offset.tolist(), space.modalities.values(), strict=True)
            if row.learned_positions
        ]
        self.register_buffer("positions", position_table(space, dim), persistent=False)
        self.register_buffer("learned_rows", torch.cat(learned) if learned else torch.empty(0).long(), persistent=False)
        self.learned_positions = nn.Parameter(torch.empty(len(self.learned_rows), dim)) if learned else None
        self.project = nn.ModuleDict(
            {
                name: nn.Linear(row.width, dim, bias=row.kind == "vectors")
                for name, row in space.modalities.items()
                if continuous and not row.discrete
            }
        )

    def place(self, pos: Tensor, mod: Tensor) -> Tensor:
        """Where a token stands and what it is: (B, N) position rows and modality numbers -> (B, N, D), 0 if empty."""
        table = self.positions
        if self.learned_positions is not None:
            table = table.index_copy(0, self.learned_rows, self.learned_positions.to(table.dtype))
        return (F.embedding(pos, table) + F.embedding(mod.clamp(min=0), self.modality)) * (mod >= 0).unsqueeze(-1)

    def content(self, ids: Tensor, mod: Tensor, rows: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> Tensor:
        """What the tokens say: (B, N) ids, and (K, width) rows for (K,) slots of B * N -> (B, N, D), 0 if empty."""
        x = self.tokens(ids) * (mod >= 0).unsqueeze(-1)
        for name, values in rows.items():
            projected = self.project[name](values)
            x = x.flatten(0, 1).index_copy(0, slots[name], projected.to(x.dtype)).view(x.shape)
        return x
