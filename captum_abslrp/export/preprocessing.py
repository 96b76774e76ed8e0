"""How an image becomes the input of a model, as data that another program can read.

Axes: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preprocessing"]

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
SIZES = ((97, 131), (640, 427), (300, 300))
"""Widths and heights of the pictures for a comparison."""
LARGEST_ERROR = 2.5
"""Pillow and PyTorch round resized images differently, to up to two of 255 levels."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalize an image.

    The steps are those of torchvision: convert the image to `mode`, resize it, crop its center, divide its
    values by 255, subtract `mean` and divide by `std`.

    Attributes:
        mode: ``"RGB"`` or ``"L"`` (grayscale), as in Pillow.
        resize: length of the shorter side, a size (H, W), or None.
        interpolation: name of the filter in Pillow, such as ``"bicubic"``.
        crop: size (H, W) of the part in the center, or None. Smaller images are padded with zeros.
        mean: one value per channel.
        std: one value per channel.
        rounding: where the part starts if its border is half a pixel: ``"even"`` (torchvision) or ``"down"``
            (transformers).

    Example:
        >>> from PIL import Image
        >>> prepare = Preprocessing("RGB", 256, "bicubic", (224, 224), (0.5,) * 3, (0.5,) * 3)
        >>> prepare(Image.new("RGB", (300, 400))).shape
        torch.Size([3, 224, 224])
    """

    mode: str
    resize: int | tuple[int, int] | None
    interpolation: str
    crop: tuple[int, int] | None
    mean: Sequence[float]
    std: Sequence[float]
    rounding: str = "even"

    def __call__(self, image: Image) -> Tensor:
        """Return the input of the model, (C, H, W), for an upright image with 8 bits per channel."""
        from PIL import Image as Images

        image = image.convert(self.mode)
        if self.resize is not None:
            size = self._resized(image.size)
            if size != image.size:
                image = image.resize(size, Images.Resampling[self.interpolation.upper()])
        if self.crop is not None:
            height, width = self.crop
            rounded = int if self.rounding == "down" else round
            left, top = (
                rounded((have - want) / 2) if have >= want else -((want - have) // 2)
                for have, want in zip(image.size, (width, height), strict=True)
            )
            image = image.crop((left, top, left + width, top + height))
        pixels = np.array(image).reshape(*image.size[::-1], -1).transpose(2, 0, 1)
        mean, std = (torch.tensor([*v])[:, None, None] for v in (self.mean, self.std))
        return (torch.from_numpy(pixels.copy()).float() / 255 - mean) / std

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after resizing."""
        assert self.resize is not None
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        width, height = size
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes, for JSON.

        Example:
            >>> Preprocessing("L", None, "bilinear", None, (0.5,), (0.5,)).as_dict()["mode"]
            'L'
        """
        return asdict(self)

    @classmethod
    def of(cls, transform: Callable[[Image], Tensor], mode: str = "RGB") -> Preprocessing:
        """Read the steps of a transform, and compare both on a picture.

        Args:
            transform: a ``Compose`` of timm or torchvision, or an image processor of transformers, that
                resizes, crops and normalizes images.
            mode: the mode of its input images, ``"RGB"`` or ``"L"``.

        Raises:
            ValueError: if the steps are unknown, or compute another input than the transform.

        Example:
            >>> from timm.data import create_transform
            >>> transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.9)
            >>> prepare = Preprocessing.of(transform)
            >>> prepare.resize, prepare.interpolation, prepare.crop
            (248, 'bicubic', (224, 224))
        """
        from PIL import Image as Images

        steps = getattr(transform, "transforms", None)
        if isinstance(steps, (list, tuple)):
            resize, interpolation, crop = _steps_of_compose(steps)
            run = transform
        else:
            resize, interpolation, crop = _steps_of_processor(transform)
            run = _runner(transform)
        # The last steps are the same affine function for all pixels of a channel.
        center = (slice(None), *(slice(n // 2, n // 2 + 1) for n in run(_gray(mode, 0)).shape[1:]))
        black, white = (run(_gray(mode, v))[center].flatten() for v in (0, 255))
        std = 1 / (white - black).double()
        mean = -black.double() * std
        levels = 255 / (white - black).abs().double()[:, None, None]
        sizes = [*SIZES]
        if isinstance(resize, int) and crop is not None:
            sizes += [(_side(resize, crop[1]), resize), (resize, _side(resize, crop[0]))]
        pictures = [Images.fromarray(_picture(*size)).convert(mode) for size in sizes]
        expected = [run(picture) for picture in pictures]
        for rounding in ("even", "down"):
            found = cls(mode, resize, interpolation, crop, _short(mean), _short(std), rounding)
            pairs = zip(map(found, pictures), expected, strict=True)
            if all(a.shape == b.shape and _equal(a, b, levels) for a, b in pairs):
                return found
        raise _unknown(transform, "more than these steps")


def _side(resize: int, crop: int) -> int:
    """A length of the longer side with a border of 1.5 pixels, which shows how borders are rounded."""
    return next(length for length in range(resize, resize + 4) if (length - crop) % 4 == 3)


def _equal(a: Tensor, b: Tensor, levels: Tensor) -> bool:
    """Whether two inputs are the same but for rounding; `levels` are the levels of 255 per unit."""
    return bool(((a - b) * levels).abs().max() <= LARGEST_ERROR)


def _short(values: Tensor) -> tuple[float, ...]:
    """Values with the digits that float32 has."""
    return tuple(float(f"{value:.6g}") for value in values.tolist())


def _unknown(transform: Any, found: str) -> ValueError:
    return ValueError(
        "Expected a preprocessing that resizes an image, crops its center and normalizes it, but got "
        f'{type(transform).__name__} with {found}. Describe it in a text: `preprocessing="..."`.'
    )


def _gray(mode: str, value: int) -> Image:
    from PIL import Image as Images

    return Images.new(mode, (256, 256), value if mode == "L" else (value,) * 3)


def _picture(width: int, height: int) -> np.ndarray[Any, Any]:
    """A picture with smooth and sharp parts, (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin(x / a) + 60 * np.cos(y / b) for a, b in ((9, 7), (4, 21), (17, 3))]
    picture = np.stack(waves, axis=-1)
    picture[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 90)
    return picture.clip(0, 255).astype(np.uint8)


