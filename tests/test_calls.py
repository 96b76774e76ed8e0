"""Calls of the networks that people bring: masks, regions, sparse matrices, layers with several outputs, lazy
layers, and the remedies that error messages name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torchvision import ops

from captum_abslrp import (
    AbsLRP,
    LayerAbsLRP,
    UnsupportedCallError,
    inspect_rules,
    register_call_rule,
)
from captum_abslrp.engine.propagation import TOTAL, propagate
from captum_abslrp.engine.recording import Recording
from captum_abslrp.mappings import Mapping, MappingScope, get_mapping
from captum_abslrp.rules import AbsLRPRule, ConstantRule, TwinRule
from tests.conftest import relative_error
from tests.test_call_rules import by_mapping, own_rule
from tests.test_closed_forms import draw_tensor, literal, share
from tests.test_no_trace import no_trace

Calls = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A linear layer, some calls, and a linear layer without a bias, so that every class has a map."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calls = calls
        self.first, self.last = nn.Linear(6, 8).double(), nn.LazyLinear(3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.calls(self.first(x)))


def samples(count: int = 4) -> Tensor:
    return draw_tensor(1, count, 6)


def ready(model: nn.Module, *inputs: Any) -> nn.Module:
    """The model in evaluation mode, after a run that gives its lazy layers their weights."""
    with torch.no_grad():
        model.eval()(*inputs)
    torch.manual_seed(2)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is None:
            nn.init.normal_(layer.weight)
    return model


def explain(
    calls: Calls, mapping: Mapping | None = None, normalization: str = "separate", count: int = 4
) -> Tensor:
    """The map, which has to be that of each sample on its own."""
    x = samples(count)
    attributor = AbsLRP(ready(Between(calls), x), mapping, normalization=normalization)
    relevance: Tensor = attributor.attribute(x, 1)
    one_by_one = torch.cat([attributor.attribute(sample[None], 1) for sample in x])
    assert relative_error(relevance, one_by_one) < 1e-9
    assert bool(relevance.any())
    return relevance


# --- constants of other dtypes ---------------------------------------------------------------------

MASK = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool()
COUNTS = torch.tensor([1, 0, 2, -3, 4, 1, 1, 2])
LENGTHS = COUNTS.abs() + 1


def changed(change: Callable[[Tensor], Any]) -> Calls:
    def calls(h: Tensor) -> Tensor:
        h = h.clone()
        change(h)
        return h

    return calls


Cast = Callable[[Tensor], Any]
"""What a constant is made of: itself, or the same numbers in the dtype of the network."""
FORMS: dict[str, Callable[[Cast], Calls]] = {
    "h * (h > 0)": lambda c: lambda h: h * c(h > 0),
    "(h > 0) * h": lambda c: lambda h: c(h > 0) * h,
    "(~mask)[..., None]": lambda c: (
        lambda h: (h.view(-1, 4, 2) * c((~MASK[:4])[..., None])).flatten(1)
    ),
    "relu * mask": lambda c: lambda h: h.relu() * c(MASK),
    "h * mask of one": lambda c: lambda h: h * c(torch.tensor(True)),
    "h * counts": lambda c: lambda h: h * c(COUNTS),
    "h * 32 bits": lambda c: lambda h: h * c(COUNTS.int()),
    "h * 8 bits": lambda c: lambda h: h * c(LENGTHS.to(torch.uint8)),
    "h / lengths": lambda c: lambda h: h / c(LENGTHS),
    "h / number": lambda c: lambda h: h / c(torch.tensor(3)) + h,
    "h / float32": lambda c: lambda h: h / c(LENGTHS.float()),
    "true_divide": lambda c: lambda h: torch.true_divide(h, c(LENGTHS)),
    "h + ids": lambda c: lambda h: h + c(COUNTS),
    "h + mask": lambda c: lambda h: h + c(MASK),
    "mask + h, alpha": lambda c: lambda h: torch.add(c(MASK), h, alpha=0.3),
    "h + ids, alpha": lambda c: lambda h: torch.add(h, c(COUNTS), alpha=0.3),
    "h - m.int()": lambda c: lambda h: h - c(MASK.int()),
    "ids - h": lambda c: lambda h: c(COUNTS) - h,
    "h ** ids": lambda c: lambda h: h.abs() ** c(LENGTHS),
    "h ** mask": lambda c: lambda h: h.abs() ** c(MASK),
    "ids ** h": lambda c: lambda h: c(LENGTHS) ** h,
    "addcmul": lambda c: lambda h: torch.addcmul(h, h.tanh(), c(COUNTS), value=0.5),
    "addcmul, mask": lambda c: lambda h: torch.addcmul(h, c(MASK), h.tanh()),
    "maximum": lambda c: lambda h: torch.maximum(h, c(COUNTS)),
    "minimum": lambda c: lambda h: torch.minimum(c(COUNTS), h),
    "max": lambda c: lambda h: torch.max(h, c(COUNTS)),
    "fmax": lambda c: lambda h: torch.fmax(h, c(MASK)),
    "clamp": lambda c: lambda h: h + torch.clamp(h, min=c(COUNTS - 2), max=c(COUNTS)),
    "where": lambda c: lambda h: torch.where(h > 0, h.relu(), c(COUNTS)),
    "where, mask": lambda c: lambda h: h.where(h > 0, c(MASK)),
    "masked_fill": lambda c: lambda h: h.relu().masked_fill(MASK, c(torch.tensor(-3))),
    "cat": lambda c: lambda h: torch.cat([h.relu(), c(COUNTS).expand(len(h), -1)], 1),
    "*= mask": lambda c: changed(lambda h: h.mul_(c(MASK))),
    "+= ids": lambda c: changed(lambda h: h.add_(c(COUNTS))),
    "/= lengths": lambda c: changed(lambda h: h.div_(c(LENGTHS))),
    "*= on a slice": lambda c: changed(lambda h: h[:, 2:].mul_(c(MASK[2:]))),
    "-= on a slice": lambda c: changed(lambda h: h[:, 2:].sub_(c(COUNTS[2:]))),
    "out": lambda c: lambda h: torch.mul(h, c(MASK), out=torch.empty_like(h)),
    "masked mean": lambda c: (
        lambda h: (h * c(h > 0)).sum(1, keepdim=True) / c((h > 0).sum(1, keepdim=True) + 1) * h
    ),
}


def as_given(constant: Tensor) -> Tensor:
    return constant


def as_double(constant: Tensor) -> Tensor:
    return constant.double()


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", FORMS)
def test_a_constant_of_another_dtype_is_cast(name: str, normalization: str) -> None:
    maps = [explain(FORMS[name](cast), None, normalization) for cast in (as_given, as_double)]
    assert torch.equal(*maps)


SCALARS: dict[str, tuple[Calls, Calls]] = {
    "float32": (lambda h: h * np.float32(2.5), lambda h: h * 2.5),
    "float32, reflected": (lambda h: np.float32(2.5) * h, lambda h: h * 2.5),
    "int64": (lambda h: h + np.int64(2), lambda h: h + 2.0),
    "int64, reflected": (lambda h: np.int64(2) - h, lambda h: 2.0 - h),
    "bool": (lambda h: h * np.bool_(True) + h, lambda h: h * 1.0 + h),
    "divisor": (lambda h: h / np.int32(3), lambda h: h / 3.0),
    "base": (lambda h: np.float64(2.5) ** h, lambda h: 2.5**h),
    "int": (lambda h: 1 - h, lambda h: 1.0 - h),
    "int base": (lambda h: 2**h, lambda h: 2.0**h),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALARS)
def test_numbers_of_numpy_are_numbers(name: str) -> None:
    assert torch.equal(*map(explain, SCALARS[name]))


ARRAYS: dict[str, Calls] = {
    "product": lambda h: h * np.array([2, 0, 1, -1] * 2),
    "sum": lambda h: h + np.array([True, False] * 4),
    "function": lambda h: torch.as_tensor(np.exp(h)),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__")
@pytest.mark.parametrize("name", ARRAYS)
def test_calls_of_numpy_are_refused_with_a_remedy(name: str) -> None:
    model = Between(ARRAYS[name])
    model.last = nn.Identity()
    with pytest.raises(UnsupportedCallError, match=r"NumPy.*`torch\.as_tensor\(array\)`"):
        AbsLRP(model).attribute(samples(), 1)
    explain(lambda h: h * torch.as_tensor(np.array([2, 0, 1, -1] * 2)))


def test_a_mask_is_known_to_be_nonnegative() -> None:
    given = samples().requires_grad_().clone()
    with Recording(MappingScope(), inputs=[given], batch_size=4) as recording:
        h = given.relu()
        known = [h * (h > 0), h * MASK[:6], (h > 0) * h, torch.where(h > 1, h, MASK[:6])]
        unknown = [h * COUNTS[:6], torch.where(h > 1, h, COUNTS[:6]), h + COUNTS[:6]]
        assert all(map(recording.is_nonnegative, known))
        assert not any(map(recording.is_nonnegative, unknown))


def test_rounded_quotients_are_steps() -> None:
    expected = explain(lambda h: h + (h / 2).floor().detach())
    for calls in (lambda h: h + h // 2, lambda h: h + torch.floor_divide(h, 2)):
        assert torch.equal(explain(calls), expected)


# --- single elements, casts, and other calls -------------------------------------------------------


def each(change: Callable[[Tensor, int], None]) -> Calls:
    def calls(h: Tensor) -> Tensor:
        p = h.clone()
        for b in range(len(p)):
            change(p, b)
        return p

    return calls


def added(p: Tensor, b: int) -> None:
    p[b, 1] += 0.25


def subtracted(p: Tensor, b: int) -> None:
    p[b, 1] -= 0.25


def multiplied(p: Tensor, b: int) -> None:
    p[b, 1] *= -2.5


def squared(p: Tensor, b: int) -> None:
    p[b, 1] = p[b, 1].square()


def added_to_a_slice(p: Tensor, b: int) -> None:
    p[b, 1:3] += torch.tensor([1, -2])


def with_column(change: Calls, last: int = 2) -> Calls:
    return lambda h: torch.cat([h[:, :1], change(h[:, 1:last]), h[:, last:]], 1)


ELEMENTS: dict[str, tuple[Calls, Calls]] = {
    "+=": (each(added), with_column(lambda c: c + 0.25)),
    "-=": (each(subtracted), with_column(lambda c: c - 0.25)),
    "*=": (each(multiplied), with_column(lambda c: c * -2.5)),
    "square": (each(squared), with_column(torch.square)),
    "slice": (each(added_to_a_slice), with_column(lambda c: c + torch.tensor([1.0, -2.0]), 3)),
    "column": (changed(lambda h: h[:, 1].add_(0.25)), with_column(lambda c: c + 0.25)),
}


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_one_element_may_be_changed_in_place(name: str, normalization: str) -> None:
    maps = [explain(calls, None, normalization) for calls in ELEMENTS[name]]
    torch.testing.assert_close(*maps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_a_number_of_one_sample_is_a_source(normalization: str) -> None:
    explain(lambda h: h * h.mean(), None, normalization, count=1)


CASTS: dict[str, Calls] = {
    "as_tensor": torch.as_tensor,
    "as_tensor with a dtype": lambda h: torch.as_tensor(h, dtype=torch.float64),
    "asarray": torch.asarray,
    "asarray, copied": lambda h: torch.asarray(h, copy=True),
}


@pytest.mark.filterwarnings("ignore:torch.asarray")
@pytest.mark.parametrize("name", CASTS)
def test_conversions_move_elements(name: str) -> None:
    assert torch.equal(explain(CASTS[name]), explain(lambda h: h))


def index_of(h: Tensor) -> Tensor:
    return torch.tensor([0, 1, 1, 2, 2, 2, 3, 0]).expand(len(h), 8)


SCATTERED: dict[str, tuple[Calls, Calls]] = {
    "add": (
        lambda h: h[:, :4].scatter(1, index_of(h), h, reduce="add"),
        lambda h: h[:, :4].scatter_reduce(1, index_of(h), h, "sum"),
    ),
    "multiply": (
        lambda h: h + h.scatter(1, index_of(h)[:, :2], h[:, 1:], reduce="multiply"),
        lambda h: h + h.scatter_reduce(1, index_of(h)[:, :2], h[:, 1:], "prod"),
    ),
    "multiply by a number": (
        lambda h: h.scatter(1, index_of(h)[:, :1], 2.0, reduce="multiply"),
        lambda h: h.scatter_reduce(1, index_of(h)[:, :1], h.new_full((len(h), 1), 2.0), "prod"),
    ),
    "a source that is too large": (
        lambda h: h.scatter_add(1, index_of(h)[:, :3], h),
        lambda h: h.scatter_add(1, index_of(h)[:, :3], h[:, :3]),
    ),
    "a source that is too large, moved": (
        lambda h: h.scatter(1, torch.tensor([[1, 3]]).expand(len(h), -1), h.exp()),
        lambda h: h.scatter(1, torch.tensor([[1, 3]]).expand(len(h), -1), h.exp()[:, :2]),
    ),
    "add a number in place": (
        lambda h: h.clone().scatter_(1, index_of(h)[:, :1], 2, reduce="add"),
        lambda h: h.scatter_reduce(1, index_of(h)[:, :1], h.new_full((len(h), 1), 2.0), "sum"),
    ),
    "in place": (
        lambda h: h.new_zeros(len(h), 4).scatter_(1, index_of(h), h, reduce="add"),
        lambda h: h.new_zeros(len(h), 4).scatter_reduce(1, index_of(h), h, "sum"),
    ),
    "scatter_reduce in place": (
        lambda h: h.new_zeros(len(h), 4).scatter_reduce_(1, index_of(h), h, "mean"),
        lambda h: h.new_zeros(len(h), 4).scatter_reduce(1, index_of(h), h, "mean"),
    ),
    "index_reduce in place": (
        lambda h: h.new_zeros(len(h), 4).index_reduce_(1, index_of(h)[0], h, "amax"),
        lambda h: h.new_zeros(len(h), 4).index_reduce(1, index_of(h)[0], h, "amax"),
    ),
    "module": (
        lambda h: nn.PairwiseDistance(p=3, keepdim=True)(h, h.tanh()),
        lambda h: torch.pairwise_distance(h, h.tanh(), 3, keepdim=True),
    ),
}


@pytest.mark.filterwarnings("ignore:.*(beta|experimental|reduce argument)")
@pytest.mark.parametrize("name", SCATTERED)
def test_two_names_of_a_call_agree(name: str) -> None:
    assert torch.equal(*map(explain, SCATTERED[name]))


MIXING: dict[str, Calls] = {
    "scatter_reduce": lambda h: h.scatter_reduce(0, torch.zeros_like(h, dtype=torch.long), h, "mean"),
    "index_add": lambda h: h.index_add(0, torch.zeros(len(h), dtype=torch.long), h),
    "cdist": lambda h: torch.cdist(h, h + 1) @ torch.ones(len(h), 2).double(),
    "pdist": lambda h: h * torch.pdist(h).sum() if len(h) > 1 else h,
    "addmm": lambda h: torch.addmm(h, torch.eye(len(h)).double(), h),
    "covariance": lambda h: h @ torch.cov(h.T),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_calls_that_mix_samples_run_one_at_a_time(name: str) -> None:
    mapping = get_mapping().extended({"cov": TwinRule()})
    if name == "covariance":  # of one sample it is none
        with pytest.raises((ValueError, FloatingPointError)), pytest.warns(UserWarning):
            explain(MIXING[name], mapping)
        return
    explain(MIXING[name], mapping)


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_gumbel_softmax_draws_its_noise_once(normalization: str) -> None:
    def written_out(h: Tensor) -> Tensor:
        noise = torch.empty_like(h.detach()).exponential_().log()
        return ((h - noise) / 0.7).softmax(1)

    x = samples()
    maps = []
    for calls in (lambda h: F.gumbel_softmax(h, 0.7, dim=1), written_out):
        attributor = AbsLRP(ready(Between(calls), x), normalization=normalization)
        torch.manual_seed(3)
        maps.append(attributor.attribute(x, 1))
    assert torch.equal(*maps)
    assert bool(maps[0].any())


def test_hard_gumbel_softmax_passes_relevance_to_the_share_of_the_choice() -> None:
    x = draw_tensor(0, 2, 5)
    leaf = x.clone().requires_grad_()
    given = leaf.clone()
    torch.manual_seed(4)
    with Recording(own_rule, inputs=[given], batch_size=2, total=TOTAL):
        chosen = F.gumbel_softmax(given, hard=True)
    torch.manual_seed(4)
    assert torch.equal(chosen, F.gumbel_softmax(x, hard=True))
    torch.manual_seed(4)
    with Recording(own_rule, inputs=[given], batch_size=2, total=TOTAL):
        soft = F.gumbel_softmax(given)
    seed = draw_tensor(1, 2, 5).abs()
    hard = propagate(chosen, [leaf], seed[None])[0]
    expected = propagate(soft, [leaf], (seed * chosen.detach())[None])[0]
    torch.testing.assert_close(hard, expected, rtol=1e-6, atol=1e-9)
    assert bool(hard.any())


# --- sparse matrices -------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda a: a.to_sparse(),
    "not coalesced": lambda a: torch.sparse_coo_tensor(
        torch.cat([a.to_sparse().indices()] * 2, 1),
        torch.cat([2 * a.to_sparse().values(), -a.to_sparse().values()]),
        a.shape,
        check_invariants=True,
    ),
    "csr": lambda a: a.to_sparse_csr(),
    "csc": lambda a: a.to_sparse_csc(),
}
SPARSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.sparse.mm": lambda a, h: (
        torch.sparse.mm(a, h.T).T if a.layout != torch.strided else (a @ h.T).T
    ),
    "@": lambda a, h: (a @ h.T).T,
    "mm": lambda a, h: torch.mm(a, h.T).T,
    "spmm": lambda a, h: torch.spmm(a, h.T).T,
    "dense @ sparse": lambda a, h: h @ a,
    "mv": lambda a, h: torch.stack([torch.mv(a, row) for row in h]),
    "@ vector": lambda a, h: torch.stack([a @ row for row in h]),
    "addmm": lambda a, h: torch.addmm(h.T, a, h.T, beta=0.5, alpha=-2.0).T,
}


def matrix(signed: bool) -> Tensor:
    a = draw_tensor(5, 8, 8) * (draw_tensor(6, 8, 8) > 0)
    return a if signed else a.abs()


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("signed", [False, True], ids=["nonnegative", "signed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_matrix_is_a_weight(name: str, layout: str, signed: bool) -> None:
    dense = matrix(signed)
    sparse = LAYOUTS[layout](dense)
    call = SPARSE[name]
    torch.testing.assert_close(
        call(sparse, draw_tensor(0, 2, 8)), call(dense, draw_tensor(0, 2, 8))
    )
    of_sparse, of_dense = (explain(lambda h, a=a: call(a, h)) for a in (sparse, dense))
    torch.testing.assert_close(of_sparse, of_dense, rtol=1e-9, atol=1e-12)
    told = get_mapping().extended({("_sparse_mm", "mm", "matmul", "mv", "spmm"): TwinRule()})
    of_sparse, of_dense = (explain(lambda h, a=a: call(a, h), told) for a in (sparse, dense))
    torch.testing.assert_close(of_sparse, of_dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", ["addmm", "baddbmm", "addmv"])
def test_a_negative_factor_is_the_sign_of_the_product(name: str, normalization: str) -> None:
    def calls(h: Tensor, alpha: float, sign: float) -> Tensor:
        if name == "addmm":
            return torch.addmm(h, h.tanh(), sign * matrix(True), alpha=alpha)
        if name == "addmv":
            rows = [torch.addmv(row, sign * matrix(True), row.tanh(), alpha=alpha) for row in h]
            return torch.stack(rows)
        rows = h.tanh()[:, None]
        return torch.baddbmm(
            h[:, None], rows, sign * matrix(True).expand(len(h), 8, 8), alpha=alpha
        )[:, 0]

    maps = [
        explain(lambda h, a=a, s=s: calls(h, a, s), None, normalization)
        for a, s in ((-2.0, 1.0), (2.0, -1.0))
    ]
    torch.testing.assert_close(*maps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_a_negative_factor_is_the_sign_of_the_summand(normalization: str) -> None:
    def calls(h: Tensor, beta: float) -> Tensor:
        return torch.addmm(h.sin() if beta > 0 else -h.sin(), h.tanh(), matrix(True), beta=beta)

    maps = [explain(lambda h, b=b: calls(h, b), None, normalization) for b in (-2.0, 2.0)]
    torch.testing.assert_close(*maps, rtol=1e-9, atol=1e-12)


class Graph(nn.Module):
    """A graph network: the nodes of one graph are one sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()
        self.register_buffer("edges", matrix(signed=False).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        nodes = x[0] if x.dim() == 3 else x
        h = (self.edges @ self.first(nodes)).relu()
        h = self.last(torch.sparse.mm(self.edges, h))
        return h.mean(0, keepdim=True) if x.dim() == 3 else h


def test_graph_networks() -> None:
    model, x = Graph(), draw_tensor(0, 1, 8, 5)
    dense = Graph()
    dense.edges = dense.edges.to_dense()
    dense.forward = lambda x: dense.last(  # type: ignore[method-assign]
        dense.edges @ (dense.edges @ dense.first(x[0])).relu()
    ).mean(0, keepdim=True)
    relevance = AbsLRP(model).attribute(x, 1)
    torch.testing.assert_close(relevance, AbsLRP(dense).attribute(x, 1))
    with pytest.raises(ValueError, match=r"one sample at a time.*nodes of a graph.*unsqueeze\(0\)"):
        AbsLRP(model).attribute(x[0], 1)


class Sparsely(nn.Module):
    """A layer from dense tensors to dense ones, with sparse ones inside that depend on the input."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.stack(
            [torch.sparse.mm(torch.diag(row).to_sparse(), row[:, None])[:, 0] for row in h]
        )


@pytest.mark.parametrize(
    "calls",
    [Sparsely(), lambda h: (h * matrix(True)[: len(h)].to_sparse()).to_dense()],
    ids=["made sparse", "product by element"],
)
def test_sparse_tensors_that_depend_on_the_input_are_refused(calls: Calls) -> None:
    with pytest.raises(
        UnsupportedCallError, match=r"dense tensor, but got a sparse.*register_call_rule"
    ):
        explain(calls)


def test_the_remedy_for_sparse_tensors_works() -> None:
    register_call_rule(Sparsely, TwinRule())
    torch.testing.assert_close(explain(Sparsely()), explain(torch.square), rtol=1e-9, atol=1e-12)


# --- regions of images -----------------------------------------------------------------------------

BOXES = [
    torch.tensor([[-1.0, -2, 5, 6], [1, 1, 7, 7]]).double(),
    torch.tensor([[2.0, 2, 6, 6], [0, 0, 3, 3]]).double(),
]
Regions = Callable[[Any, Tensor, list[Tensor]], Tensor]
REGIONS: dict[str, Regions] = {
    "roi_align": lambda m, h, boxes: ops.roi_align(h, boxes, 2),
    "roi_align, aligned": lambda m, h, boxes: ops.roi_align(h, boxes, 2, 0.5, 2, True),
    "roi_pool": lambda m, h, boxes: ops.roi_pool(h, boxes, 2),
    "ps_roi_align": lambda m, h, boxes: ops.ps_roi_align(h, boxes, 2),
    "ps_roi_pool": lambda m, h, boxes: ops.ps_roi_pool(h, boxes, 2),
    "RoIAlign": lambda m, h, boxes: m.roi_align(h, boxes),
    "RoIPool": lambda m, h, boxes: m.roi_pool(h, boxes),
    "one tensor": lambda m, h, boxes: ops.roi_align(
        h, torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)]), 2
    ),
    "both outputs": lambda m, h, boxes: torch.ops.torchvision.roi_pool(
        h, ops._utils.convert_boxes_to_roi_format(boxes), 1.0, 2, 2
    )[0],
}


class Detector(nn.Module):
    def __init__(self, regions: Regions) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.regions = regions
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.offset, self.gate = nn.Conv2d(8, 18, 3, padding=1), nn.Conv2d(8, 9, 3, padding=1)
        self.deform = ops.DeformConv2d(8, 4, 3, padding=1)
        self.roi_align, self.roi_pool = ops.RoIAlign(2, 1.0, 2), ops.RoIPool(2, 1.0)
        self.levels = ops.MultiScaleRoIAlign(["0", "1"], 2, 2)
        self.head = nn.LazyLinear(3, bias=False)
        self.double()

    def forward(self, x: Tensor, boxes: list[Tensor]) -> Tensor:
        h = self.regions(self, self.conv(x), boxes)
        return self.head(h.reshape(len(x), -1, h[0].numel()).mean(1))


def images(count: int = 2) -> Tensor:
    return draw_tensor(3, count, 3, 8, 8)


def detector(regions: Regions) -> nn.Module:
    model = ready(Detector(regions), images(), BOXES)
    nn.init.normal_(model.offset.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    return model


@pytest.mark.parametrize("told", [False, True], ids=["as it is", "as told"])
@pytest.mark.parametrize("name", REGIONS)
def test_regions_of_a_batch(name: str, told: bool) -> None:
    names = "roi_align roi_pool ps_roi_align ps_roi_pool".split()
    rules = {f"torchvision::{call}": TwinRule() for call in names} if told else {}
    model, x = detector(REGIONS[name]), images()
    for normalization in ("separate", "joint"):
        attributor = AbsLRP(model, get_mapping().extended(rules), normalization=normalization)
        relevance = attributor.attribute(x, 1, (BOXES,))
        one_by_one = [attributor.attribute(x[i : i + 1], 1, ([BOXES[i]],)) for i in range(2)]
        assert relative_error(relevance, torch.cat(one_by_one)) < 1e-9
        assert bool(relevance.any())


LINEAR = {
    "roi_align": lambda h: ops.roi_align(h, BOXES, 2),
    "ps_roi_align": lambda h: ops.ps_roi_align(h, BOXES, 2),
    "ps_roi_pool": lambda h: ops.ps_roi_pool(h, BOXES, 2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_pooled_regions_are_linear(name: str) -> None:
    x = draw_tensor(0, 2, 8, 8, 8)
    _, (actual,), relevance = by_mapping(LINEAR[name], [x], 0)
    torch.testing.assert_close(actual, share(literal(LINEAR[name], [x], [], relevance)[0]))
    assert not bool(actual[x < 0].any())


def test_the_maximum_of_a_region() -> None:
    def pool(h: Tensor) -> Tensor:
        return ops.roi_pool(h, BOXES, 2)

    x = draw_tensor(0, 2, 8, 8, 8)
    _, (actual,), relevance = by_mapping(pool, [x], 0)
    torch.testing.assert_close(actual, share(literal(pool, [x], [], relevance)[0]))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("told", [False, True], ids=["as it is", "as told"])
def test_deformable_convolution(told: bool, gated: bool) -> None:
    rules = {"torchvision::deform_conv2d": TwinRule()} if told else {}
    x, offset = draw_tensor(0, 2, 4, 6, 6), draw_tensor(1, 2, 18, 6, 6)
    w, b, gate = draw_tensor(2, 3, 4, 3, 3), draw_tensor(3, 3), draw_tensor(4, 2, 9, 6, 6).sigmoid()

    def call(x: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.deform_conv2d(x, offset, w, b, padding=1, mask=gate)

    leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_(gated)]
    given = [leaf.clone() for leaf in leaves]
    inputs = [tensor for tensor in given if tensor.requires_grad]
    find_rule = MappingScope(get_mapping().extended(rules))
    with Recording(find_rule, inputs=inputs, batch_size=1, total=TOTAL):
        z = call(*given, w, b)
    relevance = draw_tensor(9, *z.shape).abs()
    sources = leaves if gated else leaves[:1]
    shares = propagate(z, sources, relevance[None])
    expected = literal(call, [x, gate], [w, b], relevance)
    for (actual,), wanted in zip(shares, expected, strict=False):
        torch.testing.assert_close(actual, share(wanted), rtol=1e-7, atol=1e-11)


DEFORMED: dict[str, Regions] = {
    "layer": lambda m, h, boxes: m.deform(h, m.offset(h)),
    "with a gate": lambda m, h, boxes: m.deform(h, m.offset(h), m.gate(h).sigmoid()),
    "function": lambda m, h, boxes: ops.deform_conv2d(h, m.offset(h), m.deform.weight, padding=1),
}


@pytest.mark.parametrize("name", DEFORMED)
def test_offsets_that_depend_on_the_input_are_constants(name: str) -> None:
    model, x = detector(DEFORMED[name]), images()
    attributor = AbsLRP(model)
    relevance = attributor.attribute(x, 1, (BOXES,))
    one_by_one = [attributor.attribute(x[i : i + 1], 1, (BOXES,)) for i in range(2)]
    assert relative_error(relevance, torch.cat(one_by_one)) < 1e-9


def proposed(m: Any, h: Tensor, boxes: list[Tensor]) -> Tensor:
    corners = [image[:2, 0, 0].abs()[None] for image in h]
    return ops.roi_align(h, [torch.cat([corner, corner + 4], 1) for corner in corners], 2)


def test_boxes_that_depend_on_the_input_are_constants() -> None:
    model, x = detector(proposed), images()
    with torch.no_grad():
        corners = [h[:2, 0, 0].abs()[None] for h in model.conv(x)]  # type: ignore[operator]
    fixed = [torch.cat([corner, corner + 4], 1) for corner in corners]
    plain = detector(REGIONS["roi_align"])
    relevance = AbsLRP(model).attribute(x, 1, (BOXES,))
    torch.testing.assert_close(relevance, AbsLRP(plain).attribute(x, 1, (fixed,)))


def pyramid(m: Any, h: Tensor, boxes: list[Tensor]) -> Tensor:
    pooled = m.levels({"0": h, "1": F.avg_pool2d(h, 2)}, boxes, [(8, 8)] * len(h))
    return torch.stack([regions.mean(0) for regions in pooled.split([len(b) for b in boxes])])


def uneven(m: Any, h: Tensor, boxes: list[Tensor]) -> Tensor:
    pooled = ops.roi_align(h, boxes, 2).split([len(b) for b in boxes])
    return torch.stack([regions.mean(0) for regions in pooled])


@pytest.mark.parametrize("regions", [pyramid, uneven])
def test_the_remedy_for_uneven_regions_works(regions: Regions) -> None:
    boxes = [BOXES[0], BOXES[1][:1]]
    model, x = detector(regions), images()
    attributor = AbsLRP(model)
    with pytest.raises(ValueError, match=r"to be less than 1, but got 1\..*\[boxes\[i\]\]"):
        attributor.attribute(x, 1, (boxes,))
    for i in range(2):
        relevance = attributor.attribute(x[i : i + 1], 1, additional_forward_args=([boxes[i]],))
        assert bool(relevance.any())


# --- several outputs, keyword arguments, states ----------------------------------------------------


class Spike(torch.autograd.Function):
    """A step with the slope of something smooth."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grads[0] / (1 + v.abs()) ** 2


class Named(NamedTuple):
    spikes: Tensor
    state: Tensor


@dataclasses.dataclass
class Fields:
    spikes: Tensor
    state: list[Tensor]


RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda s, v: (s, v),
    "list": lambda s, v: [s, v],
    "dict": lambda s, v: {"spikes": s, "state": v},
    "named tuple": Named,
    "nested": lambda s, v: (s, (v, None)),
    "with integers": lambda s, v: (s, v, s.long(), "name"),
    "dataclass": lambda s, v: Fields(s, [v]),
}


