"""Models that learned different modalities from one base become one model that knows them all, without training.

Notable:
* what modalities share (blocks, norms, the projection of the context, single tokens) is merged as weight deltas to the
  base; adapters count as the products of their factors, never as factors (`factor_mean` does that, for comparison);
* what a modality has to itself (rows of tables, projections) is taken over from whoever has it; where two have it and
  differ, it is a conflict with a name, and a policy decides;
* `damc` (Chen et al. 2024) keeps each branch's set of decoupled adapters for its own modalities and merges only the
  sets that all others share; `convert` does so with plain adapters, which then serve as both.

N branches, P numbers in a tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fourm import runtime
from fourm.modalities import Modality, TokenSpace
from fourm.model.embeddings import Embeddings
from fourm.model.fourm import FourM
from fourm.model.lora import LoRALinear, RoutedLinear, adapters, inject_routed, load_adapter, routed
from fourm.model.warm_start import EQUAL, GROWING, SIDES, open_source

PRIVATE = (*SIDES, "to_logits.")
# What base and branches must agree in; the rest of a config changes neither tensors nor what they mean.
SHAPE = (*EQUAL, *GROWING, "tied_head", "share_modality_embeddings", "decoder_causal", "decoder_separate")
ROUTED = ("damc", "convert")
POLICIES = ("error", "base", "merge", "first")
Weights = Mapping[str, float]


@dataclass(frozen=True)
class MergeConfig:
    """How deltas become one.

    Args:
        method: `naive` (their mean), `factor_mean` (the mean of adapters' factors, which is wrong: it has the products
            of one model's with another's), `damc` (decoupled adapters), `convert` (plain ones, decoupled now),
            `task_arithmetic` (their sum), `ties` (large ones that agree in sign), `dare` (some, at random) or `slerp`
            (of two, on the arc between them, tensor by tensor).
        scale: Of what is added to the base; 0 for what the method's authors advise: 0.4 for `task_arithmetic`, 1 for
            the others. Decoupled adapters have `weights` only.
        keep: Share of a branch's numbers, the largest, that `ties` keeps.
        drop: Share of them that `dare` leaves out. Half of them and a mean are ours; its authors leave out more, of
            models whose deltas they add up.
        seed: Of that choice.
        conflicts: What becomes of tensors that belong to one modality and differ between branches: `error`; `base`;
            `merge` (as what is shared), both for modalities of the base; `first`; or the name of a branch.
    """

    method: Literal["naive", "factor_mean", "damc", "convert", "task_arithmetic", "ties", "dare", "slerp"] = "naive"
    scale: float = 0.0
    keep: float = 0.2
    drop: float = 0.5
    seed: int = 0
    conflicts: str = "error"

    def __post_init__(self) -> None:
        if self.method not in (*MERGES, "factor_mean", *ROUTED):
            raise ValueError(f"method is {self.method!r}, allowed are {', '.join((*MERGES, 'factor_mean', *ROUTED))}")
        if self.method in ROUTED and self.scale not in (0, 1):
            raise ValueError(f"scale is {self.scale}, but {self.method} keeps adapters as they are; use `weights`")
        if not (0 < self.keep <= 1 and 0 <= self.drop < 1):
            raise ValueError(f"keep is {self.keep} and drop {self.drop}, expected shares in (0, 1] and [0, 1)")


@dataclass
class Plan:
    """What becomes of every tensor.

    Attributes:
        merged: Shared tensors that some branch moved, by name, with these branches.
        unmoved: Shared tensors that are the base's.
        kept: Tensors of one modality, by name, with the model that they come from.
        conflicts: Those that differ between branches, with these branches; also adapters of one modality that several
            branches have.
        routes: Sets of decoupled adapters: from which branch, for which modalities.
    """

    merged: dict[str, list[str]] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, list[str]] = field(default_factory=dict)
    routes: list[tuple[str, list[str]]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        said = [f"merged: {len(self.merged)} shared tensors; {len(self.unmoved)} more are the base's"]
        for branches in sorted({tuple(each) for each in self.merged.values()}):
            names = [name for name, each in self.merged.items() if tuple(each) == branches]
            said.append(f"  moved by {', '.join(branches)}: {len(names)}, such as {names[0]}")
        said += [f"kept of {name}, for its own tokens: adapters of {', '.join(own)}" for name, own in self.routes]
        for model in dict.fromkeys(self.kept.values()):
            names = [name for name, each in self.kept.items() if each == model]
            said.append(f"kept of {model}: {', '.join(names)}")
        return said + [f"conflict: {name} differs between {', '.join(who)}" for name, who in self.conflicts.items()]


def naive(deltas: Tensor, weights: Tensor) -> Tensor:
    """(N, ...), (N,) -> (...): the weighted sum; a mean where the weights add up to 1."""
    return torch.tensordot(weights, deltas, 1)


def ties(deltas: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of those that have the sign of the weighted sum (Yadav et al. 2023, after trimming)."""
    agrees = (deltas.sign() == naive(deltas, weights).sign()) & (deltas != 0)
    shares = agrees * weights.view(-1, *[1] * (deltas.ndim - 1))
    return (shares * deltas).sum(0) / shares.sum(0).clamp(min=torch.finfo(deltas.dtype).tiny)


