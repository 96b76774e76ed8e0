"""The step of the backward pass that a record of a call becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.observers import ObservedCall
from captum_abslrp.engine.saved import SavedTensor, SavedTensors, in_full_precision, storage_of
from captum_abslrp.engine.tape import Propagate, Record, Tail, Totals


@dataclass
class Step:
    """The step of the backward pass through one recorded call."""

    propagate: Propagate | None
    keeps_sign: bool
    nonnegative: Sequence[bool]
    """Whether each input is known to have no negative entry that takes part."""
    inputs: Sequence[SavedTensor]
    """The inputs, where their relevance is scaled."""
    output: SavedTensor | None
    """The output, where all inputs together are scaled to what arrived at it (``"joint"``)."""
    layouts: Sequence[tuple[torch.Size, torch.dtype]]
    """Shape and dtype of each input."""
    batch_size: int
    total: float
    vanishing: SavedTensor | None
    """The output, where it may be next to nothing."""
    all_seeds: bool = False
    """Whether the rule takes all seeds at once."""
    spares_zeros: bool = False
    """Whether zeros among the inputs get no relevance."""
    without_zeros: Propagate | None = None
    """The rule where no relevance arrives at zeros."""
    conserves: bool = False
    """Whether it passes on the magnitude of all that arrives, without being scaled."""
    adds_total: bool = False
    """Whether the rule says what all inputs together stand for."""
    stabilized: bool = False
    """Whether what arrives was divided by ``|z| + EPS`` rather than by ``|z|``."""
    is_first: bool = False
    """Whether it is the first step behind the tail of the score, or behind the score itself."""
    positive: bool = False
    """Whether what arrives is known to be nowhere negative."""
    cancels: list[Tensor] | None = None
    """For each seed, which samples have had relevance of both signs on the way, (B,), where it was looked
    at; None where only what the rules say is known."""
    references: int | None = None
    """How many seeds, from the first one, the scale is chosen by; the others are parts of them, in the same
    order, and are scaled as they are. None for all."""
    shared: bool = True
    """Whether something else may look at what arrives, so that it cannot be overwritten."""
    unscaled: frozenset[int] = frozenset()
    """Sources whose scale does not matter, because what comes next is scaled itself."""
    arrives_unscaled: bool = False
    """Whether the scale of what arrives is none in particular, so that its size tells nothing."""
    scale_now: bool = False
    """Whether all inputs are to be scaled nevertheless."""
    observed: ObservedCall | None = None
    """Who looks at what goes through, if anybody does."""
    tail: Tail | None = None
    """What the call does on the tail of the score."""
    on_tail: bool = False
    """Whether it is on the tail."""
    rectified: SavedTensor | None = None
    """The output, if a ReLU has changed it in place: relevance of a score of zero ends there."""
    changes: list[Tensor] = field(default_factory=list)
    """By how much the relevance of each seed changed there, because of signs."""
    logits: SavedTensor | None = None
    """The input, where the output holds probabilities of it."""
    is_layer: bool = False
    """Whether it is a layer with weights."""

    @classmethod
    def of(
        cls,
        record: Record,
        output: Tensor,
        saved: SavedTensors,
        *,
        batch_size: int,
        total: float,
        joint: bool,
        may_be_on_tail: bool,
    ) -> Step:
        """The step of what a rule has recorded for a call with an output."""

        def saved_output() -> SavedTensor:
            # The step must not hold the output itself, whose history it becomes.
            return saved.save(output) if record.saved_output is None else record.saved_output

        inputs: Sequence[SavedTensor] = ()
        if record.scaled and record.saved_inputs is not None:
            inputs = record.saved_inputs
        elif record.scaled:
            inputs = [saved.save(x) for x in record.inputs]
        return cls(
            record.propagate,
            record.keeps_sign,
            [saved.is_nonnegative(x) for x in record.inputs],
            inputs,
            saved_output() if record.scaled and joint else None,
            [(x.shape, x.dtype) for x in record.inputs],
            batch_size,
            total,
            saved_output() if record.vanishing else None,
            record.all_seeds,
            spares_zeros=record.spares_zeros,
            without_zeros=record.without_zeros,
            conserves=record.conserves,
            adds_total=record.adds_total,
            scale_now=record.scale_now,
            tail=record.tail if may_be_on_tail else None,
            logits=record.logits,
            is_layer=record.layer is not None,
        )

    @property
    def scaled(self) -> bool:
        """Whether what the inputs get is scaled."""
        return bool(self.inputs)

    @property
    def joint(self) -> bool:
        """Whether all inputs together are scaled to what arrived."""
        return self.output is not None

    def _note_signs(self, of_seeds: Sequence[Sequence[Tensor]]) -> None:
        """Note which samples have negative relevance in what the sources get, where it is looked at."""
        if self.cancels is None:
            return
        found = [
            [numerics.negative_rows(share, self.batch_size) for share in shares]
            for shares in of_seeds
        ]
        self.cancels = [
            torch.stack([before, *rows]).any(0)
            for before, rows in zip(self.cancels, found[: self.references], strict=True)
        ]

    def expect_no_zeros(self) -> None:
        """Note that no relevance arrives at entries of zero: all of it comes from steps that spare them."""
        if self.without_zeros is not None:
            self.propagate, self.spares_zeros = self.without_zeros, True

    def __call__(
        self, seeds: Sequence[Tensor], arrived: Totals = None
    ) -> tuple[list[list[Tensor]], list[Totals]]:
        """Relevance per magnitude of each source, for each seed, from that of the output.

        Args:
            seeds: relevance per magnitude of the output, for each seed.
            arrived: what it adds up to, where that is known.

        Returns:
            For each source, its relevance per magnitude, and what its relevance adds up to, where known.
        """
        rule, self.propagate = self.propagate, None  # what it holds is freed as soon as it was used
        self.without_zeros = None
        if rule is None:
            raise RuntimeError("Expected each call to be run back once, but got a second time.")
        if self.rectified is not None and (self.on_tail or self.is_first):
            output = self.rectified()
            seeds = [numerics.rectify(in_full_precision(s), output) for s in seeds]
        self.rectified = None
        if self.on_tail:
            return self._run_tail(seeds), [None] * len(self.layouts)
        self.tail = None
        own = not self.shared
        seeds = [in_full_precision(s if own and _is_dense(s) else s.clone()) for s in seeds]
        joint = self.joint
        if joint:
            known = seeds[: self.references]
            totals: Sequence[Tensor | float] = arrived or [self._total(s) for s in known]
        else:
            totals = [self.total] * len(seeds[: self.references])
        if self.observed is not None:
            self.observed.arrives(seeds, stabilized=self.stabilized)
        if self.vanishing is not None:
            numerics.stabilize(seeds, self.vanishing())
            self.vanishing = None
        found = rule(seeds) if self.all_seeds else map(rule, seeds)  # type: ignore[arg-type]  # of one seed
        of_seeds, wholes = [], []
        for shares in found:
            *of_inputs, whole = [*shares] if self.adds_total else [*shares, None]
            pairs = zip(of_inputs, self.layouts, strict=True)
            of_seeds.append(_apart([share.sum_to_size(shape) for share, (shape, _) in pairs]))
            wholes.append(whole)
        del found, shares, of_inputs, pairs
        del rule, seeds
        self._note_signs(of_seeds)
        if self.scaled:
            passed = self._scale(of_seeds, totals, wholes)
        else:
            passed = [arrived if self.conserves else None] * len(self.layouts)
        if self.observed is not None:
            self.observed.passes(of_seeds)
        results = [
            [shares[i].to(dtype) for shares in of_seeds]
            for i, (_, dtype) in enumerate(self.layouts)
        ]
        return results, passed

    def _run_tail(self, seeds: Sequence[Tensor]) -> list[list[Tensor]]:
        """What a call on the tail of the score passes to its inputs: nothing is scaled."""
        assert self.tail is not None
        tail, self.tail = self.tail, None
        self.inputs, self.output, self.vanishing = (), None, None
        full = [in_full_precision(s) for s in seeds]
        if self.observed is not None:
            self.observed.arrives(full, stabilized=True)
        of_seeds = [
            [
                share.sum_to_size(shape)
                for share, (shape, _) in zip(tail.propagate(s), self.layouts, strict=True)
            ]
            for s in full
        ]
        self._note_signs(of_seeds)
        if not tail.keeps_sign:
            self.changes = [
                tail.change(s, shares, self.batch_size)
                for s, shares in zip(full, of_seeds, strict=True)
            ]
        if self.observed is not None:
            self.observed.passes(of_seeds, stabilized=True)
        return [[shares[i] for shares in of_seeds] for i in range(len(self.layouts))]

    def _total(self, s: Tensor) -> Tensor:
        """What the relevance that arrives adds up to."""
        assert self.output is not None
        magnitudes = self.output().abs()
        if self.stabilized:
            magnitudes += numerics.EPS
        else:  # as in what is passed to an output of zero
            magnitudes.masked_fill_(magnitudes == 0, numerics.LEAST)
        return numerics.sums(magnitudes, s, self.batch_size)

    def _scale(
        self,
        of_seeds: Sequence[Sequence[Tensor]],
        totals: Sequence[Tensor | float],
        wholes: Sequence[Tensor | None],
    ) -> list[Totals]:
        """Scale each source to the total, or all of them to what arrived; in place.

        Returns:
            What each source gets then, where all of them together are scaled.
        """
        joint = self.joint
        unscaled = self.unscaled
        if self.adds_total:  # the part of each is not known, and is summed later
            unscaled = frozenset()
        chosen = [i for i in range(len(self.inputs)) if i not in unscaled]
        if joint and len(self.inputs) > 1:  # the parts of each are to be known
            chosen = [*range(len(self.inputs))]
        known_totals: Any = totals if joint else None
        passed: list[Totals] = [known_totals] * len(self.inputs)
        if chosen:
            inputs = [_laid_out_as(of_seeds[0][i], self.inputs[i]()) for i in chosen]
            known = self.positive and self.keeps_sign
            count = self.references or len(of_seeds)
            leading = of_seeds[:count]
            signed: Sequence[Any] = self.cancels or [not known] * len(leading)
            found = [
                numerics.scale(
                    inputs,
                    [shares[i] for i in chosen],
                    self.batch_size,
                    totals=total,
                    joint=joint,
                    whole=whole,
                    signed=of_seed,
                    unscaled=self.arrives_unscaled,
                    positive=[known and self.nonnegative[i] for i in chosen],
                    kept=[n for n, i in enumerate(chosen) if i in unscaled],
                    followers=[
                        [part[i] for i in chosen] for part in of_seeds[count + number :: count]
                    ],
                )
                for number, (shares, total, whole, of_seed) in enumerate(
                    zip(leading, totals, wholes[:count], signed, strict=True)
                )
            ]
            for n, i in enumerate(chosen if joint else ()):
                passed[i] = None if self.adds_total else [of_inputs[n] for of_inputs in found]
        self.inputs, self.output = (), None
        return passed


def _laid_out_as(share: Tensor, x: Tensor) -> Tensor:
    """A source as what it gets lies in memory, so that products of the two are fast."""
    return x if x.stride() == share.stride() else torch.empty_like(share, dtype=x.dtype).copy_(x)


def _apart(shares: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, none of which has memory in common with another, so that all may be overwritten."""
    seen: set[int] = set()
    result = []
    for share in shares:
        if storage_of(share) in seen or not _is_dense(share):
            share = share.clone()
        seen.add(storage_of(share))
        result.append(share)
    return result


def _is_dense(tensor: Tensor) -> bool:
    """Whether each place of a tensor's memory holds one element, whatever their order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
