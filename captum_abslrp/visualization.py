"""Plots of relevance. Figures are returned, never shown, and no global state is modified.

Colors are symmetric around 0: red is positive relevance, blue is negative relevance, white is 0. With a
contrast, blue means that the contrast has more relevance here than the target. Without one, only signed rules
give much blue: relevance of negative sign, which lowers the score. Color bars call the two ends "for" (the
target) and "against". The color map is colorblind-safe. The ends of the scale are a percentile of the
magnitudes, so that a few extreme pixels do not turn all others white.

A strided convolution or a patch embedding at the start of a model leaves a grid in its maps. `smoothing`
removes the grid from a figure, see :func:`smooth_map`. The relevance itself does not change.

Axes: C channels (1 or 3), H height, W width. matplotlib is imported on first use.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "Array",
    "color_limit",
    "denormalize",
    "overlay_opacity",
    "picture_array",
    "plot_attribution",
    "plot_grid",
    "plot_overlays",
    "plot_rows",
    "relevance_image",
    "smooth_map",
]

Array = Tensor | npt.NDArray[Any]
"""A torch tensor or a numpy array."""

COLOR_MAP = "RdBu_r"
SMOOTHED = "Maps are smoothed over {} pixels."

_CELL_INCHES = 3.0
_GRID_CELL_INCHES = 1.7


def relevance_image(attribution: Array) -> npt.NDArray[np.float64]:
    """Sum relevance over channels, to get one value per pixel.

    Args:
        attribution: relevance, (C, H, W) with any C, or (H, W).

    Returns:
        The map, (H, W).

    Raises:
        ValueError: if the shape is wrong, an axis is empty or a value is not finite.

    Example:
        >>> import torch
        >>> relevance_image(torch.tensor([[[1.0, 2.0]], [[3.0, -4.0]]]))
        array([[ 4., -2.]])
    """
    values = _to_numpy(attribution).astype(np.float64)
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(
            "Expected `attribution` to have shape (C, H, W) or (H, W) without empty axes, "
            f"but got {values.shape}."
        )
    _require_finite(values, "attribution")
    return values.sum(axis=0) if values.ndim == 3 else values


def smooth_map(attribution: Array, smoothing: int) -> npt.NDArray[np.float64]:
    """Sum relevance over channels and smooth out the grid of a strided convolution or patch embedding.

    The function averages `smoothing` by `smoothing` pixels around every pixel, twice. The two averages
    amount to a triangular window of ``2 * smoothing - 1`` pixels, which is centered even if `smoothing` is
    an even number. A pattern with a period of `smoothing` pixels becomes flat, except for a remainder in the
    ``smoothing - 1`` pixels next to a border. The map is mirrored at its borders, which preserves the sum of
    the relevance and leaves constant maps unchanged.

    Args:
        attribution: relevance, (C, H, W) with any C, or (H, W).
        smoothing: stride of the grid in pixels; :func:`~captum_abslrp.stem_stride` returns that of a model.
            1 leaves the map unchanged.

    Returns:
        The map, (H, W).

    Raises:
        ValueError: if `smoothing` is not a positive integer, or as in :func:`relevance_image`.

    Example:
        >>> import torch
        >>> grid = torch.tensor([[0.0, 4.0, 0.0, 4.0, 0.0, 4.0]])
        >>> smooth_map(grid, 2)
        array([[1., 2., 2., 2., 2., 3.]])
    """
    if not isinstance(smoothing, int) or smoothing < 1:
        raise ValueError(
            f"Expected `smoothing` to be a positive number of pixels, but got {smoothing!r}."
        )
    relevance = relevance_image(attribution)
    if smoothing == 1:
        return relevance
    smooth = torch.from_numpy(np.pad(relevance, smoothing - 1, mode="symmetric"))[None]
    for _ in range(2):
        smooth = F.avg_pool2d(smooth, smoothing, stride=1)
    return smooth[0].numpy()


def color_limit(relevance: Array, clip_percentile: float = 99.0) -> float:
    """Compute the magnitude at both ends of the color scale.

    Args:
        relevance: values of any shape.
        clip_percentile: percentile of the magnitudes, in (0, 100].

    Returns:
        The percentile; the largest magnitude if the percentile is 0 (most pixels are zero); 1.0 if all
        values are zero. Always positive.

    Raises:
        ValueError: if `clip_percentile` is out of range.

    Example:
        >>> import torch
        >>> color_limit(torch.tensor([-4.0, 1.0, 2.0]), 100)
        4.0
        >>> color_limit(torch.zeros(2, 2))
        1.0
    """
    if not 0 < clip_percentile <= 100:
        raise ValueError(
            f"Expected `clip_percentile` to be in (0, 100], but got {clip_percentile}."
        )
    magnitudes = np.abs(_to_numpy(relevance).astype(np.float64))
    # Avoid subnormal limits, by which matplotlib cannot divide.
    tiny = float(np.finfo(np.float64).tiny) * 2
    for limit in (float(np.percentile(magnitudes, clip_percentile)), float(magnitudes.max())):
        if limit > tiny:
            return limit
    return 1.0


def overlay_opacity(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the opacity of relevance over a picture, which grows with its magnitude.

    Args:
        values: relevance divided by the magnitude at the end of the color scale, any shape.

    Example:
        >>> overlay_opacity(np.array([0.0, -1.0, 2.0]))
        array([0.  , 0.95, 0.95])
    """
    return 0.95 * np.abs(values).clip(0, 1) ** 0.7


def denormalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalization ``(image - mean) / std`` and clamp to [0, 1].

    Args:
        image: normalized image, (..., C, H, W).
        mean: mean per channel, C values.
        std: standard deviation per channel, C values.

    Raises:
        ValueError: if the number of values is not C.

    Example:
        >>> import torch
        >>> denormalize(torch.tensor([[[0.5]], [[9.0]]]), mean=[0.4, 0.5], std=[0.2, 0.2]).flatten()
        tensor([0.5000, 1.0000])
    """
    channels = image.shape[-3] if image.ndim >= 3 else 0
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"Expected `mean` and `std` to have one value per channel ({channels}), "
            f"but got {len(mean)} and {len(std)}."
        )
    scale, shift = (image.new_tensor(list(values))[:, None, None] for values in (std, mean))
    return (image.detach() * scale + shift).clamp(0, 1)


def plot_attribution(
    image: Array,
    attribution: Array,
    *,
    title: str | None = None,
    clip_percentile: float = 99.0,
    smoothing: int = 1,
) -> Figure:
    """Plot an image and its relevance: input, overlay, map with color bar.

    Args:
        image: the image without normalization, values in [0, 1] or uint8, (C, H, W) or (H, W).
        attribution: relevance, (C, H, W) or (H, W), with the height and width of `image`.
        title: heading of the figure.
        clip_percentile: percentile of the magnitudes at the ends of the color scale.
        smoothing: number of pixels that the maps are smoothed over, see :func:`smooth_map`; 1 draws the
            maps unchanged. A figure with smoothed maps has a note.

    Raises:
        ValueError: if a shape does not match, or if a value is not finite or out of range.

    Example:
        >>> import torch
        >>> figure = plot_attribution(torch.rand(3, 8, 8), torch.randn(3, 8, 8), title="a cat")
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['input', 'overlay', 'relevance']
    """
    return plot_rows(
        [image],
        [attribution],
        title=title,
        clip_percentile=clip_percentile,
        smoothing=smoothing,
    )


def plot_rows(
    images: Sequence[Array],
    attributions: Sequence[Array],
    *,
    row_labels: Sequence[str] | None = None,
    title: str | None = None,
    clip_percentile: float = 99.0,
    smoothing: int = 1,
) -> Figure:
    """Plot one row per attribution: input, overlay and map with color bar.

    Several attributions of one image share one picture of the input.

    Args:
        images: R images as in `plot_attribution`.
        attributions: R attributions as in `plot_attribution`; each has its own color scale.
        row_labels: R texts for the left margin.
        title: heading of the figure.
        clip_percentile: percentile of the magnitudes at the ends of the color scale.
        smoothing: number of pixels that the maps are smoothed over, see :func:`smooth_map`; 1 draws the
            maps unchanged. A figure with smoothed maps has a note.

    Raises:
        ValueError: if the counts differ, or as in `plot_attribution`.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 8, 8)
        >>> figure = plot_rows(images, torch.randn(2, 3, 8, 8), row_labels=["cat", "dog"])
        >>> len(figure.axes)  # 2 x 3 pictures and 2 color bars
        8
    """
    rows = len(images)
    _require_count("attributions", len(attributions), rows)
    _require_labels("row_labels", row_labels, rows)
    pictures = [picture_array(image) for image in images]
    maps = [smooth_map(attribution, smoothing) for attribution in attributions]

    height = rows * _CELL_INCHES * _tallness(pictures)
    figure = _figure(3.25 * _CELL_INCHES + 0.5, height, title)
    axes = figure.subplots(rows, 3, squeeze=False)
    _draw_inputs(axes, pictures, row_labels, width=22, size=11)
    for row in range(rows):
        _, middle, right = axes[row]
        _draw_overlay(middle, pictures[row], maps[row], clip_percentile)
        drawn = _draw_map(right, maps[row], clip_percentile)
        _add_color_bar(figure, drawn, right, maps[row])
    for column, name in enumerate(("input", "overlay", "relevance")):
        axes[0, column].set_title(name, fontsize=11)
    _note_scales(figure, rows, smoothing)
    return figure


def plot_grid(
    images: Sequence[Array],
    attributions: Sequence[Sequence[Array | str]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
    clip_percentile: float = 99.0,
    smoothing: int = 1,
) -> Figure:
    """Plot a grid with one row per image: the input, then one overlay per method.

    Rows of one image share one picture of the input.

    Every overlay has its own symmetric color scale, so the shared color bar is in multiples of the magnitude
    at the end of each scale.

    Args:
        images: R images as in `plot_attribution`.
        attributions: R rows of K attributions as in `plot_attribution`; a text instead of an
            attribution is written into its cell.
        row_labels: R texts for the left margin.
        column_labels: K texts above the columns of attributions.
        title: heading of the figure.
        clip_percentile: percentile of the magnitudes at the ends of the color scale.
        smoothing: number of pixels that the maps are smoothed over, see :func:`smooth_map`; 1 draws the
            maps unchanged. A figure with smoothed maps has a note.

    Raises:
        ValueError: if the counts differ, or as in `plot_attribution`.

    Example:
        >>> import torch
        >>> figure = plot_grid(
        ...     [torch.rand(3, 8, 8)],
        ...     [[torch.randn(3, 8, 8), "not supported"]],
        ...     column_labels=["AbsLRP", "LRP"],
        ... )
        >>> [axes.get_title() for axes in figure.axes]
        ['input', 'AbsLRP', 'LRP', '']
    """
    rows = len(images)
    _require_count("attributions", len(attributions), rows)
    columns = len(attributions[0]) if rows else 0
    for given in attributions:
        _require_count("attributions of every row", len(given), columns)
    _require_labels("row_labels", row_labels, rows)
    _require_labels("column_labels", column_labels, columns)
    pictures = [picture_array(image) for image in images]

    width = (columns + 1) * _GRID_CELL_INCHES + 1.2
    height = rows * _GRID_CELL_INCHES * _tallness(pictures) + 0.3
    figure = _figure(width, height, title)
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    _draw_inputs(axes, pictures, row_labels, width=16, size=10)
    for row, picture in enumerate(pictures):
        for column, cell in enumerate(attributions[row], start=1):
            if isinstance(cell, str):
                _write_note(axes[row, column], cell)
            else:
                relevance = smooth_map(cell, smoothing)
                _draw_overlay(axes[row, column], picture, relevance, clip_percentile)
    for column, name in enumerate(["input", *(column_labels or [])]):
        axes[0, column].set_title(_wrap(name, 20), fontsize=10, parse_math=False)
    _add_shared_color_bar(figure, axes)
    _note_scales(figure, rows * columns, smoothing)
    return figure


def plot_overlays(
    images: Sequence[Sequence[Array]],
    attributions: Sequence[Sequence[Array]],
    *,
    row_labels: Sequence[str] | None = None,
    cell_labels: Sequence[Sequence[str]] | None = None,
    title: str | None = None,
    note: str | None = None,
    clip_percentile: float = 99.0,
) -> Figure:
    """Plot rows of overlays, each on a different image.

    Every overlay has its own symmetric color scale, as in :func:`plot_grid`.

    Args:
        images: R rows of at most K images as in `plot_attribution`.
        attributions: one attribution per image.
        row_labels: R texts for the left margin.
        cell_labels: one text per image, shown above it.
        title: heading of the figure.
        note: a line below all images.
        clip_percentile: percentile of the magnitudes at the ends of the color scale.

    Raises:
        ValueError: if the counts differ, or as in `plot_attribution`.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 3, 8, 8)  # 2 rows of 3 images
        >>> figure = plot_overlays(images, torch.randn(2, 3, 8, 8), row_labels=["a", "b"])
        >>> len(figure.axes)  # and a color bar
        7
    """
    rows = len(images)
    _require_count("attributions", len(attributions), rows)
    _require_labels("row_labels", row_labels, rows)
    for given, maps in zip(images, attributions):
        _require_count("attributions of every row", len(maps), len(given))
    pictures = [[picture_array(image) for image in row] for row in images]
    columns = max(map(len, pictures), default=0)
    if columns == 0:
        raise ValueError("Expected `images` to contain at least one image, but got none.")

    tallness = _tallness([picture for row in pictures for picture in row])
    extra = 0.25 if cell_labels is not None else 0.0
    height = rows * (_GRID_CELL_INCHES * tallness + extra) + 0.3
    figure = _figure(columns * _GRID_CELL_INCHES + 1.9, height, title)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column, cell in enumerate(axes[row]):
            if column >= len(pictures[row]):
                cell.set_axis_off()
                continue
            relevance = relevance_image(attributions[row][column])
            _draw_overlay(cell, pictures[row][column], relevance, clip_percentile)
            if cell_labels is not None:
                text = _wrap(cell_labels[row][column], 24)
                cell.set_title(text, fontsize=8, parse_math=False)
        if row_labels is not None:
            # The label is vertical, so a low row has less room for it.
            width = max(8, int(16 * min(1.0, tallness)))
            _label_row(axes[row, 0], row_labels[row], width=width, size=10)
    _add_shared_color_bar(figure, axes)
    _note_scales(figure, sum(map(len, pictures)), 1, *([] if note is None else [note]))
    return figure


def _to_numpy(values: Array) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    if isinstance(values, np.ndarray):
        return values
    raise TypeError(f"Expected a torch tensor or a numpy array, but got {type(values).__name__}.")


def _require_finite(values: npt.NDArray[Any], name: str) -> None:
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"Expected `{name}` to be finite, but got {bad} NaN or infinite values "
            f"out of {values.size}."
        )


def _require_count(name: str, given: int, expected: int) -> None:
    if expected == 0:
        raise ValueError("Expected at least one image and one attribution, but got none.")
    if given != expected:
        raise ValueError(f"Expected `{name}` to have {expected} entries, but got {given}.")


def _require_labels(name: str, labels: Sequence[str] | None, expected: int) -> None:
    if labels is not None:
        _require_count(name, len(labels), expected)


def picture_array(image: Array) -> npt.NDArray[np.float64]:
    """Convert an image to a numpy array (H, W, 3) with values in [0, 1].

    Args:
        image: values in [0, 1] or uint8, (C, H, W) with one or three channels, or (H, W).

    Raises:
        ValueError: if the shape is wrong, or if a value is not finite or out of range.

    Example:
        >>> import torch
        >>> picture_array(torch.ones(1, 2, 4)).shape
        (2, 4, 3)
    """
    raw = _to_numpy(image)
    if raw.ndim == 2:
        raw = raw[None]
    if raw.ndim != 3 or raw.shape[0] not in (1, 3) or raw.size == 0:
        raise ValueError(
            "Expected `image` to have shape (3, H, W), (1, H, W) or (H, W), "
            f"but got {tuple(image.shape)}."
        )
    values = raw.astype(np.float64) / (255 if raw.dtype == np.uint8 else 1)
    _require_finite(values, "image")
    # Undoing a normalization in single precision may overshoot a little.
    if values.min() < -1e-3 or values.max() > 1 + 1e-3:
        raise ValueError(
            "Expected `image` to have values in [0, 1], but got "
            f"[{values.min():.3g}, {values.max():.3g}]. Undo a normalization with `denormalize`."
        )
    return np.broadcast_to(values.clip(0, 1), (3, *values.shape[1:])).transpose(1, 2, 0)


def _tallness(pictures: Sequence[npt.NDArray[np.float64]]) -> float:
    """Height of a row as a multiple of the width of its pictures, within limits."""
    return min(3.0, max(0.4, *(picture.shape[0] / picture.shape[1] for picture in pictures)))


def _figure(width: float, height: float, title: str | None) -> Figure:
    from matplotlib.figure import Figure

    # The heading enlarges the figure, so that the pictures keep their size.
    lines = _wrap(title, max(30, int(width * 9))).splitlines() if title else []
    figure = Figure(
        figsize=(width, height + 0.35 + 0.25 * len(lines)), dpi=120, layout="constrained"
    )
    if lines:
        # Without math parsing, a dollar sign in the name of a file or class is plain text.
        figure.suptitle("\n".join(lines), fontsize=13, parse_math=False)
    return figure


def _wrap(text: str, width: int) -> str:
    """Wrap long lines and keep line breaks in the text."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def _without_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.7")


