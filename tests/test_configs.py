"""Every configuration that ships is read, fits together, and says how it is run."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from fourm.cli import VERBS, read
from fourm.masking.masking import Masker
from fourm.modalities import TokenSpace
from fourm.model.fourm import FourM
from fourm.tokenization.autoencoder import ImageTokenizer
from fourm.tokenization.encode import source_of
from fourm.training.optim import learning_rate, parameter_groups

ROOT = Path(__file__).parents[1]
FOLDERS = {verb: verb for verb in VERBS} | {"demo": "run"}  # below configs/, and the verb that reads what is in them
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name in FOLDERS)
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "tokenizers").glob("*/recipe.yaml"))
OUTPUTS = ("root", "folder", "output")  # keys of configs that name what is written


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in configs are relative to it


def verb_of(path: Path) -> str:
    if path.parts[0] == "configs":
        return FOLDERS[path.parts[1]]
    return "text-tokenizer" if "codecs" in yaml.safe_load((ROOT / path).read_text()) else "tokenizer"


def of_verb(verb: str) -> list[Path]:
    return [path for path in [*CONFIGS, *RECIPES] if verb_of(path) == verb]


def config_class(verb: str):
    return importlib.import_module(f"fourm.verbs.{verb.replace('-', '_')}").Config


def load(path: Path):
    verb = verb_of(path)
    return read(config_class(verb), ["--config", str(path)], verb)


def test_every_yaml_has_a_reader():
    shipped = {
        path.relative_to(ROOT) for folder in ("configs", "tokenizers") for path in (ROOT / folder).rglob("*.y*ml")
    }
    tables = {path for path in shipped if path.parts[:2] == ("configs", "modalities")}  # read in test_modalities.py
    assert not shipped - tables - set(CONFIGS) - set(RECIPES)
    assert CONFIGS and RECIPES and tables


@pytest.mark.parametrize("path", [*CONFIGS, *RECIPES], ids=str)
def test_config_is_read_and_names_the_command_that_reads_it(path):
    config = load(path)
    for key in ("config", "modalities"):
        assert Path(getattr(config, key, ".")).exists(), f"{path} names {getattr(config, key)}, which is not there"
    header = path.read_text().partition("\n\n")[0]
    command = re.search(r"^# Command: +(.+)$", header, re.MULTILINE)
    assert command, f"{path} does not say `# Command:`"
    assert f"fourm {verb_of(path)} --config {path}" in command[1]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_says_what_it_costs_and_gives(path):
    for word in ("Command", "Cost", "Expected"):
        line = re.search(rf"^# {word}: +(.+)$", path.read_text(), re.MULTILINE)
        assert line, f"{path} does not say `# {word}:`"
        assert len(line[1].split()) > 1, f"{path} says nothing behind `# {word}:` but {line[1]!r}"


@pytest.mark.parametrize("path", of_verb("train"), ids=str)
def test_training_config_builds_its_model_and_masker(path):
    config = load(path)
    space = TokenSpace.from_yaml(config.modalities)
    with torch.device("meta"):
        model = FourM(config.model, space)
    assert all(parameter.is_meta for parameter in model.parameters())
    parameter_groups(model, config.optim.name == "muon")
    Masker(space, config.masking)
    check_length(config)


@pytest.mark.parametrize("path", of_verb("tokenizer"), ids=str)
def test_recipe_builds_its_tokenizer(path):
    config = load(path)
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config.tokenizer)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) > 1000
    check_length(config)


def check_length(config):
    length = config.tokens or config.steps
    assert learning_rate(config.optim, length / 2, length) > 0  # refuses warm-ups longer than the run
    assert config.loader_batch(1) > 0


@pytest.mark.parametrize("path", of_verb("tokenize"), ids=str)
def test_tokenizers_of_a_table_have_its_vocabularies_and_grids(path):
    """The recipes that fill `tokenizers` give what the modality table beside it expects."""
    config = load(path)
    images = {recipe.folder: recipe.tokenizer for recipe in map(load, of_verb("tokenizer"))}
    texts = {
        f"{recipe.folder}/{name}": recipe for recipe in map(load, of_verb("text-tokenizer")) for name in recipe.codecs
    }
    for name, row in TokenSpace.from_yaml(config.modalities).modalities.items():
        if not row.discrete:
            continue
        folder = f"{config.tokenizers}/{row.tokenizer or source_of(name, row)}"
        if row.kind == "grid":
            made = images[folder]
            assert (made.quantizer.vocab_size, made.grid) == (row.vocab_size, row.grid), name
        else:
            made = texts[folder]
            assert (made.vocab_size, made.sentinels) == (row.vocab_size, row.sentinels), name
            codec = made.codecs[source_of(name, row)]
            assert codec.codec == "caption" or made.bins >= max(codec.bins, len(codec.fields)), name


@pytest.mark.parametrize("path", of_verb("run"), ids=str)
def test_pipeline_steps_are_commands_that_parse(path):
    pipeline = load(path)
    assert pipeline.steps
    assert len({step.name for step in pipeline.steps}) == len(pipeline.steps)
    for step in pipeline.steps:
        for command in step.run:
            verb, *options = shlex.split(command.format(folder=pipeline.folder))
            assert verb in VERBS, f"{step.name}: {command}"
            for option, value in itertools.pairwise(options):
                assert option not in ("--config", "--modalities") or Path(value).is_file(), f"{step.name}: {command}"
            config = read(config_class(verb), options, verb)
            written = [Path(getattr(config, key)) for key in OUTPUTS if hasattr(config, key)]
            assert written and all(place.is_relative_to(pipeline.folder) for place in written), (
                f"{step.name}: {command}"
            )
            if hasattr(config, "optim"):
                check_length(config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "generate").glob("*.yaml")), ids=lambda path: path.stem)
def test_generated_targets_can_be_predicted(path):
    config = yaml.safe_load(path.read_text())
    space = TokenSpace.from_yaml(ROOT / "configs" / "modalities" / path.name)
    assert {target["name"] for target in config["targets"]} <= set(space.outputs())
