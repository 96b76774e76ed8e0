"""Which rule answers which call, and how to add what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import captum_abslrp
from captum_abslrp import (
    AbsLRP,
    UnsupportedCallError,
    inspect_rules,
    register_call_rule,
)
from captum_abslrp.cli import main
from captum_abslrp.mappings import get_mapping, list_mappings, registry
from captum_abslrp.rules import AbsLRPRule, PassThroughRule, TwinRule
from tests.conftest import relative_error
from tests.test_no_trace import no_trace


def batch(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Swish(torch.autograd.Function):
    """An opaque call: only its backward pass is known."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s + x * s * (1 - s))


class FusedSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


class Scaled(nn.Module):
    """An opaque layer with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(batch(6))

    def forward(self, x: Tensor) -> Tensor:
        return Multiply.apply(x, self.weight)


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        _, w = ctx.saved_tensors
        return grad * w, None


def network(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), middle, nn.Linear(6, 5)).double().eval()


def test_an_opaque_layer_is_registered_as_one_call() -> None:
    model, x = network(FusedSwish()), batch(3, 6)
    with pytest.raises(UnsupportedCallError) as refused:
        AbsLRP(model).attribute(x, 1)
    line = "captum_abslrp.register_call_rule(FusedSwish, captum_abslrp.rules.TwinRule())"
    assert line in str(refused.value)
    register_call_rule(FusedSwish, TwinRule())
    with no_trace(model):
        relevance = AbsLRP(model).attribute(x, 1)
    assert relative_error(relevance, AbsLRP(network(nn.SiLU())).attribute(x, 1)) < 1e-9


def test_the_twin_of_an_opaque_layer_has_the_magnitude_of_its_weights() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(batch(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    register_call_rule(Scaled, TwinRule())
    x = batch(3, 6)
    by_definition = get_mapping().extended({"mul": TwinRule()})
    plain = AbsLRP(network(Plain()), by_definition).attribute(x, 1)
    opaque = AbsLRP(network(Scaled())).attribute(x, 1)
    assert relative_error(opaque, plain) < 1e-9


def test_subclasses_of_a_registered_layer_are_meant_too() -> None:
    class Faster(FusedSwish):
        pass

    register_call_rule(FusedSwish, TwinRule())
    assert bool(AbsLRP(network(Faster())).attribute(batch(3, 6), 1).any())


def test_a_rule_of_ours_on_a_registered_layer_stands_in_for_the_registered_one() -> None:
    model, x = network(FusedSwish()), batch(3, 6)
    register_call_rule(FusedSwish, TwinRule())
    expected = AbsLRP(model).attribute(x, 1)
    register_call_rule(FusedSwish, PassThroughRule(), overwrite=True)
    assert relative_error(AbsLRP(model).attribute(x, 1), expected) > 1e-3
    model[1].rule = TwinRule()
    assert torch.equal(AbsLRP(model).attribute(x, 1), expected)
    (call,) = (c for c in inspect_rules(model, x).calls if c.path == "1")
    assert (call.call, call.rule, call.origin) == (
        "FusedSwish.forward",
        "TwinRule()",
        "module.rule",
    )


def test_a_call_is_registered_by_the_line_of_the_message() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erfinv(x.tanh())

    model, x = network(Inverse()), batch(3, 6)
    with pytest.raises(UnsupportedCallError) as refused:
        AbsLRP(model).attribute(x, 1)
    message = str(refused.value)
    assert "`torch.erfinv` in `1` (Inverse)" in message
    line = message.partition("`captum_abslrp.")[2].partition("`")[0]
    exec(f"captum_abslrp.{line}", {"captum_abslrp": captum_abslrp})
    relevance = AbsLRP(model).attribute(x, 1)
    assert bool(torch.isfinite(relevance).all())
    assert bool(relevance.any())
    by_mapping = AbsLRP(model, get_mapping().extended({"erfinv": TwinRule()})).attribute(x, 1)
    assert torch.equal(relevance, by_mapping)


@pytest.fixture
def operator() -> Iterator[str]:
    """An operator of a library of the user's."""
    with torch.library._scoped_library("abslrp_test", "DEF") as library:
        library.define("swish(Tensor x) -> Tensor")
        library.impl("swish", Swish.apply, "CompositeImplicitAutograd")
        yield "abslrp_test::swish"


