"""Multi-head attention in one call, as in ``nn.MultiheadAttention``."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
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
            f"Expected no rule on the output projection of {call}, which is not called as a module, but got "
            f"{inner}. Set the rule on the attention module."
        )
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return call.recording.run_parts(_multi_head_attention, SimpleNamespace(**bound.arguments))


def _multi_head_attention(given: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` with samples in the leading dimension of all inner calls.

    Inputs are (N, B, D), or (N, D) for one sample. Unlike in the original, which is sequence first, all
    inner calls have tensors (B, ...), so that the relevance of samples stays separate.
    """
    for name in ("bias_k", "bias_v", "static_k", "static_v", "add_zero_attn"):
        value = getattr(given, name)
        if value is not None and value is not False:
            raise NotImplementedError(
                f"Expected multi-head attention without `{name}`, but got it. Implement the attention with "
                f"explicit calls in the model."
            )
    inputs, heads = (given.query, given.key, given.value), given.num_heads
    batched = given.query.dim() == 3
    of_samples = [t.transpose(0, 1) if batched else t.unsqueeze(0) for t in inputs]
    weight, bias = given.in_proj_weight, given.in_proj_bias
    # Backward hooks turn one tensor into three views.
    alike = all(t is given.query or is_alias(t, given.query) for t in inputs[1:])
    if alike and weight is not None:
        # As in the original, one product computes all three.
        projected = F.linear(of_samples[0], weight, bias).chunk(3, -1)
    else:
        separate = (given.q_proj_weight, given.k_proj_weight, given.v_proj_weight)
        weights = separate if weight is None else weight.chunk(3)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        projected = tuple(map(F.linear, of_samples, weights, biases))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in projected)
    mask: Tensor | None = None
    for part in (given.attn_mask, given.key_padding_mask):
        if part is None:
            continue
        additive = part
        if part.dtype == torch.bool:
            zeros = torch.zeros_like(part, dtype=q.dtype)
            additive = zeros.masked_fill(part, -torch.inf)
        if part is given.key_padding_mask:
            additive = additive.reshape(-1, 1, 1, additive.shape[-1])
        elif additive.dim() == 3:
            additive = additive.unflatten(0, (-1, heads))
        mask = additive if mask is None else mask + additive

    def output(attended: Tensor) -> Tensor:
        joined = attended.transpose(1, 2).flatten(2)
        result = F.linear(joined, given.out_proj_weight, given.out_proj_bias)
        return result.transpose(0, 1) if batched else result.squeeze(0)

    if not given.need_weights:
        dropout = given.dropout_p if given.training else 0.0
        return output(F.scaled_dot_product_attention(q, k, v, mask, dropout)), None
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits + mask
    weights = F.dropout(logits.softmax(-1), given.dropout_p, given.training)
    shown = weights.detach().mean(1) if given.average_attn_weights else weights.detach()
    return output(weights @ v), shown if batched else shown.squeeze(0)


MULTI_HEAD: dict[str, Form] = {"multi_head_attention_forward": record_multi_head_attention}
