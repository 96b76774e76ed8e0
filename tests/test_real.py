"""The benchmark on real models, with a small model and drawn images in their place."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks import real
from benchmarks.real import (
    ROWS,
    SUMMARY,
    Benchmark,
    randomized,
    rank_correlation,
    read,
    summary,
)
from benchmarks.real_data import Case, load_case, make_mosaics
from benchmarks.real_methods import guided_backprop, layer_cam, methods_of
from captum_abslrp import demo
from captum_abslrp.methods import find_feature_layer, get_method

LOADER = """
import numpy as np
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    features = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(4, 3)), prepare

def prepare(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
"""


@cache
def case_of(name: str) -> Case:
    return load_case(name, None)


@pytest.fixture
def loader(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(LOADER, encoding="utf-8")
    return f"{path}:make"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, name in enumerate(("cat", "dog", "emu")):
        color = [0, 0, 0]
        color[index] = 200
        for number in range(2):
            Image.new("RGB", (8, 8), tuple(color)).save(folder / f"{name}_{number}.png")
    return folder


def test_labels_come_from_names(loader: str, pictures: Path) -> None:
    case = load_case(loader, pictures, classes=["cat", "dog", "emu"])
    assert case.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert case.images.shape == (6, 3, 8, 8) and not case.model.training
    with pytest.raises(ValueError, match="to start with one of cat, dog"):
        load_case(loader, pictures, classes=["cat", "dog"])
    with pytest.raises(ValueError, match="to start with the number of its class"):
        load_case(loader, pictures)
    (pictures / "emu_1.png").rename(pictures / "0012_emu.png")
    for file in pictures.glob("*_?.png"):
        file.unlink()
    assert load_case(loader, pictures).labels.tolist() == [12]
    with pytest.raises(ValueError, match="Expected images in"):
        load_case(loader, pictures / "empty")


def test_arrays_are_images_too(loader: str, tmp_path: Path) -> None:
    given = np.zeros((2, 8, 8, 3), np.uint8)
    given[1, :, :, 2] = 255
    np.savez(tmp_path / "images.npz", images=given, labels=[1, 0])
    case = load_case(loader, tmp_path / "images.npz")
    assert case.labels.tolist() == [1, 0] and case.images[1].sum((1, 2)).tolist() == [0, 0, 64]


def test_boxes_go_through_the_preprocessing(loader: str, pictures: Path) -> None:
    boxes = {file.name: [2, 1, 5, 3] for file in pictures.iterdir()}
    (pictures / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    case = load_case(loader, pictures, classes=["cat", "dog", "emu"])
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert case.boxes is not None and torch.equal(case.boxes[3], expected)


@pytest.mark.parametrize("full_size", [False, True])
def test_mosaics_have_four_classes(full_size: bool) -> None:
    case = case_of("demo:vit")
    mosaics = make_mosaics(case, 4, full_size=full_size)
    side = 128 if full_size else 64
    assert mosaics.images.shape == (4, 3, side, side)
    assert mosaics.positions.tolist() == [0, 1, 2, 3]
    assert mosaics.model(mosaics.images).shape == (4, 10)
    assert case.model(case.images[:1]).shape == (1, 10)  # as it was
    if full_size:  # each quarter is an image of the target
        quarters = mosaics.images.unfold(2, 64, 64).unfold(3, 64, 64).flatten(2, 3)
        for i in range(4):
            at = (case.images == quarters[i, :, i]).flatten(1).all(1).nonzero().flatten()
            assert case.labels[at].tolist() == [mosaics.targets[i].item()]


def test_too_few_classes_are_refused() -> None:
    case = case_of("demo:vgg")
    few = Case(case.model, case.images, torch.zeros_like(case.labels))
    with pytest.raises(ValueError, match="Expected images of four classes"):
        make_mosaics(few, 1, full_size=False)


def test_rank_correlation_is_spearmans() -> None:
    a, b = torch.rand(3, 50), torch.rand(3, 50)
    a[1] = a[1].round(decimals=1)  # with ties
    b[1].clamp_(min=0.5)
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(rank_correlation(a, b).tolist(), expected)
    assert rank_correlation(a, torch.zeros_like(a)).tolist() == [0, 0, 0]


def test_only_the_upper_layers_are_randomized() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def changed(share: float) -> list[bool]:
        other = randomized(model, share)
        return [bool((a.weight != b.weight).all()) for a, b in zip(model, other, strict=True)]

    assert changed(0.0) == [False, False, False, True]
    assert changed(0.5) == [False, False, True, True]
    assert changed(1.0) == [True] * 4


def scored(folder: Path, scores: list[str], methods: Any) -> dict[tuple[str, str], Any]:
    case = case_of("demo:vgg")
    sizes = {"gridpg": 4, "images": 3, "gae": 1, "mprt": 2}
    Benchmark(folder, case, sizes, 4).run(methods, scores)
    return {(e["method"], e["score"]): e for e in read(folder / "scores.jsonl")}


def test_scores_are_kept_and_failures_are_tried_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def ones(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        calls.append("ones")
        return torch.ones_like(x)

    def fails(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        calls.append("fails")
        raise RuntimeError("no rule")

    scores = ["gridpg_half", "lerf_morf", "energy", "mprt_all", "mprt_all_abs", "memory"]
    found = scored(tmp_path, scores, {"ones": ones, "fails": fails})
    torch.testing.assert_close(found["ones", "gridpg_half"]["values"], [0.25] * 4)
    assert found["ones", "mprt_all"]["values"] == [0.0, 0.0]
    share = case_of("demo:vgg").boxes[:3].float().mean((1, 2))  # type: ignore[index]
    torch.testing.assert_close(found["ones", "energy"]["values"], share.tolist())
    assert found["fails", "gridpg_half"]["failure"] == "RuntimeError: no rule"
    assert calls.count("fails") == 1 and ("fails", "lerf_morf") not in found
    assert ("ones", "memory") not in found  # without a GPU
    calls.clear()
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"method": "ones", "sco')  # a run that was killed
    again = scored(tmp_path, scores, {"ones": ones, "fails": fails})
    assert set(calls) == {"fails"} and again["ones", "energy"] == found["ones", "energy"]


@pytest.mark.parametrize("model", ["vgg", "vit"])
def test_every_method_runs_or_says_why(model: str, tmp_path: Path) -> None:
    case = case_of(f"demo:{model}")
    sizes = {"gridpg": 1, "images": 1, "gae": 1, "mprt": 1}
    methods = methods_of(case.model)
    slow = ("Occlusion", "IntegratedGradients", "GradientShap")  # in tests of their own
    alike = (
        "AbsLRP transformer AttnLRP",
        "AbsLRP transformer CP, gamma 0",
        "AbsLRP signed gamma 0",
    )
    methods = {n: m for n, m in methods.items() if n not in slow and not n.startswith(alike)}
    Benchmark(tmp_path, case, sizes, 4).run(methods, ["gridpg_half"])
    found = {e["method"]: e for e in read(tmp_path / "scores.jsonl")}
    failed = {name for name, entry in found.items() if "failure" in entry}
    without_relu = {"DeepLift", "GuidedBackprop", "LayerGradCam", "GuidedGradCam", "Captum LRP"}
    assert set(found) == set(methods) and failed == (without_relu if model == "vit" else set())
    assert all(0 <= v <= 1 for e in found.values() for v in e.get("values", []))


def test_the_summary_marks_the_best(tmp_path: Path) -> None:
    for folder in ("lite0", "resnet56"):
        (tmp_path / folder).mkdir()
        rows = [
            {"method": "AbsLRP.recommended", "score": "gridpg_half", "values": [0.5, 0.75]},
            {"method": "AbsLRP.recommended", "score": "gridpg_full", "values": [0.25, 0.5]},
            {"method": "random", "score": "gridpg_half", "values": [0.25, 0.25]},
            {"method": "random", "score": "gridpg_full", "values": [0.75, 0.5]},
        ]
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / folder / "scores.jsonl").write_text(lines, encoding="utf-8")
    models = {"lite0": "Lite0", "resnet56": "ResNet-56"}
    options = {"methods": ROWS, "scores": SUMMARY}
    lines = summary(tmp_path, models, errors=False, **options).splitlines()
    assert lines[2].startswith("| AbsLRP.recommended | **0.62** | 0.38 | - |")
    assert lines[-1].startswith("| random | 0.25 | **0.62** | - |")
    assert "**0.62** ± 0.12" in summary(tmp_path, models, errors=True, **options)
    short = summary(
        tmp_path, models, methods=["random"], scores={"GridPG": "gridpg_half"}, errors=False
    )
    assert short.splitlines()[2:] == ["| random | **0.25** | **0.62** |"]


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_backprop_is_captums_where_relus_are_modules() -> None:
    model, x = demo.load_model("resnet"), demo.load_scenes("single", 2).inputs
    y = torch.tensor([1, 7])
    expected = captum.attr.GuidedBackprop(demo.load_model("resnet")).attribute(x, target=y)
    torch.testing.assert_close(guided_backprop(model, x, y), expected)
    with pytest.raises(ValueError, match="Expected `model` to have ReLUs"):
        guided_backprop(nn.Sequential(nn.Flatten(), nn.Linear(12288, 3)), x, torch.tensor([0, 1]))


@pytest.mark.filterwarnings("ignore:Setting")
def test_guided_gradcam_is_captums() -> None:
    model, x = demo.load_model("vgg"), demo.load_scenes("single", 2).inputs
    found = get_method("guided_gradcam")(model)(x, 3)
    other = demo.load_model("vgg")
    method = captum.attr.GuidedGradCam(other, find_feature_layer(other, x))
    expected = method.attribute(x, target=3, interpolate_mode="bilinear")
    torch.testing.assert_close(3 * found, expected)


def test_layer_cam_looks_at_tokens_or_features() -> None:
    x = demo.load_scenes("single", 2).inputs
    for name in ("vit", "resnet"):
        maps = layer_cam(demo.load_model(name), x, torch.tensor([3, 4]))
        assert maps.shape == x.shape and bool((maps >= 0).all()) and maps.std() > 0


def test_the_command(
    loader: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["run", "--model", loader, "--images", str(pictures), "--classes", "cat,dog,emu"]
    words += ["--scores", "lerf_morf,time", "--methods", "Sali*", "--work", str(tmp_path / "w")]
    for command in (words, words, ["report", "--work", str(tmp_path / "w")]):
        monkeypatch.setattr(sys, "argv", ["real", *command])
        real.main()
    assert "| Saliency | " in capsys.readouterr().out.splitlines()[-3]
    assert len(list(read(tmp_path / "w" / "make" / "scores.jsonl"))) == 2
    monkeypatch.setattr(sys, "argv", ["real", *words[:7], "--scores", "gea"])
    with pytest.raises(SystemExit):
        real.main()
    assert "no such scores" in capsys.readouterr().err
