"""One data set to another, shard by shard, by several processes, safe from being killed at any time.

A shard is written aside and gets its name when all of it is on the disk, so what has a name is whole. Whoever starts
the same rewriting again makes only what is missing, with the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from fourm.checkpoint import flush
from fourm.data.shards import Faults, ShardDataset, add_value, parse_name, shard_name, tar_entries

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


class Skipped(NamedTuple):
    """A sample that is left out."""

    key: str
    reason: str
    message: str


@dataclass
class Rewritten:
    """What a process did in its share of the shards.

    Attributes:
        samples: In all of them.
        written: Of these, in shards that were made now.
        skipped: Number of samples left out, by reason.
        kept: Shards that had been there.
        made: Shards that were made now.
        seconds: How long that took.
    """

    samples: int = 0
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    made: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Samples written per second."""
        return self.written / self.seconds


def shard_keys(dataset: ShardDataset, shard_size: int) -> dict[str, list[str]]:
    """Keys of each output shard: those of a tar of the source, or of plain folders every `shard_size`.

    Where modalities lie in different tars, the first one's count.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, expected at least 1")
    shards: dict[str, list[str]] = {}
    paths = ({key: str(entry.path) for key, entry in column.entries.items()} for column in dataset.columns.values())
    tars = next((of for of in paths if any(path.endswith(".tar") for path in of.values())), None)
    for number, key in enumerate(dataset.keys):
        name = PurePosixPath(tars[key]).name if tars else shard_name(number // shard_size)
        shards.setdefault(name, []).append(key)
    return shards


def rewrite(
    dataset: ShardDataset,
    output: str | Path,
    split: str,
    names: Sequence[str],
    function: Callable[[Any], list[Sample]],
    *,
    shard_size: int,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    extensions: Mapping[str, str] | None = None,
    describe: str = "",
    prepare: Callable[[list[Sample]], Any] = list,
    on_error: Literal["raise", "skip"] = "raise",
    max_bad: float = 0.01,
) -> Rewritten:
    """Maps samples to samples, shard by shard; shards whose outputs are all there are kept.

    Batches never cross a shard, so the function meets the same batches however often it was killed, and with any
    number of processes. Samples that are left out are listed in `<shard>.skipped.jsonl` in the folder of the first
    name.

    Args:
        dataset: What is read; of a tar source, shards keep their names and their samples.
        output: Root of the new data set; may be that of the old one.
        split: Folder below it.
        names: Modalities that are written.
        function: A batch, as `prepare` leaves it, to samples with `__key__` and the names; called in this thread.
        shard_size: Samples in a shard, where the source are plain folders.
        batch_size: Samples in a batch, at most.
        workers: Threads that read, decode and prepare the next batches; there is at least one.
        rank: Number of this process; it takes shards rank, rank + world_size, ...
        world_size: Number of processes.
        extensions: As in `write_shards`.
        describe: Title of the progress bar.
        prepare: Done to the samples of a batch after reading, by the workers.
        on_error: `raise` the ValueError of a bad sample; or `skip`: go through its batch one by one, and list it.
        max_bad: Share of a shard's samples that may be left out; one may in any case.

    Raises:
        ValueError: A sample that cannot be read, prepared, mapped or written; too many of them; a shard that is there
            and has other samples than the source.
    """
    start, done, folder = time.perf_counter(), Rewritten(), Path(output) / split
    every = shard_keys(dataset, shard_size)
    shards = dict(list(every.items())[rank::world_size])
    missing = {
        shard: [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        for shard, keys in shards.items()
        if not all((folder / name / shard).exists() for name in names)
    }
    for path in sorted((folder / names[0]).glob("*.tar")):
        if path.name not in every or path.name in shards.keys() - missing.keys():
            _check_kept(path, every.get(path.name, []), names)

    def load(keys: list[str]) -> Any:
        return prepare([dataset.sample(key) for key in keys])

    def mapped(keys: list[str], loaded: Future[Any]) -> Iterator[Sample | Skipped]:
        try:
            yield from function(loaded.result())
        except ValueError:
            if on_error == "raise":
                raise
            for key in keys:
                reason = "unreadable"
                try:
                    sample = dataset.sample(key)
                    reason = "unusable"
                    yield from function(prepare([sample]))
                except ValueError as error:
                    yield Skipped(key, reason, str(error))

    def write(samples: list[Sample], tars: Mapping[str, tarfile.TarFile]) -> None:
        for sample in samples:
            for name, tar in tars.items():
                try:
                    add_value(tar, sample["__key__"], sample[name], (extensions or {}).get(name))
                except ValueError as error:
                    raise ValueError(f"{folder / name}, {sample['__key__']!r}: {error}") from error

    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        ThreadPoolExecutor(1) as writer,
        tqdm(total=sum(map(len, shards.values())), desc=describe, unit=" samples", mininterval=1, disable=rank > 0)
        as progress,
    ):  # fmt: skip
        batches = _ahead(pool, load, (batch for shard in missing.values() for batch in shard), max(workers, 1) + 1)
        for shard, keys in shards.items():
            first = folder / names[0] / shard
            if shard in missing:
                with _tars(folder, shard, names) as tars:
                    skipped, written = list[Skipped](), writer.submit(write, [], tars)
                    for batch, loaded in islice(batches, len(missing[shard])):
                        samples = list(mapped(batch, loaded))
                        skipped += [sample for sample in samples if isinstance(sample, Skipped)]
                        if len(skipped) > (limit := max(1, int(max_bad * len(keys)))):
                            raise ValueError(f"{first}: {len(skipped)} or more of {len(keys)} samples are bad, max_bad "
                                             f"{max_bad} allows {limit}; the first: {skipped[0].message}")  # fmt: skip
                        written.result()
                        written = writer.submit(write, [one for one in samples if not isinstance(one, Skipped)], tars)
                        progress.update(len(batch))
                    written.result()
                    _write_skipped(first, skipped)
            else:
                progress.update(len(keys))
            left_out = _read_skipped(first)
            done.samples += len(keys) - len(left_out)
            done.written += len(keys) - len(left_out) if shard in missing else 0
            done.skipped.update(one.reason for one in left_out)
    done.made, done.kept = len(missing), len(shards) - len(missing)
    done.seconds = time.perf_counter() - start
    return done


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[list[str]], Any], batches: Iterable[list[str]], count: int
) -> Iterator[tuple[list[str], Future[Any]]]:
    """Batches and what is loaded of them, some batches ahead."""
    pending = deque[tuple[list[str], Future[Any]]]()
    for batch in batches:
        pending.append((batch, pool.submit(load, batch)))
        if len(pending) > count:
            yield pending.popleft()
    yield from pending


@contextlib.contextmanager
def _tars(folder: Path, shard: str, names: Sequence[str]) -> Iterator[dict[str, tarfile.TarFile]]:
    """Open tars of one shard; they get their names when the context is left without an error."""
    asides = {name: folder / name / f"{shard}.tmp" for name in names}
    for aside in asides.values():
        aside.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT))
            for name, aside in asides.items()
        }
    for aside in asides.values():
        flush(aside)
    for aside in asides.values():
        aside.replace(aside.with_suffix(""))
        flush(aside.parent)


def write_durably(path: Path, text: str) -> None:
    """Writes a small file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def _check_kept(shard: Path, keys: Sequence[str], names: Sequence[str]) -> None:
    """ValueError where a shard that is there has not the samples that its source has now."""
    with open(shard, "rb") as stream:
        there = {parse_name(name)[0] for name, *_ in tar_entries(shard, stream, Faults("raise"))}
    if other := sorted(there.union(one.key for one in _read_skipped(shard)).symmetric_difference(keys)):
        raise ValueError(f"{shard}: the source has changed since, {len(other)} samples such as {other[0]!r} are in one "
                         f"of both only; delete {shard.name} in {', '.join(names)} of {shard.parents[1]}, or these "
                         "folders")  # fmt: skip


def _write_skipped(shard: Path, skipped: Sequence[Skipped]) -> None:
    for one in skipped:
        logger.warning("skipped (%s): %s", one.reason, one.message)
    lines = [json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in skipped]
    path = shard.with_suffix(".skipped.jsonl")
    write_durably(path, "".join(lines)) if lines else path.unlink(missing_ok=True)


def _read_skipped(shard: Path) -> list[Skipped]:
    path = shard.with_suffix(".skipped.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Skipped(**json.loads(line)) for line in lines]
