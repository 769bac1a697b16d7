"""FuseMix: losses, mixtures and baselines by hand and against torch and numpy; selection; the verbs on a small set."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

from fourm import cli
from fourm.checkpoint import latest
from fourm.evaluation.retrieval import both_ways
from fourm.model.connectors import Connector, ConnectorConfig
from fourm.stitching.baselines import asif, choose, ridge
from fourm.stitching.curve import AdapterConfig, CurveConfig, draw, measure, train_one
from fourm.stitching.fusemix import Augmentation, Contrastive, augment, evaluate, structure_loss
from fourm.stitching.latents import Source
from fourm.stitching.pairs import PairsConfig, Samples, choose_layers
from fourm.stitching.runs import Best
from fourm.stitching.space import SharedSpace, info_nce
from fourm.stitching.teacher import open_side
from fourm.training.optim import OptimConfig
from fourm.training.trainer import TrainConfig
from fourm.verbs import stitch_fusemix
from fourm.verbs.stitch_retrieve import read_query

ROOT = Path(__file__).parents[2]


def pairs(n, seed=0, noise=0.5):
    """Two views of the same five factors."""
    rng, views = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    factors, a, b = torch.randn(n, 5, generator=rng), *(torch.randn(5, 8, generator=views) for _ in range(2))
    sides = [factors @ view + noise * torch.randn(n, 8, generator=rng) for view in (a, b)]
    return Samples(dict(zip("ab", sides, strict=True)), [f"{seed}-{i}" for i in range(n)])


def space(dim=6):
    torch.manual_seed(0)
    return SharedSpace(
        {side: Connector(ConnectorConfig(kind="mlp", input_dim=8, output_dim=dim, hidden=16)) for side in "ab"}
    )


class AsTheyAre:
    temperature = torch.tensor(1.0)

    def __call__(self, side, z):
        return z


TRAIN = TrainConfig(steps=12, batch_size=8, eval_every=4, save_every=4, log_every=0, spike_sigma=0, precision="fp32",
                    optim=OptimConfig(lr=0.01, warmup=2))  # fmt: skip


def test_the_loss_is_the_mean_of_two_cross_entropies():
    a, b = (F.normalize(torch.randn(7, 5), dim=1) for _ in range(2))
    logits, target = a @ b.T / 0.1, torch.arange(7)
    expected = (
        F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    ) / 2
    torch.testing.assert_close(info_nce(a, b, 0.1), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(info_nce(a, b, 0.1), expected)


def test_cosines_are_told_apart_under_autocast():
    turns = torch.linspace(0, 1, 200)
    some = Samples(dict.fromkeys("ab", torch.stack([turns.cos(), turns.sin()], 1)), [str(i) for i in range(200)])
    before, after = torch.randn(6, 5), torch.randn(6, 3)
    expected = structure_loss(before, after)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(AsTheyAre(), some).a_to_b.max() == 0  # in bf16 neighbours have the same cosine
        assert torch.equal(structure_loss(before, after), expected)


@pytest.mark.parametrize("partner", ["permutation", "half"])
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_mixtures_are_convex_combinations_of_the_same_two_pairs(partner, per):
    torch.manual_seed(3)
    n = 8
    # One-hot latents: a mixture's entries are the shares themselves.
    sides = {"a": torch.eye(n), "b": 2 * torch.eye(n)}
    mixed = augment(sides, Augmentation(partner=partner, per=per), {})
    rows = n // 2 if partner == "half" else n
    assert mixed["a"].shape == (rows, n) and torch.equal(mixed["b"], 2 * mixed["a"])
    torch.testing.assert_close(mixed["a"].sum(1), torch.ones(rows))
    own = mixed["a"].diagonal()[:rows]
    if partner == "half":
        assert torch.equal(mixed["a"][:, n // 2 :], (1 - own).diag())
    moved = own[own != 1]
    assert (len(moved.unique()) == 1) == (per == "batch")
    apart = augment(sides, Augmentation(partner=partner, per=per, shared=False), {})
    assert torch.equal(apart["a"] > 0, apart["b"] > 0) and not torch.equal(apart["b"], 2 * apart["a"])


def test_shares_are_beta_and_noise_is_in_units_of_the_spread():
    torch.manual_seed(0)
    sides, spread = {"a": torch.zeros(4000, 2)}, {"a": torch.tensor([1.0, 3.0])}
    noisy = augment(sides, Augmentation(kind="noise", noise=0.5), spread)["a"]
    torch.testing.assert_close(noisy.std(0), torch.tensor([0.5, 1.5]), rtol=0.05, atol=0)
    halves = {"a": torch.cat([torch.ones(4000, 1), torch.zeros(4000, 1)])}
    shares = augment(halves, Augmentation(per="sample", partner="half", alpha=3.0), {})["a"]
    assert np.isclose(float(shares.mean()), 0.5, atol=0.02) and np.isclose(float(shares.var()), 1 / 28, rtol=0.1)
    assert augment(sides, Augmentation(kind="none"), {})["a"] is sides["a"]


def test_a_batch_is_scored_as_a_part_of_the_update_with_a_clamped_temperature():
    model, some = space(), pairs(6)
    task, batch = Contrastive(model, Augmentation(kind="none"), some), {"sides": some.sides}
    assert task.counts(batch).tolist() == [6]
    assert Contrastive(model, Augmentation(partner="half"), some).counts(batch).tolist() == [3]
    with torch.no_grad():
        model.temperature.fill_(0.9)
    loss = task.loss(batch, torch.tensor([12.0]))["loss"]
    assert model.temperature.item() == 0.5
    expected = info_nce(*(model(side, z) for side, z in some.sides.items()), 0.5).sum() / 12
    torch.testing.assert_close(loss, expected)


def test_structure_is_the_divergence_of_walks():
    """Against scipy's Jensen-Shannon distance, and a connector that keeps all cosines."""
    before, after = torch.randn(6, 5), torch.randn(6, 3)
    walks = []
    for z in (before, after):
        z = F.normalize(z - z.mean(0), dim=1)
        walks.append((z @ z.T / 0.05).softmax(1).double().numpy())
    for hops in (1, 2):
        expected = sum(
            jensenshannon(*(np.linalg.matrix_power(walk, hop) for walk in walks), axis=1) ** 2 / hop
            for hop in range(1, hops + 1)
        )
        np.testing.assert_allclose(structure_loss(before, after, hops), expected, atol=1e-5)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    kept = structure_loss(before, 3 * before @ turn + 1)
    torch.testing.assert_close(kept, torch.zeros(6), atol=1e-5, rtol=0)
    model, some = space(), pairs(6)
    plain, more = (
        Contrastive(model, Augmentation(kind="none", structure=weight), some).loss(
            {"sides": some.sides}, torch.tensor([6.0])
        )["loss"]
        for weight in (0.0, 10.0)
    )
    said = sum(structure_loss(z, model(side, z)).mean() for side, z in some.sides.items())
    torch.testing.assert_close(more, plain + 10 * said)
    more.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_layers_are_chosen_that_have_the_same_neighbours(tmp_path, monkeypatch):
    chosen = {}
    factors, other = torch.randn(30, 4), torch.randn(30, 4)
    table = {"p:a@1": other, "p:a@2": factors, "p:b@1": torch.randn(30, 4), "p:b@2": -2 * factors}

    def stored(source, *_, **__):
        chosen[source.encoder] = chosen.get(source.encoder, 0) + 1
        return SimpleNamespace(read=lambda: table[source.encoder])

    monkeypatch.setattr("fourm.stitching.pairs.compute", stored)
    config = PairsConfig(data="d", latents="l", a=Source(modality="x", encoder="p:a"),
                         b=Source(modality="y", encoder="p:b@1"), a_layers=["1", "2"], b_layers=["1", "2"])  # fmt: skip
    best, found = choose_layers(config, k=3)
    assert (best.a.encoder, best.b.encoder) == ("p:a@2", "p:b@2") and set(chosen.values()) == {1}
    assert found["p:a@2 p:b@2"] == 1 and max(value for pair, value in found.items() if "@1" in pair) < 0.6
    assert choose_layers(best) == (best, {})
    one, _ = choose_layers(dataclasses.replace(config, a_layers=["2"], b_layers=[]), k=3)
    assert (one.a.encoder, one.b.encoder) == ("p:a@2", "p:b@1")
    with pytest.raises(ValueError, match=r"a_layers is \['1'\], but fourm:x@rgb has none to choose"):
        choose_layers(dataclasses.replace(config, a=Source(modality="x", encoder="fourm:x@rgb"), a_layers=["1"]))
    few = stitch_fusemix.Config(folder="f", pairs=config, curve=CurveConfig(sizes=[100, 0]))
    with pytest.raises(ValueError, match=r"curve.sizes is \[100, 0\].* chosen with all .*; allowed is \[0\]"):
        stitch_fusemix.run(few)


