"""Methods that change the backward pass at modules: right where they answer, refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_abslrp.methods import find_feature_layer, get_method

Middle = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A convolution, what is tested on maps (B, 4, 8, 8), and a linear head."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = middle
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.flatten(self.pool(self.middle(self.conv(x)))))
        return result


class Calls(nn.Module):
    """A module that calls a function with some modules of its own."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


class OwnReLU(nn.ReLU):
    """Captum's DeepLift goes by the exact type."""


class Straight(torch.autograd.Function):
    """Linear forward, and a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def build(middle: nn.Module, *, eval: bool = True) -> nn.Module:
    """A network in float64 with biases and statistics that are not trivial."""
    net = Net(middle).double()
    net.eval()(torch.zeros(1, 3, 8, 8).double())  # the lazy layer
    generator = torch.Generator().manual_seed(1)
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.data.copy_(drawn.abs() + 0.5 if (tensor == 1).all() else drawn * 0.4)
    return net.train(not eval)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def attend(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    attention = (tokens @ tokens.transpose(1, 2)).softmax(-1)
    return (attention @ tokens).transpose(1, 2).view_as(x)


def fused(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).view_as(x)


def written(x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer[:, :2] = x[:, :2]
    return buffer.view(-1).relu_().view_as(x)


NOT_IN_MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "F.relu": (lambda: Calls(F.relu), "relu"),
    "torch.relu": (lambda: Calls(torch.relu), "relu"),
    "x.relu()": (lambda: Calls(lambda x: x.relu()), "relu"),
    "relu_ of a view": (lambda: Calls(written), "relu"),
    "clamp": (lambda: Calls(lambda x: x.clamp(min=0)), "clamp"),
    "maximum": (lambda: Calls(lambda x: torch.max(x, torch.zeros_like(x))), "maximum"),
    "abs": (lambda: Calls(lambda x: (x + x.abs()) / 2), "abs"),
    "mask": (lambda: Calls(lambda x: x * (x > 0)), "gt"),
    "where": (lambda: Calls(lambda x: torch.where(x > 0, x, 0.1 * x)), "gt"),
    "masked_fill": (lambda: Calls(lambda x: x.masked_fill(x.lt(0), 0)), "lt"),
    "assigned": (lambda: Calls(lambda x: x.clone().index_put_((x < 0,), x.new_zeros(()))), "lt"),
    "forward called": (lambda: Calls(lambda x, act: act.forward(x), nn.ReLU()), "relu"),
    "scripted": (lambda: torch.jit.script(nn.SiLU()), "silu"),
    "F.gelu": (lambda: Calls(F.gelu), "gelu"),
    "GELU": (nn.GELU, "gelu"),
    "SiLU": (nn.SiLU, "silu"),
    "Hardswish": (nn.Hardswish, "hardswish"),
    "ReLU6": (nn.ReLU6, "hardtanh"),
    "PReLU": (nn.PReLU, "prelu"),
    "mixed": (lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), Calls(F.relu)), "relu"),
    "mixed modules": (lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Mish()), "mish"),
    "autograd function": (lambda: Calls(Straight.apply), "mul"),
}
"""Activations that neither DeepLift nor guided backpropagation changes, and the name in the error."""

NOT_LINEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (OwnReLU, "relu"),
    "attention": (lambda: Calls(attend), "bmm"),
    "fused attention": (lambda: Calls(fused), "(bmm|scaled_dot_product)"),
    "F.softmax": (lambda: Calls(lambda x: x.softmax(1)), "softmax"),
    "LogSoftmax": (lambda: nn.LogSoftmax(1), "log_softmax"),
    "F.layer_norm": (lambda: Calls(lambda x: F.layer_norm(x, (8, 8))), "native_layer_norm"),
    "LayerNorm": (lambda: nn.LayerNorm((8, 8)), "native_layer_norm"),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), "native_group_norm"),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(4), "batch_norm"),
    "norm by hand": (lambda: Calls(lambda x: x - x.mean(1, True) / x.std(1, keepdim=True)), "std"),
    "product": (lambda: Calls(lambda x, f: x * f(x), nn.Conv2d(4, 4, 1)), "mul"),
    "square": (lambda: Calls(lambda x: x**2), "pow"),
    "bilinear": (lambda: Calls(lambda x: x @ x.transpose(2, 3)), "bmm"),
    "einsum": (lambda: Calls(lambda x: torch.einsum("bchw,bdhw->bdhw", x, x)), "(bmm|mul)"),
    "own kernel": (
        lambda: Calls(lambda x: F.conv2d(x, x[:1].mean((2, 3))[..., None, None])),
        "conv",
    ),
    "quotient": (lambda: Calls(lambda x: x / (2 + x.mean((1, 2, 3), True))), "div"),
    "reciprocal": (lambda: Calls(lambda x: 1 / (9 + x)), "reciprocal"),
    "rounded": (lambda: Calls(lambda x: x.div(0.5, rounding_mode="floor")), "div"),
    "integers": (lambda: Calls(lambda x: x + x.long()), "_to_copy"),
    "F.max_pool2d": (lambda: Calls(lambda x: F.max_pool2d(x, 2)), "max_pool2d"),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), "adaptive_max_pool2d"),
    "amax": (lambda: Calls(lambda x: x - x.amax(1, True)), "amax"),
    "unpooled": (
        lambda: Calls(
            lambda x, p, u: u(*p(x)), nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        ),
        "max_pool2d",
    ),
    "item": (lambda: Calls(lambda x: x * x.mean().item()), "_local_scalar_dense"),
    "detached": (lambda: Calls(lambda x: x + x.detach()), "add"),
    "no_grad": (lambda: Calls(lambda x: x + no_grad(x)), "mul"),
    "no_grad at last": (lambda: nn.Sequential(nn.ReLU(), Calls(lambda x: x + no_grad(x))), "mul"),
}
"""More that DeepLift has no rule for."""


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("case", [*NOT_IN_MODULES, *NOT_LINEAR])
def test_deeplift_refuses_what_it_would_not_change(case: str, images: Tensor) -> None:
    middle, name = {**NOT_IN_MODULES, **NOT_LINEAR}[case]
    model = build(middle())
    with pytest.raises(
        TypeError, match=rf"Expected `model` to be linear.*got Net with `\w*{name}"
    ) as e:
        get_method("deeplift")(model)(images, 1)
    place = "its own forward" if case == "scripted" else "`middle"  # scripted parts take no hooks
    assert f" in {place}" in str(e.value)
    # The remedy that the error names.
    assert get_method("ig")(model)(images, 1).isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("case", NOT_IN_MODULES)
def test_guided_backprop_refuses_other_activations(case: str, images: Tensor) -> None:
    middle, name = NOT_IN_MODULES[case]
    model = build(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), middle()))
    with pytest.raises(
        TypeError, match=rf"only nn\.ReLU modules as activations.*got Net with `\w*{name}"
    ):
        get_method("guided_backprop")(model)(images, 1)
    assert get_method("saliency")(model)(images, 1).isfinite().all()


@pytest.mark.parametrize(
    "case",
    [
        "subclass",
        "attention",
        "fused attention",
        "GroupNorm",
        "LayerNorm",
        "F.max_pool2d",
        "product",
    ],
)
def test_guided_backprop_leaves_the_gradient_of_other_operations(case: str, images: Tensor) -> None:
    model = build(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), NOT_LINEAR[case][0]()))
    assert get_method("guided_backprop")(model)(images, 1).abs().sum() > 0


class Window(nn.Module):
    """A pooling of maps with other dimensions."""

    def __init__(self, pool: nn.Module, dims: int) -> None:
        super().__init__()
        self.pool, self.dims = pool, dims

    def forward(self, x: Tensor) -> Tensor:
        if self.dims == 1:
            result: Tensor = self.pool(x.flatten(2))[..., None]
            return result
        result = self.pool(x[:, None])
        return result.flatten(1, 2)


def guarded(x: Tensor, act: nn.Module) -> Tensor:
    assert not x.isnan().any() and bool(x.abs().max() < 1e6)
    result: Tensor = act(x)
    return result


SUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ELU": nn.ELU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "Softplus": nn.Softplus,
    "MaxPool1d": lambda: Window(nn.MaxPool1d(2), 1),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "MaxPool2d, ceil": lambda: nn.MaxPool2d(3, 3, ceil_mode=True),
    "MaxPool3d": lambda: Window(nn.MaxPool3d(2), 3),
    "activations side by side": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Tanh()),
    "BatchNorm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
    "averages": lambda: nn.Sequential(nn.AvgPool2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
    "constants": lambda: Calls(lambda x, a: 2 - a(3 * x + 1) / torch.tensor(4.0), nn.ReLU()),
    "constant mask": lambda: Calls(lambda x, a: a(x) * (torch.arange(8) > 3), nn.ReLU()),
    "resized": lambda: Calls(
        lambda x, a: F.interpolate(a(x), scale_factor=2, mode="bilinear"), nn.ReLU()
    ),
    "rolled": lambda: Calls(lambda x, a: F.pad(a(x.roll(1, 2)), (1, 1, 0, 0)).flip(2), nn.ReLU()),
    "guarded": lambda: Calls(guarded, nn.ReLU()),
    "linear": lambda: nn.Conv2d(4, 4, 3),
}


@pytest.mark.parametrize("case", SUPPORTED)
def test_deeplift_adds_up(case: str, images: Tensor) -> None:
    model = build(SUPPORTED[case]())
    maps = get_method("deeplift")(model)(images, 1)
    difference = (model(images) - model(torch.zeros_like(images)))[:, 1]
    torch.testing.assert_close(maps.flatten(1).sum(1), difference, rtol=1e-9, atol=1e-11)
    for i in range(len(images)):
        alone = get_method("deeplift")(model)(images[i : i + 1], 1)
        torch.testing.assert_close(alone[0], maps[i], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tail", [nn.Sigmoid(), nn.Tanh()], ids=str)
def test_deeplift_adds_up_behind_a_tail(tail: nn.Module, images: Tensor) -> None:
    model = nn.Sequential(build(nn.Tanh()), tail)
    maps = get_method("deeplift")(model)(images, torch.tensor([0, 1, 2]))
    difference = (model(images) - model(torch.zeros_like(images))).diagonal()
    torch.testing.assert_close(maps.flatten(1).sum(1), difference, rtol=1e-9, atol=1e-11)


def test_deeplift_refuses_batch_norm_in_training_mode(images: Tensor) -> None:
    model = build(nn.BatchNorm2d(4), eval=False)
    with pytest.raises(TypeError, match="`native_batch_norm` in training mode in `middle` "):
        get_method("deeplift")(model)(images, 1)


OUTSIDE_OF_LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "F.linear": (lambda: Calls(lambda x: F.linear(x, torch.eye(8).to(x) * 3)), "m"),
    "F.conv2d": (lambda: Calls(lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1).to(x))), "convolution"),
    "mean": (lambda: Calls(lambda x: x.mean((2, 3), keepdim=True)), "mean"),
    "scaled": (lambda: Calls(lambda x: 3 * x), "mul"),
    "avg_pool2d": (lambda: Calls(lambda x: F.avg_pool2d(x, 2)), "avg_pool2d"),
    "max_pool2d": (lambda: Calls(lambda x: F.max_pool2d(x, 2)), "max_pool2d"),
    "gelu": (lambda: Calls(F.gelu), "gelu"),
    "shifted": (lambda: Calls(lambda x: x - 3), "sub"),
}


@pytest.mark.parametrize("case", OUTSIDE_OF_LAYERS)
def test_lrp_refuses_what_is_computed_outside_of_layers(case: str, images: Tensor) -> None:
    middle, name = OUTSIDE_OF_LAYERS[case]
    # The function of a module that has a layer: Captum refuses modules without any.
    model = build(nn.Sequential(nn.ReLU(), Wrapped(middle())))
    with pytest.raises(
        TypeError, match=rf"Expected `model` to compute only in torch.nn layers.*`\w*{name}"
    ):
        get_method("lrp")(model)(images, 1)
    assert get_method("abslrp")(model)(images, 1).isfinite().all()


class Wrapped(nn.Module):
    """Calls a function of a module in its own forward, beside a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        assert isinstance(inner, Calls)
        self.layer, self.function = nn.ReLU(), inner.function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    "function", [F.relu, lambda x: x.transpose(2, 3), lambda x: torch.cat([x, x], 1).chunk(2, 1)[0]]
)
def test_lrp_of_functions_that_it_needs_no_rule_for(
    function: Callable[[Tensor], Tensor], images: Tensor
) -> None:
    def layers(last: nn.Module) -> nn.Module:
        return build(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), last))

    with_function = get_method("lrp")(layers(Wrapped(Calls(function))))(images, 1)
    assert with_function.isfinite().all() and with_function.abs().sum() > 0
    if function is F.relu:
        torch.testing.assert_close(with_function, get_method("lrp")(layers(nn.ReLU()))(images, 1))


