"""Tokenizer training through its verb: diffusion decoders, frozen encoders, sizes, masks, losses, resuming."""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from fourm.checkpoint import latest as checkpoint_of
from fourm.data.shards import write_shards
from fourm.tokenization import autoencoder, load_tokenizer, task
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.controlnet import ControlNetDecoder, stable_diffusion
from fourm.tokenization.diffusion import DiffusionConfig
from fourm.tokenization.inputs import InputConfig, resize, resize_raw
from fourm.tokenization.losses import Perceptual, PerceptualConfig
from fourm.tokenization.quantizers import QuantizerConfig
from fourm.tokenization.task import Crops, Sizes, TokenizerTask, Views, start_from
from fourm.training.optim import OptimConfig
from fourm.verbs import tokenizer as verb

RNG = np.random.default_rng(0)
SIDE = 32
BACKBONE = BackboneConfig(patch_size=8, width=16, heads=2, encoder="vit", positions="sincos")
BASE = TokenizerConfig(InputConfig("image", (SIDE, SIDE)), QuantizerConfig("vq", codebook_size=16, dim=8), BACKBONE)
NOISE = DiffusionConfig(scheduler="ddim", steps=2, cls_free_guidance_dropout=0.5, masked_cfg=True)
UNET = {"denoiser": "unet_patched", "denoiser_options": {"model_channels": 32, "num_res_blocks": 1,
        "channel_mult": (1, 1), "attention_resolutions": (2,)}, "loss": "mse", "diffusion": NOISE}  # fmt: skip
UVIT = {"denoiser": "uvit_b_p4_f8", "denoiser_options": {"block_out_channels": (32, 32), "layers_per_block": 1,
        "mid_layers": 1, "mid_num_heads": 2, "mid_dim": 32, "mid_hw_posemb": 4}, "loss": "mse",
        "diffusion": dataclasses.replace(NOISE, beta_schedule="shifted_cosine:0.5")}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("test", 4)):
        small = RNG.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        samples = [
            {"__key__": f"k{i}", "rgb": np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE))),
             "depth": RNG.random((SIDE, SIDE), dtype=np.float32),
             "seen": (RNG.random((SIDE, SIDE)) < 0.8).astype(np.uint8)}
            for i, pixels in enumerate(small)
        ]  # fmt: skip
        write_shards(root, split, samples, shard_size=16)
    return root


def train(data, folder, tokenizer=BASE, modality="rgb", steps=2, **options):
    given = {"batch_size": 6, "optim": OptimConfig(lr=1e-2, warmup=1), "log_every": 1, "seed": 3, "precision": "fp32"}
    config = verb.Config(data=str(data), modality=modality, folder=str(folder), tokenizer=tokenizer, steps=steps,
                         test_samples=4, **given | options)  # fmt: skip
    verb.run(config)
    figures = json.loads((folder / "metrics.json").read_text())
    return load_tokenizer(folder), figures


def encoder_of(tokenizer):
    return {k: v for k, v in tokenizer.state_dict().items() if k.startswith(("encoder.", "quantizer."))}


@pytest.mark.parametrize("decoder", [UNET, UVIT], ids=["unet", "uvit"])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_a_diffusion_decoder_is_trained_and_measured(decoder, prediction, data, tmp_path):
    noise = dataclasses.replace(decoder["diffusion"], prediction_type=prediction)
    if prediction == "epsilon":
        noise = dataclasses.replace(noise, zero_terminal_snr=False, beta_schedule="linear", guidance=2.0)
    config = dataclasses.replace(BASE, **decoder | {"diffusion": noise})
    tokenizer, figures = train(data, tmp_path, config)
    assert tokenizer.diffusion.config.steps == 2 and 0 < figures["psnr"] < 50
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["batch_codebook_use"] <= 1 <= line["batch_perplexity"] <= 16 for line in log)


def test_a_diffusion_decoder_on_a_frozen_encoder(data, tmp_path):
    base, _ = train(data, tmp_path / "base")
    config = dataclasses.replace(BASE, **UNET)
    options = {"init": str(tmp_path / "base"), "freeze": "encoder", "ema": 0.5}
    tokenizer, _ = train(data, tmp_path / "unet", config, **options)
    for name, value in encoder_of(base).items():
        assert torch.equal(encoder_of(tokenizer)[name], value), name
    untrained, _ = train(data, tmp_path / "none", config, **options, steps=0)
    moved = [not torch.equal(a, b) for a, b in zip(tokenizer.decoder.parameters(), untrained.decoder.parameters(),
                                                   strict=True)]  # fmt: skip
    assert sum(moved) > 10
    with pytest.raises(ValueError, match="no `init` to take it from"):
        train(data, tmp_path / "wrong", config, freeze="encoder")


