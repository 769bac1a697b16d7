"""`fourm data inspect`: what a folder of data holds, and all that is wrong with it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fourm.data.inspect import beside, inspect
from fourm.modalities import TokenSpace


@dataclass
class Config:
    """What is looked at. The exit status is 1 where anything is wrong.

    Args:
        path: Root of raw or token data (with a folder for each split), or the folder of one split.
        output: The page with pictures; default: `inspect.html` in that folder.
        modalities: YAML file with the modality table of token data; default: `modalities.yaml` in the root.
        samples: Samples shown of each split.
    """

    path: str
    output: str | None = None
    modalities: str | None = None
    samples: int = 6

    positional: ClassVar[bool] = True


def run(config: Config) -> None:
    """Prints a table and all that is wrong, writes the page."""
    if not Path(config.path).is_dir():
        print(f"fourm data inspect: path is {config.path}, which is not a folder", file=sys.stderr)
        sys.exit(2)
    table = Path(config.modalities or beside(Path(config.path), "modalities.yaml"))
    space = TokenSpace.from_yaml(table) if config.modalities or table.is_file() else None
    found = inspect(config.path, space, config.samples)
    output = Path(config.output or Path(config.path) / "inspect.html")
    found.write(output)
    print(found.table(), *found.reasons(), sep="\n")
    print(f"{output}: {f'{len(found.troubles):,} troubles' if found.troubles else 'no trouble'}")
    sys.exit(bool(found.troubles))
