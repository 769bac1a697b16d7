"""`fourm stitch hyma`: one hypernetwork makes the connectors of all pairs of a zoo; which are the best."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fourm import runtime
from fourm.evaluation.results import Table, write_metrics
from fourm.stitching.hyma import AlignConfig, Hyma, ZooConfig, load_zoo
from fourm.stitching.ranking import train_arm
from fourm.training.trainer import TrainConfig


@dataclass(kw_only=True)
class Config(TrainConfig):
    """A zoo, and how its pairs are joined.

    Args:
        folder: Where the run, `metrics.json`, the hypernetwork `hyma` and `connectors` are written.
        zoo: The encoders, and the data they meet on.
        align: What is trained.
        winners: Pairs whose connectors are written, those that are best on the validation split.
    """

    folder: str
    zoo: ZooConfig
    align: AlignConfig = field(default_factory=AlignConfig)
    winners: int = 3


def run(config: Config) -> None:
    """Makes the latents that are not there yet, trains, writes ranking, hypernetwork and the winners' connectors."""
    folder, joined = Path(config.folder), runtime.accelerator()
    if joined.is_main_process:
        runtime.open_run(folder, dataclasses.asdict(config))
    zoo = load_zoo(config.zoo)
    train = TrainConfig.of(config)
    result = train_arm("hyma", config.align, zoo, train, folder, {"zoo": dataclasses.asdict(config.zoo)})
    if joined.is_main_process:
        hyma = Hyma.load(folder / "hyma")
        test = (np.mean(result[name], axis=1) for name in ("quality", "hits"))
        ranking = sorted(zip(zoo["train"].pairs, result["val"], *test, strict=True), key=lambda row: -row[1])
        for pair, *_ in ranking[: config.winners]:
            hyma.materialise(pair).save(folder / "connectors" / "--".join(pair))
        protocol = (
            f"ranked by the mean of R@1, R@5 and R@10 in both directions among {len(zoo['val'].ids)} validation "
            f"samples, which also stopped training; test: the same among {len(zoo['test'].ids)} test samples"
        )
        rows = [[*pair, *(f"{100 * figure:.1f}" for figure in figures)] for pair, *figures in ranking]
        table = Table("Pairs, points", ["a", "b", "validation", "test", "test R@1"], rows)
        write_metrics(folder, {"protocol": protocol, "seconds": result["seconds"]}, [table])
        print(f"{folder / 'metrics.json'}, {folder / 'connectors'}")
    runtime.finish(joined)
