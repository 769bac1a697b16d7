"""Labels for pictures by teachers: new modalities beside the pictures, aligned with them.

`TEACHERS` has functions that make teachers from options; a teacher takes a list of raw values and gives a list of as
many labels. A function of the user's, `module.path:function`, is a teacher too: it is called with the list and the
options, and returns what shards can hold: uint8 or uint16 images, float arrays, strings, or anything JSON has. That is
also the way to bring what neither timm nor transformers has under a name: human poses (HMR 2.0), SAM's instances as
polygons, ImageBind; `fourm.data.transforms` says what these look like.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.utils.rnn import pad_sequence

from fourm import runtime
from fourm.checkpoint import read_json
from fourm.data.pixels import canny, depth_normals, luma, palettes, picture, statistics
from fourm.data.rewrite import rewrite, write_durably
from fourm.data.shards import ShardDataset
from fourm.encoders import from_transformers, import_function, load_encoder

Teacher = Callable[..., Sequence[Any]]

# Teachers without weights --------------------------------------------------------------------------------------------


def edges(low: float = 24, high: float = 72) -> Teacher:
    """Canny's edges: uint8 (H, W), 255 on an edge.

    Args:
        low: Gradient (Sobel's, of a blurred picture) above which a pixel continues an edge.
        high: Gradient above which a pixel starts one.
    """
    return lambda images: [canny(luma(picture(image)), low, high).astype(np.uint8) * 255 for image in images]


def colours() -> Teacher:
    """Palettes of one to seven colours, `[{"1": [[r, g, b]], ..., "7": ...}]`."""
    return lambda images: [palettes(picture(image)) for image in images]


def metadata(threshold: float = 0.6) -> Teacher:
    """4M-21's metadata, as far as pixels and other labels tell.

    The label's `source` is the pictures' modality, or a mapping from these roles to modalities: `image`; `caption` (of
    several the first counts); `boxes` of COCO's classes; `people` (human poses); `instances` (a list of SAM's);
    `classes` (class ids). Walkability, objectness, geometric complexity, occlusion, watermark and aesthetic scores need
    models of their own: a function can add them.

    Args:
        threshold: Smallest score of a box that counts.
    """

    def count(image: Any, caption: Any = None, boxes: Any = None, people: Any = None, instances: Any = None,
              classes: Any = None) -> dict[str, float]:  # fmt: skip
        numbers = statistics(picture(image))
        if caption is not None:
            text = captions(caption)[0]
            sentences = re.findall(r"[^.!?]*\w[^.!?]*", text)
            numbers |= {"caption_n_chars": len(text), "caption_n_words": len(text.split())}
            numbers["caption_n_sentences"] = len(sentences)
        if people is not None:
            numbers["n_humans"] = len(people["bbox_xyxy"]) if people else 0
        if instances is not None:
            numbers["n_sam_instances"] = len(instances)
        if boxes is not None:
            names = [box["class_name"] for box in boxes["instances"] if box["score"] >= threshold]
            numbers |= {"n_coco_instances": len(names), "coco_instance_diversity": len(set(names))}
        if classes is not None:
            numbers["semantic_diversity"] = len(np.unique(classes))
        return numbers

    def label(image: list[Any], **others: list[Any]) -> list[dict[str, float]]:
        others = {"image": image, **others}
        return [count(**dict(zip(others, row, strict=True))) for row in zip(*others.values(), strict=True)]

    return label


def captions(value: Any) -> list[str]:
    """All captions of a raw value: a string, `{"caption": string}`, or a list of such."""
    several = [value] if isinstance(value, (str, Mapping)) else list(value)
    found = [one["caption"] if isinstance(one, Mapping) else one for one in several]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError(f"expected captions, got {value!r:.80}")
    return found


def normals_of_depth(fov: float = 60.0) -> Teacher:
    """Normals by geometry: uint8 (H, W, 3), (n + 1) / 2 * 255, x to the right, y up, z towards the camera.

    The label's `source` is a metric depth (H, W), as the teacher `depth` writes it.

    Args:
        fov: Horizontal angle of view in degrees.
    """
    return lambda depths: [_coded(depth_normals(depth, fov)) for depth in depths]


def _coded(normals: np.ndarray) -> np.ndarray:
    unit = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    return np.rint((unit + 1) * 127.5).clip(0, 255).astype(np.uint8)


# Frozen encoders -----------------------------------------------------------------------------------------------------


def by_size(function: Callable[[list[np.ndarray]], Any]) -> Teacher:
    """A teacher of any pictures from one of uint8 pictures (H, W, 3) of one size, as networks are."""

    def label(images: Sequence[np.ndarray]) -> list[Any]:
        images = [picture(image) for image in images]
        labels: list[Any] = [None] * len(images)
        for shape in dict.fromkeys(image.shape for image in images):
            rows = [row for row, image in enumerate(images) if image.shape == shape]
            for row, value in zip(rows, function([images[row] for row in rows]), strict=True):
                labels[row] = value
        return labels

    return label


def features(encoder: str, size: int = 0, pooled: bool = False, device: str = "cpu") -> Teacher:
    """What a frozen encoder says: maps (h, w, dim) or vectors (dim,), float16.

    Args:
        encoder: A name as in `fourm.encoders`.
        size: Pixels of the shorter side that it sees; default: its own.
        pooled: One vector for the whole picture.
        device: Where it runs.
    """
    network: Any = load_encoder(encoder, device, size)
    compute = network.pooled if pooled else network.features
    return by_size(lambda images: compute(images).half().cpu().numpy())


def hed(size: int = 0, device: str = "cpu") -> Teacher:
    """Edges of holistically-nested edge detection (Xie and Tu, 2015): their probability as uint8 (H, W).

    Args:
        size: Pixels of the shorter side that it sees; default: as they are. Small pictures have finer edges so.
        device: Where it runs.
    """
    network: Any = load_encoder("package:hed", device, size)

    def label(images: list[np.ndarray]) -> np.ndarray:
        found = adaptive_avg_pool2d(network.edges(images), images[0].shape[:2])
        return (found * 255).round().byte().cpu().numpy()

    return by_size(label)


def text_features(encoder: str, length: int = 77, device: str = "cpu") -> Teacher:
    """Embedded captions: (L, dim) float16 of one, (captions, L, dim) of a list of them, filled up with rows of NaN.

    The label's `source` is a modality with captions.

    Args:
        encoder: A text encoder's name; 4M-21's is a T5-XXL, as `transformers:google/t5-v1_1-xxl`.
        length: Tokens of a caption at most.
        device: Where it runs.
    """
    network: Any = load_encoder(encoder, device, length)

    def label(values: list[Any]) -> list[np.ndarray]:
        found = iter(network.features([text for value in values for text in captions(value)]))
        filled = [pad_sequence([next(found) for _ in captions(value)], True, float("nan")) for value in values]
        arrays = [one.half().cpu().numpy() for one in filled]
        return [a if isinstance(value, list) else a[0] for a, value in zip(arrays, values, strict=True)]

    return label


# Models of transformers, by hub id or folder -------------------------------------------------------------------------


def _predictor(auto: str, task: str, model: str, device: str) -> tuple[Any, Callable[..., Any]]:
    """A model, and a function from pictures to what its processor makes of the output, in the pictures' size."""
    network = from_transformers(auto, model).eval().to(device)
    processor = from_transformers("AutoImageProcessor", model)
    post_process = getattr(processor, f"post_process_{task}", None)
    if not post_process:
        raise ValueError(f"{model}: {type(processor).__name__} has no post-processing for {task}")
    asked = [name for name in ("source_sizes", "target_sizes") if name in inspect.signature(post_process).parameters]

    @torch.no_grad()
    def predict(images: list[np.ndarray], **options: Any) -> Any:
        inputs = processor(images=images, return_tensors="pt").to(device)
        sizes = [image.shape[:2] for image in images]
        return post_process(network(**inputs), **{name: sizes for name in asked}, **options)

    return network, predict


