"""All modalities of 4M-21, from raw files in the reference's formats to tokens, a model, values and pictures.

The table and the plan are those that ship; tokenizers and model are as small as their grids allow and know nothing.
"""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fourm.data.transforms as raw
from fourm import cli
from fourm.data.shards import ShardDataset, write_shards
from fourm.data.tokens import TokenDataset
from fourm.data.transforms import MIRRORED_JOINTS, Crop, Poses, View, centre_crop, transform_sample
from fourm.evaluation.gallery import Gallery, GalleryConfig
from fourm.evaluation.report import task_figures
from fourm.evaluation.shown import ShownDataset
from fourm.evaluation.tasks import Task, TasksConfig, evaluate_tasks
from fourm.evaluation.tokenizers import evaluate_tokenizer
from fourm.generation.decode import decode, picture, project, unfold
from fourm.modalities import TokenSpace
from fourm.model.fourm import FourM, FourMConfig
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.encode import CropConfig, TokenizeConfig, load_tokenizers, tokenize, verify
from fourm.tokenization.inputs import InputConfig
from fourm.tokenization.quantizers import QuantizerConfig
from fourm.tokenization.structured import CODECS_OF_4M, METADATA_21
from fourm.tokenization.text import train_text_tokenizer
from fourm.verbs import evaluate, generate, report

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "configs/generate/4m-21.yaml"
HEIGHT, WIDTH = 240, 300  # of the photos
CLASSES = 134
PIXELS = BackboneConfig(16, 16, heads=2, decoder="mlp", positions="sincos")
CELLS = BackboneConfig(1, 16, heads=2, decoder="mlp", positions="sincos")
VECTOR = BackboneConfig(1, 32, decoder="mlp", positions="none", outer_linear=True)
KINDS = {  # by the beginning of the name: input, backbone, loss
    "tok_rgb": (InputConfig("image", (224, 224)), PIXELS, "l1"),
    "tok_depth": (InputConfig("depth", (224, 224)), PIXELS, "l1"),
    "tok_normal": (InputConfig("normal", (224, 224)), PIXELS, "l1"),
    "tok_semseg": (InputConfig("classes", (224, 224), classes=CLASSES, values=(255, *range(CLASSES - 1))), PIXELS,
                   "cross_entropy"),
    "tok_clip": (InputConfig("features", (14, 14), channels=24), CELLS, "cosine"),
    "tok_dinov2@": (InputConfig("features", (16, 16), channels=24), CELLS, "cosine"),
    "tok_imagebind@": (InputConfig("features", (16, 16), channels=24), CELLS, "cosine"),
    "tok_dinov2_g": (InputConfig("features", (1, 1), channels=24), VECTOR, "cosine"),
    "tok_imagebind_g": (InputConfig("features", (1, 1), channels=24), VECTOR, "cosine"),
    "tok_canny": (InputConfig("image", (224, 224), channels=1), PIXELS, "l1"),
    "tok_sam": (InputConfig("image", (224, 224), channels=1), PIXELS, "l1"),
}  # fmt: skip
VIEWED = {  # by raw modality: how its values become those that tokenizers take
    "rgb": raw.Picture(), "depth": raw.Map(), "normal": raw.Normals(), "semseg": raw.Classes(),
    "canny_edge": raw.Map(), "sam_edge": raw.Map(), "clip": raw.Features(), "dinov2": raw.Features((16, 16)),
    "imagebind": raw.Features((16, 16)), "caption": raw.Caption(), "det": raw.Boxes(), "human_poses": raw.Poses(),
    "color_palette": raw.Palette(), "sam_instance": raw.Instances(), "t5_caption": raw.Vectors(),
    "metadata": raw.Metadata(),
}  # fmt: skip


