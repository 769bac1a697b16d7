"""Hyma (EMNLP 2025): one hypernetwork makes the connectors of all pairs of two sets of frozen encoders.

A connector takes the latents of an encoder of side `a` into the space of one of side `b`, which stays as it is. All
latents have length 1. What makes a layer's weights sees a code of the pair and one of the layer; an update trains some
pairs only, and what they share serves the others. `Grid` is what it is compared with: connectors of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourm.evaluation.retrieval import BothWays, both_ways
from fourm.model.connectors import ACTIVATIONS, Connector, ConnectorConfig, read_config, save_model, with_weights
from fourm.runtime import generator
from fourm.stitching.baselines import mean_recall
from fourm.stitching.latents import Source
from fourm.stitching.pairs import Samples, load_samples
from fourm.stitching.runs import Run
from fourm.stitching.space import info_nce
from fourm.training.trainer import TrainConfig

Pair = tuple[str, str]  # names of an encoder of side a and one of side b

# Zoo -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ZooConfig:
    """Encoders of two sides of the same samples.

    Args:
        data: Root of the raw data, with the splits train, val and test.
        a: The encoders whose latents go through connectors, by name.
        b: Those whose spaces they go to.
        latents: Folder of the stored latents.
        centre: Subtract the mean of the training latents before they are made unit vectors. Encoders that end in a ReLU
            need it: their vectors all point the same way.
    """

    data: str
    a: dict[str, Source]
    b: dict[str, Source]
    latents: str
    centre: bool = True


@dataclass(frozen=True)
class Zoo(Samples):
    """Samples whose sides are `(a, name)` and `(b, name)` of all encoders; their vectors have length 1.

    The means (D,), by side and name, are those of the raw training latents, made unit vectors.
    """

    means: dict[str, dict[str, Tensor]]

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """Numbers in a vector by side and name."""
        return {side: {name: z.shape[1] for (of, name), z in self.sides.items() if of == side} for side in ("a", "b")}

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of an encoder of a and one of b."""
        return [(a, b) for a in self.widths["a"] for b in self.widths["b"]]


def load_zoo(config: ZooConfig) -> dict[str, Zoo]:
    """Latents of all encoders by split, made where they are not there; see `load_samples`."""
    sources = {(side, name): source for side in ("a", "b") for name, source in getattr(config, side).items()}
    means: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    found = load_samples(config.data, config.latents, sources)
    for side, name in sources:
        mean = found["train"].sides[side, name].mean(0)
        means[side][name] = F.normalize(mean, dim=0)
        for split in found.values():
            z = split.sides[side, name]
            split.sides[side, name] = F.normalize(z - mean if config.centre else z, dim=-1)
    return {name: Zoo(split.sides, split.ids, means) for name, split in found.items()}


