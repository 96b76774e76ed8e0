"""The README's Python blocks run as printed, on a small model with random weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    create_model = timm.create_model

    def small_model(name: str, *, pretrained: bool) -> torch.nn.Module:
        assert timm.is_model_pretrained(name)
        assert pretrained
        return create_model("test_vit", num_classes=1000)

    monkeypatch.setattr(timm, "create_model", small_model)
    monkeypatch.chdir(tmp_path)
    x = torch.randn(1, 3, 160, 160)
    names: dict[str, object] = {"x": x}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    relevance = names["relevance"]
    assert isinstance(relevance, torch.Tensor) and relevance.shape == x.shape
    assert (tmp_path / "why.png").stat().st_size > 0
