"""The embedded demo: three slim trained models and scenes of handwritten digits with masks.

Example:
    >>> from captum_abslrp.demo import load_model, load_scenes
    >>> scenes = load_scenes("single", 10)
    >>> tuple(load_model("vgg")(scenes.inputs).shape)
    (10, 10)
"""

from .models import list_models, load_model
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
    "Scenes",
    "list_models",
    "load_model",
    "load_scenes",
    "normalize",
    "render_scenes",
]
