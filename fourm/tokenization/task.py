"""Training of image tokenizers, in the form the trainer takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fourm.data.transforms import BodyPose, Crop, InstanceMasks, Mask, View, centre_crop, random_crop
from fourm.runtime import derive_seed
from fourm.tokenization.autoencoder import ALL_PIXELS, ImageTokenizer
from fourm.tokenization.inputs import InputConfig, resize
from fourm.tokenization.losses import LOSSES, Perceptual, per_image
from fourm.tokenization.quantizers import codebook_use

DECODES = ("decoder.", "class_out.")
MANY_CLASSES = 8  # from here on the softmax costs more than the rest of a training step


@dataclass(frozen=True)
class Sizes:
    """Square sizes an update's images are made smaller to, each equally likely; pixels, or cells of features.

    Args:
        low: Smallest side.
        high: Largest side, also that of the tokenizer's input.
        step: From one to the next.
    """

    low: int
    high: int
    step: int = 32

    def __post_init__(self) -> None:
        if self.step < 1 or not 0 < self.low <= self.high or (self.high - self.low) % self.step:
            raise ValueError(f"sizes are {self.low} to {self.high} in steps of {self.step}: high - low must "
                             "be a multiple of step")  # fmt: skip

    def draw(self, seed: int, update: int) -> tuple[int, int]:
        """Height and width of one update: the same in all its batches, in all processes, and when it is repeated."""
        side = self.low + self.step * (derive_seed(seed, "size", update) % ((self.high - self.low) // self.step + 1))
        return side, side


@dataclass(frozen=True)
class SizedBatches:
    """Batches of a loader, told their size, to which the task brings them on the device."""

    loader: Any
    sizes: Sizes
    seed: int
    accumulate: int

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Batches from a step on, without end."""
        for number, batch in enumerate(self.loader.batches(start_step), start_step):
            yield batch | {"size": self.sizes.draw(self.seed, number // self.accumulate)}


@dataclass(frozen=True)
class Crops:
    """A random part of every image in training, and the centre square in tests; then images may be of any size.

    Args:
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width over height.
        hflip: Share that is mirrored.
    """

    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5


@dataclass(frozen=True)
class Views:
    """A data set of whole images, as one of what `TokenizerTask.view` shows of them."""

    dataset: Any
    task: TokenizerTask

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.task.view(self.dataset[i])


def start_from(tokenizer: ImageTokenizer, trained: ImageTokenizer) -> bool:
    """Takes over the weights of a trained tokenizer; tables of positions stay those of the new size.

    Returns:
        Whether the decoder's were taken too: only if both are of the same architecture.

    Raises:
        ValueError: Inputs, quantizers or encoders are not of the same architecture.
    """
    made = []
    for each in (tokenizer.config, trained.config):
        source = dataclasses.replace(each.input, size=(1, 1), names=(), units="", encoder="", encoder_size=0)
        made.append((source, each.quantizer.type, each.quantizer.levels, each.quantizer.cosine))
    fixed = {name for name, _ in tokenizer.named_buffers() if name.endswith(".positions")}
    mine, theirs = ({k: v for k, v in each.state_dict().items() if k not in fixed} for each in (tokenizer, trained))
    differ = {name for name in mine.keys() | theirs.keys() if name not in mine or name not in theirs
              or mine[name].shape != theirs[name].shape}  # fmt: skip
    wrong = sorted(name for name in differ if not name.startswith(DECODES))
    if made[0] != made[1] or wrong:
        raise ValueError(f"the tokenizers differ in {', '.join(wrong) or 'inputs or quantizers'}: the new one has "
                         f"{made[0]}, the trained one {made[1]}")  # fmt: skip
    taken = {name: value for name, value in theirs.items() if not (differ and name.startswith(DECODES))}
    tokenizer.load_state_dict(taken, strict=False)
    return not differ


def part(raw: Any, source: InputConfig, seed: int) -> Any:
    """The first body of HMR 2.0's people for `features`, one of SAM's contours for a `mask`; zeros where none is."""
    if source.kind == "features":
        return BodyPose()(raw, View(Crop(0, 0, 1, 1), 1, 1))
    if source.kind != "mask":
        return raw
    corners = [np.reshape(one["points"], (-1, 2)) for one in raw]
    width, height = (np.concatenate(corners).max(0) + 1).tolist() if corners else (1, 1)
    view = View(Crop(0, 0, height, width), height, width, seed=seed)
    masks = InstanceMasks((height, width), source.size[0])(raw, view)["masks"]
    return masks[view.generator("part").integers(len(masks))] if len(masks) else np.zeros(source.size, bool)


class TokenizerTask:
    """Training an image tokenizer.

    Args:
        tokenizer: What is trained.
        modality: Name of its raw modality in the samples.
        mask: Name of the masks of valid pixels, if there are any.
        crops: How images are cropped; default: they are of the size of the input, or made smaller.
        seed: Of the crops, together with epoch and key.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, modality: str, mask: str = "", crops: Crops | None = None, seed: int = 0
    ):
        self.model: nn.Module = tokenizer
        self.modality, self.mask, self.crops, self.seed = modality, mask, crops, seed
        perceptual = tokenizer.config.perceptual
        self.perceptual = Perceptual(perceptual) if perceptual.model else None  # no part of the model

    def collate(self, samples: Sequence[Mapping[str, Any]], draws: Sequence[Any]) -> dict[str, Any]:
        """Raw samples to a batch: `images` as `ImageTokenizer.forward` takes them (RGB arrays, where a frozen encoder
        makes features of them on the device), and `keys`."""
        tokenizer = cast(ImageTokenizer, self.model)
        samples = [self.view(sample, epoch) for sample, (epoch, _) in zip(samples, draws, strict=True)]
        raw = [sample[self.modality] for sample in samples]
        valid = [sample[self.mask] for sample in samples] if self.mask else None
        images = np.stack(raw) if tokenizer.encodes(raw) else tokenizer.preprocess(raw, valid)
        return {"images": images, "keys": tuple(sample["__key__"] for sample in samples)}

    def view(self, sample: Mapping[str, Any], epoch: int | None = None) -> dict[str, Any]:
        """A sample whose image, and mask, are cropped: at random in an epoch, or else to the centre square.

        Of values that are no arrays it is what the tokenizer learns from, see `part`.
        """
        shown, tokenizer = dict(sample), cast(ImageTokenizer, self.model)
        if not isinstance(sample[self.modality], np.ndarray):
            seed = derive_seed(self.seed, "part", epoch or 0, sample["__key__"])
            return shown | {self.modality: part(sample[self.modality], tokenizer.config.input, seed)}
        if self.crops is None:
            return shown
        height, width = np.shape(sample[self.modality])[:2]
        crop = centre_crop(height, width)
        if epoch is not None:
            rng = np.random.default_rng(derive_seed(self.seed, "crops", epoch, sample["__key__"]))
            crop = random_crop(height, width, rng, self.crops.scale, self.crops.ratio)
            crop = crop._replace(hflip=bool(rng.random() < self.crops.hflip))
        view = View(crop, height, width)
        shown[self.modality] = tokenizer.shown(sample[self.modality], view)
        if self.mask:
            shown[self.mask] = Mask(tokenizer.config.input.size)(sample[self.mask], view)
        return shown

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Number of images, (1,)."""
        return torch.tensor([float(len(batch["images"]))], device=next(self.model.parameters()).device)

    def loss(self, batch: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Losses that add up over micro-batches and processes to the mean over `counts[0]` images."""
        tokenizer = cast(ImageTokenizer, self.model)
        config, x = tokenizer.config, self._images(tokenizer, batch)
        target, valid = x, None
        if config.input.mask_value is not None:
            target, valid = x[:, :-1], x[:, -1] > 0
        share = len(x) / counts[0]
        parts: dict[str, Tensor] = {}
        if config.denoiser:
            quantized, ids, own = tokenizer.quantizer(tokenizer.latents(x))
            condition = quantized.transpose(1, 2).unflatten(2, tokenizer.cells_of(x))
            if config.denoiser == "controlnet":
                target, valid = tokenizer.decoder.to_latents(target), None
            mean = tokenizer.diffusion.loss(tokenizer.decoder, target, condition, config.loss, valid=valid)
            parts["reconstruction"] = mean * share
        else:
            rows, columns = self._pixels(tokenizer)
            output, ids, own = tokenizer(x, (rows, columns))
            weighted = {"weight": x.new_tensor(config.class_weights, dtype=torch.float32)}
            errors = LOSSES[config.loss](
                output.float(), target[..., rows, columns], **(weighted if config.class_weights else {})
            )
            parts["reconstruction"] = per_image(errors, valid).sum() / counts[0]
            if self.perceptual is not None:
                first, second = self._pictures(tokenizer, output), self._pictures(tokenizer, target)
                if valid is not None:
                    first = torch.where(valid[:, None], first, second)
                total = self.perceptual.to(x.device)(first, second).float().sum()
                parts["perceptual"] = config.perceptual.weight * total / counts[0]
        parts["quantizer"] = own * share
        used = codebook_use(ids.detach(), tokenizer.vocab_size, config.quantizer.codebooks)
        return {
            "loss": torch.stack(list(parts.values())).sum(),
            **{f"loss/{name}": part.detach() for name, part in parts.items()},
            **{f"batch_{name}": share * value for name, value in used.items()},
        }

    def _images(self, tokenizer: ImageTokenizer, batch: Mapping[str, Any]) -> Tensor:
        """What the encoder takes, of the batch's own size where it has one."""
        images, size = batch["images"], batch.get("size")
        if not isinstance(images, Tensor):
            return tokenizer.features(images, size)
        return images if size is None else resize(images, size, tokenizer.config.input)

    def _pictures(self, tokenizer: ImageTokenizer, x: Tensor) -> Tensor:
        """(B, 3, H, W) from 0 to 1."""
        source = tokenizer.config.input
        mean, std = (x.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (source.mean, source.std))
        return x.float() * std + mean

    def _pixels(self, tokenizer: ImageTokenizer) -> tuple[slice, slice]:
        """In training with many classes every other row and column from a random start: the same mean, cheaper."""
        if not tokenizer.training or tokenizer.config.input.classes < MANY_CLASSES:
            return ALL_PIXELS
        top, left = torch.randint(2, (2,)).tolist()
        return slice(top, None, 2), slice(left, None, 2)
