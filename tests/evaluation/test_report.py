"""Tasks, gallery and page, with tokenizers that lose nothing and a model that knows the answer or knows nothing."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fourm.evaluation.gallery import Gallery, GalleryConfig
from fourm.evaluation.report import heat_map, loss_curves, number, task_figures, write_report
from fourm.evaluation.tasks import Task, TasksConfig, evaluate_tasks
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import FourM, FourMConfig
from fourm.tokenization.structured import CodecConfig

SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(2, 2), patch_size=8),
        "tok_rgb": Modality("grid", vocab_size=256, grid=(2, 2), source="rgb"),
        "elevation": Modality("grid", vocab_size=256, grid=(2, 2)),
        "water": Modality("grid", vocab_size=2, grid=(2, 2)),
        "caption": Modality("text", vocab_size=32, vocab="text", max_tokens=6, sentinels=10),
    }
)
KINDS = {"tok_rgb": ("image", 0, ""), "elevation": ("field", 0, "metres"), "water": ("classes", 2, "")}


class Blocks:
    """A tokenizer without loss: the four quarters of a 16 x 16 picture have one value each, and that is the id."""

    def __init__(self, kind, classes, units):
        self.config = SimpleNamespace(input=SimpleNamespace(kind=kind, classes=classes, units=units, values=()))
        self.vocab_size, self.grid = classes or 256, (2, 2)

    targets = staticmethod(np.stack)

    def encode(self, pictures, valid=None):
        pictures = np.asarray(pictures)
        grey = pictures[..., 0] if pictures.ndim == 4 else pictures
        return torch.from_numpy(grey[:, ::8, ::8].reshape(-1, 4).astype(np.int64))

    def decode(self, ids):
        maps = np.asarray(ids).reshape(-1, 2, 2).repeat(8, 1).repeat(8, 2)
        if self.config.input.kind == "image":
            return np.repeat(maps[..., None], 3, -1).astype(np.uint8)
        return maps.astype(np.float32 if self.config.input.kind == "field" else np.int64)

    def decode_probabilities(self, ids):
        return torch.nn.functional.one_hot(torch.from_numpy(self.decode(ids)), 2).permute(0, 3, 1, 2).float()


class Letters:
    """Ids 14.. as letters."""

    vocab_size, config = 32, CodecConfig("caption")

    def encode(self, texts):
        return [np.array([ord(letter) - 83 for letter in text]) for text in texts]

    def decode(self, ids):
        return ["".join(chr(83 + int(i)) for i in row) for row in ids]


TOKENIZERS = {name: Blocks(*row) for name, row in KINDS.items()} | {"caption": Letters()}


def world(count, seed=0):
    """Raw samples and their tokens: elevation = 2 * rgb, water where rgb is below 50."""
    rng, raw, tokens = np.random.default_rng(seed), [], []
    for i in range(count):
        level = rng.integers(0, 128, 4)
        ids = {"tok_rgb": level, "elevation": 2 * level, "water": (level < 50).astype(int)}
        values = {name: TOKENIZERS[name].decode(row[None])[0] for name, row in ids.items()}
        caption = rng.integers(14, 32, 3)
        named = {"__key__": f"{i:03d}", "rgb": values["tok_rgb"], "caption": Letters().decode([caption])[0]}
        raw.append(named | {name: values[name] for name in ("elevation", "water")})
        tokens.append({"__key__": f"{i:03d}", "rgb": values["tok_rgb"], "caption": caption, **ids})
    return raw, tokens


class Oracle(FourM):
    """Reads the brightness out of the given patches and derives every grid from it, without doubt."""

    def __init__(self):
        super().__init__(FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2), SPACE)

    def forward(self, batch):
        return (batch.rows["rgb"].mean(1) * 0.5 + 0.5).mul(255).round().reshape(len(batch), 4, 1)

    def logits(self, hidden, name):
        level = hidden[..., 0].long()
        ids = {"tok_rgb": level, "elevation": 2 * level, "water": (level < 50).long()}[name]
        return torch.nn.functional.one_hot(ids, SPACE[name].vocab_size) * 100.0


TASKS = TasksConfig(
    tasks=[Task("rgb", "elevation", "land"), Task("rgb", "water")],
    regions={"land": ("water", 0)}, n=6, draws=2, train_n=20, batch_size=4,
)  # fmt: skip


def test_a_model_that_knows_scores_perfectly_and_the_constant_is_that_of_the_training_data():
    (raw, tokens), (train, _) = world(6), world(20, seed=1)
    figures = evaluate_tasks(Oracle(), TOKENIZERS, raw, tokens, train, TASKS)
    elevation, water = figures["rgb->elevation"], figures["rgb->water"]
    assert elevation["mae_m"] == elevation["mae_land_m"] == elevation["bound"]["mae_land_m"] == 0
    known = np.stack([scene["elevation"] for scene in train])[np.stack([scene["water"] for scene in train]) == 0]
    truth = np.stack([scene["elevation"] for scene in raw])[np.stack([scene["water"] for scene in raw]) == 0]
    assert elevation["mean_predictor_mae_land_m"] == pytest.approx(np.abs(truth - known.mean()).mean(), rel=1e-5)
    assert water["iou"] == water["accuracy"] == 1
    wet = np.stack([scene["water"] for scene in raw]).mean()
    assert water["majority"] == pytest.approx(1 - wet)  # land is the commoner class of the training data
    assert "mae_land_m" in elevation["bound"] and elevation["n"] == 6


def test_tasks_name_what_does_not_fit():
    raw, tokens = world(6)
    swapped = [raw[1], raw[0], *raw[2:]]
    with pytest.raises(ValueError, match=r"raw data has '00[01]' where the tokens have '00[01]'"):
        evaluate_tasks(Oracle(), TOKENIZERS, swapped, tokens, raw, TASKS)
    with pytest.raises(ValueError, match=r"regions \['sea'\], known are land"):
        evaluate_tasks(Oracle(), TOKENIZERS, raw, tokens, raw, TasksConfig([Task("rgb", "water", "sea")], n=2))
    assert evaluate_tasks(Oracle(), TOKENIZERS, raw, tokens, raw, TasksConfig([Task("sound", "water")])) == {}


def small_model():
    torch.manual_seed(0)
    return FourM(FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2), SPACE)


def test_gallery_shows_the_truth_it_was_given_and_generates_the_rest():
    raw, tokens = world(3)
    gallery = Gallery(small_model(), TOKENIZERS, raw, tokens, GalleryConfig(samples=2, steps=2, chain=["water", "rgb"]))
    keys = [scene["__key__"] for scene in gallery.raw]
    assert keys == [sample["__key__"] for sample in gallery.tokens]
    panels = list(gallery.any_to_any())
    assert [panel.caption for panel in panels] == keys
    assert panels[0].columns == ["rgb", "elevation", "water", "caption"]
    assert [heading for heading, _ in panels[0].rows] == ["truth", *(f"given {name}" for name in panels[0].columns)]
    for position, (_, cells) in enumerate(panels[0].rows[1:]):
        assert [cell.given for cell in cells] == [position == column for column in range(4)]
    chained = gallery.chained()
    assert chained.columns == ["caption", "water", "rgb", "the real one"]
    assert chained.rows[0][1][0].text == gallery.raw[0]["caption"]
    assert all(cell.image.startswith("data:image/webp;base64,") for cell in chained.rows[0][1][1:])
    assert len(gallery.guidance().rows[0][1]) == len(gallery.config.guidance) + 2
    painted = gallery.in_painting(tries=2)
    assert painted.rows[0][1][1].image != painted.rows[0][1][2].image  # seeds differ


def test_in_painting_keeps_what_was_given(monkeypatch):
    raw, tokens = world(2)
    gallery = Gallery(small_model(), TOKENIZERS, raw, tokens, GalleryConfig(samples=2, steps=2))
    shown = []
    monkeypatch.setattr(gallery, "cell", lambda name, value, row, *rest, **more: shown.append((row, np.asarray(value))))
    gallery.in_painting(tries=1)
    for row, value in shown:
        assert (value[:, :8] == gallery.raw[row]["rgb"][:, :8]).all()


MATRIX = {
    "rgb": {"water": {"gain_bits": 1.5, "ci95": [1, 2], "shuffled_gain_bits": -0.25, "bits": 0.5, "nothing_bits": 2.0}},
    "water": {"rgb": {"gain_bits": 0.1, "ci95": [-1, 1], "shuffled_gain_bits": -1.0, "bits": 7.9, "nothing_bits": 8.0}},
}


def test_heat_map_shares():
    heat = heat_map(MATRIX)
    assert heat["targets"] == ["rgb", "water"] and heat["top"] == 75
    (_, (own, cell)), (_, (other, _)) = heat["rows"]
    assert own is None and cell["share"] == 75 and cell["sure"] and not other["sure"]


def test_figures_pair_each_value_with_its_constant_and_bound():
    tasks = {
        "rgb->elevation": {"mae_land_m": 50.0, "mean_predictor_mae_land_m": 200.0, "bound": {"mae_land_m": 10.0}},
        "rgb->climate": {"accuracy_land": 0.2, "majority_land": 0.4, "n": 4, "bound": {"accuracy_land": 0.9}},
    }
    first, second = task_figures(tasks)
    assert first == {"name": "rgb → elevation", "figure": "mae_land_m", "value": 50.0, "constant": 200.0, "ratio": 0.25,
                     "bound": 10.0, "better": True}  # fmt: skip
    assert (second["figure"], second["ratio"], second["better"]) == ("accuracy_land", 0.5, False)


def test_numbers():
    assert [number(v) for v in (1234.5, 0.12345, 3.0, None, float("nan"))] == ["1,234", "0.123", "3", "–", "–"]


def test_page_is_self_contained_escapes_text_and_leaves_out_what_is_missing(tmp_path):
    raw, tokens = world(2)
    raw[0]["caption"] = raw[1]["caption"] = "<script>alert(1)</script>"
    gallery = Gallery(small_model(), TOKENIZERS, raw, tokens, GalleryConfig(samples=2, steps=1, guidance=[1, 2]))
    records = [{"step": s, "loss": 9 - s, "val/loss": 9.5 - s, "val/loss/water": 1.0} for s in range(3)]
    metrics = {
        "matrix": MATRIX, "tasks": {"rgb->water": {"iou": 0.8, "majority_iou": 0.0, "bound": {"iou": 0.9}}},
        "tokenizers": {"rgb": {"codebook_use": 0.93, "perplexity": 200.0, "vocab_size": 256, "psnr": 21.5}},
        "seconds": {"train": 60.0}, "environment": {"torch": "2"},
    }  # fmt: skip
    card = {"sources": [{"package": "maps", "files": "world.jpg", "licence": "MIT", "citation": "NASA Blue Marble"}]}
    commands = {"train": "fourm train --config a.yaml"}
    page = write_report(tmp_path / "new" / "report.html", metrics, gallery, {"model": records}, commands, card)
    html = page.read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)  # nothing is fetched
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", html)
    for part in (
        "1.50",
        "93 %",
        "fourm train --config a.yaml",
        "Blue Marble",
        "currentColor",
        "val/loss",
        "In-painting",
        "Guidance",
    ):
        assert part in html
    assert html.count('class="dim "') == 1  # water -> rgb: the interval includes zero
    bare = write_report(tmp_path / "bare.html", {}).read_text()
    assert "In-painting" not in bare and "Any-to-any matrix" not in bare


def test_curves_of_an_empty_run_are_an_empty_drawing():
    assert loss_curves([]).startswith("<svg")
