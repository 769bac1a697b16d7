"""Starts a model from another one: what both know is taken over by name, what only the new one knows stays as it is.

Notable:
* the two may differ in order, number and sharing of their modalities: rows move modality by modality, on each side;
* a modality that the source lacks starts from the same one at another resolution (`tok_rgb@448` from `tok_rgb@224`), or
  from the one that `like` names. 4M itself starts such tables anew;
* positions are computed for the new grid; where they are learned, they are resampled to it;
* decoupled adapters come along, each set for the modalities that start from one of its own;
* temperatures start at 1, for a model that is trained further has to be calibrated again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from fourm import checkpoint
from fourm.modalities import Modality
from fourm.model.embeddings import Embeddings
from fourm.model.fourm import FourM, own_card
from fourm.model.lora import CARD, base_of, fuse_lora, inject_lora, inject_routed, load_adapter, routed

EQUAL = ("dim", "encoder_depth", "decoder_depth", "heads", "mlp_ratio", "gated_mlp")
# May be added, but not left out.
GROWING = ("qkv_bias", "proj_bias", "mlp_bias", "norm_bias", "qk_norm", "registers")
OTHER = ("share_modality_embeddings", "tied_head", "blank_hidden", "decoder_causal", "decoder_separate")
SIDES = ("encoder_embeddings", "decoder_embeddings")


@dataclass
class Plan:
    """What was matched.

    Attributes:
        lines: For people: one per modality, then what else there is to say.
        kept: Of every parameter the rows (first, one after the last) that were taken over.
    """

    lines: list[str] = field(default_factory=list)
    kept: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def open_source(path: str | Path) -> tuple[FourM, str]:
    """A model to start from.

    Args:
        path: What `FourM.from_pretrained` loads; the folder of a run, for its finished model or else its newest
            checkpoint (the moving average, and with its adapters, where there are any); or adapters in peft's format,
            which are put into the model they name.

    Returns:
        The model, and from where `FourM.from_pretrained` loads it on any later day: a folder as an absolute path, or a
        hub id as it was given; '' for what was put together here, or may be removed as checkpoints are.

    Raises:
        ValueError: None of these is there, or its parts do not fit.
    """
    found = checkpoint.resolve(path)
    if (found / CARD).is_file():
        model, _ = open_source(base_of(found))
        model.base_hash = model.fingerprint()
        load_adapter(model, found)
        fuse_lora(model)
        return model, ""
    if (found / "model" / "config.json").is_file():
        found = found / "model"
    elif found.is_dir():
        found = checkpoint.latest(found) or found
        if (found / "state.json").is_file():
            return _of_checkpoint(found), ""
    given = Path(path).exists() or found.name == "model"
    return FourM.from_pretrained(found), str(found.resolve() if given else path)


def _of_checkpoint(folder: Path) -> FourM:
    """The model that a run would have ended with here."""
    card, lora = own_card(folder), checkpoint.read_json(folder / "state.json").get("config", {}).get("lora")
    if not card:
        raise ValueError(f"{folder} is not a checkpoint of an any-to-any model")
    model = FourM.from_card(card)
    if lora and model.route is None:
        inject_lora(model, **lora)
    average = folder / "ema.safetensors"
    model.load_unique_state_dict(
        checkpoint.read_tensors(average if average.is_file() else folder / "model.safetensors")
    )
    fuse_lora(model)
    return model.eval()


@torch.no_grad()
def warm_start(model: FourM, source: FourM, like: Mapping[str, str] | None = None) -> Plan:
    """Takes over the source's weights.

    Args:
        model: Freshly initialised.
        source: Where the weights come from.
        like: Modalities of the model that start from a modality of the source with another name.

    Raises:
        ValueError: The models differ in shape, or `like` names modalities that are not there or not alike.
    """
    _compare(model, source)
    origins = {name: _origin(name, model, source, like or {}) for name in model.space.names}
    sets = _take_sets(model, source, origins) if source.route is not None else []
    plan, names = Plan(), {parameter: name for name, parameter in model.named_parameters()}

    def take(parameter: Tensor, rows: Tensor, start: int = 0) -> None:
        parameter[start : start + len(rows)] = rows.to(parameter)
        kept = plan.kept.setdefault(names[parameter], [])  # type: ignore[index]
        kept += [] if (start, start + len(rows)) in kept else [(start, start + len(rows))]

    known = dict(source.named_parameters())
    fresh: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if name.startswith((*SIDES, "to_logits.")):
            continue
        if name in known:
            take(parameter, known[name])
        if name not in known or len(known[name]) < len(parameter):
            fresh[re.sub(r"\.\d+\.", ".*.", name)] = None

    table: list[tuple[str, ...]] = [("modality", "from", "encoder", "decoder")]
    cells = {side: _side(model, source, side, origins, take) for side in SIDES}
    for name in model.space.names:
        table.append((name, origins[name] or "-", *(cells[side].get(name, "-") for side in SIDES)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    plan.lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]

    used = {(side, origins[name]) for side in SIDES for name in getattr(model, side).names}
    unused = [
        f"{name} ({side[:7]})" for side in SIDES for name in getattr(source, side).names if (side, name) not in used
    ]
    notes = {"decoupled adapters": sets, "new, outside of the modalities": list(fresh)}
    notes["not used of the source"] = unused
    notes["different"] = [
        f"{key} is {getattr(source.config, key)} in the source, {getattr(model.config, key)} here"
        for key in OTHER
        if getattr(source.config, key) != getattr(model.config, key)
    ]
    if model.config.tied_head and not source.config.tied_head:
        notes["different"].append("the tied table takes the rows of the source's head")
    if model.config.share_modality_embeddings and not source.config.share_modality_embeddings:
        notes["different"].append("shared modality embeddings are those of the source's encoder")
    if (source.temperature != 1).any():
        notes["different"].append("temperatures of the source are left behind, all are 1")
    plan.lines += [f"{what}: {', '.join(items)}" for what, items in notes.items() if items]
    return plan


def _take_sets(model: FourM, source: FourM, origins: Mapping[str, str | None]) -> list[str]:
    """Adapts the model as the source is; says of each set what it is for. Weights are taken over by name, later."""
    sets = [[name for name in model.space.names if origins[name] in own] for own in source.routed_sets]
    rows = [0, *(number for number, names in enumerate(sets, 1) if names)]
    inject_routed(model, list(filter(None, sets)), source.routed_card()["ranks"])
    gates = routed(source)
    for name, layer in routed(model).items():
        layer.gate.copy_(gates[name].gate[rows])
    return [
        f"the set of {' and '.join(own)} " + (f"serves {' and '.join(names)}" if names else "is left out")
        for own, names in zip(source.routed_sets, sets, strict=True)
    ]


def _compare(model: FourM, source: FourM) -> None:
    pairs = {key: (getattr(source.config, key), getattr(model.config, key)) for key in EQUAL + GROWING}
    wrong = {key: (old, new) for key, (old, new) in pairs.items() if (old != new if key in EQUAL else old > new)}
    if wrong:
        listed = (f"{key} is {old} in the source, {new} here" for key, (old, new) in wrong.items())
        raise ValueError(f"init: the source does not fit the model: {'; '.join(listed)}")


def _alike(a: Modality, b: Modality) -> bool:
    """Whether tokens of both mean the same to tables and projections, as far as shapes tell."""
    return (a.kind, a.vocab_size, a.patch_size, a.channels, a.dim) == (
        b.kind, b.vocab_size, b.patch_size, b.channels, b.dim)  # fmt: skip


def _origin(name: str, model: FourM, source: FourM, like: Mapping[str, str]) -> str | None:
    """The modality of the source that one of the model starts from."""
    wrong = sorted(set(like) - set(model.space.names)) + sorted(set(like.values()) - set(source.space.names))
    if wrong:
        ours, theirs = (", ".join(each.space.names) for each in (model, source))
        raise ValueError(f"like: there is no modality {', '.join(wrong)}; the model has {ours}, the source {theirs}")
    stem = name.partition("@")[0]
    other = [each for each in source.space.names if each.partition("@")[0] == stem]
    for origin in [like[name]] if name in like else [name] if name in source.space.names else other:
        if _alike(model.space[name], source.space[origin]):
            return origin
        if name in like:
            raise ValueError(f"like: {name} is {_said(model.space[name])}, but {origin} of the source is "
                             f"{_said(source.space[origin])}; they must agree")  # fmt: skip
    return None


def _said(row: Modality) -> str:
    return f"{row.kind} of {f'{row.vocab_size} ids' if row.discrete else f'width {row.width}'}"


def _side(
    model: FourM, source: FourM, prefix: str, origins: Mapping[str, str | None], take: Callable[..., None]
) -> dict[str, str]:
    """Moves what belongs to one side; says of each modality there what became of it."""
    side, other = cast(Embeddings, getattr(model, prefix)), cast(Embeddings, getattr(source, prefix))
    head = source.decoder_embeddings.tokens if source.to_logits is None else source.to_logits
    said: dict[str, str] = {}
    written: dict[int, str] = {}  # first row of a vocabulary -> the modality that brought it
    before: list[str] = []  # modalities whose row of a shared table the encoder has brought
    if prefix == SIDES[1] and model.config.share_modality_embeddings:
        before = [name for name in model.space.inputs() if origins[name] in source.encoder_embeddings.names]
    for name in sorted(side.names, key=lambda name: origins[name] not in other.names):
        row, origin = side.space[name], origins[name]
        first = side.vocabulary(name).start if row.discrete else -1
        said[name] = f"{row.vocab_size} rows" if row.discrete else "projection"
        if origin is None or origin not in other.names:
            said[name] += f" of {written[first]}" if first in written else " new"
            if origin is None and name in source.space.names:
                said[name] += f" ({_said(source.space[name])} there)"
            continue
        number, was = other.space.number[origin], other.space[origin]
        place = int(side.modality_row[side.space.number[name]])
        if name not in before:
            take(side.modality, other.modality[other.modality_row[number], None], place)
        if not row.discrete:
            for mine, old in zip(side.project[name].parameters(), other.project[origin].parameters(), strict=True):
                take(mine, old)
        elif first in written:
            shared = other.vocabulary(origin) == other.vocabulary(str(origins[written[first]]))
            said[name] += "" if shared else f" of {written[first]}"
        else:
            written[first], rows = name, other.vocabulary(origin)
            scores = prefix == SIDES[1] and model.to_logits is None
            take(side.tokens.weight, (head if scores else other.tokens).weight[rows], first)
            if prefix == SIDES[1] and model.to_logits is not None:
                take(model.to_logits.weight, head.weight[rows], first)
        if name in side.learned:
            table = other.position_table()[other.space.position_offset[number] :][: was.length]
            if row.grid and was.grid and row.grid != was.grid:
                said[name] += ", positions resampled from {}x{}".format(*was.grid)
                table = resample_abs_pos_embed(table[None], list(row.grid), list(was.grid), num_prefix_tokens=0)[0]
            elif len(table) < row.length:
                said[name] += f", {row.length - len(table)} positions new"
            take(side.learned_positions, table[: row.length], side.learned[name].start)
        elif origin in other.learned:
            said[name] += ", positions computed, not learned as there"
    return said
