"""`LayerAbsLRP` of several layers: one forward and one backward pass, and the results of single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn

import captum_abslrp.attribution
from captum_abslrp import LayerAbsLRP
from tests.conftest import GOLDEN_NAMES, load_golden
from tests.test_layer import IN_PLACE, Pair, Wired, batch, chain, same
from tests.test_no_trace import no_trace

TARGET = [3, 1, 2]
LISTS = {
    "vgg": ["", "features.0", "features.3", "features", "pre_logits", "head.fc"],
    "vgg_bn": ["head", "features.4", "features.1", "features.0", ""],
    "resnet_basic": ["layer2", "layer1.0.bn1", "layer2.0", "conv1", "layer1", "fc", "layer2"],
    "resnet_bottleneck": ["layer4", "layer3", "layer2", "layer1", "layer1.0.conv3", "maxpool"],
    "vit": ["blocks.1", "blocks.0.attn", "blocks.1.mlp.act", "norm", "blocks.0", "head", "blocks"],
}


def explain_each(
    model: nn.Module,
    layers: list[nn.Module],
    x: Any,
    *,
    normalization: str = "separate",
    **kwargs: Any,
) -> list[Any]:
    index = kwargs.pop("call_index", None)
    indices = index if isinstance(index, list) else [index] * len(layers)
    return [
        LayerAbsLRP(model, layer, normalization=normalization).attribute(x, call_index=i, **kwargs)
        for layer, i in zip(layers, indices, strict=True)
    ]


def check(model: nn.Module, layers: list[Any], x: Any, **kwargs: Any) -> list[Any]:
    layers = [model.get_submodule(part) if isinstance(part, str) else part for part in layers]
    expected = explain_each(model, layers, x, **kwargs)
    normalization = kwargs.pop("normalization", "separate")
    attributor = LayerAbsLRP(model, layers, normalization=normalization)
    with no_trace(model):
        together = attributor.attribute(x, **kwargs)
    assert isinstance(together, list)
    same(together, expected)
    same(attributor.attribute(x, **kwargs), expected)
    return together


# All pairs of options by default; the rest of their product is left to the slow tests.
@pytest.mark.parametrize(
    ("contrast", "normalization", "of_input"),
    [
        pytest.param(
            contrast,
            normalization,
            of_input,
            marks=[pytest.mark.slow]
            if contrast != "others" and of_input == (normalization == "joint")
            else [],
        )
        for contrast in ("others", None, 0)
        for normalization in ("separate", "joint")
        for of_input in (False, True)
    ],
)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_each_entry_is_that_of_the_layer_alone(
    name: str, contrast: Any, normalization: str, of_input: bool
) -> None:
    golden = load_golden(name)
    check(
        golden.model,
        LISTS[name],
        golden.x,
        target=TARGET,
        contrast=contrast,
        normalization=normalization,
        attribute_to_layer_input=of_input,
    )


@pytest.mark.parametrize("of_input", [False, True])
def test_the_model_runs_once_forward_and_once_back(
    of_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = chain(), batch(3, 6)
    runs: list[str] = []
    propagate = captum_abslrp.attribution.propagate

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append("back")
        return propagate(*args, **kwargs)

    monkeypatch.setattr(captum_abslrp.attribution, "propagate", counted)
    model.register_forward_hook(lambda *_: runs.append("forward"))
    attributor = LayerAbsLRP(model, [model[0], model[1], model])
    attributor.attribute(x, 1, attribute_to_layer_input=of_input)
    assert runs == ["forward", "back"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vgg_bn", "vit"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name, dtype)
    layers = [golden.model.get_submodule(part) for part in LISTS[name]]
    expected = explain_each(golden.model, layers, golden.x, target=1, contrast=None)
    together = LayerAbsLRP(golden.model, layers).attribute(golden.x, 1, contrast=None)
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-3}
    )
    torch.testing.assert_close(together, expected, **tolerance)


@pytest.mark.parametrize("size", [1, 2, "auto"])
@pytest.mark.parametrize("name", ["resnet_basic", "vit"])
def test_samples_in_parts(name: str, size: Any) -> None:
    golden = load_golden(name)
    layers = [golden.model.get_submodule(part) for part in LISTS[name]]
    attributor = LayerAbsLRP(golden.model, layers)
    options = {"target": TARGET, "return_convergence_delta": True}
    expected = attributor.attribute(golden.x, **options)
    same(attributor.attribute(golden.x, internal_batch_size=size, **options), expected)


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize("depth", [1, 2])
def test_layers_around_one_that_works_in_place(case: str, of_input: bool, depth: int) -> None:
    inner = around = nn.ReLU(inplace=True)
    for _ in range(depth):
        around = nn.Sequential(around)
    model = Wired(IN_PLACE[case][0], act=around, other=nn.Linear(8, 8))
    parts = ["act", "act" + ".0" * depth, "first", "head", "", "act.0"]
    check(model, parts, batch(3, 6), target=1, attribute_to_layer_input=of_input)
    functional = Wired(IN_PLACE[case][1], act=nn.Sequential(nn.ReLU()), other=nn.Linear(8, 8))
    functional.load_state_dict(model.state_dict())
    options = {"target": 1, "attribute_to_layer_input": of_input}
    (alone,) = explain_each(functional, [functional.act], batch(3, 6), **options)
    of_inner, of_outer = LayerAbsLRP(model, [inner, model.act]).attribute(batch(3, 6), **options)
    same(of_inner, alone)
    same(of_outer, alone)


AFTERWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the result is changed": lambda m, x: (
        h := m.first(x), y := m.act(h), y.add_(1), m.head(y + m.other(h))
    )[3],
    "the input is changed": lambda m, x: (
        h := m.first(x), y := m.act(h), h.mul_(2), m.head(y + m.other(h))
    )[3],
    "a slice of the result is changed": lambda m, x: (
        h := m.first(x), y := m.act(h), y[:, :3].relu_(), m.head(y + m.other(h))
    )[3],
}  # fmt: skip


class Shift(nn.Module):
    """In place, and without a place where everything is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).sub_(1.0)


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", AFTERWARDS)
def test_what_a_layer_changed_in_place_keeps_its_other_names(
    case: str, of_input: bool, wrapped: bool
) -> None:
    act = nn.Sequential(Shift()) if wrapped else Shift()
    model, x = Wired(AFTERWARDS[case], act=act, other=nn.Linear(8, 8)), batch(3, 6)
    outputs: list[Tensor] = []
    with torch.no_grad():
        expected = model(x)
    model.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
    layers = [model.act, model.first, *([model.act[0]] if wrapped else [])]
    options = {"target": 1, "attribute_to_layer_input": of_input}
    LayerAbsLRP(model, model.act).attribute(x, **options)
    check(model, layers, x, **options)
    for output in outputs:
        same(output, expected)


