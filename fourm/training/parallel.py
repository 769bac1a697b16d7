"""How processes share an update: alone, DDP as accelerate makes it, or FSDP2 (torch's own `fully_shard`).

The launcher decides: FSDP if `ACCELERATE_USE_FSDP` is set, as `accelerate launch` does for a config of type FSDP.

Notable under FSDP2:
* each block is a unit of its own, gathered when it is its turn, in the precision of products; everything else is one
  more unit, in float32: the sums in a table's gradient would suffer from less;
* a batch need not touch every weight: processes reduce zeros for the others, and agree afterwards on which weights
  none of them used, whose gradients are dropped as in a single process;
* evaluators get an ordinary model, gathered for them, so that they may call what they like as often as they like;
* a checkpoint is made of the same files as a single process writes: each process writes its rows at their place, and
  reads no others.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recompute

from fourm import checkpoint, faults, runtime
from fourm.model.layers import DecoderBlock, EncoderBlock, kept

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


class Parallel:
    """Wraps a training step for the processes that train it.

    Args:
        joined: The processes.
        step: Module whose forward is the loss, with `model` in it. Sharded in place.
        model: What is trained.
        dtype: Of matrix products.
        compile: Compile the step, or each block if the model is sharded.
        checkpointing: Blocks keep their inputs only, and compute the rest again for the backward pass.

    Raises:
        ValueError: A model without blocks to checkpoint, one with codebooks to shard, or a torch that cannot.
    """

    def __init__(
        self,
        joined: Accelerator,
        step: nn.Module,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        checkpointing: bool = False,
    ):
        checkpointing = checkpointing or parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
        kind = type(model).__name__
        self.joined, self.model, self.sharded = joined, model, runtime.asks_for_shards() and joined.num_processes > 1
        self.skeleton: nn.Module | None = None  # the model without its weights
        if self.sharded:
            self.skeleton = replaced(
                model, {n: torch.empty_like(p, device="meta") for n, p in model.named_parameters()}
            )
        self.watched: list[str] = []
        self.used: set[str] = set()
        blocks = [module for module in model.modules() if isinstance(module, EncoderBlock | DecoderBlock)]
        if checkpointing and not blocks:
            raise ValueError(f"checkpointing: a {kind} has no encoder or decoder blocks to checkpoint")
        if self.sharded and not blocks and list(model.buffers()):
            raise ValueError(f"FSDP does not share the buffers of a {kind} (codebooks); launch its training with DDP")
        for block in blocks:
            forward: Any = block.forward
            if compile and self.sharded:
                forward = torch.compile(forward)
            block.forward = partial(recomputed, forward) if checkpointing else forward  # type: ignore[method-assign]
        if self.sharded:
            self.step: Any = self._shard(step, blocks, dtype)
            return
        if compile:
            step.compile()
        self.step = joined.prepare(step)

    def _shard(self, step: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module:
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ValueError(f"torch {torch.__version__} shards only models of which each batch uses all; update it")
        mesh = torch.distributed.init_device_mesh(self.joined.device.type, (self.joined.num_processes,))
        fewer = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, None, False)
        again = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True)
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=again, mp_policy=fewer)
        whole: Any = fully_shard(step, mesh=mesh)
        whole.set_reduce_scatter_unused_params(True)
        step.register_forward_hook(self._watch)
        return whole

    def _watch(self, *_: Any) -> None:
        """Notes from now on which weights outside of blocks get a gradient; they are gathered just now."""
        if self.watched:
            return
        gathered = {name: p for name, p in self.model.named_parameters() if not isinstance(p, DTensor)}
        self.watched = [name for name, p in gathered.items() if p.requires_grad]
        for name in self.watched:
            gathered[name].register_post_accumulate_grad_hook(lambda _, name=name: self.used.add(name))

    @contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        """Inside, a batch goes forward and backward; processes exchange gradients at the last one of an update only."""
        if self.sharded:
            self.step.set_requires_gradient_sync(last)
        if self.sharded or last:
            yield
        else:
            with self.joined.no_sync(self.step):
                yield
        if self.sharded and last:
            self._drop_unused()

    def _drop_unused(self) -> None:
        mine = torch.tensor([name in self.used for name in self.watched], dtype=torch.int32, device=self.joined.device)
        everywhere = self.joined.reduce(mine, "sum").tolist()
        parameters = dict(self.model.named_parameters())
        for name, processes in zip(self.watched, everywhere, strict=True):
            if not processes:
                parameters[name].grad = None
        self.used.clear()

    def storage(self) -> nn.Module:
        """The model as a moving average is made of it: itself, or an ordinary module around this process's shards."""
        return self.model if self.skeleton is None else replaced(self.skeleton, self.model.state_dict())

    def whole(self, model: nn.Module) -> nn.Module:
        """An ordinary model for `model` or an average of it: the same, or gathered. All processes must ask for it."""
        if self.skeleton is None:
            return model
        tensors = model.state_dict().items()
        gathered = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors}
        return replaced(self.skeleton, gathered).to(self.joined.device)

    @property
    def write(self) -> Callable[[Path, Mapping[str, Tensor]], None] | None:
        """What `checkpoint.save` needs so that a checkpoint does not depend on the number of processes."""
        return partial(write, main=self.joined.is_main_process) if self.sharded else None

    def latest(self, folder: Path) -> Path | None:
        """As `checkpoint.latest`; the main process looks, the others need not read all of a checkpoint for it."""
        found: list[Any] = [None, None]
        if self.joined.is_main_process:
            try:
                found[0] = checkpoint.latest(folder, tidy=True)
            except ValueError as error:
                found[1] = str(error)
        path, wrong = broadcast_object_list(found)
        if wrong:
            raise ValueError(wrong)
        return path

    def agree(self, well: bool) -> bool:
        """Whether it is well with all processes."""
        return not self.joined.reduce(torch.tensor(float(not well), device=self.joined.device), "sum")


