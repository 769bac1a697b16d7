"""`fourm train --init`: a model learns a modality more, rests where it is told to, and is adapted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fourm import checkpoint, cli, logbook
from fourm.data.shards import write_shards
from fourm.model.fourm import FourM
from fourm.model.warm_start import open_source

OLD = {"tok": {"kind": "grid", "vocab_size": 20, "grid": [2, 2]}}
NEW = {"depth": {"kind": "grid", "vocab_size": 10, "grid": [2, 2]}, **OLD}
EVEN = {"input_tokens": 3, "target_tokens": 3, "mixture": [{"input": {"others": 1}, "target": {"others": 1}}]}
SETTINGS = {
    "data": "data", "masking": EVEN, "steps": 4, "batch_size": 8, "save_every": 2, "val_batches": 1,
    "model": {"size": "nano", "dim": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2},
    "precision": "fp32", "optim": {"warmup": 0, "schedule": "constant", "lr": 0.01},
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Data, and a base model that knows one of the two modalities."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        samples = [
            {"__key__": f"{i}", **{name: rng.integers(0, 10, 4).astype(np.int16) for name in NEW}} for i in range(16)
        ]
        write_shards(Path("data"), split, samples, 8)
    for name, table in (("old", OLD), ("new", NEW)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    train("base", modalities="old.yaml")
    return tmp_path


def train(folder: str, **changes) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(SETTINGS | {"modalities": "new.yaml", "folder": folder} | changes))
    cli.main(["train", "--config", "config.yaml"])


def test_a_modality_more_and_an_interruption(here, capsys, monkeypatch):
    settings = {"init": "base", "freeze": [{"what": "old", "until": 0.5}], "ema": 0.5}
    train("tuned", **settings)
    said = Path("tuned/warm_start.txt").read_text()
    assert said in capsys.readouterr().out and "starting from base" in said
    assert [line.split() for line in said.splitlines()[1:]] == [
        ["modality", "from", "encoder", "decoder"],
        ["depth", "-", "10", "rows", "new", "10", "rows", "new"],
        ["tok", "tok", "20", "rows", "20", "rows"],
    ]
    base, half, whole = (load_file(f"{each}/model.safetensors") for each in
                         ("base/model", "tuned/checkpoint-2", "tuned/checkpoint-4"))  # fmt: skip
    assert torch.equal(half["encoder.0.attn.qkv.weight"], base["encoder.0.attn.qkv.weight"])
    assert not torch.equal(whole["encoder.0.attn.qkv.weight"], base["encoder.0.attn.qkv.weight"])
    for side in ("encoder", "decoder"):
        name = f"{side}_embeddings.tokens.weight"
        assert torch.equal(half[name][10:], base[name]) and not torch.equal(whole[name][10:], base[name])
    assert any("val/loss/depth" in record for record in logbook.read("tuned"))

    shutil.copytree("tuned", "again", ignore=shutil.ignore_patterns("checkpoint-4", "model"))
    shutil.move("base", "moved")  # what goes on does not start again
    read, damage = [], checkpoint._damage
    monkeypatch.setattr(checkpoint, "_damage", lambda path: read.append(path.name) or damage(path))
    train("again", **settings)
    assert read == ["checkpoint-2"]  # all of it once, which takes minutes where it is large
    again = load_file("again/checkpoint-4/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert "starting from base" not in capsys.readouterr().out


def peft_computes(folder: str, state) -> bool:
    """Whether the adapters on the model that they name are the fused one."""
    peft = pytest.importorskip("peft")
    base = json.loads(Path(folder, "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    merged = peft.PeftModel.from_pretrained(FourM.from_pretrained(base), f"{folder}/adapter").merge_and_unload()
    names = [name for name in state if name.startswith(("encoder.", "decoder."))]
    return all(torch.allclose(merged.state_dict()[name], state[name], atol=1e-6) for name in names)


def test_an_unfinished_run_of_adapters_is_a_model_to_start_from(here):
    settings = {"init": "base", "lora": {"rank": 2, "scale": 2.0}, "ema": 0.5}
    train("adapted", **settings)
    ended = load_file("adapted/model/model.safetensors")
    shutil.rmtree("adapted/model")
    for path in ("adapted", "adapted/checkpoint-4"):
        found, base = open_source(path)
        assert base == ""
        for name, value in found.unique_state_dict().items():
            assert torch.equal(value, ended[name]), name
    assert not torch.equal(ended["encoder.0.attn.qkv.weight"],
                           load_file("base/model/model.safetensors")["encoder.0.attn.qkv.weight"])  # fmt: skip
    train("twice", **settings | {"init": "adapted", "ema": 0.0})
    shutil.rmtree("adapted")
    assert peft_computes("twice", load_file("twice/model/model.safetensors"))
    train("thrice", init="twice/adapter", steps=1)


def test_a_plan_says_what_it_leaves_out(here, capsys):
    train("planned", init="base", lora={}, dry_run=True)
    said = capsys.readouterr().out
    train("planned", init="base", dry_run=True)
    plain = capsys.readouterr().out
    assert said.startswith(plain.rstrip()) and "`lora` and `freeze` are not taken into account" in said
    assert "taken into account" not in plain


def test_adapters(here, capsys):
    train("adapted", init="base", lora={"rank": 2, "targets": "all"}, steps=3)
    base, model = FourM.from_pretrained("base/model").state_dict(), FourM.from_pretrained("adapted/model").state_dict()
    state = {key.partition("/")[2] for key in load_file("adapted/checkpoint-3/optimizer.safetensors")}
    tables = {"encoder_embeddings.tokens.weight", "decoder_embeddings.tokens.weight", "encoder_embeddings.modality"}
    assert {name for name in state if ".lora_" not in name} == tables
    for name, value in base.items():
        fused = name.startswith(("encoder.", "decoder.")) and "norm" not in name
        same = torch.equal(model[name][-len(value) :], value)  # the new modality's rows come first
        assert same is not fused or name.endswith("temperature"), name
    card = json.loads(Path("adapted/adapter/adapter_config.json").read_text())
    assert card["base_model_name_or_path"] == str(here / "base/model")
    assert peft_computes("adapted", model)
    assert "adapters only; `model` alone has what is new, in encoder_embeddings.modality, " in capsys.readouterr().out
    adapted = open_source("adapted/adapter")[0].state_dict()
    torch.testing.assert_close(adapted["encoder.0.mlp.fc1.weight"], model["encoder.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"lora": {}}, "need a model to start from"), ({"like": {"depth": "tok"}}, "need a model to start from"),
     ({"freeze": [{"what": "old"}]}, "need a model to start from"),
     ({"init": "base", "lora": {}, "freeze": [{"what": "trunk"}]}, "leave `freeze` out"),
     ({"tokenizers": "nowhere"}, "tokenizers: there is none of anything that samples may be given: depth, tok"),
     ({"init": "base", "like": {"depth": "tok"}}, "depth is grid of 10 ids, but tok of the source is grid of 20 ids")],
)  # fmt: skip
def test_errors(here, settings, said):
    with pytest.raises(ValueError, match=said):
        train("wrong", **settings)
