"""Store ahead, search in real time: items of a side projected once; a query is one prediction and one search.

<folder>/items.f32   unit vectors (n, dim), one after another
         ids.txt     their names, a line each; what is not named yet is not there
         card.json   side, dim, and the digest of the weights that made them

`fourm stitch altmoe` leaves a model and a store of the test items of each side. A text finds its pictures by

    model = Predictor.load("runs/stitch/altmoe-emoji/model")
    store = Store("runs/stitch/altmoe-emoji/store/rgb", model, "rgb")
    side = Source(**model.card["sides"]["caption"])
    z = latents(load(side.encoder, size=side.size), ["a red apple"], side.pooling)[0]
    found = [store.ids[number] for number in store.search("caption", z[None], 5)[1][0]]

with `Source` of `fourm.stitching.latents`, `load` and `latents` of `fourm.stitching.encoders`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourm.checkpoint import read_json
from fourm.evaluation.retrieval import search
from fourm.stitching.altmoe import Predictor, split
from fourm.stitching.latents import check


class Store:
    """Items of one side, on disk, to be searched from any other.

    Args:
        folder: Where they are, or will be.
        model: What made or makes them.
        side: Whose items.

    Raises:
        ValueError: There are items of other weights or of another side.
    """

    def __init__(self, folder: str | Path, model: Predictor, side: str):
        self.folder, self.model, self.side = Path(folder), model, side
        card = {"side": side, "dim": model.method.hidden, "weights": model.item_weights(side)}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "card.json").is_file():
            check(self.folder, read_json(self.folder / "card.json"), card)
        else:
            (self.folder / "card.json").write_text(json.dumps(card) + "\n")
        self._open()

    def _open(self) -> None:
        names, items = self.folder / "ids.txt", self.folder / "items.f32"
        named = names.read_bytes() if names.is_file() else b""
        self.named = named.rfind(b"\n") + 1  # bytes; a kill may have left half a line
        self.ids = named[: self.named].decode().splitlines()
        shape = (len(self.ids), self.model.method.hidden)
        self.items = np.memmap(items, np.float32, "c", shape=shape) if self.ids else np.zeros(shape, np.float32)

    @torch.inference_mode()
    def add(self, z: Tensor, ids: Sequence[str]) -> None:
        """Projects latents (n, D) and appends them; what is stored already is not touched.

        Raises:
            ValueError: A name has a line break, or their number is not that of the latents.
        """
        if len(z) != len(ids) or any(len(name.splitlines()) != 1 for name in ids):
            raise ValueError(f"{self.folder}: {len(z)} latents, {len(ids)} names, expected one line for each")
        vectors, names = self.model.items(self.side, z).cpu().numpy().tobytes(), "".join(f"{name}\n" for name in ids)
        for end, new, file in ((self.items.nbytes, vectors, "items.f32"), (self.named, names.encode(), "ids.txt")):
            path = self.folder / file
            with path.open("r+b" if path.exists() else "w+b") as opened:
                opened.seek(end)  # over what a kill has left
                opened.write(new)
                opened.truncate()
        self._open()

    @torch.inference_mode()
    def search(self, source: str, z: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """The k items nearest to latents (B, D) of another side: cosines, falling, and their numbers, (B, k) each."""
        queries = self.model.query(f"{source}>{self.side}", z).cpu()
        return (queries @ torch.from_numpy(self.items).T).topk(min(k, len(self.ids)))


def latency(
    model: Predictor, way: str, queries: Tensor, items: Tensor, n: int, folder: str | Path, seed: int = 0
) -> dict[str, float]:
    """Milliseconds of one query at n items, against projecting all items for it, and the share of same answers.

    Args:
        model: The predictor, in evaluation mode.
        way: The direction.
        queries: Latents (Q, D) of the source, asked one at a time.
        items: Latents (m, D) of the target; where n is larger, they are drawn again, with Gaussian noise of a tenth of
            each dimension's deviation.
        n: Items in the store.
        folder: Where the store is made; there must be none.
        seed: Of draws and noise.
    """
    source, target = split(way, model.widths)
    rng = torch.Generator().manual_seed(seed)
    drawn = items[torch.randint(len(items), (max(0, n - len(items)),), generator=rng)]
    noisy = drawn + 0.1 * items.std(0) * torch.randn(drawn.shape, generator=rng)
    z = torch.cat([items[:n], noisy])
    store = Store(folder, model, target)
    store.add(z[:-1], [str(i) for i in range(n - 1)])
    began = time.perf_counter()
    store.add(z[-1:], [str(n - 1)])
    adding = time.perf_counter() - began
    store.search(source, queries[:1])

    @torch.inference_mode()
    def anew(asked: Tensor) -> Tensor:
        return search(model.query(way, asked), model.items(target, z), 10)[1]

    seconds, answers, slow = [], [], []
    for query in queries:
        began = time.perf_counter()
        answers.append(store.search(source, query[None])[1])
        seconds.append(time.perf_counter() - began)
    for query in queries[:5]:
        began = time.perf_counter()
        anew(query[None])
        slow.append(time.perf_counter() - began)
    same = (torch.cat(answers) == anew(queries)).all(1)
    p50, p95 = (1000 * np.quantile(seconds, [0.5, 0.95])).tolist()
    return {"p50_ms": p50, "p95_ms": p95, "queries": len(queries), "unstored_p50_ms": 1000 * float(np.median(slow)),
            "add_ms": 1000 * adding, "same_answers": float(same.double().mean())}  # fmt: skip
