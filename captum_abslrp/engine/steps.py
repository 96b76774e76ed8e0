"""The steps of the backward pass, one for each recorded call."""

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
    """For each input, whether negative entries can be ignored or do not exist."""
    inputs: Sequence[SavedTensor]
    """The inputs, if their relevance is scaled."""
    output: SavedTensor | None
    """The output, if all inputs together are scaled to its relevance (``"joint"``)."""
    layouts: Sequence[tuple[torch.Size, torch.dtype]]
    """Shape and dtype of each input."""
    batch_size: int
    total: float
    vanishing: SavedTensor | None
    """The output, if it may be tiny; see :class:`~captum_abslrp.engine.tape.Record`."""
    all_seeds: bool = False
    """Whether the rule takes all seeds at once."""
    spares_zeros: bool = False
    """Whether zero entries of the inputs get no relevance."""
    without_zeros: Propagate | None = None
    """The rule for the case that zero entries of the output have no relevance."""
    conserves: bool = False
    """Whether the step conserves the sum of magnitudes without being scaled."""
    adds_total: bool = False
    """Whether the rule also returns the sum over all inputs."""
    stabilized: bool = False
    """Whether incoming relevance was divided by ``|z| + EPS`` instead of ``|z|``."""
    is_first: bool = False
    """Whether it is the first step before the tail of the score, or before the score itself."""
    positive: bool = False
    """Whether incoming relevance is known to be nonnegative."""
    cancels: list[Tensor] | None = None
    """For each seed, which samples have had relevance of both signs so far, (B,), by its values; None if
    the signs are only known from the rules."""
    references: int | None = None
    """The number of seeds, from the first one, that determine the scale. The others are parts of them, in
    the same order, and are scaled by the same factors. None for all seeds."""
    shared: bool = True
    """Whether incoming relevance may be used elsewhere, so that it must not be overwritten."""
    unscaled: frozenset[int] = frozenset()
    """Sources whose scale does not matter, because the next step is scaled."""
    arrives_unscaled: bool = False
    """Whether incoming relevance has an arbitrary scale."""
    scale_now: bool = False
    """Whether all inputs must be scaled in any case."""
    observed: ObservedCall | None = None
    """The observer of the relevance of the step, or None."""
    tail: Tail | None = None
    """The rule of the call on the tail of the score."""
    on_tail: bool = False
    """Whether the step is on the tail."""
    rectified: SavedTensor | None = None
    """The output, if a ReLU has modified it in place; relevance of a score of zero ends there."""
    changes: list[Tensor] = field(default_factory=list)
    """The changes of the relevance of each seed due to negative slopes."""
    logits: SavedTensor | None = None
    """The input, if the output consists of its probabilities."""
    is_layer: bool = False
    """Whether the call is a layer with weights."""

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
        """Create the step for a record and the output of its call."""

        def saved_output() -> SavedTensor:
            # The step must not hold the output itself, because it is part of the history of the output.
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
        """Whether the relevance of the inputs is scaled."""
        return bool(self.inputs)

    @property
    def joint(self) -> bool:
        """Whether all inputs together are scaled to the incoming relevance."""
        return self.output is not None

    def _note_signs(self, of_seeds: Sequence[Sequence[Tensor]]) -> None:
        """Update which samples have negative relevance, if this is tracked by values."""
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
        """Use the rule for outputs whose zero entries have no relevance."""
        if self.without_zeros is not None:
            self.propagate, self.spares_zeros = self.without_zeros, True

    def __call__(
        self, seeds: Sequence[Tensor], arrived: Totals = None
    ) -> tuple[list[list[Tensor]], list[Totals]]:
        """Propagate relevance per magnitude from the output to each source, for each seed.

        Args:
            seeds: relevance per magnitude of the output, for each seed.
            arrived: the sums of its relevance, if known.

        Returns:
            For each source, its relevance per magnitude, and the sums of its relevance, if known.
        """
        rule, self.propagate = self.propagate, None  # free its saved tensors right after use
        self.without_zeros = None
        if rule is None:
            raise RuntimeError(
                "Expected one backward pass, but got a second one. Run the forward pass again."
            )
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
        """Propagate relevance through a call on the tail of the score, without scaling."""
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
        """The sum of the incoming relevance of each sample."""
        assert self.output is not None
        magnitudes = self.output().abs()
        if self.stabilized:
            magnitudes += numerics.EPS
        else:  # consistent with the relevance of zero entries
            magnitudes.masked_fill_(magnitudes == 0, numerics.LEAST)
        return numerics.sums(magnitudes, s, self.batch_size)

    def _scale(
        self,
        of_seeds: Sequence[Sequence[Tensor]],
        totals: Sequence[Tensor | float],
        wholes: Sequence[Tensor | None],
    ) -> list[Totals]:
        """Scale each source to the total, or all of them together to the incoming relevance, in place.

        Returns:
            The sums of the relevance of each source, if all of them are scaled together.
        """
        joint = self.joint
        unscaled = self.unscaled
        if self.adds_total:  # the sum of each source is unknown, and is computed later
            unscaled = frozenset()
        chosen = [i for i in range(len(self.inputs)) if i not in unscaled]
        if joint and len(self.inputs) > 1:  # the sum of each source is needed
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
    """Copy a source to the memory layout of its relevance if they differ, for fast products."""
    return x if x.stride() == share.stride() else torch.empty_like(share, dtype=x.dtype).copy_(x)


def _apart(shares: Sequence[Tensor]) -> list[Tensor]:
    """Clone tensors that share memory, so that all can be overwritten."""
    seen: set[int] = set()
    result = []
    for share in shares:
        if storage_of(share) in seen or not _is_dense(share):
            share = share.clone()
        seen.add(storage_of(share))
        result.append(share)
    return result


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor fill its memory without gaps or overlap, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
