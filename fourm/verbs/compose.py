"""`fourm compose`: joins models that learned different modalities from one base, without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fourm import runtime
from fourm.composition import interference, search
from fourm.composition.benchmark import accuracies, measure, read_questions
from fourm.composition.merge import MergeConfig, compose, open_branch, uniform
from fourm.data.loader import Loader
from fourm.data.tokens import TokenDataset
from fourm.evaluation.results import Table, write_metrics, write_results
from fourm.masking.budgets import MaskingConfig
from fourm.masking.masking import Masker
from fourm.model.fourm import FourM
from fourm.model.warm_start import open_source
from fourm.training.tasks import HeldOutLoss, MaskedTask


@dataclass(kw_only=True)
class SearchConfig:
    """Samples that show modalities of several branches together; weights are those with the lowest loss on them.

    Args:
        data: Split of token data, such as `runs/tokens/val`.
        masking: What is given and asked of them.
        modalities: Which of the composed model's they have; default: all.
        samples: How many are used at most, drawn once, in whole batches of up to 64.
        step: Of the grid of weights.
    """

    data: str
    masking: MaskingConfig
    modalities: list[str] | None = None
    samples: int = 256
    step: float = 0.1

    def held_out(self, model: FourM) -> HeldOutLoss:
        """The loss on these samples."""
        space = model.space
        data = TokenDataset(self.data, space.subset(self.modalities or space.names))
        data.by_epoch = False
        size = min(64, self.samples, len(data))
        loader = Loader(data, size, Masker(space, self.masking), 0)
        return HeldOutLoss(MaskedTask(model, "token"), loader, min(self.samples, len(data)) // size)


@dataclass(frozen=True, kw_only=True)
class Config(MergeConfig):
    """A base, its branches, and how they become one model.

    Args:
        base: What the branches were trained from: what `init` of `fourm train` takes.
        branches: Their runs by name.
        folder: The model goes to `model` below, figures to `metrics.json`, pictures beside it.
        weights: Of the branches; default: those of a mean (of a sum for `task_arithmetic`).
        search: Choose the weights instead.
        questions: File of questions that base, branches and the composed model answer; '' for none.
        dry_run: Only say what is kept, merged and in conflict.
    """

    base: str
    branches: dict[str, str]
    folder: str
    weights: dict[str, float] | None = None
    search: SearchConfig | None = None
    questions: str = ""
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and self.search is not None:
            raise ValueError("weights are given, and to be searched; leave one of them out")
        if self.search is not None and self.method == "task_arithmetic":
            raise ValueError("search tries weights of a mean, but task_arithmetic takes a sum; use naive")


def run(config: Config) -> None:
    """Composes, measures, and writes the model."""
    base, _ = open_source(config.base)
    branches = {name: open_branch(path, base, config.method) for name, path in config.branches.items()}
    composed, plan = compose(base, branches, config, config.weights, config.dry_run)
    print("\n".join(plan.lines()))
    if config.dry_run:
        return
    folder = Path(config.folder)
    runtime.open_run(folder, dataclasses.asdict(config))
    weights = config.weights or uniform(list(branches), config.method)
    metrics: dict[str, Any] = {"protocol": protocol(config), "plan": dataclasses.asdict(plan)}
    if config.search:
        loss = config.search.held_out(composed)
        weights, metrics["search"] = search.search(
            lambda tried: loss(compose(base, branches, config, tried)[0], 0)["loss"], list(branches), config.search.step
        )
        composed, _ = compose(base, branches, config, weights)
        search.draw(metrics["search"], folder / "weights.png")
    metrics["weights"] = weights
    if len(branches) > 1:
        metrics["interference"] = interference.interference(base, branches)
        if metrics["interference"]:
            interference.draw(metrics["interference"], folder / "interference.png")
    composed.save_pretrained(folder / "model")
    models = {"base": base, **branches, "composed": composed}
    metrics["parameters"] = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    tables = []
    if config.questions:
        questions = read_questions(config.questions)
        each = tqdm(models.items(), "questions", unit="model")
        metrics["accuracy"] = {name: accuracies(measure(model, questions)) for name, model in each}
        tables.append(table(metrics["accuracy"]))
    write_metrics(folder, metrics, tables)
    write_results(folder, folder / "report.html", "Composition")
    print(f"weights: {', '.join(f'{name} {value:.2f}' for name, value in weights.items())}")
    print(f"{folder / 'model'}: {metrics['parameters']['composed'] / 1e6:.1f} M parameters; {folder / 'metrics.json'}")


def protocol(config: Config) -> str:
    """What the figures mean."""
    said = f"{config.method} of {', '.join(config.branches)}, all trained from {config.base}"
    if config.search:
        said += f"; weights: lowest loss a token on up to {config.search.samples} samples of {config.search.data}"
    if config.questions:
        said += f"; share of {config.questions} whose right option is the likeliest, 95 % bootstrap over questions"
    return said


def table(found: Mapping[str, dict[str, dict[str, dict[str, float]]]]) -> Table:
    """A row per kind and view, a column per model; empty where it lacks a modality."""
    rows = []
    for kind, view in sorted({(each, view) for model in found.values() for each in model for view in model[each]}):
        cells = (model.get(kind, {}).get(view, {}).get("accuracy") for model in found.values())
        rows.append([f"{kind}: {view}", *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    return Table("Rightly answered, %", ["", *found], rows)
