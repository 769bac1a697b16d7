import numpy as np
import pytest
import torch

from fourm.generation.decode import decode, kind_of, picture
from fourm.tokenization.autoencoder import ImageTokenizer, InputConfig, TokenizerConfig
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import TextTokenizer, train_text_tokenizer


class Doubler:
    def decode(self, ids):
        return 2 * np.asarray(ids)


def test_every_modality_goes_through_its_own_tokenizer():
    raw = decode({"depth": torch.tensor([[1, 2]])}, {"depth": Doubler()})
    assert raw["depth"].tolist() == [[2, 4]]
    with pytest.raises(ValueError, match="no tokenizer for caption, there are depth"):
        decode({"caption": [torch.tensor([1])]}, {"depth": Doubler()})


def test_images_keep_their_pixels():
    raw = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    for kind in ("image", "normal"):
        drawn = picture(kind, raw, size=16)
        assert drawn.size == (32, 16)
        assert (np.asarray(drawn)[::2, ::2] == raw).all()
    assert np.asarray(picture("image", raw[..., 0], size=8)).shape == (8, 16, 3)


def test_fields_use_one_scale():
    raw = np.array([[0.0, 5.0], [10.0, np.nan]], dtype=np.float32)
    pixels = np.asarray(picture("field", raw, size=2, low=0, high=10))
    assert (pixels[0, 0], pixels[1, 0])[0].tolist() == [68, 1, 84]  # both ends of viridis
    assert pixels[1, 0].tolist() == [253, 231, 37]
    assert pixels[1, 1].tolist() == [0, 0, 0]
    assert len(np.unique(np.asarray(picture("field", np.full((4, 4), 7), size=4)))) > 0  # a constant field


def test_classes_have_their_own_colours():
    raw = np.arange(36, dtype=np.uint8).reshape(6, 6)
    pixels = np.asarray(picture("classes", raw, size=6)).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) == 36
    assert pixels[0].tolist() == [31, 119, 180]


def test_palettes_are_swatches():
    pixels = np.asarray(picture("palette", [[255, 0, 0], [0, 0, 255]], size=10))
    assert (pixels[:, :5] == [255, 0, 0]).all() and (pixels[:, 5:] == [0, 0, 255]).all()
    assert (np.asarray(picture("palette", [], size=4)) == 255).all()


def test_places_are_dots_where_they_are():
    pixels = np.asarray(picture("places", [{"name": "A", "x": 0.25, "y": 0.75}], size=100))
    assert pixels[75, 25].tolist() == [220, 20, 60]
    assert (pixels[:50] == 255).all()


@pytest.mark.parametrize(
    ("kind", "raw"), [("caption", "word " * 200), ("caption", ""), ("metadata", {"latitude": 1.5, "name": "x"})]
)
def test_texts_are_drawn(kind, raw):
    drawn = picture(kind, raw, size=128)
    assert drawn.size == (128, 128)
    assert (np.asarray(drawn) < 128).any() == bool(raw)


def test_unknown_kinds():
    with pytest.raises(ValueError, match="kind is 'sound', allowed are field, image"):
        picture("sound", None)


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
    for name, kind in (("rgb", "image"), ("caption", "caption"), ("palette", "palette")):
        assert kind_of(tokenizers[name]) == kind
        assert picture(kind, raw[name][0], size=64).size == (64, 64)
