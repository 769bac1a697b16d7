"""Tokenizer figures against values worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fourm.evaluation.tokenizers import evaluate_tokenizer, score, unit
from fourm.tokenization.quantizers import Quantizer, QuantizerConfig
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import TextTokenizer, train_text_tokenizer


def settings(kind, classes=0, units="", values=()):
    return SimpleNamespace(
        input=SimpleNamespace(kind=kind, classes=classes, units=units, values=values, mask_value=None)
    )


class Coarse:
    """One token per pixel: heights rounded down to a multiple of 10."""

    config, vocab_size, grid = settings("field", units="metres"), 8, (2, 2)
    quantizer = Quantizer(QuantizerConfig("vq", codebook_size=8))
    targets = staticmethod(np.stack)

    def encode(self, pictures):
        return torch.from_numpy(np.asarray(pictures).reshape(len(pictures), 4) // 10)

    def decode(self, ids):
        return (np.asarray(ids) * 10.0).reshape(-1, 2, 2)


def test_field_tokenizer_in_its_own_unit():
    heights = [np.array([[10, 24], [38, 10]]), np.array([[10, 20], [30, 12]])]
    dataset = [{"__key__": str(i), "height": heights[i % 2]} for i in range(6)]
    figures = evaluate_tokenizer(Coarse(), dataset, "height", n=6)
    assert figures["mae_m"] == pytest.approx((4 + 8 + 0 + 0 + 0 + 0 + 0 + 2) / 8)
    assert figures["codebook_use"] == pytest.approx(3 / 8)
    shares = np.array([4, 2, 2]) / 8
    assert figures["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_classes_with_raw_values_of_their_own_are_scored_as_classes():
    tokenizer = SimpleNamespace(config=settings("classes", 2, values=(0, 255)))
    truth, guess = np.array([[[0, 255, 255, 0]]], np.uint8), np.array([[[255, 255, 255, 0]]])
    assert score(tokenizer, guess, truth) == pytest.approx(
        {"accuracy": 0.75, "miou": (1 / 2 + 2 / 3) / 2, "iou": 2 / 3}
    )


def test_units_can_stand_in_the_name_of_a_figure():
    assert unit(SimpleNamespace(config=settings("field", units="Linke turbidity"))) == "linke_turbidity"
    assert unit(SimpleNamespace(config=settings("field", units="m"))) == "m"


def test_text_tokenizer_round_trip():
    texts = ["a green hill", "a green lake", "the hill"]
    tokenizer = TextTokenizer(train_text_tokenizer(texts, 200, bins=4, sentinels=4), CodecConfig("caption"))
    figures = evaluate_tokenizer(tokenizer, [{"__key__": str(i), "caption": t} for i, t in enumerate(texts)], "caption")
    assert figures["round_trip"] == 1 and figures["unknown_share"] == 0
    assert figures["tokens_max"] == max(len(ids) for ids in tokenizer.encode(texts))
    dataset = [{"__key__": "0", "caption": "水 hill"}]
    assert evaluate_tokenizer(tokenizer, dataset, "caption")["unknown_share"] > 0
