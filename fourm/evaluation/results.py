"""What a comparison came to: figures as `metrics.json`, tables, pictures, and a page of several."""

from __future__ import annotations

import base64
import contextlib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fourm.checkpoint import read_json
from fourm.data.rewrite import write_durably
from fourm.evaluation.report import write_page
from fourm.runtime import environment


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


def write_metrics(folder: Path, metrics: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Writes `metrics.json` with tables and environment, and prints the tables."""
    found = {**metrics, "tables": tables, "environment": environment()}
    write_durably(folder / "metrics.json", json.dumps(found, indent=1))
    print(*tables, sep="\n\n")


@contextlib.contextmanager
def drawing(path: Path, rows: int, columns: int, size: tuple[float, float], title: str = "") -> Iterator[Any]:
    """Axes (rows, columns) to draw on; what is drawn is then written.

    Args:
        path: Where.
        rows: Of axes.
        columns: Of axes.
        size: Width and height in inches.
        title: Stands above it, in as many lines as it needs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    yield axes
    if title:
        figure.suptitle(textwrap.fill(title, round(12.5 * size[0])), fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_results(folder: str | Path, output: str | Path, title: str) -> Path:
    """Writes one page with the protocol, pictures and tables of every run below a folder.

    Args:
        folder: Holds folders with `metrics.json` (`protocol`, `tables`) and pictures, as `write_metrics` writes them.
        output: The page.
        title: Its title.

    Raises:
        ValueError: There is no such run.
    """
    runs: list[dict[str, Any]] = []
    for path in sorted(Path(folder).rglob("metrics.json")):
        metrics = read_json(path)
        if "protocol" in metrics:
            drawn = {png.stem: base64.b64encode(png.read_bytes()).decode() for png in sorted(path.parent.glob("*.png"))}
            name = path.parent.name if path.parent == Path(folder) else str(path.parent.relative_to(folder))
            runs.append({"name": name, "pictures": drawn, "tables": [], **metrics})
    if not runs:
        raise ValueError(f"{folder} holds no finished run: no metrics.json with a protocol")
    return write_page(output, "results.html", "fourm.evaluation", title=title, runs=runs)
