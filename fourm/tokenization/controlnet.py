"""A decoder on a Stable Diffusion checkpoint: frozen, steered by a ControlNet (Zhang et al. 2023) that sees the latents
of our tokenizer, as 4M's `VQControlNet`.

All happens in the latents of the checkpoint's own autoencoder, four channels on a grid an eighth of its pictures. The
checkpoint is read from a folder or the hub in the layout of diffusers, safetensors only, when it is first needed, and
is no part of what is trained or saved. B images, D channels of the condition.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

SD_15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}  # where ControlNetModel's defaults differ
EMBEDDING = (32, 32, 96, 256)


class StableDiffusion(NamedTuple):
    """Autoencoder, denoiser, and the embedding (1, L, D) of the empty prompt."""

    vae: Any
    unet: Any
    prompt: Tensor


@functools.lru_cache(maxsize=1)
def stable_diffusion(path: str, device: torch.device) -> StableDiffusion:
    """A frozen checkpoint by its folder or hub id."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    vae, unet, text = (
        part.from_pretrained(path, subfolder=folder, use_safetensors=True).requires_grad_(False).eval()
        for part, folder in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder"))
    )
    ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        prompt = text(ids).last_hidden_state
    return StableDiffusion(vae.to(device), unet.to(device), prompt.to(device))


class ControlNetDecoder(nn.Module):
    """Denoiser of Stable Diffusion's latents under a condition.

    Args:
        cond_channels: Channels of the condition.
        path: Folder or hub id of the checkpoint.
        size: Side of its pictures in pixels.
        conditioning_scale: Weight of the ControlNet in evaluation mode; in training it is 1.
        shape: Arguments of `ControlNetModel` where the checkpoint is not of the shape of version 1.5.
    """

    channels = 4

    def __init__(
        self,
        cond_channels: int,
        path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        size: int = 512,
        conditioning_scale: float = 0.8,
        **shape: Any,
    ):
        super().__init__()
        self.path, self.size, self.scale = path, size, conditioning_scale
        controlnet: Any = ControlNetModel(**SD_15 | shape)
        layers: list[nn.Module] = []
        for inner, outer in zip((cond_channels, *EMBEDDING), EMBEDDING, strict=False):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.SiLU()]
        last = nn.Conv2d(EMBEDDING[-1], controlnet.config.block_out_channels[0], 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        controlnet.controlnet_cond_embedding = nn.Sequential(*layers, last)
        self.controlnet = controlnet

    @property
    def frozen(self) -> StableDiffusion:
        """The checkpoint, on the device of the ControlNet."""
        return stable_diffusion(self.path, next(self.parameters()).device)

    def start(self) -> None:
        """Begins with the weights of the checkpoint's own denoiser."""
        for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            getattr(self.controlnet, name).load_state_dict(getattr(self.frozen.unet, name).state_dict())

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents drawn by the autoencoder (B, 4, h, w)."""
        vae = self.frozen.vae
        resized = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return vae.encode(resized).latent_dist.sample() * vae.config.scaling_factor

    def to_images(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents (B, 4, h, w) to images (B, 3, H, W) of a size."""
        vae = self.frozen.vae
        images = vae.decode(latents / vae.config.scaling_factor).sample
        return F.interpolate(images, size, mode="bilinear", antialias=True)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the autoencoder's latents."""
        side = self.size // 2 ** (len(self.frozen.vae.config.block_out_channels) - 1)
        return side, side

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor, cond_mask: Tensor | None = None,
                resolution: Tensor | None = None) -> Tensor:  # fmt: skip
        """What the checkpoint predicts, usually the noise; for the arguments see `PatchedUNet.forward`."""
        if cond_mask is not None:
            condition = condition.masked_fill(cond_mask.unsqueeze(1), 0.0)
        condition = F.interpolate(condition.to(noisy.dtype), noisy.shape[2:], mode="nearest")
        _, unet, prompt = self.frozen
        prompt = prompt.expand(len(noisy), -1, -1)
        down, middle = self.controlnet(
            noisy, timesteps, prompt, condition, 1.0 if self.training else self.scale, return_dict=False
        )
        return unet(
            noisy, timesteps, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
