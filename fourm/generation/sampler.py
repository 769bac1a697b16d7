"""Generates any modality from any others. Speaks of ids only: what they look like is `decode.py`'s business.

Notable:
* the state is what is known of every modality; only what is known reaches the encoder, only what is asked the decoder;
* a partly known grid (in-painting) is an ordinary state: its steps continue where a schedule with that many known
  tokens would be; a partly known text holds sentinels where something is missing;
* all guidance rows (unguided, conditions, negative conditions) are rows of one batch;
* texts are written with cached keys and values, and rows that are finished leave the batch;
* 4M's own checkpoints (`FourMConfig.blank_hidden`) are sampled as 4M does it, so that they give the same ids.

B rows of the state, V guidance rows for each, L positions of one modality, N encoder slots, M decoder slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fourm.generation.plan import Plan, Step, check_fit
from fourm.generation.sampling import sample
from fourm.masking.batch import MaskedBatch, Selection, Tokens, assemble
from fourm.masking.collect import Sample
from fourm.masking.transfer import select_whole
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import Context


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


def random_order(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform scores (B, L)."""
    return torch.rand(shape, generator=generator, device=generator.device)


class Sampler:
    """Generates with a `FourM` (or anything with its methods).

    Args:
        model: The model, on any device; it is put into evaluation mode.
        sample: How ids are drawn from logits: see `sampling.sample`, whose positional arguments it gets.
        order: Scores of positions (B, L) in [0, 1]; ROAR decodes the highest of those that are left.
    """

    def __init__(
        self,
        model: Any,
        sample: Callable[..., tuple[Tensor, Tensor]] = sample,
        order: Callable[[torch.Size, torch.Generator], Tensor] = random_order,
    ):
        self.model = model.eval()
        self.space: TokenSpace = model.space
        self.sample, self.order = sample, order
        self.blank_hidden: bool = model.config.blank_hidden

    def generate(
        self, known: State, plan: Plan, seed: int = 0, num_samples: int = 1, conditions: Sequence[State] = ()
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
        self, known: State, plan: Plan, seed: int = 0, num_samples: int = 1, conditions: Sequence[State] = ()
    ) -> Iterator[tuple[Step, dict[str, Given]]]:
        """As `generate`, but yields each step and what is known after it."""
        device = next(self.model.parameters()).device
        rows = self._check(known, plan, num_samples, conditions) * num_samples
        state, *extras = (
            {name: given.to(device).repeat(num_samples) for name, given in part.items()}
            for part in (known, *conditions)
        )
        if self.blank_hidden:
            texts = [step.target for step in plan if step.scheme == "autoregressive"]
            state = {name: blank(self.space[name], rows, device) for name in texts} | state
        generator = torch.Generator(device).manual_seed(seed)
        settled = dict.fromkeys((step.target for step in plan), 0)
        for step in plan:
            state.setdefault(step.target, _nothing(self.space[step.target], rows, device))
            if step.count and step.scheme != "autoregressive":
                settled[step.target] += step.count
                state[step.target] = self._fill(step, settled[step.target], state, extras, generator)
            else:
                state[step.target] = self._write(step, state, extras, generator)
            yield step, dict(state)

    def _fill(self, step: Step, goal: int, state: State, conditions: Sequence[State], generator: Any) -> Given:
        """Settles positions of a grid until `goal` of them are known in every row."""
        given = state[step.target]
        counts = (goal - given.known.sum(1)).clamp(min=0)
        if not counts.any():
            return given
        asked = ~given.known & (counts > 0)[:, None]
        if step.scheme == "roar":
            asked = highest(self.order(asked.shape, generator).masked_fill(~asked, -1.0), counts)
        views, weights = self._views(step, state, conditions)
        batch = pack(self.space, views, len(given), asked.device, step.target, asked)
        hidden = self.model.decode(batch, self._context(batch, len(views))).unflatten(0, (len(views), -1))
        logits = self.model.logits(guide(hidden[:, batch.target_mod[: len(given)] >= 0], weights), step.target)
        ids, confidence = self.sample(logits, step.temperature, step.top_k, step.top_p, generator)
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
        context = self._context(pack(self.space, views, len(live), device), len(views))
        cache = self.model.start_decoding(context, limit)
        number = self.space.number[step.target]
        first_id, first_position = self.space.vocabulary(step.target).start, int(self.space.position_offset[number])
        for place in range(limit):
            ids = (token + first_id).repeat(len(views))
            hidden = self.model.decode_next(
                ids, torch.full_like(ids, first_position + place), torch.full_like(ids, number), cache
            )
            logits = self.model.logits(guide(hidden.unflatten(0, (len(views), -1)), weights), step.target)
            token, _ = self.sample(logits, step.temperature, step.top_k, step.top_p, generator)
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

    def _context(self, batch: MaskedBatch, views: int) -> Context:
        """Encodes what V views show. With `blank_hidden`, one that shows nothing in any row has no context."""
        context = self.model.encode(batch)
        if not self.blank_hidden:
            return context
        shows = (batch.mod >= 0).unflatten(0, (views, -1)).flatten(1).any(1).repeat_interleave(len(batch) // views)
        registers = self.model.config.registers
        seen = [some if shown else registers for some, shown in zip(context.seen, shows.tolist(), strict=True)]
        return replace(context, seen=seen)

    def _views(self, step: Step, state: State, conditions: Sequence[State]) -> tuple[list[State], tuple[float, ...]]:
        """What each guidance row sees, the unguided row first, and the weights of the others."""
        default = () if conditions else tuple(name for name in state if name != step.target)
        hidden = [name for name in (default if step.hidden is None else step.hidden) if name in state]
        base = {name: given for name, given in state.items() if name not in hidden}
        if self.blank_hidden:
            given = state[step.target]
            fresh = (name for name in hidden if not self.space[name].grid)
            base |= {name: blank(self.space[name], len(given), given.known.device) for name in fresh}
        rows: list[State] = [{**base, **extra} for extra in conditions]
        if len(step.guidance) == len(conditions) + 1:
            rows.append(state)
        elif len(step.guidance) != len(conditions):
            raise ValueError(
                f"{step.target}: {len(step.guidance)} guidance weights for {len(conditions)} conditions; expected one "
                "for each, or one more for a row that sees everything"
            )
        if step.guidance == (1.0,) or not (conditions or hidden):
            return rows, ()
        return [base, *rows], step.guidance

    def _check(self, known: State, plan: Plan, num_samples: int, conditions: Sequence[State]) -> int:
        """Raises the errors of `generate`; the number of rows given."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        sizes: dict[str, int] = {}
        for name, given in (item for entries in (known, *conditions) for item in entries.items()):
            _check_given(name, self.space[name], given)
            sizes[name] = len(given)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"given modalities differ in their number of rows: {sizes}")
        settled: dict[str, int] = {}
        for step in plan:
            check_fit(self.space, step.target, step.scheme)
            if any(step.target in extra for extra in conditions):
                raise ValueError(f"{step.target!r} is a target and part of a condition")
            if step.scheme != "autoregressive":
                settled[step.target] = settled.get(step.target, 0) + (step.count or 0)
        for name, count in settled.items():
            if count != self.space[name].length:
                raise ValueError(f"the steps of {name!r} settle {count} tokens, expected {self.space[name].length}")
        return next(iter(sizes.values()), 1)


def from_samples(space: TokenSpace, samples: Sequence[Sample], names: Sequence[str]) -> dict[str, Given]:
    """What the encoder may see of token samples: grids, whole texts with their EOS, cut and normalised patches.

    Args:
        space: The modalities.
        samples: B token samples that hold all of the named modalities.
        names: Modalities to give.

    Raises:
        ValueError: A modality that cannot be given, or contents that do not fit its row; names the sample.
    """
    tokens, _, contents = select_whole(space, samples, names, ())
    known = {}
    for name in names:
        row, own = space[name], tokens.mod == space.number[name]
        place = tokens.row[own], tokens.pos[own]
        where = np.zeros((len(samples), row.length if row.grid else place[1].max(initial=-1) + 1), dtype=bool)
        where[place] = True
        found = tokens.ids[own] if row.discrete else contents[name]
        values = np.zeros((*where.shape, *found.shape[1:]), dtype=found.dtype)
        values[place] = found
        known[name] = Given(torch.from_numpy(values), torch.from_numpy(where))
    return known


def pack(
    space: TokenSpace,
    views: Sequence[State],
    batch_size: int,
    device: torch.device,
    target: str = "",
    asked: Tensor | None = None,
) -> MaskedBatch:
    """Lays the known tokens of every view and row out on as few slots as the fullest row needs.

    Args:
        space: The modalities.
        views: V states of B rows each.
        batch_size: B.
        device: Where the batch goes.
        target: Grid to predict.
        asked: (B, L) bool, which of its positions; the same in every view.

    Returns:
        V * B rows, view after view.
    """
    nothing = Tokens(*np.zeros((4, 0), dtype=np.int64))
    given, wanted, contents = [nothing], [nothing], {}
    for name in space.inputs():
        shown = [(number * batch_size, view[name]) for number, view in enumerate(views) if name in view]
        ids = space[name].discrete
        given += [_tokens(space, name, part.known, part.values if ids else None, start) for start, part in shown]
        if shown and not ids:
            contents[name] = torch.cat([part.values[part.known] for _, part in shown]).cpu().numpy()
    if asked is not None:
        wanted += [_tokens(space, target, asked, None, number * batch_size) for number in range(len(views))]
    keys = ("",) * (len(views) * batch_size)
    return assemble(space, keys, Selection(Tokens.join(given), Tokens.join(wanted), contents)).to(device)


def _tokens(space: TokenSpace, name: str, where: Tensor, values: Tensor | None, first_row: int) -> Tokens:
    """The marked tokens (R, L) of a modality; their rows count from `first_row`."""
    row, pos = where.cpu().numpy().nonzero()
    ids = np.zeros_like(row) if values is None else values.cpu().numpy()[row, pos]
    return Tokens(row + first_row, np.full_like(row, space.number[name]), pos, ids)


def guide(hidden: Tensor, weights: Sequence[float]) -> Tensor:
    """Guided states u + sum_i w_i (c_i - u): (V, ..., D) -> (..., D), u first; its only row if no weights.

    The head is linear: scores of guided states are the guided scores, for one pass through the vocabulary, not V.
    """
    if not weights:
        return hidden[0]
    factors = torch.tensor([1 - sum(weights), *weights], dtype=torch.float32, device=hidden.device)
    return torch.einsum("v,v...->...", factors, hidden.float()).to(hidden.dtype)


def highest(scores: Tensor, counts: Tensor) -> Tensor:
    """Marks the `counts` (B,) highest scores of each row of (B, L)."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < counts[:, None]


def merge(row: Modality, text: Sequence[int], written: Sequence[int]) -> list[int]:
    """Puts what was written in the place of the sentinels.

    Args:
        row: The modality.
        text: Known ids, with sentinels.
        written: What the decoder wrote after the first sentinel, up to and including its stop. What follows a sentinel
            that `text` does not have belongs nowhere and is left out.

    Returns:
        The text without its sentinels; at most `row.max_tokens` ids.
    """
    spans: dict[int, list[int]] = {i: [] for i in text if _is_sentinel(row, i)}
    span = next(iter(spans.values()))
    for i in written:
        if _is_sentinel(row, i):
            span = spans.get(i, [])
        else:
            span.append(i)
    merged = [j for i in text for j in (spans[i] if _is_sentinel(row, i) else [i])]
    return merged[: row.max_tokens]


def _is_sentinel(row: Modality, i: int) -> bool:
    return row.first_sentinel <= i < row.first_sentinel + row.sentinels


def _clean(row: Modality, given: Given) -> list[Tensor]:
    """Texts without EOS and sentinels."""
    texts = [[i for i in text if i != row.eos and not _is_sentinel(row, i)] for text in given.lists()]
    return [torch.tensor(text, dtype=torch.long) for text in texts]


def blank(row: Modality, rows: int, device: torch.device) -> Given:
    """What 4M's guidance shows of a text that is hidden, `[S_1]`, or of vectors, a zero vector."""
    first = torch.full((rows, 1), row.first_sentinel + 1) if row.kind == "text" else torch.zeros(rows, 1, row.dim)
    return Given(first.to(device), torch.ones(rows, 1, dtype=torch.bool, device=device))


def _nothing(row: Modality, rows: int, device: torch.device) -> Given:
    length = row.length if row.kind == "grid" else 0
    values = torch.zeros(rows, length, dtype=torch.long, device=device)
    return Given(values, torch.zeros_like(values, dtype=torch.bool))


def _check_given(name: str, row: Modality, given: Given) -> None:
    """Raises the errors for contents that do not fit a row of the table."""
    length = given.known.shape[1]
    shape = given.known.shape if row.discrete else (*given.known.shape, row.width)
    if given.values.shape != shape or not (length == row.length if row.grid else length <= row.max_tokens):
        allowed = f"(rows, {row.length})" if row.grid else f"(rows, at most {row.max_tokens})"
        width = "" if row.discrete else f" of {row.width} floats each"
        raise ValueError(
            f"given {name!r} has values {tuple(given.values.shape)} and known {tuple(given.known.shape)}, "
            f"expected {allowed}{width}"
        )
    ids = given.values[given.known]
    if row.discrete and len(ids) and (ids.min() < 0 or ids.max() >= row.vocab_size):
        raise ValueError(f"given {name!r} has ids in [{ids.min()}, {ids.max()}], expected ids in [0, {row.vocab_size})")
