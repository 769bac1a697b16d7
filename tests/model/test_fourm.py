"""The encoder-decoder against hand-computed values, published counts and its own invariances."""

import contextlib
import dataclasses
import math

import pytest
import torch

from fourm.masking.batch import MaskedBatch
from fourm.modalities import Modality, TokenSpace
from fourm.model import layers
from fourm.model.config import FourMConfig
from fourm.model.embeddings import position_table, sincos
from fourm.model.fourm import FourM

SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(2, 2), patch_size=2),
        "depth": Modality("grid", vocab_size=7, grid=(2, 2)),
        "caption": Modality("text", vocab_size=11, max_tokens=5),
        "place": Modality("grid", vocab_size=3, grid=(1, 2), learned_positions=True),
        "features": Modality("vectors", dim=6, max_tokens=3),
    }
)
CONFIG = FourMConfig(size="nano", dim=16, heads=2, encoder_depth=2, decoder_depth=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = FourM(CONFIG, SPACE).eval()
    with torch.no_grad():  # weigh positions and modalities as much as content, so that mistakes show
        for parameter in model.parameters():
            if parameter.ndim < 3 and parameter.std() < 0.03:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def batch(*samples: dict, inputs: int = 6, targets: int = 6) -> MaskedBatch:
    """Rows from dictionaries {"in": [(modality, place, id)], "out": [(modality, place, id fed, id asked)]}."""
    columns = {
        name: torch.zeros(len(samples), inputs if name in ("ids", "pos", "mod") else targets).long()
        for name in ("ids", "pos", "mod", "target_in", "target", "target_pos", "target_mod")
    }
    for name in ("mod", "target_mod"):
        columns[name].fill_(-1)
    rows, slots = [], []
    for b, sample in enumerate(samples):
        for n, (name, place, value) in enumerate(sample["in"]):
            number = SPACE.number[name]
            if SPACE[name].discrete:
                columns["ids"][b, n] = SPACE.vocab_offset[number] + value
            else:
                rows.append(torch.tensor(value))
                slots.append(b * inputs + n)
            columns["pos"][b, n] = SPACE.position_offset[number] + place
            columns["mod"][b, n] = number
        for m, (name, place, fed, asked) in enumerate(sample["out"]):
            number = SPACE.number[name]
            columns["target_in"][b, m] = -1 if fed < 0 else SPACE.vocab_offset[number] + fed
            columns["target"][b, m] = SPACE.vocab_offset[number] + asked
            columns["target_pos"][b, m] = SPACE.position_offset[number] + place
            columns["target_mod"][b, m] = number
    continuous = {"rows": {"rgb": torch.stack(rows)}, "slots": {"rgb": torch.tensor(slots)}} if rows else {}
    return MaskedBatch(**columns, **continuous)


PIXELS = [0.1 * k for k in range(12)]
FIRST = {
    "in": [("rgb", 1, PIXELS), ("depth", 0, 3), ("place", 1, 2)],
    "out": [("depth", 1, -1, 4), ("depth", 3, -1, 0), ("caption", 0, 5, 9), ("caption", 1, 9, 2)],
}
SECOND = {"in": [("caption", 0, 7)], "out": [("place", 0, -1, 1), ("place", 1, -1, 2)]}


def test_sincos_matches_published_rows():
    row = sincos(torch.arange(4), 8)[3]
    published = [0.141120, 0.295520, 0.029995, 0.003000, -0.989992, 0.955337, 0.999550, 0.999996]
    torch.testing.assert_close(row, torch.tensor(published), atol=1e-6, rtol=0)
    square = position_table(TokenSpace({"x": Modality("grid", vocab_size=2, grid=(2, 2))}), 8)
    published = [0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995]  # row 0, column 1
    torch.testing.assert_close(square[1], torch.tensor(published), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "millions"), [("base", 198.83), ("large", 705.74), ("xlarge", 2823.0)])
def test_published_parameter_counts(size, millions):
    with torch.device("meta"):
        model = FourM(FourMConfig(size=size), TokenSpace({"rgb": Modality("patches", grid=(14, 14), patch_size=16)}))
    trunk = sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    assert trunk / 1e6 == pytest.approx(millions, abs=0.05)


def test_loss_of_uniform_scores_is_the_logarithm_of_the_vocabulary(model):
    with torch.no_grad():
        model.decoder_embeddings.tokens.weight.zero_()
    rows = batch(FIRST, SECOND)
    by_modality = {"depth": math.log(7), "caption": math.log(11), "place": math.log(3)}
    loss = model.loss(rows, kind="mod")
    assert loss["loss"].item() == pytest.approx(sum(by_modality.values()) / 3, rel=1e-6)
    assert {name: loss[f"loss/{name}"].item() for name in by_modality} == pytest.approx(by_modality)
    per_token = (2 * math.log(7) + 2 * math.log(11) + 2 * math.log(3)) / 6
    assert model.loss(rows, kind="token")["loss"].item() == pytest.approx(per_token, rel=1e-6)


def test_modality_without_targets_counts_as_zero(model):
    with torch.no_grad():
        model.decoder_embeddings.tokens.weight.zero_()
    assert model.loss(batch(SECOND))["loss"].item() == pytest.approx(math.log(3) / 3, rel=1e-6)


