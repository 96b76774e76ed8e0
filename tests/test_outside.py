"""What is not part of the path: other histories, subclasses, hooks, autograd functions, detached values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from captum_abslrp import AbsLRP, LayerAbsLRP, inspect_rules, register_call_rule
from captum_abslrp.rules import TwinRule
from tests.conftest import relative_error

NORMALIZATIONS = ["separate", "joint"]


def features() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)]
    return nn.Sequential(*layers).double().eval()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class With(nn.Module):
    """Features, and a function of them and of something else."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor], other: Any) -> None:
        super().__init__()
        self.features, self.function, self.other = features(), function, other

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.features(x), self.other)


def parameter(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(2)
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))


def text() -> Tensor:
    embedding = nn.Embedding(5, 7, _weight=parameter(5, 7))
    return F.normalize(embedding(torch.arange(5)), dim=1)


FOREIGN: dict[str, tuple[Callable[[Tensor, Any], Tensor], Callable[[], Any]]] = {
    "text features": (F.linear, text),
    "rows of another head": (F.linear, lambda: parameter(9, 7)[[2, 3, 5]]),
    "a slice": (F.linear, lambda: parameter(9, 7)[2:5]),
    "fast weights": (F.linear, lambda: parameter(4, 7) - 0.1 * parameter(4, 7).square()),
    "matmul": (lambda h, w: h @ w.t(), lambda: parameter(4, 7) * 2),
    "a scale": (lambda h, s: h * s, lambda: parameter(1)[0] + 4),
    "a scale of each": (lambda h, s: h * s, lambda: parameter(7).exp()),
    "a summand": (lambda h, s: h.relu() + s, lambda: parameter(9, 7)[3]),
    "a divisor": (lambda h, s: h / s, lambda: parameter(7).exp()),
    "a subtrahend": (lambda h, s: (h - s).square(), lambda: parameter(7) * 3),
    "beside": (lambda h, s: torch.cat([h, s.expand(len(h), -1)], 1), lambda: parameter(1, 2) * 3),
    "written into": (
        lambda h, s: s.clone().index_copy(1, torch.arange(7), h),
        lambda: parameter(3, 9) * 2,
    ),
    "where": (lambda h, s: torch.where(h > 0, h, s), lambda: parameter(7) * 2),
    "attention": (
        lambda h, s: F.scaled_dot_product_attention(h[:, None], s, s)[:, 0],
        lambda: (parameter(1, 6, 7) * 2).expand(3, -1, -1),
    ),
    "cosine": (lambda h, s: F.cosine_similarity(h[:, None], s[None], dim=2), text),
    "einsum": (lambda h, s: torch.einsum("bi,ki->bk", h, s), text),
    "convolution": (
        lambda h, s: F.conv1d(h[:, None], s).flatten(1),
        lambda: parameter(3, 1, 3) * 2,
    ),
    "layer norm": (lambda h, s: F.layer_norm(h, (7,), s, s), lambda: parameter(7) * 2),
}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_history_of_its_own_makes_no_difference(name: str, normalization: str) -> None:
    function, make = FOREIGN[name]
    other = make()
    assert other.grad_fn is not None
    maps = [
        AbsLRP(With(function, value), normalization=normalization).attribute(images(), [0, 1, 2])
        for value in (other, other.detach())
    ]
    assert maps[1].abs().sum() > 0
    assert torch.equal(*maps)


