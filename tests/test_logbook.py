import importlib.util
import io
import json
import math
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image
from rich.console import Console

from fourm import logbook, runtime
from fourm.logbook import Logbook, amount, duration, read, sparkline

TRAINED = {
    "lr": 1.25e-3, "grad_norm": 0.816, "seconds": 2.0, "data_wait": 0.004, "samples_per_second": 1230.0,
    "tokens_per_second": 34567.0, "mfu": 0.412, "tokens": 9000, "skipped": 3,
}  # fmt: skip
FACTS = ("lr 1.25e-03", "gradient 0.816", "1.23k samples/s", "34.6k tokens/s", "MFU 41.2%", "data 0.4%", "3 skipped")


def test_records_are_lines_of_json(tmp_path, capsys):
    with Logbook(tmp_path / "run") as book:
        book.write(1, {"loss": 0.1, "bad": float("nan"), "worse": -float("inf"), "name": "x"})
        book.say("hello")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": 0.1, "bad": "nan", "worse": "-inf", "name": "x"}
    assert capsys.readouterr().out == "hello\n"


def test_rewind_drops_what_will_be_made_again(tmp_path):
    book = Logbook(tmp_path)
    for step in (1, 2, 3):
        book.write(step, {"loss": step / 3})
    with book.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]
    book.rewind(2)
    book.write(3, {"loss": 1.5})
    assert [(record["step"], record["loss"]) for record in read(tmp_path)] == [(1, 1 / 3), (2, 2 / 3), (3, 1.5)]


def test_other_processes_are_silent(tmp_path, capsys):
    with Logbook(tmp_path / "run", ["wandb"], enabled=False) as book:
        book.write(1, {"loss": 1.0})
        book.pictures(1, {"a": Image.new("RGB", (2, 2))})
        book.progress(1, 0.5, {"loss": 1.0, **TRAINED}, 10.0)
        book.say("hello")
        book.rewind(0)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


# Trackers ------------------------------------------------------------------------------------------------------------


class Recorder(GeneralTracker):
    """Remembers what it is told."""

    name, requires_logging_directory, tracker = "wandb", False, None

    def __init__(self, *given):
        self.given, self.calls = given, []

    def start(self):
        self.calls.append(("start",))

    def log(self, values, step=None):
        self.calls.append(("log", values, step))

    def log_images(self, values, step=None):
        self.calls.append(("log_images", values, step))

    def finish(self):
        self.calls.append(("finish",))


class Broken(Recorder):
    def log(self, values, step=None):
        raise ConnectionError("no route to host")

    log_images = log

    def finish(self):
        raise TimeoutError


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the tracker, and for its package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    made = []

    def use(kind):
        monkeypatch.setitem(logbook.TRACKERS, "wandb", lambda *given: made.append(kind(*given)) or made[-1])
        return made

    return use


def test_trackers_get_figures_and_pictures(tmp_path, wandb):
    made, image = wandb(Recorder), Image.new("RGB", (2, 2))
    for _ in range(2):
        with Logbook(tmp_path / "some" / "run", ["wandb"], "project", {"lr": 1}) as book:
            book.write(5, {"loss": 1.0, "bad": math.nan, "samples": ["a", "b"]})
            book.pictures(5, {"val/sheet": image})
    assert [call[0] for call in made[0].calls] == ["start", "log", "log_images", "finish"]
    _, values, step = made[0].calls[1]
    assert values["loss"] == 1.0 and math.isnan(values["bad"]) and len(values) == 2 and step == 5  # lists are left out
    assert made[0].calls[2][1:] == ({"val/sheet": [image]}, 5)
    folder, project, name, config = made[0].given
    assert (folder, project, config) == (tmp_path / "some" / "run", "project", {"lr": 1})
    assert name.startswith("some-run-") and made[1].given[2] == name  # it goes on as the same run


