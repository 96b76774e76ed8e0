"""Complex calls: rules see real and imaginary part as two real numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
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
from captum_abslrp.engine import names
from captum_abslrp.engine.propagation import TOTAL, propagate
from captum_abslrp.engine.recording import Recording
from captum_abslrp.mappings import At, get_mapping
from captum_abslrp.rules import AbsLRPRule, Rule, TwinRule
from captum_abslrp.rules.captum import SingleRule
from tests.test_call_rules import own_rule

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
    # A rule that is not the one of the generic mapping itself holds on the tail of the score, too.
    find = SingleRule(rule) if rule else own_rule
    with Recording(find, inputs=given, batch_size=1, total=TOTAL):
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


def seeds_like(z: Tensor) -> Tensor:
    return draw(17, *z.shape, cplx=False).abs()


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

    relevance = seeds_like(real_view(call(*free)))
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


@settings(deadline=None, max_examples=25, derandomize=True)
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
    "hfft2": (torch.fft.hfft2, draw(1, 2, 3, 3)),
    "ihfft2": (torch.fft.ihfft2, draw(1, 2, 3, 4, cplx=False)),
    "hfftn": (lambda x: torch.fft.hfftn(x, (4, 4), (1, 2)), draw(1, 2, 3, 3)),
    "ihfftn": (torch.fft.ihfftn, draw(1, 2, 3, 4, cplx=False)),
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
    z = of_view(real_view(x))
    # Zeros, which may come out as rounding errors, have no relevance.
    relevance = seeds_like(z).masked_fill(z.abs() < 1e-12, 0)
    (got,) = found_by_rule(function, [x], relevance, rule)
    expected = literal(of_view, of_view, real_view(x), relevance)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_every_transform_has_a_case() -> None:
    assert {name.partition(" ")[0] for name in TRANSFORMS} == {
        name.removeprefix("fft_") for name in names.TRANSFORMS
    }


def test_the_magnitude_is_the_norm_of_the_parts() -> None:
    x = draw(1, 2, 3)

    def norm(view: Tensor) -> Tensor:
        return torch.linalg.vector_norm(view, dim=-1)

    relevance = draw(17, 2, 3, cplx=False).abs()
    for function in (torch.abs, Tensor.abs, abs, torch.absolute):
        (got,) = found_by_rule(function, [x], relevance)
        torch.testing.assert_close(got, literal(norm, norm, real_view(x), relevance))


WRITTEN_OUT: dict[str, tuple[Function, Function]] = {
    "polar": (
        lambda z: torch.polar(z.abs(), z.imag),
        lambda z: _from_polar(z.abs(), z.imag),
    ),
    "exp": (torch.exp, lambda z: _from_polar(z.real.exp(), z.imag)),
    "sgn": (torch.sgn, lambda z: z / z.detach().abs()),
    "sgn of zeros": (
        lambda z: torch.sgn(F.pad(z[:, :2], (0, 2))),
        lambda z: F.pad(z[:, :2] / z[:, :2].detach().abs(), (0, 2)),
    ),
    "addcmul": (lambda z: torch.addcmul(z, z, z.conj()), lambda z: z + z * z.conj()),
    "lerp": (lambda z: z.lerp(z.conj(), 0.25), lambda z: z * 0.75 + z.conj() * 0.25),
    "matmul of a list": (
        lambda z: torch.einsum("bi,ij->bj", [z, draw(3, 4, 2)]), lambda z: z @ draw(3, 4, 2)
    ),
    "integers": (lambda z: z * torch.arange(4), lambda z: z * torch.arange(4.0).cdouble()),
    "a mask": (lambda z: z * (torch.arange(4) > 1), lambda z: z * (torch.arange(4) > 1).cdouble()),
    "in place": (lambda z: _in_place(z), lambda z: (z * (1 + 2j) - z.conj()) / (2 - 1j)),
}  # fmt: skip


def _from_polar(size: Tensor, angle: Tensor) -> Tensor:
    return torch.complex(size * angle.cos(), size * angle.sin())


def _in_place(z: Tensor) -> Tensor:
    conjugate = z.conj_physical()
    z *= 1 + 2j
    z.sub_(conjugate)
    z /= 2 - 1j
    return z


@pytest.mark.filterwarnings("ignore:The map of the")
@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_calls_are_the_same_as_written_out(name: str, normalization: str) -> None:
    x = draw(5, 3, 6, cplx=False)
    models = [OneCall(function) for function in WRITTEN_OUT[name]]
    torch.testing.assert_close(models[0](x), models[1](x))
    got, expected = (AbsLRP(m, normalization=normalization).attribute(x, 1) for m in models)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (got != 0).any()


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
    relevance = seeds_like(of_view(real_view(x)))
    (got,) = found_by_rule(function, [x], relevance, TwinRule())
    expected = literal(of_view, of_view, real_view(x), relevance)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_twin_rule_takes_the_magnitude_of_the_parts_of_weights() -> None:
    x, w = draw(1, 2, 3), draw(2, 3)
    relevance = draw(17, 2, 3, 2, cplx=False).abs()
    (got,) = found_by_rule(lambda x: x * w, [x], relevance, TwinRule())
    sizes = torch.view_as_complex(torch.view_as_real(w).abs())
    expected = literal(
        on_view(lambda x: x * w, [x], 0),
        on_view(lambda x: x * sizes, [x], 0),
        real_view(x),
        relevance,
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


@pytest.mark.filterwarnings("ignore:The map of the")
@pytest.mark.parametrize("name", ["angle", "acosh"])
def test_a_registered_rule_answers_complex_calls(name: str) -> None:
    function = getattr(torch, name)
    model, x = OneCall(function), draw(5, 2, 6, cplx=False)
    mapping = get_mapping().extended({name: TwinRule()})
    expected = AbsLRP(model, mapping).attribute(x, 1)
    register_call_rule(function, TwinRule())
    torch.testing.assert_close(AbsLRP(model).attribute(x, 1), expected)


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
    if by == "rule":
        model.function.rule = TwinRule()  # type: ignore[assignment]
    got = AbsLRP(model).attribute(x, 1)
    single = [AbsLRP(model).attribute(row, 1) for row in x.split(1)]
    assert [c.call for c in inspect_rules(model, x).calls].count("Spectrum.forward") == 1
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
    got, expected = (AbsLRP(m, normalization=normalization).attribute(x, 2) for m in (model, twin))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


CONJUGATES: list[Function] = [
    torch.conj,
    Tensor.conj_physical,
    lambda z: z.mT.mH,
    lambda z: torch.adjoint(z.mT),
]


@pytest.mark.parametrize("conjugated", CONJUGATES)
def test_a_conjugate_passes_relevance_on(conjugated: Function) -> None:
    x, relevance = draw(1, 2, 3), draw(17, 2, 3, 2, cplx=False).abs()
    (got,) = found_by_rule(lambda z: -conjugated(z), [x], relevance)
    torch.testing.assert_close(got, relevance)
    # On the tail of the score, what lowers it counts with its sign.
    for rule in (None, TwinRule()):
        (got,) = found_by_rule(conjugated, [x], relevance, rule)
        torch.testing.assert_close(got, relevance * torch.tensor([1.0, -1.0]).double())


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", ["conj", "1j", "-2j", "real", "sub", "abs", "mean", "neg"])
def test_scores_on_a_complex_tail_are_scores_on_a_real_one(name: str, normalization: str) -> None:
    tails: dict[str, tuple[Function, Function]] = {
        "conj": (lambda z: z.conj().imag, lambda x: -x[..., 1]),
        "1j": (lambda z: (1j * z).real, lambda x: -x[..., 1]),
        "-2j": (lambda z: (-2j * z).real, lambda x: 2 * x[..., 1]),
        "real": (lambda z: (3 * z).real, lambda x: 3 * x[..., 0]),
        "sub": (lambda z: (1j - z).real, lambda x: 0 - x[..., 0]),
        "abs": (lambda z: z.abs(), lambda x: torch.linalg.vector_norm(x, dim=-1)),
        "mean": (
            lambda z: torch.stack([z, z.flip(1)]).mean(0).real, lambda x: (x + x.flip(1))[..., 0] / 2
        ),
        "neg": (lambda z: (-z).imag, lambda x: -x[..., 1]),
    }  # fmt: skip
    x = draw(5, 4, 6, cplx=False)
    models = [Scored(tail, real=i == 1) for i, tail in enumerate(tails[name])]
    torch.testing.assert_close(models[0](x), models[1](x))
    for contrast in ("others", None):
        got, expected = (
            AbsLRP(m, normalization=normalization).attribute(x, 1, contrast=contrast)
            for m in models
        )
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
        assert (got != 0).any(1).all()


class Scored(nn.Module):
    """A function of four complex logits."""

    def __init__(self, tail: Function, *, real: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tail, self.real = tail, real
        self.head = nn.Linear(6, 8).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.head(x).view(len(x), 4, 2)
        return self.tail(pairs if self.real else torch.view_as_complex(pairs))


@pytest.mark.parametrize("number", [1j, -2j, 3.0, -3, 2 + 0j])
def test_real_and_imaginary_numbers_pass_relevance_on(number: complex) -> None:
    x = draw(1, 2, 3)
    relevance = draw(17, 2, 3, 2, cplx=False).abs()
    moved = relevance.flip(-1) if complex(number).imag else relevance
    for function in (lambda z: z * number, lambda z: number * z, lambda z: z / number):
        (got,) = found_by_rule(function, [x], relevance)
        torch.testing.assert_close(got, moved)


def with_zeros(x: Tensor) -> Tensor:
    return torch.stack([x, torch.zeros_like(x)], -1)


RIGHT = torch.arange(4) > 1
MOVES: dict[str, tuple[Function, Function]] = {
    "slice": (lambda z: z[:, 1:], lambda x: x[:, 1:]),
    "index": (lambda z: z[:, [2, 0]], lambda x: x[:, [2, 0]]),
    "cat": (lambda z: torch.cat([z, z.flip(1)], 1), lambda x: torch.cat([x, x.flip(1)], 1)),
    "cat of real": (
        lambda z: torch.cat([z.real, z], 1), lambda x: torch.cat([with_zeros(x[..., 0]), x], 1)
    ),
    "pad": (lambda z: F.pad(z, (1, 2)), lambda x: F.pad(x, (0, 0, 1, 2))),
    "expand": (
        lambda z: z.unsqueeze(1).expand(-1, 2, -1), lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1)
    ),
    "fftshift": (lambda z: torch.fft.fftshift(z, dim=1), lambda x: x.roll(2, 1)),
    "ifftshift": (lambda z: torch.fft.ifftshift(z, dim=(1,)), lambda x: x.roll(-2, 1)),
    "where": (
        lambda z: torch.where(RIGHT, z, 0j), lambda x: x.masked_fill(~RIGHT[:, None], 0)
    ),
    "where of real": (
        lambda z: torch.where(RIGHT, z.real, z),
        lambda x: torch.stack([x[..., 0], x[..., 1].masked_fill(RIGHT, 0)], -1),
    ),
    "masked": (
        lambda z: z.masked_fill(RIGHT, -1 - 1j), lambda x: x.masked_fill(RIGHT[:, None], -1)
    ),
    "cast": (lambda z: z.real.to(torch.complex128), lambda x: with_zeros(x[..., 0])),
    "cdouble": (lambda z: z.imag.cdouble(), lambda x: with_zeros(x[..., 1])),
    "set": (lambda z: _set(z), lambda x: F.pad(x, (0, 0, 2, 1))),
    "set a part": (lambda z: _set_part(z), lambda x: x.flip(-1)),
    "swap": (lambda z: torch.complex(z.imag, z.real), lambda x: x.flip(-1)),
    "repeat": (lambda z: z.repeat(1, 2), lambda x: x.repeat(1, 2, 1)),
    "transpose": (
        lambda z: z.view(len(z), 2, 2).mT.reshape(len(z), 4), lambda x: x[:, [0, 2, 1, 3]]
    ),
    "samples second": (lambda z: z.T.contiguous().real.T.cdouble(), lambda x: with_zeros(x[..., 0])),
    "parts moved away": (
        lambda z: torch.view_as_complex(torch.view_as_real(z.T).transpose(0, 1).contiguous()),
        lambda x: x,
    ),
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
@pytest.mark.parametrize("name", MOVES)
def test_moves_of_complex_tensors_are_moves_of_pairs(name: str, normalization: str) -> None:
    x = draw(9, 3, 6, cplx=False)
    model, twin = (Moved(MOVES[name][real], real=bool(real)) for real in (0, 1))
    torch.testing.assert_close(model(x), twin(x))
    got, expected = (AbsLRP(m, normalization=normalization).attribute(x, 2) for m in (model, twin))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------- models as in papers


class Rope(nn.Module):
    """Attention with rotary embedding, as in Llama and rope-vit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 4)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.3]))
        self.register_buffer("phases", torch.polar(torch.ones_like(angles), angles))

    def rotate(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * self.phases).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (5, 3)))
        q, k, v = self.qkv(x).view(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.head((x + y.transpose(1, 2).flatten(2)).mean(1))


class GlobalFilter(nn.Module):
    """GFNet: a complex weight for each frequency of the feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(3, 3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(len(x), 3, 5, 1))
        z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        z = z * torch.view_as_complex(self.weight)
        y = torch.fft.irfft2(z, s=(3, 5), dim=(1, 2), norm="ortho")
        return self.head((x + F.gelu(y)).mean((1, 2)))


class Fourier(nn.Module):
    """FNet: the real part of a Fourier transform in place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (5, 3)))
        x = self.norm(x + torch.fft.fft2(x, norm="ortho").real)
        x = self.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return self.head(x.mean(1))


