"""Seeds: the initial relevance of the backward pass, for the target and for the contrast.

Axes: B samples, K classes. A *seed* is the relevance of the model's output. It has the shape of the output
and sums to one over each sample.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine.arguments import on_host
from captum_abslrp.engine.messages import warn
from captum_abslrp.engine.saved import in_full_precision
from captum_abslrp.scores import Score

__all__ = [
    "DEFAULT",
    "Contrast",
    "Default",
    "Target",
    "class_dimension",
    "contrast_seed",
    "expand_target",
    "fitting_targets",
    "target_seed",
]

Target = None | int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | Score
"""A target in any form that Captum accepts, or a function of the output."""

Contrast = None | str | int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | Score
"""``"others"``, ``"softmax"``, None, classes in any form of :data:`Target`, or a function of the output."""


class Default:
    """Placeholder for an argument that is not passed, where None is a valid value."""

    def __repr__(self) -> str:
        return "default"


DEFAULT = Default()


def expand_target(target: Any, batch_size: int, *, name: str = "target") -> Tensor | None:
    """Convert a target in any of Captum's forms to one row of indices per sample.

    Args:
        target: None; an int or a one-element tensor (for all samples); a list or 1-d tensor of B ints; a
            tuple of ints (one index per dimension, for all samples) for outputs with more than two
            dimensions; or a list of B such tuples.
        batch_size: B.
        name: name of the argument, for messages.

    Returns:
        Integer tensor of shape (B, number of indices per sample), or None.

    Raises:
        TypeError: if the target has none of these forms.
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
                f"Expected the tuples of `{name}` to have the same length, but got {target}."
            )
        rows = torch.tensor(target)
        if rows.is_floating_point():
            raise TypeError(f"Expected the tuples of `{name}` to contain ints, but got {target}.")
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


def target_seed(
    output: Tensor,
    target: Tensor | None,
    *,
    class_dim: int | None = None,
    name: str = "target",
    signed: bool = False,
    checked: bool = True,
) -> Tensor:
    """Compute the seed of the target: one at a single element, or spread over the elements of a sum.

    Args:
        output: (B, K), (B,), or (B, ...) with more dimensions.
        target: indices from :func:`expand_target`, (B, I), for the first I dimensions after the batch
            dimension. If the output has more dimensions, the target is the sum over the remaining ones, and
            the seed is distributed by magnitude, ``|x_i| / sum |x_j|``, or evenly if all values are zero.
            None selects the predicted class of an output with one value per class, or the only output.
        class_dim: as in :func:`class_dimension`.
        name: name of the argument, for messages.
        signed: whether the seed is the value of the output instead of one.
        checked: whether to raise an error for indices that are out of range; otherwise the seed of such a
            sample is undefined.

    Returns:
        Tensor with the shape of ``output``, in float32 if ``output`` has half precision.

    Raises:
        ValueError: if the target is None and the output has several values per class, if the target
            has more indices than the output has dimensions, if the output is empty, or if the class
            dimension is the batch dimension.
        IndexError: if an index or the class dimension is out of range.

    Example:
        >>> target_seed(torch.tensor([[0.1, 0.9]]), None)
        tensor([[0., 1.]])
        >>> target_seed(torch.tensor([[[1.0, -3.0], [5.0, 5.0]]]), torch.tensor([[0]]))
        tensor([[[0.2500, 0.7500],
                 [0.0000, 0.0000]]])
    """
    classes = class_dimension(output, class_dim)
    output = in_full_precision(output)
    values = output[0].numel()
    if values == 0:
        raise ValueError(
            f"Expected the model to return at least one value per sample, but got an output of shape "
            f"{tuple(output.shape)}."
        )
    if values == 1:
        outside = None if target is None else ~_in_range(output, target)
        if checked and target is not None and outside is not None and on_host(outside.any()):
            raise IndexError(
                f"Expected `{name}` to be 0 or None for a model with one output per sample, but got "
                f"{target[outside][0].tolist()}."
            )
        return output if signed else torch.ones_like(output)
    if target is None:
        if values != output.shape[classes]:
            raise ValueError(
                f"Expected `{name}` to be a tuple of {output.dim() - 1} indices for an output of shape "
                f"{tuple(output.shape)}, which has more than one value per class (dimension {classes}), "
                f"but got None. Pass fewer indices to explain the sum over the remaining dimensions."
            )
        ones = torch.zeros_like(output).scatter(classes, output.argmax(classes, keepdim=True), 1.0)
        return ones * output if signed else ones
    indexed = target.shape[1]
    if indexed > output.dim() - 1:
        raise ValueError(
            f"Expected `{name}` to have at most {output.dim() - 1} indices per sample for an output of "
            f"shape {tuple(output.shape)}, but got {indexed}."
        )
    scores = _sums_behind(output, indexed)
    if checked:
        outside = ~_in_range(scores, target)
        if on_host(outside.any()):
            raise IndexError(
                f"Expected `{name}` to be within the output shape {tuple(scores.shape[1:])} of each "
                f"sample, but got {target[outside][0].squeeze().tolist()}."
            )
    ones = _one_hot(scores, target)
    return _spread(ones, output, indexed, signed=signed)


