"""Complex calls: rules see real and imaginary part as two real numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_abslrp import (
    AbsLRP,
    LayerAbsLRP,
    UnsupportedCallError,
    inspect_rules,
    register_call_rule,
    trace_relevance,
)
from captum_abslrp.interception import Interception
from captum_abslrp.mappings import At, get_mapping, registry
from captum_abslrp.propagation import TOTAL, propagate
from captum_abslrp.rules import AbsLRPRule, Rule, TwinRule

EPS = 1e-9
Function = Callable[..., Any]


def draw(seed: int, *shape: int, cplx: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(*shape, *[2] * cplx, generator=generator, dtype=torch.float64).to(dtype)
    return torch.view_as_complex(parts) if cplx else parts


def real_view(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def found_by_rule(
    function: Function, inputs: Sequence[Tensor], relevance: Tensor, rule: Rule | None = None
) -> list[Tensor]:
    """What the real views of the inputs get from a call, for relevance of the real view of its output."""
    leaves = [real_view(x).clone().requires_grad_() for x in inputs]
    given = [leaf.clone() for leaf in leaves]
    find = get_mapping().rule_of_call if rule is None else lambda call: rule
    with Interception(find, batch_size=1, total=TOTAL):
        args = [torch.view_as_complex(t) if x.is_complex() else t for t, x in zip(given, inputs)]
        output = function(*args)
        output = torch.view_as_real(output) if output.is_complex() else output.clone()
    return [r[0] for r in propagate(output, leaves, relevance.unsqueeze(0))]


def on_view(function: Function, inputs: Sequence[Tensor], i: int) -> Callable[[Tensor], Tensor]:
    """The call as a function of the real view of one input, with a real view for a result."""

    def of_view(view: Tensor) -> Tensor:
        x = torch.view_as_complex(view) if inputs[i].is_complex() else view
        return real_view(function(*inputs[:i], x, *inputs[i + 1 :]))

    return of_view


def share(relevance: Tensor) -> Tensor:
    return relevance / relevance.abs().sum().clamp(min=1e-30)


def literal(
    function: Callable[[Tensor], Tensor],
    twin: Callable[[Tensor], Tensor],
    x: Tensor,
    relevance: Tensor,
) -> Tensor:
    """``x d/dx <s, f(x) + twin(|x|)>``, scaled to one."""
    x = x.clone().requires_grad_()
    output = function(x)
    s = relevance / (output.detach().abs() + EPS)
    (gradient,) = torch.autograd.grad((s * (output + twin(x.abs()))).sum(), x)
    return share(x.detach() * gradient)


def as_affine(function: Callable[[Tensor], Tensor], view: Tensor) -> Callable[[Tensor], Tensor]:
    """The twin of a call that is linear in a real view: the explicit real block matrix, in magnitude."""
    matrix = torch.autograd.functional.jacobian(function, view)
    rank = view.dim()
    return lambda x: torch.tensordot(matrix.abs(), x, rank)


def assert_affine(function: Function, *inputs: Tensor, sources: Sequence[int] = (0,)) -> None:
    """The rule is that of the explicit real block form, for each source with the others fixed."""
    fixed = {i: x for i, x in enumerate(inputs) if i not in sources}
    free = [inputs[i] for i in sources]

    def call(*args: Tensor) -> Any:
        rest = iter(args)
        return function(*(fixed[i] if i in fixed else next(rest) for i in range(len(inputs))))

    relevance = torch.rand_like(real_view(call(*free)))
    found = found_by_rule(call, free, relevance)
    for i, (got, x) in enumerate(zip(found, free)):
        of_view = on_view(call, free, i)
        constant = of_view(torch.zeros_like(real_view(x)))
        linear = as_affine(lambda v, f=of_view, c=constant: f(v) - c, real_view(x))
        expected = literal(of_view, linear, real_view(x), relevance)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


# -------------------------------------------------------------------------- closed forms of the calls


PRODUCTS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "mul": (torch.mul, (draw(1, 2, 3), draw(2, 2, 3))),
    "mul, broadcast": (torch.mul, (draw(1, 2, 1, 3), draw(2, 4, 1))),
    "mul by real": (torch.mul, (draw(1, 2, 3), draw(2, 2, 3, cplx=False))),
    "mul of real": (torch.mul, (draw(1, 3, cplx=False), draw(2, 2, 3))),
    "mul by one number of a tensor": (torch.mul, (draw(1, 2, 3), draw(2))),
    "matmul": (torch.matmul, (draw(1, 2, 3), draw(2, 3, 4))),
    "operator": (lambda a, b: a @ b, (draw(1, 2, 3), draw(2, 3, 4))),
    "matmul of vectors": (torch.matmul, (draw(1, 2, 3), draw(2, 3))),
    "matmul, broadcast": (torch.matmul, (draw(1, 2, 2, 3), draw(2, 3, 4))),
    "matmul of real": (lambda a, b: a.to(b.dtype) @ b, (draw(1, 2, 3, cplx=False), draw(2, 3, 4))),
    "bmm": (torch.bmm, (draw(1, 2, 2, 3), draw(2, 2, 3, 2))),
    "dot": (torch.dot, (draw(1, 3), draw(2, 3))),
    "outer": (torch.outer, (draw(1, 3), draw(2, 2))),
    "inner": (torch.inner, (draw(1, 2, 3), draw(2, 4, 3))),
    "kron": (torch.kron, (draw(1, 2, 2), draw(2, 1, 3))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=1), (draw(1, 2, 3), draw(2, 3, 2))),
    "einsum": (lambda a, b: torch.einsum("bixy,ioxy->boxy", a, b),
               (draw(1, 2, 3, 2, 2), draw(2, 3, 2, 2, 2))),
    "einsum of a list": (lambda a, b: torch.einsum("bi,io->bo", [a, b]), (draw(1, 2, 3), draw(2, 3, 2))),
    "linear": (F.linear, (draw(1, 2, 3), draw(2, 4, 3))),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1, stride=2), (draw(1, 1, 2, 5), draw(2, 3, 2, 3))),
    "conv2d": (lambda x, w: F.conv2d(x, w, groups=2), (draw(1, 1, 2, 3, 3), draw(2, 2, 1, 2, 2))),
    "conv_transpose1d": (F.conv_transpose1d, (draw(1, 1, 2, 3), draw(2, 2, 2, 2))),
}  # fmt: skip


@pytest.mark.parametrize("sources", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_affine_in_each_factor(name: str, sources: tuple[int, ...]) -> None:
    function, inputs = PRODUCTS[name]
    assert_affine(function, *inputs, sources=sources)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_products_of_drawn_shapes(seed: int, b: int, i: int, o: int, flipped: bool) -> None:
    a, w, v = draw(seed, b, i), draw(seed + 1, i, o), draw(seed + 2, i)
    assert_affine(torch.matmul, a, w, sources=(int(flipped),))
    assert_affine(torch.mul, a, v, sources=(0, 1))


AFFINE: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "div": (torch.div, (draw(1, 2, 3), draw(2, 3))),
    "div by a complex number": (lambda x: x / (1 - 2j), (draw(1, 2, 3),)),
    "div of real": (torch.div, (draw(1, 2, 3, cplx=False), draw(2, 3))),
    "div by real": (torch.div, (draw(1, 2, 3), draw(2, 3, cplx=False))),
    "mul by a complex number": (lambda x: (1 - 2j) * x, (draw(1, 2, 3),)),
    "linear with bias": (lambda x: F.linear(x, draw(2, 4, 3), draw(3, 4)), (draw(1, 2, 3),)),
    "conv with bias": (lambda x: F.conv1d(x, draw(2, 4, 3, 2), draw(3, 4)), (draw(1, 1, 3, 4),)),
    "mean": (lambda x: x.mean(-1), (draw(1, 2, 3),)),
    "sum": (lambda x: torch.sum(x, (0, 1)), (draw(1, 2, 3, 2),)),
    "cumsum": (lambda x: x.cumsum(1), (draw(1, 2, 3),)),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_calls(name: str) -> None:
    function, inputs = AFFINE[name]
    assert_affine(function, *inputs)


SUMS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "add": (torch.add, (draw(1, 2, 3), draw(2, 3))),
    "add with a factor": (lambda a, b: torch.add(a, b, alpha=-2), (draw(1, 2, 3), draw(2, 3))),
    "sub": (torch.sub, (draw(1, 2, 3), draw(2, 2, 1))),
    "real and complex": (lambda a, b: a + b, (draw(1, 2, 3, cplx=False), draw(2, 2, 3))),
    "a complex number": (lambda a: a + (1 - 2j), (draw(1, 2, 3),)),
    "a real number": (lambda a: 2 - a, (draw(1, 2, 3),)),
    "baddbmm": (
        lambda c, a, b: torch.baddbmm(c, a, b, beta=2, alpha=-1),
        (draw(1, 2, 2, 2), draw(2, 2, 2, 3), draw(3, 2, 3, 2)),
    ),
    "addmm": (torch.addmm, (draw(1, 2), draw(2, 2, 3), draw(3, 3, 2))),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_affine_in_each_summand(name: str) -> None:
    function, inputs = SUMS[name]
    assert_affine(function, *inputs, sources=range(len(inputs)))


TRANSFORMS: dict[str, tuple[Function, Tensor]] = {
    "fft": (torch.fft.fft, draw(1, 2, 5)),
    "fft of real": (lambda x: torch.fft.fft(x, dim=1), draw(1, 2, 3, 2, cplx=False)),
    "ifft": (lambda x: torch.fft.ifft(x, n=4, norm="ortho"), draw(1, 2, 5)),
    "rfft": (torch.fft.rfft, draw(1, 2, 6, cplx=False)),
    "irfft": (lambda x: torch.fft.irfft(x, n=5), draw(1, 2, 3)),
    "hfft": (torch.fft.hfft, draw(1, 2, 3)),
    "hfft of real": (torch.fft.hfft, draw(1, 2, 3, cplx=False)),
    "ihfft": (torch.fft.ihfft, draw(1, 2, 4, cplx=False)),
    "fft2": (lambda x: torch.fft.fft2(x, norm="ortho"), draw(1, 2, 3, 4)),
    "ifft2": (torch.fft.ifft2, draw(1, 2, 3, 4)),
    "rfft2": (lambda x: torch.fft.rfft2(x, dim=(1, 2)), draw(1, 2, 3, 4, 2, cplx=False)),
    "irfft2": (lambda x: torch.fft.irfft2(x, s=(4, 4)), draw(1, 2, 4, 3)),
    "fftn": (lambda x: torch.fft.fftn(x, dim=(1, 2)), draw(1, 2, 3, 2)),
    "ifftn": (lambda x: torch.fft.ifftn(input=x, s=(2, 2)), draw(1, 2, 3, 2)),
    "rfftn": (torch.fft.rfftn, draw(1, 2, 3, 4, cplx=False)),
    "irfftn": (torch.fft.irfftn, draw(1, 2, 3, 3)),
    "stft": (lambda x: torch.stft(x, 4, window=torch.hann_window(4, dtype=x.dtype),
                                  return_complex=True), draw(1, 2, 12, cplx=False)),
    "istft": (lambda x: torch.istft(x, 4, window=torch.ones(4, dtype=torch.float64)), draw(1, 2, 3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("rule", [None, AbsLRPRule(), TwinRule()], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_linear_without_weights(name: str, rule: Rule | None) -> None:
    function, x = TRANSFORMS[name]
    of_view = on_view(function, [x], 0)
    relevance = torch.rand_like(of_view(real_view(x)))
    (got,) = found_by_rule(function, [x], relevance, rule)
    expected = literal(of_view, of_view, real_view(x), relevance)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_the_magnitude_is_the_norm_of_the_parts() -> None:
    x = draw(1, 2, 3)

    def norm(view: Tensor) -> Tensor:
        return torch.linalg.vector_norm(view, dim=-1)

    relevance = torch.rand(2, 3, dtype=torch.float64)
    for function in (torch.abs, Tensor.abs, abs, torch.absolute):
        (got,) = found_by_rule(function, [x], relevance)
        torch.testing.assert_close(got, literal(norm, norm, real_view(x), relevance))


# ------------------------------------------------------------------------------------------ the twin


BY_DEFINITION: dict[str, tuple[Function, Tensor]] = {
    "mul": (lambda x: x * x.new_tensor([2, 2, 2]), draw(1, 2, 3)),
    "matmul": (lambda x: x @ torch.ones(3, 2, dtype=x.dtype), draw(1, 2, 3)),
    "fft_rfft": (torch.fft.rfft, draw(1, 2, 4, cplx=False)),
    "fft_irfft2": (torch.fft.irfft2, draw(1, 2, 3, 3)),
    "abs": (torch.abs, draw(1, 2, 3)),
    "angle": (torch.angle, draw(1, 2, 3)),
    "tanh": (torch.tanh, draw(1, 2, 3)),
    "sqrt": (torch.sqrt, draw(1, 2, 3)),
    "exp": (torch.exp, draw(1, 2, 3)),
    "square": (torch.square, draw(1, 2, 3)),
    "prod": (lambda x: x.prod(1), draw(1, 2, 3)),
    "var": (lambda x: x.var(1), draw(1, 2, 3)),
    "linalg_vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=1), draw(1, 2, 3)),
}


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_twin_rule_is_the_definition_on_the_real_view(name: str) -> None:
    """The constants here are positive numbers, so that their magnitude is what they are."""
    function, x = BY_DEFINITION[name]
    of_view = on_view(function, [x], 0)
    relevance = torch.rand_like(of_view(real_view(x)))
    (got,) = found_by_rule(function, [x], relevance, TwinRule())
    expected = literal(of_view, of_view, real_view(x), relevance)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_twin_rule_takes_the_magnitude_of_the_parts_of_weights() -> None:
    x, w = draw(1, 2, 3), draw(2, 3)
    relevance = torch.rand(2, 3, 2, dtype=torch.float64)
    (got,) = found_by_rule(lambda x: x * w, [x], relevance, TwinRule())
    sizes = torch.view_as_complex(torch.view_as_real(w).abs())
    expected = literal(
        on_view(lambda x: x * w, [x], 0), on_view(lambda x: x * sizes, [x], 0), real_view(x), relevance
    )
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


class OneCall(nn.Module):
    """A complex call between two linear layers."""

    def __init__(self, function: Function, features: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last = nn.Linear(6, 8), nn.LazyLinear(3)
        self.double().eval()(torch.zeros(1, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = self.function(torch.view_as_complex(self.first(x).view(len(x), -1, 2)))
        return self.last((torch.view_as_real(z) if z.is_complex() else z).flatten(1))


REFUSED: dict[str, Function] = {
    "angle": torch.angle,
    "tanh": lambda z: z.tanh(),
    "log": lambda z: (z + 3).log(),
    "pow": lambda z: z**2,
    "normalize": lambda z: F.normalize(z, dim=1),
    "vdot": lambda z: torch.stack([torch.vdot(row, row) for row in z]).unsqueeze(1),
}


@pytest.mark.parametrize("remedy", ["mapping", "place", "module"])
@pytest.mark.parametrize("name", REFUSED)
def test_remedies_of_refused_calls_work(name: str, remedy: str) -> None:
    model, x = OneCall(REFUSED[name]), draw(5, 2, 6, cplx=False)
    with pytest.raises(UnsupportedCallError, match=rf"{name}.*TwinRule"):
        AbsLRP(model).attribute(x, 1)
    inspection = inspect_rules(model, x)
    assert {call.call.rpartition(".")[2].strip("_") for call in inspection.unsupported} == {name}
    mapping = None
    if remedy == "mapping":
        mapping = get_mapping().extended({name: TwinRule()})
    elif remedy == "place":
        mapping = get_mapping().extended({At("", call=name): TwinRule()})
    else:
        model.rule = TwinRule()  # type: ignore[assignment]
    relevance = AbsLRP(model, mapping).attribute(x, 1, contrast=None)
    assert relevance.isfinite().all() and (relevance != 0).any(1).all()
    assert not inspect_rules(model, x, mapping=mapping).unsupported


@pytest.mark.parametrize("name", ["angle", "asinh"])
def test_a_registered_rule_answers_complex_calls(name: str) -> None:
    function = getattr(torch, name)
    model, x = OneCall(function), draw(5, 2, 6, cplx=False)
    register_call_rule(function, TwinRule())
    try:
        got = AbsLRP(model).attribute(x, 1)
    finally:
        del registry._CALL_RULES[name]
    mapping = get_mapping().extended({name: TwinRule()})
    torch.testing.assert_close(got, AbsLRP(model, mapping).attribute(x, 1))


class Spectrum(nn.Module):
    """A layer from complex to complex tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(7, 4))

    def forward(self, z: Tensor) -> Tensor:
        return torch.fft.fft(z) * self.weight


