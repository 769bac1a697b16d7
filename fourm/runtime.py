"""What a run stands on: processes, device, precision, seeds, and a folder that explains itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import random
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env, patch_environment

PRECISIONS = ("auto", "fp32", "bf16")


class GPU(NamedTuple):
    """Dense bfloat16 products in TFLOP/s, and memory in GiB, as their makers give them."""

    tflops: float
    gib: float


GPUS = {
    "A100-40G": GPU(312, 40),
    "A100": GPU(312, 80),
    "H100": GPU(989, 80),
    "H100-PCIe": GPU(756, 80),
    "H200": GPU(989, 141),
    "B200": GPU(2250, 180),
    "L40S": GPU(362, 48),
    "MI300X": GPU(1307, 192),
    "RTX4090": GPU(165, 24),
}


def accelerator(threads: int | None = None) -> Accelerator:
    """Joins the processes that the launcher started, or just this one.

    Args:
        threads: Threads torch computes with in this process; default: torch's own choice.

    Raises:
        ValueError: Another number of processes than asked for came together.
    """
    keep_memory()
    if threads:
        torch.set_num_threads(threads)
    # A batch need not touch every parameter: a rare modality is absent from some.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Processes wait for one that measures, or has more to tokenize; torch would give up after 10 to 30 minutes.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))
    # Without `cpu`, accelerate takes several processes on a machine without GPU for as many separate runs.
    on_cpu = not torch.accelerator.is_available()
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # accelerate's own FSDP is DDP on CPU, without a word
        joined = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[unused, patient])
    asked = os.environ.get("WORLD_SIZE", "1")
    if not asked.isdigit() or int(asked) != joined.num_processes:
        raise ValueError(
            f"WORLD_SIZE asks for {asked} processes, but {joined.num_processes} came together; start several with "
            "`python -m torch.distributed.run --nproc_per_node N -m fourm ...`"
        )
    return joined


def asks_for_shards() -> bool:
    """Whether the launcher wants the model sharded: `accelerate launch` with a config of type FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def keep_memory() -> None:
    """Lets this process keep the memory it frees, where the C library is glibc and torch computes on CPU.

    By default glibc gives tensors of more than 128 kB back at once, and getting fresh pages for the next ones costs a
    tenth of a training step. From 4 MB on they are still given back, so that the heap stays compact.
    """
    if platform.libc_ver()[0] == "glibc" and not torch.accelerator.is_available():
        library = ctypes.CDLL(None)
        for parameter, value in ((-3, 2**22), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            library.mallopt(ctypes.c_int(parameter), ctypes.c_int(value))


def hush() -> None:
    """Sends the output nowhere from now on, once a write to it has failed: whoever read it is gone, the run goes on."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
        for stream in {out, err} if os.path.sameopenfile(out, err) else {out}:
            os.dup2(nowhere.fileno(), stream)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; without, bf16 is slower than fp32 by far."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and in_hardware)
    return False


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of matrix products: bfloat16 or float32. `auto` is bfloat16 wherever the hardware has it.

    Raises:
        ValueError: An unknown precision, or `bf16` on hardware without it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, allowed are {', '.join(PRECISIONS)}")
    if precision == "bf16" and not has_bf16(device):
        raise ValueError(f"precision is 'bf16', but this {device.type} has no bfloat16 hardware; use 'auto' or 'fp32'")
    return torch.bfloat16 if precision != "fp32" and has_bf16(device) else torch.float32


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products, against which use is measured: the maker's figure of a GPU, a CPU's as measured.

    The CPU's is the best of three products of 1024 x 1024 matrices, with the threads of this process.

    Returns:
        None for devices that are not in `GPUS`, and for float32 on a GPU.
    """
    if device.type == "cpu":
        a, b = torch.ones(2, 1024, 1024, dtype=dtype)
        seconds = []
        for _ in range(4):  # the first one warms up
            began = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - began)
        return 2 * 1024**3 / min(seconds[1:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if dtype != torch.bfloat16 or re.search(r"\b(Laptop|D|NVL|MIG)\b", name):  # slower ones, and parts of one
        return None
    words = {key: re.sub(r"(?<=[A-Z])(?=\d)", " ?", key).split("-") for key in GPUS}  # RTX 4090
    fitting = [key for key, parts in words.items() if all(re.search(rf"{part}(?!\d)", name) for part in parts)]
    return 1e12 * GPUS[max(fitting, key=len)].tflops if fitting else None


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of its own for everything that has a name, in [0, 2^63); the same on every machine."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


def seed_everything(seed: int, *names: str | int) -> None:
    """Seeds the global generators of torch, numpy and Python, which layers and libraries draw from."""
    derived = derive_seed(seed, *names)
    torch.manual_seed(derived)
    np.random.seed(derived % 2**32)
    random.seed(derived)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """What the figures of a run depend on: versions, machine, threads, and the commit of the working directory."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = ("numpy", "accelerate", "timm", "tokenizers", "vector-quantize-pytorch")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{package: importlib.metadata.version(package) for package in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": has_bf16(device),
        "commit": commit.stdout.strip() or None,
    }


def open_run(folder: str | Path, config: dict[str, Any]) -> Path:
    """Makes a run's folder, with the resolved config and the environment in it as `config.yaml`, `environment.yaml`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", config), ("environment", environment())):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def finish(joined: Accelerator, status: int = 0) -> None:
    """Ends the program of one of several processes; where there is only one it returns if all is well.

    Gloo processes tend to abort at interpreter exit although all work is done, so they leave without it.
    """
    if joined.num_processes > 1:
        joined.wait_for_everyone()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        if joined.device.type == "cpu":
            os._exit(status)
    if status:
        sys.exit(status)