def depth(model: str, output: str = "metric", device: str = "cpu") -> Teacher:
    """Depth: uint16 (H, W), farther is more.

    Args:
        model: Such as `Intel/zoedepth-nyu` (metric), `depth-anything/Depth-Anything-V2-Base-hf` (inverse).
        output: What the model predicts. `metric`: metres, written as millimetres up to 65.535 m. `inverse`: disparity
            up to scale and shift (MiDaS, DPT, Depth Anything), turned around, stretched to 0..65535 in every picture.
        device: Where it runs.
    """
    if output not in ("metric", "inverse"):
        raise ValueError(f"output is {output!r}, allowed are 'metric' and 'inverse'")
    _, predict = _predictor("AutoModelForDepthEstimation", "depth_estimation", model, device)

    def coded(found: np.ndarray) -> np.ndarray:
        if not np.isfinite(found).all():
            raise ValueError(f"{model} gave a depth that is not finite")
        if output == "inverse":
            found = (found.max() - found) / max(float(np.ptp(found)), 1e-12) * 65.535
        return np.rint(found * 1000).clip(0, 65535).astype(np.uint16)

    return by_size(lambda images: [coded(one["predicted_depth"].float().cpu().numpy()) for one in predict(images)])


def normals(model: str, device: str = "cpu") -> Teacher:
    """Surface normals: uint8 (H, W, 3), (n + 1) / 2 * 255 along the model's own axes.

    Args:
        model: A model for normal estimation, such as Sapiens2's.
        device: Where it runs.
    """
    _, predict = _predictor("AutoModelForNormalEstimation", "normal_estimation", model, device)
    return by_size(lambda images: [_coded(one["normals"].float().cpu().numpy().transpose(1, 2, 0))
                                   for one in predict(images)])  # fmt: skip


