"""Rooms import downwards only, and nothing shadows Hugging Face's `tokenizers`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = [
    {"modalities"}, {"runtime", "faults"}, {"checkpoint", "official_files", "encoders", "logbook", "pipeline"},
    {"data"}, {"tokenization"}, {"masking"}, {"model"}, {"training"}, {"generation"}, {"evaluation"},
    {"stitching", "composition"}, {"verbs"}, {"cli"}, {"__main__"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):  # imports inside functions count too
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("fourm.") and name != "fourm.__version__")


def test_rooms_import_downwards():
    upward = []
    for path in sorted((ROOT / "fourm").rglob("*.py")):
        room = path.relative_to(ROOT / "fourm").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        upward += [
            f"{path.relative_to(ROOT)} imports fourm.{other}"
            for other in imported_rooms(path)
            if other != room and LEVEL[other] >= LEVEL[room]
        ]
    assert not upward, "\n".join(upward)


def test_tokenizers_folder_holds_no_python():
    assert (ROOT / "tokenizers").is_dir()
    assert not list((ROOT / "tokenizers").rglob("*.py"))
    import tokenizers

    assert hasattr(tokenizers, "Tokenizer")  # Hugging Face's, even from the repository's top


def test_nothing_is_unpickled():
    forbidden = ("pickle.load", "import pickle", "allow_pickle=True", "torch.load(", "np.load(", "yaml.load(")
    allowed = {"np.load(": "allow_pickle=False", "torch.load(": "weights_only=True"}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("fourm", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for word in forbidden
        if word in line and allowed.get(word, "\0") not in line
    ]
    assert not found, "\n".join(found)


def test_product_never_reads_the_shared_folder():
    assert not [path for path in (ROOT / "fourm").rglob("*.py") if "shared/" in path.read_text()]