class Nested(nn.Module):
    """A layer that returns more than one tensor, one of them that of the layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.act = Pair(), nn.Tanh()

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.act(a), self.pair(a, b=b)


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("contrast", ["others", None])
def test_layers_with_several_tensors(of_input: bool, contrast: Any) -> None:
    def wiring(model: Any, x: Tensor) -> Tensor:
        act, out = model.nested(model.first(x), model.second(x))
        return model.head(act * 2 + out["sum"] * out["rest"][0])

    model = Wired(wiring, nested=Nested(), second=nn.Linear(6, 8))
    parts = ["nested.pair", "first", "nested", "nested.act", "second"]
    options = {"attribute_to_layer_input": of_input, "contrast": contrast, "target": 1}
    together = check(model, parts, batch(3, 6), **options)
    assert [type(entry) for entry in together] == [tuple, Tensor, tuple, Tensor, Tensor]


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("index", [0, 2, [1, 0, None, 2], [2, 2, None, 1]])
def test_calls_of_layers_that_are_called_again(index: Any, of_input: bool) -> None:
    shared, inner = nn.Sequential(nn.Linear(8, 8)), nn.Linear(6, 8)
    model = chain(inner, shared, nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(8, 5))
    layers = [shared, shared[0], model[0], shared]
    if isinstance(index, int):
        layers = [shared, shared[0], shared]
    check(model, layers, batch(3, 6), target=1, call_index=index, attribute_to_layer_input=of_input)


@pytest.mark.parametrize("of_input", [False, True])
def test_layers_with_a_rule_of_captum(of_input: bool) -> None:
    model = chain(nn.Sequential(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5))
    model[0][0].rule, model[2].rule = EpsilonRule(), EpsilonRule()
    check(model, ["2", "0", "0.0", "1"], batch(3, 6), target=1, attribute_to_layer_input=of_input)


def test_a_layer_that_does_not_reach_the_output_gets_nothing_beside_others() -> None:
    model = Wired(lambda m, x: (h := m.first(x), m.spare(h), m.head(h))[2], spare=nn.Linear(8, 8))
    together = check(model, ["spare", "first"], batch(3, 6), target=1)
    assert bool((together[0] == 0).all() and (together[1] != 0).any())


def test_the_list_of_one_layer_and_a_tuple_return_lists() -> None:
    model, x = chain(), batch(3, 6)
    (alone,) = LayerAbsLRP(model, [model[0]]).attribute(x, 1)
    same(alone, LayerAbsLRP(model, model[0]).attribute(x, 1))
    assert len(LayerAbsLRP(model, (model[0], model[1])).attribute(x, 1)) == 2
    assert LayerAbsLRP(model, [model[0]]).layer == [model[0]]
    wrapped = nn.DataParallel(chain())
    same(LayerAbsLRP(wrapped, [wrapped.module[0], wrapped]).attribute(x, 1)[0], alone)


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("contrast", ["others", None])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_deltas(name: str, contrast: Any, normalization: str) -> None:
    golden = load_golden(name)
    layers = [golden.model.get_submodule(part) for part in LISTS[name]]
    options = {"target": TARGET, "contrast": contrast, "return_convergence_delta": True}
    relevances, deltas = LayerAbsLRP(golden.model, layers, normalization=normalization).attribute(
        golden.x, **options
    )
    started_with = 0 if contrast else 1
    for layer, relevance, delta in zip(layers, relevances, deltas, strict=True):
        assert delta.shape == (3,)
        same(delta, relevance.flatten(1).sum(1) - started_with)
        alone = LayerAbsLRP(golden.model, layer, normalization=normalization)
        same(alone.attribute(golden.x, **options), (relevance, delta))


def test_the_delta_of_several_tensors_and_of_blocks_of_rows() -> None:
    def wiring(model: Any, x: Tensor) -> Tensor:
        out = model.pair(model.first(x), model.second(x))
        parts = model.rows((out["sum"] * out["rest"][0]).reshape(-1, 4))
        return model.head(parts.reshape(len(x), 8))

    layers = {"pair": Pair(), "second": nn.Linear(6, 8), "rows": nn.Linear(4, 4)}
    model, x = Wired(wiring, **layers), batch(3, 6)
    attributor = LayerAbsLRP(model, [model.pair, model.rows])
    (pair, rows), deltas = attributor.attribute(x, 1, contrast=None, return_convergence_delta=True)
    same(deltas[0], sum(r.sum(1) for r in pair) - 1)
    same(deltas[1], rows.reshape(3, 8).sum(1) - 1)
    gated = attributor.attribute(x, 1, combine="gated", return_convergence_delta=True)
    same(gated[1][1], gated[0][1].reshape(3, 8).sum(1) - 1)


def test_no_delta_where_samples_are_not_in_the_leading_dimension() -> None:
    def wiring(model: Any, x: Tensor) -> Tensor:
        tokens = model.spread(model.first(x).reshape(-1, 2, 4).transpose(0, 1))
        return model.head(tokens.transpose(0, 1).flatten(1))

    model, x = Wired(wiring, spread=nn.Identity()), batch(3, 6)
    attributor = LayerAbsLRP(model, [model.first, model.spread])
    assert attributor.attribute(x, 1)[1].shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"leading dimension .*`spread` \(Identity\).*delta"):
        attributor.attribute(x, 1, return_convergence_delta=True)
    singles = [
        attributor.attribute(x[i : i + 1], 1, contrast=None, return_convergence_delta=True)[1][1]
        for i in range(3)
    ]
    same(torch.cat(singles), torch.zeros(3).double())


class Several(nn.Module):
    """Two inputs, and more arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.act = nn.Linear(3, 8), nn.Linear(2, 8), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, a: Tensor, b: Tensor, gate: Tensor, power: int = 1) -> Tensor:
        return self.head(self.act(self.left(a) + self.right(b)) * gate**power)


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("size", [None, 2])
def test_several_inputs_and_additional_arguments(of_input: bool, size: int | None) -> None:
    torch.manual_seed(0)
    model = Several().eval().double()
    inputs = (batch(3, 3), batch(3, 2))
    options = {"additional_forward_args": (batch(3, 8).abs(), 2), "target": TARGET}
    check(
        model, ["head", "right", "act", "left", ""], inputs,
        attribute_to_layer_input=of_input, internal_batch_size=size, **options,
    )  # fmt: skip


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no layers": (lambda: LayerAbsLRP(chain(), []), ValueError, "at least one module, .*empty list"),
    "a name among the layers": (
        lambda: LayerAbsLRP(m := chain(), [m[0], "1"]),  # type: ignore[list-item]
        TypeError, r"Expected `layer` to be a torch\.nn\.Module, but got str\. Pass several layers .* list",
    ),
    "a layer of another model among them": (
        lambda: LayerAbsLRP(m := chain(), [m[0], chain()[0]]), ValueError, "is not part of it",
    ),
    "too few calls": (
        lambda: LayerAbsLRP(m := chain(), [m[0], m[1]]).attribute(batch(2, 6), 1, call_index=[0]),
        ValueError, r"`call_index` to have one entry per layer \(2\), but got \[0\]",
    ),
    "calls of one layer in a list": (
        lambda: LayerAbsLRP(m := chain(), m[0]).attribute(batch(2, 6), 1, call_index=[0]),
        ValueError, r"`call_index` to be an int, but got \[0\]",
    ),
    "a bool for a call": (
        lambda: LayerAbsLRP(m := chain(), m[0]).attribute(batch(2, 6), 1, call_index=False),
        ValueError, "`call_index` to be an int, but got False",
    ),
    "a call that there is not": (
        lambda: LayerAbsLRP(m := chain(), [m[0], m[1]]).attribute(batch(2, 6), 1, call_index=[0, 1]),
        ValueError, r"from 0 to 0, because `1` \(ReLU\) is called 1 times .*got 1",
    ),
    "a container": (
        lambda: LayerAbsLRP(
            m := Wired(lambda m, x: m.head(m.parts[0](x)), parts=nn.ModuleList([nn.Linear(6, 8)])),
            [m.head, m.parts],
        ).attribute(batch(2, 6), 1),
        ValueError, r"`parts` \(ModuleList\) to be called .*list\(container\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_the_parts_of_a_container_are_explained_as_its_error_says() -> None:
    parts = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
    model = Wired(lambda m, x: m.head(m.parts[1](m.parts[0](x).relu())), parts=parts)
    check(model, list(parts), batch(3, 6), target=1)


def test_a_layer_with_several_tensors_in_a_noise_tunnel() -> None:
    def wiring(model: Any, x: Tensor) -> Tensor:
        out = model.pair(model.first(x), model.second(x))
        return model.head(out["sum"] * out["rest"][0])

    model, x = Wired(wiring, pair=Pair(), second=nn.Linear(6, 8)), batch(3, 6)
    attributor = LayerAbsLRP(model, model.pair)
    options = {"target": TARGET, "contrast": [0, 0, 1]}
    expected, delta = attributor.attribute(x, return_convergence_delta=True, **options)
    smooth, of_copies = NoiseTunnel(attributor).attribute(
        x, nt_samples=2, stdevs=0.0, return_convergence_delta=True, **options
    )
    same(smooth, expected)
    same(of_copies, delta.repeat_interleave(2))
