"""`fourm <verb> --config FILE --key value`: finds the verb, reads its config, runs it.

A verb is a module in `fourm/verbs` with a dataclass `Config` and a function `run(config)`. It is imported when called,
so that `fourm --help` is instant.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser

VERBS = {
    "run": "run a list of commands as one; only what is not done yet",
    "data": "build the built-in data set",
    "data inspect": "say what a folder of data holds and what is wrong with it",
    "text-tokenizer": "fit the text tokenizers of captions and structured modalities",
    "tokenizer": "train an image tokenizer and measure it",
    "label": "let teachers write new modalities beside pictures",
    "tokenize": "turn raw shards into token shards",
    "train": "train an any-to-any model on token shards",
    "plan": "say what a training run takes: tokens, memory, days",
    "generate": "generate modalities from others and save pictures",
    "evaluate": "measure a model: any-to-any matrix, tasks, tokenizers",
    "report": "write the page that people look at",
    "stitch fusemix": "join two frozen encoders with few pairs",
    "stitch hyma": "join all pairs of two sets of frozen encoders by one hypernetwork",
    "stitch rank": "say which pairs of encoders are worth joining, and what that costs",
    "stitch altmoe": "predict the latents of each encoder from any other",
    "stitch retrieve": "find what belongs to a text or picture through joined encoders",
    "compose": "join models that learned different modalities from one base",
    "stitch report": "write the page of what stitching came to",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb. A wrong command line ends with one line that says what is allowed, and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        verbs = "\n".join(f"  {verb:<18}{text}" for verb, text in VERBS.items())
        print(f"usage: fourm VERB [--config FILE] [--key value ...]\n\n{verbs}\n\nfourm VERB --help lists its keys.")
        return
    verb, options = split(words)
    if verb not in VERBS:
        _refuse(f"fourm: there is no verb {verb!r}{_nearest(verb, VERBS)}; allowed are {', '.join(VERBS)}")
    module = importlib.import_module(f"fourm.verbs.{re.sub('[- ]', '_', verb)}")
    module.run(read(module.Config, options, verb))


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of two words where there is such a one, and its options."""
    count = 2 if " ".join(words[:2]) in VERBS else 1
    return " ".join(words[:count]), list(words[count:])


def read(config: Any, options: Sequence[str], verb: str = "") -> Any:
    """A verb's `Config` from `--config` files and `--key value` options, the later ones winning.

    What a config with `positional` needs is given without its key.
    """
    parser = ArgumentParser(prog=f"fourm {verb}", description=VERBS.get(verb), exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(config, as_group=False, as_positional=getattr(config, "positional", False))
    try:
        values = parser.instantiate(parser.parse_args(list(options)))
        values.pop("config")
        return config(**values)
    except (ArgumentError, ValueError) as error:
        message = re.sub(r"<class '(\w+)'>|typing\.", r"\1", " ".join(str(error).split()))
        known = [key for action in parser._actions for key in (action.dest, action.dest.rpartition(".")[2])]
        _refuse(f"fourm {verb}: {message}{_nearest_key(message, known)}")


def _nearest_key(message: str, known: Sequence[str]) -> str:
    """The key that was meant, where jsonargparse says that there is none of a name."""
    unknown = re.search(r"(?:unrecognized arguments: --|option ')([\w.]+)", message, re.IGNORECASE)
    item = re.search(r"class_path '([\w.]+)\.(\w+)'", message)  # of a list of dataclasses
    if item:
        known = list(inspect.signature(getattr(importlib.import_module(item[1]), item[2])).parameters)
    return _nearest(unknown[1], known) if unknown else ""


def _nearest(word: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)
