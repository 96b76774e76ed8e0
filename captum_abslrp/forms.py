"""The closed forms: how a call of each kind is run, and how relevance goes back through it.

A form takes the :class:`~captum_abslrp.interception.Call` and the arguments of the call, as the
function that is called declares them, and returns an
:class:`~captum_abslrp.interception.Answer`. The mathematics is in :mod:`captum_abslrp.functional`; what
is said here is what each call computes, what is kept for the backward pass, and which of the arguments
receive relevance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_abslrp import functional
from captum_abslrp.calls import tensors_in
from captum_abslrp.functional import divide
from captum_abslrp.interception import Answer, Call, Kept, carries_relevance

Form = Callable[..., Any]


class _Geometry(TypedDict):
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def answer_twin(call: Call, *, divides: bool = True) -> Answer:
    """The definition, :func:`captum_abslrp.functional.twin`, for any differentiable call."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected the twin rule to see one output tensor, but got {call}.")
    func, (leaves, structure) = call.func, tree_flatten((call.args, call.kwargs))
    at = [i for i, leaf in enumerate(leaves) if is_source(leaf)]
    kept = [call.keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    z = call.keep(output)

    def propagate(relevance: Tensor) -> list[Tensor]:
        s = divide(relevance, z()) if divides else relevance
        plain = [k() if isinstance(k, Kept) else k for k in kept]
        absolute = [_magnitude(value) for value in plain]

        def of_source(i: int) -> Tensor:
            def call_with(others: list[Any], x: Tensor) -> Tensor:
                args, kwargs = tree_unflatten([*others[:i], x, *others[i + 1 :]], structure)
                result: Tensor = func(*args, **kwargs)
                return result

            return functional.twin(
                plain[i], partial(call_with, plain), partial(call_with, absolute), s
            )

        return [of_source(i) for i in at]

    return Answer(output, [leaves[i] for i in at], propagate)


def answer_passed(call: Call) -> Answer:
    """Relevance moves with its element."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    sources = [t for t in tensors_in((call.args, call.kwargs)) if carries_relevance(t)]
    if not isinstance(output, Tensor) or any(s.shape != output.shape for s in sources):
        raise TypeError(
            f"Expected relevance to pass through a call that keeps the shape of its input, but got "
            f"{call}."
        )
    return _passed(output, sources)


def answer_linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Answer:
    output = call.run(lambda: F.linear(input, weight, bias))
    x, w, z = call.keep(input), call.keep(weight), call.keep(output)
    if not carries_relevance(weight):
        return Answer(
            output, [input], lambda relevance: [functional.linear(x(), w(), divide(relevance, z()))]
        )
    wanted = [carries_relevance(t) for t in (input, weight)]

    def propagate(relevance: Tensor) -> list[Tensor]:
        s = divide(relevance, z())
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
        _check_batched(call, input, dims)
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
        x, w, z = call.keep(input), call.keep(weight), call.keep(output)
        return Answer(
            output,
            [input],
            lambda relevance: [
                functional.convolution(x(), w(), divide(relevance, z()), **geometry)
            ],
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
        _check_batched(call, input, dims)
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
        x, w, z = call.keep(input), call.keep(weight), call.keep(output)
        return Answer(
            output,
            [input],
            lambda relevance: [
                functional.convolution(
                    x(), w(), divide(relevance, z()), output_padding=extra, **geometry
                )
            ],
        )

    return answer_transposed_convolution


def answer_linear_map(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    func = call.func

    def run(x: Tensor) -> Tensor:
        result: Tensor = func(x, *args, **kwargs)
        return result

    output = call.run(lambda: run(input))
    x, z = call.keep(input), call.keep(output)
    return Answer(
        output,
        [input],
        lambda relevance: [functional.linear_map(x(), run, divide(relevance, z()))],
    )


def answer_elementwise(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    args = tuple(a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args)
    func = call.func

    def run(x: Tensor) -> Tensor:
        result: Tensor = func(x, *args, **kwargs)
        return result

    output = call.run(lambda: run(input))
    if output.shape != input.shape:
        raise TypeError(
            f"Expected an elementwise call to keep the shape {tuple(input.shape)} of its input, but "
            f"got {call} with output shape {tuple(output.shape)}."
        )
    x = call.keep(input)
    factor = _once(lambda: functional.elementwise(x(), run))
    return Answer(output, [input], lambda relevance: [factor() * relevance])


def answer_relu(call: Call, input: Tensor, inplace: bool = False) -> Answer:
    """The twin rule of ReLU is the identity, up to the scale of a sample, where the output is positive.

    Where the output is zero, so is the relevance that arrives there: the call that handed it over has
    multiplied by that zero. A rule that does not (Captum's ``IdentityRule``) is passed on as it is,
    as under Captum's own ``LRP``; the literal twin would divide it by the stabiliser.
    """
    return Answer(call.run(lambda: torch.relu(input)), [input], lambda relevance: [relevance])


def answer_max_pool(
    call: Call, input: Tensor, *args: Any, divides: bool = True, **kwargs: Any
) -> Answer:
    _check_batched(call, input, int(call.name[-2]))
    with_indices = getattr(F, f"{call.name}_with_indices")
    bound = inspect.signature(with_indices).bind(input, *args, **kwargs)
    bound.arguments["return_indices"] = True
    options = {key: value for key, value in bound.arguments.items() if key != "input"}

    def pool(x: Tensor) -> tuple[Tensor, Tensor]:
        maximum, indices = with_indices(x, **options)
        return maximum, indices

    output = call.run(lambda: call.func(input, *args, **kwargs))
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected max pooling without indices, but got {call}.")
    x, z = call.keep(input), call.keep(output)
    return Answer(
        output,
        [input],
        lambda relevance: [
            functional.max_pool(x(), pool, divide(relevance, z()) if divides else relevance)
        ],
    )


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
    if training or running_var is None:
        running_var = input.transpose(0, 1).flatten(1).var(1, correction=0)
    scale = (running_var + eps).rsqrt()
    scale = (scale if weight is None else scale * weight).view(-1, *[1] * (input.dim() - 2))
    x, z = call.keep(input), call.keep(output)
    factor = _once(lambda: functional.diagonal(x(), scale, z()))
    return Answer(output, [input], lambda relevance: [factor() * relevance])


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
    x, z = call.keep(input), call.keep(output)
    w = None if weight is None else call.keep(weight)
    factor = _once(
        lambda: divide(
            functional.layer_norm(x(), len(normalized_shape), w() if w else None, eps), z()
        )
    )
    return Answer(output, [input], lambda relevance: [factor() * relevance])


def answer_rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Answer:
    output = call.run(lambda: F.rms_norm(input, normalized_shape, weight, eps))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x, z = call.keep(input), call.keep(output)
    w = None if weight is None else call.keep(weight)
    factor = _once(
        lambda: divide(
            functional.rms_norm(x(), len(normalized_shape), w() if w else None, eps), z()
        )
    )
    return Answer(output, [input], lambda relevance: [factor() * relevance])


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
    x, p = call.keep(input), call.keep(output)
    factor = _once(lambda: divide(functional.softmax(x(), p(), dim), p().nan_to_num()))
    return Answer(output, [input], lambda relevance: [factor() * relevance])


def answer_matmul(call: Call, input: Tensor, other: Tensor) -> Answer:
    if input.dim() < 2 or other.dim() < 2:
        return answer_twin(call)
    output = call.run(lambda: torch.matmul(input, other))
    a, b, z = call.keep(input), call.keep(other), call.keep(output)
    wanted = [carries_relevance(t) for t in (input, other)]

    def propagate(relevance: Tensor) -> list[Tensor]:
        return list(compress(functional.matmul(a(), b(), divide(relevance, z())), wanted))

    return Answer(output, list(compress([input, other], wanted)), propagate)


def answer_addition(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Answer:
    summand = other if alpha == 1 else other * alpha
    return _answer_summands(call, (input, other), (input, summand))


def answer_subtraction(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Answer:
    return _answer_summands(call, (input, other), (input, -alpha * other))


def _answer_summands(call: Call, arguments: Sequence[Any], summands: Sequence[Any]) -> Answer:
    output = call.run(lambda: summands[0] + summands[1])
    z = call.keep(output)
    pairs = [(a, call.keep(s)) for a, s in zip(arguments, summands, strict=True) if is_source(a)]
    factors = [_once(partial(_factor_of_summand, summand, z)) for _, summand in pairs]
    return Answer(
        output,
        [argument for argument, _ in pairs],
        lambda relevance: [factor() * relevance for factor in factors],
    )


def _factor_of_summand(summand: Kept, output: Kept) -> Tensor:
    return functional.diagonal(summand(), 1.0, output())


def answer_head_sum(call: Call, input: Any, other: Any) -> Answer:
    if not (is_source(input) and is_source(other)):
        return answer_addition(call, input, other)
    output = call.run(lambda: torch.add(input, other))
    x, y, z = call.keep(input), call.keep(other), call.keep(output)

    def propagate(relevance: Tensor) -> list[Tensor]:
        s = divide(relevance, z())
        return [x().abs() * s, y().abs() * s]

    return Answer(output, [input, other], propagate)


def answer_product(call: Call, input: Any, other: Any) -> Answer:
    output = call.run(lambda: input * other)
    sources = [t for t in (input, other) if is_source(t)]
    if _is_scalar(input, other) or _is_scalar(other, input):
        return _passed(output, sources)
    a, b, z = call.keep(input), call.keep(other), call.keep(output)
    factor = _once(lambda: functional.diagonal(a(), b(), z()))
    n = len(sources)
    return Answer(output, sources, lambda relevance: [factor() * relevance] * n)


def answer_division(
    call: Call, input: Any, other: Any, *, rounding_mode: str | None = None
) -> Answer:
    if is_source(other):
        return answer_twin(call)
    output = call.run(lambda: torch.div(input, other, rounding_mode=rounding_mode))
    if _is_scalar(other, input):
        return _passed(output, [input])
    x, c, z = call.keep(input), call.keep(other), call.keep(output)
    factor = _once(lambda: functional.diagonal(x(), c().reciprocal(), z()))
    return Answer(output, [input], lambda relevance: [factor() * relevance])


def _is_scalar(value: Any, other: Any) -> bool:
    """Whether multiplying by a value is scaling by a constant, whatever the batch size."""
    if not isinstance(value, Tensor):
        return True
    single = value.dim() == 0 or (value.numel() == 1 and value.dim() < other.dim())
    return single and not carries_relevance(value)


def answer_dropout(
    call: Call,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Answer:
    output = call.run(lambda: call.func(input, p, training))
    z = call.keep(output)
    factor = _once(partial(_factor_of_summand, z, z))
    return Answer(output, [input], lambda relevance: [factor() * relevance])


def answer_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    def attention() -> Tensor:
        k, v, mask = key, value, attn_mask
        if enable_gqa:
            repeats = query.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
        if is_causal:
            shape = (query.shape[-2], k.shape[-2])
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
        if mask is not None:
            logits = (
                logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            )
        # Dropout is a call even where it does nothing: as in attention that is written out.
        weights = F.dropout(logits.softmax(-1), dropout_p, dropout_p > 0)
        return (weights if mask is None else _without_masked_rows(weights, logits)) @ v

    return call.interception.composite(attention)


def _without_masked_rows(weights: Tensor, logits: Tensor) -> Tensor:
    """Attention of a query that may see nothing is zero, as in PyTorch's own kernels."""
    return weights.masked_fill(logits.detach().isneginf().all(-1, keepdim=True), 0)


def answer_multi_head_attention(call: Call, *args: Any, **kwargs: Any) -> Any:
    inner = getattr(getattr(call.module, "out_proj", None), "rule", None)
    if inner is not None:
        raise TypeError(
            f"Expected no rule on the output projection inside {call}, whose layers are not called as "
            f"modules, but got {inner}. Set the rule on the attention itself."
        )
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return call.interception.composite(_multi_head_attention, **bound.arguments)


def _multi_head_attention(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    static_k: Tensor | None,
    static_v: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` with samples in the leading dimension throughout.

    Inputs are (N, B, D), or (N, D) for one sample; where the original is sequence first, every call
    in between here is (B, ...), which is what makes the relevance of a sample its own.
    """
    unsupported = {
        "bias_k": bias_k, "bias_v": bias_v, "static_k": static_k, "static_v": static_v,
        "add_zero_attn": add_zero_attn or None,
    }  # fmt: skip
    for name, given in unsupported.items():
        if given is not None:
            raise NotImplementedError(
                f"Expected multi-head attention without `{name}`, but got one with it. Write the "
                f"attention out in the model as calls of its own."
            )
    batched = query.dim() == 3
    q, k, v = (t.transpose(0, 1) if batched else t.unsqueeze(0) for t in (query, key, value))
    if in_proj_weight is None:
        weights = [w for w in (q_proj_weight, k_proj_weight, v_proj_weight) if w is not None]
    else:
        weights = list(in_proj_weight.chunk(3))
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    if query is key and key is value and in_proj_weight is not None:
        # As in the original, one product makes all three.
        projected = list(F.linear(q, in_proj_weight, in_proj_bias).chunk(3, -1))
    else:
        triples = zip((q, k, v), weights, biases, strict=True)
        projected = [F.linear(t, w, b) for t, w, b in triples]
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in projected)
    mask: Tensor | None = None
    for given in (attn_mask, None if key_padding_mask is None else key_padding_mask):
        if given is None:
            continue
        additive = (
            torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -torch.inf)
            if given.dtype == torch.bool
            else given
        )
        if given is key_padding_mask:
            additive = additive.reshape(-1, 1, 1, additive.shape[-1])
        elif additive.dim() == 3:
            additive = additive.unflatten(0, (-1, num_heads))
        mask = additive if mask is None else mask + additive
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits + mask
    attention = F.dropout(logits.softmax(-1), dropout_p, training)
    if mask is not None and not need_weights:
        attention = _without_masked_rows(attention, logits)
    output = F.linear((attention @ v).transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    output = output.transpose(0, 1) if batched else output.squeeze(0)
    if not need_weights:
        return output, None
    attention = attention.detach()
    attention = attention.mean(1) if average_attn_weights else attention
    return output, attention if batched else attention.squeeze(0)


CONVOLUTIONS: dict[str, Form] = {f"conv{d}d": _convolution(d) for d in (1, 2, 3)} | {
    f"conv_transpose{d}d": _transposed_convolution(d) for d in (1, 2, 3)
}
LINEAR_MAPS: dict[str, Form] = dict.fromkeys(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d mean sum".split(),
    answer_linear_map,
)
ELEMENTWISE: dict[str, Form] = dict.fromkeys(
    "relu6 gelu silu sigmoid tanh elu celu selu softplus mish hardswish hardsigmoid hardtanh "
    "leaky_relu logsigmoid softsign prelu".split(),
    answer_elementwise,
)
ELEMENTWISE["relu"] = answer_relu
MAX_POOLS: dict[str, Form] = dict.fromkeys(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d".split(),
    answer_max_pool,
)
DROPOUTS: dict[str, Form] = dict.fromkeys(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split(),
    answer_dropout,
)
MATMULS: dict[str, Form] = dict.fromkeys(["matmul", "bmm", "mm"], answer_matmul)
ATTENTION: dict[str, Form] = {
    "scaled_dot_product_attention": answer_attention,
    "multi_head_attention_forward": answer_multi_head_attention,
}


def _passed(output: Tensor, sources: Sequence[Tensor]) -> Answer:
    """Scaling by a constant: relevance moves with its element."""
    n = len(sources)
    return Answer(output, sources, lambda relevance: [relevance] * n, scaled=False)


def _once(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Compute what does not depend on the seed with the first seed, and keep it for the others."""
    result: list[Tensor] = []

    def get() -> Tensor:
        if not result:
            result.append(compute())
        return result[0]

    return get


def is_source(value: Any) -> bool:
    return isinstance(value, Tensor) and carries_relevance(value)


def _magnitude(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number per spatial dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def _check_batched(call: Call, input: Tensor, dims: int) -> None:
    if input.dim() != dims + 2:
        raise ValueError(
            f"Expected {call} to see a batch, an input of {dims + 2} dimensions, but got shape "
            f"{tuple(input.shape)}. Add the batch dimension to `inputs`: `x.unsqueeze(0)`."
        )
