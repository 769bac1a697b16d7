"""Vectors of a shared space as labels: by hand, on the command line, and as what a model takes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fourm import cli
from fourm.data.shards import ShardDataset, write_shards
from fourm.data.tokens import TokenDataset
from fourm.modalities import Modality, TokenSpace
from fourm.model.connectors import Connector, ConnectorConfig
from fourm.stitching.encoders import load
from fourm.stitching.space import SharedSpace
from fourm.stitching.teacher import open_side, shared
from fourm.verbs import stitch_fusemix

ROOT = Path(__file__).parents[2]


def colours(images):
    return torch.from_numpy(np.stack(images)).float() / 255


colours.dim = 3


@pytest.fixture
def space(tmp_path, monkeypatch):
    """A space whose side `a` is mean colours through a linear connector."""
    monkeypatch.setitem(sys.modules, "tests_colours", SimpleNamespace(means=colours))
    open_side.cache_clear()
    torch.manual_seed(0)
    sides = {side: Connector(ConnectorConfig(kind="linear", input_dim=3, output_dim=4)) for side in "ab"}
    source = {"modality": "rgb", "encoder": "tests_colours:means", "pooling": "mean", "size": 0, "dtype": "float32"}
    card = {"pairs": dict.fromkeys("ab", source), "made": dict.fromkeys("ab", load(source["encoder"]).fingerprint())}
    SharedSpace(sides, card=card).save(tmp_path / "space")
    return str(tmp_path / "space"), sides["a"]


def test_labels_are_unit_vectors_of_the_connector_and_go_into_a_model_as_vectors(space, tmp_path):
    folder, connector = space
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (5, 6, 3), dtype=np.uint8) for _ in range(3)]
    weight, bias = connector.network.weight.detach().numpy(), connector.network.bias.detach().numpy()
    expected = [weight @ (image.reshape(-1, 3) / 255).mean(0) + bias for image in images]
    expected = [each / np.linalg.norm(each) for each in expected]
    found = shared(images, folder, "a")
    assert [(each.shape, each.dtype) for each in found] == [((1, 4), np.float16)] * 3
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-3)

    samples = [{"__key__": f"{i}", "rgb": image} for i, image in enumerate(images)]
    write_shards(tmp_path / "data", "train", samples, 3)
    label = f"data: {tmp_path}/data\nsplits: [train]\nlabels:\n  s: {{teacher: 'fourm.stitching.teacher:shared', "
    (tmp_path / "label.yaml").write_text(label + f"space: {folder}, side: a}}\n")
    cli.main(["label", "--config", str(tmp_path / "label.yaml")])
    assert np.array_equal(ShardDataset(tmp_path / "data/train", ["s"]).sample("1")["s"], found[1])
    (tmp_path / "table.yaml").write_text("s: {kind: vectors, dim: 4, max_tokens: 1}\n")
    cli.main(["tokenize", "--data", f"{tmp_path}/data", "--output", f"{tmp_path}/tokens", "--splits", "[train]",
              "--modalities", f"{tmp_path}/table.yaml"])  # fmt: skip
    tokens = TokenDataset(tmp_path / "tokens/train", TokenSpace({"s": Modality("vectors", dim=4, max_tokens=1)}))
    np.testing.assert_array_equal(tokens[2]["s"], found[2].astype(np.float32))


def test_another_encoder_or_side_is_refused(space):
    folder, _ = space
    with pytest.raises(ValueError, match="side is 'c', allowed are a, b"):
        shared([], folder, "c")
    config = json.loads(Path(folder, "config.json").read_text())
    config["card"]["made"]["a"]["weights"] = "0" * 12
    Path(folder, "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="space was made with weights 000000000000; asked for is weights"):
        shared([], folder, "a")


def test_the_recipe_of_the_space_is_read_and_its_space_is_the_one_that_is_used():
    path = ROOT / "configs/stitch/features-earth.yaml"
    config = cli.read(stitch_fusemix.Config, ["--config", str(path)], "stitch fusemix")
    for user in ("label", "evaluate"):
        assert f"space: {config.folder}/space" in (ROOT / f"configs/{user}/earth-features.yaml").read_text(), user
