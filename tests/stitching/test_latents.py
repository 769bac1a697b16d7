"""The store of latents: what is in it, that a kill costs nothing, and that other latents are refused."""

import contextlib
import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fourm.stitching.latents as module
import fourm.stitching.pairs as pairs_module
from fourm.encoders import FunctionEncoder
from fourm.stitching.encoders import latents, load
from fourm.stitching.latents import Latents, Source, compute
from fourm.stitching.pairs import PairsConfig, SampleLoader, choose_layers, load_samples

RNG = np.random.default_rng(0)


def means(images):
    """Maps (B, 2, 2, 3) of mean colours."""
    pixels = torch.from_numpy(np.stack(images)).float()
    return pixels.unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4))


means.dim = 3


def letters(texts):
    """States (L, 2) of the letters of texts."""
    return [torch.tensor([[ord(letter), index] for index, letter in enumerate(text)]).float() for text in texts]


letters.dim = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for split, count in (("train", 11), ("val", 3), ("test", 4)):
        for modality in ("rgb", "caption"):
            (root / split / modality).mkdir(parents=True)
        for i in range(count):
            pixels = RNG.integers(0, 256, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / "rgb" / f"{i:02}.png")
            (root / split / "caption" / f"{i:02}.txt").write_text("abc" * (i + 1))
    return root


def source(modality="rgb", pooling="mean", **options):
    return Source(modality=modality, encoder=f"{__name__}:{'means' if modality == 'rgb' else 'letters'}",
                  pooling=pooling, **options)  # fmt: skip


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, __name__, __import__("types").SimpleNamespace(means=means, letters=letters)
    )


def picture(data, i, split="train"):
    return np.asarray(Image.open(data / split / "rgb" / f"{i:02}.png"), np.float32)


def test_vectors_are_stored_as_they_are(data, tmp_path):
    found = compute(source(), data, "train", tmp_path, batch_size=2, chunk=4)
    assert found.ids == [f"{i:02}" for i in range(11)] and found.dim == 3 and len(found) == 11
    expected = np.stack([picture(data, i).mean((0, 1)) for i in range(11)])
    np.testing.assert_allclose(found.raw, expected, rtol=1e-6)
    assert isinstance(found.raw, np.memmap)
    np.testing.assert_allclose(found.card["mean"], expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.card["std"], expected.std(0), rtol=1e-5)
    np.testing.assert_array_equal(found.read([3, 1]), found.raw[[3, 1]])
    assert compute(source(), data, "val", tmp_path, limit=2).ids == ["00", "01"]


def test_maps_and_states_of_tokens(data, tmp_path):
    maps = compute(source(pooling="none", dtype="float16"), data, "test", tmp_path)
    assert maps.raw.shape == (4, 2, 2, 3) and maps.raw.dtype == np.float16
    np.testing.assert_allclose(maps.read()[1][0, 1], picture(data, 1, "test")[:2, 2:].mean((0, 1)), rtol=1e-3)
    states = compute(source("caption", "none"), data, "test", tmp_path, batch_size=2, chunk=2)
    assert states.offsets == [0, 3, 9, 18, 30] and states.raw.shape == (30, 2)
    assert states.item(1).tolist() == letters(["abcabc"])[0].tolist()
    with pytest.raises(ValueError, match="states of tokens, of a different number each"):
        states.read()


