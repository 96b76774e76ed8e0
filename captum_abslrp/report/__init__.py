"""HTML reports with interactive maps, as a single file without external resources.

Axes: C channels (1 or 3), H height, W width. Images and maps are embedded in the file as PNGs.

Example:
    >>> import torch
    >>> panel = Panel("cat.jpg", torch.rand(3, 8, 8), ["cat", "dog"], {"target": torch.randn(2, 3, 8, 8)})
    >>> page = render([Section("a model", [panel])], title="Why?", settings={"model": "a model"})
    >>> page.startswith("<!doctype html>"), "http:" in page
    (True, False)
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captum_abslrp.visualization import (
    COLOR_MAP,
    SMOOTHED,
    Array,
    color_limit,
    overlay_opacity,
    picture_array,
    relevance_image,
    smooth_map,
)

__all__ = ["Panel", "Section", "Table", "drawing", "render"]

TARGET, CONTRAST, DIFFERENCE = "target", "contrast", "difference"
"""Views with a predefined meaning in :class:`Panel`."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One image and its maps.

    Attributes:
        name: heading, for example the file name.
        picture: the image without normalization, values in [0, 1] or uint8, (C, H, W) or (H, W).
        classes: names of the K explained classes.
        maps: for each view, K maps (C, H, W) or (H, W), one per class, or None for a missing map. The view
            ``"target"`` is the relevance of the class, ``"contrast"`` that of its contrast, and
            ``"difference"`` the difference or another combination of both. ``"difference"`` is shown first,
            if it exists, otherwise the first view. With ``"target"``, any two classes can be compared.
        probabilities: probabilities of the classes, K values in [0, 1].
        contrast: a description of the contrast.
        combined: the name of the view ``"difference"``. The comparison of two classes is always the
            difference of their maps.
        notes: lines below the image.
        smoothing: number of pixels that drawn maps are smoothed over, see
            :func:`~captum_abslrp.visualization.smooth_map`; 1 draws the maps unchanged. Alternative texts
            always describe the maps without smoothing.

    Example:
        >>> import torch
        >>> maps = {"target": torch.randn(2, 3, 8, 8)}
        >>> Panel("cat.jpg", torch.rand(3, 8, 8), ["cat", "dog"], maps).contrast
        'the other classes'
    """

    name: str
    picture: Array
    classes: Sequence[str]
    maps: Mapping[str, Sequence[Array | None]]
    probabilities: Sequence[float] | None = None
    contrast: str = "the other classes"
    combined: str = "the difference"
    notes: Sequence[str] = ()
    smoothing: int = 1


@dataclass(frozen=True)
class Table:
    """A table of scores: a caption, column headers, and rows of text that start with a row header.

    Example:
        >>> Table("Scores", ["method", "GAE"], [["absLRP", "0.21"]]).caption
        'Scores'
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A section of a report: notes, tables, figures (PNG bytes by alternative text), and panels.

    Example:
        >>> Section("VGG", notes=["100 mosaics"]).title
        'VGG'
    """

    title: str
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render(
    sections: Sequence[Section],
    *,
    title: str,
    settings: Mapping[str, Any],
    command: str | None = None,
    clip_percentile: float = 99.0,
) -> str:
    """Render a report as one HTML page.

    Args:
        sections: the sections of the report.
        title: heading of the page.
        settings: names and values of all settings that affect the results.
        command: the command line that reproduces the report.
        clip_percentile: percentile of the magnitudes of a map at the ends of its color scale.

    Returns:
        The page, to be saved as UTF-8.

    Raises:
        ValueError: if a panel has no map, if its counts differ, or if its image or a map is invalid, see
            :func:`~captum_abslrp.visualization.plot_attribution`.

    Example:
        >>> table = Table("Scores", ["method", "GAE"], [["absLRP", "0.21"]])
        >>> "0.21" in render([Section("VGG", tables=[table])], title="Scores", settings={"seed": 0})
        True
    """
    data = {
        "sections": [
            {
                "title": section.title,
                "panels": [_panel(panel, clip_percentile) for panel in section.panels],
                "tables": [vars(table) for table in section.tables],
                "figures": [
                    {"alt": alt, "src": _data_url(png)} for alt, png in section.figures.items()
                ],
                "notes": list(section.notes),
            }
            for section in sections
        ],
        "settings": {name: str(value) for name, value in settings.items()},
        "command": command,
        "scale": _color_bar(),
    }
    parts = {
        "title": html.escape(title),
        "style": _resource("report.css"),
        "script": _resource("common.js") + _resource("report.js"),
        # No text of the user's can end the script element.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    page = _resource("report.html")
    before, *rest = page.split("{{")
    return before + "".join(
        parts[name] + after for name, after in (part.split("}}", 1) for part in rest)
    )


def drawing() -> dict[str, Any]:
    """Return what a page needs to draw maps in the colors of a report.

    Returns:
        ``"palette"``: red, green, blue and opacity of each color level, from the most negative to the most
        positive relevance. ``"scale"``: the image of the color scale as a data URL.

    Example:
        >>> palette = drawing()["palette"]
        >>> len(palette), palette[LEVELS]  # no relevance is transparent
        (127, [247, 246, 246, 0])
    """
    return {"palette": _palette().tolist(), "scale": _color_bar()}


def _resource(name: str) -> str:
    return (files("captum_abslrp.report") / name).read_text(encoding="utf-8")


def _panel(panel: Panel, clip_percentile: float) -> dict[str, Any]:
    picture = picture_array(panel.picture)
    count = len(panel.classes)
    if not panel.maps or count == 0:
        raise ValueError(f"Expected {panel.name} to have maps of classes, but got none.")
    counts = {view: len(maps) for view, maps in panel.maps.items()}
    probabilities = None
    if panel.probabilities is not None:
        probabilities = [float(p) for p in panel.probabilities]
        counts["probabilities"] = len(probabilities)
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError(
                f"Expected `probabilities` of {panel.name} to be in [0, 1], but got {probabilities}."
            )
    for what, found in counts.items():
        if found != count:
            raise ValueError(
                f"Expected {panel.name} to have {count} of `{what}`, one per class, but got {found}."
            )
    maps = {
        view: [None if given is None else relevance_image(given) for given in of_view]
        for view, of_view in panel.maps.items()
    }

    def shown(relevance: npt.NDArray[np.float64] | None, what: str) -> dict[str, Any] | None:
        if relevance is None:
            return None
        if relevance.shape != picture.shape[:2]:
            raise ValueError(
                f"Expected maps of {panel.name} to have the height and width of its picture "
                f"{picture.shape[:2]}, but got {relevance.shape}."
            )
        drawn = smooth_map(relevance, panel.smoothing)
        limit = color_limit(drawn, clip_percentile)
        return {
            "src": _overlay(drawn, limit),
            "limit": _number(limit),
            "alt": f"{what}: {_in_words(relevance)}",
        }

    pairs = {}
    notes = list(panel.notes)
    for a, b in permutations(range(count) if TARGET in maps else (), 2):
        first, second = maps[TARGET][a], maps[TARGET][b]
        if first is None or second is None:
            continue
        what = f"{panel.classes[a]} compared with {panel.classes[b]}"
        pairs[f"{a} {b}"] = shown(first - second, what)
        total = np.abs(first).sum() + np.abs(second).sum()
        if (
            a < b
            and 0 < np.abs(first - second).sum() < 100 * _precision(panel.maps[TARGET][a]) * total
        ):
            notes.append(
                f"{what}: the two maps are so similar that their difference is rounding error."
            )
    return {
        "name": panel.name,
        "picture": _data_url(_png((picture * 255).round().astype(np.uint8))),
        "size": [picture.shape[1], picture.shape[0]],
        "classes": list(panel.classes),
        "probabilities": probabilities,
        "contrast": panel.contrast,
        "combined": panel.combined,
        "views": list(maps),
        "maps": {
            view: [
                shown(relevance, f"{name}, {_name_of_view(view, panel.contrast)}")
                for name, relevance in zip(panel.classes, of_view, strict=True)
            ]
            for view, of_view in maps.items()
        },
        "pairs": pairs,
        "notes": notes + [SMOOTHED.format(panel.smoothing)] * (panel.smoothing > 1),
    }


def _number(value: float) -> str:
    """Two digits of a number, with a power of ten for tiny and huge values."""
    digits, power = f"{value:.1e}".split("e")
    if -3 < int(power) < 4:
        return f"{float(f'{value:.1e}'):g}"
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{digits} \N{MULTIPLICATION SIGN} 10{str(int(power)).translate(superscripts)}"


def _precision(values: Array | None) -> float:
    """The relative precision of the dtype of a map."""
    if isinstance(values, np.ndarray):
        return float(np.finfo(values.dtype).eps) if values.dtype.kind == "f" else 0.0
    return (
        torch.finfo(values.dtype).eps if values is not None and values.is_floating_point() else 0.0
    )


def _name_of_view(view: str, contrast: str) -> str:
    names = {
        TARGET: "relevance of the class",
        CONTRAST: f"relevance of {contrast}",
        DIFFERENCE: f"compared with {contrast}",
    }
    return names.get(view, view)


def _in_words(relevance: npt.NDArray[np.float64]) -> str:
    """An alternative text for a map: the shares of positive and negative relevance, and their locations."""
    total = np.abs(relevance).sum()
    if total == 0:
        return "no relevance"
    parts = []
    for name, part in (("positive", relevance.clip(0)), ("negative", (-relevance).clip(0))):
        share = part.sum() / total
        if share > 0:
            most, place = _largest_cell(part)
            parts.append(
                f"{share:.0%} of the relevance is {name}, the largest part ({most:.0%}) in the {place}"
            )
    return "; ".join(parts)


def _largest_cell(values: npt.NDArray[np.float64]) -> tuple[float, str]:
    """The largest share of a cell in a 3 x 3 grid of the map, and the name of the cell."""
    rows = np.array_split(values, 3, axis=0)
    cells = np.array([[cell.sum() for cell in np.array_split(row, 3, axis=1)] for row in rows])
    row, column = np.unravel_index(int(cells.argmax()), cells.shape)
    names = [["upper left", "upper middle", "upper right"], ["middle left", "center", "middle right"],
             ["lower left", "lower middle", "lower right"]]  # fmt: skip
    return float(cells[row, column] / values.sum()), names[row][column]


LEVELS = 63
"""Number of color levels on each side of zero: enough for the eye, and small enough for small files."""


def _palette() -> npt.NDArray[np.uint8]:
    """Color and opacity of each level, (2 LEVELS + 1, 4)."""
    from matplotlib import colormaps

    values = np.linspace(-1, 1, 2 * LEVELS + 1)
    colors = colormaps[COLOR_MAP]((values + 1) / 2)
    colors[:, 3] = overlay_opacity(values)
    return (colors * 255).round().astype(np.uint8)


def _overlay(relevance: npt.NDArray[np.float64], limit: float) -> str:
    """Draw a map as an overlay for the image, transparent where relevance is zero."""
    from PIL import Image

    steps = ((relevance / limit).clip(-1, 1) * LEVELS).round().astype(int) + LEVELS
    palette = _palette()
    image = Image.fromarray(steps.astype(np.uint8)).convert("P")
    image.putpalette(palette[:, :3].tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", transparency=palette[:, 3].tobytes(), optimize=True)
    return _data_url(file.getvalue())


def _color_bar() -> str:
    """Draw the color scale on white."""
    palette = _palette()[None].astype(float)
    opacity = palette[..., 3:] / 255
    return _data_url(_png((palette[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)))


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