class Layered(OneCall):
    def __init__(self) -> None:
        super().__init__(lambda z: z)
        self.function = Spectrum()


@pytest.mark.parametrize("by", ["class", "rule"])
def test_layers_of_complex_tensors_as_one_call(by: str) -> None:
    model, x = Layered(), draw(5, 2, 6, cplx=False)
    assert isinstance(model.function, Spectrum)
    plain = AbsLRP(model).attribute(x, 1)
    register_call_rule(Spectrum, TwinRule())
    try:
        if by == "rule":
            model.function.rule = TwinRule()  # type: ignore[assignment]
        got = AbsLRP(model).attribute(x, 1)
        single = [AbsLRP(model).attribute(row, 1) for row in x.split(1)]
        assert [c.call for c in inspect_rules(model, x).calls].count("Spectrum.forward") == 1
    finally:
        del registry._LAYER_RULES[Spectrum]
    torch.testing.assert_close(got, torch.cat(single))
    assert got.isfinite().all() and got.abs().sum() > 0.01
    assert not torch.allclose(got, plain)


def test_rules_of_captum_are_refused_on_complex_layers() -> None:
    model = Layered()
    model.function.rule = captum.attr._utils.lrp_rules.EpsilonRule()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"EpsilonRule.*real tensors, but got complex"):
        AbsLRP(model).attribute(draw(5, 2, 6, cplx=False), 1)