def test_frozen_parts_stay_in_evaluation_mode():
    tokenizer = ImageTokenizer(BASE)
    tokenizer.freeze_encoder()
    assert tokenizer.train() is tokenizer
    assert tokenizer.decoder.training and not tokenizer.encoder.training and not tokenizer.quantizer.training
    assert all(p.requires_grad == name.startswith("decoder.") for name, p in tokenizer.named_parameters())


def test_starting_from_another_tokenizer():
    torch.manual_seed(0)
    small = dataclasses.replace(BASE, input=InputConfig("image", (16, 16)))
    first, second = ImageTokenizer(small), ImageTokenizer(BASE)
    table = second.encoder.body.positions.clone()
    assert start_from(second, first) and torch.equal(second.encoder.body.positions, table)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = ImageTokenizer(dataclasses.replace(BASE, **UNET))
    assert not start_from(other, first) and torch.equal(other.encoder.patches.weight, first.encoder.patches.weight)
    for change in ({"backbone": dataclasses.replace(BACKBONE, width=32)}, {"quantizer": QuantizerConfig()},
                   {"input": InputConfig("image", (SIDE, SIDE), mean=(0.4,))}):  # fmt: skip
        with pytest.raises(ValueError, match="the tokenizers differ in"):
            start_from(ImageTokenizer(dataclasses.replace(BASE, **change)), first)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_another_size_every_update(accumulate, data, tmp_path, monkeypatch):
    seen = []
    latents = ImageTokenizer.latents
    monkeypatch.setattr(ImageTokenizer, "latents", lambda self, x: (seen.append((self.training, x.shape[-1])),
                                                                    latents(self, x))[1])  # fmt: skip
    sizes = Sizes(16, 32, 8)
    tokenizer, figures = train(data, tmp_path, steps=6, sizes=sizes, accumulate=accumulate)
    sides = [sizes.draw(3, update)[0] for update in range(6)]
    assert [side for training, side in seen if training] == [side for side in sides for _ in range(accumulate)]
    assert len(set(sides)) > 1 and {side for training, side in seen if not training} == {16, 32}
    assert {"psnr_16", "psnr_32", "perplexity_16"} <= set(figures) and tokenizer.grid == (4, 4)


def test_sizes_that_do_not_fit(data, tmp_path):
    with pytest.raises(ValueError, match="high - low must be a multiple of step"):
        Sizes(16, 30, 8)
    with pytest.raises(ValueError, match="sizes up to 24 need an input of this size"):
        train(data, tmp_path, sizes=Sizes(16, 24, 8))
    counts = np.bincount([Sizes(16, 32, 8).draw(0, update)[0] // 8 - 2 for update in range(600)])
    assert len(counts) == 3 and counts.min() > 150


def test_resizing():
    rgb, ids = RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8), RNG.integers(0, 9, (2, 8, 8))
    means = rgb.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).round()
    np.testing.assert_array_equal(resize_raw(rgb, (4, 4), InputConfig()), means)
    classes = resize_raw(ids, (4, 4), InputConfig("classes", classes=9))
    assert classes.dtype == ids.dtype and set(classes.ravel()) <= set(ids.ravel())
    torch.testing.assert_close(resize(torch.from_numpy(ids), (4, 4), InputConfig("classes", classes=9)),
                               torch.from_numpy(classes))  # fmt: skip
    normals = resize(torch.randn(2, 3, 8, 8), (4, 4), InputConfig("normal", scale=0.5))
    torch.testing.assert_close(normals.norm(dim=1), torch.full((2, 4, 4), 2.0))
    with pytest.raises(ValueError, match="8x8 pixels are smaller than 16x16"):
        resize(torch.randn(2, 3, 8, 8), (16, 16), InputConfig())


MASKED = dataclasses.replace(BASE, input=InputConfig("field", (SIDE, SIDE), mask_value=-2.0))


