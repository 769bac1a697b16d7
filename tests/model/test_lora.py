"""Adapters change nothing until they are trained, and vanish into the layers they adapt."""

import pytest
import torch
from torch import nn

from fourm.modalities import Modality, TokenSpace
from fourm.model.attention import Blocks
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.lora import LoRALinear, fuse_lora, inject_lora, train_lora_only

SPACE = TokenSpace({"depth": Modality("grid", vocab_size=7, grid=(2, 2))})
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FourM(FourMConfig(dim=16, heads=2, encoder_depth=1, decoder_depth=1), SPACE).eval()


def blocks(model: FourM) -> torch.Tensor:
    own, x = Blocks.even(2, 5, 5, X.device), X.flatten(0, 1)
    return model.decoder[0](x, model.encoder[0](x, own), own, own)


def test_starts_as_the_same_model_and_fuses_into_one(model):
    before, names = blocks(model), list(model.state_dict())
    inject_lora(model, rank=3, scale=0.5, targets="all")
    assert torch.equal(blocks(model), before)
    for parameter in train_lora_only(model):
        nn.init.normal_(parameter, std=0.2)
    adapted = blocks(model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    fuse_lora(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(blocks(model), adapted, atol=1e-4, rtol=1e-4)


def test_only_adapters_are_trained(model):
    inject_lora(model, rank=2, targets="attn")
    thin = train_lora_only(model)
    blocks(model).square().mean().backward()
    named = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(named) == len(thin) == 2 * (2 + 5)  # two of a self-attention in the encoder, five in the decoder
    assert all(".lora_" in name for name in named)
    assert model.encoder[0].attn.qkv.lora_down.weight.shape == (6, 16)
    assert model.decoder[0].cross_attn.kv.lora_up.weight.shape == (32, 4)
    assert not any(isinstance(module, LoRALinear) for module in model.encoder[0].mlp.modules())


def test_errors(model):
    with pytest.raises(ValueError, match="allowed are selfattn, crossattn, attn, mlp, all"):
        inject_lora(model, targets="heads")
    with pytest.raises(ValueError, match="ranks from 1"):
        inject_lora(model, rank=0)
    with pytest.raises(ValueError, match="no layers of 'mlp'"):
        inject_lora(nn.Linear(2, 2), targets="mlp")
    inject_lora(model)
    with pytest.raises(ValueError, match="adapters already"):
        inject_lora(model)
