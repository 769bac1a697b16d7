import io
import itertools
import multiprocessing
import os
import pickle
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from fourm.data import tokens
from fourm.data.loader import WINDOW, Loader
from fourm.data.shards import EXTENSIONS, Encoded, ShardDataset, write_shards
from fourm.data.tokens import TokenDataset
from fourm.data.transforms import Picture, View, crop_settings
from fourm.masking.budgets import Component, MaskingConfig
from fourm.masking.masking import Masker
from fourm.modalities import Modality, TokenSpace
from fourm.tokenization.inputs import InputConfig, to_network

RNG = np.random.default_rng(0)
SPACE = TokenSpace(
    {
        "grid": Modality("grid", vocab_size=100, grid=(2, 3)),
        "text": Modality("text", vocab_size=50, max_tokens=5, first_sentinel=4, sentinels=40),
        "vectors": Modality("vectors", dim=3, max_tokens=4),
    }
)
PIXELS = TokenSpace({"image": Modality("patches", grid=(2, 2), patch_size=4), "grid": SPACE["grid"]})


def samples(count: int = 5, crops: int = 2) -> list[dict]:
    def text(length: int) -> np.ndarray:
        return np.array([[*range(4, 4 + length), *[-1] * (5 - length)] for _ in range(crops)], np.int16)

    return [
        {
            "__key__": f"t{i}",
            "grid": RNG.integers(0, 100, (crops, 6)).astype(np.int16),
            "text": text(i % 4),
            "vectors": np.concatenate([RNG.normal(size=(crops, 2, 3)), np.full((crops, 1, 3), np.nan)], 1).astype("f4"),
        }
        for i in range(count)
    ]


def rewrite(path: Path, change) -> None:
    """Edits the list of (name, bytes) of a tar."""
    with tarfile.open(path) as tar:
        entries = [(member.name, tar.extractfile(member).read()) for member in tar]
    entries = change(entries) or entries
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def put(root: Path, name: str, row: int, data: bytes) -> None:
    """Replaces one value of the first shard."""
    rewrite(root / f"train/{name}/shard-000000.tar", lambda e: [*e[:row], (e[row][0], data), *e[row + 1 :]])


def npy(value) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def packed_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


# What is read


def test_crops_follow_epoch_and_sample_and_padding_is_gone(tmp_path):
    stock = samples(crops=3)
    write_shards(tmp_path, "train", stock, 2)
    data = TokenDataset(tmp_path / "train", SPACE)
    for epoch, i in itertools.product(range(4), range(5)):
        got, crop = data[epoch, i], (epoch + i) % 3
        np.testing.assert_array_equal(got["grid"], stock[i]["grid"][crop])
        np.testing.assert_array_equal(got["text"], np.arange(4, 4 + i % 4))
        np.testing.assert_array_equal(got["vectors"], stock[i]["vectors"][crop, :2])
        np.testing.assert_array_equal(data[i]["grid"], stock[i]["grid"][0])  # without an epoch


def test_numbers_of_crops_must_agree(tmp_path):
    stock = samples(crops=3)
    stock[1]["text"] = stock[1]["text"][:2]  # two crops where the others have three
    stock[2]["grid"] = stock[2]["grid"][:1]  # one for all crops
    write_shards(tmp_path, "train", stock, 5)
    with pytest.raises(ValueError, match=r"shard-000000\.tar, key 't1': numbers of crops differ: grid 3, text 2, vec"):
        TokenDataset(tmp_path / "train", SPACE)
    data = TokenDataset(tmp_path / "train", SPACE, on_error="skip")
    assert data.keys == ["t0", "t2", "t3", "t4"] and data.skipped == {"crops": 1}


