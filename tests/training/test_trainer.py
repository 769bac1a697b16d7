import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fourm import checkpoint, logbook
from fourm.training.tasks import HeldOutLoss
from fourm.training.trainer import TrainConfig, moving_average

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def same(a, b):
    """Bit for bit, so that NaN equals NaN and 0.0 differs from -0.0."""
    return a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


def state(trainer):
    saved = checkpoint.load(checkpoint.latest(trainer.folder))
    return {f"{group}/{name}": tensor for group, all_of in saved.tensors.items() for name, tensor in all_of.items()}


class Stop(Exception):
    pass


def interrupted(folder, at, **settings):
    """Trains until an evaluator stops the run, as a crash would."""

    def evaluator(model, step):
        if step == at:
            raise Stop
        return {}

    with pytest.raises(Stop):
        tiny.train(folder, evaluators={"stop": evaluator}, **settings)


# 40 samples in batches of 8: updates 4 and 8 are in the middle of epochs 0 and 1, 5 and 10 are boundaries.
@pytest.mark.parametrize(("optimizer", "accumulate"), [("adamw", 1), ("muon", 1), ("adamw", 2)])
def test_resumed_three_times_equals_never_stopping(tmp_path, optimizer, accumulate):
    settings = {"optimizer": optimizer, "accumulate": accumulate, "ema": 0.9, "keep": 0}
    whole = tiny.train(tmp_path / "whole", eval_every=1, **settings)
    for at in (5, 7, 10):
        interrupted(tmp_path / "parts", at, eval_every=1, **settings)
    parts = tiny.train(tmp_path / "parts", eval_every=1, **settings)
    assert same(state(whole), state(parts))
    fields = ("step", "loss", "loss/0", "loss/1", "lr", "grad_norm")
    records = [[[r.get(f) for f in fields] for r in logbook.read(t.folder) if "loss" in r] for t in (whole, parts)]
    assert records[0] == records[1] and [r[0] for r in records[0]] == [3, 4, 6, 8, 9, 12]


def test_runs_differ_where_they_should(tmp_path):
    """The negative control of the test above: weights move, and dropout follows the seed."""
    first, other = tiny.train(tmp_path / "a", keep=0), tiny.train(tmp_path / "b", seed=1)
    assert not same(state(first), state(other))
    early = checkpoint.load(tmp_path / "a" / "checkpoint-4").tensors["model"]
    assert not same(early, checkpoint.load(tmp_path / "a" / "checkpoint-12").tensors["model"])


def test_finished_run_is_left_alone(tmp_path):
    first = tiny.train(tmp_path, evaluators={"val": lambda model, step: {"x": float(step)}})
    written = (tmp_path / "metrics.jsonl").read_text()
    again = tiny.train(tmp_path, evaluators={"val": lambda model, step: {"x": -1.0}})
    assert first.metrics == again.metrics == {"val/x": 12.0}
    assert same(first.task.model.state_dict(), again.task.model.state_dict())
    assert (tmp_path / "metrics.jsonl").read_text() == written