# Models --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The connectors of all pairs.

    Args:
        depth: Hidden layers: 0 for a linear map, MLP_0 of the paper.
        hidden: Their width.
        activation: After them.
    """

    depth: int = 1
    hidden: int = 64
    activation: Literal["gelu", "relu"] = "relu"

    def config(self, input_dim: int, output_dim: int) -> ConnectorConfig:
        """An ordinary connector of this kind."""
        kind: Any = "mlp" if self.depth else "linear"
        return ConnectorConfig(kind=kind, input_dim=input_dim, output_dim=output_dim, depth=self.depth,
                               hidden=self.hidden, activation=self.activation)  # fmt: skip

    def layers(self, input_dim: int, output_dim: int) -> list[tuple[int, int]]:
        """Numbers that go out of and into each layer."""
        widths = [input_dim, *[self.hidden] * self.depth, output_dim]
        return list(zip(widths[1:], widths[:-1], strict=True))

    def flops(self, input_dim: int, output_dim: int, batch: int) -> int:
        """Of products in one update of one connector, and of its loss.

        The scores and their gradient, 4 B^2 d; 4 B o d for the first layer, whose input needs no gradient, and 6 B o d
        for each other one.
        """
        first, *others = (o * d for o, d in self.layers(input_dim, output_dim))
        return 4 * batch**2 * output_dim + 4 * batch * first + 6 * batch * sum(others)


class Grid(nn.Module):
    """A connector of its own for every pair: grid search. Their updates have nothing in common but the samples.

    Args:
        shape: Of the connectors.
        widths: Numbers in a vector by side and name.
    """

    def __init__(self, shape: Shape, widths: Mapping[str, Mapping[str, int]]):
        super().__init__()
        self.pairs = list(itertools.product(widths["a"], widths["b"]))
        each = (shape.config(widths["a"][a], widths["b"][b]) for a, b in self.pairs)
        self.connectors = nn.ModuleList(map(Connector, each))

    def forward(self, pairs: Sequence[Pair], z: Sequence[Tensor]) -> list[Tensor]:
        """Latents (B, Da) of each of some pairs in the space of its b, (B, Db)."""
        return [self.materialise(pair)(each) for pair, each in zip(pairs, z, strict=True)]

    def materialise(self, pair: Pair) -> Connector:
        """The connector of a pair."""
        return self.connectors[self.pairs.index(pair)]  # type: ignore[return-value]

    def parts(self, pairs: Sequence[Pair]) -> dict[str, Sequence[Pair]]:
        """What can be stopped on its own: each of some pairs, by how the names of its weights begin."""
        return {f"connectors.{self.pairs.index(pair)}.": [pair] for pair in pairs}


@dataclass(frozen=True, kw_only=True)
class HymaConfig:
    """The hypernetwork.

    Args:
        code: Numbers in a code.
        trunk: Widths of its hidden layers.
        conditioning: What a pair is told by: codes of both `encoders`, one of the `pair`, or `features`, the mean
            latents of both encoders, padded and projected.
    """

    code: int = 32
    trunk: Sequence[int] = (128, 128)
    conditioning: Literal["encoders", "pair", "features"] = "encoders"


def key(first: str, second: str) -> str:
    """The name of a code: of a side and an encoder, or of a pair."""
    return f"{first} x {second}".replace(".", "%2e")  # parameters have no dots


class Hyma(nn.Module):
    """A hypernetwork that makes the connector of any pair of a zoo, layer by layer.

    A layer's weights are a corner of a matrix that has room for the widest encoders, divided by the root of the layer's
    input width, so that encoders of all widths train together.

    Args:
        config: The hypernetwork.
        shape: Of the connectors.
        means: Mean latents (D,) of the encoders by side and name.
        card: Anything JSON can hold that goes into the folder, such as the encoders.
    """

    def __init__(self, config: HymaConfig, shape: Shape, means: Mapping[str, Mapping[str, Tensor]],
                 card: Mapping[str, Any] | None = None):  # fmt: skip
        super().__init__()
        self.config, self.shape, self.card = config, shape, dict(card or {})
        self.widths: dict[str, dict[str, int]] = {"a": {}, "b": {}}
        self.room = {side: max(map(len, each.values())) for side, each in means.items()}
        self.largest = shape.layers(self.room["a"], self.room["b"])
        self.codes = nn.ParameterDict()
        self.layer_codes = nn.Parameter(torch.randn(len(self.largest), config.code))
        if config.conditioning == "features":
            self.project = nn.ModuleDict({side: nn.Linear(room, config.code) for side, room in self.room.items()})
        for side, each in means.items():
            for name, mean in each.items():
                self.add(side, name, mean)
        sizes = [config.code * (2 if config.conditioning == "pair" else 3), *config.trunk]
        layers = [(nn.Linear(i, o), nn.GELU()) for i, o in itertools.pairwise(sizes)]
        self.trunk = nn.Sequential(*itertools.chain(*layers))
        self.head = nn.Linear(sizes[-1], max(o * d + o for o, d in self.largest))

    def add(self, side: str, name: str, mean: Tensor) -> list[nn.Parameter]:
        """Makes codes for one more encoder.

        Args:
            side: `a` or `b`.
            name: Its name.
            mean: Its mean latents (D,).

        Returns:
            The new codes.

        Raises:
            ValueError: The name is taken, or it is too wide.
        """
        if name in self.widths[side] or len(mean) > self.room[side]:
            raise ValueError(f"{side}.{name} has {len(mean)} numbers; there is room for {self.room[side]}, and there "
                             f"are {', '.join(self.widths[side]) or 'none'} already")  # fmt: skip
        self.widths[side][name] = len(mean)
        keys, features = [key(side, name)], self.config.conditioning == "features"
        if self.config.conditioning == "pair":
            others = self.widths["b" if side == "a" else "a"]
            keys = [key(name, other) if side == "a" else key(other, name) for other in others]
        for each in keys:
            code = F.pad(mean, (0, self.room[side] - len(mean))) if features else torch.randn(self.config.code)
            self.codes[each] = nn.Parameter(code, requires_grad=not features)
        return [self.codes[each] for each in keys]

    def _code(self, pair: Pair) -> Tensor:
        if self.config.conditioning == "pair":
            return self.codes[key(*pair)]
        found = [self.codes[key(*each)] for each in zip("ab", pair, strict=True)]
        if self.config.conditioning == "features":
            found = [self.project[side](mean) for side, mean in zip("ab", found, strict=True)]
        return torch.cat(found)

    def weights(self, pairs: Sequence[Pair]) -> list[list[tuple[Tensor, Tensor]]]:
        """Matrix (o, d) and bias (o,) of each layer of the connectors of some pairs."""
        codes = torch.stack([self._code(pair) for pair in pairs])[:, None].expand(-1, len(self.layer_codes), -1)
        layers = self.layer_codes.expand(len(pairs), -1, -1)
        numbers = self.head(self.trunk(torch.cat([codes, layers], -1).flatten(0, 1))).unflatten(0, layers.shape[:2])
        found = []
        for (a, b), each in zip(pairs, numbers, strict=True):
            made, own = [], self.shape.layers(self.widths["a"][a], self.widths["b"][b])
            for (o, d), (rows, columns), flat in zip(own, self.largest, each, strict=True):
                matrix, bias = flat[: rows * columns].view(rows, columns)[:o, :d], flat[rows * columns :][:o]
                made.append((matrix / math.sqrt(d), bias / math.sqrt(d)))
            found.append(made)
        return found

    def forward(self, pairs: Sequence[Pair], z: Sequence[Tensor]) -> list[Tensor]:
        """Latents (B, Da) of each of some pairs in the space of its b, (B, Db)."""
        activation, found = ACTIVATIONS[self.shape.activation](), []
        for layers, x in zip(self.weights(pairs), z, strict=True):
            for matrix, bias in layers[:-1]:
                x = activation(F.linear(x, matrix, bias))
            found.append(F.linear(x, *layers[-1]))
        return found

    @torch.no_grad()
    def materialise(self, pair: Pair) -> Connector:
        """An ordinary connector that does the same."""
        connector = Connector(self.shape.config(self.widths["a"][pair[0]], self.widths["b"][pair[1]]))
        tensors = itertools.chain(*self.weights([pair])[0])
        for parameter, tensor in zip(connector.parameters(), tensors, strict=True):
            parameter.copy_(tensor)
        return connector.eval()

    def parts(self, pairs: Sequence[Pair]) -> dict[str, Sequence[Pair]]:
        """What can be stopped on its own: all pairs at once."""
        return {"": pairs}

    def flops(self) -> int:
        """Of products in making one connector and passing its gradient on: 6 for every weight and layer."""
        trunk = sum(layer.weight.numel() for layer in [*self.trunk, self.head] if isinstance(layer, nn.Linear))
        projected = sum(self.room.values()) * self.config.code if self.config.conditioning == "features" else 0
        return 6 * len(self.largest) * trunk + 4 * projected  # means need no gradient

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        card = {"hyma": dataclasses.asdict(self.config), "shape": dataclasses.asdict(self.shape)}
        save_model(self, card | {"widths": self.widths, "card": self.card}, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Hyma:
        """Inverse of `save`; ValueError where the folder holds none."""
        found = read_config(folder, "hyma", "hypernetwork")
        each = found["widths"].items()
        means = {side: {name: torch.zeros(width) for name, width in widths.items()} for side, widths in each}
        return with_weights(cls(HymaConfig(**found["hyma"]), Shape(**found["shape"]), means, found["card"]), folder)


# Training ------------------------------------------------------------------------------------------------------------


class Aligning:
    """Task: the latents of pairs of encoders meet in the space of their b, some pairs in each update.

    Every pair has its turn once before any has its second.

    Args:
        model: `Hyma` or `Grid`.
        temperature: Divides the cosines.
        pairs: The pairs that are trained.
        turns: How many of them in an update.
        seed: Decides whose turn it is.

    Raises:
        ValueError: There are fewer pairs than turns.
    """

    def __init__(self, model: nn.Module, temperature: float, pairs: Sequence[Pair], turns: int, seed: int):
        if not 0 < turns <= len(pairs):
            raise ValueError(f"turns is {turns}, allowed are 1 to {len(pairs)}, the number of pairs of encoders")
        self.model, self.temperature, self.pairs, self.turns, self.seed = model, temperature, pairs, turns, seed

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Samples, (1,)."""
        device = next(iter(batch["sides"].values())).device
        return torch.tensor([len(batch["keys"])], dtype=torch.float32, device=device)

    def turn(self, number: int) -> Pair:
        """The pair that is trained after so many others."""
        round_, place = divmod(number, len(self.pairs))
        order = torch.randperm(len(self.pairs), generator=generator(self.seed, "turns", round_))
        return self.pairs[int(order[place])]

    def loss(self, batch: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Symmetric InfoNCE in nats, the mean over the pairs whose turn it is."""
        z, pairs = batch["sides"], [self.turn(batch["step"] * self.turns + i) for i in range(self.turns)]
        moved = self.model(pairs, [z["a", a] for a, _ in pairs])
        losses = [
            info_nce(F.normalize(each.float(), dim=-1), z["b", b], self.temperature).sum()
            for each, (_, b) in zip(moved, pairs, strict=True)
        ]
        return {"loss": torch.stack(losses).mean() / counts[0]}


@torch.no_grad()
def evaluate(model: Any, zoo: Zoo, pairs: Sequence[Pair]) -> list[BothWays]:
    """Ranks in both directions of the samples of a split, for each of some pairs of encoders."""
    found = []
    for a, b in pairs:
        x, y = (z.to(next(model.parameters()).device) for z in (zoo.sides["a", a], zoo.sides["b", b]))
        found.append(both_ways(F.normalize(model([(a, b)], [x])[0].float(), dim=-1) @ y.T))
    return found


def watch(model: Any, zoo: Zoo, pairs: Sequence[Pair]) -> tuple[dict[str, float], dict[str, float]]:
    """For `Best`: the score that is selected by, of each part of a model and as the mean over some pairs."""
    found = [mean_recall(ranks.figures()) for ranks in evaluate(model, zoo, pairs)]
    scores = dict(zip(pairs, found, strict=True))
    parts = {part: sum(scores[pair] for pair in own) / len(own) for part, own in model.parts(pairs).items()}
    return {"score": sum(found) / len(found)}, parts


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """What is trained on a zoo, but for how long.

    Args:
        shape: Of the connectors.
        hyma: The hypernetwork.
        turns: Pairs of encoders in one of its updates, B_m of the paper.
        temperature: Divides the cosines.
    """

    shape: Shape = field(default_factory=Shape)
    hyma: HymaConfig = field(default_factory=HymaConfig)
    turns: int = 4
    temperature: float = 0.07


def fit(model: Any, zoo: Mapping[str, Zoo], pairs: Sequence[Pair], turns: int, temperature: float, run: Run) -> None:
    """Trains on a zoo, and leaves the model with the weights that were best on the validation split.

    Args:
        model: `Hyma` or `Grid`.
        zoo: `train` and `val`.
        pairs: The pairs of encoders that are trained.
        turns: How many of them in an update.
        temperature: Divides the cosines.
        run: How long and how, and where.
    """
    task = Aligning(model, temperature, pairs, turns, run.train.seed)
    run.fit(task, zoo["train"], lambda model: watch(model, zoo["val"], pairs))


def adapt(
    model: Hyma, side: str, name: str, zoo: Mapping[str, Zoo], train: TrainConfig, folder: Path, temperature: float
) -> None:
    """Teaches the hypernetwork one more encoder: only its new code learns, from the mean of those there are.

    Args:
        model: The hypernetwork; afterwards it makes connectors of the new encoder, too.
        side: `a` or `b`.
        name: The new encoder's, in the zoo.
        zoo: `train` and `val` with the latents of the new encoder and of those it is paired with.
        train: How long and how.
        folder: The run's folder.
        temperature: Divides the cosines.
    """
    mean = zoo["train"].means[side][name]
    others = [pair for pair in zoo["train"].pairs if pair["ab".index(side)] == name]
    kind = model.config.conditioning
    like = [code.detach() for name, code in model.codes.items() if kind == "pair" or name.startswith(f"{side} x ")]
    new = model.add(side, name, mean)
    if kind == "features":
        return  # its mean says it all
    resting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for code in new:
        code.copy_(torch.stack(like).mean(0)).requires_grad_(True)
    fit(model, zoo, others, min(len(others), 4), temperature, Run(folder, train, {}))
    for parameter in resting:
        parameter.requires_grad_(True)
