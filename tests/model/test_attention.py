"""All ways to compute attention inside blocks give the same."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fourm.model import attention
from fourm.model.attention import Blocks, attend, offsets
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.layers import DropPath
from tests.model.test_fourm import CONFIG, FIRST, SECOND, SPACE, batch

CPU = torch.device("cpu")
QUERIES, KEYS, STARTS, TOTAL = [3, 0, 4, 4, 2], [5, 2, 3, 3, 0], [0, 5, 8, 11, 14], 15  # key 7 and the last are unseen


def cross(backend="sdpa") -> Blocks:
    return Blocks(QUERIES, KEYS, STARTS, CPU, backend)


def own(backend="sdpa") -> Blocks:
    """Rows of 6, 3 and 3 tokens: runs of 2 and 4 (causal), 3, and 1 and 2 (causal, but seeing all before them)."""
    first = torch.tensor([0, 0, 2, 2, 2, 2, 6, 6, 6, 9, 9, 9])
    last = torch.tensor([2, 2, 3, 4, 5, 6, 9, 9, 9, 10, 11, 12])
    return Blocks([6, 3, 3], [6, 3, 3], [0, 6, 9], CPU, backend, (first, last))


def inputs(kind, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(12, 3, 2, 16)] if kind is own else [(13, 1, 2, 16), (TOTAL, 2, 2, 16)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def by_hand(blocks: Blocks, *packed: torch.Tensor) -> torch.Tensor:
    """One query at a time."""
    q, k, v = (part for tensor in packed for part in tensor.unbind(1))
    out = []
    for query, first, last in zip(q, *(edge.tolist() for edge in blocks.key_ranges), strict=True):
        scores = torch.einsum("hw,khw->hk", query, k[first:last]) / 4
        out.append(torch.einsum("hk,khw->hw", scores.softmax(1), v[first:last]))
    return torch.stack(out).flatten(1)


@pytest.mark.parametrize("kind", [own, cross])
@pytest.mark.parametrize("way", ["products", "torch"])
def test_values_and_gradients_on_cpu(kind, way, monkeypatch):
    if way == "torch":
        monkeypatch.setattr(attention, "LONG", 0)
    packed, again = inputs(kind), inputs(kind)
    weight = torch.randn(len(packed[0]), 32, generator=torch.Generator().manual_seed(1))
    found, expected = attend(kind(), *packed), by_hand(kind(), *again)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(packed, again, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=0)


def test_neighbouring_blocks_of_a_size_share_a_product():
    assert [(group.size, group.rows.stop, group.columns.stop) for group in cross().groups] == [
        (1, 3, 5), (1, 3, 7), (2, 11, 14), (1, 13, 14)
    ]  # fmt: skip


def test_an_empty_block_may_come_first():
    """A sample of which nothing is asked."""
    groups = Blocks([0, 2], [0, 2], [0, 0], CPU).groups
    assert [(group.rows, group.columns) for group in groups] == [(slice(0, 0), slice(0, 0)), (slice(0, 2), slice(0, 2))]


@torch.no_grad()
@pytest.mark.parametrize("kind", [own, cross])
def test_flex_is_equal(kind):
    packed = [x.detach() for x in inputs(kind)]
    torch.testing.assert_close(attend(kind("flex"), *packed), attend(kind(), *packed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [own, cross])
def test_calls_of_xformers(kind, monkeypatch):
    """Against what xformers documents its two masks to mean."""

    class Mask(types.SimpleNamespace):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            return cls(queries=q_seqlen, keys=kv_seqlen)

    class Causal(Mask):
        pass

    def memory_efficient_attention(query, key, value, attn_bias):
        assert query.shape[0] == 1 and query.shape[1] == sum(attn_bias.queries)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        parts = zip(q.split(attn_bias.queries, 1), *(x.split(attn_bias.keys, 1) for x in (k, v)), strict=True)
        out = []
        for one, keys, values in parts:
            rows, columns = one.shape[1], keys.shape[1]
            mask = torch.ones(rows, columns, dtype=torch.bool)
            mask = mask.tril(columns - rows) if isinstance(attn_bias, Causal) else mask
            out.append(F.scaled_dot_product_attention(one[None], keys[None], values[None], attn_mask=mask)[0])
        return torch.cat(out, 1).transpose(0, 1)[None]

    masks = types.SimpleNamespace(BlockDiagonalMask=Mask, BlockDiagonalCausalFromBottomRightMask=Causal)
    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    for name, module in {"": None, ".ops": ops, ".ops.fmha": None, ".ops.fmha.attn_bias": masks}.items():
        monkeypatch.setitem(sys.modules, f"xformers{name}", module or types.ModuleType("xformers"))
    packed = inputs(kind)
    found = attention._memory_efficient(kind("xformers"), *packed).flatten(1)
    torch.testing.assert_close(found, attend(kind(), *packed), atol=1e-5, rtol=0)


def test_what_cannot_run_says_so():
    with pytest.raises(ValueError, match=r"flex trains on CUDA only.*attention: sdpa"):
        attend(own("flex"), *inputs(own))
    with pytest.raises(ValueError, match=r"xformers needs CUDA.*the model is on cpu"):
        attend(own("xformers"), *inputs(own))
    with pytest.raises(ValueError, match="attention is 'flash', allowed are sdpa, flex, xformers"):
        FourMConfig(attention="flash")


VARIANTS = {
    "as it is": {},
    "registers": {"registers": 2, "qk_norm": True},
    "causal": {"decoder_causal": True},
    "joined": {"decoder_separate": False},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_packing_and_backends_change_nothing(fields):
    torch.manual_seed(0)
    model = FourM(dataclasses.replace(CONFIG, **fields), SPACE)
    rows = batch(FIRST, {"in": [], "out": SECOND["out"]}, SECOND, {"in": FIRST["in"], "out": []}, inputs=9, targets=7)
    found, gradients = [], []
    for packed in (True, False):
        model.config = dataclasses.replace(model.config, packed=packed)
        model.zero_grad()
        losses = model.loss(rows)
        losses["loss"].backward()
        found.append(losses)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
    with torch.no_grad():
        for packed in (True, False):
            model.config = dataclasses.replace(model.config, attention="flex", packed=packed)
            torch.testing.assert_close(model.loss(rows), found[0], atol=1e-5, rtol=0)


def test_stochastic_depth_leaves_out_whole_samples():
    lengths = [2, 3, 1] * 200
    blocks = Blocks(lengths, lengths, offsets(lengths), CPU)
    layer = DropPath(0.25)
    parts = layer(torch.ones(sum(lengths), 4), blocks).split(lengths)
    assert all(part.unique().numel() == 1 for part in parts)
    kept = torch.stack([part[0, 0] for part in parts])
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.07)
    assert torch.equal(layer.eval()(parts[0], blocks), parts[0])
