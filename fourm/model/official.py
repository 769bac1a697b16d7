"""Weights of apple/ml-4m: its modality table, its configs, and where each of its tensors lies in ours.

Notable:
* 4M keeps one table per modality and side, we keep one per side: `layout` says which rows of which of our tensors an
  official name stands for, and import and export both follow it;
* sine-cosine tables are not weights: they are checked when they come and computed when they go (sequences: 512 rows,
  whatever their length);
* 4M trains with the head tied to the decoder's token table and stores both: where all pairs are equal, so is ours.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fourm.modalities import Modality, TokenSpace
from fourm.model.config import SIZES, FourMConfig
from fourm.model.embeddings import Embeddings, sincos

SEQUENCE_ROWS = 512  # in a file's position table of a sequence
TRUNK = ("encoder.", "encoder_norm.", "decoder_proj_context.", "decoder.", "decoder_norm.")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _pixels(side: int) -> Modality:
    return Modality("patches", grid=(side, side), patch_size=16, **IMAGENET)  # type: ignore[arg-type]


def _grid(vocab_size: int, side: int, tokenizer: str, **more: Any) -> Modality:
    tokenizer = f"EPFL-VILAB/4M_tokenizers_{tokenizer}"
    return Modality("grid", vocab_size=vocab_size, grid=(side, side), tokenizer=tokenizer, **more)


def _text(max_tokens: int, **more: Any) -> Modality:
    return Modality("text", vocab_size=30000, max_tokens=max_tokens, tokenizer="text", **more)


# Every modality 4M has embeddings for (its data/modality_info.py).
MODALITIES: dict[str, Modality] = {
    "rgb@224": _pixels(14),
    "rgb@448": _pixels(28),
    "caption": _text(256),
    "det": _text(256),
    "metadata": _text(40, chunk=2),
    "human_poses": _text(275, decoder_positions=263),
    "color_palette": _text(23),
    "sam_instance": _text(290),
    "t5_caption": Modality("vectors", dim=4096, max_tokens=77),
    "tok_rgb@224": _grid(16384, 14, "rgb_16k_224-448", source="rgb@224"),
    "tok_depth@224": _grid(8192, 14, "depth_8k_224-448"),
    "tok_normal@224": _grid(8192, 14, "normal_8k_224-448"),
    "tok_semseg@224": _grid(4096, 14, "semseg_4k_224-448"),
    "tok_clip@224": _grid(8192, 14, "CLIP-B16_8k_224-448"),
    "tok_rgb@448": _grid(16384, 28, "rgb_16k_224-448", source="rgb@448"),
    "tok_depth@448": _grid(8192, 28, "depth_8k_224-448"),
    "tok_normal@448": _grid(8192, 28, "normal_8k_224-448"),
    "tok_semseg@448": _grid(4096, 28, "semseg_4k_224-448"),
    "tok_clip@448": _grid(8192, 28, "CLIP-B16_8k_224-448"),
    "tok_canny_edge@224": _grid(8192, 14, "edge_8k_224-512"),
    "tok_sam_edge@224": _grid(8192, 14, "edge_8k_224-512"),
    "tok_dinov2@224": _grid(8192, 16, "DINOv2-B14_8k_224-448"),
    "tok_imagebind@224": _grid(8192, 16, "ImageBind-H14_8k_224-448"),
    "tok_dinov2_global": _grid(8192, 4, "DINOv2-B14-global_8k_16_224", learned_positions=True),
    "tok_imagebind_global": _grid(8192, 4, "ImageBind-H14-global_8k_16_224", learned_positions=True),
}

# Key of an official config -> our field, 4M's default, and whether its own configs always name it.
KEYS: dict[str, tuple[str, float, bool]] = {
    "encoder_depth": ("encoder_depth", 12, True),
    "decoder_depth": ("decoder_depth", 12, True),
    "dim": ("dim", 768, True),
    "num_heads": ("heads", 12, True),
    "mlp_ratio": ("mlp_ratio", 4, True),
    "qkv_bias": ("qkv_bias", True, True),
    "proj_bias": ("proj_bias", True, True),
    "mlp_bias": ("mlp_bias", True, True),
    "norm_bias": ("norm_bias", True, True),
    "gated_mlp": ("gated_mlp", False, True),
    "qk_norm": ("qk_norm", False, False),
    "num_register_tokens": ("registers", 0, False),
    "share_modality_embeddings": ("share_modality_embeddings", True, False),
    "decoder_causal_mask": ("decoder_causal", False, False),
    "decoder_sep_mask": ("decoder_separate", True, False),
    "drop_path_rate_encoder": ("drop_path", 0, False),
}
OTHER_KEYS = {"domains_in", "domains_out", "act_layer", "image_size", "patch_size"}
OTHER_KEYS |= {"drop_path_rate_decoder", "shared_drop_path", "use_act_checkpoint"}


def our_config(config: Mapping[str, Any]) -> tuple[FourMConfig, TokenSpace]:
    """Shape and modality table of a model from its official config, or from the arguments of 4M's training script.

    Keys that are no keys of a config are ignored with a warning.

    Raises:
        ValueError: A missing key, a modality that 4M does not have, or a value that has no counterpart here.
    """
    if "domains_in" not in config and "in_domains" in config:
        config = _config_of_run(config)
    missing = [key for key in ("domains_in", "domains_out", "act_layer") if key not in config]
    if missing:
        raise ValueError(f"not a config of 4M: it lacks {', '.join(missing)} and has {', '.join(config) or 'no keys'}")
    unknown = sorted(set(config) - set(KEYS) - OTHER_KEYS)
    if unknown:
        warnings.warn(f"keys that no 4M config has are ignored: {', '.join(unknown)}", stacklevel=2)
    values: dict[str, Any] = {ours: config.get(key, default) for key, (ours, default, _) in KEYS.items()}
    wrong = {key: values[ours] for key, (ours, _, _) in KEYS.items() if not isinstance(values[ours], int | float)}
    if wrong:
        raise ValueError(f"4M config has {wrong}, expected numbers and truth values")
    fixed = {
        "act_layer": "SiLU" if values["gated_mlp"] else "GELU",
        "image_size": 224,
        "patch_size": 16,
        "drop_path_rate_decoder": values["drop_path"],
        "shared_drop_path": False,
    }
    other = {key: config[key] for key, value in fixed.items() if config.get(key, value) != value}
    if other:
        raise ValueError(f"4M config has {other}, supported here are { {key: fixed[key] for key in other} }")
    given, asked = config["domains_in"], config["domains_out"]
    foreign = sorted({*given, *asked} - set(MODALITIES))
    if foreign:
        raise ValueError(f"4M has no modality {', '.join(foreign)}; it has {', '.join(MODALITIES)}")
    rows = {
        name: replace(row, input=name in given, output=name in asked or row.kind == "patches")
        for name, row in sorted(MODALITIES.items())
        if name in given or name in asked
    }
    size = next((size for size, row in SIZES.items() if row.items() <= values.items()), "base")
    return FourMConfig(size=size, tied_head=False, blank_hidden=True, **values), TokenSpace(rows)


def _config_of_run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Official config of a training run: the name of the model says it all but the domains."""
    name = str(args.get("model"))
    match = re.fullmatch(r"fm_(tiny|small|base|large|xlarge)_(\d+)e_(\d+)d_(gelu|swiglu(?:_qknorm)?_nobias)", name)
    if not match or "out_domains" not in args:
        raise ValueError(
            f"training run of model {name!r}, expected one of 4M such as 'fm_base_12e_12d_swiglu_nobias', with "
            "in_domains and out_domains"
        )
    size, encoder_depth, decoder_depth, kind = match.groups()
    bias = kind == "gelu"
    return {
        "domains_in": list(args["in_domains"]),
        "domains_out": list(args["out_domains"]),
        "encoder_depth": int(encoder_depth),
        "decoder_depth": int(decoder_depth),
        "dim": SIZES[size]["dim"],
        "num_heads": SIZES[size]["heads"],
        **dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"), bias),
        "act_layer": "GELU" if bias else "SiLU",
        "gated_mlp": not bias,
        "qk_norm": "qknorm" in kind,
        "num_register_tokens": args.get("num_register_tokens", 0),
        "image_size": args.get("input_size", 224),
        "patch_size": args.get("patch_size", 16),
    }


