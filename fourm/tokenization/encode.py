"""Raw shards to token shards, once, before training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate.utils import gather_object
from torch import Tensor

from fourm import runtime
from fourm.checkpoint import resolve
from fourm.data.rewrite import Rewritten, Sample, rewrite, write_durably
from fourm.data.shards import EXTENSIONS, Encoded, ShardDataset, check_tokens
from fourm.data.tokens import CROPS
from fourm.data.transforms import Instances, View, crop_settings
from fourm.modalities import Modality, TokenSpace
from fourm.tokenization import AnyTokenizer, ImageTokenizer, TextTokenizer, load_tokenizer
from fourm.tokenization.structured import SAM_SIZE
from fourm.tokenization.text import shown_value

Samples = Sequence[Mapping[str, Any]]
Views = Sequence[list[View]]  # of each sample


@dataclass(frozen=True)
class CropConfig:
    """Several crops of each sample, see `transforms.crop_settings`.

    Args:
        count: How many, the first one being the centre square.
        image: Raw modality whose pixels the crops are in.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width over height.
        hflip: Share of the crops that are flipped.
        seed: Of crops and of all random choices.
    """

    count: int
    image: str
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"crops.count is {self.count}, expected at least 1")


@dataclass(frozen=True)
class TokenizeConfig:
    """What to tokenize, and where to.

    Args:
        data: Root of the raw data.
        output: Root of the token data.
        modalities: YAML file with the modality table.
        tokenizers: Folder with the tokenizers; a modality's own is `tokenizer`, or else its source.
        splits: Which splits; `.` where the data have none.
        crops: Crop the samples, unless the raw data have `crop_settings`, which decide then; default: do not.
        layout: `fourm`; or `4m`, which the loader of apple/ml-4m reads: texts stay as they are.
        shard_size: Samples in a token shard, where the raw data are plain folders; raw shards keep their borders.
        batch_size: Samples that are read, and images that are encoded, at once.
        workers: Threads that read, decode and crop.
        device: Where image tokenizers run; default: on the GPU of the process, if there is one.
        precision: Of their encoders: `fp32`; or `bf16` or `auto`, faster on a GPU, with other ids where two are near.
        on_error: What bad samples do: `raise`; or `skip`, count, and list in `<shard>.skipped.jsonl`.
        max_bad: Share of a shard's samples that may be left out; one may in any case.
        verify: Only read the output again and say what is wrong with it.
    """

    data: str
    output: str
    modalities: str
    tokenizers: str = "tokenizers"
    splits: tuple[str, ...] = ("train", "val", "test")
    crops: CropConfig | None = None
    layout: Literal["fourm", "4m"] = "fourm"
    shard_size: int = 1024
    batch_size: int = 64
    workers: int = 2
    device: str = "auto"
    precision: str = "fp32"
    on_error: Literal["raise", "skip"] = "raise"
    max_bad: float = 0.01
    verify: bool = False


def source_of(name: str, row: Modality) -> str:
    """Name of the raw modality that a model modality is made from."""
    return row.source or name


def tokenizer_folder(name: str, row: Modality, root: str | Path) -> Path:
    """Folder of a modality's tokenizer: below the root, or else downloaded from the hub."""
    return _folder(row.tokenizer or source_of(name, row), root)


def _folder(where: str, root: str | Path) -> Path:
    local = Path(root) / where
    return resolve(where) if "/" in where and not local.exists() else resolve(local)


def load_tokenizers(space: TokenSpace, root: str | Path, device: str = "cpu") -> dict[str, AnyTokenizer]:
    """The tokenizer of every discrete modality, each checked against its row.

    Raises:
        ValueError: A tokenizer is missing, or its vocabulary or grid differ from the modality table.
    """
    tokenizers: dict[str, AnyTokenizer] = {}
    for name, row in space.modalities.items():
        if not row.discrete:
            continue
        folder = tokenizer_folder(name, row, root)
        tokenizer = load_tokenizer(folder, name if row.kind == "text" else None)
        if isinstance(tokenizer, ImageTokenizer) and tokenizer.resizable and row.grid:
            tokenizer.use_grid(row.grid)
        if (tokenizer.vocab_size, tokenizer.grid) != (row.vocab_size, row.grid):
            raise ValueError(
                f"{name}: the modality table says {row.vocab_size} ids and grid {row.grid}, but the tokenizer "
                f"{folder} has {tokenizer.vocab_size} ids and grid {tokenizer.grid}"
            )
        if isinstance(tokenizer, TextTokenizer) and tokenizer.config.inner:
            inner = load_tokenizer(_folder(tokenizer.config.inner, root))
            tokenizer.inner = inner.to(device) if isinstance(inner, torch.nn.Module) else inner
        tokenizers[name] = tokenizer.to(device) if isinstance(tokenizer, torch.nn.Module) else tokenizer
    return tokenizers


