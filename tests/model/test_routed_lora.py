"""Decoupled adapters: every token goes through the set of its modality, wherever the model takes it."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fourm.generation.plan import Step
from fourm.generation.sampler import Given, Sampler
from fourm.masking.transfer import transfer_batch
from fourm.modalities import Modality, TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.image_encoder import ImageEncoder
from fourm.model.lora import adapters, fuse_lora, inject_lora, inject_routed, load_adapter, routed, save_adapter
from fourm.model.warm_start import warm_start

SPACE = TokenSpace(
    {
        "depth": Modality("grid", vocab_size=7, grid=(2, 2)),
        "words": Modality("text", vocab_size=30, max_tokens=6, first_sentinel=4, sentinels=8),
        "rgb": Modality("patches", grid=(2, 2), patch_size=2),
    }
)
CONFIG = FourMConfig(dim=16, heads=2, encoder_depth=2, decoder_depth=2, registers=1)


@pytest.fixture
def model() -> FourM:
    torch.manual_seed(0)
    return FourM(CONFIG, SPACE).eval()


def stirred(model: FourM) -> FourM:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch(given: list[str], asked: str, rows: int = 3):
    rng = np.random.default_rng(0)
    samples = [
        {
            "depth": rng.integers(0, 7, 4),
            "words": rng.integers(12, 30, 3),
            "rgb": rng.integers(0, 256, (4, 4, 3), np.uint8),
        }
        for _ in range(rows)
    ]
    return transfer_batch(SPACE, samples, given, [asked])


@torch.no_grad()
def states(model: FourM, given: list[str], asked: str) -> torch.Tensor:
    return model(batch(given, asked))


def test_one_set_for_all_is_a_plain_adapter(model):
    plain, one = copy.deepcopy(model), copy.deepcopy(model)
    inject_lora(plain, 3, 0.5, "all")
    stirred(plain)
    found = adapters(plain)
    inject_routed(one, [["depth"]], {name: layer.lora_down.out_features for name, layer in found.items()})
    for name, layer in routed(one).items():
        layer.lora_down, layer.lora_up = found[name].lora_down, found[name].lora_up
        layer.gate[0] = 0.5
    torch.testing.assert_close(states(one, ["rgb"], "words"), states(plain, ["rgb"], "words"), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states(one, ["depth"], "words"), states(plain, ["depth"], "words"), atol=1e-2)
    for layer in routed(one).values():
        layer.gate[1] = 0.5
    for given, asked in ((["rgb", "depth"], "words"), (["rgb"], "depth"), ([], "words")):
        torch.testing.assert_close(states(one, given, asked), states(plain, given, asked), atol=1e-5, rtol=1e-5)


def test_starts_as_the_same_model(model):
    before = states(model, ["rgb", "depth"], "words")
    inject_lora(model, 3, 0.5, "all", ["depth"])
    assert torch.equal(states(model, ["rgb", "depth"], "words"), before)
    layer = routed(model)["decoder.0.cross_attn.kv"]
    assert layer.gate.tolist() == [[0.5] * 6 + [0.0] * 6, [0.0] * 6 + [0.5] * 6]
    assert "decoder_proj_context" in routed(model)


# Layers whose own set matters, by what is given and asked.
SOURCE = {"attn", "mlp of the encoder", "kv", "decoder_proj_context"}
TARGET = {"self_attn", "q and proj", "mlp of the decoder"}
CASES = [(["rgb"], "words", set()), (["depth", "rgb"], "words", SOURCE), (["rgb"], "depth", TARGET)]


def part(name: str) -> str:
    if name == "decoder_proj_context" or name.endswith(".kv"):
        return name.rpartition(".")[2]
    side = "encoder" if name.startswith("encoder.") else "decoder"
    owner = name.split(".")[2]
    return {"mlp": f"mlp of the {side}", "cross_attn": "q and proj"}.get(owner, owner)


@pytest.mark.parametrize(("given", "asked", "matters"), CASES)
def test_routing_rules(model, given, asked, matters):
    inject_lora(model, 2, 1.0, "all", ["depth"])
    stirred(model)
    before = states(model, given, asked)
    found = set()
    for name, layer in routed(model).items():
        kept = layer.gate.clone()
        layer.gate[1] = 0
        if not torch.equal(states(model, given, asked), before):
            found.add(part(name))
        layer.gate.copy_(kept)
    assert found == matters


@pytest.mark.parametrize("own", ["depth", "words"])
def test_every_way_to_run_it_agrees(model, own):
    inject_lora(model, 2, 1.0, "all", [own])
    stirred(model)
    rows = batch(["rgb", "depth"], "words")
    with torch.no_grad():
        whole, context = model(rows), model.encode(rows)
        order = torch.tensor([2, 0, 1])
        asked = ("target_in", "target", "target_pos", "target_mod")
        others = dataclasses.replace(rows, **{name: getattr(rows, name)[order] for name in asked})
        torch.testing.assert_close(model.decode(others, context.select(order)), whole[order], atol=1e-5, rtol=1e-5)
        cache = model.start_decoding(context, rows.target_in.shape[1])
        for step in range(rows.target_in.shape[1]):
            columns = (column[:, step] for column in (rows.target_in, rows.target_pos, rows.target_mod))
            torch.testing.assert_close(model.decode_next(*columns, cache), whole[:, step], atol=1e-5, rtol=1e-5)
        model.config = dataclasses.replace(model.config, packed=False)
        torch.testing.assert_close(model(rows), whole, atol=1e-5, rtol=1e-5)


def test_generates_with_all_that_is_asked(model):
    inject_lora(model, 2, 1.0, "all", ["depth"])
    stirred(model)
    plan = (Step("depth", "maskgit", 2), Step("depth", "maskgit", 2), Step("words", "autoregressive"))
    picture = Given.floats(torch.randn(2, 4, 12))
    made = Sampler(model).generate({"rgb": picture}, plan)
    assert made["depth"].shape == (2, 4) and len(made["words"]) == 2
    model.route.table[:] = 0
    assert not torch.equal(Sampler(model).generate({"rgb": picture}, plan)["depth"], made["depth"])


def test_is_saved_and_taken_over(model, tmp_path):
    inject_lora(model, 2, 0.5, "attn", ["depth"])
    stirred(model).save_pretrained(tmp_path)
    again = FourM.from_pretrained(tmp_path)
    assert torch.equal(states(again, ["depth"], "words"), states(model, ["depth"], "words"))
    fresh = FourM(CONFIG, SPACE).eval()
    warm_start(fresh, model)
    assert torch.equal(states(fresh, ["depth"], "words"), states(model, ["depth"], "words"))
    fuse_lora(again)
    assert routed(again)  # which no plain layer can be
    with pytest.raises(ValueError, match="decoupled adapters, which 4M's format cannot say"):
        model.save_official(tmp_path / "official")


def test_sets_follow_their_modalities(model):
    """To a table that lacks a set's modality, and has another's under a new name."""
    ranks = {"encoder.0.attn.qkv": 5, "decoder.0.mlp.fc2": 5}
    inject_routed(model, [["rgb"], ["depth"]], ranks)
    stirred(model)
    for layer in routed(model).values():
        layer.gate.copy_(torch.arange(15).view(3, 5))
    fresh = FourM(CONFIG, TokenSpace({"words": SPACE["words"], "range": SPACE["depth"]})).eval()
    lines = warm_start(fresh, model, {"range": "depth"}).lines
    assert "decoupled adapters: the set of rgb is left out, the set of depth serves range" in lines
    assert fresh.routed_sets == [["range"]] and fresh.route.table.tolist() == [0, 1, 0]
    for name, layer in routed(fresh).items():
        assert torch.equal(layer.gate, routed(model)[name].gate[[0, 2]])
        assert torch.equal(layer.lora_up.weight, routed(model)[name].lora_up.weight)
    nothing = FourM(CONFIG, TokenSpace({"words": SPACE["words"]})).eval()
    warm_start(nothing, model)
    assert nothing.routed_sets == [] and next(iter(routed(nothing).values())).gate.tolist() == [[0, 1, 2, 3, 4]]


def test_errors(model, tmp_path):
    with pytest.raises(ValueError, match=r"\['dept'\] must be modalities of the model"):
        inject_lora(model, decoupled=["dept"])
    with pytest.raises(ValueError, match="each once"):
        inject_routed(model, [["depth"], ["depth"]], {"decoder_proj_context": 2})
    other = copy.deepcopy(model)
    inject_lora(other)
    save_adapter(other, tmp_path, "base")
    inject_lora(model, decoupled=["depth"])
    for again in (lambda: inject_lora(model), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="adapters already"):
            again()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which the encoder alone has no place for"):
        ImageEncoder.from_pretrained(tmp_path)
