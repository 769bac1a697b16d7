"""Budgets against hand-computed cases (tools/fixtures/masking.py compares them with the reference)."""

import numpy as np
import pytest

from fourm.masking.budgets import Component, MaskingConfig, Mixture, split
from fourm.modalities import Modality, TokenSpace

SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(4, 4), patch_size=2),
        "tok": Modality("grid", vocab_size=9, grid=(4, 4)),
        "text": Modality("text", vocab_size=300, max_tokens=20),
        "only_asked": Modality("grid", vocab_size=9, grid=(2, 2), input=False),
    }
)


def mixture(*components: Component, given: int | tuple = 8, asked: int | tuple = 8, seed: int = 0) -> Mixture:
    return Mixture(SPACE, MaskingConfig(given, asked, list(components), seed))


def everything(count: int, space: TokenSpace = SPACE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.ones((count, len(space)), dtype=bool), np.zeros(count, dtype=int), np.arange(count)


def test_split_by_hand() -> None:
    """Shares 0.5, 0.3, 0.2 of 7 tokens: 3, 2, 1, and the rest to the winner of the next draw."""
    shares = np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05]])[None, :, None]
    alpha = np.ones((1, 1, 3))
    assert split(alpha, np.array([[7]]), shares)[0, 0].tolist() == [3, 2, 2]
    assert split(0 * alpha, np.array([[7]]), np.full_like(shares, -np.inf))[0, 0].tolist() == [0, 0, 0]


def test_dirichlet_marginals() -> None:
    """Share a of Dirichlet(a, b, c) is Beta(a, b + c): mean and variance, also for tiny alphas."""
    for alphas in ([0.01, 0.02, 0.01], [1.0, 3.0, 2.0]):
        part = Component(target=dict(zip(["tok", "text", "only_asked"], alphas, strict=True)))
        many = Mixture(
            TokenSpace({name: Modality("grid", vocab_size=2, grid=(1000, 1)) for name in part.target}),
            MaskingConfig(0, 1000, [part]),
        ).draw(np.ones((4000, 3), dtype=bool), np.zeros(4000, dtype=int), np.arange(4000))
        share, total = many.target / 1000, sum(alphas)
        expected = np.array(alphas) / total
        variance = expected * (1 - expected) / (total + 1)
        assert np.abs(share.mean(axis=0) - expected).max() < 5 * np.sqrt(variance.max() / 4000)
        assert share.var(axis=0) == pytest.approx(variance, rel=0.15)


def test_all_tokens_are_given_out_up_to_the_limits() -> None:
    """16 cells of one grid: 10 given leaves 6 to ask; a text has its own limit; rgb is never asked."""
    drawn = mixture(Component(input={"tok": 1}, target={"tok": 1}), given=10, asked=10).draw(*everything(3))
    assert drawn.input.tolist() == [[0, 10, 0, 0]] * 3
    assert drawn.target.tolist() == [[0, 6, 0, 0]] * 3
    drawn = mixture(Component(input={"others": 1}, target={"others": 1}), given=6, asked=9).draw(*everything(500))
    assert (drawn.input.sum(axis=1) == 6).all()
    assert not drawn.input[:, 3].any()
    assert not drawn.target[:, 0].any()
    assert (drawn.target[:, 3] <= 4).all()


def test_ranges_are_inclusive() -> None:
    drawn = mixture(Component(input={"text": 1}, target={"tok": 1}), given=(3, 5), asked=2)
    budgets = drawn.draw(*everything(300))
    assert set(budgets.input[:, 2]) == {3, 4, 5}
    assert set(budgets.target[:, 1]) == {2}
    assert drawn.widths == (5, 2)


