"""What the model makes of unseen samples, as pictures for the report.

Every panel is a `Panel` of rows of cells; nothing here knows HTML. Targets are generated on their own unless a chain is
the point: grids in random order (ROAR), texts left to right.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fourm.evaluation.matrix import aligned_samples, raw_sources, raw_targets
from fourm.evaluation.tokenizers import reconstruct
from fourm.generation.decode import decode, picture, principal_axes, words
from fourm.generation.plan import Target, chain
from fourm.generation.sampler import Given, Sampler, from_samples
from fourm.model.fourm import FourM

DRAWING = 64  # least side of a picture in pixels; larger images keep their own
LARGE_DRAWING = 224  # where words stand in it


@dataclass(frozen=True)
class Cell:
    """One value to look at: a picture as a data URI, or text.

    Attributes:
        title: What it is, shown on hovering and to screen readers.
        image: Data URI.
        text: Words, where they say more than a picture.
        given: It was given, not generated.
    """

    title: str
    image: str = ""
    text: str = ""
    given: bool = False


@dataclass(frozen=True)
class Panel:
    """A table of cells: a heading for each column and for each row."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    caption: str = ""


@dataclass(frozen=True)
class GalleryConfig:
    """How the shown samples are made.

    Args:
        samples: Test samples shown.
        steps: Steps of a grid.
        temperature: Of the draws of grids.
        text_temperature: Of the draws of texts.
        top_p: Of all draws.
        guidance: Weights of the guidance sweep; 1 is none.
        prompt: Raw modality that starts the chain and the guidance sweep.
        picture: Raw modality that is in-painted and swept.
        chain: Raw modalities in the order in which the chain makes them; those that the model lacks are left out.
        seed: Of samples and draws.
    """

    samples: int = 4
    steps: int = 16
    temperature: float = 1.0
    text_temperature: float = 0.6
    top_p: float = 0.9
    guidance: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    prompt: str = "caption"
    picture: str = "rgb"
    chain: Sequence[str] = ("water", "relief", "elevation", "rgb", "climate", "normal", "edges", "palette")
    seed: int = 0


