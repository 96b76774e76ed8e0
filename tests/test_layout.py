"""The memory layout of a model is kept on the way back."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from captum_abslrp.rules import affine
from tests.conftest import relative_error


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "vgg11_bn", "convnext_atto"])
def test_channels_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = AbsLRP(model).attribute(x, 1, contrast=None)
    convolution = affine.convolution
    layouts: list[tuple[Any, ...]] = []

    def watched(x: Tensor, weight: Any, s: Tensor, **options: Any) -> Tensor:
        kept = s.is_contiguous(memory_format=torch.channels_last)
        layouts.append((tuple(s.shape), s.stride(), kept))
        return convolution(x, weight, s, **options)

    monkeypatch.setattr(affine, "convolution", watched)
    last = model.to(memory_format=torch.channels_last)
    given = x.contiguous(memory_format=torch.channels_last)
    maps = AbsLRP(last).attribute(given, 1, contrast=None)
    assert relative_error(maps, plain) < 1e-4
    assert layouts and not [row for row in layouts if not row[-1]]


@pytest.mark.parametrize(
    ("permutation", "dim"),
    [((2, 0, 3, 1, 4), 0), ((2, 0, 3, 1, 4), -5), ((0, 3, 2, 1, 4), 2), ((0, 1, -2, -1, 2), -1)],
)
@pytest.mark.parametrize("one_unused", [False, True])
def test_parts_of_a_permuted_tensor(
    permutation: tuple[int, ...], dim: int, one_unused: bool
) -> None:
    """Query, key and value unbound from one tensor, and the same ones selected one by one."""

    class Model(nn.Module):
        def __init__(self, unbinds: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.head = nn.Linear(4, 3 * 2 * 4), nn.Linear(5 * 2 * 4, 3)
            self.unbinds = unbinds

        def forward(self, x: Tensor) -> Tensor:
            permuted = self.qkv(x).view(-1, 5, 3, 2, 4).permute(permutation)
            parts = (
                permuted.unbind(dim)
                if self.unbinds
                else [permuted.select(dim, i) for i in range(3)]
            )
            a, b, c = parts
            out = torch.tanh(a) * b if one_unused else torch.tanh(a) * b + c
            return self.head(out.reshape(len(x), -1))

    x = torch.randn(2, 5, 4)
    maps = [AbsLRP(Model(unbinds)).attribute(x, 1) for unbinds in (True, False)]
    assert maps[0].abs().sum() > 0
    torch.testing.assert_close(*maps)
