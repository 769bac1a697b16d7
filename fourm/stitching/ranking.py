"""Which encoders are worth joining: rankings of all pairs of a zoo, by what they cost and how often they are right."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from fourm import runtime
from fourm.evaluation.results import drawing
from fourm.evaluation.retrieval import KS, both_ways, cka, mutual_knn, paired_bootstrap
from fourm.stitching.baselines import choose, mean_recall, ridge
from fourm.stitching.hyma import AlignConfig, Grid, Hyma, Zoo, evaluate, fit
from fourm.stitching.pairs import SPLITS, Samples, fingerprint
from fourm.stitching.runs import Run
from fourm.training.trainer import TrainConfig

TUNING = 10_000  # the seed that learning rates and batches are tuned with


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What is compared.

    Args:
        seeds: Runs of every arm that is trained, at least 2; the first has the seed of the training settings.
        lrs: Learning rates, of which each arm takes, at each length, the one that is best on the validation split.
        updates: Updates of each pair at which Hyma and connectors of their own are compared.
        batches: Batches, of which each arm takes its best in the same way, with one seed.
        depths: Depths of connectors that Hyma is tried with, with one seed.
    """

    seeds: int = 5
    lrs: Sequence[float] = (3e-3, 1e-2, 3e-2, 1e-1)
    updates: Sequence[int] = ()
    batches: Sequence[int] = ()
    depths: Sequence[int] = ()


def build(arm: str, align: AlignConfig, zoo: Zoo) -> Grid | Hyma:
    """The untrained model of an arm, `hyma` or `grid`."""
    return Hyma(align.hyma, align.shape, zoo.means) if arm == "hyma" else Grid(align.shape, zoo.widths)


