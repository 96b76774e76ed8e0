"""Attention in one call: run part by part, so that each part has its own rule, or at once."""

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
    r""":func:`matmul`, :func:`softmax` and :func:`matmul` again, of :math:`\mathrm{softmax}(q k^T) v`.

    Returns the relevance of query, key and value for each seed. A few rows of the attention are made again
    at a time: what stays in the cache costs little, and memory does not grow with the square of the tokens.

    Args:
        query: (G, N, D), scaled; G samples and heads, N queries, D features.
        key: (G, M, D), M keys.
        value: (G, M, E), E features.
        seeds: relevance per magnitude of the output for each seed, (G, N, E).
        mask: what is seen, bool, (G, N, M) or (1, N, M); None for all.
        stabilized: how many calls divide by the probabilities: softmax, and a dropout behind it.
        sizes: gets for each seed the sum of magnitudes of the relevance of the probabilities, (G,).

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
            if mask is not None:  # a query that sees nothing
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
"""Elements of attention that are made at a time, by the kind of device: about five tensors of as many, 5 MB
or 1.3 GB in float32. That of the CPU was measured; a GPU wants large products and has memory for them."""


ROWS = 256
"""Rows of attention that are made at a time at least, so that products with them are efficient."""


def _blocks(groups: int, rows: int, columns: int, device: torch.device) -> list[list[slice]]:
    """Some groups with all of their rows, or some rows of a group, at a time."""
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
        # Dropout is a call even where it does nothing: as in attention that is written out.
        weights = F.dropout(logits.softmax(-1), dropout_p, dropout_p > 0)
        if (
            mask is not None
        ):  # attention of a query that sees nothing is zero, as in PyTorch's own kernels
            nothing = logits.detach().isneginf().all(-1, keepdim=True)
            weights = weights.masked_fill(nothing, 0)
        del logits  # which are made again by the backward pass
        return weights @ value

    return call.recording.run_parts(parts)


def _stabilized(call: Call) -> int | None:
    """How many calls of attention divide by its probabilities; None if a part has an unusual form."""
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
    """What the parts would pass one after the other, without the attention of all tokens on each other."""
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
        propagate,  # type: ignore[arg-type]  # of all seeds
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
    """Scale what query and key get to what the probabilities have, so that all parts have one scale.

    Args:
        inputs: those of query, key and value that get relevance.
        shares: their relevance per magnitude, which is overwritten: of the query times the scale, as yet.
        of_probabilities: what the relevance of the probabilities adds up to, (B,).
        wanted: which of query, key and value get relevance.
        scale: what the query is multiplied by, without its sign.

    Returns:
        What the relevance of probabilities and value adds up to, (B,).
    """
    batch_size = len(of_probabilities)
    if wanted[0]:
        shares[0].mul_(scale)
    count = wanted[0] + wanted[1]
    whole = torch.zeros_like(of_probabilities)
    if count:  # logits have no history otherwise, and softmax makes constants of them
        whole += of_probabilities
        numerics.scale(
            inputs[:count], shares[:count], batch_size, totals=of_probabilities, joint=True
        )
    if wanted[2]:
        whole += numerics.sums(inputs[count], shares[count], batch_size)
    return whole


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Which keys a query may see if it sees none after its own place."""
    shape = (query.shape[-2], key.shape[-2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


ATTENTION: dict[str, Form] = {"scaled_dot_product_attention": record_attention}
