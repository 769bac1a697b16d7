"""Alt-MoE: losses by torch and by hand, schedules, extension, expert loads, the store ahead, and the verb."""

import dataclasses
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score
from sklearn.neighbors import NearestNeighbors

from fourm import cli
from fourm.evaluation.results import write_results
from fourm.stitching import ahead
from fourm.stitching.ahead import Store, latency
from fourm.stitching.altmoe import (
    LOSSES,
    Directions,
    Method,
    Predictor,
    all_ways,
    evaluate,
    extend,
    gradient_cosines,
    loads,
    taught,
    train_one,
)
from fourm.stitching.encoders import latents, load
from fourm.stitching.latents import Source
from fourm.stitching.pairs import SampleLoader, Samples
from fourm.training.optim import OptimConfig
from fourm.training.trainer import TrainConfig
from fourm.verbs import stitch_altmoe

ROOT = Path(__file__).parents[2]
WIDTHS = {"a": 8, "b": 6, "c": 7}
SMALL = Method(hidden=16, experts=4, dropout=0.0)
TRAIN = TrainConfig(steps=12, batch_size=16, eval_every=4, save_every=4, log_every=0, spike_sigma=0, precision="fp32",
                    optim=OptimConfig(lr=0.01, warmup=2))  # fmt: skip


def items(n, seed=0, noise=0.3):
    """Three views of the same five factors."""
    rng, views = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    factors = torch.randn(n, 5, generator=rng)
    return Samples(
        {
            side: 3 + factors @ torch.randn(5, width, generator=views) + noise * torch.randn(n, width, generator=rng)
            for side, width in WIDTHS.items()
        },
        [f"{seed}-{i}" for i in range(n)],
    )


SPLITS = {"train": items(60), "val": items(20, 1), "test": items(20, 2)}


def predictor(method=SMALL, sides="ab", ways=None):
    torch.manual_seed(0)
    model = Predictor({side: WIDTHS[side] for side in sides}, ways or all_ways(list(sides)), method)
    return model.fit_scale({side: SPLITS["train"].sides[side] for side in sides})


def batch(step=0, n=16):
    found = next(SampleLoader(SPLITS["train"], n, 0).batches(step))
    return found | {"sides": {side: found["sides"][side] for side in "ab"}}


@pytest.mark.parametrize("dense", [0, 2])
def test_the_loss_is_that_of_the_paper(dense):
    method = dataclasses.replace(SMALL, dense=dense, alpha=0.3, balance=0.1, temperature=0.2, schedule="joint")
    model, some = predictor(method), batch()
    task = Directions(model, method, ["b>a"])
    counts = task.counts(some)
    assert counts.tolist() == [16]
    z = {side: (v - SPLITS["train"].sides[side].mean(0)) / SPLITS["train"].sides[side].std(0)
         for side, v in some["sides"].items()}  # fmt: skip
    h = F.gelu(model.enter["b"](z["b"] + model.way["b>a"]))
    parts = []
    for number in (0, 1):
        x = h + model.loss_type[number]
        if dense:
            out = model.experts(x)
        else:  # every expert sees everything, and all but the two best count nothing
            chances = model.experts.gate(x).softmax(1)
            kept = chances * (chances >= chances.topk(2).values[:, -1:])
            kept = kept / kept.sum(1, keepdim=True)
            out = sum(expert(x) * kept[:, [i]] for i, expert in enumerate(model.experts.experts))
            parts.append((kept > 0, chances))
        parts.append(x + F.gelu(model.norm(out)))
    routed, (contrastive, regression) = ([], parts) if dense else (parts[::2], parts[1::2])
    query = F.normalize(model.contrastive["b>a"](contrastive), dim=1)
    logits = query @ F.normalize(model.projection["a"](z["a"]), dim=1).T / 0.2
    ways = [F.cross_entropy(each, torch.arange(16)) for each in (logits, logits.T)]
    expected = 0.3 * F.smooth_l1_loss(model.regression["b>a"](regression), z["a"]) + 0.7 * sum(ways) / 2
    if routed:
        share, chance = (torch.cat(each).float().mean(0) for each in zip(*routed, strict=True))
        expected = expected + 0.1 * 4 * (share / 2 * chance).sum()
    torch.testing.assert_close(task.loss(some, counts)["loss"], expected)
    torch.testing.assert_close(task.loss(some, 2 * counts)["loss"], expected / 2)
    both = Directions(model, method, all_ways("ab")).loss(some, counts)
    alone = Directions(model, method, ["a>b"]).loss(some, counts)["loss"]
    torch.testing.assert_close(both["loss"], (expected + alone) / 2)
    torch.testing.assert_close(both["b>a"], sum(ways) / 2)


