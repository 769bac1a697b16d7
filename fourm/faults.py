"""Faults on order, to see what a run survives: `FOURM_FAULT=kill@step:7 fourm train ...`.

The variable holds one fault or several, parted by commas: `<kind>@<point>:<number>`, and `@rank:<r>` behind it for one
of several processes. Points are `step` (the start of update k, counted from 0) and `write` (the n-th thing this process
does to the disk for its checkpoints, counted from 1). Kinds are `kill` (SIGKILL to itself), `hang`, `io` (an error of
the disk), `full` (no space on it), and at a step also `nan` (its loss is not a number).
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
import signal
import sys
import time

VARIABLE = "FOURM_FAULT"
writes = itertools.count(1)


def reach(point: str, number: int | None = None) -> None:
    """Has the faults that are ordered for this point happen; none without the variable.

    Args:
        point: `step` or `write`.
        number: Which; default: one more than the last time.

    Raises:
        OSError: It was ordered.
        ValueError: The variable is not understood.
    """
    if order := os.environ.get(VARIABLE):
        number = next(writes) if number is None else number
        for kind in _due(order, point, number) - {"nan"}:
            print(f"{VARIABLE}: {kind} at {point} {number}", file=sys.stderr, flush=True)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while kind == "hang":
                time.sleep(3600)
            code = errno.EIO if kind == "io" else errno.ENOSPC
            raise OSError(code, f"{os.strerror(code)} ({VARIABLE})")


def spoils(step: int) -> bool:
    """Whether the loss of an update is to be NaN."""
    order = os.environ.get(VARIABLE)
    return bool(order) and "nan" in _due(str(order), "step", step)


def _due(order: str, point: str, number: int) -> set[str]:
    return {kind for kind, *place in _parse(order) if place == [point, number]}


@functools.cache
def _parse(order: str) -> list[tuple[str, str, int]]:
    """Kind, point and number of the faults of this process."""
    faults = []
    for fault in order.split(","):
        found = re.fullmatch(r"(?:(kill|hang|io|full)@(step|write)|(nan)@(step)):(\d+)(?:@rank:(\d+))?", fault.strip())
        if found is None:
            raise ValueError(
                f"{VARIABLE} holds {fault!r}; allowed are kill, hang, io, full and nan, such as 'kill@step:7', "
                "'full@write:3' or 'nan@step:7@rank:1' (nan only at steps), parted by commas"
            )
        kind, point, nan, step, number, rank = found.groups()
        if rank is None or rank == os.environ.get("RANK", "0"):
            faults.append((kind or nan, point or step, int(number)))
    return faults
