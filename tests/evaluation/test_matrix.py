"""The any-to-any matrix against brute force with a real model, and against a model whose bits are known."""

import numpy as np
import pytest
import torch

from fourm.evaluation.matrix import any_to_any, raw_name, raw_sources, raw_targets, summary
from fourm.masking.transfer import transfer_batch
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import FourM, FourMConfig


def small_space():
    return TokenSpace(
        {
            "rgb": Modality("patches", grid=(2, 2), patch_size=2),
            "tok_rgb": Modality("grid", vocab_size=16, grid=(2, 2), source="rgb"),
            "water": Modality("grid", vocab_size=4, grid=(2, 2)),
            "caption": Modality("text", vocab_size=32, vocab="text", max_tokens=8, sentinels=10),
        }
    )


def small_tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "__key__": f"{i:03d}",
            "rgb": rng.integers(0, 256, (4, 4, 3), dtype=np.uint8),
            "tok_rgb": rng.integers(0, 16, 4),
            "water": rng.integers(0, 4, 4),
            "caption": rng.integers(14, 32, rng.integers(1, 8)),
        }
        for i in range(count)
    ]


def test_pixels_stand_for_rgb_as_source_and_tokens_as_target():
    space = small_space()
    assert raw_sources(space) == {"rgb": "rgb", "water": "water", "caption": "caption"}
    assert raw_targets(space) == {"rgb": "tok_rgb", "water": "water", "caption": "caption"}
    assert list(raw_sources(space)) == list(raw_targets(space)) == ["rgb", "water", "caption"]


@pytest.mark.parametrize("order", [1, -1])
def test_two_tokens_of_one_raw_modality_stay_apart(order):
    rows = {
        "rgb": Modality("patches", grid=(2, 2), patch_size=2),
        "tok_rgb": Modality("grid", vocab_size=16, grid=(2, 2), source="rgb"),
        "tok_dinov2": Modality("grid", vocab_size=16, grid=(2, 2), source="rgb", tokenizer="dinov2"),
        "vectors": Modality("vectors", dim=4, max_tokens=3),
    }
    space = TokenSpace({name: rows[name] for name in list(rows)[::order]})
    assert raw_sources(space) == {"rgb": "rgb", "tok_dinov2": "tok_dinov2", "vectors": "vectors"}
    assert raw_targets(space) == {"rgb": "tok_rgb", "tok_dinov2": "tok_dinov2"}
    alike = {f"tok_{i}": Modality("grid", vocab_size=16, grid=(2, 2), source="rgb") for i in range(2)}
    assert [raw_name(TokenSpace(alike), name) for name in alike] == list(alike)


def test_matrix_equals_one_pass_per_sample_and_pair():
    torch.manual_seed(0)
    model = FourM(FourMConfig(dim=32, encoder_depth=1, decoder_depth=2, heads=2), small_space())
    with torch.no_grad():
        model.decoder_embeddings.tokens.weight.mul_(20)  # far from uniform
    tokens = small_tokens(7)
    matrix = any_to_any(model, tokens, n=7, batch_size=3)
    assert {source: set(row) for source, row in matrix.items()} == {
        "rgb": {"water", "caption"}, "water": {"rgb", "caption"}, "caption": {"rgb", "water"}
    }  # fmt: skip
    order = np.random.default_rng(0).permutation(7).tolist()
    before = {row: chunk[i - 1] for chunk in (order[:4], order[4:]) for i, row in enumerate(chunk)}  # two passes
    for source, target, given, asked in [
        ("rgb", "caption", "rgb", "caption"), ("caption", "rgb", "caption", "tok_rgb")
    ]:  # fmt: skip
        bits, nothing, wrong, count = 0.0, 0.0, 0.0, 0
        for row, sample in enumerate(list.__iter__(tokens)):
            swapped = sample | {given: tokens[before[row]][given]}
            wrong += model.token_nll(transfer_batch(model.space, [swapped], [given], [asked])).sum().item() / np.log(2)
            batch = transfer_batch(model.space, [sample], [given], [asked])
            bits += model.token_nll(batch).sum().item() / np.log(2)
            nothing += model.token_nll(transfer_batch(model.space, [sample], [], [asked])).sum().item() / np.log(2)
            count += batch.target_tokens
        cell = matrix[source][target]
        assert cell["bits"] == pytest.approx(bits / count, rel=1e-4)
        assert cell["gain_bits"] == pytest.approx((nothing - bits) / count, abs=1e-4)
        assert cell["shuffled_gain_bits"] == pytest.approx((nothing - wrong) / count, abs=1e-4)
        assert cell["ci95"][0] <= cell["gain_bits"] <= cell["ci95"][1]


class Copier(torch.nn.Module):
    """Gives a target token 8 of 10 parts where the input has the same id at its place, else 1 of 16 (uniform)."""

    def __init__(self, space):
        super().__init__()
        self.space, self.weight = space, torch.nn.Parameter(torch.zeros(1))

    def encode(self, batch):
        return torch.where(batch.mod < 0, -1, batch.ids % 16)

    def decode(self, batch, context):
        return context.expand(batch.target.shape)

    def token_nll(self, batch, hidden):
        right = torch.where(hidden == batch.target % 16, 0.8, 0.2 / 15)
        return -torch.where(hidden < 0, 1 / 16, right).log()


def test_gain_and_wrong_source_of_a_known_model():
    space = TokenSpace({name: Modality("grid", vocab_size=16, grid=(2, 2)) for name in ("a", "b")})
    maps = [np.full(4, i) for i in range(8)]  # no two samples share an id, so a wrong source never agrees
    model = Copier(space).train()
    matrix = any_to_any(model, [{"__key__": str(i), "a": x, "b": x} for i, x in enumerate(maps)], 8, 4)
    cell = matrix["a"]["b"]
    assert cell["nothing_bits"] == pytest.approx(4)
    assert cell["gain_bits"] == pytest.approx(4 + np.log2(0.8))
    assert cell["ci95"] == pytest.approx([4 + np.log2(0.8)] * 2)
    assert cell["shuffled_gain_bits"] == pytest.approx(4 + np.log2(0.2 / 15))
    assert summary(matrix) == pytest.approx(
        {
            "pairs": 2,
            "positive_share": 1,
            "mean_gain_bits": 4 + np.log2(0.8),
            "max_shuffled_gain_bits": 4 + np.log2(0.2 / 15),
        }
    )


def test_errors_name_what_was_given():
    model, tokens = (
        FourM(FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2), small_space()),
        small_tokens(4),
    )
    with pytest.raises(ValueError, match="9 samples are wanted, but there are only 4"):
        any_to_any(model, tokens, n=9)
    with pytest.raises(ValueError, match="n is 1"):
        any_to_any(model, tokens, n=1)
