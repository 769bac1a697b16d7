"""Breaks a small training in random ways, and sees whether it ends as if nothing had happened.

    python tools/fault_drill.py --rounds 100 --seed 0

Every round starts a run of `fourm train`, hurts it with a random fault (`fourm/faults.py`) at a random place, mostly
hurts its newest checkpoint too or the run that goes on, then lets it go on to its end. It survived if the last
checkpoint and the model are those of a run that was never disturbed, bit for bit, and the losses in `metrics.jsonl`
the same. Runs are forks of this process, which has imported everything. Exit status 1 if any round was lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from fourm import checkpoint, cli, faults, logbook
from fourm.data.shards import write_shards
from fourm.verbs import train

STEPS = 11
SAMPLES = {"first": 20, "second": 12}  # by data set; an epoch of both is 4 updates
TABLE = {
    "tok": {"kind": "grid", "vocab_size": 20, "grid": [2, 2]},
    "depth": {"kind": "grid", "vocab_size": 10, "grid": [2, 2]},
    "caption": {"kind": "text", "vocab_size": 300, "max_tokens": 8, "sentinels": 20},
}
CONFIG = {
    "modalities": "table.yaml", "steps": STEPS, "batch_size": 8, "precision": "fp32", "ema": 0.9, "keep": 2,
    "data": [{"path": name, "weight": 0.5} for name in SAMPLES], "val_batches": 1, "eval_every": 4, "save_every": 2,
    "log_every": 1, "optim": {"warmup": 2, "name": "muon"},
    "model": {"size": "nano", "dim": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2},
    "masking": {"input_tokens": 6, "target_tokens": 6,
                "mixture": [{"input": {"others": 1}, "target": {"others": 1}}]},
}  # fmt: skip


def write_data() -> None:
    rng = np.random.default_rng(0)
    for split, (name, count) in itertools.product(("train", "val"), SAMPLES.items()):
        stock = [
            {
                "__key__": f"{name}{i}",
                "tok": rng.integers(0, 20, 4).astype(np.int16),
                "depth": rng.integers(0, 10, 4).astype(np.int16),
                "caption": rng.integers(30, 60, 6),
            }
            for i in range(count)
        ]
        write_shards(Path(name), split, stock, 5)
    Path("table.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))


def start(folder: Path, order: str = "", *options: str) -> int:
    """Starts `fourm train` in a fork, with faults; the number of the process."""
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("")
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ[faults.VARIABLE] = order
        cli.main(["train", "--config", "config.yaml", "--folder", str(folder), *options])
        sys.stdout.flush()
        status = 0
        (folder / "writes").write_text(str(next(faults.writes) - 1))
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def watch(child: int, folder: Path, hurt: Callable[[], None] | None = None, after: float = 0) -> int:
    """Waits for a run, kills it when nothing more comes of it, and may hurt it before; how it ended."""
    began = news = time.monotonic()
    before, patience = [0, 0], 120
    files = [folder / "metrics.jsonl", folder / "log.txt"]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        sizes = [file.stat().st_size if file.exists() else 0 for file in files]
        if sizes != before:
            before, news = sizes, now
            patience = 1 if "hang at" in files[1].read_text() else 120
        if hurt is not None and now - began > after:
            hurt()
            hurt = None
        if now - news > patience:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def result(folder: Path) -> dict[str, object]:
    """What a run came to: every tensor file of its last checkpoint and of its model, its counters, and its losses."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest = checkpoint.latest(folder)
    if newest is None:
        raise ValueError("no checkpoint is left")
    state = json.loads((newest / "state.json").read_text())
    found: dict[str, object] = {key: state[key] for key in ("step", "tokens", "metrics", "averaged")}
    for file in [*newest.glob("*.safetensors"), folder / "model" / "model.safetensors"]:
        found[file.parent.name + "/" + file.name] = file.read_bytes()
    found["losses"] = [[row["step"], row["loss"], row["grad_norm"]] for row in logbook.read(folder) if "loss" in row]
    return found


def corrupt(folder: Path, rng: random.Random) -> str:
    """Hurts the newest checkpoint of a run that is not running."""
    names = [path for path in folder.glob("checkpoint-*") if (path / checkpoint.MANIFEST).exists()]
    if len(names) < 2:  # one must be left
        return "no checkpoint hurt"
    newest = max(names, key=lambda path: int(path.name.partition("-")[2]))
    file = rng.choice(sorted(newest.iterdir()))
    how = rng.choice(["cut", "flip", "manifest"])
    content = bytearray(file.read_bytes())
    if how == "manifest":
        (newest / checkpoint.MANIFEST).unlink()
        return f"manifest of {newest.name} deleted"
    place = rng.randrange(len(content))
    if how == "cut":
        file.write_bytes(content[:place])
        return f"{newest.name}/{file.name} cut at byte {place}"
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"a bit of byte {place} of {newest.name}/{file.name} flipped"


