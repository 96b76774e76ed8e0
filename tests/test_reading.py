"""The figures of docs/reading-maps.md, on constructed models and a demo model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import reading
from benchmarks.real_data import Case, load_case
from captum_abslrp import AbsLRP


class Ends(nn.Module):
    """A model with timm's names: a feature map, an average, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight.data = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 4.0]])

    def forward_features(self, x: Tensor) -> Tensor:
        return x[:, :2]

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))


def test_regions() -> None:
    image = torch.arange(48.0).view(1, 6, 8)
    assert torch.equal(reading.center(image), image[:, 1:5, 2:6])
    assert torch.equal(reading.left(image), image[:, :, :2])


def test_the_last_layer_is_read_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(1, 3, 5, 5)
    x[0, 0, 2, 2], x[0, 0, 0, 0] = 50.0, 25.0  # 2 of the average 3 are in the middle
    x[0, 1, 1, 1], x[0, 1, 4, 4] = 25.0, 75.0  # 1 of the average 4
    reading.last_layer(Ends(), x, 0)
    positive, every = capsys.readouterr().out.splitlines()
    # class 0 has 2 - 1 of 3 - 4, class 1 has 4 of 6, class 2 has 4 of 16
    assert "2.00 to the class and 4.00 to the others" in positive
    assert "of all places 66.7% and 45.8%" in positive
    assert "1.00 to the class and 4.00 to the others" in every


def test_scan_measures_the_center() -> None:
    given = load_case("demo:resnet", None)
    case = Case(copy.deepcopy(given.model).double(), given.images[:3].double(), given.labels[:3])
    sums, kept = reading.scan(case, 2)
    target = case.model(case.images).argmax(1)
    difference = AbsLRP(case.model).attribute(case.images, target).sum(1)
    alone = AbsLRP(case.model).attribute(case.images, target, contrast=None).sum(1)
    size = difference.abs().sum((1, 2))
    torch.testing.assert_close(sums, difference[:, 16:48, 16:48].sum((1, 2)) / size)
    torch.testing.assert_close(kept, size / alone.abs().sum((1, 2)))


class Quarter(nn.Module):
    """A class for each color, by its largest value anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3)) * 20


def test_hiding_the_right_quarter_matters_most() -> None:
    images = torch.zeros(8, 4, 4, 4)
    images[torch.arange(8), torch.arange(8) % 4] = 1.0
    case = Case(Quarter(), images, torch.arange(8) % 4)
    assert reading.hide_quarters(case, 8) == 1.0


def test_the_command_reads_a_folder_and_a_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = tmp_path / "models.py"
    loader.write_text(
        "from captum_abslrp import demo\n"
        "from timm.data import create_transform\n"
        "def make():\n"
        "    return demo.load_model('resnet'), create_transform((3, 64, 64), crop_pct=1.0)\n",
        encoding="utf-8",
    )
    folder = tmp_path / "images"
    folder.mkdir()
    scenes = load_case("demo:resnet", None)
    for index in range(12):
        pixels = (scenes.images[index] * 0.2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{int(scenes.labels[index])}_{index}.png")
    common = ["reading", "--model", f"{loader}:make", "--images", str(folder)]
    monkeypatch.setattr(reading, "hide_quarters", lambda case, count: 0.75)
    monkeypatch.setattr(sys, "argv", common)
    reading.main()
    said = capsys.readouterr().out
    assert "of 12 images" in said and "matters most in 75%" in said
    monkeypatch.setattr(
        sys, "argv", [*common, "--photo", next(folder.iterdir()).name, "--region", "left"]
    )
    reading.main()
    said = capsys.readouterr().out
    assert "share in the left" in said and "recommended" in said
