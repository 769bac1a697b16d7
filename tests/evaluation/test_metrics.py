"""Figures against values worked out by hand, and against scikit-free brute force."""

import numpy as np
import pytest

from fourm.evaluation.metrics import (
    COMBINE,
    CONSTANT,
    SCORES,
    angle_degrees,
    bootstrap_ratio,
    coded_vectors,
    delta1,
    key,
    of_constant,
    unit_vectors,
)


def test_psnr_is_the_mean_over_pictures_and_a_perfect_picture_counts_100_db():
    truth = np.zeros((2, 16, 16, 3), np.uint8)
    guess = truth.copy()
    guess[1] += 51  # a fifth of the range: mse 0.04, 10 log10(25) = 13.979 dB
    assert SCORES["image"](guess, truth, None, 0)["psnr"] == pytest.approx((100 + 13.9794) / 2, abs=1e-3)
    assert SCORES["image"](truth, truth, None, 0)["ssim"] == pytest.approx(1)


def test_pictures_without_a_channel_axis_are_scored():
    truth = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    assert SCORES["image"](truth, truth, None, 0) == pytest.approx({"psnr": 100, "ssim": 1})


def test_field_error_counts_only_the_region():
    truth = np.array([[[100, 0], [200, -50]]])
    guess = np.array([[[120, 900], [300, -50]]])
    assert SCORES["field"](guess, truth, None, 0)["mae"] == pytest.approx((20 + 900 + 100 + 0) / 4)
    scored = SCORES["field"](guess, truth, truth > 0, 0)
    assert scored == pytest.approx({"mae": 60, "delta1": 0.5})  # 1.2 is inside 1.25, 1.5 is not


def test_delta1_ignores_truths_that_are_not_positive():
    assert delta1(np.array([5.0, 110.0]), np.array([0.0, 100.0])) == 1
    assert np.isnan(delta1(np.array([1.0]), np.array([-1.0])))


def test_angles():
    axis = np.array([1.0, 0.0, 0.0])
    others = np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [np.cos(1e-4), np.sin(1e-4), 0]])
    assert angle_degrees(others, axis) == pytest.approx([0, 90, 180, np.degrees(1e-4)], rel=1e-5, abs=1e-9)


def test_normals_are_scored_as_directions_not_as_pixels():
    up, east = coded_vectors(np.array([[[[0.0, 0, 1]]]])), coded_vectors(np.array([[[[5.0, 0, 0]]]]))
    assert SCORES["normal"](up, east, None, 0)["mean_angle"] == pytest.approx(90, abs=0.5)
    vectors = np.random.default_rng(0).normal(size=(100, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert angle_degrees(unit_vectors(coded_vectors(vectors)), vectors).max() < 0.5


def test_class_figures_by_hand():
    truth, guess = np.array([[[0, 0, 1, 1]]]), np.array([[[0, 1, 1, 1]]])
    scored = SCORES["classes"](guess, truth, None, 2)
    assert scored == pytest.approx({"accuracy": 0.75, "miou": (1 / 2 + 2 / 3) / 2, "iou": 2 / 3})
    # Class 2 neither occurs nor is guessed: it must not pull the mean down.
    assert SCORES["classes"](guess, truth, None, 3)["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert SCORES["classes"](guess, truth, np.array([[[True, False, False, True]]]), 3)["accuracy"] == 1


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(1.0, 2.0, 400)
    low, high = bootstrap_ratio(values, np.ones(400), draws=4000)
    error = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)


def test_bootstrap_weighs_samples_by_their_tokens():
    low, high = bootstrap_ratio(np.array([2.0, 30.0]), np.array([1.0, 15.0]))
    assert (low, high) == pytest.approx((2, 2))  # 2 bits a token in each sample, whatever the lengths


def test_point_estimates_and_constants():
    draws = np.array([1.0, 2, 50])[:, None, None, None] * np.ones((3, 2, 4, 4))
    assert (COMBINE["field"](draws) == 2).all()
    chances = np.array([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9]])[:, None, :, None, None]  # (S, B, C, H, W)
    assert COMBINE["classes"](chances).item() == 1
    assert CONSTANT["classes"](np.array([3, 5, 5])) == 5
    assert CONSTANT["field"](np.array([1, 2, 6], np.int16)) == 3
    assert CONSTANT["image"](np.array([[0, 10, 20], [10, 20, 31]], np.uint8)).tolist() == [5, 15, 26]


def test_names_of_figures():
    assert key("mae", "land", "m") == "mae_land_m"
    assert key("mean_angle") == "mean_angle_deg" and key("accuracy", "land", "m") == "accuracy_land"
    names = ["mae_land_m", "mean_angle_deg", "accuracy_land", "iou", "miou_land", "psnr"]
    assert [of_constant(name) for name in names] == [
        "mean_predictor_mae_land_m", "mean_predictor_angle_deg", "majority_land", "majority_iou", "majority_miou_land",
        "mean_predictor_psnr",
    ]  # fmt: skip


def test_depth_is_scored_up_to_scale_and_shift():
    truth = np.array([[[0.0, 1.0], [2.0, 3.0]]])
    assert SCORES["depth"](truth * -7 + 3, truth, None, 0)["relative_error"] == pytest.approx(0, abs=1e-9)
    flat = SCORES["depth"](np.zeros_like(truth), truth, None, 0)["relative_error"]
    assert flat == pytest.approx(1 / np.sqrt(1.25))  # the mean's error of 1 over a deviation of sqrt(1.25)


def test_masks_and_features_by_hand():
    truth, guess = np.array([[[1, 1], [0, 0]]]), np.array([[[1, 0], [1, 0]]])
    assert SCORES["mask"](guess, truth, None, 0)["iou"] == pytest.approx(1 / 3)
    wanted, made = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[6.0, 8.0], [0.0, 2.0]])
    assert SCORES["features"](made, wanted, None, 0)["cosine"] == pytest.approx(0.5)


def test_every_kind_has_an_estimate_and_a_constant():
    assert set(COMBINE) == set(CONSTANT) == set(SCORES)
    draws = np.array([[[1.0, 9.0]], [[3.0, 5.0]], [[2.0, 700.0]]])
    assert COMBINE["depth"](draws).tolist() == [[2, 9]]
    assert COMBINE["mask"](np.array([[True, False], [True, False], [False, False]])).tolist() == [True, False]
    assert COMBINE["features"](np.array([[[1.0, 2.0]], [[3.0, 2.0]]])).tolist() == [[2, 2]]
    assert CONSTANT["depth"](np.array([1, 2, 6])) == 3
    assert not CONSTANT["mask"](np.array([True, False, False]))
    assert CONSTANT["features"](np.array([[1.0, 2.0], [3.0, 2.0]])).tolist() == [2, 2]
