"""Task figures: how well a picture is read out of another modality, beside a constant guess and the tokenizer's bound.

The model's one-pass distribution over the target's tokens is drawn from several times; the decoded draws are combined
per pixel into the estimate that suits the figure (median of numbers, mean of probabilities, vectors and colours).
Texts are written left to right, each time the likeliest id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fourm.evaluation.matrix import aligned_samples, chosen_rows, raw_sources, raw_targets
from fourm.evaluation.metrics import COMBINE, CONSTANT, key, of_constant
from fourm.evaluation.texts import score_texts, typical
from fourm.evaluation.tokenizers import reconstruct, score, unit
from fourm.generation.decode import decode, unfold
from fourm.generation.plan import Target, chain
from fourm.generation.sampler import Sampler, from_samples
from fourm.masking.transfer import transfer_batch
from fourm.model.fourm import FourM
from fourm.tokenization.autoencoder import ImageTokenizer

TYPICAL_OF = 64  # training texts among which the typical one is chosen


@dataclass(frozen=True)
class Task:
    """Predict `target` from `source` (raw names).

    Args:
        source: Raw modality that is given, or several, as `rgb+relief`.
        target: Raw modality that is predicted.
        region: Of an image-like target: also score only the pixels of this region of `TasksConfig.regions`.
    """

    source: str
    target: str
    region: str | None = None


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
        regions: Name to a raw class map and its value inside; default: land is where `water` is 0.
        n: Test samples per task.
        draws: Token maps drawn per sample.
        train_n: Training samples behind the constant guess.
        batch_size: Samples per pass.
        seed: Of choices and draws.
    """

    tasks: Sequence[Task] = EARTH_TASKS
    regions: Mapping[str, tuple[str, int]] = field(default_factory=lambda: {"land": ("water", 0)})
    n: int = 256
    draws: int = 8
    train_n: int = 1024
    batch_size: int = 64
    seed: int = 0