def test_schedules_depend_on_the_step_alone():
    ways, even = ["x", "y", "z"], torch.ones(3)
    turns = Method(steps_per_direction=2)
    assert [taught(turns, ways, step, 0.5, even)[0] for step in range(8)] == list("xxyyzzxx")
    assert taught(Method(schedule="joint"), ways, 5, 0.5, even) == ways
    drawn = Method(schedule="probabilistic")
    found = [taught(drawn, ways, 0, draw, torch.tensor([1.0, 2.0, 1.0]))[0] for draw in np.arange(0, 1, 0.125)]
    assert found == list("xxyyyyzz")
    with pytest.raises(ValueError, match="allowed are alternate, joint, probabilistic"):
        taught(Method(schedule="both"), ways, 0, 0.5, even)
    first = list(zip(range(5), SampleLoader(SPLITS["train"], 4, 1).batches(0), strict=False))[4][1]
    again = next(SampleLoader(SPLITS["train"], 4, 1).batches(4))
    assert first["keys"] == again["keys"] and first["draw"] == again["draw"] and first["step"] == again["step"] == 4


def test_alternation_teaches_both_directions_and_one_leaves_the_other_at_chance(tmp_path):
    method = dataclasses.replace(SMALL, gradients=3)
    both = train_one(predictor(), method, all_ways("ab"), SPLITS, TRAIN, tmp_path / "both")
    first = {way: np.mean(np.array(ranks) < 1) for way, ranks in both["ranks"].items()}
    assert both["updates"] == 72 and min(first.values()) > 0.4
    one = train_one(predictor(), method, ["a>b"], SPLITS, TRAIN, tmp_path / "one")
    assert one["updates"] == 36 and np.mean(np.array(one["ranks"]["a>b"]) < 1) > 0.4
    assert np.mean(np.array(one["ranks"]["b>a"]) < 1) < 0.25  # chance is 0.05
    assert [each["step"] for each in both["course"]] == list(range(8, 73, 8))
    loaded = Predictor.load(tmp_path / "both/model")
    assert evaluate(loaded, SPLITS["test"], ["b>a"])["b>a"].tolist() == both["ranks"]["b>a"]
    with pytest.raises(ValueError, match="holds no predictor"):
        Predictor.load(tmp_path)


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    method = dataclasses.replace(SMALL, schedule="probabilistic", dropout=0.1)
    model = predictor(method)
    whole = train_one(model, method, all_ways("ab"), SPLITS, TRAIN, tmp_path / "whole")
    assert not torch.equal(model.difficulty, torch.ones(2))
    loss, calls = Directions.loss, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Directions, "loss", dies)
        train_one(predictor(method), method, all_ways("ab"), SPLITS, TRAIN, tmp_path / "killed")
    again = train_one(predictor(method), method, all_ways("ab"), SPLITS, TRAIN, tmp_path / "killed")
    assert again["ranks"] == whole["ranks"] and again["course"] == whole["course"] and again["step"] == whole["step"]
    monkeypatch.setattr(Directions, "loss", None)  # what is done is not done again
    third = predictor(method)
    assert train_one(third, method, all_ways("ab"), SPLITS, TRAIN, tmp_path / "killed") == again
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), model.parameters(), strict=True))


def test_best_weights_of_a_killed_run_with_other_settings_are_not_taken(tmp_path, monkeypatch):
    seldom = dataclasses.replace(TRAIN, save_every=0)
    other = dataclasses.replace(seldom, optim=OptimConfig(lr=1e-3, warmup=2))
    whole = train_one(predictor(), SMALL, all_ways("ab"), SPLITS, other, tmp_path / "whole")
    loss = Directions.loss

    def dies(self, batch, counts):
        if batch["step"] == 20:  # after two measurements
            raise KeyboardInterrupt
        return loss(self, batch, counts)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Directions, "loss", dies)
        train_one(predictor(), SMALL, all_ways("ab"), SPLITS, seldom, tmp_path / "killed")
    assert len(list((tmp_path / "killed/best").iterdir())) == 1
    again = train_one(predictor(), SMALL, all_ways("ab"), SPLITS, other, tmp_path / "killed")
    assert again["ranks"] == whole["ranks"] and again["score"] == whole["score"] and again["step"] == whole["step"]