class Gallery:
    """Makes the panels of the report.

    Args:
        model: The model.
        tokenizers: By name of the model modality.
        raw: `ShownDataset` of the test split.
        tokens: `TokenDataset` of the same samples in the same order.
        config: What is shown.

    Raises:
        ValueError: Too few samples, or the two datasets differ in their samples.
    """

    def __init__(
        self, model: FourM, tokenizers: Mapping[str, Any], raw: Any, tokens: Any, config: GalleryConfig | None = None
    ):
        self.config = config or GalleryConfig()
        self.tokenizers, self.space, self.sampler = tokenizers, model.space, Sampler(model)
        self.sources, self.targets = raw_sources(model.space), raw_targets(model.space)
        scenes, self.tokens = aligned_samples(raw, tokens, self.config.samples, self.config.seed)
        self.raw = list(map(dict, scenes))
        for name in self.image_names:
            truths = tokenizers[self.targets[name]].targets([scene[name] for scene in self.raw])
            for scene, truth in zip(self.raw, truths, strict=True):
                scene[name] = truth

    @property
    def image_names(self) -> list[str]:
        """Targets (raw names) that are grids."""
        return [name for name, target in self.targets.items() if self.space[target].kind == "grid"]

    def panels(self) -> dict[str, list[Panel]]:
        """All panels that the model's modalities allow, by the name of their section."""
        given, made = self.config.picture in self.sources, self.config.picture in self.targets
        told = made and self.config.prompt in self.sources
        return {
            "reconstructions": [self.reconstructions()],
            "any_to_any": list(self.any_to_any()),
            "from_picture": [self.from_picture()] if given else [],
            "chained": [self.chained()] if told else [],
            "guidance": [self.guidance()] if told else [],
            "in_painting": [self.in_painting()] if made else [],
        }

    def generate(
        self, known: Mapping[str, Given], targets: Sequence[str], guidance: float = 1.0, seed: int = 0
    ) -> dict[str, Sequence[Any]]:
        """Raw values of a chain of targets (raw names), one for each given row."""
        settings = self.config
        heat = {"text": settings.text_temperature}
        wanted = [
            Target(name, "autoregressive" if self.space[name].kind == "text" else "roar", settings.steps,
                   temperature=heat.get(self.space[name].kind, settings.temperature), top_p=settings.top_p,
                   guidance=guidance)
            for name in map(self.targets.__getitem__, targets)
        ]  # fmt: skip
        hidden = list(known) if guidance != 1 else None
        ids = self.sampler.generate(known, chain(self.space, wanted, hidden), seed=settings.seed + seed)
        values = decode(ids, self.tokenizers)
        return {name: values[self.targets[name]] for name in targets}

    def given(self, name: str) -> dict[str, Given]:
        """A source (raw name) of the shown samples, as the sampler wants it."""
        return from_samples(self.space, self.tokens, [self.sources[name]])

    def cell(self, name: str, value: Any, row: int, title: str, given: bool = False) -> Cell:
        """Shows a raw value; numbers are coloured by about the range of the truth of the same sample."""
        target = self.targets.get(name) or self.sources[name]
        tokenizer: Any = self.tokenizers.get(target)  # pixels and vectors have none
        size, scale, background = DRAWING, None, None  # type: int, Any, Any
        if self.space[target].kind == "text":
            if words(value):
                return Cell(title, text=words(value), given=given)
            size = DRAWING if tokenizer.config.codec == "palette" else LARGE_DRAWING
            background = self.raw[row].get(self.config.picture)
        elif tokenizer:
            truth = np.asarray(self.raw[row][name])
            size = len(truth) if truth.ndim > 1 and len(truth) > DRAWING else DRAWING
            if tokenizer.config.input.kind == "field":
                # Colours span the truth, but not so little of what else is shown that noise would look like structure.
                spread = max(float(np.ptp(scene[name])) for scene in self.raw)
                scale = float(truth.min()), float(max(truth.max(), truth.min() + spread / 4))
            elif tokenizer.config.input.kind == "features" and truth.ndim == 3:
                scale = principal_axes(np.stack([scene[name] for scene in self.raw]))  # a colour means the same in all
        return Cell(title, data_uri(picture(tokenizer, value, size, scale, background)), given=given)

    def cells(self, made: Mapping[str, Any], row: int, title: str) -> list[Cell]:
        """One row of values by modality (raw names)."""
        return [self.cell(name, values[row], row, f"{name}: {title}") for name, values in made.items()]

    def truths(self, names: Sequence[str], row: int, given: bool = False) -> list[Cell]:
        """The true values of one sample."""
        title = "given" if given else "the truth"
        return [self.cell(name, self.raw[row][name], row, f"{name}: {title}", given) for name in names]

    def from_picture(self) -> Panel:
        """Every modality predicted from the picture alone, with the truth below, for every shown sample."""
        source = self.config.picture
        names = [name for name in self.targets if name != source]
        made = {name: self.generate(self.given(source), [name])[name] for name in names}
        panel = Panel([source, *names])
        for row in range(len(self.raw)):
            guesses = self.cells(made, row, f"from {source}")
            panel.rows.append(("predicted", [*self.truths([source], row, given=True), *guesses]))
            panel.rows.append(("truth", [Cell(""), *self.truths(names, row)]))
        return panel

    def any_to_any(self) -> Iterator[Panel]:
        """For every shown sample: each modality (rows) alone gives every other one (columns)."""
        names = list(self.targets)
        made = {
            source: {name: self.generate(self.given(source), [name])[name] for name in names if name != source}
            for source in tqdm(self.sources, "pictures", unit="source")
        }
        for row, scene in enumerate(self.raw):
            panel = Panel(names, [("truth", self.truths(names, row))], caption=str(scene["__key__"]))
            for source in self.sources:
                cells = self.cells(made[source], row, f"from {source}")
                if source in names:
                    cells.insert(names.index(source), *self.truths([source], row, given=True))
                panel.rows.append((f"given {source}", cells))
            yield panel

    def chained(self) -> Panel:
        """From the prompt alone: one modality after another, each seeing those before it."""
        prompt = self.config.prompt
        names = [name for name in self.config.chain if name in self.targets and name != prompt]
        made = self.generate(self.given(prompt), names)
        return self._between_truths(lambda row: self.cells(made, row, f"from {prompt} and all to the left"), names)

    def guidance(self) -> Panel:
        """The picture from the prompt at rising guidance weights, with the same seed."""
        name, given = self.config.picture, self.given(self.config.prompt)
        made = {f"weight {weight:g}": self.generate(given, [name], weight)[name] for weight in self.config.guidance}
        return self._between_truths(
            lambda row: [self.cell(name, values[row], row, title) for title, values in made.items()], list(made)
        )

    def _between_truths(self, cells: Callable[[int], list[Cell]], columns: list[str]) -> Panel:
        """What was made of each prompt, between the prompt and the picture that it belongs to."""
        prompt, name = self.config.prompt, self.config.picture
        rows = [
            ("", [*self.truths([prompt], row, given=True), *cells(row), *self.truths([name], row)])
            for row in range(len(self.raw))
        ]
        return Panel([prompt, *columns, "the real one"], rows)

    def in_painting(self, tries: int = 3) -> Panel:
        """The right half of the picture's tokens is hidden and filled in, several times."""
        name = self.config.picture
        model_name = self.targets[name]
        height, width = self.space[model_name].grid or (1, 1)
        known = torch.zeros(height, width, dtype=torch.bool)
        known[:, : width // 2] = True
        ids = torch.stack([torch.as_tensor(sample[model_name]) for sample in self.tokens])
        state = {model_name: Given.grid(ids, known.flatten().expand(len(ids), -1))}
        made = [self.generate(state, [name], seed=seed)[name] for seed in range(tries)]
        panel = Panel(["given", *(f"filled in, seed {seed}" for seed in range(tries)), "truth"])
        for row, whole in enumerate(decode({model_name: ids}, self.tokenizers)[model_name]):
            part = np.array(whole)
            part[:, part.shape[1] * (width // 2) // width :] = 128
            cells = [self.cell(name, part, row, "the tokens that are given", given=True)]
            cells += [self.cell(name, values[row], row, f"seed {seed}") for seed, values in enumerate(made)]
            panel.rows.append(("", cells + self.truths([name], row)))
        return panel

    def reconstructions(self) -> Panel:
        """What each image tokenizer keeps of the shown samples."""
        names = self.image_names
        made = {
            name: reconstruct(self.tokenizers[self.targets[name]], np.stack([scene[name] for scene in self.raw]))[0]
            for name in names
        }
        panel = Panel(names)
        for row in range(len(self.raw)):
            panel.rows.append(("original", self.truths(names, row)))
            panel.rows.append(("tokens", self.cells(made, row, "decode(encode(original))")))
        return panel


def data_uri(image: Image.Image) -> str:
    """A picture inside the page itself, as WebP (a fifth of PNG's size)."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
