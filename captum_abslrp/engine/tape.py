"""The tape: what a rule records for a call, and the step of the backward pass that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as _module
from torch.nn.modules._functions import BackwardHookFunction

from captum_abslrp.engine import numerics
from captum_abslrp.engine.observers import ObservedCall
from captum_abslrp.engine.saved import SavedTensor, SavedTensors, in_full_precision, storage_of

Totals = Sequence[Tensor] | None
"""The sum of the magnitudes of relevance of each sample, (B,), for each seed; None where it is not known."""

Propagate = Callable[[Tensor], Sequence[Tensor]]
"""From relevance per magnitude of the output to that of each input. Where it is scaled afterwards, a factor
that all inputs share may be left out. The argument may be overwritten, and what is returned will be."""


class Record(NamedTuple):
    """What a rule makes of a call."""

    output: Tensor
    """The result of the call, without history."""
    inputs: Sequence[Tensor]
    """The inputs of the call that receive relevance."""
    propagate: Propagate
    """Maps relevance per magnitude of the output to that of each input; runs once per seed."""
    scaled: bool = True
    """Whether the relevance of each sample is scaled afterwards, so that the sum of its magnitudes is the
    total, or with ``"joint"`` that of what arrived. A rule of another family, or one that only passes
    relevance, says no."""
    constants: Sequence[Tensor] = ()
    """Arguments that depend on the explained inputs, too, and are constants of this call."""
    nonnegative: bool = False
    """Whether no negative entry of the output takes part in what comes after, because there is none, or the
    rule passes nothing where the output is negative. The rules of later calls may make use of it."""
    vanishing: bool = False
    """Whether the output may be next to nothing where the input is not (softmax, GELU at -6). Its relevance
    is divided by ``|z| + EPS`` there, as in the definition, which leaves nothing of it."""
    keeps_sign: bool = False
    """Whether the rule passes nothing negative where nothing negative arrives."""
    saved_output: SavedTensor | None = None
    """The output, saved by ``Call.save_output`` or otherwise."""
    all_seeds: bool = False
    """Whether `propagate` takes a list of all seeds, and returns a list of what it would for each."""
    scale_now: bool = False
    """Whether relevance must be scaled at once, because the rule takes it out of its range."""
    conserves: bool = False
    """Whether a call with one input, whose relevance is not scaled, passes on the magnitude of all of it."""
    adds_total: bool = False
    """Whether `propagate` returns, behind what each input gets, the sum of magnitudes of each sample that
    all inputs together stand for, (B,), where some of it ends inside of the call."""
    saved_inputs: Sequence[SavedTensor] | None = None
    """The inputs as they were, where the call has changed one of them in place."""
    tail: Tail | None = None
    """What the call does on the tail of the score; None if the tail ends before it."""
    logits: SavedTensor | None = None
    """The input, where the output holds probabilities of it (softmax, sigmoid)."""
    layer: Any = None
    """The call by its parts and its rule, if it is a layer with weights that a later call may fold into."""


class Tail(NamedTuple):
    """A call on the tail of the score: between the last layer with weights and the output.

    The score itself is explained, so all of its relevance arrives at the last layer with weights. The calls
    behind it pass relevance by the share of the magnitudes of their inputs, with the sign of their slope.
    """

    propagate: Propagate
    """From relevance over magnitude of the output, ``R / (|z| + EPS)``, to that of each input."""
    output: SavedTensor
    inputs: Sequence[SavedTensor] | None = None
    """The inputs; None where the call scales its only input by `factor`."""
    factor: Callable[[], Tensor | float] | None = None
    keeps_sign: bool = False
    """Whether nonnegative relevance of the output makes nonnegative relevance of the inputs."""

    def change(self, s: Tensor, shares: Sequence[Tensor], batch_size: int) -> Tensor:
        """By how much the sum of the relevance of each sample changes, because signs do."""
        relevance = numerics.relevance(self.output(), s)
        if self.inputs is None:
            assert self.factor is not None
            factor = torch.as_tensor(self.factor(), dtype=s.dtype, device=s.device)
            change = relevance * (factor.sign() - 1)
            return change.reshape(batch_size, -1).sum(1)
        found = [numerics.relevance(x(), r) for x, r in zip(self.inputs, shares, strict=True)]
        sums = [r.reshape(batch_size, -1).sum(1) for r in (relevance, *found)]
        return torch.stack(sums[1:]).sum(0) - sums[0]


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
    shared: bool = True
    """Whether something else may look at what arrives, so that it cannot be overwritten."""
    unscaled: frozenset[int] = frozenset()
    """Sources whose scale does not matter, because what comes next is scaled itself."""
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
            totals: Sequence[Tensor | float] = arrived or [self._total(s) for s in seeds]
        else:
            totals = [self.total] * len(seeds)
        if self.observed is not None:
            self.observed.arrives(seeds, stabilized=self.stabilized)
        if self.vanishing is not None:
            numerics.stabilize(seeds, self.vanishing())
            self.vanishing = None
        found = rule(seeds) if self.all_seeds else map(rule, seeds)  # type: ignore[arg-type]  # of one seed
        of_seeds, wholes = [], []
        for shares in found:
            if self.adds_total:
                *shares, whole = shares
                wholes.append(whole)
            of_seeds.append(
                _apart(
                    [
                        share.sum_to_size(shape)
                        for share, (shape, _) in zip(shares, self.layouts, strict=True)
                    ]
                )
            )
        del found, shares
        del rule, seeds
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
        wholes: Sequence[Tensor],
    ) -> list[Totals]:
        """Scale each source to the total, or all of them to what arrived; in place.

        Returns:
            What each source gets then, where all of them together are scaled.
        """
        joint = self.joint
        unscaled = self.unscaled
        if wholes:  # the parts of each are not known, and are summed later
            unscaled = frozenset()
        chosen = [i for i in range(len(self.inputs)) if i not in unscaled]
        if joint and len(self.inputs) > 1:  # the parts of each are to be known
            chosen = [*range(len(self.inputs))]
        passed: list[Totals] = [totals if joint else None] * len(self.inputs)  # type: ignore[list-item]
        if chosen:
            inputs = [_laid_out_as(of_seeds[0][i], self.inputs[i]()) for i in chosen]
            known = self.positive and self.keeps_sign
            found = [
                numerics.scale(
                    inputs,
                    [shares[i] for i in chosen],
                    self.batch_size,
                    totals=total,
                    joint=joint,
                    whole=whole,
                    signed=not known,
                    positive=[known and self.nonnegative[i] for i in chosen],
                    kept=[n for n, i in enumerate(chosen) if i in unscaled],
                )
                for shares, total, whole in zip(
                    of_seeds, totals, wholes or [None] * len(totals), strict=True
                )
            ]
            for n, i in enumerate(chosen if joint else ()):
                passed[i] = None if wholes else [of_inputs[n] for of_inputs in found]
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


class Node(torch.autograd.Function):
    """The node of the autograd graph whose backward is a step."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, position: int | None, output: list[Tensor], *inputs: Tensor
    ) -> Tensor:
        """Args: ``position`` of the source that the call has changed in place, if it has."""
        ctx.step = step
        ctx.set_materialize_grads(False)
        if position is not None:
            ctx.mark_dirty(inputs[position])
            return inputs[position]
        # Handed over in a list: autograd takes a tensor that is an argument and is returned for a
        # view of it, which later in-place calls of the model could then not change.
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """One seed, where autograd runs the graph: under Captum's ``LRP``."""
        (s,) = grad_outputs
        if s is None:
            return None, None, None, *[None] * len(ctx.step.layouts)
        with torch.autocast(s.device.type, enabled=False):
            shares = [share for (share,) in ctx.step([s])[0]]
        return None, None, None, *shares


