"""Relevance that arrives at nodes of the autograd graph, and its propagation through nodes of autograd.

Nodes of autograd belong to calls that move elements. Their relevance is propagated like a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_abslrp.engine.nodes import is_hook, is_recorded
from captum_abslrp.engine.tape import Totals


class Arrived(NamedTuple):
    """Relevance per magnitude of a tensor, for each seed, and the sum of its relevance."""

    seeds: list[Tensor]
    totals: Totals

    def divided(self, parts: Sequence[Tensor]) -> Arrived:
        """Return the relevance of all seeds, followed by that of each part."""
        of_parts = [s * part for part in parts for s in self.seeds]
        return Arrived([*self.seeds, *of_parts], self.totals)

    def first(self, count: int) -> Arrived:
        """Return the relevance of the first seeds."""
        return Arrived(self.seeds[:count], None if self.totals is None else self.totals[:count])


CONSERVING = frozenset(
    f"{name}Backward{overload}"
    for name in "Alias Clone Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T ToCopy "
    "Transpose Unbind UnsafeSplit UnsafeView Unsqueeze View".split()
    for overload in range(4)
)
"""Nodes of autograd that move each element to a distinct position and drop none."""


def move_back(
    node: Any, arrived: Mapping[int, Arrived], count: int
) -> tuple[list[Any], list[Totals]]:
    """Propagate relevance through a node of autograd, for the first `count` seeds."""
    outputs = len(node._input_metadata)  # some of them may be unused
    count = min(count, max(len(of.seeds) for of in arrived.values()))

    def of_output(number: int, seed: int) -> Tensor | None:
        if number not in arrived:
            return None
        seeds = arrived[number].seeds
        return seeds[seed] if seed < len(seeds) else torch.zeros_like(seeds[0])  # without parts

    of_seeds = [_apply(node, [of_output(n, i) for n in range(outputs)]) for i in range(count)]
    results = list(zip(*of_seeds, strict=True))
    if is_hook(node):  # outputs and inputs correspond by index
        return results, [arrived[n].totals if n in arrived else None for n in range(outputs)]
    known = [totals for _, totals in arrived.values() if totals is not None]
    if len(known) < len(arrived) or type(node).__name__ not in CONSERVING:
        return results, [None] * len(results)
    # The outputs have no element in common, so magnitudes add up.
    return results, [[torch.stack(parts).sum(0) for parts in zip(*known, strict=True)]]


def conserves(node: Any) -> bool:
    """Whether a node conserves relevance and passes on its sum."""
    if is_recorded(node):
        return bool(node.step.conserves)
    return is_hook(node) or type(node).__name__ in CONSERVING


def _apply(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Run the backward function of a node of autograd."""
    if is_hook(node):  # hooks of the user expect gradients, not relevance
        return gradients
    result = node(*gradients)
    return result if isinstance(result, tuple) else (result,)


def add(pending: dict[int, Arrived], number: int, more: Arrived, *, positive: bool = False) -> None:
    """Add relevance to pending relevance; sums of magnitudes add up if all of it is nonnegative."""
    if number not in pending:
        pending[number] = more
        return
    seeds, totals = pending[number]
    together = [
        a.add_(b) if a.is_contiguous() else a + b for a, b in zip(seeds, more.seeds, strict=False)
    ]
    together += seeds[len(together) :] + more.seeds[len(together) :]  # parts that only one has
    whole: Totals = None
    if positive and totals is not None and more.totals is not None:
        whole = [a + b for a, b in zip(totals, more.totals, strict=True)]
    pending[number] = Arrived(together, whole)
