"""4M's masked encoder-decoder over one token space (Mizrahi et al. 2023, section 2).

Notable:
* tokens are selected before they are embedded: the model sees the kept tokens only, never whole modalities;
* one token table, one position table, one modality table a side, whatever the number of modalities;
* the blocks see the tokens of all samples end to end and no empty slots; only attention knows the samples;
* decoder tokens see the other tokens of their own modality (all of them in a grid, earlier ones in a text) and every
  encoder token, nothing else;
* the context is the projected encoder output plus the encoder's position and modality embeddings again;
* a sample without inputs sees one empty slot, so "given nothing" is an ordinary input;
* the head is tied to the decoder's token table, and a token is only scored within its modality's vocabulary.

B rows, N encoder slots, M decoder slots, K and T of them filled, R registers, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from fourm.checkpoint import read_json, read_tensors, resolve
from fourm.masking.batch import MaskedBatch
from fourm.modalities import TokenSpace
from fourm.model import official
from fourm.model.attention import Blocks, offsets
from fourm.model.config import FourMConfig
from fourm.model.embeddings import Embeddings
from fourm.model.head import Segment, linear_cross_entropy, two_uses
from fourm.model.layers import DecoderBlock, DecoderState, EncoderBlock, LayerNorm
from fourm.model.lora import Route, inject_routed, routed
from fourm.official_files import read_official


@dataclass(frozen=True)
class Context:
    """What the decoder may look at.

    Attributes:
        hidden: (K, D) tokens of B rows, end to end.
        lengths: B numbers of tokens.
        seen: B numbers of those that the decoder sees, the first of each row.
        mod: (K,) their modality numbers, -1 for registers and empty slots.
    """

    hidden: Tensor
    lengths: Sequence[int]
    seen: Sequence[int]
    mod: Tensor

    def select(self, rows: Tensor) -> Context:
        """These rows (R,), also repeated ones."""
        chosen = rows.tolist()
        lengths, seen = ([numbers[row] for row in chosen] for numbers in (self.lengths, self.seen))
        parts = (tensor.split(list(self.lengths)) for tensor in (self.hidden, self.mod))
        hidden, mod = (torch.cat([part[row] for row in chosen]) for part in parts)
        return Context(hidden, lengths, seen, mod)


@dataclass
class DecoderCache:
    """What is remembered while a text is decoded token by token: a state per block, the cross-attention mask, if
    anything is hidden, and the table of positions."""

    states: list[DecoderState]
    mask: Tensor | None  # (B, 1, 1, N + 1)
    positions: Tensor
    step: int = 0

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (R,) of the batch."""
        for state in self.states:
            state.select(rows)
        self.mask = None if self.mask is None else self.mask[rows]


