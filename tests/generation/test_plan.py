"""Schedules and chains by hand (tools/fixtures/generation.py compares them with the reference)."""

import dataclasses
import itertools

import pytest

from fourm.generation.plan import Step, Target, chain, cosine_counts, linear_counts, temperatures
from fourm.modalities import Modality, TokenSpace

SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(4, 4), patch_size=2),
        "depth": Modality("grid", vocab_size=20, grid=(4, 4)),
        "normal": Modality("grid", vocab_size=20, grid=(4, 4)),
        "caption": Modality("text", vocab_size=50, sentinels=10, max_tokens=12),
    }
)


def test_counts_by_hand():
    assert linear_counts(5, 12) == [3, 3, 2, 2, 2]
    assert linear_counts(9, 4) == [1, 1, 1, 1]
    assert cosine_counts(2, 10) == [5, 5]
    assert cosine_counts(8, 784) == [30, 85, 127, 150, 150, 127, 85, 30]


def test_no_step_is_ever_empty():
    for build, steps, total in itertools.product((cosine_counts, linear_counts), range(1, 60), (1, 3, 16, 64, 196)):
        counts = build(steps, total)
        assert (len(counts), sum(counts)) == (min(steps, total), total)
        assert min(counts) >= 1


def test_temperatures_by_hand():
    assert temperatures("constant", 2.0, [1, 3]) == [2.0, 2.0]
    assert temperatures("linear", 2.0, [1, 3]) == [2.0, 1.5]
    assert temperatures("decreasing:1.0", 2.0, [1, 3]) == [1.75, 1.0]
    onex = [2.681122, 1.978231, 1.536462, 1.220485, 0.984094, 0.793612, 0.635082, 0.5]  # printed by 4M
    assert temperatures("onex:0.5:0.5", 3.0, linear_counts(8, 196)) == pytest.approx(onex, abs=1e-6)


def test_temperature_of_a_single_token():
    assert temperatures("onex:0.5:0.5", 3.0, [1]) == [0.5]  # the reference gives NaN


def test_finished_targets_grow_the_guidance():
    targets = [Target("depth", steps=1), Target("caption"), Target("normal", steps=1)]
    hidden = [step.hidden for step in chain(SPACE, targets, ["rgb"], grow=True)]
    assert hidden == [("rgb",), ("rgb", "depth"), ("rgb", "depth", "caption")]
    assert {step.hidden for step in chain(SPACE, targets, ["rgb"])} == {("rgb",)}


def test_chain_picks_the_scheme_by_kind():
    plan = chain(SPACE, [Target("depth", steps=2, guidance=2), Target("caption", max_tokens=5)])
    assert [(s.target, s.scheme, s.count) for s in plan] == [
        ("depth", "maskgit", 8),
        ("depth", "maskgit", 8),
        ("caption", "autoregressive", 5),
    ]
    assert plan[0].guidance == (2,)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("rgb"), "targets may be depth, normal, caption"),
        (Target("colour"), "unknown modality 'colour'"),
        (Target("caption", scheme="roar"), "'caption' .* by 'roar'"),
        (Target("depth", scheme="autoregressive"), "'depth' .* by 'autoregressive'"),
        (Target("depth", schedule="square"), "allowed are cosine, linear"),
        (Target("depth", temperature_schedule="onex"), "allowed are constant, linear, decreasing:MIN, onex"),
        (Target("depth", steps=0), "expected at least 1"),
        (Target("depth", top_p=1.5), "top_p in"),
    ],
)
def test_chain_names_what_is_wrong(target, message):
    with pytest.raises(ValueError, match=message):
        chain(SPACE, [target])


def test_a_target_is_neither_repeated_nor_hidden():
    with pytest.raises(ValueError, match="twice"):
        chain(SPACE, [Target("depth"), Target("depth")])
    with pytest.raises(ValueError, match="among the hidden"):
        dataclasses.replace(Step("depth", "roar", 4), hidden=("depth",))
