"""Tokenizers of 4M: containers, names, raw data of every domain, refusals. Numbers are checked by the fixtures."""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from fourm.modalities import Modality, TokenSpace
from fourm.official_files import read_official
from fourm.tokenization import Tokenizer, load_tokenizer
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.encode import load_tokenizers
from fourm.tokenization.official import VITS, VitPreset, from_official, official_tensors, tokenizer_config
from fourm.tokenization.task import TokenizerTask
from fourm.tokenization.uvit import UVITS

RNG = np.random.default_rng(0)
SMALL = {"image_size": 32, "image_size_enc": None, "patch_size": 16, "enc_type": "vit_t_enc", "dec_type": "vit_t_dec",
         "post_mlp": True, "codebook_size": 32, "latent_dim": 8, "sync_codebook": False}  # fmt: skip
MLP = SMALL | {"enc_type": "BottleneckMLP/B_2-Wi_16", "dec_type": "BottleneckMLP/B_2-Wi_16", "quant_type": "memcodes"}


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    monkeypatch.setitem(VITS, "vit_t", VitPreset(32, 1, 2))


def official(config, domain="rgb", seed=0):
    """Random weights under 4M's names."""
    torch.manual_seed(seed)
    return {
        key: value.clone() for key, value in official_tensors(ImageTokenizer(tokenizer_config(config, domain))).items()
    }


