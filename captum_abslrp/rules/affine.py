"""Linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.numerics import rectify_in_place
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, check_batched, once, without_noise
from captum_abslrp.rules.contributions import (
    SignedParts,
    chosen,
    positive_contributions,
    signed_parts,
)
from captum_abslrp.rules.matmul import matmul
from captum_abslrp.rules.sparse import is_sparse, record_sparse
from captum_abslrp.rules.twin import record_twin

LARGE = 2**22
"""Elements of a weight above which its parts are made piece by piece, so that it is never copied whole."""


def linear(
    x: Tensor, weight: Tensor | SignedParts, s: Tensor, *, nonnegative: bool = False
) -> Tensor:
    """:func:`positive_contributions` of ``F.linear``.

    Example:
        >>> linear(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -4.0]]), torch.ones(1, 1))
        tensor([[3., 4.]])
    """
    parts = signed_parts(weight)
    if parts.weight.numel() <= LARGE:
        return positive_contributions(x, parts, lambda w: s @ w, nonnegative=nonnegative)
    columns, step = s.flatten(0, -2), max(1, LARGE // x.shape[-1])

    def product(**limit: float) -> Tensor:
        result = columns.new_zeros(len(columns), x.shape[-1])
        for few, rows in zip(columns.split(step, 1), parts.weight.split(step), strict=True):
            result.addmm_(few, rows.to(parts.dtype).clamp(**limit))
        return result.view(x.shape)

    if nonnegative:
        return rectify_in_place(product(min=0), x)
    return chosen([product(min=0), product(max=0)], x)


def record_linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Record:
    output = call.run(lambda: F.linear(input, weight, bias))
    if is_sparse(weight):
        return record_sparse(call, output, input, weight.detach().t())
    if input.dim() == 1:
        return record_twin(call)
    x, w = call.save(input), call.save(weight)
    nonnegative = call.is_nonnegative(input)
    if not carries_relevance(weight):
        full = torch.promote_types(output.dtype, torch.float32)
        parts = SignedParts(w.as_given(), dtype=full)  # of a large weight, one piece at a time
        masked = without_noise(call, output, input, weight, F.linear)
        return Record(
            output,
            [input],
            lambda s: [linear(x(), parts, masked(s), nonnegative=nonnegative)],
            keeps_sign=True,
        )
    wanted = [carries_relevance(t) for t in (input, weight)]

    def propagate(s: Tensor) -> list[Tensor]:
        rows, columns = x().flatten(0, -2), w().mT
        of_input, of_weight = matmul(rows, columns, s.flatten(0, -2))
        return list(compress([of_input.view_as(x()), of_weight.mT], wanted))

    return Record(output, list(compress([input, weight], wanted)), propagate)


FEW = 8
"""Channels of an input for which two convolutions cost as much as one with twice as many."""


def convolution(
    x: Tensor,
    weight: Tensor | SignedParts,
    s: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
    nonnegative: bool = False,
) -> Tensor:
    """:func:`positive_contributions` of a convolution; of a transposed one, if `output_padding` is given.

    Example:
        >>> x, w = torch.ones(1, 1, 2, 2), torch.tensor([[[[2.0]]], [[[-1.0]]]])
        >>> options = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
        >>> convolution(x, w, torch.ones(1, 2, 2, 2), **options).flatten()
        tensor([2., 2., 2., 2.])
    """
    parts = signed_parts(weight)
    spatial = parts.weight.shape[2:]
    is_transposed, padded = output_padding is not None, any(padding)
    if spatial == x.shape[2:] and not padded and groups == 1 and not is_transposed:
        # A linear layer, perhaps with a very large weight.
        flat = SignedParts(parts.weight.flatten(1), dtype=s.dtype)
        return linear(x.flatten(1), flat, s.flatten(1), nonnegative=nonnegative).view_as(x)
    if set(spatial) == {1} and max(stride) > 1 and not padded and not is_transposed:
        # Most places of the input take no part.
        seen = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
        ones = [1] * len(spatial)
        result = torch.zeros_like(x, dtype=s.dtype)
        result[seen] = convolution(
            x[seen], parts, s, stride=ones, padding=padding, dilation=dilation, groups=groups,
            nonnegative=nonnegative,
        )  # fmt: skip
        return result
    few = x.shape[1] <= FEW
    side_by_side = tuple(stride) == tuple(spatial) != (1,) * len(spatial) and not padded
    plain = groups == 1 and not is_transposed and set(dilation) == {1}

    def transposed(w: Tensor, like: Tensor = x) -> Tensor:
        if plain and (side_by_side or (few and max(stride) > 1)):
            return _by_phases(s, w, like, stride, padding)
        # Only shape and layout of the input are used.
        grad_input: Tensor = torch.ops.aten.convolution_backward(
            s, like, w, None, stride, padding, dilation, is_transposed,
            output_padding or [0] * len(stride), groups, [True, False, False],
        )[0]  # fmt: skip
        return grad_input

    if nonnegative or groups > 1 or is_transposed or not few:
        return positive_contributions(x, parts, transposed, nonnegative=nonnegative)
    # An image: the products with the positive and the negative part of the weight as one.
    both = transposed(torch.cat([parts.positive, parts.negative], 1), torch.cat([x, x], 1))
    return chosen([product.contiguous() for product in both.chunk(2, 1)], x)


def _by_phases(
    s: Tensor, weight: Tensor, like: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The transposed product of a convolution with a stride, as a convolution without one.

    Input places that are a stride apart use the same taps: place ``k a + r`` uses tap ``r + p - k d`` of
    output place ``a + d``. So each phase ``r`` is a channel of its own, over places ``a``.
    """
    channels, dims = weight.shape[1], len(stride)
    pads, kept = [], [slice(None), slice(None)]
    for dim, (k, p, size) in enumerate(zip(stride, padding, like.shape[2:], strict=True)):
        taps = weight.shape[2 + 2 * dim]
        lowest, highest = -((taps - 1 - p) // k), (k - 1 + p) // k
        phase = torch.arange(k, device=weight.device).unsqueeze(1)
        offset = torch.arange(lowest, highest + 1, device=weight.device)
        # A tap that does not exist is the last one, which is zero.
        met = (phase + p - k * offset).flatten().clamp_(-1, taps) % (taps + 1)
        end = [0, 0] * (weight.dim() - 3 - 2 * dim) + [0, 1]
        weight = F.pad(weight, end).index_select(2 + 2 * dim, met)
        weight = weight.unflatten(2 + 2 * dim, (k, -1))
        places = -(-size // k)
        pads.append(max(0, -lowest, places - 1 + highest - (s.shape[2 + dim] - 1)))
        kept.append(slice(pads[-1] + lowest, pads[-1] + lowest + places))
    # (C_out, C_in, phase, offset, phase, offset ...) to (C_in phases, C_out, offsets)
    phases, offsets = ([2 + 2 * dim + i for dim in range(dims)] for i in (0, 1))
    weight = weight.permute(1, *phases, 0, *offsets).flatten(0, dims)
    if set(weight.shape[2:]) == {1} and not any(pads):  # patches side by side
        cells = (s.movedim(1, -1) @ weight.flatten(1).mT).movedim(-1, 1)
    else:
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
        cells = convolve(s, weight, padding=pads)
    cells = cells[tuple(kept)].unflatten(1, (channels, *stride))
    # (B, C_in, phase, phase ..., place, place ...)
    order = [i + dim for dim in range(dims) for i in (2 + dims, 2)]
    grown = [k * n for k, n in zip(stride, cells.shape[2 + dims :], strict=True)]
    result = cells.permute(0, 1, *order).reshape(len(s), channels, *grown)
    result = result[tuple(map(slice, (len(s), channels, *like.shape[2:])))]
    if like.is_contiguous():
        return result.contiguous()
    return torch.empty_like(like, dtype=result.dtype).copy_(result)


def _convolution(name: str) -> Form:
    run, dims, is_transposed = getattr(F, name), int(name[-2]), "transpose" in name
    # In the order of the positional arguments.
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    if is_transposed:
        defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}

    def record_convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Record:
        check_batched(call, input, dims)
        if carries_relevance(weight):
            return record_twin(call)
        given = defaults | dict(zip(defaults, args)) | kwargs
        if given["padding"] == "same":
            reach = [d * (k - 1) for d, k in zip(_each(given["dilation"], dims), weight.shape[2:])]
            given["padding"] = [total // 2 for total in reach]
            if any(total % 2 for total in reach):
                pads = [p for total in reversed(reach) for p in (total // 2, total - total // 2)]
                given["padding"] = 0
                return call.recording.run_parts(
                    lambda: run(F.pad(input, pads), weight, bias, **given)
                )
        elif given["padding"] == "valid":
            given["padding"] = 0
        groups = given.pop("groups")
        options: dict[str, Any] = {k: _each(v, dims) for k, v in given.items()}
        options["groups"] = groups
        output = call.run(lambda: run(input, weight, bias, **options))
        x, w = call.save(input), call.save(weight)
        parts = once(lambda: SignedParts(w()))
        nonnegative = call.is_nonnegative(input)
        masked = (
            (lambda s: s)
            if is_transposed
            else without_noise(call, output, input, weight, lambda x, w: run(x, w, **options))
        )
        return Record(
            output,
            [input],
            lambda s: [convolution(x(), parts(), masked(s), nonnegative=nonnegative, **options)],
            keeps_sign=not is_transposed,
        )

    return record_convolution


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number per spatial dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


LINEAR: dict[str, Form] = {"linear": record_linear}
CONVOLUTIONS: dict[str, Form] = {
    name: _convolution(name)
    for name in "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
}
