"""One view for all modalities of a sample: aligned crops and flips, and values of one crop."""

import numpy as np
import pytest

from fourm.data.transforms import (
    MIRRORED_JOINTS,
    TRANSFORMS,
    Crop,
    InstanceMasks,
    Instances,
    View,
    centre_crop,
    crop_boxes,
    crop_polygon,
    crop_settings,
    inside,
    jittered_square,
    paste_masks,
    random_crop,
    transform_sample,
)

FLIPPED = View(Crop(0, 0, 100, 200, True), 100, 200)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_crop_settings_begin_with_the_centre_and_depend_on_seed_and_key_alone():
    rows = crop_settings(120, 200, 400, seed=1, key="a", scale=(0.2, 0.8))
    assert rows.shape == (400, 5)
    assert rows[0].tolist() == [0, 40, 120, 120, 0]
    assert (crop_settings(120, 200, 7, seed=1, key="a", scale=(0.2, 0.8)) == rows[:7]).all()
    for other in (crop_settings(120, 200, 400, 2, "a"), crop_settings(120, 200, 400, 1, "b")):
        assert (other[1:] != rows[1:]).any(1).mean() > 0.9
    top, left, height, width, hflip = rows[1:].T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 120).all() and (left + width <= 200).all()
    assert np.abs(height * width / 24_000 - 0.5).max() < 0.32
    assert (width / height).min() > 0.72 and (width / height).max() < 1.38
    assert 0.4 < hflip.mean() < 0.6  # 399 draws: 5 deviations


