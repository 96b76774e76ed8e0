"""``captum-abslrp explain``: why a model sees a class in an image.

Axes: C channels, H height, W width.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from captum_abslrp import __version__, demo, processes
from captum_abslrp.attribution import AbsLRP
from captum_abslrp.cli.attributors import (
    add_attributor,
    attributor_of,
    class_index,
    contrast_of,
)
from captum_abslrp.cli.concepts import find_layer, section_of
from captum_abslrp.cli.files import (
    UserError,
    all_image_files,
    complain,
    folder,
    html_file,
    output_names,
    positive_int,
    progress,
    save_array,
    save_figure,
    save_report,
    say,
    with_suffix,
)
from captum_abslrp.cli.models import (
    PHOTO_MODEL,
    Subject,
    add_checkpoint,
    add_device,
    add_smoothing,
    exact_name,
    find_device,
    load_subject,
    model_names,
    smoothing_of,
)
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.methods import get_method, list_methods
from captum_abslrp.report import CONTRAST, DIFFERENCE, TARGET, Panel, Section
from captum_abslrp.text import did_you_mean
from captum_abslrp.visualization import plot_grid, plot_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

NOTE = "captum-abslrp"
"""Name of the metadata entry of a figure with its settings."""


def add_command(commands: Any) -> None:
    """Add the command to a parser's ``add_subparsers()``."""
    parser = commands.add_parser(
        "explain",
        help="explain what a model sees in images",
        description="Write a figure (input, overlay, map) and the raw relevance for each image: "
        "STEM-abslrp.png and STEM-abslrp.npy. The raw relevance is never smoothed. With "
        "`torchrun -m captum_abslrp explain ...`, several processes share the images.",
    )
    parser.set_defaults(command=_explain)
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files or folders; the outputs keep the structure of folders",
    )
    parser.add_argument(
        "--photos",
        nargs="*",
        metavar="NAME",
        help="explain photographs from the extra `photos`, all six or those named, e.g. --photos chelsea "
        f"coffee; the default model is then {PHOTO_MODEL}",
    )
    parser.add_argument("--model", metavar="NAME", help=model_names())
    add_checkpoint(parser)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        "--target",
        metavar="CLASS|INDEX",
        help="class to explain (default: the predicted class)",
    )
    wanted.add_argument(
        "--top",
        type=positive_int,
        metavar="K",
        help="explain the K most probable classes, one row each",
    )
    add_attributor(parser)
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=[name for name in list_methods() if name != "abslrp"],
        default=[],
        metavar="METHOD",
        help="also show other methods: %(choices)s",
    )
    add_smoothing(parser)
    add_device(parser)
    parser.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="number of CPU threads per process; it affects the last digits of maps (default: as in PyTorch)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("abslrp-maps"),
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip images that were already explained with the same settings, as recorded in their figures",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write an interactive HTML report: a single file, about 1 MB per image with --top 3; each "
        "class is also explained without a contrast; the report contains this command line",
    )
    parser.add_argument(
        "--concepts",
        metavar="LAYER",
        help="with --html: add a section about the most relevant channels of a layer, given by its path, "
        "e.g. layer3 or blocks.6",
    )


@dataclass(frozen=True)
class Question:
    """The question about every image; indices are of classes."""

    target: int | None
    top: int | None
    contrast: int | str | None


def _explain(args: argparse.Namespace) -> int:
    html_file(args.html)
    given = _images(args)
    if args.html is not None and args.resume:
        raise UserError(
            "Expected `--html` or `--resume`, but got both. A report explains all images again: "
            "omit `--resume`."
        )
    if args.concepts is not None and args.html is None:
        raise UserError(
            "Expected `--html` with `--concepts`, because concepts are a section of the report. "
            "Add `--html FILE`."
        )
    device = find_device(args.device)
    subject = load_subject(args.model, args.checkpoint, device)
    if args.concepts is not None:
        find_layer(subject.model, args.concepts)
    method = attributor_of(args, subject)
    question = _question(args, method, subject)
    say(f"Explained by {method!r}")
    example = torch.zeros(1, *subject.input_size, device=device)
    smoothing = smoothing_of(args, subject.model, example)
    out = folder(args.out)
    images = all_image_files(given, out)
    outputs = [out / name for name in output_names(images, out)]
    paths = [path for path, _ in images]
    undone = list(range(len(paths)))
    if args.resume:
        undone = processes.from_first(
            lambda: [i for i in undone if not _is_done(paths[i], outputs[i], args)]
        )
        say(f"{len(paths) - len(undone)} of {len(paths)} images are already explained.")

    failures: dict[int, str] = {}
    panels: dict[int, Panel] = {}
    finished = False
    try:
        for i in progress(processes.share(undone), "images", show=len(paths) > 1):
            try:
                panel, trouble = _explain_image(
                    paths[i], outputs[i], subject, method, question, smoothing, args, device
                )
                if panel is not None:
                    panels[i] = panel
            except UserError as error:
                trouble = str(error)
            if trouble:
                failures[i] = trouble
                complain(trouble)
        finished = True
    finally:  # what is finished is not lost if the rest is stopped
        if finished:
            failures, panels = _of_all(failures), _of_all(panels)
        if args.html is not None and processes.rank() == 0:
            times = Counter(path.name for path in paths)
            for i, panel in panels.items():
                name = paths[i].name if times[paths[i].name] == 1 else str(paths[i])
                panels[i] = replace(panel, name=name)
            args.method = repr(method)
            notes = list(failures.values())
            further = []
            if args.concepts is not None and panels and finished:
                concepts = section_of(
                    subject, method, args.concepts, [paths[i] for i in panels],
                    target=question.target, smoothing=smoothing, device=device,
                )  # fmt: skip
                further.append(concepts)
            _write_report(args, list(panels.values()), notes, further)
    # The first process speaks for all: `torchrun` stops the others when one fails.
    return 2 if failures and processes.rank() == 0 else 0


