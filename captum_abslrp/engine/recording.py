"""Recording of a forward pass, in which each call is run by its rule.

The model is never modified. Its forward pass runs under a ``TorchFunctionMode``. There are three cases for a
call on a tensor that carries relevance (``F.linear``, ``+``, ``@``, ``softmax``, an in-place ReLU ...).

1. The call has a rule. The rule runs the call and records how to propagate relevance through it. The output
   gets a node of the autograd graph whose backward function is that record.
2. The call only moves elements (reshape, slice, cat, ...). It runs normally, and its gradient in autograd
   moves relevance with its element.
3. For any other call whose result depends on such a tensor, an error that names the call is raised.

Autograd handles the graph: relevance of a tensor that is used twice is added, also through views and slices.
Calls on tensors without relevance (weights, position embeddings, masks) run normally.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_abslrp.engine import refusals
from captum_abslrp.engine.arguments import (
    as_differentiable,
    cast_constants,
    has_in_place_argument,
    instances_in,
    map_instances,
    tensors_in,
    written_tensors,
)
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import (
    CONJUGATES,
    as_complex,
    as_parts,
    call_on_parts,
    has_complex,
    is_complex,
    phase,
)
from captum_abslrp.engine.dependence import Dependence, carries_relevance, is_source, untracked
from captum_abslrp.engine.detached import DetachedParts
from captum_abslrp.engine.in_place import run_in_place
from captum_abslrp.engine.layers import LeftStates, from_its_state, with_magnitudes
from captum_abslrp.engine.modules import Frame, ModuleStack, run_inside_layer
from captum_abslrp.engine.moves import move
from captum_abslrp.engine.names import (
    ARITHMETIC,
    CONSTANT,
    PASS_THROUGH,
    canonical_name,
)
from captum_abslrp.engine.nodes import Node, is_hook, is_own
from captum_abslrp.engine.observers import Observer
from captum_abslrp.engine.protocols import CallRule, Scope
from captum_abslrp.engine.samples import check_aligned, check_apart
from captum_abslrp.engine.saved import SavedTensors
from captum_abslrp.engine.steps import Step
from captum_abslrp.engine.tape import Record, Tail


class Recording(TorchFunctionMode):
    """Context that records the calls of one forward pass by their rules.

    Args:
        scope: finds the rule of a call or a layer.
        inputs: the explained tensors, which require gradients. Only tensors that depend on them carry
            relevance; all others are constants, even if they have autograd history.
        batch_size: number of samples B; the leading dimension of the inputs.
        model: the model, for the paths of its modules.
        joint: scale the relevance of the inputs of one call together.
        total: sum of relevance of each sample after a call, if each input is scaled on its own.
        result: output of the only call of a module, if it is already computed.
        observer: observes every recorded call.

    Attributes:
        fuses: whether a composite call may be recorded as one, if the result is the same.
        joint: as given.
        hides_negatives: whether an output that is marked as nonnegative may have negative entries.
        depends: tracks which nodes of the autograd graph depend on the explained inputs.
        detached: tracks detached values.
        before_change: a function that is called with each tensor before a call overwrites it, or None.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        inputs: Sequence[Tensor],
        batch_size: int,
        model: nn.Module | None = None,
        joint: bool = False,
        total: float = 1.0,
        result: Tensor | None = None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.fuses = True
        self.hides_negatives = False
        self.in_score = False
        self.joint = joint
        self.depends = Dependence(inputs)
        self.detached = DetachedParts()
        self.observer = observer
        self.before_change: Callable[[Tensor], None] | None = None
        self._scope = scope
        self._total = total
        self._result = result
        self._modules = ModuleStack(self, scope, model, batch_size)
        self._saved = SavedTensors()
        self._states = LeftStates()
        self._fresh: Tensor | None = None
        # The interface for rules, see `Recorder`.
        self.save = self._saved.save
        self.release = self._saved.release
        self.hand_memory = self._saved.hand_memory
        self.is_nonnegative = self._saved.is_nonnegative
        self.mark_nonnegative = self._saved.mark_nonnegative
        self.layer_behind = self._saved.layer_behind
        self.hides_layer = self._saved.hides_layer

    def __enter__(self) -> Recording:
        self._modules.start()
        try:
            super().__enter__()
        except BaseException:
            self._modules.stop()
            raise
        self.depends.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._modules.stop()
        for part in (self._saved, self._states, self.detached):
            part.clear()
        self.depends.stop()
        self._fresh = None
        self.before_change = None
        super().__exit__(exc_type, exc_val, exc_tb)

    @property
    def innermost(self) -> Frame:
        """The innermost running module."""
        return self._modules.innermost

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not any(cls not in _PLAIN for cls in types):
            return self._see(func, args, kwargs)
        # Treat subclasses of Tensor as plain tensors; their handlers would intercept the calls of rules.
        with torch._C.DisableTorchFunctionSubclass():
            return self._see(func, args, kwargs)

    def _see(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        """Run a call of the model."""
        kwargs = dict(kwargs or {})
        if self.before_change is not None:
            for tensor in written_tensors(func, args, kwargs):
                self.before_change(tensor)
        name, in_place, reflected = canonical_name(func)
        refusals.check_untransformed((args, kwargs), self.innermost)
        self._states.check_unused((args, kwargs))
        tensors = tensors_in((args, kwargs))
        path = self.detached.path_before(name, args, tensors, self.innermost, reflected=reflected)
        result = self._run_call(name, func, args, kwargs, tensors, in_place, reflected)
        self.depends.mark_seen((result, args, kwargs) if in_place or "out" in kwargs else result)
        if path is not None:
            self.detached.follow(name, path, args[:1] if in_place else result)
        return result

    def _run_call(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        in_place: bool,
        reflected: bool,
    ) -> Any:
        if self.innermost.is_whole:
            return run_inside_layer(self.innermost, name, func, args, kwargs, in_place=in_place)
        if in_place or kwargs.get("out") is not None or has_in_place_argument(func, args, kwargs):
            return run_in_place(self, name, func, args, kwargs)
        # Reading `grad_fn` does not use the tensor; checkpoints of older PyTorch versions read it.
        if func == _GET_HISTORY or not any(map(carries_relevance, tensors)):
            return untracked(func, args, kwargs)
        self._fresh = None
        kwargs.pop("out", None)
        self.check_visible(tensors)
        return self.run_with_relevance(name, func, args, kwargs, reflected=reflected)

    def run_with_relevance(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        reflected: bool = False,
        target: Tensor | None = None,
    ) -> Any:
        """Run a call on a tensor that carries relevance: move elements, apply a rule, or raise."""
        is_property = getattr(func, "__name__", "") == "__get__"
        name, func, args, kwargs = as_differentiable(name, func, args, kwargs, self.run_parts)
        if name in PASS_THROUGH and torch.is_grad_enabled():
            return self.pass_through(name, func, args, kwargs)
        if is_property or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name == "sgn" and has_complex((args, kwargs)):
            return self.run_parts(phase, *args, **kwargs)
        if name in CONSTANT:
            with torch.no_grad():
                return func(*args, **kwargs)
        if name in ARITHMETIC:
            args, kwargs = self._cast(args, kwargs)
        call = self._call(name, func, args, kwargs, self.innermost, self._result)
        call.reflected, call.target = reflected, target
        rule = self.rule_of(call)
        if rule is None:
            return self.run_without_rule(call)
        check_apart(name, call.operands, kwargs, self.batch_size, is_source=is_source)
        return self._record(rule, call)

    def run_without_rule(self, call: Call) -> Any:
        """Raise for a call without a rule, unless its result has no gradient."""
        refusals.check_not_numpy(call)
        output = call.func(*call.args, **call.kwargs)
        if any(t.requires_grad for t in instances_in(Tensor, output)):
            refusals.refuse_without_rule(call, output, type(self.innermost.module).__name__)
        return output

    def refuse_unseen(self, node: Any) -> None:
        """Raise for a node from code whose calls cannot be intercepted."""
        refusals.refuse_unseen(node, self.innermost)

    def _call(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: Frame,
        result: Any,
    ) -> Call:
        where = frame.module, frame.path, frame.local_path
        return Call(name, func, args, kwargs, *where, self, result=result)

    def rule_of(self, call: Call) -> CallRule | None:
        """The rule of a call: the rule set on the innermost module, or that of the table."""
        rule = self.innermost.rule
        if rule is None:
            rule = self._scope.rule_of_call(call, self.innermost.table)
        if rule is not None and is_complex(call) and not rule.suits_complex(call):
            return None
        return rule

    def run_parts(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of this package under this mode, so that its calls are recorded."""
        with torch.enable_grad(), _Reentered(self):
            return func(*args, **kwargs)

    def _record(self, rule: CallRule, call: Call) -> Any:
        """Let the rule record a call; a call on complex tensors is recorded on real views."""
        if not is_complex(call) or rule.runs_parts_of(call):
            with torch.no_grad():
                record = rule.record(call)
            if not (isinstance(record, Record) and record.output.is_complex()):
                refusals.check_inputs(record, call)
                return self.attach(record, call, rule)
            call.result = record.output
        with torch.no_grad():
            output = call.run(lambda: call.func(*call.args, **call.kwargs))
        on_parts = call_on_parts(call, output, self._move, carries_relevance)
        with torch.no_grad():
            record = rule.record(on_parts)
        refusals.check_inputs(record, on_parts)
        result = self.attach(record, call, rule)
        if isinstance(output, Tensor) and output.is_complex():
            return self._move("view_as_complex", as_complex, result)
        return result

    def record_layer(self, frame: Frame, output: Any) -> Any:
        """Record a layer as one call."""
        layer, rule, as_it_was = frame.module, frame.layer_rule, frame.as_it_was
        assert layer is not None and rule is not None
        assert as_it_was is not None and frame.inputs is not None
        self._states.note(layer, frame.path, frame.held)
        func = partial(from_its_state, as_it_was)
        call = self._call(type(layer).__name__, func, frame.inputs, frame.kwargs, frame, output)
        call.absolute_func = partial(with_magnitudes, as_it_was)
        return self._record(rule, call)

    def attach(self, record: Record | Any, call: Call | None = None, rule: Any = None) -> Any:
        """Attach the records of a call to its outputs as autograd history."""
        if not isinstance(record, Record):
            return map_instances(Record, lambda one: self.attach(one, call, rule), record)
        for x in record.inputs:
            check_aligned(x, self.batch_size)
        output = record.output
        if output.layout != torch.strided:
            refusals.refuse_sparse(
                call or self.innermost.path, type(self.innermost.module).__name__
            )
        position = None
        if record.saved_inputs is not None:  # one of the inputs may now be the output
            position = next((i for i, x in enumerate(record.inputs) if x is output), None)
        if position is None:
            # Dropout in evaluation mode returns its input.
            aliased = self._saved.note_aliases(output, record.inputs)
            if aliased or output._is_view():  # a view of a tensor that is not used elsewhere
                output = output.data
        step = Step.of(
            record,
            output,
            self._saved,
            batch_size=self.batch_size,
            total=self._total,
            joint=self.joint,
            may_be_on_tail=self._may_be_on_tail(call, rule),
        )
        if self.observer is not None and call is not None:
            inputs = record.inputs
            if record.saved_inputs is not None:  # the inputs before the call
                inputs = [saved.as_given() for saved in record.saved_inputs]
            step.observed = self.observer.recorded(call, rule, inputs, output, self.batch_size)
        result: Tensor = Node.apply(step, position, [output], *record.inputs)
        if record.nonnegative:
            self.mark_nonnegative(result)
        if record.saved_output is not None:
            self._saved.save_as(result, record.saved_output)
        if record.layer is not None:
            self._saved.note_layer(result, record.layer)
        self._fresh = result
        self.depends.mark_seen(result)
        return result

    def _may_be_on_tail(self, call: Call | None, rule: Any) -> bool:
        """Whether the rule is a default. A rule from the user or the mapping of an architecture also applies
        on the tail of the score."""
        if call is None:
            return True
        return self.innermost.rule is None and self._scope.is_default(call, rule)

    def is_fresh(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output of the last call, so that no other call has used it."""
        return tensor is self._fresh

    def check_visible(self, value: Any) -> None:
        """Raise for tensors from a call that cannot be intercepted, or with invalid history."""
        for tensor in tensors_in(value):
            overwritten = self._saved.is_overwritten(tensor)
            for node in self.depends.unseen(tensor, is_overwritten=overwritten):
                if not (is_own(node) or is_hook(node)):
                    self.refuse_unseen(node)
            if self._saved.is_stale(tensor):
                refusals.refuse_stale(self.innermost)
        self.depends.mark_seen(value)

    def _cast(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cast the constants of an arithmetic call to the dtype of the call."""
        args, kwargs, cast = cast_constants(args, kwargs, carries_relevance)
        for constant, number in cast:
            if self.is_nonnegative(constant) and not number.is_complex():
                self.mark_nonnegative(number)
        return args, kwargs

    def pass_through(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call that moves elements; a conjugate also negates some of them."""
        if not (name in CONJUGATES and has_complex((args, kwargs))):
            return self._move(name, func, *args, **kwargs)
        moved = self._move(name, CONJUGATES[name], *args, **kwargs)
        parts = self._move("view_as_real", as_parts, moved)
        output = as_parts(moved.detach().conj())
        # The negated part keeps its relevance; autograd would conjugate it.
        tail = Tail(
            lambda s: [as_parts(as_complex(s).conj())], self.save(output), [self.save(parts)]
        )
        record = Record(output, [parts], lambda s: [s], scaled=False, keeps_sign=True, tail=tail)
        return self._move("view_as_complex", as_complex, self.attach(record))

    def _move(self, name: str, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = move(self._saved, self.batch_size, name, func, args, kwargs)
        self.depends.mark_seen(result)
        return result


class _Reentered:
    """Context that re-enables a recording inside the call that it records."""

    def __init__(self, mode: Recording) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self._mode)

    def __exit__(self, *exc: Any) -> None:
        TorchFunctionMode.__exit__(self._mode, *exc)


_PLAIN = frozenset([Tensor, nn.Parameter])
_GET_HISTORY = torch.Tensor.grad_fn.__get__  # type: ignore[union-attr]  # a descriptor of the class
