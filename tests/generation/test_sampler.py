import dataclasses

import numpy as np
import pytest
import torch

from fourm.generation.plan import Step, Target, chain
from fourm.generation.sampler import Given, Sampler, from_samples, guide, highest, merge, pack
from fourm.generation.sampling import sample
from fourm.masking.batch import Selection, Tokens, assemble
from fourm.masking.transfer import transfer_batch
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import Context, FourM, FourMConfig

TEXT = {"vocab_size": 40, "sentinels": 10, "vocab": "text"}
SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(2, 2), patch_size=2),
        "depth": Modality("grid", vocab_size=20, grid=(3, 3)),
        "caption": Modality("text", max_tokens=12, **TEXT),
        "normal": Modality("grid", vocab_size=30, grid=(3, 4)),
        "places": Modality("text", max_tokens=9, **TEXT),
        "features": Modality("vectors", dim=5, max_tokens=4),
    }
)
EOS, SENTINEL = 3, 4  # [S_1] is SENTINEL + 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = FourM(FourMConfig(size="nano", dim=32, heads=4, encoder_depth=2, decoder_depth=2), SPACE).eval()
    for parameter in model.parameters():  # far from uniform, so that a mistake shows
        torch.nn.init.normal_(parameter, std=0.6 if parameter.ndim > 1 else 0.5)
    with torch.no_grad():  # so that texts end at different times
        model.decoder_embeddings.tokens.weight[SPACE.vocabulary("caption").start + EOS] *= 4
    return model


def ids(name, rows, seed=0):
    low, high = (0, SPACE[name].vocab_size) if SPACE[name].kind == "grid" else (14, 40)
    return torch.randint(low, high, (rows, SPACE[name].length), generator=torch.Generator().manual_seed(seed))


def samples(rows, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "__key__": str(row),
            "rgb": rng.integers(0, 256, (4, 4, 3), dtype=np.uint8),
            "depth": rng.integers(0, 20, 9),
            "caption": rng.integers(14, 40, rng.integers(1, 14)),
            "features": rng.standard_normal((rng.integers(1, 4), 5)).astype(np.float32),
        }
        for row in range(rows)
    ]


def plain_logits(model, view, target, positions, fed=None):
    """Logits (len(positions), vocab) for one row, assembled by masking; `view`: (position, id) by name."""
    lists = [
        Tokens(
            np.zeros(len(known), int), np.full(len(known), SPACE.number[name]), *np.array(known, int).reshape(-1, 2).T
        )
        for name, known in view.items()
    ]
    count = len(positions)
    asked = Tokens(
        np.zeros(count, int),
        np.full(count, SPACE.number[target]),
        np.array(positions),
        np.zeros(count, int),
        -1 if fed is None else np.array(fed),
    )
    given = Tokens.join([Tokens(*[np.zeros(0, int)] * 4), *lists])
    batch = assemble(SPACE, ("row",), Selection(given, asked, {}))
    return model.logits(model(batch)[0], target)


def listed(values):
    return list(enumerate(values))


@torch.no_grad()
def plain_maskgit(model, views, weights, known, plan):
    """One row, greedily, in plain Python: `views` hold everything but the target, `known` its {position: id}."""
    known, goal = dict(known), 0
    for step in plan:
        goal += step.count
        count = goal - len(known)
        if count <= 0:
            continue
        rest = [p for p in range(SPACE[step.target].length) if p not in known]
        rows = [plain_logits(model, {**view, step.target: sorted(known.items())}, step.target, rest) for view in views]
        logits = rows[0] + sum((w * (row - rows[0]) for w, row in zip(weights, rows[1:], strict=True)), 0 * rows[0])
        confidence, best = logits.softmax(-1).max(-1)
        for i in confidence.argsort(descending=True)[:count].tolist():
            known[rest[i]] = int(best[i])
    return [known[p] for p in sorted(known)]


@torch.no_grad()
def plain_text(model, views, weights, name, start, stop, limit):
    """One row, greedily, without any cache: the decoder runs over the whole prefix for each token."""
    fed = [start]
    while len(fed) <= limit and (len(fed) == 1 or fed[-1] not in (EOS, stop)):
        rows = [plain_logits(model, view, name, list(range(len(fed))), fed)[-1] for view in views]
        logits = rows[0] + sum((w * (row - rows[0]) for w, row in zip(weights, rows[1:], strict=True)), 0 * rows[0])
        fed.append(int(logits.argmax()))
    return fed[1:]


