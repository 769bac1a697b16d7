"""Hyma: its connectors by hand and as ordinary ones, costs against torch's counter, rankings by hand, the verbs."""

import dataclasses
import itertools
import json
import math
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode

from fourm import cli
from fourm.model.connectors import load_connector
from fourm.stitching import hyma as module
from fourm.stitching import ranking
from fourm.stitching.hyma import AlignConfig, Aligning, Grid, Hyma, HymaConfig, Shape, Zoo, watch
from fourm.stitching.pairs import SampleLoader
from fourm.stitching.runs import Best, Run
from fourm.training.optim import OptimConfig
from fourm.training.trainer import TrainConfig
from fourm.verbs import stitch_hyma, stitch_rank

ROOT = Path(__file__).parents[2]
A, B = {"small": 5, "wide": 9}, {"low": 6, "high": 11, "middle": 8}
SMALL = HymaConfig(code=4, trunk=(12, 10))
TRAIN = TrainConfig(steps=60, batch_size=24, eval_every=20, save_every=0, log_every=0, spike_sigma=0, precision="fp32",
                    optim=OptimConfig(lr=0.01, weight_decay=0, warmup=5))  # fmt: skip


def zoo(n, seed=0, noise=0.3):
    """Views of the same four factors, one for every encoder."""
    rng, views = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    factors = torch.randn(n, 4, generator=rng)
    sides = {
        (side, name): F.normalize(factors @ torch.randn(4, width, generator=views) +
                                  noise * torch.randn(n, width, generator=rng), dim=1)
        for side, widths in (("a", A), ("b", B)) for name, width in widths.items()
    }  # fmt: skip
    means = {side: {name: z.mean(0) for (of, name), z in sides.items() if of == side} for side in "ab"}
    return Zoo(sides, [f"{seed}-{i}" for i in range(n)], means)


def hypernetwork(conditioning="encoders", depth=1, seed=0):
    torch.manual_seed(seed)
    config = dataclasses.replace(SMALL, conditioning=conditioning)
    return Hyma(config, Shape(depth=depth, hidden=7), zoo(30).means)


def test_best_weights_of_another_run_in_the_same_folder_are_not_taken(tmp_path):
    splits, config = {"train": zoo(60), "val": zoo(30, 1)}, dataclasses.replace(TRAIN, steps=10, eval_every=5)
    fast, slow = (dataclasses.replace(config, optim=OptimConfig(lr=lr, warmup=0)) for lr in (0.01, 1e-7))

    def trained(train, folder):
        model = hypernetwork()
        module.fit(model, splits, splits["train"].pairs, 3, 0.1, Run(tmp_path / folder, train, {}))
        return model.layer_codes.detach()

    other = trained(fast, "used")
    for path in (tmp_path / "used").glob("checkpoint-*"):  # as if it had been killed: `save_every` is 0
        shutil.rmtree(path)
    used, fresh = trained(slow, "used"), trained(slow, "fresh")
    assert torch.equal(used, fresh) and not torch.equal(used, other)


