"""Structured values to text and back."""

import random

import numpy as np
import pytest

from fourm.tokenization.structured import CODECS, METADATA_21, CodecConfig, from_bin, rounded, to_bin

FIELDS = {"latitude": (-60.0, 80.0), "brightness": (0.0, 255.0)}
PERSON = {
    "box": [0.1, 0.2, 0.3, 1.0], "pose": [0, 511, 512, 1023, 5, 6, 7, 8], "global": np.eye(3), "camera": [1, -0.5, 19],
    "shape": np.linspace(-3, 3, 10), "order": ("shape", "pose", "camera", "global"),
}  # fmt: skip
WHOLE_PERSON = (
    "human v0=100 v1=200 v2=300 v3=999 "
    "shape v0=0 v0=111 v0=222 v0=333 v0=444 v0=555 v0=666 v0=777 v0=888 v0=999 "
    "pose v0=0 v0=511 v1=0 v1=511 v0=5 v0=6 v0=7 v0=8 "
    "camera v0=100 v0=25 v0=999 "
    "global v0=999 v0=500 v0=500 v0=500 v0=999 v0=500 v0=500 v0=500 v0=999"
)
PLACE = {"point": (12, 200), "instances": [{"box": [1, 2, 30, 40], "tokens": [0, 1023, *range(505, 519)]}]}
BOX = {"boxes": [0.0, 0.5, 1.0, 0.25], "class_name": "hot dog"}


def codec(name, **options):
    return CODECS[name](CodecConfig(name, **options))


def test_bins_by_hand():
    assert [to_bin(x, 0, 10, 5) for x in (-3, 0, 1.99, 2, 9.9, 10, 99)] == [0, 0, 0, 1, 4, 4, 4]
    assert [from_bin(i, 0, 10, 5) for i in range(5)] == [1, 3, 5, 7, 9]
    assert [rounded(x, 9, 0, 10) for x in (-1, 0.04, 0.5, 0.06, 1, 2)] == [0, 0, 4, 1, 9, 9]  # 4.5 goes to the even 4


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


def test_metadata_21_by_hand():
    metadata = codec("metadata_21")
    values = {"aesthetic_score": 5, "original_width": 700, "walkability": 1, "n_humans": 1e9, "color": 3, "entropy": -1}
    text = "v1=20 v0=1 v1=0 v0=21 v1=14 v0=49 v1=5 v0=999 v1=13 v0=0"
    assert metadata.to_text(values) == text
    back = metadata.from_text(text)
    assert back == pytest.approx(
        {"aesthetic_score": 5, "original_width": 672, "walkability": 1, "n_humans": 999, "entropy": 10 / 98}
    )
    assert metadata.to_text(back) == text


@pytest.mark.parametrize("name", METADATA_21)
def test_every_bin_of_metadata_21_comes_back(name):
    metadata, kind = codec("metadata_21"), list(METADATA_21).index(name)
    for index in range(len(METADATA_21[name][1])):
        text = f"v1={kind} v0={index}"
        assert metadata.to_text(metadata.from_text(text)) == text


def test_boxes_by_hand():
    assert codec("boxes").to_text([BOX, BOX]) == " ".join(["v0=0 v1=500 v2=999 v3=250 hot dog"] * 2)
    assert codec("boxes", bins=5).to_text([BOX | {"boxes": [-1, 0.3, 0.7, 2]}]) == "v0=0 v1=1 v2=3 v3=4 hot dog"
    assert codec("boxes").to_text([]) == "" and codec("boxes").from_text("none") == []
    [box] = codec("boxes").from_text("dog v0=1 v1=2 v2=3 v3=4 v0=0 v1=999 v2=999 v3=999 hot  dog v1=5 v2=6")
    assert box == {"boxes": [0, 1, 1, 1], "class_name": "hot dog"}


def test_people_by_hand():
    assert codec("human_poses").to_text([PERSON]) == WHOLE_PERSON
    assert len(WHOLE_PERSON.split()) == 39
    [back] = codec("human_poses").from_text(WHOLE_PERSON)
    for key in ("box", "pose", "camera", "global", "shape"):
        assert np.allclose(back[key], PERSON[key], atol=0.011), key
    assert back["order"] == PERSON["order"]
    unordered = codec("human_poses").to_text([{key: PERSON[key] for key in PERSON if key != "order"}])
    assert [word for word in unordered.split() if "=" not in word] == ["human", "pose", "global", "camera", "shape"]
    assert codec("human_poses").to_text([]) == "none" and codec("human_poses").from_text("none") == []