def clean(written):
    return [i for i in written if i != EOS and not SENTINEL <= i < SENTINEL + 10]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_maskgit_equals_plain_decoding(model, schedule, guidance):
    depth, partial = ids("depth", 3), ids("normal", 3, 1)
    known = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < torch.tensor([[0.0], [0.3], [0.7]])
    plan = chain(SPACE, [Target("normal", steps=4, schedule=schedule, temperature=0.0, guidance=guidance)])
    result = Sampler(model).generate({"depth": Given.grid(depth), "normal": Given.grid(partial, known)}, plan)["normal"]
    assert torch.equal(result[known], partial[known])
    for row in range(3):
        view = {"depth": listed(depth[row].tolist())}
        views, weights = ([view], ()) if guidance == 1 else ([{}, view], (guidance,))
        given = {p: int(partial[row, p]) for p in range(12) if known[row, p]}
        assert result[row].tolist() == plain_maskgit(model, views, weights, given, plan)


def test_conditions_are_weighted_and_may_be_negative(model):
    known = {"caption": Given.texts([[20, 21, EOS], [22, EOS]])}
    good, bad = Given.grid(ids("depth", 2)), Given.texts([[30, EOS], [31, 32, 33, EOS]])
    plan = [Step("normal", "maskgit", 6, 0.0, guidance=(2.0, -0.5))] * 2
    result = Sampler(model).generate(known, plan, conditions=[{"depth": good}, {"caption": bad}])["normal"]
    for row in range(2):
        caption = {"caption": listed(known["caption"].lists()[row])}
        first = {**caption, "depth": listed(good.values[row].tolist())}
        second = {"caption": listed(bad.lists()[row])}
        assert result[row].tolist() == plain_maskgit(model, [caption, first, second], (2.0, -0.5), {}, plan)


def test_roar_decodes_each_position_once_and_all_steps_count(model):
    known = {"depth": Given.grid(ids("depth", 2))}
    plan = chain(SPACE, [Target("normal", "roar", steps=5)])
    before = torch.zeros(2, 12, dtype=torch.bool)
    values = None
    for step, state in Sampler(model).iterate(known, plan, seed=3):
        after = state["normal"].known
        assert (after | ~before).all() and ((after & ~before).sum(1) == step.count).all()
        if values is not None:
            assert torch.equal(values[before], state["normal"].values[before])
        before, values = after, state["normal"].values
    assert before.all()


def test_one_roar_step_is_the_models_distribution(model):
    """Frequencies of single-step samples against the softmax of the model's logits."""
    depth = ids("depth", 1)
    plan = chain(SPACE, [Target("normal", "roar", steps=1)])
    drawn = Sampler(model).generate({"depth": Given.grid(depth)}, plan, num_samples=3000)["normal"]
    with torch.no_grad():
        expected = plain_logits(model, {"depth": listed(depth[0].tolist())}, "normal", list(range(12))).softmax(-1)
    frequency = torch.stack([column.bincount(minlength=30) / 3000 for column in drawn.T])
    assert (frequency - expected).abs().max() < 0.05


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_text_equals_decoding_without_cache(model, guidance):
    depth = ids("depth", 6, seed=5)
    plan = chain(SPACE, [Target("caption", temperature=0.0, guidance=guidance)])
    result = Sampler(model).generate({"depth": Given.grid(depth)}, plan)["caption"]
    lengths = set()
    for row in range(6):
        view = {"depth": listed(depth[row].tolist())}
        views, weights = ([view], ()) if guidance == 1 else ([{}, view], (guidance,))
        written = plain_text(model, views, weights, "caption", SENTINEL + 1, SENTINEL + 2, 12)
        lengths.add(len(written))
        assert result[row].tolist() == clean(written)
    assert len(lengths) > 1, "rows should stop at different times, or the test shows nothing"


def test_holes_of_a_text_are_filled(model):
    """Two holes, generated after [S_1] until [S_3]; a whole text in the same batch stays as it is."""
    texts = [[20, SENTINEL + 1, 21, SENTINEL + 2, 22, EOS], [23, 24, EOS]]
    plan = chain(SPACE, [Target("caption", temperature=0.0)])
    result = Sampler(model).generate({"caption": Given.texts(texts)}, plan)["caption"]
    view = {"caption": listed(texts[0])}
    written = plain_text(model, [view], (), "caption", SENTINEL + 1, SENTINEL + 3, 12)
    assert result[0].tolist() == clean(merge(SPACE["caption"], texts[0], written))
    assert result[1].tolist() == [23, 24]


def test_merging_by_hand():
    one, two, three = SENTINEL + 1, SENTINEL + 2, SENTINEL + 3
    row = SPACE["caption"]
    assert merge(row, [20, one, 21, two], [30, 31, two, 32, EOS]) == [20, 30, 31, 21, 32, EOS]
    assert merge(row, [20, one, 21, two], [30, three]) == [20, 30, 21]
    assert merge(row, [20, one], [30, three, 31, one, 32]) == [20, 30, 32]  # what follows [S_3] has no place
    assert merge(row, [one], []) == []
    assert merge(row, [one], [25] * 40) == [25] * 12