def _images(args: argparse.Namespace) -> list[Path]:
    """Return the images to explain, and set the model of the photographs if the user names none."""
    photos: list[Path] = []
    if args.photos is not None:
        try:
            known = {photo.name: photo.path for photo in demo.load_photos()}
        except ModuleNotFoundError as error:
            raise UserError(f"--photos: {error}") from error
        for name in args.photos:
            if name not in known:
                raise UserError(
                    f"Expected `--photos` to name photographs, but got {name!r}"
                    f"{did_you_mean(name, known)}. Available: {', '.join(known)}. Put image files before "
                    "`--photos`."
                )
        args.photos = args.photos or list(known)
        photos = [known[name] for name in args.photos]
        args.model = args.model or PHOTO_MODEL
    if not args.images and not photos:
        raise UserError("Expected image files, folders or `--photos`, but got none.")
    if args.model is None:
        raise UserError("Expected `--model NAME` with your images, but got none.")
    return [*args.images, *photos]


def _of_all(found: dict[int, T]) -> dict[int, T]:
    """The results of all processes, by the number of the image."""
    return dict(sorted(chain.from_iterable(part.items() for part in processes.gather(found))))


def _write_report(
    args: argparse.Namespace,
    panels: Sequence[Panel],
    notes: Sequence[str],
    further: Sequence[Section],
) -> None:
    if not panels:
        say(f"No image was explained, so {args.html} was not written.")
        return
    seen = panels[0].name if len(panels) == 1 else f"{len(panels)} images"
    model = "EfficientNet-Lite0" if args.model == PHOTO_MODEL else args.model
    section = Section(model, panels, notes=notes)
    save_report(args, [section, *further], f"What {model} sees in {seen}")