@pytest.mark.parametrize("extension", ["png", "npy", "webp"])
def test_images_are_cropped_with_the_crop_of_the_tokens(tmp_path, extension):
    stock = []
    for i in range(3):
        image = RNG.integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)
        settings = crop_settings(20 + i, 30, 4, 0, f"t{i}")
        grid = RNG.integers(0, 100, (4, 6))
        stock.append({"__key__": f"t{i}", "image": image, "crop_settings": settings, "grid": grid})
    write_shards(tmp_path, "train", stock, 2, extensions={"image": extension})
    data = TokenDataset(tmp_path / "train", PIXELS)
    for epoch, i in itertools.product(range(5), range(3)):
        image, settings = stock[i]["image"], stock[i]["crop_settings"]
        wanted = Picture((8, 8))(image, View.of(settings, (epoch + i) % 4, *image.shape[:2]))
        got = data[epoch, i]
        assert set(got) == {"__key__", "image", "grid"}
        np.testing.assert_array_equal(got["image"], wanted)
        np.testing.assert_array_equal(got["grid"], stock[i]["grid"][(epoch + i) % 4])
    named = TokenDataset(f"{tmp_path}/train/[image,grid]/shard-{{000000..000001}}.tar", PIXELS)
    np.testing.assert_array_equal(named[4, 2]["image"], got["image"])  # crop settings need no name
    ids_only = TokenDataset(tmp_path / "train", PIXELS.subset(["grid"]))
    assert set(ids_only[0]) == {"__key__", "grid"}


def test_vectors_of_4m(tmp_path):
    arrays = {"emb": RNG.normal(size=(2, 3, 3)).astype(np.float16), "mask_valid": np.array([[1, 1, 0], [1, 0, 0]]) > 0}
    stock = [{"__key__": "a", "vectors": Encoded("npz", EXTENSIONS["npz"].encode(arrays))}]
    write_shards(tmp_path, "train", stock, 1)
    data = TokenDataset(tmp_path / "train", SPACE.subset(["vectors"]))
    np.testing.assert_array_equal(data[0, 0]["vectors"], arrays["emb"][0, :2])
    np.testing.assert_array_equal(data[1, 0]["vectors"], arrays["emb"][1, :1])


def test_plain_folders_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "FOLDER_SHARD", 2)
    stock = samples()
    for sample, name in itertools.product(stock, SPACE.names):
        path = tmp_path / f"train/{name}/x/{sample['__key__']}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(npy(sample[name]))
    data = TokenDataset(tmp_path / "train", SPACE)
    assert data.keys == [f"x/t{i}" for i in range(5)] and data.sizes == [2, 2, 1]
    (tmp_path / "train/text/x/t0.npy").unlink()  # the others stay where they are
    data = TokenDataset(tmp_path / "train", SPACE, on_error="skip")
    assert data.keys == [f"x/t{i}" for i in range(1, 5)] and data.skipped == {"misaligned": 1}
    np.testing.assert_array_equal(data[3]["grid"], stock[4]["grid"][0])