def test_instances_by_hand():
    instances = codec("sam_instances")
    text = instances.to_text([PLACE, {"point": (3, 4), "instances": []}])
    tokens = "v0=0 v1=511 v0=505 v0=506 v0=507 v0=508 v0=509 v0=510 v0=511 v1=0 v1=1 v1=2 v1=3 v1=4 v1=5 v1=6"
    assert text == f"point v0=200 v1=12 polygon v0=1 v1=2 v2=30 v3=40 {tokens} point v0=4 v1=3 none"
    assert instances.from_text(text) == [PLACE, {"point": (3, 4), "instances": []}]
    assert instances.from_text(text.replace("v2=30", "v2=1"))[0]["instances"] == []  # a box without area


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("boxes", {"bins": 50}, [BOX, {"boxes": [0.1, 0.2, 0.3, 0.4], "class_name": "person"}]),
        ("human_poses", {}, [PERSON, PERSON | {"order": ("pose", "global", "shape", "camera")}]),
        ("sam_instances", {}, [PLACE, PLACE]),
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


@pytest.mark.parametrize("name", [name for name in CODECS if name != "caption"])
@pytest.mark.parametrize(
    "text", ["", "v0=", "v1=99999 v0=1 v0=2", "v0=900 v1=900 x", "v1=0 v1=1 v0=3 [UNK] v9=1", "ab ' c"]
)
def test_text_of_a_model_never_raises(name, text):
    value = codec(name, fields=FIELDS, bins=64).from_text(text)
    assert len(value) <= 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("boxes", codec("boxes").to_text([BOX] * 3)),
        ("human_poses", f"{WHOLE_PERSON} {WHOLE_PERSON}"),
        ("sam_instances", codec("sam_instances").to_text([PLACE] * 2)),
        ("metadata_21", "v1=0 v0=3 v1=3 v0=4 v1=20 v0=2"),
    ],
)
def test_damaged_text_gives_what_can_be_written_again(name, text):
    damaged, draws = codec(name), random.Random(0)
    for _ in range(300):
        words = text.split()
        for _ in range(draws.randint(1, 3)):
            place = draws.randrange(len(words))
            words[place : place + draws.randint(0, 2)] = draws.choice(
                ([], ["dog"], ["v0=5"], ["v1=9999"], ["v3=" + "9" * 5000], ["point"], ["global", "v0="], ["[UNK]"])
            )
        read = damaged.from_text(" ".join(words))
        assert damaged.to_text(damaged.from_text(damaged.to_text(read))) == damaged.to_text(read)


def test_wrong_values_raise():
    with pytest.raises(ValueError, match="0 to 255"):
        codec("palette").to_text([[1, 2, 300]])
    with pytest.raises(ValueError, match="name"):
        codec("places").to_text([{"name": "v0=1", "x": 0, "y": 0}])
    with pytest.raises(ValueError, match="finite"):
        codec("metadata", fields=FIELDS).to_text({"latitude": float("nan")})
    with pytest.raises(ValueError, match="finite number for 'entropy'"):
        codec("metadata_21").to_text({"entropy": float("inf")})
    with pytest.raises(ValueError, match="finite"):
        codec("boxes").to_text([BOX | {"boxes": [0, 0, 1, float("nan")]}])
    with pytest.raises(ValueError, match="expected a name"):
        codec("boxes").to_text([BOX | {"class_name": " "}])
    with pytest.raises(ValueError, match="flipped needs new ones"):
        codec("human_poses").to_text([PERSON | {"pose": None}])
    with pytest.raises(ValueError, match=r"8 ids in \[0, 1024\), got \[1, 2\]"):
        codec("human_poses").to_text([PERSON | {"pose": [1, 2]}])
    with pytest.raises(ValueError, match="expected 10 numbers for 'shape' of a person, got 9"):
        codec("human_poses").to_text([PERSON | {"shape": [0] * 9}])
    with pytest.raises(ValueError, match="16 ids"):
        codec("sam_instances").to_text([{"point": (1, 2), "instances": [{"box": [0, 0, 1, 1], "tokens": [1024] * 16}]}])
    with pytest.raises(ValueError, match="allowed are caption"):
        CodecConfig("poses")
