"""``captum-abslrp explain``: why a model sees a class in an image.

Axes: C channels, H height, W width.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_abslrp import demo
from captum_abslrp.attribution import AbsLRP
from captum_abslrp.cli.files import (
    UserError,
    complain,
    did_you_mean,
    folder,
    html_file,
    output_names,
    positive_int,
    progress,
    read_image,
    save_array,
    save_figure,
    save_text,
    say,
    settings_of,
    with_suffix,
)
from captum_abslrp.cli.models import DEMO_PREFIX, Subject, find_device, load_subject
from captum_abslrp.interception import UnsupportedCallError
from captum_abslrp.methods import get_method, list_methods
from captum_abslrp.report import CONTRAST, DIFFERENCE, TARGET, Panel, Section, render
from captum_abslrp.visualization import plot_grid, plot_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMALIZATIONS = ("separate", "joint")
CONTRASTS = ("others", "softmax", "none")


def add_command(commands: Any) -> None:
    """Add the command to a parser's ``add_subparsers()``."""
    parser = commands.add_parser(
        "explain",
        help="explain what a model sees in images",
        description="Writes for each image a figure (input, overlay, map) and the raw relevance: "
        "STEM-abslrp.png and STEM-abslrp.npy.",
    )
    parser.set_defaults(command=_explain)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a timm model, e.g. resnet50 or vit_base_patch16_224, or without network one of "
        + ", ".join(DEMO_PREFIX + name for name in demo.list_models()),
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the timm model (.safetensors or a torch file) instead of downloaded ones",
    )
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        "--target",
        metavar="CLASS|INDEX",
        help="the class to explain (default: the predicted one)",
    )
    wanted.add_argument(
        "--top",
        type=positive_int,
        metavar="K",
        help="explain the K most probable classes, one row each",
    )
    parser.add_argument(
        "--contrast",
        default=CONTRASTS[0],
        metavar="|".join([*CONTRASTS, "CLASS", "INDEX"]),
        help="rather than what: all other classes alike, weighted by their probability, nothing, "
        "or one class (default: %(default)s)",
    )
    parser.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default=NORMALIZATIONS[0],
        help="where branches meet, scale relevance of each or of all together "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=[name for name in list_methods() if name != "abslrp"],
        default=[],
        metavar="METHOD",
        help="show other methods too: %(choices)s",
    )
    parser.add_argument(
        "--device", default="cpu", help="torch device to compute on (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("abslrp-maps"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a report for a browser, too: one file to click through",
    )


@dataclass(frozen=True)
class Question:
    """What is asked about every image; indices are of classes."""

    target: int | None
    top: int | None
    contrast: int | str | None


def _explain(args: argparse.Namespace) -> int:
    html_file(args.html)
    device = find_device(args.device)
    subject = load_subject(args.model, args.checkpoint, device)
    question = _question(args, subject)
    out = folder(args.out)
    outputs = output_names(args.images, out)

    failures: list[str] = []
    panels: list[Panel] = []
    many = len(args.images) > 1
    try:
        for path, name in progress(zip(args.images, outputs, strict=True), "images", show=many):
            try:
                _explain_image(path, out / name, subject, question, args, device, panels)
            except UserError as error:
                failures.append(str(error))
                complain(error)
    finally:  # what is finished is not lost if the rest is stopped
        if args.html is not None:
            _write_report(args, panels, failures)
    return 2 if failures else 0


def _write_report(
    args: argparse.Namespace, panels: Sequence[Panel], failures: Sequence[str]
) -> None:
    if not panels:
        say(f"No image was explained: {args.html} is not written.")
        return
    seen = panels[0].name if len(panels) == 1 else f"{len(panels)} images"
    page = render(
        [Section(args.model, panels, notes=failures)],
        title=f"What {args.model} sees in {seen}",
        settings=settings_of(args),
        command=args.line,
    )
    save_text(page, args.html)
    say(f"The report is {args.html}.")


