"""Reads the files in which checkpoints of apple/ml-4m come; no code in them is run."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def read_official(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a checkpoint of apple/ml-4m, as they stand in its container; nothing is renamed.

    Args:
        path: A safetensors file with the config in its header (every value as Python prints it) or in a `config.json`
            beside it, a training checkpoint `.pth` (a dict of `model` and `args`), or a folder with one such file.
            Of a `.pth`, tensors and plain values are read, and `argparse.Namespace` as the only class.

    Returns:
        The config (of a `.pth`: the training arguments) and the tensors by name, on the CPU. Names that a hub export
        left out, because their tensor is stored under another one, are filled in.

    Raises:
        ValueError: No such file, another container, or no config.
    """
    path = Path(path)
    file = _official_file(path) if path.is_dir() else path
    if file.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{file} is not a checkpoint of 4M: expected a .safetensors or .pth file or a folder with one")
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    return _read_pth(file) if file.suffix == ".pth" else _read_safetensors(file)


def _official_file(folder: Path) -> Path:
    for pattern in ("model.safetensors", "*.safetensors", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} holds several checkpoints ({', '.join(f.name for f in found)}): give one file")
        if found:
            return found[0]
    raise ValueError(f"{folder} holds no file .safetensors or .pth")


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    config, beside = {}, file.with_name("config.json")
    for key, value in header.items():
        if value in tensors:
            tensors.setdefault(key, tensors[value])
        elif key != "format":
            config[key] = _literal(value)
    if beside.is_file():
        try:
            config |= json.loads(beside.read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{beside} is not a JSON object: {error}") from error
    if not config:
        raise ValueError(f"{file} has no config, neither in its header nor in a config.json beside it")
    return config, tensors


def _literal(text: str) -> Any:
    """A value that Python printed: numbers, truth values, None and lists of them; anything else is a string."""
    try:
        return yaml.safe_load(re.sub(r"\bNone\b", "null", text))
    except yaml.YAMLError:
        return text


def _read_pth(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many unrelated types
        foreign = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.\w+)", str(error))
        reason = f"it holds a {foreign[1]}, and code in pickles is never run" if foreign else str(error).splitlines()[0]
        raise ValueError(f"{file} is not read: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "args" not in content:
        raise ValueError(f"{file} is not a training checkpoint of 4M: expected a dict with 'model' and 'args'")
    config = content["args"]
    if not isinstance(config, argparse.Namespace | dict):
        raise ValueError(f"{file}: 'args' is a {type(config).__name__}, expected an argparse.Namespace or a dict")
    return dict(config if isinstance(config, dict) else vars(config)), dict(content["model"])
