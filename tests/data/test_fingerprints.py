"""What a checkpoint remembers of its data: the same after a copy, another one after a change."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fourm.data.mixture import MixedDataset
from fourm.data.shards import ShardDataset, write_shards
from fourm.data.tokens import TokenDataset
from fourm.modalities import Modality, TokenSpace

SPACE = TokenSpace(
    {"a": Modality("grid", vocab_size=100, grid=(2, 3)), "b": Modality("grid", vocab_size=9, grid=(1, 2))}
)


def write(root: Path, count: int = 10, seed: int = 0, sha: str = "1" * 64) -> Path:
    rng = np.random.default_rng(seed)
    stock = [
        {"__key__": f"k{i}", "a": rng.integers(0, 100, 6), "b": rng.integers(0, 9, 2).astype(np.int16)}
        for i in range(count)
    ]
    write_shards(root, "train", stock, 4)
    (root / "card.json").write_text(json.dumps({"tokenizers": {"a": sha}}))
    return root


def prints(root: Path) -> dict[str, str]:
    return TokenDataset(root / "train", SPACE).fingerprints()


def test_tokens(tmp_path):
    first = prints(write(tmp_path / "first"))
    assert first.keys() == {"data", "tokenizer of a"}
    shutil.copytree(tmp_path / "first", tmp_path / "copy", ignore=shutil.ignore_patterns(".packed"))
    assert prints(tmp_path / "copy") == first
    assert prints(write(tmp_path / "values", seed=1))["data"] != first["data"]
    assert prints(write(tmp_path / "longer", count=11))["data"] != first["data"]
    retrained = prints(write(tmp_path / "retrained", sha="2" * 64))
    assert retrained["data"] == first["data"] and retrained["tokenizer of a"] != first["tokenizer of a"]


def test_mixture(tmp_path):
    one, two = (TokenDataset(write(tmp_path / str(seed), seed=seed) / "train", SPACE) for seed in (0, 1))
    mixed = MixedDataset([one, two], [1, 2]).fingerprints()
    assert mixed.keys() == {f"{i}. {name}" for i in (0, 1) for name in ("data", "tokenizer of a")}
    assert mixed["0. data"] == one.fingerprints()["data"] != mixed["1. data"] == two.fingerprints()["data"]


@pytest.mark.parametrize("change", ["count", "bytes"])
def test_raw(tmp_path, change):
    root = write(tmp_path / "first")
    first = ShardDataset(root / "train", ["a"]).fingerprints()
    shutil.copytree(root, tmp_path / "copy")
    assert ShardDataset(tmp_path / "copy" / "train", ["a"]).fingerprints() == first
    if change == "count":
        write(tmp_path / "other", count=11)
    else:
        write_shards(tmp_path / "other", "train", [{"__key__": f"k{i}", "a": np.arange(7)} for i in range(10)], 4)
    assert ShardDataset(tmp_path / "other" / "train", ["a"]).fingerprints() != first
