"""Generates any modality from any others. Speaks of ids only: what they look like is `decode.py`'s business.

Notable:
* the state is what is known of every modality; only what is known reaches the encoder, only what is asked the decoder;
* a partly known grid (in-painting) is an ordinary state: its steps continue where a schedule with that many known
  tokens would be; a partly known text holds sentinels where something is missing;
* all guidance rows (unguided, conditions, negative conditions) are rows of one batch;
* texts are written with cached keys and values, and rows that are finished leave the batch.

B rows of the state, V guidance rows for each, L positions of one modality, N encoder slots, M decoder slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fourm.generation.plan import Plan, Step
from fourm.generation.sampling import sample
from fourm.masking.batch import MaskedBatch
from fourm.masking.collect import Sample, cut_patches, finish, grid_ids, sequences
from fourm.modalities import Modality, TokenSpace


@dataclass(frozen=True)
class Given:
    """What is known of one modality, for B rows.

    Attributes:
        values: (B, L) int64 ids, or (B, L, width) float32 tokens of a continuous modality.
        known: (B, L) bool. Grids and patches: by position. Texts and vectors: the first tokens of each row.
    """

    values: Tensor
    known: Tensor

    @classmethod
    def grid(cls, ids: Tensor, known: Tensor | None = None) -> Given:
        """Ids (B, L) of a grid, all known unless `known` (B, L) says otherwise."""
        return cls(ids.long(), torch.ones_like(ids, dtype=torch.bool) if known is None else known.bool())

    @classmethod
    def texts(cls, texts: Sequence[Any]) -> Given:
        """One sequence of ids for each row, as the encoder shall see it.

        A whole text ends with its EOS. A text to be filled in or continued holds sentinels `[S_1]`, `[S_2]`, ...
        where something is missing. An empty one is unknown altogether.
        """
        rows = [torch.as_tensor(text, dtype=torch.long) for text in texts]
        known = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        return cls(pad_sequence(rows, batch_first=True), known)

    @classmethod
    def floats(cls, values: Tensor, known: Tensor | None = None) -> Given:
        """Tokens (B, L, width) of patches or vectors."""
        return cls(values.float(), torch.ones(values.shape[:2], dtype=torch.bool) if known is None else known.bool())

    def __len__(self) -> int:
        return self.known.shape[0]

    def take(self, rows: Tensor) -> Given:
        """These rows (R,)."""
        return Given(self.values[rows], self.known[rows])

    def repeat(self, times: int) -> Given:
        """Each row `times` times, one after another."""
        return Given(self.values.repeat_interleave(times, 0), self.known.repeat_interleave(times, 0))

    def to(self, device: torch.device) -> Given:
        """The same on another device."""
        return Given(self.values.to(device), self.known.to(device))

    def lists(self) -> list[list[int]]:
        """The known ids of every row."""
        return [ids[known].tolist() for ids, known in zip(self.values, self.known, strict=True)]


State = Mapping[str, Given]


class Sampler:
    """Generates with a `FourM` (or anything with its methods).

    Args:
        model: The model, on any device. Dropping paths is switched off while it generates.
    """

    def __init__(self, model: Any):
        self.model = model
        self.space: TokenSpace = model.space

    def generate(
        self,
        known: State,
        plan: Plan,
        seed: int = 0,
        num_samples: int = 1,
        conditions: Sequence[State] = (),
    ) -> dict[str, Tensor | list[Tensor]]:
        """Runs a plan.

        Args:
            known: What is given, by modality; every entry has the same number of rows.
            plan: Steps, see `fourm.generation.plan`.
            seed: The same seed, inputs and plan give the same ids on the same machine.
            num_samples: Samples of each given row, one after another; the number of rows if nothing is given.
            conditions: Guidance conditions. Each one's row sees it on top of what the unguided row sees;
                `Step.guidance` holds their weights, negative ones push away.

        Returns:
            Every target of the plan: ids (B, L) of a grid; of a text a list of B id tensors, without EOS and sentinels.

        Raises:
            ValueError: Unknown modalities, ids out of range, numbers of rows that differ, counts that do not add up.
        """
        result: dict[str, Tensor | list[Tensor]] = {}
        for step, state in self.iterate(known, plan, seed, num_samples, conditions):
            row, given = self.space[step.target], state[step.target]
            result[step.target] = given.values if row.kind == "grid" else _clean(row, given)
        return result

    @torch.no_grad()
    def iterate(
        self,
        known: State,
        plan: Plan,
        seed: int = 0,
        num_samples: int = 1,
        conditions: Sequence[State] = (),
    ) -> Iterator[tuple[Step, dict[str, Given]]]:
        """As `generate`, but yields each step and what is known after it."""
        device = next(self.model.parameters()).device
        self._check(known, plan, num_samples, conditions)
        rows = num_samples * len(next(iter(known.values()))) if known else num_samples
        state = {name: given.to(device).repeat(num_samples) for name, given in known.items()}
        conditions = [{name: g.to(device).repeat(num_samples) for name, g in extra.items()} for extra in conditions]
        generator = torch.Generator(device).manual_seed(seed)
        settled: dict[str, int] = {}
        training = self.model.training
        self.model.eval()
        try:
            for step in plan:
                state.setdefault(step.target, _nothing(self.space[step.target], rows, device))
                if self.space[step.target].kind == "text":
                    state[step.target] = self._write(step, state, conditions, generator)
                else:
                    settled[step.target] = settled.get(step.target, 0) + (step.count or 0)
                    state[step.target] = self._fill(step, settled[step.target], state, conditions, generator)
                yield step, dict(state)
        finally:
            self.model.train(training)

    def _fill(self, step: Step, goal: int, state: State, conditions: Sequence[State], generator: Any) -> Given:
        """Settles positions of a grid until `goal` of them are known in every row."""
        given = state[step.target]
        counts = (goal - given.known.sum(1)).clamp(min=0)
        if not counts.any():
            return given
        asked = ~given.known & (counts > 0)[:, None]
        if step.scheme == "roar":
            asked = highest(random_order(asked.shape, generator).masked_fill(~asked, -1.0), counts)
        views, weights = self._views(step, state, conditions)
        batch = pack(self.space, views, len(given), asked.device, step.target, asked)
        hidden = self.model.decode(batch, self.model.encode(batch)).unflatten(0, (len(views), -1))
        logits = guide(self.model.logits(hidden[:, batch.target_mod[: len(given)] >= 0], step.target), weights)
        ids, confidence = sample(logits, step.temperature, step.top_k, step.top_p, generator)
        values = given.values.masked_scatter(asked, ids)
        if step.scheme == "maskgit":
            sure = torch.full(asked.shape, -1.0, device=asked.device).masked_scatter(asked, confidence)
            asked = highest(sure, counts)
            values = torch.where(asked, values, given.values)
        return Given(values, given.known | asked)

    def _write(self, step: Step, state: State, conditions: Sequence[State], generator: Any) -> Given:
        """Writes what is missing of the texts: all of an empty one, else what its sentinels stand for."""
        row, given, device = self.space[step.target], state[step.target], state[step.target].values.device
        texts = [text or [row.first_sentinel + 1] for text in given.lists()]
        holes = [[i for i in text if _is_sentinel(row, i)] for text in texts]
        live = torch.tensor([i for i, found in enumerate(holes) if found], dtype=torch.long, device=device)
        if not len(live):
            return given
        token = torch.tensor([found[0] for found in holes if found], device=device)
        stop = torch.tensor([found[-1] + 1 for found in holes if found], device=device)
        limit = step.count or row.max_tokens
        written = torch.full((len(texts), limit), -1, device=device)

        views, weights = self._views(step, state, conditions)
        views = [{name: g.take(live) for name, g in view.items()} for view in views]
        context = self.model.encode(pack(self.space, views, len(live), device))
        cache = self.model.start_decoding(context, limit)
        number = self.space.number[step.target]
        first_id, first_position = self.space.vocabulary(step.target).start, int(self.space.position_offset[number])
        for place in range(limit):
            ids = (token + first_id).repeat(len(views))
            hidden = self.model.decode_next(
                ids, torch.full_like(ids, first_position + place), torch.full_like(ids, number), cache
            )
            logits = guide(self.model.logits(hidden.unflatten(0, (len(views), -1)), step.target), weights)
            token, _ = sample(logits, step.temperature, step.top_k, step.top_p, generator)
            written[live, place] = token
            going = (token != stop) & (token != row.eos)
            if not going.any():
                break
            if not going.all():
                live, token, stop = live[going], token[going], stop[going]
                cache.select(going.repeat(len(views)).nonzero().squeeze(1))
        finished = [
            merge(row, text, [i for i in new if i >= 0]) if found else text
            for text, found, new in zip(texts, holes, written.tolist(), strict=True)
        ]
        return Given.texts(finished).to(device)

    def _views(self, step: Step, state: State, conditions: Sequence[State]) -> tuple[list[State], tuple[float, ...]]:
        """What each guidance row sees, the unguided row first, and the weights of the others."""
        default = () if conditions else tuple(name for name in state if name != step.target)
        hidden = default if step.hidden is None else step.hidden
        base = {name: given for name, given in state.items() if name not in hidden}
        rows: list[State] = [{**base, **extra} for extra in conditions]
        if len(step.guidance) == len(conditions) + 1:
            rows.append(state)
        elif len(step.guidance) != len(conditions):
            raise ValueError(
                f"{step.target}: {len(step.guidance)} guidance weights for {len(conditions)} conditions; expected one "
                "for each, or one more for a row that sees everything"
            )
        if step.guidance == (1.0,) or (not conditions and len(base) == len(state)):
            return rows, ()
        return [base, *rows], step.guidance

    def _check(self, known: State, plan: Plan, num_samples: int, conditions: Sequence[State]) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        sizes: dict[str, int] = {}
        for name, given in (item for entries in (known, *conditions) for item in entries.items()):
            _check_given(name, self.space[name], given)
            sizes[name] = len(given)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"given modalities differ in their number of rows: {sizes}")
        if conditions and not known:
            raise ValueError("conditions are given but nothing is known; put an empty text or grid of their rows there")
        settled: dict[str, int] = {}
        for step in plan:
            row = self.space[step.target]
            if not row.predicted or (row.kind == "text") != (step.scheme == "autoregressive"):
                raise ValueError(
                    f"{step.target!r} (kind {row.kind!r}) cannot be generated by {step.scheme!r}; targets may be "
                    f"{', '.join(self.space.outputs())}, texts only autoregressive, grids by maskgit or roar"
                )
            if any(step.target in extra for extra in conditions):
                raise ValueError(f"{step.target!r} is a target and part of a condition")
            for name in step.hidden or ():
                _ = self.space[name]
            if row.kind == "grid":
                settled[step.target] = settled.get(step.target, 0) + (step.count or 0)
        for name, count in settled.items():
            if count != self.space[name].length:
                raise ValueError(f"the steps of {name!r} settle {count} tokens, expected {self.space[name].length}")


def from_samples(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> dict[str, Given]:
    """What the encoder may see of token samples: grids, whole texts with their EOS, cut and normalised patches.

    Args:
        space: The modalities.
        samples: B token samples; where one lacks a modality, nothing of it is known.
        names: Modalities to give.

    Raises:
        ValueError: A modality that cannot be given, or contents that do not fit its row; names the sample.
    """
    rows = np.arange(len(samples))
    known = {}
    for name in names:
        row = space[name]
        has = torch.from_numpy(np.array([name in sample for sample in samples], dtype=bool))
        if row.kind == "grid":
            ids = torch.from_numpy(grid_ids(space, samples, [name])[:, 0])
            known[name] = Given(ids, has[:, None].repeat(1, row.length))
        elif row.kind == "patches":
            holders = rows[has.numpy()].repeat(row.length)
            cells = np.tile(np.arange(row.length), int(has.sum()))
            values = torch.zeros(len(samples), row.length, row.width)
            values[has] = torch.from_numpy(cut_patches(name, row, samples, holders, cells)).view(
                -1, row.length, row.width
            )
            known[name] = Given(values, has[:, None].repeat(1, row.length))
        else:
            known[name] = _sequences_from_samples(space, samples, name)
    return known


def _sequences_from_samples(space: TokenSpace, samples: Sequence[Sample], name: str) -> Given:
    found = finish(space, sequences(space, samples, [name]))
    valid = torch.zeros(len(samples), found.ids.shape[1], dtype=torch.bool)
    valid[found.row] = torch.from_numpy(found.valid)
    if space[name].kind == "text":
        values = torch.zeros(valid.shape, dtype=torch.long)
        values[found.row] = torch.from_numpy(found.ids)
        return Given(values * valid, valid)
    floats = torch.zeros(*valid.shape, space[name].dim)
    if name in found.vectors:
        floats[valid] = torch.from_numpy(found.vectors[name][found.ids[found.valid] - 1])
    return Given(floats, valid)


def pack(
    space: TokenSpace,
    views: Sequence[State],
    batch_size: int,
    device: torch.device,
    target: str = "",
    asked: Tensor | None = None,
) -> MaskedBatch:
    """Lists the known tokens of every view and row, and lays them out on as few slots as the fullest row needs.

    Args:
        space: The modalities.
        views: V states of B rows each.
        batch_size: B.
        device: Of the states.
        target: Grid to predict.
        asked: (B, L) bool, which of its positions; the same in every view.

    Returns:
        V * B rows, view after view.
    """
    given = [(name, _stack(views, name, batch_size)) for name in space.names if space[name].input]
    lists, floats = [torch.zeros(4, 0, dtype=torch.long, device=device)], {}
    for name, part in given:
        if part is not None:
            lists.append(_tokens(space, name, part.known, part.values if space[name].discrete else None))
            if not space[name].discrete:
                floats[name] = part.values[part.known]
    tokens = torch.cat(lists, 1)
    mod, pos, ids, slot = _lay_out(tokens, len(views) * batch_size)
    wanted = lists[0] if asked is None else _tokens(space, target, asked)
    target_mod, target_pos, _, _ = (part.repeat(len(views), 1) for part in _lay_out(wanted, batch_size))
    return MaskedBatch(
        ids=ids,
        pos=pos,
        mod=mod,
        sample=mod.clamp(max=0),
        target_in=torch.full_like(target_mod, -1),
        target=torch.zeros_like(target_mod),
        target_pos=target_pos,
        target_mod=target_mod,
        target_sample=target_mod.clamp(max=0),
        rows=floats,
        slots={name: slot[tokens[1] == space.number[name]] for name in floats},
    )


def _stack(views: Sequence[State], name: str, batch_size: int) -> Given | None:
    """One modality of all views, padded to the longest; None if no view has it."""
    some = next((view[name] for view in views if name in view), None)
    if some is None:
        return None
    nothing = Given(some.values[:, :0], some.known[:, :0])
    parts = [view.get(name, nothing) for view in views]
    length = max(part.known.shape[1] for part in parts)
    values = some.values.new_zeros(len(views), batch_size, length, *some.values.shape[2:])
    known = some.known.new_zeros(len(views), batch_size, length)
    for number, part in enumerate(parts):
        values[number, :, : part.known.shape[1]] = part.values
        known[number, :, : part.known.shape[1]] = part.known
    return Given(values.flatten(0, 1), known.flatten(0, 1))


def _tokens(space: TokenSpace, name: str, wanted: Tensor, values: Tensor | None = None) -> Tensor:
    """The wanted tokens (R, L) as a list: rows of the batch, modality number, row of the position and token tables."""
    number = space.number[name]
    row, column = wanted.nonzero(as_tuple=True)
    place = column if space[name].grid else wanted.cumsum(1)[row, column] - 1
    ids = torch.zeros_like(row) if values is None else values[row, column] + space.vocabulary(name).start
    return torch.stack([row, torch.full_like(row, number), place + int(space.position_offset[number]), ids])


def _lay_out(tokens: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A list of tokens (4, T) in rows: modality numbers, positions and ids (rows, width), and flat slots (T,)."""
    order = tokens[0].argsort(stable=True)
    row = tokens[0, order]
    count = row.bincount(minlength=rows)
    width = max(1, int(count.max()))
    slot = torch.empty_like(order)
    slot[order] = row * width + torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    laid = torch.zeros(3, rows * width, dtype=torch.long, device=tokens.device)
    laid[0] = -1
    laid[:, slot] = tokens[1:]
    mod, pos, ids = laid.view(3, rows, width)
    return mod, pos, ids, slot