@pytest.mark.parametrize(("size", "expected"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_an_image_that_is_too_long_gives_its_middle(size, expected):
    crop = random_crop(*size, rng(), scale=(1.0, 1.0))
    assert crop == (*expected, False)


def test_jittered_squares_stay_at_the_image():
    crops = [jittered_square(60, 100, rng(seed)) for seed in range(50)]
    assert all(crop.height == crop.width >= 50 and 0 <= crop.top <= 10 and 0 <= crop.left <= 50 for crop in crops)


@pytest.mark.parametrize("row", crop_settings(150, 210, 8, seed=0, key="x", scale=(0.5, 1.0)).tolist())
def test_all_modalities_show_the_same_thing_at_the_same_place(row):
    """A bright rectangle is found at the same pixels in every modality, whatever the crop."""
    top, left, bottom, right = 70, 90, 100, 130  # within all of the crops, about
    rgb = np.zeros((150, 210, 3), dtype=np.uint8)
    rgb[top:bottom, left:right] = 255
    depth, classes = rgb[..., 0].astype(np.uint16) * 257, rgb[..., 0] // 85
    box = [left / 210, top / 150, right / 210, bottom / 150]
    corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    sample = {
        "rgb": rgb, "depth": depth, "classes": classes, "mask": rgb[..., 0], "features": rgb.astype(np.float32) / 255,
        "boxes": {"instances": [{"boxes": box, "class_name": "x", "score": 1.0}]}, "sam_masks": [{"points": corners}],
        "human_poses": person(bbox_xyxy=[[left, top, right, bottom]]),
    }  # fmt: skip
    size = (96, 128)
    options = {name: {"size": size} for name in ("rgb", "depth", "classes", "mask", "features", "sam_masks")}
    transforms = {name: TRANSFORMS[{"rgb": "image"}.get(name, name)](**options.get(name, {})) for name in sample}
    seen = transform_sample(sample, transforms, View(Crop(*row[:4], bool(row[4])), 150, 210))
    scaled = np.array([128, 96, 128, 96])
    places = {
        "rgb": extent(seen["rgb"][..., 0] > 127), "depth": extent(seen["depth"] > 32_767),
        "classes": extent(seen["classes"] == 3), "mask": extent(seen["mask"]),
        "features": extent(seen["features"][..., 0] > 0.5), "boxes": scaled * seen["boxes"][0]["boxes"],
        "human_poses": scaled * seen["human_poses"][0]["box"], "sam_masks": seen["sam_masks"]["boxes"][0],
    }  # fmt: skip
    for name, place in places.items():
        assert np.abs(place - places["boxes"]).max() <= 1.5, (name, places)


def extent(where):
    """xmin, ymin, xmax, ymax of marked pixels."""
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def test_a_flip_turns_normals_around():
    raw = np.full((100, 200, 3), (255, 128, 10), dtype=np.uint8)
    assert np.unique(TRANSFORMS["normal"](size=(4, 8))(raw, FLIPPED).reshape(-1, 3), axis=0).tolist() == [[0, 128, 10]]


def test_features_of_the_whole_image_stay():
    raw = rng().normal(size=(5, 7, 3)).astype(np.float32)
    same = TRANSFORMS["features"](size=(5, 7))(raw, View(Crop(0, 0, 50, 70), 50, 70))
    assert np.allclose(same, raw, atol=1e-5)
    flipped = TRANSFORMS["features"](size=(5, 7))(raw, View(Crop(0, 0, 50, 70, True), 50, 70))
    assert np.allclose(flipped, raw[:, ::-1], atol=1e-5)
    part = TRANSFORMS["features"](size=(2, 3))(raw, View(Crop(10, 20, 20, 30), 50, 70))
    assert np.allclose(part, raw[1:3, 2:5], atol=1e-5)


def test_outside_of_the_image_it_is_black():
    raw = np.full((4, 8), 9, dtype=np.uint8)
    shown = TRANSFORMS["field"](size=(8, 8), resample="nearest")(raw, View(Crop(0, 0, 8, 8), 4, 8))
    assert (shown[:4] == 9).all() and (shown[4:] == 0).all()


def test_grey_pictures_get_three_channels():
    assert TRANSFORMS["image"](size=(5, 6))(np.zeros((100, 200), dtype=np.uint8), FLIPPED).shape == (5, 6, 3)


def test_boxes_by_hand():
    view = View(Crop(0, 100, 100, 100), 100, 200)
    boxes = np.array([[0.25, 0.0, 0.75, 0.5], [0.0, 0.0, 0.5, 1.0], [0.6, 0.1, 0.7, 0.2]])
    seen, share = crop_boxes(boxes, view)
    assert seen[[0, 2]] == pytest.approx(np.array([[0, 0, 0.5, 0.5], [0.2, 0.1, 0.4, 0.2]]))
    assert share == pytest.approx([0.5, 0, 1])
    instances = [{"boxes": box, "class_name": name, "score": score}
                 for box, name, score in zip(boxes.tolist(), "abc", (0.7, 0.9, 0.8), strict=True)]  # fmt: skip

    def names(**options):
        return "".join(one["class_name"] for one in TRANSFORMS["boxes"](**options)({"instances": instances}, view))

    assert names() == "ac"
    assert names(order="score") == "ca"
    assert names(order="area") == "ac"
    assert names(max_count=1) == "c"
    assert names(threshold=0.75) == "c"
    assert names(min_visibility=0.6) == "c"


def person(**changes):
    turn = np.linalg.qr(rng(3).normal(size=(24, 3, 3)))[0]
    return {
        "bbox_xyxy": [[0, 0, 100, 50]],
        "pred_cam": [[1.0, 0.25, -0.5]],
        "pose_tokenized": [[1, 2, 3, 4, 5, 6, 7, 8]],
        "pred_smpl_params": {
            "global_orient": turn[:1].tolist(), "body_pose": [turn[1:].tolist()], "betas": [list(range(10))]
        },
    } | changes  # fmt: skip


def test_a_flip_mirrors_people():
    raw = person()
    [plain], [flipped] = (TRANSFORMS["human_poses"]()(raw, View(Crop(0, 0, 100, 200, f), 100, 200)) for f in (0, 1))
    assert plain["pose"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and flipped["pose"] is None
    assert plain["box"] == pytest.approx([0, 0, 0.5, 0.5]) and flipped["box"] == pytest.approx([0.5, 0, 1, 0.5])
    assert flipped["camera"].tolist() == [1, -0.25, -0.5] and (flipped["shape"] == plain["shape"]).all()
    mirror = np.diag([-1, 1, 1])
    left_elbow, right_elbow = 17, 18  # SMPL's joints 18 and 19, without the root
    for ours, other in ((left_elbow, right_elbow), (right_elbow, left_elbow), (11, 11)):
        assert flipped["body_pose"][ours] == pytest.approx(mirror @ plain["body_pose"][other] @ mirror)
    assert flipped["global"] == pytest.approx(mirror @ plain["global"] @ mirror)
    assert [MIRRORED_JOINTS[i] for i in MIRRORED_JOINTS] == list(range(23))


def test_flipped_bodies_are_tokenized_again():
    asked = []

    def encode(bodies):
        asked.append(bodies)
        return np.full((len(bodies), 8), 9)

    transform = TRANSFORMS["human_poses"](encode=encode)
    assert transform(person(), View(Crop(0, 0, 100, 200), 100, 200))[0]["pose"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not asked
    [flipped] = transform(person(), FLIPPED)
    assert flipped["pose"].tolist() == [9] * 8 and asked[0].shape == (1, 207) and asked[0].dtype == np.float32
    assert (asked[0] == TRANSFORMS["body_pose"]()(person(), FLIPPED)).all()


def test_people_outside_are_left_out():
    assert TRANSFORMS["human_poses"]()(person(), View(Crop(0, 110, 50, 50), 100, 200)) == []
    assert TRANSFORMS["human_poses"]()({}, FLIPPED) == []
    assert not TRANSFORMS["body_pose"]()({}, FLIPPED).any()


def test_inside_counts_edges_and_corners():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]])
    points = np.array([[2, 2], [0, 0], [4, 2], [5, 2], [2, -1], [0, 5]])
    assert inside(square, points).tolist() == [True, True, True, False, False, False]
    notched = np.array([[0, 0], [4, 0], [2, 2], [4, 4], [0, 4]])  # a bite from the right
    assert inside(notched, np.array([[3, 2], [1, 2], [2, 2]])).tolist() == [False, True, True]


def test_polygons_are_cut_at_the_border():
    square = np.array([[10, 10], [30, 10], [30, 30], [10, 30]])
    assert crop_polygon(square, Crop(0, 0, 40, 40)).tolist() == square.tolist()
    cut = crop_polygon(square, Crop(20, 0, 40, 40))
    assert extent_of(cut) == [10, 0, 30, 10]
    assert crop_polygon(square, Crop(50, 50, 10, 10)) is None


def extent_of(polygon):
    return [*polygon.min(0).tolist(), *polygon.max(0).tolist()]


def test_masks_pasted_back_give_the_picture():
    """A large and a small triangle, one on the other, and a third beside them."""
    shapes = [[[1, 1], [90, 1], [1, 90]], [[70, 60], [120, 60], [120, 120]], [[10, 10], [40, 10], [10, 40]]]
    view = View(Crop(0, 0, 128, 128), 128, 128)
    found = InstanceMasks(size=(128, 128))([{"points": shape} for shape in shapes], view)
    labels = paste_masks(found["masks"], found["boxes"], (128, 128))
    assert labels[5, 60] == 1 and labels[70, 110] == 2 and labels[15, 15] == 3 and labels[110, 20] == 0
    twice = paste_masks(*(np.concatenate([found[key]] * 2) for key in ("masks", "boxes")), (128, 128))
    assert (twice == labels).all()
    assert not paste_masks(np.full((1, 4, 4), 0.6), np.array([[0, 0, 9, 9]]), (16, 16)).any()
    assert not paste_masks(np.zeros((0, 4, 4)), np.zeros((0, 4)), (16, 16)).any()


def test_at_most_so_many_masks():
    raw = [{"points": [[i, 0], [i + 50, 0], [i + 50, 50]]} for i in range(30)]
    found = InstanceMasks(max_count=5)(raw, View(Crop(0, 0, 100, 100), 100, 100, seed=1))
    assert len(found["masks"]) == len(found["boxes"]) == 5


def test_instances_are_drawn_anew_for_each_view_but_not_for_each_call():
    square = [[[0, 0], [223, 0], [223, 223], [0, 223]]]
    raw = [{"points": [square[0:1][0:1]], "bbox": [[0, 0, 223, 223]], "token_ids": [list(range(16))]}]
    views = [View(Crop(0, 0, 9, 9), 9, 9, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (Instances()(raw, view) for view in views)
    assert first == again != other
    assert len(first) == 7
    assert all(one["instances"] == [{"box": [0, 0, 223, 223], "tokens": list(range(16))}] for one in first)


def test_values_of_a_crop():
    settings = crop_settings(10, 20, 3, 0, "k")
    views = [View.of(settings, index, 10, 20) for index in range(3)]
    tokens = np.arange(6).reshape(3, 2)
    assert [TRANSFORMS["tokens"]()(tokens, view).tolist() for view in views] == tokens.tolist()
    assert TRANSFORMS["caption"]()(["only"], views[2]) == "only"
    assert TRANSFORMS["caption"](choose="random")(["a", "b"], views[2]) in "ab"
    embedded = {"emb": np.arange(12).reshape(2, 3, 2), "mask_valid": np.array([[1, 0, 0], [0, 1, 1]])}
    assert TRANSFORMS["vectors"]()(embedded, views[1]).tolist() == [[8, 9], [10, 11]]
    palettes = [{str(n): [[n, n, n]] * n for n in range(1, 8)}]
    sizes = {len(TRANSFORMS["palette"]()(palettes, View(views[0].crop, 9, 9, seed=seed))) for seed in range(100)}
    assert sizes == set(range(1, 8))


def test_features_that_were_made_per_crop_give_the_row_of_the_view():
    view = View(Crop(0, 0, 50, 70), 50, 70, index=1)
    vectors, maps = np.arange(6.0).reshape(2, 3), np.arange(24.0).reshape(2, 2, 2, 3)
    assert TRANSFORMS["features"]()(vectors[0], view).tolist() == [0, 1, 2]
    assert TRANSFORMS["features"]()(vectors, view).tolist() == [3, 4, 5]
    np.testing.assert_array_equal(TRANSFORMS["features"]()(maps, view), maps[1])


def test_one_of_several_embedded_captions_is_that_of_the_text():
    emb = rng().normal(size=(3, 4, 2)).astype(np.float16)
    emb[:, 3] = np.nan
    emb[1, 2] = np.nan
    words = ["a", "b", "c"]
    for seed in range(4):
        view = View(Crop(0, 0, 8, 8), 8, 8, index=seed % 3, seed=seed)
        for choose in ("crop", "first", "random"):
            number = words.index(TRANSFORMS["caption"](choose=choose)(words, view))
            wanted = emb[number, : 2 if number == 1 else 3]
            np.testing.assert_array_equal(TRANSFORMS["vectors"](choose=choose)(emb, view), wanted)
    np.testing.assert_array_equal(TRANSFORMS["vectors"]()(emb[0], view), emb[0])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int32", "int64", "uint32"])
def test_classes_and_masks_of_any_type(dtype):
    raw = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
    view = View(Crop(0, 0, 3, 4, True), 3, 4)
    np.testing.assert_array_equal(TRANSFORMS["classes"](size=(3, 4))(raw, view), raw[:, ::-1])
    np.testing.assert_array_equal(TRANSFORMS["mask"](size=(3, 4))(raw, view), raw[:, ::-1] == 1)


def test_places_move_with_the_crop():
    raw = [{"name": "a", "x": 0.25, "y": 0.5}, {"name": "b", "x": 0.75, "y": 0.5}]
    assert TRANSFORMS["places"]()(raw, View(Crop(0, 0, 100, 200), 100, 200)) == raw
    left = Crop(25, 0, 50, 100, True)  # pixels 0 to 99 of 200, rows 25 to 74
    assert TRANSFORMS["places"]()(raw, View(left, 100, 200)) == [{"name": "a", "x": 0.5, "y": 0.5}]
    assert TRANSFORMS["places"]()([], View(left, 100, 200)) == []


def test_contours_become_instances_with_the_ids_of_their_masks():
    """A contour in the left half of the image, seen in a flipped crop of that half at twice the scale."""
    raw = [{"points": [[[20, 20]], [[60, 20]], [[60, 80]], [[20, 80]]]}, {"points": [[150, 10], [190, 10], [190, 90]]}]
    view, masks = View(Crop(0, 0, 100, 100, True), 100, 200), []

    def encode(found):
        masks.extend(found)
        return np.arange(16 * len(found)).reshape(-1, 16)

    transform = TRANSFORMS["sam_instances"](size=(200, 200), encode=encode, mask_size=8)
    made = transform.of_view(raw, view)
    assert made["bbox"] == [[40, 80, 160, 160]] and made["token_ids"] == [list(range(16))]  # ymin, xmin, ymax, xmax
    assert np.array(masks).shape == (1, 8, 8) and np.all(masks)
    hits = transform.at(made, np.array([[100, 100], [10, 10]]))
    assert hits[0]["instances"] == [{"box": [80, 40, 160, 160], "tokens": list(range(16))}] and not hits[1]["instances"]
    assert [len(one["instances"]) for one in transform([], view)] == [0] * 7
    with pytest.raises(ValueError, match="contours have no ids"):
        TRANSFORMS["sam_instances"]()(raw, view)


def test_random_choices_depend_on_seed_key_and_crop_alone():
    settings = crop_settings(50, 70, 3, seed=0, key="a")
    numbers = {f"n{i}": float(i) for i in range(9)}
    emb = {"emb": np.arange(5.0).reshape(5, 1, 1), "mask_valid": np.ones((5, 1), bool)}

    def drawn(seed, key, index):
        view = View.of(settings, index, 50, 70, seed, key)
        caption = TRANSFORMS["caption"](choose="random")(["0", "1", "2", "3", "4"], view)
        assert TRANSFORMS["vectors"](choose="random")(emb, view).tolist() == [[float(caption)]]
        return caption, list(TRANSFORMS["metadata_21"]()(numbers, view))

    assert drawn(0, "a", 0) == drawn(0, "a", 0)
    assert sorted(drawn(0, "a", 0)[1]) == list(numbers)
    others = [drawn(0, "a", 0), drawn(1, "a", 0), drawn(0, "b", 0), drawn(0, "a", 1)]
    assert len({tuple(order) for _, order in others}) == 4


def test_values_that_are_ready_stay_as_they_are_in_the_whole_image():
    whole = View(Crop(0, 0, 50, 70), 50, 70)
    people, boxes = [{"box": [0, 0, 1, 1]}], [{"boxes": [0.5, 0.5, 1, 1], "class_name": "b"}]
    points = [{"point": (1, 2), "instances": []}]
    for name, value in (("human_poses", people), ("boxes", boxes), ("sam_instances", points), ("palette", [[1, 2, 3]])):
        assert TRANSFORMS[name]()(value, whole) == value
    [cut] = TRANSFORMS["boxes"]()(boxes, View(Crop(25, 0, 25, 70), 50, 70))
    assert cut["boxes"] == [0.5, 0, 1, 1]


def test_errors_say_what_and_where():
    view = View(centre_crop(10, 20), 10, 20, index=4)
    transforms = {"rgb": TRANSFORMS["image"](), "caption": TRANSFORMS["caption"]()}
    with pytest.raises(
        ValueError, match=r"rgb, sample 'k7': expected an image of 10x20 pixels, got uint8 \(9, 20, 3\)"
    ):
        transform_sample({"__key__": "k7", "rgb": np.zeros((9, 20, 3), dtype=np.uint8)}, transforms, view)
    with pytest.raises(ValueError, match="cannot resize an image of complex128"):
        transform_sample({"rgb": np.zeros((10, 20, 3), dtype=complex)}, transforms, view)
    with pytest.raises(ValueError, match="'k7' has no 'rgb', only __key__"):
        transform_sample({"__key__": "k7"}, transforms, view)
    for captions, said in ((["a", "b"], "2 values, but crop 4"), ([], "empty"), ([3] * 5, "got int")):
        with pytest.raises(ValueError, match=f"caption, sample .*{said}"):
            transform_sample({"caption": captions}, {"caption": transforms["caption"]}, view)
    with pytest.raises(ValueError, match=r"crop 2 was asked of crop settings \(2, 5\)"):
        View.of(np.zeros((2, 5)), 2, 10, 20)
