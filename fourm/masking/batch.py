"""The one batch that travels from masking to loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourm.modalities import TokenSpace


@dataclass(frozen=True)
class MaskedBatch:
    """Tokens that are given and tokens that are asked, for B rows.

    B rows, N encoder slots, M decoder slots, K kept tokens of one continuous modality. Token ids are rows of the one
    token table and positions rows of the one position table (`TokenSpace`), so that the model needs one gather per
    table. Tokens of a modality lie side by side. Empty slots come last; they have `mod` -1 and zeros elsewhere.

    Attributes:
        ids: (B, N) int64, rows of the token table; 0 where the token is continuous.
        pos: (B, N) int64, rows of the position table.
        mod: (B, N) int64, modality number.
        target_in: (B, M) int64, row of the token table the decoder is fed (text), or -1 for the mask token (grid).
        target: (B, M) int64, row of the token table to predict.
        target_pos: (B, M) int64, rows of the position table.
        target_mod: (B, M) int64, modality number.
        rows: Per continuous modality its kept tokens, (K, width) float32.
        slots: Per continuous modality where they go in the flattened (B * N) inputs, (K,) int64.
        keys: Names of the samples, in the order of the rows.
    """

    ids: Tensor
    pos: Tensor
    mod: Tensor
    target_in: Tensor
    target: Tensor
    target_pos: Tensor
    target_mod: Tensor
    rows: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, Tensor] = field(default_factory=dict)
    keys: tuple[str, ...] = ()

    def _map(self, change: Any) -> MaskedBatch:
        changed: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                changed[entry.name] = change(value)
            elif isinstance(value, dict):
                changed[entry.name] = {name: change(tensor) for name, tensor in value.items()}
            else:
                changed[entry.name] = value
        return MaskedBatch(**changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskedBatch:
        """The same batch in page-locked memory, for fast copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def input_tokens(self) -> int:
        """Encoder slots that hold a token."""
        return int((self.mod >= 0).sum())

    @property
    def target_tokens(self) -> int:
        """Decoder slots that hold a token."""
        return int((self.target_mod >= 0).sum())


class Tokens(NamedTuple):
    """Tokens of a batch as one flat list; per token, in arrays (T,):

    Attributes:
        row: Number of the sample in the batch.
        mod: Modality number.
        pos: Position within the modality, from 0.
        ids: Id within the vocabulary of the modality (to predict, in a list of targets); 0 for continuous ones.
        fed: Id that the decoder is fed, or -1 for the mask token (and in a list of inputs).
    """

    row: np.ndarray
    mod: np.ndarray
    pos: np.ndarray
    ids: np.ndarray
    fed: np.ndarray | int = -1

    @classmethod
    def join(cls, lists: Sequence[Tokens]) -> Tokens:
        """Lists end to end."""
        columns = zip(*(np.broadcast_arrays(*tokens) for tokens in lists), strict=True)
        return cls(*map(np.concatenate, columns))


class Selection(NamedTuple):
    """What of some samples is given and what is asked.

    Attributes:
        inputs: Tokens that are given.
        targets: Tokens that are asked.
        contents: Per continuous modality its vectors (K, width), in the order of its tokens in `inputs`.
    """

    inputs: Tokens
    targets: Tokens
    contents: dict[str, np.ndarray]

    @classmethod
    def of_groups(cls, rows: Sequence[np.ndarray], groups: Sequence[Selection]) -> Selection:
        """What is selected of several groups of samples; `rows` holds the numbers of each group's samples."""
        moved = [
            [tokens._replace(row=row[tokens.row]) for row, tokens in zip(rows, side, strict=True)]
            for side in ([group.inputs for group in groups], [group.targets for group in groups])
        ]
        inputs, targets = map(Tokens.join, moved)
        names = dict.fromkeys(name for group in groups for name in group.contents)
        contents = {
            name: np.concatenate([group.contents[name] for group in groups if name in group.contents]) for name in names
        }
        return cls(inputs, targets, contents)

    def __or__(self, other: Selection) -> Selection:
        """This and what is selected of other modalities."""
        inputs, targets = Tokens.join([self.inputs, other.inputs]), Tokens.join([self.targets, other.targets])
        return Selection(inputs, targets, self.contents | other.contents)


def place(
    space: TokenSpace, tokens: Tokens, keys: Sequence[str], width: int | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Lays tokens out in rows, by modality number and, within a modality, in the order they come in.

    Args:
        space: The modality table.
        tokens: T tokens.
        keys: Names of the B samples.
        width: Slots of a row; None for as many as the fullest row needs (at least one).

    Returns:
        `ids`, `pos`, `mod` and `fed`, each (B, width) int64, and the flat slot of each token (T,) int64.

    Raises:
        ValueError: An id outside of its vocabulary; names the sample.
    """
    vocab = np.array([max(row.vocab_size, 1) for row in space.modalities.values()])  # continuous ones have only 0
    for wrong in np.flatnonzero((tokens.ids < 0) | (tokens.ids >= vocab[tokens.mod]))[:1]:
        name, key = space.names[tokens.mod[wrong]], keys[tokens.row[wrong]]
        raise ValueError(f"sample {key!r}: {name} has id {tokens.ids[wrong]}, expected [0, {space[name].vocab_size})")
    order = np.argsort(tokens.row * len(space) + tokens.mod, kind="stable")
    row, rows = tokens.row[order], len(keys)
    count = np.bincount(row, minlength=rows)
    width = max(1, int(count.max(initial=0))) if width is None else width
    slot = np.empty(len(order), dtype=np.int64)
    slot[order] = row * width + np.arange(len(row)) - (np.cumsum(count) - count)[row]

    columns = {
        "ids": (0, tokens.ids + space.vocab_offset[tokens.mod]),
        "pos": (0, tokens.pos + space.position_offset[tokens.mod]),
        "mod": (-1, tokens.mod),
        "fed": (0, np.where(tokens.fed < 0, -1, tokens.fed + space.vocab_offset[tokens.mod])),
    }
    laid_out = {}
    for name, (empty, values) in columns.items():
        laid_out[name] = np.full(rows * width, empty, dtype=np.int64)
        laid_out[name][slot] = values
    return {name: values.reshape(rows, width) for name, values in laid_out.items()}, slot


def assemble(
    space: TokenSpace,
    keys: Sequence[str],
    selection: Selection,
    widths: tuple[int | None, int | None] = (None, None),
) -> MaskedBatch:
    """Builds the batch of B samples.

    Args:
        space: The modality table.
        keys: Names of the B samples.
        selection: Tokens of all modalities.
        widths: Slots N and M; None for as many as the fullest row needs.

    Raises:
        ValueError: An id outside of its vocabulary; names the sample.
    """
    inputs, targets, contents = selection
    given, slot = place(space, inputs, keys, widths[0])
    asked, _ = place(space, targets, keys, widths[1])
    tensor = torch.from_numpy
    return MaskedBatch(
        ids=tensor(given["ids"]),
        pos=tensor(given["pos"]),
        mod=tensor(given["mod"]),
        target_in=tensor(asked["fed"]),
        target=tensor(asked["ids"]),
        target_pos=tensor(asked["pos"]),
        target_mod=tensor(asked["mod"]),
        rows={name: tensor(np.ascontiguousarray(rows, dtype=np.float32)) for name, rows in contents.items()},
        slots={name: tensor(slot[inputs.mod == space.number[name]]) for name in contents},
        keys=tuple(keys),
    )
