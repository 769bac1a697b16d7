"""`fourm plan`: what a training run takes on some GPUs, for any config or preset, without data."""

from __future__ import annotations

from dataclasses import dataclass, field

from fourm.masking.budgets import Component, MaskingConfig
from fourm.training.planner import Cluster
from fourm.verbs import train


def _everything() -> MaskingConfig:
    return MaskingConfig(128, 128, [Component(input={"others": 1.0}, target={"others": 1.0})])


@dataclass(kw_only=True)
class Config(train.Config):
    """A training run, and where it should run. `modalities` and `model` are needed.

    Args:
        gpus: How many.
        gpu: Which: A100-40G, A100, H100, H100-PCIe, H200, B200, L40S, MI300X, RTX4090.
        mfu: Share of their peak that useful matrix products reach.
    """

    data: str | list[train.DataConfig] = ""
    folder: str = ""
    masking: MaskingConfig = field(default_factory=_everything)
    gpus: int = 8
    gpu: str = "A100"
    mfu: float = 0.4


def run(config: Config) -> None:
    """Prints the plan."""
    print(train.planned(config, Cluster(config.gpus, config.gpu, config.mfu)))
