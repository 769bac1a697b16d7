"""`fourm train` on several data sets at once: what a config may say, and what the run then sees."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from fourm import cli, logbook
from fourm.data.shards import write_shards
from fourm.modalities import TokenSpace
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import fit_text_tokenizers
from fourm.verbs import train

TABLE = {
    "tok": {"kind": "grid", "vocab_size": 20, "grid": [2, 2]},
    "depth": {"kind": "grid", "vocab_size": 10, "grid": [2, 2]},
    "caption": {"kind": "text", "vocab_size": 300, "max_tokens": 8, "sentinels": 20},
}
WORDS = ["a red house", "the blue sea", "green hills far away", "a small white boat"]


def write_tokens(root: Path, names: list[str], count: int, first: int = 0) -> None:
    rng = np.random.default_rng(first)
    for split, number in (("train", count), ("val", 8)):
        stock = [
            {
                "__key__": f"{first + i}",
                **{
                    name: rng.integers(30, 60, 4) if name == "caption" else rng.integers(0, 10, 4).astype(np.int16)
                    for name in names
                },
            }
            for i in range(number)
        ]
        write_shards(root, split, stock, 8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    Path("table.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    write_tokens(Path("all"), list(TABLE), 24)
    write_tokens(Path("maps"), ["tok", "depth"], 16, first=1000)
    Path("texts.txt").write_text("\n".join(WORDS * 5))
    samples = [{"caption": words} for words in WORDS]
    codec = {"caption": CodecConfig("caption")}
    fitted = fit_text_tokenizers(samples, codec, vocab_size=300, bins=0, sentinels=20)["caption"]
    fitted.save_pretrained("text")
    return tmp_path


def even(alpha: dict) -> dict:
    return {"input_tokens": 6, "target_tokens": 6, "mixture": [{"input": alpha, "target": alpha}]}


def config(**changes) -> dict:
    return {
        "modalities": "table.yaml", "folder": "run", "masking": even({"others": 1}), "steps": 6, "batch_size": 8,
        "model": {"size": "nano", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2},
        "precision": "fp32", "optim": {"warmup": 0}, "eval_every": 3, "save_every": 3, "log_every": 1, "val_batches": 1,
        "data": [
            {"path": "all", "weight": 0.5},
            {"path": "maps", "weight": 0.3, "modalities": ["tok", "depth"]},
            {"text": "texts.txt", "weight": 0.2, "tokenizer": "text", "masking": even({"caption": 1})},
        ],
    } | changes  # fmt: skip


def read(**changes) -> train.Config:
    Path("config.yaml").write_text(yaml.safe_dump(config(**changes), sort_keys=False))
    return cli.read(train.Config, ["--config", "config.yaml"], "train")


def test_mixture_is_opened_with_its_shares_and_masks(here):
    parsed = read()
    space = TokenSpace.from_yaml("table.yaml")
    data, masker = train.open_data(parsed, space, "train")
    assert data.ends == [24, 40, 60] and data.weights == [0.5, 0.3, 0.2]
    assert set(data[0, 0]) == {"__key__", *TABLE}
    assert set(data[0, 30]) == {"__key__", "tok", "depth"}
    assert set(data[0, 45]) == {"__key__", "caption"} and data[0, 45]["__key__"] == "0000000005"
    assert masker.maskers[0].config == masker.maskers[1].config != masker.maskers[2].config
    held_out, _ = train.open_data(parsed, space, "val")
    assert held_out.ends == [8, 16]  # texts have none
    assert data.by_epoch and not held_out.by_epoch  # whose samples are always crop 0
    write_tokens(Path("words"), ["caption"], 8)
    held_out, _ = train.open_data(read(data=[config()["data"][2] | {"val": "words/val"}]), space, "val")
    assert set(held_out[0]) == {"__key__", "caption"}


def test_one_data_set_is_no_mixture(here):
    parsed = read(data="all")
    data, masker = train.open_data(parsed, TokenSpace.from_yaml("table.yaml"), "train")
    assert len(data) == 24 and masker.config == parsed.masking
    pattern = f"{here}/all/train/[tok,depth,caption]/shard-{{000000..000001}}.tar"
    parsed = read(data=[{"path": pattern, "val": "all/val"}])
    data, _ = train.open_data(parsed, TokenSpace.from_yaml("table.yaml"), "train")
    assert len(data) == 16
    assert len(train.open_data(parsed, TokenSpace.from_yaml("table.yaml"), "val")[0]) == 8


def test_mixture_trains_and_goes_on_as_if_never_interrupted(here):
    read()
    cli.main(["train", "--config", "config.yaml"])
    cli.main(["train", "--config", "config.yaml", "--folder", "two"])
    shutil.rmtree("two/checkpoint-6")
    cli.main(["train", "--config", "config.yaml", "--folder", "two", "--workers", "1"])
    one, two = ([record["loss"] for record in logbook.read(folder) if "loss" in record] for folder in ("run", "two"))
    assert len(one) == 6 and one == two
    assert not any("data/faults" in record for record in logbook.read("run"))
    named = {name for record in logbook.read("run") for name in record}
    assert {"loss/tok", "loss/caption", "val/loss/depth"} <= named


def test_what_changed_is_named(here):
    """Data may move; a run goes on with others, or otherwise drawn or masked, only if it is told to."""
    whole, maps, texts = config()["data"]
    changes = {
        "weights of the data sets": [whole | {"weight": 0.6}, maps, texts],
        "masking of data set 3": [whole, maps, texts | {"masking": even({"caption": 2})}],
        "modalities of data set 2": [whole, maps | {"modalities": ["tok"]}, texts],
        "val data of data set 1": [whole | {"val": "all/train"}, maps, texts],
    }
    small = {"steps": 1, "eval_every": 0, "save_every": 0}
    read(**small)
    cli.main(["train", "--config", "config.yaml"])
    for name, data in changes.items():
        read(data=data, **small)
        with pytest.raises(ValueError, match=rf"was made with other .*{name} \(was ") as error:
            cli.main(["train", "--config", "config.yaml"])
        others = [other for other in changes if other != name and f" {other} (" in str(error.value)]
        assert not [other for other in others if not other.startswith("val")], (name, others)
    Path("all").rename("moved")
    rows = TABLE | {"tok": TABLE["tok"] | {"source": "rgb"}, "depth": TABLE["depth"] | {"decoder_positions": 1}}
    Path("table.yaml").write_text(yaml.safe_dump(rows, sort_keys=False))
    read(data=[whole | {"path": "moved"}, maps, texts], **small)
    with pytest.raises(ValueError, match=r"modalities: modality depth \(was \w+, is \w+\); use another") as error:
        cli.main(["train", "--config", "config.yaml"])
    cli.main(["train", "--config", "config.yaml", "--accept_changes", "true"])


def test_bad_samples_are_in_the_log(here, capsys):
    path = next(Path("all/train/tok").glob("*.tar"))
    path.write_bytes(path.read_bytes()[:600])
    read(on_error="skip", max_bad=0.9)
    cli.main(["train", "--config", "config.yaml"])
    records = [record for record in logbook.read("run") if "data/faults" in record]
    assert len(records) == 2 and records[0]["data/faults/misaligned"] == 8
    assert "data/faults 9" in capsys.readouterr().out
    read(on_error="skip", folder="strict")
    with pytest.raises(ValueError, match="8 of 24 samples are bad"):
        cli.main(["train", "--config", "config.yaml"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1.0}, "either a path or a text"),
        ({"path": "all", "text": "texts.txt"}, "either a path or a text"),
        ({"text": "texts.txt"}, "needs a `tokenizer`"),
        ({"path": "all", "wieght": 2}, "wieght"),
    ],
)
def test_wrong_entries(here, capsys, entry, message):
    with pytest.raises(SystemExit):
        read(data=[entry])
    assert message in capsys.readouterr().err


def test_wrong_data_sets(here):
    space = TokenSpace.from_yaml("table.yaml")
    with pytest.raises(ValueError, match="unknown modality 'normal'"):
        train.open_data(read(data=[{"path": "all", "modalities": ["normal"]}]), space, "train")
    with pytest.raises(ValueError, match="nothing for the split 'val'"):
        train.open_data(read(data=[{"text": "texts.txt", "tokenizer": "text"}]), space, "val")
    Path("image").mkdir()
    Path("image/config.json").write_text(json.dumps({"type": "none"}))
    with pytest.raises(ValueError, match="type is 'none'"):
        train.open_data(read(data=[{"text": "texts.txt", "tokenizer": "image"}]), space, "train")
