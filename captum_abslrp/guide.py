"""Guided maps, and the search for the guide layer.

Axes: B images, C channels, H height, W width; h, w of the layer's grid, D features, L tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_abslrp.engine.state import own_hooks
from captum_abslrp.tokens import TokenPlaces

__all__ = ["find_guide", "grid_of", "guided"]


def find_guide(
    model: nn.Module,
    inputs: Sequence[Tensor],
    run: Callable[[Tensor], Tensor],
    *,
    position: float = 0.5,
) -> nn.Module:
    """Find a layer in the middle of a model that has no bypass.

    Candidates are modules whose output has a spatial grid (:func:`grid_of`) and separates the image from the
    output of the model. The one that finishes closest to the middle is selected. The model runs once, on the
    first image, with temporary hooks, which are always removed.

    Args:
        model: an image model.
        inputs: the images, a sequence of one tensor, (B, C, H, W).
        run: the forward pass from an image, (1, C, H, W), to the explained output.
        position: relative position of the layer, from 0 (the first candidate) to 1 (the last).

    Returns:
        A module of the model, such as the middle block of a Vision Transformer.

    Raises:
        ValueError: if ``inputs`` is not one tensor of images, or if there is no such layer.
    """
    if len(inputs) != 1 or inputs[0].dim() != 4:
        raise ValueError(
            f'Expected `inputs` to be one tensor of images, (B, C, H, W), for `combine="guided"`, but got '
            f'{[tuple(x.shape) for x in inputs]}. Use `combine="difference"`.'
        )
    image = inputs[0][:1].detach().clone().requires_grad_()
    size = tuple(image.shape[2:])
    finished: list[tuple[nn.Module, Any]] = []
    calls: dict[nn.Module, int] = {}
    thread = threading.get_ident()
    places = TokenPlaces(model, size)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        calls[module] = calls.get(module, 0) + 1
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return
        if len(output) != 1 or not _has_grid(output, size, places, module):  # excludes windows
            return
        # Exclude identities, because other modules may read the same tensor.
        if all(x.grad_fn is not output.grad_fn for x in args if isinstance(x, Tensor)):
            finished.append((module, output.grad_fn))

    def register() -> Iterator[Any]:
        for module in model.modules():
            if module is not model:
                yield module.register_forward_hook(note)

    with own_hooks(register):
        output = run(image)
    folded = _before_batch_norm(output.grad_fn)
    place = (len(finished) - 1) * position
    for index in sorted(range(len(finished)), key=lambda i: abs(i - place)):
        module, node = finished[index]
        if (
            node not in folded
            and calls[module] == 1
            and not _goes_around(output.grad_fn, node, image)
        ):
            return module
    raise ValueError(
        f'Expected {type(model).__name__} to have a layer for `combine="guided"`, without a bypass and with '
        f"an output (B, D, h, w), (B, h, w, D) or (B, L, D), but got none. Pass `guide=model.layer`, or use "
        f'`combine="difference"`.'
    )


def _before_batch_norm(start: Any) -> set[Any]:
    """The nodes whose output goes into a batch norm, which signed rules fold into the layer."""
    seen, rest, found = set(), [start], set()
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        after = [following for following, _ in node.next_functions]
        if "BatchNorm" in type(node).__name__:
            found.add(after[0])
        rest += after
    return found


def _goes_around(start: Any, node: Any, leaf: Tensor) -> bool:
    """Whether the autograd history of an output reaches a leaf on a path around a node."""
    seen, rest = {node}, [start]
    while rest:
        found = rest.pop()
        if found is None or found in seen:
            continue
        if getattr(found, "variable", None) is leaf:
            return True
        seen.add(found)
        rest += [following for following, _ in found.next_functions]
    return False


def _has_grid(output: Tensor, size: tuple[int, ...], places: TokenPlaces, layer: nn.Module) -> bool:
    try:
        return grid_of(output, size, places, layer)[0].numel() > 0
    except ValueError:
        return False


def grid_of(
    values: Tensor,
    size: Sequence[int],
    places: TokenPlaces | None = None,
    layer: nn.Module | None = None,
) -> Tensor:
    """Sum the values of a layer over features and arrange them on the grid of the image.

    The token layout of the model is used if it is known, as in :func:`~captum_abslrp.token_map`, and if the
    values match it. Otherwise, the grid is derived from the aspect ratio of the image.

    Args:
        values: a feature map, (B, D, h, w) or (B, h, w, D), or tokens, (B, L, D). In an unknown layout,
            patch tokens are assumed to come last, in row-major order, after class and register tokens.
        size: height and width of the image. The grid has the same aspect ratio, within a factor of 2.
        places: the token layout of the model, for images of this size.
        layer: the layer of the model that the values belong to.

    Returns:
        (B, h, w).

    Raises:
        ValueError: if the values have another shape, or if the grid would have a single position.

    Example:
        >>> grid_of(torch.ones(2, 197, 64), (224, 224)).shape
        torch.Size([2, 14, 14])
        >>> grid_of(torch.ones(2, 7, 7, 512), (224, 224)).shape
        torch.Size([2, 7, 7])
    """
    if places is not None:
        with suppress(ValueError):
            found = places.map(values, layer)
            if found.shape[1:].numel() > 1:
                return found
    height, width = size
    if values.dim() == 4:  # choose the layout whose aspect ratio is closer to that of the image
        features = min((1, 3), key=lambda dim: _distortion(_without(values, dim), size))
        if _distortion(_without(values, features), size) < 2:
            return values.sum(features)
    if values.dim() == 3:
        tokens = values.shape[1]
        rows = int((tokens * height / width) ** 0.5)
        columns = rows * width // height
        if rows * columns > 1 and tokens - rows * columns <= _MOST_PREFIX_TOKENS:
            return values[:, tokens - rows * columns :].sum(2).unflatten(1, (rows, columns))
    raise ValueError(
        f"Expected values on a grid with the aspect ratio of the image {tuple(size)}, but got shape "
        f"{tuple(values.shape)}. Choose another layer, `guide=model.layer`."
    )


_MOST_PREFIX_TOKENS = 8
"""Maximum number of class and register tokens before the patches."""


def _without(values: Tensor, dim: int) -> list[int]:
    """Height and width of the grid if `dim` is the feature dimension."""
    return [n for i, n in enumerate(values.shape) if i not in (0, dim)]


def _distortion(grid: Sequence[int], size: Sequence[int]) -> float:
    """The ratio of the aspect ratios of grid and image, at least 1; infinite for a single position."""
    (h, w), (height, width) = grid, size
    if h * w <= 1 or height * width == 0:
        return float("inf")
    ratio = h * width / (w * height)
    return max(ratio, 1 / ratio)


def guided(
    fine: Tensor, coarse: Tensor, model: nn.Module | None = None, layer: nn.Module | None = None
) -> Tensor:
    """Weight the map of the target by the positive relevance of the guide layer.

    Args:
        fine: the map of the target, (B, C, H, W).
        coarse: relevance of the layer, target minus contrast, as in :func:`grid_of`.
        model: the model, for the token layout of the layer.
        layer: the layer.

    Returns:
        ``fine`` times the positive part of ``coarse``, upsampled bilinearly, (B, C, H, W), and rescaled to
        the total magnitude of ``fine``.

    Raises:
        ValueError: if the layer has a different number of images, or no grid.
    """
    size = fine.shape[2:]
    places = None if model is None else TokenPlaces(model, tuple(size))
    weight = grid_of(coarse, size, places, layer).clamp(min=0).unsqueeze(1)
    if len(weight) != len(fine):
        raise ValueError(
            f"Expected the guide layer to have the images in its leading dimension ({len(fine)}), but got "
            f"shape {tuple(coarse.shape)}. Choose another layer, `guide=model.layer`."
        )
    found = fine * F.interpolate(weight.to(fine.dtype), size=size, mode="bilinear")
    before, after = (r.abs().flatten(1).sum(1).view(-1, 1, 1, 1) for r in (fine, found))
    return found * torch.where(after > 0, before / after, 0)
