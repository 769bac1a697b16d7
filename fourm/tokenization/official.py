"""Published tokenizers of apple/ml-4m, and its tokenizer configs and training checkpoints, as our tokenizers.

A config says nothing of the raw data, so that comes from the domain: the name of a published tokenizer has it
(`4M_tokenizers_depth_8k_224-448`), and so have the arguments in a training checkpoint. Tensors keep their values; only
names and the two last axes of 1 x 1 convolutions differ from our own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fourm.official_files import read_official
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.diffusion import SCHEDULERS, DiffusionConfig
from fourm.tokenization.inputs import InputConfig
from fourm.tokenization.quantizers import QuantizerConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What raw images of a domain are, where neither classes nor the lack of patches tell.
DOMAINS: dict[str, Literal["image", "depth", "mask"]] = {
    "rgb": "image",
    "normal": "image",
    "edge": "image",
    "canny_edge": "image",
    "sam_edge": "image",
    "depth": "depth",
    "sam_instance": "mask",
    "sam_mask": "mask",
}
# Keys of a published config, or of training arguments, that the config of a model knows under another name.
RENAMED_KEYS = {
    "quantizer_type": "quant_type",
    "encoder_type": "enc_type",
    "decoder_type": "dec_type",
    "input_size": "image_size",
    "input_size_max": "image_size",
    "input_size_enc": "image_size_enc",
    "input_size_dec": "image_size_dec",
    "quantizer_ema_decay": "ema_decay",
}


class VitPreset(NamedTuple):
    """A row of `VITS`."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True


VITS = {"vit_s": VitPreset(512, 8, 8), "vit_b": VitPreset(768, 12, 12), "vit_l": VitPreset(1024, 24, 16)}

# Our names to theirs, one after the other.
RENAMED_TENSORS = (
    (r"^class_in\.", "cls_emb."),
    (r"^encoder\.latents\.", "quant_proj."),
    (r"^decoder\.latents\.", "post_quant_proj."),
    (r"^encoder\.outer\.", "encoder.linear_out."),
    (r"^decoder\.outer\.", "decoder.linear_in."),
    (r"\.body\.positions$", ".pos_emb"),
    (r"\.body\.post_mlp\.norm\.", ".norm_mlp."),
    (r"\.body\.post_mlp\.mlp\.", ".post_mlp."),
    (r"\.body\.blocks\.(\d+)\.block\.", r".blocks.\1."),
    (r"\.body\.blocks\.(\d+)\.norm\.", r".layernorms.\1."),
    (r"\.body\.blocks\.(\d+)\.linear\.", r".layers.\1."),
    (r"\.body\.blocks\.(\d+)\.mlp\.fc1\.", r".blocks.\1.block.0."),
    (r"\.body\.blocks\.(\d+)\.mlp\.fc2\.", r".blocks.\1.block.2."),
    (r"^decoder\.convs\.(\d+)\.", r"decoder.out_conv.\1."),
    (r"^(decoder\.out_conv\.\d+)\.conv\.", r"\1.dwconv."),
    (r"^(decoder\.out_conv\.\d+)\.mlp\.fc([12])\.", r"\1.pwconv\2."),
    (r"^quantizer\.layer\.codes$", "quantize.codes"),
    (r"^quantizer\.layer\.to_(k|v)\w+$", r"quantize.to_\1.weight"),
    (r"^quantizer\.layer\.", "quantize._codebook."),
)


