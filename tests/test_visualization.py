"""Figures have the right content; wrong input is refused in words."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import captum_abslrp.visualization
from captum_abslrp.visualization import (
    color_limit,
    denormalize,
    plot_attribution,
    plot_grid,
    plot_overlays,
    plot_rows,
    relevance_image,
)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attribution() -> torch.Tensor:
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))


def rendered(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def scales(figure: Figure) -> list[tuple[float, float]]:
    """Ends of all color scales of relevance, overlays included."""
    drawn = [picture for axes in figure.axes for picture in axes.get_images()]
    return [picture.get_clim() for picture in drawn if picture.get_cmap().name == "RdBu_r"]


def pixels(figure: Figure, axes: int) -> np.ndarray[Any, Any]:
    return np.asarray(figure.axes[axes].get_images()[0].get_array())


def test_relevance_image_sums_over_channels(attribution: torch.Tensor) -> None:
    expected = attribution.double().sum(0).numpy()
    np.testing.assert_allclose(relevance_image(attribution), expected)
    np.testing.assert_allclose(relevance_image(attribution.numpy()), expected, atol=1e-6)
    np.testing.assert_allclose(relevance_image(attribution[:1]), attribution[0].numpy())
    np.testing.assert_allclose(relevance_image(attribution[0]), attribution[0].numpy())
    assert relevance_image(attribution.bfloat16().requires_grad_()).dtype == np.float64


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 4), (3, 0, 4), ()])
def test_relevance_image_refuses_shapes(shape: tuple[int, ...]) -> None:
    message = f"to have shape (C, H, W) or (H, W) without empty axes, but got {shape}."
    with pytest.raises(ValueError, match=re.escape(message)):
        relevance_image(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_relevance_image_refuses_values_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="to be finite, but got 1 NaN or infinite values out of 4"):
        relevance_image(torch.tensor([[0.0, bad], [1.0, 2.0]]))


def test_relevance_image_refuses_lists() -> None:
    with pytest.raises(TypeError, match="Expected a torch tensor or a numpy array, but got list"):
        relevance_image([[1.0]])  # type: ignore[arg-type]


def test_color_limit() -> None:
    ramp = torch.linspace(-100, 50, 151)
    assert color_limit(ramp, 100) == 100
    assert 90 < color_limit(ramp) < 100
    assert color_limit(torch.zeros(5)) == 1
    sparse = torch.zeros(1000)
    sparse[7] = -3
    assert color_limit(sparse) == 3
    assert color_limit(np.array([1e-320])) == 1


@pytest.mark.parametrize("percentile", [0, -1, 100.5, float("nan")])
def test_color_limit_refuses_percentiles(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `clip_percentile` to be in \(0, 100\], but"):
        color_limit(torch.ones(3), percentile)


def test_denormalize_undoes_normalization(image: torch.Tensor) -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    column = (3, 1, 1)
    normalized = (image - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    torch.testing.assert_close(denormalize(normalized, mean, std), image)
    torch.testing.assert_close(denormalize(normalized[None], mean, std), image[None])


def test_denormalize_refuses_counts(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"one value per channel \(3\), but got 1 and 3"):
        denormalize(image, [0.5], [1, 1, 1])


def test_plot_attribution(image: torch.Tensor, attribution: torch.Tensor) -> None:
    figure = plot_attribution(image, attribution, title="why a cat?")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["input", "overlay", "relevance", ""]  # the last one is the color bar
    assert figure.get_suptitle() == "why a cat?"
    np.testing.assert_allclose(pixels(figure, 2), relevance_image(attribution))
    limit = color_limit(relevance_image(attribution))
    assert scales(figure) == [(-limit, limit)] * 2
    np.testing.assert_allclose(pixels(figure, 0), image.permute(1, 2, 0))
    assert rendered(figure).startswith(b"\x89PNG")


def test_the_overlay_is_opaque_where_relevance_is(image: torch.Tensor) -> None:
    relevance = torch.zeros(6, 8)
    relevance[2, 3] = -1
    figure = plot_attribution(image, relevance, clip_percentile=100)
    gray, overlay = figure.axes[1].get_images()
    opacity = np.asarray(overlay.get_alpha())
    assert opacity[2, 3] > 0.9 and opacity.sum() == opacity[2, 3]
    assert gray.get_cmap().name == "gray"


def test_more_clipping_narrows_the_scale(image: torch.Tensor, attribution: torch.Tensor) -> None:
    wide = scales(plot_attribution(image, attribution, clip_percentile=100))[0]
    narrow = scales(plot_attribution(image, attribution, clip_percentile=50))[0]
    assert narrow[1] < wide[1] == np.abs(relevance_image(attribution)).max()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_flat_tiny_and_huge_maps_are_plotted(image: torch.Tensor, scale: float) -> None:
    figure = plot_attribution(image, torch.full((3, 6, 8), scale))
    assert all(low == -high and high > 0 for low, high in scales(figure))
    rendered(figure)


def test_white_is_zero() -> None:
    figure = plot_attribution(torch.ones(6, 8), torch.zeros(6, 8))
    drawn = figure.axes[2].get_images()[0]
    assert drawn.to_rgba(np.zeros(1))[0, :3].min() > 0.95


@pytest.mark.parametrize(
    "given",
    [
        torch.rand(1, 6, 8),
        torch.rand(6, 8),
        np.random.default_rng(0).random((3, 6, 8)),
        torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8),
        torch.rand(3, 6, 8, dtype=torch.float16),
    ],
    ids=["one channel", "no channel", "numpy", "uint8", "half"],
)
def test_images_of_all_kinds_are_plotted(given: torch.Tensor, attribution: torch.Tensor) -> None:
    picture = pixels(plot_attribution(given, attribution), 0)
    assert picture.shape == (6, 8, 3) and 0 <= picture.min() <= picture.max() <= 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, 6, 8), "to have shape (3, H, W), (1, H, W) or (H, W), but got (4, 6, 8)."),
        (torch.zeros(1, 3, 6, 8), "but got (1, 3, 6, 8)."),
        (torch.full((6, 8), 2.0), "to have values in [0, 1], but got [2, 2]. Undo a normalization"),
        (torch.full((6, 8), float("nan")), "Expected `image` to be finite, but got 48 NaN"),
        (torch.zeros(3, 8, 6), "to have the height and width of the image (8, 6), but got (6, 8)."),
    ],
)  # fmt: skip
def test_bad_images_are_refused(bad: torch.Tensor, message: str, attribution: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_attribution(bad, attribution)


def test_maps_of_one_image_share_its_picture(
    image: torch.Tensor, attribution: torch.Tensor
) -> None:
    figure = plot_rows(
        [image, image.clone()], [attribution, -attribution], row_labels=["cat", "dog"]
    )
    picture, *maps = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    assert picture.get_title() == "input" and len(maps) == 4
    rendered(figure)  # computes the layout
    first, second = maps[0].get_window_extent(), maps[2].get_window_extent()
    center = (first.y0 + second.y1) / 2
    assert abs(picture.get_window_extent().y0 + picture.get_window_extent().y1 - 2 * center) < 2
    assert [axes.get_ylabel() for axes in (picture, *maps)] == ["", "cat", "", "dog", ""]


def test_rows_of_one_image_share_its_picture_in_a_grid(
    image: torch.Tensor, attribution: torch.Tensor
) -> None:
    figure = plot_grid([image] * 2, [[attribution] * 2] * 2, row_labels=["cat", "dog"])
    assert len(figure.axes) == 1 + 4 + 1
    assert [axes.get_ylabel() for axes in figure.axes] == ["", "cat", "", "dog", "", "relevance"]


@pytest.mark.parametrize("plot", [plot_attribution, lambda x, r: plot_grid([x], [[r]])])
def test_labels_of_color_bars_fit_low_figures(plot: Callable[..., Figure]) -> None:
    figure = plot(torch.rand(3, 40, 128), torch.full((3, 40, 128), 1e-7))
    rendered(figure)  # computes the layout
    label = figure.axes[-1].yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("scale", "unit", "end"),
    [(1.0, "relevance per pixel", "2"), (1e-6, "relevance per pixel\n($\\times 10^{-6}$)", "2.0")],
)
def test_color_bars_have_short_numbers(
    image: torch.Tensor, scale: float, unit: str, end: str
) -> None:
    figure = plot_attribution(image, torch.full((6, 8), 2 * scale, dtype=torch.float64))
    bar = next(axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    assert bar.get_ylabel() == unit
    assert [tick.get_text() for tick in bar.get_yticklabels()] == [f"\N{MINUS SIGN}{end}", "0", end]


def test_plot_rows(image: torch.Tensor, attribution: torch.Tensor) -> None:
    figure = plot_rows([image, image / 2, image], [attribution, 10 * attribution, 0 * attribution],
                       row_labels=["cat", "dog", "no\none"])  # fmt: skip
    assert len(figure.axes) == 3 * 3 + 3
    assert [figure.axes[i].get_ylabel() for i in (0, 3, 6)] == ["cat", "dog", "no\none"]
    limit = color_limit(relevance_image(attribution))
    expected = [limit, limit, 10 * limit, 10 * limit, 1, 1]
    np.testing.assert_allclose([high for _, high in scales(figure)], expected)
    rendered(figure)


def test_plot_grid(image: torch.Tensor, attribution: torch.Tensor) -> None:
    figure = plot_grid(
        [image, image / 2],
        [[attribution, "not supported: no rule"], [attribution[0], attribution.numpy()]],
        row_labels=["why 3?", "why 8?"],
        column_labels=["AbsLRP", "LRP"],
        title="two",
    )
    assert len(figure.axes) == 2 * 3 + 1
    assert [axes.get_title() for axes in figure.axes[:3]] == ["input", "AbsLRP", "LRP"]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["why 3?", "why 8?"]
    assert figure.axes[2].texts[0].get_text() == "not supported: no\nrule"
    assert all(low == -high for low, high in scales(figure)) and len(scales(figure)) == 3
    ticks = [text.get_text() for text in figure.axes[-1].get_yticklabels()]
    assert ticks == ["against", "0", "for"]
    rendered(figure)


@pytest.mark.parametrize("size", [(8, 8), (4, 8)])
def test_plot_overlays(size: tuple[int, int]) -> None:
    images, maps = torch.rand(2, 3, 3, *size), torch.randn(2, 3, 3, *size)
    names = ["channel 124\n12% of relevance", "channel 7\n9% of relevance"]
    figure = plot_overlays(
        [images[0], images[1, :2]], [maps[0], maps[1, :2]], row_labels=names, title="a cat",
        note="costs $1 or $2",
    )  # fmt: skip
    assert [len(axes.get_images()) for axes in figure.axes[:6]] == [2, 2, 2, 2, 2, 0]
    assert figure.get_supxlabel() == "Each map has its own color scale. costs $1 or $2"
    figure.canvas.draw()
    first, second = (figure.axes[i].yaxis.label.get_window_extent() for i in (0, 3))
    assert first.y0 > second.y1  # names of rows, which run upward, do not meet
    assert second.y0 >= 0 and first.y1 <= figure.bbox.y1


def test_counts_are_checked(image: torch.Tensor, attribution: torch.Tensor) -> None:
    two = [attribution, attribution]
    with pytest.raises(ValueError, match="Expected `attributions` to have 1 entries, but got 2"):
        plot_rows([image], two)
    with pytest.raises(ValueError, match="Expected `row_labels` to have 2 entries, but got 1"):
        plot_rows([image, image], two, row_labels=["a"])
    with pytest.raises(ValueError, match="Expected at least one image and one attribution"):
        plot_rows([], [])
    with pytest.raises(
        ValueError, match="`attributions of every row` to have 2 entries, but got 1"
    ):
        plot_grid([image, image], [two, two[:1]])
    with pytest.raises(ValueError, match="Expected `column_labels` to have 2 entries, but got 3"):
        plot_grid([image], [two], column_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="Expected `row_labels` to have 1 entries, but got 2"):
        plot_grid([image], [two], row_labels=["a", "b"])
    with pytest.raises(ValueError, match="Expected at least one image and one attribution"):
        plot_grid([], [])
    with pytest.raises(ValueError, match="Expected at least one image and one attribution"):
        plot_grid([image], [[]])


@pytest.mark.parametrize("size", [(4, 40), (40, 4), (10, 20)])
def test_the_figure_is_as_tall_as_its_pictures(size: tuple[int, int]) -> None:
    square = plot_attribution(torch.zeros(9, 9), torch.zeros(9, 9)).get_size_inches()
    figure = plot_attribution(torch.zeros(size), torch.zeros(size))
    rendered(figure)
    width, height = figure.get_size_inches()
    assert width == square[0] and (height < square[1]) == (size[0] < size[1])


def test_dollar_signs_are_no_formulas(image: torch.Tensor, attribution: torch.Tensor) -> None:
    text = r"5$ and \frac{$"
    figure = plot_grid([image], [[attribution, text]], row_labels=[text],
                       column_labels=[text, text], title=text)  # fmt: skip
    rendered(figure)


def test_long_titles_are_wrapped(image: torch.Tensor, attribution: torch.Tensor) -> None:
    figure = plot_attribution(image, attribution, title="a very long title " * 20)
    rendered(figure)
    (heading,) = figure.texts
    assert heading.get_text() == figure.get_suptitle() and heading.get_text().count("\n") > 1
    assert heading.get_window_extent().width < figure.bbox.width


def test_inputs_are_not_changed(image: torch.Tensor, attribution: torch.Tensor) -> None:
    before = image.clone(), attribution.clone()
    first = rendered(plot_attribution(image, attribution))
    assert rendered(plot_attribution(image, attribution)) == first
    assert torch.equal(image, before[0]) and torch.equal(attribution, before[1])


def test_matplotlib_is_imported_when_needed_and_pyplot_never() -> None:
    # By its path, because Captum, which the package imports, imports both.
    path = captum_abslrp.visualization.__file__
    code = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('v', {path!r})\n"
        "v = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(v)\n"
        "v.relevance_image(torch.zeros(3, 2, 2))\n"
        "assert 'matplotlib' not in sys.modules\n"
        "v.plot_attribution(torch.zeros(2, 2), torch.zeros(2, 2))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_zero_map_says_so_and_has_no_invented_scale() -> None:
    image = torch.rand(3, 8, 16)
    figure = plot_rows([image, image / 2], [torch.zeros(3, 8, 16), torch.randn(3, 8, 16)])
    assert all(
        axes.get_box_aspect() is None for axes in figure.axes[:6]
    )  # stays as wide as the image
    empty, full = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    assert [tick.get_text() for tick in empty.get_yticklabels()] == ["0"]
    assert len(full.get_yticklabels()) == 3
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes[:6]]
    assert texts == [[], ["all zero"], ["all zero"], [], [], []]
    assert figure.get_supxlabel() == "Each map has its own color scale."
    assert plot_rows([image], [torch.zeros(3, 8, 16)]).get_supxlabel() == ""
