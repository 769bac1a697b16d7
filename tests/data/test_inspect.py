"""`fourm data inspect` says what there is, and everything that is wrong, not only the first of it."""

import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import yaml
from PIL import Image

from fourm import cli
from fourm.data.inspect import inspect
from fourm.data.shards import write_shards
from fourm.modalities import TokenSpace


def samples(count=6):
    rng = np.random.default_rng(0)
    return [
        {
            "__key__": f"s{i}",
            "rgb": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
            "height": rng.normal(100, 10, (8, 8)).astype(np.float32),
            "caption": "word " * (i + 1),
            "places": [{"x": 0.5}] * i,
        }
        for i in range(count)
    ]


def reasons(found):
    return Counter((trouble.modality, trouble.reason) for trouble in found.troubles)


def fourm(*words):
    """Exit status of a command line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return int(stop.value.code or 0)


def test_figures_of_sound_data(tmp_path):
    made = samples()
    for split in ("train", "test"):
        write_shards(tmp_path, split, made, 4)
    found = inspect(tmp_path)
    assert not found.troubles
    assert {(each.split, each.found.modality) for each in found.summaries} == {
        (split, name) for split in ("train", "test") for name in ("rgb", "height", "caption", "places")
    }
    by_name = {each.found.modality: each for each in found.summaries}
    heights = np.stack([each["height"] for each in made])
    height = by_name["height"]
    assert height.cells()["values"] == f"{heights.min():.4g} to {heights.max():.4g}, mean {heights.mean():.4g}"
    assert height.shapes == {"8x8": 6} and height.types == {"float32": 6}
    assert by_name["rgb"].shapes == {"8x8x3": 6}
    assert by_name["places"].lengths == list(range(6))
    assert by_name["caption"].lengths == [5 * (i + 1) for i in range(6)]
    assert "8x8x3" in found.table() and "float32" in found.table()


def test_all_trouble_is_found(tmp_path):
    made = samples()
    made[1]["height"][2, 3] = np.nan
    made[2]["caption"] = "  "
    made[3]["height"] = made[3]["height"].astype(np.float64)
    write_shards(tmp_path, "train", made, 4)
    folder = tmp_path / "train"
    tar = folder / "rgb" / "shard-000001.tar"  # s4, s5
    with tarfile.open(tar) as stream:
        entries = {member.name: stream.extractfile(member).read() for member in stream}
    with tarfile.open(tar, "w") as stream:
        for name in ("s5.png", "s4.png", "s4.png"):
            entry = tarfile.TarInfo(name)
            data = entries[name] if name != "s5.png" else entries[name][:40]
            entry.size = len(data)
            with open(tmp_path / "bytes", "wb+") as file:
                file.write(data)
                file.seek(0)
                stream.addfile(entry, file)
    (folder / "places" / "shard-000001.tar").unlink()
    write_shards(tmp_path, "test", [{"__key__": "a", "rgb": made[0]["rgb"]}], 4)

    found = inspect(tmp_path)
    there = Counter((trouble.split, trouble.modality, trouble.reason) for trouble in found.troubles)
    assert there == {
        ("train", "height", "value"): 2,  # NaN, another dtype
        ("train", "caption", "value"): 1,
        ("train", "rgb", "value"): 1,
        ("train", "rgb", "duplicate"): 1,
        ("train", "rgb", "other order"): 1,
        ("train", "places", "missing key"): 2,
        **{("test", name, "missing"): 1 for name in ("caption", "height", "places")},
    }
    said = "\n".join(trouble.message for trouble in found.troubles)
    assert "NaN" in said and "float64" in said and "'s5'" in said and "empty" in said
    assert sum(each.troubles for each in found.summaries) == len(found.troubles)


def test_tokens_are_held_against_their_table(tmp_path):
    table = {
        "tok": {"kind": "grid", "grid": [2, 2], "vocab_size": 8},
        "words": {"kind": "text", "vocab_size": 9, "max_tokens": 3},
        "absent": {"kind": "grid", "grid": [1, 1], "vocab_size": 8},
    }
    rows = [
        {"__key__": f"s{i}", "tok": np.array([[0, 1, 2, 3]], np.int16), "words": np.arange(i + 1).astype(np.int16)}
        for i in range(5)
    ]
    rows[1]["tok"] = np.array([[0, 1, 2, 8]], np.int16)
    rows[2]["tok"] = np.array([[0, 1, 2]], np.int16)
    write_shards(tmp_path, "train", rows, 8)
    found = inspect(tmp_path, TokenSpace.from_dict(table))
    assert reasons(found) == {("tok", "value"): 2, ("absent", "missing"): 1}
    tok, words = (next(each for each in found.summaries if each.found.modality == name) for name in ("tok", "words"))
    assert tok.cells()["values"].endswith("4 of 8 ids used")
    assert words.lengths == [1, 2, 3, 4, 5] and words.cells()["length"].endswith("2 too long and cut")


def test_command_writes_a_page_and_ends_with_its_status(tmp_path, capsys):
    write_shards(tmp_path, "train", samples(), 4)
    assert fourm("data", "inspect", tmp_path) == 0
    page = (tmp_path / "inspect.html").read_text()
    assert "no trouble" in capsys.readouterr().out
    assert page.count("data:image/webp") == 12 and page.count("<svg") == 4  # rgb and height; histograms
    assert "http" not in page.replace("http-equiv", "")
    (tmp_path / "train" / "rgb" / "shard-000000.tar").unlink()
    assert fourm("data", "inspect", tmp_path, "--output", tmp_path / "bad" / "page.html") == 1
    said = capsys.readouterr().out
    assert "train/rgb: missing key (4)" in said and said.splitlines()[-1].endswith("4 troubles")
    assert (tmp_path / "bad" / "page.html").read_text().count("not in rgb") == 4


def test_plain_folders_and_a_single_split(tmp_path):
    for i, name in enumerate(("a", "deep/b")):
        for modality, text in (("caption", "hello"), ("count", json.dumps([i]))):
            path = tmp_path / "train" / modality / f"{name}.{'txt' if modality == 'caption' else 'json'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in (tmp_path, tmp_path / "train"):
        found = inspect(path)
        assert not found.troubles
        assert [len(each.found.entries) for each in found.summaries] == [2, 2]


def test_token_data_brings_its_table_along(tmp_path, capsys):
    write_shards(tmp_path, "train", [{"__key__": "s", "tok": np.array([[9]], np.int16)}], 4)
    (tmp_path / "modalities.yaml").write_text(
        yaml.safe_dump({"tok": {"kind": "grid", "grid": [1, 1], "vocab_size": 8}})
    )
    for path in (tmp_path, tmp_path / "train"):
        assert fourm("data", "inspect", path) == 1
        assert "expected [0, 8)" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["train/rgb/n01/x.png", "photos/rgb/X.PNG"])
def test_a_split_with_folders_of_keys_or_upper_case_names(place, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    Image.fromarray(samples(1)[0]["rgb"]).save(path)
    for start in (tmp_path, tmp_path / place.split("/")[0]):
        (summary,) = inspect(start).summaries
        assert (summary.split, summary.found.modality) == tuple(place.split("/")[:2])


def test_what_is_kept_of_a_value_is_small(tmp_path):
    write_shards(tmp_path, "train", [{"__key__": "s", "height": np.zeros((1024, 1024), np.float32)}], 4)
    (summary,) = inspect(tmp_path).summaries
    assert all(numbers.base is None for numbers in summary.drawn)


def test_wrong_usage(tmp_path, capsys):
    assert fourm("data", "inspect", tmp_path / "no") == 2
    assert "not a folder" in capsys.readouterr().err
    assert fourm("data", "inspect") == 2
    assert "path" in capsys.readouterr().err
    assert fourm("data", "inspect", tmp_path) == 1  # an empty folder is no data set
    assert "no data" in capsys.readouterr().out