def test_latents_go_to_the_device_of_the_model_and_a_trained_one_comes_back(tmp_path, monkeypatch):
    model = predictor(dataclasses.replace(SMALL, dense=2)).to("meta")  # numbers of other devices are refused by it
    assert {each.device.type for each in evaluate(model, SPLITS["test"], model.directions).values()} == {"meta"}
    assert model.items("b", SPLITS["test"].sides["b"]).device.type == "meta"
    called, cpu = [], Predictor.cpu
    monkeypatch.setattr(Predictor, "cpu", lambda self: called.append(1) or cpu(self))
    train_one(predictor(), SMALL, ["a>b"], SPLITS, TRAIN, tmp_path)
    assert called


def test_a_new_side_leaves_the_old_ones_as_they_are(tmp_path):
    model, test = predictor(), SPLITS["test"]
    train_one(model, SMALL, all_ways("ab"), SPLITS, TRAIN, tmp_path / "base")
    before, old = evaluate(model, test, model.directions), {k: v.clone() for k, v in model.state_dict().items()}
    larger = extend(model, {"c": SPLITS["train"].sides["c"]})
    assert larger.directions[:2] == model.directions and set(larger.directions[2:]) == {"a>c", "c>a", "b>c", "c>b"}
    method = dataclasses.replace(SMALL, gradients=2)
    found = train_one(larger, method, larger.directions[2:], SPLITS, TRAIN, tmp_path / "more")
    for name, tensor in old.items():
        assert torch.equal(larger.state_dict()[name][: len(tensor)], tensor), name
    assert all(found["ranks"][way] == ranks.tolist() for way, ranks in before.items())
    assert np.mean([np.array(found["ranks"][way]) < 1 for way in larger.directions[2:]]) > 0.25  # chance is 0.05
    assert larger.item_weights("a") == model.item_weights("a") != larger.item_weights("c")
    with pytest.raises(ValueError, match="direction is 'a>d', allowed are a>b, b>a"):
        model.query("a>d", test.sides["a"])


def test_expert_loads_by_hand_and_by_sklearn():
    model = predictor()
    with torch.no_grad():  # contrastive copies go to experts 0 and 1 or to 2 and 3 by direction, others to 0 and 1
        model.loss_type.zero_()
        model.loss_type[1, 0] = 1000
        for name in ("a>b", "b>a"):
            model.way[name].zero_()
        for side, sign in (("a", 1), ("b", -1)):
            model.enter[side].weight.zero_()
            model.enter[side].bias.zero_()
            model.enter[side].bias[1] = 5 if sign > 0 else 0
        model.experts.gate.weight.zero_()
        model.experts.gate.bias.copy_(torch.tensor([0.0, 0, 1, 1]))
        model.experts.gate.weight[:2, :2] = 1
    found = loads(model, SPLITS["test"])
    contrastive, regression = (found[loss] for loss in LOSSES)
    assert contrastive["load"] == {"a>b": [0.5, 0.5, 0, 0], "b>a": [0, 0, 0.5, 0.5]}
    assert contrastive["under_1_percent"] == {"a>b": 2, "b>a": 2} and found["dead"] == 0
    assert np.isclose(contrastive["entropy"]["a>b"], 0.5) and np.isclose(contrastive["information"], 1)
    assert np.isclose(regression["information"], 0) and regression["load"]["b>a"] == [0.5, 0.5, 0, 0]

    model, chosen, ways = predictor(), [], []
    for number, way in enumerate(model.directions):
        model.query(way, SPLITS["test"].sides[way[0]])
        chosen += model.experts.routing.experts.flatten().tolist()
        ways += [number] * 40
    expected = mutual_info_score(ways, chosen) / np.log(2)
    assert np.isclose(loads(model, SPLITS["test"])["contrastive"]["information"], expected) and expected > 0


def test_gradient_cosines_are_those_of_two_backward_passes():
    model, some, flat = predictor(), batch(), []
    for way in ("a>b", "b>a"):
        model.zero_grad()
        task = Directions(model, SMALL, [way])
        task.loss(some, task.counts(some))["loss"].backward()
        shared = [p for name, p in model.named_parameters() if name.startswith(("experts", "norm", "loss_type"))]
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in shared]
        flat.append(torch.cat([part.flatten() for part in parts]).numpy())
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert np.isclose(gradient_cosines(model, SMALL, some)["a>b | b>a"], expected, atol=1e-5)


