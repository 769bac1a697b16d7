"""Every configuration that ships is read, fits together, and says how it is run."""

import dataclasses
import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from fourm.cli import VERBS, read, split
from fourm.masking.budgets import Mixture
from fourm.masking.masking import Masker
from fourm.modalities import TokenSpace
from fourm.model.fourm import FourM
from fourm.model.official import our_config
from fourm.tokenization.autoencoder import ImageTokenizer
from fourm.tokenization.encode import source_of
from fourm.tokenization.official import official_tensors, tokenizer_config
from fourm.tokenization.task import start_from
from fourm.training.optim import learning_rate, parameter_groups

ROOT = Path(__file__).parents[1]
FOLDERS = {verb: verb for verb in VERBS} | {"demo": "run"}  # below configs/, and the verb that reads what is in them
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name in FOLDERS)
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "tokenizers").glob("*/recipe.yaml"))
OUTPUTS = ("root", "folder", "output")  # keys of configs that name what is written
FIXTURES = ROOT.parent / "shared" / "fixtures"

# Parameters that 4M's README gives, by size, and those in its files, where heads are not tied, by recipe.
PUBLISHED = {"b": 198_829_056, "l": 705_744_896, "xl": 2_822_971_392}
IN_FILES = {"4m-7_b": 441_474_048, "4m-7_l": 1_029_271_552, "4m-7_xl": 3_470_024_704, "4m-21_b": 834_417_408,
            "4m-21_l": 1_553_196_032, "4m-21_xl": 4_517_873_664, "4m-7-sr_l": 953_321_472}  # fmt: skip
# Parameters of 4M's tokenizers, its fixed tables of positions included, and the training config each recipe is from.
TOKENIZERS = {
    "rgb": (286_894_416, "divae/rgb/ViTB-UNetP4_16k_224_predx0"),
    "depth": (286_353_712, "divae/depth/ViTB-UNetP4_8k_224_predx0"),
    "normal": (286_894_416, "divae/normal/ViTB-UNetP4_8k_224_predx0"),
    "edge": (286_353_712, "divae/canny_edge/ViTB-UNetP4_8k_224_predx0"),
    "semseg": (218_879_904, "vqvae/semseg_coco/ViTB-ViTB_4k_224"),
    "clip": (180_695_584, "vqvae/CLIP-B16/ViTB-ViTB_8k_224"),
    "dinov2": (181_181_216, "vqvae/DINOv2-B14/ViTB-ViTB_8k_224"),
    "imagebind": (181_968_160, "vqvae/ImageBind-H14/ViTB-ViTB_8k_224"),
    "dinov2-global": (115_042_048, "vqvae/DINOv2-B14-global/BMLP1024-BMLP1024_8k_224"),
    "imagebind-global": (116_091_136, "vqvae/ImageBind-H14-global/BMLP1024-BMLP1024_8k_224"),
    "human-poses": (106_683_599, "vqvae/human_poses/BMLP1024-BMLP1024_1k_224"),
    "sam-instance": (181_550_468, "vqvae/sam_instance/ViTB-ViTB_1k_224_64"),
    "rgb-448": (287_346_000, "divae/rgb/ViTB-UNetP4_16k_224-448_predx0"),
    "depth-448": (286_805_296, "divae/depth/ViTB-UNetP4_8k_224-448_predx0"),
    "normal-448": (287_346_000, "divae/normal/ViTB-UNetP4_8k_224-448_predx0"),
    "edge-448": (286_805_296, "divae/canny_edge/ViTB-UNetP4_8k_224-448_predx0"),
    "semseg-448": (219_783_072, "vqvae/semseg_coco/ViTB-ViTB_4k_224-448"),
    "clip-448": (181_598_752, "vqvae/CLIP-B16/ViTB-ViTB_8k_224-448"),
    "dinov2-448": (182_360_864, "vqvae/DINOv2-B14/ViTB-ViTB_8k_224-448"),
    "rgb-vqvae": (181_089_056, "vqvae/rgb/ViTB-ViTB_1k_224_CLIPB16-5.0"),
    "rgb-vqvae-448": (181_992_224, "vqvae/rgb/ViTB-ViTB_1k_224-448_CLIPB16-5.0"),
    "rgb-uvit": (218_533_155, "divae/rgb/ViTB-UViTB_1k_224_predv_frozenenc"),
    "rgb-uvit-448": (218_533_155, "divae/rgb/ViTB-UViTB_1k_224-448_predv_frozenenc"),
}
CONTROLNETS = ("rgb-controlnet", "rgb-controlnet-448")  # 4M counts the parameters of Stable Diffusion too


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
    return importlib.import_module(f"fourm.verbs.{re.sub('[- ]', '_', verb)}").Config