def find_source(folder: Path, name: str, row: Modality) -> str:
    """Raw modality of a modality: its own name or its source, or one of these without 4M's `@224` or `tok_`."""
    names = [name, source_of(name, row)]
    names += [one.partition("@")[0] for one in names]
    names += [one.removeprefix("tok_") for one in names]
    return next((one for one in names if (folder / one).is_dir()), source_of(name, row))


def written_name(name: str, row: Modality, layout: str) -> str:
    """Folder of a modality in the output; 4M has `rgb` for `rgb@224`."""
    return name.partition("@")[0] if layout == "4m" and row.kind == "patches" else name


def _id_type(row: Modality) -> type:
    return np.int16 if row.vocab_size <= 2**15 else np.int32


def _padded(rows: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Crops of different lengths as one array, filled up at the end; if they are all the same, only one of them."""
    if all(np.array_equal(row, rows[0]) for row in rows):
        return rows[0]
    array = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), fill, rows[0].dtype)
    for place, row in zip(array, rows, strict=True):
        place[: len(row)] = row
    return array


@dataclass
class Prepared:
    """A batch that waits for its image tokenizers: what is done, crops per sample, and the inputs of all crops."""

    samples: list[Sample]
    crops: list[int]
    inputs: dict[str, Tensor]


@dataclass
class SampleEncoder:
    """Raw samples to token samples: `prepare` crops and writes texts, on any thread, `encode` runs image tokenizers.

    Grids become (crops, n) ids, texts (length,) ids or (crops, length) that end with -1, vectors (length, dim) or
    (crops, length, dim) that end with NaN; pixels stay as they are, to be cropped by `crop_settings` when read.

    Args:
        space: What is made.
        tokenizers: Of the discrete modalities, without those whose raw values are ids already.
        sources: Raw modality of each modality.
        crops: How samples are cropped, if they have no settings yet.
        cropped: Whether they are cropped at all.
        layout: See `TokenizeConfig`.
        dtype: Of the encoders' matrix products.
        batch_size: Images that are encoded at once.
        stored: Where raw values are, so that those that stay as they are need not be encoded again.
    """

    space: TokenSpace
    tokenizers: Mapping[str, AnyTokenizer]
    sources: Mapping[str, str]
    crops: CropConfig | None = None
    cropped: bool = False
    layout: str = "fourm"
    dtype: torch.dtype = torch.float32
    batch_size: int = 64
    stored: ShardDataset | None = None

    @property
    def names(self) -> list[str]:
        """Folders of what is made."""
        names = [written_name(name, row, self.layout) for name, row in self.space.modalities.items()]
        return [*names, *([CROPS] if self.cropped else [])]

    @property
    def image(self) -> str | None:
        """Raw modality that tells the size of a sample."""
        patches = (self.sources[name] for name, row in self.space.modalities.items() if row.kind == "patches")
        return self.crops.image if self.crops else next(patches, None)

    def views(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, list[View]]:
        """Crop settings and views of a sample; ValueError where there are too few or the image is missing."""
        image, crops = sample.get(self.image or ""), self.crops
        if image is None and self.cropped and self.tokenizers:
            raise ValueError(f"sample {sample['__key__']!r}: there is no image {self.image!r} that the crops are of")
        (height, width), key = (1, 1) if image is None else np.shape(image)[:2], sample["__key__"]
        settings = np.array([(0, 0, height, width, 0)])
        if CROPS in sample:
            settings = np.asarray(sample[CROPS], np.int64)[: crops.count if crops else None]
            if crops and len(settings) < crops.count:
                raise ValueError(f"sample {key!r}: has {len(settings)} crop settings, but crops.count is {crops.count}")
        elif crops:
            settings = crop_settings(height, width, crops.count, crops.seed, key, crops.scale, crops.ratio, crops.hflip)
        seed = crops.seed if crops else 0
        return settings, [View.of(settings, i, height, width, seed, key) for i in range(len(settings))]

    @torch.no_grad()
    def prepare(self, samples: Samples) -> Prepared:
        """All but image tokenizers; ValueError for a bad value, with its modality and sample."""
        settings, views = zip(*map(self.views, samples), strict=True)
        done = [{"__key__": sample["__key__"]} for sample in samples]
        for sample, rows in zip(done, settings, strict=True) if self.cropped else ():
            sample[CROPS] = rows
        prepared = Prepared(done, list(map(len, views)), {})
        for name, row in self.space.modalities.items():
            values = self._named(name, row, samples, views)
            if isinstance(values, Tensor):
                prepared.inputs[name] = values.pin_memory() if torch.cuda.is_available() else values
            else:
                for sample, value in zip(done, values, strict=True):
                    sample[written_name(name, row, self.layout)] = value
        return prepared

    def _named(self, name: str, row: Modality, samples: Samples, views: Views) -> Any:
        """Values of a modality; the error names the first sample that is bad."""
        try:
            return self._values(name, row, samples, views)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            if len(samples) > 1:
                for sample, of in zip(samples, views, strict=True):
                    self._named(name, row, [sample], [of])
            raise ValueError(f"{name}, sample {samples[0]['__key__']!r}: {error}") from error

    def _values(self, name: str, row: Modality, samples: Samples, views: Views) -> Any:
        source, tokenizer = self.sources[name], self.tokenizers.get(name)
        raw = [sample[source] for sample in samples]
        if row.kind == "patches" and not self.cropped:
            size = tuple(side * row.patch_size for side in row.grid or ())
            for image in raw:
                if image.shape[:2] != size:
                    raise ValueError(f"expected an image of {size} pixels, got {image.shape}; or ask for crops")
        if row.kind == "patches" or (self.layout == "4m" and not row.grid):
            if isinstance(tokenizer, TextTokenizer) and tokenizer.config.codec == "sam_instances":
                instances = Instances(size=SAM_SIZE, **_inner(tokenizer))
                return [[dict(instances.of_view(one, view)) for view in of] for one, of in zip(raw, views, strict=True)]
            if not self.stored:
                return raw
            column, keys = self.stored.columns[source], [sample["__key__"] for sample in samples]
            return [Encoded(column.entries[key].extension, column.read(key)) for key in keys]
        if row.grid and tokenizer is None:
            rows: list[np.ndarray] = [np.stack(check_tokens(row, value)) for value in raw]
            if few := [len(crops) for crops, of in zip(rows, views, strict=True) if len(crops) < len(of)]:
                raise ValueError(f"there are ids of {few[0]} crops, expected {max(map(len, views))}")
            return [crops[: len(of)].astype(_id_type(row)) for crops, of in zip(rows, views, strict=True)]
        shown = [[self.shown(name, value, view, len(of)) for view in of] for value, of in zip(raw, views, strict=True)]
        if tokenizer is None:
            return [_padded(crops, np.nan) for crops in shown]
        flat = [value for crops in shown for value in crops]
        if isinstance(tokenizer, ImageTokenizer):
            return tokenizer.preprocess(flat)
        texts = iter(tokenizer.encode(flat))
        return [_padded([next(texts) for _ in crops], -1).astype(_id_type(row)) for crops in shown]

    def shown(self, name: str, raw: Any, view: View, crops: int) -> Any:
        """What a view shows of a raw value: the transform follows from its tokenizer."""
        tokenizer = self.tokenizers.get(name)
        if not isinstance(tokenizer, ImageTokenizer):
            inner = _inner(tokenizer) if tokenizer else {}
            return shown_value(tokenizer.config.codec if tokenizer else "vectors", raw, view, crops, **inner)
        if not self.cropped:
            return raw
        return tokenizer.shown(raw, view)

    @torch.no_grad()
    def encode(self, prepared: Prepared) -> list[Sample]:
        """The samples with their grids."""
        ids: dict[str, Tensor] = {
            name: torch.cat([self._ids(self.tokenizers[name], part) for part in x.split(self.batch_size)])
            for name, x in prepared.inputs.items()
        }  # on their way before the first is waited for
        for name, rows in ids.items():
            values: np.ndarray = rows.cpu().numpy().astype(_id_type(self.space[name]))
            for sample, value in zip(prepared.samples, np.split(values, np.cumsum(prepared.crops)[:-1]), strict=True):
                sample[name] = value
        return prepared.samples

    def _ids(self, tokenizer: Any, x: Tensor) -> Tensor:
        device = next(tokenizer.parameters()).device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            return tokenizer.quantizer(tokenizer.latents(x.to(device, non_blocking=True)))[1]


def _inner(tokenizer: TextTokenizer) -> dict[str, Any]:
    """Options of the transform whose values hold ids that the inner tokenizer makes."""
    inner = tokenizer.inner
    return {"encode": lambda raw: inner.encode(raw).numpy(), "mask_size": inner.config.input.size[0]} if inner else {}


def encode_samples(samples: Samples, space: TokenSpace, tokenizers: Mapping[str, AnyTokenizer]) -> list[dict[str, Any]]:
    """Token samples of raw samples, not cropped.

    Grids become (1, n) ids, texts (L,) ids, pixels keep their raw value.

    Raises:
        ValueError: A value its tokenizer refuses; names the modality and the sample.
    """
    encoder = SampleEncoder(space, tokenizers, {name: source_of(name, row) for name, row in space.modalities.items()})
    return encoder.encode(encoder.prepare(samples))


def _are_ids(dataset: ShardDataset, source: str, row: Modality) -> bool:
    """Whether raw values are ids already: 4M calls such modalities `tok_...`."""
    column, key = dataset.columns[source], next(iter(dataset.keys), "")
    if row.kind != "grid" or "tok_" not in source or not key or column.entries[key].extension != "npy":
        return False
    value = EXTENSIONS["npy"].decode(column.read(key))
    return value.dtype.kind in "iu" and value.ndim < 3 and value.shape[-1:] == (row.length,)


def tokenize(config: TokenizeConfig) -> None:
    """Writes token shards of all splits; shards that are already there are kept.

    Beside them go `modalities.yaml` (a copy of the table), `card.json` (what they were made from) and `counts.json`
    (samples and shards of each split, samples left out by reason, speed). Several processes share the shards.

    Raises:
        ValueError: The output was made with another table, other tokenizers or other settings; a tokenizer does not fit
            its modality or its data; crops are asked for of what is tokens already.
    """
    joined = runtime.accelerator()
    device = joined.device if config.device == "auto" else torch.device(config.device)
    space, output, first = TokenSpace.from_yaml(config.modalities), Path(config.output), config.splits[0]
    sources = {name: find_source(Path(config.data) / first, name, row) for name, row in space.modalities.items()}
    given = (Path(config.data) / first / CROPS).is_dir()
    raw = dict.fromkeys([*sources.values(), *([CROPS] * given), *([config.crops.image] if config.crops else [])])
    opened = {split: ShardDataset(Path(config.data) / split, list(raw), config.on_error) for split in config.splits}
    encoded = {name: r for name, r in space.modalities.items() if not _are_ids(opened[first], sources[name], r)}
    if config.crops and not given and (ids := space.modalities.keys() - encoded.keys()):
        raise ValueError(f"{config.data}: {', '.join(sorted(ids))} are tokens already; without {CROPS}, which say of "
                         "which crops, no others can be added")  # fmt: skip
    tokenizers = load_tokenizers(TokenSpace(encoded), config.tokenizers, str(device)) if encoded else {}
    dtype = runtime.autocast_dtype(config.precision, device)
    if joined.is_main_process:
        _write_card(output, config, space, tokenizers, {"raw": sources, "precision": str(dtype)})
    joined.wait_for_everyone()
    encoder = SampleEncoder(
        space, tokenizers, sources, config.crops, given or config.crops is not None, config.layout, dtype,
        config.batch_size,
    )  # fmt: skip
    counts = {}
    for split, dataset in opened.items():
        encoder.stored = dataset
        done = rewrite(
            dataset, output, split, encoder.names, encoder.encode, prepare=encoder.prepare,
            shard_size=config.shard_size, batch_size=config.batch_size, workers=config.workers,
            rank=joined.process_index, world_size=joined.num_processes, describe=f"tokenize {split}",
            on_error=config.on_error, max_bad=config.max_bad,
        )  # fmt: skip
        counts[split] = _count(gather_object([done]), dataset.skipped)
    if joined.is_main_process:
        write_durably(output / "counts.json", json.dumps(counts, indent=2) + "\n")
        for split, figures in counts.items():
            print(f"{output / split}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    runtime.finish(joined)


def _count(parts: Sequence[Rewritten], at_opening: Mapping[str, int]) -> dict[str, Any]:
    """Figures of a split from those of all processes."""
    seconds, written = max(part.seconds for part in parts), sum(part.written for part in parts)
    skipped = sum((part.skipped for part in parts), Counter(at_opening))
    return {
        "samples": sum(part.samples for part in parts),
        "shards": sum(part.made + part.kept for part in parts),
        "skipped": dict(skipped),
        "written_now": written,
        "seconds": round(seconds, 1),
        "samples_per_second": round(written / seconds, 1),
    }


def _write_card(
    output: Path,
    config: TokenizeConfig,
    space: TokenSpace,
    tokenizers: Mapping[str, AnyTokenizer],
    more: Mapping[str, Any],
) -> None:
    """Says what the tokens are made from, and refuses to mix them with tokens made otherwise."""
    fingerprints = {}
    for name, tokenizer in tokenizers.items():
        folder = tokenizer_folder(name, space[name], config.tokenizers)
        digest = hashlib.sha256(_content(folder))
        if isinstance(tokenizer, TextTokenizer) and tokenizer.inner:
            digest.update(_content(_folder(tokenizer.config.inner, config.tokenizers)))
        fingerprints[name] = digest.hexdigest()
    card = {
        "source": config.data,
        "shard_size": config.shard_size,
        "crops": asdict(config.crops) if config.crops else None,
        "layout": config.layout,
        "tokenizers": fingerprints,
        "modalities": space.to_dict(),
        **more,
    }
    text = json.dumps(card, indent=2) + "\n"
    path = output / "card.json"
    if path.exists() and json.loads(path.read_text()) | {"source": config.data} != json.loads(text):
        raise ValueError(
            f"{output} holds tokens made with another configuration (see {path}); choose another folder or delete it"
        )
    write_durably(path, text)
    write_durably(output / "modalities.yaml", yaml.safe_dump(space.to_dict(), sort_keys=False))


def _content(tokenizer: Path) -> bytes:
    """What a tokenizer's ids depend on."""
    patterns = ("config.json", "*.safetensors", "*.pth", "*tokenizer*.json")
    files = chain.from_iterable(sorted(tokenizer.glob(pattern)) for pattern in patterns)
    return b"".join(file.read_bytes() for file in ([tokenizer] if tokenizer.is_file() else files))


def verify(config: TokenizeConfig, examples: int = 20) -> list[str]:
    """Reads an output again.

    Args:
        config: What it was made with.
        examples: How many of each kind of trouble are named.

    Returns:
        What is wrong: damaged shards, keys that differ between modalities, ids outside the vocabulary, wrong lengths or
        numbers of crops, another number of samples or shards than was counted.
    """
    from fourm.data.inspect import inspect  # brings matplotlib, which takes a second

    output, space = Path(config.output), TokenSpace.from_yaml(config.modalities)
    needed = [output / name for name in ("card.json", "counts.json", *config.splits)]
    if missing := [f"{path} is not there" for path in needed if not path.exists()]:
        return missing
    raw = {name for name, row in space.modalities.items() if config.layout == "4m" and not row.grid}
    rows = {written_name(n, row, config.layout): row for n, row in space.modalities.items() if n not in raw}
    counts, problems = json.loads((output / "counts.json").read_text()), list[str]()
    for split in config.splits:
        found = inspect(output / split, TokenSpace(rows), samples=0)
        problems += found.reasons(examples)
        counted = tuple(counts.get(split, {}).get(name) for name in ("samples", "shards"))
        crops = {
            one.found.modality: {shape.partition("x")[0] for shape in one.shapes if "x" in shape}
            for one in found.summaries
            if one.found.modality == CROPS or (one.row and one.row.discrete)
        }
        for summary in found.summaries:
            name, entries = summary.found.modality, summary.found.entries.values()
            if (there := (len(entries), len({entry.path for entry in entries}))) != counted:
                problems.append(f"{output / split / name}: {there} samples and shards, but {counted} were counted")
            if other := crops.get(name, set()) - crops.get(CROPS, set()) - {"1"}:
                problems.append(f"{output / split / name}: {', '.join(sorted(other))} crops, unlike {CROPS}")
    return problems
