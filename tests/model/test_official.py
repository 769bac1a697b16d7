"""Weights of 4M go in and come out again, from every container they come in."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fourm.masking.transfer import transfer_batch
from fourm.modalities import TokenSpace
from fourm.model import official
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.image_encoder import ImageEncoder

TABLES = Path(__file__).parents[2] / "configs/modalities"
CONFIG = {
    "domains_in": ["rgb@224", "human_poses", "t5_caption", "tok_dinov2_global", "tok_semseg@224"],
    "domains_out": ["t5_caption", "human_poses", "tok_dinov2_global", "tok_imagebind_global"],
    "encoder_depth": 1, "decoder_depth": 1, "dim": 16, "num_heads": 2, "mlp_ratio": 4, "qkv_bias": False,
    "proj_bias": False, "mlp_bias": False, "norm_bias": False, "act_layer": "SiLU", "gated_mlp": True,
    "image_size": 224, "patch_size": 16, "num_register_tokens": 2,
}  # fmt: skip


def model_of(**changes) -> FourM:
    torch.manual_seed(0)
    model = FourM(*official.our_config(CONFIG | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def weights_of(model: FourM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in official.state_dict(model).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("table", ["4m-7", "4m-21", "4m-7-sr"])
def test_shipped_tables_are_those_of_the_weights(table):
    space = TokenSpace.from_yaml(TABLES / f"{table}.yaml")
    config = FourMConfig(size="nano", tied_head=False)
    assert official.our_config(official.their_config(config, space))[1].modalities == space.modalities


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("where", ["folder", "model.safetensors", "header.safetensors"])
def test_export_and_import_are_inverse(tmp_path, where, shared):
    model = model_of(share_modality_embeddings=shared)
    first = weights_of(model)
    model.save_official(tmp_path / where)
    again = FourM.from_pretrained(tmp_path / where)
    assert again.config == model.config and again.space.modalities == model.space.modalities
    assert_same(weights_of(again), first)
    again.save_official(tmp_path / "again")
    assert_same(load_file(tmp_path / "again/model.safetensors"), first)
    written = json.loads((tmp_path / "again/config.json").read_text())
    expected = CONFIG | ({} if shared else {"share_modality_embeddings": False})
    assert written.keys() == expected.keys()
    assert {k: sorted(v) if isinstance(v, list) else v for k, v in written.items()} == {
        k: sorted(v) if isinstance(v, list) else v for k, v in expected.items()
    }


def test_the_header_holds_what_python_prints(tmp_path):
    model_of().save_official(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        header = opened.metadata()
    assert header["qkv_bias"] == "False" and header["act_layer"] == "SiLU" and header["dim"] == "16"
    assert header["domains_out"].startswith("['human_poses', ")


def test_tensors_that_the_hub_stores_once(tmp_path):
    model = model_of()
    stored = {n: t for n, t in weights_of(model).items() if not (n.startswith("encoder_") and n.endswith(".mod_emb"))}
    alone = {
        n: t
        for n, t in weights_of(model).items()
        if n.endswith(("rgb@224.mod_emb", "semseg@224.mod_emb", "t5_caption.mod_emb"))
    }
    save_file(stored | alone, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_same(weights_of(FourM.from_pretrained(tmp_path)), weights_of(model))


def test_equal_tables_and_heads_become_one_tensor(tmp_path):
    tensors = weights_of(model_of())
    for name in tensors:
        if name.endswith("to_logits.weight"):
            tensors[name] = tensors[name.replace("to_logits", "token_emb")]
    model = FourM.from_official(CONFIG, tensors)
    assert model.config.tied_head and model.to_logits is None
    model.save_official(tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    once = {name: tensor for name, tensor in tensors.items() if not name.endswith("to_logits.weight")}
    assert_same(weights_of(FourM.from_official(CONFIG, once)), tensors)


def test_a_training_checkpoint(tmp_path):
    domains = ["human_poses", "tok_dinov2_global"]
    args = argparse.Namespace(
        model="fm_tiny_6e_6d_swiglu_qknorm_nobias", in_domains=domains, out_domains=domains[1:], input_size=224,
        patch_size=16, num_register_tokens=0, output_dir=None, lr=1e-4,
    )  # fmt: skip
    model = FourM(*official.our_config(vars(args)))
    assert (model.config.size, model.config.qk_norm, model.config.gated_mlp) == ("tiny", True, True)
    torch.save({"model": weights_of(model), "epoch": 3, "args": args}, tmp_path / "checkpoint-3.pth")
    assert_same(weights_of(FourM.from_pretrained(tmp_path / "checkpoint-3.pth")), weights_of(model))
    torch.save({"model": weights_of(model), "args": args, "path": Path("x")}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth"):
        FourM.from_pretrained(tmp_path / "other.pth")


def test_where_shared_tensors_differ_the_decoder_counts():
    tensors = weights_of(model_of())
    tensors["encoder_embeddings.human_poses.mod_emb"].zero_()
    again = weights_of(FourM.from_official(CONFIG, tensors))
    expected = tensors["decoder_embeddings.human_poses.mod_emb"]
    assert torch.equal(again["encoder_embeddings.human_poses.mod_emb"], expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("encoder.0.attn.qkv.weight", None, "1 missing: encoder.0.attn.qkv.weight"),
        ("encoder_embeddings.t5_caption.emb_proj.bias", None, "1 missing: encoder_embeddings.t5_caption.emb_proj.bias"),
        (
            "decoder_embeddings.rgb@224.mod_emb",
            torch.zeros(1, 1, 16),
            "1 unexpected: decoder_embeddings.rgb@224.mod_emb",
        ),
        ("mask_token", torch.zeros(16), r"1 misshapen: mask_token \(16,\) instead of \(1, 1, 16\)"),
        (
            "encoder_embeddings.rgb@224.pos_emb",
            torch.zeros(1, 196, 16),
            "sines and cosines: encoder_embeddings.rgb@224",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, message):
    tensors = weights_of(model_of())
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change
    with pytest.raises(ValueError, match=message):
        FourM.from_official(CONFIG, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains_in": ["rgb@224", "sonar"]}, "4M has no modality sonar"),
        ({"act_layer": "ReLU"}, "'act_layer': 'ReLU'.*'act_layer': 'SiLU'"),
        ({"dim": "16"}, "'dim': '16'"),
        ({"image_size": 448}, "'image_size': 448"),
    ],
)
def test_configs_that_cannot_be_followed(changes, message):
    with pytest.raises(ValueError, match=message):
        official.our_config(CONFIG | changes)


def test_things_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="lacks domains_in, domains_out, act_layer"):
        official.our_config({"dim": 3})
    with pytest.raises(ValueError, match="training run of model 'vit'"):
        official.our_config({"in_domains": [], "out_domains": [], "model": "vit"})
    with pytest.warns(UserWarning, match="colour"):
        official.our_config(CONFIG | {"colour": "red"})
    model = model_of()
    rows = model.space.modalities | {"tok_semseg@224": replace(model.space["tok_semseg@224"], grid=(7, 28))}
    foreign = FourM(model.config, TokenSpace(rows | {"smell": rows["tok_dinov2_global"]}))
    with pytest.raises(ValueError, match="tok_semseg@224, smell"):
        foreign.save_official(tmp_path)


def test_each_side_has_rows_of_its_own_modalities_only():
    model = model_of()
    sides = model.encoder_embeddings, model.decoder_embeddings
    assert [side.tokens.num_embeddings for side in sides] == [30000 + 8192 + 4096, 30000 + 2 * 8192]
    assert [len(side.learned_positions) for side in sides] == [16, 32]
    rng = np.random.default_rng(0)
    sample = {"tok_semseg@224": rng.integers(0, 4096, (196,)), "tok_imagebind_global": rng.integers(0, 8192, (16,))}
    batch = transfer_batch(model.space, [sample], ["tok_semseg@224"], ["tok_imagebind_global"])
    with torch.no_grad():
        hidden, names = model(batch), weights_of(model)
        fed = model.encoder_embeddings.look_up(batch.ids, batch.mod)
        assert torch.equal(
            fed[0], names["encoder_embeddings.tok_semseg@224.token_emb.weight"][sample["tok_semseg@224"]]
        )
        head = names["decoder_embeddings.tok_imagebind_global.to_logits.weight"]
        torch.testing.assert_close(model.logits(hidden, "tok_imagebind_global"), hidden @ head.T)
        expected = torch.nn.functional.cross_entropy(
            hidden[0] @ head.T, torch.from_numpy(sample["tok_imagebind_global"])
        )
        torch.testing.assert_close(model.token_nll(batch, hidden).mean(), expected)


def test_late_positions_of_poses_are_0_to_the_decoder():
    model = model_of()
    number = model.space.number["human_poses"]
    pos = torch.tensor([[0, 262, 263, 274]]) + int(model.space.position_offset[number])
    mod = torch.full_like(pos, number)
    encoder, decoder = (side.place(pos, mod)[0] for side in (model.encoder_embeddings, model.decoder_embeddings))
    torch.testing.assert_close(encoder[:2], decoder[:2])
    assert torch.equal(decoder[2], decoder[0]) and torch.equal(decoder[3], decoder[0])
    assert not torch.allclose(encoder[2], encoder[0])


def test_image_encoder_is_the_encoder_given_all_pixels(tmp_path):
    model = model_of()
    model.save_official(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    batch = transfer_batch(model.space, [{"rgb@224": picture}], ["rgb@224"], [])
    with torch.no_grad():
        expected = model.encoder_states(batch)[:, 2:]
    for folder in ("theirs", "ours"):
        features = ImageEncoder.from_pretrained(tmp_path / folder).features(picture)
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
    encoder = ImageEncoder.from_pretrained(tmp_path / "theirs", "rgb@224")
    wide = [Image.fromarray(picture).resize((300, 224)), picture]
    assert encoder.features(wide).shape == (2, 196, 16)
    with pytest.raises(ValueError, match=r"\(1, 3, 112, 112\), expected \(B, 3, 224, 224\)"):
        encoder(torch.zeros(1, 3, 112, 112))
    with pytest.raises(ValueError, match="no pixels depth; it has rgb@224"):
        ImageEncoder.from_pretrained(tmp_path / "ours", "depth")