class ModuleInput(torch.autograd.Function):
    """The input of a module under Captum's ``LRP``, which is given relevance by the rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *s: Tensor) -> Tensor:
        return numerics.relevance(*ctx.saved_tensors, *s)


class ModuleOutput(torch.autograd.Function):
    """The output of a module under Captum's ``LRP``, which gives relevance to the rule."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clone()  # which may be changed in place

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> Tensor:
        return numerics.divide(*relevance, *ctx.saved_tensors)


def is_recorded(node: Any) -> bool:
    """Whether a node of the autograd graph is a call that a rule has recorded."""
    return isinstance(node, _OWN_NODES[0])


# The classes of the nodes themselves are an attribute that the metaclass adds.
_OWN_NODES = tuple(f._backward_cls for f in (Node, ModuleInput, ModuleOutput))  # type: ignore[attr-defined]  # private


def is_own(node: Any) -> bool:
    """Whether a node of the autograd graph is one of this module."""
    return isinstance(node, _OWN_NODES)


def is_hook(node: Any) -> bool:
    """Whether a node is the identity that PyTorch puts around a module with backward hooks."""
    return isinstance(node, BackwardHookFunction._backward_cls)  # type: ignore[attr-defined]  # private


def hooks_all_modules() -> bool:
    """Whether backward hooks are registered for all modules of the process."""
    return bool(_module._global_backward_hooks or _module._global_backward_pre_hooks)


def history(last: Any) -> Iterator[Any]:
    """The nodes of the autograd graph that a node comes from, itself included, in no order."""
    seen = set()
    stack = [last]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(before for before, _ in node.next_functions)
