"""A pipeline runs what is not done, and nothing twice."""

import pytest

from fourm import pipeline
from fourm.pipeline import PipelineConfig, Step


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(pipeline, "_call", lambda command, threads, console: made.append(command))
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
