"""Quantizers: exact decoding, gradients, dead codes."""

import pytest
import torch

from fourm.tokenization.quantizers import Quantizer, QuantizerConfig

CONFIGS = [
    QuantizerConfig("fsq", levels=(5, 4, 3)),
    QuantizerConfig("vq", codebook_size=32, dim=6),
    QuantizerConfig("vq", codebook_size=32, dim=6, cosine=True),
    QuantizerConfig("lfq", codebook_size=32),
    QuantizerConfig("simvq", codebook_size=32, dim=6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.type}-{config.cosine}")
def test_ids_decode_to_what_was_quantized(config):
    torch.manual_seed(0)
    quantizer = Quantizer(config)
    z = torch.randn(4, 16, config.latent_dim, requires_grad=True)
    quantized, ids, loss = quantizer(z)  # a training step, which starts a codebook
    (quantized.square().sum() + loss).backward()
    assert z.grad.abs().sum() > 0  # straight through

    quantizer.eval()
    quantized, ids, loss = quantizer(z)
    assert ids.shape == (4, 16) and ids.dtype == torch.int64 and loss.shape == ()
    assert ids.min() >= 0 and ids.max() < config.vocab_size and len(ids.unique()) > 8
    torch.testing.assert_close(quantizer.codes(ids), quantized, atol=1e-5, rtol=1e-5)


def test_fsq_levels_by_hand():
    """An odd number of levels L rounds tanh(z) * (L - 1) / 2 (Mentzer et al. 2023, section 3); codes are in [-1, 1]."""
    quantizer = Quantizer(QuantizerConfig("fsq", levels=(5, 3))).eval()  # the running mean is 0, the variance 1
    z = torch.tensor([[[-9.0, 9.0], [0.0, 0.0], [0.6, -0.2]]])
    quantized, ids, _ = quantizer(z)
    expected = [[[-1.0, 1.0], [0.0, 0.0], [0.5, 0.0]]]  # 2 tanh(0.6) = 1.07, tanh(-0.2) = -0.2
    torch.testing.assert_close(quantized, torch.tensor(expected))
    assert ids.tolist() == [[0 + 5 * 2, 2 + 5 * 1, 3 + 5 * 1]]


def test_fsq_uses_its_levels_whatever_the_scale_of_the_latents():
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig("fsq", levels=(8, 8)))
    ids = quantizer(0.01 * torch.randn(8, 64, 2) + 5)[1]
    assert len(ids.unique()) > 48


def test_vq_replaces_dead_codes():
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig("vq", codebook_size=16, dim=4, decay=0.5))
    quantizer(torch.randn(4, 64, 4))
    far = 50 + torch.randn(4, 64, 4)  # all codes but the few that moved here are dead now
    for _ in range(8):
        quantizer(far)
    assert len(quantizer.eval()(far)[1].unique()) >= 12


@pytest.mark.parametrize("options", [{"type": "rvq"}, {"levels": (2, 8)}, {"type": "lfq", "codebook_size": 100}])
def test_bad_configs(options):
    with pytest.raises(ValueError, match=f"{options.get('type', 'levels')}|power of two"):
        QuantizerConfig(**options)
