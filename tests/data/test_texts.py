import gzip
import importlib.util
import itertools
import json
import sys

import numpy as np
import pytest

from fourm.data import texts
from fourm.data.loader import WINDOW, Loader
from fourm.data.texts import TextSource
from fourm.data.tokens import TokenDataset
from fourm.modalities import Modality, TokenSpace

SPACE = TokenSpace({"caption": Modality("text", vocab_size=300, max_tokens=8)})
LINES = [f"row {i} é" for i in range(10)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "CHUNK", 4)


class Encode:
    """Ids are bytes; remembers how often it was asked."""

    def __init__(self):
        self.count = 0

    def __call__(self, lines):
        self.count += len(lines)
        return [np.frombuffer(line.encode(), np.uint8).astype(np.int32) for line in lines]


def open_texts(path, encode=None, encoder="1", **options) -> TokenDataset:
    source = TextSource(str(path), "caption", SPACE["caption"], encode or Encode(), encoder, **options)
    return TokenDataset(source, SPACE)


def written(folder, kind: str):
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(LINES) + "\n")  # blank lines are no texts
    elif "json" in kind:
        lines = "".join(json.dumps({"words": line}) + "\n" for line in LINES).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pytest.importorskip("datasets")
        parquet.write_table(pyarrow.table({"words": LINES}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "00000.json.gz", "json", "parquet"])
@pytest.mark.parametrize("samples", [None, 7])
def test_rows_in_their_order(tmp_path, kind, samples):
    if kind == "parquet":
        pytest.importorskip("datasets")
    data = open_texts(written(tmp_path, kind), field="words", samples=samples)
    lines = LINES[:samples]
    assert len(data) == len(lines) and data.sizes == ([4, 4, 2] if samples is None else [4, 3])
    for i, line in enumerate(lines):
        assert data[i]["__key__"] == f"{i:010d}"
        assert bytes(data[5, i]["caption"].tolist()) == line.encode()[:8]


def test_texts_are_tokenized_once(tmp_path):
    path, encode = written(tmp_path, "txt"), Encode()
    for _ in range(2):
        open_texts(path, encode)
    assert encode.count == 10
    open_texts(path, encode, encoder="2")  # another tokenizer
    assert encode.count == 20
    open_texts(path, encode)  # whose texts are still there
    assert encode.count == 20
    path.write_text("other\n")
    assert bytes(open_texts(path, encode, encoder="2")[0]["caption"].tolist()) == b"other"


@pytest.mark.parametrize("workers", [0, 2])
def test_many_texts_are_streamed(tmp_path, workers, monkeypatch):
    lines = [f"{i}" for i in range(4 * 3 * WINDOW)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    opened, rows = [], TextSource._rows
    monkeypatch.setattr(TextSource, "_rows", lambda self, start: opened.append(start) or rows(self, start))
    data = open_texts(tmp_path / "long.txt")
    loader = Loader(data, 16, lambda batch, draws: (batch, draws), seed=0, workers=workers)
    read = [pair for batch in itertools.islice(loader.batches(), 48) for pair in zip(*batch, strict=True)]
    assert sorted(draw for _, draw in read) == [(0, i) for i in range(len(lines))]
    assert all(bytes(sample["caption"].tolist()) == lines[i].encode() for sample, (_, i) in read)
    windows = [[i // (4 * WINDOW) for _, (_, i) in read[start : start + 256]] for start in (0, 256, 512)]
    assert windows == [[0] * 256, [1] * 256, [2] * 256] and [i for _, (_, i) in read] != list(range(768))
    assert len(opened) < 20  # not once for each of the 192 shards


def test_wrong_texts(tmp_path, monkeypatch):
    path = written(tmp_path, "txt")
    with pytest.raises(ValueError, match="there is no such file"):
        open_texts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="has only 10 rows, `samples` asks for more"):
        open_texts(path, samples=11)
    with pytest.raises(ValueError, match=r"row 0000000000 \('row 0 é'\): ids in"):
        open_texts(path, lambda lines: [np.full(3, 300) for _ in lines], encoder="2")
    with pytest.raises(ValueError, match=r"row 0000000000 .*no text in 'text', the fields of the row are words"):
        open_texts(written(tmp_path, "jsonl.gz"))
    for name in ("a.jsonl/x.csv", "x.tar.gz", "x.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
        with pytest.raises(ValueError, match=r"expected a file \.txt, \.jsonl or \.json"):
            open_texts(tmp_path / name)
    with pytest.raises(ValueError, match="`samples` must say how many"):
        open_texts("allenai/c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install fourm\[hf\]"):
        open_texts("allenai/c4", name="en", samples=10)


def test_rows_without_text_are_left_out(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n["c"]\n{"tex')
    source = TextSource(str(path), "caption", SPACE["caption"], Encode(), "1")
    data = TokenDataset(source, SPACE, on_error="skip", max_bad=0.6)
    assert data.keys == ["0000000000", "0000000002"] and data.skipped == {"unreadable": 3}
    path.write_text('{"text": "a"}\n{"tex')
    with pytest.raises(ValueError, match=r"texts\.jsonl, row 0000000001 .*Unterminated"):
        open_texts(path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the extra 'hf' is not installed")
def test_data_set_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(*words, **options):
        asked.append((words, options))
        return datasets.Dataset.from_dict({"text": LINES}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = open_texts("allenai/c4", name="en", split="validation", samples=9)
    assert [bytes(data[i]["caption"].tolist()).decode() for i in (0, 8)] == ["row 0 é"[:8], "row 8 é"]
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]