def parts_of(value: Any) -> tuple[Tensor, Tensor]:
    if isinstance(value, dict):
        return value["spikes"], value["state"]
    if isinstance(value, Fields):
        return value.spikes, value.state[0]
    s, v, *_ = value
    return s, v[0] if isinstance(v, tuple) else v


class Neuron(nn.Module):
    """A spiking neuron that returns its spikes and its state."""

    def __init__(self, returned: str = "tuple") -> None:
        super().__init__()
        self.returned = returned
        self.decay = nn.Parameter(torch.tensor(0.8).double())

    def forward(self, current: Any, state: Any = None, *, gain: Any = None) -> Any:
        if isinstance(current, tuple):
            current, state = current
        if isinstance(state, list):
            (state,) = state
        v = current if state is None else self.decay * state + current
        v = v if gain is None else v * gain
        return RETURNED[self.returned](Spike.apply(v - 0.1), v - 0.1 * (v > 0.1))


class First(Neuron):
    """The spikes of a neuron alone, as one call."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        spikes: Tensor = parts_of(super().forward(*args, **kwargs))[0]
        return spikes


class Second(Neuron):
    """The state of a neuron alone, as one call."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        state: Tensor = parts_of(super().forward(*args, **kwargs))[1]
        return state


Step = Callable[[nn.Module, Tensor, Any], Any]
STEPS: dict[str, Step] = {
    "positions": lambda neuron, h, v: neuron(h, v),
    "keywords": lambda neuron, h, v: neuron(current=h, state=v),
    "both": lambda neuron, h, v: neuron(h, state=v),
    "a tuple": lambda neuron, h, v: neuron((h, v)),
    "a list": lambda neuron, h, v: neuron(h, [v]),
    "a keyword more": lambda neuron, h, v: neuron(h, v, gain=1.0),
}


