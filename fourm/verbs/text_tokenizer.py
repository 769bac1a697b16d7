"""`fourm text-tokenizer`: one WordPiece for captions and structured modalities, a tokenizer folder for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fourm.data.shards import ShardDataset
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import fit_text_tokenizers


@dataclass(kw_only=True)
class Config:
    """What the pieces are learned from.

    Args:
        data: Root of the raw data; the training split is read.
        folder: Gets a folder for each modality.
        codecs: How each modality is written as text.
        vocab_size: Ids at most, special ones included.
        bins: Number words of each of the four roles `v0=...` to `v3=...`.
        sentinels: Span sentinels.
    """

    data: str
    folder: str
    codecs: dict[str, CodecConfig]
    vocab_size: int = 30_000
    bins: int = 1000
    sentinels: int = 200


def run(config: Config) -> None:
    """Fits the pieces and writes the folders."""
    dataset = ShardDataset(Path(config.data) / "train", list(config.codecs))
    samples = (dataset[i] for i in tqdm(range(len(dataset)), desc="texts", unit=" samples", mininterval=1))
    tokenizers = fit_text_tokenizers(samples, config.codecs, config.vocab_size, config.bins, config.sentinels)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(Path(config.folder) / name)
        print(f"{config.folder}/{name}: {tokenizer.vocab_size} ids")
