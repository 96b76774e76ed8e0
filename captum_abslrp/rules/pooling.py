"""Max pooling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.numerics import EPS, magnitude
from captum_abslrp.engine.tape import Record, Tail
from captum_abslrp.rules.base import DividingRule, Form, check_batched


def max_pool(
    x: Tensor,
    pool: Callable[[Tensor], tuple[Tensor, Tensor]],
    indices: Tensor,
    s: Tensor,
    *,
    nonnegative: bool = False,
) -> Tensor:
    r"""Apply the twin rule to max pooling: relevance goes to the maximum of ``x`` and ``|x|`` in each window.

    Padding with :math:`-\infty` is ignored. ``x`` is (B, C, ...) and ``s`` has the shape of the maximum.
    ``pool`` returns the maximum and its indices within a channel; ``indices`` are those of ``x``. With
    ``nonnegative``, ``x`` is known to have no negative entries (except for padding).

    Example:
        >>> x = torch.tensor([[[1.0, -2.0]]])
        >>> pool = lambda x: torch.nn.functional.max_pool1d(x, 2, return_indices=True)
        >>> max_pool(x, pool, pool(x)[1], torch.ones(1, 1, 1))
        tensor([[[1., 1.]]])
    """
    spatial = x.dim() - 2

    def routed(indices: Tensor) -> Tensor:
        rows = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(-spatial)
        rows.scatter_add_(-1, indices.flatten(-spatial), s.flatten(-spatial))
        result = rows.view(x.shape)
        return result if x.is_contiguous() else torch.empty_like(x).copy_(result)

    if nonnegative:
        return routed(indices)
    return routed(indices).mul_(x.sign()).add_(routed(pool(magnitude(x))[1]))


def record_max_pool(
    call: Call, input: Tensor, *args: Any, divides: bool = True, **kwargs: Any
) -> Record:
    check_batched(call, input, int(call.name[-2]))
    with_indices = getattr(F, f"{call.name}_with_indices")
    options = inspect.signature(with_indices).bind(input, *args, **kwargs).arguments
    if options.pop("return_indices", False):
        raise TypeError(f"Expected max pooling without indices, but got {call}.")
    del options["input"]

    def pool(x: Tensor) -> Any:
        return with_indices(x, **options)

    output, indices = pool(input)
    x, at, z = call.save(input), call.save(indices), None if divides else call.save(output)
    nonnegative = call.is_nonnegative(input)

    def propagate(s: Tensor) -> list[Tensor]:
        s = s if z is None else s.mul_(z().abs() + EPS)
        return [max_pool(x(), pool, at(), s, nonnegative=nonnegative)]

    def to_maximum(s: Tensor) -> list[Tensor]:
        return [max_pool(x(), pool, at(), s, nonnegative=True)]

    return Record(
        output,
        [input],
        propagate,
        nonnegative=nonnegative,
        keeps_sign=nonnegative,
        scale_now=not divides,
        tail=Tail(to_maximum, call.save(output), [x], keeps_sign=True),
    )


MAX_POOLS: dict[str, Form] = dict.fromkeys(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d".split(),
    record_max_pool,
)


class MaxPoolRule(DividingRule):
    """The twin rule of max pooling: relevance goes to the maximum of ``x`` and of ``|x|`` in every window.

    Args:
        divide: whether to divide relevance by the magnitude of the output, as all other calls do.
            The published VGG mapping does not divide.

    Example:
        >>> layer = nn.MaxPool2d(2)
        >>> layer.rule = MaxPoolRule(divide=False)
        >>> AbsLRP(nn.Sequential(layer, nn.Flatten())).attribute(torch.rand(4, 3, 2, 2), 0).shape
        torch.Size([4, 3, 2, 2])
    """

    closed_forms: ClassVar[Mapping[str, Form]] = MAX_POOLS
