"""Attribution methods by name: what the command line and comparisons of methods choose from.

A method is a factory ``model -> attribute`` and ``attribute(inputs, target)`` answers images
(B, C, H, W) and classes (one for all, or (B,)) with maps (B, C, H, W). Methods expect a model in
eval mode and leave it, and the inputs, as they were: those of Captum that hook, reassign or cannot
bear in-place activations run on a copy. A method whose rules are of modules would answer a plain
gradient for what a model computes elsewhere, and raises `TypeError` for such a model.
What a method draws by chance depends on the image alone: a second call gives the same maps, and a
batch those of its images. Wherever a method needs a baseline it is 0, the mean color of images
normalized by mean and standard deviation.

Axes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.operations import LINEAR, MOVING, find_operation
from captum_abslrp.text import did_you_mean

__all__ = [
    "AttributionFunction",
    "MethodFactory",
    "find_feature_layer",
    "get_method",
    "list_methods",
    "positive_share",
    "register_method",
]

AttributionFunction = Callable[[Tensor, int | Tensor], Tensor]
"""From images (B, C, H, W) and a target for all or for each to maps of the same shape."""

MethodFactory = Callable[[nn.Module], AttributionFunction]
"""Makes the attribution function of a model."""

_METHODS: dict[str, MethodFactory] = {}


def register_method(
    name: str, *, overwrite: bool = False
) -> Callable[[MethodFactory], MethodFactory]:
    """Decorator that adds a factory to the registry.

    Args:
        name: what the method is called, also by ``captum_abslrp.cli.main`` in this process.
        overwrite: replace a method that has this name already.

    Raises:
        ValueError: if the name is taken and `overwrite` is False.

    Example:
        >>> @register_method("half", overwrite=True)
        ... def half(model):
        ...     return lambda inputs, target: inputs / 2
        >>> "half" in list_methods()
        True
        >>> _ = _METHODS.pop("half")
    """
    if name in _METHODS and not overwrite:
        raise ValueError(
            f"Expected `name` to be new, but got {name!r}, which is registered already; "
            "pass overwrite=True to replace it."
        )

    def register(factory: MethodFactory) -> MethodFactory:
        _METHODS[name] = factory
        return factory

    return register


def list_methods() -> list[str]:
    """Names of all methods, in the order of their registration.

    Example:
        >>> list_methods()[:3]
        ['abslrp', 'lrp', 'ig']
    """
    return list(_METHODS)


def get_method(name: str) -> MethodFactory:
    """The factory registered under a name.

    Raises:
        ValueError: if there is none; the message has the nearest names.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> get_method("inputxgradient")(model)(torch.ones(1, 3, 2, 2), 4).shape
        torch.Size([1, 3, 2, 2])
    """
    if name in _METHODS:
        return _METHODS[name]
    raise ValueError(
        f"Expected `name` to be an attribution method, but got {name!r}"
        f"{did_you_mean(name, _METHODS)}. There are: {', '.join(_METHODS)}."
    )


def positive_share(attribution: Tensor, mask: Tensor) -> Tensor:
    """How much of the positive relevance lies inside a mask.

    Relevance is summed over channels first; then ``share = sum of r^+ inside / sum of r^+``.

    Args:
        attribution: relevance, (B, C, H, W).
        mask: True inside, (B, H, W) bool.

    Returns:
        One share in [0, 1] per image, (B,); 0 where no relevance is positive.

    Raises:
        ValueError: if the shapes do not fit or the mask is not boolean.

    Example:
        >>> attribution = torch.tensor([[[[3.0, 1.0], [-5.0, 0.0]]]])
        >>> mask = torch.tensor([[[True, False], [True, False]]])
        >>> positive_share(attribution, mask)
        tensor([0.7500])
    """
    if attribution.ndim != 4:
        raise ValueError(
            "Expected `attribution` to have shape (B, C, H, W), "
            f"but got {tuple(attribution.shape)}."
        )
    expected = (attribution.shape[0], *attribution.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(
            f"Expected `mask` to be boolean of shape {expected}, "
            f"but got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    positive = attribution.sum(dim=1).clamp(min=0)
    total = positive.flatten(1).sum(dim=1)
    inside = (positive * mask).flatten(1).sum(dim=1)
    return torch.where(total > 0, inside / total.where(total > 0, torch.ones_like(total)), 0)


def find_feature_layer(model: nn.Module, inputs: Tensor) -> nn.Module:
    """The last convolutional feature layer: where Grad-CAM looks.

    It is the module that finishes last among those that hold a convolution and whose output is a
    map (B, D, h, w) larger than 1x1, of the proportions of the image (within a factor of 2: maps with
    channels last are none). A convolution that only cuts the image into patches (stride
    equal to kernel size, applied to the image's own channels) does not count, so a vision
    transformer has no feature layer. Nor does anything behind a convolution without padding whose
    kernel spans more than half of its map: the fully connected layers of timm's VGG are such. The
    model runs once, on the first image, under hooks that are removed whatever happens.

    Args:
        model: an image model in eval mode.
        inputs: images, (B, C, H, W).

    Raises:
        ValueError: if no module qualifies.

    Example:
        >>> body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> find_feature_layer(model, torch.zeros(1, 3, 8, 8)) is body
        True
    """
    channels = inputs.shape[1]

    def is_feature_conv(module: nn.Module) -> bool:
        if not isinstance(module, nn.Conv2d):
            return False
        cuts_patches = module.kernel_size == module.stride and max(module.stride) > 1
        return not (cuts_patches and module.in_channels == channels)

    def connects_all(module: nn.Module, x: Tensor) -> bool:
        if not isinstance(module, nn.Conv2d) or module.padding not in ((0, 0), "valid"):
            return False
        sides = zip(module.kernel_size, x.shape[2:], strict=True)
        return any(1 < kernel > side / 2 for kernel, side in sides)

    def is_map(output: object) -> bool:
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2:].numel() <= 1:
            return False
        (height, width), (h, w) = inputs.shape[2:], output.shape[2:]
        return h * width < 2 * w * height and w * height < 2 * h * width

    finished: list[nn.Module] = []
    head_reached = False

    def note(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        nonlocal head_reached
        head_reached = head_reached or connects_all(module, args[0])
        if is_map(output) and not head_reached:
            finished.append(module)

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if module is not model and any(is_feature_conv(part) for part in module.modules())
    ]
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not finished:
        raise ValueError(
            "Expected `model` to have a convolutional feature map larger than 1x1, "
            f"but got {type(model).__name__} without one; Grad-CAM needs it."
        )
    return finished[-1]


def _require_no_way_around(model: nn.Module, layer: nn.Module, inputs: Tensor) -> None:
    """Raise where Grad-CAM would see a part only of what the output depends on; `model` is a copy."""
    model.requires_grad_(False)
    handle = layer.register_forward_hook(lambda module, args, output: output.detach())
    try:
        with torch.enable_grad():
            output = model(_leaf(inputs[:1]))
    finally:
        handle.remove()
    if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(output)):
        path = next(path for path, module in model.named_modules() if module is layer)
        raise ValueError(
            "Expected `model` to have a convolutional feature map that its output depends on the image "
            f"through, which Grad-CAM needs, but got {type(model).__name__}, whose last one, that of "
            f"`{path}`, has a way around it. Use Captum's `LayerGradCam` with a layer of your choice, or "
            "another method, such as 'abslrp'."
        )


@register_method("abslrp")
def _abslrp(model: nn.Module) -> AttributionFunction:
    return AbsLRP(model).attribute


@register_method("lrp")
def _lrp(model: nn.Module) -> AttributionFunction:
    from captum.attr import LRP

    class LRPOfOperations(LRP):  # type: ignore[misc,unused-ignore]  # untyped base
        layers: list[nn.Module]

        def _get_layers(self, model: nn.Module) -> None:
            super()._get_layers(model)
            # They compute nothing, so the plain backward pass moves relevance with its element.
            no_layers = (nn.Identity, nn.Flatten, _SecondName)
            self.layers = [layer for layer in self.layers if not isinstance(layer, no_layers)]

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = _unshare_layers(_hookable_copy(model), inputs)
        _require_layers(separate, inputs)
        return _maps(LRPOfOperations(separate), inputs, target)

    return attribute


@register_method("ig")
def _integrated_gradients(model: nn.Module) -> AttributionFunction:
    from captum.attr import IntegratedGradients

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        # 50 points of the path at once would need the memory of a batch 50 times as large.
        at_once = max(16, len(inputs))
        return _maps(IntegratedGradients(model), inputs, target, internal_batch_size=at_once)

    return attribute


@register_method("saliency")
def _saliency(model: nn.Module) -> AttributionFunction:
    from captum.attr import Saliency

    return lambda inputs, target: _maps(Saliency(model), inputs, target)


@register_method("inputxgradient")
def _input_x_gradient(model: nn.Module) -> AttributionFunction:
    from captum.attr import InputXGradient

    return lambda inputs, target: _maps(InputXGradient(model), inputs, target)


@register_method("deeplift")
def _deeplift(model: nn.Module) -> AttributionFunction:
    from captum.attr import DeepLift

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = _unshare_layers(_hookable_copy(model), inputs)
        _require_rescaled(separate, inputs)
        with _silenced("Setting forward, backward hooks"):
            return _maps(DeepLift(separate), inputs, target)

    return attribute


@register_method("guided_backprop")
def _guided_backprop(model: nn.Module) -> AttributionFunction:
    from captum.attr import GuidedBackprop

    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise ValueError(
            "Expected `model` to have nn.ReLU modules, which guided backpropagation changes, "
            f"but got {type(model).__name__} without any."
        )

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = _hookable_copy(model)
        _require_relu_modules(separate, inputs)
        with _silenced("Setting backward hooks"):
            return _maps(GuidedBackprop(separate), inputs, target)

    return attribute


@register_method("gradient_shap")
def _gradient_shap(model: nn.Module) -> AttributionFunction:
    from captum.attr import GradientShap

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        method = GradientShap(model)
        maps = []
        # One image at a time: Captum runs all samples of all images as one batch.
        for i, image in enumerate(inputs):
            with _global_seed(_seed_of(image), inputs.device):
                maps.append(
                    _maps(
                        method,
                        image[None],
                        _target_of(target, i),
                        baselines=torch.zeros_like(inputs[:1]),
                        n_samples=16,
                        stdevs=0.1,
                    )
                )
        return torch.cat(maps)

    return attribute


@register_method("gradcam")
def _gradcam(model: nn.Module) -> AttributionFunction:
    from captum.attr import LayerAttribution, LayerGradCam

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = _hookable_copy(model)
        layer = find_feature_layer(separate, inputs)
        _require_no_way_around(separate, layer, inputs)
        method = LayerGradCam(separate, layer)
        coarse = method.attribute(_leaf(inputs), target=target, relu_attributions=True)
        channels, *size = inputs.shape[1:]
        maps: Tensor = LayerAttribution.interpolate(coarse.detach(), tuple(size), "bilinear")
        # Shared out evenly, so that the sum over channels is the class activation map.
        return maps.expand(-1, channels, -1, -1) / channels

    return attribute


@register_method("occlusion")
def _occlusion(model: nn.Module) -> AttributionFunction:
    from captum.attr import Occlusion

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        channels, height, width = inputs.shape[1:]
        window = (channels, max(1, round(height / 8)), max(1, round(width / 8)))
        return _maps(
            Occlusion(model),
            inputs,
            target,
            sliding_window_shapes=window,
            strides=(channels, max(1, window[1] // 2), max(1, window[2] // 2)),
            perturbations_per_eval=8,
        )

    return attribute


@register_method("random")
def _random(model: nn.Module) -> AttributionFunction:
    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        maps = [
            torch.randn(image.shape, generator=torch.Generator().manual_seed(_seed_of(image)))
            for image in inputs
        ]
        return torch.stack(maps).to(inputs)

    return attribute


def _seed_of(image: Tensor) -> int:
    """A seed that depends on the image alone, so that a second call gives the same map."""
    return zlib.crc32(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _maps(method: Any, inputs: Tensor, target: int | Tensor, **options: Any) -> Tensor:
    """What a Captum method answers, without history and in the dtype of the images."""
    maps: Tensor = method.attribute(_leaf(inputs), target=target, **options)
    return maps.detach().to(inputs.dtype)


def _leaf(inputs: Tensor) -> Tensor:
    """A copy that requires gradients: Captum would switch them on at the caller's tensor."""
    return inputs.detach().clone().requires_grad_()


def _target_of(target: int | Tensor, index: int) -> int:
    if isinstance(target, Tensor):
        return int(target.expand(index + 1)[index] if target.numel() == 1 else target[index])
    return target


def _hookable_copy(model: nn.Module) -> nn.Module:
    """A copy whose activations are not in place, as Captum's module hooks need them."""
    separate = copy.deepcopy(model)
    for module in separate.modules():
        if getattr(module, "inplace", False) is True:
            vars(module).update(inplace=False)
    return separate


def _require_layers(model: nn.Module, inputs: Tensor) -> None:
    """Raise where Captum's LRP, whose rules are of layers, would take a gradient for relevance."""
    leaves = {part for part in model.modules() if part is not model and not list(part.children())}
    # A ReLU is 0, and so is its relevance, just where its gradient is.
    found = find_operation(model, inputs, MOVING | {"relu"}, leaves)
    if found is None:
        return
    if found.name == "add":
        raise TypeError(
            "Expected `model` to add tensors in modules only, which is all that Captum's LRP has "
            f"a rule for, but got {type(model).__name__} with additions outside of modules: {found}."
        )
    raise TypeError(
        "Expected `model` to compute in layers of torch.nn only, which is all that Captum's LRP has "
        f"rules for, but got {type(model).__name__} with {found}. Use a layer there, or another "
        "method, such as 'abslrp'."
    )


_RESCALED = (
    nn.ReLU,
    nn.ELU,
    nn.LeakyReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.Softmax,
)
"""The nonlinear layers that Captum's DeepLift has a rule for."""


def _is_rescaled(module: nn.Module) -> bool:
    return type(module) in _RESCALED and not getattr(module, "return_indices", False)


def _require_rescaled(model: nn.Module, inputs: Tensor) -> None:
    """Raise where DeepLift, whose rule is of modules, would leave a gradient as it is."""
    layers = {module for module in model.modules() if _is_rescaled(module)}
    found = find_operation(model, inputs, LINEAR, layers)
    if found is not None:
        known = ", ".join(layer.__name__ for layer in _RESCALED)
        raise TypeError(
            f"Expected `model` to be linear outside of the layers that DeepLift has a rule for ({known} "
            f"of torch.nn), but got {type(model).__name__} with {found}. Use such a layer there, or "
            "another method, such as 'ig'."
        )


_NOT_GUIDED = LINEAR | {
    "_native_batch_norm_legit",
    "_safe_softmax",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_softmax",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "amax",
    "baddbmm",
    "bmm",
    "div",
    "max",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "mm",
    "mul",
    "native_batch_norm",
    "native_group_norm",
    "native_layer_norm",
}
"""What guided backpropagation leaves to the plain gradient: all but activations."""


def _require_relu_modules(model: nn.Module, inputs: Tensor) -> None:
    """Raise where an activation is none that guided backpropagation changes."""
    layers = {module for module in model.modules() if isinstance(module, nn.ReLU)}
    found = find_operation(model, inputs, _NOT_GUIDED, layers, products=True)
    if found is not None:
        raise TypeError(
            "Expected `model` to have no activations but nn.ReLU modules, which guided backpropagation "
            f"changes, but got {type(model).__name__} with {found}. Use nn.ReLU there, or another "
            "method, such as 'saliency'."
        )


class _TakeTurns(nn.Module):
    """Answers call 0, 1, ... of every forward pass with module 0, 1, ..., all of them alike."""

    def __init__(self, module: nn.Module, calls: int) -> None:
        super().__init__()
        self.turns = nn.ModuleList(copy.deepcopy(module) for _ in range(calls))
        self.next = 0

    def forward(self, x: Tensor) -> Tensor:
        module = self.turns[self.next]
        self.next = (self.next + 1) % len(self.turns)
        result: Tensor = module(x)
        return result


class _SecondName(nn.Module):
    """Calls a module that is registered elsewhere: Captum would hook it once per name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The module itself, as an attribute, would be registered under this name, too.
        self.call = module.__call__

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.call(x)
        return result


_ONCE_ONLY = (nn.Dropout, *_RESCALED)
"""Layers without parameters of which DeepLift or LRP bear one call per forward pass, no more."""


def _unshare_layers(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Gives each call of a layer that is used again a module of its own; changes `model`."""
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: object, output: object) -> None:
        calls[module] += 1

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if type(module) in _ONCE_ONLY
    ]
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    registered: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        # Not named_children(), which leaves out the second name of a module that has two.
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child in registered:
                setattr(parent, name, _SecondName(registered[child]))
            elif child in calls:
                registered[child] = _TakeTurns(child, calls[child]) if calls[child] > 1 else child
                setattr(parent, name, registered[child])
    return model


@contextmanager
def _silenced(message: str) -> Iterator[None]:
    """Without the warning that Captum gives whenever it hooks a model (here: a copy)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


@contextmanager
def _global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators, which Captum draws from, and puts their states back."""
    numpy_state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(numpy_state)
