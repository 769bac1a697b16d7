import math

import pytest
import torch
from torch import nn

from fourm.masking.batch import MaskedBatch
from fourm.modalities import Modality, TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.embeddings import Embeddings
from fourm.model.fourm import FourM
from fourm.model.warm_start import warm_start
from fourm.training import optim
from fourm.training.optim import Freeze, Muon, OptimConfig, Rest, learning_rate, orthogonalise, parameter_groups
from fourm.training.tasks import MaskedTask
from fourm.training.trainer import TrainConfig, Trainer


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (35, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), (60, 0.55), (110, 0.1)],
)
def test_cosine_by_hand(progress, expected):
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup=10)
    assert learning_rate(config, progress, 110) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "expected"), [(5, 0.5), (10, 1.0), (79, 1.0), (90, 0.55), (100, 0.1), (105, 0.1)])
def test_wsd_by_hand(progress, expected):
    config = OptimConfig(lr=1.0, min_lr=0.1, schedule="wsd", warmup=0.1, decay=20)
    assert learning_rate(config, progress, 100) == pytest.approx(expected)


def test_schedule_that_does_not_fit():
    with pytest.raises(ValueError, match="warmup 80 and decay 40 do not fit into a run of 100"):
        learning_rate(OptimConfig(schedule="wsd", warmup=80, decay=40), 0, 100)
    with pytest.raises(ValueError, match="allowed are constant, cosine, inverse_sqrt, wsd"):
        learning_rate(OptimConfig(schedule="step"), 0, 100)
    with pytest.raises(ValueError, match="neither warmup nor timescale"):
        learning_rate(OptimConfig(schedule="inverse_sqrt", warmup=0), 0, 100)
    assert learning_rate(OptimConfig(lr=1.0, warmup=100), 100, 100) == 1.0


