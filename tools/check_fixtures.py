"""Compares fourm with golden inputs and outputs: `python tools/check_fixtures.py FOLDER`.

FOLDER has one folder per kind (`fm`, `generation`, `masking`, `transforms`, `vq`) of JSON files with NPZ files beside
them. Prints a line for each comparison; the exit status is 1 if one fails, if a file has no check, or if there is none.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from fixtures import diffusion, fm, generation, masking, transforms, vq
from fixtures.case import Fixture, Line, check_rule

Check = Callable[[Fixture], Iterator[Line]]

# Per folder: pattern of file names (without .json) and what compares them. A file may have several.
CHECKS: dict[str, list[tuple[str, Check]]] = {
    "fm": [*fm.CHECKS.items()],
    "generation": [*generation.CHECKS.items()],
    "masking": [*masking.CHECKS.items()],
    "transforms": [*transforms.CHECKS.items()],
    "vq": [*vq.CHECKS.items(), *diffusion.CHECKS.items()],
}


def lines(folder: Path, only: str = "*") -> Iterator[Line]:
    """Compares every case of a folder of fixtures.

    Args:
        folder: Holds a folder per kind.
        only: Pattern of the cases to compare, such as `fm/parity_*`.
    """
    if (folder / "rule_check.json").exists() and fnmatch("rule_check", only):
        yield from check_rule(Fixture(folder / "rule_check.json"))
    for kind, checks in CHECKS.items():
        for path in sorted((folder / kind).rglob("*.json")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if not fnmatch(name, only):
                continue
            within = path.relative_to(folder / kind).with_suffix("").as_posix()
            chosen = [check for pattern, check in checks if fnmatch(within, pattern)]
            if not chosen:
                yield Line(name, "nothing: this file has no check", float("nan"), False)
            for check in chosen:
                try:
                    yield from check(Fixture(path))
                except Exception as error:
                    traceback.print_exc()
                    yield Line(name, f"stopped by {type(error).__name__}: {error}", float("nan"), False)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", help="pattern of the cases to compare, such as 'fm/parity_*'")
    given = parser.parse_args()
    compared = failed = 0
    for line in lines(given.folder, given.only):
        print(line, flush=True)
        compared, failed = compared + 1, failed + (not line.ok)
    print(f"{compared} comparisons, {failed} failed")
    if not compared:
        print(f"{given.folder} holds no fixtures that match {given.only!r}", file=sys.stderr)
    return 1 if failed or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