def train_arm(arm: str, align: AlignConfig, zoo: Mapping[str, Zoo], train: TrainConfig, folder: Path,
              card: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """Trains a model for all pairs, selected on the validation split and ranked on the test split.

    Args:
        arm: `hyma`, or `grid`: every pair trains in every update, on its own.
        align: What is trained.
        zoo: `train`, `val` and `test`.
        train: How long and how.
        folder: The run's folder. A finished run is not made again.
        card: Of the hypernetwork, which is then kept in `<folder>/hyma`.

    Returns:
        Of every pair of encoders its `quality` (pairs, n), the mean of hits among the first 1, 5 and 10 in both
        directions for each test sample, `hits` (pairs, n), those at 1, and `val`, its score on the validation split.
        `seconds` it took.
    """
    data = fingerprint(zoo, [[split.ids, split.widths] for split in zoo.values()])
    run = Run(folder, train, {"data": data, "arm": arm, "align": repr(align)}, "hyma" if card else "")
    if found := run.finished():
        return found
    runtime.seed_everything(train.seed, "model")
    model, pairs = build(arm, align, zoo["train"]), zoo["train"].pairs
    if arm == "grid":  # a common norm of the gradients would tie them together
        run.train = dataclasses.replace(train, optim=dataclasses.replace(train.optim, clip=0.0))
    fit(model, zoo, pairs, align.turns if arm == "hyma" else len(pairs), align.temperature, run)
    model.eval()
    test = evaluate(model, zoo["test"], pairs)
    hits = {k: np.stack([ranks.hits(k) for ranks in test]) for k in KS}
    val = [mean_recall(found.figures()) for found in evaluate(model, zoo["val"], pairs)]
    if isinstance(model, Hyma):
        model.card = dict(card or {})
    quality = np.mean(list(hits.values()), 0).round(6)
    return run.finish({"quality": quality.tolist(), "hits": hits[1].tolist(), "val": val}, model)


# Cost ----------------------------------------------------------------------------------------------------------------


def update_flops(arm: str, align: AlignConfig, zoo: Zoo, batch: int) -> float:
    """Of products in one update, by formula: of `hyma` the mean over the pairs' turns."""
    each = [align.shape.flops(zoo.widths["a"][a], zoo.widths["b"][b], batch) for a, b in zoo.pairs]
    model = build(arm, align, zoo)
    return align.turns * (np.mean(each) + model.flops()) if isinstance(model, Hyma) else sum(each)


# Selectors that train nothing or little ------------------------------------------------------------------------------


def training_free(zoo: Mapping[str, Zoo]) -> dict[str, dict[str, Any]]:
    """`scores` (1, P) by a ridge map, CKA, mutual k-NN and the best encoder of each side, and a `row` of figures.

    The map's score is its quality on the test split; the others see the training split. How good an encoder is alone is
    told by its neighbours: the share of each sample's ten that it has in common with the other encoders of its own
    side, on average.
    """
    seen, z = zoo["train"], zoo["train"].sides

    def linear(a: str, b: str) -> float:
        train, val, test = (Samples({"a": z["a", a], "b": z["b", b]}, zoo[split].ids)
                            for split in SPLITS for z in [zoo[split].sides])  # fmt: skip
        return mean_recall(both_ways(ridge(train, test, **choose("ridge", train, val))).figures())

    def alone(side: str, name: str) -> float:
        others = [other for other in seen.widths[side] if other != name]
        return float(np.mean([mutual_knn(z[side, name], z[side, other]) for other in others]))

    scores: dict[str, Callable[[str, str], float]] = {
        "ridge map": linear,
        "CKA": lambda a, b: cka(z["a", a], z["b", b]),
        "mutual k-NN": lambda a, b: mutual_knn(z["a", a], z["b", b]),
        "best unimodal": lambda a, b: alone("a", a) + alone("b", b),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, score in scores.items():
        began = time.perf_counter()
        ranking = np.array([[score(a, b) for a, b in seen.pairs]])
        found[name] = {"scores": ranking, "row": {"seconds": time.perf_counter() - began}}
    found["ridge map"]["row"]["mean"] = found["ridge map"]["scores"].mean()
    return found


# Comparison ----------------------------------------------------------------------------------------------------------


def agreement(truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """How far a ranking of P pairs is that by their quality.

    Args:
        truth: Their quality after grid search, (P,).
        scores: What they are ranked by, (P,).

    Returns:
        `spearman`; `ndcg` of the first third, gains being qualities; `regret`, what the pair that is ranked first lacks
        to the best one, in points.
    """
    constant = not np.ptp(truth) or not np.ptp(scores)
    return {
        "spearman": 0.0 if constant else float(spearmanr(truth, scores).statistic),
        "ndcg": float(ndcg_score([truth], [scores], k=max(1, round(len(truth) / 3)))),
        "regret": float(100 * (truth.max() - truth[scores.argmax()])),
    }


def agreements(truth: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Agreement of rankings (rankings, P) with each run of grid search (runs, P), as tables (rankings, runs)."""
    each = [[agreement(run, ranking) for run in truth] for ranking in scores]
    return {name: np.array([[one[name] for one in row] for row in each]) for name in each[0][0]}


def over_seeds(table: np.ndarray, draws: int = 4000) -> list[float]:
    """The mean over pairs of runs that have different seeds, and its 95 % interval when seeds are redrawn.

    Args:
        table: A figure of each run of an arm with each of the other (seeds, seeds), or of rankings without a seed.
        draws: Bootstrap draws.
    """
    n = table.shape[1]
    table = table if len(table) == n else np.tile(table.mean(0), (n, 1))
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)
    drawn = np.concatenate([np.ones((1, n), int), drawn[(drawn > 0).sum(1) > 1]])  # the first are the seeds themselves
    means = [((drawn @ (each * ~np.eye(n, dtype=bool))) * drawn).sum(1) for each in (table, np.ones((n, n)))]
    found = means[0] / means[1]
    return [float(found[0]), *map(float, np.quantile(found[1:], [0.025, 0.975]))]


class Comparison:
    """All runs of a comparison, made when they are asked for; `sweeps` tells what was tuned.

    Args:
        config: What is compared.
        align: What is trained.
        zoo: `train`, `val` and `test`.
        train: How long and how, at matched batch.
        folder: Of the runs.
    """

    def __init__(self, config: RankConfig, align: AlignConfig, zoo: Mapping[str, Zoo], train: TrainConfig,
                 folder: Path):  # fmt: skip
        self.config, self.align, self.zoo, self.train, self.folder = config, align, zoo, train, folder
        self.sweeps: dict[str, dict[str, Any]] = {}

    def run(self, arm: str, steps: int, batch: int, lr: float, seed: int, depth: int) -> dict[str, Any]:
        """One run, by what is varied; a short one looks at the validation split as many times."""
        align = dataclasses.replace(self.align, shape=dataclasses.replace(self.align.shape, depth=depth))
        every = max(1, round(self.train.eval_every * steps / self.train.steps))
        train = dataclasses.replace(self.train, steps=steps, batch_size=batch, seed=seed, eval_every=every,
                                    optim=dataclasses.replace(self.train.optim, lr=lr))  # fmt: skip
        place = self.folder / "runs" / f"{arm}-{depth}-{steps}-{batch}-{lr:g}-{seed}"
        result = train_arm(arm, align, self.zoo, train, place)
        print(f"{place.name}: validation {100 * np.mean(result['val']):.2f}, {result['seconds']:.1f} s", flush=True)
        flops = steps * update_flops(arm, align, self.zoo["train"], batch)
        return result | {"steps": steps, "lr": lr, "flops": float(flops)}

    def sweep(self, arm: str, steps: int, batch: int, depth: int) -> float:
        """The learning rate with the best mean score on the validation split, of one seed."""
        runs = {lr: self.run(arm, steps, batch, lr, TUNING, depth) for lr in self.config.lrs}
        scores = {lr: float(np.mean(run["val"])) for lr, run in runs.items()}
        best = max(scores, key=lambda lr: scores[lr])
        seen = {"val": {f"{lr:g}": score for lr, score in scores.items()}}
        cost = {name: runs[best][name] for name in ("flops", "seconds")}
        self.sweeps[f"{arm}, MLP_{depth}, {steps} x {batch}"] = seen | cost
        return best

    def arm(self, arm: str, steps: int) -> dict[str, Any]:
        """All seeds of a tuned arm: `quality` and `hits` (runs, P, n), their `scores` (runs, P), a `row` of figures."""
        batch, depth = self.train.batch_size, self.align.shape.depth
        lr, first = self.sweep(arm, steps, batch, depth), self.train.seed
        runs = [self.run(arm, steps, batch, lr, first + i, depth) for i in range(self.config.seeds)]
        quality, hits, val, seconds = (
            np.array([run[key] for run in runs]) for key in ("quality", "hits", "val", "seconds")
        )
        scores = quality.mean(2)
        chosen = np.mean([run[best] for run, best in zip(scores, val.argmax(1), strict=True)])
        row = {"mean": scores.mean(), "R@1": hits.mean(), "chosen": chosen, "seconds": seconds.mean()}
        row |= {name: runs[0][name] for name in ("steps", "lr", "flops")}
        return {"quality": quality, "hits": hits, "scores": scores, "row": row}


def measure(config: RankConfig, align: AlignConfig, zoo: Mapping[str, Zoo], train: TrainConfig,
            folder: Path) -> dict[str, Any]:  # fmt: skip
    """Rankings against grid search, quality by updates of each pair, batches and depths.

    Raises:
        ValueError: Fewer than two seeds: runs are compared with those of other seeds.
    """
    if config.seeds < 2:
        raise ValueError(f"rank.seeds is {config.seeds}, expected 2 or more")
    runs, pairs = Comparison(config, align, zoo, train, folder), zoo["train"].pairs
    flops = {arm: update_flops(arm, align, zoo["train"], train.batch_size) for arm in ("hyma", "grid")}
    arms = {"Hyma": runs.arm("hyma", train.steps), "grid search": runs.arm("grid", train.steps)}
    arms["grid search, equal FLOPs"] = runs.arm("grid", max(1, round(train.steps * flops["hyma"] / flops["grid"])))
    truth, ranked, tables = arms["grid search"]["scores"], {}, {}
    drawn = {"random": {"scores": np.random.default_rng(0).random((200, len(pairs))), "row": {}}}
    for name, found in (arms | training_free(zoo) | drawn).items():
        tables[name] = agreements(truth, found["scores"])
        ranked[name] = {figure: over_seeds(table) for figure, table in tables[name].items()}
        ranked[name] |= {figure: float(value) for figure, value in found["row"].items()}
    curve = {}
    for updates in config.updates:
        steps = max(1, round(updates * len(pairs) / align.turns))
        curve[str(updates)] = gain(runs.arm("hyma", steps), runs.arm("grid", updates))
    for batch, arm in itertools.product(config.batches, ("hyma", "grid")):
        runs.sweep(arm, max(1, round(train.steps * train.batch_size / batch)), batch, align.shape.depth)
    for depth in config.depths:
        runs.sweep("hyma", train.steps, train.batch_size, depth)
    less = tables["Hyma"]["spearman"] - tables["grid search"]["spearman"]
    return {
        "quality": {name: dict(zip(map(" x ".join, pairs), arm["scores"].mean(0).tolist(), strict=True))
                    for name, arm in arms.items()},
        "ranked": ranked,
        "Spearman of Hyma less that of grid search": over_seeds(less),
        "Hyma and all of grid search": gain(arms["Hyma"], arms["grid search"]),
        "FLOPs of grid search over those of Hyma": flops["grid"] / flops["hyma"],
        "curve": curve,
        "sweeps": runs.sweeps,
    }  # fmt: skip


def gain(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Means of two arms over pairs, their difference, and its intervals over queries, and over queries and seeds."""
    found = {}
    for name, key in (("mean", "quality"), ("R@1", "hits")):
        both = ours[key].mean(1), theirs[key].mean(1)
        found[name] = {"arms": [float(each.mean()) for each in both]} | paired_bootstrap(*both)._asdict()
        found[name]["with_seeds"] = list(paired_bootstrap(*both, redraw_runs=True)[1:])
    return found


def draw(found: Mapping[str, Any], path: Path, title: str) -> None:
    """The comparison as a picture: qualities by grid search and by Hyma, and the mean quality by updates."""
    names = [list(dict.fromkeys(pair.split(" x ")[side] for pair in found["quality"]["Hyma"])) for side in (0, 1)]
    with drawing(path, 1, 3, (17, 5), title) as ((*tables, plot),):
        for axes, arm in zip(tables, ("grid search", "Hyma"), strict=True):
            table = 100 * np.array(list(found["quality"][arm].values())).reshape(*map(len, names)).T
            axes.imshow(table, cmap="Blues", alpha=0.6)
            for (row, column), value in np.ndenumerate(table):
                axes.text(column, row, f"{value:.1f}", ha="center", va="center")
            axes.set_xticks(range(len(names[0])), names[0])
            axes.set_yticks(range(len(names[1])), names[1])
            axes.set_title(f"quality by {arm}, points")
        for number, arm in enumerate(("Hyma", "connectors of their own")):
            values = [100 * each["mean"]["arms"][number] for each in found["curve"].values()]
            plot.semilogx(list(map(int, found["curve"])), values, "o-", label=arm)
        plot.set_xticks([int(n) for n in found["curve"]], found["curve"])
        plot.minorticks_off()
        plot.axhline(100 * found["ranked"]["grid search"]["mean"], color="grey", ls=":", label="grid search to its end")
        plot.set(xlabel="updates of each pair", title="mean quality over pairs, points")
        plot.legend()
