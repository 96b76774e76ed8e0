"""Registry of attribution methods, for the command line and for comparisons.

A method is a factory ``model -> attribute``; ``attribute(inputs, target)`` returns maps, (B, C, H, W), for
images, (B, C, H, W), and classes (one for all, or (B,)). Methods expect a model in evaluation mode and
modify neither the model nor the inputs: Captum methods that hook modules, reassign them or fail on in-place
activations run on a copy. A method with rules for modules would return plain gradients for functional calls,
and therefore raises `TypeError` for models that use them. Random numbers depend only on the image, so
results are deterministic and do not depend on the batch. The baseline, where one is needed, is 0, the mean
color of normalized images.

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
"""Maps images, (B, C, H, W), and one target for all or for each to attributions of the same shape."""

MethodFactory = Callable[[nn.Module], AttributionFunction]
"""Creates the attribution function of a model."""

_METHODS: dict[str, MethodFactory] = {}


def register_method(
    name: str, *, overwrite: bool = False
) -> Callable[[MethodFactory], MethodFactory]:
    """Register a factory under a name; for use as a decorator.

    Args:
        name: the name of the method, also for ``captum_abslrp.cli.main`` in this process.
        overwrite: whether to replace an existing method of this name.

    Raises:
        ValueError: if the name is already registered and `overwrite` is False.

    Example:
        >>> @register_method("half")
        ... def half(model):
        ...     return lambda inputs, target: inputs / 2
        >>> "half" in list_methods()
        True
    """
    if name in _METHODS and not overwrite:
        raise ValueError(
            f"Expected `name` to be new, but got {name!r}, which is already registered. "
            "Pass `overwrite=True` to replace it."
        )

    def register(factory: MethodFactory) -> MethodFactory:
        _METHODS[name] = factory
        return factory

    return register


def list_methods() -> list[str]:
    """Return the names of all methods, in the order of registration.

    Example:
        >>> list_methods()[:3]
        ['abslrp', 'abslrp_recommended', 'lrp']
    """
    return list(_METHODS)


def get_method(name: str) -> MethodFactory:
    """Return the factory that is registered under a name.

    Raises:
        ValueError: if the name is unknown. The message suggests similar names.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> get_method("inputxgradient")(model)(torch.ones(1, 3, 2, 2), 4).shape
        torch.Size([1, 3, 2, 2])
    """
    if name in _METHODS:
        return _METHODS[name]
    raise ValueError(
        f"Expected `name` to be an attribution method, but got {name!r}"
        f"{did_you_mean(name, _METHODS)}. Available methods: {', '.join(_METHODS)}."
    )


def positive_share(attribution: Tensor, mask: Tensor) -> Tensor:
    """Compute the share of positive relevance inside a mask.

    Relevance is summed over channels first; then ``share = sum of r^+ inside / sum of r^+``.

    Args:
        attribution: relevance, (B, C, H, W).
        mask: True inside, (B, H, W) bool.

    Returns:
        One share in [0, 1] per image, (B,); 0 where no relevance is positive.

    Raises:
        ValueError: if the shapes do not match or the mask is not boolean.

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
    """Captum's LRP without the requirement of rules for layers that compute nothing."""

    layers: list[nn.Module]

    def _get_layers(self, model: nn.Module) -> None:
        super()._get_layers(model)
        # In these layers, the plain backward pass moves relevance with its element.
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
        # Running all 50 points of the path at once would need 50 times the memory.
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
            "Expected `model` to have nn.ReLU modules for guided backpropagation, "
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
        # One image at a time, because Captum runs all samples of all images as one batch.
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
        # Split evenly, so that the sum over channels is the class activation map.
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
    """A random seed that depends only on the image, so that results are deterministic."""
    return zlib.crc32(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _maps(method: Any, inputs: Tensor, target: int | Tensor, **options: Any) -> Tensor:
    """The maps of a Captum method, detached and in the dtype of the images."""
    maps: Tensor = method.attribute(leaf_of(inputs), target=target, **options)
    return maps.detach().to(inputs.dtype)


def _target_of(target: int | Tensor, index: int) -> int:
    if isinstance(target, Tensor):
        return int(target.expand(index + 1)[index] if target.numel() == 1 else target[index])
    return target


@contextmanager
def _silenced(message: str) -> Iterator[None]:
    """Suppress the warning that Captum raises when it hooks a model (here: a copy)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


@contextmanager
def _global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which Captum uses, and restore their states on exit."""
    numpy_state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(numpy_state)