@pytest.mark.parametrize("name", ["deeplift", "guided_backprop", "lrp"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_methods_work_in_any_grad_mode(name: str, mode: Any, images: Tensor) -> None:
    model = build(nn.ReLU())
    expected = get_method(name)(model)(images, 1)
    with mode():
        torch.testing.assert_close(get_method(name)(model)(images, 1), expected)


class Sides(nn.Module):
    """Two branches that meet at the end."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.join = join
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.join(self.left(x), self.right(x)).mean((2, 3)))
        return result


WAYS_AROUND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "gate": lambda a, b: a * b.sigmoid(),
    "concatenated": lambda a, b: torch.cat([a[:, :2], b[:, 2:]], 1),
}


@pytest.mark.parametrize("case", WAYS_AROUND)
def test_gradcam_refuses_a_map_with_a_way_around(case: str) -> None:
    model, images = Sides(WAYS_AROUND[case]).eval(), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="whose last one, that of `right`, has a bypass"):
        get_method("gradcam")(model)(images, 1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    # The remedy.
    from captum.attr import LayerGradCam

    assert LayerGradCam(model, model.left).attribute(images, target=1).shape == (2, 1, 6, 6)


def channels_last(x: Tensor, layer: nn.Module) -> Tensor:
    result: Tensor = layer(x).permute(0, 2, 3, 1)
    return result


@pytest.mark.parametrize("channels", [4, 24, 64])
def test_gradcam_takes_no_map_with_channels_last(channels: int) -> None:
    conv = nn.Conv2d(3, channels, 3)
    stages = Calls(channels_last, conv)
    model = nn.Sequential(stages, nn.Flatten(1, 2), nn.Flatten(), nn.LazyLinear(3)).eval()
    images = torch.rand(2, 3, 14, 14)
    model(images)
    assert find_feature_layer(model, images) is conv
    assert get_method("gradcam")(model)(images, 1).shape == images.shape