def test_a_space_comes_back(tmp_path):
    model = space()
    model.card = {"pairs": "those"}
    model.save(tmp_path)
    loaded = SharedSpace.load(tmp_path)
    assert loaded.card == model.card and torch.equal(loaded("a", torch.ones(2, 8)), model("a", torch.ones(2, 8)))
    torch.testing.assert_close(loaded("b", torch.randn(3, 8)).norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="expected the same for all"):
        widths = {"a": 2, "b": 4}
        SharedSpace(
            {side: Connector(ConnectorConfig(kind="linear", input_dim=3, output_dim=widths[side])) for side in "ab"}
        )


@pytest.mark.parametrize("n", [5, 20])  # fewer than the numbers in a vector, and more
def test_ridge_is_least_squares_with_a_penalty(n):
    train, test, strength = pairs(n), pairs(9, 1), 0.3
    x, y = (train.sides[side].double().numpy() for side in "ab")
    x0, y0 = x - x.mean(0), y - y.mean(0)
    expected = 0
    for (left, right), (other_left, other_right), means in (
        ((x0, y0), (test.sides["a"].double().numpy(), test.sides["b"].double().numpy()), (x.mean(0), y.mean(0))),
        ((y0, x0), (test.sides["b"].double().numpy(), test.sides["a"].double().numpy()), (y.mean(0), x.mean(0))),
    ):
        penalty = strength * (left**2).sum() / len(left)
        rows = np.vstack([left, np.sqrt(penalty) * np.eye(8)])
        weights = np.linalg.lstsq(rows, np.vstack([right, np.zeros((8, 8))]), rcond=None)[0]
        guess, truth = (other_left - means[0]) @ weights, other_right - means[1]
        cosine = guess @ truth.T / np.linalg.norm(guess, axis=1)[:, None] / np.linalg.norm(truth, axis=1)
        expected = expected + (cosine if left is x0 else cosine.T)
    np.testing.assert_allclose(ridge(train, test, strength), expected, atol=1e-8)