@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [("constant_with_warmup", {}, {"schedule": "constant"}),
     ("cosine", {}, {"schedule": "cosine"}),
     ("inverse_sqrt", {}, {"schedule": "inverse_sqrt", "decay": 0}),
     ("inverse_sqrt", {"timescale": 25}, {"schedule": "inverse_sqrt", "timescale": 0.25, "decay": 0}),
     ("warmup_stable_decay", {"num_decay_steps": 30, "decay_type": "linear"}, {"schedule": "wsd", "decay": 0.3})],
)  # fmt: skip
def test_schedules_of_transformers(name, theirs, ours, tokens):
    """At every step of 100, also where the run is counted in tokens, 1000 an update."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(name, optimizer, 10, 100, theirs)
    config = OptimConfig(lr=1.0, warmup=10 * tokens, **ours)
    for step in range(100):
        wanted = scheduler.get_last_lr()[0]
        assert learning_rate(config, step * tokens, 100 * tokens) == pytest.approx(wanted, abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_inverse_sqrt_of_4m_by_hand():
    """`base / sqrt((i + ts) / ts)` with i from the end of the warm-up on, then linear to the end (spec, 7.1)."""
    config = OptimConfig(lr=3.0, min_lr=0.5, schedule="inverse_sqrt", warmup=100, timescale=400, decay=0.2)
    assert learning_rate(config, 50, 2000) == 1.5
    assert learning_rate(config, 100, 2000) == 3.0
    assert learning_rate(config, 1300, 2000) == 3.0 / 2
    foot = 3.0 / math.sqrt((1500 + 400) / 400)
    assert learning_rate(config, 1600, 2000) == pytest.approx(foot)
    assert learning_rate(config, 1700, 2000) == pytest.approx(foot + (0.5 - foot) / 4)
    assert learning_rate(config, 2000, 2000) == pytest.approx(0.5)


class Example(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.conv = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8), nn.TransformerEncoderLayer(4, 2, 8)])
        self.head = nn.Linear(4, 7, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_groups():
    model = Example()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g: {names[id(p)] for p in all_of} for g, all_of in parameter_groups(model, muon=True).items()}
    linear = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.out_proj", "linear1", "linear2")}
    assert groups["muon"] == linear and groups["decay"] == {"conv.weight", "head.weight"}
    assert {"table.weight", "token", "conv.bias", "blocks.0.norm1.weight"} <= groups["no_decay"]
    assert not any(name.startswith("frozen") for group in groups.values() for name in group)
    assert sum(map(len, groups.values())) == len(names) - 2
    plain = parameter_groups(model)
    assert not plain["muon"] and len(plain["decay"]) == 2 + len(linear)


def test_tied_table_is_not_decayed():
    model = Example()
    model.head.weight = model.table.weight
    no_decay = [id(parameter) for parameter in parameter_groups(model)["no_decay"]]
    assert no_decay.count(id(model.table.weight)) == 1


@pytest.mark.parametrize("shape", [(16, 16), (8, 32)])
def test_orthogonalise_by_singular_values(shape, monkeypatch):
    monkeypatch.setattr(optim, "has_bf16", lambda device: False)
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.35  # this polynomial swings around 1
    for matrix, made in zip(matrices, result, strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        exact = u @ v
        assert nn.functional.cosine_similarity(exact.flatten(), made.flatten(), dim=0) > 0.97
    torch.testing.assert_close(result[1], orthogonalise(matrices[1:2])[0])


def test_muon_follows_torch():
    shapes = [(12, 20), (20, 12), (12, 20), (6, 6)]
    draw = torch.Generator().manual_seed(1)
    ours = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1}
    pair = (Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"))
    start = [parameter.detach().clone() for parameter in ours]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=draw)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        difference, moved = (a - b).norm(), (b - before).norm()
        assert difference < 0.05 * moved  # torch multiplies in bfloat16


def test_optimizer_state_round_trip_and_refusal():
    model = Example()
    built = optim.build_optimizers(model, OptimConfig(name="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for optimizer in built:
        optimizer.step()
    tensors = optim.optimizer_tensors(model, built)
    again = optim.build_optimizers(model, OptimConfig(name="muon"))
    optim.load_optimizer_tensors(model, again, tensors)
    loaded = optim.optimizer_tensors(model, again)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert "exp_avg/table.weight" in tensors and "momentum_buffer/blocks.0.linear1.weight" in tensors
    with pytest.raises(ValueError, match="exp_avg/nobody"):
        optim.load_optimizer_tensors(model, again, {"exp_avg/nobody": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        optim.load_optimizer_tensors(model, again, {"exp_avg/table.weight": torch.zeros(2)})


def test_lazy_tables_follow_adam_where_rows_occur_and_rest_elsewhere():
    space = TokenSpace({"map": Modality("grid", vocab_size=9, grid=(1, 3))})
    torch.manual_seed(0)
    side = Embeddings(space, 4, ["map"])
    nn.init.normal_(side.tokens.weight)
    nn.init.normal_(side.modality)
    before = side.tokens.weight.detach().clone()
    adam = nn.Parameter(before.clone())
    built = optim.build_optimizers(side, OptimConfig(lr=0.1, lazy_tables=True))
    reference = torch.optim.Adam([adam], 0.1, betas=(0.9, 0.95), eps=1e-8)
    ids = torch.tensor([[2, 5, 5]])
    side.look_up(ids, torch.zeros_like(ids)).pow(2).sum().backward()
    nn.functional.embedding(ids, adam).pow(2).sum().backward()
    assert side.tokens.weight.grad.is_sparse
    norm = optim.clip_gradients(side, 0)
    assert norm == pytest.approx(float(adam.grad.norm()))
    for optimizer in (*built, reference):
        optimizer.step()
    torch.testing.assert_close(side.tokens.weight[[2, 5]], adam[[2, 5]])
    rest = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(side.tokens.weight[rest], before[rest])
    tensors = optim.optimizer_tensors(side, built)
    again = optim.build_optimizers(side, OptimConfig(lazy_tables=True))
    optim.load_optimizer_tensors(side, again, tensors)
    assert next(o.state for o in again if isinstance(o, torch.optim.SparseAdam))[side.tokens.weight]["step"] == 1


def test_clipping_follows_torch():
    draws = [torch.randn(3, 4), torch.randn(5)]
    ours, theirs = nn.ParameterList(draws), nn.ParameterList([draw.clone() for draw in draws])
    for limit in (0.5, 100.0):
        for parameter, draw in zip([*ours, *theirs], [*draws, *draws], strict=True):
            parameter.grad = draw.clone()
        norm = optim.clip_gradients(ours, limit)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), limit)))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


SPACE = {name: Modality("grid", vocab_size=size, grid=(1, 3)) for name, size in (("new", 5), ("old", 7))}
SHAPE = {"size": "nano", "dim": 8, "heads": 2, "encoder_depth": 1, "decoder_depth": 1}


class Pairs:
    """Batch k asks for one modality given the other."""

    def batches(self, start_step=0):
        step = start_step
        while True:
            draw = torch.Generator().manual_seed(step)
            offset, size = torch.tensor([0, 5]), torch.tensor([5, 7])
            mod = torch.randint(0, 2, (4, 1), generator=draw).expand(4, 3)
            ids = [(torch.rand(4, 3, generator=draw) * size[m]).long() + offset[m] for m in (mod, 1 - mod)]
            place = torch.arange(3).expand(4, 3)
            yield MaskedBatch(
                ids=ids[0], pos=place + 3 * mod, mod=mod, target=ids[1], target_in=torch.full((4, 3), -1),
                target_pos=place + 3 * (1 - mod), target_mod=1 - mod,
            )  # fmt: skip
            step += 1


def warm(**shape) -> tuple[FourM, dict]:
    torch.manual_seed(0)
    source = FourM(FourMConfig(**SHAPE | shape), TokenSpace({"old": SPACE["old"]}))
    model = FourM(FourMConfig(**SHAPE | shape), TokenSpace(SPACE))
    return model, warm_start(model, source).kept


def trained(folder, phases, steps=6, shape=None, **changes):
    """Trains with weights that rest; per update the state dict after it."""
    model, kept = warm(**shape or {})
    optimizer = OptimConfig(lr=0.05, warmup=0, weight_decay=0.1, schedule="constant", **changes)
    config = TrainConfig(steps=steps, batch_size=4, optim=optimizer, precision="fp32", save_every=2, keep=0, ema=0.9)
    seen = [{name: value.clone() for name, value in model.state_dict().items()}]

    def watch(_, step):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    config.eval_every = 1
    rest = Rest(model, phases, kept)
    trainer = Trainer(config, MaskedTask(model), Pairs(), {"watch": watch}, folder, rest=rest)
    trainer.fit()
    return seen, trainer


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


BLOCKS = ("encoder.", "encoder_norm.", "decoder.", "decoder_norm.")


@pytest.mark.parametrize(
    "changes", [{}, {"name": "muon"}, {"lazy_tables": True, "shape": {"tied_head": False}}], ids=str
)
def test_what_is_old_rests_bit_for_bit_until_it_moves(changes, tmp_path):
    seen, trainer = trained(tmp_path, [Freeze("old", 4), Freeze("trunk", 5)], **changes)
    tables = {"encoder_embeddings.tokens.weight": 5, "decoder_embeddings.tokens.weight": 5,
              "encoder_embeddings.modality": 1, "decoder_embeddings.modality": 1, "to_logits.weight": 5}  # fmt: skip
    tables = {name: rows for name, rows in tables.items() if name in seen[0]}
    new_tables = set(tables) - (
        {"decoder_embeddings.tokens.weight"} if "shape" in changes else set()
    )  # never looked up
    assert moved(seen[0], seen[4]) == new_tables
    for name, rows in tables.items():
        assert torch.equal(seen[0][name][rows:], seen[4][name][rows:])
        assert name not in new_tables or (seen[0][name][:rows] != seen[4][name][:rows]).any(1).all()
    then = moved(seen[4], seen[5])
    assert {"decoder_proj_context.weight", "mask_token"} < then and not any(name.startswith(BLOCKS) for name in then)
    assert all((seen[4][name][rows:] != seen[5][name][rows:]).any() for name, rows in tables.items() if name in then)
    assert any(name.startswith("encoder.0.mlp") for name in moved(seen[5], seen[6]))
    assert not torch.equal(trainer.ema.module.mask_token, seen[0]["mask_token"])


def test_what_rests_is_the_same_after_an_interruption(tmp_path):
    whole, _ = trained(tmp_path / "whole", [Freeze("old", 0.5), Freeze("trunk", 5)], name="muon")
    trained(tmp_path / "cut", [Freeze("old", 3), Freeze("trunk", 5)], steps=4, name="muon")
    cut, _ = trained(tmp_path / "cut", [Freeze("old", 3), Freeze("trunk", 5)], name="muon")
    assert len(cut) == 3 and all(torch.equal(whole[-1][name], value) for name, value in cut[-1].items())


def test_what_never_moves_has_no_gradient_and_no_state(tmp_path):
    seen, trainer = trained(tmp_path, [Freeze("embeddings")])
    assert all(name.startswith(BLOCKS) for name in moved(seen[0], seen[-1])) and moved(seen[0], seen[-1])
    state = optim.optimizer_tensors(trainer.task.model, trainer.optimizers)
    assert state and all(name.partition("/")[2].startswith(BLOCKS) for name in state)
    with pytest.raises(ValueError, match="'heads', allowed are trunk, embeddings, old"):
        Freeze("heads")
