"""Rows become one token space."""

from pathlib import Path

import pytest

from fourm.modalities import Modality, TokenSpace

ROOT = Path(__file__).parents[1]
GRID = Modality("grid", vocab_size=10, grid=(2, 3))


def test_tables_lie_end_to_end():
    space = TokenSpace(
        {
            "a": GRID,
            "b": Modality("text", vocab_size=20, max_tokens=4, vocab="words"),
            "c": Modality("patches", grid=(2, 2), patch_size=4),
            "d": Modality("text", vocab_size=20, max_tokens=2, vocab="words"),
            "e": Modality("grid", vocab_size=5, grid=(1, 1)),
        }
    )
    assert space.vocab_size == 10 + 20 + 5
    assert [space.vocabulary(name) for name in "abde"] == [slice(0, 10), slice(10, 30), slice(10, 30), slice(30, 35)]
    assert space.length.tolist() == [6, 10, 4, 6, 1]  # a text has room for a sentinel around every id
    assert space.position_offset.tolist() == [0, 6, 16, 20, 26]
    assert space.positions == 27
    assert space.inputs() == list("abcde")
    assert space.outputs() == list("abde")


def test_every_shipped_table_loads_and_survives_a_round_trip():
    tables = sorted((ROOT / "configs" / "modalities").glob("*.yaml"))
    assert tables
    for path in tables:
        space = TokenSpace.from_yaml(path)
        assert TokenSpace.from_dict(space.to_dict()).modalities == space.modalities


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "empty"),
        ({"a": {"kind": "grit"}}, "'a'.*'grit'.*grid, text, patches, vectors"),
        ({"a": {"kind": "grid", "vocab_size": 3}}, "'a'.*needs grid"),
        ({"a": {"kind": "grid", "vocab_size": 3, "grid": [2, 2], "vocabsize": 4}}, r"'a'.*\['vocabsize'\].*vocab_size"),
        ({"a": {"kind": "grid", "vocab_size": 3, "grid": [2]}}, "two positive numbers"),
        (
            {n: {"kind": "text", "vocab_size": v, "max_tokens": 3, "vocab": "t"} for n, v in (("a", 5), ("b", 6))},
            "b has vocab_size 6.*'t' already has 5",
        ),
    ],
)
def test_wrong_tables_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        TokenSpace.from_dict(table)


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown modality 'x', known are a"):
        TokenSpace({"a": GRID})["x"]
