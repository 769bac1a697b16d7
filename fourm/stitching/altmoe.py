"""Alt-MoE, named M3-JEPA since (2409.05929): one mixture of experts predicts the latents of each side from any other.

Notable:
* all directions share the experts; one learned vector says which direction a latent goes, another one for which loss;
* the contrastive and the regression answer are made of two copies of a hidden vector, so that one gate acts as two;
* what is looked for does not pass the experts: it is projected ahead and stored (`fourm/stitching/ahead.py`);
* latents are standardised first (ours), by their mean and deviation in the training split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.evaluation.retrieval import ranks, recalls
from fourm.model import connectors
from fourm.model.connectors import Routing, SparseMoE, balance_loss, expert, expert_load
from fourm.stitching.pairs import Samples
from fourm.stitching.runs import Run
from fourm.stitching.space import info_nce
from fourm.training.trainer import TrainConfig

LOSSES = ("contrastive", "regression")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The predictor, its losses and its schedule. The defaults are ours; `altmoe-paper.yaml` has the published ones.

    Args:
        hidden: Numbers in a hidden vector, also in one of the space where is searched.
        experts: How many.
        top_k: Experts that see a vector.
        renormalise: Make the weights of those sum to 1.
        dense: In place of the experts one MLP, this many times as wide as one of them; 0 for the experts.
        dropout: Inside the experts.
        balance: Weight of the loss that evens out the experts' load.
        alpha: Weight of the regression loss; the contrastive one has the rest.
        temperature: Of the contrastive loss.
        schedule: `alternate`: directions take turns; `joint`: all in each step; `probabilistic`: one is drawn, more
            often if its contrastive loss is high.
        steps_per_direction: Length of a turn.
        directions: What is trained, as `source>target`; default: all.
        gradients: Gradients of each direction, in units of the run's `steps`.
    """

    hidden: int = 96
    experts: int = 8
    top_k: int = 2
    renormalise: bool = True
    dense: int = 0
    dropout: float = 0.1
    balance: float = 0.01
    alpha: float = 0.5
    temperature: float = 0.03
    schedule: Literal["alternate", "joint", "probabilistic"] = "alternate"
    steps_per_direction: int = 1
    directions: Sequence[str] = ()
    gradients: float = 1.0


# Model ---------------------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """Unit vectors (B, hidden) to search with, and guessed standardised latents (B, D) of the target."""

    contrastive: Tensor
    regression: Tensor