def load(path: Path):
    verb = verb_of(path)
    return read(config_class(verb), ["--config", str(path)], verb)


def test_every_yaml_has_a_reader():
    shipped = {
        path.relative_to(ROOT) for folder in ("configs", "tokenizers") for path in (ROOT / folder).rglob("*.y*ml")
    }
    tables = {path for path in shipped if path.parts[:2] == ("configs", "modalities")}  # read in test_modalities.py
    launches = {path for path in shipped if path.parts[:2] == ("configs", "accelerate")}  # training/test_parallel.py
    stitches = {path for path in shipped if path.parts[:2] == ("configs", "stitch")}  # in stitching/
    assert not shipped - tables - launches - stitches - set(CONFIGS) - set(RECIPES)
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


def fixture(name: str):
    if not FIXTURES.exists():
        pytest.skip("the golden numbers of 4M are not on this machine")
    return json.loads((FIXTURES / name).read_text())


OF_4M = [path for path in of_verb("train") if path.stem.startswith("4m-")]


def test_every_model_of_4m_has_a_recipe():
    variants = {"4m-7_b_rgb2dense", "4m-7_b_capbias"}
    specialised = {f"4m-7-t2i_{size}" for size in PUBLISHED}
    assert {path.stem for path in OF_4M} == set(IN_FILES) | specialised | variants


@pytest.mark.parametrize("path", OF_4M, ids=lambda path: path.stem)
def test_recipe_of_4m_has_the_published_parameters_and_plans_its_run(path, capsys, tmp_path):
    config, space = load(path), TokenSpace.from_yaml(load(path).modalities)
    family, size = re.fullmatch(r"(4m-[^_]+)_([a-z]+).*", path.stem).groups()
    with torch.device("meta"):
        untied = FourM(dataclasses.replace(config.model, tied_head=False), space)
    assert sum(p.numel() for p in untied.parameters()) == IN_FILES[f"{family.removesuffix('-t2i')}_{size}"]
    header = path.read_text().partition("\ndata:")[0]
    assert f"{PUBLISHED[size]:,}" in header and f"{sum(p.numel() for p in untied.parameters()):,}" in header
    importlib.import_module("fourm.verbs.train").run(
        dataclasses.replace(config, dry_run=True, folder=str(tmp_path / "x"))
    )
    said = capsys.readouterr().out
    assert f"{PUBLISHED[size]:,} without those of modalities" in said
    assert f"{config.steps:,} updates" in said and "FSDP2, checkpointed" in said
    assert f"{config.optim.lr:.2e} at" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", OF_4M, ids=lambda path: path.stem)
def test_recipe_of_4m_has_the_shape_and_modalities_of_its_file(path):
    family = re.match(r"4m-[^_]+_(b|l|xl)", path.stem)[0]
    shape, space = our_config(fixture(f"fm/manifests/{family}.json")["config"])
    config = load(path)
    assert config.model == dataclasses.replace(shape, tied_head=True)
    assert TokenSpace.from_yaml(config.modalities).to_dict() == space.to_dict()


@pytest.mark.parametrize("name", ["4m-7_b", "4m-21_b"])
def test_mixture_of_4m_is_that_of_the_reference(name):
    config = load(Path(f"configs/train/{name}.yaml"))
    space = TokenSpace.from_yaml(config.modalities)
    mixture, tokens = Mixture(space, config.masking), config.masking.input_tokens
    stored = next(
        each
        for each in fixture("masking/budget_stats.json")["configs"]
        if set(each["modality_order"]) == set(space.names) and each["input_tokens_range"] == [tokens, tokens]
    )
    assert mixture.widths == (stored["input_tokens_range"][1], stored["target_tokens_range"][1])
    weights = stored["sampling_weights"] or [1.0] * stored["num_components"]
    assert mixture.weight.tolist() == weights
    for number, modality in enumerate(space.names):
        for side, key in enumerate(("input_alphas", "target_alphas")):
            assert mixture.alpha[:, side, number].tolist() == stored[key][modality], (modality, key)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_recipe_of_a_tokenizer_of_4m_has_its_parameters(name, capsys, tmp_path):
    path = Path(f"tokenizers/4m-{name}/recipe.yaml")
    config = load(path)
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config.tokenizer)
    fixed = sum(tensor.numel() for key, tensor in tokenizer.named_buffers() if key.endswith(".positions"))
    parameters = sum(p.numel() for p in tokenizer.parameters())
    assert parameters + fixed == TOKENIZERS[name][0]
    assert f"# Expected: {TOKENIZERS[name][0]:,} parameters" in path.read_text()
    verb = importlib.import_module("fourm.verbs.tokenizer")
    verb.run(dataclasses.replace(config, dry_run=True, folder=str(tmp_path / "x")))
    said = capsys.readouterr().out
    assert f"{parameters:,}" in said and f"{config.steps:,} updates" in said and not (tmp_path / "x").exists()


