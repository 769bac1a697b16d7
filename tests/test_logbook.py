import json
import sys

import pytest

from fourm.logbook import Logbook, amount, duration, read


def test_records_are_lines_of_json(tmp_path, capsys):
    with Logbook(tmp_path / "run") as logbook:
        logbook.write(1, {"loss": 0.1, "bad": float("nan"), "worse": -float("inf"), "name": "x"})
        logbook.say("hello")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": 0.1, "bad": "nan", "worse": "-inf", "name": "x"}
    assert capsys.readouterr().out == "hello\n"


def test_rewind_drops_what_will_be_made_again(tmp_path):
    logbook = Logbook(tmp_path)
    for step in (1, 2, 3):
        logbook.write(step, {"loss": step / 3})
    with logbook.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]
    logbook.rewind(2)
    logbook.write(3, {"loss": 1.5})
    assert [(record["step"], record["loss"]) for record in read(tmp_path)] == [(1, 1 / 3), (2, 2 / 3), (3, 1.5)]


def test_other_processes_are_silent(tmp_path, capsys):
    logbook = Logbook(tmp_path / "run", wandb="project", enabled=False)
    logbook.write(1, {"loss": 1.0})
    logbook.say("hello")
    logbook.rewind(0)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_missing_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install fourm\[wandb\]"):
        Logbook(tmp_path, wandb="project")


def test_wandb_gets_the_same_records(tmp_path, monkeypatch):
    class Fake:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *args, **kwargs: self.calls.append((name, args, kwargs)) or self

    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Logbook(tmp_path, wandb="project", config={"lr": 1}) as logbook:
        logbook.write(5, {"loss": 1.0})
    assert [name for name, _, _ in fake.calls] == ["init", "log", "finish"]
    assert fake.calls[0][2]["project"] == "project" and fake.calls[1][1:] == (({"loss": 1.0},), {"step": 5})


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(7.123, "7.12"), (1234, "1.23k"), (5.6e6, "5.6M"), (2e9, "2G")])
def test_amount(number, text):
    assert amount(number) == text
