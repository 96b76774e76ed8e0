"""Copies of models for Captum methods that hook modules, and checks of whether these methods are applicable.

A method with rules for modules would silently return plain gradients for functional calls. The checks run
the model once and raise `TypeError` for such a model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from captum_abslrp.operations import LINEAR, MOVING, find_operation

__all__ = [
    "SecondName",
    "find_feature_layer",
    "hookable_copy",
    "leaf_of",
    "require_layers",
    "require_no_way_around",
    "require_relu_modules",
    "require_rescaled",
    "unshare_layers",
]

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


def leaf_of(inputs: Tensor) -> Tensor:
    """Copy the inputs and require gradients; Captum would modify the tensor of the caller."""
    return inputs.detach().clone().requires_grad_()


def hookable_copy(model: nn.Module) -> nn.Module:
    """Copy a model and disable in-place activations, as Captum's module hooks require."""
    separate = copy.deepcopy(model)
    for module in separate.modules():
        if getattr(module, "inplace", False) is True:
            vars(module).update(inplace=False)
    return separate


def _run_hooked(model: nn.Module, inputs: Tensor, handles: Iterable[RemovableHandle]) -> None:
    """Run a model on the first image, and always remove its hooks."""
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()


class _TakeTurns(nn.Module):
    """Run a different copy of a module for each of its calls in a forward pass."""

    def __init__(self, module: nn.Module, calls: int) -> None:
        super().__init__()
        self.turns = nn.ModuleList(copy.deepcopy(module) for _ in range(calls))
        self.next = 0

    def forward(self, x: Tensor) -> Tensor:
        module = self.turns[self.next]
        self.next = (self.next + 1) % len(self.turns)
        result: Tensor = module(x)
        return result


class SecondName(nn.Module):
    """Call a module that is registered under another name; Captum would hook it once per name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The module itself, as an attribute, would also be registered under this name.
        self.call = module.__call__

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.call(x)
        return result


_ONCE_ONLY = (nn.Dropout, *_RESCALED)
"""Layers without parameters that DeepLift or LRP can handle only once per forward pass."""


def unshare_layers(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Replace layers that are called several times by one copy per call; modifies `model`."""
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: object, output: object) -> None:
        calls[module] += 1

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if type(module) in _ONCE_ONLY
    ]
    _run_hooked(model, inputs, handles)
    registered: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        # Not named_children(), which omits the second name of a module.
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child in registered:
                setattr(parent, name, SecondName(registered[child]))
            elif child in calls:
                registered[child] = _TakeTurns(child, calls[child]) if calls[child] > 1 else child
                setattr(parent, name, registered[child])
    return model


def find_feature_layer(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return the last convolutional feature layer, for Grad-CAM.

    Candidates are modules that contain a convolution and whose output is a map (B, D, h, w) larger than 1x1
    with the aspect ratio of the image, within a factor of 2 (which excludes channels-last maps). The one
    that finishes last is returned. A convolution that only embeds patches (stride equal to kernel size,
    applied to the image) does not count, so a vision transformer has no feature layer. Modules after an
    unpadded convolution whose kernel covers more than half of its map do not count either, such as the
    fully connected layers of timm's VGG. The model runs once, on the first image, with temporary hooks.

    Args:
        model: an image model in evaluation mode.
        inputs: images, (B, C, H, W).

    Raises:
        ValueError: if there is no such module.

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
    _run_hooked(model, inputs, handles)
    if not finished:
        raise ValueError(
            "Expected `model` to have a convolutional feature map larger than 1x1 for Grad-CAM, "
            f"but got {type(model).__name__} without one. Use another method, such as 'abslrp'."
        )
    return finished[-1]


def require_no_way_around(model: nn.Module, layer: nn.Module, inputs: Tensor) -> None:
    """Raise if the Grad-CAM layer has a bypass; `model` is a copy."""
    model.requires_grad_(False)
    handle = layer.register_forward_hook(lambda module, args, output: output.detach())
    try:
        with torch.enable_grad():
            output = model(leaf_of(inputs[:1]))
    finally:
        handle.remove()
    if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(output)):
        path = next(path for path, module in model.named_modules() if module is layer)
        raise ValueError(
            "Expected `model` to have a convolutional feature map without a bypass for Grad-CAM, but got "
            f"{type(model).__name__}, whose last one, that of `{path}`, has a bypass. Use Captum's "
            "`LayerGradCam` with another layer, or another method, such as 'abslrp'."
        )


def require_layers(model: nn.Module, inputs: Tensor) -> None:
    """Raise if Captum's LRP, which has rules for layers, would use a plain gradient as relevance."""
    leaves = {part for part in model.modules() if part is not model and not list(part.children())}
    # The output, the relevance and the gradient of a ReLU are 0 at the same elements.
    found = find_operation(model, inputs, MOVING | {"relu"}, leaves)
    if found is None:
        return
    if found.name == "add":
        raise TypeError(
            "Expected `model` to add tensors only in modules, as Captum's LRP requires, but got "
            f"{type(model).__name__} with additions outside of modules: {found}. Use another method, such "
            "as 'abslrp'."
        )
    raise TypeError(
        "Expected `model` to compute only in torch.nn layers, as Captum's LRP requires, but got "
        f"{type(model).__name__} with {found}. Use a layer for this operation, or another method, such as "
        "'abslrp'."
    )


def _is_rescaled(module: nn.Module) -> bool:
    return type(module) in _RESCALED and not getattr(module, "return_indices", False)


def require_rescaled(model: nn.Module, inputs: Tensor) -> None:
    """Raise if DeepLift, which has a rule for modules, would use a plain gradient."""
    layers = {module for module in model.modules() if _is_rescaled(module)}
    found = find_operation(model, inputs, LINEAR, layers)
    if found is not None:
        known = ", ".join(layer.__name__ for layer in _RESCALED)
        raise TypeError(
            f"Expected `model` to be linear outside of the torch.nn layers that DeepLift supports ({known}), "
            f"but got {type(model).__name__} with {found}. Use such a layer for this operation, or another "
            "method, such as 'ig'."
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
"""Operations for which guided backpropagation uses the plain gradient: all except activations."""


def require_relu_modules(model: nn.Module, inputs: Tensor) -> None:
    """Raise if guided backpropagation does not handle one of the activations."""
    layers = {module for module in model.modules() if isinstance(module, nn.ReLU)}
    found = find_operation(model, inputs, _NOT_GUIDED, layers, products=True)
    if found is not None:
        raise TypeError(
            "Expected `model` to have only nn.ReLU modules as activations, as guided backpropagation "
            f"requires, but got {type(model).__name__} with {found}. Use nn.ReLU for this operation, or "
            "another method, such as 'saliency'."
        )
