"""`fourm generate`: modalities from others, as files and one picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourm.data.shards import EXTENSIONS, extension_of
from fourm.data.transforms import Picture, View, centre_crop
from fourm.generation.decode import decode, picture, sheet
from fourm.generation.plan import Target, chain
from fourm.generation.sampler import Given, Sampler, from_samples
from fourm.modalities import Modality, TokenSpace
from fourm.model.fourm import FourM
from fourm.tokenization.encode import encode_samples, load_tokenizers, source_of


@dataclass(kw_only=True)
class Config:
    """What is generated from what.

    Args:
        model: Folder or hub id of the model.
        tokenizers: Folder with its tokenizers.
        targets: What to generate, in this order; each sees those before it.
        given: Raw inputs by modality: the path of an image, `.npy`, `.json` or `.txt` file, or the text itself.
        output: Folder for the results.
        num_samples: Variations.
        seed: Of the draws.
        decode_steps: Steps of diffusion decoders; default: each tokenizer's own.
    """

    model: str
    tokenizers: str
    targets: list[Target]
    given: dict[str, str] = field(default_factory=dict)
    output: str = "runs/generated"
    num_samples: int = 1
    seed: int = 0
    decode_steps: int | None = None


def run(config: Config) -> None:
    """Writes each result as a file of its own, and all of them side by side as `picture.png`."""
    model = FourM.from_pretrained(config.model)
    tokenizers = load_tokenizers(model.space, config.tokenizers)
    names = {source_of(name, row): name for name, row in reversed(model.space.modalities.items()) if row.input}
    unknown = sorted(set(config.given) - set(names))
    if unknown:
        raise ValueError(f"given {', '.join(unknown)}: allowed are {', '.join(names)}")
    raw = {name: fitted(read(value), model.space[names[name]]) for name, value in config.given.items()}
    space = model.space.subset([names[name] for name in raw]) if raw else None
    known = encode_given(raw, space, tokenizers) if space else {}
    plan = chain(model.space, config.targets)
    ids = Sampler(model).generate(known, plan, seed=config.seed, num_samples=config.num_samples)
    noise = torch.Generator().manual_seed(config.seed)
    values = decode(ids, tokenizers, steps=config.decode_steps, generator=noise)

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, results in values.items():
        for number, value in enumerate(results):
            extension = extension_of(value)
            (output / f"{name}-{number}.{extension}").write_bytes(EXTENSIONS[extension].encode(value))
    rows = []
    for number in range(config.num_samples):
        drawn = [(tokenizers.get(names[name]), value) for name, value in raw.items()]
        drawn += [(tokenizers[name], results[number]) for name, results in values.items()]
        below = next((value for tokenizer, value in drawn if is_photo(tokenizer, value)), None)
        rows.append([picture(tokenizer, value, background=below) for tokenizer, value in drawn])
    sheet([*raw, *values], rows).save(output / "picture.png")
    print(f"{output}: {config.num_samples} x {', '.join(values)}, and picture.png")


def fitted(value: Any, row: Modality) -> Any:
    """Pixels in the size that the model takes, of others the middle square; other values as they are."""
    if row.kind != "patches" or not row.grid or not isinstance(value, np.ndarray):
        return value
    size, (height, width) = (row.grid[0] * row.patch_size, row.grid[1] * row.patch_size), value.shape[:2]
    if (height, width) == size:
        return value
    return Picture(size)(value, View(centre_crop(height, width), height, width))


def is_photo(tokenizer: Any, value: Any) -> bool:
    """Whether boxes, people and the like can be drawn over a value."""
    kind = "image" if tokenizer is None else getattr(getattr(tokenizer.config, "input", None), "kind", "")
    return kind == "image" and isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3


def encode_given(raw: Mapping[str, Any], space: TokenSpace, tokenizers: Mapping[str, Any]) -> dict[str, Given]:
    """Raw inputs as the sampler wants them; `space` holds the modalities that they become."""
    (sample,) = encode_samples([{"__key__": "given"} | dict(raw)], space, tokenizers)
    for name in space.names:
        if space[name].kind == "grid":
            sample[name] = sample[name][0]  # of one crop
    return from_samples(space, [sample], space.names)


def read(value: str) -> Any:
    """The content of a file where there is one of that name and a known type, or else the text itself."""
    path = Path(value)
    extension = path.suffix.removeprefix(".").lower()
    if extension not in EXTENSIONS:
        return value
    if not path.is_file():
        raise ValueError(f"there is no file {value}")
    return EXTENSIONS[extension].decode(path.read_bytes())
