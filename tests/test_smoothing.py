"""Pictures without the grid of a model: the smoothing itself, the step of a model, and who draws with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from captum_abslrp import demo, methods, stem_stride
from captum_abslrp.cli import demo as demo_command
from captum_abslrp.cli import evaluate as evaluate_command
from captum_abslrp.cli import explain as explain_command
from captum_abslrp.cli import main
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.report import Panel, Section, render
from captum_abslrp.visualization import (
    plot_attribution,
    plot_grid,
    plot_rows,
    relevance_image,
    smooth_map,
)
from tests.test_no_trace import Crash, CrashForward, no_trace

SIZES = [1, 2, 3, 4, 7, 20]  # the last one is larger than the map
CAPTION = "Maps are smoothed over {} pixels."


def smoothing_note(figure: Figure) -> str:
    """What a figure says of smoothing; one of several maps has a note on their scales as well."""
    scales = "Each map has its own color scale."
    text = figure.get_supxlabel()
    return text.removeprefix(scales).strip()


def random_map(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- the map ------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", SIZES)
def test_the_sum_and_constant_maps_are_kept(smoothing: int) -> None:
    relevance = random_map(3, 11, 17)
    smooth = smooth_map(relevance, smoothing)
    assert smooth.shape == (11, 17) and smooth.dtype == np.float64
    assert smooth.sum() == pytest.approx(relevance.sum().item(), abs=1e-12)
    np.testing.assert_allclose(smooth_map(torch.full((11, 17), -3.0), smoothing), -3, rtol=1e-12)


@pytest.mark.parametrize("smoothing", SIZES)
def test_the_window_is_a_centered_triangle(smoothing: int) -> None:
    point = torch.zeros(61, 61)
    point[30, 30] = 1
    distance = np.abs(np.arange(61) - 30)
    weights = (smoothing - distance).clip(0) / smoothing**2
    np.testing.assert_allclose(smooth_map(point, smoothing), np.outer(weights, weights), atol=1e-15)


@pytest.mark.parametrize("smoothing", [2, 3, 4])
def test_a_pattern_that_repeats_becomes_flat(smoothing: int) -> None:
    grid = random_map(smoothing, smoothing).repeat(6, 7)
    edge = smoothing - 1
    inside = smooth_map(grid, smoothing)[edge:-edge, edge:-edge]
    np.testing.assert_allclose(inside, grid.mean(), atol=1e-12)
    assert np.ptp(smooth_map(grid, smoothing + 1)[edge:-edge, edge:-edge]) > 0.01


def test_one_pixel_leaves_the_map_as_it_is() -> None:
    relevance = random_map(3, 5, 7)
    before = relevance.clone()
    np.testing.assert_array_equal(smooth_map(relevance, 1), relevance_image(relevance))
    np.testing.assert_array_equal(smooth_map(relevance.numpy(), 2), smooth_map(relevance.sum(0), 2))
    assert torch.equal(relevance, before)


@pytest.mark.parametrize("bad", [0, -2, 2.0, "2", None])
def test_bad_smoothing_is_refused(bad: Any) -> None:
    message = f"Expected `smoothing` to be a positive number of pixels, but got {bad!r}."
    image, relevance = torch.zeros(4, 4), torch.zeros(4, 4)
    panel = Panel("a", image, ["b"], {"target": [relevance]}, smoothing=bad)
    for draw in (
        lambda: smooth_map(relevance, bad),
        lambda: plot_attribution(image, relevance, smoothing=bad),
        lambda: plot_grid([image], [[relevance]], smoothing=bad),
        lambda: render([Section("c", [panel])], title="d", settings={}),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            draw()


# --- figures ------------------------------------------------------------------------------------


def drawn(figure: Figure) -> list[np.ndarray[Any, Any]]:
    """The maps of a figure, those of overlays included."""
    pictures = [picture for axes in figure.axes for picture in axes.get_images()]
    return [np.asarray(p.get_array()) for p in pictures if p.get_cmap().name == "RdBu_r"]


def test_figures_draw_smooth_maps_and_say_so() -> None:
    image, relevance = torch.rand(3, 6, 8), random_map(3, 6, 8)
    for options, smoothing in (({}, 1), ({"smoothing": 1}, 1), ({"smoothing": 2}, 2)):
        for figure in (
            plot_attribution(image, relevance, **options),
            plot_rows([image] * 2, [relevance] * 2, **options),
            plot_grid([image], [[relevance, "none"]], **options),
        ):
            assert drawn(figure)
            for shown in drawn(figure):
                np.testing.assert_array_equal(shown, smooth_map(relevance, smoothing))
            caption = CAPTION.format(2) if smoothing == 2 else ""
            assert smoothing_note(figure) == caption


def test_a_report_draws_smooth_maps_and_describes_them_as_they_are() -> None:
    maps = random_map(2, 6, 8)

    def panel_of(given: Tensor, **options: Any) -> Any:
        panel = Panel("cat", torch.rand(3, 6, 8), ["a", "b"], {"target": given}, **options)
        page = render([Section("model", [panel])], title="Why?", settings={})
        found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
        assert found is not None
        return json.loads(found[1])["sections"][0]["panels"][0]

    raw, smooth = panel_of(maps), panel_of(maps, smoothing=2)
    already = panel_of(torch.stack([torch.from_numpy(smooth_map(m, 2)) for m in maps]))
    assert raw["notes"] == [] and smooth["notes"] == [CAPTION.format(2)]
    for of_raw, of_smooth, of_already in (
        (raw["maps"]["target"][1], smooth["maps"]["target"][1], already["maps"]["target"][1]),
        (raw["pairs"]["0 1"], smooth["pairs"]["0 1"], already["pairs"]["0 1"]),
    ):
        assert of_smooth["src"] == of_already["src"] != of_raw["src"]
        assert of_smooth["limit"] == of_already["limit"] != of_raw["limit"]
        assert of_smooth["alt"] == of_raw["alt"]


# --- the step of a model ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), [("vgg", 1), ("resnet", 2), ("vit", 8)])
def test_the_step_of_demo_models(name: str, step: int) -> None:
    model = demo.load_model(name)
    with no_trace(model):
        assert stem_stride(model, torch.zeros(1, 3, 64, 64)) == step
        assert stem_stride(model, torch.rand(3, 3, 64, 64)) == step


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("resnet18", 2),
        ("tf_efficientnet_b0", 2),  # which pads its input first
        ("vit_tiny_patch16_224", 16),
        ("swin_tiny_patch4_window7_224", 4),
        ("tresnet_m", 4),  # which folds 4x4 pixels into channels, and has a stride of 1
        ("tnt_s_patch16_224", 4),  # which cuts the image into patches, and these by a stride of 4
    ],
)
def test_the_step_of_timm_models(name: str, step: int) -> None:
    model = timm.create_model(name).eval()
    assert stem_stride(model, torch.rand(1, *model.default_cfg["input_size"])) == step


class Net(nn.Module):
    """A network of a function that gets the image and a convolution with stride 2."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.function = forward

    def forward(self, x: Tensor, *extra: Any) -> Tensor:
        result: Tensor = self.function(self, x, *extra)
        return result.flatten(1)