def their_config(config: FourMConfig, space: TokenSpace) -> dict[str, Any]:
    """Inverse of `our_config`: what 4M's `FM` is built from."""
    asked = [name for name, row in space.modalities.items() if row.output and row.kind != "patches"]
    theirs: dict[str, Any] = {"domains_in": space.inputs(), "domains_out": asked}
    for key, (ours, default, always) in KEYS.items():
        value = getattr(config, ours)
        if always or value != default:
            theirs[key] = int(value) if isinstance(value, float) and value.is_integer() else value
    if config.drop_path:
        theirs["drop_path_rate_decoder"] = config.drop_path
    return theirs | {"act_layer": "SiLU" if config.gated_mlp else "GELU", "image_size": 224, "patch_size": 16}


class Part(NamedTuple):
    """Where an official tensor lies: `rows` of our tensor `name`; in a file it has this `shape`."""

    name: str
    rows: slice
    shape: tuple[int, ...]


def layout(model: nn.Module) -> dict[str, Part]:
    """Official name -> where it lies in the tensors of a `FourM` or an `ImageEncoder`."""
    ours, config = model.state_dict(), cast(FourMConfig, model.config)
    parts = {name: Part(name, slice(None), tuple(t.shape)) for name, t in ours.items() if name.startswith(TRUNK)}

    def add(theirs: str, name: str, rows: slice = slice(None), axes: int = 2) -> None:
        shape = tuple(ours[name][rows].shape)
        parts[theirs] = Part(name, rows, (1,) * (axes - len(shape)) + shape)

    for name in ("mask_token", "register_tokens"):
        if name in ours:
            add(name, name, axes=3)
    for prefix, side in _sides(model):
        shared = "encoder_embeddings" if config.share_modality_embeddings else prefix
        for name in side.names:
            at, project = f"{prefix}.{name}", f"{prefix}.project.{name}"
            number = int(side.modality_row[side.space.number[name]])
            add(f"{at}.mod_emb", f"{shared}.modality", slice(number, number + 1), axes=3)
            if name in side.learned:
                add(f"{at}.pos_emb", f"{prefix}.learned_positions", side.learned[name], axes=3)
            kind = side.space[name].kind
            if kind == "patches":
                add(f"{at}.proj.weight", f"{project}.weight")
            elif kind == "vectors":
                add(f"{at}.emb_proj.weight", f"{project}.weight")
                add(f"{at}.emb_proj.bias", f"{project}.bias", axes=1)
            else:
                add(f"{at}.token_emb.weight", f"{prefix}.tokens.weight", side.vocabulary(name))
            if prefix == "decoder_embeddings":
                head = f"{prefix}.tokens.weight" if config.tied_head else "to_logits.weight"
                add(f"{at}.to_logits.weight", head, side.vocabulary(name))
    return parts


