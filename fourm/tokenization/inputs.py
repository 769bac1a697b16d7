"""What raw image-like arrays are: per kind, how a network sees them and how its output becomes one of them again.

B images of H x W pixels with C channels inside the network. A new kind is one entry of `KINDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_CHANNELS = 16  # width, at most, of the embedding of a class and of the features its logits are made from
REGRESSION = ("l1", "mse", "smooth_l1", "cosine")
Arrays = np.ndarray | Sequence[np.ndarray]


@dataclass(frozen=True)
class InputConfig:
    """What raw images look like.

    Args:
        kind: A name in `KINDS`: `image` (uint8), `field` (numbers with a unit), `normal` (unit vectors coded as uint8),
            `classes` (integer ids), `depth` (numbers up to offset and scale), `mask` (0 and 1 or 255), `features`
            (vectors), `spectrogram` (waves of sound, which the network sees as mel bands over time).
        size: Height and width in pixels.
        channels: Channels of an `image` (1 means arrays without a channel axis) or of `features`, whose arrays are
            (H, W, channels), or (channels,) where the size is 1 x 1.
        normals: An `image` holds normals: x turns round in a mirror.
        mean: Subtracted from the values of an `image` in [0, 1], one number or one per channel; of `features`, from the
            RGB image they are made from.
        std: Divides them after that.
        low: Smallest value of a `field`; smaller ones are clipped.
        high: Largest value of a `field`; larger ones are clipped.
        offset: Subtracted from a `field`.
        scale: Divides a `field` after that, or the vectors of a `normal` (small where they are almost upright).
        units: Unit of a `field`, for people.
        rate: Samples a second of a `spectrogram`, whose size is mel bands and frames: waves have frames * hop samples.
        window: Samples of a frame.
        hop: Samples from frame to frame.
        classes: Number of classes.
        class_channels: Width of the embedding of a class; 0 for the number of classes, at most 16.
        class_head: Make the logits from as many channels by a linear layer, rather than by the decoder itself.
        values: Raw value of each class; default 0, 1, 2, ...
        names: Names of the classes, for people.
        mask_value: What the network sees, after preprocessing, where a pixel is not valid: not finite, or false in the
            mask that comes with the array. A channel of 1 (valid) and -1 is added. None where all pixels are valid.
        encoder: Frozen encoder (`fourm.encoders`) that makes the `features` when RGB images (H, W, 3), uint8, are given
            in their place.
        encoder_size: Pixels of the shorter side of images that it makes features of `size` from.
    """

    kind: str = "image"
    size: tuple[int, int] = (64, 64)
    channels: int = 3
    normals: bool = False
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    low: float = 0.0
    high: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    units: str = ""
    rate: int = 16_000
    window: int = 1024
    hop: int = 256
    classes: int = 0
    class_channels: int = 0
    class_head: bool = True
    values: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    mask_value: float | None = None
    encoder: str = ""
    encoder_size: int = 224

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"input kind is {self.kind!r}, allowed are {', '.join(KINDS)}")
        if self.kind == "classes" and self.classes < 2:
            raise ValueError(f"classes is {self.classes}, expected 2 or more for inputs of kind 'classes'")
        for name in ("values", "names"):
            if getattr(self, name) and len(getattr(self, name)) != self.classes:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.classes} classes")
        if self.kind == "image" and {len(self.mean), len(self.std)} - {1, self.channels}:
            raise ValueError(f"mean {self.mean}, std {self.std}: expected 1 or {self.channels} numbers each")
        if self.normals and (self.kind, self.channels) != ("image", 3):
            raise ValueError(f"normals fit inputs of kind 'image' and 3 channels, not {self.kind!r} of {self.channels}")
        if self.mask_value is not None and self.kind in ("classes", "mask", "spectrogram"):
            raise ValueError(f"mask_value does not fit inputs of kind {self.kind!r}")
        if self.encoder and self.kind != "features":
            raise ValueError(f"encoder is {self.encoder!r}, but inputs are of kind {self.kind!r}, not 'features'")
        if self.low >= self.high or self.scale == 0:
            raise ValueError(f"low {self.low}, high {self.high}, scale {self.scale}: need low < high and scale not 0")

    @property
    def network_channels(self) -> int:
        """Channels of values in the network."""
        return KINDS[self.kind].channels(self)

    @property
    def encoded_channels(self) -> int:
        """Channels the encoder sees."""
        return self.network_channels + (self.mask_value is not None)

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
        return KINDS[self.kind].shape(self)


def _describe(array: np.ndarray) -> str:
    shape = "x".join(map(str, array.shape))
    if not array.size or array.dtype.kind not in "iufb":
        return f"{array.dtype} {shape}"
    return f"{array.dtype} {shape} in [{array.min():g}, {array.max():g}]"


def _stack(raw: Arrays, config: InputConfig, expected: str) -> np.ndarray:
    """All images in one array (B, *raw_shape); the first one of another shape is named."""
    for index, image in enumerate(raw):
        if np.shape(image) != config.raw_shape:
            wanted = "x".join(map(str, config.raw_shape))
            raise ValueError(f"image {index}: expected {expected} {wanted}, got {_describe(np.asarray(image))}")
    return np.stack([np.asarray(image) for image in raw])


def _image(raw: Arrays, config: InputConfig) -> Tensor:
    """uint8 (B, H, W[, C]) to float (B, C, H, W): in [0, 1], less `mean`, over `std`."""
    images = _stack(raw, config, "uint8 image")
    if images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images in [0, 255], got {_describe(images)}")
    pixels = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    return pixels.float().div_(255 * std).sub_(mean / std)


def _numbers(raw: Arrays, config: InputConfig) -> np.ndarray:
    values = _stack(raw, config, "numbers")
    if values.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers in {config.units or 'any unit'}, got {_describe(values)}")
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite numbers, got {_describe(values)} with NaN or infinity")
    return values


def _field(raw: Arrays, config: InputConfig) -> Tensor:
    """Numbers (B, H, W) to float (B, 1, H, W), clipped, offset and scaled."""
    values = _numbers(raw, config)
    clipped = np.clip(values.astype(np.float32), config.low, config.high)
    return torch.from_numpy((clipped - config.offset) / config.scale).float().unsqueeze(1)


def _normal(raw: Arrays, config: InputConfig) -> Tensor:
    """uint8-coded unit vectors (B, H, W, 3) to unit vectors over `scale` (B, 3, H, W)."""
    return F.normalize(_image(raw, config), dim=1) / config.scale


def _classes(raw: Arrays, config: InputConfig) -> Tensor:
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


def _depth(raw: Arrays, config: InputConfig) -> Tensor:
    """Numbers (B, H, W), uint16 as 65,535ths, to float (B, 1, H, W): each image less the mean and over the deviation of
    its middle 80 % (4M's robust standardisation)."""
    values = torch.from_numpy(_numbers(raw, config).astype(np.float32))
    if np.asarray(raw[0]).dtype == np.uint16:
        values = values / 65_535
    ordered = values.flatten(1).sort(1).values
    middle = ordered[:, int(0.1 * ordered.shape[1]) : int(0.9 * ordered.shape[1])]
    mean, deviation = middle.mean(1), (middle.var(1) + 1e-6).sqrt()
    return ((values - mean[:, None, None]) / deviation[:, None, None]).unsqueeze(1)


def _mask(raw: Arrays, config: InputConfig) -> Tensor:
    """Masks (B, H, W), bool or 0 and 1 or 0 and 255, to float (B, 1, H, W)."""
    values = _stack(raw, config, "mask")
    if values.dtype.kind not in "biu" or not np.isin(values, (0, 255 if values.max(initial=0) > 1 else 1)).all():
        raise ValueError(f"expected masks, bool or integers 0 and 1 or 0 and 255, got {_describe(values)}")
    return torch.from_numpy(values > 0).float().unsqueeze(1)


def _features(raw: Arrays, config: InputConfig) -> Tensor:
    """Vectors (B, [H, W,] C) to float (B, C, H, W)."""
    values = torch.from_numpy(_numbers(raw, config).astype(np.float32))
    return values.view(len(values), *config.size, config.channels).permute(0, 3, 1, 2)


FLOOR = -80.0  # dB of a full-scale sine; what is softer is silence


def _mel_bands(config: InputConfig) -> Tensor:
    """Triangles (bands, window / 2 + 1) of equal width on the mel scale, 2595 log10(1 + f / 700)."""
    top = 2595 * np.log10(1 + config.rate / 1400)
    edges = 700 * (10 ** (np.linspace(0, top, config.size[0] + 2) / 2595) - 1)
    bins = np.linspace(0, config.rate / 2, config.window // 2 + 1)
    widths = np.maximum(np.diff(edges), config.rate / config.window)[:, None]  # or a low band would have no bin
    rising, falling = (bins - edges[:-2, None]) / widths[:-1], (edges[2:, None] - bins) / widths[1:]
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).float()


def _spectrogram(raw: Arrays, config: InputConfig) -> Tensor:
    """Waves (B, samples), int16 or float in [-1, 1], to (B, 1, bands, frames): -1 is silence, 1 full scale."""
    waves = _numbers(raw, config).astype(np.float32) / (32_768 if np.asarray(raw[0]).dtype.kind == "i" else 1)
    window = torch.hann_window(config.window)
    spectrum = torch.stft(torch.from_numpy(waves), config.window, config.hop, window=window, return_complex=True)
    power = (spectrum[:, :, :-1] * (2 / window.sum())).abs() ** 2
    with torch.autocast("cpu", enabled=False):
        loudness = _mel_bands(config) @ power
    return (10 * (loudness + 1e-9).log10() / (-FLOOR / 2) + 1).clamp(-1, 1).unsqueeze(1)


def _to_waves(output: Tensor, config: InputConfig) -> np.ndarray:
    """Waves (B, samples) whose spectrogram is about that, with phases found by Griffin and Lim (1984)."""
    power = 10 ** ((output[:, 0].clamp(-1, 1) - 1) * (-FLOOR / 20))
    window, bands = torch.hann_window(config.window), _mel_bands(config)
    with torch.autocast("cpu", enabled=False):
        size = (torch.linalg.pinv(bands) @ power).clamp(min=0).sqrt() * (window.sum() / 2)
    size = torch.cat([size, size[:, :, -1:]], dim=2)
    how: dict[str, Any] = {"n_fft": config.window, "hop_length": config.hop, "window": window}
    spectrum = torch.polar(size, 2 * np.pi * torch.rand(size.shape, generator=torch.Generator().manual_seed(0)))
    for _ in range(32):
        again = torch.stft(torch.istft(spectrum, **how), **how, return_complex=True)
        spectrum = torch.polar(size, again.angle())
    return torch.istft(spectrum, **how).clamp(-1, 1).numpy()


def _to_image(output: Tensor, config: InputConfig) -> np.ndarray:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    pixels = ((output + mean / std) * (255 * std)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return (pixels if pixels.shape[-1] > 1 else pixels[..., 0]).numpy()


def _to_field(output: Tensor, config: InputConfig) -> np.ndarray:
    return (output[:, 0] * config.scale + config.offset).clamp(config.low, config.high).numpy()


def _to_features(output: Tensor, config: InputConfig) -> np.ndarray:
    vectors = output.permute(0, 2, 3, 1)
    return (vectors.flatten(1) if config.size == (1, 1) and output.shape[2:] == (1, 1) else vectors).numpy()


@dataclass(frozen=True)
class Kind:
    """A kind of raw arrays.

    Args:
        to_network: Raw arrays (B, H, W[, C]) to what the encoder takes, float (B, C, H, W); class numbers (B, H, W).
        from_network: Decoder output (B, C, H, W) to raw arrays (B, H, W[, C]).
        channels: Channels of values in the network.
        losses: Names in `LOSSES` that fit.
        shape: Of one raw array.
    """

    to_network: Callable[[Arrays, InputConfig], Tensor]
    from_network: Callable[[Tensor, InputConfig], np.ndarray]
    channels: Callable[[InputConfig], int] = lambda config: 1
    losses: tuple[str, ...] = REGRESSION
    shape: Callable[[InputConfig], tuple[int, ...]] = lambda config: config.size


def _with_channels(config: InputConfig) -> tuple[int, ...]:
    return config.size if config.network_channels == 1 else (*config.size, config.network_channels)


def _of_features(config: InputConfig) -> tuple[int, ...]:
    return (config.channels,) if config.size == (1, 1) else (*config.size, config.channels)


KINDS: dict[str, Kind] = {
    "image": Kind(_image, _to_image, lambda config: config.channels, shape=_with_channels),
    "field": Kind(_field, _to_field),
    "normal": Kind(_normal, lambda output, config: _to_image(F.normalize(output, dim=1), config), lambda config: 3,
                   shape=_with_channels),
    "classes": Kind(
        _classes,
        lambda output, config: config.class_values[output.argmax(1).numpy()],
        lambda config: config.class_channels or min(config.classes, CLASS_CHANNELS),
        ("cross_entropy",),
    ),
    "depth": Kind(_depth, lambda output, config: output[:, 0].numpy()),
    "mask": Kind(_mask, lambda output, config: (output[:, 0] > 0).numpy(), losses=("binary_cross_entropy",)),
    "features": Kind(_features, _to_features, lambda config: config.channels, shape=_of_features),
    "spectrogram": Kind(_spectrogram, _to_waves, shape=lambda config: (config.size[1] * config.hop,)),
}  # fmt: skip


def to_network(raw: Arrays, config: InputConfig, valid: Arrays | None = None) -> Tensor:
    """Raw arrays to what the encoder takes, with `mask_value` where they are not valid and the channel that says so.

    Args:
        raw: Arrays of `config.raw_shape`.
        config: What they look like.
        valid: Masks (B, H, W), bool or 0 and 1 or 255, of valid pixels; default: all that are finite.

    Returns:
        (B, encoded_channels, H, W) float, or class numbers (B, H, W).
    """
    if config.mask_value is None:
        return KINDS[config.kind].to_network(raw, config)
    values = _stack(raw, config, "array").copy()
    pixels = values.reshape(len(values), *config.size, -1)
    seen = np.isfinite(pixels).all(-1)
    if valid is not None:
        seen &= _mask(valid, dataclasses.replace(config, kind="mask", mask_value=None))[:, 0].numpy() > 0
    for image, known in zip(pixels, seen, strict=True):  # what is unknown is spread like what is known
        ordered = np.sort(image[known], axis=0) if known.any() else np.zeros((1, image.shape[-1]), image.dtype)
        image[~known] = ordered[np.linspace(0, len(ordered) - 1, (~known).sum()).round().astype(int)]
    return mark(KINDS[config.kind].to_network(values, config), torch.from_numpy(seen)[:, None], config)


def mark(x: Tensor, seen: Tensor, config: InputConfig) -> Tensor:
    """(B, C, H, W) and (B, 1, H, W), true where valid, to (B, C + 1, H, W)."""
    return torch.cat([x.masked_fill(~seen, config.mask_value or 0.0), 2.0 * seen - 1.0], dim=1)


def resize(x: Tensor, size: tuple[int, int], config: InputConfig) -> Tensor:
    """What a network takes or gives, made smaller: pixels are means over areas, classes and masks the nearest ones.

    Args:
        x: (B, C, H, W), or class numbers (B, H, W).
        size: H' and W'.
        config: What the arrays look like.

    Raises:
        ValueError: The arrays are smaller.
    """
    if x.shape[-2] < size[0] or x.shape[-1] < size[1]:
        raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]} pixels are smaller than {size[0]}x{size[1]}")
    if not x.is_floating_point():
        return F.interpolate(x[:, None].float(), size, mode="nearest-exact")[:, 0].to(x.dtype)
    smaller = F.interpolate(x, size, mode="nearest-exact" if config.kind == "mask" else "area")
    if config.kind == "normal":
        smaller[:, :3] = F.normalize(smaller[:, :3], dim=1) / config.scale
    if config.mask_value is None:
        return smaller
    return mark(smaller[:, :-1], smaller[:, -1:] > 1 - 1e-6, config)  # valid is where all of the area is


def resize_raw(raw: Arrays, size: tuple[int, int], config: InputConfig) -> np.ndarray:
    """Raw arrays (B, H, W[, C]) made smaller as in `resize`, in their own type."""
    arrays = np.stack([np.asarray(array) for array in raw])
    pixels = torch.from_numpy(arrays.reshape(*arrays.shape[:3], -1).astype(np.float32)).permute(0, 3, 1, 2)
    nearest = config.kind in ("classes", "mask")
    plain = InputConfig("mask" if nearest else "image", channels=pixels.shape[1])
    smaller = resize(pixels, size, plain).permute(0, 2, 3, 1).numpy().reshape(len(arrays), *size, *arrays.shape[3:])
    return (smaller if arrays.dtype.kind == "f" else smaller.round()).astype(arrays.dtype)