class Network(nn.Module):
    """Three steps of a neuron, of which spikes and the last state are read out."""

    def __init__(self, step: Step, returned: str = "tuple", *, apart: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.apart = step, apart
        self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(8, 3, bias=False).double()
        self.neuron = Neuron(returned)
        self.of_spikes, self.of_state = First(), Second()

    def forward(self, x: Tensor) -> Tensor:
        h, v, z = self.first(x), torch.zeros(len(x), 8).double(), 0.0
        for _ in range(3):
            if self.apart:
                s, v = (self.step(part, h, v) for part in (self.of_spikes, self.of_state))
            else:
                s, v = parts_of(self.step(self.neuron, h, v))
            z = z + self.last(s)
        return z + self.last(v)


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize(
    ("step", "returned"),
    [*((step, "tuple") for step in STEPS), *(("both", name) for name in RETURNED)],
)
def test_each_output_of_a_layer_is_a_call_of_its_own(
    step: str, returned: str, normalization: str
) -> None:
    register_call_rule(Neuron, TwinRule())
    x = samples()
    model = Network(STEPS[step], returned)
    attributor = AbsLRP(model, normalization=normalization)
    with no_trace(model):
        relevance = attributor.attribute(x, 1)
    apart = AbsLRP(Network(STEPS["positions"], apart=True), normalization=normalization)
    assert relative_error(relevance, apart.attribute(x, 1)) < 1e-9
    one_by_one = torch.cat([attributor.attribute(sample[None], 1) for sample in x])
    assert relative_error(relevance, one_by_one) < 1e-9


def test_layers_with_several_outputs_are_inspected() -> None:
    register_call_rule(Neuron, TwinRule())
    calls = [call.call for call in inspect_rules(Network(STEPS["keywords"]), samples()).calls]
    assert calls.count("Neuron.forward") == 3


@pytest.mark.parametrize("step", STEPS)
def test_the_input_of_a_layer_that_is_one_call(step: str) -> None:
    register_call_rule(Neuron, TwinRule())
    maps = []
    for name in ("positions", step):
        model = Network(STEPS[name])
        attributor = LayerAbsLRP(model, model.neuron)
        maps.append(attributor.attribute(samples(), 1, call_index=1, attribute_to_layer_input=True))
    for actual, expected in zip(*maps, strict=True):
        assert torch.equal(actual, expected)
        assert bool(actual.any())


def test_a_container_that_a_layer_is_given_is_left_alone() -> None:
    class Unpacking(nn.Module):
        def forward(self, given: Fields) -> Tensor:
            return given.spikes * given.state[0].tanh()

    register_call_rule(Unpacking, TwinRule())

    def used_again(h: Tensor) -> Tensor:
        given = Fields(h, [h.relu()])
        z: Tensor = Unpacking()(given)
        return z + given.spikes + given.state[0]

    def made_twice(h: Tensor) -> Tensor:
        state = h.relu()
        z: Tensor = Unpacking()(Fields(h, [state]))
        return z + h + state

    x = samples()
    maps = [AbsLRP(ready(Between(calls), x)).attribute(x, 1) for calls in (used_again, made_twice)]
    torch.testing.assert_close(*maps)


class Remembering(nn.Module):
    """A neuron that keeps its state."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Any = 0.0

    def forward(self, current: Tensor) -> Tensor:
        self.v = 0.8 * self.v + current
        spikes: Tensor = Spike.apply(self.v - 0.1)
        self.v = self.v - 0.1 * spikes
        return spikes


class Accumulating(nn.Module):
    """A neuron that changes its state in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.full((1, 8), 0.3).double())

    def forward(self, current: Tensor) -> Tensor:
        self.v.mul_(0.8).add_(current.mean(0, keepdim=True))
        spikes: Tensor = Spike.apply(self.v + current)
        return spikes