def test_stored_items_are_found_as_unstored_ones_are(tmp_path):
    model, test = predictor().eval(), SPLITS["test"]
    store = Store(tmp_path / "b", model, "b")
    store.add(test.sides["b"][:15], test.ids[:15])
    before = (tmp_path / "b/items.f32").read_bytes()
    with (tmp_path / "b/items.f32").open("ab") as file:
        file.write(b"left by a kill")
    store.add(test.sides["b"][15:], test.ids[15:])
    assert (tmp_path / "b/items.f32").read_bytes()[: len(before)] == before
    again = Store(tmp_path / "b", model, "b")
    assert again.ids == test.ids and again.items.shape == (20, 16)
    cosines, found = again.search("a", test.sides["a"], 4)
    with torch.no_grad():
        reference = NearestNeighbors(n_neighbors=4, metric="cosine").fit(model.items("b", test.sides["b"]).numpy())
        distances, expected = reference.kneighbors(model.query("a>b", test.sides["a"]).numpy())
    np.testing.assert_allclose(1 - distances, cosines, atol=1e-5)
    assert np.array_equal(expected, found)
    extended = extend(model, {"c": SPLITS["train"].sides["c"]})
    assert Store(tmp_path / "b", extended, "b").search("c", test.sides["c"], 4)[1].shape == (20, 4)
    with torch.no_grad():
        model.projection["b"].bias[0] += 1
    with pytest.raises(ValueError, match=r"was made with weights \w+; asked for is weights"):
        Store(tmp_path / "b", model, "b")
    with pytest.raises(ValueError, match="expected one line for each"):
        again.add(test.sides["b"][:2], ["one"])


def test_half_a_name_that_a_kill_left_is_not_one(tmp_path):
    model, test = predictor().eval(), SPLITS["test"]
    Store(tmp_path, model, "b").add(test.sides["b"][:3], test.ids[:3])
    with (tmp_path / "ids.txt").open("a") as file:
        file.write("half a na")
    store = Store(tmp_path, model, "b")
    assert store.ids == test.ids[:3]
    store.add(test.sides["b"][:1], ["after"])
    again = Store(tmp_path, model, "b")
    assert again.ids == [*test.ids[:3], "after"] and np.allclose(again.items[0], again.items[3])


def test_latency_compares_both_paths(tmp_path):
    model, z = predictor().eval(), SPLITS["test"].sides
    found = latency(model, "a>b", z["a"], z["b"], 50, tmp_path / "store")
    assert found["same_answers"] == 1 and 0 < found["p50_ms"] <= found["p95_ms"] and found["queries"] == 20
    assert (tmp_path / "store/ids.txt").read_text().split() == [str(i) for i in range(50)]


