"""`fourm stitch altmoe`: one predictor for all directions between frozen encoders, and what its parts are worth."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourm import runtime
from fourm.evaluation.results import Table, drawing, write_metrics
from fourm.evaluation.retrieval import BothWays
from fourm.stitching import altmoe
from fourm.stitching.ahead import Store, latency
from fourm.stitching.curve import difference, summary
from fourm.stitching.latents import Source
from fourm.stitching.pairs import SampleLoader, Samples, load_samples
from fourm.training.trainer import TrainConfig

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Encoders of the same samples, and what is compared.

    Args:
        folder: Where runs (each with its `model`), `metrics.json` and pictures are written; `model` is that
            of the first seed, `store` has the test items of each side for it.
        data: Root of the raw data, with the splits train, val and test.
        latents: Folder of the stored latents.
        sides: The encoders by name.
        added: Further ones that the predictor is extended by.
        arms: What is compared.
        against: The arm that the others are compared with, that is extended, and whose queries are timed.
        scratch: Arms that are also trained with all sides from the start.
        seeds: One run of each arm for each; a seed decides weights and batches.
        limit: Training items at most; 0 for all.
        sizes: Numbers of stored items that queries are timed with.
        steps: Gradients of each direction.
        eval_every: Gradients of each direction between measurements on the validation split.
    """

    folder: str
    data: str
    latents: str
    sides: dict[str, Source]
    added: dict[str, Source] = field(default_factory=dict)
    arms: dict[str, altmoe.Method] = field(default_factory=lambda: {"alternate": altmoe.Method()})
    against: str = "alternate"
    scratch: Sequence[str] = ("alternate",)
    seeds: Sequence[int] = (10, 11, 12, 13, 14)
    limit: int = 0
    sizes: Sequence[int] = (1000, 10_000, 100_000)


def run(config: Config) -> None:
    """Makes the latents that are not there yet, trains all runs, writes figures and pictures."""
    if unknown := {config.against, *config.scratch} - set(config.arms):
        raise ValueError(f"there are no arms {', '.join(sorted(unknown))}; allowed are {', '.join(config.arms)}")
    if (processes := runtime.accelerator().num_processes) > 1:
        raise ValueError(f"stitch altmoe runs in one process, not in {processes}")
    folder, everything = Path(config.folder), {**config.sides, **config.added}
    if len(everything) < 2:
        raise ValueError(f"sides are {', '.join(everything)}, expected two or more")
    runtime.open_run(folder, dataclasses.asdict(config))
    items = load_samples(config.data, config.latents, everything, limit=config.limit)
    card = {"data": config.data, "sides": {name: dataclasses.asdict(side) for name, side in everything.items()}}
    runs: dict[str, list[dict[str, Any]]] = {}
    cosines: list[dict[str, Any]] = []
    models: dict[str, altmoe.Predictor] = {}

    def fresh(sides: Mapping[str, Source], method: altmoe.Method, seed: int) -> altmoe.Predictor:
        runtime.seed_everything(seed, "model")
        vectors = {side: items["train"].sides[side] for side in sides}
        widths = {side: z.shape[1] for side, z in vectors.items()}
        return altmoe.Predictor(widths, altmoe.all_ways(sides), method, card).fit_scale(vectors)

    def one(name: str, model: altmoe.Predictor, method: altmoe.Method, ways: Sequence[str], seed: int) -> None:
        train = TrainConfig.of(config)
        place = folder / "runs" / name.replace(" ", "-") / str(seed)
        found = altmoe.train_one(model, method, ways, items, dataclasses.replace(train, seed=seed), place)
        runs.setdefault(name, []).append(found)
        models.setdefault(name, model)
        said = f"val {100 * found['score']:.1f} at step {found['step']}, {found['seconds']:.1f} s"
        print(f"{name}, seed {seed}: {said}", flush=True)

    for seed in config.seeds:
        batch = next(SampleLoader(items["train"], min(config.batch_size, len(items["train"])), seed).batches())
        for name, method in config.arms.items():
            model = fresh(config.sides, method, seed)
            start = altmoe.gradient_cosines(model, method, batch) if name == config.against else {}
            one(name, model, method, method.directions or model.directions, seed)
            if name == config.against:
                base = model
                cosines.append({"start": start, "end": altmoe.gradient_cosines(model, method, batch)})
        if config.added:
            runtime.seed_everything(seed, "extension")
            larger = altmoe.extend(base, {side: items["train"].sides[side] for side in config.added})
            one("extended", larger, config.arms[config.against], larger.directions[len(base.directions) :], seed)
            for name in config.scratch:
                model = fresh(everything, config.arms[name], seed)
                one(f"{name}, all sides", model, config.arms[name], model.directions, seed)
    kept, test = models.get("extended", models[config.against]), items["test"]
    kept.save(folder / "model")
    shutil.rmtree(folder / "store", ignore_errors=True)
    for side in kept.widths:
        Store(folder / "store" / side, kept, side).add(test.sides[side], test.ids)
    way = kept.directions[0]
    queries, stored = (test.sides[side] for side in way.split(">"))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        timed = {n: latency(kept, way, queries[:200], stored, n, f"{place}/{n}") for n in config.sizes}
    metrics = {
        "protocol": protocol(config, items),
        **compare(runs, config),
        "gradient_cosines": cosines,
        "loads": {name: [one["loads"] for one in each] for name, each in runs.items() if each[0]["loads"]},
        "latency": timed,
    }
    write_metrics(folder, metrics, tables(metrics, config.against))
    draw(runs, metrics, config, folder)
    print(f"{folder}: metrics.json, pictures, model, store")


