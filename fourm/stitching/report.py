"""Tables of figures, and the page that shows what stitching came to."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fourm.checkpoint import read_json
from fourm.evaluation.report import write_page


class Table(NamedTuple):
    """Figures as they are printed, kept in `metrics.json` and shown on the page.

    Args:
        title: What they are.
        columns: Their headings.
        rows: Cells as texts.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            [
                self.title,
                *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines),
            ]
        )


def write_stitching_report(folder: str | Path, output: str | Path) -> Path:
    """Writes one page with the protocol, pictures and tables of every run below a folder.

    Args:
        folder: Holds folders with `metrics.json` (`protocol`, `tables`) and pictures, as the verbs of stitching write.
        output: The page.

    Raises:
        ValueError: There is no such run.
    """
    runs: list[dict[str, Any]] = []
    for path in sorted(Path(folder).rglob("metrics.json")):
        metrics = read_json(path)
        if "protocol" in metrics:
            drawn = {png.stem: base64.b64encode(png.read_bytes()).decode() for png in sorted(path.parent.glob("*.png"))}
            name = str(path.parent.relative_to(folder))
            runs.append({"name": name, "pictures": drawn, "tables": [], **metrics})
    if not runs:
        raise ValueError(f"{folder} holds no finished run of `fourm stitch`: no metrics.json with a protocol")
    return write_page(output, "stitching.html", "fourm.stitching", title="Stitching", runs=runs)
