"""Files and messages of the command line."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import captum
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captum_abslrp import __version__, processes
from captum_abslrp.files import is_writable, replaced
from captum_abslrp.report import Section, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

PROGRAM = "captum-abslrp"


class UserError(Exception):
    """An error that the user can fix; its text is printed as one line."""


def read_image(path: Path, channels: int) -> Image:
    """Read an image in its upright orientation; of an animation, read the first frame."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # Apply the EXIF orientation of cameras.
            upright = _of_eight_bits(ImageOps.exif_transpose(image), image.format)
            return upright.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises each of these for broken files.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path} could not be read as an image: {reason}") from error


def _of_eight_bits(image: Image, kind: str | None) -> Image:
    """Convert an image to 8 bits per channel; Pillow would clip values above 255."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        what = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"it contains {what} with an unknown range; save it with 8 or 16 bits per channel"
        )
    return image


def image_files(place: Path, passed_over: Path | None = None) -> list[Path]:
    """Return the files with an image extension in a folder and its subfolders, sorted by path.

    Args:
        place: the folder.
        passed_over: a folder to exclude.
    """
    from PIL import Image

    Image.init()
    endings = set(Image.registered_extensions())
    left_out = passed_over and passed_over.resolve()
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(place, followlinks=True)
        if left_out is None or not Path(folder).resolve().is_relative_to(left_out)
        for name in names
        if Path(name).suffix.lower() in endings
    )


def all_image_files(given: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Return the given images and the images in the given folders, each with its folder under `out`."""
    files: list[tuple[Path, Path]] = []
    for path in given:
        if not path.is_dir():
            files.append((path, Path()))
            continue
        found = image_files(path, out)
        if not found:
            raise UserError(f"Expected {path} to be a folder with images, but got no image in it.")
        files += [(file, file.relative_to(path).parent) for file in found]
    return files


def output_names(images: Sequence[tuple[Path, Path]], out: Path) -> list[Path]:
    """Return one name per image, ``FOLDER/STEM-abslrp``, numbered to avoid other outputs and the inputs."""
    # Ignore case, as some file systems do.
    inputs = {str(path.resolve()).casefold() for path, _ in images}
    taken: set[str] = set()
    last: dict[str, int] = {}
    names = []
    for path, place in images:
        plain = place / f"{path.stem}-abslrp"
        key = str(plain).casefold()
        number = last.get(key, 0) + 1
        name = plain if number == 1 else place / f"{path.stem}-{number}-abslrp"
        while str(name).casefold() in taken or _hits(out / name, inputs):
            number += 1
            name = place / f"{path.stem}-{number}-abslrp"
        last[key] = number
        taken.add(str(name).casefold())
        names.append(name)
    return names


def _hits(output: Path, inputs: set[str]) -> bool:
    endings = (".png", ".npy")
    return any(str(with_suffix(output, e).resolve()).casefold() in inputs for e in endings)


def with_suffix(path: Path, suffix: str) -> Path:
    """Append a suffix; unlike ``Path.with_suffix``, keep dots in the name."""
    return path.with_name(path.name + suffix)


def folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Expected `--out` to be a folder to write to, but got {path}: {error.strerror}"
        ) from error
    return path


def html_file(path: Path | None) -> None:
    """Check that a report can be written, before any computation; `written` creates the folder."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"Expected `--html` to be a file name that ends in .html, but got {path}.")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if path.is_dir():
        reason = "Is a directory"
    elif there != path and not there.is_dir():
        reason = f"{there} is not a directory"
    elif not is_writable(there):
        reason = "Permission denied"
    else:
        return
    raise UserError(f"{path} could not be written: {reason}")


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, which replaces an existing file only when it is complete."""
    try:
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def save_figure(figure: Figure, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a figure as PNG; `notes` are stored as metadata."""
    with written(path) as file:
        figure.savefig(file, format="png", metadata=notes)


def save_text(text: str, path: Path) -> None:
    with written(path) as file:
        file.write(text.encode())


def save_array(values: Tensor, path: Path) -> None:
    with written(path) as file:
        np.save(file, values.numpy())


def save_report(args: argparse.Namespace, sections: Sequence[Section], title: str) -> None:
    """Write the report of a command to the path of `--html`."""
    page = render(sections, title=title, settings=settings_of(args), command=args.line)
    save_text(page, args.html)
    say(f"Report: {args.html}")


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the settings of a command and the versions of the libraries, for a report."""
    import timm

    asked = {
        name.replace("_", "-"): "\n".join(map(str, value))
        if isinstance(value, list)
        else str(value)
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
    if args.model is not None and args.model.startswith("hf:"):
        versions["transformers"] = sys.modules["transformers"].__version__
    return asked | versions


def progress(items: Iterable[Any], unit: str, *, show: bool = True) -> Iterator[Any]:
    steps = list(items)
    show = show and processes.rank() == 0
    yield from tqdm(steps, unit=f" {unit}", file=sys.stderr, disable=not show)


def say(text: str) -> None:
    """Print a line for the user, in the first process only."""
    if processes.rank() == 0:
        tqdm.write(text, file=sys.stdout)


def complain(error: UserError | str, kind: str = "error") -> None:
    tqdm.write(f"{PROGRAM}: {kind}: {error}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hide log messages of a library about retries, so that an error is one line."""
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
