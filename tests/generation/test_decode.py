from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fourm.generation.decode import decode, joints, picture, principal_axes, project, unfold, words
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.inputs import InputConfig
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import TextTokenizer, train_text_tokenizer


class Doubler:
    def decode(self, ids):
        return 2 * np.asarray(ids)


def test_every_modality_goes_through_its_own_tokenizer():
    raw = decode({"depth": torch.tensor([[1, 2]])}, {"depth": Doubler()})
    assert raw["depth"].tolist() == [[2, 4]]


def images(**settings):
    return SimpleNamespace(config=SimpleNamespace(input=InputConfig(**settings)))


def texts(codec):
    return SimpleNamespace(config=CodecConfig(codec))


def test_images_keep_their_pixels():
    raw = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    for tokenizer in (None, images(), images(kind="normal")):
        drawn = picture(tokenizer, raw, size=16)
        assert drawn.size == (32, 16)
        assert (np.asarray(drawn)[::2, ::2] == raw).all()
    assert (np.asarray(picture(images(channels=1), raw[..., 0], size=8)) == raw[..., :1]).all()
    edges = images(kind="classes", classes=2, values=(0, 255))
    assert (np.asarray(picture(edges, 255 * (raw[..., 0] > 99), size=8)) == 255 * (raw[..., :1] > 99)).all()


def test_fields_use_one_scale():
    raw = np.array([[0.0, 5.0], [10.0, 99.0]], dtype=np.float32)
    pixels = np.asarray(picture(images(kind="field"), raw, size=2, scale=(0, 10)))
    assert pixels[0, 0].tolist() == [68, 1, 84]  # both ends of viridis
    assert pixels[1, 0].tolist() == pixels[1, 1].tolist() == [253, 231, 37]
    assert picture(images(kind="field"), np.full((4, 4), 7), size=4).size == (4, 4)  # a constant field


def test_classes_have_their_own_colours():
    raw = np.arange(36, dtype=np.uint8).reshape(6, 6)
    pixels = np.asarray(picture(images(kind="classes", classes=36), raw, size=6)).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) == 36
    assert pixels[0].tolist() == [31, 119, 180]
    water = np.asarray(picture(images(kind="classes", classes=2), np.array([[0, 1]]), size=1))
    assert water[0].sum(-1).tolist() == [174 + 199 + 232, 31 + 119 + 180]


def test_classes_with_raw_values_have_the_colours_and_names_of_their_classes():
    tokenizer = images(kind="classes", classes=3, values=(255, 0, 1), names=("none", "sky", "sea"))
    pixels = np.asarray(picture(tokenizer, np.array([[255, 0, 1]], np.uint8), size=1))
    plain = np.asarray(picture(images(kind="classes", classes=3), np.array([[0, 1, 2]]), size=1))
    assert (pixels == plain).all()
    large = np.asarray(picture(tokenizer, np.full((4, 4), 1, np.uint8), size=240))
    assert len(np.unique(large.reshape(-1, 3), axis=0)) > 2  # letters on it


def test_depth_does_not_lose_its_colours_to_a_few_pixels():
    raw = np.tile(np.arange(100.0), (100, 1))
    raw[0, 0] = 1e9
    pixels = np.asarray(picture(images(kind="depth"), raw, size=100))
    assert (pixels[50, 10] != pixels[50, 90]).any()


def test_features_of_one_batch_share_their_colours():
    draws = np.random.default_rng(0)
    maps = draws.standard_normal((2, 4, 4, 8))
    maps[1, 2, 2] = maps[0, 0, 0]
    axes = principal_axes(maps)
    one, two = (np.asarray(picture(images(kind="features"), each, size=4, scale=axes)) for each in maps)
    assert (one[0, 0] == two[2, 2]).all()
    mean, directions, low, high = axes
    assert np.allclose(directions.T @ directions, np.eye(3)) and (low < high).all()
    assert np.allclose(mean, maps.reshape(-1, 8).mean(0))
    single = np.asarray(picture(images(kind="features"), maps[0], size=4))
    assert single.reshape(-1, 3).min(0).tolist() == [0, 0, 0] and (single.reshape(-1, 3).max(0) == 255).all()
    assert picture(images(kind="features"), np.ones((3, 3, 1)), size=6).size == (6, 6)  # fewer than three, and constant
    vector = np.asarray(picture(images(kind="features"), np.array([1.0, 0, 0, -1]), size=2))
    assert vector[0, 0, 0] > vector[0, 0, 2] and vector[1, 1, 2] > vector[1, 1, 0]  # red, blue


def test_boxes_lie_where_they_say_over_the_background():
    photo = np.full((100, 100, 3), 7, np.uint8)
    pixels = np.asarray(picture(texts("boxes"), [{"boxes": [0.8, 0.9, 0.2, 0.1], "class_name": "x"}], 100, None, photo))
    edge = pixels[50, 20]
    assert (edge != 7).any() and (pixels[50, 80] == edge).all() and (pixels[10, 50] == edge).all()
    assert (pixels[50, 50] == 7).all() and (pixels[95, 95] == 7).all()


PERSON = {"box": [0.25, 0.0, 0.75, 1.0], "pose": [0] * 8, "global": np.diag([1, -1, -1]), "camera": [0.8, 0.0, 0.24],
          "shape": [0] * 10}  # fmt: skip