class FourM(nn.Module):
    """Any-to-any masked model over the modalities of a `TokenSpace`."""

    is_grid: Tensor
    temperature: Tensor
    vocabulary_start: Tensor
    encoder: Sequence[EncoderBlock]
    decoder: Sequence[DecoderBlock]

    def __init__(self, config: FourMConfig, space: TokenSpace):
        super().__init__()
        self.config, self.space = config, space
        self.route: Route | None = None  # of decoupled adapters
        self.routed_sets: list[list[str]] = []
        self.base_hash = ""  # `fingerprint` of the model that this one was trained from
        dim = config.dim
        rows = space.names if config.share_modality_embeddings else None
        self.encoder_embeddings = Embeddings(space, dim, space.inputs(), rows=rows)
        self.decoder_embeddings = Embeddings(space, dim, space.outputs(), decoder=True, rows=rows)
        self.decoder_embeddings.shares_head = config.tied_head
        if config.share_modality_embeddings:
            self.decoder_embeddings.modality = self.encoder_embeddings.modality
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.register_tokens = nn.Parameter(torch.empty(config.registers, dim)) if config.registers else None
        rates = _ramp(config.drop_path, config.encoder_depth)
        self.encoder = nn.ModuleList(EncoderBlock(config, rate) for rate in rates)  # type: ignore[assignment]
        self.encoder_norm = LayerNorm(dim, config.norm_bias)
        self.decoder_proj_context = nn.Linear(dim, dim)
        rates = _ramp(config.drop_path, config.decoder_depth)
        self.decoder = nn.ModuleList(DecoderBlock(config, rate) for rate in rates)  # type: ignore[assignment]
        self.decoder_norm = LayerNorm(dim, config.norm_bias)
        vocab_size = self.decoder_embeddings.tokens.num_embeddings
        self.to_logits = None if config.tied_head else nn.Linear(dim, vocab_size, bias=False)
        is_grid = torch.from_numpy(np.append(space.is_grid, True))  # the last entry answers for empty slots (-1)
        self.register_buffer("is_grid", is_grid, persistent=False)
        self.register_buffer("vocabulary_start", torch.from_numpy(space.vocab_offset), persistent=False)
        self.register_buffer("temperature", torch.ones(len(space)))  # divides the logits of each modality
        self.init_weights()

    def init_weights(self) -> None:
        """Initialises every parameter (4M's scheme): Xavier for matrices, each packed projection as its own matrix.

        With `zero_init` the last matrix of every branch is 0 instead (Zhang et al. 2019, Fixup).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                packed = {"qkv": 3, "kv": 2}.get(name.rsplit(".", 1)[-1], 1)
                bound = (6 / (module.out_features / packed + module.in_features)) ** 0.5
                nn.init.uniform_(module.weight, -bound, bound)
                if self.config.zero_init and name.endswith((".proj", ".fc2")):
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for side in (self.encoder_embeddings, self.decoder_embeddings):
            nn.init.normal_(side.tokens.weight, std=0.02)
            nn.init.normal_(side.modality, std=0.02)
            if side.learned_positions is not None:
                nn.init.normal_(side.learned_positions, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=0.02)

    def encode(self, batch: MaskedBatch) -> Context:
        """Runs the encoder over the given tokens. A row without any has one empty slot instead."""
        states, place, _, lengths, given, mod = self._encoded(batch)
        seen = [some or length for some, length in zip(given, lengths, strict=True)]
        return Context(self.decoder_proj_context(states) + place, lengths, seen, mod)

    def encoder_states(self, batch: MaskedBatch) -> Tensor:
        """Normed states of registers and given tokens, (B, R + N, D); zeros where a slot is empty."""
        states, _, slots, *_ = self._encoded(batch)
        (rows, width), extra = batch.mod.shape, self.config.registers + 1
        return _scatter(states, slots, rows, width + extra)[:, :-1]

    def _encoded(self, batch: MaskedBatch) -> tuple[Tensor, Tensor, Tensor, list[int], list[int], Tensor]:
        """Runs the encoder over K tokens: registers and given ones, and an empty slot where there is nothing else.

        Returns:
            Their normed states (K, D), their place (K, D), and where they stand (K,) among B * (R + N + 1) slots; of
            every row their number, and how many come before the empty slots; and their modality numbers (K,).
        """
        side, registers = self.encoder_embeddings, self.config.registers
        columns = (F.pad(batch.ids, (registers, 1)), F.pad(batch.pos, (registers, 1)))
        mod = F.pad(batch.mod, (registers, 1), value=-1)
        given = mod >= 0
        given[:, :registers] = True
        used = torch.cat([given[:, :-1], ~given.any(1, keepdim=True)], 1) | (not self.config.packed)
        slots = used.flatten().nonzero()[:, 0]
        ids, pos, mod = (column.flatten()[slots] for column in (*columns, mod))
        order, width = used.flatten().cumsum(0) - 1, batch.mod.shape[1]
        where = {name: order[slot + slot // width * (registers + 1) + registers] for name, slot in batch.slots.items()}
        place = side.place(pos, mod)
        x = side.content(ids[None], mod[None], batch.rows, where)[0] + place
        if self.register_tokens is not None:
            x = x + F.pad(self.register_tokens, (0, 0, 0, 1))[(slots % used.shape[1]).clamp(max=registers)]
        numbers = torch.stack([used.sum(1), given.sum(1)])
        lengths, before = numbers.tolist()
        ranges = None
        if not self.config.packed:  # given tokens see each other, empty slots too
            split = (numbers[0].cumsum(0) - numbers[0] + numbers[1])[slots // used.shape[1]]
            known, length, some = given.flatten()[slots], *numbers[:, slots // used.shape[1]]
            ranges = torch.where(known, split - some, split), torch.where(known, split, split - some + length)
        blocks = Blocks(lengths, lengths, offsets(lengths), x.device, self.config.attention, ranges)
        if self.route is not None:
            self.route.follow("source", mod)
        for block in self.encoder:
            x = block(x, blocks)
        return self.encoder_norm(x), place, slots, lengths, before, mod

    def decode(self, batch: MaskedBatch, context: Context, table: Tensor | None = None) -> Tensor:
        """Runs the decoder over the asked tokens: (B, M, D), zeros where a slot is empty; `table` as in `look_up`."""
        side, (rows, width) = self.decoder_embeddings, batch.target_mod.shape
        used = (batch.target_mod >= 0) | (not self.config.packed)
        slots = used.flatten().nonzero()[:, 0]
        fed, pos, mod = (column.flatten()[slots] for column in (batch.target_in, batch.target_pos, batch.target_mod))
        tokens = side.look_up(fed, mod, table)
        x = torch.where((fed < 0)[:, None], self.mask_token.to(tokens.dtype), tokens)
        x = x * (mod >= 0)[:, None] + side.place(pos, mod)
        lengths, backend = used.sum(1).tolist(), self.config.attention
        ranges = self._visible(slots // width, mod)
        own = Blocks(lengths, lengths, offsets(lengths), x.device, backend, ranges)
        cross = Blocks(lengths, context.seen, offsets(context.lengths), x.device, backend)
        if self.route is not None:
            self.route.follow("source", context.mod)
            self.route.follow("target", mod)
        for block in self.decoder:
            x = block(x, context.hidden, own, cross)
        return _scatter(self.decoder_norm(x), slots, rows, width)

    def _visible(self, row: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        """First token that each of the asked tokens sees, and the one after the last: (T,) rows and modalities."""
        _, run, count = torch.unique_consecutive(
            row * (len(self.space) + 1) + mod, return_inverse=True, return_counts=True
        )
        end = count.cumsum(0)
        first = (end - count)[run] if self.config.decoder_separate else torch.searchsorted(row, row)
        whole = self.is_grid[mod] & (not self.config.decoder_causal)
        return first, torch.where(whole, end[run], torch.arange(1, len(mod) + 1, device=mod.device))

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Hidden states of the asked tokens, (B, M, D)."""
        return self.decode(batch, self.encode(batch))

    def logits(self, hidden: Tensor, name: str) -> Tensor:
        """(..., D) -> (..., vocab_size of the modality): scores of the modality's own ids."""
        return F.linear(
            hidden / self.temperature[self.space.number[name]], self._head()[self.decoder_embeddings.vocabulary(name)]
        )

    def _head(self) -> Tensor:
        """(vocab_size, D): a row scores its id."""
        return (self.decoder_embeddings.tokens if self.to_logits is None else self.to_logits).weight

    def counts(self, batch: MaskedBatch) -> Tensor:
        """Asked tokens per modality, (number of modalities,): the denominators of the loss."""
        return torch.bincount(batch.target_mod.flatten() + 1, minlength=len(self.space) + 1)[1:].float()

    def loss(self, batch: MaskedBatch, counts: Tensor | None = None, kind: str = "mod") -> dict[str, Tensor]:
        """Cross-entropy of the asked tokens, in nats.

        Args:
            batch: What is given and asked.
            counts: Denominators per modality, of all the batches that make one step; default: of this batch.
            kind: `mod`, the mean over predictable modalities of each one's mean, where one without tokens counts as 0
                (4M's recipes), or `token`, the mean over tokens.

        Returns:
            `loss`, and `loss/<modality>` for each modality asked in this batch: its part of the mean.
        """
        if kind not in ("mod", "token"):
            raise ValueError(f"loss is {kind!r}, allowed are 'mod' and 'token'")
        counts = self.counts(batch) if counts is None else counts
        table, head = two_uses(self._head()) if self.to_logits is None else (None, self.to_logits.weight)
        hidden = self.decode(batch, self.encode(batch), table)
        names, sizes, states, ids, _ = self.sorted_targets(batch, hidden)
        if not names:
            nothing = hidden.sum() + head.sum()  # processes whose batches ask wait for the gradients of all weights
            trained = next((p for p in self.parameters() if p.requires_grad), self.mask_token)
            return {"loss": 0.0 * (nothing if nothing.requires_grad else trained.sum())}
        denominators = counts[[self.space.number[name] for name in names]]
        if kind == "mod":
            weights = 1 / (denominators * len(self.space.outputs()))
        else:
            weights = (1 / counts.sum().clamp(min=1)).expand(len(names))
        segments = [Segment(*part) for part in zip(sizes, map(self.decoder_embeddings.vocabulary, names), strict=True)]
        loss, sums = linear_cross_entropy(states, head, ids, segments, weights)
        means = (sums / denominators).unbind()
        return {"loss": loss} | {f"loss/{name}": mean for name, mean in zip(names, means, strict=True)}

    @torch.no_grad()
    def token_nll(self, batch: MaskedBatch, hidden: Tensor | None = None) -> Tensor:
        """Nats of every asked token, (B, M); 0 where the slot is empty. `hidden` (B, M, D) spares running the model."""
        hidden = self(batch) if hidden is None else hidden
        nll = hidden.new_zeros(batch.target.numel())
        for _, scores, ids, where in self.scores(batch, hidden):
            nll[where] = F.cross_entropy(scores.float(), ids, reduction="none")
        return nll.view(batch.target.shape)

    def scores(self, batch: MaskedBatch, hidden: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Per modality that is asked: name, logits (K, vocab_size), ids within its vocabulary (K,), places (K,)."""
        names, sizes, *tensors = self.sorted_targets(batch, hidden)
        for name, states, ids, places in zip(names, *(tensor.split(sizes) for tensor in tensors), strict=True):
            yield name, F.linear(states, self._head()[self.decoder_embeddings.vocabulary(name)]), ids, places

    def sorted_targets(self, batch: MaskedBatch, hidden: Tensor) -> tuple[list[str], list[int], Tensor, Tensor, Tensor]:
        """Sorts the asked tokens by modality.

        Args:
            batch: B rows of M asked slots.
            hidden: (B, M, D) their states.

        Returns:
            Names of the modalities that are asked; how many tokens each; and of these K tokens the states (K, D) as the
            head gets them, ids within the vocabulary (K,) and places in the flattened (B * M) slots (K,).
        """
        mod = batch.target_mod.flatten()
        counts = torch.bincount(mod + 1, minlength=len(self.space) + 1).tolist()
        asked = [(name, count) for name, count in zip(self.space.names, counts[1:], strict=True) if count]
        places = mod.argsort(stable=True)[counts[0] :]
        mod = mod[places]
        states = hidden.flatten(0, 1).index_select(0, places) / self.temperature[mod].unsqueeze(1)
        ids = batch.target.flatten()[places] - self.vocabulary_start[mod]
        return [name for name, _ in asked], [count for _, count in asked], states, ids, places

    def start_decoding(self, context: Context, length: int) -> DecoderCache:
        """Prepares to decode one text of at most `length` tokens per row of the context."""
        hidden = pad_sequence(context.hidden.split(list(context.lengths)), batch_first=True)
        seen = torch.tensor(context.seen, device=hidden.device)
        mask = (torch.arange(hidden.shape[1], device=hidden.device) < seen[:, None])[:, None, None]
        if self.route is not None:
            mod = context.mod.split(list(context.lengths))
            self.route.follow("source", pad_sequence(mod, batch_first=True, padding_value=-1))
        states = [DecoderState(*block.project_context(hidden), length) for block in self.decoder]
        return DecoderCache(states, None if mask.all() else mask, self.decoder_embeddings.position_table())

    def decode_next(self, ids: Tensor, pos: Tensor, mod: Tensor, cache: DecoderCache) -> Tensor:
        """Feeds one more token per row ((B,) rows of the tables, modality numbers); hidden states (B, D)."""
        side = self.decoder_embeddings
        x = (side.look_up(ids, mod) + side.place(pos, mod, cache.positions))[:, None]
        if self.route is not None:
            self.route.follow("target", mod[:, None])
        for block, state in zip(self.decoder, cache.states, strict=True):
            x = block.step(x, state, cache.step, cache.mask)
        cache.step += 1
        return self.decoder_norm(x)[:, 0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, all that `from_pretrained` needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.config_json())
        save_file(self.unique_state_dict(), folder / "model.safetensors", metadata={"format": "pt"})

    def config_json(self) -> str:
        """All that rebuilds the model but its weights; not how it is computed."""
        how = ("attention", "packed")
        shape = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in how}
        card: dict[str, Any] = {"model": shape, "modalities": self.space.to_dict()}
        if self.base_hash:
            card["base_hash"] = self.base_hash
        if self.route is not None:
            card["routed"] = self.routed_card()
        return json.dumps(card, indent=2) + "\n"

    def routed_card(self) -> dict[str, Any]:
        """The arguments with which `inject_routed` makes the decoupled adapters of this model."""
        ranks = {name: layer.lora_down.out_features for name, layer in routed(self).items()}
        return {"sets": self.routed_sets, "ranks": ranks}

    def fingerprint(self) -> str:
        """SHA-256 of all weights with their names, but for temperatures, which calibration may fit later."""
        found, state = hashlib.sha256(), self.unique_state_dict()
        del state["temperature"]
        for name, tensor in sorted(state.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def unique_state_dict(self) -> dict[str, Tensor]:
        """The state dict, with shared tensors under their first name only."""
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config.share_modality_embeddings:
            state.pop("decoder_embeddings.modality")
        return state

    def load_unique_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `unique_state_dict`; missing, unexpected or misshapen tensors are errors."""
        if self.config.share_modality_embeddings:
            state = state | {"decoder_embeddings.modality": state["encoder_embeddings.modality"]}
        self.load_state_dict(state)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> FourM:
        """Loads a model.

        Args:
            path: A folder or Hugging Face hub id, of ours or of 4M's (`EPFL-VILAB/4M-21_XL`), or a file of 4M's
                (`.safetensors`, or a training checkpoint `.pth`).

        Raises:
            ValueError: Nothing of that kind is there, or its tensors do not fit its config.
        """
        found = resolve(path)
        card = own_card(found)
        if not card:
            return cls.from_official(*read_official(found))
        model = cls.from_card(card)
        model.load_unique_state_dict(read_tensors(found / "model.safetensors"))
        return model.eval()

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> FourM:
        """The model that `config_json` described, its weights unset."""
        with WithoutInit():
            model = cls(FourMConfig(**card["model"]), TokenSpace.from_dict(card["modalities"]))
            if "routed" in card:
                inject_routed(model, **card["routed"])
        model.base_hash = card.get("base_hash", "")
        return model

    @classmethod
    def from_official(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FourM:
        """Builds a model from what an official checkpoint holds.

        Args:
            config: Of 4M's `FM`, or the arguments of its training script.
            tensors: State dict; equal token tables and heads become one tensor.

        Raises:
            ValueError: A config we do not know, or missing, unexpected or misshapen tensors; names them.
        """
        shape, space = official.our_config(config)
        with WithoutInit():
            model = cls(dataclasses.replace(shape, tied_head=official.is_tied(tensors)), space)
        official.load(model, tensors)
        return model.eval()

    def save_official(self, path: str | Path) -> None:
        """Writes the model as 4M's own `FM` loads it.

        Args:
            path: A `.safetensors` file, with the config in its header, or a folder for one and a `config.json`.

        Raises:
            ValueError: The model has modalities that 4M does not have, or decoupled adapters.
        """
        if self.route is not None:
            raise ValueError("the model has decoupled adapters, which 4M's format cannot say")
        official.save(self, path)


class WithoutInit(TorchFunctionMode):
    """Models built inside leave their parameters unset, to be loaded: drawing those of 4M-21 XL takes a minute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls everything but `torch.nn.init`."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def own_card(folder: Path) -> dict[str, Any]:
    """What `FourM.config_json` wrote into a folder; nothing if it holds no model of ours."""
    file = folder / "config.json"
    card = read_json(file) if file.is_file() else {}
    return card if "modalities" in card else {}


def _ramp(last: float, depth: int) -> list[float]:
    """Drop-path rates of `depth` blocks, rising linearly from 0."""
    return np.linspace(0, last, depth).tolist()


def _scatter(x: Tensor, slots: Tensor, rows: int, width: int) -> Tensor:
    """(T, D) into the flat slots (T,) of zeros (rows, width, D)."""
    return x.new_zeros(rows * width, x.shape[1]).index_copy(0, slots, x).view(rows, width, -1)
