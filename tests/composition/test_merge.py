"""What is merged is what the papers say, by hand and by other libraries; what is kept is kept."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fourm.composition.interference import draw, interference, sign_dissimilarity
from fourm.composition.merge import (
    MergeConfig,
    compose,
    drop_and_rescale,
    naive,
    open_branch,
    slerp,
    smallest_kept,
    ties,
    uniform,
)
from fourm.composition.search import search, simplex
from fourm.masking.transfer import transfer_batch
from fourm.modalities import Modality, TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.lora import adapters, inject_lora, routed, save_adapter
from fourm.model.warm_start import warm_start

CONFIG = FourMConfig(dim=16, heads=2, encoder_depth=1, decoder_depth=1)
ROWS = {
    "rgb": Modality("grid", vocab_size=9, grid=(2, 2)),
    "depth": Modality("grid", vocab_size=7, grid=(2, 2)),
    "words": Modality("text", vocab_size=30, max_tokens=4),
    "heat": Modality("grid", vocab_size=5, grid=(2, 2)),
}
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


def model_of(*names: str, seed: int = 0) -> FourM:
    torch.manual_seed(seed)
    return FourM(CONFIG, TokenSpace({name: ROWS[name] for name in names})).eval()


@pytest.fixture(scope="module")
def base() -> FourM:
    return model_of("rgb", "words")


def branch(base: FourM, name: str, seed: int, kind: str = "plain", targets: str = "all") -> FourM:
    """As `fourm train` would leave it: adapters and new rows moved, and nothing else."""
    model = model_of("rgb", "words", name, seed=seed)
    warm_start(model, base)
    model.base_hash = base.fingerprint()
    if kind == "full":
        for parameter in model.encoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model
    inject_lora(model, 2, 0.5, targets, [name] if kind == "decoupled" else ())
    for name_, parameter in model.named_parameters():
        if ".lora_" in name_:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(model: FourM, given: list[str], asked: str):
    rng = np.random.default_rng(0)
    drawn = {
        name: [rng.integers(5, 30, 3) if name == "words" else rng.integers(0, 5, 4) for _ in range(3)] for name in ROWS
    }
    samples = [{name: values[i] for name, values in drawn.items() if name in model.space.number} for i in range(3)]
    return transfer_batch(model.space, samples, given, [asked])


def logits(model: FourM, given: list[str], asked: str) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(batch(model, given, asked)), asked)


def vectors(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_ties_by_hand():
    deltas = vectors([3, -2, 0.1, 1, 0], [-1, -4, 0.2, 2, 5], [2, 7, -0.3, 0.5, -1])
    cuts = torch.tensor([smallest_kept(iter([row[:2], row[2:]]), 0.6) for row in deltas])
    assert cuts.tolist() == [1, 2, 1]  # the third largest of each
    trimmed = deltas * (deltas.abs() >= cuts[:, None])
    assert ties(trimmed, UNIFORM).tolist() == pytest.approx([2.5, 7, 0, 1.5, 5])
    heavier = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    assert ties(trimmed, heavier)[1] == pytest.approx((0.2 * -2 + 0.7 * -4) / 0.9)  # now the sum is negative


def test_ties_is_pefts():
    utils = pytest.importorskip("peft.utils.merge_utils")
    deltas = list(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)).double())
    theirs = utils.ties(deltas, torch.ones(3, dtype=torch.float64), density=0.5)
    trimmed = torch.stack([delta * (delta.abs() >= smallest_kept(iter([delta]), 0.5)) for delta in deltas])
    torch.testing.assert_close(ties(trimmed, UNIFORM), theirs)


def test_slerp_by_formula():
    deltas = vectors([2, 0], [0, 4])  # a right angle
    third = slerp(deltas, torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert third.tolist() == pytest.approx([2 * np.sin(np.pi / 3), 4 * np.sin(np.pi / 6)])
    assert slerp(vectors([1, 2], [2, 4]), torch.tensor([1.0, 1.0]).double()).tolist() == pytest.approx([1.5, 3])
    assert slerp(vectors([0, 0], [2, 4]), torch.tensor([1.0, 1.0]).double()).tolist() == [1, 2]
    with pytest.raises(ValueError, match="slerp joins two branches, got 3"):
        slerp(vectors([1], [2], [3]), UNIFORM)


def test_dare_keeps_the_mean():
    generator, delta = torch.Generator().manual_seed(0), vectors(*[[1.0, -2.0, 4.0]] * 20000)
    left = drop_and_rescale(delta, 0.75, generator)
    assert set(left[:, 1].tolist()) == {0.0, -8.0}
    assert left.mean(0).tolist() == pytest.approx([1, -2, 4], rel=0.05)


def test_products_are_merged_not_factors(base):
    branches = {"a": branch(base, "depth", 1), "b": branch(base, "heat", 2)}
    name = "encoder.0.mlp.fc1"
    ups, downs = (
        [getattr(adapters(model)[name], each).weight.detach().double() for model in branches.values()]
        for each in ("lora_up", "lora_down")
    )
    weight = base.get_parameter(f"{name}.weight").detach().double()
    exact, _ = compose(base, branches)
    wanted = weight + 0.5 * (ups[0] @ downs[0] + ups[1] @ downs[1]) / 2
    torch.testing.assert_close(exact.get_parameter(f"{name}.weight").double(), wanted, atol=1e-6, rtol=0)
    wrong, _ = compose(base, branches, MergeConfig(method="factor_mean"))
    wanted = weight + 0.5 * (ups[0] + ups[1]) / 2 @ (downs[0] + downs[1]) / 2
    torch.testing.assert_close(wrong.get_parameter(f"{name}.weight").double(), wanted, atol=1e-6, rtol=0)
    sums, _ = compose(base, branches, MergeConfig(method="task_arithmetic"))
    wanted = weight + 0.4 * 0.5 * (ups[0] @ downs[0] + ups[1] @ downs[1])
    torch.testing.assert_close(sums.get_parameter(f"{name}.weight").double(), wanted, atol=1e-6, rtol=0)
    given, _ = compose(base, branches, MergeConfig(), {"a": 1.0, "b": 0.0})
    wanted = weight + 0.5 * ups[0] @ downs[0]
    torch.testing.assert_close(given.get_parameter(f"{name}.weight").double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["naive", "ties", "slerp", "damc"])
def test_one_branch_again_and_again_is_that_branch(base, method):
    model = branch(base, "depth", 1, "decoupled" if method == "damc" else "full")
    same = {"a": model} if method == "damc" else {"a": model, "b": copy.deepcopy(model)}
    composed, plan = compose(base, same, MergeConfig(method=method, keep=1.0))
    state = composed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(logits(composed, ["rgb", "depth"], "words"), logits(model, ["rgb", "depth"], "words"))
    assert not plan.conflicts and plan.kept["encoder_embeddings.tokens.rgb"] == "the base"
    assert plan.kept["encoder_embeddings.tokens.depth"] == "a"


def test_damc_keeps_each_set_and_merges_what_others_share(base, tmp_path):
    branches = {"a": branch(base, "depth", 1, "decoupled"), "b": branch(base, "heat", 2, "decoupled")}
    composed, plan = compose(base, branches, MergeConfig(method="damc"), {"a": 0.75, "b": 0.25})
    assert plan.routes == [("a", ["depth"]), ("b", ["heat"])]
    for given, model in (("depth", "a"), ("heat", "b")):
        own = composed.encoder_states(batch(composed, [given], "words"))
        theirs = branches[model].encoder_states(batch(branches[model], [given], "words"))
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)
    layer, parts = (
        routed(composed)["decoder.0.mlp.fc2"],
        [routed(each)["decoder.0.mlp.fc2"] for each in branches.values()],
    )
    x = torch.randn(4, layer.linear.in_features)
    composed.route.target = torch.tensor([0, 0, 1, 2])
    found = layer(x) - layer.linear(x)

    def part(number: int, gate: int, rows: torch.Tensor) -> torch.Tensor:
        return parts[number].lora_up(parts[number].lora_down(rows) * parts[number].gate[gate])

    torch.testing.assert_close(found[:2], 0.75 * part(0, 0, x[:2]) + 0.25 * part(1, 0, x[:2]))
    torch.testing.assert_close(found[2:], torch.cat([part(0, 1, x[2:3]), part(1, 1, x[3:])]))
    composed.save_pretrained(tmp_path)
    loaded = FourM.from_pretrained(tmp_path)
    wanted = logits(composed, ["depth", "heat"], "words")
    assert torch.equal(logits(loaded, ["depth", "heat"], "words"), wanted)
    assert loaded.base_hash == base.fingerprint() and loaded.routed_sets == [["depth"], ["heat"]]


def test_convert_is_the_branch_to_its_own_tokens(base):
    branches = {"a": branch(base, "depth", 1), "b": branch(base, "heat", 2)}
    composed, _ = compose(base, branches, MergeConfig(method="convert"))
    for name, own in (("a", "depth"), ("b", "heat")):
        states = (model.encoder_states(batch(model, [own], "words")) for model in (composed, branches[name]))
        torch.testing.assert_close(next(states), next(states), atol=1e-5, rtol=1e-5)
    merged, _ = compose(base, branches)
    assert torch.allclose(logits(composed, ["rgb"], "words"), logits(merged, ["rgb"], "words"), atol=1e-4)
    assert not torch.allclose(logits(composed, ["depth"], "words"), logits(merged, ["depth"], "words"), atol=1e-2)


def test_conflicts_have_names_and_a_policy(base):
    branches = {"a": branch(base, "depth", 1), "b": branch(base, "depth", 2)}
    said = "encoder_embeddings.tokens.depth differs between a, b"
    with pytest.raises(ValueError, match=said):
        compose(base, branches)
    _, plan = compose(base, branches, dry_run=True)
    assert f"conflict: {said}" in plan.lines()
    for policy, owner in (("first", "a"), ("b", "b")):
        composed, plan = compose(base, branches, MergeConfig(conflicts=policy))
        rows = [model.encoder_embeddings.tokens.weight[-7:] for model in (composed, branches[owner])]
        assert torch.equal(*rows) and plan.kept["encoder_embeddings.tokens.depth"] == policy
    with pytest.raises(ValueError, match=r"differs between a, b.*; policy base has no value for them"):
        compose(base, branches, MergeConfig(conflicts="base"))
    with pytest.raises(ValueError, match="allowed are error, base, merge, first, a, b"):
        compose(base, branches, MergeConfig(conflicts="c"))
    other = {"a": branch(base, "depth", 1), "b": branch(base, "heat", 2)}
    other["b"].encoder_embeddings.tokens.weight.data[0] += 1  # of rgb
    with pytest.raises(ValueError, match=r"encoder_embeddings\.tokens\.rgb differs"):
        compose(base, other)
    before = base.encoder_embeddings.tokens.weight[0]
    for policy, value in (("base", before), ("merge", before + 0.5)):
        composed, _ = compose(base, other, MergeConfig(conflicts=policy))
        torch.testing.assert_close(composed.encoder_embeddings.tokens.weight[0], value)


def test_adapters_that_two_branches_have_are_a_conflict(base):
    branches = {"a": branch(base, "depth", 1, "decoupled"), "b": branch(base, "depth", 2, "decoupled")}
    with pytest.raises(ValueError, match="adapters of depth differs between a, b"):
        compose(base, branches, MergeConfig(method="damc"))
    _, plan = compose(base, branches, MergeConfig(method="damc"), dry_run=True)
    assert "conflict: adapters of depth differs between a, b" in plan.lines()
    for policy, owner in (("first", "a"), ("b", "b")):
        composed, plan = compose(base, branches, MergeConfig(method="damc", conflicts=policy))
        assert plan.routes == [(owner, ["depth"])] and composed.routed_sets == [["depth"]]
        found, wanted = (each.encoder_states(batch(each, ["depth"], "words")) for each in (composed, branches[owner]))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_convert_of_a_branch_that_adds_nothing(base):
    plain = model_of("rgb", "words")
    warm_start(plain, base)
    plain.base_hash = base.fingerprint()
    inject_lora(plain, 2, 0.5, "all")
    for layer in adapters(plain).values():
        nn.init.normal_(layer.lora_up.weight, std=0.3)
    branches = {"a": plain, "b": branch(base, "depth", 1)}
    composed, plan = compose(base, branches, MergeConfig(method="convert"), {"a": 1.0, "b": 0.0})
    assert plan.routes == [("b", ["depth"])]
    found, wanted = (logits(model, ["rgb"], "words") for model in (composed, plain))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_temperatures(base):
    """Of added modalities they are like their rows; the base's are the base's, calibrated at any time."""
    branches = {"a": branch(base, "depth", 1), "b": branch(base, "depth", 1)}
    for model, value in zip(branches.values(), (2.0, 3.0), strict=True):
        model.temperature[:] = value
    with pytest.raises(ValueError, match=r"conflicts: temperature.depth differs between a, b; choose"):
        compose(base, branches)
    calibrated = copy.deepcopy(base)
    calibrated.temperature[:] = 1.5
    composed, _ = compose(calibrated, branches, MergeConfig(conflicts="b"))
    assert composed.temperature[[composed.space.number[name] for name in ("rgb", "words", "depth")]].tolist() == [
        1.5, 1.5, 3.0]  # fmt: skip


def test_only_what_is_shape_must_agree(base):
    model = branch(base, "depth", 1)
    model.config = dataclasses.replace(model.config, drop_path=0.1, zero_init=True, size="tiny", blank_hidden=True)
    compose(base, {"a": model})
    model.config = dataclasses.replace(model.config, decoder_causal=True)
    with pytest.raises(ValueError, match=r"branch a has another shape.*: decoder_causal is True, the base's False"):
        compose(base, {"a": model})


def test_settings_that_mean_nothing_are_refused(base):
    with pytest.raises(ValueError, match=r"scale is 0.5, but damc keeps adapters as they are"):
        MergeConfig(method="damc", scale=0.5)
    branches = {"first": branch(base, "depth", 1), "b": branch(base, "heat", 2)}
    with pytest.raises(ValueError, match="branches are first, b; expected at least one, of other names than"):
        compose(base, branches)
    branches["a"] = branches.pop("first")
    with pytest.raises(ValueError, match="slerp divides by the sum of the weights"):
        compose(base, branches, MergeConfig(method="slerp"), {"a": 0.0, "b": 0.0})


def test_branches_of_another_base_are_refused(base):
    stranger = branch(model_of("rgb", "words", seed=5), "heat", 2)
    with pytest.raises(ValueError, match=f"branch b was trained from {stranger.base_hash[:12]}, the base is"):
        compose(base, {"a": branch(base, "depth", 1), "b": stranger})
    stranger.base_hash = ""
    with pytest.raises(ValueError, match="from nothing that it names"):
        compose(base, {"b": stranger})
    with pytest.raises(ValueError, match="branch a has plain adapters, damc needs decoupled"):
        compose(base, {"a": branch(base, "depth", 1)}, MergeConfig(method="damc"))
    with pytest.raises(ValueError, match="branch a has decoupled adapters, naive needs plain ones or none"):
        compose(base, {"a": branch(base, "depth", 1, "decoupled")})
    moved = branch(base, "depth", 1, "decoupled")
    moved.encoder_norm.weight.data += 1
    with pytest.raises(ValueError, match=r"encoder_norm.weight was trained itself in a"):
        compose(base, {"a": moved}, MergeConfig(method="damc"))
    both = {"a": branch(base, "depth", 1), "b": branch(base, "heat", 2)}
    adapters(both["b"])["encoder.0.mlp.fc1"].linear.weight.data += 1
    with pytest.raises(ValueError, match=r"encoder.0.mlp.fc1.weight was trained itself in b; only"):
        compose(base, both, MergeConfig(method="convert"))
    changed = branch(base, "depth", 1)
    changed.space = TokenSpace(changed.space.modalities | {"depth": dataclasses.replace(ROWS["depth"], max_tokens=3)})
    with pytest.raises(ValueError, match="modality depth of branch b is another one"):
        compose(base, {"a": branch(base, "depth", 1), "b": changed})


def test_a_run_of_adapters_is_a_branch(base, tmp_path):
    """Its `model` is fused; with the factors beside it, it is taken apart again."""
    model = branch(base, "depth", 1)
    fused = copy.deepcopy(model)
    save_adapter(fused, tmp_path / "adapter", "base")
    for name, layer in adapters(fused).items():
        fused.set_submodule(name, layer.fused())
    fused.save_pretrained(tmp_path / "model")
    whole, apart = (
        compose(base, {"a": open_branch(tmp_path, base, m)}, MergeConfig(method=m))[0] for m in ("naive", "convert")
    )
    assert torch.allclose(logits(whole, ["rgb"], "words"), logits(apart, ["rgb"], "words"), atol=1e-4)
    with pytest.raises(ValueError, match="was trained from"):
        open_branch(tmp_path, model_of("rgb", "words", seed=4), "convert")
    fused.get_parameter("decoder.0.mlp.fc2.weight").data += 0.1
    fused.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"decoder.0.mlp.fc2 is not the base's with the adapter in"):
        open_branch(tmp_path, base, "convert")
    (tmp_path / "adapter").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match="has no `adapter`, which convert needs"):
        open_branch(tmp_path, base, "convert")


def test_search_finds_the_lowest_point_of_a_bowl():
    assert len(simplex(3, 10)) == 66 and len(simplex(2, 10)) == 11 and set(map(sum, simplex(3, 10))) == {10}
    best, found = search(lambda w: (w["a"] - 0.3) ** 2 + (w["b"] - 0.6) ** 2, ["a", "b", "c"])
    assert best == pytest.approx({"a": 0.3, "b": 0.6, "c": 0.1})
    assert (
        len(found["curve"]) == 67
        and found["best"] < 1e-9
        and found["uniform"] == pytest.approx(0.0033 + 0.0678, abs=2e-3)
    )
    goal = {"a": 0.2, "b": 0.9, "c": 0.0, "d": 0.5}
    best, _ = search(lambda w: sum((w[name] - value) ** 2 for name, value in goal.items()), list(goal))
    assert best == pytest.approx(goal)
    with pytest.raises(ValueError, match="a whole part of 1"):
        search(lambda w: 0.0, ["a"], 0.3)


def test_interference_by_hand(base, tmp_path):
    assert sign_dissimilarity(vectors([1, -1, 0, 2], [1, 1, 0, 1])) == pytest.approx(1 - (1 + 0 + 1) / 3)
    branches = {"a": branch(base, "depth", 1), "b": branch(base, "heat", 2), "c": branch(base, "depth", 1)}
    found = interference(base, branches)["encoder.0.attn.qkv.weight"]
    assert found["cosine a|c"] == pytest.approx(1) and abs(found["cosine a|b"]) < 0.5
    draw(interference(base, branches), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_uniform_is_a_mean_or_a_sum():
    assert uniform(["a", "b"], "naive") == {"a": 0.5, "b": 0.5} and uniform(["a"], "task_arithmetic") == {"a": 1.0}
    assert naive(vectors([1, 2], [3, 6]), torch.tensor([0.5, 0.5]).double()).tolist() == [2, 4]
