"""The masker: what is in a batch is what was in the samples, drawn as asked, and the same whoever draws it."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fourm.masking.batch import MaskedBatch
from fourm.masking.budgets import Component, MaskingConfig
from fourm.masking.collect import finish, sequences
from fourm.masking.masking import Masker, MixedMasker, cell_ranks, choose_cells, shuffle_chunks
from fourm.modalities import Modality, TokenSpace

EOS, S0 = 3, 4

SPACE = TokenSpace(
    {
        "caption": Modality("text", vocab="text", vocab_size=300, max_tokens=24),
        "rgb": Modality("patches", grid=(2, 3), patch_size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        "tok": Modality("grid", vocab_size=50, grid=(4, 4)),
        "small": Modality("grid", vocab_size=20, grid=(3, 1)),
        "t5": Modality("vectors", dim=5, max_tokens=6),
        "pairs": Modality("text", vocab="text", vocab_size=300, max_tokens=20, chunk=2),
    }
)
EVEN = MaskingConfig(20, 20, [Component(input={"others": 1}, target={"others": 1})])


def samples(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "__key__": f"k{number}",
            "caption": rng.integers(210, 300, rng.integers(0, 20)).astype(np.uint16),
            "rgb": rng.integers(0, 256, (8, 12, 3), dtype=np.uint8),
            "tok": rng.integers(0, 50, 16),
            "small": rng.integers(0, 20, 3).astype(np.int32),
            "t5": rng.normal(size=(rng.integers(1, 7), 5)).astype(np.float32),
            "pairs": rng.permutation(np.arange(210, 290))[: 2 * rng.integers(1, 7)],
        }
        for number in range(count)
    ]


def draws(count: int, epoch: int = 0) -> list[tuple[int, int]]:
    return [(epoch, index) for index in range(count)]


def tokens(batch: MaskedBatch, row: int, name: str, space: TokenSpace = SPACE) -> tuple[list, list, list, list, list]:
    """Positions and ids of the inputs, positions, fed ids and ids of the targets of a modality, ids from 0."""
    number = space.number[name]
    first, position = space.vocab_offset[number], space.position_offset[number]
    given, asked = batch.mod[row] == number, batch.target_mod[row] == number
    fed = batch.target_in[row][asked]
    return (
        (batch.pos[row][given] - position).tolist(),
        (batch.ids[row][given] - first).tolist(),
        (batch.target_pos[row][asked] - position).tolist(),
        torch.where(fed < 0, fed, fed - first).tolist(),
        (batch.target[row][asked] - first).tolist(),
    )


def merge(given: list[int], asked: list[int]) -> list[int]:
    """The text behind a span-masked input and its target: each sentinel replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in asked:
        if S0 <= token < S0 + 200:
            spans[token] = []
            current = spans[token]
        else:
            current.append(token)
    return list(itertools.chain(*[spans.get(token, [token]) for token in given]))


def equal(one: MaskedBatch, other: MaskedBatch) -> bool:
    names = ("ids", "pos", "mod", "target_in", "target", "target_pos", "target_mod")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names) and one.keys == other.keys
    return same and all(
        torch.equal(one.rows[name], other.rows[name]) and torch.equal(one.slots[name], other.slots[name])
        for name in one.rows
    )


def test_grids_hold_the_ids_of_the_sample_and_no_cell_twice() -> None:
    data = samples(64)
    batch = Masker(SPACE, EVEN)(data, draws(64))
    for row, sample in enumerate(data):
        for name in ("tok", "small"):
            given, ids, asked, fed, answers = tokens(batch, row, name)
            assert given == sorted(given)
            assert asked == sorted(asked)
            assert not set(given) & set(asked)
            assert ids == sample[name][given].tolist()
            assert answers == sample[name][asked].tolist()
            assert set(fed) <= {-1}


def test_texts_come_back_whole_from_input_and_target() -> None:
    """Big budgets: nothing is cut, so input and target together are the text and its end token."""
    data = samples(200)
    config = MaskingConfig(300, 300, [Component(input={"caption": 9}, target={"caption": 9})])
    batch = Masker(SPACE, config)(data, draws(200))
    seen = set()
    for row, sample in enumerate(data):
        given_at, given, asked_at, fed, answers = tokens(batch, row, "caption")
        text = [*sample["caption"].tolist(), EOS]
        assert given_at == list(range(len(given)))
        assert asked_at == list(range(len(answers)))
        assert fed[1:] == answers[:-1]
        target = fed[:1] + answers if fed else [S0 + 1]
        assert target[0] == S0 + 1
        assert merge(given, target) == text
        seen.add(len(answers))
    assert len(seen) > 8


