"""What a checkpoint remembers of its data: the same after a copy, another one after a change."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fourm.data import tokens
from fourm.data.mixture import MixedDataset
from fourm.data.shards import ShardDataset, write_shards
from fourm.data.texts import TextSource
from fourm.data.tokens import TokenDataset
from fourm.masking.budgets import Component, MaskingConfig
from fourm.modalities import Modality, TokenSpace
from fourm.verbs.train import fingerprints

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
    assert first.keys() == {"data", "modalities", "tokenizer of a"} and first["modalities"] == "a, b"
    shutil.copytree(tmp_path / "first", tmp_path / "copy", ignore=shutil.ignore_patterns(".packed"))
    assert prints(tmp_path / "copy") == first
    assert prints(write(tmp_path / "values", seed=1))["data"] != first["data"]
    assert prints(write(tmp_path / "longer", count=11))["data"] != first["data"]
    retrained = prints(write(tmp_path / "retrained", sha="2" * 64))
    assert retrained["data"] == first["data"] and retrained["tokenizer of a"] != first["tokenizer of a"]


def test_mixture(tmp_path):
    one, two = (TokenDataset(write(tmp_path / str(seed), seed=seed) / "train", SPACE) for seed in (0, 1))
    mixed = MixedDataset([one, two], [1, 3]).fingerprints()
    names = {f"{name} of data set {i}" for i in (1, 2) for name in ("data", "modalities", "tokenizer of a")}
    assert mixed.keys() == names | {"weights of the data sets"} and mixed["weights of the data sets"] == "250, 750"
    assert mixed["data of data set 1"] == one.fingerprints()["data"]
    assert mixed["data of data set 2"] == two.fingerprints()["data"] != mixed["data of data set 1"]
    assert MixedDataset([one, two], [2, 6]).fingerprints() == mixed
    other = MixedDataset([one, two], [1, 2]).fingerprints()
    assert {name for name in mixed if mixed[name] != other[name]} == {"weights of the data sets"}


@pytest.mark.parametrize("changed", [0, 9, 19])
def test_one_sample_of_a_big_shard(tmp_path, changed):
    """20 samples of 4096 ids are more than the 2**16 that count."""
    space = TokenSpace({"a": Modality("grid", vocab_size=9, grid=(64, 64))})
    values = np.random.default_rng(0).integers(0, 9, (20, 4096)).astype(np.uint8)
    prints = []
    for name in ("one", "other"):
        stock = [{"__key__": f"{i}", "a": value} for i, value in enumerate(values)]
        write_shards(tmp_path / name, "train", stock, 20, extensions={"a": "npy"})
        prints.append(TokenDataset(tmp_path / name / "train", space).fingerprints()["data"])
        values[changed] = (values[changed] + 1) % 9
    assert prints[0] != prints[1]


def test_values_that_count():
    values = np.arange(300_000)
    for run in (1, 64):
        chosen = np.frombuffer(tokens.spread_bytes(values, run), values.dtype)
        assert len(chosen) == 2**16 and chosen[0] == 0 and chosen[-1] == 299_999
        assert np.diff(chosen).max() <= 6 * run
    assert np.array_equal(np.frombuffer(tokens.spread_bytes(values[: 2**16], 64), values.dtype), values[: 2**16])


def write_texts(root: Path, lengths: list[int]) -> TokenDataset:
    """One shard for each text, all ids 5."""
    stock = [{"__key__": f"{i}", "t": np.full(length, 5)} for i, length in enumerate(lengths)]
    write_shards(root, "train", stock, 1)
    return TokenDataset(root / "train", TokenSpace({"t": Modality("text", vocab_size=300, max_tokens=5000)}))


def test_same_ids_in_other_texts(tmp_path):
    space = TokenSpace({"t": Modality("text", vocab_size=300, max_tokens=8)})
    prints = []
    for lengths in ((1, 3), (2, 2)):
        root = tmp_path / str(lengths[0])
        stock = [{"__key__": f"{i}", "t": np.full(length, 5)} for i, length in enumerate(lengths)]
        write_shards(root, "train", stock, 2)
        prints.append(TokenDataset(root / "train", space).fingerprints()["data"])
    assert prints[0] != prints[1]


@pytest.mark.parametrize("sizes", [True, False])
def test_shards_that_are_not_opened(tmp_path, monkeypatch, sizes):
    """Their files count with their sizes, not with their dates; without sizes nothing depends on what was looked up."""
    monkeypatch.setattr(tokens, "WINDOW", 1)
    if not sizes:
        real = tokens.listed
        bare = lambda fs, folder: [{k: v for k, v in info.items() if k != "size"} for info in real(fs, folder)]  # noqa: E731
        monkeypatch.setattr(tokens, "listed", bare)
    data = write_texts(tmp_path / "one", [10, 10, 10])
    first = data.fingerprints()
    assert len(data.keys) == 3 and data.fingerprints() == first  # now that all are opened
    for path in (tmp_path / "one").rglob("*.tar"):
        os.utime(path, (1, 1))
    assert TokenDataset(tmp_path / "one/train", data.space).fingerprints() == first
    other = write_texts(tmp_path / "other", [10, 10, 4000]).fingerprints()
    assert (other["data"] != first["data"]) == sizes


def test_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.jsonl").write_text('{"text": "a", "title": "a"}\n')
    row = Modality("text", vocab_size=300, max_tokens=8)

    def prints(field: str) -> dict[str, str]:
        def encode(texts):
            return [np.array([7])] * len(texts)

        source = TextSource(str(tmp_path / "t.jsonl"), "t", row, encode, "sha", field=field)
        return TokenDataset(source, TokenSpace({"t": row})).fingerprints()

    one, other = prints("text"), prints("title")
    assert one.keys() == {"data", "modalities", "tokenizer of t", "field"}
    assert {name for name in one if one[name] != other[name]} == {"field"}


MASKING = MaskingConfig(4, 4, [Component(input={"a": 1.0, "b": 2.0}, target={"others": 1.0})])


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"source": "rgb"}, set()),
        ({"tokenizer": "tokenizers/a"}, set()),
        ({"vocab": "a"}, set()),
        ({"vocab": "other"}, {"modality a"}),
        ({"input": False}, {"modality a"}),
        ({"output": False}, {"modality a"}),
        ({"learned_positions": True}, {"modality a"}),
        ({"first_sentinel": 5}, {"modality a"}),
        ({"mean": (0.4, 0.5, 0.5)}, {"modality a"}),
    ],
)
def test_rows_of_the_table(tmp_path, fields, changed):
    data = TokenDataset(write(tmp_path) / "train", SPACE)
    space = TokenSpace(SPACE.modalities | {"a": dataclasses.replace(SPACE["a"], **fields)})
    one, other = (fingerprints(each, data, data, [MASKING]) for each in (SPACE, space))
    assert {name for name in one | other if one.get(name) != other.get(name)} == changed


def test_names_of_a_run(tmp_path):
    data = TokenDataset(write(tmp_path / "0") / "train", SPACE)
    held_out = TokenDataset(write(tmp_path / "1", seed=1) / "train", SPACE)
    one = fingerprints(SPACE, data, data, [MASKING])
    own = {"data", "modalities", "tokenizer of a"}
    assert one.keys() == own | {f"val {name}" for name in own} | {
        "modalities of the model", "modality a", "modality b", "masking"
    }  # fmt: skip

    def changed(*given):
        other = fingerprints(*given)
        return {name for name in one | other if one.get(name) != other.get(name)}

    turned = TokenSpace({name: SPACE[name] for name in "ba"})
    assert changed(turned, data, data, [MASKING]) == {"modalities of the model"}
    assert changed(SPACE, data, held_out, [MASKING]) == {"val data"}
    assert changed(SPACE, data, data, [dataclasses.replace(MASKING, seed=1)]) == {"masking"}
    reordered = dataclasses.replace(MASKING, mixture=[Component(input={"b": 2.0, "a": 1.0}, target={"others": 1.0})])
    assert not changed(SPACE, data, data, [reordered])
    assert changed(SPACE, data, data, [MASKING] * 2) == {"masking", "masking of data set 1", "masking of data set 2"}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"nothing", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is no data card"),
        (b'{"tokenizers": 3, "modalities": [3]}', "is no data card"),
    ],
)
def test_cards(tmp_path, card, message):
    root = write(tmp_path)
    (root / "card.json").write_bytes(card)
    with pytest.raises(ValueError, match=rf"card\.json {message}"):
        ShardDataset(root / "train")
    with pytest.raises(ValueError, match=rf"card\.json {message}"):
        TokenDataset(root / "train", SPACE).fingerprints()


def test_cards_with_odd_rows(tmp_path):
    root = write(tmp_path)
    (root / "card.json").write_text('{"modalities": {"a": 3, "b": {"dtype": "int8"}}}')
    with pytest.raises(ValueError, match="wrong type int16, expected int8"):
        ShardDataset(root / "train")[0]


@pytest.mark.parametrize("change", ["count", "size", "values"])
def test_raw(tmp_path, change):
    root = write(tmp_path / "first")
    first = ShardDataset(root / "train", ["a"]).fingerprints()
    shutil.copytree(root, tmp_path / "copy")
    assert ShardDataset(tmp_path / "copy" / "train", ["a"]).fingerprints() == first
    if change == "count":
        write(tmp_path / "other", count=11)
    elif change == "size":
        write_shards(tmp_path / "other", "train", [{"__key__": f"k{i}", "a": np.arange(7)} for i in range(10)], 4)
    else:
        write(tmp_path / "other", seed=1)
    assert ShardDataset(tmp_path / "other" / "train", ["a"]).fingerprints() != first
