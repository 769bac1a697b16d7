"""Runs a list of `fourm` commands as one: in order, in parallel where asked, and only what is not done yet.

A step is done when it has finished before with the same commands, the same content of every file they name with
`--config` or `--modalities`, and the same steps before it. Records lie in `<folder>/steps/<step>.json`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any


@dataclass(frozen=True)
class Step:
    """Commands that may run at the same time.

    Args:
        name: What the step is called in the record of times.
        run: Commands as on the command line, without the leading `fourm`. `{folder}` stands for the pipeline's folder.
        jobs: How many of them run at once; they share the cores.
    """

    name: str
    run: list[str]
    jobs: int = 1


@dataclass(frozen=True)
class PipelineConfig:
    """A folder, and the steps that fill it."""

    folder: str
    steps: list[Step] = field(default_factory=list)


class Children:
    """The commands that run now, and the terminal they share."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self._console = Lock()

    def stop(self, *_: Any) -> None:
        """Handles SIGTERM: passes it on, so that trainings save, and has nothing else begin."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()

    def say(self, line: str) -> None:
        """Prints a line, as long as somebody reads."""
        with self._console:
            try:
                print(line, flush=True)
            except OSError:
                from fourm import runtime  # with torch

                runtime.hush()


def run(config: PipelineConfig) -> None:
    """Runs the steps that are not done yet.

    Raises:
        ValueError: A command failed; says which and where its output ended.
        SystemExit: With status 143, after SIGTERM, when the commands that ran then have ended.
    """
    children = Children()
    before = signal.signal(signal.SIGTERM, children.stop)
    try:
        _run(config, children)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(config: PipelineConfig, children: Children) -> None:
    records = Path(config.folder) / "steps"
    records.mkdir(parents=True, exist_ok=True)
    fingerprint, changed = "", ""
    for number, step in enumerate(config.steps, start=1):
        title = f"[{number}/{len(config.steps)}] {step.name}"
        commands = [command.replace("{folder}", config.folder) for command in step.run]
        fingerprint = _fingerprint(fingerprint, commands)
        record = records / f"{step.name}.json"
        if record.exists() and json.loads(record.read_text())["fingerprint"] == fingerprint:
            children.say(f"{title}: done before")
            continue
        children.say(f"{title}: {len(commands)} command(s)")
        if record.exists():
            changed = changed or step.name
        start = time.time()
        threads = max(1, (os.cpu_count() or 1) // step.jobs)
        try:
            with ThreadPoolExecutor(step.jobs) as pool:
                list(pool.map(partial(_call, threads=threads, children=children), commands))
        except ValueError as error:
            if not changed:
                raise
            raise ValueError(
                f"{error}\nStep {changed!r} changed since {records / changed}.json was written, so what step "
                f"{step.name!r} made before may be out of date: delete its output folder and run again"
            ) from error
        if children.stopped:
            children.say(f"{title}: stopped; the same command goes on from there")
            raise SystemExit(143)
        seconds = round(time.time() - start, 1)
        text = json.dumps({"fingerprint": fingerprint, "seconds": seconds, "commands": commands}, indent=2)
        record.with_suffix(".tmp").write_text(text)
        record.with_suffix(".tmp").rename(record)
        children.say(f"{title}: {seconds} s")


def seconds(folder: str | Path) -> dict[str, float]:
    """Seconds each finished step of a pipeline took."""
    return {path.stem: json.loads(path.read_text())["seconds"] for path in (Path(folder) / "steps").glob("*.json")}


def commands(folder: str | Path) -> dict[str, list[str]]:
    """The commands of each finished step of a pipeline."""
    return {path.stem: json.loads(path.read_text())["commands"] for path in (Path(folder) / "steps").glob("*.json")}


def _fingerprint(before: str, commands: list[str]) -> str:
    digest = hashlib.sha256(before.encode())
    for command in commands:
        digest.update(command.encode())
        words = shlex.split(command)
        for option, value in itertools.pairwise(words):
            if option in ("--config", "--modalities"):
                digest.update(Path(value).read_bytes())
    return digest.hexdigest()


def _call(command: str, threads: int, children: Children) -> None:
    """Runs one command and passes its lines on (progress bars redraw with carriage returns, which count as lines)."""
    if children.stopped:
        return
    words = shlex.split(command)
    recipe = Path(words[words.index("--config") + 1]) if "--config" in words else Path(words[0])
    label = recipe.parent.name if recipe.stem == "recipe" else words[0]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "5"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fourm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    children.running.add(process)
    if children.stopped:  # while it began
        process.terminate()
    assert process.stdout is not None
    last: list[str] = []
    for line in process.stdout:  # universal newlines: a carriage return ends a line too
        if line.strip():
            last = [*last[-20:], line.rstrip()]
            children.say(f"  {label}: {line.rstrip()}")
    failed = process.wait()
    children.running.remove(process)
    if failed and not children.stopped:
        said = "\n".join(last)
        raise ValueError(f"`fourm {command}` failed with exit status {process.returncode}; it said:\n{said}")