class Weighted(nn.Module):
    """Makes its weight anew in every forward pass, or keeps what a context has cached."""

    def __init__(self) -> None:
        super().__init__()
        self.features = features()
        torch.manual_seed(5)
        self.head = parametrizations.weight_norm(nn.Linear(7, 4).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_a_cached_parametrization_is_a_constant() -> None:
    model, x = Weighted().eval(), images()
    expected = AbsLRP(model, normalization="joint").attribute(x, 1)
    with parametrize.cached():
        model(x)
        actual = AbsLRP(model, normalization="joint").attribute(x, 1)
    assert torch.equal(actual, expected)


def test_a_part_that_no_relevance_can_reach_is_not_explained() -> None:
    weight = parameter(4, 7) * 2
    model = With(lambda h, w: w.sum(1).expand(len(h), -1), weight)
    with pytest.raises(ValueError, match="depend on `inputs`, but got an output that does not"):
        AbsLRP(model).attribute(images(), 1)


class TensorImage(Tensor):
    """As fastai has it."""


class Meta(Tensor):
    """As MONAI has it: keeps what it knows, and says so whatever is computed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            result.meta = [getattr(a, "meta", None) for a in args]  # type: ignore[attr-defined]
        return result


class Forbidding(Tensor):
    """Cannot be computed with."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


SUBCLASSES = [TensorImage, Meta, Forbidding, nn.Parameter]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("contrast", ["others", None])
@pytest.mark.parametrize("cls", SUBCLASSES, ids=lambda c: c.__name__)
def test_subclasses_of_tensors_are_plain(cls: Any, contrast: Any, inplace: bool) -> None:
    model = features()
    model[1].inplace = inplace
    for dtype in (torch.float32, torch.float64):
        x = images().to(dtype)
        model.to(dtype)
        expected = AbsLRP(model).attribute(x, 1, contrast=contrast)
        given = nn.Parameter(x) if cls is nn.Parameter else x.as_subclass(cls)
        actual, delta = AbsLRP(model).attribute(
            given, 1, contrast=contrast, return_convergence_delta=True
        )
        assert type(actual) is type(delta) is Tensor
        assert actual.dtype == dtype
        assert expected.abs().sum() > 0
        assert torch.equal(actual, expected)
        of_layer = LayerAbsLRP(model, model[3]).attribute(given, 1, contrast=contrast)
        assert type(of_layer) is Tensor
        assert torch.equal(
            of_layer, LayerAbsLRP(model, model[3]).attribute(x, 1, contrast=contrast)
        )


def test_subclasses_inside_are_plain() -> None:
    class Inside(nn.Module):
        def __init__(self, cls: type[Tensor]) -> None:
            super().__init__()
            self.features, self.cls = features(), cls

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            x = self.features(x.as_subclass(self.cls))
            return x.as_subclass(self.cls) * scale

    x, scale = images(), torch.full((7,), 2.0).double()
    expected = AbsLRP(Inside(Tensor)).attribute(x, 1, scale)
    for cls in (TensorImage, Meta):
        actual = AbsLRP(Inside(cls)).attribute(x, 1, scale.as_subclass(cls))
        assert type(actual) is Tensor
        assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of")
def test_tensors_without_memory_of_their_own_are_refused() -> None:
    x = torch.rand(2, 3)
    nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
    masked = torch.masked.masked_tensor(x, torch.ones(2, 3, dtype=torch.bool))
    for wrapped, remedy in ((nested, nested.to_padded_tensor(0.0)), (masked, masked.get_data())):
        with pytest.raises(TypeError, match=r"dense tensors, but got .*Pass a plain tensor"):
            AbsLRP(nn.Linear(3, 2)).attribute(wrapped, 1)
        assert AbsLRP(nn.ReLU()).attribute(remedy, 1).shape == (2, 3)


def no_hook(*_: Any) -> None:
    raise AssertionError("Expected hooks for gradients to be left alone.")


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "full": lambda m: m.register_full_backward_hook(no_hook),
    "full, pre": lambda m: m.register_full_backward_pre_hook(no_hook),
    "old": lambda m: m.register_backward_hook(no_hook),
}


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("at", [0, 2, 4, None])
@pytest.mark.parametrize("kind", HOOKS)
def test_backward_hooks_do_not_change_the_map(kind: str, at: int | None) -> None:
    model, x = features(), images()
    expected = AbsLRP(model, normalization="joint").attribute(x, 1)
    layer = model if at is None else model[at]
    HOOKS[kind](layer)
    assert torch.equal(AbsLRP(model, normalization="joint").attribute(x, 1), expected)
    assert not inspect_rules(model, x).unsupported
    with pytest.raises(AssertionError, match="left alone"):
        model(x.requires_grad_()).sum().backward()


def test_backward_hooks_of_all_modules() -> None:
    model, x = features(), images()
    expected = AbsLRP(model).attribute(x, 1)
    handle = torch.nn.modules.module.register_module_full_backward_hook(no_hook)
    try:
        assert torch.equal(AbsLRP(model).attribute(x, 1), expected)
    finally:
        handle.remove()


