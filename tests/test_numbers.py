"""Zeros, constants, numbers at the ends of the range, half precision: finite maps, or an error that names the
call where it went wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP, demo, trace_relevance
from captum_abslrp.mappings import get_mapping
from captum_abslrp.rules import Record, Rule
from tests.conftest import relative_error

X = demo.render_scenes("single", 2, generator=0).inputs
MODELS = [pytest.param(name, id=name) for name in demo.list_models()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(torch.ones_like(X), id="ones"),
        pytest.param(-torch.ones_like(X), id="minus ones"),
        pytest.param(X * 1e-40, id="denormal"),
        pytest.param(X * 1e-6, id="tiny"),
        pytest.param(X * 1e4, id="huge"),
    ],
)
def test_maps_are_finite(name: str, normalization: str, given: Tensor) -> None:
    attributor = AbsLRP(demo.load_model(name), normalization=normalization)
    relevance = attributor.attribute(given, 1, contrast=None)
    assert relevance.isfinite().all()
    assert relevance.any() == bool(given.abs().max() > 1e-30)  # a denormal image is one of zeros
    assert torch.equal(relevance, attributor.attribute(given, 1, contrast=None, check_finite=True))
    # Where an image is (nearly) constant, rounding decides which of a window is the largest.
    if relevance.any() and (name == "vit" or given.abs().max() > 100):
        assert any(
            relative_error(relevance.double(), exact_map(name, normalization, given, seed)) < 1e-5
            for seed in (None, 0, 1, 2, 3)
        )


def exact_map(name: str, normalization: str, given: Tensor, seed: int | None) -> Tensor:
    """The map in float64; of weights that are rounded at random to float32, with a seed. On such images a
    value may be so near to zero that its sign, and with it the map, depends on how a processor rounds."""
    model = demo.load_model(name).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.data *= 1 + noise * torch.finfo(torch.float32).eps / 2
    attributor = AbsLRP(model, normalization=normalization)
    return attributor.attribute(given.double(), 1, contrast=None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_half_precision_is_finite(name: str, dtype: torch.dtype, scale: float) -> None:
    exact = AbsLRP(demo.load_model(name)).attribute(X * scale, 1, contrast=None)
    model = demo.load_model(name)
    with torch.autocast("cpu", dtype=dtype):
        by_autocast = AbsLRP(model).attribute(X * scale, 1, contrast=None)
    half = AbsLRP(model.to(dtype)).attribute((X * scale).to(dtype), 1, contrast=None)
    assert half.dtype == dtype
    for relevance in (by_autocast.float(), half.float()):
        assert relevance.isfinite().all()
        assert torch.corrcoef(torch.stack([relevance.flatten(), exact.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_an_input_of_zeros_has_no_relevance(name: str) -> None:
    assert not AbsLRP(demo.load_model(name)).attribute(torch.zeros_like(X), 1).any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1e10, 1e20, 1e30, 1e37])
def test_a_range_that_is_left_is_no_map_of_zeros(name: str, scale: float) -> None:
    model = demo.load_model(name)
    expected = AbsLRP(demo.load_model(name).double()).attribute(
        X.double() * scale, 1, contrast=None
    )
    try:
        relevance = AbsLRP(model).attribute(X * scale, 1, contrast=None)
    except FloatingPointError:
        assert scale > (1e10 if name == "vit" else 1e20)  # variances are squares
    else:
        assert relative_error(relevance.double(), expected) < 1e-4


def overflowing(kind: str) -> nn.Module:
    torch.manual_seed(0)

    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return {"exp": torch.exp, "log": torch.log, "div": lambda x: x / (x - x)}[kind](x)

    return nn.Sequential(nn.Linear(6, 6), Call(), nn.Linear(6, 3)).eval()


@pytest.mark.parametrize("kind", ["exp", "log", "div"])
@pytest.mark.parametrize("combine", ["difference", "gated"])
@pytest.mark.parametrize("check_finite", [False, True])
def test_the_call_that_went_wrong_is_named(kind: str, combine: str, check_finite: bool) -> None:
    x = 1e4 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    attributor = AbsLRP(overflowing(kind))
    options = {"combine": combine, "check_finite": check_finite}
    with pytest.raises(FloatingPointError, match=rf"of 12 in torch.float32 from `.*{kind}` in `1`"):
        attributor.attribute(x, 1, **options)
    with pytest.raises(FloatingPointError, match=rf"{kind}` in `1` \(Call\)"):
        LayerAbsLRP(attributor.model, attributor.model[1]).attribute(x, 1, **options)
    with pytest.raises(FloatingPointError, match=rf"{kind}` in `1` \(Call\)"):
        trace_relevance(attributor.model, x, 1)


def test_overflow_in_half_precision_is_named() -> None:
    model = demo.load_model("vgg").half()
    message = r"in torch.float16 from `torch.nn.functional.batch_norm` in `features.1` \(BatchNorm2d\); its i"
    with pytest.raises(FloatingPointError, match=message):
        AbsLRP(model).attribute((X * 1e4).half(), 1)


def test_a_weight_that_is_nan_is_told_of() -> None:
    model = demo.load_model("vgg")
    with torch.no_grad():
        model.features[4].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="`features.4` .* already has NaN"):
        AbsLRP(model).attribute(X, 1)


def test_masks_of_minus_infinity_are_no_fault() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(5).index_fill(0, torch.tensor([1]), -torch.inf)
            filled = x.masked_fill(torch.arange(5) == 2, -torch.inf)
            return (filled + mask).softmax(-1)

    model = nn.Sequential(nn.Linear(4, 5), Masked(), nn.Linear(5, 3)).eval()
    assert AbsLRP(model).attribute(torch.rand(2, 4), 1, check_finite=True).any()


class Spoiling(Rule):
    """A rule that hands on what is not finite."""

    def record(self, call: object) -> Record:
        x = call.args[0]  # type: ignore[attr-defined]
        return Record(x.tanh(), [x], lambda s: [s / torch.zeros_like(s)])


def test_a_rule_that_went_wrong_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    mapping = get_mapping().extended({"tanh": Spoiling()})
    message = r"infinite values of an input of `torch.tanh` in `1` \(Tanh\) in the backward pass"
    with pytest.raises(FloatingPointError, match=message):
        AbsLRP(model, mapping).attribute(torch.rand(2, 4), 1)


@pytest.mark.parametrize("name", MODELS)
def test_relevance_is_traced_from_call_to_call(name: str) -> None:
    model = demo.load_model(name).double()
    trace = trace_relevance(model, X.double(), 1, normalization="joint")
    assert trace.calls[0].layer == "Linear" and trace.calls[0].arrived == pytest.approx(1)
    for call in trace.calls:  # each hands on what has arrived
        assert sum(call.passed) == pytest.approx(call.arrived, rel=1e-6), call
    stem = trace.calls[-1]
    assert "Conv2d" in stem.layer
    relevance = AbsLRP(model, normalization="joint").attribute(X.double(), 1, contrast=None)
    assert relevance.abs().sum().item() / 2 == pytest.approx(stem.passed[0])
    header, _, first, *_ = str(trace).splitlines()
    assert header.split("|")[1].strip() == "call" and "torch.nn.functional.linear" in first


def test_relevance_of_a_logit_of_zero_is_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Sigmoid()).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    for call in trace_relevance(model, torch.ones(2, 4).double(), 1).calls:
        assert call.arrived == pytest.approx(1) and sum(call.passed) == pytest.approx(1), call


def test_lost_relevance_is_seen_where_it_was_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    with torch.no_grad():
        model[0].weight.fill_(-1)  # the ReLU is shut: only the bias of the last layer is left
        model[0].bias.fill_(-1)
    last, *others = trace_relevance(model, torch.rand(2, 4).double(), 2).calls
    assert last.path == "2" and last.arrived == pytest.approx(1) and last.passed == (0.0,)
    assert all(call.arrived == 0 for call in others)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda: trace_relevance(nn.ReLU(), torch.rand(2, 3), 5), "`target` to be within"),
        (lambda: trace_relevance(nn.ReLU(), [1], 0), "a tuple of tensors, but got list"),  # type: ignore[arg-type]
    ],
)
def test_what_trace_relevance_refuses(of: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, IndexError), match=message):
        of()
