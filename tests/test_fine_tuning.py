"""`fourm train --init`: a model learns a modality more, rests where it is told to, and is adapted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fourm import cli, logbook
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


def test_a_modality_more_and_an_interruption(here, capsys):
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
    train("again", **settings)
    again = load_file("again/checkpoint-4/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert "starting from base" not in capsys.readouterr().out


def test_adapters(here):
    train("adapted", init="base", lora={"rank": 2, "targets": "all"}, steps=3)
    base, model = FourM.from_pretrained("base/model").state_dict(), FourM.from_pretrained("adapted/model").state_dict()
    state = {key.partition("/")[2] for key in load_file("adapted/checkpoint-3/optimizer.safetensors")}
    tables = {"encoder_embeddings.tokens.weight", "decoder_embeddings.tokens.weight", "encoder_embeddings.modality"}
    assert {name for name in state if ".lora_" not in name} == tables
    for name, value in base.items():
        fused = name.startswith(("encoder.", "decoder.")) and "norm" not in name
        same = torch.equal(model[name][-len(value) :], value)  # the new modality's rows come first
        assert same is not fused or name.endswith("temperature"), name
    assert json.loads(Path("adapted/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    adapted = open_source("adapted/adapter").state_dict()
    torch.testing.assert_close(adapted["encoder.0.mlp.fc1.weight"], model["encoder.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"lora": {}}, "need a model to start from"), ({"like": {"depth": "tok"}}, "need a model to start from"),
     ({"freeze": [{"what": "old"}]}, "need a model to start from"),
     ({"init": "base", "lora": {}, "freeze": [{"what": "trunk"}]}, "leave `freeze` out"),
     ({"init": "base", "like": {"depth": "tok"}}, "depth is grid of 10 ids, but tok of the source is grid of 20 ids")],
)  # fmt: skip
def test_errors(here, settings, said):
    with pytest.raises(ValueError, match=said):
        train("wrong", **settings)
