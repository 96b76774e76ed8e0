"""``captum-abslrp demo``: explain each digit in scenes with two digits."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from captum_abslrp import demo
from captum_abslrp.attribution import AbsLRP
from captum_abslrp.cli.files import UserError, folder, positive_int, progress, save_figure
from captum_abslrp.cli.models import add_smoothing, smoothing_of
from captum_abslrp.methods import AttributionFunction, get_method, positive_share
from captum_abslrp.text import markdown_table
from captum_abslrp.visualization import plot_grid

SHOWN_PAIRS = 3


def add_command(commands: Any) -> None:
    """Add the command to a parser's ``add_subparsers()``."""
    parser = commands.add_parser(
        "demo",
        help="explain pairs of digits with three small models that are included in the package",
        description="Explain each digit of scenes with two digits (why a 3? why an 8?) for three small "
        "models. Write one figure per model, and a table with the share of positive relevance on the target "
        "digit. No network is needed.",
    )
    parser.set_defaults(command=_demo)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("abslrp-demo"),
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        type=positive_int,
        default=20,
        metavar="N",
        help="number of scenes to explain (default: %(default)s)",
    )
    add_smoothing(parser)


@dataclass(frozen=True)
class Shares:
    """Share of positive relevance that a method assigns to the target digit, averaged over all questions."""

    model: str
    method: str
    mean: float | None
    questions: int
    note: str = ""

    def cell(self) -> str:
        return self.note if self.mean is None else f"{100 * self.mean:.1f}%"


def _demo(args: argparse.Namespace) -> int:
    out = folder(args.out)
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
    for name in progress(demo.list_models(), "models"):
        model = demo.load_model(name)
        area = masks.float().mean(dim=(1, 2))
        table.append(Shares(name, "(uniform relevance)", float(area.mean()), len(labels)))
        columns: dict[str, Tensor | str] = {}
        for method, build in _demo_methods().items():
            try:
                maps = build(model)(demo.normalize(images), labels)
            except Exception as error:  # Captum's methods fail in many ways on unknown layers
                if method.startswith("AbsLRP"):
                    raise
                columns[method] = note = f"not supported: {short_reason(error)}"
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
            title=f"Demo model {name}: both digits of a scene, explained separately",
            smoothing=smoothing_of(args, model, images[:1]),
        )
        save_figure(figure, out / f"{name}.png")

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
        "AbsLRP (recommended)": lambda model: AbsLRP.recommended(model).attribute,
        "AbsLRP (separate)": abslrp("separate"),
        "AbsLRP (joint)": abslrp("joint"),
        "Saliency": get_method("saliency"),
        "InputXGradient": get_method("inputxgradient"),
        "IntegratedGradients": get_method("ig"),
        "LRP": get_method("lrp"),
    }


def short_reason(error: Exception) -> str:
    """Shorten an error message, such as Captum's message about a layer without a rule."""
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
    rows = ([method, *(cells[method, model] for model in models)] for method in methods)
    heading = (
        f"Share of positive relevance on the target digit (mean over {table[0].questions} digits)"
    )
    return f"{heading}\n\n{markdown_table(['method', *models], rows)}\n"


def _csv(table: Sequence[Shares]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["model", "method", "positive_share", "questions", "note"])
    for entry in table:
        share = "" if entry.mean is None else f"{entry.mean:.6f}"
        writer.writerow([entry.model, entry.method, share, entry.questions, entry.note])
    return buffer.getvalue()
