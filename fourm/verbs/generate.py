"""`fourm generate`: modalities from others, as files and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from fourm.data.shards import EXTENSIONS, extension_of
from fourm.generation.decode import decode, picture
from fourm.generation.plan import Target, chain
from fourm.generation.sampler import Given, Sampler, from_samples
from fourm.modalities import TokenSpace
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
    """

    model: str
    tokenizers: str
    targets: list[Target]
    given: dict[str, str] = field(default_factory=dict)
    output: str = "runs/generated"
    num_samples: int = 1
    seed: int = 0


def run(config: Config) -> None:
    """Writes each result as a file of its own, and all of them side by side as `picture.png`."""
    model = FourM.from_pretrained(config.model)
    tokenizers = load_tokenizers(model.space, config.tokenizers)
    names = {source_of(name, row): name for name, row in reversed(model.space.modalities.items()) if row.input}
    unknown = sorted(set(config.given) - set(names))
    if unknown:
        raise ValueError(f"given {', '.join(unknown)}: allowed are {', '.join(names)}")
    raw = {name: read(value) for name, value in config.given.items()}
    space = model.space.subset([names[name] for name in raw]) if raw else None
    known = encode_given(raw, space, tokenizers) if space else {}
    plan = chain(model.space, config.targets)
    ids = Sampler(model).generate(known, plan, seed=config.seed, num_samples=config.num_samples)
    values = decode(ids, tokenizers)

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, results in values.items():
        for number, value in enumerate(results):
            extension = extension_of(value)
            (output / f"{name}-{number}.{extension}").write_bytes(EXTENSIONS[extension].encode(value))
    rows = [
        [picture(tokenizers.get(names[name]), value) for name, value in raw.items()]
        + [picture(tokenizers[name], results[number]) for name, results in values.items()]
        for number in range(config.num_samples)
    ]
    sheet([*raw, *values], rows).save(output / "picture.png")
    print(f"{output}: {config.num_samples} x {', '.join(values)}, and picture.png")


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


def sheet(titles: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows under the titles of their columns."""
    widths = [max(row[column].width for row in rows) for column in range(len(titles))]
    heights = [max(image.height for image in row) for row in rows]
    page = Image.new("RGB", (sum(widths) + 8 * len(widths), sum(heights) + 8 * len(heights) + 20), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        x = sum(widths[:column]) + 8 * column
        draw.text((x, 4), title, fill="black")
        for number, row in enumerate(rows):
            page.paste(row[column], (x, 20 + sum(heights[:number]) + 8 * number))
    return page