def rotation(draws):
    matrix, _ = np.linalg.qr(draws.standard_normal((3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def raw_sample(seed):
    """One sample as the reference stores it."""
    draws = np.random.default_rng(seed)
    people = int(draws.integers(1, 3))
    corners = np.sort(draws.uniform(0, 1, (5, 2, 2)), axis=1).reshape(5, 4)
    contour = [[40, 40], [180, 50], [170, 190], [50, 180]]
    return {
        "__key__": f"sample{seed}",
        "rgb": draws.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        "depth": draws.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16),
        "normal": draws.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        "semseg": draws.choice(np.uint8([255, *range(CLASSES - 1)]), (HEIGHT, WIDTH)),
        "canny_edge": draws.integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8) * 255,
        "sam_edge": draws.integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8) * 255,
        "clip": draws.standard_normal((14, 14, 24), dtype=np.float32),
        "dinov2": draws.standard_normal((16, 16, 24), dtype=np.float32),
        "imagebind": draws.standard_normal((16, 16, 24), dtype=np.float32),
        "dinov2_global": draws.standard_normal(24, dtype=np.float32),
        "imagebind_global": draws.standard_normal(24, dtype=np.float32),
        "caption": [{"caption": "a dog beside a red car"}],
        "t5_caption": {"emb": draws.standard_normal((1, 9, 4096), dtype=np.float32),
                       "mask_valid": np.arange(9)[None] < 6},
        "det": {"instances": [{"boxes": box.tolist(), "score": 0.9, "class_name": name}
                              for box, name in zip(corners, ("dog", "car", "hot dog", "person", "dog"), strict=True)]},
        "human_poses": {
            "bbox_xyxy": [[0.2 * WIDTH, 0.1 * HEIGHT, 0.7 * WIDTH, 0.9 * HEIGHT]] * people,
            "pred_smpl_params": {
                "global_orient": [[rotation(draws).tolist()] for _ in range(people)],
                "body_pose": [[rotation(draws).tolist() for _ in range(23)] for _ in range(people)],
                "betas": draws.uniform(-3, 3, (people, 10)).tolist(),
            },
            "pose_tokenized": draws.integers(0, 1024, (people, 8)).tolist(),
            "pred_cam": draws.uniform(0.5, 1, (people, 3)).tolist(),
        },
        "color_palette": [{str(n): draws.integers(0, 256, (n, 3)).tolist() for n in range(1, 8)}],
        "sam_instance": [{"points": [[contour]], "bbox": [[40, 40, 190, 180]],
                          "token_ids": draws.integers(0, 1024, (1, 16)).tolist()}],
        "metadata": {name: float(draws.choice(values)) for name, (_, values) in METADATA_21.items()},
    }  # fmt: skip


def view(hflip=False, seed=0):
    return View(centre_crop(HEIGHT, WIDTH)._replace(hflip=hflip), HEIGHT, WIDTH, seed=seed)


def small_tokenizer(row, source, backbone, loss):
    quantizer = QuantizerConfig("vq", codebook_size=row.vocab_size, dim=8, kmeans=False)
    if backbone is VECTOR:
        count = row.grid[0] * row.grid[1]
        quantizer = QuantizerConfig("memcodes", codebook_size=row.vocab_size, codebooks=count, dim=8 * count)
    return ImageTokenizer(TokenizerConfig(source, quantizer, backbone, loss=loss)).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The shipped table, a tokenizer for each of its rows, and a model, all on disk; two samples."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("4m-21")
    texts = ["a dog beside a red car", "human pose global camera shape point polygon none", "hot dog person"]
    pieces = train_text_tokenizer(texts * 5, vocab_size=4500, bins=1000, sentinels=200)
    (root / "text").mkdir()
    pieces.save(str(root / "text" / "tokenizer.json"))  # nothing but 4M's file: the names say what the codecs are
    table = yaml.safe_load((ROOT / "configs/modalities/4m-21.yaml").read_text())
    for row in table.values():
        row |= {"vocab_size": pieces.get_vocab_size()} if row["kind"] == "text" else {}
    space = TokenSpace.from_dict(table)
    for name, row in space.modalities.items():
        if row.kind == "grid" and not (root / row.tokenizer).exists():
            kind = next(kind for beginning, kind in KINDS.items() if name.startswith(beginning))
            small_tokenizer(row, *kind).save_pretrained(root / row.tokenizer)
    inner = {name: root / codec.inner for name, codec in CODECS_OF_4M.items() if codec.inner}
    pose = QuantizerConfig("memcodes", codebook_size=1024, codebooks=8, dim=32)
    ImageTokenizer(
        TokenizerConfig(InputConfig("features", (1, 1), channels=207), pose, VECTOR, loss="smooth_l1")
    ).save_pretrained(inner["human_poses"])
    mask = QuantizerConfig("vq", codebook_size=1024, dim=8, kmeans=False)
    ImageTokenizer(
        TokenizerConfig(InputConfig("mask", (64, 64), channels=1), mask, PIXELS, loss="binary_cross_entropy")
    ).save_pretrained(inner["sam_instance"])
    FourM(FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2), space).save_pretrained(root / "model")
    samples = [raw_sample(seed) for seed in range(2)]
    return SimpleNamespace(root=root, space=space, raw=samples, tokenizers=load_tokenizers(space, root))


