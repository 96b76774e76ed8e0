"""Copies of models for methods of Captum that hook modules, and checks of what these methods can see.

A method whose rules are of modules would return a plain gradient for what a model computes elsewhere. The
checks run the model once and raise `TypeError` for such a model.
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
    """A copy that requires gradients: Captum would switch them on at the caller's tensor."""
    return inputs.detach().clone().requires_grad_()


def hookable_copy(model: nn.Module) -> nn.Module:
    """A copy whose activations are not in place, as Captum's module hooks need them."""
    separate = copy.deepcopy(model)
    for module in separate.modules():
        if getattr(module, "inplace", False) is True:
            vars(module).update(inplace=False)
    return separate


def _run_hooked(model: nn.Module, inputs: Tensor, handles: Iterable[RemovableHandle]) -> None:
    """Run a model on the first image, and remove its hooks whatever happens."""
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()


class _TakeTurns(nn.Module):
    """Runs module 0, 1, ... for call 0, 1, ... of every forward pass; the modules are copies of one."""

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
    """Calls a module that is registered elsewhere: Captum would hook it once per name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The module itself, as an attribute, would be registered under this name, too.
        self.call = module.__call__

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.call(x)
        return result


_ONCE_ONLY = (nn.Dropout, *_RESCALED)
"""Layers without parameters that DeepLift or LRP can handle once per forward pass only."""


def unshare_layers(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Gives each call of a layer that is used again a module of its own; changes `model`."""
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
        # Not named_children(), which leaves out the second name of a module that has two.
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
    _run_hooked(model, inputs, handles)
    if not finished:
        raise ValueError(
            "Expected `model` to have a convolutional feature map larger than 1x1, "
            f"but got {type(model).__name__} without one; Grad-CAM needs it."
        )
    return finished[-1]


def require_no_way_around(model: nn.Module, layer: nn.Module, inputs: Tensor) -> None:
    """Raise where Grad-CAM would see a part only of what the output depends on; `model` is a copy."""
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
            "Expected `model` to have a convolutional feature map that its output depends on the image "
            f"through, which Grad-CAM needs, but got {type(model).__name__}, whose last one, that of "
            f"`{path}`, has a way around it. Use Captum's `LayerGradCam` with a layer of your choice, or "
            "another method, such as 'abslrp'."
        )


def require_layers(model: nn.Module, inputs: Tensor) -> None:
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


def _is_rescaled(module: nn.Module) -> bool:
    return type(module) in _RESCALED and not getattr(module, "return_indices", False)


def require_rescaled(model: nn.Module, inputs: Tensor) -> None:
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


def require_relu_modules(model: nn.Module, inputs: Tensor) -> None:
    """Raise where guided backpropagation does not change one of the activations."""
    layers = {module for module in model.modules() if isinstance(module, nn.ReLU)}
    found = find_operation(model, inputs, _NOT_GUIDED, layers, products=True)
    if found is not None:
        raise TypeError(
            "Expected `model` to have no activations but nn.ReLU modules, which guided backpropagation "
            f"changes, but got {type(model).__name__} with {found}. Use nn.ReLU there, or another "
            "method, such as 'saliency'."
        )
