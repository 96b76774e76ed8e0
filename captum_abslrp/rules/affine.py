"""Linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.numerics import rectify_in_place
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, Function, check_batched, once, without_noise
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
"""Number of elements of a weight above which its parts are computed in pieces, to avoid a full copy."""


def linear(
    x: Tensor, weight: Tensor | SignedParts, s: Tensor, *, nonnegative: bool = False
) -> Tensor:
    """Apply :func:`positive_contributions` to ``F.linear``.

    Example:
        >>> linear(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -4.0]]), torch.ones(1, 1))
        tensor([[3., 4.]])
    """
    parts = signed_parts(weight)
    return positive_contributions(x, parts, lambda w: s @ w, nonnegative=nonnegative)


def linear_of_seeds(
    x: Tensor, parts: SignedParts, seeds: Sequence[Tensor], *, nonnegative: bool = False
) -> list[Tensor]:
    """Apply :func:`linear` with a large weight, reading each piece of the weight once for all seeds.

    Example:
        >>> x, weight = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -4.0]])
        >>> linear_of_seeds(x, SignedParts(weight), [torch.ones(1, 1), torch.zeros(1, 1)])
        [tensor([[3., 4.]]), tensor([[0., 0.]])]
    """
    rows, step = torch.cat([s.flatten(0, -2) for s in seeds]), max(1, LARGE // x.shape[-1])

    def products(**limit: float) -> list[Tensor]:
        result = rows.new_zeros(len(rows), x.shape[-1])
        for few, piece in zip(rows.split(step, 1), parts.weight.split(step), strict=True):
            result.addmm_(few, piece.to(parts.dtype).clamp(**limit))
        return [*result.view(len(seeds), *x.shape)]

    if nonnegative:
        return [rectify_in_place(product, x) for product in products(min=0)]
    return [chosen(pair, x) for pair in zip(products(min=0), products(max=0), strict=True)]


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
        parts = SignedParts(w.as_given(), dtype=full)  # in pieces for a large weight
        masked = without_noise(call, output, input, weight, F.linear)
        if weight.numel() > LARGE:
            return _record_large(call, output, input, parts, masked)
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


def _record_large(
    call: Call, output: Tensor, input: Tensor, parts: SignedParts, masked: Function
) -> Record:
    """Record a linear layer with a large weight, or a convolution whose kernel covers the whole input."""
    x, nonnegative = call.save(input), call.is_nonnegative(input)
    trailing = parts.weight.dim() - 1  # the dimensions that the product sums over

    def propagate(seeds: Sequence[Tensor]) -> list[list[Tensor]]:
        values = x()
        flat = SignedParts(parts.weight.flatten(1), dtype=parts.dtype)
        found = linear_of_seeds(
            values.flatten(-trailing),
            flat,
            [masked(s).flatten(-trailing) for s in seeds],
            nonnegative=nonnegative,
        )
        return [[of_seed.view_as(values)] for of_seed in found]

    return Record(
        output,
        [input],
        propagate,  # type: ignore[arg-type]  # takes all seeds
        keeps_sign=True,
        all_seeds=True,
    )


FEW = 8
"""Maximum number of input channels for which both products are computed by one convolution."""


def convolution(
    x: Tensor,
    weight: Tensor | SignedParts,
    s: Tensor,
    *,
    nonnegative: bool = False,
    **options: Any,
) -> Tensor:
    """Apply :func:`positive_contributions` to a convolution; options as in :func:`transposed_convolution`.

    Example:
        >>> x, w = torch.ones(1, 1, 2, 2), torch.tensor([[[[2.0]]], [[[-1.0]]]])
        >>> options = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
        >>> convolution(x, w, torch.ones(1, 2, 2, 2), **options).flatten()
        tensor([2., 2., 2., 2.])
    """
    parts = signed_parts(weight)
    if _is_linear(parts.weight, x, **options):
        flat = SignedParts(parts.weight.flatten(1), dtype=s.dtype)
        return linear(x.flatten(1), flat, s.flatten(1), nonnegative=nonnegative).view_as(x)

    def transposed(w: Tensor, like: Tensor = x) -> Tensor:
        return transposed_convolution(s, w, like, **options)

    plain = options["groups"] == 1 and "output_padding" not in options
    if nonnegative or not plain or x.shape[1] > FEW:
        return positive_contributions(x, parts, transposed, nonnegative=nonnegative)
    # For few channels (images), compute the products with both parts of the weight as one.
    both = transposed(torch.cat([parts.positive, parts.negative], 1), torch.cat([x, x], 1))
    return chosen([product.contiguous() for product in both.chunk(2, 1)], x)


def _is_linear(
    weight: Tensor,
    x: Tensor,
    *,
    padding: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
    **_: Any,
) -> bool:
    """Whether the kernel of a convolution covers the whole input."""
    whole = weight.shape[2:] == x.shape[2:] and not any(padding)
    return whole and groups == 1 and output_padding is None


def transposed_convolution(
    s: Tensor,
    weight: Tensor,
    like: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """Compute the transposed product of ``s`` with the weight of a convolution, as a new tensor.

    Args:
        s: tensor with the shape of the output of the convolution.
        weight: its weight.
        like: its input, of which only shape and memory layout are used.
        stride, padding, dilation, groups: its options, one number per spatial dimension.
        output_padding: the option of a transposed convolution; None for a regular convolution.

    Example:
        >>> options = dict(stride=(2,), padding=(0,), dilation=(1,), groups=1)
        >>> s, w = torch.ones(1, 1, 2), torch.tensor([[[3.0, 4.0]]])
        >>> transposed_convolution(s, w, torch.zeros(1, 1, 4), **options)
        tensor([[[3., 4., 3., 4.]]])
    """
    is_transposed = output_padding is not None
    plain = groups == 1 and not is_transposed and set(dilation) == {1}
    if plain and weight.shape[1] <= FEW and max(stride) > 1:
        return _by_phases(s, weight, like, stride, padding)
    of_points = plain and set(weight.shape[2:]) == {1} and not any(padding)
    # On a GPU, a convolution can be faster than a matrix product, with lower precision.
    if of_points and s.device.type == "cpu" and s.is_contiguous() and like.is_contiguous():
        return _of_points(s, weight, like, stride)
    grad_input: Tensor = torch.ops.aten.convolution_backward(
        s, like, weight, None, stride, padding, dilation, is_transposed,
        output_padding or [0] * len(stride), groups, [True, False, False],
    )[0]  # fmt: skip
    return grad_input


def _of_points(s: Tensor, weight: Tensor, like: Tensor, stride: Sequence[int]) -> Tensor:
    """The transposed product of a convolution with kernel size 1, as a matrix product."""
    product = (weight.flatten(1).mT @ s.flatten(2)).view(len(s), weight.shape[1], *s.shape[2:])
    if max(stride) == 1:
        return product
    result = product.new_zeros(like.shape)
    places = [slice(None), slice(None), *(slice(None, None, step) for step in stride)]
    result[tuple(places)] = product
    return result


def _by_phases(
    s: Tensor, weight: Tensor, like: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The transposed product of a strided convolution, as a convolution without a stride.

    Input positions that are a stride apart use the same taps: position ``k a + r`` uses tap ``r + p - k d``
    of output position ``a + d``. Each phase ``r`` therefore becomes a channel over positions ``a``.
    """
    channels, dims = weight.shape[1], len(stride)
    pads, kept = [], [slice(None), slice(None)]
    for dim, (k, p, size) in enumerate(zip(stride, padding, like.shape[2:], strict=True)):
        taps = weight.shape[2 + 2 * dim]
        lowest, highest = -((taps - 1 - p) // k), (k - 1 + p) // k
        phase = torch.arange(k, device=weight.device).unsqueeze(1)
        offset = torch.arange(lowest, highest + 1, device=weight.device)
        # Taps that do not exist are mapped to the last one, which is zero.
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


class Affine(NamedTuple):
    """A linear layer or a convolution with a constant weight: ``z = run(x, weight, bias)``."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    transposed: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Maps ``s``, a weight and an input to the transposed product; only the input's shape is used."""
    options: Mapping[str, Any]
    """Stride, padding, dilation, groups and output padding of a convolution."""
    channels: int | None = 0
    """The output channel dimension of the weight; None if two dimensions contribute."""


def affine_of(call: Call) -> Affine | None:
    """Return a linear layer or convolution with a constant dense weight as an ``Affine``; otherwise None."""
    names = ["input", "weight", "bias", *_DEFAULTS.get(call.name, {})]
    given = dict(zip(names, call.operands)) | call.kwargs
    input, weight, bias = (given.pop(name, None) for name in names[:3])
    if carries_relevance(weight) or is_sparse(weight) or is_sparse(input):
        return None
    if call.name == "linear":
        return Affine(input, weight, bias, F.linear, lambda s, w, like: s @ w, {})
    dims = int(call.name[-2])
    check_batched(call, input, dims)
    function, given = getattr(F, call.name), _DEFAULTS[call.name] | given
    pads: list[int] = []
    if given["padding"] == "same":
        reach = [d * (k - 1) for d, k in zip(_each(given["dilation"], dims), weight.shape[2:])]
        given["padding"] = [total // 2 for total in reach]
        if any(total % 2 for total in reach):
            pads = [p for total in reversed(reach) for p in (total // 2, total - total // 2)]
            given["padding"] = 0
    elif given["padding"] == "valid":
        given["padding"] = 0
    groups = given.pop("groups")
    options = {name: _each(value, dims) for name, value in given.items()} | {"groups": groups}

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        result: Tensor = function(F.pad(x, pads) if pads else x, w, b, **options)
        return result

    def back(s: Tensor, w: Tensor, like: Tensor) -> Tensor:
        if not pads:
            return transposed_convolution(s, w, like, **options)
        padded = transposed_convolution(s, w, F.pad(like, pads), **options)
        return F.pad(padded, [-p for p in pads]).contiguous()

    channels = 0 if "output_padding" not in options else 1 if groups == 1 else None
    return Affine(input, weight, bias, run, back, {} if pads else options, channels)


def record_convolution(call: Call, *args: Any, **kwargs: Any) -> Record:
    affine = affine_of(call)
    if affine is None:
        return record_twin(call)
    input, options = affine.input, affine.options
    output = call.run(lambda: affine.run(input, affine.weight, affine.bias))
    x, w = call.save(input), call.save(affine.weight)
    parts = once(lambda: SignedParts(w()))
    nonnegative, is_transposed = call.is_nonnegative(input), "transpose" in call.name
    masked: Function = lambda s: s  # noqa: E731  # transposed convolutions do not compute means
    if not is_transposed:
        masked = without_noise(
            call, output, input, affine.weight, lambda x, w: affine.run(x, w, None)
        )

    large = affine.weight.numel() > LARGE
    if large and options and _is_linear(affine.weight, input, **options):
        full = torch.promote_types(output.dtype, torch.float32)
        return _record_large(call, output, input, SignedParts(w.as_given(), dtype=full), masked)

    def propagate(s: Tensor) -> list[Tensor]:
        if options:
            return [convolution(x(), parts(), masked(s), nonnegative=nonnegative, **options)]
        back, like = affine.transposed, x()
        return [
            positive_contributions(
                like, parts(), lambda w: back(masked(s), w, like), nonnegative=nonnegative
            )
        ]

    return Record(output, [input], propagate, keeps_sign=not is_transposed)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number per spatial dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


_PLAIN = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
_DEFAULTS: dict[str, dict[str, Any]] = {
    **{f"conv{dims}d": _PLAIN for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _TRANSPOSED for dims in (1, 2, 3)},
}
"""The options of convolutions, in the order of their positional arguments."""


LINEAR: dict[str, Form] = {"linear": record_linear}
CONVOLUTIONS: dict[str, Form] = dict.fromkeys(_DEFAULTS, record_convolution)
