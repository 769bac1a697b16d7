import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from fourm.data.shards import EXTENSIONS, ShardDataset, write_shards
from fourm.data.tokens import TokenDataset
from fourm.modalities import Modality, TokenSpace

RNG = np.random.default_rng(0)


def raw_samples(count: int = 6) -> list[dict]:
    return [
        {
            "__key__": f"s{i}",
            "rgb": RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8),
            "depth": RNG.integers(0, 65536, (8, 8)).astype(np.uint16),
            "height": RNG.integers(-9, 9, (8, 8)).astype(np.int16),
            "places": [{"name": f"Ålesund {i}", "x": 0.5}],
            "titles": [f"été {i}", "hiver"],
            "caption": f"tile {i}: été",
        }
        for i in range(count)
    ]


def assert_same(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert got[name].dtype == value.dtype
            np.testing.assert_array_equal(got[name], value)
        else:
            assert got[name] == value


def rewrite(path: Path, change) -> None:
    """Rewrites a tar with Python's own writer after `change` edited its list of (name, bytes)."""
    with tarfile.open(path) as tar:
        entries = [(member.name, tar.extractfile(member).read()) for member in tar]
    changed = change(entries) or entries
    with tarfile.open(path, "w") as tar:
        for name, data in changed:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def npy(value) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def test_values_come_back(tmp_path):
    samples = raw_samples()
    packed = {"titles": "json.gz"}
    assert write_shards(tmp_path, "train", samples, 4, extensions=packed) == ["shard-000000.tar", "shard-000001.tar"]
    data = ShardDataset(tmp_path / "train")
    assert data.keys == [f"s{i}" for i in range(6)] and len(data) == 6
    for i, sample in enumerate(samples):
        assert_same(data[i], sample)
    assert set(data[-1]) == set(samples[0])
    assert set(ShardDataset(tmp_path / "train", ["caption"])[2]) == {"__key__", "caption"}
    with pytest.raises(IndexError):
        data[6]


def test_webdataset_reads_what_we_write(tmp_path):
    samples = raw_samples()
    write_shards(tmp_path, "train", samples, 4)
    urls = [str(path) for path in sorted((tmp_path / "train" / "rgb").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in read] == [sample["__key__"] for sample in samples]
    for mine, theirs in zip(samples, read, strict=True):
        np.testing.assert_array_equal(mine["rgb"], theirs["png"])


def test_we_read_what_webdataset_writes(tmp_path):
    for name, extension, values in (("caption", "txt", ["a", "b"]), ("depth", "npy", [np.eye(2), np.ones(3)])):
        (tmp_path / name).mkdir()
        with webdataset.TarWriter(str(tmp_path / name / "any.tar")) as writer:
            for key, value in zip(("x/0", "x/1"), values, strict=True):
                writer.write({"__key__": key, extension: value})
    data = ShardDataset(tmp_path)
    assert data.keys == ["x/0", "x/1"] and data[1]["caption"] == "b"
    np.testing.assert_array_equal(data[0]["depth"], np.eye(2))


def test_writing_is_reproducible_and_aside(tmp_path):
    samples = raw_samples()
    for name in ("a", "b"):
        write_shards(tmp_path / name, "train", samples, 6)
    one, two = ((tmp_path / name / "train/rgb/shard-000000.tar").read_bytes() for name in ("a", "b"))
    assert one == two
    broken = [*raw_samples(5), {**raw_samples(1)[0], "__key__": "bad", "height": object()}]
    with pytest.raises(ValueError, match=r"height.*'bad'"):
        write_shards(tmp_path / "c", "train", broken, 4)
    for folder in (tmp_path / "c/train").iterdir():
        assert [path.name for path in folder.glob("*.tar")] == ["shard-000000.tar"]


@pytest.mark.parametrize("key", ["", "a.b", None, "s0"])
def test_writer_refuses_bad_keys(tmp_path, key):
    with pytest.raises(ValueError, match="key"):
        write_shards(tmp_path, "train", [raw_samples()[0], {**raw_samples()[0], "__key__": key}], 4)


def test_plain_folders_read_like_shards(tmp_path):
    samples = raw_samples()
    write_shards(tmp_path, "tar", samples, 4)
    for path in (tmp_path / "tar").rglob("*.tar"):
        folder = tmp_path / "plain" / path.parent.name / path.stem
        folder.mkdir(parents=True)
        with tarfile.open(path) as tar:
            for member in tar:
                (folder / member.name).write_bytes(tar.extractfile(member).read())
    data = ShardDataset(tmp_path / "plain")
    assert data.keys[0] == "shard-000000/s0"
    for i, sample in enumerate(samples):
        assert_same({**data[i], "__key__": sample["__key__"]}, sample)


def test_names_in_tars_are_never_paths(tmp_path):
    write_shards(tmp_path, "train", raw_samples(2), 2)
    for path in (tmp_path / "train").rglob("*.tar"):
        rewrite(path, lambda entries: [("../../evil." + name.split(".")[1], data) for name, data in entries[:1]])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"'\.\./\.\./evil\.txt' leads out of its folder"):
        ShardDataset(tmp_path / "train")
    assert len(ShardDataset(tmp_path / "train", on_error="skip")) == 0
    assert sorted(tmp_path.rglob("*")) == before


FAULTS = {
    "missing key": (lambda entries: entries[:2] + entries[3:], "rgb.*shard-000000.*'s2'.*missing in height", 5),
    "extra key": (lambda entries: [*entries, ("more.npy", entries[0][1])], "height.*'more'.*missing in rgb", 6),
    "wrong order": (lambda entries: entries[::-1], "height.*shard-000000.*'s3'.*wrong order", 6),
    "twice": (lambda entries: [entries[0], *entries], "height.*shard-000000.*'s0'.*twice", 6),
    "unknown extension": (lambda entries: [("s0.exe", b""), *entries[1:]], "height.*shard-000000.*'s0'.*exe", 5),
    "wrong first extension": (lambda entries: [("s0.txt", b""), *entries[1:]], "height.*shard-000000.*'s0'.*txt", 5),
    "wrong extension": (lambda entries: [*entries[:3], ("s3.txt", b"")], "height.*shard-000000.*'s3'.*txt", 5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_at_opening(tmp_path, fault):
    change, message, left = FAULTS[fault]
    samples = raw_samples()
    write_shards(tmp_path, "train", samples, 4)
    rewrite(tmp_path / "train/height/shard-000000.tar", change)
    with pytest.raises(ValueError, match=message):
        ShardDataset(tmp_path / "train", ["rgb", "height"])
    data = ShardDataset(tmp_path / "train", ["rgb", "height"], on_error="skip")
    assert len(data) == left
    assert bool(data.skipped) == (fault != "wrong order")  # matched by key, nothing is lost
    wanted = {sample["__key__"]: sample for sample in samples}
    for i, key in enumerate(data.keys):
        assert_same(data[i], {name: wanted[key][name] for name in ("__key__", "rgb", "height")})


def test_missing_shard_and_folder(tmp_path):
    write_shards(tmp_path, "train", raw_samples(), 4)
    with pytest.raises(ValueError, match="no folder for modality sound, there are caption, depth"):
        ShardDataset(tmp_path / "train", ["rgb", "sound"])
    with pytest.raises(ValueError, match="there is none"):
        ShardDataset(tmp_path / "nowhere")
    (tmp_path / "train/height/shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"rgb.*shard-000001\.tar, key 's4': missing in height"):
        ShardDataset(tmp_path / "train", ["rgb", "height"])
    data = ShardDataset(tmp_path / "train", ["rgb", "height"], on_error="skip")
    assert len(data) == 4 and data.skipped == {"misaligned": 2}


@pytest.mark.parametrize(("keep", "left"), [(512 * 4 + 100, 2), (1024 * 3, 3), (0, 0)])
@pytest.mark.parametrize("pax", [False, True])
def test_truncated_tar(tmp_path, keep, left, pax):
    write_shards(tmp_path, "train", raw_samples(4), 4)
    path = tmp_path / "train/height/shard-000000.tar"
    if pax:  # long names make pax headers, which the fast scanner hands to `tarfile`
        long = "n" * 120
        for modality in ("rgb", "height"):
            shard = tmp_path / f"train/{modality}/shard-000000.tar"
            rewrite(shard, lambda entries: [(long + name, data) for name, data in entries])
        assert ShardDataset(tmp_path / "train", ["rgb", "height"]).keys[0] == long + "s0"
        keep, left = (keep, None) if keep == 0 else (path.stat().st_size // 3 + 77, None)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"height.*shard-000000"):
        ShardDataset(tmp_path / "train", ["rgb", "height"])
    data = ShardDataset(tmp_path / "train", ["rgb", "height"], on_error="skip")
    assert sum(data.skipped.values()) > 0
    assert len(data) == left if left is not None else len(data) < 4


def test_damaged_header_is_not_the_end(tmp_path):
    write_shards(tmp_path, "train", raw_samples(4), 4)
    path = tmp_path / "train/height/shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[1024 : 1024 + 512] = b"x" * 512  # the second header
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: the tar is truncated or damaged after 1 entries"):
        ShardDataset(tmp_path / "train", ["height"])
    data = ShardDataset(tmp_path / "train", ["height"], on_error="skip")
    assert data.keys == ["s0"] and data.skipped == {"damaged": 1}


def test_damaged_first_sample_without_card(tmp_path):
    """The type then is that of the first sample that can be read."""
    samples = raw_samples(4)
    write_shards(tmp_path, "train", samples, 4)
    damage = [("s0.npy", b"no array"), ("s2.npy", npy(np.zeros((8, 8))))]
    rewrite(tmp_path / "train/height/shard-000000.tar", lambda e: [damage[0], e[1], damage[1], e[3]])
    data = ShardDataset(tmp_path / "train", ["height"], on_error="skip")
    assert [data[i]["__key__"] for i in (2, 0, 1, 3)] == ["s3", "s1", "s1", "s3"]
    assert data.skipped == {"unreadable": 2}


UNREADABLE = {
    "damaged": b"not an array",
    "pickled": npy(np.array([{"a": 1}], dtype=object)),
    "wrong type": npy(np.zeros((8, 8))),
}


@pytest.mark.parametrize("fault", UNREADABLE)
@pytest.mark.parametrize("card", [False, True])
def test_unreadable_samples(tmp_path, fault, card):
    samples = raw_samples(4)
    write_shards(tmp_path, "train", samples, 4)
    if card:
        (tmp_path / "card.json").write_text(json.dumps({"modalities": {"height": {"dtype": "int16"}}}))
    row = 0 if card else 2  # without a card the first sample says what the type is

    def damage(entries):
        entries[row] = (entries[row][0], UNREADABLE[fault])

    rewrite(tmp_path / "train/height/shard-000000.tar", damage)
    data = ShardDataset(tmp_path / "train")
    with pytest.raises(ValueError, match=rf"height.*shard-000000\.tar.*'s{row}'"):
        data[row]
    data = ShardDataset(tmp_path / "train", on_error="skip")
    for _ in range(2):
        assert_same(data[row], samples[row + 1])
    assert data.skipped == {"unreadable": 1} and data[3]["__key__"] == "s3"


def test_on_error_is_checked(tmp_path):
    write_shards(tmp_path, "train", raw_samples(1), 1)
    with pytest.raises(ValueError, match="allowed are 'raise' and 'skip'"):
        ShardDataset(tmp_path / "train", on_error="ignore")


# Tokens

SPACE = TokenSpace(
    {
        "grid": Modality("grid", vocab_size=100, grid=(2, 3)),
        "text": Modality("text", vocab_size=50, max_tokens=5),
        "pairs": Modality("text", vocab_size=50, max_tokens=5, chunk=2),
        "image": Modality("patches", grid=(2, 2), patch_size=4),
        "vectors": Modality("vectors", dim=3, max_tokens=2),
    }
)


def token_samples(count: int = 5, crops=lambda i: 2) -> list[dict]:
    return [
        {
            "__key__": f"t{i}",
            "grid": RNG.integers(0, 100, (crops(i), 6)).astype(np.int16),
            "text": RNG.integers(0, 50, 2 + i).astype(np.uint16),
            "pairs": RNG.integers(0, 50, 2 * i).astype(np.int64),
            "image": RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8),
            "vectors": RNG.normal(size=(i + 1, 3)).astype(np.float32),
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("crops", [lambda i: 2, lambda i: 1 + i % 3], ids=["same", "different"])
def test_tokens(tmp_path, crops):
    samples = token_samples(crops=crops)
    write_shards(tmp_path, "train", samples, 2)
    data = TokenDataset(tmp_path / "train", SPACE)
    assert len(data) == 5 and data.keys == [f"t{i}" for i in range(5)]
    for epoch, i in itertools.product(range(4), range(5)):
        sample = samples[i]
        assert_same(
            data[epoch, i],
            {
                "__key__": f"t{i}",
                "grid": sample["grid"][(epoch + i) % len(sample["grid"])],
                "text": sample["text"][:5],
                "pairs": sample["pairs"][:4],
                "image": sample["image"],
                "vectors": sample["vectors"][:2],
            },
        )
    assert_same(data[-2], data[3])


BAD_TOKENS = {
    "too large": ("grid", np.full((1, 6), 100, np.int16), r"\[100, 100\], expected \[0, 100\)"),
    "negative": ("text", np.array([3, -1]), r"\[-1, 3\], expected \[0, 50\)"),
    "floats": ("text", np.ones(3), "integer ids, got float64"),
    "length": ("grid", np.zeros((1, 7), np.int16), r"\(crops, 6\).*\(1, 7\)"),
    "rank": ("text", np.zeros((2, 2, 2), np.int16), r"\(length,\), got int16 \(2, 2, 2\)"),
    "image size": ("image", np.zeros((8, 9, 3), np.uint8), r"\(8, 8, 3\), got uint8 \(8, 9, 3\)"),
    "vector width": ("vectors", np.zeros((2, 4), np.float32), r"\(length, 3\), got float32 \(2, 4\)"),
}


@pytest.mark.parametrize("fault", BAD_TOKENS)
def test_bad_tokens(tmp_path, fault):
    name, value, message = BAD_TOKENS[fault]
    samples = token_samples()
    samples[3][name] = value
    write_shards(tmp_path, "train", samples, 2, extensions={"image": "png"})
    with pytest.raises(ValueError, match=rf"{name}.*shard-000001\.tar.*'t3'.*{message}"):
        TokenDataset(tmp_path / "train", SPACE)
    data = TokenDataset(tmp_path / "train", SPACE, on_error="skip")
    assert data.keys == ["t0", "t1", "t2", "t4"] and sum(data.skipped.values()) == 1
    np.testing.assert_array_equal(data[3]["grid"], samples[4]["grid"][0])


def test_uint8_ids_need_an_extension(tmp_path):
    space = TokenSpace({"grid": Modality("grid", vocab_size=100, grid=(2, 3))})
    ids = np.arange(6, dtype=np.uint8)[None]
    write_shards(tmp_path, "train", [{"__key__": "a", "grid": ids}], 1, extensions={"grid": "npy"})
    np.testing.assert_array_equal(TokenDataset(tmp_path / "train", space)[0]["grid"], ids[0])


@pytest.mark.parametrize(
    "value", [np.arange(6).reshape(2, 3), np.zeros(0, np.int16), np.asfortranarray(np.eye(3)), np.array(">é", "U")]
)
def test_npy_decoder_agrees_with_numpy(value):
    parse = EXTENSIONS["npy"].decode
    for _ in range(2):
        got = parse(npy(value))
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, np.load(io.BytesIO(npy(value))))
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        parse(UNREADABLE["pickled"])
