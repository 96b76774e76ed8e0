"""The command line: ``captum-abslrp demo`` and ``captum-abslrp explain``.

What a user can put right is one line on stderr and exit code 2. Everything else is a fault of the
program and leaves with its traceback.

Axes: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_abslrp import __version__, demo
from captum_abslrp.attribution import AbsLRP
from captum_abslrp.interception import UnsupportedCallError
from captum_abslrp.methods import (
    AttributionFunction,
    get_method,
    list_methods,
    positive_share,
)
from captum_abslrp.visualization import denormalize, plot_grid, plot_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["main"]

PROGRAM = "captum-abslrp"
DEMO_PREFIX = "demo:"
NORMALIZATIONS = ("separate", "joint")
CONTRASTS = ("others", "softmax", "none")


class UserError(Exception):
    """What the user can put right; its text is the line that they read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error of the user's. Arguments that cannot be parsed,
        ``--help`` and ``--version`` raise SystemExit, as argparse does.
    """
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except UserError as error:
        _complain(error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Why does a vision model see this class here? (absLRP)"
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    show = commands.add_parser(
        "demo",
        help="explain pairs of digits with three small models that ship with the package",
        description="Asks three small models for each digit of a scene with two: why is there "
        "a 3? why an 8? Writes a figure per model and a table of how much positive relevance "
        "lies on the digit asked for. Needs no network.",
    )
    show.set_defaults(command=_demo)
    show.add_argument(
        "--out",
        type=Path,
        default=Path("abslrp-demo"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    show.add_argument(
        "--pairs",
        type=_positive_int,
        default=20,
        metavar="N",
        help="how many of the shipped scenes to ask about (default: %(default)s)",
    )

    explain = commands.add_parser(
        "explain",
        help="explain what a model sees in images",
        description="Writes for each image a figure (input, overlay, map) and the raw relevance: "
        "STEM-abslrp.png and STEM-abslrp.npy.",
    )
    explain.set_defaults(command=_explain)
    explain.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    explain.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a timm model, e.g. resnet50 or vit_base_patch16_224, or without network one of "
        + ", ".join(DEMO_PREFIX + name for name in demo.list_models()),
    )
    explain.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the timm model (.safetensors or a torch file) instead of downloaded ones",
    )
    wanted = explain.add_mutually_exclusive_group()
    wanted.add_argument(
        "--target",
        metavar="CLASS|INDEX",
        help="the class to explain (default: the predicted one)",
    )
    wanted.add_argument(
        "--top",
        type=_positive_int,
        metavar="K",
        help="explain the K most probable classes, one row each",
    )
    explain.add_argument(
        "--contrast",
        default=CONTRASTS[0],
        metavar="|".join([*CONTRASTS, "CLASS", "INDEX"]),
        help="rather than what: all other classes alike, weighted by their probability, nothing, "
        "or one class (default: %(default)s)",
    )
    explain.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default=NORMALIZATIONS[0],
        help="where branches meet, scale relevance of each or of all together "
        "(default: %(default)s)",
    )
    explain.add_argument(
        "--compare",
        nargs="+",
        choices=[name for name in list_methods() if name != "abslrp"],
        default=[],
        metavar="METHOD",
        help="show other methods too: %(choices)s",
    )
    explain.add_argument(
        "--device", default="cpu", help="torch device to compute on (default: %(default)s)"
    )
    explain.add_argument(
        "--out",
        type=Path,
        default=Path("abslrp-maps"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    return parser


def _positive_int(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"Expected a positive integer, but got {text!r}.")
    return value


# --- demo ---------------------------------------------------------------------------------------

SHOWN_PAIRS = 3


@dataclass(frozen=True)
class Shares:
    """How much positive relevance a method puts on the digit asked for, over all questions."""

    model: str
    method: str
    mean: float | None
    questions: int
    note: str = ""

    def cell(self) -> str:
        return self.note if self.mean is None else f"{100 * self.mean:.1f} %"


def _demo(args: argparse.Namespace) -> int:
    out = _folder(args.out)
    try:
        pairs = demo.load_scenes("pair", args.pairs)
    except ValueError as error:
        raise UserError(f"--pairs: {error}") from error
    # One question per digit of a pair: why is there this digit?
    images = pairs.images.repeat_interleave(2, dim=0)
    labels = pairs.labels.flatten()
    masks = pairs.masks.flatten(0, 1)
    shown = images[: 2 * SHOWN_PAIRS]

    table: list[Shares] = []
    for name in _progress(demo.list_models(), "models"):
        model = demo.load_model(name)
        area = masks.float().mean(dim=(1, 2))
        table.append(Shares(name, "(relevance everywhere alike)", float(area.mean()), len(labels)))
        columns: dict[str, Tensor | str] = {}
        for method, build in _demo_methods().items():
            try:
                maps = build(model)(demo.normalize(images), labels)
            except Exception as error:
                # Captum's methods fail in many ways on layers that they do not know.
                if method.startswith("AbsLRP"):
                    raise
                columns[method] = note = f"not supported: {_short_reason(error)}"
                table.append(Shares(name, method, None, len(labels), note))
            else:
                columns[method] = maps[: len(shown)]
                share = float(positive_share(maps, masks).mean())
                table.append(Shares(name, method, share, len(labels)))
        figure = plot_grid(
            list(shown),
            [
                [maps if isinstance(maps, str) else maps[row] for maps in columns.values()]
                for row in range(len(shown))
            ],
            row_labels=[
                f"why {'an' if label == 8 else 'a'} {demo.CLASS_NAMES[label]}?"
                for label in labels[: len(shown)].tolist()
            ],
            column_labels=list(columns),
            title=f"Demo model {name}: two digits, asked for one after the other",
        )
        _save(figure, out / f"{name}.png")

    text = _markdown(table)
    (out / "shares.md").write_text(text, encoding="utf-8")
    (out / "shares.csv").write_text(_csv(table), encoding="utf-8")
    print(text)
    print(f"Figures and tables are in {out}.")
    return 0


def _demo_methods() -> dict[str, Callable[[nn.Module], AttributionFunction]]:
    def abslrp(normalization: str) -> Callable[[nn.Module], AttributionFunction]:
        return lambda model: AbsLRP(model, normalization=normalization).attribute

    return {
        "AbsLRP (separate)": abslrp("separate"),
        "AbsLRP (joint)": abslrp("joint"),
        "Saliency": get_method("saliency"),
        "InputXGradient": get_method("inputxgradient"),
        "IntegratedGradients": get_method("ig"),
        "LRP": get_method("lrp"),
    }


def _short_reason(error: Exception) -> str:
    """The first words of an error, e.g. of Captum's about a layer without a rule."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "has no rule defined" in text:
        name = text.split("'")[1].rpartition(".")[2] if "'" in text else "a layer"
        return f"no rule for {name}"
    if "additions outside of modules" in text:
        return "additions outside of modules"
    return text if len(text) <= 60 else text[:57] + "..."


