"""`fourm stitch report`: one page of what the other verbs of stitching measured and drew."""

from __future__ import annotations

from dataclasses import dataclass

from fourm.evaluation.results import write_results


@dataclass(kw_only=True)
class Config:
    """What is shown.

    Args:
        folder: Holds the folders of the runs.
        output: The page.
    """

    folder: str = "runs/stitch"
    output: str = "runs/stitch/report.html"


def run(config: Config) -> None:
    """Writes the page."""
    print(write_results(config.folder, config.output, "Stitching"))
