"""From logits to ids: top-k, top-p, temperature, and one draw a row.

Filters work on a short list of the likeliest ids, so that the whole vocabulary is sorted only where a distribution is
so flat that nothing less will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHORTLIST = 256


def shortlist(logits: Tensor, top_k: int | float = 0, top_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The ids that survive the filters, likeliest first. Top-k comes before top-p.

    Args:
        logits: (K, V) float32.
        top_k: How many ids stay (int) or which fraction of the vocabulary (float, at least one id); 0: all.
        top_p: The likeliest ids that reach this probability stay, the one that crosses it included; 0 or 1: all.

    Returns:
        Logits (K, C) in falling order, -inf where top-p removed an id, and their ids (K, C).
    """
    size = logits.shape[-1]
    wanted = int(top_k * size) if isinstance(top_k, float) else top_k
    allowed = min(max(1, wanted), size) if top_k > 0 else size
    if not 0 < top_p < 1:
        values, ids = logits.topk(allowed, dim=-1)
        return values, ids
    for length in (SHORTLIST, size) if allowed == size > SHORTLIST else (allowed,):
        values, ids = logits.topk(length, dim=-1)
        share = (values - (logits if allowed == size else values).logsumexp(-1, keepdim=True)).exp()
        before = share.cumsum(-1) - share
        if bool((before[:, -1] > top_p).all()):
            break
    return values.masked_fill(before > top_p, -torch.inf), ids


def draw(probability: Tensor, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws one column of each row: (K, C) probabilities, (K, C) ids that the columns stand for -> (K,)."""
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


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
    if top_k or 0 < top_p < 1:
        values, candidates = shortlist(logits, top_k, top_p)
    else:
        values, candidates = logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    probability = (values / temperature).softmax(-1)
    column = draw(probability, candidates, generator)[:, None]
    return candidates.gather(-1, column).squeeze(-1), probability.gather(-1, column).squeeze(-1)
