"""What relevance starts from: the target, and what the target is held against.

Axes: B samples, K classes. A *seed* is relevance of the model's output: shaped like the output, its
sum over each sample is one.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.calls import on_host

__all__ = ["Contrast", "Target", "contrast_seed", "expand_target", "target_seed"]

Target = None | int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]]
"""Target in every form that Captum takes."""

Contrast = None | str | int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]]
"""``"others"``, ``"softmax"``, None, or classes in every form of :data:`Target`."""


def expand_target(target: Any, batch_size: int, *, name: str = "target") -> Tensor | None:
    """Bring a target in any of Captum's forms to one row of indices per sample.

    Args:
        target: None; an int or a tensor of one element (for all samples); a list or 1-d tensor of B
            ints; a tuple of ints (one index for all samples of an output of more than two
            dimensions); a list of B such tuples.
        batch_size: B.
        name: name of the argument, for messages.

    Returns:
        Integer tensor of shape (B, number of output dimensions - 1), or None.

    Raises:
        TypeError: if it is none of these.
        ValueError: if its length is not B.

    Example:
        >>> expand_target([3, 1], 2)
        tensor([[3],
                [1]])
        >>> expand_target((0, 5), 2)
        tensor([[0, 5],
                [0, 5]])
    """
    if target is None:
        return None
    if isinstance(target, Tensor):
        integers = not (target.is_floating_point() or target.dtype == torch.bool)
        if not integers or (target.dim() > 1 and target.numel() > 1):
            raise TypeError(
                f"Expected `{name}` to be a tensor of integers with at most one dimension, but got "
                f"{target.dtype} of shape {tuple(target.shape)}."
            )
        rows = target.detach().reshape(-1, 1).long().cpu()
    elif isinstance(target, tuple) and target and all(map(_is_int, target)):
        rows = torch.tensor([list(map(int, target))])
    elif _is_int(target):
        rows = torch.tensor([[int(target)]])
    elif isinstance(target, list) and target and all(map(_is_int, target)):
        rows = torch.tensor(list(map(int, target))).unsqueeze(1)
    elif isinstance(target, list) and target and all(isinstance(t, tuple) for t in target):
        if len({len(t) for t in target}) > 1:
            raise ValueError(
                f"Expected the tuples of `{name}` to have one length, but got {target}."
            )
        rows = torch.tensor(target)
        if rows.is_floating_point():
            raise TypeError(f"Expected the tuples of `{name}` to hold integers, but got {target}.")
    else:
        raise TypeError(
            f"Expected `{name}` to be an int, a tuple of ints, a list of either or a tensor of "
            f"integers, but got {target!r}."
        )
    single = not isinstance(target, list) and rows.shape[0] == 1
    if not single and rows.shape[0] != batch_size:
        raise ValueError(
            f"Expected `{name}` to have one entry per sample ({batch_size}), but got "
            f"{rows.shape[0]} entries."
        )
    return rows.expand(batch_size, -1)


def target_seed(output: Tensor, target: Tensor | None, *, name: str = "target") -> Tensor:
    """The seed that is one at the target.

    Args:
        output: (B, K), (B,), or (B, ...) with more dimensions.
        target: indices as returned by :func:`expand_target`, or None: the predicted class of an
            output (B, K), or the only output of each sample.
        name: name of the argument, for messages.

    Returns:
        Tensor shaped like ``output``.

    Raises:
        ValueError: if no target was given for an output of more than two dimensions, or if it has
            another number of indices than the output has dimensions.
        IndexError: if an index is out of range.

    Example:
        >>> target_seed(torch.tensor([[0.1, 0.9]]), None)
        tensor([[0., 1.]])
    """
    seed = torch.zeros_like(output)
    if output[0].numel() == 1:
        if target is not None and on_host(((target != 0) & (target != -1)).any()):
            raise IndexError(
                f"Expected `{name}` to be 0 or None for a model with one output per sample, but got "
                f"{target[((target != 0) & (target != -1)).any(1)][0].tolist()}."
            )
        return torch.ones_like(output)
    if target is None:
        if output.dim() != 2:
            raise ValueError(
                f"Expected `{name}` to be a tuple of {output.dim() - 1} indices for an output of shape "
                f"{tuple(output.shape)}, but got None."
            )
        return seed.scatter(1, output.argmax(1, keepdim=True), 1.0)
    sizes = torch.tensor(output.shape[1:])
    if target.shape[1] != len(sizes):
        raise ValueError(
            f"Expected `{name}` to have {len(sizes)} indices per sample for an output of shape "
            f"{tuple(output.shape)}, but got {target.shape[1]}."
        )
    # Targets are on the host, see `expand_target`: nothing has to be waited for.
    outside = ((target < -sizes) | (target >= sizes)).any(1)
    if on_host(outside.any()):
        raise IndexError(
            f"Expected `{name}` to lie within the output shape {tuple(output.shape[1:])} of each "
            f"sample, but got {target[outside][0].squeeze().tolist()}."
        )
    samples = torch.arange(len(output), device=output.device)
    at = (target % sizes).to(output.device, non_blocking=True)
    one = torch.ones((), dtype=seed.dtype, device=seed.device)
    return seed.index_put((samples, *at.unbind(1)), one)


def contrast_seed(output: Tensor, target: Tensor, contrast: Contrast) -> Tensor | None:
    """The seed that the target's is held against.

    Args:
        output: as for :func:`target_seed`.
        target: seed of the target.
        contrast: ``"others"``: uniform over all other classes, as published; ``"softmax"``: the
            other classes weighted by their softmax probability; indices as returned by
            :func:`expand_target`: one other class; None: no contrast. Classes are the last
            dimension of an output of two or three dimensions, and dimension 1 of one with more
            (dense prediction).

    Returns:
        Tensor shaped like ``output``, or None where there is no contrast or only one class.

    Raises:
        ValueError: if ``contrast`` is an unknown word, or the target itself.

    Example:
        >>> output = torch.tensor([[0.0, 1.0, 1.0]])
        >>> contrast_seed(output, target_seed(output, None), "others")
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    check_contrast(contrast)
    if contrast is None or output[0].numel() == 1:
        return None
    if isinstance(contrast, Tensor):
        seed = target_seed(output, contrast, name="contrast")
        same = (seed * target).flatten(1).any(1)
        if on_host(same.any()):
            raise ValueError(
                "Expected `contrast` to be another class than `target`, but got the same one for "
                f"sample {same.tolist().index(True)}."
            )
        return seed
    classes = 1 if output.dim() > 3 else -1
    if output.shape[classes] == 1:
        return None
    # 1 at every class of the position that the target is in, and 0 elsewhere.
    position = target.sum(classes, keepdim=True)
    others = position - target
    if contrast == "softmax":
        wide = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        others = others * (wide.masked_fill(target > 0, -torch.inf)).softmax(classes)
        return others.to(output.dtype)
    return others / (output.shape[classes] - 1)


def check_contrast(contrast: Any) -> None:
    """Raise a ValueError where a contrast is a word that is none."""
    if isinstance(contrast, str) and contrast not in ("others", "softmax"):
        raise ValueError(
            f'Expected `contrast` to be "others", "softmax", None or other classes, but got '
            f"{contrast!r}."
        )


def _is_int(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype in (torch.int64, torch.int32)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