def _markdown(table: Sequence[Shares]) -> str:
    models = list(dict.fromkeys(entry.model for entry in table))
    methods = list(dict.fromkeys(entry.method for entry in table))
    cells = {(entry.method, entry.model): entry.cell() for entry in table}
    rows = [["method", *models], *([m, *(cells[m, name] for name in models)] for m in methods)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    heading = (
        "Positive relevance on the digit asked for, of all positive relevance "
        f"(mean over {table[0].questions} questions)"
    )
    return "\n".join([heading, "", *lines, ""])


def _csv(table: Sequence[Shares]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["model", "method", "positive_share", "questions", "note"])
    for entry in table:
        share = "" if entry.mean is None else f"{entry.mean:.6f}"
        writer.writerow([entry.model, entry.method, share, entry.questions, entry.note])
    return buffer.getvalue()


# --- explain ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model and what is needed to speak about it.

    `prepare` turns a picture into model input (C, H, W), `show` turns that into values in [0, 1].
    """

    model: nn.Module
    names: Sequence[str]
    prepare: Callable[[Image], Tensor]
    show: Callable[[Tensor], Tensor]
    channels: int

    def label(self, index: int) -> str:
        name = self.names[index].split(",")[0]
        return name if name in (str(index), f"class {index}") else f"{name} ({index})"


@dataclass(frozen=True)
class Question:
    """What is asked about every image; indices are of classes."""

    target: int | None
    top: int | None
    contrast: int | str | None


def _explain(args: argparse.Namespace) -> int:
    device = _device(args.device)
    subject = _load_subject(args.model, args.checkpoint, device)
    question = _question(args, subject)
    out = _folder(args.out)
    outputs = _output_names(args.images, out)

    failures = 0
    many = len(args.images) > 1
    for path, name in _progress(zip(args.images, outputs, strict=True), "images", show=many):
        try:
            _explain_image(path, out / name, subject, question, args, device)
        except UserError as error:
            failures += 1
            _complain(error)
    return 2 if failures else 0


def _explain_image(
    path: Path,
    output: Path,
    subject: Subject,
    question: Question,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    image = subject.prepare(_read(path, subject.channels))
    inputs = image[None].to(device)
    with torch.no_grad():
        probabilities = subject.model(inputs).softmax(dim=-1)[0]
    targets = _targets(question, probabilities)
    chances = [f"{100 * float(probabilities[t]):.1f} %" for t in targets]

    maps: dict[str, list[Tensor]] = {"abslrp": []}
    method = AbsLRP(subject.model, normalization=args.normalization)
    try:
        for target in targets:
            relevance = method.attribute(inputs, target=target, contrast=question.contrast)
            maps["abslrp"].append(relevance[0].detach().cpu())
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
    _save(figure, _with_suffix(output, ".png"))
    raw = torch.stack(maps["abslrp"]) if question.top is not None else maps["abslrp"][0]
    _save_array(raw, _with_suffix(output, ".npy"))
    found = ", ".join(f"{name} {p}" for name, p in zip(classes, chances, strict=True))
    _say(f"{path}: {found} -> {_with_suffix(output, '.png')}")
    if trouble:
        raise UserError(f"{path}: {'; '.join(trouble)}")


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
        f"{_did_you_mean(near)}; an index will do too."
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"Expected `--device` to be available, but got {name!r}: {reason}"
        ) from error
    return device


# --- models -------------------------------------------------------------------------------------


def _load_subject(name: str, checkpoint: Path | None, device: torch.device) -> Subject:
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    if name.startswith(DEMO_PREFIX):
        if checkpoint is not None:
            raise UserError(
                f"Expected `--checkpoint` to go with a timm model, but got the demo model {name!r}."
            )
        model = _load_demo_model(name.removeprefix(DEMO_PREFIX))
        names: Sequence[str] = demo.CLASS_NAMES
    else:
        model = _load_timm_model(name, checkpoint)
        names = _class_names(model)
    if not names:
        raise UserError(f"Expected `--model` to be a classifier, but got {name!r} without classes.")
    config: dict[str, Any] = resolve_model_data_config(model)
    prepare: Callable[[Image], Tensor] = create_transform(**config, is_training=False)
    return Subject(
        model=model.eval().requires_grad_(False).to(device),
        names=names,
        prepare=prepare,
        show=lambda image: denormalize(image, config["mean"], config["std"]),
        channels=config["input_size"][0],
    )


def _load_demo_model(name: str) -> nn.Module:
    if name not in demo.list_models():
        there_are = ", ".join(DEMO_PREFIX + known for known in demo.list_models())
        near = [DEMO_PREFIX + n for n in difflib.get_close_matches(name, demo.list_models())]
        raise UserError(
            f"Expected `--model` to be a demo model, but got {DEMO_PREFIX + name!r}"
            f"{_did_you_mean(near)}; there are {there_are}."
        )
    return demo.load_model(name)


def _load_timm_model(name: str, checkpoint: Path | None) -> nn.Module:
    import timm

    elsewhere = ":" in name  # hf-hub:OWNER/NAME and local-dir:FOLDER are timm's to resolve
    if not elsewhere and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"Expected `--model` to be a timm model or {DEMO_PREFIX}NAME, but got {name!r}"
            f"{_did_you_mean(near)}."
        )
    if checkpoint is not None:
        return _load_from_checkpoint(name, checkpoint)
    try:
        with _quiet("huggingface_hub", "timm"):
            model: nn.Module = timm.create_model(name, pretrained=True)
    except OSError as error:
        # So are the errors of the hub, of sockets and of urllib.
        raise UserError(
            f"the weights of {name!r} could not be fetched ({_first_line(error)}); give them with "
            f"--checkpoint, or try a model that ships with the package: {DEMO_PREFIX}vgg"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name!r} could not be loaded: {_first_line(error)}") from error
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
            f"the weights in {checkpoint} do not fit {name!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    return model


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; training scripts put it into a dict, wrappers prefix its keys."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"Expected `--checkpoint` to be a file of weights, but got {path}: {_first_line(error)}"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"Expected `--checkpoint` to hold a state dict, but got {path} without one."
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


# --- files and messages -------------------------------------------------------------------------


def _read(path: Path, channels: int) -> Image:
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


def _output_names(images: Sequence[Path], out: Path) -> list[str]:
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
    return any(str(_with_suffix(output, e).resolve()).casefold() in inputs for e in endings)


def _with_suffix(path: Path, suffix: str) -> Path:
    """Unlike ``Path.with_suffix``, keeps a dot that is part of the name."""
    return path.with_name(path.name + suffix)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Expected `--out` to be a folder to write to, but got {path}: {error.strerror}"
        ) from error
    return path


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from error


def _save_array(values: Tensor, path: Path) -> None:
    import numpy as np

    try:
        np.save(path, values.numpy())
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from error


def _progress(items: Iterable[Any], unit: str, *, show: bool = True) -> Iterator[Any]:
    from tqdm import tqdm

    steps = list(items)
    yield from tqdm(steps, unit=f" {unit}", file=sys.stderr, disable=not show)


def _say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


def _complain(error: UserError) -> None:
    from tqdm import tqdm

    tqdm.write(f"{PROGRAM}: error: {error}", file=sys.stderr)


def _did_you_mean(near: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
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