WEIGHT = torch.ones(4, 3, 2, 2)
NETWORKS = {
    "module": (lambda net, x: net.conv(x), 2),
    "function": (lambda net, x: F.conv2d(x, WEIGHT, stride=3), 3),
    "positional stride": (lambda net, x: torch.conv2d(x, WEIGHT, None, (1, 3)), 3),
    "default stride": (lambda net, x: F.conv2d(x, WEIGHT), 1),
    "first of two": (lambda net, x: net.conv(F.conv2d(x, WEIGHT, stride=4)[:, :3]), 4),
    "of a constant": (
        lambda net, x: x * F.conv2d(torch.ones(1, 3, 48, 48), WEIGHT, stride=4).mean(),
        1,
    ),
    "of a constant, then the image": (
        lambda net, x: net.conv(x * F.conv2d(torch.ones(1, 3, 48, 48), WEIGHT, stride=4).mean()),
        2,
    ),
    "made smaller before": (lambda net, x: net.conv(F.avg_pool2d(x, 2)), 4),
    "changed in place before": (lambda net, x: net.conv(x.sub_(0.5).div_(2)), 2),
    "patches by a linear map": (
        lambda net, x: F.unfold(x, 4, stride=4).mT @ torch.ones(48, 4) + 1,
        1,
    ),
    "a call without a rule": (lambda net, x: net.conv(torch.erfinv(x / 2)), 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_step_of_written_networks(name: str) -> None:
    forward, step = NETWORKS[name]
    inputs = torch.rand(1, 3, 48, 48)
    before = inputs.clone()
    model = Net(forward).eval()
    with no_trace(model):
        assert stem_stride(model, inputs) == step
    assert torch.equal(inputs, before)


def test_a_rule_of_the_layer_does_not_hide_the_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=3)).eval()
    model[0].rule = EpsilonRule()
    with no_trace(model):
        assert stem_stride(model, torch.rand(1, 3, 32, 32)) == 2


