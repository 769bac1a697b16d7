"""The text tokenizer: one Hugging Face WordPiece for captions and for every structured modality.

Ids as in 4M: 0 `[PAD]`, 1 `[UNK]`, 2 `[SOS]`, 3 `[EOS]`, then the sentinels `[S_0]`, `[S_1]`, ..., then the number
words `v0=0` ... `v3=<bins - 1>`, then learned pieces.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from fourm.checkpoint import read_json
from fourm.data.transforms import TRANSFORMS, Crop, View
from fourm.tokenization.structured import CODECS, CodecConfig

CONTROL = ("[PAD]", "[UNK]", "[SOS]", "[EOS]")
EOS = CONTROL.index("[EOS]")
# Letters that get pieces of their own, at the start of a word and inside one, whether they occur in the texts or not:
# a word with a letter that has none is [UNK] as a whole.
LETTERS = [letter for letter in map(chr, range(0x100)) if letter.isalnum()]
SPLIT = re.compile(r"\s*([-'’/])\s*")
AFTER_WORD = re.compile(r"\s+([:;)])")
ROLES = 4  # number words are v0=..., v1=..., v2=..., v3=...


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 30_000, bins: int = 1000, sentinels: int = 200, lowercase: bool = True
) -> Tokenizer:
    """Learns a WordPiece vocabulary.

    Args:
        texts: What to learn the pieces from.
        vocab_size: Number of ids at most, special ones included.
        bins: Number words per role.
        sentinels: Number of span sentinels.
        lowercase: Fold case, and strip accents.

    Raises:
        ValueError: `vocab_size` leaves no room for learned pieces.
    """
    numbers = [f"v{role}={index}" for role in range(ROLES) for index in range(bins)]
    words = [f"[S_{index}]" for index in range(sentinels)] + numbers
    special = [AddedToken(word, special=True, normalized=False) for word in CONTROL]
    special += [AddedToken(word, single_word=True, special=True, normalized=False) for word in words]
    if vocab_size <= len(special):
        raise ValueError(f"vocab_size is {vocab_size}, but {len(special)} ids are special; it must be larger")
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(chain((letter * 2 for letter in LETTERS), texts), trainer)
    return tokenizer


class TextTokenizer:
    """Raw values to sequences of ids and back, through a codec's text.

    Args:
        tokenizer: A fitted WordPiece, shared by all text modalities.
        codec: How values are written as text.

    Attributes:
        inner: Tokenizer of the ids within the values, where there is one (`CodecConfig.inner`).

    Raises:
        ValueError: The codec has more bins than the tokenizer has number words.
    """

    def __init__(self, tokenizer: Tokenizer, codec: CodecConfig):
        self.tokenizer = tokenizer
        self.config = codec
        self.codec = CODECS[codec.codec](codec)
        self.vocab_size = tokenizer.get_vocab_size()
        self.grid = None
        self.inner: Any = None
        largest = max(codec.bins, len(codec.fields)) - 1
        if codec.codec != "caption" and tokenizer.token_to_id(f"v0={largest}") is None:
            raise ValueError(f"{codec.codec} needs the number word 'v0={largest}', which this text tokenizer lacks")
        words = tokenizer.get_vocab()
        self._dropped = [index for word, index in words.items() if word in ("[PAD]", "[SOS]") or word[:3] == "[S_"]

    def encode(self, raw: Sequence[Any]) -> list[np.ndarray]:
        """Values to ids, int32 (length,) each, without `[EOS]` and sentinels.

        Raises:
            ValueError: A value is not of the codec's form; the error gives its index.
        """
        texts = []
        for index, value in enumerate(raw):
            try:
                texts.append(self.codec.to_text(value))
            except (TypeError, KeyError, ValueError) as error:
                raise ValueError(f"value {index} ({self.config.codec}): {error}") from error
        return [np.array(entry.ids, np.int32) for entry in self.tokenizer.encode_batch(texts)]

    def decode(self, ids: Iterable[Sequence[int]]) -> list[Any]:
        """Ids up to `[EOS]` to values; padding and sentinels are left out."""
        return [self.codec.from_text(text) for text in self.decode_text(ids)]

    def decode_text(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """Ids up to `[EOS]` to plain text, with the spaces taken out that words were split at."""
        kept = []
        for row in ids:
            array = np.asarray(row, np.int64)
            before_end = array[: np.argmax(array == EOS)] if EOS in array else array
            kept.append(before_end[~np.isin(before_end, self._dropped)].tolist())
        texts = self.tokenizer.decode_batch(kept, skip_special_tokens=False)
        return [SPLIT.sub(r"\1", AFTER_WORD.sub(r"\1", text)) for text in texts]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, `tokenizer.json` and a card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        config = {"type": "text", **dataclasses.asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md").write_text(
            f"# {folder.name}\n\nWordPiece of {self.vocab_size} ids; values are written as text by the codec "
            f"`{self.config.codec}`. `load_tokenizer(folder)` gives `encode(values)` and `decode(ids)`.\n"
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> TextTokenizer:
        """Loads a saved tokenizer."""
        config = read_json(Path(folder) / "config.json")
        config.pop("type", None)
        config["fields"] = {name: tuple(bounds) for name, bounds in config.get("fields", {}).items()}
        return cls.from_file(Path(folder) / "tokenizer.json", CodecConfig(**config))

    @classmethod
    def from_file(cls, path: str | Path, codec: CodecConfig | None = None) -> TextTokenizer:
        """Loads a bare Hugging Face tokenizer file, such as 4M's `text_tokenizer_4m_wordpiece_30k.json`.

        Args:
            path: The file.
            codec: How values are written as text; default: captions, which are their own text.

        Raises:
            ValueError: There is no such file, or it is not a tokenizer.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} is not a file, expected a Hugging Face tokenizer (.json)")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        return cls(tokenizer, codec or CodecConfig("caption"))


