"""Pictures of held-out samples that a training shows at its evaluations, always of the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from fourm.evaluation.matrix import raw_sources, raw_targets
from fourm.evaluation.tokenizers import reconstruct, truths
from fourm.generation.decode import common_scale, decode, picture, sheet
from fourm.generation.plan import Target, chain
from fourm.generation.sampler import Sampler, from_samples
from fourm.modalities import TokenSpace

SIZE = 128  # height of a picture in pixels
STEPS = 4  # of a grid, and of diffusion decoders


def spread(samples: Any, count: int) -> list[Mapping[str, Any]]:
    """So many, from all over a data set; or all, where there are fewer."""
    chosen = min(count, len(samples))
    return [samples[row * len(samples) // chosen] for row in range(chosen)]


class Reconstructions:
    """Evaluator of an image tokenizer: originals above what it makes of them.

    Args:
        dataset: Raw samples.
        modality: The tokenizer's raw modality.
        mask: Raw modality with the masks of valid pixels, if there are any.
        count: Samples at most.
    """

    def __init__(self, dataset: Any, modality: str, mask: str = "", count: int = 8):
        self.samples, self.modality, self.mask = spread(dataset, count), modality, mask

    def __call__(self, model: Any, step: int) -> dict[str, Image.Image]:
        """One sheet, `reconstructions`."""
        truth, where = truths(model, self.samples, self.modality, self.mask)
        made, scale = reconstruct(model, truth, valid=where)[0], common_scale(model, truth)
        rows = [[picture(model, value, SIZE, scale) for value in values] for values in (truth, made)]
        return {"reconstructions": sheet([str(sample["__key__"])[-20:] for sample in self.samples], rows)}


class Predictions:
    """Evaluator of an any-to-any model: true values above those that it predicts from one modality.

    That is the first that may be given, of those that most samples have. Modalities without a tokenizer are left out.

    Args:
        space: The model's modalities.
        load: The tokenizer of a model modality by its name; ValueError or OSError if there is none. Asked for those
            that are shown only.
        dataset: Token samples.
        count: Samples at most.
        targets: Modalities at most, each predicted on its own, in a few steps.

    Raises:
        ValueError: There are no samples with anything that may be given, or tokenizers of nothing of it.
    """

    def __init__(self, space: TokenSpace, load: Callable[[str], Any], dataset: Any, count: int = 4, targets: int = 8):
        self.space, self.load, self.tokenizers = space, load, dict[str, Any]()
        samples, sources = spread(dataset, 8 * count), raw_sources(space)  # some of a mixture may not do
        having = {raw: sum(name in sample for sample in samples) for raw, name in sources.items()}
        if not any(having.values()):
            raise ValueError(f"none of {len(samples)} samples has anything that may be given: {', '.join(sources)}")
        ranked = sorted((raw for raw in sources if having[raw]), key=lambda raw: -having[raw])
        given = next((raw for raw in ranked if self._opens(sources[raw])), None)
        if given is None:
            raise ValueError(f"tokenizers: there is none of anything that samples may be given: {', '.join(ranked)}")
        self.given, self.source = given, sources[given]
        self.samples = spread([sample for sample in samples if self.source in sample], count)
        names = [name for raw, name in raw_targets(space).items() if raw != self.given]
        shown = (name for name in names if all(name in sample for sample in self.samples) and self._opens(name))
        self.targets = list(islice(shown, targets))
        self.truth = {name: self._values(name) for name in (self.source, *self.targets)}

    def _opens(self, name: str) -> bool:
        if self.space[name].discrete:
            try:
                self.tokenizers[name] = self.load(name)
            except (ValueError, OSError) as error:
                print(f"samples: {name} is not shown: {error}")
                return False
        return True

    def _values(self, name: str) -> Sequence[Any]:
        contents = [sample[name] for sample in self.samples]
        if not self.space[name].discrete:
            return contents
        ids = [torch.as_tensor(each) for each in contents]
        rows = torch.stack(ids) if self.space[name].kind == "grid" else ids
        return decode({name: rows}, self.tokenizers, steps=STEPS)[name]

    def __call__(self, model: Any, step: int) -> dict[str, Image.Image]:
        """One sheet, `from_<modality>`."""
        known, made = from_samples(self.space, self.samples, [self.source]), {self.source: self.truth[self.source]}
        for name in self.targets:
            plan = chain(self.space, [Target(name, steps=STEPS, top_p=0.9, max_tokens=64)])
            made |= decode(Sampler(model).generate(known, plan), self.tokenizers, steps=STEPS)
        scales = {name: common_scale(self.tokenizers.get(name), values) for name, values in self.truth.items()}
        rows = [
            [
                picture(self.tokenizers.get(name), values[row], SIZE, scales[name], self._background(row))
                for name, values in shown.items()
            ]
            for row in range(len(self.samples))
            for shown in (self.truth, made)
        ]
        return {f"from_{self.given}": sheet(list(self.truth), rows)}

    def _background(self, row: int) -> Any:
        value = self.truth[self.source][row]
        return value if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 else None
