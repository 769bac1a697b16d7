"""Retrieval through generated vectors, several given modalities, and two models beside each other."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from fourm.evaluation.comparison import ComparisonConfig, Versus, compare
from fourm.evaluation.generated import RetrievalConfig, figures, retrieve
from fourm.evaluation.matrix import any_to_any
from fourm.evaluation.tasks import Task, TasksConfig, evaluate_tasks
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import FourM, FourMConfig
from fourm.tokenization.autoencoder import ImageTokenizer, TokenizerConfig
from fourm.tokenization.backbones import BackboneConfig
from fourm.tokenization.inputs import InputConfig
from fourm.tokenization.quantizers import QuantizerConfig

SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(2, 2), patch_size=2),
        "water": Modality("grid", vocab_size=8, grid=(2, 2)),
        "vector": Modality("grid", vocab_size=8, grid=(3, 1), learned_positions=True),
        "sentence": Modality("vectors", dim=5, max_tokens=1),
    }
)


def tokenizer(kind, size, channels, books, patch=1, **more):
    config = TokenizerConfig(
        InputConfig(kind, size, channels=channels, **more), QuantizerConfig("memcodes" if books > 1 else "vq",
        codebook_size=8, codebooks=books, dim=6, kmeans=False), BackboneConfig(patch, 12, encoder="mlp", decoder="mlp"),
        loss="cosine" if kind == "features" else "cross_entropy",
    )  # fmt: skip
    return ImageTokenizer(config).eval()


@pytest.fixture
def world():
    """A model, its tokenizers, 12 raw samples and their tokens; the vectors are what the tokens say."""
    torch.manual_seed(0)
    tokenizers = {"vector": tokenizer("features", (1, 1), 7, 3), "water": tokenizer("classes", (4, 4), 3, 1, 2,
                  classes=2)}  # fmt: skip
    model = FourM(FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2), SPACE)
    rng, raw, tokens = np.random.default_rng(0), [], []
    for i in range(12):
        sample = {"__key__": f"{i:02d}", "rgb": rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)}
        sample["sentence"] = rng.standard_normal((1, 5)).astype(np.float32)
        ids = {"water": rng.integers(0, 8, 4), "vector": rng.integers(0, 8, 3)}
        raw.append(sample | {"water": rng.integers(0, 2, (4, 4)).astype(np.uint8)})
        raw[-1]["vector"] = tokenizers["vector"].decode(torch.from_numpy(ids["vector"])[None])[0]
        tokens.append(sample | ids)
    return model, tokenizers, raw, tokens


def test_ranks_are_those_of_scipy_and_chance_is_beside_them(world):
    torch.manual_seed(1)
    queries, items = torch.randn(40, 6), torch.randn(40, 6)
    found = figures(queries, items)
    sides = [z - z.mean(0) for z in (queries.numpy() + 5, items.numpy())]  # a shift of all queries changes nothing
    cosines = np.divide(sides[0] @ sides[1].T, np.outer(*(np.linalg.norm(z, axis=1) for z in sides)))
    place = np.array([rankdata(-row)[i] for i, row in enumerate(cosines)])
    assert found["R@5"] == np.mean(place <= 5) and found["median_rank"] == np.median(place)
    low, high = found["R@5_ci95"]
    error = 1.96 * np.sqrt(found["R@5"] * (1 - found["R@5"]) / 40)  # the normal approximation of a share
    assert np.allclose([low, high], [found["R@5"] - error, found["R@5"] + error], atol=0.05)
    second = figures(torch.eye(7) + 2 * torch.eye(7).roll(1, 0), torch.eye(7))  # one is always before the right one
    assert second["median_rank"] == 2 and second["R@1_ci95"] == [0, 0] and second["R@5_ci95"] == [1, 1]


class Knows(FourM):
    """Reads a vector's tokens out of the brightness of three of the four given patches, without doubt."""

    def forward(self, batch):
        if not len(batch.rows.get("rgb", ())):
            return super().forward(batch)
        return ((batch.rows["rgb"].mean(1) * 0.5 + 0.5) * 255 / 32).long().reshape(len(batch), 4)[:, :3]

    def logits(self, hidden, name):
        return super().logits(hidden, name) if hidden.ndim == 3 else torch.nn.functional.one_hot(hidden, 8) * 100.0