def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with these parameters and buffers in place of its own, which are not copied."""
    own = itertools.chain(model.named_parameters(), model.named_buffers())
    memo: dict[int, Any] = {}
    for name, tensor in own:
        if name in tensors:
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(tensors[name], tensor.requires_grad) if trained else tensors[name]
    return copy.deepcopy(model, memo)


def recomputed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """forward(*args), of which the backward pass keeps the arguments only."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return recompute(forward, *args, use_reentrant=False, context_fn=lambda: (kept(), kept()))


def rows(tensor: Tensor) -> slice:
    """This process's rows of a tensor that `fully_shard` has cut along its first axis."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    mesh = tensor.device_mesh
    each = -(-len(tensor) // mesh.size())
    first = min(mesh.get_local_rank() * each, len(tensor))
    return slice(first, min(first + each, len(tensor)))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write(file: Path, tensors: Mapping[str, Tensor], main: bool) -> None:
    """Writes one safetensors file, byte for byte that of `safetensors.torch.save_file`.

    Every process calls this and writes its rows of sharded tensors; the main one also what is not sharded. The file is
    whole when all are through. Of a tensor on a GPU one part at a time is copied to the CPU.

    Args:
        file: On a file system that all processes share.
        tensors: By name; with the same names and shapes in every process.
        main: Whether this is the main process.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    faults.reach("write")
    with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as out:
        if main:
            out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            if main or isinstance(tensor, DTensor):
                part = local(tensor.detach()).cpu().contiguous()
                before = rows(tensor).start * part[:1].nbytes if isinstance(tensor, DTensor) else 0
                out.seek(8 + len(text) + header[name]["data_offsets"][0] + before)
                out.write(part.flatten().view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def read(file: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Tensors of a safetensors file; of those that are sharded, this process's rows only.

    Args:
        file: What `write` or any other program wrote.
        like: The tensor of this name in this process, from which it follows what of it is read.

    Raises:
        ValueError: A sharded tensor has another shape in the file.
    """
    tensors: dict[str, Tensor] = {}
    try:
        opening = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    with opening as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            stored, mine = opened.get_slice(name), like(name)
            if not isinstance(mine, DTensor) or not stored.get_shape():
                tensors[name] = opened.get_tensor(name)
                continue
            if stored.get_shape() != list(mine.shape):
                raise ValueError(f"{file}: {name} has shape {stored.get_shape()}, not {list(mine.shape)}")
            part = stored[rows(mine)].to(mine.device)
            tensors[name] = DTensor.from_local(
                part, mine.device_mesh, mine.placements, run_check=False, shape=mine.shape, stride=mine.stride()
            )
    return tensors
