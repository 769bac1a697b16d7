"""The report: one HTML page that opens from disk, with everything a reader needs to judge a model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from fourm.evaluation.gallery import Gallery, Panel
from fourm.evaluation.matrix import Matrix, summary
from fourm.evaluation.metrics import BASELINE

INK = "#010203"  # stands for the page's text colour in drawings
LINES = ("#3b76c4", "#d1603d", "#3f9a6b", "#9a6bb8", "#c29a2e", "#4aa3a8", "#b8527f", "#7a7f45")
LOWER_IS_BETTER = ("mae", "mean_angle")


@dataclass(frozen=True)
class Figure:
    """One line of the table of figures; numbers are ready to print.

    Attributes:
        name: What is measured, such as `rgb->elevation`.
        figure: Which figure, such as `mae_land_m`.
        value: Of the model.
        constant: Of the best constant guess, learned from the training split.
        ratio: value / constant.
        bound: Of the target's tokenizer alone.
        better: The model beats the constant.
    """

    name: str
    figure: str
    value: str
    constant: str
    ratio: str
    bound: str
    better: bool


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
        commands: The command behind each part: `matrix`, `tasks`, `tokenizers`, `train`, `generate`, `report`, `all`.
        card: `card.json` of the data; its `sources` are credited.
        title: Headline.

    Returns:
        The path.
    """
    pages = Environment(
        loader=PackageLoader("fourm.evaluation", "."),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    matrix = metrics.get("matrix") or {}
    html = pages.get_template("report.html").render(
        title=title,
        date=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        metrics=metrics,
        heat=heat_map(matrix) if matrix else None,
        summary=summary(matrix) if matrix else None,
        figures=task_figures(metrics.get("tasks") or {}),
        tokenizers=tokenizer_table(metrics.get("tokenizers") or {}),
        panels=make_panels(gallery) if gallery else {},
        curves={name: loss_curves(records) for name, records in (runs or {}).items()},
        commands=commands or {},
        card=card or {},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html)
    return path


def make_panels(gallery: Gallery) -> dict[str, list[Panel]]:
    """All panels that the model's modalities allow, by the name of their section."""
    config, panels = gallery.config, {"reconstructions": [gallery.reconstructions()]}
    panels["any_to_any"] = list(gallery.any_to_any())
    if config.picture in gallery.sources:
        panels["from_picture"] = [gallery.from_picture()]
    if config.picture in gallery.targets and config.prompt in gallery.sources:
        panels["chained"] = [gallery.chained()]
        panels["guidance"] = [gallery.guidance()]
    if config.picture in gallery.targets:
        panels["in_painting"] = [gallery.in_painting()]
    return panels


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


def task_figures(tasks: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """One line for each figure of each task that has a constant guess to compare with."""
    lines = []
    for name, figures in tasks.items():
        for figure, value in figures.items():
            plain = next((known for known in sorted(BASELINE, key=len, reverse=True) if figure.startswith(known)), None)
            if plain is None or figure in ("bound", "n"):
                continue
            constant = figures.get(BASELINE[plain] + figure.removeprefix(plain))
            if constant is None or figure.startswith("mean_predictor"):
                continue
            bound = (figures.get("bound") or {}).get(figure)
            lines.append(
                Figure(
                    name.replace("->", " → "),
                    figure,
                    number(value),
                    number(constant),
                    f"{value / constant:.2f}" if constant and np.isfinite(value / constant) else "–",
                    number(bound),
                    value < constant if plain in LOWER_IS_BETTER else value > constant,
                )
            )
    return lines


def tokenizer_table(tokenizers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Name, vocabulary, codebook use, perplexity and the other figures of each tokenizer."""
    shown = []
    for name, figures in tokenizers.items():
        others = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        size, use, perplexity = (others.pop(key, None) for key in ("vocab_size", "codebook_use", "perplexity"))
        used = "–" if use is None else f"{100 * use:.0f} %"
        listed = ", ".join(f"{key} {number(value)}" for key, value in others.items())
        shown.append((name, number(size), used, number(perplexity), listed))
    return shown


def number(value: float | None) -> str:
    """Three significant digits, without exponents where they can be avoided."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"


def loss_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Losses over steps as inline SVG that takes the page's text colour: the whole left, one by one right."""
    from matplotlib.figure import Figure as Drawing  # without pyplot, which keeps global state

    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if "loss" in name and isinstance(value, int | float):
                series.setdefault(name, []).append((record["step"], value))
    whole = {name: points for name, points in series.items() if name.rsplit("/", 1)[-1] == "loss"}
    parts = {name: points for name, points in series.items() if name not in whole}
    held_out = {name: points for name, points in parts.items() if not name.startswith(("loss", "train"))}
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        drawing = Drawing(figsize=(11, 3.1), layout="constrained")
        panels = [part for part in (whole, held_out or parts) if part]
        axes = drawing.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for axis, lines in zip(axes, panels, strict=False):
            for number, (name, points) in enumerate(lines.items()):
                axis.plot(*np.array(points).T, color=LINES[number % len(LINES)], lw=1.4, label=name,
                          ls=("-", "--", ":")[number // len(LINES) % 3])  # fmt: skip
            axis.set_xlabel("step", color=INK)
            axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))
            axis.tick_params(colors=INK)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(INK)
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
