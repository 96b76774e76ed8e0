"""Normalization: batch, layer, group, instance and RMS norm; division by a norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.numerics import rectify
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, once
from captum_abslrp.rules.contributions import diagonal
from captum_abslrp.rules.tails import passed_on


def layer_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The factor of layer norm; mean and variance are constants of the call.

    :math:`R_{in} = (x w / \sigma(x) + |x w| / \sigma(|x|)) \, s`, per magnitude
    :math:`k = \mathrm{sign}(x) w / \sigma(x) + |w| / \sigma(|x|)`.

    Args:
        x: input, (..., D).
        normalized_dims: how many trailing dimensions are normalized together.
        weight: ``w`` of these dimensions, or None.
        eps: of the layer norm, inside the square root of the variance.

    Returns:
        What ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> layer_norm(torch.tensor([[1.0, -1.0]]), 1, torch.ones(2), 1.0)
        tensor([[1.7071, 0.2929]])
    """
    dims = list(range(-normalized_dims, 0))
    plain, twin_part = _rsigma(x, dims, eps), _rsigma(x.abs(), dims, eps)
    if weight is not None:
        plain, twin_part = plain * weight, twin_part * weight.abs()
    sign = x.sign()
    return (sign * plain).addcmul_(sign.abs(), twin_part)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The factor of group norm (of instance norm, with one channel in each group).

    As :func:`layer_norm`: :math:`k = \mathrm{sign}(x) w / \sigma(x) + |w| / \sigma(|x|)` with
    :math:`\sigma` over the channels of a group and all places.

    Args:
        x: input, (B, C, ...).
        groups: number of groups of channels.
        weight: ``w`` of each channel, (C,), or None.
        eps: of the group norm, inside the square root of the variance.

    Returns:
        What ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> group_norm(torch.tensor([[[1.0, -1.0]]]), 1, torch.ones(1), 1.0)
        tensor([[[1.7071, 0.2929]]])
    """
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    per_channel = (1, x.shape[1], *[1] * (x.dim() - 2))
    plain, twin_part = (
        _rsigma(v, [2], eps).expand(-1, -1, x.shape[1] // groups).reshape(-1, *per_channel[1:])
        for v in (grouped, grouped.abs())
    )
    if weight is not None:
        weight = weight.view(per_channel)
        plain, twin_part = plain * weight, twin_part * weight.abs()
    sign = x.sign()
    return (sign * plain).addcmul_(sign.abs(), twin_part)


def _rsigma(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """The reciprocal of the standard deviation over some dimensions."""
    centered = x - x.mean(dims, keepdim=True)
    return centered.square_().mean(dims, keepdim=True).add_(eps).rsqrt_()


def rms_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The factor of RMS norm; the mean square is a constant of the call.

    The mean square of ``x`` is that of ``|x|``: :math:`R_{in} = 2 (x w)^+ / \mathrm{rms}(x) \, s`,
    per magnitude :math:`k = 2 |w| / \mathrm{rms}(x)` where :math:`x w > 0`.

    Args and returns: as :func:`layer_norm`.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -4.0]]), 1, torch.ones(2), 0.0)
        tensor([[0.5657, 0.0000]])
    """
    dims = list(range(-normalized_dims, 0))
    scale = 2 * (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    scale = scale.expand_as(x) if weight is None else scale * weight
    return rectify(scale.abs(), x * scale)


def record_batch_norm(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    if call.func is torch.batch_norm:  # the order of its arguments differs
        weight, bias, mean, var, training, momentum, eps, _ = args
        return _record_batch_norm(call, input, mean, var, weight, bias, training, momentum, eps)
    return _record_batch_norm(call, input, *args, **kwargs)


def _record_batch_norm(
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
    output = call.run(
        lambda: F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    )
    remake = (
        None
        if training or running_var is None
        else partial(
            F.batch_norm,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            eps=eps,
        )
    )
    if training or running_var is None:
        running_var = input.transpose(0, 1).flatten(1).var(1, correction=0)
    scale = (running_var + eps).rsqrt()
    scale = (scale if weight is None else scale * weight).view(-1, *[1] * (input.dim() - 2))
    x = call.save(input)
    factor = once(lambda: diagonal(x(), scale))
    kept = None if remake is None else call.save_output(output, lambda: remake(x()))
    z = call.save(output) if kept is None else kept
    return Record(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        keeps_sign=True,
        saved_output=kept,
        tail=passed_on(z, x, scale.sign),
    )


def record_layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Record:
    output = call.run(lambda: F.layer_norm(input, normalized_shape, weight, bias, eps))
    x = call.save(input)
    w = None if weight is None else call.save(weight)
    factor = once(lambda: layer_norm(x(), len(normalized_shape), w() if w else None, eps))
    kept = call.save_output(output, lambda: F.layer_norm(x(), normalized_shape, weight, bias, eps))
    return Record(output, [input], lambda s: [s.mul_(factor())], saved_output=kept)


def record_rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Record:
    output = call.run(lambda: F.rms_norm(input, normalized_shape, weight, eps))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = call.save(input)
    w = None if weight is None else call.save(weight)
    factor = once(lambda: rms_norm(x(), len(normalized_shape), w() if w else None, eps))
    return Record(output, [input], lambda s: [s.mul_(factor())], keeps_sign=True)


def record_group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Record:
    output = call.run(lambda: F.group_norm(input, num_groups, weight, bias, eps))
    return _record_groups(call, input, output, num_groups, weight, eps)


def record_instance_norm(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    if call.func is torch.instance_norm:  # the order of its arguments differs
        weight, bias, mean, var, use_input_stats, momentum, eps, _ = args
        return _record_instance_norm(
            call, input, mean, var, weight, bias, use_input_stats, momentum, eps
        )
    return _record_instance_norm(call, input, *args, **kwargs)


def _record_instance_norm(
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
    if not use_input_stats:
        return _record_batch_norm(call, input, running_mean, running_var, weight, bias, eps=eps)
    output = call.run(
        lambda: F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    )
    return _record_groups(call, input, output, input.shape[1], weight, eps)


def _record_groups(
    call: Call, input: Tensor, output: Tensor, groups: int, weight: Tensor | None, eps: float
) -> Record:
    x = call.save(input)
    w = None if weight is None else call.save(weight)
    factor = once(lambda: group_norm(x(), groups, w() if w else None, eps))
    return Record(output, [input], lambda s: [s.mul_(factor())])


def record_divided(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    """Division by a positive number that depends on the data, ``2 (x / c)^+ s``."""
    output = call.run(lambda: call.func(input, *args, **kwargs))
    x, z = call.save(input), call.save(output)
    factor = once(lambda: numerics.rectify(z() / x(), x()))
    return Record(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        nonnegative=call.is_nonnegative(input),
        keeps_sign=True,
        tail=passed_on(z, x),
    )


NORMALIZATIONS: dict[str, Form] = {
    "layer_norm": record_layer_norm,
    "rms_norm": record_rms_norm,
    "group_norm": record_group_norm,
    "instance_norm": record_instance_norm,
    "normalize": record_divided,
    "local_response_norm": record_divided,
}
BATCH_NORM: dict[str, Form] = {"batch_norm": record_batch_norm}
