"""A space that several encoders share: one connector each, cosine as the likeness."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.model.connectors import Connector, ConnectorConfig, read_config, save_model, with_weights

LIMITS = (0.001, 0.5)  # of the temperature


class SharedSpace(nn.Module):
    """Connectors by name, into one space, and the temperature they are trained with.

    Args:
        connectors: One for each side; all have the same `output_dim`.
        temperature: Stored as it is, not as a logarithm.
        learn_temperature: Train it, too, within `LIMITS`.
        card: Anything JSON can hold that goes into the folder, such as the sides' sources.

    Raises:
        ValueError: The connectors end in different spaces.
    """

    temperature: Tensor

    def __init__(
        self,
        connectors: Mapping[str, Connector],
        temperature: float = 0.07,
        learn_temperature: bool = True,
        card: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        dims = {name: connector.config.output_dim for name, connector in connectors.items()}
        if len(set(dims.values())) != 1:
            raise ValueError(f"the connectors have output_dim {dims}, expected the same for all")
        self.connectors, self.card = nn.ModuleDict(connectors), dict(card or {})
        self.configs = {name: dataclasses.asdict(connector.config) for name, connector in connectors.items()}
        self.temperature = nn.Parameter(torch.tensor(temperature), requires_grad=learn_temperature)

    def forward(self, name: str, z: Tensor) -> Tensor:
        """Latents (..., input_dim) of one side as unit vectors (..., output_dim)."""
        return F.normalize(self.connectors[name](z).float(), dim=-1)

    def clamp(self) -> Tensor:
        """The temperature, after it was moved into its limits."""
        with torch.no_grad():
            self.temperature.clamp_(*LIMITS)
        return self.temperature

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        learns = self.temperature.requires_grad
        save_model(self, {"connectors": self.configs, "learn_temperature": learns, "card": self.card}, folder)

    @classmethod
    def load(cls, folder: str | Path) -> SharedSpace:
        """Inverse of `save`; ValueError where the folder holds none."""
        found = read_config(folder, "connectors", "shared space")
        connectors = {name: Connector(ConnectorConfig(**config)) for name, config in found["connectors"].items()}
        return with_weights(cls(connectors, learn_temperature=found["learn_temperature"], card=found["card"]), folder)


def info_nce(a: Tensor, b: Tensor, temperature: Tensor | float) -> Tensor:
    """The symmetric contrastive loss (B,) of each pair, in nats: the mean of both directions' cross-entropies.

    Args:
        a: (B, D) unit vectors.
        b: (B, D) unit vectors; those of other pairs are the negatives.
        temperature: Divides the cosines.
    """
    with torch.autocast(a.device.type, enabled=False):  # bf16 tells cosines apart by no less than 0.004
        logits = a.float() @ b.float().T / temperature
    own = logits.diagonal()
    return (logits.logsumexp(1) + logits.logsumexp(0)) / 2 - own
