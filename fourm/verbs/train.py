"""`fourm train`: trains an any-to-any model on token shards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, cast

from fourm import runtime
from fourm.data.loader import Loader
from fourm.data.shards import TokenDataset
from fourm.masking.budgets import MaskingConfig
from fourm.masking.masking import Masker
from fourm.modalities import TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.training.calibration import calibrate
from fourm.training.planner import Cluster, describe
from fourm.training.tasks import HeldOutLoss, MaskedTask
from fourm.training.trainer import TrainConfig, Trainer


@dataclass(kw_only=True)
class Config(TrainConfig):
    """A model, its data and its training.

    Args:
        data: Root of the token data.
        modalities: YAML file with the modality table.
        folder: The run; the finished model goes to `model` below.
        model: Shape of the model.
        masking: What is given and what is asked.
        loss: `mod`, the mean of the modalities' means, or `token`, the mean over tokens.
        on_error: What bad samples do: `raise`, or `skip` and count.
        val_batches: Batches (of `batch_size` samples) of the held-out loss.
        calibrate: Fit a temperature per modality on those batches in the end, for a model that knows how sure it is.
        dry_run: Only say what the run takes, on one node of 8 GPUs (`fourm plan` knows others). No data are needed.
    """

    data: str
    modalities: str
    folder: str
    model: FourMConfig
    masking: MaskingConfig
    loss: Literal["mod", "token"] = "mod"
    on_error: Literal["raise", "skip"] = "raise"
    val_batches: int = 8
    calibrate: bool = False
    dry_run: bool = False

    may_change = TrainConfig.may_change | {
        "data",
        "modalities",
        "folder",
        "on_error",
        "val_batches",
        "calibrate",
        "dry_run",
        "model.attention",
    }


def run(config: Config) -> None:
    """Trains, watches the loss on the validation split, and writes the finished model."""
    if config.dry_run:
        print(describe(config, config.model, TokenSpace.from_yaml(config.modalities), config.masking, Cluster()))
        return
    joined = runtime.accelerator()
    folder = Path(config.folder)
    if joined.is_main_process:
        runtime.open_run(folder, dataclasses.asdict(config))
    space = TokenSpace.from_yaml(config.modalities)
    runtime.seed_everything(config.seed, "model")
    model = FourM(config.model, space)
    task = MaskedTask(model, config.loss)
    masker = Masker(space, config.masking)
    train, val = (TokenDataset(Path(config.data) / split, space, config.on_error) for split in ("train", "val"))
    size, rank, processes = config.loader_batch(joined.num_processes), joined.process_index, joined.num_processes
    loader = Loader(train, size, masker, config.seed, config.workers, rank, processes)
    # The same held-out samples for any number of processes, which share them out.
    batches = config.val_batches * config.batch_size // size
    held_out = HeldOutLoss(task, Loader(val, size, masker, config.seed), batches)
    trainer = Trainer(config, task, loader, {"val": held_out}, folder, {"config.json": model.config_json()})
    trainer.fit()
    if joined.is_main_process:
        final = cast(FourM, trainer.final_model)
        if config.calibrate:
            validation = Loader(val, size, masker, config.seed).batches()
            device = next(final.parameters()).device
            chosen = calibrate(final, (batch.to(device) for batch in islice(validation, batches)))
            print("temperatures: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
        final.save_pretrained(folder / "model")
        print(f"{folder / 'model'}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    runtime.finish(joined)
