"""`fourm stitch fusemix`: joins two frozen encoders with few pairs, and says what mixing them is worth."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from fourm import runtime
from fourm.data.rewrite import write_durably
from fourm.stitching.curve import AdapterConfig, CurveConfig, draw, measure
from fourm.stitching.latents import Latents
from fourm.stitching.pairs import PairsConfig, load_pairs
from fourm.training.trainer import TrainConfig


@dataclass(kw_only=True)
class Config(TrainConfig):
    """Two encoders, and how their connectors are trained.

    Args:
        folder: Where runs, `metrics.json`, `curve.png` and the trained `space` are written.
        pairs: The encoders, and the data they meet on.
        connector: The connectors.
        curve: What is compared.
        steps: Updates of each run.
        batch_size: Pairs in a batch after mixing, the same for all that are compared; all pairs where there are fewer.
    """

    folder: str
    pairs: PairsConfig
    connector: AdapterConfig = field(default_factory=AdapterConfig)
    curve: CurveConfig = field(default_factory=CurveConfig)


def run(config: Config) -> None:
    """Makes the latents that are not there yet, trains all runs, writes figures and picture."""
    folder = Path(config.folder)
    joined = runtime.accelerator()
    if joined.is_main_process:
        runtime.open_run(folder, dataclasses.asdict(config))
    with joined.main_process_first():  # which makes the latents
        pairs = load_pairs(config.pairs)
    sides = {"a": config.pairs.a, "b": config.pairs.b}
    cards = {name: Latents(Path(config.pairs.latents) / side.name / "test").card for name, side in sides.items()}
    made = {name: {key: card[key] for key in ("weights", "preprocessing")} for name, card in cards.items()}
    card = {"pairs": dataclasses.asdict(config.pairs), "made": made}
    train = TrainConfig(**{each.name: getattr(config, each.name) for each in dataclasses.fields(TrainConfig)})
    found = measure(config.curve, config.connector, pairs, train, folder, card)
    if joined.is_main_process:
        counts = {split: len(each) for split, each in pairs.items()}
        metrics = {"protocol": protocol(config, counts), "pairs": counts, **found, "made": made}
        write_durably(folder / "metrics.json", json.dumps(metrics | {"environment": runtime.environment()}, indent=1))
        draw(found, config.curve.against, folder / "curve.png", protocol(config, counts))
        print(table(found, config.curve.against))
        print(f"{folder / 'metrics.json'}, {folder / 'curve.png'}")
    runtime.finish(joined)


def protocol(config: Config, counts: dict[str, int]) -> str:
    """What the figures mean."""
    a, b = (f"{side.modality} ({side.encoder})" for side in (config.pairs.a, config.pairs.b))
    return (
        f"{a} and {b}: each of {counts['test']} test pairs is looked for among all, in both directions; what is chosen "
        f"is chosen on {counts['val']} validation pairs; {config.curve.seeds} seeds draw training pairs and weights"
    )


def table(found: dict, against: str) -> str:
    """R@1, R@5, R@10 and the differences of R@1 and R@10 with their intervals, in points."""
    lines = [f"  pairs  {'arm':<18}         R@1    R@5   R@10  {against} less this: R@1, R@10 (95 % over queries)"]
    for n, arms in found["curve"].items():
        for name, figures in arms.items():
            first, five, ten = (100 * figures[f"R@{k}"]["mean"] for k in (1, 5, 10))
            line = f"{n:>7}  {name:<18} {first:5.1f} ± {100 * figures['R@1']['std']:3.1f} {five:6.1f} {ten:6.1f}"
            for gain in (found["differences"][n][name][f"R@{k}"] for k in (1, 10) if name != against):
                line += f"  {100 * gain['difference']:+5.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
            lines.append(line)
    return "\n".join(lines)