@pytest.fixture(scope="module")
def tokens(world):
    """`fourm tokenize` of two crops, the second one flipped: tokens of the first, and what they were made of."""
    (world.root / "table.yaml").write_text(yaml.safe_dump(world.space.to_dict()))
    write_shards(world.root / "raw", "train", world.raw, 2, extensions={"t5_caption": "npz"})
    config = TokenizeConfig(
        *(str(world.root / name) for name in ("raw", "tokens", "table.yaml", ".")), ("train",),
        CropConfig(2, "rgb", hflip=1.0), workers=0,
    )  # fmt: skip
    tokenize(config)
    assert not verify(config)
    stored = ShardDataset(world.root / "tokens/train", [*world.space.names, "crop_settings"])
    viewed, first = [], []
    for sample, made in zip(world.raw, stored, strict=True):
        assert made["crop_settings"][1, 4] == 1
        at = View.of(made["crop_settings"], 0, HEIGHT, WIDTH, key=sample["__key__"])
        viewed.append(transform_sample(sample, VIEWED, at))
        first.append({name: first_crop(world.space, name, made[name]) for name in world.space.names})
        first[-1]["rgb@224"] = viewed[-1]["rgb"]
    return SimpleNamespace(viewed=viewed, samples=first, stored=list(stored))


def first_crop(space, name, value):
    if space[name].kind == "text":
        return value[0][value[0] >= 0] if value.ndim == 2 else value
    return value[0] if space[name].kind == "grid" else value


def test_the_name_of_a_text_says_its_codec_and_values_with_ids_get_their_tokenizer(world):
    kinds = {name: world.tokenizers[name].config.codec for name in CODECS_OF_4M}
    assert kinds == {"caption": "caption", "det": "boxes", "metadata": "metadata_21", "color_palette": "palette",
                     "human_poses": "human_poses", "sam_instance": "sam_instances"}  # fmt: skip
    assert {name for name in kinds if world.tokenizers[name].inner} == {"human_poses", "sam_instance"}


def test_every_modality_becomes_tokens_that_fit_its_row(world, tokens):
    for sample, viewed in zip(tokens.samples, tokens.viewed, strict=True):
        for name, row in world.space.modalities.items():
            if row.discrete:
                assert sample[name].min() >= 0 and sample[name].max() < row.vocab_size, name
            if row.kind == "grid":
                expected = world.tokenizers[name].encode([viewed[name.removeprefix("tok_").removesuffix("@224")]])
                assert (sample[name] == expected[0].numpy()).mean() >= 0.9, name  # random codes come in near ties
        assert sample["t5_caption"].shape == (6, 4096) and sample["rgb@224"].shape == (224, 224, 3)
    assert all(made["tok_depth@224"].shape == (2, 196) for made in tokens.stored)


@pytest.mark.parametrize("name", CODECS_OF_4M)
def test_text_comes_back(world, tokens, name):
    """Tokens are those of the transformed value, and the text of what is read out of a text is that text."""
    tokenizer = world.tokenizers[name]
    for sample, viewed in zip(tokens.samples, tokens.viewed, strict=True):
        ids = sample[name]
        assert np.array_equal(tokenizer.encode([viewed[name]])[0], ids)
        assert (ids != 1).all()
        assert np.array_equal(tokenizer.encode(unfold(tokenizer, tokenizer.decode([ids])))[0], ids)


