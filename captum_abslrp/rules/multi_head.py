"""Multi-head attention in one call, as of ``nn.MultiheadAttention``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.rules.base import Form, is_alias


def record_multi_head_attention(call: Call, *args: Any, **kwargs: Any) -> Any:
    inner = getattr(getattr(call.module, "out_proj", None), "rule", None)
    if inner is not None:
        raise TypeError(
            f"Expected no rule on the output projection inside {call}, whose layers are not called as "
            f"modules, but got {inner}. Set the rule on the attention itself."
        )
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return call.recording.run_parts(_multi_head_attention, **bound.arguments)


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


MULTI_HEAD: dict[str, Form] = {"multi_head_attention_forward": record_multi_head_attention}
