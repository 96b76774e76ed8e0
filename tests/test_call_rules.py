"""Every call that the generic mapping has a rule for, against the definition, in float64.

A call that is added to the mapping without a case here fails
:func:`test_every_call_of_the_mapping_has_a_case`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.names import TRANSFORMS
from captum_abslrp.engine.propagation import TOTAL, propagate
from captum_abslrp.engine.recording import Recording
from captum_abslrp.mappings import Mapping, MappingScope, get_mapping
from captum_abslrp.rules import Rule
from tests.conftest import relative_error
from tests.test_closed_forms import EPS, draw_tensor, literal, share

seeds = st.integers(0, 2**31)


class Case(NamedTuple):
    """A call of one sample per row, and what the definition takes it for."""

    call: Callable[..., Tensor]
    inputs: list[Tensor]
    weights: tuple[Tensor, ...] = ()
    defined: Callable[..., Tensor] | None = None
    """The call with its constants fixed; ``call`` itself by default."""


class OwnRules(MappingScope):
    """The generic rules, but as if the user had chosen them, so that none is on the tail of the score."""

    def rule_of_call(self, call: Call, table: Mapping | None) -> Rule | None:
        return copy.copy(get_mapping().rule_of_call(call))


own_rule = OwnRules()


def by_mapping(
    call: Callable[..., Tensor], inputs: list[Tensor], seed: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The output of a call, the relevance of its inputs, and the relevance that it was given."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    given_ = [leaf.clone() for leaf in leaves]
    with Recording(own_rule, inputs=given_, batch_size=1, total=TOTAL):
        z = call(*given_)
    relevance = draw_tensor(seed + 9, *z.shape).abs()
    shares = propagate(z, leaves, relevance.unsqueeze(0))
    return z.detach(), [of_leaf[0] for of_leaf in shares], relevance


def assert_defined(case: Case, seed: int) -> None:
    z, actual, relevance = by_mapping(lambda *x: case.call(*x, *case.weights), case.inputs, seed)
    torch.testing.assert_close(z, case.call(*case.inputs, *case.weights))
    expected = literal(case.defined or case.call, case.inputs, [*case.weights], relevance)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, share(want), rtol=1e-7, atol=1e-11)


def function(name: str) -> Callable[..., Any]:
    for namespace in (F, torch, torch.Tensor, torch.linalg):
        if hasattr(namespace, name.removeprefix("linalg_")):
            return getattr(namespace, name.removeprefix("linalg_"))
    raise AssertionError(name)


def one(name: str, *args: Any, shape: tuple[int, ...] = (2, 4, 6), **kwargs: Any) -> Any:
    """A call on one drawn tensor, with arguments."""
    return lambda s: Case(lambda x: function(name)(x, *args, **kwargs), [draw_tensor(s, *shape)])


def positive(name: str, *args: Any) -> Any:
    """A call that is defined for positive numbers."""
    return lambda s: Case(lambda x: function(name)(x, *args), [draw_tensor(s, 2, 5).abs() + 0.1])


def two(name: str, *shapes: tuple[int, ...], **kwargs: Any) -> Any:
    """A call on drawn tensors of some shapes."""
    return lambda s: Case(
        lambda *x: function(name)(*x, **kwargs),
        [draw_tensor(s + i, *shape) for i, shape in enumerate(shapes)],
    )


def affine_sum(name: str, *shapes: tuple[int, ...]) -> Any:
    """``addmm`` and its kin, on three tensors, with factors."""
    return two(name, *shapes, beta=0.5, alpha=2.0)


def convolution(name: str, *shape: int) -> Any:
    return lambda s: Case(
        function(name),
        [draw_tensor(s, 2, 4, *shape)],
        (draw_tensor(s + 1, 4, 4, *[2] * len(shape)), draw_tensor(s + 2, 4)),
    )


def divided(
    call: Callable[[Tensor], Tensor], divisor: Callable[[Tensor], Tensor], *shape: int
) -> Any:
    """A call that divides by a statistic of its input, which the definition holds fixed."""

    def case(s: int) -> Case:
        x = draw_tensor(s, *shape)
        c = divisor(x)
        return Case(call, [x], defined=lambda x: x / c)

    return case


def batch_norm(s: int) -> Case:
    x, w, b = (draw_tensor(s + i, *shape) for i, shape in enumerate([(2, 3, 4), (3,), (3,)]))
    mean, var = draw_tensor(s + 3, 3), draw_tensor(s + 4, 3).abs() + 0.1
    scale = w * (var + 1e-5).rsqrt()
    return Case(
        lambda x, scale, shift: F.batch_norm(x, mean, var, w, b),
        [x],
        (scale, b - mean * scale),
        lambda x, scale, shift: x * scale[:, None] + shift[:, None],
    )


def sparse(call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Any:
    """A call on a sparse constant and drawn tensors."""

    def case(s: int) -> Case:
        a = draw_tensor(s, 3, 4) * (draw_tensor(s + 1, 3, 4) > 0)
        inputs = [draw_tensor(s + 2 + i, *shape) for i, shape in enumerate(shapes)]
        # What the definition takes the magnitude of is the dense matrix.
        return Case(
            lambda *x: call(x[-1] if x[-1].is_sparse else x[-1].to_sparse(), *x[:-1]),
            inputs,
            (a.to_sparse(),),
        )

    return case


def reduced(name: str, reduce: str) -> Any:
    """A call that reduces what goes to one place."""
    index = torch.tensor([0, 2, 2])
    index = index if name == "index_reduce" else index.expand(2, 3)
    return lambda s: Case(
        lambda x, y: function(name)(x, 1, index, y, reduce),
        [draw_tensor(s, 2, 4), draw_tensor(s + 1, 2, 3)],
    )


def sampled(s: int) -> Case:
    grid = draw_tensor(s + 1, 2, 3, 3, 2).tanh()
    return Case(lambda x: F.grid_sample(x, grid, align_corners=False), [draw_tensor(s, 2, 2, 4, 4)])


def quiet(name: str, **kwargs: Any) -> Any:
    """A call that PyTorch advises against."""

    def call(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(name)(x, **kwargs)

    return lambda s: Case(call, [draw_tensor(s, 2, 3, 4, 4)])


def squared_norm(x: Tensor, size: int = 3) -> Tensor:
    """What local response norm divides by."""
    padded = F.pad(x.square(), (0, 0, size // 2, size // 2))
    return (1 + 0.5 * padded.unfold(1, size, 1).mean(-1)) ** 0.75


IMAGE = (2, 3, 6, 6)
ELEMENTWISE = """
    abs asinh atan celu clamp_max cos elu erf exp exp2 expm1 gelu hardshrink hardsigmoid hardswish hardtanh
    leaky_relu logsigmoid mish relu6 selu sigmoid silu sin sinh softplus softshrink softsign square
    tan tanh tanhshrink
