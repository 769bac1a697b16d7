"""How many tokens of each modality are given and asked: mixtures of Dirichlets (Mizrahi et al. 2023, 4M)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fourm.masking.hashing import mix, uniform
from fourm.modalities import TokenSpace

KEEP = ("random", "all", "binary")
PHILOX_DOMAIN = 0x6275646765747321  # keeps these draws apart from those of the other rooms, which use the same seed


@dataclass
class Component:
    """One way to mask, of several that a mixture chooses from.

    Alphas are those of a Dirichlet distribution over modalities: small ones give one modality nearly everything, big
    ones share evenly, and 0 gives a modality nothing. Modalities that are not named take the alpha of `others` (0
    without it). A component without input alphas gives the model nothing at all to see.

    Args:
        weight: How often it is chosen, relative to the others.
        input: Alpha by modality, for the tokens that are given.
        target: Alpha by modality, for the tokens that are asked. Vectors may be named too: what falls to them is asked
            of nobody (4M-21's recipes have that for `t5_caption`).
        keep: Chance of a token of a text or of vectors to stay visible: `random` (drawn from [0, 1)), `all` (1) or
            `binary` (0 or 1); for all modalities, or by modality (and `others`, else `random`).
    """

    weight: float = 1.0
    input: dict[str, float] = field(default_factory=dict)
    target: dict[str, float] = field(default_factory=dict)
    keep: str | dict[str, str] = "random"


@dataclass
class MaskingConfig:
    """What is given and what is asked.

    Args:
        input_tokens: Tokens given per sample, a number or the ends of a range (both included).
        target_tokens: Tokens asked per sample, likewise.
        mixture: Components, at least one.
        seed: Seed of all draws.
    """

    input_tokens: int | tuple[int, int]
    target_tokens: int | tuple[int, int]
    mixture: list[Component]
    seed: int = 0


@dataclass(frozen=True)
class Budgets:
    """Draws for B samples and the K modalities of the table: tokens given and asked, and the chance to stay visible.

    Attributes:
        component: (B,) chosen component.
        input: (B, K) most tokens to give.
        target: (B, K) most tokens to ask; those of vectors are lost.
        keep: (B, K) chance in [0, 1] of a token of a sequence to stay visible.
    """

    component: np.ndarray
    input: np.ndarray
    target: np.ndarray
    keep: np.ndarray


class Mixture:
    """Draws budgets, each a pure function of (seed, epoch, index) and of which modalities the sample has.

    Args:
        space: The modality table.
        config: Checked here.

    Attributes:
        widths: The most input and target tokens that any sample can have.

    Raises:
        ValueError: Names the part of the config that is wrong, and what is allowed.
    """

    def __init__(self, space: TokenSpace, config: MaskingConfig):
        if not config.mixture:
            raise ValueError("masking.mixture is empty, expected at least one component")
        self.seed = config.seed
        self.weight = np.array([part.weight for part in config.mixture], dtype=float)
        if not np.isfinite(self.weight).all() or self.weight.min() < 0 or self.weight.sum() == 0:
            raise ValueError(f"masking.mixture has weights {self.weight.tolist()}, expected numbers >= 0, one above 0")
        alpha, keep = [], []
        vectors = [name for name, row in space.modalities.items() if row.kind == "vectors"]
        for number, part in enumerate(config.mixture):
            where = f"masking.mixture[{number}]"
            input_alphas = alphas(space, part.input, space.inputs(), f"{where}.input")
            target_alphas = alphas(space, part.target, space.outputs(), f"{where}.target", vectors)
            alpha.append([input_alphas, target_alphas])
            keep.append(keep_schemes(space, part.keep, f"{where}.keep"))
        self.alpha = np.array(alpha)  # (C, 2, K): row 0 for inputs, row 1 for targets
        self.keep = np.array(keep)  # (C, K)
        given = token_range(config.input_tokens, "masking.input_tokens")
        asked = token_range(config.target_tokens, "masking.target_tokens")
        self.low, self.high = np.array([given, asked]).T  # (2,) each: of inputs and targets
        self.widths = (given[1], asked[1])
        self.limit = np.array([row.length if row.grid else row.max_tokens for row in space.modalities.values()])
        self.is_grid = space.is_grid
        self._asks = self.alpha[:, 1] * [row.predicted for row in space.modalities.values()]  # (C, K)
        self._gives = self.alpha[:, 0]  # (C, K)
        self._philox = np.random.Philox(key=np.array([config.seed, PHILOX_DOMAIN], dtype=np.uint64))
        self._start = self._philox.state

    def keys(self, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
        """One 64-bit key for each sample of each epoch: (B,), (B,) to (B,) uint64."""
        key = mix(np.uint64(self.seed) + np.zeros(len(epoch), dtype=np.uint64))
        return mix(mix(key + epoch.astype(np.uint64)) + index.astype(np.uint64))

    def draw(self, present: np.ndarray, epoch: np.ndarray, index: np.ndarray) -> Budgets:
        """Draws budgets for B samples.

        Args:
            present: (B, K) bool, which sample has which modality; only these get tokens.
            epoch: (B,) integers >= 0.
            index: (B,) integers >= 0, numbers of the samples in their dataset.
        """
        chance = uniform(self.keys(epoch, index), 3 + present.shape[1])
        component = self._choose(present, chance[:, 0])
        alpha = self.alpha[component] * present[:, None]
        total = self.low + np.floor(chance[:, 1:3] * (self.high - self.low + 1)).astype(np.int64)
        shares = split(alpha, total, self._log_gammas(alpha, epoch, index))
        given = np.minimum(shares[:, 0], self.limit)
        asked = np.minimum(shares[:, 1], np.where(self.is_grid, self.limit - given, self.limit))
        drawn = chance[:, 3:]
        keep = np.choose(self.keep[component], [drawn, np.ones_like(drawn), (drawn < 0.5).astype(float)])
        return Budgets(component, given, asked, keep)

    def _choose(self, present: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """(B,) components; one that gives or asks only what the sample lacks is chosen only if all are like that."""
        has = present.astype(float)
        asks, gives = has @ self._asks.T > 0, (has @ self._gives.T > 0) | ~self._gives.any(axis=1)  # (B, C)
        weight = np.where(asks & gives, self.weight, 0)
        for allowed in (asks, np.ones_like(asks)):
            weight = np.where(weight.any(axis=1, keepdims=True), weight, np.where(allowed, self.weight, 0))
        ends = weight.cumsum(axis=1)
        return (chance[:, None] * ends[:, -1:] < ends).argmax(axis=1)

    def _log_gammas(self, alpha: np.ndarray, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
        """K draws per modality: logarithms of gamma variables of shape `alpha` (B, 2, K) as (B, K, 2, K).

        Gamma(a) = Gamma(a + 1) * U^(1/a), in logarithms, so that tiny alphas do not underflow. The generator is moved
        to a place of its own for each sample, which is ten times quicker than building one for each.
        """
        size = (alpha.shape[2], *alpha.shape[1:])
        gamma, chance = np.empty((len(alpha), *size)), np.empty((len(alpha), *size))
        generator, state = np.random.Generator(self._philox), self._start
        for row, (shape, *place) in enumerate(zip(alpha + 1, epoch, index, strict=True)):
            state["state"]["counter"] = np.array([0, 0, *place], dtype=np.uint64)
            self._philox.state = state
            generator.standard_gamma(shape, out=gamma[row])
            generator.random(out=chance[row])
        with np.errstate(divide="ignore", invalid="ignore"):
            boost = np.log1p(-chance) / alpha[:, None]
            return np.where(alpha[:, None] > 0, np.log(gamma) + boost, -np.inf)


def split(alpha: np.ndarray, total: np.ndarray, log_gamma: np.ndarray) -> np.ndarray:
    """Splits token numbers by Dirichlet shares.

    Each modality gets its share rounded down; the rest goes token by token to the largest share of a fresh draw.

    Args:
        alpha: (B, 2, K).
        total: (B, 2) tokens to split.
        log_gamma: (B, 1 + fresh draws, 2, K) logarithms of gamma variables of shape alpha.

    Returns:
        (B, 2, K) tokens; they add up to `total` where any alpha is above 0, and are 0 elsewhere.
    """
    possible = alpha.max(axis=2) > 0
    first = np.where(possible[..., None], log_gamma[:, 0], 0)
    weight = np.exp(first - first.max(axis=2, keepdims=True))
    tokens = np.floor(weight / weight.sum(axis=2, keepdims=True) * total[..., None]).astype(np.int64)
    tokens[~possible] = 0
    left = np.where(possible, total - tokens.sum(axis=2), 0)
    winner = log_gamma[:, 1:].argmax(axis=3)  # (B, draws, 2)
    row, draw, side = np.nonzero(np.arange(winner.shape[1])[:, None] < left[:, None])
    np.add.at(tokens, (row, side, winner[row, draw, side]), 1)
    return tokens


def check_names(space: TokenSpace, given: Mapping[str, object], where: str) -> None:
    """Raises an error for a name that is no modality and not `others`; proposes the nearest."""
    for name in given:
        if name != "others" and name not in space.modalities:
            near = difflib.get_close_matches(name, [*space.names, "others"], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{where} has unknown modality {name!r}{hint}, known are {', '.join(space.names)}, others")


def alphas(
    space: TokenSpace, given: Mapping[str, float], allowed: list[str], where: str, named: Sequence[str] = ()
) -> list[float]:
    """Alphas in the order of the modality table; 0 for modalities that are not `allowed`, nor `named` in `given`."""
    check_names(space, given, where)
    for name, alpha in given.items():
        if not 0 <= alpha < np.inf:
            raise ValueError(f"{where}.{name} is {alpha}, expected a number >= 0")
        if alpha and name != "others" and name not in allowed and name not in named:
            raise ValueError(f"{where}.{name} is {alpha}, but only 0 fits it; others: {', '.join(allowed)}")
    others = given.get("others", 0)
    return [float(given.get(name, others if name in allowed else 0)) for name in space.names]


def keep_schemes(space: TokenSpace, keep: str | Mapping[str, str], where: str) -> list[int]:
    """Numbers of keep schemes in the order of the modality table."""
    by_name = {"others": keep} if isinstance(keep, str) else keep
    check_names(space, by_name, where)
    unknown = sorted(set(by_name.values()) - set(KEEP))
    if unknown:
        raise ValueError(f"{where} is {unknown[0]!r}, allowed are {', '.join(KEEP)}")
    others = by_name.get("others", "random")
    return [KEEP.index(by_name.get(name, others)) for name in space.names]


def token_range(tokens: int | tuple[int, int], where: str) -> tuple[int, int]:
    """Least and most tokens."""
    low, high = (tokens, tokens) if isinstance(tokens, int) else tokens
    if not 0 <= low <= high:
        raise ValueError(f"{where} is {tokens}, expected a number >= 0, or two of them in ascending order")
    return low, high
