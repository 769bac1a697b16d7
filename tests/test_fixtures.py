"""The golden numbers of the methods we reimplement, where they are at hand, and the tool that compares with them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT.parent / "shared/fixtures"
here = pytest.mark.skipif(not FIXTURES.exists(), reason="the folder of golden numbers is not here")


def check(folder, *options):
    command = [sys.executable, ROOT / "tools/check_fixtures.py", folder, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@here
def test_every_case_agrees():
    done = check(FIXTURES)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))
    assert int(done.stdout.splitlines()[-1].split()[0]) > 1000


def test_an_empty_folder_fails(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 1
    assert "holds no fixtures" in done.stderr


def test_a_file_without_a_check_fails(tmp_path):
    (tmp_path / "fm").mkdir()
    (tmp_path / "fm" / "unheard_of.json").write_text("{}")
    assert check(tmp_path).returncode == 1


@here
@pytest.mark.parametrize("name", ["fm/parity_gelu_bias", "vq/mlp_memcodes_poses"])
def test_other_weights_fail(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir()
    fixture = json.loads((FIXTURES / f"{name}.json").read_text())
    path.with_suffix(".json").write_text(json.dumps(fixture | {"weights_salt": "other"}))
    shutil.copyfile(FIXTURES / f"{name}.npz", path.with_suffix(".npz"))
    done = check(tmp_path)
    assert done.returncode == 1
    assert "FAIL" in done.stdout
