"""Losses of a small run, digit by digit: whatever changes them must be a decision.

Data come from a formula, so nothing but the product can move these figures. Different processors may round differently.
"""

import numpy as np
import pytest

from fourm import logbook, runtime
from fourm.data.loader import Loader
from fourm.masking.budgets import Component, MaskingConfig
from fourm.masking.masking import Masker
from fourm.modalities import Modality, TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.training.optim import OptimConfig
from fourm.training.tasks import MaskedTask
from fourm.training.trainer import TrainConfig, Trainer

SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(2, 2), patch_size=2, channels=3),
        "map": Modality("grid", vocab_size=16, grid=(4, 4)),
        "depth": Modality("grid", vocab_size=12, grid=(4, 4)),
        "caption": Modality("text", vocab_size=40, max_tokens=8, sentinels=8, first_sentinel=4),
    }
)
SHAPE = FourMConfig("nano", dim=32, encoder_depth=2, decoder_depth=2, heads=2)
MASKING = MaskingConfig(12, 12, [Component(input={"others": 0.5}, target={"others": 0.5})])


def sample(i: int) -> dict:
    place = np.arange(16)
    return {
        "__key__": f"{i:03}",
        "rgb": ((np.arange(48).reshape(4, 4, 3) * 5 + 7 * i) % 256).astype(np.uint8),
        "map": (place * (i % 3 + 1) + i) % 16,
        "depth": (place // 2 + i) % 12,
        "caption": 12 + (np.arange(3 + i % 5) * 3 + i) % 28,
    }


def losses(folder, **optim) -> list[float]:
    config = TrainConfig(
        steps=8, batch_size=8, log_every=1, precision="fp32", ema=0.9, optim=OptimConfig(warmup=0.25, **optim)
    )
    runtime.seed_everything(0, "model")
    task = MaskedTask(FourM(SHAPE, SPACE))
    loader = Loader([sample(i) for i in range(20)], 8, Masker(SPACE, MASKING), config.seed)
    Trainer(config, task, loader, {}, folder).fit()
    return [record["loss"] for record in logbook.read(folder) if "loss" in record]


GOLDEN = {
    "adamw": [2.975897, 2.997503, 3.006737, 2.972538, 3.012647, 2.879913, 2.918341, 2.935167],
    "muon": [2.975897, 2.994443, 3.007113, 2.983209, 3.016456, 2.845646, 2.908659, 2.928552],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_losses(tmp_path, name):
    assert losses(tmp_path, name=name, lr=0.01) == pytest.approx(GOLDEN[name], rel=1e-4)