@pytest.mark.filterwarnings("ignore:Expected .*whose state is used")
@pytest.mark.parametrize("kind", [Remembering, Accumulating])
def test_a_layer_is_run_back_from_the_state_that_it_had(kind: type[nn.Module]) -> None:
    register_call_rule(kind, TwinRule())
    x = samples(1)
    state = torch.full((1, 8), 0.3).double()

    def after_the_call(
        h: Tensor,
    ) -> Tensor:  # the spikes of the first call are read, not of the second
        layer = kind()
        layer.v = state.clone()  # type: ignore[assignment]
        spikes = layer(h)
        layer(h.detach() * -5)
        return spikes

    def alone(h: Tensor) -> Tensor:
        layer = kind()
        layer.v = state.clone()  # type: ignore[assignment]
        spikes: Tensor = layer(h)
        return spikes

    assert torch.equal(
        *(AbsLRP(ready(Between(c), x)).attribute(x, 1) for c in (after_the_call, alone))
    )


@pytest.mark.parametrize("kind", [Remembering, Accumulating])
def test_a_state_that_a_layer_keeps_is_warned_of(kind: type[nn.Module]) -> None:
    register_call_rule(kind, TwinRule())

    class Repeated(Between):
        def __init__(self) -> None:
            super().__init__(lambda h: self.layer(h) + self.layer(h))
            self.layer = kind()

    model = ready(Repeated(), samples(1))
    with pytest.warns(
        UserWarning, match=r"`layer`.*whose state is used.*take its state as an argument"
    ):
        AbsLRP(model).attribute(samples(1), 1)


