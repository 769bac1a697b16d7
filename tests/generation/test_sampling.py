"""Filters and draws by hand (tools/fixtures/generation.py compares filters with the reference)."""

import pytest
import torch

from fourm.generation.sampling import sample, shortlist


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


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}])
def test_without_choice_the_confidence_is_that_of_the_model(options):
    logits = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.0, 0.8]]).log()
    ids, confidence = sample(logits, **options)
    assert ids.tolist() == [1, 2]
    assert confidence.tolist() == pytest.approx([0.6, 0.8])
