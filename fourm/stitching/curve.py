"""The data curve: augmentations against each other and against what needs no training, by number of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourm import runtime
from fourm.evaluation.results import drawing
from fourm.evaluation.retrieval import KS, BothWays, both_ways, paired_bootstrap
from fourm.model.connectors import Connector, ConnectorConfig
from fourm.stitching.baselines import BASELINES, LARGEST, choose, mean_recall
from fourm.stitching.fusemix import Augmentation, Contrastive, evaluate, watch
from fourm.stitching.pairs import Samples, fingerprint
from fourm.stitching.runs import Run
from fourm.stitching.space import SharedSpace
from fourm.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The connectors of both sides.

    Args:
        kind: See `ConnectorConfig`.
        dim: Numbers in a vector of the shared space.
        depth: See `ConnectorConfig`.
        hidden: See `ConnectorConfig`.
        dropout: See `ConnectorConfig`.
    """

    kind: str = "residual"
    dim: int = 64
    depth: int = 1
    hidden: int = 0
    dropout: float = 0.3

    def build(self, pairs: Samples) -> SharedSpace:
        """The untrained space of two sides."""
        shape: dict[str, Any] = dataclasses.asdict(self)
        dim = shape.pop("dim")
        return SharedSpace(
            {
                side: Connector(ConnectorConfig(input_dim=z.shape[1], output_dim=dim, **shape))
                for side, z in pairs.sides.items()
            }
        )


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """What is compared.

    Args:
        arms: Augmentations by name.
        noise: Levels of an arm `noise`, of which each run takes the one that is best on the validation split.
        sizes: Numbers of training pairs; 0 for all.
        seeds: Runs of each, the first with the run's `seed`; the seed draws the pairs, too.
        against: The arm that the others are compared with.

    Raises:
        ValueError: There is no such arm.
    """

    arms: dict[str, Augmentation] = field(
        default_factory=lambda: {
            "none": Augmentation(kind="none"),
            "shared": Augmentation(),
            "shared per sample": Augmentation(per="sample"),
            "unshared": Augmentation(shared=False),
        }
    )
    noise: Sequence[float] = (0.1, 0.3, 1.0)
    sizes: Sequence[int] = (100, 300, 0)
    seeds: int = 5
    against: str = "shared"

    def __post_init__(self) -> None:
        if self.against not in self.arms:
            raise ValueError(f"against is {self.against!r}, allowed are the arms {', '.join(self.arms)}")


