"""Affine calls: linear layers, convolutions, and linear maps without weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.calls import TRANSFORMS, transformed_dims
from captum_abslrp.complex_calls import OnParts
from captum_abslrp.forms.base import (
    Form,
    answer_twin,
    check_batched,
    is_source,
    once,
    tail_of,
    without_noise,
)
from captum_abslrp.forms.products import answer_sparse, is_sparse
from captum_abslrp.functional import SignedParts
from captum_abslrp.interception import Call, carries_relevance
from captum_abslrp.steps import Answer, Kept


class _Geometry(TypedDict):
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def answer_linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Answer:
    output = call.run(lambda: F.linear(input, weight, bias))
    if is_sparse(weight):
        return answer_sparse(call, output, input, weight.detach().t())
    if input.dim() == 1:
        return answer_twin(call)
    x, w = call.keep(input), call.keep(weight)
    nonnegative = call.is_nonnegative(input)
    if not carries_relevance(weight):
        full = torch.promote_types(output.dtype, torch.float32)
        parts = SignedParts(w.as_given(), dtype=full)  # of a large weight, one piece at a time
        masked = without_noise(call, output, input, weight, F.linear)
        return Answer(
            output,
            [input],
            lambda s: [functional.linear(x(), parts, masked(s), nonnegative=nonnegative)],
            keeps_sign=True,
        )
    wanted = [carries_relevance(t) for t in (input, weight)]

    def propagate(s: Tensor) -> list[Tensor]:
        rows, columns = x().flatten(0, -2), w().mT
        of_input, of_weight = functional.matmul(rows, columns, s.flatten(0, -2))
        return list(compress([of_input.view_as(x()), of_weight.mT], wanted))

    return Answer(output, list(compress([input, weight], wanted)), propagate)


def _convolution(dims: int) -> Form:
    run = getattr(F, f"conv{dims}d")

    def answer_convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Answer:
        check_batched(call, input, dims)
        if carries_relevance(weight):
            return answer_twin(call)
        if padding == "same":
            reach = [d * (k - 1) for d, k in zip(_each(dilation, dims), weight.shape[2:])]
            pads = [side for total in reversed(reach) for side in (total // 2, total - total // 2)]
            if any(total % 2 for total in reach):
                return call.interception.composite(
                    lambda: run(F.pad(input, pads), weight, bias, stride, 0, dilation, groups)
                )
            padding = [total // 2 for total in reach]
        elif padding == "valid":
            padding = 0
        geometry: _Geometry = {
            "stride": _each(stride, dims),
            "padding": _each(padding, dims),
            "dilation": _each(dilation, dims),
            "groups": groups,
        }
        output = call.run(lambda: run(input, weight, bias, **geometry))
        x, parts = call.keep(input), _parts(call.keep(weight))
        nonnegative = call.is_nonnegative(input)
        masked = without_noise(
            call, output, input, weight, lambda x, w: run(x, w, None, **geometry)
        )
        return Answer(
            output,
            [input],
            lambda s: [
                functional.convolution(x(), parts(), masked(s), nonnegative=nonnegative, **geometry)
            ],
            keeps_sign=True,
        )

    return answer_convolution


def _transposed_convolution(dims: int) -> Form:
    run = getattr(F, f"conv_transpose{dims}d")

    def answer_transposed_convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Answer:
        check_batched(call, input, dims)
        if carries_relevance(weight):
            return answer_twin(call)
        geometry: _Geometry = {
            "stride": _each(stride, dims),
            "padding": _each(padding, dims),
            "dilation": _each(dilation, dims),
            "groups": groups,
        }
        extra = _each(output_padding, dims)
        output = call.run(lambda: run(input, weight, bias, output_padding=extra, **geometry))
        x, parts = call.keep(input), _parts(call.keep(weight))
        nonnegative = call.is_nonnegative(input)
        return Answer(
            output,
            [input],
            lambda s: [
                functional.convolution(
                    x(), parts(), s, output_padding=extra, nonnegative=nonnegative, **geometry
                )
            ],
        )

    return answer_transposed_convolution


def _parts(weight: Kept) -> Callable[[], SignedParts]:
    return once(lambda: SignedParts(weight()))


def answer_linear_map(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    func = call.func

    def run(x: Tensor) -> Tensor:
        result: Tensor = func(x, *args, **kwargs)
        return result

    output = call.run(lambda: run(input))
    x, z = call.keep(input), call.keep_output(output, lambda: run(x()))
    bicubic = "bicubic" in (*args, *kwargs.values())

    def spread(x: Tensor) -> Tensor:
        """The call with nonnegative coefficients, which shares relevance on the tail of the score."""
        plain = [["bilinear", a][a != "bicubic"] if isinstance(a, str) else a for a in args]
        named = {k: "bilinear" if v == "bicubic" else v for k, v in kwargs.items()}
        result: Tensor = func(x, *plain, **named)
        return result

    def share(relevance: Tensor) -> list[Tensor]:
        return [functional.shares(x(), spread if bicubic else run, relevance)]

    nonnegative = call.is_nonnegative(input)

    least = functional.rounding(output.dtype)  # no closure may hold the output, see `Step.output`

    @once
    def noise() -> Tensor:
        """Outputs that are rounding errors: the mean of what has been centered, say."""
        return z().abs() <= least * run(functional.magnitude(x()))

    def propagate(s: Tensor) -> list[Tensor]:
        s = s if nonnegative else s.masked_fill(noise(), 0)
        return [functional.linear_map(x(), run, s)]

    return Answer(
        output,
        [input],
        propagate,
        nonnegative=nonnegative and not bicubic,
        keeps_sign=not bicubic,
        tail=tail_of(z, [x], share, keeps_sign=True),
    )


def answer_transform(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    """A linear map whose coefficients have both signs.

    Frequencies that cancel out, such as the mean of what a norm has centered, leave rounding errors. No
    relevance goes through those. The tail of the score ends here, as at a layer with weights.
    """
    answer = answer_linear_map(call, input, *args, **kwargs)
    of_complex = isinstance(call.func, OnParts) and call.func.first_is_complex
    rank = input.dim() - of_complex
    dims = transformed_dims(call.name, rank, *args, **kwargs)
    if answer.output.dim() > rank + {"stft": 1, "istft": -1}.get(call.name, 0):  # a real view
        dims = (*dims, -1)
    z = call.keep(answer.output)

    def propagate(s: Tensor) -> Sequence[Tensor]:
        return answer.propagate(functional.without_rounding(s, z(), dims))

    return answer._replace(propagate=propagate, nonnegative=False, keeps_sign=False, tail=None)


def answer_grid_sample(call: Call, input: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Sampling is linear in the input; where to sample is a constant of the call."""
    if not is_source(input):
        return call.run(lambda: F.grid_sample(input, grid, *args, **kwargs))
    answer = answer_linear_map(call, input, grid.detach(), *args, **kwargs)
    return answer._replace(constants=[grid])


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number per spatial dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


CONVOLUTIONS: dict[str, Form] = {f"conv{d}d": _convolution(d) for d in (1, 2, 3)} | {
    f"conv_transpose{d}d": _transposed_convolution(d) for d in (1, 2, 3)
}
AVERAGES: dict[str, Form] = dict.fromkeys(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d mean nanmean sum nansum cumsum".split(),
    answer_linear_map,
)
RESAMPLING: dict[str, Form] = dict.fromkeys(
    "interpolate upsample upsample_nearest upsample_bilinear fold".split(), answer_linear_map
) | {"grid_sample": answer_grid_sample}
AFFINE: dict[str, Form] = {
    "linear": answer_linear,
    **CONVOLUTIONS,
    **AVERAGES,
    **RESAMPLING,
    **dict.fromkeys(sorted(TRANSFORMS), answer_transform),
}