def test_every_tokenizer_recipe_of_4m_is_compared():
    assert {path.parent.name for path in RECIPES if path.parent.name.startswith("4m-")} == {
        f"4m-{name}" for name in (*TOKENIZERS, *CONTROLNETS)
    }


@pytest.mark.parametrize("name", [name for name in (*TOKENIZERS, *CONTROLNETS) if name.endswith("-448")])
def test_a_second_stage_starts_from_the_first(name):
    first, config = (load(Path(f"tokenizers/4m-{each}/recipe.yaml")) for each in (name.removesuffix("-448"), name))
    assert config.init == first.folder and config.freeze == first.freeze
    assert (config.sizes.high,) * 2 == config.tokenizer.input.size
    assert (config.sizes.low,) * 2 == first.tokenizer.input.size
    with torch.device("meta"):
        start_from(*(ImageTokenizer(each.tokenizer) for each in (config, first)))


@pytest.mark.parametrize("name", ["rgb-uvit", *CONTROLNETS[:1]])
def test_a_decoder_on_a_frozen_encoder_fits_it(name):
    config = load(Path(f"tokenizers/4m-{name}/recipe.yaml"))
    other = load(Path(f"tokenizers/4m-{config.init.rpartition('/')[2]}/recipe.yaml"))
    assert config.init == other.folder and config.freeze == "encoder"
    with torch.device("meta"):
        assert not start_from(ImageTokenizer(config.tokenizer), ImageTokenizer(other.tokenizer))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_recipe_of_a_tokenizer_of_4m_is_its_training_config(name):
    """The network, the noise and the quantizer are those of 4M's own config."""
    path = TOKENIZERS[name][1]
    theirs = dict(fixture("vq/manifests/training_yamls.json")["entries"][f"{path}.yaml"]["config"])
    if name.endswith("global"):
        theirs["num_codebooks"] = 16  # as in the published tokenizers
    expected, config = tokenizer_config(theirs, path.split("/")[1]), load(Path(f"tokenizers/4m-{name}/recipe.yaml"))
    ours = config.tokenizer
    with torch.device("meta"):
        tensors = [official_tensors(ImageTokenizer(each)) for each in (ours, expected)]
    assert {key: tensor.shape for key, tensor in tensors[0].items()} == {
        key: tensor.shape for key, tensor in tensors[1].items()
    }
    quantizer = expected.quantizer
    if quantizer.type == "vq":  # 4M's threshold grows with the number of GPUs, the fixture's is for one
        quantizer = dataclasses.replace(quantizer, dead_code=8 * quantizer.dead_code, sync=True)
    assert ours.quantizer == quantizer
    source = expected.input if name != "human-poses" else dataclasses.replace(expected.input, mean=(0.5,), std=(0.5,))
    assert (dataclasses.replace(ours.input, encoder="", encoder_size=224), ours.denoiser) == (source, expected.denoiser)
    noise = (
        "num_train_timesteps",
        "beta_schedule",
        "prediction_type",
        "zero_terminal_snr",
        "cls_free_guidance_dropout",
    )
    assert [getattr(ours.diffusion, key) for key in noise] == [getattr(expected.diffusion, key) for key in noise]


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
            verb, options = split(shlex.split(command.format(folder=pipeline.folder)))
            assert verb in VERBS, f"{step.name}: {command}"
            for option, value in itertools.pairwise(options):
                assert option not in ("--config", "--modalities") or Path(value).is_file(), f"{step.name}: {command}"
            config = read(config_class(verb), options, verb)
            written = [Path(getattr(config, key)) for key in OUTPUTS if hasattr(config, key)]
            written = written or [Path(config.data)]  # labels stand beside what they are of
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