class Peeking(nn.Module):
    """A layer that uses what it was not given."""

    def forward(self, h: Tensor) -> Tensor:
        return h * self.seen.tanh()  # type: ignore[union-attr, operator]


class Overwriting(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.mul_(2).tanh()


def test_what_a_registered_layer_must_not_do() -> None:
    register_call_rule(Peeking, TwinRule())
    register_call_rule(Overwriting, TwinRule())

    def peek(h: Tensor) -> Tensor:
        layer = Peeking()
        layer.seen = h.relu()  # type: ignore[assignment]
        return layer(h)

    with pytest.raises(UnsupportedCallError, match="only through its arguments.*Pass that tensor"):
        explain(peek)
    with pytest.raises(UnsupportedCallError, match="modified in place. Pass it by position"):
        explain(lambda h: Overwriting()(h=h))
    assert torch.equal(explain(lambda h: Overwriting()(h)), explain(lambda h: (h * 2).tanh()))


def test_a_rule_of_captums_knows_positions_only() -> None:
    layer = Neuron()
    layer.rule = EpsilonRule()
    with pytest.raises(TypeError, match="to return one tensor, but got tuple"):
        explain(lambda h: layer(h)[0])
    layer = First()
    layer.rule = EpsilonRule()
    with pytest.raises(TypeError, match="but got keyword arguments or containers of tensors"):
        explain(lambda h: layer((h, None)))


def square(h: Tensor) -> Tensor:
    return h.view(-1, 2, 4)


SEVERAL: dict[str, Calls] = {
    "linalg_svd": lambda h: torch.linalg.svd(square(h), full_matrices=False).S,
    "linalg_qr": lambda h: torch.cat([t.flatten(1) for t in torch.linalg.qr(square(h).mT)], 1),
    "linalg_slogdet": lambda h: h * torch.linalg.slogdet(square(h)[..., :2])[1][:, None],
    "linalg_inv": lambda h: torch.linalg.inv(square(h)[..., :2]).flatten(1),
    "cummax": lambda h: h.cummax(1).values,
    "aminmax": lambda h: torch.stack(torch.aminmax(h, dim=1), 1),
    "nanmedian": lambda h: h * h.nanmedian(1, keepdim=True)[0],
    "gradient": lambda h: torch.gradient(h, dim=1)[0],
    "frexp": lambda h: torch.frexp(h).mantissa,
}
ONE: dict[str, Calls] = {
    "hypot": lambda h: torch.hypot(h, h.tanh()),
    "atan2": lambda h: torch.atan2(h, h.exp()),
    "xlogy": lambda h: torch.xlogy(h, h.exp() + 1),
    "copysign": lambda h: torch.copysign(h, COUNTS),
    "remainder": lambda h: h + h % 2,
    "diff": torch.diff,
    "trapezoid": lambda h: torch.trapezoid(square(h), torch.arange(4.0).double()),
    "cumulative_trapezoid": lambda h: torch.cumulative_trapezoid(h),
    "quantile": lambda h: square(h).quantile(0.3, dim=1),
    "erfinv": lambda h: torch.special.erfinv(h.tanh()),
    "i0e": torch.special.i0e,
    "gammainc": lambda h: torch.special.gammainc(LENGTHS.double(), h.abs()),
    "embedding_bag": lambda h: F.embedding_bag(
        torch.arange(8).expand(len(h), 8), matrix(True), per_sample_weights=h, mode="sum"
    ),
    "embedding": lambda h: torch.stack(
        [F.embedding(torch.tensor([0, 2, 3]), row.view(4, 2)).flatten() for row in h]
    ),
    "linalg_det": lambda h: h * torch.linalg.det(square(h)[..., :2])[:, None],
    "affine_grid": lambda h: F.affine_grid(
        h[:, :6].view(-1, 2, 3), [len(h), 1, 2, 2], align_corners=False
    ).flatten(1),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SEVERAL, *ONE])
