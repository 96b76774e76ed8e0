"""The memory layout of a model is kept on the way back."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from captum_abslrp import AbsLRP, functional
from tests.conftest import relative_error


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "vgg11_bn", "convnext_atto"])
def test_channels_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = AbsLRP(model).attribute(x, 1, contrast=None)
    convolution = functional.convolution
    layouts: list[tuple[Any, ...]] = []

    def watched(x: Tensor, weight: Any, s: Tensor, **options: Any) -> Tensor:
        kept = s.is_contiguous(memory_format=torch.channels_last)
        layouts.append((tuple(s.shape), s.stride(), kept))
        return convolution(x, weight, s, **options)

    monkeypatch.setattr(functional, "convolution", watched)
    last = model.to(memory_format=torch.channels_last)
    given = x.contiguous(memory_format=torch.channels_last)
    maps = AbsLRP(last).attribute(given, 1, contrast=None)
    assert relative_error(maps, plain) < 1e-4
    assert layouts and not [row for row in layouts if not row[-1]]