def test_chunks_stay_together_in_a_new_order_each_epoch() -> None:
    data = samples(100)
    config = MaskingConfig(300, 300, [Component(input={"pairs": 9}, target={"pairs": 9})])
    orders = []
    for epoch in range(2):
        batch = Masker(SPACE, config)(data, draws(100, epoch))
        for row, sample in enumerate(data):
            _, given, _, fed, answers = tokens(batch, row, "pairs")
            whole = merge(given, fed[:1] + answers if fed else [S0 + 1])
            orders.append(whole)
            pairs = {tuple(pair) for pair in sample["pairs"].reshape(-1, 2).tolist()}
            got = [tuple(whole[at : at + 2]) for at in range(0, len(whole) // 2 * 2, 2)]
            assert whole[-1] == EOS
            assert set(got) == pairs
    assert sum(one != other for one, other in zip(orders[:100], orders[100:], strict=True)) > 60


def test_long_texts_are_cut_to_whole_chunks() -> None:
    """Five tokens at most; the end token only where it fits; an incomplete chunk stays last when shuffled."""
    space = TokenSpace(
        {
            "one": Modality("text", vocab_size=300, max_tokens=5),
            "two": Modality("text", vocab_size=300, max_tokens=5, chunk=2),
        }
    )
    texts = [np.arange(210, 210 + size) for size in (3, 4, 5, 6)]
    raw = sequences(space, [{"one": text, "two": text} for text in texts], space.names)
    done = finish(space, raw)
    assert done.length.tolist() == [4, 5, 5, 5, 4, 5, 4, 4]
    assert done.ids[0].tolist() == [210, 211, 212, EOS, 0]
    assert done.ids[1].tolist() == [210, 211, 212, 213, EOS]
    assert done.ids[3].tolist() == [210, 211, 212, 213, 214]
    chunk = np.array([1, 2])[raw.mod]
    orders = {
        tuple(shuffle_chunks(raw, chunk, np.full(8, key, dtype=np.uint64)).ids[6, :5].tolist()) for key in range(20)
    }
    assert orders == {(210, 211, 212, 213, 214), (212, 213, 210, 211, 214)}


def test_patches_equal_unfold() -> None:
    """torch's unfold gives (channel, row, column) per patch; ours is (row, column, channel)."""
    data = samples(16)
    batch = Masker(SPACE, MaskingConfig(4, 4, [Component(input={"rgb": 1}, target={"tok": 1})]))(data, draws(16))
    images = torch.stack([torch.from_numpy(sample["rgb"]) for sample in data]).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    cells = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)  # (B, 6, 48)
    cells = cells.reshape(16, 6, 3, 16).transpose(2, 3).reshape(16, 6, 48)
    slots = batch.slots["rgb"]
    assert len(slots) == 16 * 4
    assert (batch.mod.flatten()[slots] == SPACE.number["rgb"]).all()
    cell = batch.pos.flatten()[slots] - int(SPACE.position_offset[SPACE.number["rgb"]])
    assert torch.allclose(batch.rows["rgb"], cells[slots // batch.ids.shape[1], cell], atol=1e-6)


def test_grey_images() -> None:
    space = TokenSpace({"grey": Modality("patches", grid=(1, 2), patch_size=2, channels=1, mean=(0.5,), std=(0.25,)),
                        "tok": Modality("grid", vocab_size=2, grid=(1, 1))})  # fmt: skip
    image = np.array([[0, 255, 51, 0], [0, 0, 0, 0]], dtype=np.uint8)
    masker = Masker(space, MaskingConfig(2, 1, [Component(input={"grey": 1}, target={"tok": 1})]))
    batch = masker([{"grey": image, "tok": np.array([1])}], [(0, 0)])
    assert torch.allclose(batch.rows["grey"], torch.tensor([[-2.0, 2, -2, -2], [-1.2, -2, -2, -2]]))


def test_vectors_are_the_samples_with_zeros_for_masked_runs() -> None:
    """Kept rows in order; never two zero rows in a row; everything or one zero row where chance allows nothing else."""
    data = samples(300)
    batch = Masker(SPACE, MaskingConfig(6, 1, [Component(input={"t5": 1}, target={"tok": 1})]))(data, draws(300))
    width, masked = batch.ids.shape[1], 0
    for row, sample in enumerate(data):
        mine = batch.slots["t5"] // width == row
        rows = batch.rows["t5"][mine].numpy()
        assert len(rows) == int((batch.mod[row] == SPACE.number["t5"]).sum())
        zero = np.abs(rows).max(axis=1, initial=0) == 0
        assert not (zero[1:] & zero[:-1]).any()
        kept = [int(np.flatnonzero((sample["t5"] == values).all(axis=1))[0]) for values in rows[~zero]]
        assert kept == sorted(set(kept))
        gaps = np.diff([-1, *kept, len(sample["t5"])]) > 1
        assert zero.sum() == gaps.sum()
        masked += int(zero.sum())
    assert masked > 50
    assert not batch.ids[batch.mod == SPACE.number["t5"]].any()


def test_layout() -> None:
    """Sorted by modality, then position; empty slots last, -1 and zeros; widths are the budgets whatever is filled."""
    batch = Masker(SPACE, EVEN)(samples(40), draws(40))
    assert batch.ids.shape == batch.target.shape == (40, 20)
    for mod, pos, ids in (
        (batch.mod, batch.pos, batch.ids),
        (batch.target_mod, batch.target_pos, batch.target),
    ):
        key = torch.where(mod < 0, 10**6, mod * 1000 + pos)
        assert (key.diff(dim=1)[mod[:, 1:] >= 0] > 0).all()
        assert not pos[mod < 0].any()
        assert not ids[mod < 0].any()
    assert not batch.target_in[batch.target_mod < 0].any()
    assert batch.keys == tuple(f"k{number}" for number in range(40))
    assert batch.pos.max() < SPACE.positions
    assert max(batch.ids.max(), batch.target.max()) < SPACE.vocab_size


def test_chosen_cells_are_uniform_and_of_the_right_number() -> None:
    length, many = np.array([7, 4]), 6000
    given, asked = np.full((many, 2), 2), np.full((many, 2), [4, 2])
    one, two = choose_cells(cell_ranks(length, np.arange(many, dtype=np.uint64)), given, asked)
    assert not (one & two).any()
    assert (one.sum(axis=2) == given).all()
    assert (two.sum(axis=2) == asked).all()
    assert not (one | two)[:, 1, 4:].any()
    for chosen, count in ((one, given), (two, asked)):
        for grid, size in enumerate(length):
            share = count[0, grid] / size
            allowed = 5 * np.sqrt(share * (1 - share) / many)
            assert np.abs(chosen[:, grid, :size].mean(axis=0) - share).max() <= allowed


def test_a_sample_is_masked_alike_in_any_company() -> None:
    data = samples(10)
    masker = Masker(SPACE, EVEN)
    together = masker(data, draws(10, epoch=2))
    alone = Masker(SPACE, EVEN)(data[7:8], [(2, 7)])
    for name in ("ids", "pos", "mod", "target_in", "target", "target_pos", "target_mod"):
        assert torch.equal(getattr(together, name)[7:8], getattr(alone, name)), name
    assert equal(masker(data, draws(10, epoch=2)), together)
    assert not torch.equal(masker(data, draws(10, epoch=3)).pos, together.pos)


class Data(torch.utils.data.Dataset):
    def __getitem__(self, draw: tuple[int, int]) -> tuple[dict, tuple[int, int]]:
        return samples(8)[draw[1]], draw


def collate(masker: Masker, items: list) -> MaskedBatch:
    return masker([sample for sample, _ in items], [draw for _, draw in items])


def test_workers_change_nothing() -> None:
    batches = [[(epoch, index) for index in part] for epoch in range(2) for part in ([0, 5, 2], [7, 1, 3])]

    def load(workers: int) -> Iterator[MaskedBatch]:
        merge_items = functools.partial(collate, Masker(SPACE, EVEN))
        return iter(
            torch.utils.data.DataLoader(Data(), batch_sampler=batches, collate_fn=merge_items, num_workers=workers)
        )

    pairs = list(zip(load(0), load(2), strict=True))
    assert len(pairs) == 4
    assert all(equal(*pair) for pair in pairs)


def test_absent_modalities() -> None:
    data = samples(30)
    for number, sample in enumerate(data):
        for name in list(SPACE.names)[number % 6 :: 2]:
            del sample[name]
    batch = Masker(SPACE, EVEN)(data, draws(30))
    for row, sample in enumerate(data):
        got = {SPACE.names[mod] for mod in [*batch.mod[row].tolist(), *batch.target_mod[row].tolist()] if mod >= 0}
        assert got <= set(sample)
        assert got
    only_key = Masker(SPACE, EVEN)([{"__key__": "nothing"}], [(0, 0)])
    assert only_key.input_tokens == only_key.target_tokens == 0
    assert {name: tuple(rows.shape) for name, rows in only_key.rows.items()} == {"rgb": (0, 48), "t5": (0, 5)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tok", np.zeros(15, dtype=int), r"'bad': tok is int64 of shape \(15,\), expected integer ids \(16,\)"),
        ("tok", np.full(16, 50), r"'bad': tok has id 50, expected \[0, 50\)"),
        ("small", np.zeros(3), r"'bad': small is float64"),
        ("caption", np.array([-1]), r"'bad': caption has id -1, expected \[0, 300\)"),
        ("caption", np.zeros((2, 2), dtype=int), r"'bad': caption is int64 of shape \(2, 2\)"),
        ("rgb", np.zeros((8, 8, 3), dtype=np.uint8), r"'bad': rgb is uint8 of shape \(8, 8, 3\).*\(8, 12, 3\)"),
        ("rgb", np.zeros((8, 12, 3)), "'bad': rgb is float64"),
        ("t5", np.zeros((2, 4), dtype=np.float32), r"'bad': t5 is float32 of shape \(2, 4\).*floats \(None, 5\)"),
    ],
)
def test_wrong_samples_are_named(name: str, value: np.ndarray, message: str) -> None:
    data = samples(20)
    data[13] |= {"__key__": "bad", name: value}
    config = MaskingConfig(20, 20, [Component(input={name: 1}, target={"tok": 1, "caption": 1})])
    with pytest.raises(ValueError, match=message):
        Masker(SPACE, config)(data, draws(20))


def test_too_few_sentinels() -> None:
    space = TokenSpace({"text": Modality("text", vocab_size=300, max_tokens=20, sentinels=11)})
    config = MaskingConfig(9, 9, [Component(input={"text": 1}, target={"text": 1})])
    with pytest.raises(ValueError, match=r"text has room for 11 sentinels from id 4 on, but .* can need 12"):
        Masker(space, config)


def test_budgets_of_absent_modalities_go_to_the_others() -> None:
    """Filled slots of samples that have only some modalities are those of a table that has only these."""
    names = ["tok", "small"]
    config = MaskingConfig(8, 6, [Component(input={"others": 1}, target={"others": 1})])
    few = [{name: sample[name] for name in ("__key__", *names)} for sample in samples(3000)]
    batch = Masker(SPACE, config)(few, draws(3000))
    alone = Masker(SPACE.subset(names), config)(few, draws(3000))
    assert set(batch.mod.unique().tolist()) - {-1} == {SPACE.number[name] for name in names}
    assert abs(batch.input_tokens - alone.input_tokens) < 0.02 * 3000 * 8
    assert abs(batch.target_tokens - alone.target_tokens) < 0.02 * 3000 * 6
    for name in names:
        shares = [float((each.mod == each_space.number[name]).sum()) / each.input_tokens
                  for each, each_space in ((batch, SPACE), (alone, SPACE.subset(names)))]  # fmt: skip
        assert abs(shares[0] - shares[1]) < 0.04


def test_components_that_give_what_is_absent_are_left_out() -> None:
    parts = [Component(input={"rgb": 1}, target={"others": 1}), Component(input={"tok": 1}, target={"small": 1})]
    few = [{name: value for name, value in sample.items() if name != "rgb"} for sample in samples(100)]
    batch = Masker(SPACE, MaskingConfig(8, 2, parts))(few, draws(100))
    assert (batch.mod == SPACE.number["tok"]).sum(1).tolist() == [8] * 100
    nothing = [parts[0], Component(target={"small": 1})]  # a component that gives nothing by intention stays
    batch = Masker(SPACE, MaskingConfig(8, 2, nothing))(few, draws(100))
    assert not batch.input_tokens and set(batch.target_mod.unique().tolist()) == {SPACE.number["small"]}
    only_rgb = Masker(SPACE, MaskingConfig(8, 2, parts[:1]))(few, draws(100))  # nothing else to choose
    assert not only_rgb.input_tokens and only_rgb.target_tokens > 50


def test_mixed_masker_masks_each_data_set_in_its_way() -> None:
    text = MaskingConfig(12, 30, [Component(input={"caption": 1}, target={"caption": 1})], seed=5)
    maskers = [Masker(SPACE, EVEN), Masker(SPACE, text)]
    whole = samples(30)
    mixture = [
        {"__key__": each["__key__"], "caption": each["caption"]} if number % 3 == 1 else each
        for number, each in enumerate(whole)
    ]
    places = [(2, 100 + number if number % 3 == 1 else number) for number in range(30)]
    batch = MixedMasker(maskers, [100, 200])(mixture, places)
    assert batch.ids.shape == (30, 20) and batch.target.shape == (30, 30)
    assert batch.keys == tuple(each["__key__"] for each in whole)
    for row, (sample, draw) in enumerate(zip(mixture, places, strict=True)):
        alone = maskers[row % 3 == 1]([sample], [draw])
        for field in ("ids", "pos", "mod"):
            width = getattr(alone, field).shape[1]
            assert torch.equal(getattr(batch, field)[row, :width], getattr(alone, field)[0])
        for field in ("target_in", "target", "target_pos", "target_mod"):
            width = getattr(alone, field).shape[1]
            assert torch.equal(getattr(batch, field)[row, :width], getattr(alone, field)[0])
        assert (batch.mod[row, alone.mod.shape[1] :] == -1).all()
        for name in alone.rows:
            mine = batch.slots[name] // 20 == row
            assert torch.equal(batch.rows[name][mine], alone.rows[name])