def test_a_flipped_crop_has_new_pose_ids(world, tokens):
    for made, sample in zip(tokens.stored, world.raw, strict=True):
        plain, flipped = world.tokenizers["human_poses"].decode(row[row >= 0] for row in made["human_poses"])
        assert [person["pose"] for person in plain] == sample["human_poses"]["pose_tokenized"]
        assert len(flipped) == 0 or flipped[0]["pose"] != plain[0]["pose"]


def test_labels_of_a_mirrored_picture_are_the_mirrored_labels(world):
    plain, flipped = world.raw[0], view(hflip=True)
    mirrored = copy.deepcopy(plain)
    for thing in mirrored["det"]["instances"]:
        xmin, ymin, xmax, ymax = thing["boxes"]
        thing["boxes"] = [1 - xmax, ymin, 1 - xmin, ymax]
    for name in ("rgb", "depth", "normal"):
        mirrored[name] = np.ascontiguousarray(mirrored[name][:, ::-1])
    mirrored["normal"][..., 0] = 255 - mirrored["normal"][..., 0]
    names = ("det", "rgb", "depth", "normal")
    seen, expected = (transform_sample(sample, {n: VIEWED[n] for n in names}, at)
                      for sample, at in ((plain, flipped), (mirrored, view())))  # fmt: skip
    for name in names[1:]:
        difference = seen[name].astype(int) - expected[name]
        assert np.abs(difference).max() <= (2 if name != "depth" else 600), name  # rounding of the resampling
    order = [thing["class_name"] for thing in seen["det"]]
    assert order == [thing["class_name"] for thing in expected["det"]]
    assert np.allclose([t["boxes"] for t in seen["det"]], [t["boxes"] for t in expected["det"]], atol=1e-9)


def test_a_mirrored_person_is_drawn_as_the_mirrored_figure(world):
    inner = world.tokenizers["human_poses"].inner
    poses = Poses(encode=lambda bodies: inner.encode(list(bodies)).numpy())
    plain, flipped = (poses(world.raw[0]["human_poses"], view(hflip)) for hflip in (False, True))
    pairs = [0, *(1 + joint for joint in MIRRORED_JOINTS)]
    for person, other in zip(plain, flipped, strict=True):
        assert np.allclose(project(other)[pairs], project(person) * [-1, 1] + [1, 0], atol=1e-9)
        assert len(other["pose"]) == 8 and not np.array_equal(other["pose"], person["pose"])
    tokenizer = world.tokenizers["human_poses"]
    text = tokenizer.codec.to_text(flipped)
    assert tokenizer.codec.to_text(tokenizer.decode(tokenizer.encode([flipped]))[0]) == text


@pytest.fixture(scope="module")
def generated(world, tmp_path_factory):
    """`fourm generate` with the plan that ships, for the small model, from a photo of another shape."""
    output = tmp_path_factory.mktemp("generated")
    Image.fromarray(world.raw[0]["rgb"]).save(output / "photo.png")
    words = ["generate", "--config", PLAN, "--model", world.root / "model", "--tokenizers", world.root]
    cli.main([str(w) for w in (*words, "--given.rgb@224", output / "photo.png", "--output", output / "made")])
    return output / "made"


def test_diffusion_decoders_take_their_own_steps_unless_told():
    assert generate.Config.decode_steps is None


def test_the_plan_names_every_output_but_the_given_picture(world):
    targets = [target["name"] for target in yaml.safe_load(PLAN.read_text())["targets"]]
    assert {*targets, "tok_rgb@224"} == set(world.space.outputs()) and len(set(targets)) == len(targets)


def test_every_output_is_generated_from_a_photo(world, generated):
    files = {path.name.rpartition("-")[0]: path for path in generated.iterdir()}
    assert set(files) - {""} == set(world.space.outputs()) - {"tok_rgb@224"}
    for name in ("tok_normal@224", "tok_canny_edge@224"):
        assert Image.open(files[name]).size == (224, 224), name
    for name, shape in {
        "tok_depth@224": (224, 224),
        "tok_dinov2@224": (16, 16, 24),
        "tok_imagebind_global": (24,),
    }.items():
        assert np.load(files[name], allow_pickle=False).shape == shape, name
    assert isinstance(json.loads(files["human_poses"].read_text()), list)
    page = Image.open(generated / "picture.png")  # 17 pictures in two lines
    assert page.width > 9 * 256 and page.height > 2 * 256