def test_asif_keeps_the_nearest_anchors():
    anchors = Samples(dict.fromkeys("ab", torch.eye(3)), list("abc"))
    test = Samples({"a": torch.tensor([[3.0, 2, 1]]), "b": torch.tensor([[0.0, 1, 2]])}, ["d"])
    # Of the cosines (3, 2, 1) / sqrt 14 and (0, 1, 2) / sqrt 5 the two largest, squared: (9, 4, 0) and (0, 1, 4).
    assert np.isclose(float(asif(anchors, test, 2, 2.0)), 4 / np.sqrt(97 * 17))
    assert set(choose("asif", pairs(30), pairs(10, 1))) == {"neighbours", "power"}


def test_the_weights_of_the_best_validation_are_kept_and_survive(tmp_path):
    scores, model = iter([0.1, 0.5, 0.3]), space()
    best = Best(lambda _: ({"figure": 7.0}, {"": next(scores)}), tmp_path)
    for step in (1, 2, 3):
        with torch.no_grad():
            model.temperature.fill_(step / 10)
        assert best(model, step) == {"figure": 7.0}
    for kept in (best, Best(best.watch, tmp_path)):
        assert kept.scores == {"": 0.5} and kept.step == 2 and kept.weights.keys() == model.state_dict().keys()
        assert np.isclose(kept.weights["temperature"], 0.2)


