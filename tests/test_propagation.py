"""The way back through long chains, whose scale is left as it is for a few steps at a time."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, demo
from captum_abslrp.engine import propagation
from captum_abslrp.engine.steps import Step
from captum_abslrp.rules import EpsilonRule
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
    monkeypatch.setattr(propagation, "UNSCALED_STEPS", 1000)  # which leaves the range
    run, lengths = propagation._prepare, []

    def noted(order: Any, arriving: Any, explained_at: Any, longest: int) -> None:
        lengths.append(longest)
        run(order, arriving, explained_at, longest)

    monkeypatch.setattr(propagation, "_prepare", noted)
    assert relative_error(AbsLRP(chain).attribute(x, 1, contrast=None), exact) < 1e-2
    assert lengths == [1000, 0]  # once more, scaled at each step


class Branches(nn.Module):
    """Branches that merge, parts that are dropped, repeated and left over, and a dead one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(22, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        a, b = self.layers[0](x).relu(), self.layers[1](x)
        left, right = b.split([3, 5], 1)
        c = self.layers[2](torch.cat([left, right[:, 1:], torch.ones_like(left[:, :1])], 1))
        dead = (-self.layers[3](x).abs()).relu()
        y = self.norm(a + c + dead + x[:, :1].expand(-1, 8))
        return self.last(torch.cat([y * a, y.flip(1), c[:, [0, 0, 1, 2, 3, 3]]], 1))


def _input_of(model: nn.Module) -> Tensor:
    if isinstance(model, Branches):
        return torch.randn(3, 6)
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 64, 64))
    return torch.randn(2, *size)


@pytest.mark.parametrize(
    "name", ["branches", "demo:vgg", "demo:resnet", "demo:vit", "test_vit", "test_convnext"]
)
@pytest.mark.parametrize("contrast", [None, "others"])
def test_totals_that_are_carried_are_those_that_would_be_summed(
    name: str, contrast: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = Branches() if name == "branches" else None
    model = model or (demo.load_model(name[5:]) if ":" in name else timm.create_model(name))
    model, x = model.double().eval(), _input_of(model).double()
    attributor = AbsLRP(model, normalization="joint")
    carried = attributor.attribute(x, 1, contrast=contrast)
    run, known = Step.__call__, []

    def summing(step: Step, seeds: Any, arrived: Any = None) -> Any:
        known.append(arrived is not None)
        return run(step, seeds, None)

    monkeypatch.setattr(Step, "__call__", summing)
    monkeypatch.setattr(propagation, "UNSCALED_STEPS", 0)
    assert relative_error(carried, attributor.attribute(x, 1, contrast=contrast)) < 1e-12
    assert any(known)


class Biased(nn.Module):
    """A branch of layers whose biases outweigh their inputs by far: little relevance is left of it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.GELU())]
        for layer in layers[::2]:
            layer.weight.data.mul_(scale)
        self.branch, self.head = nn.Sequential(*layers), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.branch(x))


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_little_relevance_is_not_taken_for_rounding(normalization: str, scale: float) -> None:
    torch.manual_seed(0)
    model, x = Biased(scale).eval(), torch.randn(3, 6)
    attributor = AbsLRP(model, normalization=normalization)
    found = attributor.attribute(x, 1, contrast=None)
    exact = AbsLRP(model.double(), normalization=normalization)
    assert relative_error(found, exact.attribute(x.double(), 1, contrast=None)) < 1e-4


class Little(nn.Module):
    """A branch that is next to nothing behind a layer whose rule may make relevance negative."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.middle.rule = EpsilonRule()  # type: ignore[assignment]  # as users set it
        with torch.no_grad():
            self.middle.weight.abs_()
            self.middle.bias.zero_()
            for layer in (self.branch[0], self.branch[2]):
                layer.weight.abs_().mul_(1e-7)
                layer.bias.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.branch(x)
        return self.head(self.middle(torch.cat([h[:, :3], (h * x * 0.9)[:, 3:]], 1)))


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_samples_do_not_matter_to_each_other_where_little_is_left(normalization: str) -> None:
    torch.manual_seed(0)
    model, x = Little().eval(), torch.cat([torch.rand(1, 6), torch.randn(4, 6)])
    attributor = AbsLRP(model, normalization=normalization)
    alone = attributor.attribute(x[:1], 1, contrast=None)
    for other in range(1, 5):
        both = attributor.attribute(x[[0, other]], 1, contrast=None)
        torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-6)
