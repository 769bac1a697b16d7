"""`fourm compose` on runs of `fourm train`: branches by adapters, the composed model is one like any other."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fourm import cli
from fourm.composition.benchmark import accuracies, answer, measure, option_nats, read_questions
from fourm.data.shards import write_shards
from fourm.masking.budgets import Component, MaskingConfig
from fourm.masking.transfer import transfer_batch
from fourm.modalities import TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.lora import inject_lora, routed
from fourm.verbs.compose import SearchConfig

GRID = {"kind": "grid", "vocab_size": 10, "grid": [2, 2]}
MIXED = {"input_tokens": 4, "target_tokens": 4, "mixture": [{"input": {"others": 1}, "target": {"others": 1}}]}
SETTINGS = {
    "data": "data", "masking": MIXED, "steps": 4, "batch_size": 8, "save_every": 2, "val_batches": 1,
    "model": {"size": "nano", "dim": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2},
    "precision": "fp32", "optim": {"warmup": 0, "schedule": "constant", "lr": 0.02},
}  # fmt: skip


def train(folder: str, *modalities: str, **changes) -> None:
    Path("table.yaml").write_text(yaml.safe_dump(dict.fromkeys(modalities, GRID), sort_keys=False))
    Path("config.yaml").write_text(yaml.safe_dump(SETTINGS | {"modalities": "table.yaml", "folder": folder} | changes))
    cli.main(["train", "--config", "config.yaml"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, and of two branches one run with plain and one with decoupled adapters."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FOURM_CACHE", str(folder / "cache"))
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            samples = (
                {n: rng.integers(0, 10, 4).astype(np.int16) for n in ("tok", "depth", "heat")} for _ in range(16)
            )
            write_shards(Path("data"), split, [{"__key__": f"{i}", **each} for i, each in enumerate(samples)], 8)
        train("base", "tok")
        for name in ("depth", "heat"):
            train(f"plain-{name}", "tok", name, init="base", lora={"rank": 2, "targets": "all"})
            lora = {"rank": 2, "targets": "all", "decoupled": [name]}
            train(f"damc-{name}", "tok", name, init="base", lora=lora, ema=0.5)
        yield folder


@pytest.fixture
def here(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    monkeypatch.setenv("FOURM_CACHE", str(runs / "cache"))
    return runs


def compose(kind: str, *options: str) -> None:
    branches = json.dumps({name: f"{kind}-{name}" for name in ("depth", "heat")})
    cli.main(["compose", "--base=base", f"--branches={branches}", "--folder=composed", *options])


def test_a_branch_trains_adapters_and_new_rows_only(here):
    base, model = FourM.from_pretrained("base/model"), FourM.from_pretrained("damc-depth/model")
    assert model.base_hash == base.fingerprint() and model.routed_sets == [["depth"]]
    state = model.state_dict()
    for name, value in base.state_dict().items():
        path, _, leaf = name.rpartition(".")
        mine = state[f"{path}.linear.{leaf}" if path in routed(model) else name]
        assert torch.equal(mine[: len(value)], value), name
    assert not Path("damc-depth/adapter").exists()
    assert all(layer.lora_up.weight.any() for layer in routed(model).values())


def test_an_interrupted_branch_goes_on(here):
    shutil.copytree("damc-heat", "again", ignore=shutil.ignore_patterns("checkpoint-4", "model"))
    lora = {"rank": 2, "targets": "all", "decoupled": ["heat"]}
    train("again", "tok", "heat", init="base", lora=lora, ema=0.5)
    again, whole = (load_file(f"{run}/model/model.safetensors") for run in ("again", "damc-heat"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert FourM.from_pretrained("again/model").base_hash == FourM.from_pretrained("base/model").fingerprint()


def test_a_run_from_before_a_setting_was_there_goes_on(here, monkeypatch):
    """Its checkpoint does not know `decoupled`."""
    asdict = dataclasses.asdict

    def older(config):
        found = asdict(config)
        if isinstance(found.get("lora"), dict):
            found["lora"].pop("decoupled", None)
        return found

    lora, found = {"rank": 2, "targets": "all"}, "older/model/config.json"
    with monkeypatch.context() as patch:
        patch.setattr("fourm.training.trainer.dataclasses.asdict", older)
        patch.setattr("fourm.verbs.train.inject_lora", lambda model, **given: inject_lora(model, **lora))
        train("older", "tok", "heat", init="base", lora=lora, steps=2)
    Path(found).unlink()
    train("older", "tok", "heat", init="base", lora=lora)
    assert Path(found).is_file()
    with pytest.raises(ValueError, match=r'was made with lora.decoupled \[\], this run has lora.decoupled \["heat"\]'):
        train("older", "tok", "heat", init="base", lora=lora | {"decoupled": ["heat"]}, steps=6)
    shutil.rmtree("older")


def test_the_plan_says_what_is_not_decoupled(here, capsys):
    lora = {"rank": 2, "targets": "all", "decoupled": ["heat"]}
    train("half", "tok", "heat", "depth", init="base", lora=lora, steps=2)
    assert "new, but not decoupled: depth; its adapters are merged later" in capsys.readouterr().out
    shutil.rmtree("half")


def test_the_search_minds_tokens_only(here):
    """Its loss is the mean over asked tokens, however many modalities the model could be asked for."""
    model = FourM.from_pretrained("base/model")
    way = {"input": {"tok": 1}, "target": {"tok": 1}}
    masking = MaskingConfig(2, 2, [Component(**way)])
    held_out = SearchConfig(data="data/val", masking=masking, modalities=["tok"], samples=16).held_out(model)
    wider = FourM.from_pretrained("damc-depth/model")
    for name, value in model.state_dict().items():
        mine = wider.state_dict()
        if name in mine:
            mine[name][: len(value)] = value
    for layer in routed(wider).values():
        layer.gate.zero_()
    assert held_out(wider, 0)["loss"] == pytest.approx(held_out(model, 0)["loss"], rel=1e-5)


def test_a_dry_run_says_what_would_be(here, capsys):
    compose("damc", "--method=damc", "--dry_run=true")
    said = capsys.readouterr().out
    assert "kept of depth, for its own tokens: adapters of depth" in said
    assert "kept of heat: encoder_embeddings.tokens.heat, decoder_embeddings.tokens.heat, modality.heat" in said
    assert not Path("composed").exists()


@pytest.mark.parametrize(("method", "kind"), [("damc", "damc"), ("naive", "plain"), ("convert", "plain")])
def test_composes_measures_and_trains_on(here, method, kind):
    given = {name: [1, 2, 3, 4] for name in ("depth", "heat")}
    options = [[1, 1, 1, 1], [2, 2, 2, 2]]
    question = {"kind": "depth heat", "given": given, "options": [{"tok": ids} for ids in options], "answer": 0}
    other = {"kind": "to depth", "given": {"tok": given["heat"]}, "options": [{"depth": ids} for ids in options]}
    other["answer"] = 1
    Path("questions.jsonl").write_text(f"{json.dumps(question)}\n{json.dumps(other)}\n" * 2)
    search = json.dumps({"data": "data/val", "masking": MIXED, "samples": 16, "step": 0.5})
    compose(kind, f"--method={method}", f"--search={search}", "--questions=questions.jsonl")
    found = json.loads(Path("composed/metrics.json").read_text())
    assert len(found["search"]["curve"]) == 3 and sum(found["weights"].values()) == 1
    assert found["search"]["best"] == min(each["loss"] for each in found["search"]["curve"])
    assert set(found["accuracy"]["composed"]["depth heat"]) == {"all", "nothing", "only depth", "only heat"}
    assert set(found["accuracy"]["depth"]["depth heat"]) == {"nothing", "only depth"}
    assert "to depth" in found["accuracy"]["depth"] and "to depth" not in found["accuracy"]["base"]
    assert "encoder.0.attn.qkv.weight" in found["interference"] and "bootstrap over questions" in found["protocol"]
    assert all(Path("composed", name).stat().st_size > 5000 for name in ("weights.png", "interference.png"))
    assert found["tables"][0][1] == ["", "base", "depth", "heat", "composed"]
    assert "<td>depth heat: only heat</td>" in Path("composed/report.html").read_text()
    model = FourM.from_pretrained("composed/model")
    assert model.space.names == ["tok", "depth", "heat"] and (method == "naive") == (model.route is None)
    for steps in (2, 4):  # the second time it goes on
        train("further", "heat", "tok", init="composed", steps=steps)
    further = FourM.from_pretrained("further/model")
    assert (further.route is None) == (model.route is None) and further.base_hash == model.fingerprint()
    assert further.routed_sets == ([] if method == "naive" else [["heat"]])
    name = "encoder.0.mlp.fc1" + ("" if method == "naive" else ".lora_up") + ".weight"
    assert not torch.equal(further.state_dict()[name], model.state_dict()[name])
    shutil.rmtree("further")
    shutil.rmtree("composed")


def test_errors(here, capsys):
    with pytest.raises(ValueError, match="weights are given for depth, the branches are depth, heat"):
        compose("plain", '--weights={"depth": 1.0}')
    with pytest.raises(SystemExit):
        compose("plain", "--method=mean")
    search = json.dumps({"data": "data/val", "masking": MIXED})
    with pytest.raises(SystemExit):
        compose("plain", "--method=task_arithmetic", f"--search={search}")
    assert "search tries weights of a mean" in capsys.readouterr().err
    with pytest.raises(ValueError, match="branch depth has no adapters, damc needs decoupled"):
        compose("plain", "--method=damc")
    Path("bad.jsonl").write_text('{"kind": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: not a question: KeyError\('given'\)"):
        read_questions("bad.jsonl")
    options = [{"tok": [1]}, {"tok": [2]}]
    question = {"kind": "a", "given": {"tok": [1]}, "options": options, "answer": 1}
    changes = {
        "answer is -1, of 2 options": {"answer": -1},
        "3 options of tok with tok given, but line 1 of the same kind has 2": {"options": [*options, options[0]]},
        "2 options of depth": {"options": [{"depth": [1]}] * 2},
        "options of different modalities: depth, tok or tok": {"options": [{"depth": [1], "tok": [1]}, {"tok": [1]}]},
        "2 options of tok with heat, tok given": {"given": {"heat": [1], "tok": [1]}},
    }
    for said, change in changes.items():
        Path("bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (question, question | change)))
        with pytest.raises(ValueError, match=f"bad.jsonl, line 2: {said}"):
            read_questions("bad.jsonl")


def test_the_likeliest_option_is_the_answer():
    """A model that knows nothing but how likely an id is: its heads score one vector."""
    torch.manual_seed(0)
    cell = GRID | {"grid": [1, 1]}
    space = TokenSpace.from_dict({"tok": GRID, "warmth": cell, "height": cell})
    model = FourM(FourMConfig(dim=8, heads=2, encoder_depth=1, decoder_depth=1), space).eval()
    rng = np.random.default_rng(0)
    questions = [
        {"kind": "tok", "given": {"tok": rng.integers(0, 10, 4).tolist()}, "answer": int(rng.integers(4)),
         "options": [{"warmth": [a], "height": [b]} for a, b in rng.integers(0, 10, (4, 2)).tolist()]}
        for _ in range(20)
    ]  # fmt: skip
    with torch.no_grad():
        hidden = torch.randn(8)
        model.decoder_norm.weight.zero_()
        model.decoder_norm.bias.copy_(hidden)
        scores = {name: model.logits(hidden, name).log_softmax(0) for name in ("warmth", "height")}
    sums = [[sum(scores[n][ids[0]].item() for n, ids in option.items()) for option in each["options"]]
            for each in questions]  # fmt: skip
    wanted = [int(np.argmax(each)) for each in sums]
    assert answer(model, questions, batch_size=7).tolist() == wanted
    unknown = [each | {"kind": "two", "given": each["given"] | {"sound": [1]}} for each in questions]
    found = measure(model, [*questions, *unknown])
    assert set(found["two"]) == {"nothing", "only tok"} and set(found["tok"]) == {"all", "nothing"}
    both = {"kind": "x", "given": {"warmth": [1], "height": [2]}, "options": [{"tok": [1] * 4}], "answer": 0}
    assert set(measure(model, [both])["x"]) == {"all", "nothing", "only warmth", "only height"}
    assert not measure(model, [unknown[0] | {"options": [{"sound": [1]}]}])
    right = np.mean([each["answer"] == choice for each, choice in zip(questions, wanted, strict=True)])
    assert accuracies(found)["tok"]["all"]["accuracy"] == pytest.approx(100 * right)


def test_options_are_scored_as_in_a_pass_of_their_own():
    """Grids, whose masked cells are decoded once, and texts, which are not."""
    torch.manual_seed(0)
    words = {"kind": "text", "vocab_size": 30, "max_tokens": 6, "first_sentinel": 4, "sentinels": 8}
    space = TokenSpace.from_dict({"tok": GRID, "depth": GRID, "words": words})
    model = FourM(FourMConfig(dim=16, heads=2, encoder_depth=1, decoder_depth=2), space).eval()
    rng = np.random.default_rng(0)
    draws = {"tok": lambda: rng.integers(0, 10, 4), "depth": lambda: rng.integers(0, 10, 4),
             "words": lambda: rng.integers(12, 30, rng.integers(2, 5))}  # fmt: skip
    for asked in (["depth"], ["words"], ["depth", "words"]):
        questions = [
            {"given": {"tok": draws["tok"]().tolist()},
             "options": [{name: draws[name]().tolist() for name in asked} for _ in range(3)]} for _ in range(5)
        ]  # fmt: skip
        found = option_nats(model, questions, batch_size=2)
        for question, row in zip(questions, found, strict=True):
            for option, nats in zip(question["options"], row, strict=True):
                sample = {name: np.array(ids) for name, ids in (question["given"] | option).items()}
                batch = transfer_batch(space, [sample], ["tok"], asked)
                with torch.no_grad():
                    wanted = model.token_nll(batch, model(batch)).sum()
                assert nats == pytest.approx(wanted.item(), rel=1e-5)