""".split()
CASES: dict[str, Callable[[int], Case]] = {
    **{name: one(name) for name in ELEMENTWISE if name != "clamp_max"},
    "clamp_max": one("clamp_max", 0.3),
    "clamp": one("clamp", -0.5, 0.7),
    "clip": one("clip", min=-0.5),
    "clamp_min": one("clamp_min", 0.2),
    "rrelu": one("rrelu", 0.1, 0.3, False),
    "threshold": one("threshold", 0.1, 0.2),
    "prelu": lambda s: Case(F.prelu, [draw_tensor(s, 2, 3, 4)], (draw_tensor(s + 1, 3),)),
    **{name: positive(name) for name in ("log", "log2", "log10", "log1p", "sqrt")},
    # On absolute values the twin is the same call.
    "logit": lambda s: Case(torch.logit, [draw_tensor(s, 2, 3).sigmoid()]),
    "pow": positive("pow", 1.7),
    "float_power": positive("float_power", 3),
    "linear": lambda s: Case(
        F.linear, [draw_tensor(s, 2, 5)], (draw_tensor(s + 1, 3, 5), draw_tensor(s + 2, 3))
    ),
    "conv1d": convolution("conv1d", 5),
    "conv2d": convolution("conv2d", 5, 4),
    "conv3d": convolution("conv3d", 3, 4, 3),
    "conv_transpose1d": convolution("conv_transpose1d", 5),
    "conv_transpose2d": convolution("conv_transpose2d", 3, 4),
    "conv_transpose3d": convolution("conv_transpose3d", 2, 3, 2),
    "avg_pool1d": one("avg_pool1d", 2),
    "avg_pool2d": one("avg_pool2d", 3, 2, 1, shape=IMAGE),
    "avg_pool3d": one("avg_pool3d", 2, shape=(1, 2, 4, 4, 4)),
    "adaptive_avg_pool1d": one("adaptive_avg_pool1d", 3),
    "adaptive_avg_pool2d": one("adaptive_avg_pool2d", (4, 1), shape=IMAGE),
    "adaptive_avg_pool3d": one("adaptive_avg_pool3d", 2, shape=(1, 2, 4, 4, 3)),
    "mean": one("mean", (1, 2)),
    "nanmean": one("nanmean", 1),
    "sum": one("sum", -1, True),
    "nansum": one("nansum", 1),
    "cumsum": one("cumsum", 1),
    "interpolate": one("interpolate", scale_factor=2.0, mode="bilinear", shape=IMAGE),
    "upsample": quiet("upsample", size=(5, 7)),
    "upsample_nearest": quiet("upsample_nearest", size=(5, 7)),
    "upsample_bilinear": quiet("upsample_bilinear", scale_factor=2),
    "fold": one("fold", (4, 5), (2, 2), shape=(2, 8, 12)),
    "grid_sample": sampled,
    "max_pool1d": one("max_pool1d", 2),
    "max_pool2d": one("max_pool2d", 3, 2, 1, shape=IMAGE),
    "max_pool3d": one("max_pool3d", 2, shape=(1, 2, 4, 4, 4)),
    "adaptive_max_pool1d": one("adaptive_max_pool1d", 3),
    "adaptive_max_pool2d": one("adaptive_max_pool2d", (4, 1), shape=IMAGE),
    "adaptive_max_pool3d": one("adaptive_max_pool3d", 2, shape=(1, 2, 4, 4, 3)),
    "batch_norm": batch_norm,
    "normalize": divided(
        lambda x: F.normalize(x, dim=-1), lambda x: x.norm(dim=-1, keepdim=True), 2, 3, 4
    ),
    "local_response_norm": divided(
        lambda x: F.local_response_norm(x, 3, alpha=0.5), squared_norm, 2, 4, 3
    ),
    "matmul": two("matmul", (2, 3, 4), (4, 5)),
    "mm": two("mm", (3, 4), (4, 5)),
    "bmm": two("bmm", (2, 3, 4), (2, 4, 5)),
    "linalg_matmul": two("linalg_matmul", (3, 4), (4, 5)),
    "spmm": two("spmm", (3, 4), (4, 5)),
    "_sparse_mm": sparse(lambda a, h: torch.sparse.mm(a, h), (4, 5)),
    "_sparse_addmm": sparse(
        lambda a, h, c: torch.sparse.addmm(c, a, h, beta=0.5, alpha=2.0), (4, 5), (3, 5)
    ),
    "mv": two("mv", (3, 4), (4,)),
    "dot": two("dot", (4,), (4,)),
    "vdot": two("vdot", (4,), (4,)),
    "inner": two("inner", (2, 4), (3, 4)),
    "outer": two("outer", (3,), (4,)),
    "ger": two("ger", (3,), (4,)),
    "kron": two("kron", (2, 3), (3, 1)),
    "tensordot": two("tensordot", (2, 3, 4), (4, 3), dims=([1, 2], [1, 0])),
    "einsum": lambda s: Case(
        lambda a, b: torch.einsum("bhic,bhjc->bhij", a, b),
        [draw_tensor(s, 2, 2, 3, 4), draw_tensor(s + 1, 2, 2, 5, 4)],
    ),
    "einsum, of sums": lambda s: Case(
        lambda a, b: torch.einsum("bi,bj->b", a, b), [draw_tensor(s, 2, 3), draw_tensor(s + 1, 2, 4)]
    ),
    "addmm": affine_sum("addmm", (5,), (3, 4), (4, 5)),
    "addmv": affine_sum("addmv", (3,), (3, 4), (4,)),
    "baddbmm": affine_sum("baddbmm", (2, 3, 5), (2, 3, 4), (2, 4, 5)),
    "addbmm": affine_sum("addbmm", (3, 5), (2, 3, 4), (2, 4, 5)),
    "add": two("add", (2, 3, 4), (3, 1)),
    "mul": two("mul", (2, 3, 4), (4,)),
    "amax": one("amax", (1, 2)),
    "amin": one("amin", 1),
    "maximum": two("maximum", (2, 3), (2, 3)),
    "minimum": two("minimum", (2, 3), (3,)),
    "fmax": two("fmax", (2, 3), (2, 3)),
    "fmin": two("fmin", (2, 3), (3,)),
    "cdist": two("cdist", (2, 3, 4), (2, 5, 4)),
    "pdist": one("pdist", shape=(5, 3)),
    "pairwise_distance": two("pairwise_distance", (2, 4), (4,), p=3.0),
    "logaddexp": two("logaddexp", (2, 3), (2, 3)),
    "norm": one("norm", dim=-1),
    "linalg_norm": one("linalg_norm", shape=(3, 4)),
    "linalg_vector_norm": one("linalg_vector_norm", 3, dim=1),
    "logsumexp": one("logsumexp", 1),
    "logcumsumexp": one("logcumsumexp", 1),
    "prod": one("prod", 1),
    "cumprod": one("cumprod", 1),
    "std": one("std", 1),
    "var": one("var", 1),
    "lp_pool1d": one("lp_pool1d", 2.0, 2),
    "lp_pool2d": one("lp_pool2d", 2.0, 2, shape=IMAGE),
    "index_add": lambda s: Case(
        lambda x, y: x.index_add(1, torch.tensor([0, 2, 2]), y),
        [draw_tensor(s, 2, 4), draw_tensor(s + 1, 2, 3)],
    ),
    "scatter_add": lambda s: Case(
        lambda x, y: x.scatter_add(1, torch.tensor([[0, 2, 2], [1, 1, 3]]), y),
        [draw_tensor(s, 2, 4), draw_tensor(s + 1, 2, 3)],
    ),
    **{f"index_reduce, {r}": reduced("index_reduce", r) for r in ("mean", "prod", "amax", "amin")},
    **{
        f"scatter_reduce, {r}": reduced("scatter_reduce", r)
        for r in ("sum", "mean", "prod", "amax", "amin")
    },
    **{
        f"segment_reduce, {r}": lambda s, r=r: Case(
            lambda x: torch.segment_reduce(x, r, lengths=torch.tensor([1, 3])),
            [draw_tensor(s, 4, 3)],
        )
        for r in ("sum", "mean", "max", "min")
    },
    "bilinear": lambda s: Case(
        F.bilinear,
        [draw_tensor(s, 2, 3), draw_tensor(s + 1, 2, 4)],
        (draw_tensor(s + 2, 5, 3, 4), draw_tensor(s + 3, 5)),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(in beta|Sparse CSR tensor support)")
@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=8)
@given(seed=seeds)
def test_the_rule_of_a_call_is_the_definition(name: str, seed: int) -> None:
    assert_defined(CASES[name](seed), seed)


# --- normalisation: mean and variance are constants, those of the twin are its own -----------------


def standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x / (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()


def of_groups(x: Tensor, groups: int) -> Tensor:
    return standardized(x.unflatten(1, (groups, -1)), (2, 3)).flatten(1, 2)


def rooted(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Norm(NamedTuple):
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    scaled: Callable[[Tensor], Tensor]
    axis: int
    """Which axis the weight is of."""


NORMS = {
    "layer_norm": Norm(
        lambda x, w, b: F.layer_norm(x, (4,), w, b), lambda x: standardized(x, (-1,)), 2
    ),
    "group_norm": Norm(lambda x, w, b: F.group_norm(x, 2, w, b), lambda x: of_groups(x, 2), 1),
    "instance_norm": Norm(
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b), lambda x: standardized(x, (2,)), 1
    ),
    "rms_norm": Norm(lambda x, w, b: F.rms_norm(x, (4,), w, 1e-5), rooted, 2),
}


@pytest.mark.parametrize("name", NORMS)
@settings(max_examples=10)
@given(seed=seeds)
def test_statistics_are_constants(name: str, seed: int) -> None:
    norm = NORMS[name]
    shape = (2, 6, 4)
    x, w, b = (
        draw_tensor(seed + i, *s)
        for i, s in enumerate([shape, shape[norm.axis :][:1], shape[norm.axis :][:1]])
    )
    z, (actual,), relevance = by_mapping(lambda x: norm.call(x, w, b), [x], seed)
    torch.testing.assert_close(z, norm.call(x, w, b))
    weight = w.view(-1, 1) if norm.axis == 1 else w
    numerator = norm.scaled(x) * weight + norm.scaled(x.abs()) * weight.abs()
    expected = numerator * relevance / (z.abs() + EPS)
    torch.testing.assert_close(actual, share(expected), rtol=1e-7, atol=1e-11)


def test_instance_norm_with_stored_statistics_is_batch_norm() -> None:
    x, w, b, mean = (draw_tensor(i, *s) for i, s in enumerate([(2, 3, 4), (3,), (3,), (3,)]))
    var = draw_tensor(5, 3).abs() + 0.1
    maps = [
        by_mapping(lambda x, call=call: call(x, mean, var, w, b, False), [x], 0)
        for call in (F.instance_norm, F.batch_norm)
    ]
    for first, second in zip(*maps, strict=True):
        torch.testing.assert_close(first, second)


@settings(max_examples=10)
@given(seed=seeds)
def test_softmax(seed: int) -> None:
    x = draw_tensor(seed, 2, 5)
    p, (actual,), relevance = by_mapping(lambda x: x.softmax(-1), [x], seed)
    expected = (x * p + x.abs() * x.abs().softmax(-1)) * relevance / (p + EPS)
    torch.testing.assert_close(actual, share(expected), rtol=1e-7, atol=1e-11)


# --- differences, quotients, constants ----------------------------------------------------------


@settings(max_examples=10)
@given(seed=seeds)
def test_a_difference_is_a_sum(seed: int) -> None:
    x, y = draw_tensor(seed, 2, 3), draw_tensor(seed + 1, 2, 3)
    _, (of_x, of_y), relevance = by_mapping(torch.sub, [x, y], seed)
    of_sum = literal(torch.add, [x, -y], [], relevance)
    for actual, expected in zip((of_x, of_y), of_sum, strict=True):
        torch.testing.assert_close(actual, share(expected))


@pytest.mark.parametrize("lowest", [-100.0, torch.finfo(torch.float64).min, -torch.inf])
def test_an_added_mask_passes_relevance_and_a_subtracted_one_does_not(lowest: float) -> None:
    x = draw_tensor(0, 2, 3)
    mask = torch.tensor([0.0, lowest, 0.0], dtype=torch.float64)
    for call in (lambda x: x + mask, lambda x: mask + x, lambda x: x - -mask, lambda x: x + 0.0):
        _, (actual,), relevance = by_mapping(call, [x], 0)
        # No relevance arrives where softmax has left nothing.
        torch.testing.assert_close(actual[:, ::2], relevance[:, ::2], rtol=1e-14, atol=0)
    _, (actual,), relevance = by_mapping(lambda x: x - mask.clamp(min=-200), [x], 0)
    assert not torch.allclose(actual, relevance)


@settings(max_examples=10)
@given(seed=seeds)
def test_a_divisor_is_a_constant(seed: int) -> None:
    x, y = draw_tensor(seed, 2, 3), draw_tensor(seed + 1, 2, 3).abs() + 0.1
    for call in (torch.div, lambda x, y: x * y.reciprocal(), lambda x, y: x * y.pow(-1.0)):
        _, (actual, none), relevance = by_mapping(
            lambda x, y, call=call: call(x, y) + 0 * y, [x, y], seed
        )
        (expected,) = literal(lambda x: x / y, [x], [], relevance)
        torch.testing.assert_close(actual, share(expected))
        assert not bool(none.any())


@pytest.mark.parametrize("name", ["rsqrt", "reciprocal"])
def test_what_is_only_divided_by_gets_nothing(name: str) -> None:
    x = torch.ones(2, 3, requires_grad=True).clone()
    with Recording(own_rule, inputs=[x], batch_size=1):
        assert not getattr(x, name)().requires_grad
        assert not (1 / x).requires_grad
        assert not (x**-0.5).requires_grad


PASSED = {
    "neg": torch.neg,
    "log_softmax": lambda x: x.log_softmax(-1),
    "nan_to_num": torch.nan_to_num,
    "deg2rad": torch.deg2rad,
    "rad2deg": torch.rad2deg,
    **{
        name: lambda x, name=name: getattr(F, name)(x, training=False)
        for name in (
            "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
            "feature_alpha_dropout",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED)
def test_relevance_passes_through(name: str) -> None:
    shape = {"dropout1d": (2, 3, 4), "dropout2d": (2, 3, 4, 4), "dropout3d": (2, 3, 4, 4, 4)}
    x = draw_tensor(0, *shape.get(name, (2, 5)))
    _, (actual,), relevance = by_mapping(PASSED[name], [x], 0)
    torch.testing.assert_close(actual, relevance, rtol=1e-14, atol=0)


@pytest.mark.parametrize("call", [torch.relu, lambda x: x.clamp(min=0), lambda x: x.clamp_min(0)])
def test_relu_by_any_name(call: Callable[[Tensor], Tensor]) -> None:
    x = draw_tensor(0, 2, 50)
    leaf = x.clone().requires_grad_()
    given_ = leaf.clone()
    with Recording(own_rule, inputs=[given_], batch_size=1, total=TOTAL):
        z = call(given_)
    relevance = draw_tensor(1, 2, 50).abs() * (z > 0)
    ((actual,),) = propagate(z, [leaf], relevance.unsqueeze(0))
    torch.testing.assert_close(actual, share(relevance))


# --- calls that are run part by part ------------------------------------------------------------


def with_noise(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


class Loop(nn.Module):
    """One layer and direction of an LSTM, GRU or RNN, written as a loop."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.kind, self.size = layer.mode, layer.hidden_size
        self.weight = torch.cat([layer.weight_ih_l0, layer.weight_hh_l0], 1).detach()
        self.bias = (layer.bias_ih_l0 + layer.bias_hh_l0).detach()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), self.size, dtype=x.dtype)
        outputs = []
        for step in range(x.shape[1]):
            x_t = x[:, step]
            both = torch.cat([x_t, h], 1)
            if self.kind == "LSTM":
                i, f, g, o = F.linear(both, self.weight, self.bias).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif self.kind == "GRU":
                n, size = 2 * self.size, self.layer
                r, z = F.linear(both, self.weight[:n], self.bias[:n]).sigmoid().chunk(2, 1)
                of_x = F.linear(x_t, size.weight_ih_l0[n:], size.bias_ih_l0[n:])
                of_h = F.linear(h, size.weight_hh_l0[n:], size.bias_hh_l0[n:])
                new = torch.tanh(of_x + r * of_h)
                h = (1 - z) * new + z * h
            else:
                h = getattr(torch, self.kind[4:].lower())(F.linear(both, self.weight, self.bias))
            outputs.append(h)
        return torch.stack(outputs, 1).mean(1)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.batch_first:
            return self.layer(x)[0].mean(1)
        return self.layer(x.transpose(0, 1))[0].mean(0)


