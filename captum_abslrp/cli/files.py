"""Files and messages of the command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

PROGRAM = "captum-abslrp"


class UserError(Exception):
    """What the user can put right; its text is the line that they read."""


def read_image(path: Path, channels: int) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # Cameras turn pictures by a note in the file.
            upright = ImageOps.exif_transpose(image)
            return upright.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow answers broken files with each of these.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path} could not be read as an image: {reason}") from error


def output_names(images: Sequence[Path], out: Path) -> list[str]:
    """A name per image, ``STEM-abslrp``, numbered where it would hit another output or an input."""
    # Case is ignored, as some file systems do.
    inputs = {str(path.resolve()).casefold() for path in images}
    taken: set[str] = set()
    names = []
    for path in images:
        number = 1
        name = f"{path.stem}-abslrp"
        while name.casefold() in taken or _hits(out / name, inputs):
            number += 1
            name = f"{path.stem}-{number}-abslrp"
        taken.add(name.casefold())
        names.append(name)
    return names


def _hits(output: Path, inputs: set[str]) -> bool:
    endings = (".png", ".npy")
    return any(str(with_suffix(output, e).resolve()).casefold() in inputs for e in endings)


def with_suffix(path: Path, suffix: str) -> Path:
    """Unlike ``Path.with_suffix``, keeps a dot that is part of the name."""
    return path.with_name(path.name + suffix)


def folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Expected `--out` to be a folder to write to, but got {path}: {error.strerror}"
        ) from error
    return path


def html_file(path: Path | None) -> Path | None:
    """Where a report goes, checked before anything else is done."""
    if path is None:
        return None
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"Expected `--html` to be a file that ends in .html, but got {path}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "Is a directory" if path.is_dir() else "Permission denied"
        raise UserError(f"{path} could not be written: {reason}")
    return path


def save_figure(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from error


def save_text(text: str, path: Path) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from error


def save_array(values: Tensor, path: Path) -> None:
    import numpy as np

    try:
        np.save(path, values.numpy())
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from error


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What a command was asked for, and the versions that answered, for a report."""
    import platform

    import captum
    import timm
    import torch

    from captum_abslrp import __version__

    asked = {
        name.replace("_", "-"): " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in sorted(vars(args).items())
        if name not in ("command", "line") and not (value in (None, []) or value is False)
    }
    versions = {
        "captum-abslrp": __version__,
        "torch": torch.__version__,
        "captum": captum.__version__,
        "timm": timm.__version__,
        "Python": platform.python_version(),
    }
    return asked | versions


def progress(items: Iterable[Any], unit: str, *, show: bool = True) -> Iterator[Any]:
    from tqdm import tqdm

    steps = list(items)
    yield from tqdm(steps, unit=f" {unit}", file=sys.stderr, disable=not show)


def say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


def complain(error: UserError) -> None:
    from tqdm import tqdm

    tqdm.write(f"{PROGRAM}: error: {error}", file=sys.stderr)


def did_you_mean(near: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without the retries that a library logs: an error is one line."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def positive_int(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"Expected a positive integer, but got {text!r}.")
    return value
