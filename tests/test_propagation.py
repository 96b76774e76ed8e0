"""The way back through long chains, whose scale is left as it is for a few steps at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_abslrp import AbsLRP
from captum_abslrp.engine import propagation
from tests.conftest import relative_error


def test_a_long_chain_stays_within_the_range_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(60)))
    # Positive contributions are six times as large as what is left of their sum.
    for layer in chain:
        nn.init.normal_(layer.weight, std=256**-0.5)
    x = torch.randn(2, 256)
    exact = AbsLRP(chain.double()).attribute(x.double(), 1, contrast=None)
    chain.float()
    assert relative_error(AbsLRP(chain).attribute(x, 1, contrast=None), exact) < 1e-2
    monkeypatch.setattr(propagation, "UNSCALED_STEPS", 1000)  # so the limit is what it takes
    with pytest.raises(FloatingPointError):
        AbsLRP(chain).attribute(x, 1, contrast=None)