def test_absent_modalities_get_nothing() -> None:
    """Others take their share, and a component that could ask nothing is not chosen."""
    parts = [Component(input={"rgb": 1}, target={"tok": 1}), Component(input={"others": 1}, target={"text": 1})]
    present = np.array([[True, True, False, False], [False, False, True, False], [True, False, False, False]])
    drawn = mixture(*parts).draw(np.repeat(present, 50, axis=0), np.zeros(150, dtype=int), np.arange(150))
    assert (drawn.component[:50] == 0).all()
    assert (drawn.component[50:100] == 1).all()
    assert (drawn.input[50:100, 2] == 8).all()
    assert not drawn.target[100:].any()
    assert (drawn.input[100:, 0] == 8).all()


def test_no_input_alphas_give_nothing() -> None:
    drawn = mixture(Component(target={"tok": 1})).draw(*everything(20))
    assert not drawn.input.any()
    assert (drawn.target[:, 1] == 8).all()


def test_target_tokens_of_vectors_are_lost() -> None:
    """They must be named; a sample that has only them to ask for takes another component."""
    space = TokenSpace(
        {"tok": Modality("grid", vocab_size=9, grid=(4, 4)), "t5": Modality("vectors", dim=2, max_tokens=4)}
    )
    parts = [Component(target={"tok": 1, "t5": 1}), Component(weight=0.01, target={"others": 1})]
    drawn = Mixture(space, MaskingConfig(0, 10, parts)).draw(*everything(400, space))
    first = drawn.component == 0
    assert drawn.target[first, 1].max() == 4
    assert (drawn.target[first, 0] + drawn.target[first, 1] < 10).any()
    assert not drawn.target[~first, 1].any()
    only_t5 = np.broadcast_to([False, True], (50, 2))
    parts = [Component(target={"t5": 1}), Component(weight=0.01, target={"tok": 1})]
    drawn = Mixture(space, MaskingConfig(0, 10, parts)).draw(~only_t5, np.zeros(50, dtype=int), np.arange(50))
    assert (drawn.component == 1).all()


def test_keep_schemes() -> None:
    part = Component(input={"others": 1}, target={"tok": 1}, keep={"text": "binary", "tok": "all"})
    keep = mixture(part).draw(*everything(2000)).keep
    assert set(keep[:, 2]) == {0.0, 1.0}
    assert abs(keep[:, 2].mean() - 0.5) < 0.06
    assert (keep[:, 1] == 1).all()
    assert np.quantile(keep[:, 0], [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.06)


def test_draws_depend_on_seed_epoch_and_index_only() -> None:
    part = Component(input={"others": 0.5}, target={"others": 0.5})
    present, epoch, index = np.ones((6, 4), dtype=bool), np.array([0, 0, 1, 1, 0, 7]), np.array([3, 4, 3, 4, 3, 9])
    drawn = mixture(part).draw(present, epoch, index)
    alone = mixture(part).draw(present[:1], epoch[2:3], index[2:3])
    for name in ("component", "input", "target", "keep"):
        values = getattr(drawn, name)
        assert (values[0] == values[4]).all()
        assert (values[2] == getattr(alone, name)[0]).all()
    assert (drawn.keep[0] != drawn.keep[2]).all()
    assert (drawn.keep[0] != mixture(part, seed=1).draw(present, epoch, index).keep[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": {"txt": 1}}, r"mixture\[0\].input has unknown modality 'txt'.*'text'"),
        ({"input": {"rgb": -1}}, r"mixture\[0\].input.rgb is -1"),
        ({"input": {"only_asked": 1}}, "only_asked is 1, but only 0 fits it"),
        ({"target": {"rgb": 0.5}}, "rgb is 0.5, but only 0 fits it"),
        ({"keep": "some"}, "keep is 'some', allowed are random, all, binary"),
        ({"keep": {"tok": "most"}}, "keep is 'most'"),
        ({"weight": -1.0}, "weights"),
    ],
)
def test_errors_say_where(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(Component(**change))


def test_wrong_range_and_empty_mixture_are_errors() -> None:
    with pytest.raises(ValueError, match=r"input_tokens is \(5, 2\)"):
        mixture(Component(), given=(5, 2))
    with pytest.raises(ValueError, match="mixture is empty"):
        mixture()
