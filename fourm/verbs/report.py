"""`fourm report`: the page that people look at."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fourm import logbook, pipeline, runtime
from fourm.data.tokens import TokenDataset
from fourm.evaluation.gallery import Gallery, GalleryConfig
from fourm.evaluation.report import write_report
from fourm.evaluation.shown import ShownDataset
from fourm.model.fourm import FourM
from fourm.tokenization.encode import load_tokenizers

MADE_BY = {  # parts of the page, and the verbs whose commands are shown below them
    "matrix": ("evaluate",),
    "tasks": ("evaluate",),
    "tokenizers": ("tokenizer", "text-tokenizer"),
    "train": ("train",),
}


@dataclass(kw_only=True)
class Config:
    """What is shown.

    Args:
        model: Folder or hub id of the model.
        tokenizers: Folder with its tokenizers.
        data: Root of the raw data.
        tokens: Root of the token data.
        metrics: JSON file that `fourm evaluate` wrote; gets the pipeline's `seconds` added.
        output: The page.
        run: Folder of the training run, for its loss curves.
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
    run: str | None = None
    pipeline: str | None = None
    gallery: GalleryConfig = field(default_factory=GalleryConfig)
    title: str = "fourm"


def run(config: Config) -> None:
    """Generates the pictures and writes the page."""
    runtime.seed_everything(config.gallery.seed)  # diffusion decoders draw from the global generator
    model = FourM.from_pretrained(config.model)
    tokenizers = load_tokenizers(model.space, config.tokenizers)
    tokens = TokenDataset(Path(config.tokens) / "test", model.space)
    raw = ShownDataset(config.data, config.tokens, "test", model.space, tokenizers)
    metrics = json.loads(Path(config.metrics).read_text())
    commands: dict[str, str] = {}
    if config.pipeline:
        metrics["seconds"] = pipeline.seconds(config.pipeline)
        Path(config.metrics).write_text(json.dumps(metrics, indent=2) + "\n")
        commands["generate"] = shlex.join(["fourm", *sys.argv[1:]])
        made = [command for commands in pipeline.commands(config.pipeline).values() for command in commands]
        for part, verbs in MADE_BY.items():
            lines = [f"fourm {command}" for command in made if command.partition(" ")[0] in verbs]
            commands[part] = "\n".join(lines)
    card = Path(config.data) / "card.json"
    path = write_report(
        config.output,
        metrics,
        Gallery(model, tokenizers, raw, tokens, config.gallery),
        {"Any-to-any model": logbook.read(config.run)} if config.run else {},
        commands,
        json.loads(card.read_text()) if card.exists() else None,
        config.title,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
