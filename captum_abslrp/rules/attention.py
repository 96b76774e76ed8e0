"""Attention in one call: decomposed, so that each part has its own rule, or fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.numerics import EPS, rectify_in_place
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, record_passed
from captum_abslrp.rules.contributions import chosen
from captum_abslrp.rules.elementwise import record_dropout
from captum_abslrp.rules.matmul import record_matmul
from captum_abslrp.rules.products import record_product
from captum_abslrp.rules.softmax import record_softmax, softmax


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seeds: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    stabilized: int = 1,
    sizes: list[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    r"""Apply the rules of matmul, softmax and matmul to :math:`\mathrm{softmax}(q k^T) v`.

    The attention matrix is recomputed a few rows at a time. These fit into the cache, and memory does not
    grow with the square of the number of tokens.

    Args:
        query: (G, N, D), scaled; G samples and heads, N queries, D features.
        key: (G, M, D), M keys.
        value: (G, M, E), E features.
        seeds: relevance per magnitude of the output for each seed, (G, N, E).
        mask: the keys that each query attends to, bool, (G, N, M) or (1, N, M); None for all.
        stabilized: the number of calls that divide by the probabilities: softmax, and a dropout after it.
        sizes: a list to which the sum of magnitudes of the relevance of the probabilities is added for each
            seed, (G,).

    Returns:
        The relevance of query, key and value for each seed.

    Example:
        >>> q, k, v = torch.ones(1, 1, 1), torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 2, 1)
        >>> attention(q, k, v, [torch.ones(1, 1, 1)])[0][2]
        tensor([[[0.8808],
                 [0.1192]]])
    """
    groups, rows = _blocks(len(query), query.shape[1], key.shape[1], query.device)
    found = [
        (torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)) for _ in seeds
    ]
    if sizes is not None:
        sizes += [query.new_zeros(len(query)) for _ in seeds]
    for group in groups:
        q, k, v = query[group], key[group], value[group].clamp(min=0)
        of_keys = [k.clamp(min=0), k.clamp(max=0)]
        negatives = [torch.zeros_like(k) for _ in seeds]
        for row in rows:
            few = q[:, row]
            logits = few @ k.mT
            if mask is not None:
                seen = mask[group if len(mask) > 1 else slice(None), row]
                logits.masked_fill_(~seen, -torch.inf)
            probabilities = logits.softmax(-1)
            if mask is not None:  # queries whose keys are all masked
                probabilities.nan_to_num_(0)
            factor = softmax(logits, probabilities, -1)
            for _ in range(stabilized):
                factor *= probabilities / (probabilities + EPS)
            of_queries = [few.clamp(min=0), few.clamp(max=0)]
            for number, (seed, of_seed) in enumerate(zip(seeds, found, strict=True)):
                s, negative = seed[group, row], negatives[number]
                to_query, to_key, to_value = (t[group] for t in of_seed)
                to_value.baddbmm_(probabilities.mT, s)
                of_logits = s @ v.mT
                if sizes is not None:
                    magnitudes = (of_logits * probabilities).abs_()
                    sizes[number][group] += magnitudes.flatten(1).sum(1)
                of_logits *= factor
                positive = torch.bmm(of_logits, of_keys[0], out=to_query[:, row])
                chosen([positive, of_logits @ of_keys[1]], few)
                for result, part in zip((to_key, negative), of_queries, strict=True):
                    result.baddbmm_(of_logits.mT, part)
        for (_, to_key, _), negative in zip(found, negatives, strict=True):
            chosen([to_key[group], negative], k)
    return [(to_q, to_k, rectify_in_place(to_v, value)) for to_q, to_k, to_v in found]


BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""Number of elements of the attention matrix to compute at a time, by type of device. About five tensors of
this size are needed, 5 MB or 1.3 GB in float32. The value for the CPU was measured; a GPU is efficient for
large products and has the memory for them."""


ROWS = 256
"""Minimum number of rows of the attention matrix to compute at a time, for efficient products."""


