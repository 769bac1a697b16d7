"""Against 4M's own sampler: same made-up weights, same inputs, same ids (see the fixtures' README)."""

import json
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fourm.generation import sampler as sampler_module
from fourm.generation import sampling
from fourm.generation.plan import Step
from fourm.generation.sampler import Given, Sampler, merge
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import FourM, FourMConfig

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/generation"
pytestmark = pytest.mark.skipif(not FIXTURES.exists(), reason="fixtures of the reference are not here")
EOS, FIRST = 3, 5  # [S_1]
CASES = [
    "maskgit_cosine_caption2clip_b3",
    "maskgit_linear_caption2clip_cfg3_b3",
    "roar_onestep_rgb2depth_b3",
    "roar_8steps_caption2rgb_cfg3_b3",
    "autoregressive_rgb2caption_cfg1_b3",
    "autoregressive_rgb2caption_cfg3_b3",
    "autoregressive_caption_infill_b1",
    "chained_det2caption2clip2rgb_b3",
    "multi_guided_maskgit_clip_then_rgb_b3",
]


def normal(name, shape, mean=0.0, std=1.0):
    rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean))


def modality(name):
    if name.startswith("rgb"):
        return Modality("patches", grid=(14, 14), patch_size=16)
    if name.startswith("tok_"):
        return Modality("grid", vocab_size=16384 if "rgb" in name else 8192, grid=(14, 14))
    return Modality("text", vocab_size=30000, max_tokens=256)


@cache
def fixture():
    described = json.loads((FIXTURES / "gen_mod7.json").read_text())
    weights = {}
    for key, shape, _, rule, *numbers in described["weights"]:
        if rule == "normal":
            weights[key] = normal(key, shape, *numbers)
    for change in described["weight_overrides"]:
        weights[change["key"]][change["row"]] *= change["scale"]
    config = described["config"]
    space = TokenSpace({name: modality(name) for name in config["domains_in"]})
    model = FourM(
        FourMConfig(dim=48, heads=4, encoder_depth=2, decoder_depth=2, tied_head=False, share_modality_embeddings=True),
        space,
    ).eval()
    state = model.state_dict() | {name: w for name, w in weights.items() if "_embeddings." not in name}
    state["mask_token"] = weights["mask_token"].flatten()
    modalities = torch.stack([weights[f"encoder_embeddings.{name}.mod_emb"].flatten() for name in space.names])
    for side in ("encoder", "decoder"):
        state[f"{side}_embeddings.modality"] = modalities
        tables = [weights.get(f"{side}_embeddings.{name}.token_emb.weight") for name in space.vocabularies]
        state[f"{side}_embeddings.tokens.weight"] = torch.cat(tables)
    state["to_logits.weight"] = torch.cat(
        [weights[f"decoder_embeddings.{name}.to_logits.weight"] for name in space.vocabularies]
    )
    state["encoder_embeddings.project.rgb@224.weight"] = weights["encoder_embeddings.rgb@224.proj.weight"]
    model.load_state_dict(state)
    return model, described["cases"], np.load(FIXTURES / "gen_mod7.npz", allow_pickle=False)


