"""What the README tells people to type exists, and its map shows every file."""

import importlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from fourm.cli import VERBS, read, split

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
ENDS = {"&&", "||", "|", ";", "&", ">", ">>", "2>&1"}


def command_lines(block: str) -> list[list[str]]:
    """The words of each command of a block; lines that end in a backslash go on."""
    commands: list[list[str]] = []
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line.removeprefix("$ "), comments=True), ";"]:
            if word in ENDS:
                commands.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in commands if words]


def fourm_words(words: list[str]) -> list[str] | None:
    """What follows `fourm`, however it is started: as a program, or as a module (also by a launcher)."""
    if ("-m", "fourm") in pairwise(words):
        return words[words.index("fourm") + 1 :]
    words = [word for word in words if not re.match(r"\w+=", word)] or words  # variables before a command
    return words[1:] if Path(words[0]).name == "fourm" else None


COMMANDS = [
    shlex.join(options)
    for block in BLOCKS
    for words in command_lines(block)
    if (options := fourm_words(words)) is not None
]


def section(word: str) -> str:
    """The text below the first heading that holds a word, up to the next heading of its level or above."""
    heading = re.search(rf"^(#+) .*\b{word}\b.*$", README, re.MULTILINE | re.IGNORECASE)
    assert heading, f"README.md has no heading with the word {word!r}"
    rest = README[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def test_readme_shows_commands_of_every_verb():
    shown = {split(shlex.split(command))[0] for command in COMMANDS if command}
    assert shown >= set(VERBS) - {"run"}, f"not shown: {', '.join(set(VERBS) - {'run'} - shown)}"


@pytest.mark.parametrize("command", COMMANDS or ["(no `fourm` command in a bash block of README.md)"])
def test_command_parses(command, monkeypatch, capsys):
    assert COMMANDS, command
    monkeypatch.chdir(ROOT)
    verb, options = split(shlex.split(command) or ["--help"])
    if verb in ("-h", "--help"):
        return
    assert verb in VERBS
    config = importlib.import_module(f"fourm.verbs.{re.sub('[- ]', '_', verb)}").Config
    try:
        config = read(config, options, verb)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err  # --help and --print_config end well
        return
    assert Path(getattr(config, "modalities", None) or ROOT).exists(), f"{config.modalities} is not there"


def test_make_targets_exist():
    code = "\n".join([*re.findall(r"^```.*?^```", README, re.DOTALL | re.MULTILINE), *re.findall(r"`[^`\n]+`", README)])
    mentioned = set(re.findall(r"(?:^|[`\s;&])make ([a-z][\w-]*)", code))
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= mentioned
    assert mentioned <= targets, f"the Makefile has no {', '.join(mentioned - targets)}"


def mapped_files() -> set[Path]:
    """Files that the map names, relative to the top.

    A name is looked up below the last folder named before it (`data/` or `fourm/data/`), then in fourm/, then at the
    top; `*` stands for several files.
    """
    folder, files = ROOT, set()
    text = re.sub(r"https?://\S+|\bruns/\S*", "", section("map"))  # runs/ is there only after a run
    text = re.sub(r"<\w+>", "*", text)
    for name in re.findall(r"[\w.*-]+(?:/[\w.*-]+)*(?:/(?![\w*])|\.(?:py|html|md|toml|ya?ml|cff)\b)", text):
        tops = [folder, ROOT / "fourm", ROOT]
        if name.endswith("/"):
            folder = next((top / name for top in reversed(tops) if (top / name).is_dir()), None)
            assert folder, f"the map names the folder {name}, which is not there"
            continue
        hits = next((found for top in tops if (found := sorted(top.glob(name)))), [])
        assert hits, f"the map names {name}, which is not there"
        files |= {path.relative_to(ROOT) for path in hits}
    return files


def test_map_names_files_that_exist_and_every_file_of_the_product():
    product = {
        path.relative_to(ROOT)
        for path in (ROOT / "fourm").rglob("*.py")
        if not path.name.startswith("__") and path.parent.name != "verbs"  # each verb is among the commands
    }
    missing = product - mapped_files()
    assert not missing, f"not on the map: {', '.join(map(str, sorted(missing)))}"
    assert "verbs/" in section("map")
