"""The report: one HTML page that opens from disk, with everything a reader needs to judge a model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure

from fourm.evaluation.gallery import Gallery
from fourm.evaluation.matrix import Matrix, summary
from fourm.evaluation.metrics import LOWER_IS_BETTER, of_constant

INK = "#010203"  # stands for the page's text colour in drawings
COLOURS = ("#3b76c4", "#d1603d", "#3f9a6b", "#9a6bb8", "#c29a2e", "#4aa3a8", "#b8527f", "#7a7f45")
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "legend.fontsize": 8, "legend.frameon": False, "lines.linewidth": 1.4,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * cycler(color=COLOURS),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "legend.labelcolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    gallery: Gallery | None = None,
    runs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    commands: Mapping[str, str] | None = None,
    card: Mapping[str, Any] | None = None,
    title: str = "fourm",
) -> Path:
    """Writes the page; parts that nothing is known about are left out.

    Args:
        path: Of the HTML file.
        metrics: Content of `metrics.json`: `matrix`, `tasks`, `tokenizers`, `seconds`, `environment`.
        gallery: Makes the pictures.
        runs: Records of training runs (`logbook.read`) by name.
        commands: The command behind each part: `matrix`, `tasks`, `tokenizers`, `train`, `generate`.
        card: `card.json` of the data; its `sources` are credited.
        title: Headline.

    Returns:
        The path.
    """
    matrix = metrics.get("matrix") or {}
    return write_page(
        path,
        "report.html",
        title=title,
        metrics=metrics,
        heat=heat_map(matrix) if matrix else None,
        summary=summary(matrix) if matrix else None,
        figures=task_figures(metrics.get("tasks") or {}),
        panels=gallery.panels() if gallery else {},
        curves={name: loss_curves(records) for name, records in (runs or {}).items()},
        commands=commands or {},
        card=card or {},
    )


def write_page(path: str | Path, template: str, room: str = "fourm.evaluation", **values: Any) -> Path:
    """Writes a page from a template that a room has.

    Args:
        path: Of the HTML file.
        template: Extends `page.html`.
        room: Package in which the template lies.
        values: What it shows, beside `date`.

    Returns:
        The path.
    """
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(each, ".") for each in dict.fromkeys([room, "fourm.evaluation"])]),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["number"] = number
    date = datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC")
    html = pages.get_template(template).render(date=date, **values)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html)
    return path


def heat_map(matrix: Matrix) -> dict[str, Any]:
    """The matrix as cells to print: `share` is the part of the target's bits that the source saves, in percent."""
    targets = list(dict.fromkeys(target for row in matrix.values() for target in row))
    targets = [name for name in matrix if name in targets] + [name for name in targets if name not in matrix]
    nothing = {target: cell["nothing_bits"] for row in matrix.values() for target, cell in row.items()}
    rows = []
    for source, row in matrix.items():
        cells: list[dict[str, Any] | None] = []
        for target in targets:
            if target not in row:
                cells.append(None)
                continue
            low, high = row[target]["ci95"]
            share = 100 * row[target]["gain_bits"] / max(nothing[target], 1e-9)
            cells.append(row[target] | {"low": low, "high": high, "share": share, "sure": not low <= 0 <= high})
        rows.append((source, cells))
    top = max((cell["share"] for _, cells in rows for cell in cells if cell), default=1)
    return {"targets": targets, "rows": rows, "nothing": nothing, "top": max(top, 1e-9)}


def task_figures(tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each figure of each task: `value` of the model, `constant` guess, `bound` of the tokenizer.

    `better` says whether the model beats the constant.
    """
    lines = []
    for name, figures in tasks.items():
        for figure, bound in figures["bound"].items():
            value, constant = figures[figure], figures[of_constant(figure)]
            lines.append(
                {
                    "name": name.replace("->", " → "),
                    "figure": figure,
                    "value": value,
                    "constant": constant,
                    "ratio": value / constant if constant else None,
                    "bound": bound,
                    "better": value < constant if figure.startswith(LOWER_IS_BETTER) else value > constant,
                }
            )
    return lines


def number(value: float | None) -> str:
    """Three significant digits, without exponents where they can be avoided."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"


def loss_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Losses over steps as inline SVG that takes the page's text colour: the whole left, held-out parts right."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name.endswith("loss") or name.startswith("val/loss/"):
                series.setdefault(name, []).append((record["step"], value))
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(11, 3.1), layout="constrained")
        for axis, whole in zip(drawing.subplots(1, 2), (True, False), strict=True):
            for name, points in series.items():
                if name.endswith("loss") == whole:
                    axis.plot(*np.array(points).T, label=name)
            axis.set_xlabel("step")
            if axis.lines:
                axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