def test_the_twin_rule_suits_a_call_as_the_message_promises(name: str) -> None:
    calls = {**SEVERAL, **ONE}[name]
    with pytest.raises(UnsupportedCallError) as caught:
        explain(calls)
    told = re.search(r'register_call_rule\("(\w+)"', str(caught.value))
    assert told is not None and told[1] == name
    explain(calls, get_mapping().extended({told[1]: TwinRule()}))


BROADCAST: dict[str, tuple[Calls, Calls]] = {
    "column": (
        lambda h: torch.where(MASK, h[:, :1], h),
        lambda h: torch.where(MASK, h[:, :1].expand_as(h), h),
    ),
    "other": (
        lambda h: torch.where(MASK, h, h[:, 0].unsqueeze(1)),
        lambda h: torch.where(MASK, h, h[:, :1].expand_as(h)),
    ),
    "both": (
        lambda h: torch.where(MASK, h[:, :1], h[:, 1:2]),
        lambda h: torch.where(MASK, h[:, :1].expand_as(h), h[:, 1:2].expand_as(h)),
    ),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_relevance_of_what_is_broadcast_is_added_up(name: str) -> None:
    torch.testing.assert_close(*map(explain, BROADCAST[name]), rtol=1e-12, atol=1e-12)


def test_a_call_that_cannot_be_differentiated_is_refused_with_a_remedy() -> None:
    class Step(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return (h > 0).double()

    step = Step()
    rules = {"round": TwinRule()}
    assert bool(explain(lambda h: h * h.round(), get_mapping().extended(rules)).any())
    register_call_rule(Step, TwinRule())
    with pytest.raises(
        UnsupportedCallError, match=r"Step.* to be differentiable.*ConstantRule\(\)"
    ):
        explain(lambda h: h * step(h))
    register_call_rule(Step, ConstantRule(), overwrite=True)
    assert torch.equal(explain(lambda h: h * step(h)), explain(lambda h: h * (h > 0)))


@pytest.mark.parametrize(
    "calls", [torch.diag_embed, lambda h: torch.stack([torch.block_diag(r) for r in h])]
)
def test_matrices_of_blocks_move_elements(calls: Calls) -> None:
    explain(lambda h: calls(h).flatten(1))


# --- lazy layers -----------------------------------------------------------------------------------

LAZY: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
    "convolution": lambda: nn.Sequential(
        nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    ),
    "norm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.Linear(144, 3)
    ),
    "inside": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.LazyLinear(4)), nn.ReLU(), nn.Linear(4, 3)
    ),
}  # fmt: skip