def segmentation(model: str, device: str = "cpu") -> Teacher:
    """Semantic segmentation: the model's class ids, uint8 (H, W), or uint16 beyond 256 classes.

    Args:
        model: Such as `facebook/mask2former-swin-base-coco-panoptic` or `nvidia/segformer-b0-finetuned-ade-512-512`.
        device: Where it runs.
    """
    config = type(from_transformers("AutoConfig", model)).__name__
    universal = config.startswith(("Mask2Former", "MaskFormer", "Eomt"))
    auto = f"AutoModelFor{'Universal' if universal else 'Semantic'}Segmentation"
    network, predict = _predictor(auto, "semantic_segmentation", model, device)
    dtype = np.uint8 if network.config.num_labels <= 256 else np.uint16
    return by_size(lambda images: [ids.cpu().numpy().astype(dtype) for ids in predict(images)])


def detection(model: str, threshold: float = 0.5, device: str = "cpu") -> Teacher:
    """Boxes: `{"instances": [{"boxes": [xmin, ymin, xmax, ymax] from 0 to 1, "score", "class_name"}]}`.

    Args:
        model: Such as `facebook/detr-resnet-50`.
        threshold: Smallest score.
        device: Where it runs.
    """
    network, predict = _predictor("AutoModelForObjectDetection", "object_detection", model, device)

    def label(images: list[np.ndarray]) -> list[Any]:
        height, width = images[0].shape[:2]
        labels = []
        for found in predict(images, threshold=threshold):
            boxes = (found["boxes"].cpu().double() / torch.tensor([width, height] * 2)).clamp(0, 1).round(decimals=5)
            scores, names = found["scores"].double().round(decimals=5).tolist(), found["labels"].tolist()
            rows = zip(boxes.tolist(), scores, (network.config.id2label[name] for name in names), strict=True)
            labels.append({"instances": [{"boxes": b, "score": s, "class_name": name} for b, s, name in rows]})
        return labels

    return by_size(label)


def caption(model: str, prompt: str = "", length: int = 40, device: str = "cpu") -> Teacher:
    """Captions: text, by greedy decoding.

    Args:
        model: Such as `Salesforce/blip-image-captioning-base`.
        prompt: Text that the model goes on from.
        length: New tokens at most.
        device: Where it runs.
    """
    network = from_transformers("AutoModelForImageTextToText", model).eval().to(device)
    processor = from_transformers("AutoProcessor", model)

    def label(images: list[np.ndarray]) -> list[str]:
        text = {"text": [prompt] * len(images)} if prompt else {}
        inputs = processor(images=images, return_tensors="pt", **text).to(device)
        ids = network.generate(**inputs, max_new_tokens=length, do_sample=False, num_beams=1)
        return [one.strip() for one in processor.batch_decode(ids, skip_special_tokens=True)]

    return by_size(label)


TEACHERS: dict[str, Callable[..., Teacher]] = {
    "canny": edges,
    "palette": colours,
    "metadata": metadata,
    "normals_of_depth": normals_of_depth,
    "features": features,
    "hed": hed,
    "text_features": text_features,
    "depth": depth,
    "normals": normals,
    "segmentation": segmentation,
    "detection": detection,
    "caption": caption,
}


# Labelling -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelConfig:
    """What to label, and by whom.

    Args:
        data: Root of the raw data; a label goes to `<data>/<split>/<its name>/`, in shards like those of the pictures.
        labels: By name of the new modality: `teacher` (canny, palette, metadata, normals_of_depth, features, hed,
            text_features, depth, normals, segmentation, detection, caption, or module.path:function), `source` (the
            modality it looks at; default: `image`) and its options, which `fourm.data.labels` lists. Later labels may
            look at earlier ones. Give a function for SAM, human poses (HMR 2.0) and ImageBind.
        splits: Which splits.
        image: The modality with the pictures.
        batch_size: Samples a teacher gets at once.
        shard_size: Samples in a shard, where the pictures are plain files.
        workers: Threads that read and decode.
        on_error: `raise`, or `skip` samples that cannot be read or labelled, and list them.
        max_bad: Share of a shard's samples that may be left out; one may in any case.
        device: Where teachers run; default: on the GPU of the process, if there is one.
    """

    data: str
    labels: dict[str, dict[str, Any]]
    splits: tuple[str, ...] = ("train", "val", "test")
    image: str = "rgb"
    batch_size: int = 32
    shard_size: int = 1024
    workers: int = 1
    on_error: Literal["raise", "skip"] = "raise"
    max_bad: float = 0.01
    device: str = "auto"