def test_a_chain_feeds_on_what_it_made(model):
    """The second target changes when the first one does, and not when the first is kept from the encoder."""
    first, second = ids("normal", 1, 8), ids("normal", 1, 9)
    plan = chain(SPACE, [Target("normal"), Target("caption", temperature=0.0), Target("depth", temperature=0.0)])
    sampler = Sampler(model)
    results = [sampler.generate({"normal": Given.grid(given)}, plan) for given in (first, second)]
    assert torch.equal(results[0]["normal"], first)
    assert not torch.equal(results[0]["depth"], results[1]["depth"])
    states = [state for _, state in sampler.iterate({"normal": Given.grid(first)}, plan)]
    caption = states[-1]["caption"]
    known = {"normal": Given.grid(first), "caption": caption}
    again = sampler.generate(known, chain(SPACE, [Target("depth", temperature=0.0)]))["depth"]
    assert torch.equal(again, results[0]["depth"])


def test_seeds(model):
    plan = chain(SPACE, [Target("depth", "roar", steps=3), Target("caption"), Target("normal", top_p=0.9)])
    one, same, other = (Sampler(model).generate({}, plan, seed=seed, num_samples=4) for seed in (1, 1, 2))
    for name in ("depth", "normal"):
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert [t.tolist() for t in one["caption"]] == [t.tolist() for t in same["caption"]]
    assert one["depth"].shape == (4, 9) and len(one["caption"]) == 4
    assert not torch.equal(one["depth"][0], one["depth"][1])


def test_rows_of_several_samples(model):
    given = Given.grid(ids("depth", 2))
    plan = chain(SPACE, [Target("normal", temperature=0.0, steps=2)])
    single = Sampler(model).generate({"depth": given}, plan)["normal"]
    tripled = Sampler(model).generate({"depth": given}, plan, num_samples=3)["normal"]
    assert torch.equal(tripled, single.repeat_interleave(3, 0))


def test_the_model_is_put_into_evaluation_mode(model):
    assert not Sampler(model.train()).model.training
    with pytest.raises(ValueError, match="num_samples is 0"):
        Sampler(model).generate({}, chain(SPACE, [Target("depth", steps=1)]), num_samples=0)


@pytest.mark.parametrize("names", [[], ["depth"], ["caption", "rgb"], ["rgb", "depth", "caption", "features"]])
def test_what_the_encoder_sees_is_what_masking_gives(names):
    """Same tokens as `transfer_batch`, in the same slots."""
    tokens = samples(5)
    expected = transfer_batch(SPACE, tokens, names, ["depth"] if not names else [])
    batch = pack(SPACE, [from_samples(SPACE, tokens, names)], 5, torch.device("cpu"))
    for field in ("ids", "pos", "mod"):
        assert torch.equal(getattr(batch, field), getattr(expected, field)), field
    assert batch.rows.keys() == expected.rows.keys()
    for name in batch.rows:
        assert torch.equal(batch.rows[name], expected.rows[name])
        assert torch.equal(batch.slots[name], expected.slots[name])


def test_samples_must_hold_what_is_given():
    with pytest.raises(ValueError, match="sample '1' has no rgb"):
        from_samples(SPACE, [samples(1)[0], {"__key__": "1"}], ["rgb"])


def test_rows_of_which_nothing_is_known(model):
    known = torch.tensor([[True] * 9, [False] * 9])
    given = {"depth": Given.grid(ids("depth", 2), known), "caption": Given.texts([[20, EOS], []])}
    plan = chain(SPACE, [Target("normal", temperature=0.0, steps=2, guidance=2.0)])
    together = Sampler(model).generate(given, plan)["normal"]
    assert torch.equal(together[1:], Sampler(model).generate({}, plan)["normal"])


def test_conditions_alone_say_how_many_rows_there_are(model):
    plan = [Step("normal", "maskgit", 12, 0.0, guidance=(2.0,))]
    result = Sampler(model).generate({}, plan, conditions=[{"depth": Given.grid(ids("depth", 3))}])["normal"]
    view = {"depth": listed(ids("depth", 3)[2].tolist())}
    assert result[2].tolist() == plain_maskgit(model, [{}, view], (2.0,), {}, plan)


def test_only_what_is_known_and_asked_is_embedded():
    known = torch.tensor([[True] * 3 + [False] * 9, [True] * 5 + [False] * 7])
    state = {"normal": Given.grid(ids("normal", 2), known), "depth": Given.grid(ids("depth", 2))}
    batch = pack(SPACE, [state, {}], 2, torch.device("cpu"), "normal", ~known)
    assert batch.ids.shape == (4, 14) and batch.target.shape == (4, 9)
    assert (batch.mod >= 0).sum(1).tolist() == [12, 14, 0, 0]
    assert (batch.target_mod >= 0).sum(1).tolist() == [9, 7, 9, 7]