def _draw_picture(axes: Axes, picture: npt.NDArray[np.float64]) -> None:
    axes.imshow(picture, interpolation="nearest")
    _without_ticks(axes)


def _draw_inputs(
    axes: npt.NDArray[Any],
    pictures: Sequence[npt.NDArray[np.float64]],
    labels: Sequence[str] | None,
    *,
    width: int,
    size: int,
) -> None:
    """Draw the inputs into the first column, and label the rows; rows of one image share one cell."""
    shared = len(pictures) > 1 and all(np.array_equal(p, pictures[0]) for p in pictures)
    if shared:
        first, *unused = axes[:, 0]
        first.set_subplotspec(first.get_gridspec()[:, 0])
        for cell in unused:
            cell.remove()
        _draw_picture(first, pictures[0])
    else:
        for cell, picture in zip(axes[:, 0], pictures, strict=True):
            _draw_picture(cell, picture)
    for cell, label in zip(axes[:, int(shared)], labels or ()):
        _label_row(cell, label, width=width, size=size)


def _draw_map(
    axes: Axes,
    relevance: npt.NDArray[np.float64],
    clip_percentile: float,
    *,
    opacity: npt.NDArray[np.float64] | None = None,
) -> AxesImage:
    from matplotlib.colors import Normalize

    limit = color_limit(relevance, clip_percentile)
    drawn = axes.imshow(
        relevance,
        cmap=COLOR_MAP,
        norm=Normalize(-limit, limit),
        alpha=opacity,
        interpolation="nearest",
    )
    if not relevance.any():
        _write_text(axes, "all zero", behind="white")
    _without_ticks(axes)
    return drawn


