"""Attention in one call: run again part by part, so that each part meets its own rule."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.forms.base import Form, is_alias, is_source
from captum_abslrp.interception import Call
from captum_abslrp.steps import Answer


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
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]

        def repeated() -> Tensor:
            k, v = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
            return F.scaled_dot_product_attention(
                query, k, v, attn_mask, dropout_p, is_causal, scale=scale
            )

        return call.interception.composite(repeated)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    stabilised = _stabilised(call) if dropout_p == 0 else None
    leading = {t.shape[:-2] for t in (query, key, value)}
    plain_mask = attn_mask is None or (attn_mask.dtype == torch.bool and not is_source(attn_mask))
    if stabilised is not None and len(leading) == 1 and query.dim() > 2 and plain_mask:
        return _answer_at_once(
            call, query, key, value, attn_mask, scale, is_causal=is_causal, stabilised=stabilised
        )

    def attention() -> Tensor:
        mask = _causal(query, key) if is_causal else attn_mask
        logits = (query * scale) @ key.mT
        if mask is not None:
            logits = (
                logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            )
        # Dropout is a call even where it does nothing: as in attention that is written out.
        weights = F.dropout(logits.softmax(-1), dropout_p, dropout_p > 0)
        if mask is not None:
            weights = _without_masked_rows(weights, logits)
        del logits  # which are made again on the way back
        return weights @ value

    return call.interception.composite(attention)


def _stabilised(call: Call) -> int | None:
    """How many calls of attention divide by its probabilities; None if not all have the usual rules."""
    from captum_abslrp import rules

    if not call.interception.fuses:
        return None

    def kind(name: str) -> Any:
        return type(call.interception.rule_of(replace(call, name=name)))

    usual = {"mul": rules.ProductRule, "matmul": rules.MatmulRule, "softmax": rules.SoftmaxRule}
    if any(kind(name) is not expected for name, expected in usual.items()):
        return None
    of_dropout: dict[Any, int] = {rules.PassThroughRule: 1, rules.DropoutRule: 2}
    return of_dropout.get(kind("dropout"))


def _answer_at_once(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    is_causal: bool,
    stabilised: int,
) -> Answer:
    """What the parts would hand on one after the other, without the attention of all tokens on each other."""
    output = call.run(
        lambda: F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale)
    )
    sources = (query, key, value)
    wanted = [is_source(t) for t in sources]
    kept = [call.keep(t) for t in sources]
    shapes = [t.shape for t in sources]

    def propagate(seeds: Sequence[Tensor]) -> list[list[Tensor]]:
        q, k, v = (t.contiguous().flatten(0, -3) for t in kept)
        seen = _causal(q, k) if is_causal else mask
        if seen is not None:
            shape = (*shapes[0][:-1], shapes[1][-2])
            of_all = seen.dim() == 2 or set(seen.shape[:-2]) == {1}
            seen = seen.expand(shape[-2:] if seen.dim() == 2 else (*seen.shape[:-2], *shape[-2:]))
            seen = seen.reshape(1, *shape[-2:]) if of_all else seen.expand(shape).flatten(0, -3)
        shares = functional.attention(
            q * scale,
            k,
            v,
            [s.flatten(0, -3) for s in seeds],
            mask=seen,
            stabilised=stabilised,
        )
        return [
            list(compress((t.view(shape) for t, shape in zip(of, shapes, strict=True)), wanted))
            for of in shares
        ]

    return Answer(
        output,
        list(compress(sources, wanted)),
        propagate,  # type: ignore[arg-type]  # of all seeds
        nonnegative=call.is_nonnegative(value),
        together=True,
    )


def _causal(query: Tensor, key: Tensor) -> Tensor:
    shape = (query.shape[-2], key.shape[-2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


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
    # Backward hooks make three views of one tensor.
    alike = all(t is query or is_alias(t, query) for t in (key, value))
    if alike and in_proj_weight is not None:
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
    if not need_weights:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p if training else 0.0)
        return _projected(attended, out_proj_weight, out_proj_bias, batched), None
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits + mask
    attention = F.dropout(logits.softmax(-1), dropout_p, training)
    output = _projected(attention @ v, out_proj_weight, out_proj_bias, batched)
    attention = attention.detach()
    attention = attention.mean(1) if average_attn_weights else attention
    return output, attention if batched else attention.squeeze(0)


def _projected(attended: Tensor, weight: Tensor, bias: Tensor | None, batched: bool) -> Tensor:
    """The output projection of all heads together."""
    output = F.linear(attended.transpose(1, 2).flatten(2), weight, bias)
    return output.transpose(0, 1) if batched else output.squeeze(0)


ATTENTION: dict[str, Form] = {
    "scaled_dot_product_attention": answer_attention,
    "multi_head_attention_forward": answer_multi_head_attention,
}
