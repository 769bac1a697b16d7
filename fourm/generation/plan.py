"""What is generated, in which order and how: plans are plain data, made before anything is sampled.

A plan is a tuple of steps. A grid takes several steps (`maskgit` or `roar`), a text one (`autoregressive`). Chains are
the steps of several targets one after another: a finished target is visible to the next ones.
Schedules follow 4M (Mizrahi et al. 2023, appendix on generation), except that no step is ever empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fourm.modalities import TokenSpace

SCHEMES = ("maskgit", "roar", "autoregressive")


@dataclass(frozen=True)
class Step:
    """One visit to one target.

    Args:
        target: Name of the modality.
        scheme: `maskgit` decodes all remaining positions and keeps the most confident, `roar` decodes positions in
            random order, `autoregressive` writes a text from left to right.
        count: Positions this step settles; for texts the most ids it may write, None for `max_tokens`.
        temperature: Divides the logits after filtering; 0 takes the likeliest id.
        top_k: Keep that many ids (int) or that fraction of the vocabulary (float); 0 keeps all.
        top_p: Keep the likeliest ids that together have this probability; 0 keeps all.
        guidance: Weights of the guidance rows, logits = u + sum_i w_i (c_i - u). Each condition handed to the sampler
            is one row; one weight more than conditions adds a row that sees everything. (1.0,) is no guidance.
        hidden: Modalities that the unguided row u does not see; None hides all but the target, or nothing where the
            sampler is handed conditions.
    """

    target: str
    scheme: Literal["maskgit", "roar", "autoregressive"]
    count: int | None = None
    temperature: float = 1.0
    top_k: int | float = 0
    top_p: float = 0.0
    guidance: tuple[float, ...] = (1.0,)
    hidden: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"{self.target}: scheme is {self.scheme!r}, allowed are {', '.join(SCHEMES)}")
        if (self.count is None and self.scheme != "autoregressive") or (self.count is not None and self.count < 1):
            raise ValueError(f"{self.target}: a {self.scheme} step has count {self.count}, expected at least 1")
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 <= self.top_p <= 1):
            raise ValueError(
                f"{self.target}: temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; expected "
                "temperature >= 0, top_k >= 0 and top_p in [0, 1]"
            )
        if self.target in (self.hidden or ()):
            raise ValueError(f"{self.target} is the target and among the hidden modalities {self.hidden}")
        if not self.guidance:
            raise ValueError(f"{self.target}: guidance is empty, expected at least one weight")


Plan = tuple[Step, ...]


@dataclass(frozen=True)
class Target:
    """What is wanted of one target in a chain; `chain` turns it into steps.

    Args:
        name: Name of the modality.
        scheme: See `Step`; default: `autoregressive` for texts, `maskgit` for grids.
        steps: Steps of a grid, at most as many as it has tokens.
        schedule: How many tokens each step settles: `cosine` (few-many-few) or `linear`. `roar` is always linear.
        temperature: Temperature of the first step.
        temperature_schedule: `constant`, `linear` (down to 0) or `onex:MIN:POWER` (falls like x**-POWER to MIN).
        top_k: See `Step`.
        top_p: See `Step`.
        guidance: One weight, or one per row (see `Step`).
        max_tokens: Most ids of a text; default: what the modality allows.
    """

    name: str
    scheme: Literal["maskgit", "roar", "autoregressive"] | None = None
    steps: int = 8
    schedule: Literal["cosine", "linear"] = "cosine"
    temperature: float = 1.0
    temperature_schedule: str = "constant"
    top_k: int | float = 0
    top_p: float = 0.0
    guidance: float | tuple[float, ...] = 1.0
    max_tokens: int | None = None


def linear_counts(steps: int, total: int) -> list[int]:
    """Splits `total` tokens evenly, larger parts first, into min(steps, total) counts."""
    steps = _steps(steps, total)
    return [total // steps + (step < total % steps) for step in range(steps)]


def cosine_counts(steps: int, total: int) -> list[int]:
    """Rounded differences of (1 + cos(pi x)) / 2; the last step takes the rest.

    Rounding alone may leave steps with no or negative counts; these become 1, taken from the largest steps. Hence
    min(steps, total) counts, all positive, that sum to `total`.
    """
    steps = _steps(steps, total)
    curve = [total * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps + 1)]
    counts = [round(before - after) for before, after in itertools.pairwise(curve[:-1])]
    counts = [max(1, count) for count in (*counts, total - sum(counts))]
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    return counts


def _steps(steps: int, total: int) -> int:
    if steps < 1 or total < 1:
        raise ValueError(f"asked for {steps} steps over {total} tokens, expected at least 1 of each")
    return min(steps, total)


COUNTS: dict[str, Callable[[int, int], list[int]]] = {"cosine": cosine_counts, "linear": linear_counts}


def temperatures(schedule: str, start: float, counts: Sequence[int]) -> list[float]:
    """One temperature for each step.

    Args:
        schedule: `constant`, `linear` (start times the share of tokens still open) or `onex:MIN:POWER`.
        start: Highest temperature.
        counts: Tokens each step settles.

    Raises:
        ValueError: An unknown schedule.
    """
    total = sum(counts)
    done = [sum(counts[:step]) / total for step in range(len(counts) + 1)]
    match schedule.split(":"):
        case ["constant"]:
            return [start] * len(counts)
        case ["linear"]:
            return [start * (1 - share) for share in done[:-1]]
        case ["onex", low, power]:
            falling = _falling(float(power), total, len(counts))
            return [
                float(low) + (start - float(low)) * value * (1 - share)
                for value, share in zip(falling, done[1:], strict=True)
            ]
    raise ValueError(f"temperature schedule is {schedule!r}, allowed are constant, linear, onex:MIN:POWER")


def _falling(power: float, total: int, steps: int) -> list[float]:
    """x**-power at the first `steps` of `total` points between 1 and 100, rescaled to end at 1 and 0 (as 4M)."""
    if total == 1:
        return [0.0]
    low = 100.0**-power
    return [((1 + 99 * step / (total - 1)) ** -power - low) / (1 - low) for step in range(steps)]


def chain(
    space: TokenSpace, targets: Sequence[Target], hidden: Sequence[str] | None = None, grow: bool = False
) -> Plan:
    """The steps of several targets, one after another.

    Args:
        space: The modalities.
        targets: In the order in which they are generated.
        hidden: What guidance steers towards: the modalities its unguided row does not see. None: everything known,
            finished targets included.
        grow: With `hidden` given: each finished target joins it.

    Returns:
        A plan whose counts of a grid sum to its length.

    Raises:
        ValueError: A modality that cannot be predicted, a target named twice, a scheme that does not fit its kind.
    """
    plan: list[Step] = []
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise ValueError(f"targets {names} name a modality twice")
    for name in hidden or ():
        space[name]
    for target in targets:
        plan += _steps_of(space, target, None if hidden is None else tuple(hidden))
        hidden = [*hidden, target.name] if hidden is not None and grow else hidden
    return tuple(plan)


def _steps_of(space: TokenSpace, target: Target, hidden: tuple[str, ...] | None) -> list[Step]:
    row, name = space[target.name], target.name
    if not row.predicted:
        raise ValueError(f"{name!r} cannot be generated, targets may be {', '.join(space.outputs())}")
    scheme = target.scheme or ("autoregressive" if row.kind == "text" else "maskgit")
    if (scheme == "autoregressive") != (row.kind == "text"):
        raise ValueError(f"scheme {scheme!r} does not fit {name!r}, which is of kind {row.kind!r}")
    if target.schedule not in COUNTS:
        raise ValueError(f"{name}: schedule is {target.schedule!r}, allowed are {', '.join(COUNTS)}")
    guidance = (target.guidance,) if isinstance(target.guidance, int | float) else tuple(target.guidance)
    counts: list[int | None] = [target.max_tokens]
    heats = [target.temperature]
    if row.kind == "grid":
        settled = COUNTS["linear" if scheme == "roar" else target.schedule](target.steps, row.length)
        counts, heats = [*settled], temperatures(target.temperature_schedule, target.temperature, settled)
    return [
        Step(name, scheme, count, heat, target.top_k, target.top_p, guidance, hidden)
        for count, heat in zip(counts, heats, strict=True)
    ]
