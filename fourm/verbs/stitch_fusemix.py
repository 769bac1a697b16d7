"""`fourm stitch fusemix`: joins two frozen encoders with few pairs, and says what mixing them is worth."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fourm import runtime
from fourm.data.shards import ShardDataset
from fourm.evaluation.results import Table, write_metrics
from fourm.evaluation.retrieval import search
from fourm.stitching.curve import AdapterConfig, CurveConfig, draw, measure
from fourm.stitching.latents import Latents
from fourm.stitching.pairs import PairsConfig, Samples, choose_layers, load_samples
from fourm.stitching.space import SharedSpace
from fourm.training.trainer import TrainConfig
from fourm.verbs import stitch_retrieve
from fourm.verbs.stitch_retrieve import Shown


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Two encoders, and how their connectors are trained.

    Args:
        folder: Where runs, `metrics.json`, `curve.png`, the trained `space` and `retrieved.png`, what it finds, are
            written.
        pairs: The encoders, and the data they meet on.
        connector: The connectors.
        curve: What is compared.
        seed: That of the first run of each; the others have the next ones.
        steps: Updates of each run.
        batch_size: Pairs in a batch after mixing, the same for all that are compared; all pairs where there are fewer.
    """

    folder: str
    pairs: PairsConfig
    connector: AdapterConfig = field(default_factory=AdapterConfig)
    curve: CurveConfig = field(default_factory=CurveConfig)


def run(config: Config) -> None:
    """Makes the latents that are not there yet, trains all runs, writes figures and pictures.

    Raises:
        ValueError: Layers are to be chosen, which takes all training pairs, but some runs have fewer.
    """
    if (config.pairs.a_layers or config.pairs.b_layers) and any(config.curve.sizes):
        said = "a_layers and b_layers are chosen with all training pairs"
        raise ValueError(f"curve.sizes is {list(config.curve.sizes)}, but {said}; allowed is [0]")
    folder, joined = Path(config.folder), runtime.accelerator()
    if joined.is_main_process:
        runtime.open_run(folder, dataclasses.asdict(config))
    config.pairs, layers = choose_layers(config.pairs)
    place, sides = config.pairs.latents, {"a": config.pairs.a, "b": config.pairs.b}
    pairs = load_samples(config.pairs.data, place, sides, config.pairs.batch_size, config.pairs.limit)
    cards = {name: Latents(Path(place) / side.name / "test").card for name, side in sides.items()}
    made = {name: {key: card[key] for key in ("weights", "preprocessing")} for name, card in cards.items()}
    card = {"pairs": dataclasses.asdict(config.pairs), "made": made}
    found = measure(config.curve, config.connector, pairs, TrainConfig.of(config), folder, card)
    if joined.is_main_process:
        counts = {split: len(each) for split, each in pairs.items()}
        words = protocol(config, counts)
        metrics = {"protocol": words, "pairs": counts, "made": made, "layers": layers, **found}
        write_metrics(folder, metrics, tables(found, config.curve.against, layers))
        draw(found, config.curve.against, folder / "curve.png", words)
        retrieve(config.pairs, pairs["test"], folder)
        print(", ".join(str(folder / name) for name in ("metrics.json", "curve.png", "retrieved.png")))
    runtime.finish(joined)


@torch.inference_mode()
def retrieve(config: PairsConfig, test: Samples, folder: Path, queries: int = 4, k: int = 5) -> None:
    """Draws what the kept space finds for test samples of each side, evenly spaced ones."""
    space, names = SharedSpace.load(folder / "space"), {"a": config.a.modality, "b": config.b.modality}
    vectors = {side: space(side, z) for side, z in test.sides.items()}
    data, rows = ShardDataset(Path(config.data) / "test", sorted({*names.values()})), []
    queries = min(queries, len(test))
    chosen = [number * len(test) // queries for number in range(queries)]
    for here, there in (("a", "b"), ("b", "a")):
        scores, found = search(vectors[here][chosen], vectors[there], k)
        for query, numbers, cosines in zip(chosen, found.tolist(), scores.tolist(), strict=True):
            row = [Shown(data.sample(test.ids[query])[names[here]], "query")]
            for number, score in zip(numbers, cosines, strict=True):
                value, right = data.sample(test.ids[number])[names[there]], number == query
                row.append(Shown(value, f"{score:.2f}{' right' if right else ''}", right))
            rows.append(row)
    stitch_retrieve.draw(rows, folder / "retrieved.png")


def protocol(config: Config, counts: dict[str, int]) -> str:
    """What the figures mean."""
    a, b = (f"{side.modality} ({side.encoder})" for side in (config.pairs.a, config.pairs.b))
    return (
        f"{a} and {b}: each of {counts['test']} test pairs is looked for among all, in both directions; what is chosen "
        f"is chosen on {counts['val']} validation pairs; seeds {config.seed} to {config.seed + config.curve.seeds - 1} "
        "draw training pairs and weights; the figure is the mean of R@1, R@5 and R@10, R@1 stands beside it"
    )


def tables(found: dict, against: str, layers: dict[str, float]) -> list[Table]:
    """By number of pairs, mean recall and R@1 of all arms in points, and by how much one of them is better."""
    made = []
    if layers:
        rows = [[pair, f"{share:.3f}"] for pair, share in layers.items()]
        made.append(Table("Neighbours in common", ["layers", "share"], rows))
    beside = ["over queries", "over queries and seeds"]
    columns = ["arm", "mean", "±", "R@1", f"{against} less this: mean", *beside, "R@1", *beside]
    for n, arms in found["curve"].items():
        rows = []
        for name, figures in arms.items():
            row = [100 * value for value in (*figures["mean"].values(), figures["R@1"]["mean"])]
            cells = [name, *(f"{value:.1f}" for value in row)]
            for gain in (found["differences"][n][name][figure] for figure in ("mean", "R@1") if name != against):
                ends = ((gain["low"], gain["high"]), gain["with_seeds"])
                cells.append(f"{100 * gain['difference']:+.2f}")
                cells += [f"{100 * low:+.2f} to {100 * high:+.2f}" for low, high in ends]
            rows.append(cells + [""] * (len(columns) - len(cells)))
        made.append(Table(f"{n} pairs, 95 % intervals", columns, rows))
    return made
