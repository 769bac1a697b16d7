"""Low-rank adapters (LoRA, Hu et al. 2021) of the attention and MLP layers of a `FourM`, and peft's files for them.

A packed projection (query-key-value, key-value) gets the rank once for each matrix in it, as in 4M. To peft that is an
ordinary adapter of three or two times the rank.

Decoupled adapters (DAMC, Chen et al. 2024) come in sets: the modalities of a set have it to themselves, all others
share set 0. A token of the encoder goes through the set of its modality, and so do its keys and values in the decoder;
all else there goes through the set of the modality that is asked. They cannot be fused, and belong to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fourm.checkpoint import read_json, read_tensors
from fourm.model.layers import CrossAttention, Mlp, SelfAttention

# Which blocks' linear layers are adapted.
TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "selfattn": (SelfAttention,),
    "crossattn": (CrossAttention,),
    "attn": (SelfAttention, CrossAttention),
    "mlp": (Mlp,),
    "all": (SelfAttention, CrossAttention, Mlp),
}
PACKED = {"qkv": 3, "kv": 2}
# peft's files, the start of its names, and values of its config that stand for a plain adapter.
CARD, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}


class LoRALinear(nn.Module):
    """A linear layer plus `scale` times a product of two thin ones, of which the second starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        where = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.linear, self.scale = linear, scale
        self.lora_down = nn.Linear(linear.in_features, rank, bias=False, **where)
        self.lora_up = nn.Linear(rank, linear.out_features, bias=False, **where)
        nn.init.normal_(self.lora_down.weight, std=1 / rank)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.linear(x) + self.scale * self.lora_up(self.lora_down(x))

    @torch.no_grad()
    def fused(self) -> nn.Linear:
        """The linear layer that computes the same; it takes the adapter up into its weight."""
        self.linear.weight += self.scale * self.lora_up.weight @ self.lora_down.weight
        return self.linear


class Route:
    """Which set of adapters each token of a pass goes through; all routed layers of a model look here.

    Args:
        sets: Of every modality its set, by modality number.

    Attributes:
        source: Sets of the tokens that are given, and that the decoder looks at.
        target: Sets of the tokens that are asked.
    """

    source: Tensor
    target: Tensor

    def __init__(self, sets: Sequence[int]):
        self.table = torch.tensor([*sets, 0])  # the last entry answers for registers and empty slots (-1)

    def follow(self, side: Literal["source", "target"], mod: Tensor) -> None:
        """Takes modality numbers, of the shape of the tokens."""
        self.table = self.table.to(mod.device)
        setattr(self, side, self.table[mod])


class RoutedLinear(nn.Module):
    """A linear layer plus adapters that share one pair of thin matrices; `gate` (sets, rank) says whose columns count.

    Args:
        linear: What is adapted.
        rank: Columns of all sets together.
        sets: How many.
        route: That of the model.
        side: Of which tokens the sets are.
    """

    gate: Tensor

    def __init__(self, linear: nn.Linear, rank: int, sets: int, route: Route, side: Literal["source", "target"]):
        super().__init__()
        where: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.linear, self.route, self.side = linear, route, side
        self.lora_down = nn.Linear(linear.in_features, rank, bias=False, **where)
        self.lora_up = nn.Linear(rank, linear.out_features, bias=False, **where)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("gate", torch.zeros(sets, rank, **where))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.linear(x) + self.lora_up(self.lora_down(x) * F.embedding(getattr(self.route, self.side), self.gate))


