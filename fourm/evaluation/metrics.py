"""Figures on numpy arrays, in each modality's own units.

`SCORES`, `COMBINE` and `CONSTANT` know the kinds of image-like modality: `image` (pixels), `field` (numbers), `normal`
(unit vectors coded as uint8), `classes` (ids), `depth` (up to scale and shift), `mask` and `features`. B pictures of
H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Array = np.ndarray
TEXT_FIGURES = ("token_f1", "exact_share", "bin_distance", "colour_distance", "f1_", "precision_", "recall_", "person_",
                "joint_angle", "name_recall", "place_distance", "mask_iou")  # fmt: skip
LOWER_IS_BETTER = ("mae", "mean_angle", "relative_error", "spectral_error", "bin_distance", "colour_distance",
                   "joint_angle", "place_distance")  # fmt: skip


def images(pictures: Array) -> torch.Tensor:
    """(B, H, W) or (B, H, W, C) uint8 pictures as (B, C, H, W) floats in 0..255."""
    return torch.from_numpy(np.ascontiguousarray(pictures.reshape(*pictures.shape[:3], -1))).float().permute(0, 3, 1, 2)


def unit_vectors(coded: Array) -> Array:
    """Unit vectors (..., 3) from their uint8 code, round((n + 1) / 2 * 255)."""
    vectors = coded.astype(np.float32) / 127.5 - 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def coded_vectors(vectors: Array) -> Array:
    """Inverse of `unit_vectors`; vectors (..., 3) of any length."""
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)
    return np.round((vectors + 1) * 127.5).astype(np.uint8)


def angle_degrees(prediction: Array, truth: Array) -> Array:
    """Angle between unit vectors (..., 3), in degrees."""
    # The chord is exact where the arc cosine of a dot product near 1 is not.
    chord = np.linalg.norm(prediction.astype(np.float64) - truth, axis=-1)
    return np.degrees(2 * np.arcsin(np.clip(chord / 2, 0, 1)))


def delta1(prediction: Array, truth: Array) -> float:
    """Share of positive truths whose ratio to the prediction is below 1.25 either way (Eigen et al. 2014)."""
    positive = truth > 0
    if not positive.any():
        return float("nan")
    ratio = np.maximum(prediction[positive], 1e-3) / truth[positive]
    return float((np.maximum(ratio, 1 / ratio) < 1.25).mean())


def bootstrap_ratio(numerator: Array, denominator: Array, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of sum(numerator) / sum(denominator) when the n samples are redrawn with replacement.

    Args:
        numerator: (n,) sums per sample.
        denominator: (n,) counts per sample.
        draws: Bootstrap draws.
        seed: Of the redrawing.
    """
    n = len(numerator)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, n)
    ratios = (weights @ numerator) / np.maximum(weights @ denominator, 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def score_image(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """PSNR in dB (mean over pictures) and SSIM of uint8 pictures; `where` is ignored, both need whole pictures."""
    guess, wanted = images(prediction), images(truth)
    psnr = peak_signal_noise_ratio(guess, wanted, data_range=255.0, reduction="none", dim=(1, 2, 3))
    # A perfect picture has infinite PSNR; it counts as 100 dB so that one of them does not swallow the mean.
    similarity = structural_similarity_index_measure(guess, wanted, data_range=255.0)
    assert isinstance(similarity, torch.Tensor)
    return {"psnr": float(psnr.clamp(max=100).mean()), "ssim": float(similarity)}


def score_field(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """Mean absolute error in the field's unit, and delta1."""
    chosen = np.ones(truth.shape, bool) if where is None else where
    guess, wanted = prediction[chosen].astype(np.float64), truth[chosen].astype(np.float64)
    return {"mae": float(np.abs(guess - wanted).mean()), "delta1": delta1(guess, wanted)}


def score_normal(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """Mean angle in degrees between uint8-coded unit vectors."""
    angles = angle_degrees(unit_vectors(prediction), unit_vectors(truth))
    return {"mean_angle": float((angles if where is None else angles[where]).mean())}


def score_classes(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """Accuracy and mean IoU over the classes that occur; for two classes also the IoU of class 1."""
    chosen = np.ones(truth.shape, bool) if where is None else where
    guess, wanted = (torch.from_numpy(ids[chosen].astype(np.int64)) for ids in (prediction, truth))
    figures = {
        "accuracy": float(multiclass_accuracy(guess, wanted, num_classes=classes, average="micro")),
        "miou": float(multiclass_jaccard_index(guess, wanted, num_classes=classes, average="macro")),
    }
    if classes == 2:
        figures["iou"] = float(multiclass_jaccard_index(guess, wanted, num_classes=2, average="none")[1])
    return figures


def score_depth(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """Mean error after the best scale and shift of each picture, over the truth's deviation (Ranftl et al. 2020)."""
    errors = []
    for number, (guess, wanted) in enumerate(zip(prediction.astype(np.float64), truth.astype(np.float64), strict=True)):
        chosen = np.ones(wanted.shape, bool) if where is None else where[number]
        known = np.stack([guess[chosen], np.ones(chosen.sum())], axis=1)
        fitted = known @ np.linalg.lstsq(known, wanted[chosen], rcond=None)[0]
        errors.append(np.abs(fitted - wanted[chosen]).mean() / max(wanted[chosen].std(), 1e-12))
    return {"relative_error": float(np.mean(errors))}


def score_mask(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """Intersection over union of all masks together."""
    chosen = np.ones(truth.shape, bool) if where is None else where
    guess, wanted = prediction[chosen].astype(bool), truth[chosen].astype(bool)
    return {"iou": float((guess & wanted).sum() / max((guess | wanted).sum(), 1))}


def score_features(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """Mean cosine similarity of vectors (..., C)."""
    chosen = np.ones(truth.shape[:-1], bool) if where is None else where
    guess, wanted = (torch.from_numpy(vectors[chosen].astype(np.float32)) for vectors in (prediction, truth))
    return {"cosine": float(torch.nn.functional.cosine_similarity(guess, wanted, dim=-1).mean())}


def score_spectrogram(prediction: Array, truth: Array, where: Array | None, classes: int) -> dict[str, float]:
    """Log-spectral distance of waves (B, samples): rms difference in dB of their power in a third of an octave (bands
    of equal ratio), mean over time; what is below -60 dB is silence."""
    bands = torch.bucketize(torch.arange(257), torch.logspace(0, 8, 24, base=2))

    def spectra(waves: Array) -> torch.Tensor:
        sound = torch.from_numpy(waves.astype(np.float32)) / (32_768 if waves.dtype.kind == "i" else 1)
        spectrum = torch.stft(sound, 512, 128, window=torch.hann_window(512), return_complex=True).abs() / 128
        power = spectrum.new_zeros(len(waves), 25, spectrum.shape[2]).index_add(1, bands, spectrum**2)
        return 10 * power.clamp(min=1e-6).log10()

    return {"spectral_error_db": float((spectra(prediction) - spectra(truth)).square().mean(1).sqrt().mean())}


SCORES: dict[str, Callable[[Array, Array, Array | None, int], dict[str, float]]] = {
    "image": score_image,
    "field": score_field,
    "normal": score_normal,
    "classes": score_classes,
    "depth": score_depth,
    "mask": score_mask,
    "features": score_features,
    "spectrogram": score_spectrogram,
}

# A point estimate from draws (S, B, H, W, ...) of the raw modality; for classes from probabilities (S, B, C, H, W).
COMBINE: dict[str, Callable[[Array], Array]] = {
    "image": lambda draws: np.round(draws.mean(0, dtype=np.float32)).astype(np.uint8),
    "field": lambda draws: np.median(draws, axis=0),
    "normal": lambda draws: coded_vectors(unit_vectors(draws).mean(0)),
    "classes": lambda draws: draws.mean(0).argmax(1),
    "depth": lambda draws: np.median(draws, axis=0),
    "mask": lambda draws: draws.mean(0) >= 0.5,
    "features": lambda draws: draws.mean(0, dtype=np.float32),
    "spectrogram": lambda draws: draws[0],  # sounds of different phase have no mean
}

# The best constant, from all training pixels (P,) or (P, C).
CONSTANT: dict[str, Callable[[Array], Any]] = {
    "image": lambda pixels: np.round(pixels.mean(0)).astype(np.uint8),
    "field": lambda pixels: pixels.mean(dtype=np.float64),
    "normal": lambda pixels: coded_vectors(unit_vectors(pixels).mean(0)),
    "classes": lambda pixels: np.bincount(pixels.ravel()).argmax(),
    "depth": lambda pixels: pixels.mean(dtype=np.float64),
    "mask": lambda pixels: pixels.mean() >= 0.5,
    "features": lambda pixels: pixels.mean(0, dtype=np.float64),
    "spectrogram": lambda samples: samples.dtype.type(0),  # silence
}


def key(figure: str, region: str = "", unit: str = "") -> str:
    """Name of a figure in metrics.json, such as `mae_land_m` or `mean_angle_deg`."""
    return "_".join(part for part in (figure, region, {"mae": unit, "mean_angle": "deg"}.get(figure)) if part)


def of_constant(name: str) -> str:
    """What a figure is called when the constant is scored: `mean_predictor_mae_land_m`, `majority_land`, ...

    The constant of a text is a typical one of the training texts: `typical_token_f1`.
    """
    if name.startswith(TEXT_FIGURES):
        return f"typical_{name}"
    if name.startswith(("accuracy", "miou", "iou")):
        return f"majority_{name}".replace("_accuracy", "")
    return "mean_predictor_" + name.removeprefix("mean_")