def load_teacher(settings: Mapping[str, Any], device: str = "cpu") -> Callable[[], Teacher]:
    """The teacher of a label (`teacher` and its options), whose weights are loaded when it is called for.

    Raises:
        ValueError: No such teacher, function or option, or one that is missing.
    """
    options = {name: value for name, value in settings.items() if name not in ("teacher", "source")}
    teacher = settings.get("teacher")
    if isinstance(teacher, str) and ":" in teacher:
        function = functools.partial(import_function(teacher), **options)
        return lambda: function
    if teacher not in TEACHERS:
        raise ValueError(f"teacher is {teacher!r}, allowed are {', '.join(TEACHERS)}, module.path:function")
    known = inspect.signature(TEACHERS[teacher])
    if "device" in known.parameters:
        options.setdefault("device", device)
    try:
        known.bind(**options)
    except TypeError as error:
        raise ValueError(f"teacher {teacher!r}: {error}, its options are {known}") from error
    return functools.cache(functools.partial(TEACHERS[teacher], **options))


def label(config: LabelConfig) -> None:
    """Writes all labels; shards that are already there are kept. How they are made goes to `labels.json` in the root.

    Raises:
        ValueError: Wrong settings, weights that cannot be reached, a label that is there but was made otherwise, or a
            sample that a teacher refuses.
        RuntimeError: A teacher failed otherwise.
    """
    joined = runtime.accelerator()
    root = Path(config.data)
    device = str(joined.device) if config.device == "auto" else config.device
    teachers = {name: load_teacher(settings, device) for name, settings in config.labels.items()}
    _write_record(config, joined.is_main_process)
    for name, settings in config.labels.items():
        source = settings.get("source", config.image)
        sources = list(source.values()) if isinstance(source, Mapping) else [source]

        def labelled(samples: list[dict[str, Any]], name: str = name, source: Any = source) -> list[dict[str, Any]]:
            keys = [sample["__key__"] for sample in samples]
            try:
                if isinstance(source, Mapping):
                    columns = {role: [sample[one] for sample in samples] for role, one in source.items()}
                    values = teachers[name]()(**columns)
                else:
                    values = teachers[name]()([sample[source] for sample in samples])
                if len(values) != len(keys):
                    raise ValueError(f"the teacher gave {len(values)} labels for {len(keys)}")
                return [{"__key__": key, name: value} for key, value in zip(keys, values, strict=True)]
            except ValueError as error:
                raise ValueError(f"label {name!r}, samples {keys[0]!r} to {keys[-1]!r}: {error}") from error
            except Exception as error:  # not the samples' fault
                raise RuntimeError(f"label {name!r}, teacher {config.labels[name]['teacher']}: {error!r}") from error

        joined.wait_for_everyone()  # this label may be made from another
        for split in config.splits:
            dataset = ShardDataset(root / split, sources, config.on_error)
            done = rewrite(
                dataset, root, split, [name], labelled, shard_size=config.shard_size, batch_size=config.batch_size,
                workers=config.workers, rank=joined.process_index, world_size=joined.num_processes,
                describe=f"label {split}/{name}", on_error=config.on_error, max_bad=config.max_bad,
            )  # fmt: skip
            print(f"{split}/{name}: {done.samples} samples, {done.made} shards made, {done.kept} kept, "
                  f"{done.rate:.1f} samples/s, skipped: {dict(done.skipped) | dataset.skipped or 'none'}",
                  flush=True)  # fmt: skip
    runtime.finish(joined)


def _write_record(config: LabelConfig, write: bool) -> None:
    """Says how labels are made, and refuses to go on with one that was made otherwise."""
    path = Path(config.data) / "labels.json"
    record = read_json(path) if path.is_file() else {}
    for name, settings in config.labels.items():
        wanted = {"source": config.image, **settings}
        folders = [folder for split in config.splits if (folder := Path(config.data) / split / name).exists()]
        if folders and record.get(name) != wanted:
            was = record.get(name, "something else")
            raise ValueError(f"{folders[0]} was made by {was}, asked for is {wanted}; delete it or choose another name")
        record[name] = wanted
    if write:
        write_durably(path, json.dumps(record, indent=2) + "\n")