def given(space, inputs, arrays):
    """What the fixture's dictionary shows the encoder; targets are left out unless it shows part of them."""
    known = {}
    for name, entry in inputs.items():
        visible = ~torch.from_numpy(arrays[entry["input_mask"]["npz"]].astype(bool))
        if space[name].kind == "patches":
            images = torch.stack([normal(image, entry["tensor"]["shape_each"]) for image in entry["tensor"]["names"]])
            patches = (
                images.unflatten(3, (14, 16)).unflatten(2, (14, 16)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            )
            known[name] = Given.floats(patches, visible)
        else:
            ids = torch.from_numpy(arrays[entry["tensor"]["npz"]].astype(np.int64))
            if space[name].kind == "grid":
                known[name] = Given.grid(ids, visible)
            else:
                known[name] = Given.texts([row[seen] for row, seen in zip(ids, visible, strict=True)])
    return known


class ReferenceSampler(Sampler):
    """Where the reference's guidance rows differ: it shows `[S_1]` where a text is hidden, we show nothing."""

    def _views(self, step, state, conditions):
        views, weights = super()._views(step, state, conditions)
        if weights and not conditions:
            texts = [name for name in step.hidden if self.space[name].kind == "text" and name in state]
            sentinel = Given.texts([[FIRST]] * len(state[step.target]))
            views[0] = {**views[0], **{name: sentinel for name in texts}}
        if len(weights) > len(conditions) > 0:  # a finished target is the only thing its row sees
            views[-1] = {name: given for name, given in views[-1].items() if self.space[name].kind == "grid"}
        return views, weights


def plan_of(case, arrays, name):
    steps = []
    for number, step in enumerate(case["schedule"]):
        scale = step["cfg_scale"]
        text = step["scheme"] == "autoregressive"
        steps.append(
            Step(
                step["target_domain"],
                step["scheme"],
                arrays[f"{name}/step{number}/generated"].shape[1] if text else step["num_tokens"],
                step["temperature"],
                case["top_k"],
                case["top_p"],
                tuple(scale) if isinstance(scale, list) else (scale,),
                tuple(step["cfg_cond_domains"]),
            )
        )
    return tuple(steps)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_generates_the_same_ids(name, monkeypatch):
    model, cases, arrays = fixture()
    case = cases[name]
    plan = plan_of(case, arrays, name)
    known = given(model.space, case.get("uncond_inputs") or case["inputs"], arrays)
    targets = {step.target for step in plan}
    conditions = [
        {key: value for key, value in given(model.space, inputs, arrays).items() if key not in targets}
        for inputs in case.get("cond_inputs", ())
    ]
    if conditions:
        # There a condition's row sees nothing else, and a finished target becomes one more condition: our row that sees
        # all that is hidden from the unguided one.
        unseen = Given.texts([[]] * case["batch_size"])
        conditions = [{"caption": unseen} | condition for condition in conditions]
        finished = plan[0].target
        plan = tuple(replace(s, hidden=(finished,) if s.target != finished else ()) for s in plan)
    orders = [f"{name}/step{i}/roar_order" for i, step in enumerate(plan) if step.scheme == "roar"]
    queue = iter(orders)

    def stored_order(shape, generator):
        order = torch.from_numpy(arrays[next(queue)].astype(np.int64))
        return torch.zeros(shape).scatter(1, order, 1.0)

    monkeypatch.setattr(sampling, "draw", lambda probability, generator: probability.argmax(-1))
    monkeypatch.setattr(sampler_module, "random_order", stored_order)
    compared = 0
    for number, (step, state) in enumerate(ReferenceSampler(model).iterate(known, plan, conditions=conditions)):
        ours = state[step.target]
        if step.scheme == "autoregressive":
            written = arrays[f"{name}/step{number}/generated"].astype(int).tolist()
            for row, (text, ids) in enumerate(zip(known[step.target].lists(), written, strict=True)):
                stop = max(i for i in text if FIRST <= i < 204) + 1
                ids = ids[: next((i for i, token in enumerate(ids) if token in (EOS, stop)), len(ids)) + 1]
                assert ours.lists()[row] == merge(model.space[step.target], text, ids)
                compared += 1
        elif conditions:  # only the end is stored
            compared += 1
        else:
            positions = torch.from_numpy(arrays[f"{name}/step{number}/positions"].astype(np.int64))
            tokens = torch.from_numpy(arrays[f"{name}/step{number}/tokens"].astype(np.int64))
            assert ours.known.gather(1, positions).all()
            assert torch.equal(ours.values.gather(1, positions), tokens), f"step {number}"
            compared += positions.numel()
    assert compared and next(queue, None) is None
    for target in sorted(targets) if conditions else ():
        assert torch.equal(
            state[target].values, torch.from_numpy(arrays[f"{name}/out/{target}/tensor"].astype(np.int64))
        )