def shown_value(codec: str, raw: Any, view: View, crops: int = 1, **inner: Any) -> Any:
    """What a view shows of a raw value, in the form that a text codec writes.

    Args:
        codec: A name in `CODECS`, or `vectors` for embedded captions.
        raw: The value as it is stored: in the codec's form, or as 4M and `fourm label` store it.
        view: Which part of the image, and the seed of random choices.
        crops: Of as many captions each crop has its own; of another number a random one is taken.
        inner: `encode` and `mask_size` of the transform, where ids stand within the value.
    """
    options: dict[str, Any] = {}
    if codec in ("caption", "vectors"):
        captions = raw["emb"] if isinstance(raw, Mapping) and "emb" in raw else raw
        options = {"choose": "crop" if len(captions) == crops else "random"}
    elif inner and codec in ("human_poses", "sam_instances"):
        options = inner if codec == "sam_instances" else {"encode": inner["encode"]}
    return TRANSFORMS[codec](**options)(raw, view) if codec in TRANSFORMS else raw


def fit_text_tokenizers(
    samples: Iterable[Mapping[str, Any]],
    codecs: Mapping[str, CodecConfig],
    vocab_size: int,
    bins: int,
    sentinels: int,
    lowercase: bool = False,
) -> dict[str, TextTokenizer]:
    """One WordPiece fitted on all text modalities of the samples, with one tokenizer per modality around it.

    Args:
        samples: Raw samples, in the codecs' form or as `fourm label` writes them; a modality may be absent.
        codecs: How each modality is written as text.
        vocab_size: As in `train_text_tokenizer`, like the others.
        bins: See there.
        sentinels: See there.
        lowercase: See there. Off, names of places come back as they were.
    """
    writers = {name: CODECS[config.codec](config) for name, config in codecs.items()}
    texts = (
        writer.to_text(_to_learn_from(codecs[name].codec, sample[name], seed))
        for seed, sample in enumerate(samples)
        for name, writer in writers.items()
        if name in sample
    )
    tokenizer = train_text_tokenizer(texts, vocab_size, bins, sentinels, lowercase)
    return {name: TextTokenizer(tokenizer, config) for name, config in codecs.items()}


def _to_learn_from(codec: str, raw: Any, seed: int) -> Any:
    """A value of the whole image, of about any size, with ids that stand for those that its inner tokenizer makes."""
    length = 8 if codec == "human_poses" else 16
    return shown_value(codec, raw, View(Crop(0, 0, 1024, 1024), 1024, 1024, seed=seed), mask_size=64,
                       encode=lambda values: np.zeros((len(values), length), int))  # fmt: skip