LAYERS = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers_are_loops(name: str, batch_first: bool) -> None:
    make, options = LAYERS[name]
    layer = with_noise(make(3, 4, batch_first=batch_first, **options))
    x = draw_tensor(1, 2, 5, 3)
    whole, loop = Recurrent(layer), Loop(layer)
    torch.testing.assert_close(whole(x), loop(x))
    for contrast in (None, "others"):
        maps = [AbsLRP(m).attribute(x, 1, contrast=contrast) for m in (whole, loop)]
        assert relative_error(*maps) < 1e-9
        assert bool(maps[0].any())


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "num_layers": 2},
        {"proj_size": 2, "bidirectional": True},
        {"proj_size": 2, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_keep_their_output(name: str, options: dict[str, Any]) -> None:
    if name == "gru":
        options = {k: v for k, v in options.items() if k != "proj_size"}
    layer = with_noise(LAYERS[name][0](3, 4, **options))
    x = draw_tensor(1, 5, 2, 3)
    given_ = x.requires_grad_().clone()
    with Recording(own_rule, inputs=[given_], batch_size=1):
        output, state = layer(given_)
    expected, expected_state = layer(x)
    torch.testing.assert_close(output, expected)
    states = (
        zip(state, expected_state, strict=True) if name == "lstm" else [(state, expected_state)]
    )
    for s, e in states:
        torch.testing.assert_close(s, e)
    assert bool(torch.autograd.grad(output.sum(), x)[0].any())


def test_packed_sequences_are_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = with_noise(nn.GRU(3, 4, batch_first=True))

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2], batch_first=True)
            return self.layer(packed)[1][0]

    with pytest.raises(NotImplementedError, match="but got `_pack_padded_sequence`"):
        AbsLRP(Packed()).attribute(draw_tensor(0, 2, 4, 3), 1)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_cells_are_steps_of_layers(name: str) -> None:
    cells = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell}
    make, options = LAYERS[name]
    layer = with_noise(make(3, 4, batch_first=True, **options))
    cell = cells[name](3, 4, **options).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})

    class OneStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            state = self.cell(x[:, 0])
            return (state[0] if isinstance(state, tuple) else state).unsqueeze(1).mean(1)

    x = draw_tensor(1, 2, 1, 3)
    maps = [AbsLRP(m).attribute(x, 1) for m in (OneStep(), Recurrent(layer))]
    assert relative_error(*maps) < 1e-9


