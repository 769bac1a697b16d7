"""What a run shows while it trains."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from fourm import logbook, runtime
from fourm.training import trainer

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


class Unreachable:
    """A tracker whose network is down from the start."""

    def __init__(self, *given):
        pass

    def start(self):
        pass

    def __getattr__(self, name):
        raise ConnectionError("no route to host")


def test_pictures_mfu_and_a_broken_tracker(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(logbook.TRACKERS, "wandb", Unreachable)
    monkeypatch.setattr(trainer, "tokens_in", lambda batch: 10)
    monkeypatch.setattr(runtime, "peak_flops", lambda device, dtype: 5e6)
    made = trainer.Trainer
    monkeypatch.setattr(tiny, "Trainer", lambda *given: made(*given, flops_per_token=2e3))
    evaluators = {"show": lambda model, step: {"sheet": Image.new("RGB", (2, 2)), "figure": 0.5}}
    tiny.train(tmp_path, evaluators=evaluators, trackers=["wandb"])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained] == [3, 4, 6, 8, 9, 12]
    for record in trained:
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 2e3 / 5e6)
    assert next(record for record in records if "show/figure" in record) == {"step": 5, "show/figure": 0.5}
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "show-sheet-10.png", "show-sheet-12.png", "show-sheet-5.png",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("warning: wandb failed") == 1 and "MFU" in said and "step 12 (100%)  loss" in said