def test_what_was_killed_goes_on_and_ends_with_the_same_bytes(data, tmp_path, monkeypatch):
    options = {"batch_size": 2, "chunk": 4}
    whole = compute(source(), data, "train", tmp_path / "whole", **options)
    calls = []

    def dies(encoder, inputs, pooling):
        calls.append(len(inputs))
        if len(calls) == 4:  # in the second chunk, with a batch of it written
            raise KeyboardInterrupt
        return latents(encoder, inputs, pooling)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "latents", dies)
        compute(source(), data, "train", tmp_path / "killed", **options)
    place = tmp_path / "killed" / source().name
    assert os.listdir(place) == [".train.partial"]
    progress = json.loads((place / ".train.partial" / "progress.json").read_text())
    assert progress["samples"] == 4 and progress["lengths"] == []
    with pytest.raises(ValueError, match=r"chunk \[2, 4\]; asked for is chunk \[2, 5\]"):
        compute(source(), data, "train", tmp_path / "killed", batch_size=2, chunk=5)
    counted = []
    monkeypatch.setattr(module, "latents", lambda *args: counted.append(len(args[1])) or latents(*args))
    again = compute(source(), data, "train", tmp_path / "killed", **options)
    assert sum(counted) == 11 - 4
    for name in ("latents.npy", "ids.json", "card.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_killed_states_of_tokens_go_on(data, tmp_path, monkeypatch):
    words, options = source("caption", "none"), {"batch_size": 2, "chunk": 4}
    whole = compute(words, data, "train", tmp_path / "whole", **options)
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return latents(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "latents", dies)
        compute(words, data, "train", tmp_path / "killed", **options)
    again = compute(words, data, "train", tmp_path / "killed", **options)
    assert again.offsets == whole.offsets == [0, *np.cumsum(3 * np.arange(1, 12))]
    assert np.array_equal(again.raw, whole.raw)


def test_an_encoder_runs_where_the_program_does_and_is_hashed_once(data, tmp_path, monkeypatch):
    hashed, devices = [], []
    weights = FunctionEncoder.weights
    monkeypatch.setattr(FunctionEncoder, "weights", lambda self: hashed.append(self.name) or weights(self))
    joined = SimpleNamespace(device=torch.device("meta"), main_process_first=contextlib.nullcontext)
    monkeypatch.setattr(pairs_module, "accelerator", lambda: joined)
    monkeypatch.setattr(FunctionEncoder, "to", lambda self, device: devices.append(str(device)) or self)
    config = PairsConfig(data=str(data), a=source(), b=source("caption"), latents=str(tmp_path))
    load_samples(config.data, config.latents, {"a": config.a, "b": config.b})
    assert devices == ["meta", "meta"] and len(hashed) == 2  # not once for each of three splits
    setattr(sys.modules[__name__], "means@1", means)
    choose_layers(dataclasses.replace(config, a_layers=["1"], b=source()), k=3)
    assert devices[2:] == ["meta", "meta"]


def test_other_latents_are_refused_with_both_sides_named(data, tmp_path):
    made = compute(source(), data, "test", tmp_path)
    card = json.loads((made.folder / "card.json").read_text())
    (made.folder / "card.json").write_text(json.dumps(card | {"weights": "0123456789ab"}))
    with pytest.raises(ValueError, match=f"weights 0123456789ab; asked for is weights {card['weights']}"):
        compute(source(), data, "test", tmp_path)
    with pytest.raises(ValueError, match="holds no finished latents"):
        Latents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="pooling is 'sum', allowed are own, none, mean, max, first"):
        latents(load(source().encoder), [np.zeros((4, 4, 3), np.uint8)], "sum")


def test_pairs_and_their_batches(data, tmp_path):
    def pairs_of(**sides):
        return load_samples(str(data), str(tmp_path), sides, limit=9)

    pairs = pairs_of(a=source(), b=source("caption"))
    assert {split: len(each) for split, each in pairs.items()} == {"train": 9, "val": 3, "test": 4}
    few, more = pairs["train"].subset(3, 1), pairs["train"].subset(6, 1)
    assert more.ids[:3] == few.ids and few.ids != pairs["train"].subset(3, 2).ids
    loader = SampleLoader(pairs["train"], 4, seed=0, world_size=2)
    first, second, third = (next(loader.batches(step)) for step in (0, 1, 2))
    stream = loader.batches()
    assert [next(stream)["keys"], next(stream)["keys"], next(stream)["keys"]] == [
        first["keys"],
        second["keys"],
        third["keys"],
    ]
    other = next(SampleLoader(pairs["train"], 4, seed=0, rank=1, world_size=2).batches())
    assert len({*first["keys"], *other["keys"]}) == 8 and first["keys"] != second["keys"]
    row = pairs["train"].ids.index(first["keys"][2])
    assert all(torch.equal(first["sides"][side][2], pairs["train"].sides[side][row]) for side in "ab")
    with pytest.raises(ValueError, match="batches have 10 samples, but there are 9"):
        SampleLoader(pairs["train"], 5, seed=0, world_size=2)
    with pytest.raises(ValueError, match=r"none-\w+/train has \[9, 2, 2, 3\] numbers, expected a vector a sample"):
        pairs_of(a=source("caption"), b=source(pooling="none"))
    names = tmp_path / source("caption").name / "val/ids.json"
    names.write_text(names.read_text().replace("02", "03"))
    with pytest.raises(
        ValueError, match=r"val has 3 samples and the first side 3; only one of them has \['\w*02', '\w*03'\]"
    ):
        pairs_of(a=source(), b=source("caption"))
