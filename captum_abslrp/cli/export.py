"""``captum-abslrp export``: an explanation that runs without this package."""

from __future__ import annotations

import argparse
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.cli.attributors import add_attributor, attributor_of, contrast_of
from captum_abslrp.cli.files import UserError, complain, say, written
from captum_abslrp.cli.models import Subject, add_checkpoint, load_subject, model_names
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.export import FORMATS, Preprocessing, save_explainer
from captum_abslrp.web import RUNTIME_VERSION, check_folder, find_runtime, write_page


def add_command(commands: Any) -> None:
    """Add the command to a parser's ``add_subparsers()``."""
    parser = commands.add_parser(
        "export",
        help="save a model and its explanation as a file that runs elsewhere",
        description="Write one file that returns the scores of a model and the map of a class: a .pt2 file "
        "for PyTorch, or an ONNX model. Neither needs this package, Captum or timm. The file describes the "
        "preprocessing and the classes. With --web, write a static page that explains images in a browser.",
    )
    parser.set_defaults(command=_export)
    parser.add_argument("--model", required=True, metavar="NAME", help=model_names())
    add_checkpoint(parser)
    add_attributor(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write, FILE.pt2 or FILE.onnx"
    )
    parser.add_argument(
        "--web",
        type=Path,
        metavar="DIR",
        help="folder for a page that explains images in a browser; serve it with "
        "`python -m http.server --directory DIR`",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="DIR",
        help="with --web: folder of the npm package onnxruntime-web (default: node_modules of this folder or "
        f"a parent; otherwise version {RUNTIME_VERSION} is fetched with npm)",
    )


def _export(args: argparse.Namespace) -> int:
    if args.out is None and args.web is None:
        raise UserError("Expected `--out FILE` or `--web DIR`, but got neither.")
    if args.runtime is not None and args.web is None:
        raise UserError("Expected `--web DIR` with `--runtime`, but got none.")
    form = "onnx"
    if args.out is not None:
        form = args.out.suffix.removeprefix(".").lower()
        if form not in FORMATS:
            raise UserError(f"Expected `--out` to end in .pt2 or .onnx, but got {args.out}.")
    subject = load_subject(args.model, args.checkpoint, torch.device("cpu"))
    method = attributor_of(args, subject)
    method.contrast = contrast_of(args, method, subject)
    if args.web is not None:
        _check_folder(args.web)
    made = None
    if args.out is not None:
        with written(args.out) as file:
            made = explainer_of(args, subject, method, form)
            file.write(made[0])
        say(f"{args.out}: {len(made[0]) / 1e6:.1f} MB")
    if args.web is not None:
        _write_page(args, subject, method, made if form == "onnx" else None)
    return 0


def _check_folder(folder: Path) -> None:
    """Raise an error before any computation if the page cannot be written to a folder."""
    try:
        check_folder(folder)
    except ValueError as error:
        raise UserError(f"--web: {error}") from error
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error


def _write_page(
    args: argparse.Namespace, subject: Subject, method: AbsLRP, made: tuple[bytes, Any] | None
) -> None:
    """Write the page; `made` is the ONNX model with its metadata, if it was already made."""
    try:
        with find_runtime(args.runtime) as runtime:
            content, about = made or explainer_of(args, subject, method, "onnx")
            if not isinstance(about["preprocessing"], dict):
                raise UserError(
                    f"Expected a model whose images are resized, cropped and normalized for `--web`, but got "
                    f"{args.model}, see the warning. Use `--out FILE` instead."
                )
            size = write_page(args.web, content, about, runtime)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--web: {error}") from error
    except OSError as error:
        raise UserError(f"{args.web} could not be written: {error.strerror or error}") from error
    say(
        f"{args.web}: a page of {size / 1e6:.1f} MB. Serve it with `python -m http.server --directory "
        f"{args.web}`, and open http://localhost:8000."
    )


def explainer_of(
    args: argparse.Namespace, subject: Subject, method: AbsLRP, form: str
) -> tuple[bytes, Any]:
    """Return the content of a file and its metadata."""
    say(f"Explained by {method!r}")
    preprocessing: Preprocessing | str
    try:
        preprocessing = Preprocessing.of(subject.transform, "L" if subject.channels == 1 else "RGB")
    except ValueError as error:
        complain(f"{args.model}: {error}", kind="warning")
        preprocessing = " ".join(str(subject.transform).split())
    # The example fixes shapes; its values only choose which masks and constants are nonnegative.
    example = torch.randn(1, *subject.input_size, generator=torch.Generator().manual_seed(0))
    target = int(method.contrast == 0)
    content = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the map of the example
            about = save_explainer(
                method,
                content,
                example,
                target,
                format=form,
                name=args.model,
                class_names=subject.names,
                preprocessing=preprocessing,
            )
    except (
        ValueError,
        TypeError,
        IndexError,
        RuntimeError,
        FloatingPointError,
        UnsupportedCallError,
        ImportError,
    ) as error:
        raise UserError(f"{args.model} could not be exported: {error}") from error
    return content.getvalue(), about
