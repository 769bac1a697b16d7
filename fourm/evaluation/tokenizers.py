"""What a tokenizer loses: its reconstructions in the modality's own units, and how much of its codebook it uses.

The reconstruction figure is also the bound of any model that predicts these tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fourm.evaluation.metrics import SCORES, key
from fourm.evaluation.texts import score_texts
from fourm.generation.decode import unfold
from fourm.tokenization.autoencoder import ImageTokenizer
from fourm.tokenization.inputs import InputConfig, resize_raw
from fourm.tokenization.quantizers import codebook_use
from fourm.tokenization.text import TextTokenizer


@torch.inference_mode()
def reconstruct(
    tokenizer: ImageTokenizer, pictures: np.ndarray, batch_size: int = 64, valid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes and decodes raw pictures (B, H, W, ...): the decoded ones in raw units, and the ids (B, n)."""
    decoded, ids = [], []
    for start in range(0, len(pictures), batch_size):
        rows = slice(start, start + batch_size)
        ids.append(tokenizer.encode(pictures[rows], *([] if valid is None else [valid[rows]])))
        decoded.append(tokenizer.decode(ids[-1]))
    return np.concatenate(decoded), torch.cat(ids).cpu().numpy()


def score(
    tokenizer: ImageTokenizer, prediction: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None
) -> dict[str, float]:
    """Figures of a prediction by the kind of the tokenizer's input (`SCORES`), under their plain names.

    Args:
        tokenizer: Says the kind and the classes.
        prediction: (B, H, W, ...) raw pictures.
        truth: As `prediction`.
        where: (B, H, W) bool, the pixels that count; default: all.
    """
    settings = tokenizer.config.input
    if settings.values:  # raw values such as 0 and 255 to class numbers
        number = np.zeros(max(settings.values) + 1, dtype=np.int64)
        number[list(settings.values)] = range(settings.classes)
        prediction, truth = number[prediction], number[truth]
    return SCORES[settings.kind](prediction, truth, where, settings.classes)


def unit(tokenizer: ImageTokenizer) -> str:
    """Unit of a field as it stands in the name of a figure."""
    units = tokenizer.config.input.units
    return {"metres": "m", "degrees": "deg"}.get(units, re.sub(r"\W+", "_", units.lower()))


def evaluate_tokenizer(
    tokenizer: Any, dataset: Any, modality: str, n: int = 512, seed: int = 0, mask: str = ""
) -> dict[str, float]:
    """Figures of one tokenizer on held-out data.

    Args:
        tokenizer: `ImageTokenizer` or `TextTokenizer`.
        dataset: `ShardDataset` of the raw test split.
        modality: Raw modality that the tokenizer belongs to.
        n: Samples, at most.
        seed: Of their choice.
        mask: Raw modality with the masks of valid pixels, which alone are encoded and scored; default: all pixels.

    Returns:
        `codebook_use` (share of codes that occur), `perplexity`, `vocab_size`, and for images the reconstruction in
        the modality's own unit (`psnr` and `ssim`, `mae_<unit>` and `delta1`, `mean_angle_deg`, `accuracy` and
        `miou`), for text `round_trip` (share of values that a second trip leaves as the first one did),
        `unknown_share`, `tokens_mean`, `tokens_max` and what `TEXT_SCORES` has for its codec.
    """
    rows = np.random.default_rng(seed).permutation(len(dataset))[:n].tolist()
    samples = [dataset[row] for row in rows]
    values = [sample[modality] for sample in samples]
    if isinstance(tokenizer, TextTokenizer):
        return _text_figures(tokenizer, values)
    truth, where = truths(tokenizer, samples, modality, mask)
    decoded, ids = reconstruct(tokenizer, truth, valid=where)
    figures = score(tokenizer, decoded, truth, where)
    return _used(tokenizer, ids, tokenizer.quantizer.config.codebooks) | {
        key(name, "", unit(tokenizer)): value for name, value in figures.items()
    }


def truths(
    tokenizer: ImageTokenizer, samples: Sequence[Any], modality: str, mask: str = ""
) -> tuple[np.ndarray, np.ndarray | None]:
    """What reconstructions of samples are compared with (B, H, W, ...), and where (B, H, W); None for everywhere."""
    truth = tokenizer.targets([sample[modality] for sample in samples])
    if tokenizer.config.input.mask_value is None:
        return truth, None
    where = np.isfinite(truth.reshape(*truth.shape[:3], -1)).all(-1)
    if mask:
        masks = [np.float32(np.asarray(sample[mask]) > 0) for sample in samples]
        where &= resize_raw(masks, where.shape[1:], InputConfig()) > 1 - 1e-6
    return truth, where


def _used(tokenizer: Any, ids: np.ndarray, books: int = 1) -> dict[str, float]:
    used = codebook_use(torch.from_numpy(ids), tokenizer.vocab_size, books)
    return {name: float(value) for name, value in used.items()} | {"vocab_size": float(tokenizer.vocab_size)}


def _text_figures(tokenizer: Any, values: Sequence[Any]) -> dict[str, float]:
    sequences = tokenizer.encode(values)
    once = tokenizer.decode(sequences)
    twice = tokenizer.decode(tokenizer.encode(once))
    ids = np.concatenate(sequences)
    lengths = [len(sequence) for sequence in sequences]
    return _used(tokenizer, ids[None]) | {
        "round_trip": float(np.mean([first == second for first, second in zip(once, twice, strict=True)])),
        "unknown_share": float((ids == 1).mean()),
        "tokens_mean": float(np.mean(lengths)),
        "tokens_max": float(max(lengths)),
        **score_texts(tokenizer, unfold(tokenizer, once), values),
    }
