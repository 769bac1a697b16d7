"""What composing models is worth, on a world made up from a seed: `python tools/composition.py`.

A base learns, from descriptions in three anchor modalities, to tell an attribute of a thing and the value that two or
three things share. Three branches each learn one modality more, each from a seed of its own: an attribute of a thing,
translations to and from an anchor, and what a thing shares with one that an anchor describes. No branch ever sees two
modalities that were added. Then they are composed by every method, and answer questions about things in several.

Each modality describes a thing in a language of its own, as a set of values in any order. Of a question about two
things A and B, one option is a value of both, one of A, one of B and one of neither, so A alone leaves two of four. Of
three things, one is of all and one of each pair: one thing leaves three of four, and two leave two. Of a question about
one thing, all options are values of the attribute.

One in eight combinations of values is held out: no training sample has a thing with one, and things of test questions
about one thing have no other.

Protocol, fixed before any of the reported seeds was measured: worlds, data and weights are drawn by the seed; settings
were chosen on seed 100, which is not reported. History: on seed 100 the base had 3000 steps and a branch 800 at first;
its accuracies on the split `test` of that seed, which stopped rising before, made it 2000 and 600. Each branch got a
seed of its own, and learns, too, what an added thing and one that an anchor describes share: both make the task easier
than a pilot whose branches only translated. Combinations were held out, and questions about an added and an anchor
thing added, after a review, before measuring.

Weights are uniform, but of `damc searched`, whose weights have the lowest loss a token on 256 joint samples of the
split `val`; questions are of the split `test`, 1000 of each kind. `task_arithmetic` and `ties` have their authors'
settings; `dare` leaves out half and takes a mean, which is ours. `joint` is the base fine-tuned on the data of all
branches and on joint questions: the upper bound. `lora` adapts all attention and MLP layers; `damc` adapts the
projection of the context as well, so a difference of theirs has this in it. `kept` is the accuracy on single things
after composition over the branch's own before, of each branch, their mean, and the least of them. Intervals are
Student's t over seeds, of means and of paired differences; the spread is the sample's standard deviation. What was made
with other settings is refused; what is there is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

from fourm import cli, runtime
from fourm.composition.benchmark import Question, accuracies, answer, measure
from fourm.composition.interference import draw, interference
from fourm.composition.merge import MergeConfig, compose, open_branch
from fourm.composition.search import draw as draw_curve
from fourm.composition.search import search
from fourm.data.rewrite import write_durably
from fourm.data.shards import write_shards
from fourm.masking.budgets import Component, MaskingConfig
from fourm.model.fourm import FourM
from fourm.verbs.compose import SearchConfig

Models = Mapping[str, FourM]
METHODS = ("naive", "factor_mean", "convert", "task_arithmetic", "ties", "dare")
COMPARED = ("added, one", "kept", "kept, least", "added and anchor", "two added", "three added", "anchors, shared")
# What is compared with what, seed by seed.
DIFFERENCES = (
    ("naive", "factor_mean"), ("damc", "naive"), ("damc", "task_arithmetic"), ("damc", "ties"), ("damc", "convert"),
    ("convert", "naive"), ("damc searched", "damc"), ("joint", "damc"), ("damc", "base"),
)  # fmt: skip
LORA = {"rank": 8, "targets": "all"}
MODEL = {"size": "nano", "dim": 64, "encoder_depth": 3, "decoder_depth": 2, "heads": 4}
COMMON = {
    "model": MODEL, "precision": "fp32", "batch_size": 128, "eval_every": 1000, "save_every": 0, "log_every": 100,
    "val_batches": 4, "spike_sigma": 0,
}  # fmt: skip
BASE = {"steps": 2000, "optim": {"lr": 2e-3, "schedule": "wsd", "warmup": 100, "decay": 0.5}}
BRANCH = {"steps": 600, "optim": {"lr": 3e-3, "schedule": "wsd", "warmup": 50, "decay": 0.5, "weight_decay": 0.0}}
SAMPLES = {"base": {1: 4000, 2: 8000, 3: 12000}, "branch": 8000, "joint": 8000, "val": 512, "questions": 1000}
HELD_OUT = 8  # one combination of values in so many


@dataclass(frozen=True, kw_only=True)
class World:
    """Things, and languages to describe them in.

    Args:
        attributes: Of a thing, at least 4.
        values: Of an attribute.
        anchors: Modalities of the base, which share a language of one id a value.
        added: Modalities of the branches, each with a language of its own, two ids a value.
        synonyms: Ways to say a value in such a language.
        noise: Chance of an id of it to be any other one.
        seed: Of languages and samples.
    """

    attributes: int = 4
    values: int = 6
    anchors: tuple[str, ...] = ("left", "middle", "right")
    added: tuple[str, ...] = ("sound", "touch", "smell")
    synonyms: int = 2
    noise: float = 0.02
    seed: int = 0

    VOCABULARY = 64  # ids of an added modality

    def table(self, added: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Rows of the base's modalities and some of those that are added, as `TokenSpace.from_dict` reads them."""
        ids = self.attributes * self.values
        rows: dict[str, dict[str, Any]] = {
            name: {"kind": "grid", "vocab_size": ids, "grid": [1, self.attributes]} for name in self.anchors
        }
        rows["question"] = {"kind": "grid", "vocab_size": self.attributes + 1, "grid": [1, 1], "output": False}
        rows["answer"] = {"kind": "grid", "vocab_size": ids, "grid": [1, 1]}
        for name in added:
            rows[name] = {"kind": "grid", "vocab_size": self.VOCABULARY, "grid": [1, 2 * self.attributes]}
        return rows

    def things(self, count: int, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws values (count, number, attributes) of things that share one value, two of three each another one.

        Returns:
            The values; (count, attributes) attributes in random order: the first is shared by all, the next by each
            pair of three, in the order of `itertools.combinations`; and (count, attributes) values of no thing.
        """
        shape = (count, self.attributes)
        drawn = rng.permuted(np.broadcast_to(np.arange(self.values), (*shape, self.values)), axis=2)
        found = drawn[..., :number].transpose(0, 2, 1).copy()
        order = rng.permuted(np.broadcast_to(np.arange(self.attributes), shape), axis=1)
        row = np.arange(count)
        found[row, :, order[:, 0]] = found[row, :1, order[:, 0]]
        if number == 3:
            for place, (a, b) in enumerate(itertools.combinations(range(3), 2), 1):
                found[row, b, order[:, place]] = found[row, a, order[:, place]]
        return found, order, drawn[..., number]

    def held_out(self, values: np.ndarray) -> np.ndarray:
        """(..., attributes) -> (...) bool: which combinations of values no training sample shows."""
        shape = (self.values,) * self.attributes
        place = np.random.default_rng([self.seed, 1000]).permutation(self.values**self.attributes)
        return place[np.ravel_multi_index(tuple(np.moveaxis(values, -1, 0)), shape)] % HELD_OUT == 0

    def things_of(
        self, count: int, number: int, rng: np.random.Generator, split: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `things`: none that is held out for `train` and `val`, only such for `test` of one thing."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        while sum(len(part[0]) for part in parts) < count:
            drawn = self.things(count, number, rng)
            held_out = self.held_out(drawn[0])
            chosen = ~held_out.any(1) if split != "test" else held_out[:, 0] if number == 1 else np.full(count, True)
            parts.append((drawn[0][chosen], drawn[1][chosen], drawn[2][chosen]))
        values, order, other = (np.concatenate(each)[:count] for each in zip(*parts, strict=True))
        return values, order, other

    def say(self, name: str, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(count, attributes) ids of values -> (count, length) ids of a modality."""
        if name in self.anchors:
            return ids
        words = np.random.default_rng([self.seed, self.added.index(name)])
        pairs = words.permutation(self.VOCABULARY**2)[: self.attributes * self.values * self.synonyms]
        chosen = pairs[ids * self.synonyms + rng.integers(0, self.synonyms, ids.shape)]
        said = np.stack([chosen // self.VOCABULARY, chosen % self.VOCABULARY], 2).reshape(len(ids), -1)
        return np.where(rng.random(said.shape) < self.noise, rng.integers(0, self.VOCABULARY, said.shape), said)

    def questions(self, names: Sequence[str], count: int, split: str) -> list[Question]:
        """Questions about one thing, or what two or three of them share, each described in one of these modalities."""
        rng = np.random.default_rng([self.seed, *f"{split} {' '.join(names)}".encode()])
        values, order, other = self.things_of(count, len(names), rng, split)
        row, ids = np.arange(count), values + self.values * np.arange(self.attributes)
        if len(names) == 1:
            asked = order[:, 0]
            wrong = rng.permuted(np.broadcast_to(np.arange(1, self.values), (count, self.values - 1)), axis=1)[:, :3]
            right = values[row, 0, asked]
            options = (right[:, None] + np.pad(wrong, ((0, 0), (1, 0)))) % self.values + self.values * asked[:, None]
        else:
            asked = np.full(count, self.attributes)
            first, *more = order.T[:4]
            if len(names) == 2:
                rest = [ids[row, 0, more[0]], ids[row, 1, more[1]], (other + ids[:, 0] - values[:, 0])[row, more[2]]]
            else:
                pairs = itertools.combinations(range(3), 2)
                rest = [ids[row, a, attribute] for (a, _), attribute in zip(pairs, more, strict=True)]
            options = np.stack([ids[row, 0, first], *rest], 1)
        places = rng.permuted(np.broadcast_to(np.arange(4), (count, 4)), axis=1)
        shown = np.take_along_axis(options, places, 1)
        mixed = rng.permuted(ids, axis=2) if len(names) > 1 else rng.permuted(ids[:, 0], axis=1)[:, None]
        said = {name: self.say(name, mixed[:, thing], rng) for thing, name in enumerate(names)}
        return [
            {
                "kind": " ".join(names),
                "given": {name: each[i].tolist() for name, each in said.items()} | {"question": [int(asked[i])]},
                "target": "answer",
                "options": shown[i][:, None].tolist(),
                "answer": int(places[i].argmin()),
            }
            for i in range(count)
        ]

    def translations(self, name: str, count: int, split: str) -> list[dict[str, np.ndarray]]:
        """The same things in an added modality and in the first anchor, value by value."""
        rng = np.random.default_rng([self.seed, *f"{split} {name} {self.anchors[0]}".encode()])
        ids = self.things_of(count, 1, rng, split)[0][:, 0] + self.values * np.arange(self.attributes)
        ids = rng.permuted(ids, axis=1)
        said = zip(self.say(name, ids, rng), ids, strict=True)
        return [{name: there, self.anchors[0]: here} for there, here in said]


def training_samples(questions: Sequence[Question]) -> list[dict[str, np.ndarray]]:
    """Questions with their right answers, as a model is trained on them."""
    return [
        {name: np.array(ids) for name, ids in each["given"].items()}
        | {each["target"]: np.array(each["options"][each["answer"]])}
        for each in questions
    ]


def write_samples(root: Path, split: str, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Token shards that `fourm train` reads; nothing where they are, and never a part of them."""
    if (root / split).is_dir():
        return
    aside = root / f"{split}.part"
    shutil.rmtree(aside, ignore_errors=True)
    keyed = (
        {"__key__": f"{i:06}"} | {n: v.astype(np.int16) for n, v in each.items()} for i, each in enumerate(samples)
    )
    write_shards(root, aside.name, keyed, 4096)
    aside.rename(root / split)


def masking(*ways: tuple[Sequence[str], Sequence[str]]) -> dict[str, Any]:
    """Some modalities wholly given, others wholly asked."""
    mixture = [{"input": dict.fromkeys(given, 1000), "target": dict.fromkeys(asked, 1000)} for given, asked in ways]
    return {"input_tokens": 64, "target_tokens": 64, "mixture": mixture}


def asking(world: World, root: Path, names: Sequence[str], count: int, weight: float = 1) -> dict[str, Any]:
    """A data set of questions."""
    root = root / "-".join(names)
    for split, number in (("train", count), ("val", SAMPLES["val"])):
        write_samples(root, split, training_samples(world.questions(names, number, split)))
    shown = [*names, "question"]
    return {"path": str(root), "weight": weight, "modalities": [*shown, "answer"],
            "masking": masking((shown, ["answer"]))}  # fmt: skip


def translating(world: World, root: Path, name: str, count: int, weight: float = 1) -> dict[str, Any]:
    """A data set of things in an added modality and in the first anchor."""
    root, anchor = root / f"{name}-to-{world.anchors[0]}", world.anchors[0]
    for split, number in (("train", count), ("val", SAMPLES["val"])):
        write_samples(root, split, world.translations(name, number, split))
    return {"path": str(root), "weight": weight, "modalities": [name, anchor],
            "masking": masking(([name], [anchor]), ([anchor], [name]))}  # fmt: skip


def train(
    folder: Path, name: str, added: Sequence[str], world: World, data: Sequence[Mapping[str, Any]], **more: Any
) -> Path:
    """One run of `fourm train`, unless it is there."""
    run = folder / name
    if not (run / "model" / "model.safetensors").is_file():
        table = folder / f"{name}.modalities.yaml"
        table.write_text(yaml.safe_dump(world.table(added), sort_keys=False))
        config = COMMON | {
            "data": list(data),
            "modalities": str(table),
            "folder": str(run),
            "masking": masking(([], ["answer"])),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | more, sort_keys=False))
        cli.main(["train", "--config", str(folder / f"{name}.yaml")])
    return run


def runs(folder: Path, seed: int) -> tuple[World, dict[str, Path]]:
    """All models of a seed."""
    world, root = World(seed=seed), folder / "data"
    anchors, added = world.anchors, world.added
    count = SAMPLES["base"]
    base_data = [asking(world, root, [name], count[1]) for name in anchors]
    base_data += [asking(world, root, pair, count[2], 2) for pair in itertools.combinations(anchors, 2)]
    base_data += [asking(world, root, anchors, count[3], 4)]
    found = {"base": train(folder, "base", [], world, base_data, seed=seed, **BASE)}
    start: dict[str, Any] = {"init": str(found["base"])}
    own = {
        name: [
            asking(world, root, [name], SAMPLES["branch"], 3),
            translating(world, root, name, SAMPLES["branch"]),
            *(asking(world, root, [name, anchor], SAMPLES["branch"]) for anchor in anchors),
        ]
        for name in added
    }
    for number, name in enumerate(added):
        start["seed"] = 1000 + 10 * seed + number
        found[f"lora {name}"] = train(folder, f"lora-{name}", [name], world, own[name], lora=LORA, **start, **BRANCH)
        decoupled = LORA | {"decoupled": [name]}
        found[f"damc {name}"] = train(
            folder, f"damc-{name}", [name], world, own[name], lora=decoupled, **start, **BRANCH
        )
    start["seed"] = seed
    joint = [asking(world, root, names, SAMPLES["joint"], 3) for names in [*itertools.combinations(added, 2), added]]
    longer = BRANCH | {"steps": 3 * BRANCH["steps"]}
    rank = LORA | {"rank": 3 * LORA["rank"]}
    data = [*itertools.chain(*own.values()), *joint]
    found["joint"] = train(folder, "joint", added, world, data, lora=rank, **start, **longer)
    return world, found


def settle(folder: Path, world: World) -> None:
    """Writes down what a folder is made with.

    Raises:
        ValueError: It was made with something else.
    """
    settings = {"world": asdict(world), "model": MODEL, "lora": LORA, "common": COMMON, "base": BASE, "branch": BRANCH,
                "samples": SAMPLES, "held out": HELD_OUT}  # fmt: skip
    settings, record = json.loads(json.dumps(settings)), folder / "settings.json"
    if folder.is_dir() and any(folder.iterdir()):
        made = json.loads(record.read_text()) if record.is_file() else {}
        other = sorted(key for key in settings if made.get(key) != settings[key])
        if other:
            raise ValueError(f"{folder} was made with another {', '.join(other)}; use another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(record, json.dumps(settings, indent=1))


def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Figures of all methods for one seed."""
    settle(folder, World(seed=seed))
    record = folder / "figures.json"
    if record.is_file():
        return json.loads(record.read_text())
    world, found = runs(folder, seed)
    anchors, added = world.anchors, world.added
    kinds = [[name] for name in (*anchors, *added)]
    for group in (anchors, added):
        kinds += [*map(list, itertools.combinations(group, 2)), list(group)]
    kinds += map(list, itertools.product(added, anchors))
    questions = [each for names in kinds for each in world.questions(names, SAMPLES["questions"], "test")]
    base = FourM.from_pretrained(found["base"] / "model")
    plain = {name: open_branch(found[f"lora {name}"], base, "convert") for name in added}
    decoupled = {name: open_branch(found[f"damc {name}"], base, "damc") for name in added}
    models = {"base": base, "joint": FourM.from_pretrained(found["joint"] / "model")}
    models |= {f"lora {name}": model for name, model in plain.items()}
    models |= {f"damc {name}": model for name, model in decoupled.items()}
    models |= {method: compose(base, plain, MergeConfig(method=method))[0] for method in METHODS}  # type: ignore[arg-type]
    damc = MergeConfig(method="damc")
    models["damc"] = compose(base, decoupled, damc)[0]
    shown = [*added, "question"]
    component = Component(input=dict.fromkeys(shown, 1000), target={"answer": 1000})
    joint = SearchConfig(
        data=str(folder / "data" / "-".join(added) / "val"),
        modalities=[*shown, "answer"],
        masking=MaskingConfig(64, 64, [component]),
    )
    loss = joint.held_out(models["damc"])
    weights, curve = search(lambda tried: loss(compose(base, decoupled, damc, tried)[0], 0)["loss"], added)
    models["damc searched"] = compose(base, decoupled, damc, weights)[0]
    draw_curve(curve, folder / "weights.png")
    lines = "".join(json.dumps(each) + "\n" for each in questions)
    (folder / "questions.jsonl").write_text(lines)
    figures = {
        "accuracy": {name: accuracies(measure(model, questions)) for name, model in models.items()},
        "search": {"weights": weights, **curve},
        "interference": {"lora": interference(base, plain), "damc": interference(base, decoupled)},
        "cost": cost(base, plain, decoupled, world),
    }
    draw(figures["interference"]["lora"], folder / "interference.png")
    write_durably(record, json.dumps(figures, indent=1))
    return figures


@torch.inference_mode()
def cost(base: FourM, plain: Models, decoupled: Models, world: World) -> list[dict[str, Any]]:
    """Parameters, and CPU time of 512 questions about an anchor, by the number of branches that were composed."""
    questions = world.questions(world.anchors[:1], 512, "test")
    rows = []
    for number in range(len(plain) + 1):
        row: dict[str, Any] = {"branches": number}
        for method, branches in (("naive", plain), ("damc", decoupled)):
            chosen = dict(itertools.islice(branches.items(), number))
            model = compose(base, chosen, MergeConfig(method=method))[0] if number else base  # type: ignore[arg-type]
            times = []
            for _ in range(9):
                began = time.process_time()
                answer(model, questions)
                times.append(time.process_time() - began)
            row[method] = {"parameters": sum(p.numel() for p in model.parameters()), "seconds": float(np.median(times))}
        rows.append(row)
    return rows


def of_seed(figures: Mapping[str, Any], world: World) -> dict[str, dict[str, float]]:
    """By model: its ability on each group of questions, in percent of rightly answered ones."""
    found = {}
    own = {name: figures["accuracy"][f"lora {name}"][name]["all"]["accuracy"] for name in world.added}
    own_damc = {name: figures["accuracy"][f"damc {name}"][name]["all"]["accuracy"] for name in world.added}
    pairs = list(itertools.combinations(world.added, 2))
    for model, kinds in figures["accuracy"].items():

        def mean(names: Sequence[Sequence[str]], *views: str, kinds: Any = kinds) -> float:
            cells = [kinds.get(" ".join(each), {}).get(view) for each in names for view in views]
            return float(np.mean([cell["accuracy"] for cell in cells if cell] or [np.nan]))

        row = {"anchor, one": mean([[name] for name in world.anchors], "all")}
        row["anchors, shared"] = mean([*itertools.combinations(world.anchors, 2), world.anchors], "all")
        row["added, one"] = mean([[name] for name in world.added], "all")
        row["added and anchor"] = mean([*itertools.product(world.added, world.anchors)], "all")
        row["two added"], row["three added"] = mean(pairs, "all"), mean([world.added], "all")
        for label, names in (("two", pairs), ("three", [world.added])):
            row[f"{label} added, one shown"] = mean(names, *(f"only {name}" for name in world.added))
            row[f"{label} added, none shown"] = mean(names, "nothing")
        before = own_damc if model.startswith("damc") else own
        own_kinds = [name for name in world.added if "all" in kinds.get(name, {})]
        kept = {f"kept, {name}": 100 * kinds[name]["all"]["accuracy"] / before[name] for name in own_kinds}
        if kept:
            row |= {"kept": float(np.mean(list(kept.values()))), "kept, least": min(kept.values())} | kept
        found[model] = {column: value for column, value in row.items() if np.isfinite(value)}
    return found


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, the sample's standard deviation, the mean's 95 % t interval (none of one seed), the values."""
    mean, found = float(np.mean(values)), {"std": 0.0}
    if len(values) > 1:
        found["std"] = float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * found["std"] / len(values) ** 0.5
        found |= {"low": mean - half, "high": mean + half}
    return {"mean": mean, **found, "seeds": list(values)}


def main() -> None:
    """Trains, composes, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/compose"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    seeds = {seed: one_seed(options.folder / f"seed-{seed}", seed) for seed in options.seeds}
    tables = [of_seed(figures, World(seed=seed)) for seed, figures in seeds.items()]
    summary = {
        model: {column: interval([table[model][column] for table in tables]) for column in row}
        for model, row in tables[0].items()
    }
    single = [max(table[f"{kind} {name}"]["two added, one shown"] for kind in ("lora", "damc") for name in World.added)
              for table in tables]  # fmt: skip
    differences = {
        f"{a} less {b}: {column}": interval([table[a][column] - table[b][column] for table in tables])
        for a, b in DIFFERENCES
        for column in COMPARED
        if column in tables[0][a] and column in tables[0][b]
    }
    for model in ("naive", "damc"):
        gains = [table[model]["two added"] - best for table, best in zip(tables, single, strict=True)]
        differences[f"{model} less the best single branch: two added"] = interval(gains)
    metrics = {"protocol": " ".join(str(__doc__).split()), "summary": summary, "differences": differences,
               "weights": {seed: each["search"]["weights"] for seed, each in seeds.items()},
               "cost": {seed: each["cost"] for seed, each in seeds.items()},
               "environment": runtime.environment()}  # fmt: skip
    write_durably(options.folder / "metrics.json", json.dumps(metrics, indent=1))
    columns = list(summary["damc"])
    print(f"{'':16}" + "".join(f"{column:>24}" for column in columns))
    for model, row in summary.items():
        cells = (f"{row[c]['mean']:.1f} ± {row[c]['std']:.1f}" if c in row else "" for c in columns)
        print(f"{model:16}" + "".join(f"{cell:>24}" for cell in cells))
    for name, each in differences.items():
        ends = f" ({each['low']:+.1f} to {each['high']:+.1f})" if "low" in each else ""
        print(f"{name}: {each['mean']:+.1f}{ends}")
    for row in next(iter(seeds.values()))["cost"]:
        print(row)
    print(options.folder / "metrics.json")


if __name__ == "__main__":
    main()
