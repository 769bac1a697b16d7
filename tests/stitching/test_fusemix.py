"""FuseMix: losses, mixtures and baselines by hand and against torch and numpy; selection; the verbs on a small set."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fourm import cli
from fourm.checkpoint import latest
from fourm.evaluation.retrieval import both_ways
from fourm.model.connectors import Connector, ConnectorConfig
from fourm.stitching.baselines import asif, choose, ridge
from fourm.stitching.curve import AdapterConfig, CurveConfig, measure, train_one
from fourm.stitching.fusemix import Augmentation, Contrastive, Selection, augment, evaluate
from fourm.stitching.pairs import Pairs
from fourm.stitching.space import SharedSpace, info_nce
from fourm.training.optim import OptimConfig
from fourm.training.trainer import TrainConfig
from fourm.verbs import stitch_fusemix

ROOT = Path(__file__).parents[2]


def pairs(n, seed=0, noise=0.5):
    """Two views of the same five factors."""
    rng, views = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    factors, a, b = torch.randn(n, 5, generator=rng), *(torch.randn(5, 8, generator=views) for _ in range(2))
    sides = [factors @ view + noise * torch.randn(n, 8, generator=rng) for view in (a, b)]
    return Pairs(*sides, [f"{seed}-{i}" for i in range(n)])


def space(dim=6):
    torch.manual_seed(0)
    return SharedSpace(
        {side: Connector(ConnectorConfig(kind="mlp", input_dim=8, output_dim=dim, hidden=16)) for side in "ab"}
    )


TRAIN = TrainConfig(steps=12, batch_size=8, eval_every=4, save_every=4, log_every=0, spike_sigma=0, precision="fp32",
                    optim=OptimConfig(lr=0.01, warmup=2))  # fmt: skip


def test_the_loss_is_the_mean_of_two_cross_entropies():
    a, b = (F.normalize(torch.randn(7, 5), dim=1) for _ in range(2))
    logits, target = a @ b.T / 0.1, torch.arange(7)
    expected = (
        F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    ) / 2
    torch.testing.assert_close(info_nce(a, b, 0.1), expected)


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
    task, batch = Contrastive(model, Augmentation(kind="none"), some), {"a": some.a, "b": some.b}
    assert task.counts(batch).tolist() == [6]
    assert Contrastive(model, Augmentation(partner="half"), some).counts(batch).tolist() == [3]
    with torch.no_grad():
        model.temperature.fill_(0.9)
    loss = task.loss(batch, torch.tensor([12.0]))["loss"]
    assert model.temperature.item() == 0.5
    expected = info_nce(model("a", some.a), model("b", some.b), 0.5).sum() / 12
    torch.testing.assert_close(loss, expected)


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
    x, y = train.a.double().numpy(), train.b.double().numpy()
    x0, y0 = x - x.mean(0), y - y.mean(0)
    expected = 0
    for (left, right), (other_left, other_right), means in (
        ((x0, y0), (test.a.double().numpy(), test.b.double().numpy()), (x.mean(0), y.mean(0))),
        ((y0, x0), (test.b.double().numpy(), test.a.double().numpy()), (y.mean(0), x.mean(0))),
    ):
        penalty = strength * (left**2).sum() / len(left)
        rows = np.vstack([left, np.sqrt(penalty) * np.eye(8)])
        weights = np.linalg.lstsq(rows, np.vstack([right, np.zeros((8, 8))]), rcond=None)[0]
        guess, truth = (other_left - means[0]) @ weights, other_right - means[1]
        cosine = guess @ truth.T / np.linalg.norm(guess, axis=1)[:, None] / np.linalg.norm(truth, axis=1)
        expected = expected + (cosine if left is x0 else cosine.T)
    np.testing.assert_allclose(ridge(train, test, strength), expected, atol=1e-8)


def test_asif_keeps_the_nearest_anchors():
    anchors = Pairs(torch.eye(3), torch.eye(3), list("abc"))
    test = Pairs(torch.tensor([[3.0, 2, 1]]), torch.tensor([[0.0, 1, 2]]), ["d"])
    # Of the cosines (3, 2, 1) / sqrt 14 and (0, 1, 2) / sqrt 5 the two largest, squared: (9, 4, 0) and (0, 1, 4).
    assert np.isclose(float(asif(anchors, test, 2, 2.0)), 4 / np.sqrt(97 * 17))
    assert set(choose("asif", pairs(30), pairs(10, 1))) == {"neighbours", "power"}


def test_the_weights_of_the_best_validation_are_kept_and_survive(tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.3])
    monkeypatch.setattr("fourm.stitching.fusemix.mean_recall", lambda _: next(scores))
    model, val = space(), pairs(10)
    selection = Selection(val, tmp_path)
    for step in (1, 2, 3):
        with torch.no_grad():
            model.temperature.fill_(step / 10)
        selection(model, step)
    assert Selection(val, tmp_path).score == 0.5
    assert Selection(val, tmp_path).restore(model) == 2 and np.isclose(model.temperature.item(), 0.2)


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


def test_the_curve_compares_arms_on_the_same_queries(tmp_path):
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
    for seed in (0, 1):
        scores = {
            level: json.loads((tmp_path / f"runs/noise-{level}/40-{seed}/result.json").read_text())["score"]
            for level in (0.1, 0.2)
        }
        assert scores[float(found["chosen"][f"noise/40/{seed}"])] == max(scores.values())
    assert [path.name for path in tmp_path.glob("runs/*/*/space")] == ["space"]
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
    assert (tmp_path / "run/curve.png").stat().st_size > 5000
    found = tmp_path / "run/runs/shared/12-0/space"
    query = ["--query", str(tmp_path / "data/test/rgb/3.png"), "--space", str(found), "--side", "a", "--k", "3"]
    cli.main(["stitch", "retrieve", *query, "--output", str(tmp_path / "found.png")])
    assert (tmp_path / "found.png").is_file() and "3 pairs" not in capsys.readouterr().err
    card = json.loads((found / "config.json").read_text())
    card["card"]["made"]["b"]["weights"] = "0" * 12
    (found / "config.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="asked for is weights 000000000000"):
        cli.main(["stitch", "retrieve", *query])


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