def test_loss_over_parts_adds_up_to_the_loss_of_the_whole(model):
    parts = [batch(FIRST), batch(SECOND), batch(FIRST)]
    counts = sum(model.counts(part) for part in parts)
    total = sum(model.loss(part, counts)["loss"] for part in parts)
    torch.testing.assert_close(total, model.loss(batch(FIRST, SECOND, FIRST))["loss"])


def test_token_nll_is_cross_entropy_over_the_own_vocabulary(model):
    rows = batch(FIRST)
    hidden = model(rows)[0, 2]
    ids = SPACE.vocabulary("caption")
    expected = -torch.log_softmax(model.decoder_embeddings.tokens.weight[ids] @ hidden, 0)[9]
    torch.testing.assert_close(model.token_nll(rows)[0, 2], expected)
    assert model.token_nll(rows)[0, 4:].tolist() == [0.0, 0.0]


def test_padding_changes_nothing(model):
    short, long = model(batch(FIRST, inputs=3, targets=4)), model(batch(FIRST, inputs=9, targets=8))
    torch.testing.assert_close(short[0, :4], long[0, :4], atol=1e-5, rtol=0)


def test_sample_without_inputs_is_finite_and_the_same_beside_any_other(model):
    nothing = {"in": [], "out": SECOND["out"]}
    alone, beside = model(batch(nothing, inputs=0)), model(batch(FIRST, nothing))
    assert alone.isfinite().all()
    torch.testing.assert_close(alone[0, :2], beside[1, :2], atol=1e-5, rtol=0)


def test_text_sees_earlier_tokens_only_and_grids_see_all_of_themselves(model):
    def hidden(change: int, fed: int) -> torch.Tensor:
        out = [list(token) for token in FIRST["out"]]
        out[change][2] = fed
        return model(batch({"in": FIRST["in"], "out": out}))[0]

    before, after = hidden(3, 9), hidden(3, 1)  # the second caption token
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed.tolist()[:4] == [False, False, False, True]
    before, after = hidden(0, -1), hidden(0, 2)  # a depth token
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed.tolist()[:4] == [True, True, False, False]


def test_decoding_step_by_step_equals_decoding_at_once(model):
    rows = batch(FIRST, FIRST)
    whole = model(rows)[:, 2:4]
    cache = model.start_decoding(model.encode(rows), length=4)
    for step in range(2):
        column = 2 + step
        hidden = model.decode_next(
            rows.target_in[:, column], rows.target_pos[:, column], rows.target_mod[:, column], cache
        )
        torch.testing.assert_close(hidden, whole[:, step], atol=1e-5, rtol=0)
        if step == 0:
            cache.select(torch.tensor([1, 0]))


def test_registers_take_part():
    model = FourM(dataclasses.replace(CONFIG, registers=3, qk_norm=True), SPACE).eval()
    rows = batch(FIRST)
    before = model(rows)
    with torch.no_grad():
        model.register_tokens.mul_(50)
    assert not torch.allclose(before, model(rows))


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = FourM.from_pretrained(tmp_path)
    rows = batch(FIRST, SECOND)
    assert torch.equal(again(rows), model(rows))
    assert again.space.to_dict() == SPACE.to_dict()
    assert again.encoder_embeddings.modality is again.decoder_embeddings.modality


def test_blocks_that_start_at_zero_change_nothing_and_learn():
    torch.manual_seed(0)
    fresh = FourM(dataclasses.replace(CONFIG, zero_init=True), SPACE)
    rows = batch(FIRST, SECOND)
    asked = fresh(rows)
    for block in fresh.encoder:
        torch.nn.init.normal_(block.mlp.fc1.weight)
    assert torch.equal(fresh(rows), asked)
    fresh.loss(rows)["loss"].backward()
    ends = [block.self_attn.proj for block in fresh.decoder] + [block.mlp.fc2 for block in fresh.decoder]
    assert all(not end.weight.any() and end.weight.grad.any() for end in ends)


def test_every_parameter_gets_a_gradient_and_is_initialised(model):
    fresh = FourM(CONFIG, SPACE)
    assert all(parameter.isfinite().all() and parameter.abs().max() < 3 for parameter in fresh.parameters())
    model.loss(batch(FIRST, SECOND))["loss"].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"encoder_embeddings.project.features.weight", "encoder_embeddings.project.features.bias"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"size": "huge"}, "nano, tiny"), ({"size": "nano", "heads": 5}, "multiple of 4 and of heads")],
)
def test_wrong_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FourMConfig(**fields)


def test_what_is_made_again_changes_no_gradient(model, monkeypatch):
    rows = batch(FIRST, SECOND)
    model.loss(rows)["loss"].backward()
    lean = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(layers, "remade", lambda *cheap: contextlib.nullcontext())
    model.loss(rows)["loss"].backward()
    for name, gradient in lean.items():
        assert torch.equal(gradient, dict(model.named_parameters())[name].grad), name


def test_widened_mlp_is_the_same():
    torch.manual_seed(0)
    mlp = layers.Mlp(16, 4.0, gated=True, bias=True)
    assert mlp.hidden == 42  # no multiple of 8
    x = torch.randn(5, 16, requires_grad=True)
    mlp(x).sum().backward()
    plain, x.grad = [x.grad, *(p.grad.clone() for p in mlp.parameters())], None
    mlp.zero_grad()
    wide = mlp.widened(x, 6)
    torch.testing.assert_close(wide, mlp(x))
    wide.sum().backward()
    for ours, theirs in zip([x.grad, *(p.grad for p in mlp.parameters())], plain, strict=True):
        torch.testing.assert_close(ours, theirs)
