"""Adapters change nothing until they are trained, vanish into the layers they adapt, and are peft's too."""

import copy
import json

import pytest
import torch
from torch import nn

from fourm.modalities import Modality, TokenSpace
from fourm.model.attention import Blocks
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.lora import LoRALinear, adapters, base_of, fuse_lora, inject_lora, load_adapter, save_adapter

SPACE = TokenSpace({"depth": Modality("grid", vocab_size=7, grid=(2, 2))})
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FourM(FourMConfig(dim=16, heads=2, encoder_depth=1, decoder_depth=1), SPACE).eval()


def blocks(model: FourM) -> torch.Tensor:
    own, x = Blocks.even(2, 5, 5, X.device), X.flatten(0, 1)
    return model.decoder[0](x, model.encoder[0](x, own), own, own)


def stir(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.2)


def test_starts_as_the_same_model_and_fuses_into_one(model):
    before, names = blocks(model), list(model.state_dict())
    inject_lora(model, rank=3, scale=0.5, targets="all")
    assert torch.equal(blocks(model), before)
    stir(model)
    adapted = blocks(model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    fuse_lora(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(blocks(model), adapted, atol=1e-4, rtol=1e-4)


def test_packed_layers_have_the_rank_of_each_matrix(model):
    inject_lora(model, rank=2, targets="attn")
    assert len(adapters(model)) == 2 + 5  # two of a self-attention in the encoder, five in the decoder
    assert model.encoder[0].attn.qkv.lora_down.weight.shape == (6, 16)
    assert model.decoder[0].cross_attn.kv.lora_up.weight.shape == (32, 4)
    assert not any(isinstance(module, LoRALinear) for module in model.encoder[0].mlp.modules())


@pytest.mark.parametrize("targets", ["selfattn", "all"])
def test_peft_computes_the_same_with_our_files(model, targets, tmp_path):
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(model)
    inject_lora(model, rank=3, scale=0.5, targets=targets)
    stir(model)
    save_adapter(model, tmp_path, "some/base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ranks = {name: layer.r["default"] for name, layer in theirs.base_model.model.named_modules() if hasattr(layer, "r")}
    assert ranks == {name: layer.lora_down.out_features for name, layer in adapters(model).items()}
    assert torch.equal(blocks(theirs.base_model.model), blocks(model))
    assert not torch.allclose(blocks(base), blocks(model), atol=1e-2)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_compute_the_same_with_pefts_files(model, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "fc1", "kv"], rank_pattern={"qkv": 6},
                             alpha_pattern={"fc1": 3}, use_rslora=rslora)  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path)
    before = blocks(model)
    load_adapter(model, tmp_path)
    assert torch.equal(blocks(model), blocks(theirs.base_model.model)) and not torch.equal(blocks(model), before)
    fuse_lora(model)
    torch.testing.assert_close(blocks(model), blocks(theirs.base_model.model), atol=1e-4, rtol=1e-4)


def test_other_adapters_are_refused(model, tmp_path):
    other = FourM(FourMConfig(dim=8, heads=2, encoder_depth=1, decoder_depth=1), SPACE)
    inject_lora(other)
    save_adapter(other, tmp_path, "some/base")
    with pytest.raises(ValueError, match=r"an adapter of \S+, which the model has not, or in another shape"):
        load_adapter(model, tmp_path)
    card = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(card | {"use_dora": True}))
    with pytest.raises(ValueError, match="'use_dora': True"):
        load_adapter(model, tmp_path)


def test_a_card_may_lack_what_is_plain_but_not_the_strength(model, tmp_path):
    base = copy.deepcopy(model)
    inject_lora(model, rank=2, scale=0.5)
    stir(model)
    save_adapter(model, tmp_path, "some/base")
    path = tmp_path / "adapter_config.json"
    card = {"lora_alpha": json.loads(path.read_text())["lora_alpha"], "alpha_pattern": {"kv": 2.0}}
    path.write_text(json.dumps(card))
    load_adapter(base, tmp_path)
    scales = {name.rpartition(".")[2]: layer.scale for name, layer in adapters(base).items()}
    assert scales == {"qkv": 0.5, "proj": 1.5, "q": 1.5, "kv": 0.5}  # 3 / rank, and 2 / rank of kv
    assert torch.equal(adapters(base)["encoder.0.attn.qkv"].lora_up.weight, model.encoder[0].attn.qkv.lora_up.weight)
    path.write_text(json.dumps({"alpha_pattern": None, "base_model_name_or_path": 3}))
    fuse_lora(base)
    with pytest.raises(ValueError, match=r"adapter_config.json has no `lora_alpha`, the strength of"):
        load_adapter(base, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json does not say which model"):
        base_of(tmp_path)


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
