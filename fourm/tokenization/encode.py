"""Raw shards to token shards, once, before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from fourm.checkpoint import resolve
from fourm.data.shards import ShardDataset, shard_name, write_shards
from fourm.modalities import Modality, TokenSpace
from fourm.tokenization import AnyTokenizer, ImageTokenizer, load_tokenizer


@dataclass(frozen=True)
class TokenizeConfig:
    """What to tokenize, and where to.

    Args:
        data: Root of the raw data.
        output: Root of the token data.
        modalities: YAML file with the modality table.
        tokenizers: Folder with the tokenizers; a modality's own is `tokenizer`, or else its source.
        splits: Which splits.
        shard_size: Samples in a token shard.
        batch_size: Samples that are encoded at once.
        device: Where image tokenizers run.
    """

    data: str
    output: str
    modalities: str
    tokenizers: str = "tokenizers"
    splits: tuple[str, ...] = ("train", "val", "test")
    shard_size: int = 1024
    batch_size: int = 64
    device: str = "cpu"


def source_of(name: str, row: Modality) -> str:
    """Name of the raw modality that a model modality is made from."""
    return row.source or name


def tokenizer_folder(name: str, row: Modality, root: str | Path) -> Path:
    """Folder of a modality's tokenizer: below the root, or else downloaded from the hub."""
    where = row.tokenizer or source_of(name, row)
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
        tokenizer = load_tokenizer(folder)
        if isinstance(tokenizer, ImageTokenizer) and tokenizer.resizable and row.grid:
            tokenizer.use_grid(row.grid)
        if (tokenizer.vocab_size, tokenizer.grid) != (row.vocab_size, row.grid):
            raise ValueError(
                f"{name}: the modality table says {row.vocab_size} ids and grid {row.grid}, but the tokenizer "
                f"{folder} has {tokenizer.vocab_size} ids and grid {tokenizer.grid}"
            )
        tokenizers[name] = tokenizer.to(device) if isinstance(tokenizer, torch.nn.Module) else tokenizer
    return tokenizers


def encode_samples(
    samples: Sequence[Mapping[str, Any]], space: TokenSpace, tokenizers: Mapping[str, AnyTokenizer]
) -> list[dict[str, Any]]:
    """Token samples of raw samples.

    Grids become (1, n) ids (one crop), texts (L,) ids, continuous modalities keep their raw value.

    Raises:
        ValueError: A value its tokenizer refuses; names the modality and the sample.
    """
    encoded: list[dict[str, Any]] = [{"__key__": sample["__key__"]} for sample in samples]
    for name, row in space.modalities.items():
        raw = [sample[source_of(name, row)] for sample in samples]
        values: Sequence[Any] = raw
        if row.discrete:
            values = _encode(name, tokenizers[name], raw, samples)
            dtype = np.int16 if row.vocab_size <= 2**15 else np.int32
            values = [np.asarray(ids[None] if row.kind == "grid" else ids, dtype) for ids in values]
        for sample, value in zip(encoded, values, strict=True):
            sample[name] = value
    return encoded


def _encode(
    name: str, tokenizer: AnyTokenizer, raw: Sequence[Any], samples: Sequence[Mapping[str, Any]]
) -> Sequence[Any]:
    """All values at once; the error names the first sample that the tokenizer refuses."""
    try:
        return list(tokenizer.encode(raw))
    except ValueError as error:
        if len(samples) == 1:
            raise ValueError(f"{name}, sample {samples[0]['__key__']!r}: {error}") from error
        return [_encode(name, tokenizer, raw[i : i + 1], samples[i : i + 1])[0] for i in range(len(samples))]


def tokenize(config: TokenizeConfig) -> None:
    """Writes token shards of all splits; shards that are already there are kept.

    Beside them go `modalities.yaml` (a copy of the table) and `card.json` (what they were made from).

    Raises:
        ValueError: The output was made with another table, other tokenizers or another shard size, or a tokenizer does
            not fit its modality or its data.
    """
    space = TokenSpace.from_yaml(config.modalities)
    tokenizers = load_tokenizers(space, config.tokenizers, config.device)
    output = Path(config.output)
    _write_card(output, config, space)
    sources = list(dict.fromkeys(source_of(name, row) for name, row in space.modalities.items()))
    for split in config.splits:
        dataset = ShardDataset(Path(config.data) / split, sources)
        shards = range(-(-len(dataset) // config.shard_size))
        with tqdm(total=len(dataset), desc=f"tokenize {split}", unit=" samples", mininterval=1) as progress:
            for shard in shards:
                rows = range(len(dataset))[shard * config.shard_size : (shard + 1) * config.shard_size]
                if not all((output / split / name / shard_name(shard)).exists() for name in space.names):
                    batches = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
                    raw = ([dataset[row] for row in batch] for batch in batches)
                    samples = chain.from_iterable(encode_samples(batch, space, tokenizers) for batch in raw)
                    write_shards(output, split, samples, config.shard_size, first_shard=shard)
                progress.update(len(rows))


def _write_card(output: Path, config: TokenizeConfig, space: TokenSpace) -> None:
    """Says what the tokens are made from, and refuses to mix them with tokens made otherwise."""
    fingerprints = {}
    for name, row in space.modalities.items():
        if row.discrete:
            folder = tokenizer_folder(name, row, config.tokenizers)
            files = [folder / file for file in ("config.json", "model.safetensors", "tokenizer.json")]
            content = b"".join(file.read_bytes() for file in files if file.is_file())
            fingerprints[name] = {"folder": str(folder), "sha256": hashlib.sha256(content).hexdigest()}
    card = {
        "source": config.data,
        "shard_size": config.shard_size,
        "tokenizers": fingerprints,
        "modalities": space.to_dict(),
    }
    text = json.dumps(card, indent=2) + "\n"
    path = output / "card.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"{output} holds tokens made with another configuration (see {path}); choose another folder or delete it"
        )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (output / "modalities.yaml").write_text(yaml.safe_dump(space.to_dict(), sort_keys=False))