class Predictor(nn.Module):
    """From the latents of any side to those of any other.

    Args:
        widths: Numbers in the latents of each side.
        directions: As `source>target`.
        method: What it is like.
        card: Anything JSON can hold that goes into the folder, such as the sides' sources.

    Attributes:
        difficulty: Moving averages (number of directions,) of the contrastive losses in training, in nats.
    """

    difficulty: Tensor

    def __init__(self, widths: Mapping[str, int], directions: Sequence[str], method: Method, card: Any = None):
        super().__init__()
        self.widths, self.directions, self.method, self.card = dict(widths), list(directions), method, dict(card or {})
        h, ways = method.hidden, [(way, *split(way, widths)) for way in directions]
        self.enter = nn.ModuleDict({side: nn.Linear(width, h) for side, width in widths.items()})
        self.way = nn.ParameterDict({way: 0.02 * torch.randn(widths[source]) for way, source, _ in ways})
        self.loss_type = nn.Parameter(0.02 * torch.randn(len(LOSSES), h))
        self.experts: nn.Module
        if method.dense:
            self.experts = expert(h, method.dense * h, method.dropout)
        else:
            self.experts = SparseMoE(h, method.experts, h, method.top_k, method.renormalise, method.dropout)
        self.norm = nn.LayerNorm(h)
        self.contrastive = nn.ModuleDict({way: nn.Linear(h, h) for way in directions})
        self.regression = nn.ModuleDict({way: nn.Linear(h, widths[target]) for way, _, target in ways})
        self.projection = nn.ModuleDict({side: nn.Linear(width, h) for side, width in widths.items()})
        for side, width in widths.items():
            self.register_buffer(f"mean_{side}", torch.zeros(width))
            self.register_buffer(f"std_{side}", torch.ones(width))
        self.register_buffer("difficulty", torch.ones(len(directions)))

    def fit_scale(self, vectors: Mapping[str, Tensor]) -> Predictor:
        """Takes the means and deviations of sides from their training latents (n, D)."""
        for side, z in vectors.items():
            getattr(self, f"mean_{side}").copy_(z.mean(0))
            getattr(self, f"std_{side}").copy_(z.std(0).clamp(min=1e-6))
        return self

    def standardised(self, side: str, z: Tensor) -> Tensor:
        """Latents (B, D) of a side, on any device, each number of mean 0 and deviation 1 over the training split."""
        mean, std = getattr(self, f"mean_{side}"), getattr(self, f"std_{side}")
        return (z.to(mean.device) - mean) / std

    def hidden(self, way: str, z: Tensor, losses: slice = slice(None)) -> Tensor:
        """Latents (B, D) of the source as hidden vectors (losses, B, hidden), one for each loss that is asked for."""
        source = split(way, self.widths)[0]
        h = F.gelu(self.enter[source](self.standardised(source, z) + self.way[way]))
        h = h + self.loss_type[losses, None]
        return h + F.gelu(self.norm(self.experts(h)))

    def forward(self, way: str, z: Tensor) -> Prediction:
        """Latents (B, D) of the source -> both answers."""
        contrastive, regression = self.hidden(way, z)
        return Prediction(F.normalize(self.contrastive[way](contrastive), dim=-1), self.regression[way](regression))

    def query(self, way: str, z: Tensor) -> Tensor:
        """Latents (B, D) of the source as unit vectors (B, hidden) to search the target's items with."""
        hidden = self.hidden(way, z, slice(1))[0]
        return F.normalize(self.contrastive[way](hidden), dim=-1)

    def items(self, side: str, z: Tensor) -> Tensor:
        """Latents (B, D) of a side as unit vectors (B, hidden) to be found."""
        return F.normalize(self.projection[side](self.standardised(side, z)), dim=-1)

    def item_weights(self, side: str) -> str:
        """Digest of all that `items` of a side depends on; adding a side leaves that of others as it is."""
        names = (f"projection.{side}.", f"mean_{side}", f"std_{side}")
        return digest({name: tensor for name, tensor in self.state_dict().items() if name.startswith(names)})

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        shape = {"widths": self.widths, "directions": self.directions, "method": dataclasses.asdict(self.method)}
        connectors.save_model(self, shape | {"card": self.card}, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Predictor:
        """Inverse of `save`; ValueError where the folder holds none."""
        found = connectors.read_config(folder, "directions", "predictor of Alt-MoE")
        model = cls(found["widths"], found["directions"], Method(**found["method"]), found["card"])
        return connectors.with_weights(model, folder)


def split(way: str, sides: Mapping[str, Any]) -> tuple[str, str]:
    """Source and target of a direction; ValueError where it is none between two of the sides."""
    source, _, target = way.partition(">")
    if source == target or {source, target} - set(sides):
        raise ValueError(f"direction is {way!r}, allowed are {', '.join(all_ways(sides))}")
    return source, target


def all_ways(sides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Every direction between sides."""
    return [f"{source}>{target}" for source, target in itertools.permutations(sides, 2)]


def extend(model: Predictor, vectors: Mapping[str, Tensor]) -> Predictor:
    """A predictor that knows more sides, in all directions; whatever `model` has is taken over, and rests.

    Args:
        model: What is extended.
        vectors: Training latents (n, D) of the new sides.
    """
    widths = model.widths | {side: z.shape[1] for side, z in vectors.items()}
    new = [way for way in all_ways(widths) if way not in model.directions and set(way.split(">")) & set(vectors)]
    larger = Predictor(widths, [*model.directions, *new], model.method, model.card).fit_scale(vectors)
    state = model.state_dict() | {"difficulty": torch.cat([model.difficulty, model.difficulty.new_ones(len(new))])}
    larger.load_state_dict(state, strict=False)
    for name, parameter in larger.named_parameters():
        parameter.requires_grad_(name not in state)
    return larger


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names and numbers."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        made.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()[:12]


# Training ------------------------------------------------------------------------------------------------------------


def taught(method: Method, ways: Sequence[str], step: int, draw: float, difficulty: Tensor) -> list[str]:
    """The directions a batch is for: decided by its number alone, or by its draw and what the model remembers.

    Args:
        method: The schedule.
        ways: All that are trained.
        step: Number of the batch.
        draw: In [0, 1), the batch's own.
        difficulty: (number of ways,) what `probabilistic` draws in proportion to.
    """
    if method.schedule == "joint":
        return list(ways)
    if method.schedule == "alternate":
        return [ways[step // method.steps_per_direction % len(ways)]]
    if method.schedule == "probabilistic":
        shares = difficulty.double().cumsum(0) / difficulty.double().sum()
        return [ways[min(int((shares <= draw).sum()), len(ways) - 1)]]
    raise ValueError(f"schedule is {method.schedule!r}, allowed are alternate, joint, probabilistic")


class Directions:
    """Task: predict, in the directions whose turn it is.

    Args:
        model: The predictor.
        method: Losses and schedule.
        ways: The directions that are trained.
    """

    def __init__(self, model: Predictor, method: Method, ways: Sequence[str]):
        self.model: nn.Module = model
        self.method, self.ways = method, list(ways)
        self.places = [model.directions.index(way) for way in ways]

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Items, (1,)."""
        first = next(iter(batch["sides"].values()))
        return torch.tensor([len(first)], dtype=torch.float32, device=first.device)

    def loss(self, batch: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Mean over the directions of the batch; beside it the contrastive loss of each in nats."""
        model: Any = self.model
        ways = taught(self.method, self.ways, batch["step"], batch["draw"], model.difficulty[self.places])
        parts = {way: self.one(way, batch["sides"], counts) for way in ways}
        for way, (_, contrastive) in parts.items():
            if model.training:
                model.difficulty[model.directions.index(way)].lerp_(contrastive.detach(), 0.05)
        loss = torch.stack([loss for loss, _ in parts.values()]).mean()
        return {"loss": loss, **{way: contrastive for way, (_, contrastive) in parts.items()}}

    def one(self, way: str, sides: Mapping[str, Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one direction, and its contrastive part."""
        model: Any = self.model
        method, (source, target) = self.method, split(way, model.widths)
        guess, truth = model(way, sides[source]), model.standardised(target, sides[target])
        found = info_nce(guess.contrastive, model.items(target, sides[target]), method.temperature)
        contrastive = found.sum() / counts[0]
        regression = F.smooth_l1_loss(guess.regression, truth, reduction="none").mean(1).sum() / counts[0]
        loss = method.alpha * regression + (1 - method.alpha) * contrastive
        if method.balance and not method.dense:
            loss = loss + method.balance * balance_loss(model.experts.routing) * len(truth) / counts[0]
        return loss, contrastive


@torch.no_grad()
def evaluate(model: Predictor, items: Samples, ways: Sequence[str]) -> dict[str, Tensor]:
    """Ranks (n,) of the right items in each direction."""
    z, targets = items.sides, {way: split(way, model.widths) for way in ways}
    return {way: ranks(model.query(way, z[a]) @ model.items(b, z[b]).T) for way, (a, b) in targets.items()}


def watch(
    model: Predictor, items: Samples, ways: Sequence[str], trained: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """For `Best`: R@1 of some directions, and the score: mean of R@1, R@5, R@10 over the trained ones among them."""
    found = {way: recalls(each) for way, each in evaluate(model, items, ways).items()}
    score = sum(sum(found[way].values()) for way in trained) / 3 / len(trained)
    return {"score": score, **{way: each["R@1"] for way, each in found.items()}}, {"": score}


def train_one(model: Predictor, method: Method, ways: Sequence[str], items: Mapping[str, Samples], train: TrainConfig,
              folder: Path) -> dict[str, Any]:  # fmt: skip
    """One run with the trainer, selected on the validation split and ranked on the test split; `model` ends trained.

    Args:
        model: The predictor, as it begins.
        method: Losses and schedule.
        ways: What is trained.
        items: `train`, `val` and `test`.
        train: How; its `steps` and `eval_every` are in gradients of each direction.
        folder: The run's folder; the predictor is kept in `<folder>/model`. A finished run is not made again.

    Returns:
        `ranks` of the test items in all directions the model has, `course` on the validation split, `loads`, `score`,
        `step`, `updates`, `seconds`.
    """
    turns = 1 if method.schedule == "joint" else len(ways)
    steps, size = round(train.steps * method.gradients) * turns, min(train.batch_size, len(items["train"]))
    train = dataclasses.replace(train, steps=steps, batch_size=size, eval_every=train.eval_every * turns)
    data = digest({f"{name}/{side}": z for name, each in items.items() for side, z in each.sides.items()})
    made = {"data": data, "model": digest(model.state_dict()), "method": repr(method), "directions": " ".join(ways)}
    run = Run(folder, train, made, "model")
    if found := run.finished():
        connectors.with_weights(model, folder / "model")
        return found
    best = run.fit(Directions(model, method, ways), items["train"],
                   lambda model: watch(model, items["val"], model.directions, ways))  # fmt: skip
    model.cpu().eval()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "ranks": {way: each.tolist() for way, each in evaluate(model, items["test"], model.directions).items()},
        "course": [each for each in records if "val/score" in each],
        "loads": loads(model, items["test"]) if isinstance(model.experts, SparseMoE) else {},
        "score": best.scores[""],
        "step": best.step,
        "updates": steps,
    }
    return run.finish(result, model)


# What the experts and the gradients do -------------------------------------------------------------------------------


@torch.no_grad()
def loads(model: Predictor, items: Samples) -> dict[str, Any]:
    """How vectors spread over the experts.

    Returns:
        By loss type `load`: of each direction the shares (E,) of the experts, `entropy`: of each direction that of its
        shares, 1 if even, `under_1_percent`: of each direction how many experts, and `information`: what the expert
        says about the direction, in bits; beside them `dead`: how many experts have under 1 % of everything.
    """
    moe: Any = model.experts
    found = {loss: dict[str, Any](load={}) for loss in LOSSES}
    for way in model.directions:
        model.hidden(way, items.sides[split(way, model.widths)[0]])
        halves = [Routing(*each) for each in zip(*(part.chunk(2) for part in moe.routing), strict=True)]
        for loss, routing in zip(LOSSES, halves, strict=True):
            found[loss]["load"][way] = expert_load(routing).double()
    everything = torch.stack([load for each in found.values() for load in each["load"].values()]).mean(0)
    for each in found.values():
        shares = each["load"]
        entropies = {way: float(torch.special.entr(load).sum()) for way, load in shares.items()}
        together = float(torch.special.entr(torch.stack(list(shares.values())).mean(0)).sum())
        each["entropy"] = {way: entropy / math.log(len(everything)) for way, entropy in entropies.items()}
        each["under_1_percent"] = {way: int((load < 0.01).sum()) for way, load in shares.items()}
        each["information"] = (together - sum(entropies.values()) / len(entropies)) / math.log(2)
        each["load"] = {way: load.tolist() for way, load in shares.items()}
    return {**found, "dead": int((everything < 0.01).sum())}


def gradient_cosines(model: Predictor, method: Method, batch: Mapping[str, Any]) -> dict[str, float]:
    """Cosine between the gradients that two directions give the parts that all share, on one batch, by their names."""
    task, model = Directions(model, method, model.directions), model.eval()
    shared = [*model.experts.parameters(), *model.norm.parameters(), model.loss_type]
    flat = {}
    for way in model.directions:
        loss, _ = task.one(way, batch["sides"], task.counts(batch))
        gradients = torch.autograd.grad(loss, shared, allow_unused=True, materialize_grads=True)
        flat[way] = torch.cat([gradient.flatten() for gradient in gradients])
    pairs = itertools.combinations(flat, 2)
    return {f"{a} | {b}": float(F.cosine_similarity(flat[a], flat[b], dim=0)) for a, b in pairs}
