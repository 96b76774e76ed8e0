"""Rules on modules: under Captum's own LRP, and mixed with Captum's rules inside AbsLRP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, IdentityRule
from torch import Tensor, nn

from captum_abslrp import AbsLRP, UnsupportedCallError
from captum_abslrp.chunks import Samples
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.propagation import propagate
from captum_abslrp.mappings import get_mapping
from captum_abslrp.rules import (
    AbsLRPRule,
    FactorRule,
    MaxPoolRule,
    PassThroughRule,
    Record,
    Rule,
    TwinRule,
)
from tests.conftest import relative_error


def vgg_style() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4),
        ).eval().double()
    )  # fmt: skip


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def with_rules(model: nn.Sequential, rule: type[Rule] = AbsLRPRule) -> nn.Sequential:
    for layer in model:
        layer.rule = rule()
    return model


@pytest.mark.parametrize("rule", [AbsLRPRule, TwinRule], ids=lambda r: r.__name__)
def test_under_captums_lrp_the_map_is_that_of_abslrp_but_for_a_factor_per_sample(
    rule: type[Rule],
) -> None:
    x, target = images(), [0, 3, 2]
    model = vgg_style()
    ours = AbsLRP(model, "generic").attribute(x, target, contrast=None)
    # The literal twin takes batch norm by its biased parameters apart: it is left to its closed form.
    model = with_rules(model, rule)
    model[4].rule = AbsLRPRule()
    captums = LRP(model).attribute(x.clone(), target=target)
    factors = captums.flatten(1).sum(1) / ours.flatten(1).sum(1)
    assert relative_error(captums, ours * factors.view(-1, 1, 1, 1)) < 1e-6
    with torch.no_grad():
        outputs = vgg_style()(x)[range(3), target]
    torch.testing.assert_close(factors, outputs)


def test_captums_lrp_leaves_the_weights_as_they_were() -> None:
    model = with_rules(vgg_style())
    before = copy.deepcopy(model.state_dict())
    LRP(model).attribute(images(), target=1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_rules_of_other_layers_work_under_captums_lrp() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4), nn.Softmax(1)
    )
    ours = AbsLRP(model.double()).attribute(images()[:, 0, 0, :6], 2, contrast=None)
    rules = (AbsLRPRule(), AbsLRPRule(), TwinRule(), AbsLRPRule(), AbsLRPRule())
    for layer, rule in zip(model, rules):
        layer.rule = rule
    captums = LRP(model).attribute(images()[:, 0, 0, :6].contiguous(), target=2)
    scaled = captums / captums.sum(1, keepdim=True)
    assert relative_error(scaled, ours) < 1e-6


def square_layers() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    linear = [nn.Linear(5, 5) for _ in range(3)]
    model = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2]).double()
    return model, torch.rand(3, 5, dtype=torch.float64)


def epsilon(layer: nn.Module, x: Tensor, relevance: Tensor, eps: float) -> Tensor:
    """The epsilon rule, written out."""
    leaf = x.clone().requires_grad_()
    z = layer(leaf)
    stabilised = z + torch.where(z < 0, -eps, eps)
    return x * torch.autograd.grad(z, leaf, relevance / stabilised)[0]


def test_a_rule_of_captums_wins_over_the_mapping_and_stays() -> None:
    model, x = vgg_style(), images()
    plain = AbsLRP(model).attribute(x, 1, contrast=None)
    last = model[-1]
    last.rule = EpsilonRule(0.5)
    mixed = AbsLRP(model).attribute(x, 1, contrast=None)
    assert isinstance(last.rule, EpsilonRule)
    assert relative_error(mixed, plain) > 1e-3
    assert torch.equal(mixed, AbsLRP(model).attribute(x, 1, contrast=None))

    del last.rule
    hidden = model[:-1](x)
    one = torch.zeros(3, 4, dtype=torch.float64)
    one[:, 1] = 1
    relevance = epsilon(last, hidden, one, 0.5)
    trunk = model[:-1]
    # The trunk's map for that relevance: maps are linear in it up to the scale of each sample.
    leaf = x.clone().requires_grad_()
    output = AbsLRP(trunk)._forward([leaf], Samples((leaf,), None, None, ()))
    ((expected,),) = propagate(output, [leaf], relevance.unsqueeze(0))
    assert relative_error(mixed, expected) < 1e-6


@pytest.mark.parametrize(
    "rule", [EpsilonRule(), GammaRule(), Alpha1_Beta0_Rule()], ids=lambda r: type(r).__name__
)
def test_captums_rules_mix_with_ours_as_under_captums_lrp(rule: object) -> None:
    model, x = square_layers()
    reference = copy.deepcopy(model)
    reference[0].rule, reference[2].rule, reference[4].rule = (
        AbsLRPRule(),
        copy.copy(rule),
        AbsLRPRule(),
    )
    captums = LRP(reference).attribute(x.clone(), target=2)
    model[2].rule = copy.copy(rule)
    ours = AbsLRP(model).attribute(x, 2, contrast=None)
    weights = copy.deepcopy(model.state_dict())
    scaled = captums / captums.sum(1, keepdim=True)
    assert relative_error(ours, scaled) < 1e-6
    assert type(model[2].rule) is type(rule)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not hasattr(model[2], "activations")


def test_captums_identity_rule_hands_relevance_on() -> None:
    # Captum's own LRP loses it at a ReLU in front, so the reference is our rule of the same meaning.
    model, x = square_layers()
    model[2].rule = IdentityRule()
    of_captums_rule = AbsLRP(model).attribute(x, 2)
    model[2].rule = PassThroughRule()
    torch.testing.assert_close(of_captums_rule, AbsLRP(model).attribute(x, 2))


def test_captums_rules_keep_an_input_that_is_overwritten_later() -> None:
    class Overwriting(nn.Module):
        def __init__(self, *, late: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 4)
            self.layer, self.late = nn.Linear(5, 5), late
            self.layer.rule = EpsilonRule()

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = self.layer(h)
            if self.late:
                h *= -2
            else:
                h = h * -2
            return self.last(y + h)

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    maps = [AbsLRP(Overwriting(late=late).double()).attribute(x, 1) for late in (True, False)]
    torch.testing.assert_close(*maps)


def test_a_factor_knows_the_arguments_of_its_call() -> None:
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []

    class Noting(FactorRule):
        def factor(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            seen.append((args, kwargs))
            return torch.ones_like(x)

    class Clamped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(super().forward(x), -0.5, max=0.5)

    mapping = get_mapping().extended({"clamp": Noting()})
    AbsLRP(Clamped(5, 4), mapping).attribute(torch.rand(2, 5), 1)
    assert seen == [((-0.5,), {"max": 0.5})]


def test_inputs_may_share_what_a_rule_passes_on() -> None:
    class Passing(Rule):
        def __init__(self, *, copies: bool) -> None:
            self.copies = copies

        def record(self, call: Call) -> Record:
            a, b = call.args
            output = call.run(lambda: a + b)
            return Record(output, [a, b], lambda s: [s, s.clone() if self.copies else s])

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h.exp() + h.tanh())

    model, x = Sum().double(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    mappings = [get_mapping().extended({"add": Passing(copies=c)}) for c in (True, False)]
    maps = [AbsLRP(model, mapping).attribute(x.double(), 1) for mapping in mappings]
    torch.testing.assert_close(*maps)


def test_our_rule_on_a_module_wins_over_the_mapping() -> None:
    model, x = vgg_style(), images() - 0.5
    plain = AbsLRP(model, "generic").attribute(x, 1)
    model[0] = nn.MaxPool2d(1)
    model[3] = nn.Conv2d(3, 8, 3, padding=1).double()
    model[2].rule = MaxPoolRule(divide=False)
    undivided = AbsLRP(model, "generic").attribute(x, 1)
    assert torch.equal(undivided, AbsLRP(model, "vgg").attribute(x, 1)) is False
    model[0].rule = MaxPoolRule(divide=False)
    assert torch.equal(
        AbsLRP(model, "generic").attribute(x, 1), AbsLRP(model, "vgg").attribute(x, 1)
    )
    assert plain.shape == undivided.shape


def test_a_rule_on_a_container_holds_for_what_is_inside() -> None:
    model, x = vgg_style(), images()
    container = nn.Sequential(model[:3], model[3:])
    container[0].rule = MaxPoolRule(divide=False)
    with pytest.raises(UnsupportedCallError, match="Expected MaxPoolRule to be used for one of"):
        AbsLRP(container).attribute(x, 1)
    container[0].rule = PassThroughRule()
    with pytest.raises(UnsupportedCallError, match="keeps the shape of its input"):
        AbsLRP(container).attribute(x, 1)
    container[0].rule = TwinRule()
    assert (
        relative_error(AbsLRP(container).attribute(x, 1), AbsLRP(vgg_style()).attribute(x, 1))
        < 1e-5
    )


def test_a_rule_of_captums_that_cannot_be_used_is_an_error() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = Keywords()
    model.layer.rule = EpsilonRule()
    with pytest.raises(TypeError, match="Expected `layer`.*positional tensors, but got keyword"):
        AbsLRP(model).attribute(torch.rand(2, 5), 1)

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.layer(x, x, x)[0])[:, 0]

    model = Tuple()
    model.layer.rule = EpsilonRule()
    with pytest.raises(TypeError, match="Expected `layer`.*to return one tensor, but got tuple"):
        AbsLRP(model.eval()).attribute(torch.rand(2, 3, 4), 1)


def test_a_rule_inside_of_multi_head_attention_is_an_error() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x)[0][:, 0]

    model = Attention().eval()
    model.layer.out_proj.rule = AbsLRPRule()
    with pytest.raises(TypeError, match="Expected no rule on the output projection"):
        AbsLRP(model).attribute(torch.rand(2, 3, 4), 1)


def test_in_place_layers_under_captums_rules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Hardswish(), nn.Linear(5, 4)).double()
    x = torch.randn(3, 5).double()
    model[1].rule = EpsilonRule()
    expected = AbsLRP(model).attribute(x, 1)
    model[1].inplace = True
    torch.testing.assert_close(AbsLRP(model).attribute(x, 1), expected)
    model[1].rule = AbsLRPRule()
    for layer in (model[0], model[2]):
        layer.rule = AbsLRPRule()
    with pytest.raises(
        ValueError, match=r"Expected Hardswish not to work in place.*inplace = False"
    ):
        LRP(model).attribute(x, target=1)


def test_pass_through_hands_relevance_on() -> None:
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double(), torch.rand(2, 5).double()
    model[1].rule = PassThroughRule()
    torch.testing.assert_close(AbsLRP(model).attribute(x, 2), AbsLRP(model[:1]).attribute(x, 2))


def test_rules_have_readable_names() -> None:
    assert repr(AbsLRPRule()) == "AbsLRPRule()"
    assert repr(MaxPoolRule(divide=False)) == "MaxPoolRule(divide=False)"
    assert repr(TwinRule()) == "TwinRule()"


@pytest.mark.parametrize("rule", [MaxPoolRule(), PassThroughRule()])
def test_what_a_rule_says_is_not_lost_behind_an_operator(rule: Rule) -> None:
    class Product(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return h * h.mean(1, keepdim=True)

    mapping = get_mapping().extended({"mul": rule})
    with pytest.raises(UnsupportedCallError, match="torch.Tensor.mul"):
        AbsLRP(Product(3, 2), mapping).attribute(torch.rand(4, 3), target=0)


@pytest.mark.parametrize("call", [lambda h: torch.square(input=h), lambda h: 2**h])
def test_a_factor_rule_says_where_it_does_not_suit(call: Callable[[Tensor], Tensor]) -> None:
    class Factor(FactorRule):
        def factor(self, x: Tensor, *args: Any) -> Tensor:
            return x.abs()

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return call(super().forward(x))

    mapping = get_mapping().extended({("square", "pow"): Factor()})
    with pytest.raises(
        UnsupportedCallError, match=r"first positional argument of `torch.*Use `TwinRule\(\)`"
    ):
        AbsLRP(Net(3, 2), mapping).attribute(torch.rand(4, 3), target=0)
    remedy = get_mapping().extended({("square", "pow"): TwinRule()})
    AbsLRP(Net(3, 2), remedy).attribute(torch.rand(4, 3), target=0)
