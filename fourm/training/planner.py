"""What a run takes before it is started: updates, tokens, parameters, memory, time. From shapes alone, without data.

Notable:
* a sample's tokens are drawn as the masker draws them, from modalities that are all there; texts shorter than their
  budget then bring fewer, so loads, memory and time are upper bounds;
* FLOPs are those of matrix products that the loss and its gradients need (two and four per weight or score); what
  checkpointing computes again is not useful work, but takes time;
* activations are the bytes autograd keeps for the backward pass, term by term (`kept_activations`), with attention
  that keeps no scores, and a head that keeps none either;
* not counted: the CUDA context, the allocator's gaps, and what lives within one operation. `SPARE` is left for them.

n encoder tokens and m decoder tokens of a sample, D width, c bytes of a number that matrices are multiplied in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fourm.masking.budgets import MaskingConfig, Mixture
from fourm.modalities import TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.runtime import GPUS
from fourm.training.optim import OptimConfig, learning_rate, parameter_groups
from fourm.training.trainer import TrainConfig

GIB = 2**30
SPARE = 0.1  # share of a GPU's memory


@dataclass(frozen=True)
class Cluster:
    """What is computed on.

    Args:
        gpus: How many.
        gpu: Which, a name in `GPUS`.
        mfu: Share of their peak that useful products reach.
    """

    gpus: int = 8
    gpu: str = "A100"
    mfu: float = 0.4

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"gpu is {self.gpu!r}, allowed are {', '.join(GPUS)}")
        if self.gpus < 1 or not 0 < self.mfu <= 1:
            raise ValueError(f"gpus is {self.gpus} (at least 1), mfu is {self.mfu} (above 0, at most 1)")


class Load(NamedTuple):
    """What one sample brings on average.

    Attributes:
        given: Encoder tokens by modality; registers count as one.
        asked: Decoder tokens by modality.
        pairs: Query-key pairs of the encoder's self-attention, the decoder's, and of cross-attention.
        slots: Encoder and decoder tokens of the longest samples, which attention pads the others to.
    """

    given: Mapping[str, float]
    asked: Mapping[str, float]
    pairs: tuple[float, float, float]
    slots: tuple[float, float]

    @property
    def tokens(self) -> tuple[float, float]:
        """n and m."""
        return sum(self.given.values()), sum(self.asked.values())


def expected_load(space: TokenSpace, masking: MaskingConfig, registers: int = 0, draws: int = 1024) -> Load:
    """The load of samples that have every modality."""
    mixture, present, index = Mixture(space, masking), np.ones((draws, len(space)), bool), np.arange(draws)
    budgets = mixture.draw(present, np.zeros_like(index), index)
    given = np.column_stack([budgets.input, np.full(draws, registers)])
    asked = budgets.target * [row.predicted for row in space.modalities.values()]
    n, m = given.sum(1), asked.sum(1)
    names = [*space.names, "registers"]
    inputs, targets = (dict(zip(names, tokens.mean(0).tolist(), strict=False)) for tokens in (given, asked))
    pairs = (float((n * n).mean()), float((m * m).mean()), float((n * m).mean()))
    return Load(inputs, targets, pairs, (float(n.max()), float(m.max())))


class Parameters(NamedTuple):
    """Numbers of a model.

    Attributes:
        total: All that are trained.
        trunk: Those outside of the modalities' embeddings and heads, the count that 4M publishes.
        multiplied: Those in linear layers, of which mixed precision makes copies.
        block: Those of the largest block.
        outside: Those outside of all blocks.
        gradients: Those with a dense gradient.
        optimiser: Numbers that the optimiser remembers.
    """

    total: int
    trunk: int
    multiplied: int
    block: int
    outside: int
    gradients: int
    optimiser: int


def count_parameters(model: FourM, optim: OptimConfig) -> Parameters:
    """Counts a model's parameters; it may be on the meta device."""
    groups = parameter_groups(model, optim.name == "muon", optim.lazy_tables)
    grouped = {name: sum(parameter.numel() for parameter in group) for name, group in groups.items()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    modalities = ("encoder_embeddings.", "decoder_embeddings.", "to_logits.")
    linear = (module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "to_logits")
    blocks = [sum(p.numel() for p in block.parameters()) for block in [*model.encoder, *model.decoder]]
    total = sum(sizes.values())
    return Parameters(
        total=total,
        trunk=sum(size for name, size in sizes.items() if not name.startswith(modalities)),
        multiplied=sum(module.weight.numel() for module in linear),
        block=max(blocks),
        outside=total - sum(blocks),
        gradients=total - grouped["rows"],
        optimiser=2 * total - grouped["muon"],
    )


def forward_flops(model: FourM, load: Load) -> dict[str, float]:
    """FLOPs of the matrix products of one sample's forward pass: `inputs`, `linear`, `attention`, `head`."""
    (n, m), dim = load.tokens, model.config.dim
    flops = dict.fromkeys(("inputs", "linear", "attention", "head"), 0.0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "to_logits":
            modality = name.removeprefix("encoder_embeddings.project.")
            of_encoder = not name.startswith("decoder.") or name.endswith("cross_attn.kv")
            tokens = load.given[modality] if modality != name else n if of_encoder else m
            flops["inputs" if modality != name else "linear"] += 2 * tokens * module.weight.numel()
    encoder, decoder, cross = load.pairs
    flops["attention"] = 4 * dim * (len(model.encoder) * encoder + len(model.decoder) * (decoder + cross))
    flops["head"] = sum(2 * tokens * dim * model.space[name].vocab_size for name, tokens in load.asked.items())
    return flops


def training_flops(model: FourM, load: Load) -> float:
    """FLOPs of one sample's forward and backward pass; nobody asks for the gradient of pixels and vectors."""
    forward = forward_flops(model, load)
    return 3 * sum(forward.values()) - forward["inputs"]


def flops_per_token(model: FourM, masking: MaskingConfig) -> float:
    """FLOPs of training on one given or asked token, on average."""
    load = expected_load(model.space, masking, model.config.registers)
    return training_flops(model, load) / (sum(load.tokens) - model.config.registers)


class Kept(NamedTuple):
    """A term of what autograd keeps.

    Attributes:
        where: In each `encoder` or `decoder` block, or at the `ends` of the model.
        of: Whose tokens or slots, or scores that are masked.
        size: Bytes of one of them.
    """

    where: str
    of: str
    size: float


def kept_activations(config: FourMConfig, compute: int) -> list[Kept]:
    """Terms of the activations of a model; `compute` is c. The stream between blocks is float32."""
    dim, c, normalisers = config.dim, compute, 4 * config.heads
    hidden = int(2 * int(dim * config.mlp_ratio) / 3) if config.gated_mlp else int(dim * config.mlp_ratio)
    norm = 4 * dim + 8  # its input; mean and deviation
    # What a projection gets from a norm is made again; mixed precision keeps a copy of it in its own type.
    before = 0 if c == 4 else c * dim
    ends = before + c * dim  # and the one behind it
    # QK-norm: mean and deviation; its input in float32, in a copy of its own or with values beside keys
    query_norm = config.qk_norm * (4 * dim + 2 * normalisers)
    key_norm = config.qk_norm * ((4 if c < 4 else 8) * dim + 2 * normalisers)
    # gate and value (their product is made again), or GELU's two sides; a copy of the input for each layer
    mlp = norm + before * (1 + config.gated_mlp) + 2 * c * hidden
    queries, keys = 2 * c * dim + normalisers, 2 * c * dim  # queries and what they get; keys and values
    return [
        Kept("encoder", "encoder tokens", norm + ends + query_norm + key_norm + mlp),
        Kept("encoder", "encoder slots", queries + keys),
        Kept("encoder", "encoder mask", c),
        Kept("decoder", "decoder tokens", norm + ends + query_norm + key_norm + norm + ends + query_norm + mlp),
        Kept("decoder", "decoder slots", queries + keys + queries),
        Kept("decoder", "decoder mask", c),
        Kept("decoder", "encoder tokens", 8 + before + key_norm),  # normed by each block, kept once below
        Kept("decoder", "encoder slots", keys),
        Kept("decoder", "cross mask", c),
        Kept("ends", "encoder tokens", norm + c * dim + 4 * dim),  # last norm, projection, context
        Kept("ends", "decoder tokens", norm + 8 * dim),  # last norm in and out, and the gradient that the head leaves
    ]


def activations(
    config: FourMConfig, space: TokenSpace, load: Load, compute: int = 2, checkpoint: bool = False
) -> float:
    """Bytes that one sample keeps for the backward pass.

    Args:
        config: Shape of the model. `sdpa` pads to the longest sample of a batch, with masks where lengths differ and
            always in the decoder; `flex` and `xformers` do not.
        space: The modality table.
        load: Tokens of the sample.
        compute: Bytes of a number that matrices are multiplied in.
        checkpoint: Blocks keep their inputs only, and one at a time computes the rest again.
    """
    (n, m), padded = load.tokens, config.attention == "sdpa"
    rows, columns = load.slots if padded else (n, m)
    differ = padded and load.pairs[0] < rows * rows
    amount = {
        "encoder tokens": n,
        "decoder tokens": m,
        "encoder slots": rows,
        "decoder slots": columns,
        "encoder mask": differ * rows * rows,
        "decoder mask": padded * columns * columns,
        "cross mask": differ * rows * columns,
    }
    parts = {"encoder": 0.0, "decoder": 0.0, "ends": 0.0}
    for where, of, size in kept_activations(config, compute):
        parts[where] += size * amount[of]
    again = 0.0
    if checkpoint:
        again = max(parts["encoder"], parts["decoder"])
        parts |= {"encoder": 4 * config.dim * n, "decoder": 4 * config.dim * m}
    widths = {name: space[name].width + config.dim for name in space.inputs() if not space[name].discrete}
    inputs = sum(4 * width * load.given[name] for name, width in widths.items())  # as they come, and projected
    blocks = config.encoder_depth * parts["encoder"] + config.decoder_depth * parts["decoder"]
    return blocks + again + parts["ends"] + inputs


class Memory(NamedTuple):
    """Bytes on one GPU.

    Attributes:
        weights: Weights, and their moving average where there is one.
        gradients: Gradients, and those on their way between GPUs.
        optimiser: What the optimiser remembers.
        copies: Weights in the precision of products, or gathered from other GPUs.
        activations: What is kept for the backward pass.
    """

    weights: float
    gradients: float
    optimiser: float
    copies: float
    activations: float


def memory(
    parameters: Parameters,
    kept: float,
    gpus: int,
    sharded: bool,
    mixed: bool = True,
    ema: bool = False,
    accumulates: bool = False,
) -> Memory:
    """Memory of one GPU.

    With DDP all of the state is on every GPU, and the gradients a second time, in the buckets they are sent in. With
    FSDP2 a GPU keeps its share, and gathers what is outside of blocks, in float32, and two blocks (one ahead) in the
    precision of products; gradients leave in float32, those of several batches together.

    Args:
        parameters: Of the model.
        kept: Bytes of activations, of all samples that are computed at once.
        gpus: How many share the work.
        sharded: FSDP2 instead of DDP.
        mixed: Matrices are multiplied in bfloat16.
        ema: There is a moving average of the weights.
        accumulates: An update is made of several batches.
    """
    state = 4 / gpus if sharded else 4.0  # bytes of a number, here
    copies, sent = 2.0 * mixed * parameters.multiplied, 4.0 * parameters.gradients * (gpus > 1)
    if sharded:
        copies = 4 * parameters.outside + (2 if mixed else 4) * 2.0 * parameters.block
        sent = 4.0 * (parameters.gradients if accumulates else max(parameters.outside, parameters.block))
    weights, gradients = state * parameters.total * (1 + ema), state * parameters.gradients + sent
    return Memory(weights, gradients, state * parameters.optimiser, copies, kept)


@dataclass(frozen=True)
class Plan:
    """What a masked model's run takes.

    Attributes:
        load: Of an average sample.
        parameters: Of the model.
        updates: How many.
        flops: Of one sample, forward and backward.
        days: On the cluster; the second number is with checkpointed activations.
        memory: Of one GPU, by what is sharded and kept.
        accumulate: By the same names the fewest batches of an update that fit into memory; 0 if none does.
    """

    load: Load
    parameters: Parameters
    updates: int
    flops: float
    days: tuple[float, float]
    memory: Mapping[str, Memory]
    accumulate: Mapping[str, int]


def plan(train: TrainConfig, shape: FourMConfig, space: TokenSpace, masking: MaskingConfig, cluster: Cluster) -> Plan:
    """Plans a run.

    Args:
        train: How long and how it trains.
        shape: Shape of the model.
        space: The modality table.
        masking: What is given and asked.
        cluster: Where.

    Raises:
        ValueError: Samples that cannot be shared out evenly, or another wrong config.
    """
    with torch.device("meta"):
        model = FourM(shape, space)
    parameters, load = count_parameters(model, train.optim), expected_load(space, masking, shape.registers)
    mixed, gpu = train.precision != "fp32", GPUS[cluster.gpu]
    samples = train.loader_batch(cluster.gpus)
    flops, forward = training_flops(model, load), forward_flops(model, load)
    again = forward["linear"] + forward["attention"]
    updates = math.ceil(train.tokens / (train.batch_size * sum(load.tokens))) if train.tokens else train.steps
    rate = cluster.gpus * gpu.tflops * 1e12 * cluster.mfu * 86400
    memories, fitting = {}, {}
    for sharded, checkpoint in itertools.product((False, True)[: cluster.gpus], (False, True)):
        name = ("FSDP2" if sharded else "DDP" if cluster.gpus > 1 else "alone") + ", checkpointed" * checkpoint
        kept = activations(shape, space, load, 2 if mixed else 4, checkpoint)
        own = samples * train.accumulate

        def needed(cut: int, kept: float = kept, sharded: bool = sharded, own: int = own) -> Memory:
            return memory(parameters, own / cut * kept, cluster.gpus, sharded, mixed, train.ema > 0, cut > 1)

        cuts = (cut for cut in range(1, own + 1) if own % cut == 0)
        memories[name] = needed(train.accumulate)
        fitting[name] = next((cut for cut in cuts if sum(needed(cut)) <= (1 - SPARE) * gpu.gib * GIB), 0)
    total = updates * train.batch_size / rate
    return Plan(load, parameters, updates, flops, (total * flops, total * (flops + again)), memories, fitting)


def rates(train: TrainConfig) -> str:
    """Learning rates over the run: at the end of the rise, and after each fifth."""
    length = train.tokens or train.steps
    warmup = train.optim.warmup if train.optim.warmup < 1 else train.optim.warmup / length
    shares = sorted({0.0, warmup, *(share / 5 for share in range(1, 6))})
    return ", ".join(
        f"{learning_rate(train.optim, share * length, length):.2e} at {100 * share:.3g} %" for share in shares
    )


def describe_tokenizer(train: TrainConfig, tokenizer: nn.Module) -> str:
    """The plan of a tokenizer's run as text; activations and time are not planned."""
    total, updates = sum(p.numel() for p in tokenizer.parameters()), train.steps
    state = 4 * total * (4 + (train.ema > 0)) / GIB
    lines = {
        "parameters": f"{total:,}",
        "run": f"{updates:,} updates of {train.batch_size:,} samples, {updates * train.batch_size:,} in all",
        "rate": rates(train),
        "memory": f"{state:.2f} GiB of weights, gradients and optimiser on each GPU, and activations",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


def describe(
    train: TrainConfig, shape: FourMConfig, space: TokenSpace, masking: MaskingConfig, cluster: Cluster
) -> str:
    """The plan of a run as text. For arguments and errors see `plan`."""
    made, (given, asked) = plan(train, shape, space, masking, cluster), Mixture(space, masking).widths
    (n, m), samples, updates = made.load.tokens, train.batch_size, made.updates
    parts = train.loader_batch(cluster.gpus)
    days, repeated = made.days
    lines = {
        "model": f"width {shape.dim}, {shape.encoder_depth} + {shape.decoder_depth} blocks, {shape.heads} heads; "
        f"{len(space.inputs())} modalities in, {len(space.outputs())} out",
        "parameters": f"{made.parameters.total:,}; {made.parameters.trunk:,} without those of modalities",
        "sample": f"{given} + {asked} slots; budgets fill {n:.1f} + {m:.1f}, texts that are shorter fewer",
        "update": f"{samples:,} samples, {samples * (given + asked):,} slots, {samples * (n + m):,.0f} tokens; "
        f"each of {cluster.gpus} GPUs computes {train.accumulate} x {parts} samples",
        "run": f"{updates:,} updates, {updates * samples:,} samples, {updates * samples * (given + asked):,} slots, "
        f"{updates * samples * (n + m):,.0f} tokens",
        "rate": rates(train),
        "compute": f"{made.flops / 1e9:,.2f} GFLOP a sample, {made.flops / (n + m) / 1e9:.3f} a token, "
        f"{updates * samples * made.flops:.3g} FLOP in all",
        "time": f"{days:.3g} days on {cluster.gpus} {cluster.gpu} at {cluster.mfu:.0%} of their peak, {repeated:.3g} "
        "with checkpointed activations",
    }
    limit = GPUS[cluster.gpu].gib
    text = [f"{name:<12}{value}" for name, value in lines.items()]
    text.append(f"{f'memory, GiB of {limit:g}':<20}" + "".join(f"{name:>13}" for name in (*Memory._fields, "in all")))
    for name, needed in made.memory.items():
        cut = made.accumulate[name]
        fits = f"fits with accumulate {cut}" if cut else "does not fit"
        text.append(f"{name:<20}" + "".join(f"{each / GIB:13.2f}" for each in (*needed, sum(needed))) + f"  {fits}")
    text.append(
        "`accelerate launch --config_file configs/accelerate/8gpu-ddp.yaml` is DDP, `nodes-fsdp2.yaml` FSDP2; "
        "checkpointed: `checkpointing: true`."
    )
    return "\n".join(text)