def test_the_verb_compares_and_extends(tmp_path, capsys, monkeypatch):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for i in range(count):
            colour = rng.integers(0, 256, 3)
            for modality in ("rgb", "small", "grey"):
                (tmp_path / "data" / split / modality).mkdir(parents=True, exist_ok=True)
                pixels = (colour + rng.integers(-5, 6, (4, 4, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / modality / f"{i}.png")
    monkeypatch.setitem(__import__("sys").modules, "tests_colours", __import__("types").SimpleNamespace(means=colours))
    side = '{modality: %s, encoder: "tests_colours:means", pooling: mean}'
    (tmp_path / "config.yaml").write_text(
        f"folder: {tmp_path}/run\ndata: {tmp_path}/data\nlatents: {tmp_path}/latents\n"
        f"sides: {{rgb: {side % 'rgb'}, small: {side % 'small'}}}\nadded: {{grey: {side % 'grey'}}}\n"
        "arms: {alternate: {hidden: 8}, one: {hidden: 8, directions: [rgb>small]}, mlp: {hidden: 8, dense: 2}}\n"
        "seeds: [3, 4]\nsizes: [9]\nsteps: 3\nbatch_size: 6\neval_every: 2\nsave_every: 0\nlog_every: 0\n"
        "precision: fp32\n"
    )
    cli.main(["stitch", "altmoe", "--config", str(tmp_path / "config.yaml")])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(metrics["arms"]) == ["alternate", "one", "mlp", "extended", "alternate, all sides"]
    runs = [json.loads((tmp_path / f"run/runs/one/{seed}/result.json").read_text()) for seed in (3, 4)]
    ours, theirs = (
        np.mean([np.array(json.loads((tmp_path / f"run/runs/{arm}/{seed}/result.json").read_text())["ranks"][way]) < k
                 for seed in (3, 4) for way in ("rgb>small", "small>rgb") for k in (1, 5, 10)])
        for arm in ("alternate", "one")
    )  # fmt: skip
    expected = np.mean([np.array(run["ranks"]["small>rgb"]) < 5 for run in runs])
    assert np.isclose(metrics["arms"]["one"]["rgb, small"]["b_to_a/R@5"]["mean"], expected)
    assert np.isclose(metrics["differences"]["one"]["rgb, small"]["mean"]["difference"], ours - theirs)
    assert list(metrics["differences"]["one"]) == ["rgb, small", "rgb>small"]
    assert list(metrics["differences"]["alternate, all sides"]) == ["rgb, small", "rgb, grey", "small, grey"]
    assert set(metrics["differences"]) == {"one", "mlp", "alternate, all sides"}
    assert metrics["protocol"][-1] != "." and "same by construction" in metrics["protocol"]
    first, *_ = metrics["tables"]
    page = write_results(tmp_path / "run", tmp_path / "report.html", "Alt-MoE").read_text()
    assert first[2][0][:2] == ["alternate", "rgb, small"] and "<td>alternate</td><td>rgb, small</td>" in page
    assert "6 test items" in metrics["protocol"] and metrics["latency"]["9"]["same_answers"] == 1
    assert set(metrics["loads"]) == {"alternate", "one", "extended", "alternate, all sides"}
    assert all((tmp_path / "run" / name).stat().st_size > 5000 for name in ("comparison.png", "loads.png"))
    assert "alternate, all sides" in capsys.readouterr().out
    rows = textwrap.dedent(re.search(r"\n\n((?:    .+\n)+)", ahead.__doc__)[1])
    assert len(rows.splitlines()) == 5
    rows = rows.replace("runs/stitch/altmoe-emoji", f"{tmp_path}/run").replace("caption", "small")
    names = {"Predictor": Predictor, "Store": Store, "Source": Source, "load": load, "latents": latents}
    names["picture"] = np.asarray(Image.open(tmp_path / "data/test/small/2.png"))
    exec(rows.replace('"a red apple"', "picture"), names)
    stored = {path.stem for path in (tmp_path / "data/test/rgb").glob("*.png")}
    assert len(names["found"]) == 5 and set(names["found"]) < stored
    assert sorted(path.name for path in (tmp_path / "run/store").iterdir()) == ["grey", "rgb", "small"]
    dense = [
        "--arms",
        "{mlp: {hidden: 8, dense: 2}}",
        "--against",
        "mlp",
        "--scratch",
        "[]",
        "--added",
        "{}",
        "--seeds",
        "[3]",
    ]
    (tmp_path / "run/loads.png").unlink()
    cli.main(["stitch", "altmoe", "--config", str(tmp_path / "config.yaml"), *dense])  # nothing has experts
    assert not (tmp_path / "run/loads.png").exists()
    assert sorted(path.name for path in (tmp_path / "run/store").iterdir()) == ["rgb", "small"]
    with pytest.raises(ValueError, match="there are no arms other; allowed are alternate, one, mlp"):
        cli.main(["stitch", "altmoe", "--config", str(tmp_path / "config.yaml"), "--against", "other"])


def test_the_published_size_is_the_published_one():
    config = cli.read(stitch_altmoe.Config, ["--config", str(ROOT / "configs/stitch/altmoe-paper.yaml")])
    widths = {"rgb": 1024, "caption": 4096}  # DINOv2-Large, Llama-3-8B
    with torch.device("meta"):
        model = Predictor(widths, all_ways(widths), config.arms["alternate"])
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(count) == 141 and round(sum(p.numel() for p in model.experts.parameters()) / 1e6, 1) == 100.7


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/stitch/altmoe-*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read_and_say_how_they_are_run(path):
    config = cli.read(stitch_altmoe.Config, ["--config", str(path)], "stitch altmoe")
    assert config.against in config.arms and all(isinstance(method, Method) for method in config.arms.values())
    head = path.read_text()
    command = f"fourm stitch altmoe --config {path.relative_to(ROOT)}"
    assert command in head and "# Cost:" in head and "# Expected:" in head


def colours(images):
    return torch.from_numpy(np.stack(images)).float() / 255


colours.dim = 3