def contrast_seed(
    output: Tensor,
    target: Tensor | None,
    contrast: Contrast,
    *,
    class_dim: int | None = None,
    logits: Tensor | None = None,
    signed: bool = False,
    checked: bool = True,
) -> Tensor | None:
    """Compute the seed of the contrast.

    Args:
        output, target, class_dim: as in :func:`target_seed`.
        contrast: ``"others"`` is uniform over all other classes, as published; ``"softmax"`` weights the
            other classes by their softmax probability; indices from :func:`expand_target` select one other
            class; None means no contrast. If the target is a sum over some dimensions, so is each class.
        logits: the logits of the output if it consists of probabilities; by default, the output itself.
        signed, checked: as in :func:`target_seed`.

    Returns:
        Tensor as in :func:`target_seed`, or None if there is no contrast or only one class.

    Warns:
        UserWarning: if an output with several values per sample has a single class in dimension 1, and
            ``class_dim`` is None.

    Raises:
        ValueError: if ``contrast`` is an unknown string or equals the target, or if the target is a sum
            over classes, which has no contrast.
        IndexError: as in :func:`target_seed`.

    Example:
        >>> output = torch.tensor([[0.0, 1.0, 1.0]])
        >>> contrast_seed(output, torch.tensor([[1]]), "others")
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    check_contrast(contrast)
    if contrast is None or output[0].numel() == 1:
        return None
    if isinstance(contrast, Tensor):
        seed = target_seed(output, contrast, class_dim=class_dim, name="contrast", checked=checked)
        same = _is_same(seed, target_seed(output, target, class_dim=class_dim, checked=checked))
        if checked and on_host(same.any()):
            raise ValueError(
                "Expected `contrast` and `target` to be different classes, but got the same class for "
                f"sample {same.tolist().index(True)}."
            )
        if signed:
            return target_seed(output, contrast, class_dim=class_dim, signed=True, checked=checked)
        return seed
    classes = class_dimension(output, class_dim)
    indexed = output.dim() - 1 if target is None else target.shape[1]
    if classes > indexed:
        raise ValueError(
            f"Expected `target` to select a class with `contrast={contrast!r}`, but got {indexed} of the "
            f"{output.dim() - 1} indices of an output of shape {tuple(output.shape)} with classes in "
            f"dimension {classes}, which is a sum over all classes. Pass `contrast=None`, or the class "
            f"dimension as `class_dim`."
        )
    scores = _sums_behind(in_full_precision(output), indexed)
    if scores.shape[classes] == 1:
        if class_dim is None:
            warn(
                f"Expected more than one class in dimension 1 of the output for `contrast={contrast!r}`, but "
                f"got shape {tuple(output.shape)}. The map is that of the target alone. Pass `class_dim` if "
                f"the classes are in another dimension, or `contrast=None`."
            )
        return None
    chosen = target_seed(scores, target, class_dim=classes, checked=checked)
    # 1 at every other class at the position of the target, and 0 elsewhere.
    others = chosen.sum(classes, keepdim=True) - chosen
    if contrast == "softmax":
        if logits is not None:
            scores = _sums_behind(in_full_precision(logits), indexed)
        others = others * scores.masked_fill(chosen > 0, -torch.inf).softmax(classes)
    else:
        others = others / (scores.shape[classes] - 1)
    return _spread(others, output, indexed, signed=signed)


def class_dimension(output: Tensor, class_dim: int | None) -> int:
    """Return the class dimension of an output.

    Args:
        output: (B, ...).
        class_dim: index of the dimension, which can be negative. None is dimension 1, the convention of
            Captum and PyTorch.

    Raises:
        IndexError: if the output has no such dimension.
        ValueError: if it is the batch dimension.

    Example:
        >>> class_dimension(torch.rand(2, 5, 7, 7), None), class_dimension(torch.rand(2, 9, 5), -1)
        (1, 2)
    """
    if class_dim is None:
        return 1
    dims = output.dim()
    has = f"has dimensions 1 to {dims - 1}" if dims > 1 else "has none"
    message = (
        f"Expected `class_dim` to be a dimension of each sample of an output of shape "
        f"{tuple(output.shape)}, which {has}, but got {class_dim}"
    )
    if not -dims <= class_dim < dims:
        raise IndexError(f"{message}.")
    if class_dim % dims == 0:
        raise ValueError(f"{message}, which is the batch dimension.")
    return class_dim % dims


def _sums_behind(output: Tensor, indexed: int) -> Tensor:
    """The sums of an output (B, ...) over all dimensions after the first `indexed` ones of each sample."""
    return output if indexed == output.dim() - 1 else output.flatten(indexed + 1).sum(-1)


def fitting_targets(
    output: Tensor, target: Tensor | None, contrast: Contrast, class_dim: int | None
) -> Tensor:
    """Return which samples have a valid target and contrast for :func:`contrast_seed`.

    Args:
        output, target, contrast, class_dim: as in :func:`contrast_seed`.

    Returns:
        Boolean tensor, (B,).

    Example:
        >>> fitting_targets(torch.zeros(2, 3), torch.tensor([[2], [3]]), None, None)
        tensor([ True, False])
    """
    fits = torch.ones(len(output), dtype=torch.bool, device=output.device)
    given = [t for t in (target, contrast) if isinstance(t, Tensor)]
    for indices in given:
        fits = fits & _in_range(output, indices.to(output.device))
    if isinstance(contrast, Tensor) and output[0].numel() > 1:
        options: dict[str, Any] = {"class_dim": class_dim, "checked": False}
        seeds = [target_seed(output, indices, **options) for indices in (target, contrast)]
        fits = fits & ~_is_same(*seeds)
    return fits


def _is_same(seed: Tensor, other: Tensor) -> Tensor:
    """Which samples have the same seed, (B,)."""
    return (seed == other).flatten(1).all(1)


def _in_range(output: Tensor, target: Tensor) -> Tensor:
    """Which samples have indices within the first dimensions of an output, (B,)."""
    sizes = [*output.shape[1:]] if output[0].numel() > 1 else [1] * target.shape[1]
    found = [(at >= -size) & (at < size) for at, size in zip(target.unbind(1), sizes)]
    return torch.stack(found).all(0)


def _one_hot(scores: Tensor, target: Tensor) -> Tensor:
    """One at the target of each sample, which has one index per dimension of the scores."""
    at = target.to(scores.device, non_blocking=True)
    chosen = torch.ones((), dtype=torch.bool, device=scores.device)
    for dim, size in enumerate(scores.shape[1:]):
        places = torch.arange(size, device=scores.device).view(-1, *[1] * (scores.dim() - dim - 2))
        index = at[:, dim].remainder(size).view(-1, *[1] * (scores.dim() - 1))
        chosen = chosen & (index == places)
    return chosen.to(scores.dtype)


def _spread(seed: Tensor, output: Tensor, indexed: int, *, signed: bool) -> Tensor:
    """Distribute a seed of sums (see :func:`_sums_behind`) over the output."""
    if signed:
        return seed.reshape(*seed.shape, *[1] * (output.dim() - seed.dim())) * in_full_precision(
            output
        )
    if indexed == output.dim() - 1:
        return seed
    parts = in_full_precision(output).abs().flatten(indexed + 1)
    total = parts.sum(-1, keepdim=True)
    shares = (parts / total).masked_fill(total == 0, 1 / parts.shape[-1])
    return (seed.unsqueeze(-1) * shares).reshape(output.shape)


def check_class_dim(class_dim: Any) -> None:
    """Raise if a class dimension is invalid for any output."""
    if class_dim is None:
        return
    if isinstance(class_dim, bool) or not isinstance(class_dim, numbers.Integral):
        raise TypeError(
            f"Expected `class_dim` to be the index of a dimension, an int, or None, but got {class_dim!r}."
        )
    if class_dim == 0:
        raise ValueError(
            "Expected `class_dim` to be a dimension of each sample, at least 1 or negative, but got 0, "
            "which is the batch dimension."
        )


def check_contrast(contrast: Any) -> None:
    """Raise if a contrast is an unknown string."""
    if isinstance(contrast, str) and contrast not in ("others", "softmax"):
        raise ValueError(
            f'Expected `contrast` to be "others", "softmax", None or other classes, but got '
            f"{contrast!r}."
        )


def _is_int(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype in (torch.int64, torch.int32)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