def test_every_value_has_a_picture(world, tokens):
    sample = tokens.samples[0]
    ids = {name: torch.from_numpy(sample[name].astype(np.int64)) for name in world.space.outputs()}
    values = decode({n: i[None] if world.space[n].kind == "grid" else [i] for n, i in ids.items()}, world.tokenizers)
    drawn = set()
    for name, (value,) in values.items():
        made = picture(world.tokenizers[name], value, size=200, background=sample["rgb@224"])
        assert made.size == (200, 200) and made.mode == "RGB", name
        config = world.tokenizers[name].config
        drawn.add(getattr(config, "codec", None) or config.input.kind)
    assert drawn == {"image", "normal", "depth", "classes", "features", *(c.codec for c in CODECS_OF_4M.values())}
    assert picture(None, sample["t5_caption"], size=64).size == (64, 64)
    people, places = values["human_poses"][0], values["sam_instance"][0]
    assert np.shape(people[0]["body_pose"]) == (23, 3, 3)
    assert np.allclose(np.linalg.det(people[0]["body_pose"]), 1, atol=1e-2)
    masks = [one["mask"] for place in places for one in place["instances"]]
    assert masks and np.shape(masks[0]) == (64, 64)
    json.dumps([people, places])


@pytest.mark.parametrize("name", CODECS_OF_4M)
def test_text_of_a_model_is_drawn_as_far_as_it_goes(world, tokens, name):
    """Ids without sense, and texts that were right before something happened to them."""
    draws, tokenizer = random.Random(0), world.tokenizers[name]
    whole = tokens.samples[0][name].tolist()
    texts = [[draws.randrange(world.space[name].vocab_size) for _ in range(60)] for _ in range(20)]
    for _ in range(60):
        text = list(whole)
        for _ in range(draws.randint(1, 4)):
            place = draws.randrange(len(text) + 1)
            text[place : place + draws.randint(0, 3)] = [draws.randrange(204, 4204) for _ in range(draws.randint(0, 2))]
        texts.append(text)
    values = decode({name: [torch.tensor(text) for text in texts] + [torch.tensor([], dtype=torch.long)]},
                    world.tokenizers)[name]  # fmt: skip
    for value in values:
        assert picture(tokenizer, value, size=48).size == (48, 48)
        json.dumps(value)


def test_a_view_outside_of_the_photo_shows_nobody(world):
    outside = View(Crop(0, WIDTH, 50, 50), HEIGHT, WIDTH)
    assert Poses()(world.raw[0]["human_poses"], outside) == []


@pytest.fixture(scope="module")
def judged(world, tokens):
    """A model, raw samples as tokenizers take them, and their tokens."""
    short = {name: name.removeprefix("tok_").removesuffix("@224") for name in world.space.names}
    raw_samples = [
        {"__key__": sample["__key__"], **{name: sample[key] for name, key in short.items()}} for sample in tokens.viewed
    ]
    made = [{"__key__": sample["__key__"]} | own for sample, own in zip(world.raw, tokens.samples, strict=True)]
    return FourM.from_pretrained(world.root / "model"), world.tokenizers, raw_samples, made


def test_the_report_shows_every_modality(judged, world):
    model, tokenizers, raw_samples, made = judged
    config = GalleryConfig(samples=2, steps=1, picture="rgb@224", guidance=(1.0, 2.0), chain=("det", "tok_depth@224"))
    gallery = Gallery(model, tokenizers, raw_samples, made, config)
    for panel in (gallery.from_picture(), gallery.reconstructions(), gallery.in_painting()):
        for heading, cells in panel.rows:
            assert len(cells) == len(panel.columns), heading
            assert all(cell.image or cell.text for cell in cells if cell.title)
    names = [name for name in world.space.outputs() if name != "tok_rgb@224"]
    truths = dict(zip(names, gallery.truths(names, 0), strict=True))
    assert {name for name, cell in truths.items() if not cell.image} == {"caption", "metadata"}
    assert truths["caption"].text == "a dog beside a red car"


