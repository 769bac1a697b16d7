"""Checkpoints as folders that are whole or not there: tensors as safetensors, the rest as JSON, nothing pickled.

`checkpoint-<step>/` holds `<name>.safetensors` per group of tensors, `state.json`, further text files, and
`manifest.json` with the size and SHA-256 of each. It is written under another name, flushed to disk and renamed, the
manifest last, so a run may die at any moment: a folder without a manifest that agrees with its files does not count.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourm import faults

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
    permanent_every: int = 0,
    main: bool = True,
    agree: Callable[[bool], bool] = bool,
    write: Callable[[Path, Mapping[str, Tensor]], None] | None = None,
) -> Path:
    """Writes `folder/checkpoint-<step>`, then removes all older ones but the newest.

    Args:
        folder: The run's folder.
        step: Number of the checkpoint; one of the same step is replaced.
        tensors: Groups of named tensors, one safetensors file per group.
        state: Anything JSON can hold; floats return bit for bit.
        files: Further text files by name, such as the model's `config.json`.
        keep: How many checkpoints to leave; 0 leaves all.
        permanent_every: Those of a multiple of this step are never removed, and do not count; 0 for none.
        main: Whether this is the process that makes the folder and completes it. Several processes write together where
            each calls this, on a folder that all of them see.
        agree: Waits for all processes, and says whether all of them were given True.
        write: Writes this process's share of a group into its file; default: the main process writes all.

    Raises:
        OSError: The disk is full or broken, here or in another process; earlier checkpoints are untouched.
    """
    folder = Path(folder)
    final, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    texts = {"state.json": json.dumps(state, indent=1), **(files or {})}
    needed = sum(tensor.numel() * tensor.itemsize for group in tensors.values() for tensor in group.values())
    needed += sum(len(text.encode()) for text in texts.values())
    try:
        with _together(agree):
            if main:
                _begin(aside, needed)
        with _together(agree):
            for name, group in tensors.items():
                if write is not None:
                    write(aside / f"{name}.safetensors", group)
                elif main:
                    _write(aside / f"{name}.safetensors", group)
            for name, text in texts.items() if main else ():
                faults.reach("write")
                (aside / name).write_text(text)
        with _together(agree):
            if main:
                _write_manifest(aside)
                _publish(aside, final)
                _rotate(folder, step, keep, permanent_every)
    except Exception as error:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        code = re.search(r"\(os error (\d+)\)", str(error))  # in what safetensors raises
        number = (error.errno if isinstance(error, OSError) else code and int(code[1])) or errno.EIO
        space = ""
        if number in (errno.ENOSPC, errno.EDQUOT):
            space = f"; it needs over {needed:,} bytes, and {shutil.disk_usage(folder).free:,} are free"
        raise OSError(number, f"{final} is not written: {error}{space}; earlier checkpoints are whole") from error
    return final


def latest(folder: str | Path, tidy: bool = False) -> Path | None:
    """The newest complete checkpoint of a run, found by looking at the files themselves; names the ones it skips.

    Args:
        folder: The run's folder.
        tidy: Rename damaged ones that are newer to `damaged-checkpoint-<step>`, so that none counts as kept.

    Raises:
        ValueError: There are checkpoints, but none is complete.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(_checkpoints(Path(folder))):
        damage = _damage(path)
        if damage is not None:
            damaged[path] = damage
            continue
        for bad, reason in damaged.items():
            warnings.warn(f"{bad} is not a complete checkpoint ({reason}), using an older one", stacklevel=2)
            if tidy:
                put_aside = bad.with_name(f"damaged-{bad.name.strip('.')}")
                shutil.rmtree(put_aside, ignore_errors=True)
                bad.rename(put_aside)
        return path
    if damaged:
        each = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ValueError(f"{folder}: no checkpoint is complete ({each}); to start anew, delete them")
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
    tensors = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path, tensors, read_json(path / "state.json"))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU; ValueError where there is none, or another kind of file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; ValueError where it is another kind of file."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{path} is not JSON: {error}") from error


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


def push(folder: str | Path, repository: str, private: bool = True) -> str:
    """Uploads a folder to the Hugging Face hub as `owner/name`; returns the address of the commit."""
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    return api.upload_folder(repo_id=repository, folder_path=str(folder)).commit_url


@contextlib.contextmanager
def _together(agree: Callable[[bool], bool]) -> Iterator[None]:
    """Goes on where all processes did their part, and fails in all of them where one failed."""
    try:
        yield
    except Exception:
        agree(False)
        raise
    if not agree(True):
        raise OSError(errno.EIO, "another process failed to write its part")


def _begin(aside: Path, needed: int) -> None:
    """Removes what dead processes left, and makes the hidden folder."""
    folder = aside.parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in _checkpoints(folder):
        if path.suffix == ".replaced":
            path.rename(folder / path.stem.removeprefix("."))
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    faults.reach("write")
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    aside.mkdir()


def _write(file: Path, group: Mapping[str, Tensor]) -> None:
    faults.reach("write")
    save_file(unshared(group), file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes it the owner's only


def _write_manifest(aside: Path) -> None:
    """Flushes all files, and lists them."""
    files = sorted(aside.iterdir())
    with ThreadPoolExecutor() as pool:
        manifest = {file.name: each for file, each in zip(files, pool.map(_fingerprint, files), strict=True)}
    for file in files:
        faults.reach("write")
        flush(file)
    faults.reach("write")
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (aside / MANIFEST, aside):
        faults.reach("write")
        flush(path)


def _publish(aside: Path, final: Path) -> None:
    """Gives the hidden folder its name; at every moment either it or the one it replaces is found by `latest`."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        faults.reach("write")
        final.rename(replaced)
    faults.reach("write")
    aside.rename(final)
    faults.reach("write")
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _rotate(folder: Path, step: int, keep: int, permanent_every: int) -> None:
    """Removes old checkpoints. Those of later steps are not counted: the run would have gone on from a sound one."""
    complete = [path for path in _checkpoints(folder) if (path / MANIFEST).exists() and _number(path) <= step]
    old = [path for path in complete if not permanent_every or _number(path) % permanent_every]
    for path in old[:-keep] if keep else []:
        hidden = folder / f".{path.name}.removed"  # renamed first, so that no half-removed one is ever found
        try:
            faults.reach("write")
            path.rename(hidden)
            faults.reach("write")
            shutil.rmtree(hidden)
        except OSError as error:
            warnings.warn(f"{path} is not removed: {error}", stacklevel=2)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not; also one that was put aside and whose successor never came."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    aside = folder.glob(".checkpoint-*.replaced")
    found += [path for path in aside if not (folder / path.stem.removeprefix(".")).exists()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[0])


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if {"/", ".."} & {*Path(name).parts}:
                return f"{MANIFEST} names {name}, outside of the folder"
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} is cut short"
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: _fingerprint(path / name), manifest)
            for (name, expected), fingerprint in zip(manifest.items(), found, strict=True):
                if fingerprint != expected:
                    return f"{name} was altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None if "state.json" in manifest else f"{MANIFEST} does not list state.json"


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