Parts = Callable[..., Tensor]
WRITTEN_OUT: dict[str, tuple[Parts, Parts]] = {
    "glu": (lambda x, y: F.glu(x, 1), lambda x, y: x[:, :2] * x[:, 2:].sigmoid()),
    "addcmul": (
        lambda x, y: torch.addcmul(x, y, x.tanh(), value=0.5),
        lambda x, y: x + 0.5 * (y * x.tanh()),
    ),
    "addcdiv": (
        lambda x, y: torch.addcdiv(x, y, y.square(), value=0.5),
        lambda x, y: x + 0.5 * (y / y.square()),
    ),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: x * (1 - 0.3) + y * 0.3),
    "softmin": (lambda x, y: F.softmin(x, 1) * y, lambda x, y: (-x).softmax(1) * y),
    "cosine_similarity": (
        lambda x, y: F.cosine_similarity(x, y, dim=-1),
        lambda x, y: (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1),
    ),
    "max": (lambda x, y: x.max(1).values + y.max(), lambda x, y: x.amax(1) + y.amax()),
    "min": (
        lambda x, y: torch.min(x, y) + x.min(1, keepdim=True)[0],
        lambda x, y: torch.minimum(x, y) + x.amin(1, keepdim=True),
    ),
    "var_mean": (
        lambda x, y: torch.mul(*torch.var_mean(x, 1, keepdim=True)),
        lambda x, y: x.var(1, keepdim=True) * x.mean(1, keepdim=True),
    ),
    "std_mean": (
        lambda x, y: torch.mul(*torch.std_mean(x, 1)),
        lambda x, y: x.std(1) * x.mean(1),
    ),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
