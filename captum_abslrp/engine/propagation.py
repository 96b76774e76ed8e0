"""The backward pass: relevance of tensors that an output depends on, for several seeds at once.

The autograd history of the output is a graph of steps (recorded calls) and of nodes of autograd (calls that
move elements). It runs here instead of in autograd, node by node for all seeds. Terms that do not depend on
the seed are then computed once, and the saved tensors of a step are freed after the step.

The scale of a sample's relevance matters only where relevance from several calls is added. In between,
relevance is not scaled, because the required sums over whole tensors are expensive compared to the single
transposed product of most rules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.arrivals import Arrived, add, conserves, move_back
from captum_abslrp.engine.complex import as_parts
from captum_abslrp.engine.nodes import is_recorded
from captum_abslrp.engine.numerics import EPS, LEAST
from captum_abslrp.engine.saved import in_full_precision
from captum_abslrp.engine.steps import Step

TOTAL = 256.0
"""Total relevance of a sample during propagation. A power of two does not affect the digits of the result.
This value keeps the relevance of single elements and of sums over branches within the range of float16."""


UNSCALED_STEPS = 8
"""Maximum number of consecutive steps without scaling, so that values stay in the range of float32."""


def propagate(
    output: Tensor,
    explained: Sequence[Tensor],
    seeds: Tensor,
    *,
    positive: bool = False,
    counts: Sequence[int] | None = None,
    changes: list[Tensor] | None = None,
    chains: bool = True,
    through: Through | None = None,
) -> list[Tensor]:
    """Propagate relevance from an output to the tensors that it depends on.

    Axes: S seeds.

    Args:
        output: the output under an :class:`~captum_abslrp.engine.recording.Recording` with ``total=TOTAL``;
            its autograd history is consumed.
        explained: the tensors; their relevance is zero if the output does not depend on them.
        seeds: relevance of the output, (S, ``*output.shape``).
        positive: whether the seeds are known to be nonnegative.
        counts: for each tensor, the number of seeds, from the first one, whose relevance is needed; None for
            all seeds. Seeds are not propagated where they are not needed.
        changes: a list to which tensors (S, B) are added: the changes of the relevance of each sample on the
            tail of the score due to negative slopes.
        chains: whether consecutive steps may leave relevance unscaled. Tiny relevance of both signs then
            becomes NaN, because it may be a rounding error. Without chains, each step is scaled, and the
            signs of relevance are read from the values.
        through: a tensor, and parts of its relevance to propagate separately.

    Returns:
        Relevance of each tensor, (S, ``*tensor.shape``), in its dtype. For a complex tensor, it is the sum
        over both parts, in the dtype of the parts. If fewer seeds are needed, S is their number. With P
        parts, the relevance through each part follows the relevance of all seeds:
        (S + P S, ``*tensor.shape``).
    """
    if output.grad_fn is None:
        raise ValueError(
            "Expected `output` to depend on the inputs, but got a tensor without autograd history."
        )
    last = output.grad_fn
    all_seeds = len(seeds) if through is None else len(seeds) * (1 + len(through.parts))
    counts = [all_seeds] * len(explained) if counts is None else counts
    explained_at: dict[Place, int] = {}
    for tensor, count in zip(explained, counts, strict=True):
        explained_at[_place(tensor)] = max(count, explained_at.get(_place(tensor), 0))
    order, arriving = _in_order(last)
    first, tail = _mark_tail(order, arriving)
    parts_at = {} if through is None else {_place(through.tensor): through.parts}
    if through is not None:
        for node in order:
            if is_recorded(node):
                node.step.references = len(seeds)
    _prepare(order, arriving, {**explained_at, **parts_at}, UNSCALED_STEPS if chains else 0)
    values = in_full_precision(output.detach()).abs()
    if first:  # the first rules divide by `|z| + EPS`, as in the definition
        values += EPS
    else:  # relevance is only passed on, without a division
        values = values.clamp_(min=LEAST)
    start = in_full_precision(seeds) * TOTAL / values
    start = start.clamp(max=torch.finfo(output.dtype).max).to(output.dtype)
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        start_at = last, output.output_nr
        found = _run_back(
            order, start_at, list(start), explained_at, parts_at, positive, exact=not chains
        )
    if changes is not None:
        steps = [node.step for node in order if is_recorded(node)]
        for step in steps:
            if step.changes:  # for fewer seeds if the others are not needed
                of_seeds = torch.stack(step.changes[: len(seeds)]) / TOTAL
                left = of_seeds.new_zeros(len(seeds) - len(of_seeds), of_seeds.shape[1])
                changes.append(torch.cat([of_seeds, left]))
    results = []
    for tensor, count in zip(explained, counts, strict=True):
        place = _place(tensor)
        if place not in found:
            results.append(tensor.new_zeros((count, *tensor.shape), dtype=tensor.dtype.to_real()))
            continue
        values = in_full_precision(as_parts(tensor.detach()))
        if first and place[0] in tail:  # undo the division by `|z| + EPS`
            values = values.abs() + EPS
        else:  # a rule may give relevance to a zero
            values = values.abs().clamp(min=LEAST)
        shares = [
            numerics.relevance(values, in_full_precision(as_parts(s))) for s in found[place][:count]
        ]
        # Relevance that does not flow through the tensor has no parts.
        shares += [torch.zeros_like(shares[0])] * (count - len(shares))
        relevance = torch.stack(shares) / TOTAL
        if tensor.is_complex():
            relevance = relevance.sum(-1)
        results.append(relevance.to(tensor.dtype.to_real()))
    return results


class Through(NamedTuple):
    """Parts of the relevance of a tensor inside a model."""

    tensor: Tensor
    parts: Sequence[Tensor]
    """For each part, weights that broadcast with the tensor; 1 for elements of the part."""


def saved_bytes(output: Tensor) -> int:
    """Return the total size in bytes of the tensors saved for the backward pass from an output."""
    order, _ = _in_order(output.grad_fn)
    sizes: dict[int, int] = {}
    for node in order:
        for kept in node.step.inputs if is_recorded(node) else ():
            storage = kept.storage()
            if storage is not None:
                sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


Place = tuple[Any, int]
"""The position of a tensor in the autograd graph: its node (or the node that accumulates into a leaf), and
the index of the output."""


def _place(tensor: Tensor) -> Place:
    if tensor.grad_fn is None:
        node = torch.autograd.graph.get_gradient_edge(tensor).node
        if type(node).__name__ != "AccumulateGrad":
            raise TypeError(
                f"Expected a plain tensor to explain, but got a leaf of type {type(tensor).__name__}, which "
                f"has no node in the autograd graph. Pass `x.as_subclass(torch.Tensor)`."
            )
        return node, 0
    return tensor.grad_fn, tensor.output_nr


def _run_back(
    order: Sequence[Any],
    start: Place,
    seeds: list[Tensor],
    explained_at: Mapping[Place, int],
    parts_at: Mapping[Place, Sequence[Tensor]],
    positive: bool,
    *,
    exact: bool,
) -> dict[Place, list[Tensor]]:
    """Compute relevance per magnitude, for each seed, at the explained places."""
    needed: dict[Any, int] = {}  # the number of seeds that are needed at each node
    for count in sorted(set(explained_at.values())):
        wanting = {node for (node, _), wanted in explained_at.items() if wanted >= count}
        needed |= dict.fromkeys(_leading_to(order, wanting), count)
    pending: dict[Any, dict[int, Arrived]] = {start[0]: {start[1]: Arrived(seeds, None)}}
    found: dict[Place, list[Tensor]] = {}
    signed: set[Any] = set() if positive else {start[0]}
    cancels: dict[Any, list[Tensor]] | None = None
    if exact:
        cancels = {start[0]: [numerics.negative_rows(s, len(s)) for s in seeds]}
    to_zeros = {start[0]}  # nodes whose zero entries may have relevance
    for node in order:
        arrived = pending.pop(node, None)
        if arrived is None:
            continue
        following = [
            (i, place) for i, place in enumerate(node.next_functions) if place[0] in needed
        ]
        for number, (of_seeds, _) in arrived.items():
            if (node, number) in explained_at:
                found[node, number] = [s.clone() for s in of_seeds] if following else of_seeds
        for number in arrived:
            if (node, number) in parts_at:
                of_parts = parts_at[node, number]
                arrived[number] = arrived[number].divided(of_parts)
        if not following:
            continue
        count = max(needed[target] for _, (target, _) in following)
        arrived = {number: of.first(count) for number, of in arrived.items()}
        hands_on_signed = node in signed
        mixed = None if cancels is None else cancels.pop(node)[:count]
        if is_recorded(node):
            step: Step = node.step
            step.positive = not hands_on_signed
            step.cancels = mixed
            if node not in to_zeros:
                step.expect_no_zeros()
            keeps_sign = step.tail is not None and step.tail.keeps_sign
            hands_on_signed |= not (keeps_sign if step.on_tail else step.keeps_sign)
            spares_zeros = step.spares_zeros and not step.on_tail
            results, totals = step(*arrived.pop(0))
        else:
            spares_zeros = node not in to_zeros
            results, totals = move_back(node, arrived, count)
        if mixed is not None and is_recorded(node):
            mixed = step.cancels
        del arrived
        for i, (target, number) in following:
            if results[i][0] is not None:
                if hands_on_signed:
                    signed.add(target)
                if not spares_zeros:
                    to_zeros.add(target)
                if cancels is not None and mixed is not None:
                    known = cancels.get(target, mixed)  # possibly for fewer seeds
                    cancels[target] = [a | b for a, b in zip(known, mixed, strict=False)]
                # Nodes of autograd expect the engine to sum over broadcast dimensions, and to take the real
                # part if `where` converted a real tensor to complex.
                expected = target._input_metadata[number]
                shares = [
                    s if list(s.shape) == expected.shape else s.sum_to_size(expected.shape)
                    for s in results[i]
                ]
                if shares[0].is_complex() and not expected.dtype.is_complex:
                    shares = [s.real for s in shares]
                more = Arrived(shares, totals[i]).first(needed[target])
                add(pending.setdefault(target, {}), number, more, positive=target not in signed)
        del results
    return found


def _leading_to(order: Sequence[Any], targets: Collection[Any]) -> set[Any]:
    """The nodes from which a target can be reached."""
    needed = set(targets)
    for node in reversed(order):
        if any(following in needed for following, _ in node.next_functions):
            needed.add(node)
    return needed


def _mark_tail(order: Sequence[Any], arriving: dict[Any, int]) -> tuple[bool, set[Any]]:
    """Mark the steps on the tail of the score, and the first steps before the tail.

    A step is on the tail if it has a tail rule and all calls that use its output are on the tail.

    Returns:
        Whether any step expects relevance divided by ``|z| + EPS``, and the nodes that receive it.
    """
    from_tail = dict.fromkeys(order, 0)
    divides, nodes = False, set()
    for node in order:
        if from_tail[node] < arriving[node]:
            continue
        nodes.add(node)
        if is_recorded(node):
            step: Step = node.step
            step.on_tail = step.tail is not None
            divides |= step.on_tail or step.scaled
            if not step.on_tail:
                step.is_first, step.stabilized, step.vanishing = True, step.scaled, None
                continue
        for following, _ in node.next_functions:
            if following is not None:
                from_tail[following] += 1
    return divides, nodes


def logits(output: Tensor) -> Tensor:
    """Return the logits of an output that consists of probabilities, or the output itself.

    Args:
        output: an output under an :class:`~captum_abslrp.engine.recording.Recording`.
    """
    node = output.grad_fn
    while node is not None and not is_recorded(node):
        after = [following for following, _ in node.next_functions if following is not None]
        node = after[0] if len(after) == 1 else None
    kept = None if node is None else node.step.logits  # type: ignore[attr-defined]  # a step's node
    if kept is None or node.step.layouts[0][0] != output.shape:  # type: ignore[union-attr]
        return output.detach()
    return kept.as_given().detach()


def _prepare(
    order: Sequence[Any],
    arriving: dict[Any, int],
    explained_at: Collection[Place],
    longest: int,
) -> None:
    """Set which inputs of each step need no scaling, and that steps may overwrite their incoming relevance.

    Steps return new tensors, and calls that move elements pass relevance to a single place, so incoming
    relevance is never shared. At most `longest` consecutive steps are unscaled.
    """
    stops = {node for node, _ in explained_at}
    depth: dict[Any, int] = {}

    def next_step(node: Any, *, joint: bool) -> Any:
        """The scaled step that receives exactly the relevance of this node, or None."""
        while node is not None and node not in stops and arriving[node] == 1:
            if is_recorded(node) and node.step.scaled:
                return node
            if joint and not conserves(node):
                return None
            after = [following for following, _ in node.next_functions if following is not None]
            if len(after) != 1:
                return None
            (node,) = after
        return None

    for node in order:
        if not is_recorded(node):
            continue
        step: Step = node.step
        step.shared = False
        if step.on_tail:
            continue
        traced = step.observed is not None and step.observed.output is not None
        if not step.scaled or step.scale_now or traced:
            continue
        unscaled = set()
        for i, ((following, _), (_, dtype)) in enumerate(
            zip(node.next_functions, step.layouts, strict=True)
        ):
            target = next_step(following, joint=step.joint)
            if target is None or dtype not in (torch.float32, torch.float64):
                continue
            if depth.get(node, 0) + 1 < longest:
                depth[target] = depth.get(node, 0) + 1
                target.step.arrives_unscaled = True
                unscaled.add(i)
        step.unscaled = frozenset(unscaled)


def _in_order(last: Any) -> tuple[list[Any], dict[Any, int]]:
    """The nodes of an autograd graph in topological order, and the number of edges that arrive at each."""
    arriving: dict[Any, int] = {last: 0}
    stack = [last]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if node not in arriving:
                stack.append(node)
            arriving[node] = arriving.get(node, 0) + 1
    left = dict(arriving)
    order = [last]
    for node in order:
        for following, _ in node.next_functions:
            if following is not None:
                left[following] -= 1
                if left[following] == 0:
                    order.append(following)
    return order, arriving
