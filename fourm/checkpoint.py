"""Checkpoints as folders that are whole or not there: tensors as safetensors, the rest as JSON, nothing pickled.

`checkpoint-<step>/` holds `<name>.safetensors` per group of tensors, `state.json`, further text files, and
`manifest.json` with the size and SHA-256 of each. It is written under another name, flushed to disk and renamed, the
manifest last, so a run may die at any moment: a folder without a manifest that agrees with its files does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds: groups of tensors (on the CPU) by file name, and plain state."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    keep: int = 2,
) -> Path:
    """Writes `folder/checkpoint-<step>`, then removes all but the `keep` newest complete checkpoints.

    Args:
        folder: The run's folder.
        step: Number of the checkpoint; one of the same step is replaced.
        tensors: Groups of named tensors, one safetensors file per group.
        state: Anything JSON can hold; floats return bit for bit.
        files: Further text files by name, such as the model's `config.json`.
        keep: How many checkpoints to leave; 0 leaves all.

    Raises:
        OSError: The disk is full or broken; earlier checkpoints are untouched.
    """
    folder = Path(folder)
    final, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover)
    aside.mkdir()
    try:
        for name, group in tensors.items():
            save_file(unshared(group), aside / f"{name}.safetensors", metadata={"format": "pt"})
            (aside / f"{name}.safetensors").chmod(aside.stat().st_mode & 0o666)  # safetensors makes it the owner's only
        for name, text in {"state.json": json.dumps(state, indent=1), **(files or {})}.items():
            (aside / name).write_text(text)
        manifest = {path.name: _fingerprint(path) for path in sorted(aside.iterdir())}
        for name in manifest:
            flush(aside / name)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        flush(aside / MANIFEST)
        flush(aside)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():
        final.rename(folder / f".checkpoint-{step}.replaced")
    aside.rename(final)
    flush(folder)
    _rotate(folder, keep)
    return final


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, found by looking at the files themselves; names the ones it skips."""
    for path in reversed(_checkpoints(Path(folder))):
        damage = _damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path} is not a complete checkpoint ({damage}), looking for an older one", stacklevel=2)
    return None


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint folder.

    Raises:
        ValueError: A file is missing, cut short or altered.
    """
    path = Path(path)
    damage = _damage(path)
    if damage is not None:
        raise ValueError(f"{path} is not a complete checkpoint: {damage}")
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path, tensors, json.loads((path / "state.json").read_text()))


def resolve(path_or_id: str | Path) -> Path:
    """A local folder for a path or a Hugging Face hub id `owner/name[@revision]`, downloaded once.

    Raises:
        ValueError: Neither a folder nor a reachable repository.
    """
    path = Path(path_or_id)
    if path.exists():
        return path
    repository, _, revision = str(path_or_id).partition("@")
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository):
        raise ValueError(f"{path_or_id} is neither an existing folder nor a hub id such as 'owner/name'")
    wanted = ["*.json", "*.safetensors", "*.yaml", "*.md"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(f"{path_or_id} is not a folder here, and the hub does not give it: {error}") from error


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


def push(folder: str | Path, repository: str, private: bool = True) -> str:
    """Uploads a folder to the Hugging Face hub as `owner/name`; returns the address of the commit."""
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    return api.upload_folder(repo_id=repository, folder_path=str(folder)).commit_url


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} is cut short"
            if _fingerprint(path / name) != expected:
                return f"{name} was altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None if "state.json" in manifest else f"{MANIFEST} does not list state.json"


def _rotate(folder: Path, keep: int) -> None:
    complete = [path for path in _checkpoints(folder) if (path / MANIFEST).exists()]
    for path in complete[:-keep] if keep else []:
        hidden = folder / f".{path.name}.removed"  # renamed first, so that no half-removed one is ever found
        path.rename(hidden)
        shutil.rmtree(hidden)
    for leftover in folder.glob(".checkpoint-*.replaced"):
        shutil.rmtree(leftover)


def unshared(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors ready for safetensors, which stores every name on its own: tied ones become copies."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return ready


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
