"""Diffusion decoders: the noise process, its training loss, and sampling (Ho et al. 2020; Song et al. 2020).

B images with C channels, a condition of D channels on h x w cells (the quantized latents), T training timesteps.
Timestep t mixes sqrt(a_t) of the image with sqrt(1 - a_t) of noise. The solvers are those of diffusers, which is
imported when they are needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fourm.tokenization.losses import LOSSES, per_image
from fourm.tokenization.unet import UNETS, PatchedUNet

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",  # these two are good within 10 to 20 steps
    "unipc": "UniPCMultistepScheduler",
}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("sample", "epsilon", "v_prediction")
SPACINGS = ("trailing", "leading", "linspace")


class Denoiser(Protocol):
    """What a diffusion decoder does; `PatchedUNet.forward` explains the arguments."""

    channels: int

    def __call__(self, noisy: Tensor, timesteps: Tensor, condition: Tensor, cond_mask: Tensor | None = None,
                 resolution: Tensor | None = None) -> Tensor:  # fmt: skip
        """(B, C, H, W) to (B, C, H, W)."""


def build_denoiser(name: str, channels: int, cond_channels: int, conditioning: str = "concat", dropout: float = 0.0,
                   options: dict[str, Any] | None = None) -> nn.Module:  # fmt: skip
    """A decoder by its name in official configs (`dec_type`).

    Args:
        name: A name in `UNETS` or `fourm.tokenization.uvit.UVITS`, or `controlnet`.
        channels: Channels of the image.
        cond_channels: Channels of the condition.
        conditioning: `concat` or `xattn`, for a UViT.
        dropout: Within the transformer of a UViT.
        options: Other arguments of the class, in the place of those the name stands for.

    Raises:
        ValueError: There is no decoder of this name, or it has no such argument.
    """
    options = options or {}
    try:
        if name in UNETS:
            return PatchedUNet(channels, cond_channels, **UNETS[name] | options)
        from fourm.tokenization.uvit import UVITS, UViT

        if name in UVITS:
            return UViT(channels, cond_channels, **UVITS[name] | options, conditioning=conditioning, dropout=dropout)
        if name == "controlnet":
            from fourm.tokenization.controlnet import ControlNetDecoder

            return ControlNetDecoder(cond_channels, **options)
    except TypeError as error:
        raise ValueError(f"denoiser {name!r} does not take denoiser_options {dict(options)}: {error}") from error
    raise ValueError(f"diffusion decoder is {name!r}, allowed are {', '.join([*UNETS, *UVITS, 'controlnet'])}")


@dataclass(frozen=True)
class DiffusionConfig:
    """A noise process; names and defaults are those of official tokenizer configs.

    Args:
        num_train_timesteps: T.
        scheduler: Solver to sample with, a name in `SCHEDULERS`.
        beta_schedule: One of `BETA_SCHEDULES`, or `shifted_cosine:s` (Hoogeboom et al. 2023; s < 1 is less noisy).
        prediction_type: What the decoder predicts: the image (`sample`), the noise (`epsilon`) or
            sqrt(a) noise - sqrt(1 - a) image (`v_prediction`, Salimans & Ho 2022).
        zero_terminal_snr: Rescale so that nothing of the image is left at the last timestep (Lin et al. 2023); always
            so with a shifted cosine.
        thresholding: Clip the predicted image to [-1, 1] while sampling.
        clip_sample: The same; official configs have both names.
        cls_free_guidance_dropout: Share of training images whose condition is masked.
        masked_cfg: Mask a random number of cells of those images instead of all.
        masked_cfg_low: Fewest such cells.
        masked_cfg_high: Most such cells; None for all.
        beta_start: Of the schedules `linear`, `scaled_linear` and `sigmoid`.
        beta_end: Of the same.
        steps: Of sampling, unless `Diffusion.sample` is told otherwise.
        guidance: Of sampling, likewise.
    """

    num_train_timesteps: int = 1000
    scheduler: str = "ddpm"
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "v_prediction"
    zero_terminal_snr: bool = True
    thresholding: bool = True
    clip_sample: bool = False
    cls_free_guidance_dropout: float = 0.0
    masked_cfg: bool = False
    masked_cfg_low: int = 0
    masked_cfg_high: int | None = None
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 50
    guidance: float = 1.0

    def __post_init__(self) -> None:
        _one_of("scheduler", self.scheduler, SCHEDULERS)
        _one_of("prediction_type", self.prediction_type, PREDICTIONS)
        if self.shift is None:
            _one_of("beta_schedule", self.beta_schedule, [*BETA_SCHEDULES, "shifted_cosine:<number above 0>"])
        if not 0 <= self.cls_free_guidance_dropout <= 1:
            raise ValueError(f"cls_free_guidance_dropout is {self.cls_free_guidance_dropout}, expected 0 to 1")

    @property
    def shift(self) -> float | None:
        """s of a shifted cosine."""
        found = re.fullmatch(r"shifted_cosine:(\d+\.?\d*)", self.beta_schedule)
        return float(found[1]) or None if found else None


def _one_of(what: str, given: str, allowed: Sequence[str] | dict[str, str]) -> None:
    if given not in allowed:
        raise ValueError(f"{what} is {given!r}, allowed are {', '.join(allowed)}")


def _signal(config: DiffusionConfig) -> Tensor:
    """a_t of every timestep, (T,) float32."""
    if config.shift is not None:
        place = torch.linspace(0, 1, config.num_train_timesteps).double()
        log_snr = -2 * (torch.tan(math.pi / 2 * place).log() + math.log(config.shift))
        signal = log_snr.clamp(-15, 15).float().sigmoid()
        signal[-1] = 0
        return signal
    from diffusers import DDPMScheduler

    table: Any = DDPMScheduler(config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule,
                               rescale_betas_zero_snr=config.zero_terminal_snr)  # fmt: skip
    return table.alphas_cumprod


class Diffusion:
    """The noise process of a config.

    Attributes:
        signal: (T,) float32, a_t, the share of the image's variance that is left at timestep t.
    """

    def __init__(self, config: DiffusionConfig):
        self.config = config
        self.signal = _signal(config)

    def _mix(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.signal.to(like.device)[timesteps.to(like.device)].view(-1, *[1] * (like.ndim - 1))
        return signal.sqrt().to(like.dtype), (1 - signal).sqrt().to(like.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Images and noise (B, C, H, W) at timesteps (B,) to noisy images (B, C, H, W)."""
        image, rest = self._mix(timesteps, clean)
        return image * clean + rest * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the decoder should predict, (B, C, H, W)."""
        image, rest = self._mix(timesteps, clean)
        return {"sample": clean, "epsilon": noise, "v_prediction": image * noise - rest * clean}[
            self.config.prediction_type
        ]

    def condition_mask(self, condition: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Cells a training step masks, (B, h, w), true where masked; None where the config masks nothing.

        Args:
            condition: (B, D, h, w).
            generator: Source of randomness.
        """
        config, (batch, _, *size) = self.config, condition.shape
        if not config.cls_free_guidance_dropout:
            return None
        device = generator.device if generator else condition.device
        mask = (torch.rand(batch, 1, generator=generator, device=device) < config.cls_free_guidance_dropout).expand(
            batch, math.prod(size)
        )
        if config.masked_cfg:
            most = mask.shape[1] if config.masked_cfg_high is None else config.masked_cfg_high
            counts = torch.randint(config.masked_cfg_low, most + 1, (batch, 1), generator=generator, device=device)
            order = torch.rand(mask.shape, generator=generator, device=device).argsort(1)
            mask = mask & (order < counts)
        return mask.unflatten(1, size).to(condition.device)

    def loss(self, decoder: Denoiser, clean: Tensor, condition: Tensor, loss: str = "mse",
             generator: torch.Generator | None = None, resolution: Tensor | None = None,
             valid: Tensor | None = None) -> Tensor:  # fmt: skip
        """Training loss at random timesteps, a scalar.

        Args:
            decoder: What is trained.
            clean: (B, C, H, W).
            condition: (B, D, h, w); gradients reach it.
            loss: A name in `LOSSES`.
            generator: Source of timesteps, noise and masks.
            resolution: (B, 2), for decoders that embed it.
            valid: (B, H, W), true where pixels count; default: all.
        """
        device = generator.device if generator else clean.device
        timesteps = torch.randint(len(self.signal), (len(clean),), generator=generator, device=device).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator, device=device).to(clean)
        mask = self.condition_mask(condition, generator)
        output = decoder(self.add_noise(clean, noise, timesteps), timesteps, condition, mask, resolution)
        return per_image(LOSSES[loss](output.float(), self.target(clean, noise, timesteps)), valid).mean()

    def timesteps(self, steps: int, spacing: str) -> list[int]:
        """The timesteps that sampling in so many steps visits, largest first (Lin et al. 2023, table 2).

        Args:
            steps: 1 to T.
            spacing: `trailing` starts from pure noise; `leading` ends at timestep 0; `linspace` does both.
        """
        total = len(self.signal)
        _one_of("spacing", spacing, SPACINGS)
        if not 1 <= steps <= total:
            raise ValueError(f"steps is {steps}, expected 1 to {total}")
        if spacing == "leading":
            return [step * (total // steps) for step in reversed(range(steps))]
        places = np.linspace(total, 0, steps, endpoint=False) if spacing == "trailing" else np.linspace(total, 1, steps)
        return (places.round().astype(int) - 1).tolist()

    def solver(self, timesteps: Sequence[int], scheduler: str) -> Any:
        """A scheduler of diffusers whose own training timesteps are the visited ones, renumbered from 0.

        Each step then leads exactly to the next visited timestep, whatever their spacing; diffusers on its own takes
        the distance T // steps.

        Args:
            timesteps: Those to visit, largest first.
            scheduler: A name in `SCHEDULERS`.

        Raises:
            ValueError: The timesteps are not such a list, or the noise is to be predicted where all is noise.
        """
        import diffusers

        _one_of("scheduler", scheduler, SCHEDULERS)
        total, count = len(self.signal), len(timesteps)
        if sorted(set(timesteps), reverse=True) != list(timesteps) or not 0 <= timesteps[-1] <= timesteps[0] < total:
            raise ValueError(f"timesteps are {list(timesteps)}, expected falling numbers in [0, {total})")
        signal = self.signal[list(reversed(timesteps))]
        if self.config.prediction_type == "epsilon" and not signal[-1]:
            raise ValueError("a decoder that predicts the noise says nothing at a timestep that is all noise: "
                             "use spacing 'leading' or zero_terminal_snr: false")  # fmt: skip
        clips, multistep = self.config.thresholding or self.config.clip_sample, scheduler in ("dpm++", "unipc")
        solver = getattr(diffusers, SCHEDULERS[scheduler])(
            num_train_timesteps=count,
            prediction_type=self.config.prediction_type,
            timestep_spacing="trailing",
            **{"thresholding" if multistep else "clip_sample": clips},  # with a maximum of 1 they are the same
        )
        solver.alphas_cumprod = signal.clamp(min=2**-24) if multistep else signal  # log SNR must be finite
        solver.set_timesteps(count)
        return solver

    @torch.no_grad()
    def sample(
        self,
        decoder: Denoiser,
        condition: Tensor,
        size: tuple[int, int],
        steps: int | Sequence[int] | None = None,
        guidance: float | None = None,
        *,
        scheduler: str | None = None,
        spacing: Literal["trailing", "leading", "linspace"] | None = None,
        cond_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Images for a condition.

        Args:
            decoder: A trained decoder, in eval mode.
            condition: (B, D, h, w).
            size: H and W in pixels.
            steps: Number of steps, or the timesteps to visit, largest first; default: the config's.
            guidance: 1 for none; above 1 the result leans away from what the decoder gives with every cell masked (Ho &
                Salimans 2022); default: the config's. It needs a decoder trained with `cls_free_guidance_dropout`.
            scheduler: Another solver than the config's.
            spacing: See `timesteps`; default `trailing`, for ddpm `leading` as in 4M.
            cond_mask: (B, h, w), true where the condition is to be ignored.
            resolution: (B, 2) height and width of the original image, for decoders that embed it.
            generator: Source of the noise.
            noise: (B, C, H, W) to start from, instead of drawing it.
            progress: Show a bar.

        Returns:
            (B, C, H, W) float32.

        Raises:
            ValueError: See `timesteps` and `solver`.
        """
        scheduler, steps = scheduler or self.config.scheduler, steps or self.config.steps
        guidance = self.config.guidance if guidance is None else guidance
        if isinstance(steps, int):
            steps = self.timesteps(steps, spacing or ("leading" if scheduler == "ddpm" else "trailing"))
        solver, batch, device = self.solver(steps, scheduler), len(condition), condition.device
        if noise is None:
            drawn_on = generator.device if generator else device
            noise = torch.randn(batch, decoder.channels, *size, generator=generator, device=drawn_on)
        image = noise.to(device)
        random = {"generator": generator} if scheduler == "ddpm" else {}
        guided = guidance != 1
        if guided:  # rows without the condition behind those with it
            kept = torch.zeros(batch, *condition.shape[2:], dtype=torch.bool, device=device)
            cond_mask = torch.cat([kept if cond_mask is None else cond_mask, torch.ones_like(kept)])
            condition = condition.repeat(2, 1, 1, 1)
            resolution = None if resolution is None else resolution.repeat(2, 1)
        for timestep, index in zip(tqdm(steps, disable=not progress), solver.timesteps, strict=True):
            rows = image.repeat(2, 1, 1, 1) if guided else image
            at = torch.full((len(rows),), timestep, device=device)
            output = decoder(rows, at, condition, cond_mask, resolution).float()
            if guided:
                with_condition, without = output.chunk(2)
                output = without + guidance * (with_condition - without)
            image = solver.step(output, index, image, **random).prev_sample
        return image
