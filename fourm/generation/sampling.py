"""From logits to ids: top-k, top-p, temperature, and one draw a row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def shortlist(logits: Tensor, top_k: int | float = 0, top_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The ids that survive the filters, in any order. Top-k comes before top-p.

    Args:
        logits: (K, V) float32.
        top_k: How many ids stay (int) or which fraction of the vocabulary (float, at least one id); 0: all.
        top_p: The likeliest ids that reach this probability stay, the one that crosses it included; 0 or 1: all.

    Returns:
        Logits (K, C), -inf where top-p removed an id, and their ids (K, C).
    """
    size = logits.shape[-1]
    wanted = int(top_k * size) if isinstance(top_k, float) else top_k
    if top_k > 0 and wanted < size:
        values, ids = logits.topk(max(1, wanted), dim=-1, sorted=False)
    else:
        values, ids = logits, torch.arange(size, device=logits.device).expand_as(logits)
    if 0 < top_p < 1:
        ranked = falling(values)
        share = ranked.softmax(-1)
        last = (share.cumsum(-1) - share <= top_p).sum(-1, keepdim=True) - 1
        values = values.masked_fill(values < ranked.gather(-1, last), -torch.inf)
    return values, ids


def falling(values: Tensor) -> Tensor:
    """Sorts each row of (K, C), the largest first."""
    if values.device.type == "cpu":  # numpy sorts 30,000 numbers twenty times as fast as torch
        return torch.from_numpy(np.sort(values.detach().numpy())).flip(-1)
    return values.sort(-1, descending=True).values


def draw(probability: Tensor, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws one column of each row: (K, C) probabilities, (K, C) ids that the columns stand for -> (K,).

    One uniform number a row is looked up among the cumulative sums; `torch.multinomial` takes thirty times as long.
    """
    sums = probability.cumsum(-1)
    level = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, level, right=True).squeeze(-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | float = 0,
    top_p: float = 0.0,
    generator: torch.Generator | None = None,
    draw: Callable[[Tensor, Tensor, torch.Generator | None], Tensor] = draw,
) -> tuple[Tensor, Tensor]:
    """Filters, tempers and draws.

    Where only one outcome is possible (temperature 0 or top_k 1) the probability is the one the model gives it among
    all ids: otherwise all confidences would be 1 and MaskGIT would keep arbitrary positions.

    Args:
        logits: (K, V).
        temperature: Divides the filtered logits; below 1e-10 the likeliest id is taken.
        top_k: See `shortlist`.
        top_p: See `shortlist`.
        generator: Where randomness comes from, on the device of the logits.
        draw: How one column of each row is drawn; another function can feed recorded draws.

    Returns:
        Ids (K,) and their probabilities (K,) in the distribution they were drawn from.
    """
    logits = logits.float()
    if temperature < 1e-10 or (top_k == 1 and isinstance(top_k, int)):
        value, ids = logits.max(-1)
        return ids, (value - logits.logsumexp(-1)).exp()
    values, candidates = shortlist(logits, top_k, top_p)
    probability = (values / temperature).softmax(-1)
    column = draw(probability, candidates, generator)[:, None]
    return candidates.gather(-1, column).squeeze(-1), probability.gather(-1, column).squeeze(-1)
