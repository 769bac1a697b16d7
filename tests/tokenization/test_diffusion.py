"""Diffusion decoders: what the fixtures of 4M do not cover."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fourm.tokenization.diffusion import SCHEDULERS, Diffusion, DiffusionConfig, build_denoiser
from fourm.tokenization.unet import PatchedUNet
from fourm.tokenization.uvit import UVITS, UViT

PLAIN = {"thresholding": False, "prediction_type": "sample", "scheduler": "ddim"}
UNET = {"patch_size": 2, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": (2,),
        "channel_mult": (1, 2)}  # fmt: skip
UVIT = {"block_out_channels": (32, 32), "layers_per_block": 1, "mid_layers": 3, "mid_num_heads": 2, "mid_dim": 32}
DECODERS = {
    "unet": lambda: PatchedUNet(1, 8, **UNET),
    "concat": lambda: UViT(1, 8, **UVIT, downsample_before_mid=True),
    "xattn": lambda: UViT(1, 8, **UVIT, conditioning="xattn", mid_use_long_skip=True),
}


class Gaussian(nn.Module):
    """The best possible decoder for pixels drawn from N(mean, std^2), in every parametrisation."""

    channels, mean, std = 1, 0.3, 0.5

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion = diffusion

    def forward(self, noisy, timesteps, condition, cond_mask=None, resolution=None):
        signal = self.diffusion.signal[timesteps].view(-1, 1, 1, 1)
        seen = signal * self.std**2 + 1 - signal  # variance of the noisy pixels
        clean = self.mean + signal.sqrt() * self.std**2 / seen * (noisy - signal.sqrt() * self.mean)
        noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
        return self.diffusion.target(clean, noise, timesteps)


def filled(decoder):
    """A decoder without the zeros it starts with."""
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 250), ("dpm++", 20), ("unipc", 20)])
def test_solvers_follow_the_probability_flow(scheduler, steps, prediction):
    # For Gaussian pixels its solution is known: noise z ends at mean + std * z.
    diffusion = Diffusion(DiffusionConfig(**PLAIN | {"scheduler": scheduler, "prediction_type": prediction}))
    noise = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
    image = diffusion.sample(Gaussian(diffusion), torch.zeros(1, 8, 1, 1), (4, 4), steps, noise=noise)
    torch.testing.assert_close(image, Gaussian.mean + Gaussian.std * noise, atol=0.01, rtol=0)


def test_ddpm_draws_from_the_distribution_and_repeats_itself():
    diffusion = Diffusion(DiffusionConfig(**PLAIN | {"scheduler": "ddpm"}))
    condition = torch.zeros(2, 8, 1, 1)
    images = [
        diffusion.sample(Gaussian(diffusion), condition, (40, 40), 100, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert images[0].mean().item() == pytest.approx(Gaussian.mean, abs=0.03)
    assert images[0].std().item() == pytest.approx(Gaussian.std, abs=0.03)


def test_every_step_leads_to_the_next_timestep_by_the_formula_of_ddim():
    diffusion = Diffusion(DiffusionConfig(**PLAIN))
    decoder, image = Gaussian(diffusion), torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    visited = diffusion.timesteps(7, "trailing")
    assert visited == [999, 856, 713, 570, 428, 285, 142]  # 1000 - k * 1000 / 7, less 1
    sampled = diffusion.sample(decoder, torch.zeros(1, 8, 1, 1), (2, 2), 7, noise=image)
    for here, there in zip(visited, [*visited[1:], None], strict=True):
        clean = decoder(image, torch.tensor([here]), None)
        a, b = diffusion.signal[here], torch.tensor(1.0) if there is None else diffusion.signal[there]
        noise = (image - a.sqrt() * clean) / (1 - a).sqrt()
        image = b.sqrt() * clean + (1 - b).sqrt() * noise
    torch.testing.assert_close(sampled, image)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_step_and_clipping(scheduler):
    diffusion = Diffusion(DiffusionConfig(prediction_type="sample", scheduler=scheduler))

    class Loud(Gaussian):
        def forward(self, noisy, *_):
            return torch.full_like(noisy, 3.0)

    image = diffusion.sample(Loud(diffusion), torch.zeros(1, 8, 1, 1), (2, 2), 1)
    torch.testing.assert_close(image, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("name", DECODERS)
def test_a_masked_condition_is_not_seen(name):
    decoder, generator = filled(DECODERS[name]()), torch.Generator().manual_seed(0)
    noisy, at, mask = torch.randn(2, 1, 16, 16, generator=generator), torch.tensor([10, 500]), torch.zeros(2, 4, 4)
    first, second = (torch.randn(2, 8, 4, 4, generator=generator) for _ in range(2))
    mask[:, 1:] = 1
    with torch.no_grad():
        seen = torch.where(mask.bool().unsqueeze(1), first, second)
        assert not torch.equal(decoder(noisy, at, first), decoder(noisy, at, seen))
        mixed = decoder(noisy, at, torch.where(mask.bool().unsqueeze(1), second, first), mask.bool())
        torch.testing.assert_close(mixed, decoder(noisy, at, first, mask.bool()))
        hidden = torch.ones(2, 4, 4, dtype=torch.bool)
        torch.testing.assert_close(decoder(noisy, at, first, hidden), decoder(noisy, at, second, hidden))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_learns(name):
    torch.manual_seed(0)
    decoder, diffusion = DECODERS[name](), Diffusion(DiffusionConfig(**PLAIN, cls_free_guidance_dropout=0.2))
    optimizer, generator = torch.optim.Adam(decoder.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    condition = torch.randn(4, 8, 2, 2, generator=generator).requires_grad_()
    clean = condition.detach()[:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3)
    losses = []
    for _ in range(30):
        loss = diffusion.loss(decoder, clean, condition, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert condition.grad is not None and condition.grad.any()
    assert all(parameter.grad is not None for parameter in decoder.parameters() if parameter.requires_grad)


def test_targets():
    clean, noise, at = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0), torch.tensor([1])
    expected = {"sample": 2.0, "epsilon": 3.0, "v_prediction": 0.6 * 3 - 0.8 * 2}
    for prediction, value in expected.items():
        diffusion = Diffusion(DiffusionConfig(prediction_type=prediction))
        diffusion.signal[1] = 0.36
        assert diffusion.target(clean, noise, at).item() == pytest.approx(value)
        assert diffusion.add_noise(clean, noise, at).item() == pytest.approx(0.6 * 2 + 0.8 * 3)


def test_condition_masks():
    condition, seeded = torch.zeros(400, 8, 3, 5), lambda: torch.Generator().manual_seed(0)
    assert Diffusion(DiffusionConfig()).condition_mask(condition) is None
    whole = Diffusion(DiffusionConfig(cls_free_guidance_dropout=0.25)).condition_mask(condition, seeded())
    assert whole.shape == (400, 3, 5) and whole.dtype == torch.bool
    assert ({*whole.sum((1, 2)).tolist()}, whole[:, 0, 0].float().mean().item()) == (
        {0, 15},
        pytest.approx(0.25, abs=0.07),
    )
    some = Diffusion(DiffusionConfig(cls_free_guidance_dropout=1, masked_cfg=True, masked_cfg_low=2, masked_cfg_high=4))
    mask = some.condition_mask(condition, seeded())
    assert {*mask.sum((1, 2)).tolist()} == {2, 3, 4}
    assert torch.equal(mask, some.condition_mask(condition, seeded()))
    assert (mask.float().mean(0) - 0.2).abs().max() < 0.08  # every cell alike


def test_presets_have_the_sizes_of_official_checkpoints():
    def count(name, channels, **options):
        decoder = build_denoiser(name, channels, 32, **options)
        return sum(parameter.numel() for parameter in decoder.parameters())

    with torch.device("meta"):
        assert count("unet_patched", 3) == 196_350_256  # of 4M_tokenizers_rgb_16k_224-448
        assert count("uvit_b_p4_f16", 1) == 127_529_217  # of 4M_tokenizers_edge_8k_224-512
        for name in UVITS:
            if name.endswith("_f8"):  # without two convolutions around the transformer
                assert count(name.replace("f8", "f16"), 3) - count(name, 3) == 2 * (256 * 256 * 9 + 256)
            assert count(name, 3, conditioning="xattn") > count(name, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiffusionConfig(scheduler="euler"), "scheduler is 'euler', allowed are ddpm, ddim, dpm"),
        (lambda: DiffusionConfig(beta_schedule="shifted_cosine:x"), "beta_schedule is 'shifted_cosine:x'"),
        (lambda: DiffusionConfig(prediction_type="noise"), "prediction_type is 'noise'"),
        (lambda: DiffusionConfig(cls_free_guidance_dropout=2), "cls_free_guidance_dropout is 2"),
        (lambda: Diffusion(DiffusionConfig()).timesteps(0, "leading"), "steps is 0, expected 1 to 1000"),
        (lambda: Diffusion(DiffusionConfig()).timesteps(3, "even"), "spacing is 'even'"),
        (lambda: Diffusion(DiffusionConfig()).solver([3, 5], "ddim"), r"timesteps are \[3, 5\]"),
        (lambda: Diffusion(DiffusionConfig(prediction_type="epsilon")).solver([999], "ddim"), "all noise"),
        (lambda: build_denoiser("unet", 3, 8), "diffusion decoder is 'unet', allowed are unet_patched, uvit_b"),
        (lambda: UViT(1, 8, **UVIT, conditioning="add"), "conditioning is 'add'"),
        (lambda: UViT(1, 8, **UVIT | {"mid_layers": 2}, mid_use_long_skip=True), "mid_layers is 2"),
        (lambda: run("unet", 18), r"\(18, 18\), expected multiples of 4"),
        (lambda: run("concat", 18), r"\(18, 18\), expected multiples of 4"),
        (lambda: run("unet", 16, torch.ones(1, 2)), "resolution=None"),
        (lambda: run("concat", 16, torch.ones(1, 2)), "resolution=None"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def run(name, side, resolution=None):
    decoder = DECODERS[name]()
    return decoder(torch.zeros(1, 1, side, side), torch.tensor([0]), torch.zeros(1, 8, 2, 2), None, resolution)


def test_a_uvit_takes_any_multiple_of_its_patches():
    assert run("concat", 20).shape == (1, 1, 20, 20)


def test_other_tokenizers_do_not_import_diffusers():
    code = "import fourm.tokenization, fourm.tokenization.diffusion, sys; print('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
