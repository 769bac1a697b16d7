"""The any-to-any matrix: how many bits about each modality does each other one give?

Per ordered pair: held-out bits per target token given the source, against the same model given nothing and given the
source of another sample. Grids are predicted in one parallel pass with all tokens masked, texts are teacher-forced.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fourm.evaluation.metrics import bootstrap_ratio
from fourm.masking.batch import MaskedBatch
from fourm.masking.transfer import transfer_batch
from fourm.modalities import TokenSpace
from fourm.model.fourm import FourM
from fourm.tokenization.encode import source_of

Matrix = dict[str, dict[str, dict[str, Any]]]


def raw_name(space: TokenSpace, name: str) -> str:
    """What a modality is called in figures: as its raw modality, or by its own name where several are made from that.

    Of those the one with the raw modality's own tokenizer keeps its name, so that a picture is one to any model.
    """
    source = source_of(name, space[name])
    rows = [each for each, row in space.modalities.items() if row.discrete and source_of(each, row) == source]
    own = [each for each in rows if space[each].tokenizer in (None, source)] if len(rows) > 1 else rows
    return name if name in rows and own != [name] else source


def raw_sources(space: TokenSpace) -> dict[str, str]:
    """Model modality that stands for each `raw_name` as a source: the continuous one (pixels) where there are two."""
    discrete_first = sorted(space.inputs(), key=lambda name: not space[name].discrete)
    chosen = {raw_name(space, name): name for name in discrete_first}
    return {raw: chosen[raw] for raw in dict.fromkeys(raw_name(space, name) for name in space.inputs())}


def raw_targets(space: TokenSpace) -> dict[str, str]:
    """Model modality that stands for each `raw_name` as a target."""
    return {raw_name(space, name): name for name in space.outputs()}


def chosen_rows(size: int, n: int, seed: int) -> list[int]:
    """Draws n of so many samples by their index; ValueError where there are fewer."""
    if n > size:
        raise ValueError(f"{n} samples are wanted, but there are only {size}")
    return np.random.default_rng(seed).permutation(size)[:n].tolist()


def aligned_samples(raw: Any, tokens: Any, n: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """n raw samples and their token samples; ValueError where the keys of the two data sets differ."""
    rows = chosen_rows(len(tokens), n, seed)
    pairs = [(raw[row], tokens[row]) for row in rows]
    for scene, sample in pairs:
        if scene["__key__"] != sample["__key__"]:
            raise ValueError(
                f"raw data has {scene['__key__']!r} where the tokens have {sample['__key__']!r}; "
                "both must be the same split in the same order"
            )
    return [scene for scene, _ in pairs], [sample for _, sample in pairs]


def bits_per_row(model: FourM, batch: MaskedBatch, hidden: Tensor) -> np.ndarray:
    """Bits that all asked tokens of each row cost, (B,) float64; `hidden` (B, M, D) is what the decoder made."""
    return model.token_nll(batch, hidden).double().sum(1).cpu().numpy() / np.log(2)


@torch.inference_mode()
def any_to_any(
    model: FourM,
    dataset: Any,
    n: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Matrix:
    """Bits per target token that each source saves, on held-out samples.

    Every source is encoded once and serves all targets. The wrong source is that of the sample before in the (randomly
    ordered) batch. What the decoder makes of it is known already where a grid is asked: it is fed mask tokens, whatever
    the sample.

    Args:
        model: Its `space` says which modalities there are.
        dataset: `TokenDataset` of the test split.
        n: Samples per pair, at least 2.
        batch_size: Samples per pass, at least 2.
        seed: Of the choice of samples and of the bootstrap.
        progress: Show a bar.

    Returns:
        `{source: {target: {"gain_bits", "ci95": [low, high], "shuffled_gain_bits", "bits", "nothing_bits"}}}` with raw
        names; all in bits per target token, a modality against itself is left out.

    Raises:
        ValueError: Too few samples, or n or batch_size below 2.
    """
    if n < 2 or batch_size < 2:
        raise ValueError(f"n is {n} and batch_size {batch_size}; both must be at least 2, for another sample's source")
    space = model.eval().space
    given, asked = raw_sources(space), raw_targets(space)
    samples = [dataset[row] for row in chosen_rows(len(dataset), n, seed)]
    device = next(model.parameters()).device
    tokens, nothing = ({target: np.zeros(n) for target in asked} for _ in range(2))
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
            nothing[target][chunk] = bits_per_row(model, ask[target], model.decode(ask[target], empty))
        for source in given:
            context = model.encode(transfer_batch(space, rows, [given[source]], []).to(device))
            before = torch.arange(len(rows), device=device).roll(1)
            for target, name in asked.items():
                if source == target:
                    continue
                hidden = model.decode(ask[target], context)
                grid = space[name].kind == "grid"
                wrong = hidden[before] if grid else model.decode(ask[target], context.select(before))
                bits[source, target][chunk] = bits_per_row(model, ask[target], hidden)
                shuffled[source, target][chunk] = bits_per_row(model, ask[target], wrong)
            bar.update()
    bar.close()

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


def summary(matrix: Matrix) -> dict[str, float]:
    """What the matrix says as a whole.

    Returns:
        `pairs`, `positive_share` (pairs whose interval lies above 0), `mean_gain_bits` and `max_shuffled_gain_bits`.
    """
    cells = [cell for row in matrix.values() for cell in row.values()]
    return {
        "pairs": float(len(cells)),
        "positive_share": float(np.mean([cell["ci95"][0] > 0 for cell in cells])),
        "mean_gain_bits": float(np.mean([cell["gain_bits"] for cell in cells])),
        "max_shuffled_gain_bits": max(cell["shuffled_gain_bits"] for cell in cells),
    }
