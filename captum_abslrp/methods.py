"""Attribution methods by name: what the command line and comparisons of methods choose from.

A method is a factory ``model -> attribute``; ``attribute(inputs, target)`` returns maps (B, C, H, W) of
images (B, C, H, W) and classes (one for all, or (B,)). Methods expect a model in eval mode and leave it,
and the inputs, as they were: those of Captum that hook modules, reassign them or fail on in-place
activations run on a copy. A method whose rules are of modules would return a plain gradient for what a
model computes elsewhere, and raises `TypeError` for such a model. Random numbers depend on the image
alone: a second call gives the same maps, and a batch gives those of its images. Wherever a
method needs a baseline it is 0, the mean color of images normalized by mean and standard deviation.

Axes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from captum.attr import (
    LRP,
    DeepLift,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.hookable import (
    SecondName,
    find_feature_layer,
    hookable_copy,
    leaf_of,
    require_layers,
    require_no_way_around,
    require_relu_modules,
    require_rescaled,
    unshare_layers,
)
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
        ['abslrp', 'abslrp_recommended', 'lrp']
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


@register_method("abslrp")
def _abslrp(model: nn.Module) -> AttributionFunction:
    return AbsLRP(model).attribute


@register_method("abslrp_recommended")
def _abslrp_recommended(model: nn.Module) -> AttributionFunction:
    return AbsLRP.recommended(model).attribute


class _LRPOfOperations(LRP):  # type: ignore[misc,unused-ignore]  # untyped base
    """Captum's LRP, which asks for no rule of layers that compute nothing."""

    layers: list[nn.Module]

    def _get_layers(self, model: nn.Module) -> None:
        super()._get_layers(model)
        # The plain backward pass moves relevance with its element there.
        no_layers = (nn.Identity, nn.Flatten, SecondName)
        self.layers = [layer for layer in self.layers if not isinstance(layer, no_layers)]


@register_method("lrp")
def _lrp(model: nn.Module) -> AttributionFunction:
    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = unshare_layers(hookable_copy(model), inputs)
        require_layers(separate, inputs)
        return _maps(_LRPOfOperations(separate), inputs, target)

    return attribute


@register_method("ig")
def _integrated_gradients(model: nn.Module) -> AttributionFunction:
    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        # 50 points of the path at once would need the memory of a batch 50 times as large.
        at_once = max(16, len(inputs))
        return _maps(IntegratedGradients(model), inputs, target, internal_batch_size=at_once)

    return attribute


@register_method("saliency")
def _saliency(model: nn.Module) -> AttributionFunction:
    return lambda inputs, target: _maps(Saliency(model), inputs, target)


@register_method("inputxgradient")
def _input_x_gradient(model: nn.Module) -> AttributionFunction:
    return lambda inputs, target: _maps(InputXGradient(model), inputs, target)


@register_method("deeplift")
def _deeplift(model: nn.Module) -> AttributionFunction:
    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = unshare_layers(hookable_copy(model), inputs)
        require_rescaled(separate, inputs)
        with _silenced("Setting forward, backward hooks"):
            return _maps(DeepLift(separate), inputs, target)

    return attribute


@register_method("guided_backprop")
def _guided_backprop(model: nn.Module) -> AttributionFunction:
    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise ValueError(
            "Expected `model` to have nn.ReLU modules, which guided backpropagation changes, "
            f"but got {type(model).__name__} without any."
        )

    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = hookable_copy(model)
        require_relu_modules(separate, inputs)
        with _silenced("Setting backward hooks"):
            return _maps(GuidedBackprop(separate), inputs, target)

    return attribute


@register_method("gradient_shap")
def _gradient_shap(model: nn.Module) -> AttributionFunction:
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
    def attribute(inputs: Tensor, target: int | Tensor) -> Tensor:
        separate = hookable_copy(model)
        layer = find_feature_layer(separate, inputs)
        require_no_way_around(separate, layer, inputs)
        method = LayerGradCam(separate, layer)
        coarse = method.attribute(leaf_of(inputs), target=target, relu_attributions=True)
        channels, *size = inputs.shape[1:]
        maps: Tensor = LayerAttribution.interpolate(coarse.detach(), tuple(size), "bilinear")
        # Shared out evenly, so that the sum over channels is the class activation map.
        return maps.expand(-1, channels, -1, -1) / channels

    return attribute


@register_method("guided_gradcam")
def _guided_gradcam(model: nn.Module) -> AttributionFunction:
    fine, coarse = _guided_backprop(model), _gradcam(model)
    return lambda inputs, target: fine(inputs, target) * coarse(inputs, target)


@register_method("occlusion")
def _occlusion(model: nn.Module) -> AttributionFunction:
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
    """The maps of a method of Captum, without history and in the dtype of the images."""
    maps: Tensor = method.attribute(leaf_of(inputs), target=target, **options)
    return maps.detach().to(inputs.dtype)


def _target_of(target: int | Tensor, index: int) -> int:
    if isinstance(target, Tensor):
        return int(target.expand(index + 1)[index] if target.numel() == 1 else target[index])
    return target


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
