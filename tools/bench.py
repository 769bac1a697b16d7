"""How fast the parts of the product are on this machine: `python tools/bench.py training`.

Every figure is printed beside what is wanted of it, and drawn in `runs/bench/<benchmark>.png`. Figures are ratios of
times that were taken in turn in one run, or CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from fourm import logbook, runtime
from fourm.data.loader import Loader
from fourm.data.shards import write_shards
from fourm.data.tokens import TokenDataset
from fourm.generation.plan import Plan, Step, Target, chain
from fourm.generation.sampler import Given, Sampler
from fourm.generation.sampling import sample
from fourm.masking.batch import MaskedBatch
from fourm.masking.budgets import Component, MaskingConfig
from fourm.masking.masking import Masker
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import FourM, FourMConfig
from fourm.model.layers import CrossAttention, SelfAttention
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.encode import CropConfig, TokenizeConfig
from fourm.tokenization.encode import tokenize as run_tokenize
from fourm.tokenization.inputs import InputConfig
from fourm.training.optim import OptimConfig, build_optimizers, clip_gradients

ROOT = Path(__file__).parents[1]


class Figure(NamedTuple):
    """A figure, and what is wanted of it: at least that much, or at most."""

    label: str
    value: float
    wanted: float
    at_most: bool = False
    unit: str = ""

    @property
    def reached(self) -> float:
        """How far it goes: 1 is what is wanted, more is better."""
        return self.wanted / self.value if self.at_most else self.value / self.wanted

    def __str__(self) -> str:
        limit = "at most" if self.at_most else "at least"
        return f"{self.label:52} {self.value:10,.2f} {self.unit:10} {limit} {self.wanted:,.2f}"


def draw(figures: Sequence[Figure], path: Path) -> None:
    """A bar for each figure, as a share of what is wanted."""
    import matplotlib.pyplot as plt  # not before the memory of training is measured

    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.45 * len(figures)), layout="constrained")
    labels = [f"{each.label}: {each.value:,.2f} {each.unit}".strip() for each in figures]
    shares = [each.reached for each in figures]
    axes.barh(labels, shares, color=["tab:green" if share >= 1 else "tab:red" for share in shares])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("share of what is wanted")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def earth_space() -> TokenSpace:
    """Thirteen modalities of the sizes of the built-in data."""
    grid = {"kind": "grid", "vocab_size": 512, "grid": [8, 8]}
    text = {"kind": "text", "vocab": "text", "vocab_size": 8192}
    return TokenSpace.from_dict(
        {
            "rgb": {"kind": "patches", "grid": [8, 8], "patch_size": 8},
            **{name: grid for name in ("tok_rgb", "elevation", "normal", "climate", "water", "relief", "edges")},
            "turbidity": {"kind": "grid", "vocab_size": 64, "grid": [4, 4]},
            "caption": {**text, "max_tokens": 48},
            "metadata": {**text, "max_tokens": 32, "chunk": 2},
            "palette": {**text, "max_tokens": 24},
            "places": {**text, "max_tokens": 32},
        }
    )


def random_samples(space: TokenSpace, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Token samples of random contents, texts a third to all of their greatest length."""
    generator = np.random.default_rng(seed)

    def content(row: Modality) -> np.ndarray:
        if row.kind == "patches":
            assert row.grid is not None
            size = (row.grid[0] * row.patch_size, row.grid[1] * row.patch_size, row.channels)
            return generator.integers(0, 256, size, dtype=np.uint8)
        if row.kind == "vectors":
            return generator.normal(size=(row.max_tokens, row.dim)).astype(np.float32)
        long = row.length if row.kind == "grid" else generator.integers(row.max_tokens // 3, row.max_tokens)
        low = 0 if row.kind == "grid" else row.first_sentinel + row.sentinels
        return generator.integers(low, row.vocab_size, long // row.chunk * row.chunk).astype(np.int32)

    return [{name: content(row) for name, row in space.modalities.items()} for _ in range(count)]


def masking(samples: int = 8192, batch: int = 256) -> Iterator[Figure]:
    """Samples masked per CPU second by one process, 13 modalities at 128/128 tokens (at least 4,000 are wanted)."""
    space = earth_space()
    mixture = [
        Component(input={"others": 0.5}, target={"others": 0.5}),
        Component(input={"rgb": 1000}, target={"others": 0.5}),
        Component(input={"caption": 5, "others": 0.05}, target={"others": 0.5}, keep={"caption": "all"}),
        *(Component(input={"others": alpha}, target={"others": alpha}) for alpha in (0.01, 0.1, 1, 10)),
        Component(input={}, target={"others": 0.5}),
    ]
    masker = Masker(space, MaskingConfig(input_tokens=128, target_tokens=128, mixture=mixture))
    stock = random_samples(space, batch)
    masker(stock, [(0, index) for index in range(batch)])
    given, asked, start = 0, 0, time.process_time()
    for first in range(0, samples, batch):
        masked = masker(stock, [(1, first + index) for index in range(batch)])
        given, asked = given + masked.input_tokens, asked + masked.target_tokens
    seconds = time.process_time() - start
    print(
        f"batches of {batch}, {given / samples / 128:.0%} of inputs and {asked / samples / 128:.0%} of targets filled"
    )
    yield Figure("13 modalities, 128/128 tokens, one core", samples / seconds, 4000, unit="samples/s")


def four_m_7() -> TokenSpace:
    """The modalities of 4M-7, with their published vocabularies."""
    return TokenSpace.from_dict(yaml.safe_load((ROOT / "configs/modalities/4m-7.yaml").read_text()))


def training(steps: int = 8, batch: int = 16) -> Iterator[Figure]:
    """Matrix products of a training step over its time, as a share of what one large product reaches in the same run.

    4M-7 tiny, 128/128 tokens, fp32, 2 threads, with the optimiser; at least 70 % and at most 3.0 GB are wanted.
    """
    torch.set_num_threads(2)
    runtime.keep_memory()
    space = four_m_7()
    mixture = [
        Component(input={"rgb@224": 1000}, target={"others": 0.5}),
        Component(input={"others": 0.5}, target={"others": 0.5}),
    ]
    masker = Masker(space, MaskingConfig(input_tokens=128, target_tokens=128, mixture=mixture))
    stock = random_samples(space, batch)
    torch.manual_seed(0)
    model = FourM(FourMConfig(size="tiny"), space).train()
    optimizers = build_optimizers(model, OptimConfig(lazy_tables=True))

    def step(masked: MaskedBatch) -> None:
        model.loss(masked)["loss"].backward()
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def product() -> float:
        left, right = torch.randn(2, 2048, 2048)
        return min(timeit.repeat(lambda: left @ right, number=1, repeat=4))

    seconds, products = [], []
    for epoch in range(-2, steps):  # two to warm up
        masked = masker(stock, [(epoch + 2, index) for index in range(batch)])
        products.append(product())
        seconds.append(timeit.timeit(partial(step, masked), number=1))
    seconds, products = seconds[2:], products[2:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    from torch.utils.flop_counter import FlopCounterMode  # brings triton: 80 MB that training does not need

    with FlopCounterMode(display=False) as counter:
        model.loss(masked)["loss"].backward()
    work, rate = counter.get_total_flops(), 2 * 2048**3 / float(np.median(products))
    share = work / float(np.median(seconds)) / rate
    speed = batch / np.median(seconds)
    print(f"{speed:.2f} samples/s of {work / batch / 1e9:.1f} GFLOP each; the product reaches {rate / 1e9:.0f} GFLOP/s")
    yield Figure("a step's products over its time", 100 * share, 70, unit="% of rate")
    yield Figure("peak memory", peak, 3.0, at_most=True, unit="GB")


def four_m_21_masker(space: TokenSpace) -> Masker:
    """Masks as the recipe of 4M-21 does, 256/256 tokens."""
    recipe = yaml.safe_load((ROOT / "configs/train/4m-21_b.yaml").read_text())["masking"]
    mixture = [Component(**component) for component in recipe.pop("mixture")]
    return Masker(space, MaskingConfig(**recipe, mixture=mixture))


def four_m_21_samples(space: TokenSpace, count: int) -> list[dict[str, np.ndarray]]:
    """Random samples: captions of 8-30 words, 0-12 boxes, people in a third of the images, 7 points of SAM."""
    generator, stock = np.random.default_rng(0), random_samples(space, count)
    for raw in stock:
        people = generator.integers(40, 275) if generator.random() < 1 / 3 else 1
        words, boxes = generator.integers(10, 40), generator.integers(13)
        lengths = {"caption": words, "t5_caption": words, "det": 1 + 5 * boxes, "human_poses": people}
        raw |= {name: raw[name][:length] for name, length in lengths.items()}
    return stock


def loader(samples: int = 512, batch: int = 64, rounds: int = 3) -> Iterator[Figure]:
    """Samples read, masked and batched per CPU second of one process: all modalities of 4M-21 at 256/256 tokens."""
    torch.set_num_threads(1)
    space = TokenSpace.from_yaml(ROOT / "configs/modalities/4m-21.yaml")
    stock = four_m_21_samples(space, samples)
    with tempfile.TemporaryDirectory() as root:
        extensions = {name: "npy" for name, row in space.modalities.items() if row.kind != "patches"}
        named = ({"__key__": f"{number:05d}", **sample} for number, sample in enumerate(stock))
        write_shards(root, "train", named, samples // 4, extensions=extensions)
        start = time.process_time()
        dataset = TokenDataset(Path(root) / "train", space)
        packed = samples / (time.process_time() - start)
        batches, rates = Loader(dataset, batch, four_m_21_masker(space), seed=0).batches(), []
        for _ in range(rounds):
            start = time.process_time()
            for _ in range(samples // batch):
                next(batches)
            rates.append(samples / (time.process_time() - start))
    print(f"packed once at {packed:,.0f} samples/s; then {', '.join(f'{rate:,.0f}' for rate in rates)} samples/s")
    yield Figure("4M-21, 256/256 tokens, packed shards, one core", float(np.median(rates)), 1000, unit="samples/s")


def tokenize(samples: int = 48, batch: int = 16, rounds: int = 2) -> Iterator[Figure]:
    """Samples per CPU second of `fourm tokenize` on JPEGs, as a share of its encoder's: 4M's ViT-B, 224 x 224, fp32.

    Nothing that is done beside the encoder is taken for free, though it may have a core of its own: reading, decoding,
    cropping and writing all count, but not the start, which is what a run takes that finds all shards there.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = BackboneConfig(16, 768, 12, 4.0, "vit", 12, "mlp", positions="sincos")
    tokenizer = ImageTokenizer(TokenizerConfig(InputConfig(size=(224, 224)), backbone=backbone)).eval()
    row = Modality("grid", vocab_size=tokenizer.vocab_size, grid=tokenizer.grid, source="rgb")
    pixels = np.random.default_rng(0).integers(0, 256, (samples, 16, 16, 3), dtype=np.uint8)
    photos = [np.asarray(Image.fromarray(image).resize((320, 256), Image.Resampling.BICUBIC)) for image in pixels]
    x = torch.randn(batch, 3, 224, 224)

    @torch.no_grad()
    def encode() -> None:
        for _ in range(samples // batch):
            tokenizer.quantizer(tokenizer.latents(x))

    encode()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        named = ({"__key__": f"{number:05d}", "rgb": photo} for number, photo in enumerate(photos))
        write_shards(root / "raw", "train", named, samples // 2, extensions={"rgb": "jpg"})
        tokenizer.save_pretrained(root / "tokenizers/rgb")
        (root / "table.yaml").write_text(yaml.safe_dump(TokenSpace({"tok_rgb": row}).to_dict()))
        outputs = iter([*range(rounds), *range(rounds)])

        def run() -> None:
            paths = [root / "raw", root / f"tokens{next(outputs)}", root / "table.yaml", root / "tokenizers"]
            run_tokenize(TokenizeConfig(*map(str, paths), ("train",), CropConfig(1, "rgb"), batch_size=batch))

        ours, least = compare(f"4M's ViT-B at 224 px, {samples} JPEGs", run, encode, rounds)
        start, _ = compare("the start of it", run, lambda: None, rounds)
    yield Figure("4M's ViT-B at 224 px, from JPEGs", 100 * least / (ours - start), 90, unit="% of rate")


def packing(batch: int = 8, steps: int = 3, rounds: int = 2) -> None:
    """Filled slots per second of forward and backward passes of the 4M-21 recipe, with empty slots computed and not.

    Size `small`, 256/256 tokens, fp32, 2 threads. Vocabularies are cut to 1,024 ids, so that the figure is about the
    blocks: the head never sees empty slots. At least 85 % of what is not computed must be turned into speed.
    """
    torch.set_num_threads(2)
    runtime.keep_memory()
    table = yaml.safe_load((ROOT / "configs/modalities/4m-21.yaml").read_text())
    space = TokenSpace.from_dict(
        {name: row | ({"vocab_size": 1024} if "vocab_size" in row else {}) for name, row in table.items()}
    )
    masker, stock = four_m_21_masker(space), four_m_21_samples(space, batch * steps)
    batches = [
        masker(stock[first : first + batch], [(0, first + i) for i in range(batch)])
        for first in range(0, len(stock), batch)
    ]
    torch.manual_seed(0)
    model = FourM(FourMConfig(size="small"), space).train()
    losses = {True: [0.0] * steps, False: [0.0] * steps}

    def step(number: int, packed: bool) -> None:
        model.config = dataclasses.replace(model.config, packed=packed)
        loss = model.loss(batches[number])["loss"]
        loss.backward()
        losses[packed][number] = float(loss.detach())
        model.zero_grad()

    step(0, True)
    ways = (True, False)
    times = [
        [[timeit.timeit(partial(step, number, packed), number=1) for packed in ways] for number in range(steps)]
        for _ in range(rounds)
    ]
    seconds = dict(zip(ways, np.min(times, axis=0).sum(0), strict=True))
    given, asked = (sum(count) for count in zip(*((b.input_tokens, b.target_tokens) for b in batches), strict=True))
    slots = 256 * batch * steps
    ratio, wanted = seconds[False] / seconds[True], 1 + 0.85 * (2 * slots / (given + asked) - 1)
    apart = max(abs(one - other) for one, other in zip(*losses.values(), strict=True))
    rates = [(given + asked) / seconds[packed] for packed in (False, True)]
    print(
        f"{given / slots:.0%} of inputs and {asked / slots:.0%} of targets filled; {rates[0]:,.0f} filled slots/s with"
    )
    print(f"empty ones computed, {rates[1]:,.0f} without; losses differ by at most {apart:.0e}")
    yield Figure("4M-21 recipe, without empty slots over with them", ratio, wanted)


@torch.no_grad()
def bare_pass(model: FourM, given: int, asked: int, batch: int) -> Tensor:
    """What no sampler can spare: encoder and decoder over so many tokens, without embeddings, masks and padding."""

    def attend(layer: SelfAttention | CrossAttention, *projected: Tensor) -> Tensor:
        parts = [part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in projected]
        return layer.proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    x = torch.randn(batch, max(given, 1), model.config.dim)  # one empty slot where nothing is given
    for block in model.encoder:
        x = x + attend(block.attn, *block.attn.qkv(block.norm1(x)).chunk(3, -1))
        x = x + block.mlp(block.norm2(x))
    context, x = model.decoder_proj_context(model.encoder_norm(x)), torch.randn(batch, asked, model.config.dim)
    for layer in model.decoder:
        cross = layer.cross_attn
        x = x + attend(layer.self_attn, *layer.self_attn.qkv(layer.norm1(x)).chunk(3, -1))
        x = x + attend(cross, cross.q(layer.query_norm(x)), *cross.kv(layer.context_norm(context)).chunk(2, -1))
        x = x + layer.mlp(layer.norm2(x))
    return model.decoder_norm(x)


@torch.no_grad()
def bare_products(model: FourM, name: str, tokens: int, rows: int, scored: int) -> None:
    """The products with weights of `tokens` decoded tokens: blocks with `rows` rows at a time, head with `scored`."""
    weights = [
        (module.weight, torch.randn(rows, module.in_features))
        for part, module in model.decoder.named_modules()  # type: ignore[attr-defined]
        if isinstance(module, torch.nn.Linear) and not part.endswith("cross_attn.kv")
    ]
    states = torch.randn(scored, model.config.dim)
    for _ in range(tokens):
        for weight, x in weights:
            F.linear(x, weight)
        model.logits(states, name)


def generation(batch: int = 2, tokens: int = 256, steps: int = 8, rounds: int = 2) -> Iterator[Figure]:
    """CPU seconds of one thread to generate with 4M-7 tiny from an RGB image, and of the passes that takes at least."""
    torch.set_num_threads(1)
    model = FourM(FourMConfig(size="tiny"), four_m_7()).eval()
    rgb, text, grid = "rgb@224", "caption", "tok_depth@224"
    seen = model.space[rgb].length
    known = {rgb: Given.floats(torch.randn(batch, seen, model.space[rgb].width))}
    row = model.space[text]
    ends = torch.tensor([row.eos, row.first_sentinel + 2])

    def endless(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        return sample(logits.index_fill(-1, ends, -torch.inf), *options)

    def write(scale: float, top_p: float) -> None:
        plan = (Step(text, "autoregressive", tokens, top_p=top_p, guidance=(scale,)),)
        Sampler(model, endless).generate(known, plan)

    def fill(plan: Plan) -> None:
        Sampler(model).generate(known, plan)

    @torch.no_grad()
    def fill_barely(plan: Plan) -> None:
        settled = 0
        for step in plan:
            count = step.count or 0
            asked = count if step.scheme == "roar" else model.space[grid].length - settled
            for given in (seen + settled,) if step.guidance == (1.0,) else (settled, seen + settled):
                hidden = bare_pass(model, given, asked, batch)
            model.logits(hidden, grid)
            settled += count

    print(
        f"4M-7 tiny, batch {batch}, from an RGB image; CPU seconds of one thread, and of the passes it takes at least"
    )
    for scale, top_p in ((2.0, 0.0), (2.0, 0.9), (1.0, 0.0)):
        rows = batch if scale == 1 else 2 * batch
        label = f"{tokens} text tokens, guidance {scale}" + (f", top-p {top_p}" if top_p else "")
        floor = partial(bare_products, model, text, tokens, rows, batch)
        yield Figure(label, compare(label, partial(write, scale, top_p), floor, rounds)[0], 5, at_most=True, unit="s")
    for scheme in ("maskgit", "roar"):
        for scale in (1.0, 2.0):
            plan = chain(model.space, [Target(grid, scheme, steps, guidance=scale)])
            label = f"{scheme}, {steps} steps, {model.space[grid].length} tokens, guidance {scale}"
            ours, least = compare(label, partial(fill, plan), partial(fill_barely, plan), rounds)
            yield Figure(label, ours / least, 1.2, at_most=True, unit="x floor")


def many_modalities(count: int) -> TokenSpace:
    """So many modalities, every fourth a text, with a vocabulary of 512 or 1,024 ids each."""
    grid = {"kind": "grid", "grid": [8, 8]}
    text = {"kind": "text", "vocab_size": 1024, "max_tokens": 32, "sentinels": 40}
    rows: list[dict[str, Any]] = [grid | {"vocab_size": 1024}, grid | {"vocab_size": 512}] * 2
    return TokenSpace.from_dict({f"m{i:02d}": text if i % 4 == 3 else rows[i % 4] for i in range(count)})


class Run:
    """A training with so many modalities at 128/128 tokens: 4M's size tiny, fp32, shards on disk."""

    def __init__(self, count: int, batch: int, root: Path):
        space = many_modalities(count)
        named = ({"__key__": f"{i:05d}", **sample} for i, sample in enumerate(random_samples(space, 4 * batch)))
        write_shards(root / str(count), "train", named, 4 * batch, extensions=dict.fromkeys(space.names, "npy"))
        mixture = [Component(input={"others": 0.5}, target={"others": 0.5})]
        masker = Masker(space, MaskingConfig(input_tokens=128, target_tokens=128, mixture=mixture))
        self.batches = Loader(TokenDataset(root / str(count) / "train", space), batch, masker, seed=0).batches()
        torch.manual_seed(0)
        self.model = FourM(FourMConfig(size="tiny"), space).train()
        self.optimizers = build_optimizers(self.model, OptimConfig())
        sides = (self.model.encoder_embeddings, self.model.decoder_embeddings)
        # Weight, gradient and the two means of Adam; positions are neither learned nor in any gradient.
        self.tables = sum(16 * side.tokens.weight.numel() + 4 * side.positions.numel() for side in sides)

    def step(self) -> list[float]:
        """CPU seconds of reading and masking, of the two passes, and of clipping and AdamW; tokens of the batch."""
        times = [time.process_time()]
        masked = next(self.batches)
        tokens = masked.input_tokens + masked.target_tokens
        times.append(time.process_time())
        self.model.loss(masked)["loss"].backward()
        times.append(time.process_time())
        clip_gradients(self.model, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [*np.diff([*times, time.process_time()]), tokens]


def peak_memory(count: int, batch: int) -> tuple[float, float]:
    """Peak memory of three steps in a process of its own, and what the tables take of it, in GB."""
    torch.set_num_threads(1)
    runtime.keep_memory()
    with tempfile.TemporaryDirectory() as root:
        run = Run(count, batch, Path(root))
        for _ in range(3):
            run.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, run.tables / 1e9


def modalities(counts: Sequence[int] = (12, 24, 48), batch: int = 16, rounds: int = 7) -> Iterator[Figure]:
    """CPU seconds of a training step of one thread, and peak memory, with ever more modalities at the same budgets.

    Clipping and AdamW pass over all rows of all tables, so their time is printed apart. More modalities fill the same
    budgets better, and empty slots cost nothing, so times are compared per token.
    """
    torch.set_num_threads(1)
    runtime.keep_memory()
    # First, because the peak of a new process is at least what its parent holds.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks, tables = zip(*pool.starmap(peak_memory, [(count, batch) for count in counts], chunksize=1), strict=True)
    with tempfile.TemporaryDirectory() as root:
        runs = [Run(count, batch, Path(root)) for count in counts]
        seconds = np.array([[run.step() for run in runs] for _ in range(rounds + 1)])[1:]  # one to warm up
    data, passes, optimizer, tokens = np.median(seconds, axis=0).T
    for i, count in enumerate(counts):
        print(
            f"  {count} modalities: data and masking {1e3 * data[i]:.0f} ms, passes {1e3 * passes[i]:.0f} ms; apart: "
            f"clipping and AdamW {1e3 * optimizer[i]:.0f} ms; {tokens[i] / batch:.0f} tokens a sample; peak "
            f"{peaks[i]:.2f} GB, of it tables {tables[i]:.2f} GB"
        )
    whole = seconds[..., :2].sum(2) / seconds[..., 3]
    for i, count in enumerate(counts[1:], start=1):
        time_ratio = float(np.median(whole[:, i] / whole[:, 0]))
        yield Figure(f"time per token, {count} over {counts[0]} modalities", time_ratio, 1.05, at_most=True, unit="x")
        memory_ratio = (peaks[i] - tables[i]) / (peaks[0] - tables[0])
        yield Figure(f"memory but for tables, {count} over {counts[0]}", memory_ratio, 1.05, at_most=True, unit="x")


def waiting(steps: int = 100) -> Iterator[Figure]:
    """Share of the demo's training that waits for data, by its own command and config on 2 threads, from step 10 on.

    Where `runs/demo/tokens` lacks modalities random tokens of the same shapes take its place.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, space = ROOT / "runs/demo/tokens", TokenSpace.from_yaml(ROOT / "configs/modalities/earth.yaml")
        if not all((data / split / name).is_dir() for split in ("train", "val") for name in space.names):
            data = Path(folder) / "tokens"
            kinds = {name: "npy" for name, row in space.modalities.items() if row.kind != "patches"}
            for split, count in (("train", 4096), ("val", 64)):
                named = ({"__key__": f"{i:05d}", **sample} for i, sample in enumerate(random_samples(space, count)))
                write_shards(data, split, named, 1024, extensions=kinds)
        options = {"data": data, "folder": f"{folder}/run", "steps": steps, "log_every": 1, "eval_every": 0,
                   "save_every": 0, "val_batches": 1, "calibrate": "false"}  # fmt: skip
        words = [
            "train",
            "--config",
            "configs/train/earth.yaml",
            *(f"--{key}={value}" for key, value in options.items()),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run([sys.executable, "-m", "fourm", *words], cwd=ROOT, env=environment, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        records = [record for record in logbook.read(f"{folder}/run") if "data_wait" in record][10:]
    seconds = np.array([record["seconds"] for record in records])
    waited = seconds @ [record["data_wait"] for record in records]
    print(f"steps of {1e3 * np.median(seconds):.0f} ms, of which data wait {1e3 * waited / len(records):.1f} ms")
    yield Figure("data wait of the demo's training", 100 * waited / seconds.sum(), 2, at_most=True, unit="% of time")


def compare(label: str, run: Callable[[], object], floor: Callable[[], object], rounds: int) -> tuple[float, float]:
    """CPU seconds of both, the least of some rounds in turn."""
    seconds = [[timeit.timeit(part, timer=time.process_time, number=1) for part in (run, floor)] for _ in range(rounds)]
    ours, least = np.min(seconds, axis=0)
    print(f"  {label:48} {ours:5.2f} s, floor {least:5.2f} s", flush=True)
    return ours, least


BENCHMARKS: dict[str, Callable[[], Iterator[Figure]]] = {
    "masking": masking,
    "loader": loader,
    "tokenize": tokenize,
    "training": training,
    "packing": packing,
    "generation": generation,
    "modalities": modalities,
    "waiting": waiting,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    name = parser.parse_args().benchmark
    figures = list(BENCHMARKS[name]())
    print(*figures, sep="\n")
    draw(figures, Path(f"runs/bench/{name}.png"))
    print(f"runs/bench/{name}.png")
