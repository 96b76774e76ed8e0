"""Linear maps without weights: means and sums, resampling, Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import OnParts
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.names import TRANSFORMS, transformed_dims
from captum_abslrp.engine.numerics import magnitude, rectify, rounding
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, once
from captum_abslrp.rules.contributions import transposed
from captum_abslrp.rules.tails import tail_of


def linear_map(x: Tensor, call: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """Apply the twin rule to a call that is linear in ``x`` and has no weights: mean, interpolation.

    Without negative coefficients (all except bicubic interpolation), this equals
    :func:`positive_contributions`.

    Example:
        >>> linear_map(torch.tensor([[1.0, -1.0]]), lambda x: x.mean(1), torch.ones(1))
        tensor([[0.5000, 0.0000]])
    """
    return rectify(transposed(call, x, s), x)


def shares(x: Tensor, call: Callable[[Tensor], Tensor], relevance: Tensor) -> Tensor:
    r"""Distribute relevance in proportion to magnitudes, for linear calls ``a`` on the tail of the score.

    :math:`R_i = \sum_j |x_i| a_{ij} / (\sum_{i'} |x_{i'}| a_{i'j}) \, R_j` with nonnegative :math:`a_{ij}`.
    Relevance is conserved, unless all inputs are 0.

    Example:
        >>> shares(torch.tensor([[1.0, -3.0]]), lambda x: x.mean(1), torch.ones(1))
        tensor([[0.2500, 0.7500]])
    """
    sizes = magnitude(x)
    whole = call(sizes)
    return sizes * transposed(call, sizes, (relevance / whole).masked_fill_(whole == 0, 0))


def record_linear_map(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    func = call.func

    def run(x: Tensor) -> Tensor:
        result: Tensor = func(x, *args, **kwargs)
        return result

    output = call.run(lambda: run(input))
    x, z = call.save(input), call.save_output(output, lambda: run(x()))
    nonnegative = call.is_nonnegative(input)
    bicubic = "bicubic" in (*args, *kwargs.values())
    least = rounding(output.dtype)  # no closure may hold the output, see `Step.output`

    def spread(x: Tensor) -> Tensor:
        """Run the call with nonnegative coefficients, for the tail of the score."""
        plain = ["bilinear" if a == "bicubic" else a for a in args]
        result: Tensor = func(
            x, *plain, **{k: "bilinear" if v == "bicubic" else v for k, v in kwargs.items()}
        )
        return result

    @once
    def noise() -> Tensor:
        """Outputs that are rounding errors, such as the mean of centered values."""
        return z().abs() <= least * run(magnitude(x()))

    def propagate(s: Tensor) -> list[Tensor]:
        s = s if nonnegative else s.masked_fill(noise(), 0)
        return [linear_map(x(), run, s)]

    return Record(
        output,
        [input],
        propagate,
        nonnegative=nonnegative and not bicubic,
        keeps_sign=not bicubic,
        tail=tail_of(z, [x], lambda relevance: [shares(x(), spread, relevance)], keeps_sign=True),
    )


def record_transform(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    """Record a linear map with coefficients of both signs, at which the tail of the score ends.

    Frequencies that cancel, such as the mean of centered values, leave rounding errors below 16 times the
    machine precision, relative to the largest value along the dimensions that the call sums over.
    """
    record = record_linear_map(call, input, *args, **kwargs)
    of_complex = isinstance(call.func, OnParts) and call.func.first_is_complex
    rank = input.dim() - of_complex
    dims = tuple(transformed_dims(call.name, rank, *args, **kwargs))
    if record.output.dim() > rank + {"stft": 1, "istft": -1}.get(call.name, 0):  # a real view
        dims = (*dims, -1)
    z = call.save(record.output)

    def propagate(s: Tensor) -> Sequence[Tensor]:
        sizes = z().abs()
        bound = 16 * torch.finfo(sizes.dtype).eps * sizes.amax(dims, keepdim=True)
        return record.propagate(s.masked_fill(sizes <= bound, 0))

    return record._replace(propagate=propagate, nonnegative=False, keeps_sign=False, tail=None)


def record_grid_sample(call: Call, input: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Record sampling, which is linear in the input; the positions are a constant of the call."""
    if not is_source(input):
        return call.run(lambda: F.grid_sample(input, grid, *args, **kwargs))
    record = record_linear_map(call, input, grid.detach(), *args, **kwargs)
    return record._replace(constants=[grid])


LINEAR_MAPS: dict[str, Form] = {
    **dict.fromkeys(
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "mean nanmean sum nansum cumsum interpolate upsample upsample_nearest upsample_bilinear "
        "fold".split(),
        record_linear_map,
    ),
    "grid_sample": record_grid_sample,
    **dict.fromkeys(sorted(TRANSFORMS), record_transform),
}