@pytest.mark.parametrize("by_name", [True, False])
def test_operators_of_libraries(operator: str, by_name: bool) -> None:
    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.abslrp_test.swish(x)

    model, x = network(Custom()), batch(3, 6)
    with pytest.raises(UnsupportedCallError, match=r'register_call_rule\("abslrp_test::swish"'):
        AbsLRP(model).attribute(x, 1)
    register_call_rule(operator if by_name else torch.ops.abslrp_test.swish, ActivationLike())
    assert (
        relative_error(AbsLRP(model).attribute(x, 1), AbsLRP(network(nn.SiLU())).attribute(x, 1))
        < 1e-9
    )


class ActivationLike(TwinRule):
    """A rule of the user's."""


@wrap_torch_function(lambda x: (x,))
def kernel(x: Tensor) -> Tensor:
    return Swish.apply(x)


def test_functions_that_pytorch_shows() -> None:
    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernel(x)

    register_call_rule(kernel, TwinRule())
    model, x = network(Custom()), batch(3, 6)
    assert (
        relative_error(AbsLRP(model).attribute(x, 1), AbsLRP(network(nn.SiLU())).attribute(x, 1))
        < 1e-9
    )


def test_a_registered_rule_holds_behind_those_of_the_architecture_and_of_modules() -> None:
    model, x = network(nn.GELU()), batch(3, 6)
    before = AbsLRP(model).attribute(x, 1)
    register_call_rule("gelu", PassThroughRule(), overwrite=True)
    passed = AbsLRP(model).attribute(x, 1)
    assert relative_error(passed, before) > 1e-3
    wins = get_mapping().extended({"gelu": AbsLRPRule()})
    assert torch.equal(AbsLRP(model, wins).attribute(x, 1), before)
    model[1].rule = AbsLRPRule()
    assert torch.equal(AbsLRP(model).attribute(x, 1), before)