def test_invalid_pixels_are_neither_seen_nor_judged(data, tmp_path):
    tokenizer, figures = train(data, tmp_path, MASKED, "depth", mask="seen")
    assert 0 < figures["mae"] < 1
    raw, seen = RNG.random((3, SIDE, SIDE), dtype=np.float32), RNG.random((3, SIDE, SIDE)) < 0.7
    other = np.where(seen, raw, np.float32(np.nan))
    x = tokenizer.preprocess(raw, seen)
    assert x.shape == (3, 2, SIDE, SIDE) and torch.equal(x, tokenizer.preprocess(other))
    np.testing.assert_array_equal(x[:, 1] > 0, seen)
    np.testing.assert_array_equal(x[:, 0].numpy(), np.where(seen, raw, -2))
    assert torch.equal(tokenizer.encode(raw, seen), tokenizer.encode(other))
    assert not torch.equal(tokenizer.encode(raw), tokenizer.encode(other))
    assert tokenizer.decode(tokenizer.encode(raw)).shape == raw.shape
    training = TokenizerTask(tokenizer, "depth", "seen")
    batch = training.collate([{"__key__": "a", "depth": raw[0], "seen": seen[0]}], [(0, 0)])
    losses = training.loss(batch, training.counts(batch))
    output = tokenizer(batch["images"])[0][0, 0].detach().numpy()
    assert losses["loss/reconstruction"].item() == pytest.approx(np.abs(output - raw[0])[seen[0]].mean(), rel=1e-4)
    smaller = resize(x, (16, 16), MASKED.input)
    whole = seen.reshape(3, 16, 2, 16, 2).all((2, 4))
    np.testing.assert_array_equal(smaller[:, 1] > 0, whole)
    np.testing.assert_array_equal(smaller[:, 0].numpy()[~whole], -2)


def test_statistics_of_depth_are_those_of_valid_pixels():
    tokenizer = ImageTokenizer(dataclasses.replace(MASKED, input=InputConfig("depth", (SIDE, SIDE), mask_value=0.0)))
    raw, seen = RNG.random((1, SIDE, SIDE), dtype=np.float32), np.zeros((1, SIDE, SIDE), bool)
    seen[:, :16] = True
    torch.testing.assert_close(
        tokenizer.preprocess(np.where(seen, raw, 1e6), seen)[:, :1, :16],
        ImageTokenizer(dataclasses.replace(BASE, input=InputConfig("depth", (16, SIDE)))).preprocess(raw[:, :16]),
        atol=0.02, rtol=0,
    )  # fmt: skip
    assert torch.isfinite(tokenizer.preprocess(np.full((1, SIDE, SIDE), np.nan))).all()


def test_a_mask_needs_its_value(data, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.input.mask_value is not given"):
        train(data, tmp_path, mask="seen")
    with pytest.raises(ValueError, match="does not fit inputs of kind 'classes'"):
        InputConfig("classes", classes=3, mask_value=0.0)


@pytest.mark.parametrize("model", ["lpips:alex", "timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_perceptual_loss(model, data, tmp_path, monkeypatch):
    if model.startswith("lpips"):
        pytest.importorskip("lpips")
    layers = (0, 1) if "resnet" in model else (5, 11)
    config = PerceptualConfig(model, weight=0.5, layers=layers, loss="l1" if "resnet" in model else "cosine")
    torch.manual_seed(0)
    network = Perceptual(config, pretrained=False)
    first, second = torch.rand(2, 2, 3, 64, 64)
    first.requires_grad_()
    torch.testing.assert_close(network(second, second), torch.zeros(2), atol=1e-5, rtol=0)
    value = network(first, second)
    value.sum().backward()
    assert value.shape == (2,) and value.min() > 0 and first.grad.abs().sum() > 0
    if "vit" in model:
        return
    monkeypatch.setattr(task, "Perceptual", lambda config: network)
    training = TokenizerTask(ImageTokenizer(dataclasses.replace(BASE, perceptual=config)), "x")
    batch = training.collate(
        [{"__key__": "a", "x": x} for x in RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)], [(0, 0)] * 2
    )
    losses = training.loss(batch, training.counts(batch))
    output = training.model.eval()(batch["images"])[0]
    expected = 0.5 * network(output / 2 + 0.5, batch["images"] / 2 + 0.5).mean()
    training.model.train()
    assert losses["loss/perceptual"].item() == pytest.approx(expected.item(), rel=0.2)  # codes moved in between
    assert losses["loss"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k.startswith("loss/")))


class Patches:
    """An encoder whose features are the mean colours of patches."""

    size = 224

    def features(self, images, size):
        pixels = torch.from_numpy(np.stack([np.asarray(Image.fromarray(i).resize((size, size))) for i in images]))
        return pixels.float().unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).mean((2, 4)) / 255

    def pooled(self, images, size):
        return self.features(images, size).mean((1, 2))