@pytest.mark.parametrize("conditioning", ["encoders", "pair", "features"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_materialised_connector_is_an_ordinary_one_that_does_the_same(conditioning, depth, tmp_path):
    model, pairs = hypernetwork(conditioning, depth), zoo(3).pairs
    model.save(tmp_path / "hyma")
    model = Hyma.load(tmp_path / "hyma")
    z = [torch.randn(3, A[a]) for a, _ in pairs]
    for pair, x, out in zip(pairs, z, model(pairs, z), strict=True):
        model.materialise(pair).save(tmp_path / "connector")
        connector = load_connector(tmp_path / "connector")
        assert connector.config.kind == ("mlp" if depth else "linear") and out.shape == (3, B[pair[1]])
        torch.testing.assert_close(connector(x), out)
        assert len(list(connector.parameters())) == 2 * (depth + 1)
    assert len({tuple(out.flatten().tolist()[:3]) for out in model(pairs, z)}) == len(pairs)
    torch.testing.assert_close(hypernetwork(conditioning, depth)(pairs, z), model(pairs, z))


def test_weights_are_a_corner_of_the_largest_layer_and_start_small():
    model = hypernetwork(depth=1)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(len(model.head.bias)))
    (first, bias), (last, _) = model.weights([("small", "low")])[0]
    # Layers of the widest pair: 7 x 9 and 11 x 7; small takes 5 columns of the first, low 6 rows of the last.
    np.testing.assert_allclose(first.detach() * math.sqrt(5), np.arange(63).reshape(7, 9)[:, :5], rtol=1e-6)
    np.testing.assert_allclose(bias.detach() * math.sqrt(5), np.arange(63, 70), rtol=1e-6)
    np.testing.assert_allclose(last.detach() * math.sqrt(7), np.arange(77).reshape(11, 7)[:6], rtol=1e-6)
    assert len(model.head.bias) == 11 * 7 + 11


def test_encoders_share_their_code_and_pairs_do_not():
    def moves(conditioning, *key):
        model, pairs = hypernetwork(conditioning), zoo(3).pairs
        z = [torch.randn(2, A[a]) for a, _ in pairs]
        before = model(pairs, z)
        with torch.no_grad():
            model.codes[module.key(*key)].add_(1)
        return [pair for pair, x, y in zip(pairs, before, model(pairs, z), strict=True) if not torch.equal(x, y)]

    assert moves("encoders", "b", "low") == [("small", "low"), ("wide", "low")]
    assert moves("pair", "wide", "high") == [("wide", "high")]
    assert moves("features", "a", "small") == [("small", name) for name in B]


@pytest.mark.parametrize("arm", ["hyma", "grid"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("conditioning", ["encoders", "features"])
def test_flops_are_those_that_torch_counts(arm, depth, conditioning):
    align = AlignConfig(
        shape=Shape(depth=depth, hidden=16), hyma=HymaConfig(code=8, conditioning=conditioning), turns=4
    )
    some, updates = zoo(40), 6 if arm == "hyma" else 1  # in so many every pair has as many turns
    formula, turns = ranking.update_flops(arm, align, some, 32), 4 if arm == "hyma" else 6
    task = Aligning(ranking.build(arm, align, some), align.temperature, some.pairs, turns, 0)
    batches = SampleLoader(some, 32, 0).batches()
    with FlopCounterMode(display=False) as counter:
        for batch in itertools.islice(batches, updates):
            task.loss(batch, task.counts(batch))["loss"].backward()
    assert np.isclose(formula, counter.get_total_flops() / updates, rtol=0.005)
    if arm == "hyma" and conditioning == "encoders" and depth == 1:  # the formula's terms by hand
        weights = 24 * 128 + 128 * 128 + 128 * (16 * 11 + 11)
        pairs = [4 * 32**2 * b + 4 * 32 * 16 * a + 6 * 32 * 16 * b for a in A.values() for b in B.values()]
        assert formula == 4 * (sum(pairs) / 6 + 6 * 2 * weights)


def test_every_pair_has_its_turn_and_batches_are_those_of_their_step():
    some, seen = zoo(12), []
    task = Aligning(lambda pairs, z: seen.append(pairs) or hypernetwork()(pairs, z), 0.1, some.pairs, 4, seed=3)
    batches = list(itertools.islice(SampleLoader(some, 8, seed=3).batches(), 6))
    for batch in batches:
        task.loss(batch, task.counts(batch))
    turns = [pair for pairs in seen for pair in pairs]
    assert all(sorted(turns[i : i + 6]) == sorted(some.pairs) for i in range(0, 24, 6)) and turns[:6] != turns[6:12]
    again = next(SampleLoader(some, 8, seed=3).batches(4))
    task.loss(again, task.counts(again))
    assert again["keys"] == batches[4]["keys"] and seen[6] == seen[4] and len(set(again["keys"])) == 8
    for side, z in again["sides"].items():
        assert torch.equal(z, torch.stack([some.sides[side][some.ids.index(key)] for key in again["keys"]]))
    with pytest.raises(ValueError, match="turns is 7, allowed are 1 to 6"):
        Aligning(hypernetwork(), 0.1, some.pairs, 7, seed=3)


def test_the_loss_is_the_mean_of_the_pairs_cross_entropies():
    model, some = hypernetwork(), zoo(12)
    batch, task = next(SampleLoader(some, 8, seed=3).batches()), Aligning(model, 0.1, some.pairs, 4, seed=3)
    losses = []
    for a, b in map(task.turn, range(4)):
        x = F.normalize(model.materialise((a, b))(batch["sides"]["a", a]), dim=1)
        logits, target = x @ batch["sides"]["b", b].T / 0.1, torch.arange(8)
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    found = task.loss(batch, torch.tensor([8.0]))["loss"]
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_pairs_of_a_grid_learn_as_if_alone(tmp_path):
    splits, both = {"train": zoo(40), "val": zoo(20, 1)}, []
    train = dataclasses.replace(TRAIN, steps=5, eval_every=5, optim=dataclasses.replace(TRAIN.optim, clip=0))
    for number, pairs in enumerate((splits["train"].pairs, [("wide", "high")])):
        torch.manual_seed(0)
        model = Grid(Shape(hidden=7), splits["train"].widths)
        before = model.materialise(("wide", "high")).network[0].weight.clone()
        module.fit(model, splits, pairs, len(pairs), 0.1, Run(tmp_path / str(number), train, {}))
        both.append(model.materialise(("wide", "high")).state_dict())
        assert not torch.allclose(before, both[-1]["network.0.weight"], atol=1e-3)
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-3)


def test_each_part_keeps_the_weights_it_was_best_with(tmp_path, monkeypatch):
    scores = {("small", "low"): [0.1, 0.5, 0.2], ("wide", "high"): [0.7, 0.1, 0.3]}
    torch.manual_seed(0)
    model = Grid(Shape(depth=0), {"a": A, "b": B})
    parts = model.parts(list(scores))
    for step in (0, 1, 2):
        found = {pair: {f"R@{k}": values[step] for k in (1, 5, 10)} for pair, values in scores.items()}
        fakes = {pair: types.SimpleNamespace(figures=lambda each=each: each) for pair, each in found.items()}
        monkeypatch.setattr(module, "evaluate", lambda *given, fakes=fakes: [fakes[pair] for pair in given[2]])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        mean = Best(lambda model: watch(model, zoo(5), list(scores)), tmp_path)(model, step)["score"]
        assert np.isclose(mean, sum(each[step] for each in scores.values()) / 2)
    kept = Best(watch, tmp_path)
    assert np.allclose(sorted(kept.scores.values()), [0.5, 0.7])
    for (prefix, pairs), step in zip(parts.items(), [1, 0], strict=True):
        assert pairs[0] in scores and (kept.weights[prefix + "network.weight"] == step).all()


@pytest.mark.parametrize("conditioning", ["encoders", "pair", "features"])
def test_a_new_encoder_learns_a_code_and_nothing_else_moves(conditioning, tmp_path, monkeypatch):
    splits, config = {"train": zoo(60), "val": zoo(20, 1)}, dataclasses.replace(SMALL, conditioning=conditioning)

    def adapted(folder):
        torch.manual_seed(0)
        means = {"a": {"known": torch.ones(9), "other": torch.zeros(9)}, "b": splits["train"].means["b"]}
        model = Hyma(config, Shape(hidden=7), means)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        module.adapt(model, "a", "small", splits, dataclasses.replace(TRAIN, steps=10, eval_every=5), folder, 0.1)
        return model, before

    with monkeypatch.context() as patched:
        patched.setattr(module, "fit", lambda *_: None)
        start, before = adapted(tmp_path / "start")
    model, _ = adapted(tmp_path / "run")
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(after) - len(before) == (3 if conditioning == "pair" else 1)
    assert model.materialise(("small", "low")).config.input_dim == 5
    new = module.key(*(("small", "low") if conditioning == "pair" else ("a", "small")))
    if conditioning == "features":
        torch.testing.assert_close(model.codes[new], F.pad(splits["train"].means["a"]["small"], (0, 4)))
    else:
        like = [code for name, code in before.items() if name.startswith("codes.") and "b x " not in name]
        assert len(like) == (6 if conditioning == "pair" else 2)
        torch.testing.assert_close(start.codes[new], torch.stack(like).mean(0))
        assert (model.codes[new] - start.codes[new]).abs().max() > 1e-3
        assert all(parameter.requires_grad for parameter in model.parameters())
    model.save(tmp_path / "hyma")
    z, loaded = [torch.randn(2, 5)], Hyma.load(tmp_path / "hyma")
    assert torch.equal(loaded([("small", "low")], z)[0], model([("small", "low")], z)[0])
    with pytest.raises(ValueError, match="there is room for 9"):
        model.add("a", "huge", torch.ones(10))


def test_agreement_by_hand():
    truth, scores = np.array([0.1, 0.4, 0.3, 0.2, 0.0, 0.5]), np.array([1.0, 5.0, 6.0, 3.0, 2.0, 4.0])
    found = ranking.agreement(truth, scores)
    ranks = np.array([[1, 4, 3, 2, 0, 5], [0, 4, 5, 2, 1, 3]])
    assert np.isclose(found["spearman"], 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (6 * 35))
    assert np.isclose(found["ndcg"], (0.3 + 0.4 / np.log2(3)) / (0.5 + 0.4 / np.log2(3)))
    assert np.isclose(found["regret"], 20)
    tables = ranking.agreements(np.stack([truth, scores, truth]), np.stack([scores, truth]))
    assert tables["spearman"].shape == (2, 3) and np.isclose(tables["spearman"][0, 0], found["spearman"])
    np.testing.assert_allclose(tables["spearman"][[0, 1, 1], [1, 0, 2]], 1)


def test_runs_are_compared_with_those_of_other_seeds():
    table = np.array([[9.0, 1, 2], [3, 9, 4], [5, 6, 9]])
    middle, low, high = ranking.over_seeds(table)
    assert np.isclose(middle, 21 / 6)
    each = []  # all 27 draws of three seeds, less the three that hold one seed only
    for drawn in itertools.product(range(3), repeat=3):
        apart = [table[i, j] for i, j in itertools.product(drawn, drawn) if i != j]
        each += [np.mean(apart)] if apart else []
    assert len(each) == 24 and np.isclose([low, high], np.quantile(each, [0.025, 0.975]), atol=0.01).all()
    np.testing.assert_allclose(ranking.over_seeds(np.array([[1.0, 2, 3], [3, 4, 5]]))[0], 3)


def test_the_comparison_reports_what_its_runs_found(tmp_path):
    splits = {"train": zoo(60), "val": zoo(30, 1), "test": zoo(40, 2)}
    config = ranking.RankConfig(seeds=2, lrs=(0.003, 0.01), updates=(2, 4), batches=(12,), depths=(0,))
    align = AlignConfig(shape=Shape(hidden=7), hyma=SMALL, turns=3, temperature=0.1)
    train = dataclasses.replace(TRAIN, steps=8, eval_every=4, seed=3, optim=OptimConfig(weight_decay=0, warmup=0.07))
    found = ranking.measure(config, align, splits, train, tmp_path)
    names = ["Hyma", "grid search", "grid search, equal FLOPs", "ridge map", "CKA", "mutual k-NN", "best unimodal",
             "random"]  # fmt: skip
    assert list(found["ranked"]) == names and list(found["curve"]) == ["2", "4"]

    def read(arm, steps, lr, seed, batch=24, depth=1):
        return json.loads((tmp_path / f"runs/{arm}-{depth}-{steps}-{batch}-{lr:g}-{seed}/result.json").read_text())

    hyma, grid = ([read(arm, 8, found["ranked"][name]["lr"], seed) for seed in (3, 4)]
                  for arm, name in (("hyma", "Hyma"), ("grid", "grid search")))  # fmt: skip
    assert np.isclose(found["ranked"]["Hyma"]["mean"], np.mean([run["quality"] for run in hyma]))
    assert np.isclose(found["ranked"]["Hyma"]["R@1"], np.mean([run["hits"] for run in hyma]))
    assert np.array(hyma[0]["quality"]).mean() > np.array(hyma[0]["hits"]).mean()
    means = [[np.mean(run["quality"], 1) for run in runs] for runs in (hyma, grid)]
    apart = [spearmanr(means[0][i], means[1][1 - i]).statistic for i in (0, 1)]
    assert np.isclose(found["ranked"]["Hyma"]["spearman"][0], np.mean(apart))
    own = spearmanr(*means[1]).statistic
    assert np.isclose(found["ranked"]["grid search"]["spearman"][0], own)
    assert np.isclose(found["Spearman of Hyma less that of grid search"][0], np.mean(apart) - own)
    chosen = [np.mean(run["quality"], 1)[np.argmax(run["val"])] for run in hyma]
    assert np.isclose(found["ranked"]["Hyma"]["chosen"], np.mean(chosen))
    four = found["curve"]["4"]["mean"]["arms"][0]  # 8 updates of 3 of 6 pairs
    assert np.isclose(four, found["ranked"]["Hyma"]["mean"])
    for name, scores in found["sweeps"].items():
        arm, depth, length = name.split(", ")
        steps, batch = map(int, length.split(" x "))
        for lr, score in scores["val"].items():
            val = read(arm, steps, float(lr), ranking.TUNING, batch, int(depth[-1]))["val"]
            assert np.isclose(score, np.mean(val))
    scores = found["sweeps"]["hyma, MLP_1, 8 x 24"]["val"]
    assert scores[f"{found['ranked']['Hyma']['lr']:g}"] == max(scores.values())
    assert {"hyma, MLP_0, 8 x 24", "grid, MLP_1, 16 x 12", "grid, MLP_1, 2 x 24"} <= set(found["sweeps"])
    record = tmp_path / f"runs/hyma-1-8-24-{found['ranked']['Hyma']['lr']:g}-3/result.json"
    before = record.stat().st_mtime_ns
    ranking.Comparison(config, align, splits, train, tmp_path).arm("hyma", 8)
    assert record.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"rank\.seeds is 1, expected 2 or more"):
        ranking.measure(dataclasses.replace(config, seeds=1), align, splits, train, tmp_path)


def test_the_verbs_rank_and_write_the_winners(tmp_path, capsys, monkeypatch):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 12), ("test", 12)):
        (tmp_path / "data" / split / "rgb").mkdir(parents=True)
        for i in range(count):
            pixels = (rng.integers(0, 256, 3) + rng.integers(-5, 6, (4, 4, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / "rgb" / f"{i}.png")
    fakes = types.SimpleNamespace(colours=colours, cells=cells)
    monkeypatch.setitem(sys.modules, "tests_zoo", fakes)
    a, b = (
        '{modality: rgb, encoder: "tests_zoo:colours", pooling: %s}',
        '{modality: rgb, encoder: "tests_zoo:cells", pooling: mean}',
    )
    (tmp_path / "config.yaml").write_text(
        f"folder: {tmp_path}/run\nzoo: {{data: {tmp_path}/data, latents: {tmp_path}/latents, a: {{mean: {a % 'mean'}, "
        f"max: {a % 'max'}}}, b: {{cells: {b}, again: {a % 'mean'}}}}}\nalign: {{turns: 2, shape: {{hidden: 4}}}}\n"
        "steps: 4\nbatch_size: 8\neval_every: 2\nsave_every: 0\nlog_every: 0\nprecision: fp32\n"
    )
    cli.main(["stitch", "hyma", "--config", str(tmp_path / "config.yaml"), "--winners", "2"])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    (_, columns, rows), *_ = metrics["tables"]
    vals = [float(row[2]) for row in rows]
    assert len(vals) == 4 and vals == sorted(vals, reverse=True) and "12 test samples" in metrics["protocol"]
    best = dict(zip(columns, rows[0], strict=True))
    connector = load_connector(tmp_path / "run/connectors" / f"{best['a']}--{best['b']}")
    assert len(list((tmp_path / "run/connectors").iterdir())) == 2
    assert Hyma.load(tmp_path / "run/hyma").card["zoo"]["a"]["max"]["pooling"] == "max"
    splits = module.load_zoo(cli.read(stitch_hyma.Config, ["--config", str(tmp_path / "config.yaml")]).zoo)
    test = splits["test"]
    torch.testing.assert_close(splits["train"].sides["a", "mean"].norm(dim=1), torch.ones(16))
    scores = F.normalize(connector(test.sides["a", best["a"]]), dim=1) @ test.sides["b", best["b"]].T
    hits = [float((each.argmax(1) == torch.arange(12)).float().mean()) for each in (scores, scores.T)]
    assert best["test R@1"] == f"{100 * np.mean(hits):.1f}"

    options = ["--folder", f"{tmp_path}/rank", "--rank", '{"seeds": 2, "lrs": [0.01], "updates": [1]}']
    cli.main(["stitch", "rank", "--config", str(tmp_path / "config.yaml"), *options])
    metrics = json.loads((tmp_path / "rank/metrics.json").read_text())
    assert "2 x 2 pairs" in metrics["protocol"] and (tmp_path / "rank/ranking.png").stat().st_size > 5000
    assert [title.partition(" ")[0] for title, _, _ in metrics["tables"]] == ["Agreement", "Hyma", "Scores"]
    assert all(len(row) == len(columns) for _, columns, rows in metrics["tables"] for row in rows)
    assert "grid search, equal FLOPs" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/stitch/hyma-*.yaml")) +
                         sorted(ROOT.glob("configs/stitch/rank-*.yaml")), ids=lambda path: path.stem)  # fmt: skip
def test_recipes_are_read_and_say_how_they_are_run(path):
    verb = path.stem.partition("-")[0]
    config = cli.read(
        {"hyma": stitch_hyma, "rank": stitch_rank}[verb].Config, ["--config", str(path)], f"stitch {verb}"
    )
    assert config.align.turns <= len(config.zoo.a) * len(config.zoo.b) >= 12
    head = path.read_text()
    assert f"fourm stitch {verb} --config {path.relative_to(ROOT)}" in head
    assert "# Cost:" in head and "# Expected:" in head


def colours(images):
    return torch.from_numpy(np.stack(images)).float() / 255


def cells(images):
    return torch.cat([colours(images), colours(images) ** 2], -1)


colours.dim, cells.dim = 3, 6