def train_one(adapter: AdapterConfig, augmentation: Augmentation, pairs: Mapping[str, Samples], train: TrainConfig,
              folder: Path, keep: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """One run, with the trainer, selected on the validation split and ranked on the test split.

    A batch has `batch_size` pairs after mixing, or as many as there are (with partner `half` half of those), the same
    in each process.

    Args:
        adapter: The connectors.
        augmentation: Of their inputs.
        pairs: `train`, `val` and `test`.
        train: How long and how; the seed is the run's.
        folder: The run's folder. A finished run is not made again.
        keep: Card of the space, which is then kept in `<folder>/space`.

    Returns:
        `ranks` of the test pairs in both directions, `score` on the validation split, `step`, `seconds`.
    """
    training, processes = pairs["train"], runtime.accelerator().num_processes
    batch = min(train.batch_size, len(training) // augmentation.drawn) // processes * processes
    train = dataclasses.replace(train, batch_size=batch * augmentation.drawn)
    data = fingerprint(pairs, [split.ids for split in pairs.values()])
    made = {"data": data, "adapter": repr(adapter), "augmentation": repr(augmentation)}
    run = Run(folder, train, made, "" if keep is None else "space")
    if found := run.finished():
        return found
    runtime.seed_everything(train.seed, "model")
    space = adapter.build(training)
    space.card = dict(keep or {})
    best = run.fit(Contrastive(space, augmentation, training), training, lambda model: watch(model, pairs["val"]))
    ranks = {name: found.tolist() for name, found in evaluate(space.eval(), pairs["test"])._asdict().items()}
    return run.finish({"ranks": ranks, "score": best.scores[""], "step": best.step}, space)


def measure(config: CurveConfig, adapter: AdapterConfig, pairs: Mapping[str, Samples], train: TrainConfig,
            folder: Path, card: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """All runs, and what they come to: figures by size and arm, and differences to one of them.

    The space of the most pairs, the first seed and the arm `against` is kept in `<folder>/space`, with `card`.
    """
    arms = config.arms | {f"noise {level:g}": Augmentation(kind="noise", noise=level) for level in config.noise}
    found: dict[int, dict[str, list[BothWays]]] = {}
    chosen: dict[str, Any] = {}
    seconds: list[float] = []
    largest = max(size or len(pairs["train"]) for size in config.sizes)
    for size in config.sizes:
        n = size or len(pairs["train"])
        runs = found.setdefault(
            n, {name: [] for name in (*BASELINES, *config.arms, *(["noise"] if config.noise else []))}
        )
        for seed in range(train.seed, train.seed + config.seeds):
            subset = {**pairs, "train": pairs["train"].subset(size, seed)}
            fitted = subset["train"].take(range(min(n, LARGEST)))
            for name in BASELINES:
                chosen[f"{name}/{n}/{seed}"] = choice = choose(name, fitted, pairs["val"])
                runs[name].append(both_ways(BASELINES[name][0](fitted, pairs["test"], **choice)))
            noisy: dict[str, dict[str, Any]] = {}
            for name, augmentation in arms.items():
                own = dataclasses.replace(train, seed=seed)
                place = folder / "runs" / name.replace(" ", "-") / f"{n}-{seed}"
                keep = dict(card) if (name, n, seed) == (config.against, largest, train.seed) else None
                result = train_one(adapter, augmentation, subset, own, place, keep)
                if keep is not None and runtime.accelerator().is_main_process:
                    space = SharedSpace.load(place / "space")
                    space.card = keep
                    space.save(folder / "space")
                seconds.append(result["seconds"])
                ranks = _ranks(result)
                if runtime.accelerator().is_main_process:
                    said = f"val {100 * result['score']:.1f} at step {result['step']}, {result['seconds']:.1f} s"
                    print(f"{n} pairs, seed {seed}, {name}: {said}", flush=True)
                if name in config.arms:
                    runs[name].append(ranks)
                else:
                    noisy[name] = result
            if noisy:
                best = max(noisy, key=lambda name: noisy[name]["score"])
                chosen[f"noise/{n}/{seed}"] = best.removeprefix("noise ")
                runs["noise"].append(_ranks(noisy[best]))
    return {
        "curve": {n: {name: summary(each) for name, each in runs.items()} for n, runs in found.items()},
        "differences": {
            n: {name: difference(runs[config.against], each) for name, each in runs.items() if name != config.against}
            for n, runs in found.items()
        },
        "chosen": chosen,
        "seconds": {"mean": float(np.mean(seconds)), "sum": float(np.sum(seconds)), "runs": len(seconds)},
    }


def _ranks(result: Mapping[str, Any]) -> BothWays:
    return BothWays(**{name: torch.tensor(found) for name, found in result["ranks"].items()})


def summary(runs: Sequence[BothWays]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of every figure."""
    figures = [(found := each.figures()) | {"mean": mean_recall(found)} for each in runs]
    values = {name: np.array([each[name] for each in figures]) for name in figures[0]}
    return {name: {"mean": float(each.mean()), "std": float(each.std(ddof=1)) if len(each) > 1 else 0.0}
            for name, each in values.items()}  # fmt: skip


def difference(first: Sequence[BothWays], second: Sequence[BothWays]) -> dict[str, Any]:
    """Differences of R@k and of their mean, with intervals over queries, and over queries and seeds."""
    found: dict[str, Any] = {}
    for name, ks in ({f"R@{k}": [k] for k in KS} | {"mean": KS}).items():
        ours, theirs = (np.stack([np.mean([each.hits(k) for k in ks], 0) for each in runs]) for runs in (first, second))
        found[name] = paired_bootstrap(ours, theirs)._asdict() | {
            "with_seeds": list(paired_bootstrap(ours, theirs, redraw_runs=True)[1:]),
            "seeds": (ours - theirs).mean(1).tolist(),
        }
    return found


def draw(found: Mapping[str, Any], against: str, path: Path, title: str) -> None:
    """The curve as a picture: mean recall by number of pairs, and what `against` gains over each other arm."""
    sizes = [int(n) for n in found["curve"]]
    with drawing(path, 1, 2, (12, 4.5), title) as ((left, right),):
        for number, name in enumerate(next(iter(found["curve"].values()))):
            rows = [each[name]["mean"] for each in found["curve"].values()]
            means, stds = (100 * np.array([row[figure] for row in rows]) for figure in ("mean", "std"))
            line: dict[str, Any] = {"label": name, "ls": "--" if name in BASELINES else "-", "color": f"C{number}"}
            line |= {"marker": "o", "ms": 3, "capsize": 2}
            left.errorbar(sizes, means, stds, **line)
            if name != against:
                gains = [each[name]["mean"] for each in found["differences"].values()]
                middle = 100 * np.array([gain["difference"] for gain in gains])
                low, high = 100 * np.array([gain["with_seeds"] for gain in gains]).T
                place = np.array(sizes) * (1 + 0.02 * number)  # beside each other
                right.errorbar(place, middle, [middle - low, high - middle], **line)
        right.axhline(0, color="grey", lw=0.8)
        for axes, label, bars in (
            (left, "mean of R@1, R@5, R@10, %", "bars: deviation over seeds"),
            (right, f"{against} less the others, points", "bars: 95 % over queries and seeds"),
        ):
            axes.set(xscale="log", xlabel="training pairs", ylabel=label)
            axes.set_title(bars, fontsize=9)
            axes.set_xticks(sizes, [f"{n:,}" for n in sizes], minor=False)
            axes.minorticks_off()
            axes.legend(fontsize=8)
