"""Image tokenizers: an encoder, a quantizer and a decoder, with the pre- and post-processing in their config.

B images of H x W pixels with C channels inside the network (one per class after the class embedding), n tokens, or n
in each of several codebooks. A diffusion decoder may stand in the place of the deterministic one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourm.checkpoint import unshared
from fourm.tokenization.backbones import BackboneConfig, Decoder, Encoder
from fourm.tokenization.diffusion import Diffusion, DiffusionConfig, build_denoiser
from fourm.tokenization.losses import LOSSES
from fourm.tokenization.quantizers import Quantizer, QuantizerConfig

CLASS_CHANNELS = 16  # width, at most, of the embedding of a class and of the features its logits are made from
MANY_CLASSES = 8  # from here on the softmax costs more than the rest of a training step
ALL_PIXELS = (slice(None), slice(None))


@dataclass(frozen=True)
class InputConfig:
    """What raw images look like.

    Args:
        kind: `image` (uint8), `field` (numbers with a unit), `normal` (unit vectors coded as uint8), `classes` (integer
            ids), `depth` (numbers up to offset and scale), `mask` (0 and 1) or `features` (vectors).
        size: Height and width in pixels.
        channels: Channels of an `image` (1 means arrays without a channel axis) or of `features`, whose arrays are
            (H, W, channels), or (channels,) where the size is 1 x 1.
        mean: Subtracted from the values of an `image` in [0, 1], one number or one per channel; of `features`, from the
            RGB image they are made from.
        std: Divides them after that.
        low: Smallest value of a `field`; smaller ones are clipped.
        high: Largest value of a `field`; larger ones are clipped.
        offset: Subtracted from a `field`.
        scale: Divides a `field` after that, or the vectors of a `normal` (small where they are almost upright).
        units: Unit of a `field`, for people.
        classes: Number of classes.
        class_channels: Width of the embedding of a class; 0 for the number of classes, at most 16.
        class_head: Make the logits from as many channels by a linear layer, rather than by the decoder itself.
        values: Raw value of each class; default 0, 1, 2, ...
        names: Names of the classes, for people.
    """

    kind: Literal["image", "field", "normal", "classes", "depth", "mask", "features"] = "image"
    size: tuple[int, int] = (64, 64)
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    low: float = 0.0
    high: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    units: str = ""
    classes: int = 0
    class_channels: int = 0
    class_head: bool = True
    values: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in PREPROCESS:
            raise ValueError(f"input kind is {self.kind!r}, allowed are {', '.join(PREPROCESS)}")
        if self.kind == "classes" and self.classes < 2:
            raise ValueError(f"classes is {self.classes}, expected 2 or more for inputs of kind 'classes'")
        for name in ("values", "names"):
            if getattr(self, name) and len(getattr(self, name)) != self.classes:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.classes} classes")
        if self.kind == "image" and {len(self.mean), len(self.std)} - {1, self.channels}:
            raise ValueError(f"mean {self.mean}, std {self.std}: expected 1 or {self.channels} numbers each")
        if self.low >= self.high or self.scale == 0:
            raise ValueError(f"low {self.low}, high {self.high}, scale {self.scale}: need low < high and scale not 0")

    @property
    def network_channels(self) -> int:
        """Channels the encoder sees."""
        return {"image": self.channels, "normal": 3, "features": self.channels,
                "classes": self.class_channels or min(self.classes, CLASS_CHANNELS)}.get(self.kind, 1)  # fmt: skip

    @property
    def decoded_channels(self) -> int:
        """Channels the decoder gives."""
        return self.network_channels if self.class_head or self.kind != "classes" else self.classes

    @property
    def class_values(self) -> np.ndarray:
        """Raw value of each class, int64."""
        return np.array(self.values or range(self.classes), dtype=np.int64)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw array."""
        if self.kind == "features" and self.size == (1, 1):
            return (self.channels,)
        coloured = self.kind in ("normal", "features") or (self.kind == "image" and self.channels > 1)
        return (*self.size, self.network_channels) if coloured else self.size


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that rebuilds an `ImageTokenizer`.

    Args:
        input: What raw images look like.
        quantizer: How latents become ids.
        backbone: Encoder and decoder.
        loss: Reconstruction loss, a name in `LOSSES`; `cross_entropy` for classes and only for them.
        class_weights: Weight of each class in the loss; default 1.
        denoiser: A diffusion decoder in the place of the backbone's, a name in `UNETS` or `UVITS`.
        diffusion: Its noise process.
        conditioning: How a UViT sees the latents.
        dropout: Within the transformer of a UViT.
    """

    input: InputConfig = field(default_factory=InputConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    loss: Literal["l1", "mse", "smooth_l1", "cosine", "cross_entropy", "binary_cross_entropy"] = "l1"
    class_weights: tuple[float, ...] = ()
    denoiser: str = ""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    conditioning: Literal["concat", "xattn"] = "concat"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}, allowed are {', '.join(LOSSES)}")
        needed = {"classes": "cross_entropy", "mask": "binary_cross_entropy"}
        if needed.get(self.input.kind, "none") != (self.loss if self.loss in needed.values() else "none"):
            raise ValueError(f"loss {self.loss!r} does not fit inputs of kind {self.input.kind!r}: classes need "
                             "'cross_entropy', masks 'binary_cross_entropy', the others another loss")  # fmt: skip
        if self.denoiser and self.input.kind in needed:
            raise ValueError(f"denoiser {self.denoiser!r} does not fit inputs of kind {self.input.kind!r}")
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
                 "diffusion": DiffusionConfig}  # fmt: skip
        try:
            nested = {key: part(**_tuples(values.get(key, {}))) for key, part in parts.items()}
            return cls(**_tuples(values) | nested)
        except TypeError as error:
            raise ValueError(f"not the config of an image tokenizer: {error}") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _describe(array: np.ndarray) -> str:
    shape = "x".join(map(str, array.shape))
    if not array.size or array.dtype.kind not in "iufb":
        return f"{array.dtype} {shape}"
    return f"{array.dtype} {shape} in [{array.min():g}, {array.max():g}]"


def _stack(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig, expected: str) -> np.ndarray:
    """All images in one array (B, *raw_shape); the first one of another shape is named."""
    for index, image in enumerate(raw):
        if np.shape(image) != config.raw_shape:
            wanted = "x".join(map(str, config.raw_shape))
            raise ValueError(f"image {index}: expected {expected} {wanted}, got {_describe(np.asarray(image))}")
    return np.stack([np.asarray(image) for image in raw])


def _image(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """uint8 (B, H, W[, C]) to float (B, C, H, W): in [0, 1], less `mean`, over `std`."""
    images = _stack(raw, config, "uint8 image")
    if images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images in [0, 255], got {_describe(images)}")
    pixels = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    return pixels.float().div_(255 * std).sub_(mean / std)


def _numbers(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> np.ndarray:
    values = _stack(raw, config, "numbers")
    if values.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers in {config.units or 'any unit'}, got {_describe(values)}")
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite numbers, got {_describe(values)} with NaN or infinity")
    return values


def _field(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """Numbers (B, H, W) to float (B, 1, H, W), clipped, offset and scaled."""
    values = _numbers(raw, config)
    clipped = np.clip(values.astype(np.float32), config.low, config.high)
    return torch.from_numpy((clipped - config.offset) / config.scale).float().unsqueeze(1)


def _normal(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """uint8-coded unit vectors (B, H, W, 3) to unit vectors over `scale` (B, 3, H, W)."""
    return F.normalize(_image(raw, config), dim=1) / config.scale


def _classes(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """Raw class values (B, H, W) to class numbers, int64 (B, H, W)."""
    ids = _stack(raw, config, "integer class ids")
    allowed = f"integer class ids in [0, {config.classes})"
    if config.values:
        allowed = f"integers among {', '.join(map(str, config.values))}"
    if ids.dtype.kind not in "iu":
        raise ValueError(f"expected {allowed}, got {_describe(ids)}")
    known = config.class_values
    order = np.argsort(known)
    numbers = order[np.searchsorted(known, ids, sorter=order).clip(0, config.classes - 1)]
    if not (known[numbers] == ids).all():
        raise ValueError(f"expected {allowed}, got {_describe(ids)}")
    return torch.from_numpy(numbers.astype(np.int64))


def _depth(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """Numbers (B, H, W), uint16 as 65,535ths, to float (B, 1, H, W): each image less the mean and over the deviation of
    its middle 80 % (4M's robust standardisation)."""
    values = torch.from_numpy(_numbers(raw, config).astype(np.float32))
    if np.asarray(raw[0]).dtype == np.uint16:
        values = values / 65_535
    ordered = values.flatten(1).sort(1).values
    middle = ordered[:, int(0.1 * ordered.shape[1]) : int(0.9 * ordered.shape[1])]
    mean, deviation = middle.mean(1), (middle.var(1) + 1e-6).sqrt()
    return ((values - mean[:, None, None]) / deviation[:, None, None]).unsqueeze(1)


def _mask(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """Masks (B, H, W), bool or 0 and 1, to float (B, 1, H, W)."""
    values = _stack(raw, config, "mask")
    if values.dtype.kind not in "biu" or values.min() < 0 or values.max() > 1:
        raise ValueError(f"expected masks, bool or integers 0 and 1, got {_describe(values)}")
    return torch.from_numpy(values).float().unsqueeze(1)


def _features(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """Vectors (B, [H, W,] C) to float (B, C, H, W)."""
    values = torch.from_numpy(_numbers(raw, config).astype(np.float32))
    return values.view(len(values), *config.size, config.channels).permute(0, 3, 1, 2)


PREPROCESS: dict[str, Callable[[np.ndarray | Sequence[np.ndarray], InputConfig], Tensor]] = {
    "image": _image,
    "field": _field,
    "normal": _normal,
    "classes": _classes,
    "depth": _depth,
    "mask": _mask,
    "features": _features,
}


def _to_image(output: Tensor, config: InputConfig) -> np.ndarray:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    pixels = ((output + mean / std) * (255 * std)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return (pixels if pixels.shape[-1] > 1 else pixels[..., 0]).numpy()


def _to_field(output: Tensor, config: InputConfig) -> np.ndarray:
    return (output[:, 0] * config.scale + config.offset).clamp(config.low, config.high).numpy()


def _to_features(output: Tensor, config: InputConfig) -> np.ndarray:
    vectors = output.permute(0, 2, 3, 1)
    return (vectors.flatten(1) if config.size == (1, 1) and output.shape[2:] == (1, 1) else vectors).numpy()


POSTPROCESS: dict[str, Callable[[Tensor, InputConfig], np.ndarray]] = {
    "image": _to_image,
    "field": _to_field,
    "normal": lambda output, config: _to_image(F.normalize(output, dim=1), config),
    "classes": lambda output, config: config.class_values[output.argmax(1).numpy()],
    "depth": lambda output, config: output[:, 0].numpy(),
    "mask": lambda output, config: (output[:, 0] > 0).numpy(),
    "features": _to_features,
}


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
        self.encoder = Encoder(config.backbone, source.network_channels, latent_dim, config.cells)
        self.quantizer = Quantizer(config.quantizer)
        self.decoder: Any
        if config.denoiser:
            self.decoder = build_denoiser(
                config.denoiser, source.decoded_channels, latent_dim, config.conditioning, config.dropout
            )
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
        if config.cells == (1, 1) and rows * columns == config.quantizer.codebooks:
            self.grid = grid
        elif self.resizable and config.quantizer.codebooks == 1:
            size = (rows * config.backbone.patch_size, columns * config.backbone.patch_size)
            self.config = dataclasses.replace(config, input=dataclasses.replace(config.input, size=size))
            self.grid = grid
        elif grid != self.grid:
            raise ValueError(f"grid is {grid}, but this tokenizer makes grids {self.grid} only")

    def preprocess(self, raw: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """Raw arrays to what `forward` takes.

        Args:
            raw: Arrays of `config.input.raw_shape`, or one array with a leading batch axis. A `resizable` tokenizer
                takes other heights and widths too, if they are multiples of its patches and the same for all arrays.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        if len(raw) == 0:
            raise ValueError("expected at least one image, got none")
        source, shape, patch = self.config.input, np.shape(raw[0]), self.config.backbone.patch_size
        if self.resizable and len(shape) > 1 and shape[:2] != source.size:
            if any(side % patch or not side for side in shape[:2]):
                raise ValueError(f"image 0: {'x'.join(map(str, shape))} has sides that are no multiples of {patch}")
            source = dataclasses.replace(source, size=shape[:2])
        return PREPROCESS[source.kind](raw, source)

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
    def encode(self, raw: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """Raw arrays to ids (B, n), int64, row-major, one codebook after the other. Call `eval()` first."""
        device = next(self.parameters()).device
        return self.quantizer(self.latents(self.preprocess(raw).to(device)))[1].cpu()

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
            return self.output(quantized, cells).cpu()
        size = (cells[0] * self.config.backbone.patch_size, cells[1] * self.config.backbone.patch_size)
        condition = quantized.transpose(1, 2).unflatten(2, cells)
        return self.diffusion.sample(self.decoder, condition, sampling.pop("size", size), **sampling).cpu()

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
        return POSTPROCESS[self.config.input.kind](self._decode(ids, cells, **sampling), self.config.input)

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
        config = json.loads((Path(folder) / "config.json").read_text())
        config.pop("type", None)
        tokenizer = cls(TokenizerConfig.from_dict(config))
        tokenizer.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return tokenizer.eval()


class TokenizerLoss(nn.Module):
    """A tokenizer whose forward gives its training loss, so that DDP can wrap it."""

    def __init__(self, tokenizer: ImageTokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, batch: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Losses of one micro-batch as its share of the mean over `counts[0]` images."""
        config = self.tokenizer.config
        x = batch["images"]
        if config.denoiser:
            quantized, ids, quantizer_loss = self.tokenizer.quantizer(self.tokenizer.latents(x))
            condition = quantized.transpose(1, 2).unflatten(2, self.tokenizer.cells_of(x))
            mean = self.tokenizer.diffusion.loss(self.tokenizer.decoder, x, condition, config.loss)
            reconstruction = mean * (len(x) / counts[0])
        else:
            rows, columns = self._pixels()
            output, ids, quantizer_loss = self.tokenizer(x, (rows, columns))
            weighted = {"weight": x.new_tensor(config.class_weights, dtype=torch.float32)}
            errors = LOSSES[config.loss](
                output.float(), x[..., rows, columns], **(weighted if config.class_weights else {})
            )
            reconstruction = errors.flatten(1).mean(1).sum() / counts[0]
        own = quantizer_loss * (len(x) / counts[0])
        used = ids.detach().unique().numel() / self.tokenizer.vocab_size
        return {
            "loss": reconstruction + own,
            "loss/reconstruction": reconstruction.detach(),
            "loss/quantizer": own.detach(),
            "batch_codebook_use": (len(x) / counts[0]) * used,
        }

    def _pixels(self) -> tuple[slice, slice]:
        """In training with many classes every other row and column from a random start: the same mean, cheaper."""
        if not self.training or self.tokenizer.config.input.classes < MANY_CLASSES:
            return ALL_PIXELS
        top, left = torch.randint(2, (2,)).tolist()
        return slice(top, None, 2), slice(left, None, 2)


class TokenizerTask:
    """Training an image tokenizer, in the form the trainer takes.

    Args:
        tokenizer: What is trained.
        modality: Name of its raw modality in the samples.
    """

    def __init__(self, tokenizer: ImageTokenizer, modality: str):
        self.model: nn.Module = TokenizerLoss(tokenizer)
        self.tokenizer = tokenizer
        self.modality = modality

    def collate(self, samples: Sequence[Mapping[str, Any]], draws: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Raw samples to a batch: `images` as `ImageTokenizer.forward` takes them, and `keys`."""
        images = self.tokenizer.preprocess([sample[self.modality] for sample in samples])
        return {"images": images, "keys": tuple(sample["__key__"] for sample in samples)}

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Number of images, (1,)."""
        return torch.tensor([float(len(batch["images"]))], device=batch["images"].device)

    def loss(self, batch: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Losses that add up over micro-batches and processes to the mean over `counts[0]` images."""
        return self.model(batch, counts)
