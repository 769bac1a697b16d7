"""Connectors: small networks from the latents of one frozen encoder to those of another, or to a space they share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fourm.checkpoint import read_json, read_tensors, unshared

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """What a connector is like.

    Args:
        kind: `linear`, `mlp`, `residual` (FuseMix), or `moe` (sparse mixture of experts).
        input_dim: Numbers in a vector that goes in.
        output_dim: Numbers in one that comes out.
        depth: Hidden layers of an `mlp`, blocks of `residual`, layers of experts of `moe`.
        hidden: Width of the hidden layers; 0 for four times `input_dim`. All of a `moe` has this width.
        dropout: On hidden layers.
        activation: Of an `mlp`.
        experts: Of a `moe`.
        top_k: Experts that see a vector.
        renormalise: Make the weights of those sum to 1.
    """

    kind: Literal["linear", "mlp", "residual", "moe"]
    input_dim: int
    output_dim: int
    depth: int = 1
    hidden: int = 0
    dropout: float = 0.0
    activation: Literal["gelu", "relu"] = "gelu"
    experts: int = 8
    top_k: int = 2
    renormalise: bool = True

    @property
    def width(self) -> int:
        """Of the hidden layers."""
        return self.hidden or 4 * self.input_dim


class Connector(nn.Module):
    """A connector of any kind.

    Raises:
        ValueError: An unknown kind, or numbers that do not fit it.
    """

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        if config.kind not in NETWORKS:
            raise ValueError(f"connector is {config.kind!r}, allowed are {', '.join(NETWORKS)}")
        self.config, self.network = config, NETWORKS[config.kind](config)

    def forward(self, z: Tensor) -> Tensor:
        """(..., input_dim) -> (..., output_dim)."""
        return self.network(z)

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        save_model(self, dataclasses.asdict(self.config), folder)


def load_connector(folder: str | Path) -> Connector:
    """Inverse of `Connector.save`; ValueError where the folder holds none."""
    return with_weights(Connector(ConnectorConfig(**read_config(folder, "kind", "connector"))), folder)


# Folders -------------------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Writes the weights as `model.safetensors`, and as `config.json` what they go into."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(unshared(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: str | Path, key: str, what: str) -> dict[str, Any]:
    """The `config.json` of a folder; ValueError where there is none that has a key, and so no `what`."""
    path = Path(folder) / "config.json"
    found = read_json(path) if path.is_file() else {}
    if key not in found:
        raise ValueError(f"{folder} holds no {what}")
    return found


def with_weights(model: M, folder: str | Path) -> M:
    """A model with the weights of a folder, in evaluation mode."""
    model.load_state_dict(read_tensors(Path(folder) / "model.safetensors"))
    return model.eval()


# Kinds ---------------------------------------------------------------------------------------------------------------


def _mlp(config: ConnectorConfig) -> nn.Module:
    layers: list[nn.Module] = []
    width = config.input_dim
    for _ in range(config.depth):
        layers += [nn.Linear(width, config.width), ACTIVATIONS[config.activation](), nn.Dropout(config.dropout)]
        width = config.width
    return nn.Sequential(*layers, nn.Linear(width, config.output_dim))


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x)), dropout before the MLP's second layer."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return x + self.outer(self.dropout(torch.nn.functional.gelu(self.inner(self.norm(x)))))


def _residual(config: ConnectorConfig) -> nn.Module:
    """FuseMix's fusion adapter (2312.10144): blocks, a norm, and a projection."""
    dim = config.input_dim
    blocks = [ResidualBlock(dim, config.width, config.dropout) for _ in range(config.depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(dim), nn.Linear(dim, config.output_dim))


# Mixture of experts --------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """Which experts see which of N vectors: weights (N, k), experts (N, k), and probabilities (N, E) of all."""

    weights: Tensor
    experts: Tensor
    probabilities: Tensor


def expert(dim: int, hidden: int, dropout: float) -> nn.Module:
    """Linear-GELU-Linear, with dropout after both."""
    inner, outer = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    return nn.Sequential(inner, nn.GELU(), nn.Dropout(dropout), outer, nn.Dropout(dropout))


class SparseMoE(nn.Module):
    """Experts of which each vector is seen by the k that its gate likes best; the others do not compute.

    Args:
        dim: Numbers in a vector.
        experts: How many.
        hidden: Width inside an `expert`.
        top_k: Experts that see a vector.
        renormalise: Make the weights of those sum to 1.
        dropout: Inside the experts.

    Attributes:
        routing: That of the last forward.
    """

    def __init__(self, dim: int, experts: int, hidden: int, top_k: int, renormalise: bool = True, dropout: float = 0.0):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}, allowed are 1 to {experts}, the number of experts")
        self.top_k, self.renormalise = top_k, renormalise
        self.gate = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(expert(dim, hidden, dropout) for _ in range(experts))
        self.routing: Routing | None = None

    def route(self, x: Tensor) -> Routing:
        """The gate's choice for vectors (N, dim)."""
        probabilities = self.gate(x).float().softmax(-1)
        weights, experts = probabilities.topk(self.top_k)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(weights, experts, probabilities)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim): the weighted sum of what the chosen experts say."""
        flat = x.flatten(0, -2)
        self.routing = self.route(flat)
        order = self.routing.experts.flatten().argsort(stable=True)  # (N k,) grouped by expert
        rows, weights = order // self.top_k, self.routing.weights.flatten()[order, None]
        counts = self.routing.experts.flatten().bincount(minlength=len(self.experts)).tolist()
        said = [
            expert(group) for expert, group in zip(self.experts, flat[rows].split(counts), strict=True) if len(group)
        ]
        return torch.zeros_like(flat).index_add(0, rows, (torch.cat(said) * weights).to(flat.dtype)).view_as(x)


def balance_loss(routing: Routing) -> Tensor:
    """E * sum of (share of choices) * (mean probability) over the experts: 1 if even (Fedus et al. 2021, eq. 4)."""
    return routing.probabilities.shape[-1] * (expert_load(routing) * routing.probabilities.mean(0)).sum()


def expert_load(routing: Routing) -> Tensor:
    """The share (E,) of all choices that fell on each expert."""
    chosen = routing.experts.flatten()
    return chosen.bincount(minlength=routing.probabilities.shape[-1]) / len(chosen)


class _Experts(nn.Module):
    """h + GELU(LayerNorm(MoE(h))), as in M3-JEPA (2409.05929)."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        width = config.width
        self.moe = SparseMoE(width, config.experts, width, config.top_k, config.renormalise, config.dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.nn.functional.gelu(self.norm(self.moe(h)))


def _moe(config: ConnectorConfig) -> nn.Module:
    layers = [_Experts(config) for _ in range(config.depth)]
    into, out = nn.Linear(config.input_dim, config.width), nn.Linear(config.width, config.output_dim)
    return nn.Sequential(into, nn.GELU(), *layers, out)


NETWORKS: dict[str, Callable[[ConnectorConfig], nn.Module]] = {
    "linear": lambda config: nn.Linear(config.input_dim, config.output_dim),
    "mlp": _mlp,
    "residual": _residual,
    "moe": _moe,
}