ATTENDING: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "sequence first": lambda: nn.TransformerEncoderLayer(8, 2, 16),
}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", ATTENDING)
def test_hooks_of_attention_do_not_change_the_map(name: str, normalization: str) -> None:
    torch.manual_seed(0)
    layer = ATTENDING[name]().double().eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x, x, x)[0] if name == "attention" else self.layer(x)
            return self.head(y.mean(1))

    model, x = Model(), torch.randn(1, 5, 8, dtype=torch.float64)
    attributor = AbsLRP(model, normalization=normalization)
    expected = attributor.attribute(x, 1)
    for module in model.modules():
        module.register_full_backward_hook(no_hook)
    assert relative_error(attributor.attribute(x, 1), expected) < 1e-12


class SequenceFirst(nn.Module):
    """Samples in the second dimension of what a hooked module gets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(5, 5).double(), nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
        self.inner.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x).transpose(0, 1)).transpose(0, 1).mean(1)


def test_samples_of_a_hooked_module_are_followed() -> None:
    model, x = SequenceFirst(), torch.randn(2, 4, 5, dtype=torch.float64)
    expected = AbsLRP(model).attribute(x, 1)
    for layer in (model.inner, model.inner[0], model):
        handle = layer.register_full_backward_hook(no_hook)
        assert relative_error(AbsLRP(model).attribute(x, 1), expected) < 1e-12
        handle.remove()


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return (x / scale).round() * scale, scale * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradients[0], None


class Binary(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, Sign.apply(self.weight), self.bias)


class Quantised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight, scale = Rounded.apply(self.weight, self.weight.abs().max() / 7)
        return F.conv2d(x, weight * (scale / scale), self.bias)


class Mixed(nn.Conv2d):
    """Weights of an autograd function, within other calls."""

    def forward(self, x: Tensor) -> Tensor:
        weight = 0.5 * Sign.apply(self.weight - self.weight.mean()) + 0.5 * self.weight
        return F.conv2d(x, F.normalize(weight, dim=0), self.bias).relu() + 0.1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("cls", [Binary, Quantised, Mixed], ids=lambda c: c.__name__)
def test_autograd_functions_on_weights_are_constants(
    cls: type[nn.Conv2d], registered: bool, frozen: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cls(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    model.eval().requires_grad_(not frozen)
    x = images()
    if registered:
        register_call_rule(cls, TwinRule())
    relevance = AbsLRP(model, normalization="joint").attribute(x, 1, contrast=None)
    total = torch.ones(len(x), dtype=torch.float64)
    torch.testing.assert_close(relevance.flatten(1).abs().sum(1), total, rtol=1e-6, atol=0)


class Activated(nn.Module):
    """Does more than call an autograd function on what carries relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7).double()

    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(self.linear(x).tanh(), torch.tensor(0.1))[0] + x


def test_an_autograd_function_inside_a_registered_layer() -> None:
    model = nn.Sequential(features(), Activated(), nn.Linear(7, 3).double()).eval()
    with pytest.raises(
        NotImplementedError, match=r"`Rounded` in `1` \(Activated\).*register_call_rule"
    ):
        AbsLRP(model).attribute(images(), 1)
    register_call_rule(Activated, TwinRule())
    assert AbsLRP(model).attribute(images(), 1).abs().sum() > 0


