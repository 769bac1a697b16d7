"""Task figures: how well a picture is read out of another modality, beside a constant guess and the tokenizer's bound.

The model's one-pass distribution over the target's tokens is drawn from several times; the decoded draws are combined
per pixel into the estimate that suits the figure (median of numbers, mean of probabilities, vectors and colours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fourm.evaluation.matrix import complete_samples, raw_samples, raw_sources, raw_targets
from fourm.evaluation.metrics import BASELINE, COMBINE, CONSTANT, key
from fourm.evaluation.tokenizers import reconstruct, score, unit
from fourm.masking.transfer import transfer_batch
from fourm.model.fourm import FourM
from fourm.tokenization.autoencoder import ImageTokenizer


@dataclass(frozen=True)
class Task:
    """Predict `target` from `source` (raw names).

    Args:
        source: Raw modality that is given.
        target: Raw image-like modality that is predicted.
        region: Also score only the pixels of this region of `TasksConfig.regions`.
    """

    source: str
    target: str
    region: str | None = None


@dataclass(frozen=True)
class Region:
    """The pixels where a class map has one value.

    Args:
        modality: Raw class map, aligned with the target.
        value: Class id inside the region.
    """

    modality: str
    value: int


EARTH_TASKS = (
    Task("rgb", "water"),
    Task("rgb", "climate", "land"),
    Task("rgb", "elevation", "land"),
    Task("rgb", "normal", "land"),
    Task("rgb", "relief"),
    Task("relief", "elevation", "land"),
    Task("relief", "normal", "land"),
    Task("elevation", "normal", "land"),
    Task("caption", "climate", "land"),
    Task("caption", "rgb"),
    Task("climate", "rgb"),
)


@dataclass(frozen=True)
class TasksConfig:
    """What is scored, and how carefully.

    Args:
        tasks: Source, target and region of each.
        regions: By name; default: land is where `water` is 0.
        n: Test samples per task.
        draws: Token maps drawn per sample.
        train_n: Training samples behind the constant guess.
        batch_size: Samples per pass.
        seed: Of choices and draws.
    """

    tasks: Sequence[Task] = EARTH_TASKS
    regions: Mapping[str, Region] = field(default_factory=lambda: {"land": Region("water", 0)})
    n: int = 256
    draws: int = 8
    train_n: int = 1024
    batch_size: int = 64
    seed: int = 0


@torch.inference_mode()
def draw_pictures(
    model: FourM,
    tokenizer: ImageTokenizer,
    samples: Sequence[dict[str, Any]],
    source: str,
    target: str,
    draws: int,
    generator: torch.Generator,
) -> np.ndarray:
    """A point estimate of the target's pictures from the one-pass token distribution.

    Args:
        model: In evaluation mode.
        tokenizer: The target's.
        samples: B token samples that hold `source` and `target`.
        source: Model modality that is given.
        target: Model modality (grid) that is predicted; its tokens in `samples` are not looked at.
        draws: Token maps per sample.
        generator: Of the draws; lives on the CPU.

    Returns:
        (B, H, W, ...) raw pictures.
    """
    device = next(model.parameters()).device
    hidden = model(transfer_batch(model.space, samples, [source], [target]).to(device))  # (B, n, D)
    chances = model.logits(hidden, target).float().softmax(-1).cpu()  # (B, n, V)
    ids = torch.multinomial(chances.flatten(0, 1), draws, replacement=True, generator=generator)
    maps = ids.T.reshape(draws, *chances.shape[:2]).to(device)  # (S, B, n)
    settings = tokenizer.config.input
    decode = tokenizer.decode_probabilities if settings.kind == "classes" else tokenizer.decode
    estimate = COMBINE[settings.kind](np.stack([np.asarray(decode(ids)) for ids in maps]))
    return np.array(settings.values)[estimate] if settings.values else estimate


def evaluate_tasks(
    model: FourM,
    tokenizers: Mapping[str, Any],
    raw: Any,
    tokens: Any,
    train: Any,
    config: TasksConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores the tasks whose modalities the model has.

    Args:
        model: Its `space` says which modalities there are.
        tokenizers: By name of the model modality.
        raw: `ShardDataset` of the test split.
        tokens: `TokenDataset` of the same samples in the same order.
        train: `ShardDataset` of the training split, for the constant guess.
        config: Tasks and budgets; default: the built-in data's.

    Returns:
        `{"rgb->elevation": {"mae_m", "mae_land_m", "mean_predictor_mae_land_m", ..., "bound": {...}, "n"}}`. `bound`
        holds the same figures of the target's tokenizer alone: decode(encode(truth)).

    Raises:
        ValueError: The two datasets differ in their samples, or a task names an unknown region.
    """
    config = config or TasksConfig()
    sources, targets = raw_sources(model.space), raw_targets(model.space)
    tasks = [task for task in config.tasks if task.source in sources and task.target in targets]
    for task in tasks:
        if task.region is not None and task.region not in config.regions:
            known = ", ".join(config.regions)
            raise ValueError(f"{task.source}->{task.target} names the region {task.region!r}, known are {known}")
    if not tasks:
        return {}
    names = {sources[task.source] for task in tasks} | {targets[task.target] for task in tasks}
    chosen = complete_samples(tokens, sorted(names), min(config.n, len(tokens)), config.seed)
    scenes = raw_samples(raw, chosen)
    order = np.random.default_rng(config.seed).permutation(len(train))[: config.train_n]
    training = [train[int(index)] for index in order]

    model.eval()
    figures: dict[str, dict[str, Any]] = {}
    for task in tasks:
        tokenizer, pair = tokenizers[targets[task.target]], (sources[task.source], targets[task.target])
        guess = _draw_all(model, tokenizer, list(chosen.values()), pair, config)
        regions = {task.region: config.regions[task.region]} if task.region else {}
        scored = _score(tokenizer, guess, task.target, scenes, training, regions)
        figures[f"{task.source}->{task.target}"] = scored | {"n": len(scenes)}
    return figures


