"""What the model makes of unseen samples, as pictures for the report.

Every panel is a `Panel` of rows of cells; nothing here knows HTML. Targets are generated on their own unless a chain is
the point: MaskGIT for grids, left to right for texts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from fourm.evaluation.matrix import complete_samples, raw_samples, raw_sources, raw_targets
from fourm.evaluation.tokenizers import reconstruct
from fourm.generation.decode import decode, picture
from fourm.generation.plan import Target, chain
from fourm.generation.sampler import Given, Sampler, from_samples
from fourm.model.fourm import FourM

DRAWING = 64  # side of a drawn palette in pixels; images keep their own


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
        steps: MaskGIT steps of a grid.
        temperature: Of all draws.
        top_p: Of all draws.
        guidance: Weights of the guidance sweep; 1 is none.
        prompt: Raw modality that starts the chain and the guidance sweep.
        picture: Raw modality that is in-painted and swept.
        chain: Raw modalities in the order in which the chain makes them; those that the model lacks are left out.
        seed: Of samples and draws.
    """

    samples: int = 4
    steps: int = 8
    temperature: float = 0.8
    top_p: float = 0.9
    guidance: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    prompt: str = "caption"
    picture: str = "rgb"
    chain: Sequence[str] = ("climate", "elevation", "water", "relief", "rgb", "normal", "edges", "palette")
    seed: int = 0


