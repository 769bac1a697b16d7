"""Raw shards to token shards: right ids, resumable, refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fourm.data.shards import ShardDataset, write_shards
from fourm.tokenization.autoencoder import ImageTokenizer, InputConfig, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.encode import TokenizeConfig, tokenize
from fourm.tokenization.quantizers import QuantizerConfig
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import fit_text_tokenizers

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
TABLE = {
    "rgb": {"kind": "patches", "grid": [2, 2], "patch_size": 8},
    "tok_rgb": {"kind": "grid", "grid": [2, 2], "vocab_size": 64, "source": "rgb"},
    "caption": {"kind": "text", "vocab": "text", "max_tokens": 16, "vocab_size": 0},
}


@pytest.fixture
def config(tmp_path):
    samples = [{"__key__": f"k{i}", "rgb": image, "caption": f"picture {i}"} for i, image in enumerate(IMAGES)]
    write_shards(tmp_path / "raw", "val", samples, shard_size=3)
    torch.manual_seed(0)
    rgb = TokenizerConfig(InputConfig("image", (16, 16)), QuantizerConfig(levels=(4, 4, 4)), BackboneConfig(width=32))
    ImageTokenizer(rgb).save_pretrained(tmp_path / "tokenizers/rgb")
    text = fit_text_tokenizers(samples, {"caption": CodecConfig("caption")}, vocab_size=120, bins=8, sentinels=8)
    text["caption"].save_pretrained(tmp_path / "tokenizers/caption")
    table = {**TABLE, "caption": {**TABLE["caption"], "vocab_size": text["caption"].vocab_size}}
    (tmp_path / "modalities.yaml").write_text(yaml.safe_dump(table))
    return TokenizeConfig(
        data=str(tmp_path / "raw"),
        output=str(tmp_path / "tokens"),
        modalities=str(tmp_path / "modalities.yaml"),
        tokenizers=str(tmp_path / "tokenizers"),
        splits=("val",),
        shard_size=4,
        batch_size=3,
    )


def test_tokens_are_those_of_the_tokenizers(config):
    tokenize(config)
    tokens = ShardDataset(Path(config.output) / "val", ["rgb", "tok_rgb", "caption"])
    assert list(tokens.keys) == [f"k{i}" for i in range(7)]
    expected = ImageTokenizer.from_folder(Path(config.tokenizers) / "rgb").encode(IMAGES)
    for i in range(7):
        sample = tokens[i]
        assert sample["tok_rgb"].tolist() == [expected[i].tolist()] and sample["tok_rgb"].dtype == np.int16
        np.testing.assert_array_equal(sample["rgb"], IMAGES[i])
        assert sample["caption"].ndim == 1
    assert (Path(config.output) / "modalities.yaml").exists()


def test_finished_shards_are_kept_and_missing_ones_made(config):
    tokenize(config)
    shards = sorted(Path(config.output).rglob("*.tar"))
    assert len(shards) == 6 and not list(Path(config.output).rglob("*.tmp"))
    content = {shard: shard.read_bytes() for shard in shards}
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    shards[-1].unlink()
    tokenize(config)
    assert {shard: shard.read_bytes() for shard in shards} == content
    kept = [shard for shard in shards if shard.name == "shard-000000.tar"]
    assert len(kept) == 3 and all(shard.stat().st_mtime_ns == times[shard] for shard in kept)


def test_refuses_to_mix(config):
    tokenize(config)
    with pytest.raises(ValueError, match="another configuration"):
        tokenize(dataclasses.replace(config, shard_size=2))
    rgb = ImageTokenizer.from_folder(Path(config.tokenizers) / "rgb")
    torch.nn.init.normal_(rgb.encoder.latents.weight)
    rgb.save_pretrained(Path(config.tokenizers) / "rgb")
    with pytest.raises(ValueError, match="another configuration"):
        tokenize(config)


def test_refuses_a_tokenizer_that_does_not_fit_the_table(config):
    table = yaml.safe_load(Path(config.modalities).read_text())
    table["tok_rgb"]["vocab_size"] = 65
    Path(config.modalities).write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match="tok_rgb: the modality table says 65 ids"):
        tokenize(config)


def test_bad_raw_data_are_named(config):
    bad = [{"__key__": "b", "rgb": np.zeros((8, 8, 3), np.uint8), "caption": "x"}]
    write_shards(config.data, "val", bad, shard_size=3, first_shard=3)
    with pytest.raises(ValueError, match=r"tok_rgb, sample 'b': image 0: expected uint8 image 16x16x3"):
        tokenize(config)
