"""The command line: quick to answer, strict about names, one line about what is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fourm import cli
from fourm.verbs.train import Config as TrainVerb

ROOT = Path(__file__).parents[1]
TRAIN = ["--config", str(ROOT / "configs/train/earth.yaml")]


def refused(capsys, *words: str) -> str:
    """The one line that a wrong command line ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
    return said.err


def test_help_lists_all_verbs_without_torch():
    code = (
        "import sys; from fourm import cli; cli.main(['--help']); "
        "heavy = {'torch', 'numpy', 'accelerate', 'fourm.verbs'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = {re.split(r"\s{2,}", line)[1] for line in done.stdout.splitlines() if line.startswith("  ")}
    modules = {path.stem for path in (ROOT / "fourm/verbs").glob("*.py")} - {"__init__"}
    assert listed == set(cli.VERBS)
    assert modules == {re.sub("[- ]", "_", verb) for verb in cli.VERBS}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_explains_every_key(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert cli.VERBS[verb] in said
    assert "--config" in said


def test_unknown_verb_is_answered_with_the_nearest(capsys):
    line = refused(capsys, "trian", "--steps", "3")
    assert "'trian'" in line and "did you mean 'train'?" in line
    assert all(verb in line for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (["--stepz", "3"], "steps"),
        (["--stepz=3"], "steps"),
        (["--optim.lrr", "3e-4"], "optim.lr"),
        (["--model.dimm", "32"], "model.dim"),
        (["--masking.mixture", "[{weigth: 3}]"], "weight"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(capsys, options, meant):
    line = refused(capsys, "train", *TRAIN, *options)
    assert re.search(r"stepz|lrr|dimm|weigth", " ".join(options))[0] in line
    assert f"did you mean '{meant}'?" in line


@pytest.mark.parametrize(("key", "meant"), [("stepz: 3", "steps"), ("optim: {lrr: 3.0e-4}", "lr")])
def test_unknown_key_in_a_file_is_answered_with_the_nearest(capsys, tmp_path, key, meant):
    path = tmp_path / "typo.yaml"
    path.write_text(key + "\n")
    line = refused(capsys, "train", *TRAIN, "--config", str(path))
    assert f"did you mean '{meant}'?" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", "many"), ("optim.lr", "fast"), ("optim.name", "adam"), ("masking.seed", "x"), ("precision", "fp8")],
)
def test_wrong_type_names_key_and_value(capsys, option, value):
    line = refused(capsys, "train", *TRAIN, f"--{option}", value)
    assert option in line and value in line
    assert "did you mean" not in line  # the key is right


def test_value_outside_the_allowed_ones_is_answered_with_them(capsys):
    line = refused(capsys, "train", *TRAIN, "--optim.name", "adamv")
    assert "adamw" in line and "muon" in line


def test_values_that_do_not_fit_together_are_refused_like_wrong_types(capsys):
    assert "dim 30 must be a multiple of 4" in refused(capsys, "train", *TRAIN, "--model.dim", "30")
    assert "nano, tiny, small" in refused(capsys, "train", *TRAIN, "--model.size", "huge")


def test_missing_file_and_missing_keys_are_named(capsys):
    assert "no-such.yaml" in refused(capsys, "train", "--config", "no-such.yaml")
    assert "modalities" in refused(capsys, "train", "--data", "a", "--folder", "b", "--masking.input_tokens", "1",
                                   "--masking.target_tokens", "1", "--masking.mixture", "[{}]")  # fmt: skip


def test_options_override_files_and_later_files_earlier_ones(tmp_path):
    shipped = yaml.safe_load((ROOT / "configs/train/earth.yaml").read_text())
    assert shipped["optim"]["lr"] != 3e-4 and shipped["steps"] != 7
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 7\noptim: {weight_decay: 0.5}\n")
    config = cli.read(TrainVerb, [*TRAIN, "--config", str(path), "--optim.lr", "3e-4"], "train")
    assert (config.steps, config.optim.lr, config.optim.weight_decay) == (7, 3e-4, 0.5)
    assert config.optim.name == shipped["optim"]["name"]  # what is not named stays
    assert config.batch_size == shipped["batch_size"]


def test_print_config_shows_what_would_run(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *TRAIN, "--optim.lr", "3e-4", "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optim"]["lr"] == 3e-4
    assert shown["loss"] == "mod"  # defaults too
    assert shown["masking"]["mixture"][0]["keep"] == "all"


def test_printed_config_is_a_config(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["train", *TRAIN, "--steps", "5", "--print_config"])
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert cli.read(TrainVerb, ["--config", str(path)], "train") == cli.read(
        TrainVerb, [*TRAIN, "--steps", "5"], "train"
    )