class Gallery:
    """Makes the panels of the report.

    Args:
        model: The model.
        tokenizers: By name of the model modality.
        raw: `ShardDataset` of the test split.
        tokens: `TokenDataset` of the same samples in the same order.
        config: What is shown.

    Raises:
        ValueError: Too few complete samples, or the two datasets differ in their samples.
    """

    def __init__(
        self, model: FourM, tokenizers: Mapping[str, Any], raw: Any, tokens: Any, config: GalleryConfig | None = None
    ):
        self.config = config or GalleryConfig()
        self.tokenizers, self.space, self.sampler = tokenizers, model.space, Sampler(model.eval())
        self.sources, self.targets = raw_sources(model.space), raw_targets(model.space)
        names = sorted({*self.sources.values(), *self.targets.values()})
        chosen = complete_samples(tokens, names, self.config.samples, self.config.seed)
        self.tokens, self.raw = list(chosen.values()), raw_samples(raw, chosen)

    def generate(
        self, known: Mapping[str, Given], targets: Sequence[str], guidance: float = 1.0, seed: int = 0
    ) -> dict[str, Sequence[Any]]:
        """Raw values of a chain of targets (raw names), one for each given row."""
        settings = self.config
        wanted = [
            Target(self.targets[name], steps=settings.steps, temperature=settings.temperature, top_p=settings.top_p,
                   guidance=guidance) for name in targets
        ]  # fmt: skip
        hidden = list(known) if guidance != 1 else None
        ids = self.sampler.generate(known, chain(self.space, wanted, hidden), seed=settings.seed + seed)
        values = decode(ids, self.tokenizers)
        return {name: values[self.targets[name]] for name in targets}

    def given(self, name: str, rows: slice = slice(None)) -> dict[str, Given]:
        """A source (raw name) of the shown samples, as the sampler wants it."""
        return from_samples(self.space, self.tokens[rows], [self.sources[name]])

    def is_text(self, name: str) -> bool:
        """Whether a target (raw name) is written rather than painted."""
        return self.space[self.targets[name]].kind == "text"

    def cell(self, name: str, value: Any, row: int, title: str, given: bool = False) -> Cell:
        """Shows a raw value; numbers are coloured by about the range of the truth of the same sample."""
        if self.is_text(name):
            text = words(value)
            return Cell(title, "" if text else data_uri(picture(name, value, DRAWING)), text, given)
        settings, truth = self.tokenizers[self.targets[name]].config.input, np.asarray(self.raw[row][name])
        # Class maps with values of their own (0 and 255) are pictures already; of two classes the second is the darker.
        kind = "image" if settings.kind == "classes" and settings.values else settings.kind
        value = 1 - np.asarray(value) if kind == "classes" and settings.classes == 2 else value
        # Colours span the truth, but not so little of what else is shown that noise would look like structure.
        spread = max(float(np.ptp(scene[name])) for scene in self.raw)
        low, high = float(truth.min()), float(max(truth.max(), truth.min() + spread / 4))
        return Cell(title, data_uri(picture(kind, value, len(truth), low, high)), given=given)

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
            guesses = [self.cell(name, made[name][row], row, f"{name} from {source}") for name in names]
            panel.rows.append(("predicted", [*self.truths([source], row, given=True), *guesses]))
            panel.rows.append(("truth", [Cell(""), *self.truths(names, row)]))
        return panel

    def any_to_any(self) -> Iterator[Panel]:
        """For every shown sample: each modality (rows) alone gives every other one (columns)."""
        names = list(self.targets)
        made = {
            (source, target): self.generate(self.given(source), [target])[target]
            for source in self.sources for target in names if source != target
        }  # fmt: skip
        for row, scene in enumerate(self.raw):
            panel = Panel(names, [("truth", self.truths(names, row))], caption=str(scene["__key__"]))
            for source in self.sources:
                cells = [
                    self.truths([name], row, given=True)[0]
                    if name == source
                    else self.cell(name, made[source, name][row], row, f"{name} from {source}")
                    for name in names
                ]
                panel.rows.append((f"given {source}", cells))
            yield panel

    def chained(self) -> Panel:
        """From the prompt alone: one modality after another, each seeing those before it."""
        prompt = self.config.prompt
        names = [name for name in self.config.chain if name in self.targets and name != prompt]
        made = self.generate(self.given(prompt), names)
        panel = Panel([prompt, *names, "the real place"])
        for row in range(len(self.raw)):
            cells = [self.cell(name, made[name][row], row, f"{name}, step {i + 1}") for i, name in enumerate(names)]
            ends = self.truths([prompt], row, given=True), self.truths([self.config.picture], row)
            panel.rows.append(("", [*ends[0], *cells, *ends[1]]))
        return panel

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

    def guidance(self) -> Panel:
        """The picture from the prompt at rising guidance weights, with the same seed."""
        prompt, name = self.config.prompt, self.config.picture
        made = {weight: self.generate(self.given(prompt), [name], weight)[name] for weight in self.config.guidance}
        panel = Panel([prompt, *(f"weight {weight:g}" for weight in made), "the real place"])
        for row in range(len(self.raw)):
            cells = [self.cell(name, values[row], row, f"guidance {weight:g}") for weight, values in made.items()]
            panel.rows.append(("", [*self.truths([prompt], row, given=True), *cells, *self.truths([name], row)]))
        return panel

    def reconstructions(self) -> Panel:
        """What each image tokenizer keeps of the shown samples."""
        names = [name for name in self.targets if not self.is_text(name)]
        made = {
            name: reconstruct(self.tokenizers[self.targets[name]], np.stack([scene[name] for scene in self.raw]))[0]
            for name in names
        }
        panel = Panel(names)
        for row in range(len(self.raw)):
            panel.rows.append(("original", self.truths(names, row)))
            cells = [self.cell(name, made[name][row], row, f"{name}: decode(encode(original))") for name in names]
            panel.rows.append(("tokens", cells))
        return panel


def words(value: Any) -> str:
    """A raw value of a text modality in words; nothing for a palette, which is better drawn."""
    if not value:
        return "none"
    if isinstance(value, Mapping):
        return "\n".join(f"{name.replace('_', ' ')} {number:.4g}" for name, number in value.items())
    if isinstance(value, str):
        return value
    return "\n".join(f"{item['name']} {item['x']:.2f} {item['y']:.2f}" for item in value if isinstance(item, Mapping))


def data_uri(image: Image.Image) -> str:
    """A picture inside the page itself, as WebP (a fifth of PNG's size)."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
