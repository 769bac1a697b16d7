"""`fourm tokenizer`: trains an image tokenizer and measures it on held-out data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from fourm import runtime
from fourm.data.loader import Loader
from fourm.data.shards import ShardDataset
from fourm.evaluation.samples import Reconstructions
from fourm.evaluation.tokenizers import evaluate_tokenizer
from fourm.tokenization import load_tokenizer
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.task import Crops, SizedBatches, Sizes, TokenizerTask, Views, start_from
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
        mask: Raw modality, masks of the pixels that are valid; with `tokenizer.input.mask_value`.
        init: Folder or hub id of a tokenizer to start from: its encoder, quantizer and class embedding, and its decoder
            where that is of the same architecture.
        freeze: Which weights are frozen: `nothing`, or the `encoder` with quantizer and class embedding.
        crops: Crop images, which may then be of any size and shape.
        sizes: Sizes of images, another one at every update; default: that of the input.
        test_samples: Samples of the test split it is measured on, at the smallest and the largest size.
        dry_run: Only say what the run takes. No data are needed.
    """

    data: str
    modality: str
    folder: str
    tokenizer: TokenizerConfig
    mask: str = ""
    init: str = ""
    freeze: Literal["nothing", "encoder"] = "nothing"
    crops: Crops | None = None
    sizes: Sizes | None = None
    test_samples: int = 512
    dry_run: bool = False

    may_change = TrainConfig.may_change | set(["data", "folder", "test_samples", "dry_run"])


def prepare(config: Config) -> ImageTokenizer:
    """A tokenizer to train.

    Raises:
        ValueError: The config asks for what does not fit together.
    """
    tokenizer = ImageTokenizer(config.tokenizer)
    source = config.tokenizer.input
    if config.sizes is not None and (not tokenizer.resizable or source.size != (config.sizes.high,) * 2):
        raise ValueError(f"sizes up to {config.sizes.high} need an input of this size, not {source.size}, and fixed "
                         "positions or none (backbone.positions)")  # fmt: skip
    if config.crops is not None and len(source.raw_shape) == 1 and not source.encoder:
        raise ValueError(f"crops fit images and maps, not the {source.kind} of shape {source.raw_shape}")
    if config.mask and source.mask_value is None:
        raise ValueError(f"mask is {config.mask!r}, but tokenizer.input.mask_value is not given")
    if config.freeze == "encoder" and not config.init:
        raise ValueError("freeze is 'encoder', but there is no `init` to take it from")
    if config.tokenizer.denoiser == "controlnet":
        tokenizer.decoder.start()
    if config.init:
        whole = start_from(tokenizer, cast(ImageTokenizer, load_tokenizer(config.init)))
        print(f"starting from {config.init}{'' if whole else ', but for the decoder, which starts anew'}")
    if config.freeze == "encoder":
        tokenizer.freeze_encoder()
    return tokenizer


def measure(config: Config, task: TokenizerTask) -> dict[str, float]:
    """Figures on the test split; at several sizes their names end in the side."""
    tokenizer = cast(ImageTokenizer, task.model)
    names = tuple(name for name in (config.modality, config.mask) if name)
    test = Views(ShardDataset(Path(config.data) / "test", names), task)
    options = (config.modality, config.test_samples, config.seed, config.mask)
    if config.sizes is None:
        return evaluate_tokenizer(tokenizer, test, *options)
    figures: dict[str, float] = {}
    for side in dict.fromkeys((config.sizes.low, config.sizes.high)):  # ends with the size of the input
        cells = side // config.tokenizer.backbone.patch_size
        tokenizer.use_grid((config.tokenizer.quantizer.codebooks * cells, cells))
        figures |= {f"{name}_{side}": value for name, value in evaluate_tokenizer(tokenizer, test, *options).items()}
    return figures


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
    task = TokenizerTask(prepare(config), config.modality, config.mask, config.crops, config.seed)
    names = [name for name in (config.modality, config.mask) if name]
    data = ShardDataset(Path(config.data) / "train", names)
    loader: Any = Loader(
        data,
        config.loader_batch(joined.num_processes),
        task.collate,
        config.seed,
        config.workers,
        joined.process_index,
        joined.num_processes,
    )
    if config.sizes is not None:
        loader = SizedBatches(loader, config.sizes, config.seed, config.accumulate)
    split = next((name for name in ("val", "test") if (Path(config.data) / name).is_dir()), "test")
    held_out = Views(ShardDataset(Path(config.data) / split, names), task)
    shown = {split: Reconstructions(held_out, config.modality, config.mask)}
    trainer = Trainer(config, task, loader, shown, folder / "run", fingerprints=data.fingerprints())
    trainer.fit()
    if joined.is_main_process:
        tokenizer = cast(ImageTokenizer, trainer.final_model).eval()
        runtime.seed_everything(config.seed, "measure")
        task.model = tokenizer
        figures = measure(config, task)
        tokenizer.save_pretrained(folder, figures)
        (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(f"{folder}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    runtime.finish(joined)
