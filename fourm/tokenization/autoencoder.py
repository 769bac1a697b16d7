"""Image tokenizers: an encoder, a quantizer and a decoder, with the pre- and post-processing in their config.

B images of H x W pixels with C channels inside the network (one per class after the class embedding), n tokens.
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

from fourm.tokenization.backbones import BackboneConfig, Decoder, Encoder
from fourm.tokenization.losses import LOSSES
from fourm.tokenization.quantizers import Quantizer, QuantizerConfig

CLASS_CHANNELS = 16  # width, at most, of the embedding of a class and of the features its logits are made from
MANY_CLASSES = 8  # from here on the softmax costs more than the rest of a training step
ALL_PIXELS = (slice(None), slice(None))


@dataclass(frozen=True)
class InputConfig:
    """What raw images look like.

    Args:
        kind: `image` (uint8), `field` (numbers with a unit), `normal` (unit vectors coded as uint8) or `classes`
            (integer ids).
        size: Height and width in pixels.
        channels: Channels of an `image`; 1 means arrays without a channel axis.
        low: Smallest value of a `field`; smaller ones are clipped.
        high: Largest value of a `field`; larger ones are clipped.
        offset: Subtracted from a `field`.
        scale: Divides a `field` after that, or the vectors of a `normal` (small where they are almost upright).
        units: Unit of a `field`, for people.
        classes: Number of classes.
        values: Raw value of each class; default 0, 1, 2, ...
        names: Names of the classes, for people.
    """

    kind: Literal["image", "field", "normal", "classes"] = "image"
    size: tuple[int, int] = (64, 64)
    channels: int = 3
    low: float = 0.0
    high: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    units: str = ""
    classes: int = 0
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
        if self.low >= self.high or self.scale == 0:
            raise ValueError(f"low {self.low}, high {self.high}, scale {self.scale}: need low < high and scale not 0")

    @property
    def network_channels(self) -> int:
        """Channels the encoder sees and the decoder gives."""
        return {"image": self.channels, "field": 1, "normal": 3,
                "classes": min(self.classes, CLASS_CHANNELS)}[self.kind]  # fmt: skip

    @property
    def class_values(self) -> np.ndarray:
        """Raw value of each class, int64."""
        return np.array(self.values or range(self.classes), dtype=np.int64)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw array."""
        coloured = self.kind == "normal" or (self.kind == "image" and self.channels > 1)
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
    """

    input: InputConfig = field(default_factory=InputConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    loss: Literal["l1", "mse", "smooth_l1", "cosine", "cross_entropy"] = "l1"
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}, allowed are {', '.join(LOSSES)}")
        if (self.loss == "cross_entropy") != (self.input.kind == "classes"):
            raise ValueError(f"loss {self.loss!r} does not fit inputs of kind {self.input.kind!r}: "
                             "classes need 'cross_entropy', the others need another loss")  # fmt: skip
        if self.class_weights and len(self.class_weights) != self.input.classes:
            raise ValueError(f"{len(self.class_weights)} class_weights for {self.input.classes} classes")
        if any(side % self.backbone.patch_size for side in self.input.size):
            raise ValueError(f"size {self.input.size} is not a multiple of patch_size {self.backbone.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, columns = (side // self.backbone.patch_size for side in self.input.size)
        return rows, columns

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenizerConfig:
        """Inverse of `dataclasses.asdict`, also after JSON. ValueError where a key is not known."""
        parts = {"input": InputConfig, "quantizer": QuantizerConfig, "backbone": BackboneConfig}
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
    """uint8 (B, H, W[, C]) to float (B, C, H, W) in [-1, 1]."""
    images = _stack(raw, config, "uint8 image")
    if images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images in [0, 255], got {_describe(images)}")
    pixels = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1)


def _field(raw: np.ndarray | Sequence[np.ndarray], config: InputConfig) -> Tensor:
    """Numbers (B, H, W) to float (B, 1, H, W), clipped, offset and scaled."""
    values = _stack(raw, config, "numbers")
    if values.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers in {config.units or 'any unit'}, got {_describe(values)}")
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite numbers, got {_describe(values)} with NaN or infinity")
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


PREPROCESS: dict[str, Callable[[np.ndarray | Sequence[np.ndarray], InputConfig], Tensor]] = {
    "image": _image,
    "field": _field,
    "normal": _normal,
    "classes": _classes,
}


def _to_image(output: Tensor, config: InputConfig) -> np.ndarray:
    pixels = ((output + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.reshape(-1, *config.raw_shape).numpy()


def _to_field(output: Tensor, config: InputConfig) -> np.ndarray:
    return (output[:, 0] * config.scale + config.offset).clamp(config.low, config.high).numpy()


POSTPROCESS: dict[str, Callable[[Tensor, InputConfig], np.ndarray]] = {
    "image": _to_image,
    "field": _to_field,
    "normal": lambda output, config: _to_image(F.normalize(output, dim=1), config),
    "classes": lambda output, config: config.class_values[output.argmax(1).numpy()],
}


class ImageTokenizer(nn.Module):
    """Raw image-like arrays to grids of ids and back."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.grid = config.grid
        self.vocab_size = config.quantizer.vocab_size
        channels, latent_dim = config.input.network_channels, config.quantizer.latent_dim
        self.encoder = Encoder(config.backbone, channels, latent_dim, self.grid)
        self.quantizer = Quantizer(config.quantizer)
        self.decoder = Decoder(config.backbone, channels, latent_dim, self.grid)
        if config.input.kind == "classes":
            self.class_in = nn.Embedding(config.input.classes, channels)
            self.class_out = nn.Linear(channels, config.input.classes)

    def preprocess(self, raw: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """Raw arrays to what `forward` takes.

        Args:
            raw: Arrays of `config.input.raw_shape`, or one array with a leading batch axis.

        Raises:
            ValueError: Wrong shape, type or range.
        """
        if len(raw) == 0:
            raise ValueError("expected at least one image, got none")
        return PREPROCESS[self.config.input.kind](raw, self.config.input)

    def _latents(self, x: Tensor) -> Tensor:
        if self.config.input.kind == "classes":
            x = self.class_in(x).permute(0, 3, 1, 2)
        return self.encoder(x)

    def _output(self, quantized: Tensor, pixels: tuple[slice, slice] = ALL_PIXELS) -> Tensor:
        output = self.decoder(quantized)[:, :, pixels[0], pixels[1]]
        if self.config.input.kind == "classes":
            output = self.class_out(output.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return output

    def forward(self, x: Tensor, pixels: tuple[slice, slice] = ALL_PIXELS) -> tuple[Tensor, Tensor, Tensor]:
        """Preprocessed images to their reconstruction.

        Args:
            x: What `preprocess` gives.
            pixels: Rows and columns the output is asked at.

        Returns:
            Output (B, C, H, W) (logits for classes), ids (B, n), and the quantizer's own loss (scalar).
        """
        quantized, ids, loss = self.quantizer(self._latents(x))
        return self._output(quantized, pixels), ids, loss

    @torch.no_grad()
    def encode(self, raw: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """Raw arrays to ids (B, n), int64, row-major. Call `eval()` first."""
        device = next(self.parameters()).device
        return self.quantizer(self._latents(self.preprocess(raw).to(device)))[1].cpu()

    @torch.no_grad()
    def _decode(self, ids: Tensor) -> Tensor:
        ids = torch.as_tensor(ids)
        cells = self.grid[0] * self.grid[1]
        if ids.ndim != 2 or ids.shape[1] != cells or ids.is_floating_point():
            raise ValueError(f"expected integer ids (B, {cells}), got {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"expected ids in [0, {self.vocab_size}), got [{int(ids.min())}, {int(ids.max())}]")
        return self._output(self.quantizer.codes(ids.long().to(next(self.parameters()).device))).cpu()

    def decode(self, ids: Tensor) -> np.ndarray:
        """Ids (B, n) to raw arrays (B, *raw_shape): uint8 images, fields in their unit, class values.

        Raises:
            ValueError: Wrong shape, type or range of the ids.
        """
        return POSTPROCESS[self.config.input.kind](self._decode(ids), self.config.input)

    def decode_probabilities(self, ids: Tensor) -> np.ndarray:
        """Ids (B, n) to the probability of each class, float32 (B, classes, H, W)."""
        if self.config.input.kind != "classes":
            raise ValueError(f"inputs of kind {self.config.input.kind!r} have no class probabilities")
        return self._decode(ids).softmax(1).numpy()

    def save_pretrained(self, folder: str | Path, figures: Mapping[str, float] | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and a card, with `figures` measured on held-out data."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"type": "autoencoder", **dataclasses.asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()},
                  folder / "model.safetensors")  # fmt: skip
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
        rows, columns = self._pixels()
        output, ids, quantizer_loss = self.tokenizer(x, (rows, columns))
        weights = {"weight": x.new_tensor(config.class_weights, dtype=torch.float32)} if config.class_weights else {}
        errors = LOSSES[config.loss](output.float(), x[..., rows, columns], **weights)
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