def _explain_image(
    path: Path,
    output: Path,
    subject: Subject,
    method: AbsLRP,
    question: Question,
    smoothing: int,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[Panel | None, str]:
    """Explain an image and write what is found.

    Returns:
        What a report shows of it, if there is one, and what methods it is compared with have failed.
    """
    image = subject.read(path)
    inputs = image[None].to(device)
    with torch.no_grad():
        probabilities = subject.model(inputs).softmax(dim=-1)[0]
    targets = _targets(question, probabilities)
    chances = [f"{100 * float(probabilities[t]):.1f}%" for t in targets]

    classes = [subject.label(target) for target in targets]

    def explained(contrast: int | str | None, combine: str) -> tuple[list[Tensor], list[str]]:
        """The map of each class, and warnings with the class that they are about."""
        maps: list[Tensor] = []
        doubts: list[str] = []
        for name, target in zip(classes, targets, strict=True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                relevance = method.attribute(
                    inputs, target=target, contrast=contrast, combine=combine
                )
            maps.append(relevance[0].detach().cpu())
            doubts += dict.fromkeys(f"{name}: {warning.message}" for warning in caught)
        return maps, doubts

    try:
        ours, doubts = explained(question.contrast, method.combine)
        wanted = args.html is not None and question.contrast is not None
        alone = explained(None, "difference")[0] if wanted else None
    except (UnsupportedCallError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error

    maps = {"abslrp": ours}
    for doubt in doubts:
        complain(f"{path}: {doubt}", kind="warning")
    trouble: list[str] = []
    for name in dict.fromkeys(args.compare):
        try:
            attribute = get_method(name)(subject.model)
            maps[name] = [attribute(inputs, target)[0].detach().cpu() for target in targets]
        except Exception as error:  # Captum's methods fail in many ways on unknown layers
            reason = " ".join(str(error).split())
            trouble.append(f"{name} failed on {args.model}: {type(error).__name__}: {reason}")

    rather = ""
    if isinstance(question.contrast, int):
        rather = f" rather than {subject.label(question.contrast)}"
    figure = _explanation(path.name, subject.show(image), maps, classes, chances, rather, smoothing)
    raw = torch.stack(maps["abslrp"]) if question.top is not None else maps["abslrp"][0]
    save_array(raw, with_suffix(output, ".npy"))
    # The figure comes last: where it is, the image is done.
    save_figure(figure, with_suffix(output, ".png"), {NOTE: _note(path, args)})
    found = ", ".join(f"{name} {p}" for name, p in zip(classes, chances, strict=True))
    say(f"{path}: {found} -> {with_suffix(output, '.png')}")
    panel = None
    if args.html is not None:
        panel = Panel(
            path.name,
            subject.show(image).mul(255).round().byte(),
            classes,
            _views(maps, alone, method.combine),
            [float(probabilities[t]) for t in targets],
            contrast=_in_words(question.contrast, subject),
            combined=f"the {method.combine}{'' if method.combine == 'difference' else ' map'}",
            notes=doubts,
            smoothing=smoothing,
        )
    return panel, f"{path}: {'; '.join(trouble)}" if trouble else ""


def _note(path: Path, args: argparse.Namespace) -> str:
    """The text in a figure about how it was made, so that it can be made again."""
    asked = {
        name: getattr(args, name)
        for name in (
            *("mapping", "target", "top", "contrast", "combine", "normalization"),
            *("compare", "no_smoothing"),
        )
    }
    asked["checkpoint"] = args.checkpoint and str(args.checkpoint.resolve())
    settings = {"image": str(path.resolve()), "model": exact_name(args.model), **asked}
    return json.dumps({**settings, "captum-abslrp": __version__})


def _is_done(path: Path, output: Path, args: argparse.Namespace) -> bool:
    """Whether an image has been explained as it is asked for now."""
    from PIL import Image

    figure, raw = with_suffix(output, ".png"), with_suffix(output, ".npy")
    try:
        if not raw.exists() or figure.stat().st_mtime < path.stat().st_mtime:
            return False
        with Image.open(figure) as image:
            return image.info.get(NOTE) == _note(path, args)
    except OSError:
        return False


def _views(
    maps: dict[str, list[Tensor]], alone: list[Tensor] | None, combine: str
) -> dict[str, Sequence[Tensor | None]]:
    """What a report shows of each class, (H, W) per map; `alone` are its maps without a contrast, if there
    is one, and `combine` says how the two were combined."""
    maps = {name: [relevance.sum(0) for relevance in of_method] for name, of_method in maps.items()}
    alone = None if alone is None else [relevance.sum(0) for relevance in alone]
    ours, *_ = maps.values()
    others = {name: of_method for name, of_method in maps.items() if name != "abslrp"}
    if alone is None:
        return {TARGET: ours, **others}
    if combine != "difference":
        return {DIFFERENCE: ours, TARGET: alone, **others}
    contrasts = [target - difference for target, difference in zip(alone, ours, strict=True)]
    return {DIFFERENCE: ours, TARGET: alone, CONTRAST: contrasts, **others}


def _in_words(contrast: int | str | None, subject: Subject) -> str:
    return subject.label(contrast) if isinstance(contrast, int) else "the other classes"


def _explanation(
    name: str,
    picture: Tensor,
    maps: dict[str, list[Tensor]],
    classes: Sequence[str],
    chances: Sequence[str],
    rather: str,
    smoothing: int,
) -> Figure:
    """Rows of classes or of methods; rows of classes and columns of methods where both are many.

    `maps` has for each method one map (C, H, W) per class. Only AbsLRP knows of a contrast, so
    `rather` goes with its name where others stand beside it.
    """
    compared = len(maps) > 1
    methods = [f"abslrp{rather}" if method == "abslrp" else method for method in maps]
    rows = [f"{label}\n{chance}" for label, chance in zip(classes, chances, strict=True)]
    if len(classes) == 1:
        title = f"{name}: why {classes[0]}{'' if compared else rather}? ({chances[0]})"
    else:
        title = f"{name}{'' if compared else rather and ':' + rather}"
    if compared and len(classes) > 1:
        cells: list[list[Tensor | str]] = [list(row) for row in zip(*maps.values(), strict=True)]
        return plot_grid(
            [picture] * len(rows),
            cells,
            row_labels=rows,
            column_labels=methods,
            title=title,
            smoothing=smoothing,
        )
    shown = [relevance for of_method in maps.values() for relevance in of_method]
    labels = methods if compared else rows
    return plot_rows(
        [picture] * len(shown),
        shown,
        row_labels=labels if len(shown) > 1 else None,
        title=title,
        smoothing=smoothing,
    )


def _question(args: argparse.Namespace, method: AbsLRP, subject: Subject) -> Question:
    target = None if args.target is None else class_index(args.target, subject.names, "--target")
    contrast = contrast_of(args, method, subject)
    if target is not None and contrast == target:
        raise UserError(
            "Expected `--contrast` to be another class than `--target`, "
            f"but got {subject.label(target)} for both."
        )
    available = len(subject.names) - isinstance(contrast, int)
    if args.top is not None and args.top > available:
        raise UserError(
            f"Expected `--top` to be at most the number of classes {available}, but got {args.top}."
        )
    return Question(target, args.top, contrast)


def _targets(question: Question, probabilities: Tensor) -> list[int]:
    """The classes to explain: never the one that they are contrasted with."""
    if question.target is not None:
        return [question.target]
    ranked = probabilities.clone()
    if isinstance(question.contrast, int):
        ranked[question.contrast] = -1
    chosen: list[int] = ranked.topk(question.top or 1).indices.tolist()
    return chosen
