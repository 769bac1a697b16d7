"""`fourm stitch rank`: how well and at what cost ways to choose a pair of encoders rank all pairs of a zoo."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourm import runtime
from fourm.evaluation.results import Table, write_metrics
from fourm.stitching.hyma import AlignConfig, ZooConfig, load_zoo
from fourm.stitching.ranking import RankConfig, draw, measure
from fourm.training.trainer import TrainConfig


@dataclass(kw_only=True)
class Config(TrainConfig):
    """A zoo, and what is compared on it.

    Args:
        folder: Where runs, `metrics.json` and `ranking.png` are written.
        zoo: The encoders, and the data they meet on.
        align: What is trained.
        rank: What is compared.
        steps: Updates of Hyma, of `align.turns` pairs each, and of grid search, of all pairs.
        batch_size: Samples in an update.
        seed: The first of `rank.seeds`.
    """

    folder: str
    zoo: ZooConfig
    align: AlignConfig = field(default_factory=AlignConfig)
    rank: RankConfig = field(default_factory=RankConfig)


def run(config: Config) -> None:
    """Makes the latents that are not there yet, trains all runs, writes figures and picture."""
    folder, joined = Path(config.folder), runtime.accelerator()
    if joined.is_main_process:
        runtime.open_run(folder, dataclasses.asdict(config))
    zoo = load_zoo(config.zoo)
    train = TrainConfig.of(config)
    found = measure(config.rank, config.align, zoo, train, folder)
    if joined.is_main_process:
        counts = {split: len(each) for split, each in zoo.items()}
        words = protocol(config, counts)
        write_metrics(folder, {"protocol": words, **found}, tables(found, counts["val"]))
        draw(found, folder / "ranking.png", words)
        print(f"{folder / 'metrics.json'}, {folder / 'ranking.png'}")
    runtime.finish(joined)


def protocol(config: Config, counts: Mapping[str, int]) -> str:
    """What the figures mean."""
    n = len(config.zoo.a) * len(config.zoo.b)
    return (
        f"{len(config.zoo.a)} x {len(config.zoo.b)} pairs of encoders; the quality of a pair is the mean of R@1, R@5 "
        f"and R@10 in both directions among {counts['test']} test samples, with MLP_{config.align.shape.depth} "
        f"connectors from {counts['train']} training samples; {config.steps} updates of {config.batch_size} samples, "
        f"of {config.align.turns} pairs by Hyma, of all {n} by grid search; rates and stops are chosen on "
        f"{counts['val']} validation samples, rates for each arm and length with a seed of their own, stops for each "
        f"pair of grid search; seeds {config.seed} to {config.seed + config.rank.seeds - 1}; agreement is the mean "
        "over runs of an arm and runs of grid search with other seeds, and its interval one over seeds; that of grid "
        f"search with itself is the ceiling; NDCG: of the first {max(1, round(n / 3))}; chosen: the pair best on "
        "the validation split; CKA, mutual k-NN and best unimodal (whose ten nearest neighbours agree most with those "
        "of the others of its side) see the training split"
    )


def tables(found: Mapping[str, Any], samples: int) -> list[Table]:
    """Agreement with grid search, qualities by updates, and what was tuned; below twice chance a run has collapsed."""
    scales = {"mean": 100, "R@1": 100, "chosen": 100, "flops": 1e-9, "seconds": 1, "steps": 1, "lr": 1}
    rows = []
    for name, each in found["ranked"].items():
        figures = [f"{each[figure][0]:.3f}" for figure in ("spearman", "ndcg", "regret")]
        cells = [f"{scale * each[figure]:.4g}" if figure in each else "" for figure, scale in scales.items()]
        rows.append([name, *figures[:1], _ends(each["spearman"][1:]), *figures[1:], *cells])
    middle, *ends = found["Spearman of Hyma less that of grid search"]
    rows.append(["Hyma less grid search", f"{middle:+.3f}", _ends(ends)] + [""] * (len(rows[0]) - 3))
    columns = ["arm", "Spearman", "95 %", "NDCG", "regret", *list(scales)[:3], "GFLOP", "seconds", "updates", "rate"]
    made = [Table("Agreement with grid search; qualities in points", columns, rows)]

    compared, rows = found["curve"] | {"all of grid search": found["Hyma and all of grid search"]}, []
    for (updates, each), figure in itertools.product(compared.items(), ("mean", "R@1")):
        gain = each[figure]
        cells = [f"{100 * value:.2f}" for value in gain["arms"]] + [f"{100 * gain['difference']:+.2f}"]
        rows.append([updates, figure, *cells, _ends([gain["low"], gain["high"]], 100), _ends(gain["with_seeds"], 100)])
    columns = ["updates of each pair", "figure", "Hyma", "own", "difference", "over queries", "over queries and seeds"]
    made.append(Table("Hyma and connectors of their own, points", columns, rows))

    rows, least = [], 2 * np.mean([min(1, k / samples) for k in (1, 5, 10)])
    for name, each in found["sweeps"].items():
        scores = list(each["val"].values())
        cells = [f"{100 * score:.2f}" for score in scores] + [str(sum(score < least for score in scores))]
        rows.append([name, *cells, f"{each['flops'] / 1e9:.4g}", f"{each['seconds']:.1f}"])
    rates = [f"rate {lr}" for lr in next(iter(found["sweeps"].values()))["val"]]
    columns = ["arm", *rates, "collapsed", "GFLOP", "seconds of the best"]
    made.append(Table("Scores on the validation split with the seed for tuning, points", columns, rows))
    return made


def _ends(interval: Sequence[float], scale: float = 1) -> str:
    return " to ".join(f"{scale * end:+.{3 if scale == 1 else 2}f}" for end in interval)
