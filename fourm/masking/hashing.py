"""Random numbers as a pure function of keys (SplitMix64), so that a whole batch is drawn at once and no draw depends
on the samples drawn before it."""

from __future__ import annotations

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(value: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit integers (Steele, Lea and Flood 2014, SplitMix64's output function); any shape, uint64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def stream(keys: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers of the generator seeded by each key: (...,) uint64 to (..., count) uint64."""
    return mix(mix(keys)[..., None] + STEP * np.arange(1, count + 1, dtype=np.uint64))


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each key: (...,) uint64 to (..., count) float64."""
    return (stream(keys, count) >> np.uint64(11)) * 2.0**-53
