"""Linear maps without weights of their own: means and sums, resampling, Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import OnParts
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.names import TRANSFORMS, transformed_dims
from captum_abslrp.engine.numerics import magnitude, rectify
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, once
from captum_abslrp.rules.contributions import transposed
from captum_abslrp.rules.tails import tail_of


def linear_map(x: Tensor, call: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """The twin form of a linear call without weights of its own: pooling, mean, sum, interpolation.

    Where no coefficient is negative (all but bicubic interpolation) it is
    :func:`positive_contributions`.

    Args:
        x: input, any shape.
        call: the call, linear in ``x``.
        s: shaped like the output of the call.

    Example:
        >>> linear_map(torch.tensor([[1.0, -1.0]]), lambda x: x.mean(1), torch.ones(1))
        tensor([[0.5000, 0.0000]])
    """
    return rectify(transposed(call, x, s), x)


def shares(x: Tensor, call: Callable[[Tensor], Tensor], relevance: Tensor) -> Tensor:
    r"""Relevance by the share of magnitudes, for linear calls on the tail of the score.

    :math:`R_i = \sum_j |x_i| a_{ij} / (\sum_{i'} |x_{i'}| a_{i'j}) \, R_j`. Nothing is lost, but where all
    inputs are 0.

    Args:
        x: input, any shape.
        call: the call, linear in ``x``, without negative coefficients.
        relevance: ``R``, relevance of the output, shaped like it.

    Returns:
        Relevance of ``x``, shaped like it.

    Example:
        >>> shares(torch.tensor([[1.0, -3.0]]), lambda x: x.mean(1), torch.ones(1))
        tensor([[0.2500, 0.7500]])
    """
    sizes = magnitude(x)
    whole = call(sizes)
    return sizes * transposed(call, sizes, (relevance / whole).masked_fill_(whole == 0, 0))


def without_rounding(s: Tensor, output: Tensor, dims: Sequence[int]) -> Tensor:
    """Relevance per magnitude without that of numbers that are rounding errors.

    Args:
        s: relevance per magnitude of the output.
        output: the output of a call that adds up numbers of both signs, such as a Fourier transform.
        dims: the dimensions that it adds up over, along which the largest magnitude is what counts. Of a
            real view the last one, of the two parts, is among them.

    Returns:
        ``s``, and 0 where the output is less than 16 times the machine precision of that magnitude.

    Example:
        >>> without_rounding(torch.ones(3), torch.tensor([1.0, 1e-8, -0.1]), [0])
        tensor([1., 0., 1.])
    """
    sizes = output.abs()
    bound = 16 * torch.finfo(output.dtype).eps * sizes.amax(tuple(dims), keepdim=True)
    return s.masked_fill(sizes <= bound, 0)


def record_linear_map(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    func = call.func

    def run(x: Tensor) -> Tensor:
        result: Tensor = func(x, *args, **kwargs)
        return result

    output = call.run(lambda: run(input))
    x, z = call.save(input), call.save_output(output, lambda: run(x()))
    bicubic = "bicubic" in (*args, *kwargs.values())

    def spread(x: Tensor) -> Tensor:
        """The call with nonnegative coefficients, which shares relevance on the tail of the score."""
        plain = [["bilinear", a][a != "bicubic"] if isinstance(a, str) else a for a in args]
        named = {k: "bilinear" if v == "bicubic" else v for k, v in kwargs.items()}
        result: Tensor = func(x, *plain, **named)
        return result

    def share(relevance: Tensor) -> list[Tensor]:
        return [shares(x(), spread if bicubic else run, relevance)]

    nonnegative = call.is_nonnegative(input)

    least = numerics.rounding(output.dtype)  # no closure may hold the output, see `Step.output`

    @once
    def noise() -> Tensor:
        """Outputs that are rounding errors: the mean of what has been centered, say."""
        return z().abs() <= least * run(numerics.magnitude(x()))

    def propagate(s: Tensor) -> list[Tensor]:
        s = s if nonnegative else s.masked_fill(noise(), 0)
        return [linear_map(x(), run, s)]

    return Record(
        output,
        [input],
        propagate,
        nonnegative=nonnegative and not bicubic,
        keeps_sign=not bicubic,
        tail=tail_of(z, [x], share, keeps_sign=True),
    )


def record_transform(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    """A linear map whose coefficients have both signs.

    Frequencies that cancel out, such as the mean of what a norm has centered, leave rounding errors. No
    relevance goes through those. The tail of the score ends here, as at a layer with weights.
    """
    record = record_linear_map(call, input, *args, **kwargs)
    of_complex = isinstance(call.func, OnParts) and call.func.first_is_complex
    rank = input.dim() - of_complex
    dims = transformed_dims(call.name, rank, *args, **kwargs)
    if record.output.dim() > rank + {"stft": 1, "istft": -1}.get(call.name, 0):  # a real view
        dims = (*dims, -1)
    z = call.save(record.output)

    def propagate(s: Tensor) -> Sequence[Tensor]:
        return record.propagate(without_rounding(s, z(), dims))

    return record._replace(propagate=propagate, nonnegative=False, keeps_sign=False, tail=None)


def record_grid_sample(call: Call, input: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Sampling is linear in the input; where to sample is a constant of the call."""
    if not is_source(input):
        return call.run(lambda: F.grid_sample(input, grid, *args, **kwargs))
    record = record_linear_map(call, input, grid.detach(), *args, **kwargs)
    return record._replace(constants=[grid])


AVERAGES: dict[str, Form] = dict.fromkeys(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d mean nanmean sum nansum cumsum".split(),
    record_linear_map,
)


RESAMPLING: dict[str, Form] = dict.fromkeys(
    "interpolate upsample upsample_nearest upsample_bilinear fold".split(), record_linear_map
) | {"grid_sample": record_grid_sample}
LINEAR_MAPS: dict[str, Form] = {
    **AVERAGES,
    **RESAMPLING,
    **dict.fromkeys(sorted(TRANSFORMS), record_transform),
}