def guide(logits: Tensor, weights: Sequence[float]) -> Tensor:
    """Guided scores u + sum_i w_i (c_i - u): (V, ..., vocab) -> (..., vocab), u first; its only row if no weights."""
    logits = logits.float()
    if not weights:
        return logits[0]
    factors = logits.new_tensor([1 - sum(weights), *weights])
    return torch.einsum("v,v...->...", factors, logits)


def random_order(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform scores (B, L); ROAR decodes the highest."""
    return torch.rand(shape, generator=generator, device=generator.device)


def highest(scores: Tensor, counts: Tensor) -> Tensor:
    """Marks the `counts` (B,) highest scores of each row of (B, L)."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < counts[:, None]


def merge(row: Modality, text: Sequence[int], written: Sequence[int]) -> list[int]:
    """Puts what was written in the place of the sentinels.

    Args:
        row: The modality.
        text: Known ids, with sentinels.
        written: What the decoder wrote after the first sentinel, up to and including its stop. Sentinels that `text`
            does not have are left out.

    Returns:
        The text without its sentinels; at most `row.max_tokens` ids.
    """
    spans: dict[int, list[int]] = {i: [] for i in text if _is_sentinel(row, i)}
    span = next(iter(spans.values()))
    for i in written:
        if i in spans:
            span = spans[i]
        elif not _is_sentinel(row, i):
            span.append(i)
    merged = [j for i in text for j in (spans[i] if _is_sentinel(row, i) else [i])]
    return merged[: row.max_tokens]


def _is_sentinel(row: Modality, i: int) -> bool:
    return row.first_sentinel <= i < row.first_sentinel + row.sentinels


def _clean(row: Modality, given: Given) -> list[Tensor]:
    """Texts without EOS and sentinels."""
    texts = [[i for i in text if i != row.eos and not _is_sentinel(row, i)] for text in given.lists()]
    return [torch.tensor(text, dtype=torch.long) for text in texts]


def _nothing(row: Modality, rows: int, device: torch.device) -> Given:
    length = row.length if row.kind == "grid" else 0
    values = torch.zeros(rows, length, dtype=torch.long, device=device)
    return Given(values, torch.zeros_like(values, dtype=torch.bool))


def _check_given(name: str, row: Modality, given: Given) -> None:
    """Raises the errors for contents that do not fit a row of the table."""
    length = given.known.shape[1]
    shape = given.values.shape[:2] if row.discrete else (*given.values.shape[:2], row.width)
    fits = length == row.length if row.grid else length <= row.max_tokens
    if not fits or tuple(given.values.shape) != tuple(shape) or given.known.shape != shape[:2]:
        allowed = f"(rows, {row.length})" if row.grid else f"(rows, at most {row.max_tokens})"
        width = "" if row.discrete else f" of {row.width} floats each"
        raise ValueError(
            f"given {name!r} has values {tuple(given.values.shape)} and known {tuple(given.known.shape)}, "
            f"expected {allowed}{width}"
        )
    if row.discrete and given.known.any():
        ids = given.values[given.known]
        if ids.min() < 0 or ids.max() >= row.vocab_size:
            raise ValueError(
                f"given {name!r} has ids in [{ids.min()}, {ids.max()}], expected ids in [0, {row.vocab_size})"
            )