def test_a_run_learns_and_goes_on_after_a_kill_to_the_same_end(tmp_path, monkeypatch):
    splits = {"train": pairs(40), "val": pairs(20, 1), "test": pairs(20, 2)}
    adapter = AdapterConfig(dim=6, hidden=16)
    whole = train_one(adapter, Augmentation(), splits, TRAIN, tmp_path / "whole", keep={"made": "here"})
    assert whole["score"] > 0.35  # chance is 0.27
    loaded = SharedSpace.load(tmp_path / "whole" / "space")
    assert (
        evaluate(loaded, splits["test"]).a_to_b.tolist() == whole["ranks"]["a_to_b"] and loaded.card["made"] == "here"
    )
    assert latest(tmp_path / "whole") is None and not (tmp_path / "whole" / "best").exists()

    loss, calls = Contrastive.loss, []

    def dies(self, batch, counts):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return loss(self, batch, counts)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Contrastive, "loss", dies)
        train_one(adapter, Augmentation(), splits, TRAIN, tmp_path / "killed")
    assert latest(tmp_path / "killed").name == "checkpoint-4"
    again = train_one(adapter, Augmentation(), splits, TRAIN, tmp_path / "killed")
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    monkeypatch.setattr(Contrastive, "loss", None)  # what is done is not done again
    assert train_one(adapter, Augmentation(), splits, TRAIN, tmp_path / "killed") == again


def test_what_was_best_of_a_killed_run_is_not_believed_by_another(tmp_path, monkeypatch):
    splits = {"train": pairs(40), "val": pairs(20, 1), "test": pairs(20, 2)}
    adapter, loss, calls = AdapterConfig(dim=6, hidden=16), Contrastive.loss, []
    train = dataclasses.replace(TRAIN, save_every=0)

    def dies(self, batch, counts):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return loss(self, batch, counts)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Contrastive, "loss", dies)
        train_one(adapter, Augmentation(), splits, train, tmp_path)
    assert latest(tmp_path) is None and latest(tmp_path / "best") is not None
    slow = dataclasses.replace(train, optim=dataclasses.replace(train.optim, lr=1e-9))  # worse than what was killed
    found = train_one(adapter, Augmentation(), splits, slow, tmp_path)
    expected = train_one(adapter, Augmentation(), splits, slow, tmp_path / "fresh")
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_the_picture_of_the_curve_has_the_intervals_over_seeds_too(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    rows = {name: {"mean": {"mean": 0.5, "std": 0.1}} for name in ("none", "shared")}
    gain = {"difference": 0.04, "low": 0.03, "high": 0.05, "with_seeds": [0.01, 0.08]}
    found = {"curve": {10: rows, 20: rows}, "differences": {n: {"none": {"mean": gain}} for n in (10, 20)}}
    draw(found, "shared", tmp_path / "curve.png", "title")
    axes = figures[0].axes[1]
    bars = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[1, 8]] * 2)
    assert "95 % over queries and seeds" in axes.get_title()


