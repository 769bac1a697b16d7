"""Image tokenizers: every input kind through the whole way, refusals, folders, losses that add up."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fourm.tokenization import load_tokenizer
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BLOCKS, BackboneConfig, patchify, unpatchify
from fourm.tokenization.inputs import KINDS, InputConfig, to_network
from fourm.tokenization.losses import LOSSES
from fourm.tokenization.quantizers import QuantizerConfig
from fourm.tokenization.task import TokenizerTask

RNG = np.random.default_rng(0)
CASES = {
    "image": (InputConfig("image", (16, 24)), RNG.integers(0, 256, (6, 16, 24, 3), dtype=np.uint8), "mse"),
    "grey": (InputConfig("image", (16, 24), channels=1), RNG.integers(0, 256, (6, 16, 24), dtype=np.uint8), "l1"),
    "field": (InputConfig("field", (16, 24), low=-450, high=7000, offset=500, scale=1000, units="metres"),
              RNG.integers(-400, 6000, (6, 16, 24)).astype(np.int16), "smooth_l1"),
    "normal": (InputConfig("normal", (16, 24)), RNG.integers(0, 256, (6, 16, 24, 3), dtype=np.uint8), "cosine"),
    "classes": (InputConfig("classes", (16, 24), classes=9), RNG.integers(0, 9, (6, 16, 24)), "cross_entropy"),
    "values": (InputConfig("classes", (16, 24), classes=2, values=(0, 255)),
               (255 * RNG.integers(0, 2, (6, 16, 24))).astype(np.uint8), "cross_entropy"),
}  # fmt: skip


def build(name, quantizer=None, **options):
    source, _, loss = CASES[name]
    torch.manual_seed(0)
    small = BackboneConfig(patch_size=8, width=32, heads=2, **options)
    return ImageTokenizer(TokenizerConfig(source, quantizer or QuantizerConfig("fsq", levels=(4, 4, 4)), small, loss))


@pytest.mark.parametrize("name", CASES)
def test_raw_to_ids_to_raw(name, tmp_path):
    raw = CASES[name][1]
    tokenizer = build(name).eval()
    ids = tokenizer.encode(raw)
    assert ids.shape == (6, 6) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.grid == (2, 3) and tokenizer.vocab_size == 64
    assert torch.equal(ids, tokenizer.encode(list(raw)))
    decoded = tokenizer.decode(ids)
    assert decoded.shape == raw.shape
    if name in ("image", "grey", "normal"):
        assert decoded.dtype == np.uint8
    if name == "field":
        assert decoded.min() >= -450 and decoded.max() <= 7000
    if name == "normal":
        lengths = np.linalg.norm(decoded / 127.5 - 1, axis=-1)
        assert np.abs(lengths - 1).max() < 0.02
    if name == "values":
        assert set(np.unique(decoded)) <= {0, 255}

    tokenizer.save_pretrained(tmp_path / "t", {"psnr": 21.5})
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.config == tokenizer.config and torch.equal(loaded.encode(raw), ids)
    np.testing.assert_array_equal(loaded.decode(ids), decoded)
    assert "psnr: 21.5" in (tmp_path / "t/README.md").read_text()


@pytest.mark.parametrize("name", CASES)
def test_preprocessing_loses_nothing(name):
    """What the network would output if it were perfect comes back as the raw array."""
    source, raw, _ = CASES[name]
    x = KINDS[source.kind].to_network(raw, source)
    if source.kind == "classes":
        x = F.one_hot(x, source.classes).permute(0, 3, 1, 2).float()
    back = KINDS[source.kind].from_network(x, source)
    if name == "normal":  # arbitrary bytes are not unit vectors: compare directions
        a, b = raw / 127.5 - 1, back / 127.5 - 1
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosines.min() > 0.999
    else:
        np.testing.assert_allclose(back, raw, atol=1e-3)


@pytest.mark.parametrize("name", ["classes", "field", "image"])
@pytest.mark.parametrize("quantizer", [None, QuantizerConfig("vq", codebook_size=64, dim=8)], ids=["fsq", "vq"])
def test_it_learns(name, quantizer):
    raw = np.repeat(np.repeat(CASES[name][1][:, :2, :3], 8, 1), 8, 2)  # constant patches
    task = TokenizerTask(build(name, quantizer), "x")
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=5e-3)
    batch = task.collate([{"__key__": str(i), "x": x} for i, x in enumerate(raw)], [(0, i) for i in range(6)])
    assert batch["keys"] == ("0", "1", "2", "3", "4", "5")
    losses = []
    for _ in range(80):
        losses.append(task.loss(batch, task.counts(batch))["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    truth, rebuilt = raw.astype(float), task.model.eval().decode(task.model.encode(raw)).astype(float)
    assert np.abs(rebuilt - truth).mean() < 0.5 * np.abs(truth - truth.mean()).mean()


def test_micro_batches_add_up_to_the_batch():
    task = TokenizerTask(build("image"), "x")
    samples = [{"__key__": str(i), "x": x} for i, x in enumerate(CASES["image"][1])]
    task.model.eval()  # FSQ standardises latents over the batch in training
    whole, first, second = (task.collate(part, [(0, 0)] * len(part)) for part in (samples, samples[:4], samples[4:]))
    counts = task.counts(whole)
    assert torch.equal(counts, task.counts(first) + task.counts(second))
    parts = [task.loss(part, counts)["loss"] for part in (first, second)]
    torch.testing.assert_close(sum(parts), task.loss(whole, counts)["loss"])


def test_class_probabilities():
    tokenizer = build("classes").eval()
    ids = tokenizer.encode(CASES["classes"][1])
    probabilities = tokenizer.decode_probabilities(ids)
    assert probabilities.shape == (6, 9, 16, 24)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(1), tokenizer.decode(ids))
    with pytest.raises(ValueError, match="no class probabilities"):
        build("image").decode_probabilities(ids)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("classes", RNG.random((2, 16, 24), dtype=np.float32), r"expected integer class ids in \[0, 9\), got float32"),
        ("classes", np.full((2, 16, 24), 9), r"\[0, 9\), got int64 2x16x24 in \[9, 9\]"),
        ("classes", np.full((2, 16, 24), -1), r"in \[-1, -1\]"),
        ("values", np.full((2, 16, 24), 1), "expected integers among 0, 255"),
        ("image", RNG.random((2, 16, 24, 3), dtype=np.float32), r"expected uint8 images in \[0, 255\], got float32"),
        ("image", np.zeros((2, 24, 16, 3), np.uint8), "image 0: expected uint8 image 16x24x3, got uint8 24x16x3"),
        ("image", [np.zeros((16, 24, 3), np.uint8), np.zeros((16, 24), np.uint8)], "image 1: expected"),
        ("field", np.full((2, 16, 24), np.nan), "finite"),
        ("field", np.zeros((2, 16, 24), bool), "expected numbers in metres, got bool"),
        ("grey", [], "at least one"),
    ],
)
def test_refuses_what_it_was_not_made_for(name, raw, message):
    with pytest.raises(ValueError, match=message):
        build(name).encode(raw)


def test_masks_may_end_at_1_or_255():
    source = InputConfig("mask", (8, 8))
    raw = RNG.random((2, 8, 8)) < 0.5
    for values in (raw.astype(np.uint8), 255 * raw.astype(np.uint8)):
        assert torch.equal(to_network(values, source), to_network(raw, source))
    with pytest.raises(ValueError, match="0 and 1 or 0 and 255, got int64 2x8x8"):
        to_network(raw * 7, source)


@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 5, dtype=int), torch.zeros(2, 6), torch.full((2, 6), 64), -torch.ones(1, 6).int()]
)
def test_refuses_bad_ids(ids):
    with pytest.raises(ValueError, match="expected"):
        build("image").decode(ids)


def test_config_errors():
    with pytest.raises(ValueError, match=r"config of an image tokenizer: .*'chanels'"):
        TokenizerConfig.from_dict({"input": {"chanels": 3}})
    with pytest.raises(ValueError, match="which take cross_entropy"):
        TokenizerConfig(InputConfig("classes", classes=3), loss="mse")
    with pytest.raises(ValueError, match="2 class_weights for 3 classes"):
        TokenizerConfig(InputConfig("classes", classes=3), loss="cross_entropy", class_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="not a multiple of patch_size 8"):
        TokenizerConfig(InputConfig(size=(60, 64)))
    with pytest.raises(ValueError, match="2 or more"):
        InputConfig("classes")


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_and_smoothing(block):
    tokenizer = build("image", encoder=block, decoder=block, decoder_depth=2)
    output, _, _ = tokenizer(tokenizer.preprocess(CASES["image"][1]))
    assert output.shape == (6, 3, 16, 24)
    output.square().mean().backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_mlp_encoder_sees_only_its_own_patch():
    tokenizer = build("image", encoder="mlp").eval()
    raw = CASES["image"][1].copy()
    before = tokenizer.encode(raw)
    raw[:, :, 8:] = 255 - raw[:, :, 8:]
    assert torch.equal(before[:, [0, 3]], tokenizer.encode(raw)[:, [0, 3]])


def test_patchify_against_unfold():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    torch.testing.assert_close(patches, F.unfold(images, 4, stride=4).transpose(1, 2))
    torch.testing.assert_close(unpatchify(patches, 4, (2, 3)), images)


def test_losses_by_hand():
    prediction = torch.tensor([[[[1.0]], [[3.0]]]])  # one pixel, two channels
    target = torch.tensor([[[[0.0]], [[4.0]]]])
    values = {name: LOSSES[name](prediction, target).mean().item() for name in ("l1", "mse", "smooth_l1", "cosine")}
    assert values == pytest.approx({"l1": 1, "mse": 1, "smooth_l1": 0.5, "cosine": 1 - 12 / (10**0.5 * 4)})
    true_class = torch.tensor([[[1]]])
    nats = float(np.log(1 + np.exp(-2)))
    assert LOSSES["cross_entropy"](prediction, true_class).item() == pytest.approx(nats)
    assert LOSSES["cross_entropy"](prediction, true_class, torch.tensor([1.0, 5.0])).item() == pytest.approx(5 * nats)


def test_many_classes_train_on_some_pixels_and_are_judged_on_all():
    task = TokenizerTask(build("classes"), "x")
    batch = task.collate([{"__key__": "a", "x": x} for x in CASES["classes"][1]], [(0, 0)] * len(CASES["classes"][1]))
    evaluated = copy.deepcopy(task)
    evaluated.model.eval()
    full = evaluated.loss(batch, task.counts(batch))["loss/reconstruction"]
    logits = evaluated.model(batch["images"])[0]
    torch.testing.assert_close(full, F.cross_entropy(logits, batch["images"]))
    torch.manual_seed(1)
    drawn = torch.stack([task.loss(batch, task.counts(batch))["loss/reconstruction"] for _ in range(32)])
    assert drawn.std() > 0 and abs(drawn.mean() - full) < 0.1