# Domain, config, raw data, grid, and the smallest and largest values that the network sees.
DOMAINS = {
    "rgb_16k_224-448": (SMALL, RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), (2, 2), (-1, 1)),
    "normal_8k_224-448": (SMALL, RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), (2, 2), (-1, 1)),
    "edge_8k_224-512": (SMALL | {"n_channels": 1}, RNG.integers(0, 256, (2, 32, 32), dtype=np.uint8), (2, 2), (-1, 1)),
    "depth_8k_224-448": (SMALL | {"n_channels": 1}, RNG.integers(0, 65536, (2, 32, 32), dtype=np.uint16), (2, 2), None),
    "semseg_4k_224-448": (SMALL | {"n_channels": 12, "n_labels": 6},
                          RNG.choice(np.uint8([255, 0, 1, 2, 3, 4]), (2, 32, 32)), (2, 2), (0, 5)),
    "CLIP-B16_8k_224-448": (SMALL | {"n_channels": 24, "patch_proj": False},
                            RNG.standard_normal((2, 2, 2, 24), dtype=np.float32), (2, 2), None),
    "DINOv2-B14-global_8k_16_224": (MLP | {"n_channels": 24, "num_codebooks": 4},
                                    RNG.standard_normal((2, 24), dtype=np.float32), (4, 1), None),
    "human-poses_1k_8": (MLP | {"n_channels": 207, "num_codebooks": 8},
                         RNG.standard_normal((2, 207), dtype=np.float32), (8, 1), None),
    "sam-instance_1k_64": (SMALL | {"n_channels": 1, "out_conv": True}, RNG.random((2, 32, 32)) > 0.5, (2, 2), (0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", DOMAINS)
def test_raw_data_of_every_domain(name, tmp_path):
    config, raw, grid, limits = DOMAINS[name]
    folder = tmp_path / f"4M_tokenizers_{name}"
    folder.mkdir()
    tensors = official(config, name.split("_")[0])
    save_file(tensors, folder / "model.safetensors", metadata={key: str(value) for key, value in config.items()})
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.grid == grid and tokenizer.vocab_size == 32 and not tokenizer.training
    x = tokenizer.preprocess(raw)
    if limits:
        assert (float(x.min()), float(x.max())) == pytest.approx(limits)
    ids = tokenizer.encode(raw)
    assert ids.shape == (2, grid[0] * grid[1])
    decoded = tokenizer.decode(ids)
    assert decoded.shape == raw.shape and decoded.dtype == {"depth": np.float32, "semseg": np.int64}.get(
        name.split("_")[0], raw.dtype
    )

    tokenizer.save_pretrained(tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert again.config == tokenizer.config and torch.equal(again.encode(raw), ids)
    assert all(torch.equal(value, tensors[key]) for key, value in official_tensors(again).items())


def test_depth_by_hand():
    """The middle of 0..9 after cutting a tenth on each side is 1..8: mean 4.5, variance 6."""
    tokenizer = ImageTokenizer(tokenizer_config(SMALL | {"n_channels": 1}, "depth"))
    raw = np.tile(np.arange(10, dtype=np.float32), 103)[:1024].reshape(32, 32)
    x = tokenizer.preprocess([raw, 3 * raw + 7])
    middle = np.sort(raw.ravel())[102:921]
    expected = (raw - middle.mean()) / np.sqrt(middle.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(x[0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(x[1, 0], x[0, 0], atol=1e-5)
    coded = (raw * 5000).astype(np.uint16)
    assert torch.equal(tokenizer.preprocess([coded]), tokenizer.preprocess([coded.astype(np.float32) / 65535]))


def test_masks_come_back_as_probabilities_and_train():
    config, raw, _, _ = DOMAINS["sam-instance_1k_64"]
    tokenizer = from_official(config, official(config, "sam_instance"), "sam_instance")
    ids = tokenizer.encode(raw)
    probabilities = tokenizer.decode_probabilities(ids)
    assert probabilities.shape == (2, 1, 32, 32) and 0 < probabilities.min() < probabilities.max() < 1
    np.testing.assert_array_equal(probabilities[:, 0] > 0.5, tokenizer.decode(ids))
    task = TokenizerTask(tokenizer.train(), "m")
    batch = task.collate([{"__key__": "a", "m": mask} for mask in raw], [(0, 0)] * len(raw))
    task.loss(batch, task.counts(batch))["loss"].backward()
    with pytest.raises(ValueError, match="bool or integers 0 and 1 or 0 and 255, got uint8 2x32x32 in"):
        tokenizer.encode(7 * raw.astype(np.uint8))


def test_other_sizes():
    tokenizer = from_official(SMALL, official(SMALL))
    wide = RNG.integers(0, 256, (1, 32, 64, 3), dtype=np.uint8)
    ids = tokenizer.encode(wide)
    assert ids.shape == (1, 8) and tokenizer.decode(ids, (2, 4)).shape == wide.shape
    with pytest.raises(ValueError, match=r"expected integer ids \(B, 4\)"):
        tokenizer.decode(ids)
    tokenizer.use_grid((2, 4))
    assert tokenizer.grid == (2, 4) and tokenizer.decode(ids).shape == wide.shape
    with pytest.raises(ValueError, match="32x40x3 has sides that are no multiples of 16"):
        tokenizer.encode(np.zeros((1, 32, 40, 3), np.uint8))


def test_the_modality_table_chooses_the_grid(tmp_path):
    for name in ("rgb_16k_224-448", "DINOv2-B14-global_8k_16_224"):
        config = DOMAINS[name][0]
        folder = tmp_path / f"4M_tokenizers_{name}"
        folder.mkdir()
        save_file(official(config, name), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    rows = {
        "large": Modality("grid", vocab_size=32, grid=(4, 4), tokenizer="4M_tokenizers_rgb_16k_224-448"),
        "global": Modality("grid", vocab_size=32, grid=(2, 2), tokenizer="4M_tokenizers_DINOv2-B14-global_8k_16_224"),
    }
    loaded = load_tokenizers(TokenSpace(rows), tmp_path)
    assert loaded["large"].encode(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 16)
    assert loaded["large"].config.input.size == (64, 64) and loaded["global"].grid == (2, 2)
    with pytest.raises(ValueError, match=r"grid is \(3, 2\)"):
        loaded["global"].use_grid((3, 2))


class Mixin(nn.Module):
    """As a hub export stores a module: tensors that share memory once."""

    def __init__(self, tensors):
        super().__init__()
        for key, value in tensors.items():
            self.register_buffer(key.replace(".", "/"), value)


@pytest.mark.parametrize("container", ["header", "file", "hub", "pth", "old_pth"])
def test_containers(container, tmp_path):
    tensors, folder = official(SMALL), tmp_path / "4M_tokenizers_rgb_16k"
    folder.mkdir()
    path = folder
    if container in ("header", "file"):
        save_file(
            tensors, folder / "model.safetensors", metadata={"format": "pt"} | {k: str(v) for k, v in SMALL.items()}
        )
        path = folder / "model.safetensors" if container == "file" else folder
    elif container == "hub":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(SMALL))
    else:
        renamed = {"enc_type": "encoder_type", "dec_type": "decoder_type", "image_size": "input_size_max",
                   "quant_type": "quantizer_type", "image_size_enc": "input_size_enc"}  # fmt: skip
        args = {renamed.get(key, key): value for key, value in SMALL.items()}
        args |= {"domain": "rgb", "input_size": 16, "mask_size": 64, "lr": 1e-4, "scheduler": "cosine"}
        tensors_then = {key.replace("quant_proj.", "quant_conv."): value for key, value in tensors.items()}
        path = folder / "checkpoint-final.pth"
        torch.save({"model": tensors_then, "args": argparse.Namespace(**args), "epoch": 3}, path,
                   _use_new_zipfile_serialization=container == "pth")  # fmt: skip
    tokenizer = load_tokenizer(path)
    assert all(torch.equal(value, tensors[key]) for key, value in official_tensors(tokenizer).items())
    assert tokenizer.config == dataclasses.replace(tokenizer_config(SMALL, "rgb"))


def test_dropped_aliases_are_filled_in(tmp_path):
    """A UViT registers one convolution twice, which a hub export stores once."""
    torch.manual_seed(0)
    module = Mixin({"a": torch.ones(2), "b.c": torch.zeros(3)})
    module.register_buffer("again", getattr(module, "b/c"))
    save_model(module, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"enc_type": "vit_b_enc"}')
    config, tensors = read_official(tmp_path)
    assert config == {"enc_type": "vit_b_enc"} and set(tensors) == {"a", "b/c", "again"}
    assert torch.equal(tensors["again"], torch.zeros(3))


def test_a_diffusion_tokenizer_trains_saves_and_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(UVITS, "uvit_t", {"patch_size": 4, "block_out_channels": [32, 32], "layers_per_block": 1,
                                         "downsample_before_mid": True, "mid_layers": 1, "mid_num_heads": 2,
                                         "mid_dim": 32, "mid_mlp_ratio": 2, "mid_hw_posemb": 4})  # fmt: skip
    config = SMALL | {"dec_type": "uvit_t", "beta_schedule": "shifted_cosine:0.5", "scheduler": "ddim",
                      "prediction_type": "v_prediction", "conditioning": "concat"}  # fmt: skip
    tokenizer = from_official(config, official(config))
    raw = DOMAINS["rgb_16k_224-448"][1]
    task = TokenizerTask(tokenizer.train(), "x")
    batch = task.collate([{"__key__": "a", "x": image} for image in raw], [(0, 0)] * len(raw))
    losses = task.loss(batch, task.counts(batch))
    losses["loss"].backward()
    assert losses["loss/reconstruction"] > 0 and tokenizer.encoder.patches.weight.grad.abs().sum() > 0
    ids = tokenizer.eval().encode(raw)
    images = tokenizer.decode(ids, steps=2, generator=torch.Generator().manual_seed(0))
    assert images.shape == raw.shape and images.dtype == np.uint8
    twice = {key for key in official(config) if "downsample_mid.Conv2d_0" in key}
    assert twice and from_official(config, {key: value for key, value in official(config).items() if key not in twice})
    tokenizer.save_pretrained(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t").decode(ids, steps=2, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(again, images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_type": "vit_x_enc"}, "encoder 'vit_x_enc', decoder 'vit_t_dec': allowed are vit_s"),
        ({"quant_type": "lfq"}, "quant_type 'lfq'"),
        ({"num_codebooks": 2}, "'lucid' with one"),
        ({"dec_type": "unet", "beta_schedule": "linear"}, "diffusion decoder is 'unet'"),
        ({"sd_path": "x"}, "ControlNet"),
    ],
)
def test_refuses_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ImageTokenizer(tokenizer_config(SMALL | change, "rgb"))


def test_refusals(tmp_path):
    tensors = official(SMALL)
    with pytest.raises(ValueError, match=re.escape("domain is None; for images of 1 channel(s)")):
        from_official(SMALL, official(SMALL | {"n_channels": 1}, "edge"))
    with pytest.raises(ValueError, match=r"missing \['quant_proj.bias'\], unknown \['x'\]"):
        from_official(
            SMALL,
            {key: value for key, value in tensors.items() if key != "quant_proj.bias"}
            | {"x": tensors["quant_proj.bias"]},
        )
    with pytest.raises(ValueError, match=r"quantize._codebook.embed \(32, 8\) where \(16, 8\)"):
        from_official(SMALL | {"codebook_size": 16}, tensors)
    with pytest.raises(ValueError, match="not a tokenizer of 4M"):
        from_official(SMALL, {"encoder.x": torch.ones(1)})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no config"):
        load_tokenizer(tmp_path)
    torch.save({"model": tensors, "args": argparse.Namespace(path=Path("."))}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="it holds a pathlib"):
        load_tokenizer(tmp_path / "a.pth")
    torch.save({"state_dict": tensors}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="expected a dict with 'model' and 'args'"):
        load_tokenizer(tmp_path / "b.pth")
    (tmp_path / "c.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_tokenizer(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"expected a \.safetensors or .pth file"):
        read_official(tmp_path / "d.bin")


def test_configs_survive_json():
    for config, *_ in DOMAINS.values():
        ours = tokenizer_config(config, "depth")
        assert TokenizerConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(ours)))) == ours