def test_features_are_made_on_the_fly(data, tmp_path, monkeypatch):
    autoencoder._frozen.cache_clear()
    monkeypatch.setattr(autoencoder, "load_encoder", lambda name, device: Patches())
    source = InputConfig("features", (8, 8), channels=3, encoder="timm:x", encoder_size=32)
    config = TokenizerConfig(source, QuantizerConfig(), dataclasses.replace(BACKBONE, patch_size=1), loss="cosine")
    tokenizer, figures = train(data, tmp_path, config, sizes=Sizes(6, 8, 1), steps=3)
    assert {"cosine_6", "cosine_8"} <= set(figures)
    images = RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    vectors = tokenizer.targets(images)
    assert vectors.shape == (2, 8, 8, 3) and vectors.dtype == np.float32
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(vectors))
    expected = tokenizer.targets(images)
    other = ImageTokenizer(dataclasses.replace(config, input=dataclasses.replace(source, size=(4, 4), encoder_size=16)))
    with ThreadPoolExecutor() as threads:  # which share the frozen encoder
        made = [threads.submit(each.targets, images) for _ in range(20) for each in (tokenizer, other)]
        assert all(np.array_equal(one.result(), expected) for one in made[::2])
    tokenizer.use_grid((4, 4))
    assert tokenizer.encode(images).shape == (2, 16) and tokenizer.config.input.encoder_size == 16
    single = ImageTokenizer(dataclasses.replace(config, input=dataclasses.replace(source, size=(1, 1)))).eval()
    assert single.encode(images).shape == (2, 1) and single.targets(images).shape == (2, 3)
    wide = ImageTokenizer(dataclasses.replace(config, input=dataclasses.replace(source, channels=5)))
    with pytest.raises(ValueError, match=r"timm:x gives features \(8, 8, 3\), expected \(8, 8, 5\)"):
        wide.encode(images)
    autoencoder._frozen.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Stable Diffusion checkpoint with random weights."""
    pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sd")
    (root / "tokenizer").mkdir()
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (root / "tokenizer/vocab.json").write_text(json.dumps(words))
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(words, [], model_max_length=7).save_pretrained(root / "tokenizer")
    text = CLIPTextConfig(vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=7, bos_token_id=0, eos_token_id=1)  # fmt: skip
    CLIPTextModel(text).save_pretrained(root / "text_encoder")
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
                  up_block_types=["UpDecoderBlock2D"] * 2).save_pretrained(root / "vae")  # fmt: skip
    UNet2DConditionModel(
        block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(root / "unet")  # fmt: skip
    return root


def test_a_controlnet_on_a_frozen_checkpoint(checkpoint, data, tmp_path):
    shape = {"block_out_channels": [16, 16], "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2,
             "norm_num_groups": 4, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}  # fmt: skip
    noise = DiffusionConfig(scheduler="ddim", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                            prediction_type="epsilon", zero_terminal_snr=False, thresholding=False, steps=2,
                            guidance=2.5, cls_free_guidance_dropout=0.1)  # fmt: skip
    config = dataclasses.replace(BASE, loss="mse", denoiser="controlnet", diffusion=noise,
                                 denoiser_options={"path": str(checkpoint), "size": 16, **shape})  # fmt: skip
    train(data, tmp_path / "base")
    tokenizer, figures = train(data, tmp_path / "cn", config, init=str(tmp_path / "base"), freeze="encoder", ema=0.9)
    assert 0 < figures["psnr"] < 50
    saved = set(tokenizer.state_dict())
    assert any("controlnet.mid_block" in name for name in saved) and not any("vae" in name for name in saved)
    frozen = stable_diffusion(str(checkpoint), torch.device("cpu"))
    assert frozen.prompt.shape == (1, 7, 16) and not any(p.requires_grad for p in frozen.unet.parameters())
    fresh = ControlNetDecoder(8, str(checkpoint), 16, **shape).eval()
    fresh.start()
    weights = fresh.controlnet.mid_block.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in frozen.unet.mid_block.state_dict().items())
    noisy, at, cells = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 8, 4, 4)
    alone = frozen.unet(noisy, at, frozen.prompt.expand(2, -1, -1)).sample
    torch.testing.assert_close(fresh(noisy, at, cells), alone)  # it starts without any influence
    trained = tokenizer.decoder
    assert trained.latent_size == (8, 8) and not torch.equal(trained(noisy, at, cells), alone)
    everything = torch.ones(2, 4, 4, dtype=torch.bool)
    assert torch.equal(trained(noisy, at, cells, everything), trained(noisy, at, 2 * cells, everything))
    ids = tokenizer.encode(RNG.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8))
    same = [tokenizer.decode(ids, generator=torch.Generator().manual_seed(0), guidance=g) for g in (None, 2.5, 9.0)]
    assert same[0].shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(same[0], same[1])  # the config's guidance
    assert (same[0] != same[2]).any()
    with pytest.raises(ValueError, match=r"mean 0.5 and std 0.5 only"):
        dataclasses.replace(config, input=InputConfig("image", (SIDE, SIDE), mean=(0.4,)))


@pytest.mark.parametrize("quantizer", [
    QuantizerConfig("fsq"), QuantizerConfig("vq", codebook_size=16, dim=8), QuantizerConfig("lfq", codebook_size=16),
    QuantizerConfig("simvq", codebook_size=16, dim=8),
    QuantizerConfig("memcodes", codebook_size=16, dim=8, codebooks=2),
    QuantizerConfig("residual_vq", codebook_size=16, dim=8, codebooks=2),
    QuantizerConfig("residual_fsq", levels=(5, 5), codebooks=2),
], ids=lambda quantizer: quantizer.type)  # fmt: skip
def test_a_resumed_run_equals_an_undisturbed_one(quantizer, data, tmp_path):
    config = dataclasses.replace(BASE, quantizer=quantizer)
    options = {"ema": 0.9, "sizes": Sizes(16, 32, 8), "save_every": 2}
    whole, figures = train(data, tmp_path / "whole", config, steps=4, **options)
    shutil.copytree(tmp_path / "whole/run", tmp_path / "parts/run")
    shutil.rmtree(checkpoint_of(tmp_path / "parts/run"))  # it was stopped after step 2
    parts, again = train(data, tmp_path / "parts", config, steps=4, **options)
    assert figures == again
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_the_moving_average_includes_the_codebook(data, tmp_path):
    raw, _ = train(data, tmp_path / "raw", steps=6)
    mean, _ = train(data, tmp_path / "mean", steps=6, ema=0.9)
    assert not torch.allclose(raw.quantizer.layer.embed, mean.quantizer.layer.embed)
    assert not torch.allclose(raw.quantizer.layer.cluster_size, mean.quantizer.layer.cluster_size)


def photos(count=4):
    """Photos of different shapes, and normals that point along x; the left half is dark, the right half bright."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        height, width = (int(side) for side in rng.integers(40, 90, 2))
        rgb = np.zeros((height, width, 3), dtype=np.uint8)
        rgb[:, width // 2 :] = 255
        normal = np.broadcast_to(np.array([200, 128, 128], dtype=np.uint8), rgb.shape)
        samples.append({"__key__": f"photo{i}", "rgb": rgb, "normal": normal})
    return samples


def test_photos_of_any_shape_are_cropped_by_seed_epoch_and_key():
    task = TokenizerTask(ImageTokenizer(BASE), "rgb", crops=Crops(), seed=1)
    samples = photos()
    first, again, later = (
        task.collate(samples, [(epoch, i) for i in range(len(samples))])["images"] for epoch in (0, 0, 1)
    )
    assert first.shape == (len(samples), 3, *BASE.input.size)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first != later).flatten(1).any(1).all()
    alone = task.collate(samples[2:3], [(0, 0)])["images"]
    torch.testing.assert_close(alone[0], first[2], rtol=0, atol=0)


