"""Models by name, with their classes and their preprocessing."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_abslrp import demo, processes
from captum_abslrp.cli import huggingface
from captum_abslrp.cli.files import UserError, first_line, quiet, read_image
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.inspection import stem_stride
from captum_abslrp.text import did_you_mean
from captum_abslrp.visualization import denormalize

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO_PREFIX = "demo:"
PHOTO_MODEL = f"{DEMO_PREFIX}photo"


@dataclass(frozen=True)
class Subject:
    """A model, the names of its classes and its preprocessing.

    `model` returns one score per class. `prepare` turns a picture into model input (C, H, W), `show` turns
    that into values in [0, 1]; `input_size` is its shape. `transform` is the object behind `prepare`, of timm
    or transformers.
    """

    model: nn.Module
    names: Sequence[str]
    prepare: Callable[[Image], Tensor]
    show: Callable[[Tensor], Tensor]
    input_size: tuple[int, int, int]
    transform: Any

    @property
    def channels(self) -> int:
        return self.input_size[0]

    def read(self, path: Path) -> Tensor:
        """Return the model's input for the picture in a file."""
        image = self.prepare(read_image(path, self.channels))
        if tuple(image.shape) != tuple(self.input_size):
            raise UserError(
                f"Expected the preprocessing of the model to return an input {self.input_size} for {path}, "
                f"but got {tuple(image.shape)}. Resize the picture."
            )
        return image

    def label(self, index: int) -> str:
        name = self.names[index].split(",")[0]
        return name if name in (str(index), f"class {index}") else f"{name} ({index})"


def model_names() -> str:
    """Return the help text of ``--model``."""
    demos = ", ".join(DEMO_PREFIX + name for name in demo.list_models())
    return (
        "a timm model, e.g. resnet50 or vit_base_patch16_224; a Hugging Face image classifier, "
        f"{huggingface.PREFIX}ORG/NAME or {huggingface.PREFIX}./FOLDER (requires transformers); or a demo "
        f"model, which needs no network: {demos}, or {PHOTO_MODEL} (EfficientNet-Lite0 on "
        "ImageNet; requires the extra `photos`)"
    )


def exact_name(name: str) -> str:
    """Return the name of a model, with the absolute path of a folder."""
    if name.startswith(huggingface.PREFIX):
        return huggingface.PREFIX + huggingface.place_of(name)
    return name


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--checkpoint`` to the parser of a command."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="file with weights for the timm model (.safetensors or PyTorch), instead of downloaded weights",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device`` to the parser of a command."""
    parser.add_argument(
        "--device", default="cpu", help="torch device to compute on (default: %(default)s)"
    )