# ------------------------------------------------------------------------- models and their real twins


class Rotated(nn.Module):
    """Rotary embedding, in one of several spellings, or as linear layers."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.angles = torch.arange(4, dtype=torch.float64) * 2 - 1
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        phases = torch.polar(torch.ones_like(self.angles), self.angles)
        pairs = h.view(len(x), -1, 2)
        if self.spelling == "linear":
            blocks = [
                torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])])
                for a in self.angles
            ]
            return self.last(F.linear(h, torch.block_diag(*blocks)))
        if self.spelling == "complex":
            z = torch.complex(pairs[..., 0], pairs[..., 1]) * phases
        elif self.spelling == "in place":
            z = torch.view_as_complex(pairs)
            z *= phases
        elif self.spelling == "out":
            z = torch.view_as_complex(pairs)
            torch.mul(z, phases, out=z)
        elif self.spelling == "set":
            z = torch.zeros(len(x), 4, dtype=torch.complex128)
            z[:, :] = torch.view_as_complex(pairs)
            z.mul_(phases)
        elif self.spelling == "matrix":
            z = torch.view_as_complex(pairs) @ torch.diag(phases)
        elif self.spelling == "reversed":
            z = phases * torch.view_as_complex(pairs.flip(1))[:, [3, 2, 1, 0]]
        elif self.spelling == "conjugate":
            z = (torch.view_as_complex(pairs) * phases).conj().resolve_conj()
            z = torch.stack([z.real, -z.imag], -1)
            return self.last(z.flatten(1))
        elif self.spelling == "parts":
            z = torch.view_as_complex(pairs) * phases
            return self.last(torch.stack([z.real, torch.imag(z)], -1).flatten(1))
        else:
            z = torch.view_as_complex(pairs) * phases
        return self.last(torch.view_as_real(z).flatten(1))


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize(
    "spelling",
    "plain complex in_place out set matrix reversed conjugate parts".split(),
)
def test_a_rotation_is_the_linear_layer_that_it_is(spelling: str, normalization: str) -> None:
    x = draw(3, 3, 6, cplx=False)
    got, expected = (
        AbsLRP(Rotated(s), normalization=normalization).attribute(x, 1)
        for s in (spelling.replace("_", " "), "linear")
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


class ComplexNet(nn.Module):
    """A network of complex linear layers, or of the real ones they are."""

    def __init__(self, *, real: bool, how: str) -> None:
        super().__init__()
        self.real, self.how = real, how
        self.weights = [draw(1, 4, 3), draw(2, 2, 4)]
        self.bias = draw(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.real:
            for i, w in enumerate(self.weights):
                blocks = torch.stack([torch.stack([w.real, -w.imag], -1),
                                      torch.stack([w.imag, w.real], -1)], 1)  # fmt: skip
                weight = blocks.permute(0, 1, 2, 3).reshape(2 * len(w), -1)
                bias = torch.view_as_real(self.bias).flatten() if i == 0 else None
                x = F.linear(x, weight, bias)
                if i == 0:
                    x = F.relu(x)
            return x
        z = torch.view_as_complex(x.unflatten(1, (-1, 2)))
        first, second = self.weights
        z = F.linear(z, first, self.bias)
        z = torch.view_as_complex(torch.view_as_real(z).relu())
        if self.how == "matmul":
            z = z @ second.T
        elif self.how == "einsum":
            z = torch.einsum("bi,oi->bo", z, second)
        elif self.how == "conjugate":
            z = z @ second.conj().mH
        else:
            z = F.conv1d(z.unsqueeze(-1), second.unsqueeze(-1)).squeeze(-1)
        return torch.view_as_real(z).flatten(1)


@pytest.mark.parametrize("how", ["matmul", "einsum", "conjugate", "conv1d"])
@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_complex_layers_are_real_block_layers(how: str, normalization: str) -> None:
    x = draw(9, 3, 6, cplx=False)
    model, twin = (ComplexNet(real=real, how=how) for real in (False, True))
    torch.testing.assert_close(model(x), twin(x))
    got, expected = (
        AbsLRP(m, normalization=normalization).attribute(x, 2) for m in (model, twin)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "conjugated",
    [torch.conj, Tensor.conj_physical, lambda z: z.mT.mH, lambda z: torch.adjoint(z.mT), lambda z: -z.conj()],
)  # fmt: skip
def test_a_conjugate_passes_relevance_on(conjugated: Function) -> None:
    x = draw(1, 2, 3)
    relevance = torch.rand(2, 3, 2, dtype=torch.float64)
    (got,) = found_by_rule(conjugated, [x], relevance)
    torch.testing.assert_close(got, relevance)
    (got,) = found_by_rule(conjugated, [x], relevance, TwinRule() if conjugated is torch.conj else None)
    torch.testing.assert_close(got, relevance)


@pytest.mark.parametrize("number", [1j, -2j, 3.0, -3, 2 + 0j])
def test_real_and_imaginary_numbers_pass_relevance_on(number: complex) -> None:
    x = draw(1, 2, 3)
    relevance = torch.rand(2, 3, 2, dtype=torch.float64)
    moved = relevance.flip(-1) if complex(number).imag else relevance
    for function in (lambda z: z * number, lambda z: number * z, lambda z: z / number):
        (got,) = found_by_rule(function, [x], relevance)
        torch.testing.assert_close(got, moved)


MOVES: dict[str, tuple[Function, Function]] = {
    "slice": (lambda z: z[:, 1:], lambda x: x[:, 1:]),
    "index": (lambda z: z[:, [2, 0]], lambda x: x[:, [2, 0]]),
    "cat": (lambda z: torch.cat([z, z.flip(1)], 1), lambda x: torch.cat([x, x.flip(1)], 1)),
    "pad": (lambda z: F.pad(z, (1, 2)), lambda x: F.pad(x, (0, 0, 1, 2))),
    "expand": (lambda z: z.unsqueeze(1).expand(-1, 2, -1), lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1)),
    "roll": (lambda z: torch.fft.fftshift(z, dim=1), lambda x: x.roll(2, 1)),
    "back": (lambda z: torch.fft.ifftshift(z, dim=(1,)), lambda x: x.roll(-2, 1)),
    "select": (lambda z: torch.where(torch.arange(4) > 1, z, 0j), lambda x: x * (torch.arange(4) > 1).double()[:, None]),
    "of real": (lambda z: z.real.to(torch.complex128), lambda x: torch.stack([x[..., 0], torch.zeros(len(x), 4, dtype=x.dtype)], -1)),
    "where of real": (lambda z: torch.where(torch.arange(4) > 1, z.real, z), lambda x: torch.stack([x[..., 0], x[..., 1].masked_fill(torch.arange(4) > 1, 0)], -1)),
    "cat of real": (lambda z: torch.cat([z.real, z], 1), lambda x: torch.cat([torch.stack([x[..., 0], torch.zeros(len(x), 4, dtype=x.dtype)], -1), x], 1)),
    "set": (lambda z: _set(z), lambda x: F.pad(x, (0, 0, 2, 1))),
    "set a part": (lambda z: _set_part(z), lambda x: x.flip(-1)),
    "swap": (lambda z: torch.complex(z.imag, z.real), lambda x: x.flip(-1)),
    "repeat": (lambda z: z.repeat(1, 2), lambda x: x.repeat(1, 2, 1)),
    "transpose": (lambda z: z.view(len(z), 2, 2).mT.reshape(len(z), 4), lambda x: x.view(len(x), 2, 2, 2).transpose(1, 2).reshape(len(x), 4, 2)),
    "stack": (lambda z: torch.stack([z, z.conj()], -1).sum(-1) / 2, lambda x: torch.stack([x, x * torch.tensor([1.0, -1.0])], 2).sum(2) / 2),
}  # fmt: skip


def _set(z: Tensor) -> Tensor:
    out = torch.zeros(len(z), 7, dtype=z.dtype)
    out[:, 2:6] = z
    return out


def _set_part(z: Tensor) -> Tensor:
    out = torch.zeros(len(z), 4, dtype=z.dtype)
    out.real = z.imag
    out.imag[:] = z.real
    return out


class Moved(nn.Module):
    def __init__(self, function: Function, *, real: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.real = function, real
        self.first, self.last = nn.Linear(6, 8), nn.LazyLinear(3)
        self.double().eval()(torch.zeros(1, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.first(x).view(len(x), -1, 2)
        if self.real:
            return self.last(self.function(pairs).flatten(1))
        return self.last(torch.view_as_real(self.function(torch.view_as_complex(pairs))).flatten(1))


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", [name for name in MOVES if name not in ("select", "stack")])
def test_moves_of_complex_tensors_are_moves_of_pairs(name: str, normalization: str) -> None:
    x = draw(9, 3, 6, cplx=False)
    model, twin = (Moved(MOVES[name][real], real=bool(real)) for real in (0, 1))
    torch.testing.assert_close(model(x), twin(x))
    got, expected = (AbsLRP(m, normalization=normalization).attribute(x, 2) for m in (model, twin))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
