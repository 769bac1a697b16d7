"""`fourm evaluate`: measures a model on test data."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from fourm import runtime
from fourm.data.tokens import TokenDataset
from fourm.evaluation.comparison import ComparisonConfig, compare
from fourm.evaluation.generated import RetrievalConfig, retrieve
from fourm.evaluation.matrix import any_to_any, raw_name
from fourm.evaluation.retrieval import KS
from fourm.evaluation.shown import ShownDataset
from fourm.evaluation.tasks import TasksConfig, evaluate_tasks
from fourm.evaluation.tokenizers import evaluate_tokenizer
from fourm.model.fourm import FourM
from fourm.stitching.space import SharedSpace
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
        retrieval: Search through generated vectors; what is found is drawn beside `output`, in a PNG of its name.
        versus: Another model that knows the same tokens, and what the two are compared on.
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
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    versus: ComparisonConfig = field(default_factory=ComparisonConfig)
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
    if config.versus.model:
        metrics["versus"] = compare(model, FourM.from_pretrained(config.versus.model), tokens, config.versus)
        for pair, found in metrics["versus"].items():
            low, high = found["ci95"]
            print(f"{pair}: {found['saved_bits']:+.3f} bits a token saved ({low:+.3f} to {high:+.3f})", flush=True)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if config.retrieval.target:
        metrics["retrieval"] = _retrieval(config, model, tokenizers, test, tokens)
    output.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{output}: {', '.join(metrics)}")


def _retrieval(config: Config, model: FourM, tokenizers: dict, test: ShownDataset, tokens: TokenDataset) -> dict:
    asked = config.retrieval
    space = SharedSpace.load(asked.space) if asked.space else None
    with torch.inference_mode():
        project = functools.partial(space, asked.side) if space else None
        found, page = retrieve(model, tokenizers, test, tokens, asked, project)
    page.save(Path(config.output).with_suffix(".png"))
    for source, figures in found["sources"].items():
        print(f"{source} -> {asked.target}: " + ", ".join(f"R@{k} {figures[f'R@{k}']:.3f}" for k in KS), flush=True)
    return found
