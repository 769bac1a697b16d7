"""The page of a comparison: every run with its protocol, pictures and tables, and nothing of what is not a run."""

import base64
import json

import pytest
from PIL import Image

from fourm.evaluation.results import Table, write_results


def test_page_shows_every_run(tmp_path):
    table = Table("Recall", ["arm", "R@1"], [["shared", "11.0"], ["<none>", "10.3"]])
    for name, metrics in {
        "fusemix": {"protocol": "each of 549 pairs is looked for", "tables": [table]},
        "hyma": {"protocol": "12 pairs"},
        "other": {"matrix": {}},
    }.items():
        folder = tmp_path / "stitch" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics))
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "stitch/hyma/curve.png")
    page = write_results(tmp_path / "stitch", tmp_path / "report.html", "Stitched").read_text()
    assert (
        "<h1>Stitched</h1>" in page
        and page.count("<h2") == 2
        and "each of 549 pairs is looked for." in page
        and "12 pairs." in page
    )
    assert "<td>shared</td><td>11.0</td>" in page and "&lt;none&gt;" in page
    assert base64.b64encode((tmp_path / "stitch/hyma/curve.png").read_bytes()).decode() in page
    own = write_results(tmp_path / "stitch/hyma", tmp_path / "report.html", "Hyma").read_text()
    assert '<h2 id="hyma">hyma</h2>' in own and own.count("<h2") == 1
    assert str(table).splitlines() == ["Recall", "arm     R@1 ", "shared  11.0", "<none>  10.3"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        write_results(tmp_path, tmp_path / "report.html", "Nothing")