def inject_lora(
    model: nn.Module,
    rank: int = 4,
    scale: float = 1.0,
    targets: Literal["selfattn", "crossattn", "attn", "mlp", "all"] = "attn",
    decoupled: Sequence[str] = (),
) -> None:
    """Adapts the linear layers of some blocks; the model computes the same until it is trained.

    Args:
        model: A `FourM`.
        rank: Of one matrix, in each set.
        scale: Of what an adapter adds.
        targets: Which layers; `all` of decoupled ones has the projection of the context, too.
        decoupled: Modalities that get a set of their own, together; none for plain adapters.

    Raises:
        ValueError: Unknown targets or modalities, a rank below 1, or a model without such layers or with adapters
            already.
    """
    if targets not in TARGETS or rank < 1:
        raise ValueError(f"targets {targets!r} with rank {rank}: allowed are {', '.join(TARGETS)}, and ranks from 1")
    if adapters(model) or routed(model):
        raise ValueError("the model has adapters already; fuse them first, where they are not decoupled")
    owners = [module for module in model.modules() if isinstance(module, TARGETS[targets])]
    if not owners:
        raise ValueError(f"the model has no layers of {targets!r}")
    places = {id(layer): name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    names = [places[id(layer)] for owner in owners for layer in owner.children() if id(layer) in places]
    names += ["decoder_proj_context"] if decoupled and targets == "all" else []
    ranks = {name: rank * PACKED.get(name.rpartition(".")[2], 1) for name in names}
    if not decoupled:
        for name, own in ranks.items():
            model.set_submodule(name, LoRALinear(model.get_submodule(name), own, scale))  # type: ignore[arg-type]
        return
    inject_routed(model, [list(decoupled)], {name: 2 * own for name, own in ranks.items()})
    for name, layer in routed(model).items():
        nn.init.normal_(layer.lora_down.weight, std=1 / ranks[name])
        layer.gate[0, : ranks[name]] = layer.gate[1, ranks[name] :] = scale


def inject_routed(model: nn.Module, sets: Sequence[Sequence[str]], ranks: Mapping[str, int]) -> None:
    """Adapts layers with sets of adapters that nothing goes through yet: their gates are 0.

    Args:
        model: A `FourM`.
        sets: Modalities of each set from 1 on; all others have set 0.
        ranks: Columns of all sets together, by the name of the layer.

    Raises:
        ValueError: A modality that the model has not, or that is in two sets.
    """
    space: Any = model.space
    listed = [name for names in sets for name in names]
    unknown = sorted(set(listed) - set(space.names))
    if unknown or len(set(listed)) < len(listed) or not all(sets):
        raise ValueError(f"decoupled: {listed} must be modalities of the model, each once; it has {space.names}")
    owner = {name: number for number, names in enumerate(sets, 1) for name in names}
    route = Route([owner.get(name, 0) for name in space.names])
    for name, rank in ranks.items():
        given = name.startswith("encoder.") or name.endswith(".kv") or name == "decoder_proj_context"
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, RoutedLinear(layer, rank, len(sets) + 1, route, "source" if given else "target"))
    model.route, model.routed_sets = route, [list(names) for names in sets]  # type: ignore[assignment]


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def routed(model: nn.Module) -> dict[str, RoutedLinear]:
    """The layers of a model with decoupled adapters by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLinear)}


def fuse_lora(model: nn.Module) -> None:
    """Takes all plain adapters up into the layers they adapt, so that the model can be saved as it is."""
    for name, adapter in adapters(model).items():
        model.set_submodule(name, adapter.fused())


def save_adapter(model: nn.Module, folder: str | Path, base: str) -> None:
    """Writes the adapters as `peft.PeftModel.from_pretrained(FourM.from_pretrained(base), folder)` reads them.

    Args:
        model: With adapters. What else was trained is not written.
        folder: Where to.
        base: Folder or hub id of the model that they adapt.
    """
    folder, found = Path(folder), adapters(model)
    ranks = {name: adapter.lora_down.out_features for name, adapter in found.items()}
    first = next(iter(found))
    card = PLAIN | {
        "base_model_name_or_path": base,
        "r": ranks[first],
        "lora_alpha": ranks[first] * found[first].scale,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {re.escape(name): rank * found[name].scale for name, rank in ranks.items()},
        "target_modules": list(found),
        "task_type": None,
    }
    tensors = {}
    for name, adapter in found.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.lora_down.weight.detach().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.lora_up.weight.detach().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Adapts a model with what peft or `save_adapter` wrote.

    Raises:
        ValueError: Not a plain LoRA of peft, or one of another model.
    """
    path, card = Path(folder), _card(folder)
    other = {key: card[key] for key, plain in PLAIN.items() if (card.get(key, plain) or None) != (plain or None)}
    if other:
        raise ValueError(f"{path / CARD} has {other}, supported are { {key: PLAIN[key] for key in other} }")
    if adapters(model) or routed(model):
        raise ValueError("the model has adapters already; fuse them first, where they are not decoupled")
    tensors, layers = read_tensors(path / TENSORS), dict(model.named_modules())
    names = [
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")
    ]
    pairs = {name: [tensors.pop(f"{PREFIX}{name}.lora_{each}.weight", None) for each in "AB"] for name in names}
    for name, (down, up) in pairs.items():
        layer = layers.get(name)
        if (
            down is None
            or up is None
            or not isinstance(layer, nn.Linear)
            or layer.weight.shape != (len(up), down.shape[1])
        ):
            raise ValueError(f"{path} has an adapter of {name}, which the model has not, or in another shape")
        alphas = (a for key, a in (card.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = next(alphas, card.get("lora_alpha"))
        if not isinstance(alpha, int | float):
            raise ValueError(f"{path / CARD} has no `lora_alpha`, the strength of the adapter of {name}")
        adapter = LoRALinear(layer, len(down), alpha / len(down) ** (0.5 if card.get("use_rslora") else 1))
        adapter.lora_down.weight.data.copy_(down)
        adapter.lora_up.weight.data.copy_(up)
        model.set_submodule(name, adapter)
    if tensors or not pairs:
        raise ValueError(f"{path} is not a plain LoRA; it has {', '.join(tensors) or 'no tensors'}")


def base_of(folder: str | Path) -> str:
    """Which model the adapters in a folder are for."""
    base = _card(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{Path(folder) / CARD} does not say which model it is for (`base_model_name_or_path`)")
    return base


def _card(folder: str | Path) -> dict[str, Any]:
    card = read_json(Path(folder) / CARD)
    if not isinstance(card, dict):
        raise ValueError(f"{Path(folder) / CARD} is not a config of peft")
    return card