def test_who_writes_the_right_tokens_finds_as_much_as_they_say(world):
    _, tokenizers, raw, tokens = world
    model = Knows(FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2), SPACE)
    levels = np.random.default_rng(3).permutation(512)[:12]
    for level, scene, sample in zip(levels, raw, tokens, strict=True):
        ids = np.array([level // 64, level // 8 % 8, level % 8])
        patches = np.uint8(32 * np.append(ids, 0) + 16).reshape(2, 2)
        scene["rgb"] = sample["rgb"] = np.kron(patches, np.ones((2, 2), np.uint8))[..., None].repeat(3, 2)
        scene["vector"], sample["vector"] = tokenizers["vector"].decode(torch.from_numpy(ids)[None])[0], ids
    found, _ = retrieve(model, tokenizers, raw, tokens, RetrievalConfig(target="vector", draws=2, batch_size=5))
    assert found["sources"]["rgb"]["R@1"] == 1 and found["sources"]["rgb"]["R@1_ci95"] == [1, 1]
    stored = np.stack([scene["vector"] for scene in raw])
    again = tokenizers["vector"].decode(tokenizers["vector"].encode(stored))  # an untrained encoder loses most
    again, stored = again - again.mean(0), stored - stored.mean(0)
    cosines = (again @ stored.T) / np.linalg.norm(again, axis=1)[:, None] / np.linalg.norm(stored, axis=1)
    assert found["bound"]["R@1"] == np.mean(cosines.argmax(1) == np.arange(12)) < 1
    assert found["sources"]["water"]["R@1"] < 0.5 and found["chance"]["R@1"] == 1 / 12


def test_sources_are_all_but_the_target_and_both_spaces_are_scored(world):
    model, tokenizers, raw, tokens = world
    config = RetrievalConfig(target="vector", n=10, draws=3)
    found, page = retrieve(model, tokenizers, raw, tokens, config, lambda vectors: vectors.flip(1)[:, :2])
    assert set(found["sources"]) == {"rgb", "water", "sentence"} and found["n"] == 10
    assert found["chance"] == {"R@1": 0.1, "R@5": 0.5, "R@10": 1.0}
    assert found["bound"]["R@10"] == found["sources"]["rgb"]["shared"]["R@10"] == 1  # there are only ten
    assert page.height == 3 * (96 + 8 + 20) and page.width == 6 * (96 + 8)
    again, _ = retrieve(model, tokenizers, raw, tokens, config)
    assert again["sources"]["rgb"]["median_rank"] == found["sources"]["rgb"]["median_rank"]  # the same draws
    with pytest.raises(ValueError, match=r"target is 'rgb', the model predicts water, vector"):
        retrieve(model, tokenizers, raw, tokens, RetrievalConfig(target="rgb"))


def test_a_task_may_give_several_modalities(world):
    model, tokenizers, raw, tokens = world
    with torch.no_grad():
        for project in model.encoder_embeddings.project.values():
            project.weight.mul_(30)  # so that what is given matters
        model.decoder_embeddings.tokens.weight.mul_(30)
    sources = ("rgb", "sentence", "rgb+sentence", "sentence+rgb", "rgb+sound")
    config = TasksConfig([Task(source, "vector") for source in sources], n=12, draws=64)
    scored = evaluate_tasks(model, tokenizers, raw, tokens, raw, config)
    cosines = {name.partition("->")[0]: each["cosine"] for name, each in scored.items()}
    assert set(cosines) == set(sources[:4])  # there is no sound
    assert cosines["rgb+sentence"] == cosines["sentence+rgb"]
    assert len({cosines["rgb"], cosines["sentence"], cosines["rgb+sentence"]}) == 3


def test_two_models_differ_by_what_their_matrices_say(world):
    model, _, _, tokens = world
    torch.manual_seed(2)
    other = FourM(FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, heads=2), SPACE)
    with torch.no_grad():
        other.decoder_embeddings.tokens.weight.mul_(20)  # far from uniform, hence worse
    pairs = [Versus("water", "rgb"), Versus("vector", "rgb+sentence", "water")]
    found = list(compare(model, other, tokens, ComparisonConfig(pairs=pairs, batch_size=5)).values())
    ours, theirs = (any_to_any(each, tokens, 12) for each in (model, other))
    assert found[0]["bits"] == pytest.approx(ours["rgb"]["water"]["bits"], rel=1e-5)
    assert found[1]["other_bits"] == pytest.approx(theirs["water"]["vector"]["bits"], rel=1e-5)
    saved = theirs["rgb"]["water"]["bits"] - ours["rgb"]["water"]["bits"]
    assert found[0]["saved_bits"] == pytest.approx(saved, rel=1e-4)
    low, high = found[0]["ci95"]
    assert low < saved < high
    (same,) = compare(model, model, tokens, ComparisonConfig(pairs=pairs[:1])).values()
    assert same["saved_bits"] == 0 and same["ci95"] == [0, 0]
    with pytest.raises(ValueError, match="sound: the model is given rgb, water, vector, sentence"):
        compare(model, other, tokens, ComparisonConfig(pairs=[Versus("water", "sound")]))
