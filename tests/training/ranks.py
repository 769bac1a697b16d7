"""One of several processes that train the tiny task on token shards of which some are bad."""

import sys

import numpy as np
import tiny
import torch

from fourm import runtime
from fourm.data.loader import Loader
from fourm.data.tokens import TokenDataset
from fourm.modalities import Modality, TokenSpace
from fourm.training.trainer import TrainConfig, Trainer


def collate(samples, draws):
    x = torch.from_numpy(np.stack([sample["a"] for sample in samples])).float() / 10
    return {"x": x, "kind": torch.arange(len(samples)) % 2, "keys": tuple(sample["__key__"] for sample in samples)}


if __name__ == "__main__":
    folder, max_bad, run = sys.argv[1:]
    joined = runtime.accelerator()
    space = TokenSpace({name: Modality("grid", vocab_size=10, grid=(2, 3)) for name in ("a", "b")})
    data = TokenDataset(folder, space, "skip", float(max_bad))
    config = TrainConfig(steps=1000, batch_size=4, precision="fp32", eval_every=0, save_every=0, log_every=1000)
    loader = Loader(data, 2, collate, 1, rank=joined.process_index, world_size=joined.num_processes)
    try:
        Trainer(config, tiny.TinyTask(), loader, {}, run).fit()
    except ValueError as error:
        print(error, flush=True)
        runtime.finish(joined, 3)
