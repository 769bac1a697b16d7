"""Questions whose answer needs several modalities together, in the spirit of MCUB (Chen et al. 2024).

A question is one line of JSON: `kind`, `given` (ids by modality), `target`, `options` (ids of each) and `answer` (which
of them). `tools/composition.py` makes some up.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourm.evaluation.metrics import bootstrap_ratio
from fourm.masking.transfer import transfer_batch
from fourm.model.fourm import FourM

Question = dict[str, Any]


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a file, one a line; those of one kind have one target, the same modalities and as many options.

    Raises:
        ValueError: A line that is no question, or unlike the first of its kind; says which.
    """
    found: list[Question] = []
    kinds: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            question = {key: json.loads(line)[key] for key in ("kind", "given", "target", "options", "answer")}
            count, given = len(question["options"]), ", ".join(sorted(question["given"].keys()))
            shape = f"{count} options of {question['target']} with {given or 'nothing'} given"
            first, known = kinds.setdefault(question["kind"], (number, shape))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a question: {error!r}") from error
        if question["answer"] not in range(count):
            raise ValueError(f"{path}, line {number}: answer is {question['answer']}, of {count} options from 0 on")
        if shape != known:
            raise ValueError(f"{path}, line {number}: {shape}, but line {first} of the same kind has {known}")
        found.append(question)
    return found


@torch.inference_mode()
def answer(model: FourM, questions: Sequence[Question], batch_size: int = 256) -> np.ndarray:
    """(Q,) which option the model itself finds most likely; questions of one kind, with the same modalities given."""
    space, device, chosen = model.space, next(model.parameters()).device, []
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        given = [{name: np.array(ids) for name, ids in each["given"].items()} for each in chunk]
        options = [{chunk[0]["target"]: np.array(ids)} for each in chunk for ids in each["options"]]
        context = model.encode(transfer_batch(space, given, list(given[0]), []).to(device))
        asked = transfer_batch(space, options, [], [chunk[0]["target"]]).to(device)
        rows = torch.arange(len(chunk), device=device).repeat_interleave(len(options) // len(chunk))
        nats = model.token_nll(asked, model.decode(asked, context.select(rows))).sum(1)
        chosen.append(nats.view(len(chunk), -1).argmin(1).cpu().numpy())
    return np.concatenate(chosen)


def measure(model: FourM, questions: Sequence[Question], about: str = "question") -> dict[str, dict[str, np.ndarray]]:
    """Which questions a model answers rightly, (Q,) bool by kind and by what is given.

    `all` is given where the model knows all of it; `only <modality>` shows one modality of several, `nothing` none:
    what a question gives away. A question's modality `about` is always given; kinds without it, or without the target,
    in the model are left out.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind, group in itertools.groupby(sorted(questions, key=lambda each: each["kind"]), lambda each: each["kind"]):
        asked = list(group)
        right = np.array([each["answer"] for each in asked])
        shown = [name for name in asked[0]["given"] if name != about]
        inputs = set(model.space.inputs())
        if asked[0]["target"] not in model.space.outputs() or {about} & set(asked[0]["given"]) - inputs:
            continue
        views = {"all": shown, "nothing": []} | ({f"only {name}": [name] for name in shown} if len(shown) > 1 else {})
        for view, names in views.items():
            if set(names) <= inputs:
                kept = {*names, about}
                cut = [each | {"given": {n: v for n, v in each["given"].items() if n in kept}} for each in asked]
                found.setdefault(kind, {})[view] = answer(model, cut) == right
    return found


def accuracies(measured: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy in percent and its 95 % interval over questions, by kind and view."""
    return {
        kind: {
            view: dict(
                zip(
                    ("accuracy", "low", "high"),
                    (100 * float(right.mean()), *(100 * end for end in bootstrap_ratio(right, np.ones(len(right))))),
                    strict=True,
                )
            )
            for view, right in views.items()
        }
        for kind, views in measured.items()
    }
