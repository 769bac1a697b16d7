"""DDP and FSDP2 over gloo, against one process; checkpoints that do not know who wrote them."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save

from fourm import checkpoint, logbook
from fourm.model.fourm import FourM
from fourm.model.layers import EncoderBlock
from fourm.runtime import has_bf16

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
SCRIPT = Path(__file__).with_name("several.py")
spec = importlib.util.spec_from_file_location("several_alone", SCRIPT)
several = importlib.util.module_from_spec(spec)
spec.loader.exec_module(several)
bf16 = ["fsdp-bf16"] if has_bf16(torch.device("cpu")) else []


def start_from(folder: Path, other: Path) -> Path:
    """A run that goes on from the other's third update."""
    shutil.copytree(other / "checkpoint-3", folder / "checkpoint-3")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of this process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "false")
        for name in ("adamw", "muon"):
            several.train(folder / name, optimizer=name)
        several.train(folder / "routed", decoupled=["depth"])
        yield folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, alone, accelerated):
    """Runs of two processes, which `accelerate launch` told to shard."""
    folder = tmp_path_factory.mktemp("two")
    start_from(folder / "fsdp-from-one", alone / "adamw")
    cases = ["fsdp", "ddp", "ddp-muon", "fsdp-muon", "fsdp-checkpointing", "fsdp-from-one"]
    cases += ["fsdp-routed", "ddp-routed", "failing", *bf16]
    said = accelerated(CONFIGS / "2cpu-fsdp2.yaml", SCRIPT, folder, *cases)
    assert said.count("2 processes on cpu") == len(cases)
    return folder


def assert_close(run: Path, reference: Path, step: int = 6, tolerance: float = 1e-4) -> None:
    """Checkpoints, and what was logged up to them."""
    one, other = (checkpoint.load(folder / f"checkpoint-{step}") for folder in (reference, run))
    assert one.tensors.keys() == other.tensors.keys() == {"model", "optimizer", "ema"}
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        for name, tensor in tensors.items():
            error = (tensor - other.tensors[group][name]).abs().max().item()
            assert error <= tolerance * tensor.abs().max().item() + 1e-6, (group, name, error)
    names = ("loss", "lr", "grad_norm", "tokens", "val/loss")
    one, other = (
        {(record["step"], name): record[name] for record in logbook.read(folder) for name in names if name in record}
        for folder in (reference, run)
    )
    assert other == pytest.approx({place: one[place] for place in other}, rel=tolerance)
    assert {(step, name) for step in (4, 5, 6) for name in names[:3]} <= other.keys()


@pytest.mark.parametrize("case", ["ddp", "fsdp", "ddp-muon", "fsdp-muon", "fsdp-checkpointing", "fsdp-from-one",
                                  "fsdp-routed", "ddp-routed"])  # fmt: skip
def test_two_processes_equal_one(alone, two, case):
    """Weights, optimiser, averages, losses, gradient norms and held-out losses."""
    kind = next((name for name in ("muon", "routed") if name in case), "adamw")
    tolerance = 2e-3 if kind == "muon" else 1e-4  # Muon magnifies directions that a gradient hardly has
    assert_close(two / case, alone / kind, tolerance=tolerance)


def test_routed_adapters_were_trained(alone):
    """Both sets, by samples that have their modalities."""
    tensors = checkpoint.load(alone / "routed" / "checkpoint-6").tensors["model"]
    up = tensors["encoder.0.attn.proj.lora_up.weight"]
    assert up.shape[1] == 4 and up.abs().amax(0).min() > 0


def test_a_sharded_run_writes_what_safetensors_would(two):
    files = sorted((two / "fsdp" / "checkpoint-6").glob("*.safetensors"))
    assert [file.stem for file in files] == ["ema", "model", "optimizer"]
    for file in files:
        assert save(load_file(file), metadata={"format": "pt"}) == file.read_bytes()


def test_a_sharded_run_ends_with_an_ordinary_model(two):
    final = FourM.from_pretrained(two / "fsdp" / "model").state_dict()
    averages = load_file(two / "fsdp" / "checkpoint-6" / "ema.safetensors")
    assert final.keys() == averages.keys() and all(torch.equal(final[name], averages[name]) for name in final)


