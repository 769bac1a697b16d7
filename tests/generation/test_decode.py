from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fourm.generation.decode import decode, picture, words
from fourm.tokenization.autoencoder import ImageTokenizer, InputConfig, TokenizerConfig
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import TextTokenizer, train_text_tokenizer


class Doubler:
    def decode(self, ids):
        return 2 * np.asarray(ids)


def test_every_modality_goes_through_its_own_tokenizer():
    raw = decode({"depth": torch.tensor([[1, 2]])}, {"depth": Doubler()})
    assert raw["depth"].tolist() == [[2, 4]]


def images(**settings):
    return SimpleNamespace(config=SimpleNamespace(input=InputConfig(**settings)))


def texts(codec):
    return SimpleNamespace(config=CodecConfig(codec))


def test_images_keep_their_pixels():
    raw = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    for tokenizer in (None, images(), images(kind="normal")):
        drawn = picture(tokenizer, raw, size=16)
        assert drawn.size == (32, 16)
        assert (np.asarray(drawn)[::2, ::2] == raw).all()
    assert (np.asarray(picture(images(channels=1), raw[..., 0], size=8)) == raw[..., :1]).all()
    edges = images(kind="classes", classes=2, values=(0, 255))
    assert (np.asarray(picture(edges, 255 * (raw[..., 0] > 99), size=8)) == 255 * (raw[..., :1] > 99)).all()


def test_fields_use_one_scale():
    raw = np.array([[0.0, 5.0], [10.0, 99.0]], dtype=np.float32)
    pixels = np.asarray(picture(images(kind="field"), raw, size=2, low=0, high=10))
    assert pixels[0, 0].tolist() == [68, 1, 84]  # both ends of viridis
    assert pixels[1, 0].tolist() == pixels[1, 1].tolist() == [253, 231, 37]
    assert picture(images(kind="field"), np.full((4, 4), 7), size=4).size == (4, 4)  # a constant field


def test_classes_have_their_own_colours():
    raw = np.arange(36, dtype=np.uint8).reshape(6, 6)
    pixels = np.asarray(picture(images(kind="classes", classes=36), raw, size=6)).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) == 36
    assert pixels[0].tolist() == [31, 119, 180]
    water = np.asarray(picture(images(kind="classes", classes=2), np.array([[0, 1]]), size=1))
    assert water[0].sum(-1).tolist() == [174 + 199 + 232, 31 + 119 + 180]


def test_palettes_are_swatches():
    pixels = np.asarray(picture(texts("palette"), [[255, 0, 0], [0, 0, 255]], size=10))
    assert (pixels[:, :5] == [255, 0, 0]).all() and (pixels[:, 5:] == [0, 0, 255]).all()


@pytest.mark.parametrize(
    ("codec", "raw"), [("caption", "word " * 200), ("metadata", {"latitude": 1.5}), ("palette", []), ("places", [])]
)
def test_texts_are_drawn(codec, raw):
    drawn = picture(texts(codec), raw, size=128)
    assert drawn.size == (128, 128)
    assert (np.asarray(drawn) < 128).any()


def test_words():
    assert words({"mean_height": 12.3456, "n": 3}) == "mean height 12.35\nn 3"
    assert (
        words([{"name": "Bern", "x": 0, "y": 0}, {"name": "Thun", "x": 1, "y": 1}]) == "Bern 0.00 0.00\nThun 1.00 1.00"
    )
    assert words([]) == "none"
    assert words([[1, 2, 3]]) == ""


def test_real_tokenizers_from_ids_to_pictures():
    texts = ["v0=1 v0=2 v0=3", "a lake beside a wood"]
    words = train_text_tokenizer(texts * 20, vocab_size=400, bins=64, sentinels=4)
    tokenizers = {
        "rgb": ImageTokenizer(TokenizerConfig(input=InputConfig("image", size=(64, 64)))).eval(),
        "caption": TextTokenizer(words, CodecConfig("caption")),
        "palette": TextTokenizer(words, CodecConfig("palette", bins=64)),
    }
    caption, palette = (torch.from_numpy(tokenizers[n].encode([v])[0]) for n, v in
                        (("caption", texts[1]), ("palette", [[255, 0, 0], [0, 0, 255]])))  # fmt: skip
    rgb = torch.zeros(1, tokenizers["rgb"].grid[0] * tokenizers["rgb"].grid[1], dtype=torch.long)
    raw = decode({"rgb": rgb, "caption": [caption], "palette": [palette]}, tokenizers)
    assert raw["rgb"].shape == (1, 64, 64, 3)
    assert raw["caption"] == [texts[1]]
    assert np.allclose(raw["palette"][0], [[255, 0, 0], [0, 0, 255]], atol=4)
    for name, tokenizer in tokenizers.items():
        assert picture(tokenizer, raw[name][0], size=64).size == (64, 64)