def test_path_of_4m(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    stock = [{"__key__": str(i), "grid": np.arange(6)[None] + i, "image": image} for i in range(6)]
    write_shards(tmp_path, "train", stock, 2)
    (tmp_path / "train/grid").rename(tmp_path / "train/tok@8")
    space = TokenSpace({"image@8": PIXELS["image"], "tok@8": PIXELS["grid"]})
    data = TokenDataset(f"{tmp_path}/train/[image,tok@8]/shard-{{000000..000001}}.tar", space)
    assert data.keys == ["0", "1", "2", "3"] and set(data[0]) == {"__key__", "image@8", "tok@8"}
    with pytest.raises(ValueError, match="no folder for modality tok@8, there are image"):
        TokenDataset(f"{tmp_path}/train/[image]/shard-{{000000..000001}}.tar", space)
    with pytest.raises(ValueError, match=r"image@8 lacks 1 of 4 shards, such as shard-000003.tar"):
        TokenDataset(f"{tmp_path}/train/[image,tok@8]/shard-{{000000..000003}}.tar", space)


def test_remote_shards_are_packed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    memory, stock = fsspec.filesystem("memory"), samples()
    write_shards(tmp_path, "train", stock, 2)
    memory.put(str(tmp_path / "train"), "/bucket/", recursive=True)
    data = TokenDataset("memory://bucket/train", SPACE)
    assert data.keys == [f"t{i}" for i in range(5)]
    np.testing.assert_array_equal(data[1, 3]["grid"], stock[3]["grid"][0])
    assert len(packed_files(tmp_path / "cache")) == 9 and not packed_files(tmp_path / "train")
    monkeypatch.setattr(type(memory), "cat_file", None)  # not read again
    assert TokenDataset("memory://bucket/train/[grid,text,vectors]/shard-{000000..000002}.tar", SPACE)
    memory.rm("/bucket", recursive=True)


def test_servers_whose_lists_are_links_only(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    ls = type(memory).ls
    links = lambda self, path, **_: [{**info, "size": None, "created": None} for info in ls(self, path)]  # noqa: E731
    monkeypatch.setattr(type(memory), "ls", links)
    image = np.zeros((8, 8, 3), np.uint8)
    for first in (0, 50):
        stock = [{"__key__": f"{i}", "image": image, "grid": np.arange(6)[None] + first} for i in range(WINDOW + 1)]
        write_shards(tmp_path / str(first), "train", stock, 1)
        memory.put(str(tmp_path / str(first) / "train"), "/web/", recursive=True)
        data = TokenDataset("memory://web/train", PIXELS)
        assert {path.parent.name for path in packed_files(tmp_path / "cache")} >= {"grid"}
        assert first or not packed_files(tmp_path / "cache/packed/image")
        assert data[3]["grid"].tolist() == [*range(first, first + 6)]
    memory.rm("/web", recursive=True)


def test_tars_and_plain_files_do_not_mix(tmp_path):
    write_shards(tmp_path, "train", samples(), 2)
    for path in (tmp_path / "train/text").iterdir():
        path.unlink()
    (tmp_path / "train/text/t0.npy").write_bytes(npy(np.zeros(3, int)))
    with pytest.raises(ValueError, match="tars in grid, vectors and plain files in text, expected all"):
        TokenDataset(tmp_path / "train", SPACE)


def test_places_that_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"pip install fourm\[remote\]"):
        TokenDataset("s3://bucket/train", SPACE)
    with pytest.raises(ValueError, match="nowhere://x/train"):
        TokenDataset("nowhere://x/train", SPACE)
    with pytest.raises(ValueError, match="there is none"):
        TokenDataset(tmp_path / "train", SPACE)
    with pytest.raises(ValueError, match="there is none"):
        TokenDataset("memory://nothing/train", SPACE)


# Packing


def test_packed_files_are_safetensors(tmp_path):
    stock = samples()
    write_shards(tmp_path, "train", stock, 5)
    TokenDataset(tmp_path / "train", SPACE)
    [path] = (tmp_path / ".packed/train/grid").glob("*.safetensors")
    arrays = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(arrays["values"], np.concatenate([sample["grid"].ravel() for sample in stock]))
    assert arrays["starts"].tolist() == [0, 2, 4, 6, 8, 10] and arrays["rows"].tolist() == list(range(0, 61, 6))


def test_only_what_changed_is_packed_anew(tmp_path):
    stock = samples()
    write_shards(tmp_path, "train", stock, 2)
    TokenDataset(tmp_path / "train", SPACE)
    before = {path: path.stat().st_mtime_ns for path in packed_files(tmp_path)}
    put(tmp_path, "grid", 1, npy(np.full((2, 6), 7)))
    data = TokenDataset(tmp_path / "train", SPACE)
    assert data[1]["grid"].tolist() == [7] * 6
    after = {path: path.stat().st_mtime_ns for path in packed_files(tmp_path)}
    assert len(set(before.items()) & set(after.items())) == 8 and len(after) == 9  # and the old one is gone
    wider = TokenSpace(SPACE.modalities | {"grid": Modality("grid", vocab_size=200, grid=(2, 3))})
    TokenDataset(tmp_path / "train", wider)
    assert len(packed_files(tmp_path)) == 12


def test_data_that_cannot_be_written_are_packed_elsewhere(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", "train", samples(), 5)
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert len(TokenDataset(tmp_path / "data/train", SPACE)) == 5
    assert len(packed_files(tmp_path / "cache")) == 3 and not packed_files(tmp_path / "data")


def test_killed_packing_leaves_nothing_that_counts(tmp_path):
    write_shards(tmp_path, "train", samples(), 5)
    TokenDataset(tmp_path / "train", SPACE)
    [path] = (tmp_path / ".packed/train/grid").glob("*.safetensors")
    path.rename(path.with_name(f".{path.name}.123"))
    assert len(TokenDataset(tmp_path / "train", SPACE)) == 5 and path.exists()


def pack_and_count(folder: Path, queue) -> None:
    written = []
    write = TokenDataset._write
    TokenDataset._write = lambda self, shard, name: written.append((shard, name)) or write(self, shard, name)
    data = TokenDataset(folder, SPACE)
    queue.put((written, [data[i]["grid"].tolist() for i in range(len(data))]))


def test_processes_pack_each_shard_once(tmp_path):
    write_shards(tmp_path, "train", samples(40), 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=pack_and_count, args=(tmp_path / "train", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    made, read = zip(*(queue.get(timeout=60) for _ in processes), strict=True)
    assert sorted(itertools.chain(*made)) == sorted(itertools.product(range(20), SPACE.names))
    assert all(each == read[0] for each in read)


def test_data_set_survives_pickling(tmp_path):
    write_shards(tmp_path, "train", samples(), 2)
    data = TokenDataset(tmp_path / "train", SPACE)
    again = pickle.loads(pickle.dumps(data))
    assert again.keys == data.keys and again[1, 3]["grid"].tolist() == data[1, 3]["grid"].tolist()


# Many shards


def draws_of(loader: Loader, count: int) -> list[tuple[int, int]]:
    return [draw for step in range(count) for draw in loader.draws(step)]


def unchanged(batch, draws):
    return [(sample["__key__"], sample["grid"].tolist()) for sample in batch], draws


def test_more_shards_than_a_window_are_packed_when_needed(tmp_path):
    stock = samples(4 * WINDOW)
    write_shards(tmp_path, "train", stock, 2)  # 128 shards
    data = TokenDataset(tmp_path / "train", SPACE)
    assert len(data) == 256 and len(packed_files(tmp_path)) == 2 * WINDOW  # of one modality
    for workers in (0, 2):
        loader = Loader(data, 16, unchanged, seed=1, workers=workers)
        batches = list(itertools.islice(loader.batches(), 32))
        read = [(sample, draw) for batch in batches for sample, draw in zip(*batch, strict=True)]
        assert {draw for _, draw in read} == set(itertools.product(range(2), range(256)))
        assert all(sample == (f"t{i}", stock[i]["grid"][(epoch + i) % 2].tolist()) for sample, (epoch, i) in read)
        assert list(itertools.islice(loader.batches(20), 2)) == batches[20:22]
    assert len(data._opened) <= 2 * WINDOW and data.keys[-1] == "t255"


def test_order_within_windows(tmp_path):
    write_shards(tmp_path, "train", samples(3 * WINDOW), 1)
    data = TokenDataset(tmp_path / "train", SPACE)
    loader = Loader(data, 3, unchanged, seed=1)
    first, second = (draws_of(loader, 2 * WINDOW)[epoch * 3 * WINDOW :][: 3 * WINDOW] for epoch in range(2))
    shards = [[i for _, i in epoch] for epoch in (first, second)]
    assert sorted(shards[0]) == sorted(shards[1]) == list(range(3 * WINDOW))
    windows = [set(epoch[start : start + WINDOW]) for epoch in shards for start in range(0, 3 * WINDOW, WINDOW)]
    assert set(loader.order.ahead(0)) == windows[0] | windows[1]
    assert set(loader.order.ahead(3 * WINDOW - 1)) == windows[2] | windows[3]  # the next epoch's
    assert windows[0] != windows[3] and windows[0] != set(range(WINDOW))
    other = [Loader(data, 1, unchanged, seed=1, rank=rank, world_size=3) for rank in range(3)]
    assert [order.draws(7)[0] for order in other] == loader.draws(7)


def test_bad_samples_of_many_shards_give_way_to_others(tmp_path):
    write_shards(tmp_path, "train", samples(4 * WINDOW), 2)
    put(tmp_path, "text", 1, b"broken")
    (tmp_path / "train/vectors/shard-000007.tar").write_bytes(b"x" * 20480)
    data = TokenDataset(tmp_path / "train", SPACE, on_error="skip", max_bad=0.02)
    assert len(data) == 256
    assert {data[i]["__key__"] for i in (0, 1)} == {"t0"}
    assert {data[i]["__key__"] for i in (14, 15)} == {"t16", "t17"}  # of the next shard
    assert data.skipped == {"unreadable": 1, "damaged": 1, "misaligned": 2}
    with pytest.raises(ValueError, match=r"3 of 256 samples are bad .*, max_bad 0.01 allows 2"):
        TokenDataset(tmp_path / "train", SPACE, on_error="skip", max_bad=0.01)  # it is known by now
    with pytest.raises(ValueError, match=r"text.*shard-000000\.tar.*'t1'"):
        TokenDataset(tmp_path / "train", SPACE)[0]


# Faults: each is an error that says where, or is left out and counted


def left_out(root: Path, message: str, reasons: dict[str, int], kept: list[str]) -> TokenDataset:
    for _ in range(2):  # also when it is packed already
        with pytest.raises(ValueError, match=message):
            TokenDataset(root / "train", SPACE)
        data = TokenDataset(root / "train", SPACE, on_error="skip", max_bad=0.9)
        assert data.keys == kept and data.skipped == reasons
    return data


@pytest.fixture
def root(tmp_path):
    write_shards(tmp_path, "train", samples(4), 4)
    return tmp_path


def test_corrupt_tar(root):
    path = root / "train/text/shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[1024:1536] = b"x" * 512  # the second header
    path.write_bytes(data)
    left_out(root, r"text/shard-000000\.tar: the tar is truncated", {"damaged": 1, "misaligned": 3}, ["t0"])


def test_truncated_tar(root):
    path = root / "train/text/shard-000000.tar"
    path.write_bytes(path.read_bytes()[: 1024 * 2 + 77])
    left_out(root, r"text/shard-000000\.tar: the tar is truncated", {"damaged": 1, "misaligned": 2}, ["t0", "t1"])


def test_missing_modality(root):
    rewrite(root / "train/text/shard-000000.tar", lambda e: e[:2] + e[3:])
    left_out(root, r"grid.*shard-000000\.tar.*'t2': missing in text", {"misaligned": 1}, ["t0", "t1", "t3"])
    (root / "train/text/shard-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"grid.*'t0': missing in text"):
        TokenDataset(root / "train", SPACE)


def test_missing_shard(tmp_path):
    write_shards(tmp_path, "train", samples(4), 2)
    (tmp_path / "train/text/shard-000001.tar").unlink()
    left_out(tmp_path, r"grid.*shard-000001\.tar.*'t2': missing in text", {"misaligned": 2}, ["t0", "t1"])


def test_wrong_length(root):
    put(root, "grid", 2, npy(np.zeros((2, 7), int)))
    left_out(root, r"grid.*'t2'.*\(6,\), got int64 \(2, 7\)", {"unreadable": 1}, ["t0", "t1", "t3"])


def test_id_out_of_range(root):
    put(root, "grid", 2, npy(np.full((2, 6), 100)))
    left_out(root, r"grid.*'t2'.*ids in \[100, 100\], expected \[0, 100\)", {"unreadable": 1}, ["t0", "t1", "t3"])


def test_padding_between_ids(root):
    put(root, "text", 2, npy(np.array([[4, -1, 5]] * 2)))
    left_out(root, r"text.*'t2'.*padding or NaN lies between", {"unreadable": 1}, ["t0", "t1", "t3"])


def test_wrong_dtype(root):
    put(root, "text", 2, npy(np.ones((2, 3))))
    left_out(root, r"text.*'t2'.*expected integer ids, got float64", {"unreadable": 1}, ["t0", "t1", "t3"])


def test_mixed_dtypes_of_vectors(root):
    put(root, "vectors", 2, npy(np.ones((2, 3, 3), np.float16)))
    left_out(root, r"vectors.*'t2'.*wrong type", {"unreadable": 1}, ["t0", "t1", "t3"])


def test_nan_in_vectors(root):
    broken = np.ones((2, 3, 3), np.float32)
    broken[1, 0, 2] = np.nan
    put(root, "vectors", 2, npy(broken))
    left_out(root, r"vectors.*'t2'.*NaN lies between", {"unreadable": 1}, ["t0", "t1", "t3"])


def test_duplicate_key(root):
    rewrite(root / "train/grid/shard-000000.tar", lambda e: [*e, e[1]])
    left_out(root, r"grid.*'t1': the key is there twice", {"duplicate": 1}, ["t0", "t1", "t2", "t3"])


def test_pickled_array(root):
    put(root, "text", 2, npy(np.array([{"points": []}], dtype=object)))
    left_out(root, r"text.*'t2'.*nothing is unpickled here; write them", {"unreadable": 1}, ["t0", "t1", "t3"])


def test_fault_in_two_modalities_is_one_sample(root):
    put(root, "text", 2, b"")
    put(root, "grid", 2, b"")
    data = left_out(root, "'t2'", {"unreadable": 2}, ["t0", "t1", "t3"])
    assert data._left_out() == [{"lost": 1, "faults": {"unreadable": 2}}] and data._found == 4
    assert [path.suffix for path in (root / ".packed/train/left_out").iterdir()] == [".json"]


def test_too_many_bad_samples(root):
    put(root, "text", 2, b"")
    assert len(TokenDataset(root / "train", SPACE, on_error="skip")) == 3  # one is never too many
    put(root, "text", 1, b"")
    with pytest.raises(ValueError, match=r"2 of 4 samples are bad \({'unreadable': 2}\), max_bad 0.01 allows 1"):
        TokenDataset(root / "train", SPACE, on_error="skip")


def test_image_of_another_size_is_no_patches_of_it(tmp_path):
    stock = [{"__key__": str(i), "image": np.zeros((8, 9, 3), np.uint8), "grid": np.zeros(6, int)} for i in range(2)]
    write_shards(tmp_path, "train", stock, 2)
    with pytest.raises(ValueError, match=r"image.*'0'.*\(8, 8, 3\), got uint8 \(8, 9, 3\)"):
        TokenDataset(tmp_path / "train", PIXELS)


def test_empty_caption_is_a_sample(tmp_path):
    stock = [{"__key__": str(i), "text": np.zeros(i, np.int16), "grid": np.zeros(6, np.int16)} for i in range(3)]
    write_shards(tmp_path, "train", stock, 3)
    space = SPACE.subset(["grid", "text"])
    data = TokenDataset(tmp_path / "train", space)
    assert [len(data[i]["text"]) for i in range(3)] == [0, 1, 2] and not data.skipped
    everything = Component(input={"grid": 1.0}, target={"text": 1.0})
    batch = Masker(space, MaskingConfig(6, 8, [everything]))([data[0]], [(0, 0)])
    assert batch.input_tokens == 6 and batch.target_tokens == 2  # the end of the text, and of its mask


# Pictures


def exif(image: Image.Image, orientation: int, image_format: str = "JPEG") -> bytes:
    buffer, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = orientation
    image.save(buffer, image_format, exif=tags, quality=100, subsampling=0)
    return buffer.getvalue()


def encoded(root: Path, stock: list[Encoded]) -> ShardDataset:
    write_shards(root, "train", [{"__key__": str(i), "rgb": each} for i, each in enumerate(stock)], len(stock))
    return ShardDataset(root / "train")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # a white corner, top left
    turned = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation]))
    got = encoded(tmp_path, [Encoded("jpg", exif(stored, orientation))])[0]["rgb"]
    assert got.shape == upright.shape and np.abs(got.astype(int) - upright).max() < 8


def test_grey_and_non_square_images(tmp_path):
    grey = RNG.integers(0, 256, (5, 9)).astype(np.uint8)
    stock = [{"__key__": "g", "image": grey, "crop_settings": crop_settings(5, 9, 1, 0, "g"), "grid": np.zeros(6, int)}]
    write_shards(tmp_path, "train", stock, 1)
    np.testing.assert_array_equal(ShardDataset(tmp_path / "train", ["image"])[0]["image"], grey)
    got = TokenDataset(tmp_path / "train", PIXELS)[0]["image"]
    assert got.shape == (8, 8, 3) and (got[..., 0] == got[..., 2]).all()
    space = TokenSpace({"image": Modality("patches", grid=(2, 2), patch_size=4, channels=1), "grid": SPACE["grid"]})
    np.testing.assert_array_equal(TokenDataset(tmp_path / "train", space)[0]["image"], got[..., :1])


def test_16_bits_stay(tmp_path):
    depth = np.array([[0, 300], [40000, 65535]], np.uint16)
    stock = [Encoded(name, EXTENSIONS[name].encode(depth)) for name in ("png", "tif", "pgm")]
    data = encoded(tmp_path, stock)
    for i in range(len(stock)):
        assert data[i]["rgb"].dtype == np.uint16
        np.testing.assert_array_equal(data[i]["rgb"], depth)


@pytest.mark.parametrize("extension", ["png", "ppm", "bmp", "tif", "tiff", "webp", "jpx", "jpg", "jpeg"])
def test_every_picture_of_4m_is_read(tmp_path, extension):
    image = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    got = encoded(tmp_path, [Encoded(extension, EXTENSIONS[extension].encode(image))])[0]["rgb"]
    assert got.shape == image.shape and np.abs(got.astype(int) - image).max() < 4


def test_npz_holds_plain_arrays_only(tmp_path):
    arrays = {"emb": np.eye(2, dtype=np.float32), "ids": np.arange(3)}
    data = encoded(tmp_path, [Encoded("npz", EXTENSIONS["npz"].encode(arrays))])
    assert data[0]["rgb"].keys() == arrays.keys()
    np.testing.assert_array_equal(data[0]["rgb"]["emb"], arrays["emb"])
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        EXTENSIONS["npz"].decode(buffer.getvalue())


def test_pictures_that_a_format_cannot_hold():
    with pytest.raises(ValueError, match="JPEG cannot hold uint16"):
        EXTENSIONS["jpg"].encode(np.zeros((4, 4), np.uint16))


def test_nan_depth(tmp_path):
    """Raw data come as they are, as NaN may mark what is unknown; a tokenizer without a mask for it refuses them."""
    depth = np.ones((4, 4), np.float32)
    depth[1, 2] = np.nan
    write_shards(tmp_path, "train", [{"__key__": "a", "depth": depth}], 1)
    raw = ShardDataset(tmp_path / "train")[0]["depth"]
    np.testing.assert_array_equal(raw, depth)
    with pytest.raises(ValueError, match="expected finite numbers"):
        to_network([raw], InputConfig(kind="depth", size=(4, 4), channels=1))
