"""Every closed form against the literal definition, in float64 on drawn shapes.

The literal definition is written out here once more, independent of the package:
``R_in = x * d/dx <s, f(x; w, b) + f(|x|; |w|, |b|)>`` with ``s = R / (|z| + 1e-9)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.propagation import TOTAL, propagate
from captum_abslrp.engine.recording import Recording
from captum_abslrp.rules import AbsLRPRule, DropoutRule, MaxPoolRule, Rule, TwinRule, affine
from captum_abslrp.rules.captum import SingleRule

EPS = 1e-9
settings.register_profile("closed forms", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("closed forms")

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 4)


def draw_tensor(seed: int, *shape: int, signed: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x if signed else x.clamp(min=0)


def literal(
    call: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor], relevance: Tensor
) -> list[Tensor]:
    """The definition, for each input with the others fixed, without any scaling."""
    z = call(*inputs, *weights).detach()
    s = relevance / (z.abs() + EPS)
    results = []
    for i, x in enumerate(inputs):
        leaf = x.clone().requires_grad_()
        fixed = [leaf if j == i else y for j, y in enumerate(inputs)]
        magnitudes = [leaf.abs() if j == i else y.abs() for j, y in enumerate(inputs)]
        total = (
            s * (call(*fixed, *weights) + call(*magnitudes, *(w.abs() for w in weights)))
        ).sum()
        results.append(x * torch.autograd.grad(total, leaf)[0])
    return results


def share(relevance: Tensor) -> Tensor:
    """Relevance scaled to one, if there is more than what rounding leaves of a sum that is zero."""
    total = relevance.abs().sum()
    return relevance / total if total > 1e-14 else relevance


def by_rule(
    rule: Rule,
    call: Callable[..., Tensor],
    inputs: list[Tensor],
    relevance: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Relevance of the inputs as the rule hands it over, and the relevance that it was given."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    given_ = [leaf.clone() for leaf in leaves]
    with Recording(SingleRule(rule), inputs=given_, batch_size=1, total=TOTAL):
        z = call(*given_)
    r = relevance(z.detach())
    return [of_leaf[0] for of_leaf in propagate(z, leaves, r.unsqueeze(0))], r


def assert_literal(
    call: Callable[..., Tensor],
    inputs: list[Tensor],
    weights: list[Tensor] | None = None,
    *,
    rule: Rule | None = None,
    seed: int = 0,
) -> None:
    weights = weights or []
    actual, relevance = by_rule(
        rule or AbsLRPRule(),
        lambda *xs: call(*xs, *weights),
        inputs,
        lambda z: draw_tensor(seed + 1, *z.shape).abs(),
    )
    for got, expected in zip(actual, literal(call, inputs, weights, relevance), strict=True):
        scaled = share(expected)
        torch.testing.assert_close(got, scaled, rtol=1e-8, atol=1e-12)


@given(seeds, sizes, sizes, sizes, st.booleans(), st.booleans())
def test_linear(seed: int, b: int, i: int, o: int, signed: bool, bias: bool) -> None:
    weights = [draw_tensor(seed + 2, o, i), *([draw_tensor(seed + 3, o)] if bias else [])]
    assert_literal(F.linear, [draw_tensor(seed, b, 3, i, signed=signed)], weights, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
def test_a_large_weight_is_used_piece_by_piece(
    signed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = draw_tensor(0, 3, 4).to(dtype), draw_tensor(1, 9, 4).to(dtype)

    def call(x: Tensor) -> Tensor:
        return F.linear(x.sin() if signed else x.sigmoid(), w)

    def found() -> Tensor:
        return by_rule(AbsLRPRule(), call, [x], torch.ones_like)[0][0]

    at_once = found()
    monkeypatch.setattr(affine, "LARGE", 8)
    torch.testing.assert_close(found(), at_once)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("signed", [True, False])
def test_a_large_weight_is_read_once_for_all_seeds(
    kind: str, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(24, 5)] if kind == "linear" else [nn.Conv2d(6, 5, 2)]
    activation = nn.Tanh() if signed else nn.Sigmoid()
    model = nn.Sequential(activation, *layers, nn.Flatten(), nn.Linear(5, 3)).eval()
    model[-1].weight.data.abs_()
    x = draw_tensor(0, 2, 6, 2, 2).float()
    at_once = AbsLRP(model).attribute(x, 1)
    monkeypatch.setattr(affine, "LARGE", 60)
    pieces = []
    clamp = Tensor.clamp
    monkeypatch.setattr(
        Tensor, "clamp", lambda w, *a, **k: (pieces.append(w.shape), clamp(w, *a, **k))[1]
    )
    torch.testing.assert_close(AbsLRP(model).attribute(x, 1), at_once)
    # Three pieces of five rows, of which one has one row: for both maps together.
    assert pieces.count(torch.Size([2, 24])) == (4 if signed else 2)


@given(seeds, st.integers(1, 3), sizes, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2),
       st.integers(1, 2), st.integers(1, 2), st.booleans())  # fmt: skip
def test_convolution(
    seed: int, dims: int, batch: int, kernel: int, stride: int, padding: int, dilation: int,
    groups: int, signed: bool,
) -> None:  # fmt: skip
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    x = draw_tensor(seed, batch, 2 * groups, *[6] * dims, signed=signed)
    weights = [
        draw_tensor(seed + 2, 2 * groups, 2, *[kernel] * dims),
        draw_tensor(seed + 3, 2 * groups),
    ]
    assert_literal(
        lambda x, w, b: convolve(x, w, b, stride, padding, dilation, groups),
        [x],
        weights,
        seed=seed,
    )


@given(seeds, st.integers(1, 3), st.data(), st.booleans())
def test_convolution_with_a_stride(seed: int, dims: int, data: st.DataObject, signed: bool) -> None:
    """Strides, kernels, paddings and sizes that differ by dimension, few channels or many."""

    def draw(lowest: int, highest: int) -> list[int]:
        return data.draw(st.lists(st.integers(lowest, highest), min_size=dims, max_size=dims))

    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    kernel, stride, padding = draw(1, 5), draw(1, 4), draw(0, 2)
    channels, groups = data.draw(st.sampled_from([(1, 1), (3, 1), (9, 1), (4, 2), (12, 3)]))
    x = draw_tensor(seed, 2, channels, *draw(5, 8), signed=signed)
    weight = draw_tensor(seed + 2, 2 * groups, channels // groups, *kernel)
    assert_literal(
        lambda x, w: convolve(x, w, None, stride, padding, 1, groups), [x], [weight], seed=seed
    )


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("signed", [True, False])
def test_convolution_of_points(stride: Any, padding: int, signed: bool) -> None:
    x, w = draw_tensor(0, 2, 9, 5, 6, signed=signed), draw_tensor(1, 4, 9, 1, 1)
    assert_literal(lambda x, w: F.conv2d(x, w, None, stride, padding), [x], [w])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolution_with_padding_by_name(kernel: int, padding: str) -> None:
    x, w = draw_tensor(0, 2, 3, 6, 6), draw_tensor(1, 4, 3, kernel, kernel)
    assert_literal(lambda x, w: F.conv2d(x, w, padding=padding), [x], [w])


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1),
       st.integers(1, 2), st.booleans())  # fmt: skip
def test_transposed_convolution(
    seed: int, dims: int, kernel: int, stride: int, extra: int, groups: int, signed: bool
) -> None:
    convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    extra = min(extra, stride - 1)
    x = draw_tensor(seed, 2, 2 * groups, *[4] * dims, signed=signed)
    w = draw_tensor(seed + 2, 2 * groups, 2, *[kernel] * dims)
    assert_literal(lambda x, w: convolve(x, w, None, stride, 0, extra, groups), [x], [w], seed=seed)


@given(seeds, st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 2), st.booleans(),
       st.booleans())  # fmt: skip
def test_average_pooling(
    seed: int, dims: int, kernel: int, stride: int, ceil: bool, include_pad: bool
) -> None:
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    x = draw_tensor(seed, 2, 2, *[5] * dims)
    assert_literal(
        lambda x: pool(x, kernel, stride, kernel // 2, ceil, include_pad), [x], seed=seed
    )


@given(seeds, st.sampled_from([1, 2, 3]), st.integers(1, 4))
def test_adaptive_average_pooling(seed: int, dims: int, size: int) -> None:
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[dims]
    assert_literal(lambda x: pool(x, size), [draw_tensor(seed, 2, 2, *[5] * dims)], seed=seed)


@given(seeds, st.sampled_from([(1,), (1, 2), (-1,)]), st.booleans())
def test_mean_and_sum(seed: int, dims: tuple[int, ...], keepdim: bool) -> None:
    x = draw_tensor(seed, 2, 3, 4)
    assert_literal(lambda x: x.mean(dims, keepdim=keepdim), [x], seed=seed)
    assert_literal(lambda x: torch.sum(x, dims, keepdim), [x], seed=seed)


@given(seeds, st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 2), st.booleans(),
       st.integers(1, 2), st.booleans(), st.booleans())  # fmt: skip
def test_max_pooling(
    seed: int, dims: int, kernel: int, stride: int, ceil: bool, dilation: int, signed: bool,
    divide: bool,
) -> None:  # fmt: skip
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
    x = draw_tensor(seed, 2, 2, *[6] * dims, signed=True)
    x = x if signed else x.abs()

    def call(x: Tensor) -> Tensor:
        return pool(x, kernel, stride, kernel // 2, dilation, ceil)

    if divide:
        assert_literal(call, [x], rule=MaxPoolRule(), seed=seed)
        return
    actual, relevance = by_rule(
        MaxPoolRule(divide=False), call, [x], lambda z: draw_tensor(seed + 1, *z.shape).abs()
    )
    leaf = x.clone().requires_grad_()
    total = (relevance * (call(leaf) + call(leaf.abs()))).sum()
    expected = x * torch.autograd.grad(total, leaf)[0]
    torch.testing.assert_close(actual[0], share(expected), rtol=1e-8, atol=1e-12)


@given(seeds, st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_adaptive_max_pooling(seed: int, dims: int, size: int) -> None:
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[dims]
    assert_literal(lambda x: pool(x, size), [draw_tensor(seed, 2, 2, *[5] * dims)], seed=seed)


@given(seeds, sizes, st.integers(0, 3), st.booleans())
def test_batch_norm(seed: int, channels: int, spatial: int, affine: bool) -> None:
    x = draw_tensor(seed, 3, channels, *[3] * spatial)
    mean, var = draw_tensor(seed + 1, channels), draw_tensor(seed + 2, channels).abs() + 0.1
    weight, bias = draw_tensor(seed + 3, channels), draw_tensor(seed + 4, channels)
    shape = (-1, *[1] * spatial)
    scale = (var + 1e-5).rsqrt() * (weight if affine else 1)
    shift = (bias if affine else 0) - mean * scale

    # An affine call of weight `scale` and bias `shift`; its twin takes the magnitude of both.
    def affine_call(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x * scale.view(shape) + shift.view(shape)

    actual, relevance = by_rule(
        AbsLRPRule(),
        lambda x: F.batch_norm(x, mean, var, weight if affine else None, bias if affine else None),
        [x],
        lambda z: draw_tensor(seed + 1, *z.shape).abs(),
    )
    (expected,) = literal(affine_call, [x], [scale, shift], relevance)
    torch.testing.assert_close(actual[0], share(expected), rtol=1e-7, atol=1e-12)


ELEMENTWISE = [F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu, torch.sigmoid,
               torch.tanh, F.softplus, F.softsign, F.logsigmoid, F.hardtanh, F.hardsigmoid,
               F.hardswish, torch.Tensor.sigmoid]  # fmt: skip


@pytest.mark.parametrize("function", ELEMENTWISE, ids=lambda f: f.__name__)
@given(seed=seeds, b=sizes)
def test_elementwise(function: Callable[[Tensor], Tensor], seed: int, b: int) -> None:
    assert_literal(function, [draw_tensor(seed, b, 5)], seed=seed)


@pytest.mark.parametrize(
    "function", [F.relu, torch.relu, Tensor.relu, F.relu_], ids=["F", "torch", "Tensor", "in place"]
)
@given(seed=seeds, b=sizes)
def test_relu(function: Callable[[Tensor], Tensor], seed: int, b: int) -> None:
    """Relevance that reaches a ReLU is zero where its output is: the next call multiplied by it.

    Inputs stay clear of zero, where the stabiliser of the literal form has a share in its result.
    """
    x = draw_tensor(seed, b, 5)
    x = x + 0.01 * x.sign()
    actual, relevance = by_rule(
        AbsLRPRule(), function, [x], lambda z: draw_tensor(seed + 1, *z.shape).abs() * (z > 0)
    )
    (expected,) = literal(torch.relu, [x], [], relevance)
    torch.testing.assert_close(actual[0], share(expected), rtol=1e-6, atol=1e-12)


@given(seeds, st.sampled_from(["none", "tanh"]))
def test_gelu_with_its_arguments(seed: int, approximate: str) -> None:
    assert_literal(
        lambda x: F.gelu(x, approximate=approximate), [draw_tensor(seed, 4, 5)], seed=seed
    )


@given(seeds)
def test_batch_norm_in_training_has_the_statistics_of_the_batch(seed: int) -> None:
    x, w, b = (draw_tensor(seed + i, *shape) for i, shape in enumerate([(2, 3, 2), (3,), (3,)]))
    x = x * torch.tensor([0.1, 1.0, 10.0]).double()[:, None]  # variances beside a large `eps`
    mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    of_batch, of_statistics = (
        by_rule(AbsLRPRule(), call, [x], torch.ones_like)[0][0]
        for call in (
            lambda x: F.batch_norm(x, None, None, w, b, True, 0.1, 1.0),
            lambda x: F.batch_norm(x, mean, var, w, b, False, 0.1, 1.0),
        )
    )
    torch.testing.assert_close(of_batch, of_statistics, rtol=1e-8, atol=1e-12)


@given(seeds, sizes, st.integers(2, 5), st.booleans(), st.booleans())
def test_layer_norm(seed: int, n: int, d: int, affine: bool, two_dims: bool) -> None:
    x = draw_tensor(seed, 2, n, d)
    shape = (n, d) if two_dims else (d,)
    dims = (-2, -1) if two_dims else (-1,)
    weight, bias = draw_tensor(seed + 2, *shape), draw_tensor(seed + 3, *shape)
    actual, relevance = by_rule(
        AbsLRPRule(),
        lambda x: F.layer_norm(x, shape, *((weight, bias) if affine else ())),
        [x],
        lambda z: draw_tensor(seed + 1, *z.shape).abs(),
    )
    # The bias takes no part, and the weight's magnitude is taken in the twin.
    z = F.layer_norm(x, shape, *((weight, bias) if affine else ()))
    s = relevance / (z.abs() + EPS)
    w = weight if affine else torch.ones(shape, dtype=x.dtype)

    def sigma(values: Tensor) -> Tensor:
        return (values.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()

    expected = (x * w / sigma(x) + (x * w).abs() / sigma(x.abs())) * s
    torch.testing.assert_close(actual[0], share(expected), rtol=1e-8, atol=1e-12)


@given(seeds, sizes, st.integers(2, 5))
def test_rms_norm(seed: int, n: int, d: int) -> None:
    x, weight = draw_tensor(seed, 2, n, d), draw_tensor(seed + 2, d)
    actual, relevance = by_rule(
        AbsLRPRule(),
        lambda x: F.rms_norm(x, (d,), weight, 1e-6),
        [x],
        lambda z: draw_tensor(seed + 1, *z.shape).abs(),
    )

    def rms(v: Tensor) -> Tensor:
        return (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    s = relevance / ((x * weight / rms(x)).abs() + EPS)
    expected = (x * weight / rms(x) + (x * weight).abs() / rms(x.abs())) * s
    torch.testing.assert_close(actual[0], share(expected), rtol=1e-8, atol=1e-12)


@given(seeds, sizes, st.integers(2, 5), st.sampled_from([1, -1]))
def test_softmax(seed: int, n: int, d: int, dim: int) -> None:
    x = draw_tensor(seed, 2, n, d)
    actual, relevance = by_rule(
        AbsLRPRule(), lambda x: x.softmax(dim), [x], lambda z: draw_tensor(seed + 1, *z.shape).abs()
    )

    s = relevance / (x.softmax(dim) + EPS)
    expected = (x * x.softmax(dim) + x.abs() * x.abs().softmax(dim)) * s
    torch.testing.assert_close(actual[0], share(expected), rtol=1e-8, atol=1e-12)


@given(seeds, sizes, sizes, sizes, st.booleans(), st.booleans(), st.booleans())
def test_matmul(
    seed: int, n: int, k: int, m: int, broadcast: bool, first_signed: bool, second_signed: bool
) -> None:
    a = draw_tensor(seed, 2, 3, n, k, signed=first_signed)
    b = draw_tensor(seed + 1, *(() if broadcast else (2, 3)), k, m, signed=second_signed)
    assert_literal(torch.matmul, [a, b], seed=seed)
    assert_literal(lambda a, b: torch.bmm(a.flatten(0, 1), b.expand(2, 3, k, m).flatten(0, 1)), [a, b],
                   seed=seed)  # fmt: skip


BROADCASTS = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (1, 3, 1)), ((2, 3, 4), (4,)), ((1, 4), (3, 1))]


@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
@given(seed=seeds)
def test_addition_and_product(shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    x, y = (draw_tensor(seed + i, *shape) for i, shape in enumerate(shapes))
    assert_literal(torch.add, [x, y], seed=seed)
    assert_literal(lambda x, y: x * y, [x, y], seed=seed)


@given(seeds)
def test_addition_of_a_constant_and_product_with_a_parameter(seed: int) -> None:
    x, w = draw_tensor(seed, 2, 3, 4), draw_tensor(seed + 1, 4)
    assert_literal(torch.add, [x], [w], seed=seed)
    assert_literal(torch.mul, [x], [w], seed=seed)
    assert_literal(torch.div, [x], [w], seed=seed)


@given(seeds)
def test_dropout_rule_is_the_twin_of_the_identity(seed: int) -> None:
    x = draw_tensor(seed, 2, 3, 4)
    actual, relevance = by_rule(
        DropoutRule(),
        lambda x: F.dropout(x, 0.5, False),
        [x],
        lambda z: draw_tensor(seed, *z.shape).abs(),
    )
    (expected,) = literal(lambda x: x * 1.0, [x], [], relevance)
    torch.testing.assert_close(actual[0], share(expected), rtol=1e-8, atol=1e-12)


CALLS = {
    "linear": lambda x, w: F.linear(x, w),
    "erf": lambda x, w: torch.erf(x),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "norm": lambda x, w: x.norm(dim=-1),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rule", [TwinRule(), AbsLRPRule()], ids=str)
def test_twin_rule_is_the_definition_for_any_call(name: str, rule: Rule) -> None:
    x, w = draw_tensor(0, 3, 4), draw_tensor(1, 2, 4)
    assert_literal(CALLS[name], [x], [w], rule=rule)


def test_rule_names_the_calls_that_it_is_for() -> None:
    with pytest.raises(
        UnsupportedCallError, match=r"Expected MaxPoolRule to be used for one of .*max_pool2d.*"
    ):
        by_rule(MaxPoolRule(), torch.tanh, [torch.ones(1, 2)], torch.ones_like)
