"""A pipeline runs what is not done, and nothing twice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fourm import pipeline
from fourm.pipeline import PipelineConfig, Step


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(pipeline, "_call", lambda command, threads, children: made.append(command))
    return made


def test_done_steps_are_reused_until_something_before_them_changes(tmp_path, calls):
    settings = tmp_path / "a.yaml"
    settings.write_text("x: 1")
    config = PipelineConfig(
        str(tmp_path / "run"),
        [Step("one", [f"data --config {settings}", "data --root {folder}/b"], 2), Step("two", ["x"])],
    )
    pipeline.run(config)
    assert sorted(calls) == sorted([f"data --config {settings}", f"data --root {tmp_path}/run/b", "x"])
    pipeline.run(config)
    assert len(calls) == 3
    settings.write_text("x: 2")
    pipeline.run(config)
    assert len(calls) == 6
    assert set(pipeline.seconds(tmp_path / "run")) == {"one", "two"}


def test_a_failed_command_stops_the_pipeline_and_is_not_recorded(tmp_path):
    config = PipelineConfig(str(tmp_path), [Step("one", ["no-such-verb"]), Step("two", ["--help"])])
    with pytest.raises(ValueError, match="no-such-verb"):
        pipeline.run(config)
    assert pipeline.seconds(tmp_path) == {}


def test_a_step_that_fails_after_a_change_says_what_may_be_out_of_date(tmp_path, monkeypatch):
    def call(command, **_):
        if command == "b":
            raise ValueError("b failed")

    def run(first):
        pipeline.run(PipelineConfig(str(tmp_path), [Step("one", [first]), Step("two", ["b"])]))

    monkeypatch.setattr(pipeline, "_call", call)
    with pytest.raises(ValueError, match=r"^b failed$"):
        run("a")
    with pytest.raises(ValueError, match=r"(?s)b failed.*one.*steps/one.json.*'two'.* delete its output folder"):
        run("c")


WAITS = """
import os, signal, sys, time
def stop(*_):
    open(sys.argv[1] + ".saved", "w").write("x")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(30)
"""
RUN = """
import sys
from fourm import pipeline
pipeline.sys.executable = sys.argv[1]
steps = [pipeline.Step("one", ["a", "b", "c"], int(sys.argv[3])), pipeline.Step("two", ["d"])]
pipeline.run(pipeline.PipelineConfig(sys.argv[2], steps))
"""


def start(folder, jobs, script):
    """A pipeline whose commands are a shell script, where `$3` is the command's name."""
    command = folder / "python"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    run = [sys.executable, "-c", RUN, str(command), str(folder), str(jobs)]
    root = Path(__file__).parents[1]
    return subprocess.Popen(run, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True)


@pytest.mark.parametrize("whole", [True, False], ids=["group", "process"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_lets_what_runs_save_and_begins_nothing_else(tmp_path, jobs, whole):
    (tmp_path / "waits.py").write_text(WAITS)
    process = start(tmp_path, jobs, f"exec {sys.executable} {tmp_path}/waits.py {tmp_path}/$3")
    ready = 0
    while ready < jobs:
        ready += "ready" in process.stdout.readline()
    (os.killpg if whole else os.kill)(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 143 and "stopped" in said
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["a.saved", "b.saved"][:jobs]
    assert not list((tmp_path / "steps").iterdir())


def test_a_pipeline_outlives_the_reader_of_its_output(tmp_path):
    process = start(tmp_path, 1, "echo ready; echo again")
    process.stdout.close()
    assert process.wait(20) == 0
    assert json.loads((tmp_path / "steps/two.json").read_text())["commands"] == ["d"]