def test_pictures_are_files(tmp_path):
    Logbook(tmp_path).pictures(20, {"val/sheet": Image.new("RGB", (3, 2), (1, 2, 3)), "b": Image.new("L", (1, 1))})
    assert sorted(os.listdir(tmp_path / "pictures")) == ["b-20.png", "val-sheet-20.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "val-sheet-20.png")), [[[1, 2, 3]] * 3] * 2)


def test_a_tracker_that_fails_is_warned_of_once(tmp_path, wandb, capsys):
    wandb(Broken)
    with Logbook(tmp_path, ["wandb"]) as book:
        for step in (1, 2):
            book.write(step, {"loss": 1.0})
        book.pictures(2, {"a": Image.new("RGB", (2, 2))})
    assert [record["step"] for record in read(tmp_path)] == [1, 2] and (tmp_path / "pictures" / "a-2.png").exists()
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "wandb" in said and "no route to host" in said


def test_what_cannot_be_started_is_an_error(tmp_path, monkeypatch, wandb):
    class Closed(Recorder):
        def start(self):
            raise RuntimeError("no API key")

    with pytest.raises(ValueError, match="'comet' is unknown, allowed are wandb, trackio, tensorboard"):
        Logbook(tmp_path, ["comet"])
    wandb(Closed)
    with pytest.raises(ValueError, match="wandb does not start: no API key"):
        Logbook(tmp_path, ["wandb"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"trackio .*not installed: pip install fourm\[trackio\]"):
        Logbook(tmp_path, ["trackio"])


def train_twice(folder, tracker):
    """Four steps, and again from the second on."""
    runtime.accelerator()  # which accelerate's trackers ask
    for first, last in ((1, 4), (3, 5)):
        with Logbook(folder, [tracker], "project", {"optim": {"lr": 1.0}}) as book:
            book.rewind(first - 1)
            for step in range(first, last + 1):
                book.write(step, {"loss": 1 / step, "bad": math.nan})
                book.pictures(step, {"val/sheet": Image.new("RGB", (4, 2), (step, 0, 0))})


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"the package {package} is not installed")


@needs("wandb")
def test_wandb_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_twice(tmp_path, "wandb")
    assert "warning" not in capsys.readouterr().out
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    name = (tmp_path / "run_id.txt").read_text()
    assert first.name.endswith(name) and second.name.endswith(name)
    assert [len(list(run.glob("files/media/images/val/*.png"))) for run in (first, second)] == [4, 3]


@needs("trackio")
def test_trackio_on_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it looks when it is imported, which is here
    from trackio.sqlite_storage import SQLiteStorage

    train_twice(tmp_path, "trackio")
    assert "warning" not in capsys.readouterr().out
    logs = SQLiteStorage.get_logs("project", (tmp_path / "run_id.txt").read_text())
    losses = [(log["step"], log["loss"]) for log in logs if "loss" in log]
    assert sorted(losses) == [(step, 1 / step) for step in (1, 2, 3, 3, 4, 4, 5)]
    assert sum("val/sheet" in log for log in logs) == 7


@needs("tensorboard")
def test_tensorboard_forgets_what_is_rewound(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_twice(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert events.Images("val/sheet")[-1].step == 5


# The terminal --------------------------------------------------------------------------------------------------------


def shown(book, width=80, height=24):
    """The live view as the lines of a terminal."""
    console = Console(file=io.StringIO(), record=True, force_terminal=True, width=width, height=height)
    console.print(book.board)
    return [line.rstrip() for line in console.export_text().splitlines()]


def filled(folder, modalities):
    """A logbook after three records and an evaluation; modality i loses i + 1, i + 0.5 and i."""
    book = Logbook(folder)
    for step in (1, 2, 3):
        parts = {f"loss/mod_{i}": i + (3 - step) / 2 for i in range(modalities)}
        book.write(step, {"loss": 4.5 - step, **parts, **TRAINED})
    book.write(3, {"val/loss": 1.75, "val/loss/mod_1": 1.125, "data/faults": 2.0})
    book.board.now = (3, 0.125, {"loss": 1.5, **TRAINED}, 3725.0)
    return book


def test_live_view(tmp_path):
    head, *said, titles, whole, first, second = shown(filled(tmp_path / ("long" * 20), 2), width=130)
    assert head.startswith("…" + ("long" * 20)[-42:] + "  step 3 of 24 ") and head.endswith(" 12%  1:02:05 left")
    assert all(fact in " ".join(said) for fact in FACTS)
    assert titles.split() == ["now", "course", "held", "out"]
    assert whole.split() == ["loss", "1.5", "█▅▁", "1.75"]
    assert first.split() == ["mod_0", "0", "█▅▁"] and second.split() == ["mod_1", "1", "█▅▁", "1.125"]


def test_live_view_of_many_modalities_fits(tmp_path):
    book = filled(tmp_path, 48)
    wide, small = shown(book, 130, 32), shown(book, 80, 24)
    assert len(wide) < 32 and all(any(f"mod_{i} " in line for line in wide) for i in range(48))
    assert len(small) < 24 and small[-1].endswith("more")
    assert [line.split()[0] for line in small[-19:-16]] == ["loss", "mod_47", "mod_46"]  # the worst
    assert len(small) - 5 + int(small[-1].split()[1]) == 49  # all are there or counted


def test_a_run_that_goes_on_shows_its_past(tmp_path):
    filled(tmp_path, 2)
    book = Logbook(tmp_path)
    assert shown(book)[-1] != shown(filled(tmp_path / "other", 2))[-1]
    book.rewind(3)
    assert shown(book)[-3:] == shown(filled(tmp_path / "another", 2))[-3:]
    book.rewind(2)
    assert shown(book)[-1].split() == ["mod_1", "1.5", "█▁"]


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_terminal_keeps_the_view_below_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(KeyError), filled(tmp_path, 1) as book:
        book.progress(3, 0.5, {"loss": 1.5, **TRAINED}, 10.0)
        sys.stderr.write("careful\n")
        book.say("[bold]evaluated[/bold]")
        book.progress(4, 0.75, {"loss": 1.5, **TRAINED}, 5.0)
        raise KeyError
    assert sys.stdout is stream and sys.stderr is stream
    stream.seek(0)
    text = stream.read()
    assert text.index("careful") < text.index("[bold]evaluated[/bold]") < text.rindex("step 4 of 5")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


@pytest.mark.parametrize("missing", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}, {"TTY_COMPATIBLE": "0"}])
def test_a_terminal_that_cannot_redraw_gets_lines(tmp_path, monkeypatch, missing):
    for name, value in ({"TERM": "xterm"} | missing).items():
        monkeypatch.setenv(name, value)
    stream = Terminal(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    book = Logbook(tmp_path)
    book.progress(3, 0.5, {"loss": 1.25}, 10.0)
    assert stream.buffer.getvalue() == b"step 3 (50%)  loss 1.2500  10 s left\n"


RUN = """
import sys
from fourm.logbook import Logbook
with Logbook(sys.argv[1]) as book:
    for step in range(1, 4):
        book.write(step, {"loss": 1.0, "seconds": 1.0})
        book.progress(step, step / 3, {"loss": 1.0}, 1.0)
        book.say("said")
        if step == 1:
            input()
print("after the run")
print("an error", file=sys.stderr)
"""


@pytest.mark.parametrize(("output", "together"), [("pipe", True), ("terminal", False)])
def test_a_run_outlives_the_reader_of_its_output(tmp_path, output, together):
    reader, writer = os.pipe() if output == "pipe" else pty.openpty()
    errors = tmp_path / "errors"
    with errors.open("wb") as file:
        stderr = writer if together else file
        environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        run = [sys.executable, "-c", RUN, str(tmp_path)]
        process = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=writer, stderr=stderr, env=environment)
    os.close(writer)
    seen = b""
    while b"said" not in seen:
        seen += os.read(reader, 1000)
    assert (b"\x1b" in seen) == (output == "terminal")
    os.close(reader)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert errors.read_text() == ("" if together else "an error\n")
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]


def test_without_a_terminal_there_are_lines(tmp_path, capsys):
    with Logbook(tmp_path) as book:
        book.progress(3, 0.5, {"loss": 1.25, **TRAINED}, 10.0)
        book.progress(4, 0.75, {"samples_per_second": 2.0, "tokens_per_second": 0.0, "data_wait": 0.0}, 5.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "  ".join(["step 3 (50%)", "loss 1.2500", *FACTS, "10 s left"])
    assert second == "step 4 (75%)  2 samples/s  data 0.0%  5 s left"


def test_sparkline():
    assert sparkline([1.0]) == "▁" and sparkline([2.0, 1.0, math.nan, 1.5]) == "█▁ ▅"
    assert sparkline([math.nan]) == ""
    assert len(sparkline([float(i) for i in range(30)])) == 15


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(7.123, "7.12"), (1234, "1.23k"), (5.6e6, "5.6M"), (2e9, "2G")])
def test_amount(number, text):
    assert amount(number) == text