def layer_of(model: nn.Module) -> nn.Module:
    return model[0]  # type: ignore[index]


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize(
    "attempt",
    [
        lambda model, x: AbsLRP(model).attribute(x, 1),
        lambda model, x: AbsLRP(model).attribute(x, 1, internal_batch_size="auto"),
        lambda model, x: LayerAbsLRP(model, layer_of(model)).attribute(x, 1),
        lambda model, x: inspect_rules(model, x),
    ],
    ids=["AbsLRP", "in parts", "LayerAbsLRP", "inspect_rules"],
)
def test_a_lazy_layer_has_to_run_first(name: str, attempt: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, x = LAZY[name]().eval(), images().float()
    lazy = {key: type(value) for key, value in model.named_parameters()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(
        ValueError, match=r"uninitialized lazy layer, `\d.*` \(Lazy.*Run the model once: `mod"
    ):
        attempt(model, x)
    assert {key: type(value) for key, value in model.named_parameters()} == lazy
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    model(x)
    attempt(model, x)


# --- outputs without the dimension of the samples ---------------------------------------------------


class Squeezed(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.where = where
        self.conv = nn.Conv2d(3, 4, 3).double()
        self.head = nn.Linear(4, 1 if where == "one score" else 3).double()
        nn.init.ones_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu()
        if self.where == "inside":
            return self.head(h.mean((2, 3), keepdim=True).squeeze())
        if self.where == "before the mean":
            return self.head(h.squeeze().mean((-2, -1)))
        z = self.head(h.mean((2, 3)))
        return z.squeeze()


@pytest.mark.parametrize("where", ["at the end", "inside", "before the mean", "one score"])
def test_squeezed_outputs_of_one_sample_are_its_row(where: str) -> None:
    model, x = Squeezed(where), images()
    assert model(x[:1]).dim() < 2
    target = None if where == "one score" else 1
    relevance = AbsLRP(model).attribute(x, target)
    one_by_one = [AbsLRP(model).attribute(sample[None], target) for sample in x]
    torch.testing.assert_close(relevance, torch.cat(one_by_one), rtol=1e-9, atol=1e-12)
    assert bool(relevance.any())
    in_parts = AbsLRP(model).attribute(x, target, internal_batch_size=1)
    torch.testing.assert_close(in_parts, relevance, rtol=1e-9, atol=1e-12)
    of_layer = LayerAbsLRP(model, model.conv)
    torch.testing.assert_close(
        torch.cat([of_layer.attribute(sample[None], target) for sample in x]),
        of_layer.attribute(x, target),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("reduce", [lambda z: z.sum(), lambda z: z.mean(0), lambda z: z.amax(0)])
def test_scores_of_all_samples_together_are_refused(reduce: Calls, count: int) -> None:
    model = ready(Between(lambda h: h), samples())
    model.forward = lambda x: reduce(model.first(x))  # type: ignore[method-assign, operator]
    with pytest.raises(ValueError, match="one row per sample"):
        AbsLRP(model).attribute(samples(count), None if reduce(torch.ones(2, 2)).dim() == 0 else 1)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 3)), (6,)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(0), nn.Linear(32, 3)), (1, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(0), nn.Linear(32, 3)), (3, 6, 6)),
    ],
)
def test_inputs_without_samples_are_refused(model: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"batch dimension.*`x\.unsqueeze\(0\)`"):
        AbsLRP(model).attribute(torch.rand(shape), 1)