def _explain_image(
    path: Path,
    output: Path,
    subject: Subject,
    question: Question,
    args: argparse.Namespace,
    device: torch.device,
    panels: list[Panel],
) -> None:
    """Explain an image and write what is found; what a report shows of it is added to `panels`."""
    image = subject.prepare(read_image(path, subject.channels))
    inputs = image[None].to(device)
    with torch.no_grad():
        probabilities = subject.model(inputs).softmax(dim=-1)[0]
    targets = _targets(question, probabilities)
    chances = [f"{100 * float(probabilities[t]):.1f} %" for t in targets]

    method = AbsLRP(subject.model, normalization=args.normalization)

    def explained(contrast: int | str | None) -> list[Tensor]:
        found = (method.attribute(inputs, target=t, contrast=contrast) for t in targets)
        return [relevance[0].detach().cpu() for relevance in found]

    try:
        maps = {"abslrp": explained(question.contrast)}
        alone = explained(None) if args.html is not None and question.contrast is not None else None
    except UnsupportedCallError as error:
        raise UserError(f"{path}: {error}") from error

    trouble: list[str] = []
    for name in dict.fromkeys(args.compare):
        try:
            attribute = get_method(name)(subject.model)
            maps[name] = [attribute(inputs, target)[0].detach().cpu() for target in targets]
        except Exception as error:
            # Captum's methods fail in many ways on layers that they do not know.
            reason = " ".join(str(error).split())
            trouble.append(f"{name} does not run on {args.model}: {type(error).__name__}: {reason}")

    rather = ""
    if isinstance(question.contrast, int):
        rather = f" rather than {subject.label(question.contrast)}"
    classes = [subject.label(target) for target in targets]
    figure = _explanation(path.name, subject.show(image), maps, classes, chances, rather)
    save_figure(figure, with_suffix(output, ".png"))
    raw = torch.stack(maps["abslrp"]) if question.top is not None else maps["abslrp"][0]
    save_array(raw, with_suffix(output, ".npy"))
    found = ", ".join(f"{name} {p}" for name, p in zip(classes, chances, strict=True))
    say(f"{path}: {found} -> {with_suffix(output, '.png')}")
    if args.html is not None:
        panels.append(
            Panel(
                path.name if _is_only(path.name, args.images) else str(path),
                subject.show(image),
                classes,
                _views(maps, alone),
                [float(probabilities[t]) for t in targets],
                contrast=_in_words(question.contrast, subject),
            )
        )
    if trouble:
        raise UserError(f"{path}: {'; '.join(trouble)}")


def _is_only(name: str, paths: Sequence[Path]) -> bool:
    return sum(path.name == name for path in paths) == 1


def _views(
    maps: dict[str, list[Tensor]], alone: list[Tensor] | None
) -> dict[str, Sequence[Tensor | None]]:
    """What a report shows of each class; `alone` are its maps without a contrast, if there is one."""
    ours, *_ = maps.values()
    others = {name: of_method for name, of_method in maps.items() if name != "abslrp"}
    if alone is None:
        return {TARGET: ours, **others}
    contrasts = [target - difference for target, difference in zip(alone, ours, strict=True)]
    return {DIFFERENCE: ours, TARGET: alone, CONTRAST: contrasts, **others}


def _in_words(contrast: int | str | None, subject: Subject) -> str:
    if isinstance(contrast, int):
        return subject.label(contrast)
    return {"softmax": "the others, by their probability"}.get(contrast or "", "the others")


def _explanation(
    name: str,
    picture: Tensor,
    maps: dict[str, list[Tensor]],
    classes: Sequence[str],
    chances: Sequence[str],
    rather: str,
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
            [picture] * len(rows), cells, row_labels=rows, column_labels=methods, title=title
        )
    shown = [relevance for of_method in maps.values() for relevance in of_method]
    labels = methods if compared else rows
    return plot_rows(
        [picture] * len(shown), shown, row_labels=labels if len(shown) > 1 else None, title=title
    )


def _question(args: argparse.Namespace, subject: Subject) -> Question:
    target = None if args.target is None else _class_index(args.target, subject.names, "--target")
    contrast: int | str | None
    if args.contrast in CONTRASTS:
        contrast = None if args.contrast == "none" else args.contrast
    else:
        contrast = _class_index(args.contrast, subject.names, "--contrast", CONTRASTS)
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


def _class_index(
    text: str, names: Sequence[str], option: str, other_words: Sequence[str] = ()
) -> int:
    """The class that a name (any synonym, any case) or an index stands for.

    `other_words` are what the option takes besides; they are only told of.
    """
    try:
        index = int(text)
    except ValueError:
        pass
    else:
        if not 0 <= index < len(names):
            raise UserError(
                f"Expected `{option}` to be between 0 and {len(names) - 1}, but got {index}."
            )
        return index

    wanted = text.strip().casefold()
    known: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        parts = [name, *name.split(",")] if "," in name else [name]
        for synonym in dict.fromkeys(part.strip().casefold() for part in parts):
            known.setdefault(synonym, []).append(index)
    found = known.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        indices = " or ".join(str(index) for index in found)
        raise UserError(
            f"Expected `{option}` to name one class, but got {text!r}, which names "
            f"{len(found)}: give the index {indices}."
        )
    near = difflib.get_close_matches(wanted, [*other_words, *known], n=3)
    expected = f"{', '.join(other_words)} or a class" if other_words else "a class"
    raise UserError(
        f"Expected `{option}` to be {expected} of the model, but got {text!r}"
        f"{did_you_mean(near)}; an index will do too."
    )
