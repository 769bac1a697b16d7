"""Rates of the parts of the product, on this machine: `OMP_NUM_THREADS=1 python tools/bench.py masking`."""

from __future__ import annotations

import argparse
import time

import numpy as np

from fourm.masking.budgets import Component, MaskingConfig
from fourm.masking.masking import Masker
from fourm.modalities import Modality, TokenSpace


def earth_space() -> TokenSpace:
    """Thirteen modalities of the sizes of the built-in data."""
    grid = {"kind": "grid", "vocab_size": 512, "grid": [8, 8]}
    text = {"kind": "text", "vocab": "text", "vocab_size": 8192}
    return TokenSpace.from_dict(
        {
            "rgb": {"kind": "patches", "grid": [8, 8], "patch_size": 8},
            **{name: grid for name in ("tok_rgb", "elevation", "normal", "climate", "water", "relief", "edges")},
            "turbidity": {"kind": "grid", "vocab_size": 64, "grid": [4, 4]},
            "caption": {**text, "max_tokens": 48},
            "metadata": {**text, "max_tokens": 32, "chunk": 2},
            "palette": {**text, "max_tokens": 24},
            "places": {**text, "max_tokens": 32},
        }
    )


def random_samples(space: TokenSpace, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Token samples of random contents, texts a third to all of their greatest length."""
    generator = np.random.default_rng(seed)

    def content(row: Modality) -> np.ndarray:
        if row.kind == "patches":
            assert row.grid is not None
            size = (row.grid[0] * row.patch_size, row.grid[1] * row.patch_size, row.channels)
            return generator.integers(0, 256, size, dtype=np.uint8)
        if row.kind == "vectors":
            return generator.normal(size=(row.max_tokens, row.dim)).astype(np.float32)
        long = row.length if row.kind == "grid" else generator.integers(row.max_tokens // 3, row.max_tokens)
        low = 0 if row.kind == "grid" else row.first_sentinel + row.sentinels
        return generator.integers(low, row.vocab_size, long // row.chunk * row.chunk).astype(np.int32)

    return [{name: content(row) for name, row in space.modalities.items()} for _ in range(count)]


def masking(samples: int = 8192, batch: int = 256) -> None:
    """Samples masked per CPU second by one process, 13 modalities at 128/128 tokens (at least 4,000 are wanted)."""
    space = earth_space()
    mixture = [
        Component(input={"others": 0.5}, target={"others": 0.5}),
        Component(input={"rgb": 1000}, target={"others": 0.5}),
        Component(input={"caption": 5, "others": 0.05}, target={"others": 0.5}, keep={"caption": "all"}),
        *(Component(input={"others": alpha}, target={"others": alpha}) for alpha in (0.01, 0.1, 1, 10)),
        Component(input={}, target={"others": 0.5}),
    ]
    masker = Masker(space, MaskingConfig(input_tokens=128, target_tokens=128, mixture=mixture))
    stock = random_samples(space, batch)
    masker(stock, [(0, index) for index in range(batch)])
    given, asked, start = 0, 0, time.process_time()
    for first in range(0, samples, batch):
        masked = masker(stock, [(1, first + index) for index in range(batch)])
        given, asked = given + masked.input_tokens, asked + masked.target_tokens
    seconds = time.process_time() - start
    print(f"masking: {samples / seconds:,.0f} samples/s (batches of {batch}, {len(space)} modalities, 128/128 tokens;")
    print(f"         slots filled: {given / samples / 128:.0%} of inputs, {asked / samples / 128:.0%} of targets)")


BENCHMARKS = {"masking": masking}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().benchmark]()