def test_every_output_has_figures_beside_a_constant_and_a_bound(judged, world):
    model, tokenizers, raw_samples, made = judged
    names = [name for name in world.space.outputs() if name != "tok_rgb@224"]
    config = TasksConfig([Task("rgb@224", name) for name in names], n=2, draws=2, train_n=2)
    figures = evaluate_tasks(model, tokenizers, raw_samples, made, raw_samples, config)
    assert list(figures) == [f"rgb@224->{name}" for name in names]
    lines = {(line["name"].partition(" → ")[2], line["figure"]): line for line in task_figures(figures)}
    assert {name for name, _ in lines} == set(names)
    for place in (
        ("caption", "token_f1"),
        ("det", "f1_iou50"),
        ("metadata", "exact_share"),
        ("sam_instance", "mask_iou"),
    ):
        assert lines[place]["bound"] > 0.99, place  # a text loses nothing
        assert lines[place]["value"] < lines[place]["bound"] and np.isfinite(lines[place]["constant"])
    assert lines["color_palette", "colour_distance"]["bound"] == 0
    assert (
        lines["human_poses", "person_f1_iou50"]["bound"] == 1 and lines["tok_depth@224", "relative_error"]["value"] > 0
    )
    assert lines["caption", "token_f1"]["constant"] == 1  # all captions are the same


@pytest.fixture(scope="module")
def splits(world, tokens):
    """Raw and token data of the two samples as test and training split, one above the other as `--data`, `--tokens`."""
    for name in ("raw", "tokens"):
        (world.root / name / "test").symlink_to(world.root / name / "train")
    return [world.root / name for name in ("raw", "tokens")]


def test_raw_photos_are_measured_in_the_first_crop_of_their_tokens(world, splits):
    targets = ("tok_depth@224", "det", "color_palette", "caption")
    tasks = [{"source": "rgb@224", "target": name} for name in targets]
    fourm = ("evaluate", "--model", world.root / "model", "--tokenizers", world.root, "--output", world.root / "m.json")
    data = ("--data", splits[0], "--tokens", splits[1], "--matrix_samples", 0, "--tasks.n", 2, "--tasks.draws", 1)
    cli.main([str(word) for word in (*fourm, *data, "--tasks.tasks", json.dumps(tasks))])
    figures = json.loads((world.root / "m.json").read_text())
    assert set(figures["tasks"]) == {f"rgb@224->{name}" for name in targets}
    assert set(figures["tokenizers"]) == {*world.space.outputs(), "rgb@224"} - {"tok_rgb@224"}
    assert figures["tokenizers"]["det"]["f1_iou50"] == 1


def test_the_report_shows_raw_photos_as_their_tokens_do(world, tokens, splits):
    model, data = FourM.from_pretrained(world.root / "model"), TokenDataset(splits[1] / "test", world.space)
    shown = ShownDataset(*splits, "test", world.space, world.tokenizers)
    gallery = Gallery(model, world.tokenizers, shown, data, GalleryConfig(samples=2, picture="rgb@224"))
    known = {sample["__key__"]: sample for sample in tokens.viewed}
    for row, scene in enumerate(gallery.raw):
        assert np.array_equal(scene["rgb@224"], known[scene["__key__"]]["rgb"])
        assert all(cell.image or cell.text for cell in gallery.truths([*gallery.targets, "t5_caption"], row))


@pytest.mark.parametrize("verb", [evaluate, report])
def test_diffusion_decoders_are_seeded(verb, monkeypatch):
    drawn = []
    monkeypatch.setattr(verb.FourM, "from_pretrained", lambda _: drawn.append(torch.rand(1).item()) or 1 / 0)
    needed = {name: "x" for name in ("model", "tokenizers", "data", "tokens", "output")}
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            verb.run(verb.Config(**needed, **({"metrics": "x"} if verb is report else {})))
    assert drawn[0] == drawn[1]


def test_tokenizers_of_texts_are_measured(world, tokens):
    values = [{"det": sample["det"]} for sample in tokens.viewed]
    figures = evaluate_tokenizer(world.tokenizers["det"], values, "det")
    assert figures["f1_iou50"] == 1 and figures["round_trip"] == 1