def _draw_all(
    model: FourM, tokenizer: ImageTokenizer, samples: Sequence[Any], pair: tuple[str, str], config: TasksConfig
) -> np.ndarray:
    generator = torch.Generator().manual_seed(config.seed)
    starts = range(0, len(samples), config.batch_size)
    batches = [samples[start : start + config.batch_size] for start in starts]
    return np.concatenate([draw_pictures(model, tokenizer, batch, *pair, config.draws, generator) for batch in batches])


def _score(
    tokenizer: ImageTokenizer,
    guess: np.ndarray,
    target: str,
    scenes: Sequence[dict[str, Any]],
    training: Sequence[dict[str, Any]],
    regions: Mapping[str, Region],
) -> dict[str, Any]:
    """Figures of a guess, of the best constant and of the tokenizer alone, over all pixels and over each region."""
    truth, known = (np.stack([scene[target] for scene in group if target in scene]) for group in (scenes, training))
    bound, _ = reconstruct(tokenizer, truth)
    kind = tokenizer.config.input.kind
    figures: dict[str, Any] = {}
    limits: dict[str, float] = {}
    for label, region in [("", None), *regions.items()]:
        where = _mask(region, scenes, target)
        constant = CONSTANT[kind](_pixels(known, _mask(region, training, target)))
        constants = np.broadcast_to(constant, truth.shape)
        for picture, names, into in [(guess, {}, figures), (constants, BASELINE, figures), (bound, {}, limits)]:
            for name, value in score(tokenizer, picture, truth, where).items():
                into[key(names.get(name, name), label, unit(tokenizer))] = value
    return figures | {"bound": limits}


def _mask(region: Region | None, scenes: Sequence[dict[str, Any]], target: str) -> np.ndarray | None:
    if region is None:
        return None
    return np.stack([scene[region.modality] == region.value for scene in scenes if target in scene])


def _pixels(pictures: np.ndarray, where: np.ndarray | None) -> np.ndarray:
    """(B, H, W) or (B, H, W, C) as (P,) or (P, C), of the region only."""
    return pictures.reshape(-1, *pictures.shape[3:]) if where is None else pictures[where]