def _blocks(groups: int, rows: int, columns: int, device: torch.device) -> list[list[slice]]:
    """Split the attention matrix into blocks of several groups, or of several rows of one group."""
    elements = BLOCK.get(device.type, BLOCK["cuda"])
    many = max(1, elements // (rows * columns))
    few = rows if many > 1 else max(ROWS, elements // columns)
    return [
        [slice(start, min(start + step, size)) for start in range(0, max(size, 1), step)]
        for size, step in ((groups, many), (rows, few))
    ]


def record_attention(
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
            k, v = (t.repeat_interleave(repeats, -3) for t in (key, value))
            return F.scaled_dot_product_attention(
                query, k, v, attn_mask, dropout_p, is_causal, scale=scale
            )

        return call.recording.run_parts(repeated)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    stabilized = _stabilized(call) if dropout_p == 0 else None
    leading = {t.shape[:-2] for t in (query, key, value)}
    plain_mask = attn_mask is None or (attn_mask.dtype == torch.bool and not is_source(attn_mask))
    if stabilized is not None and len(leading) == 1 and query.dim() > 2 and plain_mask:
        return _record_at_once(call, (query, key, value), attn_mask, scale, is_causal, stabilized)

    def parts() -> Tensor:
        mask = _causal(query, key) if is_causal else attn_mask
        logits = (query * scale) @ key.mT
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            logits = logits + mask
        # Call dropout even if it is inactive, as in explicit attention.
        weights = F.dropout(logits.softmax(-1), dropout_p, dropout_p > 0)
        if mask is not None:
            # If all keys of a query are masked, its attention is zero, as in the kernels of PyTorch.
            nothing = logits.detach().isneginf().all(-1, keepdim=True)
            weights = weights.masked_fill(nothing, 0)
        del logits  # the backward pass recomputes them
        return weights @ value

    return call.recording.run_parts(parts)


def _stabilized(call: Call) -> int | None:
    """The number of calls in attention that divide by the probabilities; None if a part has another rule."""
    if not call.recording.fuses:
        return None

    def form(name: str) -> Form | None:
        part = replace(call, name=name)
        rule = call.recording.rule_of(part)
        return None if rule is None else rule.form_of(part)

    usual = {"mul": record_product, "matmul": record_matmul, "softmax": record_softmax}
    if any(form(name) is not expected for name, expected in usual.items()):
        return None
    of_dropout: dict[Form | None, int] = {record_passed: 1, record_dropout: 2}
    return of_dropout.get(form("dropout"))


def _record_at_once(
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    stabilized: int,
) -> Record:
    """Record fused attention, with the same result as for its parts, without the full attention matrix."""
    output = call.run(
        lambda: F.scaled_dot_product_attention(*inputs, mask, 0.0, is_causal, scale=scale)
    )
    wanted = [is_source(t) for t in inputs]
    saved = [call.save(t) for t in inputs]
    shapes = [t.shape for t in inputs]
    joint, batch_size = call.recording.joint, call.recording.batch_size

    def propagate(seeds: Sequence[Tensor]) -> list[list[Tensor]]:
        q, k, v = (t.contiguous().flatten(0, -3) for t in saved)
        seen = _causal(q, k) if is_causal else mask
        if seen is not None:
            shape = (*shapes[0][:-1], shapes[1][-2])
            of_all = seen.dim() == 2 or set(seen.shape[:-2]) == {1}
            seen = seen.expand(*seen.shape[:-2], *shape[-2:])
            seen = seen.reshape(1, *shape[-2:]) if of_all else seen.expand(shape).flatten(0, -3)
        flat = [s.flatten(0, -3) for s in seeds]
        sizes: list[Tensor] | None = [] if joint else None
        shares = attention(q * scale, k, v, flat, mask=seen, stabilized=stabilized, sizes=sizes)
        results = [
            list(compress((t.view(shape) for t, shape in zip(of, shapes, strict=True)), wanted))
            for of in shares
        ]
        if sizes is not None:
            values = [t() for t in compress(saved, wanted)]
            for shares_of_seed, size in zip(results, sizes, strict=True):
                of_probabilities = size.view(batch_size, -1).sum(1)
                whole = _joined(values, shares_of_seed, of_probabilities, wanted, abs(scale))
                shares_of_seed.append(whole)
        return results

    return Record(
        output,
        list(compress(inputs, wanted)),
        propagate,  # type: ignore[arg-type]  # takes all seeds
        nonnegative=call.is_nonnegative(inputs[2]),
        all_seeds=True,
        adds_total=joint,
    )


def _joined(
    inputs: Sequence[Tensor],
    shares: Sequence[Tensor],
    of_probabilities: Tensor,
    wanted: Sequence[bool],
    scale: float,
) -> Tensor:
    """Scale the relevance of query and key to that of the probabilities, so that all parts have one scale.

    Args:
        inputs: the tensors among query, key and value that receive relevance.
        shares: their relevance per magnitude, which is overwritten; for the query, that of the scaled query.
        of_probabilities: the sum of the relevance of the probabilities, (B,).
        wanted: which of query, key and value receive relevance.
        scale: the magnitude of the factor of the query.

    Returns:
        The sum of the relevance of probabilities and value, (B,).
    """
    batch_size = len(of_probabilities)
    if wanted[0]:
        shares[0].mul_(scale)
    count = wanted[0] + wanted[1]
    whole = torch.zeros_like(of_probabilities)
    if count:  # otherwise the logits are constants
        whole += of_probabilities
        numerics.scale(
            inputs[:count], shares[:count], batch_size, totals=of_probabilities, joint=True
        )
    if wanted[2]:
        whole += numerics.sums(inputs[count], shares[count], batch_size)
    return whole


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask: each query attends to keys up to its own position."""
    shape = (query.shape[-2], key.shape[-2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


ATTENTION: dict[str, Form] = {"scaled_dot_product_attention": record_attention}
