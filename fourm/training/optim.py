"""Which parameter is updated how, and how fast: groups, schedules, AdamW and Muon."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fourm.model.embeddings import Embeddings
from fourm.runtime import has_bf16

SCHEDULES = ("constant", "cosine", "inverse_sqrt", "wsd")
RESTING = ("trunk", "embeddings", "old")
TRUNK = ("encoder.", "encoder_norm.", "decoder.", "decoder_norm.")  # 4M's "shared parameters": blocks and norms


@dataclass
class OptimConfig:
    """How a model is updated.

    `warmup`, `decay` and `timescale` are in the unit of the run's length (steps, or tokens); below 1 they are shares of
    it.

    Args:
        name: `adamw`, or `muon` for the matrices of the trunk with AdamW for the rest.
        lr: Highest learning rate.
        betas: AdamW's averaging rates.
        eps: AdamW's guard against division by zero.
        momentum: Muon's.
        weight_decay: Decoupled decay of matrices (not of norms, biases, embeddings and single tokens).
        schedule: After the warm-up `cosine` falls all the way, `constant` stays, `wsd` (warm-up, stable, decay) stays
            until `decay` before the end, and `inverse_sqrt` falls by 1 / sqrt(1 + t / timescale) until then.
        warmup: Linear rise from 0.
        decay: Linear fall of `wsd` and `inverse_sqrt` in the end (4M's cool-down).
        timescale: Of `inverse_sqrt`, 4M's `inverse_sqrt-10000`; 0: as long as the warm-up (Vaswani et al. 2017).
        min_lr: Learning rate at the end.
        clip: Largest gradient norm; 0 for none.
        lazy_tables: Rows of tables that are only looked up rest while they do not occur (`SparseAdam`), instead of
            moving on with what they remember. Spares their dense gradients where vocabularies are large; for
            one process.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.05
    schedule: Literal["constant", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    timescale: float = 0.0
    min_lr: float = 0.0
    clip: float = 1.0
    lazy_tables: bool = False


def learning_rate(config: OptimConfig, progress: float, length: float) -> float:
    """The learning rate after `progress` of a run of `length` (both in steps or both in tokens).

    Raises:
        ValueError: An unknown schedule, or warm-up and decay that do not fit into the run.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(f"schedule is {config.schedule!r}, allowed are {', '.join(SCHEDULES)}")
    warmup, decay, scale = (in_run(value, length) for value in (config.warmup, config.decay, config.timescale))
    decay = decay if config.schedule in ("wsd", "inverse_sqrt") else 0.0
    if warmup + decay > length:
        raise ValueError(f"warmup {warmup:g} and decay {decay:g} do not fit into a run of {length:g}")
    if progress < warmup:
        return config.lr * progress / warmup
    if config.schedule == "cosine":
        share = min(1.0, (progress - warmup) / (length - warmup)) if length > warmup else 0.0
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * share)) / 2
    high = config.lr
    if config.schedule == "inverse_sqrt":
        if not (scale or warmup):
            raise ValueError("schedule is 'inverse_sqrt' with neither warmup nor timescale; give one of them")
        high /= math.sqrt(1 + (min(progress, length - decay) - warmup) / (scale or warmup))
    left = min(1.0, max(0.0, (length - progress) / decay)) if decay else 1.0
    return config.min_lr + (high - config.min_lr) * left


def in_run(value: float, length: float) -> float:
    """A duration in the unit of a run's length, which may be given as a share of it."""
    return value * length if value < 1 else value


@dataclass
class Freeze:
    """Weights that rest.

    Args:
        what: `trunk` (blocks and norms), `embeddings` (all else), or `old`: whatever the model took over from `init`,
            in a table row by row.
        until: When they start to move, in the unit of the run's length (steps, or tokens), below 1 as a share of it;
            default: never.
    """

    what: Literal["trunk", "embeddings", "old"]
    until: float | None = None

    def __post_init__(self) -> None:
        if self.what not in RESTING or (self.until is not None and self.until <= 0):
            raise ValueError(f"freeze: what is {self.what!r}, allowed are {', '.join(RESTING)}; until is {self.until}, "
                             "expected a number above 0")  # fmt: skip


class Rest:
    """Takes the gradients of weights that rest, so that no optimiser touches them.

    What never moves needs no gradient at all from here on, and no state of an optimiser.

    Args:
        model: A `FourM`.
        phases: What rests until when.
        kept: Rows of its parameters that `old` means; those of a plan of `warm_start`.
    """

    def __init__(self, model: nn.Module, phases: Iterable[Freeze], kept: Mapping[str, Sequence[Sequence[int]]]):
        self.model = model
        self.phases: list[tuple[float | None, dict[str, Tensor]]] = []
        for phase in phases:
            moving: dict[str, Tensor] = {}  # of every parameter the rows that move
            for name, parameter in model.named_parameters():
                moves = torch.ones(len(parameter), dtype=torch.bool)
                for first, end in kept.get(name, ()):
                    moves[first:end] &= phase.what != "old"
                if phase.what != "old" and name.startswith(TRUNK) == (phase.what == "trunk"):
                    moves[:] = False
                if not moves.all():
                    moving[name] = moves
                if phase.until is None and not moves.any():
                    parameter.requires_grad_(False)
            self.phases.append((phase.until, moving))

    def __call__(self, progress: float, length: float) -> None:
        """Between an update's gradients and their use, `progress` being what came before the update."""
        parameters = dict(self.model.named_parameters())
        for until, moving in self.phases:
            if until is not None and progress >= in_run(until, length):
                continue
            for name, moves in moving.items():
                parameter = parameters.get(name)  # adapters may have taken its place
                if parameter is None or parameter.grad is None:
                    continue
                if not moves.any():
                    parameter.grad = None
                elif parameter.grad.is_sparse:
                    grad = parameter.grad = parameter.grad.coalesce()
                    grad.values().mul_(moves.to(grad.device)[grad.indices()[0], None])
                else:
                    moves = moves.to(parameter.device).view(-1, *[1] * (parameter.ndim - 1))
                    if isinstance(parameter.grad, DTensor):
                        grad = parameter.grad
                        moves = distribute_tensor(moves, grad.device_mesh, grad.placements, src_data_rank=None)
                    parameter.grad.mul_(moves)


def parameter_groups(model: nn.Module, muon: bool = False, lazy_tables: bool = False) -> dict[str, list[nn.Parameter]]:
    """Sorts every trainable parameter of a model into one group.

    Returns:
        `muon` (if asked: matrices of linear layers inside numbered blocks, such as `encoder.3.attn.qkv`), `decay`
        (other weights of linear and convolution layers, no heads), `rows` (if lazy: tables that are only looked up)
        and `no_decay` (norms, biases, other embeddings, single tokens).
    """
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "rows": [], "no_decay": []}
    chosen: dict[nn.Parameter, str] = {}
    looked_up = {id(side.tokens) for side in model.modules() if isinstance(side, Embeddings) and not side.shares_head}
    for path, module in model.named_modules():
        # A head is a table as one that is tied: its rows may rest, which decay would not let them.
        weighted = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and path != "to_logits"
        in_block = isinstance(module, nn.Linear) and any(part.isdigit() for part in path.split("."))
        for name, parameter in module.named_parameters(recurse=False):
            group = "no_decay"
            if weighted and name == "weight":
                group = "muon" if muon and in_block else "decay"
            elif lazy_tables and id(module) in looked_up:
                group = "rows"
            if chosen.get(parameter, group) != group:
                group = "no_decay"  # a table that also serves as a layer's weight is a table
            chosen[parameter] = group
    for parameter, group in chosen.items():
        if parameter.requires_grad:
            groups[group].append(parameter)
    covered = [id(parameter) for group in groups.values() for parameter in group]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(covered) == len(set(covered)) and set(covered) == trainable
    return groups


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a model; together they hold each trainable parameter once.

    Raises:
        ValueError: An unknown optimiser, or nothing to train.
    """
    if config.name not in ("adamw", "muon"):
        raise ValueError(f"optimiser is {config.name!r}, allowed are adamw, muon")
    groups = parameter_groups(model, config.name == "muon", config.lazy_tables)
    if not any(groups.values()):
        raise ValueError("the model has no trainable parameter")
    adamw: list[dict[str, Any]] = [
        {"params": groups["decay"], "weight_decay": config.weight_decay},
        {"params": groups["no_decay"], "weight_decay": 0.0},
    ]
    adamw = [group for group in adamw if group["params"]]
    built: list[torch.optim.Optimizer] = []
    if adamw:
        fused = all(p.device.type in ("cpu", "cuda") for group in adamw for p in group["params"])
        built.append(torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused))
    if groups["rows"]:
        built.append(torch.optim.SparseAdam(groups["rows"], config.lr, config.betas, config.eps))
        tables = {id(table) for table in groups["rows"]}
        for module in model.modules():
            if isinstance(module, nn.Embedding) and id(module.weight) in tables:
                module.sparse = True
    for optimizer in built:
        _allocate(optimizer)
    if groups["muon"]:
        built.append(Muon(groups["muon"], config.lr, config.momentum, config.weight_decay))
    return built


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Makes Adam's state now; made in the first step it lies scattered among the activations (3 % more memory)."""
    sparse = isinstance(optimizer, torch.optim.SparseAdam)
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = 0 if sparse else torch.zeros((), dtype=torch.float32, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Sets the rate of the next update."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of the optimisers as tensors named `<what>/<parameter>`."""
    return {
        f"{what}/{name}": torch.as_tensor(optimizer.state[parameter][what])
        for optimizer in optimizers
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for what in optimizer.state[parameter]
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`.

    Raises:
        ValueError: State of a parameter that these optimisers do not update.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.state.clear()  # what was made since; Adam's is there from the start
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        what, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in owner:
            raise ValueError(f"optimiser state {key!r} belongs to no trained parameter of this model")
        if tensor.ndim and tensor.shape != parameter.shape:
            raise ValueError(f"optimiser state {key!r} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        counts = what == "step" and isinstance(owner[parameter], torch.optim.SparseAdam)  # in Python's numbers
        owner[parameter].state[parameter][what] = int(tensor) if counts else tensor.to(parameter.device)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scales all gradients down to a common norm of at most `limit`, if it is not 0; the norm before.

    Gradients below the limit are left alone: multiplying them by 1 is a pass over all of the model.
    """
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
    sharded = any(isinstance(gradient, DTensor) for gradient in gradients)
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(gradients)
    if sharded:
        dist.all_reduce(norm.square_())
        norm.sqrt_()
    if limit and norm > limit:
        torch._foreach_mul_(gradients, limit / norm)
    return norm


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Jordan 2024), matrices of equal shape at once.

    Updates have the root mean square of AdamW's (Liu et al. 2025, section 2.2), so both share one learning rate.
    Sharded matrices are gathered, and every process makes all of them orthogonal.
    torch's own Muon always multiplies in bfloat16, which is ruinous on processors without it, and one by one.

    Args:
        params: Matrices.
        lr: Learning rate.
        momentum: Averaging rate of the gradient (Nesterov).
        weight_decay: Decoupled decay.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[(min(parameter.shape), max(parameter.shape))].append(parameter)
            for shape, parameters in alike.items():
                self._update(parameters, shape, group)

    def _update(self, parameters: list[nn.Parameter], shape: tuple[int, int], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, buffers, group["momentum"])
        whole = [d.full_tensor() if isinstance(d, DTensor) else d for d in directions]
        wide = [d if d.shape == shape else d.mT for d in whole]
        updates = orthogonalise(torch.stack(wide)).to(parameters[0].dtype)
        rate = group["lr"] * 0.2 * math.sqrt(shape[1])
        for parameter, update in zip(parameters, updates, strict=True):
            update = update if parameter.shape == shape else update.mT
            if isinstance(parameter, DTensor):  # this process's rows
                update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-rate)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Moves the singular values of wide matrices (n, r, c), r <= c, close to 1 (Newton-Schulz, quintic)."""
    x = matrices.to(torch.bfloat16 if has_bf16(matrices.device) else torch.float32)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x
