"""`fourm train`: trains an any-to-any model on token shards."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from fourm import checkpoint, runtime
from fourm.data.loader import Loader
from fourm.data.mixture import MixedDataset
from fourm.data.texts import TextSource
from fourm.data.tokens import TokenDataset, digest
from fourm.evaluation.samples import Predictions
from fourm.masking.budgets import MaskingConfig
from fourm.masking.masking import Masker, MixedMasker
from fourm.modalities import TokenSpace
from fourm.model.config import FourMConfig
from fourm.model.fourm import FourM
from fourm.model.lora import fuse_lora, inject_lora, inject_routed, save_adapter
from fourm.model.warm_start import open_source, warm_start
from fourm.tokenization import TextTokenizer, load_tokenizer
from fourm.tokenization.encode import load_tokenizers
from fourm.training.calibration import calibrate
from fourm.training.optim import Freeze, Rest
from fourm.training.planner import Cluster, describe, flops_per_token
from fourm.training.tasks import Evaluator, HeldOutLoss, MaskedTask
from fourm.training.trainer import TrainConfig, Trainer


@dataclass(kw_only=True)
class DataConfig:
    """One data set of a mixture: token shards (`path`), or texts that are tokenized here (`text`).

    Args:
        path: Root of token data, also `s3://`, `hf://` or `https://`; or shards as 4M names them, such as
            `root/[rgb,caption]/shard-{00000..09999}.tar`.
        text: Texts instead: a .txt, .jsonl, .json or .parquet file, or the id of a data set on the Hugging Face hub.
        weight: How often it is drawn, relative to the others.
        modalities: Which of the table's it has; default: all.
        masking: What is given and asked; default: as for all.
        val: What its held-out loss is measured on, named like `path`; default: the split `val` of a root, else nothing;
            '' for nothing.
        name: Configuration of a hub data set.
        split: Split of a hub data set.
        field: Where a row holds the text.
        samples: How many texts are used; must be given for a hub data set.
        modality: What texts become.
        tokenizer: Folder or hub id of the text tokenizer.
    """

    path: str | None = None
    text: str | None = None
    weight: float = 1.0
    modalities: list[str] | None = None
    masking: MaskingConfig | None = None
    val: str | None = None
    name: str | None = None
    split: str = "train"
    field: str = "text"
    samples: int | None = None
    modality: str = "caption"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.text is None):
            raise ValueError(f"data: a data set has either a path or a text, got {self.path!r} and {self.text!r}")
        if self.text and not self.tokenizer:
            raise ValueError(f"data: the text {self.text} needs a `tokenizer`")


@dataclass
class LoRAConfig:
    """Low-rank adapters. All that the model took over from `init` rests; they move, and what is new.

    Args:
        rank: Of one matrix; packed ones get it once for each matrix in them.
        scale: Of what an adapter adds.
        targets: Layers that get one: `selfattn`, `crossattn`, `attn` (both), `mlp` or `all`.
        decoupled: Modalities whose tokens have a set of adapters of their own, beside that of all others, to be
            composed with other such models (`fourm compose`). They stay in `model`, there is no `adapter` then.
    """

    rank: int = 4
    scale: float = 1.0
    targets: Literal["selfattn", "crossattn", "attn", "mlp", "all"] = "attn"
    decoupled: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Config(TrainConfig):
    """A model, its data and its training.

    Args:
        data: Root of the token data, with splits `train` and `val`; or several data sets, each with its weight.
        modalities: YAML file with the modality table.
        folder: The run; the finished model goes to `model` below.
        model: Shape of the model.
        masking: What is given and what is asked.
        init: Model to start from: a folder (of a model, run, checkpoint, or peft's adapters) or hub id, also of 4M's.
            What was matched is printed, and written to `warm_start.txt`.
        like: New modalities that start from one of `init` with the same vocabulary, such as `{places: caption}`.
        freeze: What rests until when.
        lora: Train adapters only, and what is new, such as rows of new modalities. Adapters go to `adapter` below, as
            peft loads them; `model` has all of it.
        loss: `mod`, the mean of the modalities' means, or `token`, the mean over tokens.
        on_error: What bad samples do: `raise`, or `skip` and count.
        max_bad: Share of the samples that may be skipped; more of them end the run.
        val_batches: Batches (of `batch_size` samples) of the held-out loss.
        tokenizers: Folder with the tokenizers, to show what is predicted of held-out samples at every evaluation;
            '' for no pictures.
        calibrate: Fit a temperature per modality on those batches in the end, for a model that knows how sure it is.
        dry_run: Only say what the run takes, on one node of 8 GPUs (`fourm plan` knows others). No data are needed.
    """

    data: str | list[DataConfig]
    modalities: str
    folder: str
    model: FourMConfig
    masking: MaskingConfig
    init: str = ""
    like: dict[str, str] = field(default_factory=dict)
    freeze: list[Freeze] = field(default_factory=list)
    lora: LoRAConfig | None = None
    loss: Literal["mod", "token"] = "mod"
    on_error: Literal["raise", "skip"] = "raise"
    max_bad: float = 0.01
    val_batches: int = 8
    tokenizers: str = ""
    calibrate: bool = False
    dry_run: bool = False

    may_change = TrainConfig.may_change | {
        "data",
        "modalities",
        "folder",
        "on_error",
        "max_bad",
        "val_batches",
        "tokenizers",
        "calibrate",
        "dry_run",
        "model.attention",
        "model.packed",
    }


def open_data(config: Config, space: TokenSpace, split: Literal["train", "val"]) -> tuple[Any, Any]:
    """The data sets of a split as one, and what masks them."""
    opened: list[tuple[TokenDataset, Masker, float]] = []
    for entry in [DataConfig(path=config.data)] if isinstance(config.data, str) else config.data:
        source: Any = None
        if entry.path is not None and "[" not in entry.path:
            source = f"{entry.path}/{split}"
        source = (source if entry.val is None else entry.val) if split == "val" else source or entry.path
        own = space.subset([entry.modality] if entry.text else entry.modalities or space.names)
        if entry.text and split == "train":
            tokenizer = load_tokenizer(str(entry.tokenizer))
            if not isinstance(tokenizer, TextTokenizer):
                raise ValueError(f"{entry.tokenizer} is not a text tokenizer")
            encoder = digest(tokenizer.tokenizer.to_str(), str(tokenizer.config))
            options = (entry.name, entry.split, entry.field, entry.samples)
            row = space[entry.modality]
            source = TextSource(entry.text, entry.modality, row, tokenizer.encode, encoder, *options)
        if source:
            dataset = TokenDataset(source, own, config.on_error, config.max_bad)
            opened.append((dataset, Masker(space, entry.masking or config.masking), entry.weight))
    if not opened:
        raise ValueError(f"data: there is nothing for the split {split!r}; name it, such as `val: root/val`")
    datasets, maskers, weights = (list(each) for each in zip(*opened, strict=True))
    data = datasets[0] if len(opened) == 1 else MixedDataset(datasets, weights)
    data.by_epoch = split == "train"  # held-out samples are always crop 0
    return data, maskers[0] if len(opened) == 1 else MixedMasker(maskers, data.ends)


def fingerprints(space: TokenSpace, train: Any, val: Any, maskings: Sequence[Any]) -> dict[str, str]:
    """What a run is made with, by names that say what has changed where a value is another one.

    Args:
        space: The modalities. All of a row counts, but for where its tokens came from (`source`, `tokenizer`).
        train: The data set of training.
        val: That of the held-out loss.
        maskings: A `MaskingConfig` for each of the data sets of training.
    """
    prints = {"modalities of the model": ", ".join(space.names)}
    for name, row in space.modalities.items():
        fields = dataclasses.asdict(row) | {"vocab": row.vocab or name, "source": None, "tokenizer": None}
        prints[f"modality {name}"] = digest(json.dumps(fields, sort_keys=True))
    for i, masking in enumerate(maskings, 1):
        masked = f"masking of data set {i}" if len(maskings) > 1 else "masking"
        prints[masked] = digest(json.dumps(dataclasses.asdict(masking), sort_keys=True))
    return prints | train.fingerprints() | {f"val {name}": value for name, value in val.fingerprints().items()}


def start(config: Config, model: FourM, main: bool) -> tuple[Mapping[str, Sequence[Sequence[int]]], str]:
    """Starts the model from `init`, but for a run that goes on.

    Returns:
        Rows of its parameters that were taken over, and from where they can be loaded (see `open_source`); what can be
        loaded from nowhere is written to `base` in the run's folder if adapters are trained.
    """
    if not config.init and (config.like or config.lora or any(each.what == "old" for each in config.freeze)):
        raise ValueError("like, lora and `freeze` of what is old need a model to start from (`init`)")
    if config.lora and config.freeze:
        raise ValueError("lora freezes all that is old in any case; leave `freeze` out")
    if not config.init:
        return {}, ""
    folder = Path(config.folder).resolve()
    record = folder / "warm_start.json"
    # The trainer finds out which one is whole, and stops where none is.
    if record.is_file() and any(folder.glob(f"checkpoint-*/{checkpoint.MANIFEST}")):
        known = checkpoint.read_json(record)
        model.base_hash = known.get("hash", "")
        if known.get("routed"):
            inject_routed(model, **known["routed"])
        return known["kept"], known["base"]
    source, base = open_source(config.init)
    plan = warm_start(model, source, config.like)
    card = model.routed_card() if model.route is not None else None
    if config.lora and config.lora.decoupled:
        shared = set(model.space.names) - set(source.space.names) - set(config.lora.decoupled)
        plan.lines += [f"new, but not decoupled: {name}; its adapters are merged later" for name in sorted(shared)]
    model.base_hash = source.fingerprint()
    if config.lora and not base:
        base = str(folder / "base")
        if main:
            source.save_pretrained(base)
    if main:
        text = "\n".join([f"starting from {config.init}", *plan.lines])
        print(text)
        record.with_suffix(".txt").write_text(text + "\n")
        known = {"base": base, "hash": model.base_hash, "routed": card, "kept": plan.kept}
        record.write_text(json.dumps(known))
    return plan.kept, base


def planned(config: Config, cluster: Cluster) -> str:
    """What the run takes, as text."""
    text = describe(config, config.model, TokenSpace.from_yaml(config.modalities), config.masking, cluster)
    if config.lora or config.freeze:
        text += (
            "\n`lora` and `freeze` are not taken into account: weights that never move need neither gradients nor "
            "optimiser state, and less time"
        )
    return text


def run(config: Config) -> None:
    """Trains, watches the loss on the validation split, and writes the finished model."""
    if config.dry_run:
        print(planned(config, Cluster()))
        return
    joined = runtime.accelerator()
    folder = Path(config.folder)
    if joined.is_main_process:
        runtime.open_run(folder, dataclasses.asdict(config))
    space = TokenSpace.from_yaml(config.modalities)
    runtime.seed_everything(config.seed, "model")
    model = FourM(config.model, space)
    kept, base = start(config, model, joined.is_main_process)
    flops = 0.0 if config.lora or config.freeze else flops_per_token(model, config.masking)
    phases = [Freeze("old")] if config.lora else config.freeze
    rest = Rest(model, phases, kept) if phases else None
    if config.lora:
        inject_lora(model, **dataclasses.asdict(config.lora))
    task = MaskedTask(model, config.loss)
    (train, masker), (val, val_masker) = (open_data(config, space, split) for split in ("train", "val"))
    size, rank, processes = config.loader_batch(joined.num_processes), joined.process_index, joined.num_processes
    loader = Loader(train, size, masker, config.seed, config.workers, rank, processes)
    # The same held-out samples for any number of processes, which share them out.
    batches = config.val_batches * config.batch_size // size
    held_out = HeldOutLoss(task, Loader(val, size, val_masker, config.seed), batches)

    def faults(model: Any, step: int) -> Mapping[str, float]:
        met = Counter(train.skipped) + Counter(val.skipped)
        total = {"faults": float(met.total())} if met else {}
        return total | {f"faults/{reason}": float(count) for reason, count in met.items()}

    evaluators: dict[str, Evaluator] = {"val": held_out, "data": faults}
    if config.tokenizers and joined.is_main_process:  # the others would make the same sheet
        evaluators["samples"] = Predictions(
            space, lambda name: load_tokenizers(space.subset([name]), config.tokenizers, str(joined.device))[name], val
        )
    maskings = [each.config for each in getattr(masker, "maskers", [masker])]
    prints = fingerprints(space, train, val, maskings)
    card = {"config.json": model.config_json()}
    trainer = Trainer(config, task, loader, evaluators, folder, card, prints, flops, rest=rest)
    trainer.fit()
    if joined.is_main_process:
        final = cast(FourM, trainer.final_model)
        said = []
        if config.lora and not config.lora.decoupled:
            save_adapter(final, folder / "adapter", base)
            new = [name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name]
            if new:
                said.append(f"{folder / 'adapter'}: adapters only; `model` alone has what is new, in {', '.join(new)}")
            fuse_lora(final)
        if config.calibrate:
            validation = Loader(val, size, val_masker, config.seed).batches()
            device = next(final.parameters()).device
            chosen = calibrate(final, (batch.to(device) for batch in islice(validation, batches)))
            said.append("temperatures: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
        final.save_pretrained(folder / "model")
        said.append(f"{folder / 'model'}: {sum(p.numel() for p in final.parameters()) / 1e6:.1f} M parameters")
        print("\n".join(said))  # last, as whoever reads it may be gone
    runtime.finish(joined)
