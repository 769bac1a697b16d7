"""Raw samples as the tokens of a model show them, to compare them with what the model predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourm.data.shards import ShardDataset
from fourm.data.transforms import Picture
from fourm.evaluation.matrix import raw_name
from fourm.modalities import TokenSpace
from fourm.tokenization.encode import CROPS, CropConfig, SampleEncoder, find_source


class ShownDataset:
    """Raw samples of one split by `raw_name`: texts in the form of their codecs, all in the first crop of the tokens.

    Without `crop_settings` beside the tokens, images stay as they are.

    Args:
        data: Root of the raw data.
        tokens: Root of the token data.
        split: Which split.
        space: The model's modalities.
        tokenizers: By name of the model modality.
        names: Which modalities; default: all.

    Raises:
        ValueError: A modality or the image that the crops are of is missing.
    """

    def __init__(
        self, data: str | Path, tokens: str | Path, split: str, space: TokenSpace, tokenizers: Mapping[str, Any],
        names: Sequence[str] | None = None,
    ):  # fmt: skip
        folder, card = Path(data) / split, Path(tokens) / "card.json"
        chosen = sorted(names or space.names, key=lambda name: space[name].discrete)
        self.names = {raw_name(space, name): name for name in chosen}  # tokens rather than the pixels that they are of
        sources = {name: find_source(folder, name, row) for name, row in space.modalities.items()}
        crops = json.loads(card.read_text()).get("crops") if card.exists() else None
        cropped = (Path(tokens) / split / CROPS).is_dir()
        self.encoder = SampleEncoder(space, tokenizers, sources, CropConfig(**crops) if crops else None, cropped)
        self.settings = ShardDataset(Path(tokens) / split, [CROPS]) if cropped else None
        image = [self.encoder.image] if self.encoder.image else []
        self.raw = ShardDataset(folder, list(dict.fromkeys([sources[name] for name in self.names.values()] + image)))
        self.keys = [key for key in self.raw.keys if not self.settings or key in self.settings.columns[CROPS].entries]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = self.raw.sample(self.keys[i])
        settings = self.settings.sample(self.keys[i]) if self.settings else {}
        _, views = self.encoder.views(sample | settings)
        shown: dict[str, Any] = {"__key__": self.keys[i]}
        for raw, name in self.names.items():
            row, value = self.encoder.space[name], sample[self.encoder.sources[name]]
            if row.kind == "patches" and row.grid and self.settings:
                shown[raw] = Picture((row.grid[0] * row.patch_size, row.grid[1] * row.patch_size))(value, views[0])
            else:
                shown[raw] = self.encoder.shown(name, value, views[0], len(views))
        return shown