def test_all_processes_fail_where_one_cannot_write(two):
    said = [(two / "failing" / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert "another process failed to write" in said[0] and "No space left on device" in said[1]
    assert checkpoint.latest(two / "failing").name == "checkpoint-3"
    assert not list((two / "failing").glob(".checkpoint*"))


@pytest.mark.skipif(not bf16, reason="this CPU has no bfloat16 products")
def test_bf16_under_fsdp_is_close_to_fp32(alone, two):
    one, other = (logbook.read(folder)[0] for folder in (alone / "muon", two / "fsdp-bf16"))
    assert other["loss"] == pytest.approx(one["loss"], rel=2e-3) and other["loss"] != one["loss"]
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=3e-2)
    weights = load_file(two / "fsdp-bf16" / "checkpoint-1" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def drawn(folder: Path, processes: int) -> list[str]:
    """Samples in the order in which a run drew them, from what each process was given."""
    files = [folder / f"keys-{rank}-of-{processes}.jsonl" for rank in range(processes)]
    batches = zip(*(map(json.loads, file.read_text().splitlines()) for file in files), strict=True)
    return [key for batch in batches for keys in zip(*batch, strict=True) for key in keys]


def test_a_run_goes_on_with_other_processes_and_workers(alone, two, launch, tmp_path):
    """Two that shared the model, then one with two workers, or four with DDP; one, then two that share it."""
    start_from(tmp_path / "ddp-from-two", two / "fsdp")
    launch(4, SCRIPT, tmp_path, "ddp-from-two")
    several.train(start_from(tmp_path / "one-from-two", two / "fsdp"), workers=2)
    whole = drawn(alone / "adamw", 1)
    assert len(whole) == 48 and set(whole[:36]) == {f"{i:02}" for i in range(36)}  # an epoch, and into the next
    assert drawn(two / "fsdp", 2) == whole
    for run, processes in ((tmp_path / "ddp-from-two", 4), (tmp_path / "one-from-two", 1), (two / "fsdp-from-one", 2)):
        assert whole[:24] + drawn(run, processes) == whole
        assert_close(run, alone / "adamw")


@pytest.mark.parametrize(("drop_path", "decoupled"), [(0.0, []), (0.5, []), (0.0, ["depth"])])
def test_checkpointed_blocks_compute_the_same(tmp_path, drop_path, decoupled):
    runs = [tmp_path / "kept", tmp_path / "again"]
    for folder, checkpointing in zip(runs, (False, True), strict=True):
        several.train(folder, checkpointing=checkpointing, steps=2, drop_path=drop_path, decoupled=decoupled)
    one, other = (load_file(run / "checkpoint-2" / "model.safetensors") for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpointed_blocks_keep_their_inputs_only(tmp_path):
    trainer = several.train(tmp_path, checkpointing=True, steps=1)
    (block, *_), kept = [m for m in trainer.task.model.modules() if isinstance(m, EncoderBlock)], []
    blocks = several.Blocks.even(2, 7, 7, torch.device("cpu"))
    x = torch.randn(14, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        block(x, blocks)
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() != x.data_ptr()) == 0


@pytest.mark.slow
def test_a_compiled_sharded_step_equals_an_eager_one(alone, launch, tmp_path):
    launch(2, SCRIPT, tmp_path, "fsdp-compiled")
    one, other = (logbook.read(folder)[0] for folder in (alone / "adamw", tmp_path / "fsdp-compiled"))
    fields = ["loss", "loss/depth", "loss/caption", "grad_norm"]
    assert [one[field] for field in fields] == pytest.approx([other[field] for field in fields], rel=1e-4)


def test_accelerate_reads_the_configs():
    found = {path.stem: load_config_from_file(str(path)) for path in sorted(CONFIGS.glob("*.yaml"))}
    assert found.keys() == {"1gpu", "8gpu-ddp", "nodes-fsdp2", "2cpu-ddp", "2cpu-fsdp2"}
    for name, config in found.items():
        kind = "NO" if name == "1gpu" else "FSDP" if "fsdp2" in name else "MULTI_GPU"
        assert str(config.distributed_type).endswith(kind) and config.mixed_precision == "no" and not config.use_cpu
    assert (found["nodes-fsdp2"].num_machines, found["nodes-fsdp2"].num_processes) == (4, 32)


def test_checkpointing_needs_blocks(tmp_path):
    spec = importlib.util.spec_from_file_location("tiny_flat", SCRIPT.with_name("tiny.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    with pytest.raises(ValueError, match="TinyModel has no encoder or decoder blocks"):
        tiny.train(tmp_path, checkpointing=True)