@torch.no_grad()
def test_as_4m_samples(model):
    """Hidden and unwritten texts are `[S_1]`, hidden vectors zero; where nothing is left, there is no context."""
    theirs = FourM(dataclasses.replace(model.config, blank_hidden=True), SPACE)
    theirs.load_state_dict(model.state_dict())
    plan = [Step("normal", "maskgit", 12, 0.0, guidance=(2.0,))]
    depth, caption = Given.grid(ids("depth", 2)), Given.texts([[20, 21, EOS], [22, EOS]])
    vectors = Given.floats(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(4)))
    for hidden, shown in ((caption, Given.texts([[SENTINEL + 1]] * 2)), (vectors, Given.floats(torch.zeros(2, 1, 5)))):
        name = "caption" if hidden is caption else "features"
        ours = Sampler(theirs).generate({name: hidden}, plan)["normal"]
        assert torch.equal(ours, Sampler(model).generate({name: shown}, plan, conditions=[{name: hidden}])["normal"])
        assert not torch.equal(ours, Sampler(model).generate({name: hidden}, plan)["normal"])

    batch = pack(SPACE, [{"depth": depth}], 2, torch.device("cpu"), "normal", torch.ones(2, 12, dtype=torch.bool))
    nothing = Context(torch.zeros(0, 32), [0, 0], [0, 0], torch.zeros(0, dtype=torch.long))
    guided, free = (model.logits(model.decode(batch, c), "normal") for c in (model.encode(batch), nothing))
    assert torch.equal(Sampler(theirs).generate({"depth": depth}, plan)["normal"], (2 * guided - free).argmax(-1))

    chained = chain(SPACE, [Target("normal", temperature=0.0, steps=2), Target("caption", temperature=0.0)])
    ours = Sampler(theirs).generate({"depth": depth}, chained)
    seen = Sampler(model).generate({"depth": depth, "caption": Given.texts([[SENTINEL + 1]] * 2)}, chained)
    assert torch.equal(ours["normal"], seen["normal"])
    assert [text.tolist() for text in ours["caption"]] == [text.tolist() for text in seen["caption"]]


def test_order_and_draws_can_be_replaced(model):
    """Positions in reading order, and the second likeliest id instead of the likeliest."""
    plan = chain(SPACE, [Target("normal", "roar", steps=4)])
    sampler = Sampler(
        model,
        lambda logits, *settings: sample(logits, draw=lambda p, ids, generator: p.topk(2).indices[:, 1]),
        lambda shape, generator: torch.linspace(1, 0, shape[1]).expand(shape),
    )
    for number, (_, state) in enumerate(sampler.iterate({}, plan), start=1):
        assert state["normal"].known.tolist() == [[place < 3 * number for place in range(12)]]
        if number == 1:
            logits = plain_logits(model, {}, "normal", [0, 1, 2])
            assert state["normal"].values[0, :3].tolist() == logits.topk(2).indices[:, 1].tolist()


def test_small_pieces_by_hand():
    hidden = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 1.0]])
    assert guide(hidden, (2, -1)).tolist() == [1 + 2 * 2 - 1 * -1, 2 + 2 * 3 - 1 * -1]
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert highest(scores, torch.tensor([2, 0])).tolist() == [[False, True, True], [False] * 3]


@pytest.mark.parametrize(
    ("known", "plan", "conditions", "message"),
    [
        ({"colour": Given.grid(torch.zeros(1, 9))}, [], [], "unknown modality 'colour'"),
        ({"depth": Given.grid(torch.zeros(1, 8))}, [], [], r"given 'depth' has values \(1, 8\)"),
        ({"depth": Given.grid(torch.full((1, 9), 20))}, [], [], r"ids in \[20, 20\], expected ids in \[0, 20\)"),
        ({"caption": Given.texts([[20] * 13])}, [], [], "at most 12"),
        ({"depth": Given.grid(torch.zeros(2, 9)), "caption": Given.texts([[20]])}, [], [], "number of rows"),
        ({}, [Step("rgb", "roar", 4)], [], "'rgb' .* cannot be generated"),
        ({}, [Step("caption", "roar", 4)], [], "texts only autoregressive"),
        ({}, [Step("depth", "roar", 4)], [], "settle 4 tokens, expected 9"),
        ({"depth": Given.grid(torch.zeros(1, 9))}, [Step("normal", "roar", 12)],
         [{"normal": Given.grid(torch.zeros(1, 12))}], "is a target and part of a condition"),
        ({}, [Step("depth", "roar", 9, guidance=(1.0, 2.0))], [], "2 guidance weights for 0 conditions"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(model, known, plan, conditions, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model).generate(known, plan, conditions=conditions)
