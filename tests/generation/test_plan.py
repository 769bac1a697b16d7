import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from fourm.generation.plan import Step, Target, chain, cosine_counts, linear_counts, temperatures
from fourm.modalities import Modality, TokenSpace

SHARED = Path(__file__).parents[3] / "shared"
SCHEDULES = SHARED / "fixtures/generation/schedules.json"
needs_fixtures = pytest.mark.skipif(not SCHEDULES.exists(), reason="fixtures of the reference are not here")
SPACE = TokenSpace(
    {
        "rgb": Modality("patches", grid=(4, 4), patch_size=2),
        "depth": Modality("grid", vocab_size=20, grid=(4, 4)),
        "normal": Modality("grid", vocab_size=20, grid=(4, 4)),
        "caption": Modality("text", vocab_size=50, sentinels=10, max_tokens=12),
    }
)


def test_counts_by_hand():
    assert linear_counts(5, 12) == [3, 3, 2, 2, 2]
    assert linear_counts(9, 4) == [1, 1, 1, 1]
    assert cosine_counts(2, 10) == [5, 5]
    assert cosine_counts(8, 784) == [30, 85, 127, 150, 150, 127, 85, 30]


def test_no_step_is_ever_empty():
    for build, steps, total in itertools.product((cosine_counts, linear_counts), range(1, 60), (1, 3, 16, 64, 196)):
        counts = build(steps, total)
        assert (len(counts), sum(counts)) == (min(steps, total), total)
        assert min(counts) >= 1


@needs_fixtures
def test_counts_of_the_reference():
    units = json.loads(SCHEDULES.read_text())["units"]
    for name, build in (("cosine_schedule", cosine_counts), ("linear_schedule", linear_counts)):
        for case in units[name]:
            counts = build(case["num_steps"], case["total_tokens"])
            if min(case["result"]) > 0:
                assert counts == case["result"]
            else:  # the reference leaves steps empty or takes tokens back
                assert min(counts) > 0 and sum(counts) == case["total_tokens"]


@needs_fixtures
def test_temperatures_of_the_reference():
    units = json.loads(SCHEDULES.read_text())["units"]
    compared = 0
    for case in units["onex_temp_schedule"]:
        schedule = f"onex:{case['min_t']}:{case['power']}"
        assert temperatures(schedule, case["max_t"], case["token_schedule"]) == pytest.approx(case["result"])
        compared += 1
    for case in units["linear_temp_schedule"]:
        if min(case["token_schedule"]) > 0:
            assert temperatures("linear", case["temp"], case["token_schedule"]) == pytest.approx(case["result"])
            compared += 1
    assert compared > 10


def test_temperature_of_a_single_token():
    assert temperatures("onex:0.5:0.5", 3.0, [1]) == [0.5]  # the reference gives NaN


def reference_plan(arguments, lengths):
    """The reference's arguments through our builder."""
    rows = {}
    for name in arguments["cond_domains"]:
        rows[name] = Modality("grid", vocab_size=9, grid=(1, 1))
    targets = []
    columns = ("target_domains", "autoregression_schemes", "decoding_steps", "token_decoding_schedules", "temps")
    columns += ("temp_schedules", "cfg_scales")
    for name, scheme, steps, schedule, heat, heats, scale in zip(*(arguments[c] for c in columns), strict=True):
        text = scheme == "autoregressive"
        rows[name] = (
            Modality("text", vocab_size=9, max_tokens=4)
            if text
            else Modality("grid", vocab_size=9, grid=(1, lengths[name]))
        )
        guidance = tuple(scale) if isinstance(scale, list) else scale
        targets.append(Target(name, scheme, steps or 1, schedule or "cosine", heat, heats, guidance=guidance))
    return chain(TokenSpace(rows), targets, arguments["cond_domains"], arguments["cfg_grow_conditioning"])


@needs_fixtures
def test_chains_of_the_reference():
    compared = 0
    for case in json.loads(SCHEDULES.read_text())["chained"]:
        arguments = case["args"]
        if "int guidance" in case["label"] or "more steps than tokens, cosine" in case["label"]:
            continue  # bugs of the reference: no plan, the scale of another target, empty steps
        lengths = dict(zip(arguments["target_domains"], arguments["tokens_per_target"], strict=True))
        plan = reference_plan(arguments, lengths)
        assert len(plan) == len(case["schedule"]), case["label"]
        for step, expected in zip(plan, case["schedule"], strict=True):
            scale = expected["cfg_scale"]
            assert (step.target, step.scheme, step.count) == (
                expected["target_domain"],
                expected["scheme"],
                expected["num_tokens"],
            )
            assert step.temperature == pytest.approx(expected["temperature"])
            assert step.guidance == (tuple(scale) if isinstance(scale, list) else (scale,))
            # ours hides finished texts too
            texts = [
                n
                for n, s in zip(arguments["target_domains"], arguments["autoregression_schemes"], strict=True)
                if s == "autoregressive"
            ]
            assert [name for name in step.hidden if name not in texts] == expected["cfg_cond_domains"]
            compared += 1
    assert compared > 250


def test_chain_picks_the_scheme_by_kind():
    plan = chain(SPACE, [Target("depth", steps=2, guidance=2), Target("caption", max_tokens=5)])
    assert [(s.target, s.scheme, s.count) for s in plan] == [
        ("depth", "maskgit", 8),
        ("depth", "maskgit", 8),
        ("caption", "autoregressive", 5),
    ]
    assert plan[0].guidance == (2,)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("rgb"), "targets may be depth, normal, caption"),
        (Target("colour"), "unknown modality 'colour'"),
        (Target("caption", scheme="roar"), "'caption' .* by 'roar'"),
        (Target("depth", scheme="autoregressive"), "'depth' .* by 'autoregressive'"),
        (Target("depth", schedule="square"), "allowed are cosine, linear"),
        (Target("depth", temperature_schedule="onex"), "allowed are constant, linear, onex"),
        (Target("depth", steps=0), "expected at least 1"),
        (Target("depth", top_p=1.5), "top_p in"),
    ],
)
def test_chain_names_what_is_wrong(target, message):
    with pytest.raises(ValueError, match=message):
        chain(SPACE, [target])


def test_a_target_is_neither_repeated_nor_hidden():
    with pytest.raises(ValueError, match="twice"):
        chain(SPACE, [Target("depth"), Target("depth")])
    with pytest.raises(ValueError, match="among the hidden"):
        dataclasses.replace(Step("depth", "roar", 4), hidden=("depth",))