def test_wrapped_models_and_arguments_after_the_image() -> None:
    x = torch.rand(1, 3, 32, 32)
    assert stem_stride(nn.DataParallel(Net(lambda net, x: net.conv(x))), x) == 2
    assert stem_stride(torch.compile(Net(lambda net, x: net.conv(x)), backend="eager"), x) == 2
    assert stem_stride(Net(lambda net, x, scale: net.conv(scale * x)), x, 3.0) == 2


class Counting(nn.Module):
    """Counts its calls, and its batch norm is in training mode."""

    def __init__(self, *rest: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.rest = nn.Sequential(*rest)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.rest(self.norm(x))
        return result


def test_the_model_is_put_back_and_not_run_to_its_end() -> None:
    model = Counting(nn.Conv2d(3, 4, 3, stride=2), CrashForward())
    with no_trace(model):
        assert stem_stride(model, torch.rand(2, 3, 8, 8)) == 2
    assert model.calls == 0


def test_the_model_is_put_back_after_an_error() -> None:
    model = Counting(CrashForward(), nn.Conv2d(3, 4, 3, stride=2))
    with no_trace(model), pytest.raises(Crash):
        stem_stride(model, torch.rand(2, 3, 8, 8))
    assert model.calls == 0


def test_no_handler_of_the_model_takes_the_end_of_the_search_for_an_error() -> None:
    def guarded(net: Net, x: Tensor) -> Tensor:
        try:
            return net.conv(x)
        except Exception:
            return F.conv2d(x, WEIGHT, stride=4)

    assert stem_stride(Net(guarded), torch.rand(1, 3, 32, 32)) == 2


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.rand(3, 8, 8), ValueError, "shape (B, C, H, W) without empty axes, but got (3, 8, 8)."),
        (torch.rand(1, 3, 0, 8), ValueError, "without empty axes, but got (1, 3, 0, 8)."),
        (torch.ones(1, 3, 8, 8).int(), TypeError, "a floating-point tensor, but got torch.int32."),
        ([1.0], TypeError, "Expected `inputs` to be a floating-point tensor, but got list."),
    ],
)  # fmt: skip
def test_bad_images_are_refused(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        stem_stride(Net(lambda net, x: net.conv(x)), inputs)


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = demo.load_scenes("pair", 1).images[0].mul(255).round().byte()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of relevance that commands draw."""
    made: list[Figure] = []
    for command in (demo_command, evaluate_command, explain_command):
        for plot in (plot_grid, plot_rows):
            if hasattr(command, plot.__name__):

                def spy(*args: Any, plot: Any = plot, **options: Any) -> Figure:
                    made.append(plot(*args, **options))
                    return made[-1]

                monkeypatch.setattr(command, plot.__name__, spy)
    return made


@pytest.mark.parametrize("more", [[], ["--compare", "saliency"]])
@pytest.mark.parametrize(("name", "step"), [("vgg", 1), ("resnet", 2), ("vit", 8)])
def test_explain_smooths_figures_and_never_the_raw_relevance(
    name: str, step: int, more: list[str], picture: Path, tmp_path: Path, figures: list[Figure]
) -> None:
    command = ["explain", str(picture), "--model", f"demo:{name}", "--top", "2", *more]
    raw = {}
    for out, switch in (("smooth", []), ("raw", ["--no-smoothing"])):
        assert main([*command, *switch, "--out", str(tmp_path / out)]) == 0
        raw[out] = (tmp_path / out / "scene-abslrp.npy").read_bytes()
    assert raw["smooth"] == raw["raw"]
    smooth, plain = figures
    assert smoothing_note(smooth) == (CAPTION.format(step) if step > 1 else "")
    assert smoothing_note(plain) == ""
    relevance = np.load(tmp_path / "raw" / "scene-abslrp.npy")
    np.testing.assert_array_equal(drawn(plain)[0], relevance_image(relevance[0]))
    for shown, as_it_is in zip(drawn(smooth), drawn(plain), strict=True):
        np.testing.assert_array_equal(shown, smooth_map(as_it_is, step))


def test_the_report_of_explain_is_smooth(picture: Path, tmp_path: Path) -> None:
    command = ["explain", str(picture), "--model", "demo:resnet", "--out", str(tmp_path)]
    command += ["--html", str(tmp_path / "r.html")]
    assert main(command) == 0
    assert CAPTION.format(2) in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert main([*command, "--no-smoothing"]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Maps are smoothed" not in page and '"no-smoothing": "True"' in page


def test_resume_draws_again_what_was_drawn_otherwise(
    picture: Path, tmp_path: Path, figures: list[Figure]
) -> None:
    command = [
        "explain",
        str(picture),
        "--model",
        "demo:resnet",
        "--resume",
        "--out",
        str(tmp_path),
    ]
    for switch, count in (([], 1), ([], 1), (["--no-smoothing"], 2), (["--no-smoothing"], 2)):
        assert main([*command, *switch]) == 0
        assert len(figures) == count


def test_demo_smooths(
    tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"Saliency": methods.get_method("saliency")}
    monkeypatch.setattr(demo_command, "_demo_methods", lambda: few)
    command = ["demo", "--pairs", "1", "--out", str(tmp_path)]
    assert main(command) == main([*command, "--no-smoothing"]) == 0
    captions = [smoothing_note(figure) for figure in figures]
    assert captions == ["", CAPTION.format(2), CAPTION.format(8), "", "", ""]


def test_evaluate_smooths(tmp_path: Path, figures: list[Figure]) -> None:
    command = ["evaluate", "--demo", "--model", "demo:resnet", "--n-mosaics", "1"]
    command += ["--methods", "saliency,random", "--html", str(tmp_path / "r.html")]
    for switch, caption in (([], CAPTION.format(2)), (["--no-smoothing"], "")):
        assert main([*command, *switch, "--out", str(tmp_path / f"out{len(switch)}")]) == 0
        assert smoothing_note(figures[-1]) == caption
        page = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert (CAPTION.format(2) in page) == bool(caption)
    scores = [tmp_path / f"out{i}" / "scores.jsonl" for i in range(2)]
    tables = [
        [json.loads(line)["scores"]["values"] for line in path.read_text().splitlines()]
        for path in scores
    ]
    assert tables[0] == tables[1]


def test_a_model_that_cannot_be_searched_is_drawn_as_it_is(
    picture: Path, tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> int:
        raise UnsupportedCallError("Expected another call.")

    monkeypatch.setattr("captum_abslrp.cli.models.stem_stride", refuse)
    command = ["explain", str(picture), "--model", "demo:resnet", "--out", str(tmp_path)]
    assert main(command) == 0
    assert smoothing_note(figures[0]) == ""
