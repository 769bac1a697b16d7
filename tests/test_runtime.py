import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from fourm import runtime


def test_seeds_depend_on_every_name():
    named = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a1")]
    seeds = {runtime.derive_seed(*names) for names in named}
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)
    assert runtime.derive_seed(0, "a", 1) == 7965780462979794708  # the same on every machine and version


def test_generators_repeat():
    first, again, other = (torch.rand(3, generator=runtime.generator(1, name)) for name in ("x", "x", "y"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(runtime, "has_bf16", lambda device: False)
    assert runtime.autocast_dtype("auto", cpu) == torch.float32
    with pytest.raises(ValueError, match="no bfloat16 hardware"):
        runtime.autocast_dtype("bf16", cpu)
    monkeypatch.setattr(runtime, "has_bf16", lambda device: True)
    assert runtime.autocast_dtype("auto", cpu) == torch.bfloat16
    assert runtime.autocast_dtype("fp32", cpu) == torch.float32
    with pytest.raises(ValueError, match="allowed are auto, fp32, bf16"):
        runtime.autocast_dtype("fp8", cpu)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362),
     ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307), ("NVIDIA L40", None), ("NVIDIA RTX A1000", None),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None)],
)  # fmt: skip
def test_peak_of_a_gpu_follows_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = runtime.peak_flops.__wrapped__(torch.device("cuda"), torch.bfloat16)
    assert peak == (tflops and tflops * 1e12)
    assert runtime.peak_flops.__wrapped__(torch.device("cuda"), torch.float32) is None


def test_peak_of_a_cpu_is_measured():
    cpu = torch.device("cpu")
    peak = runtime.peak_flops(cpu, torch.float32)
    assert 1e9 < peak < 1e14 and runtime.peak_flops(cpu, torch.float32) == peak  # once
    matrix = torch.rand(512, 512)
    began = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    assert 4 * 2 * 512**3 / (time.perf_counter() - began) < 3 * peak


def test_bf16_on_cpu_needs_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not runtime.has_bf16(torch.device("cpu"))


def test_world_size_that_did_not_come_together(monkeypatch):
    runtime.accelerator()
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="asks for 2 processes, but 1 came together"):
        runtime.accelerator()


def test_processes_wait_for_each_other_for_days():
    program = (
        "import torch, fourm.runtime as r; r.accelerator(); group = torch.distributed.group.WORLD;"
        "print(group._get_backend(torch.device('cpu')).options._timeout.days)"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | alone, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr


def test_run_folder_explains_itself(tmp_path):
    folder = runtime.open_run(tmp_path / "a" / "run", {"lr": 0.1, "names": ["x"]})
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"lr": 0.1, "names": ["x"]}
    environment = yaml.safe_load((folder / "environment.yaml").read_text())
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()


def test_accelerate_does_not_shard_by_itself():
    program = (
        "import os, fourm.runtime as r; joined = r.accelerator();"
        "print(joined.distributed_type, r.asks_for_shards(), os.environ['ACCELERATE_USE_FSDP'])"
    )
    asked = os.environ | {"ACCELERATE_USE_FSDP": "true"}
    done = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True)
    assert done.stdout == "DistributedType.NO True true\n", done.stderr
