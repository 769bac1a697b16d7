"""Questions whose answer needs several modalities together, in the spirit of MCUB (Chen et al. 2024).

A question is one line of JSON: `kind`, `given` (ids by modality), `options` (a list of ids by modality, all of the same
modalities) and `answer` (which of them is right). `tools/composition.py` writes some about tiles of the earth.
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
    """Questions of a file, one a line; those of one kind give and ask the same modalities, and have as many options.

    Raises:
        ValueError: A line that is no question, or unlike the first of its kind; says which.
    """
    found: list[Question] = []
    kinds: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            question = {key: json.loads(line)[key] for key in ("kind", "given", "options", "answer")}
            count, given = len(question["options"]), ", ".join(sorted(question["given"].keys()))
            asked = " or ".join(sorted({", ".join(sorted(option.keys())) for option in question["options"]}))
            shape = f"{count} options of {asked} with {given or 'nothing'} given"
            first, known = kinds.setdefault(question["kind"], (number, shape))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a question: {error!r}") from error
        if " or " in asked:
            raise ValueError(f"{path}, line {number}: options of different modalities: {asked}")
        if question["answer"] not in range(count):
            raise ValueError(f"{path}, line {number}: answer is {question['answer']}, of {count} options from 0 on")
        if shape != known:
            raise ValueError(f"{path}, line {number}: {shape}, but line {first} of the same kind has {known}")
        found.append(question)
    return found


@torch.inference_mode()
def option_nats(model: FourM, questions: Sequence[Question], batch_size: int = 256) -> np.ndarray:
    """(Q, options) how unlikely the model finds each option; questions of one kind, with the same modalities."""
    space, device, found = model.space, next(model.parameters()).device, []
    targets = list(questions[0]["options"][0])
    masked = all(space[name].grid for name in targets)  # then all options decode alike
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        given = [{name: np.array(ids) for name, ids in each["given"].items()} for each in chunk]
        context = model.encode(transfer_batch(space, given, list(given[0]), []).to(device))
        decoded, nats = None, []
        for number in range(len(chunk[0]["options"])):
            options = [{name: np.array(ids) for name, ids in each["options"][number].items()} for each in chunk]
            asked = transfer_batch(space, options, [], targets).to(device)
            if decoded is None or not masked:
                decoded = model.decode(asked, context)
            nats.append(model.token_nll(asked, decoded).sum(1))
        found.append(torch.stack(nats, 1).cpu().numpy())
    return np.concatenate(found)


def answer(model: FourM, questions: Sequence[Question], batch_size: int = 256) -> np.ndarray:
    """(Q,) which option the model itself finds most likely; questions of one kind, with the same modalities."""
    return option_nats(model, questions, batch_size).argmin(1)


def measure(model: FourM, questions: Sequence[Question]) -> dict[str, dict[str, np.ndarray]]:
    """Which questions a model answers rightly, (Q,) bool by kind and by what is given.

    `all` is given where the model knows all of it; `only <modalities>` shows fewer than there are, `nothing` none: what
    a question gives away. Kinds that ask for what the model cannot predict are left out.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind, group in itertools.groupby(sorted(questions, key=lambda each: each["kind"]), lambda each: each["kind"]):
        asked = list(group)
        right = np.array([each["answer"] for each in asked])
        shown, inputs = list(asked[0]["given"]), set(model.space.inputs())
        if set(asked[0]["options"][0]) - set(model.space.outputs()):
            continue
        for names in itertools.chain.from_iterable(itertools.combinations(shown, n) for n in range(len(shown) + 1)):
            view = "all" if len(names) == len(shown) else f"only {', '.join(names)}" if names else "nothing"
            if set(names) <= inputs:
                cut = [each | {"given": {name: each["given"][name] for name in names}} for each in asked]
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