@torch.inference_mode()
def draw_pictures(
    model: FourM, tokenizer: ImageTokenizer, samples: Sequence[Any], sources: Sequence[str], target: str,
    config: TasksConfig,
) -> np.ndarray:  # fmt: skip
    """A point estimate of the target's pictures from the one-pass token distribution.

    Args:
        model: In evaluation mode.
        tokenizer: The target's.
        samples: B token samples that hold `sources` and `target`.
        sources: Model modalities that are given.
        target: Model modality (grid) that is predicted; its tokens in `samples` are not looked at.
        config: Draws per sample, samples per pass, seed.

    Returns:
        (B, H, W, ...) raw pictures.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    settings = tokenizer.config.input
    decode = tokenizer.decode_probabilities if settings.kind == "classes" else tokenizer.decode
    estimates = []
    for start in range(0, len(samples), config.batch_size):
        batch = transfer_batch(model.space, samples[start : start + config.batch_size], sources, [target])
        chances = model.logits(model(batch.to(device)), target).float().softmax(-1).cpu()  # (B, n, V)
        ids = torch.multinomial(chances.flatten(0, 1), config.draws, replacement=True, generator=generator)
        maps = ids.T.reshape(config.draws, *chances.shape[:2]).to(device)  # (S, B, n)
        estimates.append(COMBINE[settings.kind](np.stack([np.asarray(decode(ids)) for ids in maps])))
    estimate = np.concatenate(estimates)
    return np.array(settings.values)[estimate] if settings.values else estimate


@torch.inference_mode()
def text_figures(
    model: FourM,
    tokenizer: Any,
    samples: Sequence[Any],
    known: Sequence[Any],
    sources: Sequence[str],
    target: str,
    batch_size: int,
) -> dict[str, Any]:
    """Figures of texts that the model writes, beside a typical text and what the tokenizer keeps of the truth.

    The truth is what the tokens say.

    Args:
        model: In evaluation mode.
        tokenizer: The target's.
        samples: Token samples that hold `sources` and `target`.
        known: Values to choose the typical one from.
        sources: Model modalities that are given.
        target: Model modality (text) that is predicted.
        batch_size: Samples per pass.
    """
    (truth,) = decode({target: [sample[target] for sample in samples]}, {target: tokenizer}).values()
    plan, guesses = chain(model.space, [Target(target, temperature=0.0)]), list[Any]()
    for start in range(0, len(samples), batch_size):
        given = from_samples(model.space, samples[start : start + batch_size], sources)
        guesses += decode(Sampler(model).generate(given, plan), {target: tokenizer})[target]
    again = decode({target: tokenizer.encode(truth)}, {target: tokenizer})[target]
    constant = score_texts(tokenizer, unfold(tokenizer, [typical(tokenizer, known)]) * len(truth), truth)
    scored: dict[str, Any] = {"n": len(samples), "bound": score_texts(tokenizer, again, truth)}
    return scored | score_texts(tokenizer, guesses, truth) | {of_constant(k): v for k, v in constant.items()}


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
        raw: `ShownDataset` of the test split.
        tokens: `TokenDataset` of the same samples in the same order.
        train: `ShownDataset` of the training split, for the constant guess.
        config: Tasks and budgets; default: the built-in data's.

    Returns:
        `{"rgb->elevation": {"mae_m", "mae_land_m", "mean_predictor_mae_land_m", ..., "bound": {...}, "n"}}`. `bound`
        holds the same figures of the target's tokenizer alone: decode(encode(truth)).

    Raises:
        ValueError: The two datasets differ in their samples, or a task names an unknown region.
    """
    config = config or TasksConfig()
    sources, targets = raw_sources(model.eval().space), raw_targets(model.space)
    given = {task: [sources.get(name, "") for name in task.source.split("+")] for task in config.tasks}
    tasks = [task for task in config.tasks if all(given[task]) and task.target in targets]
    unknown = {task.region for task in tasks} - {None, *config.regions}
    if unknown:
        raise ValueError(f"tasks name the regions {sorted(map(str, unknown))}, known are {', '.join(config.regions)}")
    scenes, samples = aligned_samples(raw, tokens, min(config.n, len(tokens)), config.seed)
    training = [train[row] for row in chosen_rows(len(train), min(config.train_n, len(train)), config.seed)]
    names = {task.target for task in tasks if model.space[targets[task.target]].kind == "grid"}
    pictures = {
        name: [tokenizers[targets[name]].targets([scene[name] for scene in group]) for group in (scenes, training)]
        for name in names
    }
    rebuilt = {name: reconstruct(tokenizers[targets[name]], truth)[0] for name, (truth, _) in pictures.items()}
    figures: dict[str, dict[str, Any]] = {}
    for task in tqdm(tasks, desc="tasks", unit="task"):
        tokenizer = tokenizers[targets[task.target]]
        if task.target not in names:
            texts = [scene[task.target] for scene in training[:TYPICAL_OF]]
            figures[f"{task.source}->{task.target}"] = text_figures(
                model, tokenizer, samples, texts, given[task], targets[task.target], config.batch_size
            )
            continue
        kind, (truth, known) = tokenizer.config.input.kind, pictures[task.target]
        guess = draw_pictures(model, tokenizer, samples, given[task], targets[task.target], config)
        scored: dict[str, Any] = {"n": len(scenes), "bound": {}}
        pixels = slice(-1 if kind == "features" else 3)  # a vector without a map is one pixel
        for region in dict.fromkeys(("", task.region or "")):
            modality, value = config.regions.get(region, (task.target, None))
            if modality not in scenes[0]:  # other data have no such map
                continue
            inside, inside_known = (
                _stack(group, modality) == value if region else np.ones(values.shape[pixels], bool)
                for group, values in ((scenes, truth), (training, known))
            )
            constant = np.broadcast_to(CONSTANT[kind](known[inside_known]), truth.shape)
            for picture, name_of, into in (
                (guess, str, scored), (constant, of_constant, scored), (rebuilt[task.target], str, scored["bound"])
            ):  # fmt: skip
                for name, figure in score(tokenizer, picture, truth, inside).items():
                    into[name_of(key(name, region, unit(tokenizer)))] = figure
        figures[f"{task.source}->{task.target}"] = scored
    return figures


def _stack(scenes: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.stack([scene[name] for scene in scenes])