def test_the_curve_compares_arms_on_the_same_queries(tmp_path, monkeypatch):
    splits = {"train": pairs(40), "val": pairs(20, 1), "test": pairs(20, 2)}
    config = CurveConfig(arms={"none": Augmentation(kind="none"), "shared": Augmentation()}, noise=[0.1, 0.2],
                         sizes=[10, 0], seeds=2)  # fmt: skip
    short = dataclasses.replace(TRAIN, steps=4, eval_every=2, save_every=0)
    found = measure(config, AdapterConfig(dim=6, hidden=16), splits, short, tmp_path, {})
    assert list(found["curve"]) == [10, 40] and list(found["curve"][10]) == ["ridge", "asif", "none", "shared", "noise"]
    hits = {}
    for arm in ("none", "shared"):
        results = [json.loads((tmp_path / f"runs/{arm}/40-{seed}/result.json").read_text()) for seed in (0, 1)]
        hits[arm] = [np.mean([np.array(r["ranks"][way]) < 1 for way in ("a_to_b", "b_to_a")], axis=0) for r in results]
        assert np.isclose(found["curve"][40][arm]["R@1"]["mean"], np.mean(hits[arm]))
    difference = found["differences"][40]["none"]["R@1"]
    assert np.allclose(difference["seeds"], np.mean(hits["shared"], 1) - np.mean(hits["none"], 1))
    assert difference["low"] <= difference["difference"] <= difference["high"]
    recall = [found["curve"][40]["shared"][f"R@{k}"]["mean"] for k in (1, 5, 10)]
    assert np.isclose(found["curve"][40]["shared"]["mean"]["mean"], np.mean(recall))
    gains = [found["differences"][40]["none"][f"R@{k}"]["difference"] for k in (1, 5, 10)]
    assert np.isclose(found["differences"][40]["none"]["mean"]["difference"], np.mean(gains))
    later = measure(dataclasses.replace(config, sizes=[0], seeds=1), AdapterConfig(dim=6, hidden=16), splits,
                    dataclasses.replace(short, seed=7), tmp_path / "later", {})  # fmt: skip
    assert "noise/40/7" in later["chosen"] and (tmp_path / "later/runs/shared/40-7/space").is_dir()
    for seed in (0, 1):
        scores = {
            level: json.loads((tmp_path / f"runs/noise-{level}/40-{seed}/result.json").read_text())["score"]
            for level in (0.1, 0.2)
        }
        assert scores[float(found["chosen"][f"noise/40/{seed}"])] == max(scores.values())
    assert [path.parent.name for path in tmp_path.glob("runs/*/*/space")] == ["40-0"]
    with pytest.raises(ValueError, match="against is 'share', allowed are the arms none, shared"):
        dataclasses.replace(config, against="share")
    few, card = dataclasses.replace(config, sizes=[10, 20], seeds=1, noise=[]), {"made": "here"}
    measure(few, AdapterConfig(dim=6, hidden=16), splits, short, tmp_path / "few", card)
    kept, run = SharedSpace.load(tmp_path / "few/space"), SharedSpace.load(tmp_path / "few/runs/shared/20-0/space")
    assert kept.card == card and torch.equal(*(each("a", splits["test"].sides["a"]) for each in (kept, run)))
    shutil.rmtree(tmp_path / "few/space")  # as of runs that kept it beside themselves only
    with monkeypatch.context() as patched:
        patched.setattr(Contrastive, "loss", None)
        measure(few, AdapterConfig(dim=6, hidden=16), splits, short, tmp_path / "few", {"made": "there"})
    assert SharedSpace.load(tmp_path / "few/space").card == {"made": "there"}
    subset = splits["train"].subset(10, 0)
    expected = both_ways(ridge(subset, splits["test"], **found["chosen"]["ridge/10/0"])).figures()["R@1"]
    other = both_ways(ridge(splits["train"].subset(10, 1), splits["test"], **found["chosen"]["ridge/10/1"])).figures()[
        "R@1"
    ]
    assert np.isclose(found["curve"][10]["ridge"]["R@1"]["mean"], (expected + other) / 2)