Geometry = tuple[int | tuple[int, int] | None, str, tuple[int, int] | None]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _steps_of_compose(steps: Sequence[Any]) -> Geometry:
    resize: Any = None
    interpolation, crop = "bilinear", None
    for step in steps:
        kind = type(step).__name__
        if kind == "Resize" and resize is None and crop is None and step.max_size is None:
            size = step.size
            if not isinstance(size, int):
                size = int(size[0]) if len(size) == 1 else _pair(size)
            resize, interpolation = size, step.interpolation.value
        elif kind == "CenterCrop" and crop is None:
            crop = _pair(step.size)
        elif kind not in ("ToTensor", "MaybeToTensor", "PILToTensor", "ToImage", "Normalize",
                          "ConvertImageDtype", "ToDtype"):  # fmt: skip
            raise _unknown(steps, kind)
    return resize, interpolation, crop


def _steps_of_processor(processor: Any) -> Geometry:
    def size_of(name: str) -> Any:
        size = getattr(processor, name, None)
        if isinstance(size, int):
            return size
        size = dict(size or {})
        size = {key: value for key, value in size.items() if value is not None}
        if set(size) == {"shortest_edge"}:
            return int(size["shortest_edge"])
        if set(size) == {"height", "width"}:
            return int(size["height"]), int(size["width"])
        raise _unknown(processor, f"{name} {size}")

    resize = size_of("size") if getattr(processor, "do_resize", False) else None
    crop = _pair(size_of("crop_size")) if getattr(processor, "do_center_crop", False) else None
    resample = int(getattr(processor, "resample", None) or 0)
    names = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # numbers of Pillow
    fraction = getattr(processor, "crop_pct", None)
    if fraction and isinstance(resize, int) and crop is None:  # as ConvNeXt: enlarge, then crop
        if resize < 384:
            resize, crop = int(resize / fraction), _pair(resize)
        else:
            resize = _pair(resize)
    return resize, names[resample] if resample < len(names) else "bilinear", crop


def _runner(processor: Any) -> Callable[[Image], Tensor]:
    def run(image: Image) -> Tensor:
        given = np.array(image)[None] if image.mode == "L" else image
        values: Tensor = processor(images=given, return_tensors="pt")["pixel_values"]
        return values[0].float()

    return run
