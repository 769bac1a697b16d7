"""A small `FourM` to train in this process, or in one of several that a test starts: `several.py FOLDER CASES`."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np

from fourm import runtime
from fourm.data.loader import Loader
from fourm.masking.budgets import Component, MaskingConfig
from fourm.masking.masking import Masker
from fourm.modalities import Modality, TokenSpace
from fourm.model.attention import Blocks  # noqa: F401
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.lora import inject_lora
from fourm.training import optim as optimisers
from fourm.training import parallel
from fourm.training.optim import OptimConfig
from fourm.training.tasks import HeldOutLoss, MaskedTask
from fourm.training.trainer import TrainConfig, Trainer

SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(3, 3), patch_size=2),
        "depth": Modality("grid", vocab_size=17, grid=(3, 3)),
        "caption": Modality("text", vocab_size=40, max_tokens=8, sentinels=8),
        "sound": Modality("vectors", dim=6, max_tokens=3),  # of every ninth sample: most batches have none
        "smell": Modality("vectors", dim=5, max_tokens=3),  # of no sample
    }
)
optimisers.has_bf16 = lambda device: False  # Muon would magnify what bfloat16 rounds
STEPS, SAMPLES, BATCH = 6, 36, 8  # an epoch is 4.5 updates


class Samples:
    """36 samples of random tokens."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        sample = {
            "__key__": f"{i:02}",
            "rgb": rng.integers(0, 255, (6, 6, 3), dtype=np.uint8),
            "depth": rng.integers(0, 17, 9),
            "caption": rng.integers(20, 40, rng.integers(3, 7)),
        }
        return sample | ({"sound": rng.standard_normal((3, 6)).astype(np.float32)} if i % 9 == 0 else {})


class Noted:
    """A loader that writes down which samples it gave in which step."""

    def __init__(self, loader, file):
        self.loader, self.file = loader, file

    def batches(self, start_step=0):
        for batch in self.loader.batches(start_step):
            with self.file.open("a") as out:
                out.write(json.dumps(batch.keys) + "\n")
            yield batch


def train(folder, joined=None, **settings):
    """Trains for six updates; the trainer."""
    rank, world = (joined.process_index, joined.num_processes) if joined else (0, 1)
    optim = OptimConfig(settings.pop("optimizer", "adamw"), lr=0.02, eps=1e-4, clip=0.5, weight_decay=0.1, warmup=0.2)
    settings = {"steps": STEPS, "batch_size": BATCH, "save_every": 3, "keep": 0, "eval_every": 3, "log_every": 1,
                "ema": 0.9, "precision": "fp32", "spike_sigma": 0, "drop_path": 0.0} | settings  # fmt: skip
    shape = FourMConfig(size="nano", dim=32, heads=2, encoder_depth=2, decoder_depth=2, qk_norm=True,
                        drop_path=settings.pop("drop_path"), share_modality_embeddings=True)  # fmt: skip
    decoupled = settings.pop("decoupled", [])
    config = TrainConfig(optim=optim, **settings)
    runtime.seed_everything(0, "init")
    model = FourM(shape, SPACE)
    if decoupled:
        inject_lora(model, 2, 1.0, "all", decoupled)
    mixture = [Component(input={"others": 1}, target={"depth": 1, "caption": 1}), Component(target={"depth": 1})]
    masker, samples = Masker(SPACE, MaskingConfig(10, 8, mixture)), Samples()
    loader = Loader(samples, config.loader_batch(world), masker, 0, config.workers, rank, world)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = MaskedTask(model)
    held_out = HeldOutLoss(task, Loader(samples, 5, masker, 1), 3)  # 3 batches: processes do not get equally many
    noted = Noted(loader, folder / f"keys-{rank}-of-{world}.jsonl")
    trainer = Trainer(config, task, noted, {"val": held_out}, folder, {"config.json": model.config_json()})
    trainer.fit()
    return trainer


def failing(joined, folder):
    """A sharded run whose second process cannot write its part of checkpoint-6; what each process says."""
    write = parallel.write

    def full(file, *rest, **more):
        if joined.process_index == 1 and "checkpoint-6" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, *rest, **more)

    parallel.write = full
    try:
        train(folder, joined)
    except OSError as error:
        (folder / f"error-{joined.process_index}.txt").write_text(str(error))
    finally:
        parallel.write = write


CASES = {
    "fsdp": {},
    "fsdp-muon": {"optimizer": "muon", "accumulate": 2},
    "fsdp-checkpointing": {"checkpointing": True, "accumulate": 2},
    "fsdp-from-one": {"workers": 1},
    "fsdp-routed": {"decoupled": ["depth"], "checkpointing": True},
    "fsdp-bf16": {"precision": "bf16", "steps": 1, "optimizer": "muon"},
    "fsdp-compiled": {"compile": True, "steps": 1},
    "ddp": {"accumulate": 2},
    "ddp-muon": {"optimizer": "muon"},
    "ddp-from-two": {"workers": 1},
    "ddp-routed": {"decoupled": ["depth"]},
}


if __name__ == "__main__":
    folder, joined = Path(sys.argv[1]), runtime.accelerator()
    for name in sys.argv[2:]:
        if sys.argv[2] != name or "ddp" in name:  # the first is as the launcher has it
            os.environ["ACCELERATE_USE_FSDP"] = str("ddp" not in name).lower()
        if name == "failing":
            failing(joined, folder / name)
            continue
        trainer = train(folder / name, joined, **CASES[name])
        if joined.is_main_process:
            trainer.final_model.save_pretrained(folder / name / "model")
    runtime.finish(joined)
