"""Raw shards to token shards: right ids, crops, 4M's layout, several processes, being killed, refusals."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fourm.data.shards import ShardDataset, write_shards
from fourm.data.tokens import TokenDataset
from fourm.data.transforms import Picture, View, crop_settings
from fourm.modalities import TokenSpace
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.encode import CropConfig, TokenizeConfig, load_tokenizers, tokenize, verify
from fourm.tokenization.inputs import InputConfig
from fourm.tokenization.quantizers import QuantizerConfig
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import fit_text_tokenizers
from fourm.verbs.tokenize import run

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
TABLE = {
    "rgb": {"kind": "patches", "grid": [2, 2], "patch_size": 8},
    "tok_rgb": {"kind": "grid", "grid": [2, 2], "vocab_size": 64, "source": "rgb"},
    "caption": {"kind": "text", "vocab": "text", "max_tokens": 16, "vocab_size": 0},
}


@pytest.fixture
def config(tmp_path):
    samples = [{"__key__": f"k{i}", "rgb": image, "caption": f"picture {i}"} for i, image in enumerate(IMAGES)]
    write_shards(tmp_path / "raw", "val", samples, shard_size=3)
    torch.manual_seed(0)
    rgb = TokenizerConfig(
        InputConfig("image", (16, 16)), QuantizerConfig("fsq", levels=(4, 4, 4)), BackboneConfig(width=32)
    )
    ImageTokenizer(rgb).save_pretrained(tmp_path / "tokenizers/rgb")
    text = fit_text_tokenizers(samples, {"caption": CodecConfig("caption")}, vocab_size=120, bins=8, sentinels=8)
    text["caption"].save_pretrained(tmp_path / "tokenizers/caption")
    table = {**TABLE, "caption": {**TABLE["caption"], "vocab_size": text["caption"].vocab_size}}
    (tmp_path / "modalities.yaml").write_text(yaml.safe_dump(table))
    return TokenizeConfig(
        data=str(tmp_path / "raw"),
        output=str(tmp_path / "tokens"),
        modalities=str(tmp_path / "modalities.yaml"),
        tokenizers=str(tmp_path / "tokenizers"),
        splits=("val",),
        shard_size=4,
        batch_size=3,
    )


def test_tokens_are_those_of_the_tokenizers(config):
    tokenize(config)
    tokens = ShardDataset(Path(config.output) / "val", ["rgb", "tok_rgb", "caption"])
    assert list(tokens.keys) == [f"k{i}" for i in range(7)]
    expected = ImageTokenizer.from_folder(Path(config.tokenizers) / "rgb").encode(IMAGES)
    for i in range(7):
        sample = tokens[i]
        assert sample["tok_rgb"].tolist() == [expected[i].tolist()] and sample["tok_rgb"].dtype == np.int16
        np.testing.assert_array_equal(sample["rgb"], IMAGES[i])
        assert sample["caption"].ndim == 1
    assert (Path(config.output) / "modalities.yaml").exists()


def test_finished_shards_are_kept_and_missing_ones_made(config):
    tokenize(config)
    shards = sorted(Path(config.output).rglob("*.tar"))
    assert len(shards) == 9 and not list(Path(config.output).rglob("*.tmp"))
    content = {shard: shard.read_bytes() for shard in shards}
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    shards[-1].unlink()
    tokenize(config)
    assert {shard: shard.read_bytes() for shard in shards} == content
    kept = [shard for shard in shards if shard.name == "shard-000000.tar"]
    assert len(kept) == 3 and all(shard.stat().st_mtime_ns == times[shard] for shard in kept)


def test_refuses_to_mix(config):
    tokenize(config)
    with pytest.raises(ValueError, match="another configuration"):
        tokenize(dataclasses.replace(config, shard_size=2))
    rgb = ImageTokenizer.from_folder(Path(config.tokenizers) / "rgb")
    torch.nn.init.normal_(rgb.encoder.latents.weight)
    rgb.save_pretrained(Path(config.tokenizers) / "rgb")
    with pytest.raises(ValueError, match="another configuration"):
        tokenize(config)


def test_the_same_data_by_another_path_are_not_another_configuration(config, monkeypatch):
    tokenize(config)
    monkeypatch.chdir(Path(config.data).parent)
    tokenize(dataclasses.replace(config, data="raw", tokenizers="tokenizers"))
    with pytest.raises(ValueError, match="another configuration"):
        tokenize(dataclasses.replace(config, precision="bf16"))


def test_ids_need_the_settings_of_their_crops(config):
    folder, table = Path(config.data) / "ids", {"tok_depth": {"kind": "grid", "grid": [2, 2], "vocab_size": 64}}
    samples = [{"__key__": "a", "rgb": IMAGES[0], "tok_depth": np.zeros((2, 4), np.int16)}]
    write_shards(folder, "val", samples, shard_size=3)
    Path(config.modalities).write_text(yaml.safe_dump(table | {"rgb": TABLE["rgb"]}))
    config = dataclasses.replace(config, data=str(folder), crops=CropConfig(3, "rgb"))
    with pytest.raises(ValueError, match="tok_depth are tokens already; without crop_settings"):
        tokenize(config)
    write_shards(folder, "val", [{"__key__": "a", "crop_settings": np.array([[0, 0, 16, 16, 0]] * 3)}], shard_size=3)
    with pytest.raises(ValueError, match="tok_depth, sample 'a': there are ids of 2 crops, expected 3"):
        tokenize(config)


def test_refuses_a_tokenizer_that_does_not_fit_the_table(config):
    table = yaml.safe_load(Path(config.modalities).read_text())
    table["tok_rgb"]["vocab_size"] = 65
    Path(config.modalities).write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match="tok_rgb: the modality table says 65 ids"):
        tokenize(config)


def test_bad_raw_data_are_named(config):
    bad = [{"__key__": "b", "rgb": np.zeros((8, 8, 3), np.uint8), "caption": "x"}]
    write_shards(config.data, "val", bad, shard_size=3, first_shard=3)
    with pytest.raises(ValueError, match=r"rgb, sample 'b': expected an image of \(16, 16\) pixels, got \(8, 8, 3\)"):
        tokenize(config)


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(Path(root).rglob("*.tar"))}


def tokens_of(config, *more):
    return ShardDataset(Path(config.output) / "val", ["rgb", "tok_rgb", "caption", *more])


@pytest.fixture
def photos(config):
    """Pictures of different sizes, with a caption for each of three crops."""
    draws = np.random.default_rng(1)
    samples = [
        {"__key__": f"p{i}", "rgb": draws.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8),
         "caption": [f"crop {crop} of picture {i}" for crop in range(3)]}
        for i in range(5)
    ]  # fmt: skip
    write_shards(Path(config.data) / "photos", "val", samples, shard_size=2)
    return samples, dataclasses.replace(
        config, data=config.data + "/photos", crops=CropConfig(3, "rgb", scale=(0.3, 0.9), seed=7)
    )


def test_every_crop_is_that_of_all_modalities(photos):
    samples, config = photos
    tokenize(config)
    made = tokens_of(config, "crop_settings")
    tokenizers = load_tokenizers(TokenSpace.from_yaml(config.modalities), config.tokenizers)
    for i, sample in enumerate(samples):
        height, width = sample["rgb"].shape[:2]
        settings = crop_settings(height, width, 3, 7, sample["__key__"], scale=(0.3, 0.9))
        np.testing.assert_array_equal(made[i]["crop_settings"], settings)
        np.testing.assert_array_equal(made[i]["rgb"], sample["rgb"])
        views = [View.of(settings, crop, height, width) for crop in range(3)]
        expected = tokenizers["tok_rgb"].encode([Picture((16, 16))(sample["rgb"], view) for view in views])
        np.testing.assert_array_equal(made[i]["tok_rgb"], expected)
        rows = [row[row >= 0] for row in made[i]["caption"]]
        assert tokenizers["caption"].decode(rows) == sample["caption"]
    assert verify(config) == []
    read = TokenDataset(Path(config.output) / "val", TokenSpace.from_yaml(config.modalities))
    for epoch, crop in enumerate((1, 2, 0)):
        view = View.of(made[1]["crop_settings"], crop, *samples[1]["rgb"].shape[:2])
        np.testing.assert_array_equal(read[epoch, 1]["tok_rgb"], made[1]["tok_rgb"][crop])
        np.testing.assert_array_equal(read[epoch, 1]["rgb"], Picture((16, 16))(samples[1]["rgb"], view))
        assert tokenizers["caption"].decode([read[epoch, 1]["caption"]]) == [samples[1]["caption"][crop]]
    # The same from crop settings that are there, and whatever is together in a batch.
    (Path(config.data) / "val/crop_settings").symlink_to(Path(config.output) / "val/crop_settings")
    again = dataclasses.replace(config, output=config.output + "2", crops=CropConfig(3, "rgb", seed=7), batch_size=1)
    tokenize(again)
    assert contents(again.output) == contents(config.output)
    with pytest.raises(ValueError, match=r"'p0': has 3 crop settings, but crops\.count is 4"):
        tokenize(dataclasses.replace(again, output=config.output + "3", crops=CropConfig(4, "rgb")))


def test_pictures_that_do_not_fit_need_crops(photos):
    _, config = photos
    with pytest.raises(ValueError, match=r"rgb, sample 'p0': expected an image of \(16, 16\) pixels.* ask for crops"):
        tokenize(dataclasses.replace(config, crops=None))


def test_the_layout_of_4m_is_written_and_read(photos):
    samples, config = photos
    ours = dataclasses.replace(config, output=config.output + "/ours")
    theirs = dataclasses.replace(config, output=config.output + "/theirs", layout="4m")
    tokenize(ours)
    tokenize(theirs)
    made = tokens_of(theirs, "crop_settings")
    assert made[1]["tok_rgb"].dtype == np.int16 and made[1]["tok_rgb"].shape == (3, 4)
    assert [sample["caption"] for sample in made] == [sample["caption"] for sample in samples]
    assert verify(theirs) == []
    # Plain folders as `save_vq_tokens.py` leaves them, without split; ids are taken over, no tokenizer is needed.
    root = Path(config.output) / "folders"
    for sample in made:
        for name, value in sample.items():
            path = root / name / "a" / sample["__key__"]
            path.parent.mkdir(parents=True, exist_ok=True) if name != "__key__" else None
            if name == "caption":
                path.with_suffix(".json").write_text(json.dumps(value))
            elif name != "__key__":
                np.save(path.with_suffix(".npy"), value)
    (Path(config.tokenizers) / "rgb/config.json").unlink()
    again = dataclasses.replace(
        config, data=str(root), splits=(".",), output=config.output + "/again", crops=None, shard_size=2
    )
    tokenize(again)
    for old, new in zip(
        tokens_of(ours), ShardDataset(config.output + "/again", ["rgb", "tok_rgb", "caption"]), strict=True
    ):
        assert new["__key__"] == "a/" + old["__key__"]
        np.testing.assert_array_equal(new["tok_rgb"], old["tok_rgb"])
        np.testing.assert_array_equal(new["caption"], old["caption"])
    assert verify(again) == []


def test_bad_samples_are_counted_and_named(config):
    bad = [{"__key__": key, "rgb": np.zeros((size, 16, 3), np.uint8), "caption": "x"} for key, size in
           (("good", 16), ("low", 8))]  # fmt: skip
    write_shards(config.data, "val", bad, shard_size=3, first_shard=3)
    config = dataclasses.replace(config, on_error="skip")
    for written in (8, 0):
        tokenize(config)
        counts = json.loads((Path(config.output) / "counts.json").read_text())["val"]
        assert (counts["samples"], counts["shards"], counts["skipped"]) == (8, 4, {"unusable": 1})
        assert counts["written_now"] == written
    listed = json.loads((Path(config.output) / "val/caption/shard-000003.skipped.jsonl").read_text())
    assert listed["key"] == "low" and "expected an image of (16, 16) pixels" in listed["message"]
    assert tokens_of(config).keys == [f"k{i}" for i in range(7)] + ["good"]
    assert verify(config) == []


def test_verify_finds_what_is_wrong(photos, capsys):
    _, config = photos
    there = [f"{config.output}/{name} is not there" for name in ("card.json", "counts.json", "val")]
    assert verify(config) == there
    tokenize(config)
    folder, keys = Path(config.output) / "val", ["p2", "p3"]
    ids = {key: np.array([[1, 2, 3, 64 if key == "p3" else 0]] * 2, np.int16) for key in keys}
    write_shards(config.output, "val", [{"__key__": k, "tok_rgb": v} for k, v in ids.items()], 2, first_shard=1)
    write_shards(config.output, "val", [{"__key__": "p2", "caption": np.array([7])}], 2, first_shard=1)
    (folder / "rgb/shard-000002.tar").unlink()
    problems = "\n".join(verify(config))
    for part in ("rgb: (4, 2) samples and shards, but (5, 3) were counted", "key 'p3': cannot use this .npy: ids in",
                 "caption: (4, 3) samples", "key 'p3': not in caption", "key 'p4': not in rgb",
                 "tok_rgb: 2 crops, unlike crop_settings"):  # fmt: skip
        assert part in problems, part
    with pytest.raises(SystemExit) as stopped:
        run(dataclasses.replace(config, verify=True))
    assert stopped.value.code == 1 and "tok_rgb: 2 crops" in capsys.readouterr().out


def command(config, *launcher):
    options = [
        f"--{key}={getattr(config, key)}" for key in ("data", "output", "modalities", "tokenizers", "batch_size")
    ]
    return [sys.executable, "-m", *launcher, "fourm", "tokenize", *options, '--splits=["val"]', "--workers=1"]


def test_two_processes_give_the_bytes_of_one(config):
    tokenize(config)
    two = dataclasses.replace(config, output=config.output + "2")
    launcher = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511", "-m")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(two, *launcher), check=True, capture_output=True, env=environment)
    assert contents(two.output) == contents(config.output)
    counts = json.loads((Path(two.output) / "counts.json").read_text())["val"]
    assert (counts["samples"], counts["shards"], counts["written_now"]) == (7, 3, 7)


@pytest.mark.slow
def test_killed_ten_times_gives_the_same_bytes(config, tmp_path):
    draws = random.Random(0)
    samples = [{"__key__": f"k{i:03}", "rgb": IMAGES[i % 7], "caption": f"picture {i}"} for i in range(600)]
    write_shards(tmp_path / "many", "val", samples, shard_size=20)
    config = dataclasses.replace(config, data=str(tmp_path / "many"), batch_size=1)
    tokenize(config)
    torn = dataclasses.replace(config, output=config.output + "2")
    for kill in range(10):
        process = subprocess.Popen(command(torn), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shards = len(contents(torn.output)) if kill else 0
        while (
            process.poll() is None and len(list(Path(torn.output).rglob("*.tar"))) <= shards and draws.random() > 1e-4
        ):
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        whole = contents(config.output)
        assert all(data == whole[name] for name, data in contents(torn.output).items())  # none is half a shard
    subprocess.run(command(torn), check=True, capture_output=True)
    assert contents(torn.output) == contents(config.output)
    assert verify(torn) == []
