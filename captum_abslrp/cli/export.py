"""``captum-abslrp export``: an explanation that runs without this package."""

from __future__ import annotations

import argparse
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from captum_abslrp.cli.attributors import add_attributor, attributor_of, contrast_of
from captum_abslrp.cli.files import UserError, complain, say, written
from captum_abslrp.cli.models import Subject, add_checkpoint, load_subject, model_names
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.export import Preprocessing, check_format, save_explainer


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


def _export(args: argparse.Namespace) -> int:
    if args.out is None:
        raise UserError("Expected `--out FILE`, but got none. Add `--out explainer.onnx`.")
    try:
        form = check_format(args.out, None)
    except ValueError as error:
        raise UserError(f"--out: {error}") from error
    subject = load_subject(args.model, args.checkpoint, torch.device("cpu"))
    with written(args.out) as file:
        content, about = explainer_of(args, subject, form)
        file.write(content)
    say(f"{args.out}: {len(content) / 1e6:.1f} MB, explained by {about['method']}")
    return 0


def explainer_of(args: argparse.Namespace, subject: Subject, form: str) -> tuple[bytes, Any]:
    """Return the content of a file and its metadata."""
    method = attributor_of(args, subject)
    contrast = contrast_of(args, method, subject)
    preprocessing: Preprocessing | str
    try:
        preprocessing = Preprocessing.of(subject.transform, "L" if subject.channels == 1 else "RGB")
    except ValueError as error:
        complain(f"{args.model}: {error}", kind="warning")
        preprocessing = " ".join(str(subject.transform).split())
    # Only the shape of the example matters.
    example = torch.randn(1, *subject.input_size, generator=torch.Generator().manual_seed(0))
    target = int(contrast == 0)
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
                contrast=contrast,
            )
    except (
        ValueError,
        RuntimeError,
        FloatingPointError,
        UnsupportedCallError,
        ImportError,
    ) as error:
        raise UserError(f"{args.model} could not be exported: {error}") from error
    return content.getvalue(), about
