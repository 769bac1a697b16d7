"""Image tokenizers: an encoder, a quantizer and a decoder, with the pre- and post-processing in their config.

B images of H x W pixels with C channels inside the network (one per class after the class embedding), n tokens, or n
in each of several codebooks. A diffusion decoder may stand in the place of the deterministic one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fourm.checkpoint import read_json, read_tensors, unshared
from fourm.data.transforms import TRANSFORMS, View
from fourm.encoders import Encoder as FrozenEncoder
from fourm.encoders import load_encoder
from fourm.tokenization.backbones import BackboneConfig, Decoder, Encoder
from fourm.tokenization.diffusion import Diffusion, DiffusionConfig, build_denoiser
from fourm.tokenization.inputs import KINDS, Arrays, InputConfig, resize_raw, to_network
from fourm.tokenization.losses import LOSSES, PerceptualConfig
from fourm.tokenization.quantizers import Quantizer, QuantizerConfig

ALL_PIXELS = (slice(None), slice(None))


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that rebuilds an `ImageTokenizer`.

    Args:
        input: What raw images look like.
        quantizer: How latents become ids.
        backbone: Encoder and decoder.
        loss: Reconstruction loss, a name in `LOSSES`; `cross_entropy` for classes and only for them.
        class_weights: Weight of each class in the loss; default 1.
        perceptual: A second loss beside it, for images and normals.
        denoiser: A diffusion decoder in the place of the backbone's: a name in `UNETS` or `UVITS`, or `controlnet`.
        denoiser_options: Arguments of its class in the place of those the name stands for.
        diffusion: Its noise process.
        conditioning: How a UViT sees the latents.
        dropout: Within the transformer of a UViT.
    """

    input: InputConfig = field(default_factory=InputConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    loss: Literal["l1", "mse", "smooth_l1", "cosine", "cross_entropy", "binary_cross_entropy"] = "l1"
    class_weights: tuple[float, ...] = ()
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    denoiser: str = ""
    denoiser_options: dict[str, Any] = field(default_factory=dict)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    conditioning: Literal["concat", "xattn"] = "concat"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}, allowed are {', '.join(LOSSES)}")
        fitting = KINDS[self.input.kind].losses
        if self.loss not in fitting:
            raise ValueError(f"loss {self.loss!r} does not fit inputs of kind {self.input.kind!r}, which take "
                             f"{', '.join(fitting)}")  # fmt: skip
        if self.denoiser and self.input.kind in ("classes", "mask"):
            raise ValueError(f"denoiser {self.denoiser!r} does not fit inputs of kind {self.input.kind!r}")
        if self.denoiser == "controlnet" and {self.input.kind, *self.input.mean, *self.input.std} != {"image", 0.5}:
            raise ValueError("a controlnet decodes inputs of kind 'image' with mean 0.5 and std 0.5 only")
        if self.perceptual.model and (self.denoiser or self.input.network_channels != 3 or self.input.encoder):
            raise ValueError(f"perceptual model {self.perceptual.model!r} needs inputs of 3 channels and no denoiser")
        if self.class_weights and len(self.class_weights) != self.input.classes:
            raise ValueError(f"{len(self.class_weights)} class_weights for {self.input.classes} classes")
        if any(side % self.backbone.patch_size for side in self.input.size):
            raise ValueError(f"size {self.input.size} is not a multiple of patch_size {self.backbone.patch_size}")

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of latents."""
        rows, columns = (side // self.backbone.patch_size for side in self.input.size)
        return rows, columns

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens: those of the latents, once per codebook."""
        return self.quantizer.codebooks * self.cells[0], self.cells[1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenizerConfig:
        """Inverse of `dataclasses.asdict`, also after JSON. ValueError where a key is not known."""
        parts = {"input": InputConfig, "quantizer": QuantizerConfig, "backbone": BackboneConfig,
                 "diffusion": DiffusionConfig, "perceptual": PerceptualConfig}  # fmt: skip
        try:
            nested = {key: part(**_tuples(values.get(key, {}))) for key, part in parts.items()}
            return cls(**_tuples(values) | nested)
        except TypeError as error:
            raise ValueError(f"not the config of an image tokenizer: {error}") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@functools.lru_cache
def _frozen(name: str, device: torch.device) -> FrozenEncoder:
    """Tokenizers of one encoder's features share it; it is no part of their weights."""
    return load_encoder(name, device)


class ImageTokenizer(nn.Module):
    """Raw image-like arrays to grids of ids and back.

    Attributes:
        grid: Rows and columns of tokens that `encode` makes of arrays of the configured size.
        vocab_size: Number of ids.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.grid = config.grid
        self.vocab_size = config.quantizer.vocab_size
        source, latent_dim = config.input, config.quantizer.latent_dim
        self.frozen: list[nn.Module] = []
        self.encoder = Encoder(config.backbone, source.encoded_channels, latent_dim, config.cells)
        self.quantizer = Quantizer(config.quantizer)
        self.decoder: Any
        if config.denoiser:
            self.decoder = build_denoiser(config.denoiser, source.decoded_channels, latent_dim, config.conditioning,
                                          config.dropout, config.denoiser_options)  # fmt: skip
            self.diffusion = Diffusion(config.diffusion)
        else:
            self.decoder = Decoder(config.backbone, source.decoded_channels, latent_dim, config.cells)
        if source.kind == "classes":
            self.class_in = nn.Embedding(source.classes, source.network_channels)
            if source.class_head:
                self.class_out = nn.Linear(source.network_channels, source.classes)

    @property
    def resizable(self) -> bool:
        """Whether arrays of other sizes than the configured one may be given."""
        return self.config.backbone.positions != "learned"

    def use_grid(self, grid: tuple[int, int]) -> None:
        """Expects arrays of the size that makes this grid of tokens, from now on.

        Raises:
            ValueError: It cannot make such a grid.
        """
        config, (rows, columns) = self.config, grid
        books, patch = config.quantizer.codebooks, config.backbone.patch_size
        if config.cells == (1, 1) and rows * columns == books:
            self.grid = grid
        elif self.resizable and not rows % books:
            size = (rows // books * patch, columns * patch)
            pixels = config.input.encoder_size * min(size) // min(config.input.size)
            source = dataclasses.replace(config.input, size=size, encoder_size=pixels)
            self.config = dataclasses.replace(config, input=source)
            self.grid = grid
        elif grid != self.grid:
            raise ValueError(f"grid is {grid}, but this tokenizer makes grids {self.grid} only")

    def freeze_encoder(self) -> None:
        """Leaves encoder, quantizer and class embedding as they are, and in evaluation mode, from now on."""
        self.frozen = [getattr(self, name) for name in ("encoder", "quantizer", "class_in") if hasattr(self, name)]
        for part in self.frozen:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ImageTokenizer:
        """Sets the mode of all that is not frozen."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def encodes(self, raw: Arrays) -> bool:
        """Whether raw arrays are RGB images whose features `config.input.encoder` makes."""
        image = np.asarray(raw[0])
        return bool(self.config.input.encoder) and image.dtype == np.uint8 and image.ndim == 3

    def features(self, images: Arrays, size: tuple[int, int] | None = None) -> Tensor:
        """RGB images (B, H, W, 3), uint8, of one size to features (B, C, h, w), by the frozen encoder.

        Args:
            images: Any size of the shape of the map, which the encoder brings to `config.input.encoder_size`.
            size: Another h and w than those of `config.input.size`, of images larger or smaller in proportion.

        Raises:
            ValueError: The encoder gives a map of another size or other channels.
        """
        source = self.config.input
        encoder: Any = _frozen(source.encoder, next(self.parameters()).device)
        expected = (*(size or source.size), source.channels)
        pixels = source.encoder_size * min(expected[:2]) // min(source.size)  # one encoder serves several sizes
        inputs = (images, pixels) if hasattr(encoder, "size") else (images,)
        found = encoder.pooled(*inputs)[:, None, None] if source.size == (1, 1) else encoder.features(*inputs)
        if found.shape[1:] != expected:
            raise ValueError(f"{source.encoder} gives features {tuple(found.shape[1:])}, expected {expected}: see "
                             "input.size, channels and encoder_size")  # fmt: skip
        return found.float().permute(0, 3, 1, 2)

    def shown(self, raw: np.ndarray, view: View) -> np.ndarray:
        """What a view shows of a raw array, in the size of the input, by the transform of its kind.

        Args:
            raw: An array of any size, the view's.
            view: Which part, and whether mirrored.
        """
        source = self.config.input
        kind, size = source.kind, source.size
        if self.encodes([raw]):
            kind, size = "image", (source.encoder_size, source.encoder_size)
        elif kind == "image" and (source.channels == 1 or source.normals):
            kind = "field" if source.channels == 1 else "normal"
        return TRANSFORMS[kind](size=size)(raw, view)

    def targets(self, raw: Arrays, batch_size: int = 64) -> np.ndarray:
        """What decoded arrays are to be compared with, of the size of the input: raw arrays, or features of images."""
        source = self.config.input
        if not self.encodes(raw):
            larger = self.resizable and len(source.raw_shape) > 1 and np.shape(raw[0])[:2] != source.size
            return resize_raw(raw, source.size, source) if larger else np.stack(list(raw))
        found = [self.features(raw[start : start + batch_size]).cpu() for start in range(0, len(raw), batch_size)]
        return KINDS["features"].from_network(torch.cat(found), source)

    def preprocess(self, raw: Arrays, valid: Arrays | None = None) -> Tensor:
        """Raw arrays to what `forward` takes.

        Args:
            raw: Arrays of `config.input.raw_shape`, or one array with a leading batch axis. A `resizable` tokenizer
                takes other heights and widths too, if they are multiples of its patches and the same for all arrays.
                In the place of features RGB images of any one size, where `config.input` names an encoder.
            valid: Masks (H, W) of valid pixels, with `config.input.mask_value`; default: all that are finite.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        if len(raw) == 0:
            raise ValueError("expected at least one image, got none")
        if self.encodes(raw):
            return self.features(raw)
        source, shape, patch = self.config.input, np.shape(raw[0]), self.config.backbone.patch_size
        if self.resizable and len(shape) > 1 and shape[:2] != source.size:
            if any(side % patch or not side for side in shape[:2]):
                raise ValueError(f"image 0: {'x'.join(map(str, shape))} has sides that are no multiples of {patch}")
            source = dataclasses.replace(source, size=shape[:2])
        return to_network(raw, source, valid)

    def latents(self, x: Tensor) -> Tensor:
        """What `preprocess` gives to latents (B, n, d)."""
        if self.config.input.kind == "classes":
            x = self.class_in(x).permute(0, 3, 1, 2)
        return self.encoder(x)

    def output(self, quantized: Tensor, cells: tuple[int, int], pixels: tuple[slice, slice] = ALL_PIXELS) -> Tensor:
        """Quantized latents (B, n, d) of rows and columns of cells to (B, C, H, W), at some rows and columns."""
        output = self.decoder(quantized, cells)[:, :, pixels[0], pixels[1]]
        if hasattr(self, "class_out"):
            output = self.class_out(output.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return output

    def cells_of(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of latents of preprocessed images."""
        height, width = x.shape[-2:]
        return height // self.config.backbone.patch_size, width // self.config.backbone.patch_size

    def forward(self, x: Tensor, pixels: tuple[slice, slice] = ALL_PIXELS) -> tuple[Tensor, Tensor, Tensor]:
        """Preprocessed images to their reconstruction, not by diffusion.

        Args:
            x: What `preprocess` gives.
            pixels: Rows and columns the output is asked at.

        Returns:
            Output (B, C, H, W) (logits for classes and masks), ids (B, n), and the quantizer's own loss (scalar).
        """
        quantized, ids, loss = self.quantizer(self.latents(x))
        return self.output(quantized, self.cells_of(x), pixels), ids, loss

    @torch.no_grad()
    def encode(self, raw: Arrays, valid: Arrays | None = None) -> Tensor:
        """Raw arrays, see `preprocess`, to ids (B, n), int64, row-major, one codebook after the other; in eval mode."""
        device = next(self.parameters()).device
        return self.quantizer(self.latents(self.preprocess(raw, valid).to(device)))[1].cpu()

    @torch.no_grad()
    def _decode(self, ids: Tensor, cells: tuple[int, int] | None = None, **sampling: Any) -> Tensor:
        ids = torch.as_tensor(ids)
        cells = cells or self.config.cells
        count = self.config.quantizer.codebooks * cells[0] * cells[1]
        if ids.ndim != 2 or ids.shape[1] != count or ids.is_floating_point():
            raise ValueError(f"expected integer ids (B, {count}), got {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"expected ids in [0, {self.vocab_size}), got [{int(ids.min())}, {int(ids.max())}]")
        quantized = self.quantizer.codes(ids.long().to(next(self.parameters()).device))
        if not self.config.denoiser:
            return self.output(quantized, cells).float().cpu()  # numpy has no bfloat16, which autocast gives
        size = (cells[0] * self.config.backbone.patch_size, cells[1] * self.config.backbone.patch_size)
        condition, size = quantized.transpose(1, 2).unflatten(2, cells), sampling.pop("size", size)
        if self.config.denoiser != "controlnet":
            return self.diffusion.sample(self.decoder, condition, size, **sampling).cpu()
        latents = self.diffusion.sample(self.decoder, condition, self.decoder.latent_size, **sampling)
        return self.decoder.to_images(latents, size).float().cpu()

    def decode(self, ids: Tensor, cells: tuple[int, int] | None = None, **sampling: Any) -> np.ndarray:
        """Ids (B, n) to raw arrays: uint8 images, fields in their unit, class values, standardised depth, vectors.

        Args:
            ids: What `encode` gives.
            cells: Rows and columns of latents, where they are not those of the configured size.
            sampling: Of a diffusion decoder: `steps`, `guidance`, `generator`, `size` and the other arguments of
                `Diffusion.sample`.

        Raises:
            ValueError: Wrong shape, type or range of the ids.
        """
        return KINDS[self.config.input.kind].from_network(self._decode(ids, cells, **sampling), self.config.input)

    def decode_probabilities(self, ids: Tensor) -> np.ndarray:
        """Ids (B, n) to the probability of each class, float32 (B, classes, H, W), or of the mask (B, 1, H, W)."""
        if self.config.input.kind not in ("classes", "mask"):
            raise ValueError(f"inputs of kind {self.config.input.kind!r} have no class probabilities")
        output = self._decode(ids)
        return (output.softmax(1) if self.config.input.kind == "classes" else output.sigmoid()).numpy()

    def save_pretrained(self, folder: str | Path, figures: Mapping[str, float] | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and a card, with `figures` measured on held-out data."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"type": "autoencoder", **dataclasses.asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(unshared(self.state_dict()), folder / "model.safetensors")
        source = self.config.input
        measured = "".join(f"* {name}: {value:.4g}\n" for name, value in (figures or {}).items())
        (folder / "README.md").write_text(
            f"# {folder.name}\n\nTurns {source.kind} arrays of shape {source.raw_shape} into a grid {self.grid} of "
            f"{self.vocab_size} ids ({self.config.quantizer.type}) and back: `load_tokenizer(folder)` gives "
            f"`encode(arrays)` and `decode(ids)`. Measured on data it was not trained on:\n\n{measured}"
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageTokenizer:
        """Rebuilds a saved tokenizer, in eval mode."""
        config = read_json(Path(folder) / "config.json")
        config.pop("type", None)
        tokenizer = cls(TokenizerConfig.from_dict(config))
        tokenizer.load_state_dict(read_tensors(Path(folder) / "model.safetensors"))
        return tokenizer.eval()