@settings(max_examples=8)
@given(seed=seeds)
def test_a_call_of_parts_is_its_parts(name: str, seed: int) -> None:
    inputs = [draw_tensor(seed, 2, 4, 3), draw_tensor(seed + 1, 2, 4, 3)]
    whole, parts = (by_mapping_unused(call, inputs, seed) for call in WRITTEN_OUT[name])
    torch.testing.assert_close(whole[0], WRITTEN_OUT[name][0](*inputs))
    for first, second in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(first, second)


def by_mapping_unused(
    call: Callable[..., Tensor], inputs: list[Tensor], seed: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """:func:`by_mapping` of a call that may leave an input out."""
    return by_mapping(lambda *x: call(*x) + 0 * sum(t.sum() for t in x), inputs, seed)


def test_what_is_drawn_is_not_drawn_again() -> None:
    given_ = draw_tensor(0, 2, 5).requires_grad_().clone()
    with Recording(own_rule, inputs=[given_], batch_size=1) as recording:
        z = F.rrelu(given_, 0.1, 0.9, training=True)
        assert torch.equal(recording.save(z)(), z.detach())


def test_an_extremum_has_its_indices() -> None:
    x = draw_tensor(0, 2, 5)
    given_ = x.clone().requires_grad_().clone()
    with Recording(own_rule, inputs=[given_], batch_size=1):
        found = given_.max(1)
    assert torch.equal(found.indices, x.max(1).indices)
    assert torch.equal(found.values, x.max(1).values)


ELSEWHERE = {
    # in this file
    *NORMS, *PASSED, *WRITTEN_OUT, *LAYERS, *(f"{name}_cell" for name in LAYERS),
    "softmax", "sub", "div", "rsqrt", "reciprocal", "relu",
    # in test_calls
    "gumbel_softmax", *(f"torchvision::{name}" for name in (
        "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d",
    )),
    # in test_interception: the same as written out
    "scaled_dot_product_attention", "multi_head_attention_forward",
    # in test_complex
    *TRANSFORMS, "polar",
}  # fmt: skip


def test_every_call_of_the_mapping_has_a_case() -> None:
    names = {
        name
        for keys, _ in get_mapping().entries
        for name in (keys if isinstance(keys, tuple) else (keys,))
    }
    tested = {*(case.split(",")[0] for case in CASES), *ELSEWHERE}
    assert names == tested, (
        f"{sorted(names - tested)} have no case in CASES, or WRITTEN_OUT if they are run part by part; "
        f"{sorted(tested - names)} have no rule"
    )
