"""Quantizers: exact decoding, gradients, dead codes."""

import pytest
import torch
import torch.nn.functional as F

from fourm.tokenization.quantizers import Quantizer, QuantizerConfig, codebook_use

CONFIGS = [
    QuantizerConfig("fsq", levels=(5, 4, 3)),
    QuantizerConfig("vq", codebook_size=32, dim=6),
    QuantizerConfig("vq", codebook_size=32, dim=6, cosine=True),
    QuantizerConfig("vq", codebook_size=32, dim=6, cosine=True, unit_loss=True, replace="linde_buzo_gray"),
    QuantizerConfig("lfq", codebook_size=32),
    QuantizerConfig("simvq", codebook_size=32, dim=6),
    QuantizerConfig("residual_vq", codebook_size=32, dim=6, codebooks=3),
    QuantizerConfig("residual_fsq", levels=(5, 4, 3), codebooks=2),
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
    assert ids.shape == (4, 16 * config.codebooks) and ids.dtype == torch.int64 and loss.shape == ()
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


@pytest.mark.parametrize("replace", ["batch_random", "linde_buzo_gray"])
@pytest.mark.parametrize("kmeans", [True, False])
def test_vq_replaces_dead_codes(replace, kmeans):
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig("vq", codebook_size=16, dim=4, decay=0.5, replace=replace, kmeans=kmeans))
    quantizer(torch.randn(4, 64, 4))
    far = 50 + torch.randn(4, 64, 4)  # all codes but the few that moved here are dead now
    for _ in range(8):
        quantizer(far)
    assert len(quantizer.eval()(far)[1].unique()) >= 12


def test_a_replaced_code_lives_on():
    """Its hits start at the threshold: unless nothing falls on it, it stays where it was put."""
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig("vq", codebook_size=4, dim=2, dead_code=0.1, kmeans=False))
    z = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]]])
    quantizer.layer.embed.copy_(torch.tensor([[5.0, 0.0], [90.0, 90.0], [90.0, -90.0], [-90.0, 90.0]]))
    for _ in range(50):
        quantizer(z)
    assert len(quantizer(z)[1].unique()) == 4
    torch.testing.assert_close(quantizer.layer.cluster_size, torch.ones(4), atol=0.2, rtol=0)
    torch.testing.assert_close(quantizer.eval()(z)[0], z, atol=0.2, rtol=0)


def test_splitting_by_hand():
    """The two dead codes become halves of the two most used ones, which give half of their hits away."""
    torch.manual_seed(0)
    layer = Quantizer(QuantizerConfig("vq", codebook_size=4, dim=2, dead_code=1.0)).layer
    layer.embed.copy_(torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0], [8.0, 8.0]]))
    layer.cluster_size.copy_(torch.tensor([4.0, 0.0, 10.0, 0.5]))
    layer.embed_avg.copy_(layer.embed * layer.cluster_size[:, None])
    layer._by_splitting(layer.cluster_size < 1, torch.zeros(1, 2))
    torch.testing.assert_close(layer.cluster_size, torch.tensor([2.0, 5.0, 5.0, 2.0]))
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0], [1.0, 2.0]])
    torch.testing.assert_close(layer.embed, expected, atol=0, rtol=0.05)
    torch.testing.assert_close(layer.embed_avg, layer.embed * layer.cluster_size[:, None])
    assert not torch.equal(layer.embed, expected)


def test_cosine_step_of_4m():
    """Figures of 4M's own code for one step with decay 0.99."""
    config = QuantizerConfig("vq", codebook_size=6, dim=4, cosine=True, decay=0.99, dead_code=0, kmeans=False, weight=1)
    quantizer = Quantizer(config)
    quantizer.layer.embed.copy_(F.normalize(torch.arange(24.0).cos().view(6, 4), dim=-1))
    _, ids, loss = quantizer(torch.arange(32.0).sin().view(1, 4, 8).transpose(1, 2))
    assert ids.tolist() == [[3, 0, 2, 4, 4, 1, 3, 0]] and loss.item() == pytest.approx(0.265541, abs=1e-6)
    torch.testing.assert_close(quantizer.layer.cluster_size, torch.tensor([0.02, 0.01, 0.01, 0.02, 0.02, 0.0]))
    rows = [[0.638794, 0.346118, -0.270329, -0.628824], [0.308448, -0.414001, -0.755819, -0.402741]]
    torch.testing.assert_close(quantizer.layer.embed[[0, 5]], torch.tensor(rows), atol=1e-6, rtol=0)


def test_memcodes():
    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig("memcodes", codebook_size=32, codebooks=3, dim=6))
    z = torch.randn(4, 16, 6, requires_grad=True)
    quantized, ids, loss = quantizer(z)
    quantized.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in quantizer.parameters()) and z.grad.abs().sum() > 0 and not loss
    torch.testing.assert_close(quantizer.codes(ids), quantized)
    drawn, (quantized, ids, _) = ids, quantizer.eval()(z)
    assert ids.shape == (4, 48) and not torch.equal(ids, drawn)
    torch.testing.assert_close(quantizer.codes(ids), quantized)
    layer = quantizer.layer
    keys, values = layer.codes @ layer.to_keys, layer.codes @ layer.to_values
    best = (keys[1] @ z[2, 5, 2:4]).argmax()  # second codebook, sixth latent of the third image
    assert ids[2, 16 + 5] == best
    torch.testing.assert_close(quantized[2, 5, 2:4], values[1, best])


def test_use_by_hand():
    """Of the first codebook half the codes occur, equally often, of the second one code."""
    used = codebook_use(torch.tensor([[0, 1, 3, 3], [1, 0, 3, 3]]), 4, books=2)
    assert used["codebook_use"].item() == (2 / 4 + 1 / 4) / 2
    assert used["perplexity"].item() == pytest.approx((2 + 1) / 2)


def of_one_process(rank, world, path, config, z):
    """Trains on a share of the latents, and stores the codebook."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)
    quantizer = Quantizer(config)
    quantizer.layer.load_state_dict(torch.load(f"{path}/start.pt", weights_only=True))
    for _ in range(3):
        quantizer(z.chunk(world)[rank])
    torch.save(quantizer.layer.state_dict(), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("cosine", [False, True])
def test_processes_share_one_codebook(cosine, tmp_path):
    config = QuantizerConfig("vq", codebook_size=8, dim=3, cosine=cosine, dead_code=0.0, kmeans=False)
    torch.manual_seed(0)
    z, alone = torch.randn(4, 8, 3), Quantizer(config)
    torch.save(alone.layer.state_dict(), tmp_path / "start.pt")
    torch.multiprocessing.start_processes(of_one_process, (2, str(tmp_path), config, z), nprocs=2, start_method="fork")
    for _ in range(3):
        alone(z)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in alone.layer.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "rvq"},
        {"type": "fsq", "levels": (2, 8)},
        {"type": "lfq", "codebook_size": 100},
        {"codebooks": 2},
        {"replace": "never"},
    ],
)
def test_bad_configs(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]}|power of two"):
        QuantizerConfig(**options)
