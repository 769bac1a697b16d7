"""Figures of texts against values worked out by hand."""

import numpy as np
import pytest

from fourm.evaluation.metrics import of_constant
from fourm.evaluation.texts import TEXT_SCORES, matches, score_texts, typical
from fourm.tokenization.structured import CODECS, CodecConfig
from fourm.tokenization.text import TextTokenizer, train_text_tokenizer


def test_every_codec_has_figures():
    assert set(TEXT_SCORES) == set(CODECS)


def test_words_count_whatever_their_order_and_case():
    figures = TEXT_SCORES["caption"](["A dog, a car", "", "cat"], ["the Dog and a car", "", "dog"], None)
    assert figures == pytest.approx({"token_f1": (2 * 3 / 9 + 1 + 0) / 3})  # dog, a, car of 4 and 5 words


def test_metadata_in_bins():
    codec = CODECS["metadata"](CodecConfig("metadata", bins=10, fields={"a": (0, 10), "b": (0, 100), "c": (0, 1)}))
    guess, truth = {"a": 3.2, "b": 95.0}, {"a": 3.9, "b": 12.0, "c": 0.5}
    figures = TEXT_SCORES["metadata"]([guess], [truth], codec)
    assert figures == pytest.approx({"exact_share": 1 / 3, "bin_distance": (0 + 8) / 2})
    assert np.isnan(TEXT_SCORES["metadata"]([{}], [truth], codec)["bin_distance"])


def test_palettes_whatever_their_order_and_length():
    black, red, blue = [0, 0, 0], [30, 0, 0], [0, 0, 90]
    figures = TEXT_SCORES["palette"]([[red, black], [], []], [[black, blue], [red], []], None)
    # Red to black 30, blue to black 90, black to black 0. No guess: black to white. No truth: left out.
    assert figures["colour_distance"] == pytest.approx((((30 + 0) / 2 + (0 + 90) / 2) / 2 + 441.673) / 2, abs=1e-3)


def box(*edges, name="dog"):
    return {"boxes": list(edges), "class_name": name}


def test_boxes_match_once_and_in_their_class():
    truth = [box(0, 0, 0.4, 0.4), box(0.5, 0.5, 1, 1, name="cat")]
    guess = [box(0, 0, 0.4, 0.3), box(0.4, 0.4, 0, 0), box(0.5, 0.5, 1, 1)]  # IoU 0.75; 1, edges swapped; wrong class
    assert matches(guess, truth, "boxes") == [(1, 0), (2, 1)]
    figures = TEXT_SCORES["boxes"]([guess, []], [truth, truth], None)
    assert figures == pytest.approx({"precision_iou50": 1 / 3, "recall_iou50": 1 / 4, "f1_iou50": 2 / 7})
    assert TEXT_SCORES["boxes"]([[]], [[]], None)["f1_iou50"] == 0
    assert TEXT_SCORES["boxes"]([[box(0, 0, 1, 0.5)]], [[box(0, 0, 1, 1)]], None)["recall_iou50"] == 1  # just 0.5


def turn(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def test_people_have_the_mean_angle_of_their_joints():
    straight, bent = np.tile(np.eye(3), (23, 1, 1)), np.array([turn(90), *[np.eye(3)] * 21, turn(2)])
    truth = [{"box": [0, 0, 0.5, 1], "body_pose": straight}, {"box": [0.5, 0, 1, 1], "body_pose": straight}]
    guess = [{"box": [0, 0, 0.5, 0.9], "body_pose": bent.tolist()}, {"box": [0.5, 0, 1, 1]}]
    figures = TEXT_SCORES["human_poses"]([guess], [truth], None)
    assert figures["joint_angle_deg"] == pytest.approx(92 / 23)
    assert figures["person_f1_iou50"] == figures["person_recall_iou50"] == 1


def test_places_by_name():
    truth = [{"name": "Bern", "x": 0.1, "y": 0.2}, {"name": "Thun", "x": 0.5, "y": 0.5}]
    figures = TEXT_SCORES["places"]([[{"name": "Bern", "x": 0.4, "y": 0.6}]], [truth], None)
    assert figures == pytest.approx({"name_recall": 0.5, "place_distance": 0.5})


def test_instances_by_their_best_mask():
    ring = np.zeros((64, 64))
    ring[:, :32] = 1  # the left half of its box
    truth = [{"point": (1, 1), "instances": [{"box": [0, 0, 64, 64], "mask": ring}, {"box": [100, 100, 120, 120]}]}]
    guess = [{"point": (1, 1), "instances": [{"box": [0, 0, 32, 32]}]}]
    assert TEXT_SCORES["sam_instances"]([guess], [truth], None) == pytest.approx({"mask_iou": (0.5 + 0) / 2})


def test_the_typical_text_is_the_best_guess_of_all():
    texts = ["a dog", "a red dog", "a red dog runs", "snow"]
    tokenizer = TextTokenizer(train_text_tokenizer(texts, 250, bins=4, sentinels=4), CodecConfig("caption"))
    assert typical(tokenizer, texts) == "a red dog"
    assert of_constant(next(iter(score_texts(tokenizer, texts, texts)))) == "typical_token_f1"
    assert of_constant("iou") == "majority_iou" and of_constant("mae_m") == "mean_predictor_mae_m"
