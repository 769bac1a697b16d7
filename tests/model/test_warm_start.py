"""Weights move to their places in a larger, shuffled space; what both models know, they say alike."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fourm.masking.batch import MaskedBatch
from fourm.modalities import Modality, TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.lora import inject_lora, save_adapter
from fourm.model.warm_start import open_source, warm_start

CONFIG = FourMConfig(size="nano", dim=16, heads=2, encoder_depth=2, decoder_depth=1)
GRID = {"kind": "grid", "vocab_size": 7, "grid": (2, 2)}
OLD = {
    "rgb@224": Modality("patches", grid=(2, 2), patch_size=2),
    "depth": Modality(**GRID),
    "tok@224": Modality(**GRID | {"learned_positions": True}),
    "caption": Modality("text", vocab="text", vocab_size=11, max_tokens=5),
    "title": Modality("text", vocab="text", vocab_size=11, max_tokens=3),
    "clip": Modality("vectors", dim=6, max_tokens=3),
    "gone": Modality("grid", vocab_size=3, grid=(1, 2)),
}
NEW = {
    "turbidity": Modality("grid", vocab_size=5, grid=(1, 3)),
    "caption": OLD["caption"],
    "clip": OLD["clip"],
    "tok@448": Modality(**GRID | {"grid": (3, 4), "learned_positions": True}),
    "places": Modality("text", vocab="text", vocab_size=11, max_tokens=4),
    "depth": OLD["depth"],
    "rgb@224": OLD["rgb@224"],
    "rgb@448": Modality("patches", grid=(4, 4), patch_size=2),
    "tok@224": OLD["tok@224"],
    "title": OLD["title"],
}


def made(rows, seed=0, **changes) -> FourM:
    torch.manual_seed(seed)
    model = FourM(dataclasses.replace(CONFIG, **changes), TokenSpace(rows)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def batch(space: TokenSpace, given, asked) -> MaskedBatch:
    """One row of `given` (modality, place, id or vector) and `asked` (modality, place, id fed or -1, id)."""
    at = {"ids": [], "pos": [], "mod": []}
    rows, slots = {}, {}
    for n, (name, place, value) in enumerate(given):
        number = space.number[name]
        discrete = space[name].discrete
        at["ids"].append(space.vocab_offset[number] + value if discrete else 0)
        at["pos"].append(space.position_offset[number] + place)
        at["mod"].append(number)
        if not discrete:
            rows.setdefault(name, []).append(value)
            slots.setdefault(name, []).append(n)
    targets = {f"target{each}": [] for each in ("_in", "", "_pos", "_mod")}
    for name, place, fed, value in asked:
        number = space.number[name]
        targets["target_in"].append(space.vocab_offset[number] + fed if fed >= 0 else -1)
        targets["target"].append(space.vocab_offset[number] + value)
        targets["target_pos"].append(space.position_offset[number] + place)
        targets["target_mod"].append(number)
    columns = {name: torch.tensor([[int(each) for each in column]]) for name, column in (at | targets).items()}
    rows = {name: torch.tensor(values) for name, values in rows.items()}
    return MaskedBatch(**columns, rows=rows, slots={name: torch.tensor(each) for name, each in slots.items()})


GIVEN = [("rgb@224", 1, [0.1 * k for k in range(12)]), ("depth", 0, 3), ("tok@224", 2, 5), ("caption", 1, 8),
         ("clip", 0, [0.2 * k for k in range(6)]), ("title", 0, 2)]  # fmt: skip
ASKED = [("depth", 1, -1, 4), ("depth", 3, -1, 0), ("tok@224", 1, -1, 6), ("caption", 0, 5, 9), ("caption", 2, 9, 2),
         ("title", 0, 5, 1)]  # fmt: skip


def losses(model: FourM, given=GIVEN, asked=ASKED) -> dict[str, float]:
    with torch.no_grad():
        asked = sorted(asked, key=lambda each: model.space.number[each[0]])
        said = model.loss(batch(model.space, given, asked))
    return {name: float(value) for name, value in said.items() if "/" in name}


@pytest.mark.parametrize("tied", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("shared", [(True, True), (False, False), (True, False)])
def test_old_modalities_are_said_bit_for_bit_as_before(tied, shared):
    source = made(OLD, tied_head=tied[0], share_modality_embeddings=shared[0])
    model = made(NEW, seed=1, tied_head=tied[1], share_modality_embeddings=shared[1])
    before = losses(source)
    assert len(before) == 4 and losses(model) != before
    warm_start(model, source)
    assert losses(model) == before


@torch.no_grad()
def test_a_shared_row_is_the_encoders():
    rows = OLD | {"depth": dataclasses.replace(OLD["depth"], input=False)}
    source, model = made(rows, share_modality_embeddings=False), made(rows, seed=1, share_modality_embeddings=True)
    plan = warm_start(model, source)
    for name in rows:
        side = "decoder_embeddings" if name == "depth" else "encoder_embeddings"
        assert torch.equal(row(model, "encoder_embeddings", name), row(source, side, name)), name
    assert plan.lines[-1].endswith("shared modality embeddings are those of the source's encoder")
    assert len(plan.kept["encoder_embeddings.modality"]) == len(rows)


def table(model, side, name):
    return getattr(model, side).tokens.weight[getattr(model, side).vocabulary(name)]


def row(model, side, name):
    embeddings = getattr(model, side)
    return embeddings.modality[embeddings.modality_row[model.space.number[name]]]


@torch.no_grad()
def test_another_resolution_starts_from_the_known_one():
    source, model = made(OLD), made(NEW, seed=1)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    plan = warm_start(model, source)
    for side in ("encoder_embeddings", "decoder_embeddings"):
        assert torch.equal(table(model, side, "tok@448"), table(source, side, "tok@224"))
        assert torch.equal(row(model, side, "tok@448"), row(source, side, "tok@224"))
        old = getattr(source, side).learned_positions.view(2, 2, 16).permute(2, 0, 1)[None]
        wanted = F.interpolate(old, (3, 4), mode="bicubic", antialias=True)[0].permute(1, 2, 0).reshape(12, 16)
        learned = getattr(model, side)
        torch.testing.assert_close(learned.learned_positions[learned.learned["tok@448"]], wanted)
        assert torch.equal(
            learned.learned_positions[learned.learned["tok@224"]], getattr(source, side).learned_positions
        )
    project = model.encoder_embeddings.project
    assert torch.equal(project["rgb@448"].weight, source.encoder_embeddings.project["rgb@224"].weight)

    new = fresh["encoder_embeddings.tokens.weight"][:5]  # the first modality here, which the source has not
    assert torch.equal(table(model, "encoder_embeddings", "turbidity"), new)
    assert torch.equal(row(model, "encoder_embeddings", "turbidity"), fresh["encoder_embeddings.modality"][0])
    assert [line.split("  ")[0].split() for line in plan.lines[1:3]] == [["turbidity"], ["caption"]]
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in plan.lines}
    assert said["turbidity"] == "- 5 rows new 5 rows new"
    assert said["places"] == "- 11 rows of caption 11 rows of caption"
    assert said["tok@448"].startswith("tok@224 7 rows, positions resampled from 2x2 7 rows")
    assert said["rgb@448"] == "rgb@224 projection -"
    assert plan.lines[-1] == "not used of the source: gone (encoder), gone (decoder)"
    assert plan.kept["encoder_embeddings.modality"].count((0, 1)) == 0
    rows = {n for first, end in plan.kept["decoder_embeddings.tokens.weight"] for n in range(first, end)}
    assert rows == set(range(5, len(model.decoder_embeddings.tokens.weight)))
    assert plan.kept["encoder.1.attn.qkv.weight"] == [(0, 48)]


@torch.no_grad()
def test_vocabularies_apart_there_and_shared_here():
    apart = OLD | {name: dataclasses.replace(OLD[name], vocab=None) for name in ("caption", "title")}
    source, model = made(apart), made(NEW, seed=1)
    plan = warm_start(model, source)
    for side in ("encoder_embeddings", "decoder_embeddings"):
        assert torch.equal(table(model, side, "title"), table(source, side, "caption"))
    assert any(" ".join(line.split()) == "title title 11 rows of caption 11 rows of caption" for line in plan.lines)
    source, model = made(OLD), made(apart, seed=1)
    warm_start(model, source)
    for name in ("caption", "title"):
        assert torch.equal(table(model, "decoder_embeddings", name), table(source, "decoder_embeddings", name))
    assert losses(model) == losses(source)


@torch.no_grad()
def test_like_names_where_a_modality_starts():
    source = made(OLD)
    rows = {"cloud": Modality(**GRID), "depth": Modality(**GRID | {"vocab_size": 9})}
    model = made(rows, seed=1)
    plan = warm_start(model, source, {"cloud": "depth"})
    assert torch.equal(table(model, "encoder_embeddings", "cloud"), table(source, "encoder_embeddings", "depth"))
    assert any(line.split() == ["cloud", "depth", "7", "rows", "7", "rows"] for line in plan.lines)
    assert any("9 rows new (grid of 7 ids there)" in line for line in plan.lines)  # another tokenizer's
    with pytest.raises(ValueError, match=r"depth is grid of 9 ids, but gone of the source is grid of 3 ids"):
        warm_start(model, source, {"depth": "gone"})
    with pytest.raises(ValueError, match="no modality fog, haze; the model has cloud, depth, the source rgb"):
        warm_start(model, source, {"fog": "haze"})


@torch.no_grad()
def test_a_tied_table_takes_the_rows_of_a_head():
    source, model = made(OLD, tied_head=False), made(OLD, seed=1)
    said = warm_start(model, source).lines[-2:]
    assert torch.equal(model.decoder_embeddings.tokens.weight, source.to_logits.weight)
    assert "tied_head is False in the source, True here, the tied table takes the rows" in said[-1]
    asked = [each for each in ASKED if each[0] in ("depth", "tok@224")]  # no text, whose rows are looked up too
    assert losses(model, asked=asked) == losses(source, asked=asked)


@torch.no_grad()
def test_one_side_only():
    rows = {
        "depth": dataclasses.replace(OLD["depth"], output=False),
        "gone": dataclasses.replace(OLD["gone"], input=False),
    }
    source, model = made(rows), made({name: OLD[name] for name in ("gone", "depth")}, seed=1)
    plan = warm_start(model, source)
    assert torch.equal(table(model, "encoder_embeddings", "depth"), source.encoder_embeddings.tokens.weight)
    assert torch.equal(table(model, "decoder_embeddings", "gone"), source.decoder_embeddings.tokens.weight)
    assert plan.kept["encoder_embeddings.tokens.weight"] == [(3, 10)]
    assert plan.kept["decoder_embeddings.tokens.weight"] == [(0, 3)]


@torch.no_grad()
def test_what_the_source_lacks_is_new_and_said():
    source = made({"depth": OLD["depth"]})
    source.temperature.fill_(2.0)
    model = made({"depth": OLD["depth"]}, seed=1, qk_norm=True, registers=3, norm_bias=True, decoder_causal=True)
    before = model.register_tokens.clone()
    said = "\n".join(warm_start(model, source).lines)
    assert torch.equal(model.register_tokens, before) and (model.temperature == 1).all()
    assert "register_tokens" in said and "encoder.*.attn.q_norm.weight" in said and "norm1.bias" in said
    assert "decoder_causal is False in the source, True here" in said and "temperatures of the source" in said
    longer = made({"depth": OLD["depth"]}, seed=2, qk_norm=True, registers=5, norm_bias=True)
    kept = warm_start(longer, model).kept
    assert kept["register_tokens"] == [(0, 3)] and torch.equal(longer.register_tokens[:3], before)
    with pytest.raises(ValueError, match="qk_norm is True in the source, False here; registers is 3 in the source, 0"):
        warm_start(made({"depth": OLD["depth"]}, norm_bias=True), model)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"dim": 32}, "dim is 16 in the source, 32 here"), ({"encoder_depth": 1}, "encoder_depth is 2 in the source, 1"),
     ({"gated_mlp": False}, "gated_mlp is True in the source, False here"), ({"heads": 4}, "heads is 2")],
)  # fmt: skip
def test_another_shape_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        warm_start(made(OLD, **change), made(OLD))


def test_sources(tmp_path):
    """A model, the run it lies in, a checkpoint of 4M, and adapters on top of a model."""
    model = made({"caption": Modality("text", vocab_size=30000, max_tokens=256)}, blank_hidden=True)
    model.save_pretrained(tmp_path / "run" / "model")
    model.save_official(tmp_path / "theirs.safetensors")
    for path, at in (("run/model", "run/model"), ("run", "run/model"), ("theirs.safetensors",) * 2):
        found, base = open_source(tmp_path / path)
        assert all(torch.equal(found.state_dict()[name], value) for name, value in model.state_dict().items())
        assert base == str(tmp_path / at)
    inject_lora(model, rank=2)
    for layer in (module for name, module in model.named_modules() if name.endswith("lora_up")):
        nn.init.normal_(layer.weight)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "run"))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    given, asked = [("caption", 0, 7), ("caption", 1, 9)], [("caption", 2, 5, 100), ("caption", 3, 100, 3)]
    (found, base), adapted = open_source(tmp_path / "adapter"), losses(model, given, asked)
    assert losses(found, given, asked) == pytest.approx(adapted, rel=1e-4) and base == ""
    assert losses(open_source(tmp_path / "run")[0], given, asked) != pytest.approx(adapted, rel=1e-2)
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        open_source("nowhere")