def slerp(deltas: Tensor, weights: Tensor) -> Tensor:
    """The arc between two deltas, at the second's share of the weights (Shoemake 1985); a line where they point alike.

    Raises:
        ValueError: There are not two, or their weights add up to 0.
    """
    if len(deltas) != 2:
        raise ValueError(f"slerp joins two branches, got {len(deltas)}")
    if not weights.sum():
        raise ValueError(f"slerp divides by the sum of the weights, which is 0: {weights.tolist()}")
    lengths = deltas.flatten(1).norm(dim=1)
    share, product = weights[1] / weights.sum(), lengths.prod()
    angle = torch.acos((deltas[0].flatten() @ deltas[1].flatten() / product).clamp(-1, 1)) if product else product
    if angle.sin() < 1e-6:
        return naive(deltas, torch.stack([1 - share, share]))
    return naive(deltas, torch.stack([((1 - share) * angle).sin(), (share * angle).sin()]) / angle.sin())


# What joins the deltas of one tensor, (N, ...) and weights (N,); `ties` and `dare` have changed them before.
MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "naive": naive,
    "task_arithmetic": naive,
    "ties": ties,
    "dare": naive,
    "slerp": slerp,
}


def drop_and_rescale(delta: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Leaves out a share of the numbers at random and scales the others up, for the same mean (Yu et al. 2024)."""
    return delta * (torch.rand(delta.shape, generator=generator) >= share) / (1 - share)


def smallest_kept(deltas: Iterator[Tensor], share: float) -> float:
    """The size from which on numbers are among this share of the largest, of all tensors together."""
    sizes = torch.cat([delta.abs().flatten() for delta in deltas])
    return float(sizes.kthvalue(len(sizes) - max(1, round(share * len(sizes))) + 1).values)


def uniform(branches: Sequence[str], method: str) -> dict[str, float]:
    """Weights where none are given: those of a mean, or of a sum for `task_arithmetic`."""
    return dict.fromkeys(branches, 1.0 if method == "task_arithmetic" else 1 / len(branches))


def open_branch(path: str | Path, base: FourM, method: str) -> FourM:
    """A branch as `compose` takes it: what `open_source` finds; for `factor_mean` and `convert` with its plain adapters
    apart, which must explain all that its layers differ in from the base's.

    Args:
        path: Folder of a run or model.
        base: What it was trained from.
        method: Of `MergeConfig`.

    Raises:
        ValueError: No model is there, one of another base or shape, or not the adapters that are needed.
    """
    model, _ = open_source(path)
    _check_base(base)
    _check(str(path), model, base, base.fingerprint())
    if method in ("factor_mean", "convert"):
        folder = Path(path) / "adapter"
        if not folder.is_dir():
            raise ValueError(f"{path} has no `adapter`, which {method} needs: it joins plain adapters (`lora`)")
        load_adapter(model, folder)
        for name, layer in adapters(model).items():  # whose weight had taken the adapter up
            before, fused = base.get_parameter(f"{name}.weight").detach(), layer.linear.weight.detach()
            wanted = before.double() + added(layer).detach()
            if (fused - wanted).abs().max() > 1e-4 * wanted.abs().max():
                raise ValueError(f"{path}: {name} is not the base's with the adapter in {folder}; was it trained on?")
            fused.copy_(before)
    return model


@torch.no_grad()
def compose(
    base: FourM,
    branches: Mapping[str, FourM],
    config: MergeConfig = MergeConfig(),
    weights: Weights | None = None,
    dry_run: bool = False,
) -> tuple[FourM, Plan]:
    """One model of several that were trained from one base.

    Args:
        base: What all were trained from.
        branches: By name; see `open_branch`.
        config: How.
        weights: Of the branches; default: see `uniform`.
        dry_run: Say only what would be done, of conflicts too; the model is then not to be used.

    Returns:
        The model, like any other (with decoupled adapters of `damc` and `convert`), and what became of every tensor.

    Raises:
        ValueError: A branch of another base or shape, without the adapters that the method needs, or a conflict.
    """
    reserved = sorted({*POLICIES, "composed"} & set(branches))
    if reserved or not branches:
        raise ValueError(f"branches are {', '.join(branches) or 'none'}; expected at least one, of other names than "
                         f"{', '.join((*POLICIES, 'composed'))}")  # fmt: skip
    weights = uniform(list(branches), config.method) if weights is None else weights
    if set(weights) != set(branches):
        raise ValueError(f"weights are given for {', '.join(weights)}, the branches are {', '.join(branches)}")
    if config.conflicts not in (*POLICIES, *branches):
        raise ValueError(f"conflicts is {config.conflicts!r}, allowed are {', '.join((*POLICIES, *branches))}")
    _check_base(base)
    base_hash, space = base.fingerprint(), _union(base, branches)
    for name, branch in branches.items():
        _check(name, branch, base, base_hash)
        _check_adapters(name, branch, config.method)
    card: dict[str, Any] = {"model": dataclasses.asdict(base.config), "modalities": space.to_dict()}
    composed, plan = FourM.from_card(card | {"base_hash": base_hash}), Plan()
    shared = Shared(base, branches, config, weights)
    for name, weight in shared.names.items():
        moved = shared.moved(name)
        if not moved:
            plan.unmoved.append(name)
        elif config.method in ROUTED and (itself := shared.moved(name, adapted=False)):
            raise ValueError(f"{config.method}: {name} was trained itself in {', '.join(itself)}; only adapters may be")
        else:
            plan.merged[name] = moved
        composed.get_parameter(name).copy_(weight if config.method in ROUTED or not moved else shared.merged(name))
    unsolved = _take_private(composed, base, branches, shared, plan)
    if config.method in ROUTED:
        unsolved += _choose_sets(base, branches, config, plan)
    if unsolved and not dry_run:
        listed = "; ".join(f"{name} differs between {', '.join(plan.conflicts[name])}" for name in unsolved)
        said = "" if config.conflicts == "error" else f"policy {config.conflicts} has no value for them; "
        raise ValueError(f"conflicts: {listed}; {said}choose a policy: {', '.join((*POLICIES[1:], *branches))}")
    if config.method in ROUTED:
        _keep_sets(composed, branches, weights, plan)
    return composed.eval(), plan


def _check_base(base: FourM) -> None:
    if adapters(base) or base.route is not None:
        raise ValueError("the base has adapters; what they are merged with must be plain weights")


def _check(name: str, branch: FourM, base: FourM, base_hash: str) -> None:
    """Raises the errors of a branch of another base or shape."""
    if branch.base_hash != base_hash:
        said = f"from {branch.base_hash[:12]}" if branch.base_hash else "from nothing that it names"
        raise ValueError(f"branch {name} was trained {said}, the base is {base_hash[:12]}; all must have one base")
    pairs = {key: (getattr(branch.config, key), getattr(base.config, key)) for key in SHAPE}
    listed = "; ".join(f"{key} is {mine}, the base's {its}" for key, (mine, its) in pairs.items() if mine != its)
    if listed:
        raise ValueError(f"branch {name} has another shape than the base: {listed}")


def _check_adapters(name: str, branch: FourM, method: str) -> None:
    has = "decoupled" if branch.route is not None else "plain" if adapters(branch) else "no"
    needed = {"damc": "decoupled", "convert": "plain", "factor_mean": "plain"}.get(method)
    if has != needed and (needed or has == "decoupled"):
        raise ValueError(f"branch {name} has {has} adapters, {method} needs {needed or 'plain ones or none'}")


def added(layer: LoRALinear | RoutedLinear, number: int = 0) -> Tensor:
    """What adapters add to the weight of a layer, for tokens of a set: (out, in) float64."""
    strength = layer.scale if isinstance(layer, LoRALinear) else layer.gate[number].double()
    return (layer.lora_up.weight.double() * strength) @ layer.lora_down.weight.double()


class Shared:
    """What all modalities share: deltas of the branches to the base, and how they are merged."""

    def __init__(self, base: FourM, branches: Mapping[str, FourM], config: MergeConfig, weights: Weights):
        self.names = {name: weight for name, weight in base.named_parameters() if not name.startswith(PRIVATE)}
        self.weights = {name: dict(branch.named_parameters()) for name, branch in branches.items()}
        self.adapters: dict[str, dict[str, LoRALinear | RoutedLinear]] = {
            name: {**adapters(branch), **routed(branch)} for name, branch in branches.items()
        }
        self.config, self.branches = config, list(branches)
        self.shares = torch.tensor([weights[name] for name in branches], dtype=torch.float64)
        self.scale = config.scale or (0.4 if config.method == "task_arithmetic" else 1.0)
        self.cut = dict.fromkeys(branches, 0.0)
        if config.method == "ties":
            for name in branches:
                self.cut[name] = smallest_kept((self.delta(each, name) for each in self.names), config.keep)

    def delta(self, name: str, branch: str, adapted: bool = True) -> Tensor:
        """What a branch added to a tensor, in float64, which makes the mean of equal ones exact."""
        path, _, leaf = name.rpartition(".")
        adapter = self.adapters[branch].get(path)
        after = self.weights[branch][name if adapter is None else f"{path}.linear.{leaf}"]
        delta = after.double() - self.names[name].double()
        return delta + added(adapter) if adapter is not None and leaf == "weight" and adapted else delta

    def moved(self, name: str, adapted: bool = True) -> list[str]:
        """The branches that moved a tensor (for tokens of other modalities than theirs)."""
        return [branch for branch in self.branches if self.delta(name, branch, adapted).any()]

    def merged(self, name: str) -> Tensor:
        """The tensor's value in a model without adapters."""
        layers = [self.adapters[branch].get(name.removesuffix(".weight")) for branch in self.branches]
        if self.config.method == "factor_mean" and layers != [None] * len(layers):
            return self.names[name] + self.scale * self._product_of_means(name, layers)
        return self.join(name, self.names[name], [self.delta(name, branch) for branch in self.branches])

    def join(self, name: str, before: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        """The base's value and merged deltas."""
        changed = []
        for branch, delta in zip(self.branches, deltas, strict=True):
            if self.config.method == "ties":
                delta = delta * (delta.abs() >= self.cut[branch])
            elif self.config.method == "dare":
                generator = runtime.generator(self.config.seed, "dare", branch, name)
                delta = drop_and_rescale(delta, self.config.drop, generator)
            changed.append(delta)
        return before.double() + self.scale * MERGES.get(self.config.method, naive)(torch.stack(changed), self.shares)

    def _product_of_means(self, name: str, layers: Sequence[Any]) -> Tensor:
        shapes = {layer and tuple(layer.lora_down.weight.shape) for layer in layers}
        if len(shapes) > 1:
            raise ValueError(f"factor_mean: the branches' adapters of {name} differ in shape: {shapes}")
        ups = torch.stack([layer.scale * layer.lora_up.weight.double() for layer in layers])
        downs = torch.stack([layer.lora_down.weight.double() for layer in layers])
        return naive(ups, self.shares) @ naive(downs, self.shares)


def _take_private(composed: FourM, base: FourM, branches: Mapping[str, FourM], shared: Shared, plan: Plan) -> list[str]:
    """Takes over what belongs to one modality, temperatures of the base's from the base; conflicts that are left."""
    known, tables = private_tensors(base), {name: private_tensors(model) for name, model in branches.items()}
    policy, unsolved = shared.config.conflicts, []
    for name, view in private_tensors(composed).items():
        found = {branch: table[name] for branch, table in tables.items() if name in table}
        if name.startswith("temperature.") and name in known:  # branches have it from their own calibration, if any
            found = dict.fromkeys(found, known[name])
        values = list(found.values())
        if all(torch.equal(value, values[0]) for value in values):
            plan.kept[name] = "the base" if name in known and torch.equal(known[name], values[0]) else next(iter(found))
            view.copy_(values[0])
            continue
        plan.conflicts[name] = list(found)
        choices = {"base": known.get(name), "first": values[0], **found}
        if policy == "merge" and name in known:
            choices["merge"] = shared.join(name, known[name], [value.double() - known[name] for value in values])
        chosen = choices.get(policy)
        if chosen is None:
            unsolved.append(name)
        else:
            view.copy_(chosen)
            plan.kept[name] = policy
    return unsolved


def _sets(branch: FourM, base: FourM) -> list[list[str]]:
    """Sets of decoupled adapters; what a branch of plain ones added makes one, which may be empty."""
    own = [name for name in branch.space.names if name not in base.space.number]
    return branch.routed_sets if branch.route is not None else [own]


def _choose_sets(base: FourM, branches: Mapping[str, FourM], config: MergeConfig, plan: Plan) -> list[str]:
    """Says in the plan whose adapters serve each modality; conflicts that the policy leaves."""
    unsolved, owner = [], {}
    for name in dict.fromkeys(name for each in branches.values() for names in _sets(each, base) for name in names):
        who = [branch for branch, each in branches.items() if any(name in names for names in _sets(each, base))]
        owner[name] = who[0]
        if len(who) > 1:
            conflict = f"adapters of {name}"
            plan.conflicts[conflict] = who
            if config.conflicts in who:
                owner[name] = config.conflicts
            elif config.conflicts != "first":
                unsolved.append(conflict)
    for branch, model in branches.items():
        for names in _sets(model, base):
            plan.routes.append((branch, [name for name in names if owner[name] == branch]))
    return unsolved


def _keep_sets(composed: FourM, branches: Mapping[str, FourM], weights: Weights, plan: Plan) -> None:
    """Lays the branches' adapters side by side: each set as it is, and the sets of all others, weighted, as one."""
    layers: dict[str, list[tuple[str, Any, Tensor]]] = {}
    for branch, model in branches.items():
        for name, layer in (routed(model) or adapters(model)).items():
            gate = layer.gate if isinstance(layer, RoutedLinear) else layer.lora_up.weight.new_full(
                (2, layer.lora_down.out_features), layer.scale)  # fmt: skip
            layers.setdefault(name, []).append((branch, layer, gate))
    numbers = {branch: itertools.count(1) for branch in branches}
    kept = [(branch, next(numbers[branch]), names) for branch, names in plan.routes]
    kept = [each for each in kept if each[2]]
    plan.routes = [(branch, names) for branch, _, names in kept]
    ranks = {name: sum(gate.shape[1] for *_, gate in parts) for name, parts in layers.items()}
    inject_routed(composed, [names for *_, names in kept], ranks)
    for name, layer in routed(composed).items():
        start = 0
        for branch, part, gate in layers[name]:
            columns = slice(start, start := start + gate.shape[1])
            layer.lora_down.weight[columns] = part.lora_down.weight
            layer.lora_up.weight[:, columns] = part.lora_up.weight
            layer.gate[0, columns] = weights[branch] * gate[0]
            for row, (owner, number, _) in enumerate(kept, 1):
                if owner == branch:
                    layer.gate[row, columns] = gate[number]


def _union(base: FourM, branches: Mapping[str, FourM]) -> TokenSpace:
    """The base's modalities, then what the branches add."""
    rows: dict[str, Modality] = dict(base.space.modalities)
    for branch, model in branches.items():
        for name, row in model.space.modalities.items():
            same = (dataclasses.replace(each, source=None, tokenizer=None) for each in (rows.get(name, row), row))
            if next(same) != next(same):
                raise ValueError(f"modality {name} of branch {branch} is another one than that of the same name before")
            rows.setdefault(name, row)
        missing = sorted(set(base.space.names) - set(model.space.names))
        if missing:
            raise ValueError(f"branch {branch} lacks {', '.join(missing)} of the base")
    return TokenSpace(rows)


def private_tensors(model: FourM) -> dict[str, Tensor]:
    """Views of what belongs to one modality, or to one vocabulary, by name."""
    views: dict[str, Tensor] = {}
    shared = model.config.share_modality_embeddings
    for prefix in SIDES:
        side = cast(Embeddings, getattr(model, prefix))
        for name in side.names:
            row = side.space[name]
            if row.discrete:
                views[f"{prefix}.tokens.{row.vocab or name}"] = side.tokens.weight[side.vocabulary(name)]
            if name in side.learned and side.learned_positions is not None:
                views[f"{prefix}.positions.{name}"] = side.learned_positions[side.learned[name]]
            for part, weight in side.project[name].named_parameters() if not row.discrete else ():
                views[f"{prefix}.project.{name}.{part}"] = weight
            if not shared:
                views[f"{prefix}.modality.{name}"] = side.modality[side.modality_row[side.space.number[name]]]
    if shared:
        side = model.encoder_embeddings
        views |= {f"modality.{name}": side.modality[number] for number, name in enumerate(model.space.names)}
    if model.to_logits is not None:
        side = model.decoder_embeddings
        for name, rows in side.vocabularies.items():
            views[f"to_logits.{name}"] = model.to_logits.weight[rows]
    return views | {f"temperature.{name}": model.temperature[i] for i, name in enumerate(model.space.names)}
