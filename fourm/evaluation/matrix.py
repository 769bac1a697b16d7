"""The any-to-any matrix: how many bits about each modality does each other one give?

Per ordered pair: held-out bits per target token given the source, against the same model given nothing and given the
source of another sample. Grids are predicted in one parallel pass with all tokens masked, texts are teacher-forced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fourm.evaluation.metrics import bootstrap_ratio
from fourm.masking.batch import MaskedBatch
from fourm.masking.transfer import transfer_batch
from fourm.modalities import TokenSpace
from fourm.model.fourm import Context, FourM

Matrix = dict[str, dict[str, dict[str, Any]]]


def raw_sources(space: TokenSpace) -> dict[str, str]:
    """Model modality that stands for each raw modality as a source: the continuous one (pixels) where there are two."""
    ordered = sorted(space.inputs(), key=lambda name: space[name].discrete)
    chosen: dict[str, str] = {}
    for name in ordered:
        chosen.setdefault(space[name].source or name, name)
    return {space[name].source or name: name for name in space.names if name in chosen.values()}


def raw_targets(space: TokenSpace) -> dict[str, str]:
    """Model modality that stands for each raw modality as a target."""
    chosen: dict[str, str] = {}
    for name in space.outputs():
        chosen.setdefault(space[name].source or name, name)
    return chosen


def complete_samples(dataset: Any, names: Sequence[str], n: int, seed: int) -> dict[int, dict[str, Any]]:
    """Draws n samples of a token dataset that hold all the named modalities, by their index.

    Args:
        dataset: `TokenDataset`, indexed by (epoch, index).
        names: Model modalities every sample must have.
        n: How many.
        seed: Of the choice.

    Raises:
        ValueError: Fewer than n such samples.
    """
    chosen: dict[int, dict[str, Any]] = {}
    for index in np.random.default_rng(seed).permutation(len(dataset)):
        sample = dataset[0, int(index)]
        if all(name in sample for name in names):
            chosen[int(index)] = sample
        if len(chosen) == n:
            return chosen
    raise ValueError(f"only {len(chosen)} of {len(dataset)} samples hold all of {', '.join(names)}; {n} are needed")


def raw_samples(raw: Any, chosen: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The raw samples that belong to token samples (by index); ValueError where the keys differ."""
    scenes = [raw[index] for index in chosen]
    for scene, sample in zip(scenes, chosen.values(), strict=True):
        if scene["__key__"] != sample["__key__"]:
            raise ValueError(
                f"raw data has {scene['__key__']!r} where the tokens have {sample['__key__']!r}; "
                "both must be the same split in the same order"
            )
    return scenes


def bits_per_row(model: FourM, batch: MaskedBatch, context: Context) -> np.ndarray:
    """Bits that all asked tokens of each row cost: (B,) float64."""
    return model.token_nll(batch, context).double().sum(1).cpu().numpy() / np.log(2)


@torch.inference_mode()
def any_to_any(
    model: FourM,
    dataset: Any,
    n: int = 128,
    batch_size: int = 32,
    sources: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Matrix:
    """Bits per target token that each source saves, on held-out samples.

    Every source is encoded once and serves all targets. The wrong source is that of the next sample in the (randomly
    ordered) batch.

    Args:
        model: Its `space` says which modalities there are.
        dataset: `TokenDataset` of the test split.
        n: Samples per pair, at least 2.
        batch_size: Samples per pass, at least 2.
        sources: Raw names; default: all that may be given.
        targets: Raw names; default: all that may be predicted.
        seed: Of the choice of samples and of the bootstrap.
        progress: Show a bar.

    Returns:
        `{source: {target: {"gain_bits", "ci95": [low, high], "shuffled_gain_bits", "bits", "nothing_bits"}}}` with raw
        names; all in bits per target token, a modality against itself is left out.

    Raises:
        ValueError: An unknown name, too few samples, or n or batch_size below 2.
    """
    if n < 2 or batch_size < 2:
        raise ValueError(f"n is {n} and batch_size {batch_size}; both must be at least 2, for another sample's source")
    space = model.space
    given = _chosen(raw_sources(space), sources, "source")
    asked = _chosen(raw_targets(space), targets, "target")
    samples = list(complete_samples(dataset, [*given.values(), *asked.values()], n, seed).values())
    device = next(model.parameters()).device

    was_training = model.training
    model.eval()
    tokens = {target: np.zeros(n) for target in asked}
    nothing = {target: np.zeros(n) for target in asked}
    pairs = [(source, target) for source in given for target in asked if source != target]
    bits, shuffled = ({pair: np.zeros(n) for pair in pairs} for _ in range(2))
    chunks = np.array_split(np.arange(n), max(1, n // batch_size))
    bar = tqdm(total=len(chunks) * len(given), desc="matrix", unit="source", disable=not progress)
    for chunk in chunks:
        rows = [samples[i] for i in chunk]
        ask = {target: transfer_batch(space, rows, [], [name]).to(device) for target, name in asked.items()}
        empty = model.encode(next(iter(ask.values())))
        for target in asked:
            tokens[target][chunk] = (ask[target].target_mod >= 0).sum(1).cpu()
            nothing[target][chunk] = bits_per_row(model, ask[target], empty)
        for source, source_name in given.items():
            context = model.encode(transfer_batch(space, rows, [source_name], []).to(device))
            wrong = context.select(torch.arange(len(rows), device=device).roll(1))
            for target in asked:
                if source != target:
                    bits[source, target][chunk] = bits_per_row(model, ask[target], context)
                    shuffled[source, target][chunk] = bits_per_row(model, ask[target], wrong)
            bar.update()
    bar.close()
    model.train(was_training)

    matrix: Matrix = {source: {} for source in given}
    for source, target in pairs:
        count, gain = tokens[target], nothing[target] - bits[source, target]
        total = count.sum()
        matrix[source][target] = {
            "gain_bits": float(gain.sum() / total),
            "ci95": list(bootstrap_ratio(gain, count, seed=seed)),
            "shuffled_gain_bits": float((nothing[target] - shuffled[source, target]).sum() / total),
            "bits": float(bits[source, target].sum() / total),
            "nothing_bits": float(nothing[target].sum() / total),
        }
    return matrix


def _chosen(known: dict[str, str], names: Sequence[str] | None, role: str) -> dict[str, str]:
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"{unknown} cannot be a {role}, known are {', '.join(known)}")
    return known if names is None else {name: known[name] for name in names}


def summary(matrix: Matrix, sources: Sequence[str] | None = None) -> dict[str, float]:
    """What the matrix says as a whole.

    Args:
        matrix: From `any_to_any`.
        sources: Count only pairs with these sources; default: all.

    Returns:
        `pairs`, `positive_share` (pairs whose interval lies above 0), `mean_gain_bits`, `max_shuffled_gain_bits` and
        `shuffled_positive_share` (pairs where another sample's source still gains).
    """
    cells = [cell for source, row in matrix.items() if sources is None or source in sources for cell in row.values()]
    if not cells:
        raise ValueError(f"no pairs with a source among {sources}, the matrix has {', '.join(matrix)}")
    wrong = np.array([cell["shuffled_gain_bits"] for cell in cells])
    return {
        "pairs": float(len(cells)),
        "positive_share": float(np.mean([cell["ci95"][0] > 0 for cell in cells])),
        "mean_gain_bits": float(np.mean([cell["gain_bits"] for cell in cells])),
        "max_shuffled_gain_bits": float(wrong.max()),
        "shuffled_positive_share": float((wrong > 0).mean()),
    }