def _draw_overlay(
    axes: Axes,
    picture: npt.NDArray[np.float64],
    relevance: npt.NDArray[np.float64],
    clip_percentile: float,
) -> None:
    """Draw relevance over the grayscale picture, with an opacity that grows with its magnitude."""
    if relevance.shape != picture.shape[:2]:
        raise ValueError(
            f"Expected `attribution` to have the height and width of the image "
            f"{picture.shape[:2]}, but got {relevance.shape}."
        )
    # The picture is pale, so that the dark ends of the color scale stand out on dark pictures as well.
    gray = 0.4 + 0.6 * (picture @ np.array([0.299, 0.587, 0.114]))
    axes.imshow(gray, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    limit = color_limit(relevance, clip_percentile)
    _draw_map(axes, relevance, clip_percentile, opacity=overlay_opacity(relevance / limit))


def _write_note(axes: Axes, text: str) -> None:
    """Fill an empty cell with a text."""
    axes.set_box_aspect(1)
    _write_text(axes, text)
    _without_ticks(axes)


def _write_text(axes: Axes, text: str, *, behind: str = "none") -> None:
    axes.text(
        0.5,
        0.5,
        _wrap(text, 17),
        ha="center",
        va="center",
        fontsize=9,
        color="0.3",
        bbox={"boxstyle": "round", "facecolor": behind, "edgecolor": "none"},
        parse_math=False,
        transform=axes.transAxes,
    )


def _note_scales(figure: Figure, maps: int, smoothing: int, *further: str) -> None:
    notes = ["Each map has its own color scale."] * (maps > 1)
    notes += [SMOOTHED.format(smoothing)] * (smoothing > 1)
    notes += further
    if notes:
        _note(figure, " ".join(notes))


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color="0.4", parse_math=False)


