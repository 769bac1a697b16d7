"""The encoder alone, as a backbone for images (4M's `FMViT`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fourm.checkpoint import resolve
from fourm.modalities import Modality, TokenSpace
from fourm.model import official
from fourm.model.attention import Blocks
from fourm.model.config import FourMConfig
from fourm.model.embeddings import Embeddings
from fourm.model.fourm import FourM, WithoutInit, own_card
from fourm.model.layers import EncoderBlock, LayerNorm
from fourm.official_files import read_official

Picture = Image.Image | np.ndarray


class ImageEncoder(nn.Module):
    """Encoder of a `FourM` that is given the pixels of one image and nothing else.

    Args:
        config: Shape of the model.
        name: Name of the pixels.
        image: Their row of the modality table, which carries size and normalisation.
    """

    def __init__(self, config: FourMConfig, name: str, image: Modality):
        super().__init__()
        if image.kind != "patches":
            raise ValueError(f"{name} is of kind {image.kind!r}, an image encoder needs 'patches'")
        self.config, self.image = config, image
        self.encoder_embeddings = Embeddings(TokenSpace({name: image}), config.dim, [name])
        self.register_tokens = nn.Parameter(torch.empty(config.registers, config.dim)) if config.registers else None
        self.encoder = nn.ModuleList(EncoderBlock(config, 0.0) for _ in range(config.encoder_depth))
        self.encoder_norm = LayerNorm(config.dim, config.norm_bias)

    @classmethod
    def from_pretrained(cls, path: str | Path, name: str | None = None) -> ImageEncoder:
        """Loads the encoder out of a whole model, or 4M's `FMViT` weights.

        Args:
            path: As for `FourM.from_pretrained`.
            name: Which pixels, such as `rgb@224`; default: the first that the model knows.

        Raises:
            ValueError: No such model, or it has no such pixels.
        """
        found = resolve(path)
        if not own_card(found):
            config, tensors = read_official(found)
            return cls._of(*official.our_config(config), tensors, name)
        model = FourM.from_pretrained(found)
        if model.route is not None:
            raise ValueError(f"{path} has decoupled adapters, which the encoder alone has no place for")
        return cls._of(model.config, model.space, official.state_dict(model), name)

    @classmethod
    def from_official(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ImageEncoder:
        """As `FourM.from_official`; tensors that are not the encoder's are left out."""
        return cls._of(*official.our_config(config), tensors)

    @classmethod
    def _of(
        cls, config: FourMConfig, space: TokenSpace, tensors: Mapping[str, Tensor], name: str | None = None
    ) -> ImageEncoder:
        pixels = [known for known in space.inputs() if space[known].kind == "patches"]
        if not pixels or name not in (None, *pixels):
            raise ValueError(f"the model has no pixels {name or ''}; it has {', '.join(pixels) or 'none at all'}")
        with WithoutInit():
            encoder = cls(config, name or pixels[0], space[name or pixels[0]])
        names = official.layout(encoder) | official.tables(encoder)
        official.load(encoder, {key: tensor for key, tensor in tensors.items() if key in names})
        return encoder.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) normalised pixels -> (B, N, D) tokens of the patches, row by row; registers are left out."""
        assert self.image.grid is not None
        (rows, columns), side = self.image.grid, self.image.patch_size
        if pixels.shape[1:] != (self.image.channels, rows * side, columns * side):
            expected = (self.image.channels, rows * side, columns * side)
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, expected (B, {', '.join(map(str, expected))})")
        patches = pixels.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 3, 5, 1)
        (project,) = self.encoder_embeddings.project.values()
        place = torch.arange(rows * columns, device=pixels.device)[None]
        x = project(patches.flatten(3).flatten(1, 2)) + self.encoder_embeddings.place(place, torch.zeros_like(place))
        if self.register_tokens is not None:
            x = torch.cat([self.register_tokens.expand(len(x), -1, -1), x], dim=1)
        blocks = Blocks.even(len(x), x.shape[1], x.shape[1], x.device, self.config.attention)
        flat = x.flatten(0, 1)
        for block in self.encoder:
            flat = block(flat, blocks)
        return self.encoder_norm(flat).view(x.shape)[:, self.config.registers :]

    @torch.no_grad()
    def features(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Tokens of pictures as they come.

        Args:
            pictures: One, or B of them: PIL images or uint8 arrays (H, W, 3) of any size. They are cut to the middle,
                resized and normalised as the model expects.

        Returns:
            (B, N, D).
        """
        assert self.image.grid is not None
        device = self.encoder_norm.weight.device
        height, width = (cells * self.image.patch_size for cells in self.image.grid)
        listed = [pictures] if isinstance(pictures, Picture) else pictures
        images = (Image.fromarray(p) if isinstance(p, np.ndarray) else p for p in listed)
        fitted = [ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted])).to(device) / 255
        mean, std = (torch.tensor(values, device=device) for values in (self.image.mean, self.image.std))
        return self(((pixels - mean) / std).permute(0, 3, 1, 2))