def official_tensors(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """A tokenizer's tensors under the names and in the shapes of 4M; they share memory with the tokenizer's own.

    Raises:
        ValueError: 4M has no tokenizer of this kind.
    """
    backbone, named = tokenizer.config.backbone, {}
    if backbone.positions == "learned" or tokenizer.config.quantizer.type not in ("vq", "memcodes"):
        raise ValueError("only tokenizers that were made from a config of 4M have tensors under its names")
    ends = {
        "encoder.patches.": "encoder.proj." if backbone.encoder == "vit" else "encoder.linear_in.",
        "decoder.patches.": "decoder.out_proj." if backbone.decoder == "vit" else "decoder.linear_out.",
    }
    for name, tensor in tokenizer.state_dict().items():
        ours = name
        for end, theirs in ends.items():
            name = name.replace(end, theirs)
        for pattern, theirs in RENAMED_TENSORS:
            name = re.sub(pattern, theirs, name)
        if ours == "encoder.patches.weight" and backbone.encoder == "vit":
            side = backbone.patch_size
            tensor = tensor.view(len(tensor), -1, side, side)
        elif ours in ("encoder.latents.weight", "decoder.latents.weight"):
            tensor = tensor[:, :, None, None]
        named[name] = tensor
    return named


def tokenizer_config(
    config: Mapping[str, Any], domain: str | None = None, vits: Mapping[str, VitPreset] = VITS
) -> TokenizerConfig:
    """Our config for one of 4M; keys that are not there have 4M's defaults.

    Args:
        config: Keyword arguments of 4M's `VQVAE` or `DiVAE`, or the arguments of a training.
        domain: Name of the modality, such as `rgb` or `sam_instance`; default: the config's own, if it has one.
        vits: Sizes of `<name>_enc` and `<name>_dec`.

    Raises:
        ValueError: A part of the config is unknown, or it does not say what its raw data are.
    """
    given = {key: value for key, value in config.items() if value is not None}
    given = {**given, **{new: given[old] for old, new in RENAMED_KEYS.items() if old in given}}
    get = given.get
    if "sd_path" in given:
        raise ValueError("this tokenizer decodes with Stable Diffusion and a ControlNet, which is not supported")
    domain = domain or get("domain")
    diffuses = "beta_schedule" in given
    encoder, decoder = get("enc_type", "vit_b_enc"), get("dec_type", "vit_b_dec")
    shape, is_vit = _backbone(encoder, "" if diffuses else decoder, vits)
    patches = is_vit and get("patch_proj", not re.search(r"CLIP|DINO|ImageBind", domain or ""))
    source = _input(domain, patches, get("n_labels", 0), get("n_channels", 3))
    patch_size, image_size = get("patch_size", 16), get("image_size", 224)
    if source.kind == "mask":  # trained beside images of `image_size`
        image_size = get("mask_size", image_size)
    tables: dict[str, Any] = {"patch_size": 1}
    if is_vit:
        decoder_patch = get("patch_size_dec", patch_size)
        tables = {
            "position_grid": _pair(get("image_size_enc", image_size), patch_size),
            "decoder_position_grid": _pair(get("image_size_dec", image_size), decoder_patch),
            "patch_size": patch_size if patches else 1,
            "decoder_patch_size": decoder_patch if patches else 1,
            "post_mlp": get("post_mlp", False),
            "out_conv": get("out_conv", False),
        }
    size = _pair(image_size, 1 if patches else patch_size) if is_vit else (1, 1)
    losses = {"classes": "cross_entropy", "mask": "binary_cross_entropy"}
    process = {key.name: given[key.name] for key in dataclasses.fields(DiffusionConfig) if key.name in given}
    if process.get("scheduler") not in SCHEDULERS:  # training arguments may mean that of the learning rate
        process.pop("scheduler", None)
    return TokenizerConfig(
        dataclasses.replace(source, size=size),
        _quantizer(given),
        BackboneConfig(final_norm=False, **shape, **tables),
        losses.get(source.kind, "mse"),  # type: ignore[arg-type]
        denoiser=decoder if diffuses else "",
        diffusion=DiffusionConfig(**process),
        conditioning="xattn" if get("conditioning") == "xattn" else "concat",
        dropout=get("dec_transformer_dropout", 0.2) if decoder.startswith("uvit") else 0.0,
    )


def _pair(side: Any, divisor: int) -> tuple[int, int]:
    rows, columns = (side, side) if isinstance(side, int) else side
    return rows // divisor, columns // divisor


def _backbone(encoder: str, decoder: str, vits: Mapping[str, VitPreset]) -> tuple[dict[str, Any], bool]:
    """Sizes of encoder and decoder as keys of `BackboneConfig`, and whether they are ViTs."""
    if "MLP" in encoder:
        sides = [re.fullmatch(r"(Bottleneck)?MLP/B_(\d+)-Wi_(\d+)(?:-E_(\d+))?", name) for name in (encoder, decoder)]
        if not all(sides):
            raise ValueError(
                f"encoder {encoder!r}, decoder {decoder!r}: expected two such as BottleneckMLP/B_6-Wi_1024"
            )
        parts = [("mlp" if side[1] else "linear", int(side[2]) - (not side[1]), int(side[3]), float(side[4] or 4))
                 for side in sides if side]  # fmt: skip
        (block, depth, width, ratio), (block_dec, depth_dec, width_dec, ratio_dec) = parts
        return {"encoder": block, "encoder_depth": depth, "width": width, "mlp_ratio": ratio,
                "decoder": block_dec, "decoder_depth": depth_dec, "decoder_width": width_dec,
                "decoder_mlp_ratio": ratio_dec, "positions": "none", "outer_linear": True}, False  # fmt: skip
    names = [encoder.removesuffix("_enc"), decoder.removesuffix("_dec") or encoder.removesuffix("_enc")]
    if not all(name in vits for name in names):
        raise ValueError(f"encoder {encoder!r}, decoder {decoder!r}: allowed are {', '.join(vits)} with _enc and _dec")
    one, two = (vits[name] for name in names)
    return {"encoder": "vit", "encoder_depth": one.depth, "width": one.width, "heads": one.heads,
            "mlp_ratio": one.mlp_ratio, "qkv_bias": one.qkv_bias, "decoder": "vit", "decoder_depth": two.depth,
            "decoder_width": two.width, "decoder_heads": two.heads, "decoder_mlp_ratio": two.mlp_ratio,
            "positions": "sincos"}, True  # fmt: skip


def _input(domain: str | None, patches: bool, classes: int, channels: int) -> InputConfig:
    if classes:  # ids in the files are one less, with 255 for the first class
        return InputConfig("classes", classes=classes, values=(255, *range(classes - 1)), class_channels=channels,
                           class_head=False)  # fmt: skip
    if not patches:
        return InputConfig("features", channels=channels, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    name = (domain or "").replace("-", "_").lower()
    kind = DOMAINS.get(name, "image" if channels == 3 else None)
    if kind is None:
        raise ValueError(f"domain is {domain!r}; for images of {channels} channel(s) it must tell how they are "
                         f"normalised, allowed are {', '.join(DOMAINS)}")  # fmt: skip
    return InputConfig(kind, channels=channels, normals=name == "normal")


def _quantizer(given: Mapping[str, Any]) -> QuantizerConfig:
    kind, codebooks = given.get("quant_type", "lucid"), given.get("num_codebooks", 1)
    if kind not in ("lucid", "memcodes") or (kind == "lucid" and codebooks != 1):
        raise ValueError(f"quant_type {kind!r} with {codebooks} codebooks: expected 'memcodes', or 'lucid' with one")
    size, dim = given.get("codebook_size", 16384), given.get("latent_dim", 32)
    if kind == "memcodes":
        return QuantizerConfig("memcodes", codebook_size=size, codebooks=codebooks, dim=dim)
    return QuantizerConfig(
        "vq",
        codebook_size=size,
        dim=dim,
        cosine=given.get("norm_codes", True),
        decay=given.get("ema_decay", 0.99),
        dead_code=given.get("threshold_ema_dead_code", 0.25),
        replace=given.get("code_replacement_policy", "batch_random"),
        kmeans=given.get("kmeans_init", False),
        unit_loss=given.get("norm_latents", False),
        sync=given.get("sync_codebook", True),
        weight=given.get("commitment_weight", 1.0),
    )


def from_official(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    domain: str | None = None,
    vits: Mapping[str, VitPreset] = VITS,
) -> ImageTokenizer:
    """A tokenizer in eval mode from a config and tensors of 4M.

    Args:
        config: See `tokenizer_config`.
        tensors: By 4M's names, those of old VQ-GAN checkpoints too.
        domain: See `tokenizer_config`.
        vits: See `tokenizer_config`.

    Raises:
        ValueError: Tensors are missing, unknown or of another shape.
    """
    tensors = {re.sub(r"^((?:post_)?quant)_conv(\.0)?\.", r"\1_proj.", key): value for key, value in tensors.items()}
    first = tensors.get("encoder.proj.weight", tensors.get("encoder.linear_in.weight"))
    if first is None:
        raise ValueError("not a tokenizer of 4M: there is neither encoder.proj.weight nor encoder.linear_in.weight")
    found: dict[str, Any] = {"n_channels": first.shape[1]}
    if "cls_emb.weight" in tensors:
        found["n_labels"] = len(tensors["cls_emb.weight"])
    tokenizer = ImageTokenizer(tokenizer_config({**config, **found}, domain, vits)).eval()
    own = official_tensors(tokenizer)
    there = {own[name].data_ptr() for name in own.keys() & tensors.keys()}  # a tensor may have two names
    missing = sorted(name for name in own.keys() - tensors.keys() if own[name].data_ptr() not in there)
    unknown = sorted(tensors.keys() - own.keys())
    other = [f"{name} {tuple(tensors[name].shape)} where {tuple(tensor.shape)} is expected"
             for name, tensor in own.items() if tensors.get(name, tensor).shape != tensor.shape]  # fmt: skip
    if missing or unknown or other:
        raise ValueError(f"tensors do not fit the config: missing {missing[:5]}, unknown {unknown[:5]}, {other[:5]}")
    for name in own.keys() & tensors.keys():
        own[name].copy_(tensors[name])
    return tokenizer


def load_official(path: Path, name: str, domain: str | None = None) -> ImageTokenizer:
    """Loads a file or folder of 4M.

    Args:
        path: See `read_official`.
        name: What the user called it; a published tokenizer's name has the domain.
        domain: See `tokenizer_config`.
    """
    config, tensors = read_official(path)
    published = re.search(r"4M_tokenizers_(.+?)_\d+k", name)
    return from_official(config, tensors, domain or (published[1] if published else None))
