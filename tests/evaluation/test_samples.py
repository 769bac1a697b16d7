"""Sheets of held-out samples, with tokenizers that lose nothing and a sampler that knows the answer."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fourm.evaluation import samples
from fourm.evaluation.samples import SIZE, Predictions, Reconstructions
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.diffusion import DiffusionConfig
from fourm.tokenization.inputs import KINDS, InputConfig
from fourm.tokenization.quantizers import QuantizerConfig

spec = importlib.util.spec_from_file_location("world", Path(__file__).with_name("test_report.py"))
world = sys.modules["world"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(world)

GRIDS = world.SPACE.subset(["rgb", "tok_rgb", "elevation", "water"])


def cell(sheet, row, column):
    across, down = SIZE + 8, SIZE + 28  # with margins and titles
    return np.asarray(sheet)[row * down + 20 : (row + 1) * down - 8, column * across : column * across + SIZE]


class Knowing:
    """Reads the brightness out of the given patches, and derives the target from it."""

    wrong = 0

    def __init__(self, model):
        assert model == "model"

    def generate(self, known, plan):
        level = (known["rgb"].values.mean(2) * 0.5 + 0.5).mul(255).round().long() + self.wrong
        (target,) = {step.target for step in plan}
        return {target: {"elevation": 2 * level, "water": (level < 50).long()}[target]}


def test_predictions_stand_below_the_truth(monkeypatch):
    tokens, sheets = world.world(6)[1], []
    monkeypatch.setattr(samples, "Sampler", Knowing)
    for wrong in (0, -128):
        monkeypatch.setattr(Knowing, "wrong", wrong)
        sheets.append(Predictions(GRIDS, world.TOKENIZERS.get, tokens)("model", 0))
    (known, guessed) = (sheet["from_rgb"] for sheet in sheets)
    assert known.size == (3 * (SIZE + 8), 8 * (SIZE + 28))  # given, elevation and water of four samples
    for row in range(0, 8, 2):
        picture = tokens[row // 2 * 6 // 4]["rgb"]
        assert np.array_equal(cell(known, row, 0)[:: SIZE // 16, :: SIZE // 16], picture)
        for column in range(3):
            assert np.array_equal(cell(known, row, column), cell(known, row + 1, column))
            assert np.array_equal(cell(guessed, row, column), cell(known, row, column))
        assert not np.array_equal(cell(guessed, row, 2), cell(guessed, row + 1, 2))


def test_samples_that_lack_what_is_given_are_left_out():
    tokens = world.world(6)[1]
    words = [{"__key__": "words", "caption": sample.pop("caption")} for sample in tokens]
    shown = Predictions(world.SPACE, world.TOKENIZERS.get, words[1:] + tokens)
    assert shown.given == "rgb" and [sample["__key__"] for sample in shown.samples] == ["000", "001", "003", "004"]
    assert shown.targets == ["elevation", "water"]
    assert Predictions(world.SPACE, world.TOKENIZERS.get, words + tokens[1:]).given == "caption"
    with pytest.raises(ValueError, match="none of 2 samples has anything that may be given"):
        Predictions(world.SPACE, world.TOKENIZERS.get, [{"__key__": "a"}, {"__key__": "b"}])


def test_only_what_is_shown_needs_a_tokenizer(capsys):
    asked = []

    def load(name):
        asked.append(name)
        if name in ("elevation", "caption"):
            raise ValueError("no such folder")
        return world.TOKENIZERS[name]

    tokens = world.world(6)[1]
    shown = Predictions(GRIDS, load, tokens)
    assert asked == ["elevation", "water"] and shown.targets == ["water"]
    assert "samples: elevation is not shown: no such folder" in capsys.readouterr().out
    words = world.SPACE.subset(["caption", "water"])
    assert Predictions(words, load, tokens).given == "water"  # none of the tokenizers of captions
    with pytest.raises(ValueError, match="tokenizers: there is none of anything that samples may be given: caption"):
        Predictions(world.SPACE.subset(["caption"]), load, tokens)


def test_reconstructions_stand_below_originals():
    class Brighter(world.Blocks):
        def decode(self, ids):
            return super().decode(ids) + np.uint8(9)

    sheets = []
    for kind in (world.Blocks, Brighter):
        tokenizer = kind("image", 0, "")
        tokenizer.config.input.mask_value = None
        sheets.append(Reconstructions(world.world(20)[0], "rgb")(tokenizer, 0)["reconstructions"])
    exact, brighter = sheets
    assert exact.size == (8 * (SIZE + 8), 2 * (SIZE + 28))
    for column in range(8):
        assert np.array_equal(cell(exact, 0, column), cell(exact, 1, column))
        assert np.array_equal(cell(brighter, 0, column) + 9, cell(brighter, 1, column))


RAW = {
    "image": np.zeros((16, 16, 3), np.uint8),
    "normal": np.full((16, 16, 3), 200, np.uint8),
    "field": np.full((16, 16), 0.5, np.float32),
    "depth": np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16),
    "classes": np.zeros((16, 16), np.uint8),
    "mask": np.ones((16, 16), bool),
    "features": np.ones((16, 16, 3), np.float32),
    "spectrogram": np.sin(np.arange(16 * 64, dtype=np.float32)),
}
UNET = {"denoiser": "unet_patched", "denoiser_options": {"model_channels": 32, "num_res_blocks": 1,
        "channel_mult": (1, 1), "attention_resolutions": (2,)}, "diffusion": DiffusionConfig(steps=2)}  # fmt: skip
LOSS = {"classes": "cross_entropy", "mask": "binary_cross_entropy"}


@pytest.mark.parametrize(("kind", "denoiser"), [*((kind, {}) for kind in KINDS), ("depth", UNET)])
def test_reconstructions_while_training_in_bfloat16(kind, denoiser):
    source = InputConfig(kind, (16, 16), classes=3 * (kind == "classes"), window=128, hop=64)
    backbone = BackboneConfig(patch_size=8, width=8, heads=1)
    config = TokenizerConfig(source, QuantizerConfig("fsq"), backbone, loss=LOSS.get(kind, "mse"), **denoiser)
    dataset = [{"__key__": str(row), "raw": RAW[kind]} for row in range(2)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        page = Reconstructions(dataset, "raw")(ImageTokenizer(config).eval(), 0)["reconstructions"]
    assert page.height == 2 * (SIZE + 28)
