"""The base class of rules that split the contributions of a layer into groups.

Within a group, relevance is distributed in proportion to the contributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.names import LAYERS
from captum_abslrp.engine.numerics import EPS
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.affine import Affine, affine_of
from captum_abslrp.rules.base import Form, Rule, once
from captum_abslrp.rules.signed import Layer, stabilized


class Term(NamedTuple):
    """Contributions ``factor * x * w`` to a group."""

    x: Tensor | None
    """The input; None if the term is known to be zero."""
    weight: Tensor
    bias: Tensor | None = None
    factor: float = 1.0


class Group(NamedTuple):
    """Contributions that relevance is distributed among."""

    terms: list[Term]
    factor: float = 1.0
    """The share of relevance for this group."""
    sign: int = 0
    """The sign of the outputs that the group applies to; 0 for all outputs."""


Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A layer as a function of input, weight and bias."""


def total(group: Group, output: Tensor, run: Run) -> Tensor:
    """Compute the sum of the contributions of a group, a new tensor with the shape of the output."""
    whole: Tensor | None = None
    for term in group.terms:
        if term.x is None:
            continue
        found = run(term.x, term.weight, term.bias)
        if whole is None:
            whole = found if term.factor == 1 else found.mul_(term.factor)
        else:
            whole.add_(found, alpha=term.factor)
    return torch.zeros_like(output) if whole is None else whole


@dataclass
class LayerParts:
    """Input, weight and bias of a layer."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    is_nonnegative: bool
    """Whether negative entries of the input, if any, are known to be excluded."""
    is_whole: bool = True
    """Whether no entries are excluded, so that ``z`` is the sum of all contributions."""

    @cached_property
    def plus(self) -> Tensor:
        """The positive part of the input."""
        return self.x if self.is_nonnegative and self.is_whole else self.x.clamp(min=0)

    @cached_property
    def minus(self) -> Tensor | None:
        """The negative part of the input, or None if it is known to be zero."""
        return None if self.is_nonnegative else self.x.clamp(max=0)

    def positive(self, w: Tensor, v: Tensor, b: Tensor | None = None) -> list[Term]:
        """Return the terms ``x^+ w + b`` and ``x^- v``."""
        return [Term(self.plus, w, b), Term(self.minus, v)]


class LayerRule(Rule):
    """Base class of rules for linear layers and convolutions.

    A subclass defines :meth:`groups`.

    Args:
        stabilizer: added to the sum of a group, with the sign of the sum.

    Example:
        >>> class PlainRule(LayerRule):  # the epsilon rule
        ...     def groups(self, parts):
        ...         return [Group([Term(parts.x, parts.weight, parts.bias)])]
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = PlainRule()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    spares_zeros: ClassVar[bool] = False
    """Whether all terms use the positive or the negative part of the input, so that zeros get no relevance.
    A subclass that overrides :meth:`groups` has to set it again."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "groups" in vars(cls) and "spares_zeros" not in vars(cls):
            cls.spares_zeros = False

    def __init__(self, stabilizer: float = EPS) -> None:
        self.stabilizer = stabilizer

    def groups(self, parts: LayerParts) -> list[Group]:
        """Return the groups of contributions of a layer, given its input, weight and bias."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define `groups`, but got a class that does not."
        )

    def factors(
        self, parts: LayerParts, groups: Sequence[Group], output: Tensor, run: Run
    ) -> list[Tensor]:
        """Return the factor of each group for the relevance per magnitude of the output.

        Args:
            parts: input, weight and bias of the layer.
            groups: the result of :meth:`groups`.
            output: the output ``z`` of the layer.
            run: the layer as a function of input, weight and bias.
        """
        found, largest = [], torch.finfo(output.dtype).max
        for group in groups:
            if group.sign:  # zero for outputs of the other sign
                factor = (output if group.sign > 0 else -output).clamp(0, largest)
            else:
                factor = output.abs().clamp_(numerics.LEAST, largest)
            if group.factor != 1:
                factor.mul_(group.factor)
            found.append(factor.div_(stabilized(total(group, output, run), self.stabilizer)))
        return found

    def form_of(self, call: Call) -> Form | None:
        return self._record if call.name in LAYERS else None

    def _record(self, call: Call, *_: Any, **__: Any) -> Record:
        affine = affine_of(call)
        if affine is None:
            raise UnsupportedCallError(
                f"Expected {call} to have a constant dense weight, as {type(self).__name__} requires, but "
                f"got a weight that is sparse or depends on the explained inputs. Use `EpsilonRule()` for "
                f"this call."
            )
        output = call.run(lambda: affine.run(affine.input, affine.weight, affine.bias))
        return self.record_affine(call, affine, output)

    def record_affine(self, call: Call, affine: Affine, output: Tensor) -> Record:
        """Record a layer, given its input, weight and bias."""
        x, w, z = call.save(affine.input), call.save(affine.weight), call.save(output)
        b = None if affine.bias is None else call.save(affine.bias)
        nonnegative = call.is_nonnegative(affine.input)
        whole = not (nonnegative and call.recording.hides_negatives)

        run, transposed = affine.run, affine.transposed

        @once
        def shared() -> tuple[LayerParts, list[tuple[list[Term], Tensor]]]:
            """The terms of each group, and its factor for relevance per magnitude of ``z``."""
            bias, output = None if b is None else b(), z()
            parts = LayerParts(x(), w(), bias, nonnegative, whole)
            groups = self.groups(parts)
            factors = self.factors(parts, groups, output, run)
            return parts, [(group.terms, f) for group, f in zip(groups, factors, strict=True)]

        def propagate(s: Tensor) -> list[Tensor]:
            parts, groups = shared()
            products: dict[int, tuple[Tensor, Tensor]] = {}  # by part of the input
            for terms, factor in groups:
                g = factor * s
                for term in terms:
                    if term.x is None:
                        continue
                    product = transposed(g, term.weight, parts.x)
                    if term.factor != 1:
                        product = product * term.factor
                    if id(term.x) in products:
                        product.add_(products[id(term.x)][1])
                    products[id(term.x)] = term.x, product
            return [_per_magnitude(parts, list(products.values()))]

        return Record(
            output,
            [affine.input],
            propagate,
            scaled=False,
            spares_zeros=self.spares_zeros,
            layer=Layer(affine, self.record_affine),
        )


def _per_magnitude(parts: LayerParts, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Relevance per magnitude of the input of a layer, from its parts and their relevance per value."""
    x, result, others = parts.x, None, []
    for part, product in products:
        if part is parts.plus or part is parts.minus:
            negative = part is not parts.plus
            share = numerics.rectify_in_place(product, x, negative=negative)
            share = share.neg_() if negative else share
            result = share if result is None else result.add_(share)
        else:
            others.append(part * product)
    if others:
        share = numerics.per_magnitude(torch.stack(others).sum(0), x)
        result = share if result is None else result.add_(share)
    return torch.zeros_like(x) if result is None else result