def test_about_half_of_the_crops_are_mirrored():
    task = TokenizerTask(ImageTokenizer(BASE), "rgb", crops=Crops(scale=(0.9, 1.0)))
    sample = photos(1)[0]
    dark_left = [task.view(sample, epoch)["rgb"][:, 0].mean() < 128 for epoch in range(200)]
    assert 70 < sum(dark_left) < 130  # 5 sigma of a fair coin is 35


@pytest.mark.parametrize(
    ("source", "red"),
    [(InputConfig("normal", (SIDE, SIDE)), 55), (InputConfig(size=(SIDE, SIDE), normals=True), 55),
     (InputConfig(size=(SIDE, SIDE)), 200)],
)  # fmt: skip
def test_a_mirror_turns_normals_round(source, red):
    """Whatever the modality is called."""
    task = TokenizerTask(ImageTokenizer(dataclasses.replace(BASE, input=source)), "normal", crops=Crops(hflip=1.0))
    assert (task.view(photos(1)[0], 0)["normal"] == [red, 128, 128]).all()


def test_tests_see_the_centre_square():
    task = TokenizerTask(ImageTokenizer(BASE), "rgb", crops=Crops())
    sample = photos(1)[0]
    height, width = sample["rgb"].shape[:2]
    side, (rows, columns) = min(height, width), BASE.input.size
    box = (width - side) // 2, (height - side) // 2, (width - side) // 2 + side, (height - side) // 2 + side
    expected = Image.fromarray(sample["rgb"]).crop(box).resize((columns, rows), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(Views([sample], task)[0]["rgb"], np.asarray(expected))


def test_a_tokenizer_of_photos_of_any_shape(tmp_path):
    for split in ("train", "test"):
        write_shards(tmp_path / "data", split, photos(8), shard_size=8)
    tokenizer, figures = train(tmp_path / "data", tmp_path / "out", steps=60, crops=Crops())
    assert tokenizer.grid == (4, 4)
    assert figures["psnr"] > 10  # all grey: 6


@pytest.mark.parametrize("source", [
    InputConfig("spectrogram", (SIDE, SIDE)), InputConfig("features", (1, 1), channels=5)
])  # fmt: skip
def test_what_has_no_place_in_an_image_is_not_cropped(source, tmp_path):
    config = TokenizerConfig(source, backbone=dataclasses.replace(BACKBONE, patch_size=1))
    with pytest.raises(ValueError, match=f"crops fit images and maps, not the {source.kind}"):
        train(tmp_path, tmp_path, config, crops=Crops())


def test_bodies_and_instances_of_the_raw_formats(tmp_path):
    body = np.broadcast_to(np.eye(3), (2, 23, 3, 3)).tolist()
    people = [{"pred_smpl_params": {"body_pose": body}}, {}]
    contours = [[{"points": [[2, 2], [20, 2], [2, 20]]}, {"points": [[30, 30], [50, 30], [50, 60]]}], []]
    for split in ("train", "test"):
        write_shards(tmp_path / "data", split, [
            {"__key__": f"k{i}", "human_poses": people[i % 2], "sam_instance": contours[i % 2]} for i in range(8)
        ], 8)  # fmt: skip
    mlp = BackboneConfig(patch_size=1, width=16, encoder="mlp", decoder="mlp", positions="none")
    poses = TokenizerConfig(InputConfig("features", (1, 1), channels=207), backbone=mlp, loss="smooth_l1")
    _, figures = train(tmp_path / "data", tmp_path / "poses", poses, "human_poses")
    assert "cosine" in figures
    masks = TokenizerConfig(InputConfig("mask", (SIDE, SIDE)), backbone=BACKBONE, loss="binary_cross_entropy")
    _, figures = train(tmp_path / "data", tmp_path / "masks", masks, "sam_instance")
    assert "iou" in figures
    drawn = [task.part(contours[0], masks.input, seed) for seed in range(9)]
    assert len({mask.tobytes() for mask in drawn}) == 2
    assert all(0.45 < mask.mean() < 0.6 for mask in drawn)  # a triangle fills half of its own box


def test_a_tokenizer_of_the_hub_runs_no_function(tmp_path, monkeypatch):
    source = InputConfig("features", (8, 8), channels=3, encoder="os:getcwd")
    ImageTokenizer(TokenizerConfig(source, backbone=dataclasses.replace(BACKBONE, patch_size=1))).save_pretrained(
        tmp_path / "cache/x"
    )
    load_tokenizer(tmp_path / "cache/x")
    monkeypatch.setattr("fourm.tokenization.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"is from the hub and names a function to run as its encoder, 'os:getcwd'"):
        load_tokenizer(tmp_path / "cache/x")