def add_smoothing(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--no-smoothing`` to the parser of a command."""
    parser.add_argument(
        "--no-smoothing",
        action="store_true",
        help="draw maps unsmoothed, with the grid of the stride or the patches; by default, pictures are "
        "smoothed over the stride of the first convolution, or over its patches",
    )


def smoothing_of(args: argparse.Namespace, model: nn.Module, inputs: Tensor) -> int:
    """The number of pixels that pictures of a model's maps are smoothed over."""
    if args.no_smoothing:
        return 1
    try:
        return stem_stride(model, inputs)
    except UnsupportedCallError:  # methods of Captum's may run all the same
        return 1


@contextmanager
def of_threads(count: int | None) -> Iterator[None]:
    """Set the number of threads; None does not change it."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(name: str) -> torch.device:
    try:
        device = processes.own_device(torch.device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"Expected `--device` to be available, but got {name!r}: {reason}"
        ) from error
    return device


def load_subject(name: str, checkpoint: Path | None, device: torch.device) -> Subject:
    of_timm = not name.startswith((DEMO_PREFIX, huggingface.PREFIX))
    if checkpoint is not None and not of_timm:
        raise UserError(f"Expected `--checkpoint` with a timm model, but got {name!r}.")
    if name.startswith(huggingface.PREFIX):
        subject = _huggingface_subject(name)
    else:
        subject = _timm_subject(name, checkpoint)
    if not subject.names:
        raise UserError(f"Expected `--model` to be a classifier, but got {name!r} without classes.")
    subject.model.eval().requires_grad_(False).to(device)
    return subject


def _huggingface_subject(name: str) -> Subject:
    model, names, pictures = huggingface.load(name)
    return Subject(
        model, names, pictures.prepare, pictures.show, pictures.input_size, pictures.processor
    )


def _timm_subject(name: str, checkpoint: Path | None) -> Subject:
    """A model of timm's or of the demo, which has the configuration of one."""
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    if name.startswith(DEMO_PREFIX):
        model = _load_demo_model(name.removeprefix(DEMO_PREFIX))
    else:
        model = _load_timm_model(name, checkpoint)
    digits = name.startswith(DEMO_PREFIX) and name != PHOTO_MODEL
    names: Sequence[str] = demo.CLASS_NAMES if digits else _class_names(model)
    config: dict[str, Any] = resolve_model_data_config(model)
    prepare: Callable[[Image], Tensor] = create_transform(**config, is_training=False)
    return Subject(
        model=model,
        names=names,
        prepare=prepare,
        show=lambda image: denormalize(image, config["mean"], config["std"]),
        input_size=config["input_size"],
        transform=prepare,
    )


def _load_demo_model(name: str) -> nn.Module:
    if DEMO_PREFIX + name == PHOTO_MODEL:
        try:
            return demo.load_photo_model()
        except ModuleNotFoundError as error:
            raise UserError(f"--model: {error}") from error
    if name not in demo.list_models():
        known = [*demo.list_models(), PHOTO_MODEL.removeprefix(DEMO_PREFIX)]
        there_are = ", ".join(DEMO_PREFIX + other for other in known)
        raise UserError(
            f"Expected `--model` to be a demo model, but got {DEMO_PREFIX + name!r}"
            f"{did_you_mean(name, known, prefix=DEMO_PREFIX)}. Available: {there_are}."
        )
    return demo.load_model(name)


def build_model(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A demo model, or another one with random weights; and the shape of its input."""
    import timm

    if name.startswith(huggingface.PREFIX):
        return huggingface.build(name)
    if name.startswith(DEMO_PREFIX):
        model: Any = _load_demo_model(name.removeprefix(DEMO_PREFIX))
    else:
        _check_known(name)
        model = timm.create_model(name, pretrained=False)
    return model, model.default_cfg["input_size"]


def _check_known(name: str) -> None:
    import timm

    elsewhere = ":" in name  # hf-hub:OWNER/NAME and local-dir:FOLDER are timm's to resolve
    if not elsewhere and not timm.is_model(name):
        known = [huggingface.PREFIX + name] if "/" in name else timm.list_models()
        raise UserError(
            f"Expected `--model` to be a timm model, {huggingface.PREFIX}ORG/NAME or {DEMO_PREFIX}NAME, but "
            f"got {name!r}{did_you_mean(name, known)}."
        )


def _load_timm_model(name: str, checkpoint: Path | None) -> nn.Module:
    import timm

    _check_known(name)
    if checkpoint is not None:
        return _load_from_checkpoint(name, checkpoint)
    try:
        with quiet("huggingface_hub", "timm"):
            model: nn.Module = timm.create_model(name, pretrained=True)
    except OSError as error:
        # So are the errors of the hub, of sockets and of urllib.
        raise UserError(
            f"the weights of {name!r} could not be downloaded ({first_line(error)}); pass them with "
            f"--checkpoint, or use a model that is included in the package: {DEMO_PREFIX}vgg"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name!r} could not be loaded: {first_line(error)}") from error
    return model


def _load_from_checkpoint(name: str, checkpoint: Path) -> nn.Module:
    import timm

    state = _read_checkpoint(checkpoint)
    options: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name) if ":" not in name else None
    classifier = getattr(config, "classifier", None)
    if isinstance(classifier, str) and f"{classifier}.weight" in state:
        options["num_classes"] = len(state[f"{classifier}.weight"])
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the weights in {checkpoint} do not match {name!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    return model


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Load the state dict in a file; unwrap nested dicts and remove prefixes of wrappers."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings():  # of old protocols; what fails is said below
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"Expected `--checkpoint` to be a weights file, but got {path}: {first_line(error)}"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"Expected `--checkpoint` to contain a state dict, but got {path} without one."
        )
    return {
        key.removeprefix("_orig_mod.").removeprefix("module."): value
        for key, value in content.items()
    }


def _class_names(model: nn.Module) -> Sequence[str]:
    """Names that came with the weights, else ImageNet's where the count is theirs, else numbers."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    count: int = getattr(model, "num_classes", 0)
    if not count:
        return []
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    given = config.get("label_names")
    if given and len(given) == count:
        described: dict[str, str] = config.get("label_descriptions") or {}
        return [described.get(name, name) for name in given]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        return list(ImageNetInfo(subset).label_descriptions())
    return [f"class {index}" for index in range(count)]