class Operator(nn.Module):
    """FNO: products with the lowest frequencies, written into a spectrum of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.head = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.view_as_complex(torch.randn(4, 4, 3, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x.unsqueeze(1))
        z = torch.fft.rfft(x)
        out = z.new_zeros(len(x), 4, z.shape[-1])
        out[:, :, :3] = torch.einsum("bix,iox->box", z[:, :, :3], self.weight)
        x = F.relu(torch.fft.irfft(out, n=x.shape[-1]) + self.skip(x))
        return self.head(x.mean(-1))


class Adaptive(nn.Module):
    """AFNO: products of the parts one by one, and soft shrinkage."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 4)
        self.weight, self.bias = (
            nn.Parameter(torch.randn(2, 2, 2, 2)),
            nn.Parameter(torch.randn(2, 2, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(len(x), 3, 5, 1))
        z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(len(x), 3, 3, 2, 2)
        real = torch.zeros(z.shape, dtype=x.dtype)
        real[:, :, :2] = F.relu(
            torch.einsum("...bi,bio->...bo", z[:, :, :2].real, self.weight[0])
            - torch.einsum("...bi,bio->...bo", z[:, :, :2].imag, self.weight[1])
            + self.bias[0]
        )
        imag = F.relu(
            torch.einsum("...bi,bio->...bo", z.imag, self.weight[0])
            + torch.einsum("...bi,bio->...bo", z.real, self.weight[1])
            + self.bias[1]
        )
        parts = F.softshrink(torch.stack([real, imag], -1), lambd=0.01)
        z = torch.view_as_complex(parts).reshape(len(x), 3, 3, 4)
        y = torch.fft.irfft2(z, s=(3, 5), dim=(1, 2), norm="ortho")
        return self.head((x + y).mean((1, 2)))


class Deep(nn.Module):
    """A complex network: complex linear layers, modReLU, batch of phases, magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(15, 6, dtype=torch.complex64)
        self.second = nn.Linear(6, 5, dtype=torch.complex64)
        self.threshold, self.head = nn.Parameter(torch.tensor(-0.1)), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.to(self.first.weight.dtype))
        size = z.abs()
        z = F.relu(size + self.threshold) * z / (size + 1e-3)
        z = self.second(z)
        z += 0.5j * z.conj() + torch.polar(z.real.sigmoid(), z.imag) - (0.1 * z).exp()
        return self.head((z.sgn() * z.abs().sqrt()).abs() + z.abs() ** 2)


class Sound(nn.Module):
    """A spectrogram, changed, and turned back into a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(4))
        self.gate, self.head = nn.Parameter(torch.rand(3, 1)), nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stft(x, 4, 1, window=self.window, return_complex=True)
        z = z * self.gate + (0.3 - 0.2j) * z.conj()
        return self.head(torch.istft(z, 4, 1, window=self.window, length=15).relu())


class SequenceFirst(nn.Module):
    """Samples are in the second dimension while phases are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unflatten(1, (5, 3))).transpose(0, 1).contiguous()
        z = torch.view_as_complex(h.view(5, len(x), 2, 2)).transpose(0, 1)
        z = torch.complex(z.imag, z.real) * torch.tensor([1j, 1 - 1j])
        return self.head(torch.view_as_real(z).flatten(2).relu().mean(1))


MODELS = [Rope, GlobalFilter, Fourier, Operator, Adaptive, Deep, Sound, SequenceFirst]


def made(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return model


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("kind", MODELS)
def test_models_have_maps_sample_by_sample(kind: type[nn.Module], normalization: str) -> None:
    model, x = made(kind), draw(3, 3, 15, cplx=False)
    attributor = AbsLRP(model, normalization=normalization)
    for contrast in ("others", None):
        got = attributor.attribute(x, 2, contrast=contrast)
        single = [attributor.attribute(row, 2, contrast=contrast) for row in x.split(1)]
        torch.testing.assert_close(got, torch.cat(single), rtol=1e-9, atol=1e-12)
        assert got.dtype == x.dtype and got.isfinite().all()
        assert (got != 0).any(1).all()
    assert not got.requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_models_in_single_precision(kind: type[nn.Module]) -> None:
    x = draw(3, 3, 15, cplx=False)
    expected = AbsLRP(made(kind)).attribute(x, 2, contrast=None)
    got = AbsLRP(made(kind, torch.float32)).attribute(x.float(), 2, contrast=None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)


class Cancelling(nn.Module):
    """A transform some of whose frequencies are zero, but for rounding."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(6, 24), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(len(x), 4, 6)
        if self.how == "centered":
            h = F.layer_norm(h, (6,))
        elif self.how == "even":
            h = torch.cat([h[..., :4], h[..., 1:3].flip(-1)], -1)
        elif self.how == "odd in two dimensions":
            h = h + 0.0
            h = torch.cat([h[..., :3], -h[..., :3]], -1)
        z = torch.fft.fft2(h) if "two" in self.how else torch.fft.fft(h)
        if self.how == "real again":
            z = torch.fft.ifft(z)
        return self.last(torch.view_as_real(z).flatten(1))


@pytest.mark.parametrize("how", ["centered", "even", "odd in two dimensions", "real again"])
def test_frequencies_that_cancel_out_get_no_relevance(how: str) -> None:
    x = draw(3, 3, 6, cplx=False)
    torch.manual_seed(0)
    model = Cancelling(how).double().eval()
    expected = AbsLRP(model).attribute(x, 1, contrast=None)
    again = AbsLRP(model).attribute(x * (1 + 1e-13), 1, contrast=None)
    torch.testing.assert_close(again, expected, rtol=1e-8, atol=1e-10)
    got = AbsLRP(model.float()).attribute(x.float(), 1, contrast=None)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_inspected_and_traced(kind: type[nn.Module]) -> None:
    model, x = made(kind), draw(3, 1, 15, cplx=False)
    inspection = inspect_rules(model, x)
    assert not inspection.unsupported
    names = " ".join(call.call for call in inspection.calls)
    assert "view_as_real" in names if kind is Rope else "OnParts" not in names
    trace = trace_relevance(model, x, 2, normalization="joint")
    assert len({call.call for call in trace.calls}) > 1 or kind is Sound
    for call in trace.calls:
        assert sum(call.passed) == pytest.approx(call.arrived) or sum(call.passed) == 0


@pytest.mark.parametrize("kind", [Rope, GlobalFilter, Operator, Deep])
def test_models_without_values_are_inspected(kind: type[nn.Module]) -> None:
    model, x = made(kind), draw(3, 1, 15, cplx=False)
    expected = inspect_rules(model, x)
    inspection = inspect_rules(model.to("meta"), x.to("meta"))
    assert str(inspection) == str(expected)
    assert not inspection.unsupported


@pytest.mark.parametrize("rule", [AbsLRPRule(), TwinRule()], ids=str)
@pytest.mark.parametrize("kind", [Rope, GlobalFilter, Fourier, Operator, Adaptive, Sound])
def test_a_rule_on_the_module_answers_all_calls(kind: type[nn.Module], rule: Rule) -> None:
    model, x = made(kind), draw(3, 2, 15, cplx=False)
    model.rule = rule  # type: ignore[assignment]
    got = AbsLRP(model).attribute(x, 2)
    single = [AbsLRP(model).attribute(row, 2) for row in x.split(1)]
    torch.testing.assert_close(got, torch.cat(single), rtol=1e-9, atol=1e-12)
    assert got.isfinite().all() and (got.abs().sum(1) > 0.01).all()


# ---------------------------------------------------------------------------------- samples are apart


MIXING: dict[str, Function] = {
    "fft": lambda h: torch.fft.fft(h, dim=0).real,
    "fft2": lambda h: torch.fft.fft2(h).imag,
    "fftn": lambda h: torch.fft.fftn(h).real,
    "ifftn": lambda h: torch.fft.ifftn(h, dim=(0,)).real,
    "fftn of sizes": lambda h: torch.fft.fftn(h, s=(len(h), 8)).real,
    "rfft by position": lambda h: torch.fft.rfft(h, None, 0).abs().expand(len(h), -1),
    "mean": lambda h: (h + 1j * h).mean(0, keepdim=True).real.expand(len(h), -1),
    "shift": lambda h: torch.fft.fftshift(h + 0j).real,
    "einsum": lambda h: torch.einsum("bi,ci->ci", h + 0j, h + 0j).real,
    "product": lambda h: (h @ (h.T + 0j).real) @ h,
    "parts": lambda h: torch.view_as_real(torch.complex(h, h.flip(0)) * (2 + 1j)).sum(-1),
    "conjugate": lambda h: (h.flip(0) + 0j).conj().real,
}  # fmt: skip


class Mixing(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first, self.last = function, nn.Linear(6, 8), nn.Linear(8, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.filterwarnings("ignore:The map of the")
@pytest.mark.parametrize("name", MIXING)
def test_samples_are_never_mixed(name: str) -> None:
    """They are run one at a time, or refused."""
    model, x = Mixing(MIXING[name]), draw(4, 4, 6, cplx=False)
    got = AbsLRP(model).attribute(x, 1)
    single = [AbsLRP(model).attribute(row, 1) for row in x.split(1)]
    torch.testing.assert_close(got, torch.cat(single))


def test_two_samples_do_not_make_one_complex_number() -> None:
    model = Mixing(
        lambda h: torch.view_as_complex(h.T.contiguous().view(8, -1, 2)).abs().T.repeat(2, 1)
    )
    assert model(draw(4, 4, 6, cplx=False)).shape == (4, 3)
    with pytest.raises(ValueError, match="one sample at a time.*invalid for input of size"):
        AbsLRP(model).attribute(draw(4, 4, 6, cplx=False), 1)


# -------------------------------------------------------------------------------------- the interface


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_layers_that_return_complex_tensors_are_explained(normalization: str) -> None:
    """One value for each complex number: that of its two parts."""
    model, x = Layered(), draw(5, 2, 6, cplx=False)

    class Around(nn.Module):
        """The same with the real view as a layer of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.view = model, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            z = model.function(torch.view_as_complex(model.first(x).view(len(x), -1, 2)))
            return model.last(self.view(torch.view_as_real(z)).flatten(1))

    around = Around()
    for contrast in ("others", None):
        got = LayerAbsLRP(model, model.function, normalization=normalization).attribute(
            x, 1, contrast=contrast
        )
        expected = LayerAbsLRP(around, around.view, normalization=normalization).attribute(
            x, 1, contrast=contrast
        )
        assert got.shape == (2, 4) and got.dtype == torch.float64
        torch.testing.assert_close(got, expected.sum(-1))
    given = LayerAbsLRP(model, model.function).attribute(x, 1, attribute_to_layer_input=True)
    assert given.shape == (2, 4) and given.dtype == torch.float64 and given.abs().sum() > 0.01


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_inputs_are_refused_with_a_remedy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)).eval()
    x = draw(1, 2, 3).to(dtype)
    with pytest.raises(
        TypeError,
        match=rf"real floating-point dtype, but got {dtype}.*view_as_real.*view_as_complex",
    ):
        AbsLRP(model).attribute(x, 1)

    class OnParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, parts: Tensor) -> Tensor:
            return self.model(torch.view_as_complex(parts))

    with pytest.raises(TypeError, match=rf"real tensor, but got {dtype}.*output=torch.abs"):
        AbsLRP(OnParts()).attribute(torch.view_as_real(x), 1)
    relevance = AbsLRP(OnParts(), output=torch.abs).attribute(
        torch.view_as_real(x), 1, contrast=None
    )
    assert relevance.shape == (2, 3, 2) and relevance.dtype == dtype.to_real()
    assert (relevance != 0).flatten(1).any(1).all()


def test_a_complex_factor_of_a_sum_is_refused_with_a_remedy() -> None:
    x = draw(5, 2, 6, cplx=False)
    with pytest.raises(TypeError, match=r"alpha.*real numbers, but got.*x \+ alpha \* y"):
        AbsLRP(OneCall(lambda z: torch.add(z, z, alpha=1j))).attribute(x, 1)
    model = OneCall(lambda z: z + 1j * z)
    assert AbsLRP(model).attribute(x, 1).abs().sum() > 0.01


def test_rules_on_complex_modules_are_refused_under_captum() -> None:
    model = Layered()
    model.function.rule = AbsLRPRule()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"Spectrum.*real tensors.*but got complex"):
        model.function.rule.forward_hook(model.function, (draw(1, 2, 4),), draw(2, 2, 4))  # type: ignore[operator]


def test_memory_that_is_overwritten_is_kept() -> None:
    """A factor that is changed in place later on counts as it was."""

    def changed(z: Tensor) -> Tensor:
        product = z * z.flip(1)
        z *= 3
        return product + z

    def plain(z: Tensor) -> Tensor:
        return z * z.flip(1) + z * 3

    x = draw(5, 2, 6, cplx=False)
    got, expected = (AbsLRP(OneCall(f)).attribute(x, 1) for f in (changed, plain))
    torch.testing.assert_close(got, expected)
