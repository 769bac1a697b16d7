"""Batches without chance, against hand-computed ones (tools/fixtures/masking.py has the reference's)."""

import numpy as np
import pytest

from fourm.masking.transfer import transfer_batch
from fourm.modalities import Modality, TokenSpace

SPACE = TokenSpace(
    {
        "tok": Modality("grid", vocab_size=10, grid=(1, 2)),
        "caption": Modality("text", vocab_size=300, max_tokens=3),
        "other": Modality("grid", vocab_size=7, grid=(1, 1), input=False),
        "t5": Modality("vectors", dim=2, max_tokens=2),
        "rgb": Modality("patches", grid=(1, 1), patch_size=1, mean=(0, 0, 0), std=(1, 1, 1)),
    }
)
VECTORS = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32)
SAMPLES = [
    {"__key__": "a", "tok": [4, 5], "caption": [250], "other": [6], "t5": VECTORS[:1], "rgb": np.full((1, 1, 3), 255)},
    {
        "__key__": "b",
        "tok": [8, 9],
        "caption": [251, 252, 253],
        "other": [0],
        "t5": VECTORS,
        "rgb": np.zeros((1, 1, 3)),
    },
]
SAMPLES = [{name: np.asarray(value, np.uint8) if name == "rgb" else value if name == "__key__" else np.asarray(value)
            for name, value in sample.items()} for sample in SAMPLES]  # fmt: skip


def test_by_hand() -> None:
    """Tokens: tok 0-9, caption 10-309, other 310-316. Positions: tok 0-1, caption 2-9, other 10, t5 11-12, rgb 13."""
    batch = transfer_batch(SPACE, SAMPLES, ["caption"], ["other", "tok"])
    assert batch.ids.tolist() == [[260, 13, 0], [261, 262, 263]]  # the longer one loses its end token
    assert batch.pos.tolist() == [[2, 3, 0], [2, 3, 4]]
    assert batch.mod.tolist() == [[1, 1, -1], [1, 1, 1]]
    assert batch.target.tolist() == [[4, 5, 316], [8, 9, 310]]
    assert batch.target_in.tolist() == [[-1, -1, -1], [-1, -1, -1]]
    assert batch.target_pos.tolist() == [[0, 1, 10], [0, 1, 10]]
    assert batch.target_mod.tolist() == [[0, 0, 2], [0, 0, 2]]
    assert batch.keys == ("a", "b")


def test_text_target_and_continuous_inputs_by_hand() -> None:
    batch = transfer_batch(SPACE, SAMPLES, ["rgb", "t5"], ["caption"])
    assert batch.target_in.tolist() == [[15, 260, 13, 0], [15, 261, 262, 263]]
    assert batch.target.tolist() == [[260, 13, 16, 0], [261, 262, 263, 16]]
    assert batch.target_pos.tolist() == [[2, 3, 4, 0], [2, 3, 4, 5]]
    assert batch.mod.tolist() == [[3, 4, -1], [3, 3, 4]]
    assert batch.pos.tolist() == [[11, 13, 0], [11, 12, 13]]
    assert batch.rows["t5"].tolist() == [[1, 2], [1, 2], [3, 4]]  # at most two vectors
    assert batch.slots["t5"].tolist() == [0, 3, 4]
    assert batch.rows["rgb"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch.slots["rgb"].tolist() == [1, 5]


def test_nothing_given_leaves_one_empty_slot() -> None:
    batch = transfer_batch(SPACE, SAMPLES, [], ["tok"])
    assert batch.mod.tolist() == [[-1], [-1]]
    assert (batch.input_tokens, batch.target_tokens) == (0, 4)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (["tok"], ["tok"], "tok: given and asked at once"),
        (["other"], ["tok"], "other: not an input, allowed are tok, caption, t5, rgb"),
        (["tok"], ["rgb"], "rgb: cannot be predicted, allowed are tok, caption, other"),
        (["nope"], ["tok"], "unknown modality 'nope'"),
    ],
)
def test_errors(inputs: list[str], targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transfer_batch(SPACE, SAMPLES, inputs, targets)


def test_absent_modality_is_an_error() -> None:
    with pytest.raises(ValueError, match="sample 'c' has no caption"):
        transfer_batch(SPACE, [*SAMPLES, {"__key__": "c", "tok": SAMPLES[0]["tok"]}], ["tok"], ["caption"])
