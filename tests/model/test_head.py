"""The head with its loss in one operation, against torch's layers."""

import pytest
import torch
import torch.nn.functional as F

from fourm.model import head
from fourm.model.head import Segment, linear_cross_entropy

SEGMENTS = [Segment(5, slice(0, 7)), Segment(1, slice(12, 15)), Segment(4, slice(0, 7))]  # two share a vocabulary
WEIGHTS = torch.tensor([0.5, 2.0, 0.1])


def case():
    draw = torch.Generator().manual_seed(0)
    hidden, table = torch.randn(10, 6, generator=draw), torch.randn(15, 6, generator=draw)
    ids = torch.tensor([0, 6, 3, 3, 1, 2, 5, 5, 0, 6])
    return hidden.requires_grad_(), table.requires_grad_(), ids


def by_hand(hidden, table, ids):
    sums, start = [], 0
    for tokens, rows in SEGMENTS:
        part = slice(start, start + tokens)
        sums.append(F.cross_entropy(F.linear(hidden[part], table[rows]), ids[part], reduction="sum"))
        start += tokens
    return torch.stack(sums)


@pytest.mark.parametrize("chunk", [2**25, 56])  # all at once, and two tokens at a time
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_torch(monkeypatch, chunk, scale):
    monkeypatch.setattr(head, "CHUNK", chunk)
    hidden, table, ids = case()
    expected = by_hand(hidden, table, ids)
    (scale * (expected * WEIGHTS).sum()).backward()
    ours = [tensor.detach().clone().requires_grad_() for tensor in (hidden, table)]
    loss, sums = linear_cross_entropy(*ours, ids, SEGMENTS, WEIGHTS)
    (scale * loss).backward()
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(loss, (expected * WEIGHTS).sum())
    torch.testing.assert_close(ours[0].grad, hidden.grad)
    torch.testing.assert_close(ours[1].grad, table.grad)
    assert not ours[1].grad[7:12].any()  # a vocabulary nobody asked for


def test_without_gradients_and_in_bfloat16():
    hidden, table, ids = case()
    with torch.no_grad():
        exact, _ = linear_cross_entropy(hidden, table, ids, SEGMENTS, WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = linear_cross_entropy(hidden, table, ids, SEGMENTS, WEIGHTS)
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.02)
    rough.backward()
    assert hidden.grad.dtype == table.grad.dtype == torch.float32


def test_large_scores_do_not_overflow():
    hidden, table, ids = case()
    loss, _ = linear_cross_entropy(hidden * 1e4, table, ids, SEGMENTS, WEIGHTS)
    assert torch.isfinite(loss)


def test_evaluation_makes_no_gradients(monkeypatch):
    monkeypatch.setattr(head, "_add_product", lambda *arguments, **options: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        linear_cross_entropy(*case(), SEGMENTS, WEIGHTS)
    hidden, table, ids = case()
    loss, _ = linear_cross_entropy(hidden, table.detach(), ids, SEGMENTS, WEIGHTS)
    loss.backward()
    assert hidden.grad is not None


def test_frozen_states_leave_the_table_its_gradient():
    hidden, table, ids = case()
    linear_cross_entropy(hidden.detach(), table, ids, SEGMENTS, WEIGHTS)[0].backward()
    assert table.grad is not None and table.grad.any()