@pytest.mark.parametrize(
    ("call", "rule", "error", "message"),
    [
        ("gelu", TwinRule(), ValueError, "got 'gelu', which has one. Pass `overwrite=True`"),
        (torch.reshape, TwinRule(), ValueError, "got 'reshape', which only moves elements"),
        ("erfinv", "twin", TypeError, "Expected `rule` to be an instance of a rule class"),
        ("erfinv", EpsilonRule(), TypeError, "Expected `rule` to be an instance of"),
        (3, TwinRule(), TypeError, "Expected `call` to be the name of a call"),
        (Swish, TwinRule(), TypeError, "For an autograd function, register the layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_registered(
    call: object, rule: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        register_call_rule(call, rule)  # type: ignore[arg-type]


def test_registering_twice_needs_overwrite() -> None:
    for call in ("erfinv", FusedSwish):
        register_call_rule(call, TwinRule())
        with pytest.raises(ValueError, match="overwrite=True"):
            register_call_rule(call, PassThroughRule())
        register_call_rule(call, PassThroughRule(), overwrite=True)


class Mixed(nn.Module):
    """Calls with a rule, without one, inside of an opaque function, and without relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.opaque, self.last = nn.Linear(6, 6), FusedSwish(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).reshape(-1, 6)
        x = torch.erfinv(x.tanh())
        values, _ = torch.linalg.qr(x.unsqueeze(1))
        x = self.opaque(values.squeeze(1) + torch.ones(6).cumsum(0))
        return self.last(torch.erfinv(x.tanh()))


def test_all_calls_without_a_rule_are_named_at_once() -> None:
    model = Mixed().double()
    with no_trace(model):
        inspection = inspect_rules(model, batch(2, 6))
    named = [(call.call, call.path, call.layer) for call in inspection.unsupported]
    assert named == [
        ("torch.erfinv", "", "Mixed"),
        ("torch.linalg.qr", "", "Mixed"),
        ("Swish", "opaque", "FusedSwish"),
        ("torch.erfinv", "", "Mixed"),
    ]
    lines = str(inspection).splitlines()
    assert lines[2].startswith("| torch.erfinv ")
    assert "NONE" in lines[2]
    assert " 2 " in lines[2]


def test_rules_and_where_they_come_from() -> None:
    model = network(nn.GELU())
    model[0].rule = TwinRule()
    model[2].rule = EpsilonRule()
    register_call_rule("gelu", PassThroughRule(), overwrite=True)
    found = [(c.call, c.path, c.rule, c.origin) for c in inspect_rules(model, batch(2, 6)).calls]
    assert found == [
        ("torch.nn.functional.linear", "0", "TwinRule()", "module.rule"),
        ("torch.nn.functional.gelu", "1", "PassThroughRule()", "registered"),
        ("Linear.forward", "2", found[2][2], "module.rule"),
    ]
    assert "EpsilonRule" in str(found[2][2])


def test_a_registered_layer_is_one_call() -> None:
    register_call_rule(FusedSwish, TwinRule())
    calls = inspect_rules(network(FusedSwish()), batch(2, 6)).calls
    assert [(c.call, c.origin) for c in calls][1] == ("FusedSwish.forward", "registered")


def test_samples_that_a_model_mixes_are_inspected_one_at_a_time() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.T.exp()).T

    calls = inspect_rules(Mixing(), batch(3, 6)).calls
    assert [c.rule for c in calls if c.call == "torch.Tensor.exp"] == ["AbsLRPRule()"]


def test_models_without_values_are_inspected() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224").eval()
        calls = inspect_rules(model, torch.empty(1, 3, 224, 224)).calls
    assert sum(call.call == "torch.nn.functional.layer_norm" for call in calls) == 49


def test_inspect_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", "test_vit"]) == 0
    out = capsys.readouterr().out
    assert "test_vit: mapping 'vit', " in out
    assert "calls, none without a rule" in out
    assert "| DropoutRule()" in out
    assert "moves elements" not in out
    assert main(["inspect", "--model", "test_vit", "--all", "--each"]) == 0
    each = capsys.readouterr().out
    assert "moves elements" in each
    assert each.count("torch.nn.functional.layer_norm") == 13


def test_inspect_tells_of_calls_without_a_rule(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        registry.Mapping,
        "find",
        lambda self, call, find=registry.Mapping.find: (
            None if call.name == "gelu" else find(self, call)
        ),
    )
    assert main(["inspect", "--model", "test_vit"]) == 1
    out = capsys.readouterr().out
    assert "6 without a rule" in out
    assert out.splitlines()[2].startswith("| torch.nn.functional.gelu ")


def test_inspect_knows_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", "test_vitt"]) == 2
    assert "did you mean test_vit" in capsys.readouterr().err


def test_every_call_of_the_mapping_is_in_the_table_of_the_docs() -> None:
    table = (Path(__file__).parents[1] / "docs" / "rules.md").read_text(encoding="utf-8")
    documented = set(table.replace("`", " ").replace(",", " ").split())
    names = {
        name
        for keys, _ in get_mapping().entries
        for name in (keys if isinstance(keys, tuple) else (keys,))
    }
    assert names <= documented, names - documented


def test_examples_of_the_docs_run() -> None:
    text = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, names)
    x = batch(3, 6)
    expected = AbsLRP(network(nn.SiLU())).attribute(x, 1)
    assert relative_error(AbsLRP(network(names["FusedSwish"]())).attribute(x, 1), expected) < 1e-9

    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    by_rule = get_mapping().extended({"pow": names["CubeRule"]()})
    maps = [AbsLRP(network(Cube()), mapping).attribute(x, 1) for mapping in (None, by_rule)]
    assert relative_error(*maps) < 1e-6
    assert "my_vit" in list_mappings()
