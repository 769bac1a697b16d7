"""The reference's masking configs, rebuilt from its fixtures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fourm.masking.budgets import Component, MaskingConfig
from fourm.modalities import Modality, TokenSpace

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "masking"


def reference_space(config: dict) -> TokenSpace:
    """The modality table of a `budget_stats.json` config."""
    rows = {}
    for name, size in config["max_tokens"].items():
        if name.startswith("rgb"):
            rows[name] = Modality("patches", grid=(1, size), patch_size=16)
        elif name.startswith("tok_"):
            rows[name] = Modality("grid", vocab_size=8192, grid=(1, size))
        elif name.startswith("t5"):
            rows[name] = Modality("vectors", dim=4, max_tokens=size)
        else:
            chunk = 2 if name == "metadata" else 1
            rows[name] = Modality("text", vocab="text", vocab_size=30000, max_tokens=size, chunk=chunk)
    return TokenSpace(rows)


def reference_mixture(config: dict, space: TokenSpace) -> list[Component]:
    """Its mixture; alphas of targets that nobody can predict (`t5_caption`) are left out.

    Texts are kept at random but in the components that favour them (alpha 5), palettes wholly or not at all.
    """
    weights = config["sampling_weights"] or [1.0] * config["num_components"]

    def column(table: dict, number: int, names: list[str]) -> dict[str, float]:
        return {name: values[number] for name, values in table.items() if name in names}

    return [
        Component(
            weight=weight,
            input=column(config["input_alphas"], number, space.inputs()),
            target=column(config["target_alphas"], number, space.outputs()),
            keep={
                name: "all" if alpha[number] == 5 else "binary" if name == "color_palette" else "random"
                for name, alpha in config["input_alphas"].items()
            },
        )
        for number, weight in enumerate(weights)
    ]


@pytest.fixture
def reference_masking() -> Callable[[int], tuple[dict, TokenSpace, MaskingConfig]]:
    """The stored statistics, modality table and masking config of entry `number` of `budget_stats.json`."""

    def rebuild(number: int) -> tuple[dict, TokenSpace, MaskingConfig]:
        if not FIXTURES.exists():
            pytest.skip(f"{FIXTURES} is absent")
        stored = json.loads((FIXTURES / "budget_stats.json").read_text())["configs"][number]
        space = reference_space(stored)
        low, high = stored["input_tokens_range"], stored["target_tokens_range"]
        return stored, space, MaskingConfig(tuple(low), tuple(high), reference_mixture(stored, space))

    return rebuild
