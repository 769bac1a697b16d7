"""What is trained, and how wrong it is: the only thing the loop does not know."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn

from fourm.masking.batch import MaskedBatch

# Measures a model at a step: figures (float) and pictures (PIL). Every process calls it, all with the same weights.
Evaluator = Callable[[nn.Module, int], Mapping[str, Any]]


class Task(Protocol):
    """A model and its loss.

    One update is made from several batches: those of all processes, and those a process accumulates. So that it does
    not depend on the cut, a loss is given the denominators of all of them, and returns its batch's part of the sum.

    Attributes:
        model: What is trained, saved and evaluated. `loss` finds its weights nowhere else: evaluation puts the moving
            average in its place.
    """

    model: nn.Module

    def counts(self, batch: Any) -> Tensor:
        """Denominators of this batch, (K,) float; the trainer adds them up over the batches of one update."""

    def loss(self, batch: Any, counts: Tensor) -> dict[str, Tensor]:
        """`loss` to minimise, and figures to log beside it; summed over the batches, each is the update's value.

        Args:
            batch: What the loader yields, on the model's device.
            counts: (K,) denominators of all batches of this update.
        """


class Loader(Protocol):
    """Gives batch k of a run, whatever came before."""

    def batches(self, start_step: int = 0) -> Iterator[Any]:
        """This process's batches from one on, without end."""


class MaskedTask:
    """Masked modelling with a `FourM`.

    Args:
        model: The model.
        loss: `mod`, the mean of the modalities' means, or `token`, the mean over tokens.
    """

    def __init__(self, model: nn.Module, loss: Literal["mod", "token"] = "mod"):
        self.model, self.kind = model, loss

    def counts(self, batch: MaskedBatch) -> Tensor:
        """Asked tokens per modality, (number of modalities,)."""
        return self.model.counts(batch)  # type: ignore[operator]

    def loss(self, batch: MaskedBatch, counts: Tensor) -> dict[str, Tensor]:
        """Cross-entropy in nats, in all and per modality."""
        return self.model.loss(batch, counts, self.kind)  # type: ignore[operator]


class HeldOutLoss:
    """Evaluator: the task's loss on the first batches of a held-out set, always the same ones.

    Processes share the work, so the loader must give each of them the same batches (`rank=0, world_size=1`).

    Args:
        task: Its loss is measured.
        loader: Batches of the held-out set.
        batches: How many of them; they stay in memory.
    """

    def __init__(self, task: Task, loader: Loader, batches: int):
        self.task, self.loader, self.number = task, loader, batches
        self._batches: list[Any] | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Means over the whole set, by the names of the task's loss."""
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self._batches is None:
            self._batches = list(islice(self.loader.batches(0), self.number))
        task = copy.copy(self.task)
        task.model = model
        device = next(model.parameters()).device
        counts = torch.stack([task.counts(batch) for batch in self._batches]).sum(0).to(device)
        sums: dict[str, float] = {}
        for batch in self._batches[rank::processes]:
            for name, part in task.loss(send_to_device(batch, device), counts).items():
                sums[name] = sums.get(name, 0.0) + float(part)
        return add_up(sums)


def add_up(figures: dict[str, float]) -> dict[str, float]:
    """Sums figures over processes by name; a process may lack some of the names."""
    gathered: list[Any] = [figures]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, figures)
    names = dict.fromkeys(name for each in gathered for name in each)
    return {name: sum(each.get(name, 0.0) for each in gathered) for name in names}


def tokens_in(batch: Any) -> int:
    """Tokens a batch gives or asks, without padding; 0 where the batch is not made of tokens."""
    return batch.input_tokens + batch.target_tokens if isinstance(batch, MaskedBatch) else 0


def keys_of(batch: Any) -> tuple[str, ...]:
    """Names of the samples in a batch, as far as it carries them."""
    keys = batch.get("keys", ()) if isinstance(batch, Mapping) else getattr(batch, "keys", ())
    return tuple(keys) if isinstance(keys, tuple | list) else ()
