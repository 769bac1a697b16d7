"""The figures of a run: every one to `metrics.jsonl`, a line to the console, and to wandb where asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Logbook:
    """Writes down what a run measures, one record per call.

    Args:
        folder: The run's folder; records are lines of JSON in `metrics.jsonl`, each with its `step`.
        wandb: Project to mirror records to; default: none. `WANDB_MODE=offline` in the environment works without
            network.
        config: Shown beside the run in wandb.
        enabled: Whether this process is the one of several that writes.

    Raises:
        ValueError: wandb was asked for and is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self.enabled = enabled
        self._wandb = _start_wandb(wandb, self.path.parent, config) if wandb and enabled else None
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Drops the records after a step, and a line that was cut short: they are about to be made again."""
        if not self.enabled or not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(line + "\n" for line in kept))
        os.replace(aside, self.path)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds one record; values that JSON has no word for (NaN, infinity) become text."""
        if not self.enabled:
            return
        plain = {name: _plain(value) for name, value in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(record), step=step)

    def say(self, line: str) -> None:
        """Prints a line, also where the output goes to a file."""
        if self.enabled:
            print(line, flush=True)

    def close(self) -> None:
        """Tells wandb that the run is over."""
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run in the order they were made; a line that was cut short is left out."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) is not None]


def duration(seconds: float) -> str:
    """Seconds as `s`, `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def amount(number: float) -> str:
    """A number with three digits and k, M or G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _start_wandb(project: str, folder: Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb  # an extra: only runs that ask for it need it
    except ImportError as error:
        raise ValueError("wandb was asked for but is not installed: pip install fourm[wandb]") from error
    return wandb.init(project=project, name=folder.name, dir=folder, config=dict(config or {}), resume="allow")