def tables(model: nn.Module) -> dict[str, Tensor]:
    """Official name -> sine-cosine table, of every modality that does not learn its positions."""
    found = {}
    for prefix, side in _sides(model):
        for name in side.names:
            start, row = int(side.space.position_offset[side.space.number[name]]), side.space[name]
            table = side.positions[start : start + row.length]
            if not row.grid:
                table = sincos(torch.arange(SEQUENCE_ROWS, device=table.device), table.shape[1])
            if name not in side.learned:
                found[f"{prefix}.{name}.pos_emb"] = table[None]
    return found


def _sides(model: nn.Module) -> list[tuple[str, Embeddings]]:
    return [(name, side) for name, side in model.named_children() if isinstance(side, Embeddings)]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The official state dict of a `FourM` or an `ImageEncoder`; weights are views into the model's."""
    ours = model.state_dict()
    return {name: ours[part.name][part.rows].view(part.shape) for name, part in layout(model).items()} | tables(model)


def is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the decoder's token tables are their own heads: equal, or stored once."""
    stems = dict.fromkeys(
        name.rsplit(".", 2)[0] for name in tensors if name.endswith((".token_emb.weight", ".to_logits.weight"))
    )
    pairs = [
        (tensors.get(f"{stem}.token_emb.weight"), tensors.get(f"{stem}.to_logits.weight"))
        for stem in stems
        if stem.startswith("decoder_embeddings.")
    ]
    equal = (a is None or b is None or (not (a.is_meta or b.is_meta) and torch.equal(a, b)) for a, b in pairs)
    return bool(pairs) and all(equal)


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies an official state dict into a `FourM` or an `ImageEncoder`.

    What the model computes itself (sine-cosine tables, norm biases that are always 0) may be absent. A tensor with two
    names (shared modality embedding, tied head) may stand under one of them; where they differ, the decoder's counts.

    Raises:
        ValueError: Missing, unexpected or misshapen tensors, or a table of other positions; names them.
    """
    parts, computed, ours = layout(model), tables(model), model.state_dict()
    given = dict(tensors)
    for name, part in parts.items():
        if name not in given:
            twins = (twin for twin, place in parts.items() if place[:2] == part[:2] and twin in tensors)
            given.update((name, tensors[twin]) for twin in twins)
    shapes = {name: part.shape for name, part in parts.items()} | {n: tuple(t.shape) for n, t in computed.items()}
    buffers = {name for name, _ in model.named_buffers()}
    problems = {
        "missing": [name for name in parts if name not in given and name not in buffers],
        "unexpected": [name for name in given if name not in shapes],
        "misshapen": [
            f"{name} {tuple(given[name].shape)} instead of {shape}"
            for name, shape in shapes.items()
            if name in given and tuple(given[name].shape) != shape
        ],
    }
    if not any(problems.values()):
        problems["not 4M's sines and cosines"] = [
            name
            for name, table in computed.items()
            if name in given and not (table.is_meta or given[name].is_meta)
            if not torch.allclose(given[name].to(table), table, rtol=0, atol=1e-3)
        ]
    if any(problems.values()):
        listed = [
            f"{len(names)} {kind}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise ValueError(f"the official weights do not fit the model; {'; '.join(listed)}")
    for name, part in parts.items():  # the encoder's names come before the decoder's
        if name in given:
            target = ours[part.name][part.rows]
            target.copy_(given[name].reshape(target.shape))


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a `FourM` as 4M's own `FM` loads it; see `FourM.save_official`."""
    path, space = Path(path), cast(TokenSpace, model.space)
    foreign = [n for n, row in space.modalities.items() if n not in MODALITIES or _shape(row) != _shape(MODALITIES[n])]
    if foreign:
        raise ValueError(f"4M has no modality of this name and shape: {', '.join(foreign)}")
    config = their_config(cast(FourMConfig, model.config), space)
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file != path:
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (cast(Tensor, model.temperature) != 1).any():
        raise ValueError("the model is calibrated, which 4M's format cannot say; set `model.temperature` to 1 first")
    tensors, seen = state_dict(model), set()
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(tensors, file, metadata={key: str(value) for key, value in config.items()})


def _shape(row: Modality) -> tuple[Any, ...]:
    return row.kind, row.vocab_size, row.grid, row.max_tokens, row.width, row.learned_positions
