"""Structured values to text and back."""

import json
from pathlib import Path

import pytest

from fourm.tokenization.structured import CODECS, CodecConfig, from_bin, to_bin

SHARED = Path(__file__).parents[3] / "shared"
FIELDS = {"latitude": (-60.0, 80.0), "brightness": (0.0, 255.0)}


def codec(name, **options):
    return CODECS[name](CodecConfig(name, **options))


def test_bins_by_hand():
    assert [to_bin(x, 0, 10, 5) for x in (-3, 0, 1.99, 2, 9.9, 10, 99)] == [0, 0, 0, 1, 4, 4, 4]
    assert [from_bin(i, 0, 10, 5) for i in range(5)] == [1, 3, 5, 7, 9]


def test_palette_like_4m():
    path = SHARED / "fixtures/transforms/color_palette.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    for example in json.loads(path.read_text())["examples"]:
        colours = example["sample"][0][str(example["length"])]
        text = codec("palette").to_text(colours)
        assert text == example["string"]
        assert codec("palette").from_text(text) == colours


def test_metadata_by_hand():
    metadata = codec("metadata", fields=FIELDS, bins=10)
    assert metadata.to_text({"brightness": 255, "unknown": 3, "latitude": -60}) == "v1=0 v0=0 v1=1 v0=9"
    assert metadata.from_text("v1=0 v0=0 v1=1 v0=9") == pytest.approx({"latitude": -53, "brightness": 242.25})


def test_places_by_hand():
    places = [{"name": "Port-au-Prince", "x": 0.0, "y": 1.0}, {"name": "N'Djamena  2", "x": 0.5, "y": 0.26}]
    text = codec("places", bins=4).to_text(places)
    assert text == "v0=0 v1=3 Port-au-Prince v0=2 v1=1 N'Djamena 2"
    back = codec("places", bins=4).from_text(text)
    assert back == [{"name": "Port-au-Prince", "x": 0.125, "y": 0.875}, {"name": "N'Djamena 2", "x": 0.625, "y": 0.375}]
    assert codec("places").to_text([]) == "none" and codec("places").from_text("none") == []
    assert codec("places").from_text("v0=1 v1=1  x  y v0=2 v1=2")[0]["name"] == "x y"


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("palette", {"bins": 16}, [[0, 128, 255], [7, 8, 9]]),
        ("palette", {}, []),
        ("metadata", {"fields": FIELDS, "bins": 64}, {"latitude": 12.3, "brightness": 0}),
        ("places", {"bins": 64}, [{"name": "São Paulo", "x": 0.2, "y": 0.999}]),
        ("caption", {}, "Hills, and v0=3 of it."),
    ],
)
def test_a_second_round_changes_nothing(name, options, value):
    """Binned values are fixed points: text -> value -> text gives the same text."""
    text = codec(name, **options).to_text(value)
    assert codec(name, **options).to_text(codec(name, **options).from_text(text)) == text


@pytest.mark.parametrize("name", ["palette", "metadata", "places"])
@pytest.mark.parametrize(
    "text", ["", "v0=", "v1=99999 v0=1 v0=2", "v0=900 v1=900 x", "v1=0 v1=1 v0=3 [UNK] v9=1", "ab ' c"]
)
def test_text_of_a_model_never_raises(name, text):
    value = codec(name, fields=FIELDS, bins=64).from_text(text)
    assert len(value) <= 1


def test_wrong_values_raise():
    with pytest.raises(ValueError, match="0 to 255"):
        codec("palette").to_text([[1, 2, 300]])
    with pytest.raises(ValueError, match="name"):
        codec("places").to_text([{"name": "v0=1", "x": 0, "y": 0}])
    with pytest.raises(ValueError, match="finite"):
        codec("metadata", fields=FIELDS).to_text({"latitude": float("nan")})
    with pytest.raises(ValueError, match="allowed are caption"):
        CodecConfig("poses")