def _label_row(axes: Axes, text: str, *, width: int, size: int) -> None:
    axes.set_ylabel(_wrap(text, width), fontsize=size, parse_math=False)


def _add_color_bar(
    figure: Figure, drawn: AxesImage, axes: Axes, relevance: npt.NDArray[np.float64]
) -> None:
    limit = drawn.get_clim()[1] or 1.0
    beyond = np.abs(relevance).max() > limit
    bar = figure.colorbar(
        drawn, ax=axes, fraction=0.05, pad=0.03, extend="both" if beyond else "neither"
    )
    unit = "relevance per pixel"
    if relevance.any():
        digits, power = f"{limit:.1e}".split("e")
        if -3 < int(power) < 4:
            digits = f"{limit:.2g}"
        else:
            unit += f"\n($\\times 10^{{{int(power)}}}$)"
        bar.set_ticks([-limit, 0, limit], labels=[f"\N{MINUS SIGN}{digits}", "0", digits])
    else:  # the ends of the scale mean nothing
        bar.set_ticks([0], labels=["0"])
    bar.set_label(unit, fontsize=9)
    bar.ax.tick_params(labelsize=9)


def _add_shared_color_bar(figure: Figure, axes: npt.NDArray[Any]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(-1, 1), COLOR_MAP)
    # About two pictures high, regardless of the number of rows.
    height = min(0.9, 2 / len(axes))
    bar = figure.colorbar(
        scale,
        ax=[cell for cell in axes.flat if cell.figure],
        fraction=0.03,
        pad=0.02,
        shrink=height,
    )
    bar.set_ticks([-1, 0, 1], labels=["against", "0", "for"])
    bar.set_label("relevance", fontsize=9)
    bar.ax.tick_params(labelsize=9)
