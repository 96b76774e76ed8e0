"""The README's Python blocks run as printed, on a small model with random weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

README = Path(__file__).parents[1] / "README.md"


class OneBox(torch.nn.Module):
    """Detects one box, the left half of each image, by its brightness."""

    def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        box = {"boxes": torch.tensor([[0.0, 0, 80, 160]]), "labels": torch.tensor([3])}
        return [
            {**box, "scores": image[..., :80].mean((0, 1, 2), keepdim=True).view(1)} for image in x
        ]


def test_python_blocks_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 5
    create_model = timm.create_model

    def small_model(name: str, *, pretrained: bool) -> torch.nn.Module:
        assert timm.is_model_pretrained(name)
        assert pretrained
        return create_model("test_vit", num_classes=1000)

    monkeypatch.setattr(timm, "create_model", small_model)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {
        "x": torch.randn(1, 3, 160, 160),
        "images": torch.randn(4, 3, 160, 160),
        "encoder": create_model("test_vit", num_classes=0).eval(),
        "other": torch.randn(1, 3, 160, 160),
        "segmenter": torch.nn.Conv2d(3, 21, 3).eval(),
        "detector": OneBox().eval(),
        "box": [0.0, 0.0, 80.0, 160.0],
        "label": 3,
    }
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "why.png").stat().st_size > 0
    assert "| InputXGradient |" in capsys.readouterr().out
