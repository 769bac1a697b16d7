"""`fourm report`: the page that people look at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fourm import logbook, pipeline
from fourm.data.shards import ShardDataset, TokenDataset
from fourm.evaluation.gallery import Gallery, GalleryConfig
from fourm.evaluation.report import write_report
from fourm.model.fourm import FourM
from fourm.tokenization.encode import load_tokenizers, source_of


@dataclass(kw_only=True)
class Config:
    """What is shown.

    Args:
        model: Folder or hub id of the model.
        tokenizers: Folder with its tokenizers.
        data: Root of the raw data.
        tokens: Root of the token data.
        metrics: JSON file that `fourm evaluate` wrote.
        output: The page.
        runs: Folders of training runs, by the name their curves get.
        pipeline: Folder of the pipeline that made all this; its commands and times are shown.
        gallery: How the pictures are made.
        title: Headline.
    """

    model: str
    tokenizers: str
    data: str
    tokens: str
    metrics: str
    output: str
    runs: dict[str, str] = field(default_factory=dict)
    pipeline: str | None = None
    gallery: GalleryConfig = field(default_factory=GalleryConfig)
    title: str = "fourm"


def run(config: Config) -> None:
    """Generates the pictures and writes the page."""
    model = FourM.from_pretrained(config.model)
    tokenizers = load_tokenizers(model.space, config.tokenizers)
    tokens = TokenDataset(Path(config.tokens) / "test", model.space)
    sources = dict.fromkeys(source_of(name, row) for name, row in model.space.modalities.items())
    raw = ShardDataset(Path(config.data) / "test", list(sources))
    metrics = json.loads(Path(config.metrics).read_text())
    commands: dict[str, str] = {}
    if config.pipeline:
        metrics["seconds"] = pipeline.seconds(config.pipeline)
        done = pipeline.commands(config.pipeline)
        commands = {step: "\n".join(f"fourm {command}" for command in made) for step, made in done.items()}
    card = Path(config.data) / "card.json"
    path = write_report(
        config.output,
        metrics,
        Gallery(model, tokenizers, raw, tokens, config.gallery),
        {name: logbook.read(folder) for name, folder in config.runs.items()},
        commands,
        json.loads(card.read_text()) if card.exists() else None,
        config.title,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