class Branch(nn.Module):
    """Two branches, one of which is not in the history."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept, self.cut, self.kind = nn.Linear(6, 3), nn.Linear(6, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                return self.kept(x) + self.cut(x)
        if self.kind == "a frozen branch":
            with torch.no_grad():
                y = self.cut(x).relu()
            return self.kept(x) + y
        if self.kind == "inference_mode":
            with torch.inference_mode():
                y = self.cut(x)
            return self.kept(x) * y.clone()
        if self.kind == "detach":
            return torch.cat([self.kept(x), self.cut(x.detach())], 1)
        if self.kind == "data":
            return self.kept(x) + self.cut(x).data.tanh()
        if self.kind == "written":
            y = self.kept(x)
            y[:, :2] = self.cut(x).detach()[:, :2]
            return y
        if self.kind == "added in place":
            y = self.kept(x)
            y += self.cut(x).detach()
            return y
        if self.kind == "attended":
            y = self.cut(x).detach().softmax(1)
            return self.kept(x) @ (y[:, :, None] * y[:, None])[0]
        raise AssertionError(self.kind)


WHERE = {
    "a frozen branch": "`cut` (Linear)",
    "inference_mode": "`cut` (Linear)",
    "detach": "the model itself (Branch)",
    "data": "the model itself (Branch)",
    "written": "the model itself (Branch)",
    "added in place": "the model itself (Branch)",
    "attended": "the model itself (Branch)",
}


@pytest.mark.parametrize("kind", WHERE)
def test_a_branch_that_is_dropped_is_warned_about(kind: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        AbsLRP(Branch(kind)).attribute(torch.rand(1, 6), 1)
    found = [w for w in seen if "is detached or computed under `torch.no_grad()`" in str(w.message)]
    assert len(found) == 1
    assert WHERE[kind] in str(found[0].message)
    assert found[0].filename == __file__


class Harmless(nn.Module):
    """Detached values that do not reach the output, or are no part of the score."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        with torch.no_grad():
            self.linear(x).tanh()
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z,
        lambda z: z * (z.detach() > 0),
        lambda z: z / z.detach().norm(dim=1, keepdim=True),
        lambda z: z * (1 / z.detach().norm(dim=1, keepdim=True)),
        lambda z: z[:, z.detach()[0].argsort()],
    ],
)
def test_what_is_detached_and_not_used_is_not(function: Callable[[Tensor], Tensor]) -> None:
    AbsLRP(Harmless(function)).attribute(torch.rand(1, 6), 1)


def centered(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def ones(x: Tensor) -> Tensor:
    """A weight that makes the mean of the channels."""
    return torch.full((16, 16), 1 / 16, dtype=x.dtype)


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "centered twice": lambda x: centered(centered(x)),
    "mean of what is centered": lambda x: x + centered(x).mean(1, keepdim=True),
    "sum of what is centered": lambda x: x + centered(x).sum((1, 2, 3), keepdim=True),
    "pooled": lambda x: x + F.avg_pool2d(F.instance_norm(x), 6),
    "pooled, adaptive": lambda x: x + F.adaptive_avg_pool2d(F.instance_norm(x), 1),
    "linear": lambda x: x + F.linear(rows(centered(x)), ones(x)).movedim(-1, 1),
    "matmul": lambda x: x + (rows(centered(x)) @ ones(x)).movedim(-1, 1),
    "matmul from the left": lambda x: x + (ones(x) @ centered(x).flatten(2)).view_as(x),
    "einsum": lambda x: x + torch.einsum("bchw,cd->bdhw", centered(x), ones(x)),
    "tensordot": lambda x: x + torch.tensordot(rows(centered(x)), ones(x), 1).movedim(-1, 1),
    "vector": lambda x: x + (rows(centered(x)) @ ones(x)[0]).unsqueeze(1),
    "convolution": lambda x: x + F.conv2d(centered(x), ones(x)[..., None, None]),
    "negative": lambda x: x + F.conv2d(centered(x), -ones(x)[..., None, None]),
    "var_mean": lambda x: x + torch.var_mean(centered(x), 1, keepdim=True)[1],
    "cumsum": lambda x: x + centered(x).cumsum(1)[:, -1:],
    "difference of the same": lambda x: x + ((x * 3) / 3 - x),
    "a large number": lambda x: (
        x + (x.tanh() * 1e-6 + 3 - 3 if x.dtype == torch.float32 else 0 * x)
    ),
    "a negative number": lambda x: x + (x.softmax(1).sum(1, keepdim=True) + -1.0),
}


class Noisy(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d, self.h = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.d(self.function(self.c(x))).relu().mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NOISE)
def test_rounding_gets_no_share(name: str, dtype: torch.dtype) -> None:
    attributor = AbsLRP(Noisy(NOISE[name]).to(dtype).eval())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = attributor.attribute(x, 1, contrast=None)
    single = torch.cat([attributor.attribute(i[None], 1, contrast=None) for i in x])
    assert relative_error(together, single) < (1e-4 if dtype == torch.float32 else 1e-10)
    if name != "centered twice":  # the branch is a constant
        constant = Noisy(lambda x: x + torch.full_like(x, 1e-30)).to(dtype).eval()
        expected = AbsLRP(constant).attribute(x, 1, contrast=None)
        assert relative_error(together, expected) < 1e-4