def test_the_verbs_train_and_retrieve(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("MPLBACKEND", "Agg")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for i in range(count):
            colour = rng.integers(0, 256, 3)
            for modality, size in (("rgb", 4), ("small", 2)):
                (tmp_path / "data" / split / modality).mkdir(parents=True, exist_ok=True)
                pixels = (colour + rng.integers(-5, 6, (size, size, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / modality / f"{i}.png")
    side = '{modality: %s, encoder: "tests_colours:means", pooling: mean}'
    monkeypatch.setitem(__import__("sys").modules, "tests_colours", __import__("types").SimpleNamespace(means=colours))
    (tmp_path / "config.yaml").write_text(
        f"folder: {tmp_path}/run\npairs: {{data: {tmp_path}/data, a: {side % 'rgb'}, b: {side % 'small'}, "
        f"latents: {tmp_path}/latents}}\ncurve: {{sizes: [6, 0], seeds: 1, noise: [0.1]}}\nconnector: {{dim: 3}}\n"
        "steps: 3\nbatch_size: 6\neval_every: 0\nsave_every: 0\nlog_every: 0\nprecision: fp32\n"
    )
    cli.main(["stitch", "fusemix", "--config", str(tmp_path / "config.yaml")])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(metrics["curve"]) == {"6", "12"} and "6 test pairs" in metrics["protocol"]
    rows = {row[0]: row for row in metrics["tables"][1][2]}
    assert float(rows["ridge"][1]) == round(100 * metrics["curve"]["12"]["ridge"]["mean"]["mean"], 1)
    gain = metrics["differences"]["12"]["none"]["mean"]
    assert rows["none"][4:6] == [f"{100 * gain['difference']:+.2f}",
                                 f"{100 * gain['low']:+.2f} to {100 * gain['high']:+.2f}"]  # fmt: skip
    assert (tmp_path / "run/curve.png").stat().st_size > 5000
    found, drawn = tmp_path / "run/space", tmp_path / "run/retrieved.png"
    first = np.asarray(Image.open(drawn))
    assert first.shape[:2] == (8 * 288, 6 * 240)  # four queries each way, and five that are found
    capsys.readouterr()
    query = ["--query", str(tmp_path / "data/test/rgb/3.png"), "--space", str(found), "--side", "a", "--k", "3"]
    cli.main(["stitch", "retrieve", *query])
    *lines, last = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and last == str(drawn)
    assert np.asarray(Image.open(drawn)).shape[:2] == (288, 4 * 240)
    cli.main(["stitch", "retrieve", *query, "--output", str(tmp_path / "found.png")])
    assert (tmp_path / "found.png").is_file()
    card = json.loads((found / "config.json").read_text())
    card["card"]["made"]["b"]["weights"] = "0" * 12
    (found / "config.json").write_text(json.dumps(card))
    open_side.cache_clear()
    with pytest.raises(ValueError, match="asked for is weights 000000000000"):
        cli.main(["stitch", "retrieve", *query])


def test_queries_are_what_the_side_is_of(tmp_path):
    from PIL import Image

    pixels = np.zeros((2, 2, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("x")
    assert np.array_equal(read_query(str(tmp_path / "x.png"), pixels, ""), pixels)
    assert read_query("long " * 100, "a text", "") == "long " * 100
    for query, example, message in (
        ("y.png", pixels, "query is 'y.png', but side a is of rgb, pictures, and there is no such file"),
        ("long " * 100, pixels, "pictures, and there is no such file"),
        (str(tmp_path / "x.txt"), pixels, "x.txt, which is no picture"),
        (str(tmp_path / "x.png"), ["a text"], "x.png, but side a is of rgb, texts; give a text"),
        ("x", np.zeros(5, np.float32), "neither pictures nor texts"),
    ):
        with pytest.raises(ValueError, match=message):
            read_query(query, example, "side a is of rgb")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/stitch/fusemix-*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read_and_say_how_they_are_run(path):
    config = cli.read(stitch_fusemix.Config, ["--config", str(path)], "stitch fusemix")
    assert config.curve.against in config.curve.arms
    head = path.read_text()
    assert (
        f"fourm stitch fusemix --config {path.relative_to(ROOT)}" in head
        and "# Cost:" in head
        and "# Expected:" in head
    )


def colours(images):
    return torch.from_numpy(np.stack(images)).float() / 255


colours.dim = 3
