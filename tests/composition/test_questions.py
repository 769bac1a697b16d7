"""Questions of `tools/composition.py`: what they give away, and what languages say."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools/composition.py"
    spec = importlib.util.spec_from_file_location("composition_tool", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def solve(question: dict, names: list[str]) -> list[int]:
    """Options that are among what these anchors describe."""
    described = [set(question["given"][name]) for name in names]
    return [i for i, ids in enumerate(question["options"]) if all(ids[0] in each for each in described)]


@pytest.mark.parametrize(
    ("names", "left"),
    [(["left", "middle"], {("left",): 2, ("middle",): 2, ("left", "middle"): 1}),
     (["left", "middle", "right"], {("left",): 3, ("left", "right"): 2, ("left", "middle", "right"): 1})],
)  # fmt: skip
def test_no_single_modality_can_tell(tool, names, left):
    questions = tool.World(seed=3).questions(names, 200, "test")
    for shown, count in left.items():
        found = [solve(question, list(shown)) for question in questions]
        assert all(len(each) == count for each in found)
        assert all(question["answer"] in each for question, each in zip(questions, found, strict=True))
    assert np.bincount([question["answer"] for question in questions]).min() > 30
    assert questions == tool.World(seed=3).questions(names, 200, "test")
    assert questions != tool.World(seed=3).questions(names, 200, "val")


def test_questions_about_one_thing(tool):
    world = tool.World(seed=3)
    questions = world.questions(["middle"], 50, "test")
    for question in questions:
        value = question["options"][question["answer"]][0]
        assert value in question["given"]["middle"] and value // world.values == question["given"]["question"][0]
        assert {ids[0] // world.values for ids in question["options"]} == {value // world.values}
        assert len({ids[0] for ids in question["options"]}) == 4
    answers = [sample["answer"].tolist() for sample in tool.training_samples(questions)]
    assert answers == [question["options"][question["answer"]] for question in questions]


def test_what_is_tested_was_never_shown(tool):
    """Combinations of values: of training things none, of test questions about one thing only those held out."""
    world = tool.World(seed=3)
    every = np.stack(np.meshgrid(*[np.arange(6)] * 4), -1).reshape(-1, 4)
    held_out = {tuple(each) for each in every[world.held_out(every)].tolist()}
    assert len(held_out) == 162

    def things(names, split, count):
        asked = world.questions(names, count, split)
        return {tuple((np.sort(each["given"][name]) % 6).tolist()) for each in asked for name in names}

    assert things(["left"], "test", 500) <= held_out
    for split in ("train", "val"):
        assert not things(["left"], split, 500) & held_out
        assert not things(["left", "middle", "right"], split, 500) & held_out
        said = world.translations("sound", 500, split)
        assert not {tuple((np.sort(each["left"]) % 6).tolist()) for each in said} & held_out
    assert things(["left", "middle"], "test", 500) & held_out  # of two things any


def test_folders_of_other_settings_are_refused(tool, tmp_path, monkeypatch):
    tool.settle(tmp_path / "run", tool.World(seed=3))
    tool.settle(tmp_path / "run", tool.World(seed=3))
    monkeypatch.setitem(tool.BRANCH, "steps", 800)
    with pytest.raises(ValueError, match="run was made with another branch; use another"):
        tool.settle(tmp_path / "run", tool.World(seed=3))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "figures.json").touch()
    with pytest.raises(ValueError, match="was made with another base, branch, common"):
        tool.settle(tmp_path / "old", tool.World(seed=3))


def test_a_split_is_whole_or_absent(tool, tmp_path):
    samples = tool.training_samples(tool.World(seed=3).questions(["left"], 3, "val"))

    def broken():
        yield from [samples[0]] * 4096  # a shard
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        tool.write_samples(tmp_path, "val", broken())
    assert not (tmp_path / "val").exists()
    tool.write_samples(tmp_path, "val", samples)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["val"]


def test_intervals_and_what_is_kept(tool):
    found = tool.interval([1.0, 2.0, 3.0, 4.0, 5.0])  # 2.776 is in any table of Student's t
    assert found["std"] == pytest.approx(2.5**0.5)
    assert [found["high"] - 3, 3 - found["low"]] == pytest.approx([2.776 * (2.5 / 5) ** 0.5] * 2, abs=1e-3)
    assert "low" not in tool.interval([1.0])

    def cell(value):
        return {"all": {"accuracy": value}}

    names = tool.World.added
    accuracy = {f"{kind} {name}": {name: cell(80.0)} for kind in ("lora", "damc") for name in names}
    accuracy["naive"] = {name: cell(value) for name, value in zip(names, (80.0, 60.0, 40.0), strict=True)}
    accuracy["naive"]["sound left"] = cell(70.0)
    row = tool.of_seed({"accuracy": accuracy}, tool.World())["naive"]
    kept = [row[f"kept{label}"] for label in ("", ", least", ", sound", ", touch", ", smell")]
    assert kept == pytest.approx([75, 50, 100, 75, 50]) and row["added and anchor"] == 70


def test_a_language_says_what_anchors_say(tool):
    world, ids = tool.World(noise=0.0, values=4), np.arange(16).reshape(4, 4)
    said = [world.say("sound", ids, np.random.default_rng(seed)).reshape(-1, 2) for seed in range(30)]
    words = [{tuple(each[i]) for each in said} for i in range(16)]
    assert all(len(each) == 2 for each in words) and len(set.union(*words)) == 32  # synonyms, no homonyms
    other = world.say("smell", ids, np.random.default_rng(0))
    assert not np.array_equal(other, said[0].reshape(4, -1))
    sample = world.translations("sound", 1, "train")[0]
    pairs = map(tuple, sample["sound"].reshape(-1, 2))
    assert all(pair in words[value] for pair, value in zip(pairs, sample["left"], strict=True))
