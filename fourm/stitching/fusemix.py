"""FuseMix (2312.10144): two frozen encoders meet in a space that is trained on mixed pairs of their latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fourm import checkpoint
from fourm.evaluation.retrieval import BothWays, both_ways
from fourm.stitching.baselines import mean_recall
from fourm.stitching.pairs import Pairs
from fourm.stitching.space import SharedSpace, info_nce


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to the latents of a batch before the connectors see them.

    Args:
        kind: `none`, `noise`, or `mix`: convex combinations of two pairs.
        shared: Both sides are mixed with the same share; False only to show what that costs.
        per: One share for the whole `batch`, as in the paper, or one for every `sample`.
        partner: A `permutation` of the batch, or the other `half` of it, which leaves half as many pairs (the paper's).
        alpha: Shares are drawn from Beta(alpha, alpha).
        noise: Standard deviation of Gaussian `noise`, in units of each dimension's own.
    """

    kind: Literal["none", "noise", "mix"] = "mix"
    shared: bool = True
    per: Literal["batch", "sample"] = "batch"
    partner: Literal["permutation", "half"] = "permutation"
    alpha: float = 1.0
    noise: float = 0.0

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


class Contrastive:
    """Task: the sides of a pair meet, and those of different pairs do not.

    Args:
        model: The space.
        augmentation: Of the latents.
        pairs: The training pairs, of which the noise takes its scale.
    """

    def __init__(self, model: SharedSpace, augmentation: Augmentation, pairs: Pairs):
        self.model: nn.Module = model
        self.augmentation = augmentation
        self.spread = {"a": pairs.a.std(0), "b": pairs.b.std(0)}

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Pairs that are trained on, (1,)."""
        return torch.tensor([len(batch["a"]) // self.augmentation.drawn], dtype=torch.float32, device=batch["a"].device)

    def loss(self, batch: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Symmetric InfoNCE in nats; the negatives of a pair are the others of this process's batch."""
        sides = {name: batch[name] for name in ("a", "b")}
        model: Any = self.model
        spread = {name: z.to(counts.device) for name, z in self.spread.items()}
        a, b = (model(name, z) for name, z in augment(sides, self.augmentation, spread).items())
        loss = info_nce(a, b, model.clamp()).sum() / counts[0]
        return {"loss": loss}


@torch.no_grad()
def evaluate(space: SharedSpace, pairs: Pairs) -> BothWays:
    """Ranks of pairs in both directions."""
    device = space.temperature.device
    return both_ways(space("a", pairs.a.to(device)) @ space("b", pairs.b.to(device)).T)


class Selection:
    """Evaluator: figures of the validation split; keeps the weights they were best with.

    Args:
        pairs: The validation split.
        folder: Where the best weights are kept.
        writes: Whether this process is the one of several that writes.
    """

    def __init__(self, pairs: Pairs, folder: str | Path, writes: bool = True):
        self.pairs, self.folder, self.writes = pairs, Path(folder), writes
        self.score = -1.0
        if found := checkpoint.latest(self.folder):
            self.score = checkpoint.load(found).state["score"]

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Recall in both directions, the score that is selected by, and the temperature."""
        found = evaluate(model, self.pairs).figures()
        score = mean_recall(found)
        if score > self.score:
            self.score = score
            if self.writes:
                checkpoint.save(self.folder, step, {"model": model.state_dict()}, {"score": score}, keep=1)
        return {"R@1": found["R@1"], "score": score, "temperature": model.temperature.item()}

    def restore(self, model: nn.Module) -> int:
        """Puts the best weights into a model; the step they are of."""
        found = checkpoint.latest(self.folder)
        assert found is not None
        model.load_state_dict(checkpoint.load(found).tensors["model"])
        return int(found.name.rpartition("-")[2])
