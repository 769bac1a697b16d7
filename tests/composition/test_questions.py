"""Questions of `tools/composition.py`: what they give away, and what its figures mean."""

import importlib.util
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fourm.composition.benchmark import read_questions
from fourm.data.shards import ShardDataset, write_shards


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools/composition.py"
    spec = importlib.util.spec_from_file_location("composition_tool", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiles(tool):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(120):
        tile = {name: rng.integers(0, 9, 8) for name in tool.ROWS}
        found.append(tile | {name: rng.integers(0, 5 if name == "zone" else tool.BINS, 1) for name in tool.FACTS})
    return found


def solve(tool, question: dict, tile: dict, shown: tuple[str, ...]) -> list[int]:
    """Options that agree with the facts that these modalities show of a tile."""
    facts = [name for each in shown for name in tool.OWN[each] if name in question["options"][0]]
    return [i for i, each in enumerate(question["options"]) if all(each[name] == [tile[name][0]] for name in facts)]


@pytest.mark.parametrize(
    ("given", "left"),
    [(("tok_rgb",), {(): 4, ("tok_rgb",): 1}),
     (("tok_rgb", "turbidity"), {(): 4, ("tok_rgb",): 2, ("turbidity",): 2, ("tok_rgb", "turbidity"): 1}),
     (("tok_rgb", "tok_relief", "turbidity"), {(): 8, ("tok_relief",): 4, ("tok_rgb", "turbidity"): 2,
                                               ("tok_rgb", "tok_relief", "turbidity"): 1})],
)  # fmt: skip
def test_all_of_the_modalities_are_needed(tool, tiles, given, left):
    questions = tool.Quiz(tiles, seed=3).ask(given)
    assert len(questions) == tool.QUESTIONS
    assert questions == tool.Quiz(tiles, seed=3).ask(given) != tool.Quiz(tiles, 4).ask(given)
    for question in questions:
        (tile,) = (tile for tile in tiles if all(question["given"][name] == tile[name].tolist() for name in given))
        assert set(question["options"][0]) == {fact for name in given for fact in tool.OWN[name]}
        for shown, count in left.items():
            found = solve(tool, question, tile, shown)
            assert len(found) == count and question["answer"] in found
        right = question["options"][question["answer"]]
        pairs = (
            itertools.combinations(question["options"], 2)
            if len(given) == 1
            else ((each, right) for each in question["options"])
        )
        for one, other in pairs:  # crossed ones are right in some facts
            assert all((len(given) > 1 and one[name] == other[name]) or abs(one[name][0] - other[name][0]) >= tool.APART
                       for name in one if one is not other)  # fmt: skip
    answers = np.bincount([question["answer"] for question in questions])
    assert answers.min() > 0.6 * len(questions) / len(answers)


def test_what_is_common_is_not_right_more_often(tool, tiles, monkeypatch):
    """Of skewed climates, each is the right one in a quarter of the questions that offer it."""
    skewed = [tile | {"zone": np.array([0 if i % 2 else tile["zone"][0]])} for i, tile in enumerate(tiles)]
    monkeypatch.setattr(tool, "QUESTIONS", 4000)
    questions = tool.Quiz(skewed, seed=0).ask(["tok_rgb", "turbidity"], ["climate"])
    assert {each["kind"] for each in questions} == {"climate of tok_rgb turbidity"}
    zones = np.array([[each["zone"][0] for each in question["options"]] for question in questions])
    assert all(len(set(row)) == 4 for row in zones.tolist())
    right = np.array([row[question["answer"]] for row, question in zip(zones, questions, strict=True)])
    for zone in range(5):
        offered = (zones == zone).any(1).sum()
        assert abs((right == zone).sum() - offered / 4) < 4 * (offered * 3 / 16) ** 0.5
    tile = {tuple(each["tok_rgb"].tolist()): each["zone"][0] for each in skewed}
    assert right.tolist() == [tile[tuple(question["given"]["tok_rgb"])] for question in questions]


def test_tiles_that_are_all_alike_are_refused(tool, tiles, monkeypatch):
    monkeypatch.setattr(tool, "TRIES", 50)
    with pytest.raises(ValueError, match=r"of 50 draws of 4 tiles, none differ clearly in \[\('mean_turbidity',\)"):
        tool.Quiz([tile | {"mean_turbidity": np.array([3])} for tile in tiles], seed=0).ask(["turbidity"])


def test_questions_are_read_as_they_are_written(tool, tiles, tmp_path):
    questions = tool.Quiz(tiles, seed=0).everything()
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    assert read_questions(tmp_path / "questions.jsonl") == questions
    kinds = {each["kind"] for each in questions}
    assert len(kinds) == 23 and {"water", "tok_relief climate", "climate of tok_rgb tok_relief turbidity"} <= kinds


def test_numbers_are_cut_at_equal_shares_of_the_training_tiles(tool):
    numbers = {name: np.arange(160.0) for name in tool.FACTS}
    found = tool.binned(numbers, numbers)
    assert np.bincount(found["brightness"]).tolist() == [10] * 16 and (np.diff(found["brightness"]) >= 0).all()
    assert found["zone"].tolist() == list(range(160))
    other = tool.binned({name: np.array([-5.0, 500.0]) for name in tool.FACTS}, numbers)
    assert other["ruggedness_m"].tolist() == [0, 15]


@pytest.fixture
def demo(tool, tmp_path):
    """Data and tokens of three tiles a split: tile i has i as its brightness and first id."""
    climate = np.full((4, 4), tool.OCEAN, dtype=np.uint8)
    climate[0, :3], climate[1, :2] = 5, 7
    water = np.zeros((4, 4), dtype=np.uint8)
    water[0] = 1  # so that of land class 7 is the commonest that is not ocean
    for split in tool.SPLITS:
        metadata = [{name: float(i) for name in tool.FACTS if name != "zone"} for i in range(3)]
        raw = ({"__key__": f"{i}", "climate": climate, "water": water, "metadata": metadata[i]} for i in range(3))
        write_shards(tmp_path / "demo/data", split, raw, 2)
        ids = ({"__key__": f"{i}"} | {name: np.full(4, i, np.int16) for name in tool.ROWS} for i in range(3))
        write_shards(tmp_path / "demo/tokens", split, ids, 2)
    return tmp_path / "demo"


def test_tiles_get_their_own_facts(tool, demo, tmp_path):
    for _ in range(2):  # the second time all is there
        tool.prepare(demo, tmp_path / "made")
    for split in tool.SPLITS:
        tiles = ShardDataset(tmp_path / "made" / split, [*tool.ROWS, *tool.FACTS])
        assert len(tiles) == 3
        for i in range(3):
            assert tiles[i]["zone"].tolist() == [7] and tiles[i]["tok_rgb"].tolist() == [i] * 4
            assert tiles[i]["brightness"].tolist() == [(0, 7, 15)[i]]  # of 15 cuts between 0 and 2, 7 are below 1


def test_tiles_that_do_not_belong_together_are_refused(tool, demo, tmp_path):
    tool.prepare(demo, tmp_path / "made")
    ids = ({"__key__": f"{i}"} | {name: np.full(4, i, np.int16) for name in tool.ROWS} for i in (0, 2, 3))
    shutil.rmtree(demo / "tokens/val")
    write_shards(demo / "tokens", "val", ids, 2)
    with pytest.raises(ValueError, match="made was made with another from; use another folder"):
        tool.prepare(demo, tmp_path / "made")
    with pytest.raises(ValueError, match=r"val and .*val differ: 3 and 3 tiles, or others"):
        tool.prepare(demo, tmp_path / "other")
    assert not (tmp_path / "other/val").exists()


def test_a_split_is_whole_or_absent(tool, demo, tmp_path, monkeypatch):
    whole = tool.joined

    def broken(*given):
        yield from itertools.islice(whole(*given), 2)
        raise OSError("full")

    monkeypatch.setattr(tool, "joined", broken)
    with pytest.raises(OSError, match="full"):
        tool.prepare(demo, tmp_path / "made")
    assert not (tmp_path / "made/train").exists()
    monkeypatch.setattr(tool, "joined", whole)
    tool.prepare(demo, tmp_path / "made")
    assert sorted(each.name for each in (tmp_path / "made").iterdir()) == ["made.json", "test", "train", "val"]


def test_no_branch_sees_two_added_modalities(tool):
    for name in tool.ADDED:
        for _, given, asked in tool.branch_ways(name):
            assert not {*given, *asked} & set(tool.ADDED) - {name}
    assert not any({*given, *asked} & set(tool.ADDED) for _, given, asked in tool.base_ways())


def test_folders_of_other_settings_are_refused(tool, demo, tmp_path, monkeypatch):
    tool.prepare(demo, tmp_path / "tokens")
    record = tmp_path / "run/settings.json"
    for _ in range(2):
        tool.check(record, tool.settings(tmp_path / "tokens"))
    monkeypatch.setitem(tool.JOINT, "steps", 800)
    with pytest.raises(ValueError, match="run was made with another joint; use another"):
        tool.check(record, tool.settings(tmp_path / "tokens"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "figures.json").touch()
    with pytest.raises(ValueError, match="was made with another apart, base, branch"):
        tool.check(tmp_path / "old/settings.json", tool.settings(tmp_path / "tokens"))


def test_intervals_and_what_is_kept(tool):
    found = tool.interval([1.0, 2.0, 3.0, 4.0, 5.0])  # 2.776 is in any table of Student's t
    assert found["std"] == pytest.approx(2.5**0.5)
    assert [found["high"] - 3, 3 - found["low"]] == pytest.approx([2.776 * (2.5 / 5) ** 0.5] * 2, abs=1e-3)
    assert "low" not in tool.interval([1.0])

    def cell(value):
        return {"all": {"accuracy": value}}

    def seen(value, **shown):
        return cell(value) | {f"only {name}": {"accuracy": each} for name, each in shown.items()}

    names = ["tok_rgb tok_relief", "tok_rgb turbidity", "tok_relief turbidity"]
    accuracy = {}
    for kind, more in (("lora", 0), ("damc", 5)):
        for name in tool.ADDED:
            accuracy[f"{kind} {name}"] = {name: cell(80.0)}
            for place, pair in enumerate(names):
                if name in pair:
                    accuracy[f"{kind} {name}"][pair] = {f"only {name}": {"accuracy": 40.0 + 10 * place + more}}
            for several in ("tok_rgb tok_relief turbidity", "climate of tok_rgb tok_relief turbidity"):
                accuracy[f"{kind} {name}"][several] = {f"only {name}": {"accuracy": 30.0 + len(name)}}
            for pair in names:
                accuracy[f"{kind} {name}"][f"climate of {pair}"] = {f"only {name}": {"accuracy": 33.0}}
    accuracy["naive"] = {name: cell(value) for name, value in zip(tool.ADDED, (80.0, 60.0, 40.0), strict=True)}
    accuracy["naive"] |= {pair: seen(90.0, **dict.fromkeys(pair.split(), 50.0)) for pair in names}
    accuracy["naive"]["tok_rgb water"] = cell(70.0)
    found = tool.of_seed({"accuracy": accuracy})
    row = found["naive"]
    assert [row["kept"], row["kept, least"]] == pytest.approx([75, 50])
    above = [row["kept above chance"], row["kept above chance, least"]]
    assert above == pytest.approx([100 * (55 + 35 + 15) / 165, 100 * 15 / 55])
    assert row["two added"] == 90 and row["two added, one shown"] == 50
    assert "added and anchor" not in row and "two added" not in found["lora tok_rgb"]  # of some kinds only
    best = {"two added": 55, "three added": 40, "climate, two": 33, "climate, three": 40}
    assert found["best branch"] == best


def test_branches_that_are_not_composed(tool, tiles, monkeypatch):
    """Each knows its own facts of a tile but is wrong about those of others: together they know all."""
    questions = [each for each in tool.Quiz(tiles, seed=0).everything() if not each["kind"].startswith("climate")]

    def nats(name, asked):
        found = []
        for question in asked:
            assert list(question["given"]) == [name]
            (tile,) = (tile for tile in tiles if tile[name].tolist() == question["given"][name])
            facts = tool.OWN[name]
            assert all(set(option) == set(facts) for option in question["options"])
            found.append([sum(abs(option[fact][0] - int(tile[fact][0])) for fact in facts)
                          for option in question["options"]])  # fmt: skip
        return np.array(found)

    monkeypatch.setattr(tool, "option_nats", nats)
    found = tool.apart({name: name for name in tool.ADDED}, questions)
    assert len(found) == 4 and all(cell["all"]["accuracy"] == 100 for cell in found.values())


def test_the_recipe_of_a_branch_is_what_is_measured(tool):
    configs = Path(__file__).parents[2] / "configs"
    recipe = yaml.safe_load((configs / "train/earth-branch.yaml").read_text())
    assert recipe["masking"] == tool.masking(*tool.branch_ways("tok_rgb"))
    assert recipe["model"] == tool.MODEL and {key: recipe[key] for key in tool.BRANCH} == tool.BRANCH
    assert recipe["lora"] == tool.LORA | {"decoupled": ["tok_rgb"]}
    assert yaml.safe_load((configs / "modalities/earth-facts.yaml").read_text()) == tool.table(["tok_rgb"])


def test_what_is_printed_and_drawn(tool, tmp_path, monkeypatch):
    """Two seeds with made-up abilities."""

    def rows(seed):
        level = dict.fromkeys((*tool.COMPARED, "kept above chance"), 80.0)
        found = {name: {column: value - number + seed for column, value in level.items()}
                 for number, name in enumerate(("base", "joint", *tool.METHODS, "damc", "damc searched"))}  # fmt: skip
        branches = {f"{way} {name}": {f"{name} alone": 90.0} for way in ("lora", "damc") for name in tool.ADDED}
        best = {column: 60.0 + 10 * seed for column in ("two added", "three added", "climate, three")}
        return found | branches | {"apart": {"two added": 75.0, "three added": 70.0}, "best branch": best}

    row = {"parameters": 10, "seconds": 1.0}
    cost = [{"branches": number, "naive": row, "damc": row} for number in range(4)]
    made = {"cost": cost, "search": {"weights": dict.fromkeys(tool.ADDED, 1 / 3)}}

    def one_seed(folder, seed):
        folder.mkdir()
        for name in ("interference", "weights"):
            Image.new("RGB", (1 + seed, 2)).save(folder / f"{name}.png")
        return made | {"seed": seed}

    monkeypatch.setattr(tool, "one_seed", one_seed)
    monkeypatch.setattr(tool, "of_seed", lambda figures: rows(figures["seed"]))
    monkeypatch.setattr(tool, "prepare", lambda demo, root: None)
    monkeypatch.setattr(sys, "argv", ["composition.py", "--folder", str(tmp_path), "--seeds", "0", "1"])
    tool.main()
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["differences"]["damc less best branch: two added"]["seeds"] == [72 - 60, 73 - 70]
    assert found["differences"]["damc less naive: added, one"]["mean"] == -6
    assert "convert less naive: kept" in found["differences"] and "damc less naive: kept" not in found["differences"]
    assert found["summary"]["damc"]["climate, three"]["seeds"] == [72, 73] and found["protocol"][-1] != "."
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("accuracy.png", "cost.png"))
    assert Image.open(tmp_path / "weights-of-seed-0.png").size == (1, 2)
    page = (tmp_path / "report.html").read_text()
    assert "<td>damc less naive: added, one</td><td>-6.0</td>" in page and "<td>three added</td><td>12.5</td>" in page
