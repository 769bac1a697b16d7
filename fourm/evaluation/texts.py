"""Figures of texts, on what their codecs read out of them: words, numbers, colours, boxes, people, masks, places.

`TEXT_SCORES` knows every codec. Each function compares B guesses with B truths; its first figure is the main one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from fourm.evaluation.metrics import LOWER_IS_BETTER
from fourm.tokenization.structured import SAM_SIZE

Figures = dict[str, float]
Values = Sequence[Any]


def mean(values: Sequence[float]) -> float:
    """The mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def score_captions(guesses: Values, truths: Values, codec: Any = None) -> Figures:
    """F1 of the words, whatever their order and case (Rajpurkar et al. 2016), mean over samples."""
    shares = []
    for pair in zip(guesses, truths, strict=True):
        guess, truth = (Counter(re.findall(r"\w+", text.lower())) for text in pair)
        both = guess.total() + truth.total()
        shares.append(2 * (guess & truth).total() / both if both else 1.0)
    return {"token_f1": mean(shares)}


def score_metadata(guesses: Values, truths: Values, codec: Any) -> Figures:
    """Share of the true entries that are guessed in the right bin, and the distance in bins of those that are guessed.

    Their bins are those of the codec.
    """
    exact, distances = [], []
    for pair in zip(guesses, truths, strict=True):
        guess, truth = (dict(re.findall(r"v1=(\d+) v0=(\d+)", codec.to_text(value))) for value in pair)
        exact += [guess.get(kind) == index for kind, index in truth.items()]
        distances += [abs(int(guess[kind]) - int(index)) for kind, index in truth.items() if kind in guess]
    return {"exact_share": mean(exact), "bin_distance": mean(distances)}


def score_palettes(guesses: Values, truths: Values, codec: Any = None) -> Figures:
    """Distance in RGB (0 to 442) from each colour to the nearest of the other palette, both ways, mean over samples.

    No guess at all is as far as black is from white.
    """
    errors = []
    for guess, truth in ((guess, truth) for guess, truth in zip(guesses, truths, strict=True) if truth):
        apart = np.linalg.norm(np.subtract(np.reshape(guess, (-1, 1, 3)), np.array([truth])), axis=-1)
        errors.append((apart.min(0).mean() + apart.min(1).mean()) / 2 if len(guess) else 255 * 3**0.5)
    return {"colour_distance": mean(errors)}


def matches(guesses: Values, truths: Values, key: str) -> list[tuple[int, int]]:
    """Pairs of one guess and one truth whose boxes (under `key`) have an IoU of at least 0.5, the best first."""
    edges = [np.sort(np.reshape([thing[key] for thing in things], (-1, 2, 2)), 1) for things in (guesses, truths)]
    overlap = box_iou(*(torch.from_numpy(each.reshape(-1, 4).astype(float)) for each in edges)).nan_to_num().numpy()
    found: list[tuple[int, int]] = []
    while overlap.size and overlap.max() >= 0.5:
        one, other = divmod(int(overlap.argmax()), overlap.shape[1])
        found.append((one, other))
        overlap[one], overlap[:, other] = 0, 0
    return found


def _shares(hits: int, guessed: int, there: int, name: str) -> Figures:
    return {
        f"{name}f1_iou50": 2 * hits / max(guessed + there, 1),
        f"{name}precision_iou50": hits / max(guessed, 1),
        f"{name}recall_iou50": hits / max(there, 1),
    }


def score_boxes(guesses: Values, truths: Values, codec: Any = None) -> Figures:
    """F1, precision and recall of boxes of the right class at an IoU of 0.5, over all samples together."""
    hits = 0
    for pair in zip(guesses, truths, strict=True):
        for name in {thing["class_name"] for thing in pair[1]}:
            guess, truth = ([thing for thing in side if thing["class_name"] == name] for side in pair)
            hits += len(matches(guess, truth, "boxes"))
    return _shares(hits, sum(map(len, guesses)), sum(map(len, truths)), "")


def score_people(guesses: Values, truths: Values, codec: Any = None) -> Figures:
    """The same of people's boxes, and the mean angle in degrees between the 23 joints' rotations of those that match.

    Only people with a `body_pose` have angles.
    """
    hits, angles = 0, []
    for guess, truth in zip(guesses, truths, strict=True):
        pairs = matches(guess, truth, "box")
        hits += len(pairs)
        for one, other in pairs:
            bodies = [np.asarray(person.get("body_pose", ())) for person in (guess[one], truth[other])]
            if all(body.size for body in bodies):
                cosines = (np.einsum("jab,jab->j", *bodies) - 1) / 2
                angles.append(np.degrees(np.arccos(cosines.clip(-1, 1))).mean())
    figures = _shares(hits, sum(map(len, guesses)), sum(map(len, truths)), "person_")
    return figures | {"joint_angle_deg": mean(angles)}


def score_places(guesses: Values, truths: Values, codec: Any = None) -> Figures:
    """Share of the true names that are guessed, and how far from their place (as a share of the picture's side)."""
    found, apart = [], []
    for guess, truth in zip(guesses, truths, strict=True):
        known = {place["name"]: place for place in guess}
        found += [place["name"] in known for place in truth]
        pairs = [(place, known[place["name"]]) for place in truth if place["name"] in known]
        apart += [float(np.hypot(one["x"] - other["x"], one["y"] - other["y"])) for one, other in pairs]
    return {"name_recall": mean(found), "place_distance": mean(apart)}


def score_instances(guesses: Values, truths: Values, codec: Any = None) -> Figures:
    """The best IoU that each true mask has with a guessed one, mean over all; without masks that of the boxes."""
    best = []
    for guess, truth in zip(guesses, truths, strict=True):
        made, true = ([_covered(one) for place in side for one in place["instances"]] for side in (guess, truth))
        best += [max([(mask & one).sum() / max((mask | one).sum(), 1) for one in made], default=0.0) for mask in true]
    return {"mask_iou": mean(best)}


def _covered(instance: Mapping[str, Any]) -> np.ndarray:
    """The pixels of one instance, bool (H, W)."""
    covered, mask = np.zeros(SAM_SIZE, dtype=bool), np.asarray(instance.get("mask", [[1]])) > 0.5
    xmin, ymin, xmax, ymax = instance["box"]
    window = covered[ymin:ymax, xmin:xmax]
    rows, columns = np.arange(ymax - ymin) * len(mask), np.arange(xmax - xmin) * mask.shape[1]
    stretched = mask[rows // (ymax - ymin)][:, columns // (xmax - xmin)]
    window[...] = stretched[: len(window), : window.shape[1]]
    return covered


TEXT_SCORES: dict[str, Callable[[Values, Values, Any], Figures]] = {
    "caption": score_captions,
    "metadata": score_metadata,
    "metadata_21": score_metadata,
    "palette": score_palettes,
    "places": score_places,
    "boxes": score_boxes,
    "human_poses": score_people,
    "sam_instances": score_instances,
}


def score_texts(tokenizer: Any, guesses: Values, truths: Values) -> Figures:
    """Figures of values of a text modality, by the codec of its tokenizer."""
    return TEXT_SCORES[tokenizer.config.codec](guesses, truths, tokenizer.codec)


def typical(tokenizer: Any, values: Values) -> Any:
    """The one of the values that scores best as a guess of all of them: the constant to compare with."""

    def loss(value: Any) -> float:
        name, figure = next(iter(score_texts(tokenizer, [value] * len(values), values).items()))
        return float(np.nan_to_num(figure if name.startswith(LOWER_IS_BETTER) else -figure, nan=np.inf))

    return min(values, key=loss)
