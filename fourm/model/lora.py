"""Low-rank adapters (LoRA, Hu et al. 2021) of the attention and MLP layers of a `FourM`.

A packed projection (query-key-value, key-value) gets the rank once for each matrix in it, as in 4M.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

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


def inject_lora(
    model: nn.Module,
    rank: int = 4,
    scale: float = 1.0,
    targets: Literal["selfattn", "crossattn", "attn", "mlp", "all"] = "attn",
) -> None:
    """Adapts the linear layers of some blocks; the model computes the same until it is trained.

    Raises:
        ValueError: Unknown targets, a rank below 1, or a model without such layers or with adapters already.
    """
    if targets not in TARGETS or rank < 1:
        raise ValueError(f"targets {targets!r} with rank {rank}: allowed are {', '.join(TARGETS)}, and ranks from 1")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already; fuse them first")
    owners = [module for module in model.modules() if isinstance(module, TARGETS[targets])]
    if not owners:
        raise ValueError(f"the model has no layers of {targets!r}")
    for owner in owners:
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(owner, name, LoRALinear(layer, rank * PACKED.get(name, 1), scale))


def fuse_lora(model: nn.Module) -> None:
    """Takes all adapters up into the layers they adapt; the model is an ordinary one again, and can be saved as one."""
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(owner, name, layer.fused())


def train_lora_only(model: nn.Module) -> list[nn.Parameter]:
    """Freezes all parameters but those of the adapters, and returns the latter."""
    model.requires_grad_(False)
    thin = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            thin += [
                *module.lora_down.requires_grad_(True).parameters(),
                *module.lora_up.requires_grad_(True).parameters(),
            ]
    return thin
