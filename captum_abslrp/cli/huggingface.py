"""Image classifiers from Hugging Face transformers, with their classes and image processors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_abslrp.checks import logits_of
from captum_abslrp.cli.files import UserError, first_line, quiet
from captum_abslrp.visualization import denormalize

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "hf:"
BLANK_SIZE = (224, 224)


class Pictures:
    """The preprocessing of an image processor.

    Its normalization, an affine map per channel, is determined from a black and a white image, because
    processors use different options.

    Args:
        processor: an image processor of transformers.
        mode: the mode of its input images, ``"L"`` or ``"RGB"``.
    """

    def __init__(self, processor: Any, mode: str) -> None:
        from PIL import Image

        self.processor = processor
        black, white = (self.prepare(Image.new(mode, BLANK_SIZE, c)) for c in ("black", "white"))
        channels, height, width = black.shape
        self.input_size: tuple[int, int, int] = (channels, height, width)
        middle = (slice(None), height // 2, width // 2)  # the border may be padding
        self.black, self.white = black[middle], white[middle]

    def prepare(self, image: Image) -> Tensor:
        """Return the model's input, (C, H, W), for an image."""
        # Before version 5, some processors expect a channel axis.
        given = np.array(image)[None] if image.mode == "L" else image
        values: Tensor = self.processor(images=given, return_tensors="pt")["pixel_values"]
        if values.ndim != 4 or len(values) != 1:
            raise ValueError(f"it returns an input of shape {tuple(values.shape)}")
        return values[0].float()  # uint8 if the processor does not rescale

    def show(self, image: Tensor) -> Tensor:
        """Convert an input of the model to an image with values in [0, 1]."""
        std = 1 / (self.white - self.black)
        shown = denormalize(image, (-self.black * std).tolist(), std.tolist())
        return shown.flip(0) if getattr(self.processor, "do_flip_channel_order", False) else shown


def place_of(name: str) -> str:
    """Return the folder or the name on the hub for ``hf:FOLDER`` or ``hf:ORG/NAME``."""
    given = name.removeprefix(PREFIX)
    path = Path(given).expanduser()
    if given and path.is_dir():
        return str(path.resolve())
    if not given or path.is_absolute() or given.startswith("."):
        raise UserError(
            f"Expected `--model` to be {PREFIX}ORG/NAME or {PREFIX}FOLDER, but got {name!r}, which is not a "
            "folder."
        )
    return given


def load(name: str) -> tuple[nn.Module, list[str], Pictures]:
    """Load a model that returns logits, the names of its classes and its preprocessing."""
    place, transformers = place_of(name), _transformers(name)
    config, pictures = _described(name, place, transformers)
    with _one_line(name, place):
        model, found = transformers.AutoModelForImageClassification.from_pretrained(
            place,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # checked below, with a shorter message
            trust_remote_code=False,
        )
    parameters = {key for key, _ in model.named_parameters()}
    unfit = sorted(key for key, *_ in found["mismatched_keys"])
    random = sorted(parameters.intersection(found["missing_keys"]).difference(unfit))
    if unfit:
        raise UserError(f"the weights of {name!r} do not match its configuration: {_first(unfit)}")
    if random:
        raise UserError(
            f"Expected `--model` to be an image classifier, but got {name!r}, whose weights lack "
            f"{_first(random)}."
        )
    model = model.float().eval()
    # Captum methods and scores expect a tensor. A wrapper would change the class and all module paths.
    model.register_forward_hook(_logits_alone)
    names = [str(config.id2label.get(i, f"class {i}")) for i in range(config.num_labels)]
    if names:
        _check_fit(name, model, pictures.input_size, len(names))
    return model, names, pictures


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Build a model with random weights; return it with the shape of its input, (C, H, W)."""
    place, transformers = place_of(name), _transformers(name)
    config, pictures = _described(name, place, transformers)
    with _one_line(name, place):
        model: nn.Module = transformers.AutoModelForImageClassification.from_config(
            config, trust_remote_code=False
        )
    return model.float(), pictures.input_size


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:2]) + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")


def _logits_alone(module: nn.Module, args: Any, output: Any) -> Any:
    return logits_of(output)


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"Expected transformers to be installed for {name!r}, but it is not. Run "
            "`pip install 'captum-abslrp[hf]'`."
        ) from error
    return transformers


def _described(name: str, place: str, transformers: Any) -> tuple[Any, Pictures]:
    """Return the configuration and the preprocessing of a model, which must be an image classifier."""
    with _one_line(name, place):
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"Expected `--model` to be an image classifier, but got {name!r} of type {config.model_type!r}."
        )
    with _one_line(name, place):
        processor = transformers.AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
    try:
        pictures = Pictures(processor, "L" if getattr(config, "num_channels", 3) == 1 else "RGB")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Expected the image processor of {name!r} to return an input (C, H, W) for an image, but got "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return config, pictures


def _check_fit(name: str, model: nn.Module, size: tuple[int, int, int], n_classes: int) -> None:
    try:
        with torch.no_grad():
            found = model(torch.zeros(1, *size))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Expected {name!r} to accept the inputs {size} of its image processor, but got "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(found, Tensor) or found.shape != (1, n_classes):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"Expected `--model` to return one score for each of its {n_classes} classes, but got {name!r}, "
            f"which returns {shape}."
        )


@contextmanager
def _one_line(name: str, place: str) -> Iterator[None]:
    """Load without progress bars and warnings; turn errors into one line."""
    from safetensors import SafetensorError

    try:
        with _silent():
            yield
    except (
        *(ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError),
        SafetensorError,
    ) as error:
        # Keep the first sentence; the others are advice for Python code.
        reason = first_line(error).partition(". ")[0].removesuffix(".")
        if (
            isinstance(error, OSError) and not Path(place).is_dir()
        ):  # errors of the hub are OSErrors
            raise UserError(
                f"{name!r} could not be downloaded ({reason}); pass a folder, {PREFIX}./FOLDER, or use a "
                "model that is included in the package: demo:vgg"
            ) from error
        raise UserError(f"{name!r} could not be loaded: {reason}") from error


@contextmanager
def _silent() -> Iterator[None]:
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    of_transformers = logging.is_progress_bar_enabled()
    of_hub = not hub.are_progress_bars_disabled()
    with quiet("huggingface_hub", "transformers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()  # includes those of the hub
        try:
            yield
        finally:
            if of_transformers:
                logging.enable_progress_bar()
            (hub.enable_progress_bars if of_hub else hub.disable_progress_bars)()