def protocol(config: Config, items: Mapping[str, Samples]) -> str:
    """What the figures mean."""
    sides = ", ".join(f"{name} ({side.encoder})" for name, side in {**config.sides, **config.added}.items())
    return (
        f"{sides}, {len(items['train'])} training items: each of {len(items['test'])} test items is looked for in all "
        f"of the target side; weights are those that were best on {len(items['val'])} validation items (mean of R@1, "
        f"R@5, R@10 of what was trained); seeds {', '.join(map(str, config.seeds))} decide weights, batches; every way "
        f"gets {config.steps} gradients, if the arm does not say otherwise; `mean` is that of R@1, R@5, R@10 there and "
        f"back; intervals are of 95 %, over queries and seeds; what is added to {config.against} leaves its weights as "
        "they are, so the answers between its sides are the same by construction"
    )


def paired(runs: Sequence[Mapping[str, Any]], sides: str) -> list[BothWays]:
    """Ranks of each run between two sides (`a, b`), or twice those of one direction (`a>b`)."""
    ways = [">".join(each) for each in itertools.permutations(sides.split(", "))] if ", " in sides else [sides] * 2
    return [BothWays(*(torch.tensor(one["ranks"][way]) for way in ways)) for one in runs]


def compare(runs: Runs, config: Config) -> dict[str, dict[str, Any]]:
    """Recalls of the arms and their differences, by sides and, where an arm trains one direction alone, by that."""
    found: dict[str, dict[str, Any]] = {"arms": {}, "differences": {}}
    for name, each in runs.items():
        arm = config.arms.get(name)
        pairs = itertools.combinations(config.sides if arm else [*config.sides, *config.added], 2)
        keys = [*map(", ".join, pairs), *(arm.directions if arm else ())]
        found["arms"][name] = {key: summary(paired(each, key)) for key in keys}
        if name not in (config.against, "extended"):
            first = runs[config.against if arm else "extended"]
            found["differences"][name] = {key: difference(paired(first, key), paired(each, key)) for key in keys}
    return found


def tables(metrics: Mapping[str, Any], against: str) -> list[Table]:
    """Recalls and differences, and latencies."""
    rows = []
    for name, arm in metrics["arms"].items():
        dead = " ".join(str(one["dead"]) for one in metrics["loads"].get(name, ()))
        for sides, recalls in arm.items():
            cells = [f"{100 * recalls[kind]['mean']:.1f}" for kind in ("a_to_b/R@1", "b_to_a/R@1", "mean")]
            gain = metrics["differences"].get(name, {}).get(sides, {})
            gains = [(one["difference"], *one["with_seeds"]) for kind in ("R@1", "mean") if (one := gain.get(kind))]
            more = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * np.array(each))) for each in gains] or ["", ""]
            rows.append([name, sides, *cells, *more, dead])
    columns = ["arm", "sides", "R@1 there", "R@1 back", "mean", "more R@1", "more mean", "dead experts"]
    title = f"Recall, and what {against} (of all sides: extended) has more, points"
    timed = [[f"{n:,}", *(f"{value:.4g}" for value in found.values())] for n, found in metrics["latency"].items()]
    kinds = ["stored items", *next(iter(metrics["latency"].values()), {})]
    return [Table(title, columns, rows), Table("Queries", kinds, timed)]


def draw(runs: Runs, metrics: Mapping[str, Any], config: Config, folder: Path) -> None:
    """`comparison.png`: courses and R@1 of all arms; `loads.png`: which experts see what, if any arm has some."""
    ways = altmoe.all_ways(config.sides)
    with drawing(folder / "comparison.png", 1, 2, (13, 5), metrics["protocol"]) as ((left, right),):
        alone = [arm for arm in config.arms if arm == config.against or config.arms[arm].directions]
        for number, name in enumerate(alone):
            for way, style in zip(ways, ("-", "--"), strict=False):
                courses = [[(each["step"], each[f"val/{way}"]) for each in run["course"]] for run in runs[name]]
                steps, course = np.mean(courses, axis=0).T
                left.plot(steps, 100 * course, style, color=f"C{number}", label=f"{name}: {way}")
        left.set(xlabel="updates", ylabel="R@1 on the validation split, %")
        left.legend(fontsize=7)
        for number, way in enumerate(ways):
            found = [summary(paired(each, way))["R@1"] for each in runs.values()]
            means, stds = (100 * np.array([each[key] for each in found]) for key in ("mean", "std"))
            right.errorbar(means, np.arange(len(runs)) + 0.12 * number, xerr=stds, fmt="o", ms=4, capsize=2, label=way)
        right.set_yticks(range(len(runs)), list(runs), fontsize=8)
        right.set(xlabel="R@1 on the test split, %; deviation over seeds")
        right.invert_yaxis()
        right.legend(fontsize=7)
    if not metrics["loads"]:
        return
    with drawing(folder / "loads.png", len(metrics["loads"]), 1, (7, 1.9 * len(metrics["loads"]))) as rows:
        for axes, (name, seeds) in zip(rows[:, 0], metrics["loads"].items(), strict=True):
            shares = {f"{way}, {loss}": load for loss in altmoe.LOSSES for way, load in seeds[0][loss]["load"].items()}
            axes.imshow(list(shares.values()), vmin=0, vmax=0.5, aspect="auto", cmap="magma")
            axes.set_yticks(range(len(shares)), list(shares), fontsize=6)
            axes.set_title(f"{name}, first seed: share of choices by expert; {seeds[0]['dead']} dead", fontsize=8)