class Drill:
    """Rounds against one small training.

    Args:
        seed: Decides all of them.
        folder: Where the runs are.
    """

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        self.references: dict[int | None, dict[str, object]] = {}
        began = time.monotonic()
        self.undisturbed = self.reference()
        self.seconds = time.monotonic() - began
        self.writes = int((folder / "reference" / "writes").read_text())

    def reference(self, skipped: int | None = None) -> dict[str, object]:
        """What a run comes to that nothing happens to, but that is told to leave an update out."""
        if skipped in self.references:
            return self.references[skipped]
        folder = self.folder / ("reference" if skipped is None else f"without-{skipped}")
        options = [] if skipped is None else ["--skip_steps", f"{skipped}:{skipped + 1}"]
        if watch(start(folder, "kill@step:1000000", *options), folder):  # that step never comes, but writes are counted
            raise RuntimeError(f"an undisturbed run failed: {(folder / 'log.txt').read_text()}")
        self.references[skipped] = result(folder)
        return self.references[skipped]

    def round(self, number: int) -> tuple[str, str]:
        """What was done to a run, and why it was lost if it was."""
        rng = random.Random(f"{self.seed}/{number}")
        folder = self.folder / f"round-{number}"
        options = ["--workers", rng.choice(["0", "0", "0", "2"])]
        wanted = self.undisturbed
        kind = rng.choice(["kill", "hang", "nan", "io", "full", "SIGKILL", "SIGTERM"])
        story = []
        if kind in ("SIGKILL", "SIGTERM"):
            after = rng.uniform(0, 1.2 * self.seconds)
            child = start(folder, "", *options)
            ended = watch(child, folder, hurt=lambda: os.kill(child, signal.Signals[kind]), after=after)
            story.append(f"{kind} after {after:.2f} s, status {ended}")
            allowed = {"SIGKILL": (0, -9), "SIGTERM": (0, 143, -15)}[kind]
        else:
            step = kind == "nan" or rng.random() < 0.3
            place = rng.randrange(STEPS) if step else rng.randint(1, self.writes)
            order = f"{kind}@{'step' if step else 'write'}:{place}"
            story.append(order)
            allowed = (-9,) if kind in ("kill", "hang") else (0, 1)
            if kind == "nan":
                policy = rng.choice(["skip", "rewind", "raise"])
                options += ["--non_finite", policy]
                story.append(policy)
                allowed = (1,) if policy == "raise" else (0,)
                wanted = self.undisturbed if policy == "raise" else self.reference(place)
            ended = watch(start(folder, order, *options), folder)
            log = (folder / "log.txt").read_text()
            if (faults.VARIABLE if kind != "nan" else "is not finite") not in log:
                return ", ".join(story), "the fault did not happen"
        if ended not in allowed:
            return ", ".join(story), f"it ended with status {ended}\n{(folder / 'log.txt').read_text()}"
        if wanted is self.undisturbed:
            if rng.random() < 0.5:
                story.append(corrupt(folder, rng))
            if rng.random() < 0.3:
                order = f"{rng.choice(['kill', 'io', 'full'])}@write:{rng.randint(1, self.writes)}"
                story.append(f"then {order}")
                watch(start(folder, order, *options), folder)
        if watch(start(folder, "", *options), folder):
            return ", ".join(story), f"it did not go on\n{(folder / 'log.txt').read_text()}"
        try:
            found = result(folder)
        except (ValueError, OSError, UserWarning) as error:
            return ", ".join(story), str(error)
        differing = [name for name in found | wanted if found.get(name) != wanted.get(name)]
        if differing:
            return ", ".join(story), f"{', '.join(differing)} differ"
        shutil.rmtree(folder)
        return ", ".join(story), ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round, to repeat one")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fault_drill-"))
    os.chdir(folder)
    os.environ["FOURM_CACHE"] = str(folder / "cache")
    write_data()
    drill = Drill(args.seed, folder)
    print(f"{train.__name__}: {STEPS} updates, {drill.writes} write points, {drill.seconds:.1f} s a run", flush=True)
    lost: Counter[bool] = Counter()
    began = time.monotonic()
    for number in range(args.first, args.first + args.rounds):
        story, reason = drill.round(number)
        lost[bool(reason)] += 1
        print(f"{number:4}  {'LOST' if reason else 'survived'}  {story}" + f": {reason}" * bool(reason), flush=True)
    seconds = (time.monotonic() - began) / args.rounds
    print(f"{lost[False]} of {args.rounds} rounds survived, {lost[True]} lost; {seconds:.1f} s a round")
    if lost[True]:
        print(f"what was lost is in {folder}")
    else:
        shutil.rmtree(folder)
    return int(lost[True] > 0)


if __name__ == "__main__":
    sys.exit(main())