class Still:
    """Nobody moves; and what is almost a rotation becomes one."""

    def decode(self, ids):
        return np.tile(1.1 * np.eye(3, dtype=np.float32).reshape(-1), (len(ids), 23))


def test_a_standing_person_is_upright_and_symmetric():
    tokenizer = texts("human_poses")
    tokenizer.inner = Still()
    [[person]] = unfold(tokenizer, [[PERSON]])
    assert np.allclose(person["body_pose"], np.eye(3)) and "body_pose" not in PERSON
    places = project(person)
    pelvis, left_foot, right_foot, head, left_hand, right_hand = places[[0, 10, 11, 15, 22, 23]]
    assert head[1] < pelvis[1] < left_foot[1] == right_foot[1]  # y is down
    assert np.allclose(left_foot + right_foot, [1, 2 * left_foot[1]]) and left_hand[0] > 0.5 > right_hand[0]
    assert np.allclose(pelvis, [0.5, 0.5 + 0.4 * (-0.24 + 0.24)])
    drawn = [np.asarray(picture(each, [PERSON], size=120)) for each in (tokenizer, texts("human_poses"))]
    assert (drawn[0] != drawn[1]).any()  # without a tokenizer only the box


def test_a_turned_joint_takes_along_those_behind_it():
    body = np.tile(np.eye(3), (23, 1, 1))
    body[17] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # the left elbow, by a right angle from x to y
    straight, bent = (
        joints(PERSON | {"global": np.eye(3), "body_pose": each}) for each in (0 * body + np.eye(3), body)
    )
    moved = np.flatnonzero(np.abs(straight - bent).max(1) > 1e-9)
    assert moved.tolist() == [20, 22]  # left wrist and hand
    arm = straight[22] - straight[18]
    assert np.allclose(bent[22] - bent[18], [-arm[1], arm[0], arm[2]])


class Half:
    """The left half of every box."""

    def decode_probabilities(self, ids):
        return np.tile((np.arange(64) < 32).astype(np.float32), (len(ids), 1, 64, 1))


def test_masks_fill_their_part_of_the_box():
    tokenizer = texts("sam_instances")
    tokenizer.inner = Half()
    value = [{"point": (200, 200), "instances": [{"box": [0, 0, 112, 112], "tokens": [3] * 16}]}]
    photo = np.zeros((224, 224, 3), np.uint8)
    pixels = np.asarray(picture(tokenizer, value, 224, None, photo))
    assert (pixels[20, 20] > 0).any() and (pixels[20, 90] == 0).all() and (pixels[150, 20] == 0).all()
    assert (pixels[200, 200] == 255).all()  # where it was asked
    assert decode({"x": [[0]]}, {"x": SimpleNamespace(decode=lambda ids: [value], **vars(tokenizer))})["x"][0][0][
        "instances"
    ][0]["mask"][0][:2] == [1, 1]


def test_palettes_are_swatches():
    pixels = np.asarray(picture(texts("palette"), [[255, 0, 0], [0, 0, 255]], size=10))
    assert (pixels[:, :5] == [255, 0, 0]).all() and (pixels[:, 5:] == [0, 0, 255]).all()


@pytest.mark.parametrize(
    ("codec", "raw"), [("caption", "word " * 200), ("metadata", {"latitude": 1.5}), ("palette", []), ("places", [])]
)
def test_texts_are_drawn(codec, raw):
    drawn = picture(texts(codec), raw, size=128)
    assert drawn.size == (128, 128)
    assert (np.asarray(drawn) < 128).any()


def test_words():
    assert words({"mean_height": 12.3456, "n": 3}) == "mean height 12.35\nn 3"
    assert (
        words([{"name": "Bern", "x": 0, "y": 0}, {"name": "Thun", "x": 1, "y": 1}]) == "Bern 0.00 0.00\nThun 1.00 1.00"
    )
    assert words([]) == "none"
    assert words([[1, 2, 3]]) == ""


def test_real_tokenizers_from_ids_to_pictures():
    texts = ["v0=1 v0=2 v0=3", "a lake beside a wood"]
    words = train_text_tokenizer(texts * 20, vocab_size=400, bins=64, sentinels=4)
    tokenizers = {
        "rgb": ImageTokenizer(TokenizerConfig(input=InputConfig("image", size=(64, 64)))).eval(),
        "caption": TextTokenizer(words, CodecConfig("caption")),
        "palette": TextTokenizer(words, CodecConfig("palette", bins=64)),
    }
    caption, palette = (torch.from_numpy(tokenizers[n].encode([v])[0]) for n, v in
                        (("caption", texts[1]), ("palette", [[255, 0, 0], [0, 0, 255]])))  # fmt: skip
    rgb = torch.zeros(1, tokenizers["rgb"].grid[0] * tokenizers["rgb"].grid[1], dtype=torch.long)
    raw = decode({"rgb": rgb, "caption": [caption], "palette": [palette]}, tokenizers)
    assert raw["rgb"].shape == (1, 64, 64, 3)
    assert raw["caption"] == [texts[1]]
    assert np.allclose(raw["palette"][0], [[255, 0, 0], [0, 0, 255]], atol=4)
    for name, tokenizer in tokenizers.items():
        assert picture(tokenizer, raw[name][0], size=64).size == (64, 64)
