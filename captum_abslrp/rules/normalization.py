"""Normalization: batch, layer, group, instance and RMS norm; division by a norm."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.arguments import is_traced, on_host
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.numerics import rectify
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, multiplied
from captum_abslrp.rules.contributions import diagonal
from captum_abslrp.rules.tails import passed_on


def layer_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""Compute the factor of layer norm; mean and variance are constants of the call.

    :math:`R_{in} = (x w / \sigma(x) + |x w| / \sigma(|x|)) \, s`, per magnitude
    :math:`k = \mathrm{sign}(x) w / \sigma(x) + |w| / \sigma(|x|)`. The last ``normalized_dims`` dimensions
    are normalized together; ``weight`` has their shape.

    Example:
        >>> layer_norm(torch.tensor([[1.0, -1.0]]), 1, torch.ones(2), 1.0)
        tensor([[1.7071, 0.2929]])
    """
    dims = list(range(-normalized_dims, 0))
    return _twin_factor(x, rsigma(x, dims, eps), rsigma(x.abs(), dims, eps), weight)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""Compute the factor of group norm (or of instance norm, with one channel per group).

    As in :func:`layer_norm`, :math:`k = \mathrm{sign}(x) w / \sigma(x) + |w| / \sigma(|x|)`, with
    :math:`\sigma` over the channels of a group and all positions. ``x`` is (B, C, ...), ``weight`` (C,).

    Example:
        >>> group_norm(torch.tensor([[[1.0, -1.0]]]), 1, torch.ones(1), 1.0)
        tensor([[[1.7071, 0.2929]]])
    """
    channels = (x.shape[1], *[1] * (x.dim() - 2))
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    plain, absolute = (
        rsigma(v, [2], eps).expand(-1, -1, channels[0] // groups).reshape(-1, *channels)
        for v in (grouped, grouped.abs())
    )
    return _twin_factor(x, plain, absolute, None if weight is None else weight.view(channels))


def rsigma(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """Compute the reciprocal of the standard deviation over some dimensions."""
    centered = x - x.mean(dims, keepdim=True)
    return centered.square_().mean(dims, keepdim=True).add_(eps).rsqrt_()


def _twin_factor(x: Tensor, plain: Tensor, absolute: Tensor, weight: Tensor | None) -> Tensor:
    """The factor from the reciprocal standard deviations of ``x`` and of ``|x|``."""
    if weight is not None:
        plain, absolute = plain * weight, absolute * weight.abs()
    sign = x.sign()
    return (sign * plain).addcmul_(sign.abs(), absolute)


def rms_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""Compute the factor of RMS norm; the mean square is a constant of the call.

    The arguments are those of :func:`layer_norm`. The mean squares of ``x`` and ``|x|`` are equal, so
    :math:`R_{in} = 2 (x w)^+ / \mathrm{rms}(x) \, s`, per magnitude
    :math:`k = 2 |w| / \mathrm{rms}(x)` where :math:`x w > 0`.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -4.0]]), 1, torch.ones(2), 0.0)
        tensor([[0.5657, 0.0000]])
    """
    dims = list(range(-normalized_dims, 0))
    scale = 2 * (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    scale = scale.expand_as(x) if weight is None else scale * weight
    return rectify(scale.abs(), x * scale)


Norm = Callable[[Tensor, int, Tensor | None, float], Tensor]
"""Maps ``x``, the number of dimensions or groups, the weight and ``eps`` to the factor."""


def _record_norm(
    call: Call,
    input: Tensor,
    output: Tensor,
    norm: Norm,
    size: int,
    weight: Tensor | None,
    eps: float,
    **options: Any,
) -> Record:
    """Record a norm by its factor; ``size`` is the number of dimensions or of groups."""
    x, w = call.save(input), None if weight is None else call.save(weight)
    return multiplied(output, input, lambda: norm(x(), size, w() if w else None, eps), **options)


def _norm_form(
    function: Callable[..., Tensor],
    norm: Norm,
    size_of: Callable[[Any], int],
    *,
    remade: bool = False,
    keeps_sign: bool = False,
) -> Form:
    """Create the form of a norm whose second argument gives the dimensions or groups."""
    parameters = inspect.signature(function).parameters
    names = list(parameters)[1:]

    def record(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
        # Functions of torch also take an option of cuDNN, which does not affect the result.
        pairs = [*zip(names, args, strict=False), *kwargs.items()]
        options = {name: value for name, value in pairs if name in names}
        output, x = call.run(lambda: function(input, **options)), call.save(input)
        z = call.save_output(output, lambda: function(x(), **options)) if remade else None
        size, weight = size_of(options[names[0]]), options.get("weight")
        eps = options.get("eps", parameters["eps"].default)
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        facts = {"keeps_sign": keeps_sign, "saved_output": z}
        return _record_norm(call, input, output, norm, size, weight, eps, **facts)

    return record


def record_instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Record:
    statistics = (running_mean, running_var, weight, bias)
    if not use_input_stats:
        return record_batch_norm(call, input, *statistics, eps=eps)
    output = call.run(lambda: F.instance_norm(input, *statistics, True, momentum, eps))
    return _record_norm(call, input, output, group_norm, input.shape[1], weight, eps)


def record_batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Record:
    def run(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    output, x = call.run(lambda: run(input)), call.save(input)
    variance, kept = running_var, None
    if training or variance is None:
        variance = input.transpose(0, 1).flatten(1).var(1, correction=0)
    else:  # in training mode, the call would modify the running statistics
        kept = call.save_output(output, lambda: run(x()))
    scale = (variance + eps).rsqrt()
    scale = (scale if weight is None else scale * weight).view(-1, *[1] * (input.dim() - 2))
    return multiplied(
        output,
        input,
        lambda: diagonal(x(), scale, positive=_is_positive(scale)),
        keeps_sign=True,
        saved_output=kept,
        tail=passed_on(kept or call.save(output), x, scale.sign),
    )


def _is_positive(scale: Tensor) -> bool:
    """Whether a scale is known to be positive. A traced program must not depend on the weights."""
    return not is_traced() and on_host((scale > 0).all()) is True


def record_divided(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    """Record a division by a positive number that depends on the input, ``2 (x / c)^+ s``."""
    output = call.run(lambda: call.func(input, *args, **kwargs))
    x, z = call.save(input), call.save(output)
    return multiplied(
        output,
        input,
        lambda: rectify(z() / x(), x()),
        nonnegative=call.is_nonnegative(input),
        keeps_sign=True,
        tail=passed_on(z, x),
    )


def reordered(original: Any, form: Form) -> Form:
    """Extend a form to a function of torch whose arguments start with weight and bias."""

    def record(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
        if call.func is original:
            args = (*args[2:4], *args[:2], *args[4:7])
        return form(call, input, *args, **kwargs)

    return record


NORMALIZATIONS: dict[str, Form] = {
    "layer_norm": _norm_form(F.layer_norm, layer_norm, len, remade=True),
    "rms_norm": _norm_form(F.rms_norm, rms_norm, len, keeps_sign=True),
    "group_norm": _norm_form(F.group_norm, group_norm, int),
    "instance_norm": reordered(torch.instance_norm, record_instance_norm),
    "normalize": record_divided,
    "local_response_norm": record_divided,
}
BATCH_NORM: dict[str, Form] = {"batch_norm": reordered(torch.batch_norm, record_batch_norm)}
