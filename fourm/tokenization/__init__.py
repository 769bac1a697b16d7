"""Tokenizers: raw values to ids and back. Each is a folder with a `config.json` that says its type."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from fourm.checkpoint import read_json, resolve
from fourm.encoders import LOADERS
from fourm.tokenization.autoencoder import ImageTokenizer
from fourm.tokenization.official import load_official
from fourm.tokenization.structured import CODECS_OF_4M
from fourm.tokenization.text import TextTokenizer

AnyTokenizer = ImageTokenizer | TextTokenizer

TOKENIZERS: dict[str, type[ImageTokenizer] | type[TextTokenizer]] = {
    "autoencoder": ImageTokenizer,
    "text": TextTokenizer,
}


def load_tokenizer(path_or_id: str | Path, domain: str | None = None) -> AnyTokenizer:
    """Loads a tokenizer from a folder or a Hugging Face hub id, ours or one of apple/ml-4m.

    Args:
        path_or_id: A folder, `owner/name[@revision]`, a checkpoint file of 4M, or a folder with nothing but 4M's
            WordPiece file.
        domain: Modality of a tokenizer of 4M, such as `depth`; default: what its name or its arguments say. With the
            WordPiece file: a text modality of 4M, such as `det`; default: captions.

    Raises:
        ValueError: There is no such folder or repository, or it holds no tokenizer that we know.
    """
    path = resolve(path_or_id)
    config = path / "config.json"
    content = read_json(config) if config.is_file() else {}
    weights = [*path.glob("*.safetensors"), *path.glob("*.pth")]
    pieces = list(path.glob("*tokenizer*.json"))
    if len(pieces) == 1 and not content and not weights:
        return TextTokenizer.from_file(pieces[0], CODECS_OF_4M.get(domain or "caption"))
    if path.is_file() or "enc_type" in content or (weights and not content):
        return load_official(path, str(path_or_id), domain)
    if not content:
        raise ValueError(f"{path} is not a tokenizer: it has no config.json")
    kind = content.get("type")
    if kind not in TOKENIZERS:
        raise ValueError(f"{config}: type is {kind!r}, allowed are {', '.join(TOKENIZERS)}")
    encoder = content.get("input", {}).get("encoder", "")
    downloaded = Path(HF_HUB_CACHE).absolute() in path.absolute().parents
    if downloaded and encoder.partition(":")[0] not in ("", *LOADERS):
        raise ValueError(f"{path_or_id} is from the hub and names a function to run as its encoder, {encoder!r}: only "
                         "tokenizers of other folders may")  # fmt: skip
    return TOKENIZERS[kind].from_folder(path)


class Tokenizer:
    """Loads tokenizers of any type."""

    from_pretrained = staticmethod(load_tokenizer)
