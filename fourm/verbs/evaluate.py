"""`fourm evaluate`: measures a model on test data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fourm import runtime
from fourm.data.tokens import TokenDataset
from fourm.evaluation.matrix import any_to_any, raw_name
from fourm.evaluation.shown import ShownDataset
from fourm.evaluation.tasks import TasksConfig, evaluate_tasks
from fourm.evaluation.tokenizers import evaluate_tokenizer
from fourm.model.fourm import FourM
from fourm.tokenization.encode import load_tokenizers


@dataclass(kw_only=True)
class Config:
    """What is measured, and on what.

    Args:
        model: Folder or hub id of the model.
        tokenizers: Folder with its tokenizers.
        data: Root of the raw data.
        tokens: Root of the token data.
        output: JSON file for the figures.
        matrix_samples: Test samples of each pair of the any-to-any matrix; 0 leaves the matrix out.
        tasks: Predictions scored in the modalities' own units.
        tokenizer_samples: Test samples of each tokenizer's figures; 0 leaves them out.
        seed: Of all choices and draws.
    """

    model: str
    tokenizers: str
    data: str
    tokens: str
    output: str
    matrix_samples: int = 128
    tasks: TasksConfig = field(default_factory=TasksConfig)
    tokenizer_samples: int = 512
    seed: int = 0


def run(config: Config) -> None:
    """Writes the figures as JSON."""
    runtime.seed_everything(config.seed)  # diffusion decoders draw from the global generator
    model = FourM.from_pretrained(config.model)
    tokenizers = load_tokenizers(model.space, config.tokenizers)
    tokens = TokenDataset(Path(config.tokens) / "test", model.space)
    where = config.data, config.tokens
    test, train = (ShownDataset(*where, split, model.space, tokenizers) for split in ("test", "train"))
    metrics: dict = {"environment": runtime.environment()}
    if config.tokenizer_samples:
        metrics["tokenizers"] = {}
        for name, tokenizer in tqdm(tokenizers.items(), desc="tokenizers", unit="tokenizer"):
            alone, raw = ShownDataset(*where, "test", model.space, tokenizers, [name]), raw_name(model.space, name)
            figures = evaluate_tokenizer(tokenizer, alone, raw, config.tokenizer_samples, config.seed)
            metrics["tokenizers"][raw] = figures
    metrics["tasks"] = evaluate_tasks(model, tokenizers, test, tokens, train, config.tasks)
    for task, figures in metrics["tasks"].items():
        print(task + ": " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float)), flush=True)
    if config.matrix_samples:
        metrics["matrix"] = any_to_any(model, tokens, config.matrix_samples, seed=config.seed, progress=True)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{output}: {', '.join(metrics)}")
