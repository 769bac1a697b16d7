"""Connectors: what they compute, by hand and densely, and that what is saved comes back."""

import pytest
import torch
import torch.nn.functional as F

from fourm.model.connectors import (
    NETWORKS,
    Connector,
    ConnectorConfig,
    SparseMoE,
    balance_loss,
    expert_load,
    load_connector,
)


def connector(kind, **options):
    torch.manual_seed(0)
    return Connector(ConnectorConfig(kind=kind, input_dim=6, output_dim=6, **options))


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_saved_comes_back(kind, tmp_path):
    made = connector(kind, depth=2, hidden=8, dropout=0.5).eval()
    made.save(tmp_path / kind)
    z = torch.randn(3, 2, 6)
    loaded = load_connector(tmp_path / kind)
    assert loaded.config == made.config
    assert torch.equal(loaded(z), made(z)) and made(z).shape == z.shape


def test_an_mlp_has_its_hidden_layers_and_activation():
    made, z = connector("mlp", depth=2, hidden=5, activation="relu"), torch.randn(4, 6)
    first, second, last = (layer for layer in made.network if isinstance(layer, torch.nn.Linear))
    assert (first.out_features, second.out_features, last.out_features) == (5, 5, 6)
    torch.testing.assert_close(made(z), last(second(first(z).relu()).relu()))


def test_a_residual_connector_is_fusemixs_adapter():
    made, z = connector("residual"), torch.randn(4, 6) * 3
    block, norm, last = made.network
    assert block.inner.out_features == 24  # four times the width
    inside = block.outer(F.gelu(block.inner(F.layer_norm(z, (6,), block.norm.weight, block.norm.bias))))
    torch.testing.assert_close(made(z), last(F.layer_norm(z + inside, (6,), norm.weight, norm.bias)))


@pytest.mark.parametrize("renormalise", [True, False])
def test_sparse_experts_give_what_dense_ones_give(renormalise):
    torch.manual_seed(1)
    moe, x = SparseMoE(6, 5, 7, 2, renormalise), torch.randn(3, 11, 6, requires_grad=True)
    chances = moe.gate(x).softmax(-1)
    kept = chances * (chances >= chances.topk(2).values[..., -1:])
    weights = kept / kept.sum(-1, keepdim=True) if renormalise else kept
    dense = (torch.stack([expert(x) for expert in moe.experts], -1) * weights[..., None, :]).sum(-1)
    torch.testing.assert_close(moe(x), dense)
    grads = [torch.autograd.grad(y.square().sum(), [x, *moe.parameters()]) for y in (moe(x), dense)]
    for sparse, full in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, full)


def test_experts_compute_only_the_rows_that_chose_them():
    moe, x, seen = SparseMoE(6, 4, 7, 2), torch.randn(9, 6), [0] * 4
    for number, expert in enumerate(moe.experts):
        expert.register_forward_hook(lambda _m, args, _o, number=number: seen.__setitem__(number, len(args[0])))
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor([0.0, 5, 3, -5]))
    moe(x)
    assert seen == [0, 9, 9, 0]
    assert expert_load(moe.routing).tolist() == [0, 0.5, 0.5, 0]
    probabilities = torch.tensor([0.0, 5, 3, -5]).softmax(0)
    torch.testing.assert_close(balance_loss(moe.routing), 4 * 0.5 * (probabilities[1] + probabilities[2]))


def test_wrong_connectors_say_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="connector is 'cubic', allowed are linear, mlp, residual, moe"):
        connector("cubic")
    with pytest.raises(ValueError, match="top_k is 3, allowed are 1 to 2"):
        SparseMoE(6, 2, 7, 3)
    with pytest.raises(ValueError, match="holds no connector"):
        load_connector(tmp_path)
