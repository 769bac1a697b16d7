"""Filters and draws by hand (tools/fixtures/generation.py compares filters with the reference)."""

import pytest
import torch
from scipy.stats import chi2

from fourm.generation.sampling import draw, sample, shortlist


def kept(logits, top_k, top_p):
    """(K, V) bool: ids that survive."""
    values, ids = shortlist(logits, top_k, top_p)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, values > -torch.inf)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (700, 0.9), (0.5, 0.3), (50, 0.999), (3000, 0.99)])
def test_the_shortlist_equals_a_full_sort(spread, top_k, top_p):
    logits = spread * torch.randn(4, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    count = int(top_k * 3000) if isinstance(top_k, float) else (top_k or 3000)
    expected = torch.zeros_like(logits, dtype=torch.bool)
    for row, values in enumerate(logits):
        order = values.argsort(descending=True)[:count]
        mass = 0.0
        for i, p in zip(order.tolist(), values[order].softmax(0).tolist(), strict=True):
            if mass > top_p:
                break
            expected[row, i] = True
            mass += p
    assert torch.equal(kept(logits, top_k, top_p), expected)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [0.5, 0.25, 0.125, 0.125]),
    ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
    ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
    ({"top_p": 0.7, "temperature": 0.5}, [0.8, 0.2, 0, 0]),  # filters come before the temperature
])  # fmt: skip
def test_frequencies(options, expected):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(20000, 4)
    ids, confidence = sample(logits, **options, generator=torch.Generator().manual_seed(1))
    frequency = ids.bincount(minlength=4) / len(ids)
    assert frequency.tolist() == pytest.approx(expected, abs=0.015)
    assert confidence.tolist() == pytest.approx([expected[i] for i in ids.tolist()])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 40}, {"top_p": 0.8},
                                     {"top_k": 0.5, "top_p": 0.9, "temperature": 1.5}])  # fmt: skip
def test_draws_follow_the_exact_probabilities(options):
    """Chi-square test over 300 ids."""
    logits = 1.5 * torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    top_k, top_p = options.get("top_k", 300), options.get("top_p", 1.0)
    order = logits.argsort(descending=True)[: int(300 * top_k) if isinstance(top_k, float) else top_k]
    share = logits[order].softmax(0)
    order = order[share.cumsum(0) - share <= top_p]
    expected = torch.zeros_like(logits)
    expected[order] = (logits[order] / options.get("temperature", 1.0)).softmax(0)

    count = 200_000
    generator = torch.Generator().manual_seed(4)
    drawn = [sample(logits.float().expand(count // 10, 300), **options, generator=generator) for _ in range(10)]
    ids, confidence = map(torch.cat, zip(*drawn, strict=True))
    torch.testing.assert_close(confidence, expected[ids].float(), rtol=1e-4, atol=0)
    found, likely = ids.bincount(minlength=300), expected * count > 5
    assert not found[expected == 0].any()
    statistic = ((found - count * expected)[likely].square() / (count * expected[likely])).sum()
    assert statistic < chi2.ppf(0.999, int(likely.sum()) - 1)


def test_draws_reach_both_ends_and_nothing_impossible():
    probability = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(10000, 5)
    columns = draw(probability, probability, torch.Generator().manual_seed(0))
    assert sorted(set(columns.tolist())) == [1, 3]
    again = draw(probability, probability, torch.Generator().manual_seed(0))
    assert torch.equal(columns, again)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}])
def test_without_choice_the_confidence_is_that_of_the_model(options):
    logits = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.0, 0.8]]).log()
    ids, confidence = sample(logits, **options)
    assert ids.tolist() == [1, 2]
    assert confidence.tolist() == pytest.approx([0.6, 0.8])
