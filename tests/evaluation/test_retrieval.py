"""Ranks, recalls and intervals, by hand and against scipy and numpy."""

import numpy as np
import torch

from fourm.evaluation.retrieval import (
    both_ways,
    cka,
    mutual_knn,
    paired_bootstrap,
    ranks,
    recalls,
    search,
    similarities,
)

SCORES = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.3, 0.4, 0.4]])


def test_ranks_by_hand_and_equal_scores_count_against():
    assert ranks(SCORES).tolist() == [0, 2, 1]
    assert ranks(SCORES, torch.tensor([1, 0, 0])).tolist() == [2, 0, 2]
    assert ranks(torch.zeros(3, 3)).tolist() == [2, 2, 2]
    assert ranks(torch.tensor([[0.1, 0.2], [0.3, torch.nan]])).tolist() == [1, 1]  # NaN is no hit
    assert ranks(torch.tensor([[0.1, torch.nan], [0.3, 0.4]])).tolist() == [1, 0]  # and does not come after the right
    assert recalls(ranks(SCORES), (1, 2, 3)) == {"R@1": 1 / 3, "R@2": 2 / 3, "R@3": 1.0}


def test_both_directions_by_hand():
    found = both_ways(SCORES)
    assert found.a_to_b.tolist() == [0, 2, 1] and found.b_to_a.tolist() == [0, 0, 1]
    figures = found.figures((1, 2))
    assert figures["a_to_b/R@1"] == 1 / 3 and figures["b_to_a/R@1"] == 2 / 3 and figures["R@1"] == 0.5
    assert figures["a_to_b/median_rank"] == 2 and figures["b_to_a/median_rank"] == 1
    assert found.hits(1).tolist() == [1, 0.5, 0] and found.hits(1).mean() == figures["R@1"]


def test_search_in_blocks_finds_what_sorting_finds():
    torch.manual_seed(0)
    queries, items = torch.randn(4, 5), torch.randn(23, 5)
    scores, chosen = search(queries, items, 6, block=7)
    expected = similarities(queries, items).sort(descending=True)
    assert torch.equal(chosen, expected.indices[:, :6])
    torch.testing.assert_close(scores, expected.values[:, :6])


def test_the_interval_is_that_of_the_mean_of_paired_differences():
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 400)), rng.random((3, 400)) - 0.2
    found = paired_bootstrap(first, second)
    differences = (first - second).mean(0)
    error = 1.96 * differences.std() / 20  # the normal approximation
    assert np.isclose(found.difference, differences.mean())
    assert np.allclose([found.low, found.high], [differences.mean() - error, differences.mean() + error], atol=0.006)
    common = rng.random(400)
    shifted = paired_bootstrap(common + 0.1, common)
    assert np.allclose(shifted, 0.1)  # what both arms share is no uncertainty
    runs = first + np.array([[0.0], [0.2], [0.4]])
    assert np.subtract(*paired_bootstrap(runs, second, redraw_runs=True)[:0:-1]) > 2 * (found.high - found.low)


def test_neighbours_and_alignment_of_spaces():
    torch.manual_seed(0)
    z, other = torch.randn(60, 8), torch.randn(60, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert mutual_knn(z, z @ rotation * 3, 5) == 1 and np.isclose(cka(z, z @ rotation * 3), 1)
    assert mutual_knn(z, other, 5) < 0.25 and cka(z, other) < 0.4
    near = [{*row.tolist()} for row in (similarities(z, z) - 2 * torch.eye(60)).topk(5).indices]
    others = [{*row.tolist()} for row in (similarities(other, other) - 2 * torch.eye(60)).topk(5).indices]
    assert np.isclose(mutual_knn(z, other, 5), np.mean([len(a & b) / 5 for a, b in zip(near, others, strict=True)]))
    # Kornblith's definition by Gram matrices
    k, centre = [x @ x.T for x in (z.double(), other.double())], torch.eye(60).double() - 1 / 60
    k = [centre @ each @ centre for each in k]
    expected = (k[0] * k[1]).sum() / (k[0].norm() * k[1].norm())
    assert np.isclose(cka(z, other), expected)
