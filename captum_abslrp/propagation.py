"""The way back: relevance of tensors that an output depends on, for several seeds in one pass.

The history of the output is a graph of steps (calls that were answered by a rule) and of the nodes that
autograd has made for calls that move elements. Autograd runs it back, under ``torch.func.vmap`` over the
seeds, so that large weights are read once for all of them, and frees what each step kept when it is
done.

The scale of a sample's relevance matters only where relevance from several calls is added up. In
between it is left as it is: sums over whole tensors are the dearest part of a rule that is otherwise one
transposed product.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.functional import EPS, LEAST
from captum_abslrp.interception import Step, in_full_precision, is_answered

__all__ = ["propagate"]

TOTAL = 256.0
"""Relevance of a sample while it is propagated. A power of two changes no digit of the result; this one
keeps the relevance of single elements and of sums over branches within the range of float16, too."""

UNSCALED_STEPS = 8
"""How many steps may follow each other unscaled, so that nothing leaves the range of float32."""


def propagate(output: Tensor, explained: Sequence[Tensor], seeds: Tensor) -> list[Tensor]:
    """Relevance of tensors for relevance of the output that depends on them.

    Axes: S seeds.

    Args:
        output: made under an :class:`~captum_abslrp.interception.Interception` with ``total=TOTAL``; its
            history is used up.
        explained: the tensors; zeros where the output does not depend on one.
        seeds: relevance of the output, (S, ``*output.shape``).

    Returns:
        Relevance of each tensor, (S, ``*tensor.shape``), in its dtype.
    """
    if output.grad_fn is None:
        raise ValueError("Expected `output` to depend on the inputs, but got one without history.")
    stops = {tensor.grad_fn for tensor in explained}
    alone = len(explained) == 1 or all(tensor.is_leaf for tensor in explained)
    _prepare(output.grad_fn, stops, shared=not alone)
    values = in_full_precision(output.detach()).abs()
    first = _first_step(output.grad_fn, stops)
    if first is None:  # what is only handed on is exact
        values = values.clamp_(min=LEAST)
    else:  # the first rule divides by `|z| + EPS`, as in the definition
        values += EPS
        first.stabilised, first.vanishing = True, None
    start = in_full_precision(seeds) * TOTAL / values
    start = start.clamp(max=torch.finfo(output.dtype).max).to(output.dtype)

    def run_back(s: Tensor) -> tuple[Tensor, ...]:
        shares = torch.autograd.grad(output, explained, s, allow_unused=True)
        return tuple(
            torch.zeros_like(tensor) if share is None else share
            for share, tensor in zip(shares, explained, strict=True)
        )

    if len(start) == 1:
        shares = tuple(share.unsqueeze(0) for share in run_back(start[0]))
    else:
        shares = torch.func.vmap(run_back)(start)
    return [
        (
            functional.relevance(in_full_precision(tensor.detach()), in_full_precision(share))
            / TOTAL
        ).to(tensor.dtype)
        for tensor, share in zip(explained, shares, strict=True)
    ]


def _first_step(node: Any, stops: Collection[Any]) -> Step | None:
    """The scaled step that all relevance of the output meets first, if there is one."""
    while node is not None and node not in stops:
        if is_answered(node):
            return node.step if node.step.scaled else None
        after = [following for following, _ in node.next_functions if following is not None]
        node = after[0] if len(after) == 1 else None
    return None


def _prepare(last: Any, stops: Collection[Any], *, shared: bool) -> None:
    """Tell the steps which of their sources need not be scaled, and whether others see what arrives.

    Each step hands on memory of its own, and calls that move elements hand on what they get to one
    place; only the relevance of explained tensors that depend on each other is looked at by others.
    """
    arriving = _edges(last)
    depth: dict[Any, int] = {}

    def next_step(node: Any) -> Any:
        """The scaled step that all of what reaches a node goes to, and nothing else; or None."""
        while node is not None and node not in stops and arriving[node] == 1:
            if is_answered(node) and node.step.scaled:
                return node
            after = [following for following, _ in node.next_functions if following is not None]
            if len(after) != 1:
                return None
            (node,) = after
        return None

    for node in _in_order(last, arriving):
        if not is_answered(node):
            continue
        node.step.shared = shared
        if not node.step.scaled or node.step.output is not None:
            continue
        step: Step = node.step
        unscaled = set()
        for i, ((following, _), (_, dtype)) in enumerate(
            zip(node.next_functions, step.layouts, strict=True)
        ):
            target = next_step(following)
            if target is None or dtype not in (torch.float32, torch.float64):
                continue
            if depth.get(node, 0) + 1 < UNSCALED_STEPS:
                depth[target] = depth.get(node, 0) + 1
                unscaled.add(i)
        step.unscaled = frozenset(unscaled)


def _edges(last: Any) -> dict[Any, int]:
    """The nodes of a history, and how many edges arrive at each."""
    arriving: dict[Any, int] = {last: 0}
    stack = [last]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if node not in arriving:
                stack.append(node)
            arriving[node] = arriving.get(node, 0) + 1
    return arriving


def _in_order(last: Any, arriving: dict[Any, int]) -> Iterator[Any]:
    """The nodes of a history, each after all that lead to it."""
    left = dict(arriving)
    ready = deque([last])
    while ready:
        node = ready.popleft()
        yield node
        for following, _ in node.next_functions:
            if following is not None:
                left[following] -= 1
                if left[following] == 0:
                    ready.append(following)
