"""Normalisation: statistics, divisors and denominators are constants of the call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.forms.base import Form, once, passed_on
from captum_abslrp.interception import Call
from captum_abslrp.steps import Answer


def answer_batch_norm(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    if call.func is torch.batch_norm:  # the order of its arguments differs
        weight, bias, mean, var, training, momentum, eps, _ = args
        return _answer_batch_norm(call, input, mean, var, weight, bias, training, momentum, eps)
    return _answer_batch_norm(call, input, *args, **kwargs)


def _answer_batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Answer:
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
    x = call.keep(input)
    factor = once(lambda: functional.diagonal(x(), scale))
    kept = None if remake is None else call.keep_output(output, lambda: remake(x()))
    z = call.keep(output) if kept is None else kept
    return Answer(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        keeps_sign=True,
        kept=kept,
        tail=passed_on(z, x, scale.sign),
    )


def answer_layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Answer:
    output = call.run(lambda: F.layer_norm(input, normalized_shape, weight, bias, eps))
    x = call.keep(input)
    w = None if weight is None else call.keep(weight)
    factor = once(
        lambda: functional.layer_norm(x(), len(normalized_shape), w() if w else None, eps)
    )
    kept = call.keep_output(output, lambda: F.layer_norm(x(), normalized_shape, weight, bias, eps))
    return Answer(output, [input], lambda s: [s.mul_(factor())], kept=kept)


def answer_rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Answer:
    output = call.run(lambda: F.rms_norm(input, normalized_shape, weight, eps))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = call.keep(input)
    w = None if weight is None else call.keep(weight)
    factor = once(lambda: functional.rms_norm(x(), len(normalized_shape), w() if w else None, eps))
    return Answer(output, [input], lambda s: [s.mul_(factor())], keeps_sign=True)


def answer_softmax(
    call: Call,
    input: Tensor,
    dim: int | None = None,
    *options: Any,
    dtype: torch.dtype | None = None,
    _stacklevel: int = 3,
) -> Answer:
    # F.softmax(x, dim, _stacklevel, dtype); torch.softmax(x, dim, dtype)
    dtype = next((o for o in options if isinstance(o, torch.dtype)), dtype)
    if dim is None:
        raise ValueError(f"Expected softmax to be called with its dimension, but got {call}.")
    output = call.run(lambda: torch.softmax(input, dim, dtype=dtype))
    x = call.keep(input)
    p = call.keep_output(output, lambda: torch.softmax(x(), dim))
    factor = once(lambda: functional.softmax(x(), p(), dim))
    return Answer(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        nonnegative=True,
        vanishing=True,
        kept=p,
        tail=passed_on(p, x),
        logits=x,
    )


def answer_group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Answer:
    output = call.run(lambda: F.group_norm(input, num_groups, weight, bias, eps))
    return _answer_groups(call, input, output, num_groups, weight, eps)


def answer_instance_norm(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    if call.func is torch.instance_norm:  # the order of its arguments differs
        weight, bias, mean, var, use_input_stats, momentum, eps, _ = args
        return _answer_instance_norm(
            call, input, mean, var, weight, bias, use_input_stats, momentum, eps
        )
    return _answer_instance_norm(call, input, *args, **kwargs)


def _answer_instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Answer:
    if not use_input_stats:
        return _answer_batch_norm(call, input, running_mean, running_var, weight, bias, eps=eps)
    output = call.run(
        lambda: F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    )
    return _answer_groups(call, input, output, input.shape[1], weight, eps)


def _answer_groups(
    call: Call, input: Tensor, output: Tensor, groups: int, weight: Tensor | None, eps: float
) -> Answer:
    x = call.keep(input)
    w = None if weight is None else call.keep(weight)
    factor = once(lambda: functional.group_norm(x(), groups, w() if w else None, eps))
    return Answer(output, [input], lambda s: [s.mul_(factor())])


def answer_divided(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    """Division by a positive number that depends on the data, ``2 (x / c)^+ s``."""
    output = call.run(lambda: call.func(input, *args, **kwargs))
    x, z = call.keep(input), call.keep(output)
    factor = once(lambda: functional.rectify(z() / x(), x()))
    return Answer(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        nonnegative=call.is_nonnegative(input),
        keeps_sign=True,
        tail=passed_on(z, x),
    )


NORMALIZATIONS: dict[str, Form] = {
    "layer_norm": answer_layer_norm,
    "rms_norm": answer_rms_norm,
    "group_norm": answer_group_norm,
    "instance_norm": answer_instance_norm,
    "normalize": answer_divided,
    "local_response_norm": answer_divided,
}
