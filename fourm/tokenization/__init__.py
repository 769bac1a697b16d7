"""Tokenizers: raw values to ids and back. Each is a folder with a `config.json` that says its type."""

from __future__ import annotations

import json
from pathlib import Path

from fourm.checkpoint import resolve
from fourm.tokenization.autoencoder import ImageTokenizer
from fourm.tokenization.text import TextTokenizer

Tokenizer = ImageTokenizer | TextTokenizer

TOKENIZERS: dict[str, type[ImageTokenizer] | type[TextTokenizer]] = {
    "autoencoder": ImageTokenizer,
    "text": TextTokenizer,
}


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """Loads a tokenizer from a folder or a Hugging Face hub id.

    Raises:
        ValueError: There is no such folder or repository, it holds no `config.json`, or its type is unknown.
    """
    folder = resolve(path_or_id)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is not a tokenizer: it has no config.json")
    kind = json.loads(config.read_text()).get("type")
    if kind not in TOKENIZERS:
        raise ValueError(f"{config}: type is {kind!r}, allowed are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind].from_folder(folder)
