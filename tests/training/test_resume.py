"""`fourm train` and `fourm tokenizer`, stopped by errors again and again, equal a run that was left alone."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from fourm import checkpoint, cli, faults, logbook
from fourm.data.shards import write_shards
from fourm.masking.masking import Masker
from fourm.tokenization.quantizers import EMACodebook
from fourm.tokenization.task import TokenizerTask
from fourm.training.tasks import MaskedTask, keys_of

TABLE = {
    "tok": {"kind": "grid", "vocab_size": 20, "grid": [2, 2]},
    "depth": {"kind": "grid", "vocab_size": 10, "grid": [2, 2]},
    "caption": {"kind": "text", "vocab_size": 300, "max_tokens": 8, "sentinels": 20},
}
BASIC = {"batch_size": 8, "save_every": 2, "eval_every": 3, "log_every": 1, "precision": "fp32", "ema": 0.9}
TRAIN = BASIC | {
    "modalities": "table.yaml", "steps": 12, "val_batches": 1, "optim": {"name": "muon", "warmup": 2},
    "model": {"size": "nano", "dim": 16, "encoder_depth": 1, "decoder_depth": 2, "heads": 2, "drop_path": 0.2},
    "masking": {"input_tokens": 8, "target_tokens": 8, "mixture": [{"input": {"others": 1}, "target": {"others": 1}}]},
}  # fmt: skip
TOKENIZER = BASIC | {
    "data": "raw", "modality": "rgb", "steps": 10, "test_samples": 4, "crops": {"scale": [0.5, 1.0]},
    "tokenizer": {
        "input": {"kind": "image", "size": [16, 16]},
        "quantizer": {"type": "vq", "codebook_size": 32, "dim": 4, "decay": 0.5, "dead_code": 0.5},
        "backbone": {"patch_size": 8, "width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1},
    },
}  # fmt: skip
# An epoch of 32 samples is 4 updates, and checkpoints are at even ones: a stop at 3 goes on in the middle of an epoch,
# at 4 on the boundary; 5, 6 and 7 are in one epoch; 10 in the next.
STOPS = (3, 4, 5, 6, 7, 10)


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Names of the samples of each update, of its last run; an update that is repeated has the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOURM_CACHE", str(tmp_path / "cache"))
    here, update = defaultdict(list), []
    reach = faults.reach

    def reached(point, number=None):
        reach(point, number)
        if point == "step":
            update[:] = [number]
            here[number].append([])

    def watch(task):
        loss = task.loss

        def watched(self, batch, counts):
            if self.model.training:
                here[update[0]][-1] += keys_of(batch)
            return loss(self, batch, counts)

        monkeypatch.setattr(task, "loss", watched)

    monkeypatch.setattr(faults, "reach", reached)
    watch(MaskedTask)
    watch(TokenizerTask)
    return here


def stop_at(monkeypatch, step, *words):
    monkeypatch.setenv("FOURM_FAULT", f"io@step:{step}")
    with pytest.raises(OSError, match="FOURM_FAULT"):
        cli.main([*words])
    monkeypatch.delenv("FOURM_FAULT")


def outcome(folder, seen):
    """Everything a run leaves, and the samples of its updates, which are forgotten."""
    newest = checkpoint.latest(folder)
    found = {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}
    assert sorted(found) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    state = json.loads((newest / "state.json").read_text())
    found |= {name: value for name, value in state.items() if name not in ("config", "guard")}
    timed = ("second", "wait", "mfu")
    found["records"] = [
        {name: value for name, value in record.items() if not any(word in name for word in timed)}
        for record in logbook.read(folder)
    ]
    assert all(each == tries[0] for tries in seen.values() for each in tries)
    found["samples"] = {step: tries[0] for step, tries in seen.items()}
    seen.clear()
    return found


def differing(one, other):
    return [name for name in one | other if one.get(name) != other.get(name)]


def write_tokens(root, count, names=tuple(TABLE)):
    rng = np.random.default_rng(count)
    for split in ("train", "val"):
        drawn = ({"tok": rng.integers(0, 20, 4).astype(np.int16), "depth": rng.integers(0, 10, 4).astype(np.int16),
                  "caption": rng.integers(30, 60, 6)} for _ in range(count))  # fmt: skip
        stock = [{"__key__": f"{root}{i}"} | {name: each[name] for name in names} for i, each in enumerate(drawn)]
        write_shards(Path(root), split, stock, 8)


@pytest.mark.parametrize(("sets", "packed"), [(1, True), (3, True), (3, False)])
def test_model(seen, monkeypatch, sets, packed):
    write_tokens("one", 32)
    write_tokens("two", 12)
    write_tokens("maps", 9, ("tok", "depth"))
    mixture = [{"path": "one", "weight": 0.5}, {"path": "two", "weight": 0.3},
               {"path": "maps", "weight": 0.2, "modalities": ["tok", "depth"]}]  # fmt: skip
    Path("table.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    changed = {"data": "one" if sets == 1 else mixture, "model": TRAIN["model"] | {"packed": packed}}
    Path("config.yaml").write_text(yaml.safe_dump(TRAIN | changed))
    cli.main(["train", "--config", "config.yaml", "--folder", "whole"])
    whole = outcome("whole", seen)
    words = ("train", "--config", "config.yaml", "--folder", "parts", "--workers")
    for number, step in enumerate(STOPS):
        stop_at(monkeypatch, step, *words, "02"[number % 2])
    cli.main([*words, "2"])
    assert not differing(whole, outcome("parts", seen))
    if sets == 1:
        epochs = [sorted(key for step in range(4) for key in whole["samples"][first + step]) for first in (0, 4, 8)]
        assert epochs[0] == epochs[1] == epochs[2] and len(set(epochs[0])) == 32


def test_tokenizer(seen, monkeypatch):
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 4)):
        pictures = rng.integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
        write_shards(Path("raw"), split, ({"__key__": str(i), "rgb": each} for i, each in enumerate(pictures)), 8)
    Path("config.yaml").write_text(yaml.safe_dump(TOKENIZER))
    reset = []
    replace = EMACodebook._replace
    monkeypatch.setattr(
        EMACodebook, "_replace", lambda self, dead, *rest: reset.append(dead.any()) or replace(self, dead, *rest)
    )
    cli.main(["tokenizer", "--config", "config.yaml", "--folder", "whole"])
    whole = outcome("whole/run", seen)
    assert sum(reset) > 5  # codes died at all times
    words = ("tokenizer", "--config", "config.yaml", "--folder", "parts", "--workers")
    for number, step in enumerate((3, 4, 5, 7)):
        stop_at(monkeypatch, step, *words, "02"[number % 2])
    cli.main([*words, "0"])
    assert not differing(whole, outcome("parts/run", seen))


def test_the_comparison_sees_a_difference(seen, monkeypatch):
    """One sample masked otherwise in a late update, and the outcomes differ in all that was trained."""
    write_tokens("one", 32)
    Path("table.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    Path("config.yaml").write_text(yaml.safe_dump(TRAIN | {"data": "one"}))
    cli.main(["train", "--config", "config.yaml", "--folder", "whole"])
    whole = outcome("whole", seen)
    stop_at(monkeypatch, 10, "train", "--config", "config.yaml", "--folder", "parts")
    mask = Masker.__call__
    monkeypatch.setattr(Masker, "__call__", lambda self, samples, draws: mask(self, samples, [(9, 9), *draws[1:]]))
    cli.main(["train", "--config", "config.yaml", "--folder", "parts"])
    names = differing(whole, outcome("parts", seen))
    assert {"model.safetensors", "optimizer.safetensors", "ema.safetensors", "records"} <= set(names)
    assert "samples" not in names
