"""FuseMix (2312.10144): two frozen encoders meet in a space that is trained on mixed pairs of their latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.evaluation.retrieval import BothWays, both_ways
from fourm.stitching.baselines import mean_recall
from fourm.stitching.pairs import Samples
from fourm.stitching.space import SharedSpace, info_nce


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to the latents of a batch before the connectors see them, and what is asked of these besides.

    Args:
        kind: `none`, `noise`, or `mix`: convex combinations of two pairs.
        shared: Both sides are mixed with the same share; False only to show what that costs.
        per: One share for the whole `batch`, as in the paper, or one for every `sample`.
        partner: A `permutation` of the batch, or the other `half` of it, which leaves half as many pairs (the paper's).
        alpha: Shares are drawn from Beta(alpha, alpha).
        noise: Standard deviation of Gaussian `noise`, in units of each dimension's own.
        structure: Weight of `structure_loss` in the loss.
    """

    kind: Literal["none", "noise", "mix"] = "mix"
    shared: bool = True
    per: Literal["batch", "sample"] = "batch"
    partner: Literal["permutation", "half"] = "permutation"
    alpha: float = 1.0
    noise: float = 0.0
    structure: float = 0.0

    @property
    def drawn(self) -> int:
        """Pairs that are drawn for each one that is trained on."""
        return 2 if self.kind == "mix" and self.partner == "half" else 1


def augment(sides: Mapping[str, Tensor], how: Augmentation, spread: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latents (B, D) of each side, augmented; of `half` partners (B / 2, D).

    Args:
        sides: Raw latents of the same B pairs by side.
        how: What is done.
        spread: Standard deviation (D,) of each side's dimensions.
    """
    if how.kind == "none":
        return dict(sides)
    if how.kind == "noise":
        return {name: z + how.noise * spread[name] * torch.randn_like(z) for name, z in sides.items()}
    first = next(iter(sides.values()))
    n = len(first) // how.drawn
    partner = n + torch.arange(n) if how.drawn == 2 else torch.randperm(n)
    beta = torch.distributions.Beta(how.alpha, how.alpha)
    mixed, share = {}, None
    for name, z in sides.items():
        if share is None or not how.shared:
            share = beta.sample((n if how.per == "sample" else 1, 1)).to(z)
        mixed[name] = share * z[:n] + (1 - share) * z[partner]
    return mixed


def structure_loss(before: Tensor, after: Tensor, hops: int = 2, temperature: float = 0.05) -> Tensor:
    """How far the connector changed who is near whom, (B,) nats for each sample of a batch (STRUCTURE, 2025).

    Each side of the connector is a random walk on the batch: from a sample to another by the softmax of their cosines,
    after the mean is taken off. It is the Jensen-Shannon divergence of where both walks are after l steps, weighted
    1 / l and summed.

    Args:
        before: (B, D) what goes into a connector; gets no gradient.
        after: (B, E) what comes out.
        hops: Steps of the walk.
        temperature: Divides the cosines.
    """
    with torch.autocast(before.device.type, enabled=False):
        walks = [F.normalize(z - z.mean(0), dim=-1) for z in (before.detach(), after)]
        walks = [(z @ z.T / temperature).softmax(-1) for z in walks]
        places, total = walks, torch.zeros(len(before), device=before.device)
        for hop in range(1, hops + 1):
            middle = (places[0] + places[1]) / 2
            divergence = sum((torch.xlogy(p, p) - torch.xlogy(p, middle)).sum(-1) for p in places) / 2
            total = total + divergence / hop
            places = [p @ walk for p, walk in zip(places, walks, strict=True)]
    return total


class Contrastive:
    """Task: the sides of a pair meet, and those of different pairs do not.

    Args:
        model: The space.
        augmentation: Of the latents.
        pairs: The training pairs, of which the noise takes its scale.
    """

    def __init__(self, model: SharedSpace, augmentation: Augmentation, pairs: Samples):
        self.model: nn.Module = model
        self.augmentation = augmentation
        self.spread = {side: z.std(0) for side, z in pairs.sides.items()}

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Pairs that are trained on, (1,)."""
        a = batch["sides"]["a"]
        return torch.tensor([len(a) // self.augmentation.drawn], dtype=torch.float32, device=a.device)

    def loss(self, batch: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Symmetric InfoNCE in nats; the negatives of a pair are the others of this process's batch."""
        model: Any = self.model
        spread = {name: z.to(counts.device) for name, z in self.spread.items()}
        inputs = augment(batch["sides"], self.augmentation, spread)
        a, b = (model(side, inputs[side]) for side in ("a", "b"))
        losses = info_nce(a, b, model.clamp())
        if weight := self.augmentation.structure:
            losses = losses + weight * (structure_loss(inputs["a"], a) + structure_loss(inputs["b"], b))
        return {"loss": losses.sum() / counts[0]}


@torch.no_grad()
def evaluate(space: SharedSpace, pairs: Samples) -> BothWays:
    """Ranks of pairs in both directions."""
    device = space.temperature.device
    a, b = (space(side, pairs.sides[side].to(device)) for side in ("a", "b"))
    with torch.autocast(device.type, enabled=False):
        return both_ways(a @ b.T)


def watch(space: SharedSpace, pairs: Samples) -> tuple[dict[str, float], dict[str, float]]:
    """For `Best`: recall of the validation pairs in both directions, the score, and the temperature."""
    found = evaluate(space, pairs).figures()
    score = mean_recall(found)
    return {"R@1": found["R@1"], "score": score, "temperature": space.temperature.item()}, {"": score}
