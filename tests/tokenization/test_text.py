"""The text tokenizer: ids of special words as in 4M, and values through text and back."""

import json
from pathlib import Path

import numpy as np
import pytest

from fourm.modalities import Modality, TokenSpace
from fourm.tokenization import load_tokenizer
from fourm.tokenization.encode import encode_samples
from fourm.tokenization.structured import CodecConfig
from fourm.tokenization.text import TextTokenizer, fit_text_tokenizers, train_text_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
PLACES = [{"name": "Lima", "x": 0.1, "y": 0.9}, {"name": "Port-au-Prince São N'Da", "x": 0.5, "y": 0.5}]
SAMPLES = [
    {"caption": "Peru: a warm-summer coast, near Lima.", "places": PLACES},
    {"caption": "Flat desert, no towns at all.", "places": [], "palette": [[1, 2, 3], [250, 251, 252]]},
]
CODECS = {
    "caption": CodecConfig("caption"),
    "places": CodecConfig("places", bins=16),
    "palette": CodecConfig("palette", bins=64),
}


@pytest.fixture(scope="module")
def fitted():
    return fit_text_tokenizers(SAMPLES, CODECS, vocab_size=600, bins=64, sentinels=20)


def test_values_as_teachers_write_them_are_learned_from_and_tokenized():
    body = {"global_orient": [np.eye(3)], "body_pose": [[np.eye(3)] * 23], "betas": [[0] * 10]}
    people = {"bbox_xyxy": [[10, 10, 60, 90]], "pred_smpl_params": body, "pred_cam": [[1, 0, 0]]}
    sample = {
        "caption": [{"caption": "a dog"}, {"caption": "a dog runs"}],
        "palette": [{"1": [[1, 2, 3]], "2": [[1, 2, 3], [4, 5, 6]]}],
        "boxes": {"instances": [{"boxes": [0.1, 0.2, 0.3, 0.4], "class_name": "dog", "score": 0.9}]},
        "people": people | {"pose_tokenized": [[1] * 8]},
    }
    codecs = {"caption": CodecConfig("caption"), "palette": CodecConfig("palette"), "boxes": CodecConfig("boxes"),
              "people": CodecConfig("human_poses")}  # fmt: skip
    fitted = fit_text_tokenizers([sample, {"people": people}], codecs, 4600, bins=1000, sentinels=20)
    rows = {name: Modality("text", vocab_size=one.vocab_size, max_tokens=64) for name, one in fitted.items()}
    photo = {"__key__": "a", "rgb": np.zeros((100, 100, 3), np.uint8)}
    rows["rgb"] = Modality("patches", grid=(10, 10), patch_size=10)
    (made,) = encode_samples([photo | sample], TokenSpace(rows), fitted)
    values = {name: fitted[name].decode([made[name]])[0] for name in fitted}
    assert values["caption"] in ("a dog", "a dog runs") and values["palette"][0] == [1, 2, 3]
    assert values["boxes"][0]["class_name"] == "dog" and list(values["people"][0]["pose"]) == [1] * 8


def test_special_ids_and_pipeline_are_those_of_4m():
    path = SHARED / "fixtures/text_tokenizer_4m_wordpiece_30k.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    reference = json.loads(path.read_text())
    ours = json.loads(train_text_tokenizer(["a b c"], vocab_size=4300, bins=1000, sentinels=200).to_str())
    assert ours["added_tokens"] == reference["added_tokens"][:4204]  # after these come the names of COCO's classes
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == reference[part]
    del ours["model"]["vocab"], reference["model"]["vocab"]
    assert ours["model"] == reference["model"]


def test_reads_the_tokenizer_of_4m():
    path = SHARED / "fixtures/text_tokenizer_4m_wordpiece_30k.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tokenizer = TextTokenizer.from_file(path, CodecConfig("palette"))
    ids = tokenizer.encode([[[140, 231, 126]]])
    assert ids[0].tolist() == [1205, 344, 435, 330]  # fixture transforms/color_palette.json
    assert tokenizer.decode(ids) == [[[140, 231, 126]]]


def test_a_file_that_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json is not a file"):
        TextTokenizer.from_file(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is not a Hugging Face tokenizer"):
        TextTokenizer.from_file(tmp_path / "other.json")


def test_values_come_back(fitted):
    for sample in SAMPLES:
        for name, value in sample.items():
            tokenizer = fitted[name]
            (back,) = tokenizer.decode(tokenizer.encode([value]))
            if name == "caption":
                assert back == value
            elif name == "places":
                assert [place["name"] for place in back] == [place["name"] for place in value]
                assert all(abs(b["x"] - v["x"]) <= 1 / 32 for b, v in zip(back, value, strict=True))
            else:
                assert np.abs(np.array(back) - np.array(value)).max() <= 2
    assert {tokenizer.vocab_size for tokenizer in fitted.values()} == {fitted["caption"].vocab_size}


def test_lowercase_folds_case_and_accents():
    tokenizer = fit_text_tokenizers([{"c": "São"}], {"c": CodecConfig("caption")}, 60, 4, 4, lowercase=True)["c"]
    assert tokenizer.decode(tokenizer.encode(["SÃO"])) == ["sao"]


def test_decoding_stops_at_eos_and_drops_sentinels(fitted):
    caption = fitted["caption"]
    ids = caption.encode(["Flat desert"])[0].tolist()
    assert caption.decode([[5, *ids, 6, 3, *ids], [], [3], [0, 2]]) == ["Flat desert", "", "", ""]


def test_folder_round_trip(fitted, tmp_path):
    fitted["places"].save_pretrained(tmp_path / "places")
    loaded = load_tokenizer(tmp_path / "places")
    assert isinstance(loaded, TextTokenizer) and loaded.config == CODECS["places"]
    places = [SAMPLES[0]["places"]]
    assert loaded.encode(places)[0].tolist() == fitted["places"].encode(places)[0].tolist()


def test_errors(fitted):
    with pytest.raises(ValueError, match="larger"):
        train_text_tokenizer(["a"], vocab_size=100, bins=64, sentinels=20)
    with pytest.raises(ValueError, match="v0=255"):
        TextTokenizer(fitted["caption"].tokenizer, CodecConfig("palette", bins=256))
    with pytest.raises(ValueError, match=r"value 1 \(caption\): expected a string"):
        fitted["caption"].encode(["a", 3])
    with pytest.raises(ValueError, match="neither"):
        load_tokenizer("no/such/folder")