def test_accumulation_equals_one_batch(tmp_path):
    one = tiny.train(tmp_path / "1", dropout=0.0)
    four = tiny.train(tmp_path / "4", dropout=0.0, accumulate=4)
    for a, b in zip(one.task.model.parameters(), four.task.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    losses = [[r["loss"] for r in logbook.read(t.folder) if "loss" in r] for t in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_first_update_equals_torch_by_hand(tmp_path):
    """AdamW moves each entry of the first update by the rate, against its gradient's sign (and decays matrices)."""
    trainer = tiny.train(tmp_path, dropout=0.0, steps=1, ema=0.9)
    tiny.runtime.seed_everything(0, "init")
    task = tiny.TinyTask()
    batch = next(tiny.TinyLoader(8).batches())
    loss = task.loss(batch, task.counts(batch))["loss"]
    loss.backward()
    record = next(r for r in logbook.read(tmp_path) if "loss" in r)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(
        sum(p.grad.square().sum().item() for p in task.model.parameters() if p.grad is not None) ** 0.5, rel=1e-5
    )
    lr = record["lr"]
    for name in ("norm.bias", "blocks.0.weight"):
        before, after = task.model.get_parameter(name), trainer.task.model.get_parameter(name)
        decayed = before.detach() * (1 - lr * 0.1 * (name == "blocks.0.weight"))
        torch.testing.assert_close(after.detach(), decayed - lr * before.grad.sign(), rtol=1e-3, atol=lr * 1e-2)
    assert same(trainer.ema.module.state_dict(), trainer.task.model.state_dict())  # the average starts at the weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_loss_stops_before_the_update(tmp_path, accumulate):
    with pytest.raises(ValueError, match=r"step 6: .*loss.* is not finite.*0055"):
        tiny.train(tmp_path, spoil=6 * accumulate + accumulate - 1, accumulate=accumulate)
    assert checkpoint.latest(tmp_path).name == "checkpoint-4"


def test_evaluation_does_not_disturb_training(tmp_path):
    def noisy(model, step):
        assert not model.training and not torch.is_grad_enabled()
        return {"draw": torch.rand(()).item(), "per/part": 0.0}

    often = tiny.train(tmp_path / "often", eval_every=2, evaluators={"val": noisy})
    never = tiny.train(tmp_path / "never", eval_every=0)
    assert same(state(often), state(never))
    draws = [record["val/draw"] for record in logbook.read(tmp_path / "often") if "val/draw" in record]
    assert len(draws) == 6 and len(set(draws)) == 1


def test_another_runs_checkpoint_is_refused(tmp_path):
    tiny.train(tmp_path, steps=4)
    with pytest.raises(ValueError, match="was made with batch_size 8, this run has batch_size 16"):
        tiny.train(tmp_path, batch_size=16)
    tiny.train(tmp_path, steps=6, log_every=1)  # longer, and more talkative: allowed


def test_batch_that_cannot_be_shared_out():
    assert TrainConfig(batch_size=32, accumulate=2).loader_batch(4) == 4
    with pytest.raises(ValueError, match="multiple of 6"):
        TrainConfig(batch_size=32, accumulate=2).loader_batch(3)


def test_held_out_loss_by_hand():
    task = tiny.TinyTask()
    batches = [batch for batch, _ in zip(tiny.TinyLoader(5).batches(), range(3), strict=False)]
    evaluate = HeldOutLoss(task, tiny.TinyLoader(5), 3)
    together = {name: torch.cat([batch[name] for batch in batches]) for name in ("x", "kind")}
    expected = task.loss(together, task.counts(together))
    measured = evaluate(task.model, 0)
    assert measured.keys() == expected.keys()
    assert measured == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    other = tiny.TinyModel()
    assert evaluate(other, 1)["loss"] != pytest.approx(measured["loss"]) and evaluate.task.model is not other


def test_length_in_tokens_needs_tokens(tmp_path):
    with pytest.raises(ValueError, match="batches hold none"):
        tiny.train(tmp_path, tokens=1000.0)


def test_length_in_tokens(tmp_path, monkeypatch):
    """100 tokens a batch: a run of 450 ends after the fifth, and the rate follows the tokens."""
    monkeypatch.setattr("fourm.training.trainer.tokens_in", lambda batch: 100)
    trainer = tiny.train(tmp_path, tokens=450.0, log_every=1)
    records = [record for record in logbook.read(tmp_path) if "lr" in record]
    assert trainer.step == 5 and [record["tokens"] for record in records] == [100, 200, 300, 400, 500]
    peak, halfway = 0.02, (250 - 22.5) / 427.5
    expected = peak * (1 + torch.cos(torch.tensor(halfway * torch.pi)).item()) / 2
    assert records[2]["lr"] == pytest.approx(expected, rel=1e-5)


def test_checkpoint_holds_no_pickle(tmp_path):
    path = checkpoint.latest(tiny.train(tmp_path, ema=0.9).folder)
    names = {file.name for file in path.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json"}
    assert json.loads((path / "state.json").read_text())["step"] == 12


def test_moving_average_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    average = moving_average(model, 0.25)
    expected = None
    for update, weight in enumerate([1.0, 5.0, -2.0, 8.0]):
        model.weight.data.fill_(weight)
        average.update_parameters(model)
        kept = min(0.25, (1 + update) / (10 + update))
        expected = weight if expected is None else kept * expected + (1 - kept) * weight
        assert average.module.weight.item() == pytest.approx(expected)