# --- transforms of functions -------------------------------------------------------------------------


class Ensemble(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        members = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(3)]
        self.members = nn.ModuleList(members).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def stacked(model: Any, x: Tensor) -> Tensor:
    params, buffers = stack_module_state(list(model.members))
    base = model.members[0]
    return vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers).mean(0)


def looped(model: Any, x: Tensor) -> Tensor:
    params, _ = stack_module_state(list(model.members))
    base, members = model.members[0], len(model.members)
    each = [
        functional_call(base, {name: value[i] for name, value in params.items()}, (x,))
        for i in range(members)
    ]
    return torch.stack(each).mean(0)


TRANSFORMED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ensemble": stacked,
    "samples": lambda model, x: vmap(model.members[0])(x),
    "captured": lambda model, x: vmap(lambda w: x * w)(torch.arange(3.0).double()).sum(0),
    "gradient": lambda model, x: grad(lambda y: model.members[0](y).square().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(
        UnsupportedCallError, match=r"transform of `torch\.func` \(`vmap`.*by a loop"
    ):
        AbsLRP(Ensemble(TRANSFORMED[name])).attribute(samples(), 1)


def test_the_remedies_for_transforms_work() -> None:
    def plain(model: Any, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in model.members]).mean(0)

    maps = [AbsLRP(Ensemble(run)).attribute(samples(), 1) for run in (looped, plain)]
    assert torch.equal(*maps)
    AbsLRP(Ensemble(lambda model, x: model.members[0](x))).attribute(samples(), 1)


def test_transforms_of_constants_are_constants() -> None:
    def masked(model: Any, x: Tensor) -> Tensor:
        return model.members[0](x * vmap(torch.sin)(torch.arange(6.0).double()))

    def plain(model: Any, x: Tensor) -> Tensor:
        return model.members[0](x * torch.arange(6.0).double().sin())

    maps = [AbsLRP(Ensemble(run)).attribute(samples(), 1) for run in (masked, plain)]
    assert torch.equal(*maps)


def test_a_functional_call_is_a_call() -> None:
    def called(model: Any, x: Tensor) -> Tensor:
        return functional_call(model.members[0], dict(model.members[1].named_parameters()), (x,))

    model = Ensemble(called)
    with no_trace(model):
        relevance = AbsLRP(model).attribute(samples(), 1)
    plain = AbsLRP(Ensemble(lambda model, x: model.members[1](x))).attribute(samples(), 1)
    assert torch.equal(relevance, plain)


# --- attributes named `rule` -------------------------------------------------------------------------


class Hebbian(nn.Linear):
    rule: Any = "hebbian"


def with_rule(rule: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3).double()
    layer.rule = rule
    return nn.Sequential(layer)


def of_a_class() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Hebbian(6, 3).double())


OWN: dict[str, Callable[[], nn.Module]] = {
    "of the class": of_a_class,
    "module": lambda: with_rule(nn.Linear(2, 2)),
    "parameter": lambda: with_rule(nn.Parameter(torch.ones(2))),
    "tensor": lambda: with_rule(torch.ones(2)),
    "number": lambda: with_rule(3),
    "None": lambda: with_rule(None),
    "function": lambda: with_rule(lambda: None),
}


@pytest.mark.parametrize("name", OWN)
def test_a_models_own_rule_is_its_own(name: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 3).double())
    model, x = OWN[name](), samples()
    assert torch.equal(AbsLRP(model).attribute(x, 1), AbsLRP(plain).attribute(x, 1))
    LayerAbsLRP(model, layer_of(model)).attribute(x, 1)


@pytest.mark.parametrize("rule", ["epsilon", EpsilonRule, AbsLRPRule, dict], ids=str)
@pytest.mark.parametrize("made", [lambda m: AbsLRP(m), lambda m: LayerAbsLRP(m, m[0])])
def test_what_looks_like_a_rule_is_refused(rule: Any, made: Callable[[Any], AbsLRP]) -> None:
    model, x = with_rule(rule), samples()
    message = r"`rule` of `0` to be.*an instance of a rule class.*layer.__class__ = type\("
    with pytest.raises(TypeError, match=message):
        made(model)
    layer = layer_of(model)
    del layer.rule
    attributor = made(model)
    layer.rule = rule
    with pytest.raises(TypeError, match=message):
        attributor.attribute(x, 1)
    layer.rule = AbsLRPRule()  # it is meant as a rule
    attributor.attribute(x, 1)


def test_the_remedy_for_a_models_own_rule_works() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.rule = "hebbian"

    layer = Own().double()
    with pytest.raises(TypeError, match="but got 'hebbian'"):
        AbsLRP(nn.Sequential(layer))
    layer.__class__ = type(  # type: ignore[assignment]  # as the message says
        type(layer).__name__, (type(layer),), {"rule": layer.__dict__.pop("rule")}
    )
    assert not hasattr(Own, "rule")
    AbsLRP(nn.Sequential(layer)).attribute(samples(), 1)
    assert layer.rule == "hebbian"


SELECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda h: h[MASK[: h.shape[1]].expand_as(h)].view(len(h), -1),
    "masked_select": lambda h: h.masked_select(MASK[: h.shape[1]].expand_as(h)).view(len(h), -1),
    "where": lambda h: torch.where(MASK[: h.shape[1]].expand_as(h), h, 0.0),
}


@pytest.mark.parametrize("name", SELECTED)
def test_masks_that_are_laid_out_like_the_input(name: str) -> None:
    explain(SELECTED[name])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_argument_is_for_all_samples(layout: str) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.b(torch.stack([torch.sparse.mm(edges, h) for h in self.a(x)]).mean(1))

    edges = getattr(torch.rand(6, 6, dtype=torch.float64).round(), layout)()
    x = torch.randn(6, 6, 4, dtype=torch.float64)  # as many samples as nodes
    together = AbsLRP(Graph()).attribute(x, 1, edges)
    single = torch.cat([AbsLRP(Graph()).attribute(i[None], 1, edges) for i in x])
    assert relative_error(together, single) < 1e-9
    assert torch.equal(AbsLRP(Graph()).attribute(x, 1, edges, internal_batch_size=2), together)


@pytest.mark.parametrize("rule", [TwinRule, "twin", None], ids=str)
def test_a_wrong_rule_in_a_mapping_is_refused(rule: Any) -> None:
    with pytest.raises(
        TypeError, match="rule of 'linear' in mapping .* to be an instance of a rule"
    ):
        get_mapping().extended({"linear": rule})
