"""`fourm tokenizer`: trains an image tokenizer and measures it on held-out data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from fourm import runtime
from fourm.data.loader import Loader
from fourm.data.shards import ShardDataset
from fourm.evaluation.tokenizers import evaluate_tokenizer
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig, TokenizerLoss, TokenizerTask
from fourm.training.planner import describe_tokenizer
from fourm.training.trainer import TrainConfig, Trainer


@dataclass(kw_only=True)
class Config(TrainConfig):
    """A tokenizer, its data and its training.

    Args:
        data: Root of the raw data.
        modality: Raw modality.
        folder: The finished tokenizer; its training run is in `run` below.
        tokenizer: Input, quantizer, backbone and loss.
        test_samples: Samples of the test split it is measured on.
        dry_run: Only say what the run takes. No data are needed.
    """

    data: str
    modality: str
    folder: str
    tokenizer: TokenizerConfig
    test_samples: int = 512
    dry_run: bool = False

    may_change = TrainConfig.may_change | set(["data", "folder", "test_samples", "dry_run"])


def run(config: Config) -> None:
    """Trains, writes the tokenizer's folder, and measures it on the test split."""
    if config.dry_run:
        with torch.device("meta"):
            print(describe_tokenizer(config, ImageTokenizer(config.tokenizer)))
        return
    runtime.seed_everything(config.seed, "tokenizer", config.modality)
    folder = Path(config.folder)
    joined = runtime.accelerator()
    if joined.is_main_process:
        runtime.open_run(folder / "run", dataclasses.asdict(config))
    task = TokenizerTask(ImageTokenizer(config.tokenizer), config.modality)
    loader = Loader(
        ShardDataset(Path(config.data) / "train", [config.modality]),
        config.loader_batch(joined.num_processes),
        task.collate,
        config.seed,
        config.workers,
        joined.process_index,
        joined.num_processes,
    )
    trainer = Trainer(config, task, loader, {}, folder / "run")
    trainer.fit()
    if joined.is_main_process:
        tokenizer = cast(TokenizerLoss, trainer.final_model).tokenizer.cpu().eval()
        test = ShardDataset(Path(config.data) / "test", [config.modality])
        figures = evaluate_tokenizer(tokenizer, test, config.modality, config.test_samples)
        tokenizer.save_pretrained(folder, figures)
        (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(f"{folder}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    runtime.finish(joined)
