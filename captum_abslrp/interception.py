"""The forward pass in which every call meets its rule.

The model is never changed. Its forward pass runs under a ``TorchFunctionMode``: each call on a tensor
that carries relevance (``F.linear``, ``+``, ``@``, ``softmax``, an in-place ReLU ...) is answered by a
node of the autograd graph whose forward is the call itself and whose backward is the rule. Autograd
then does the bookkeeping: relevance of a tensor that is used twice adds up, views and slices route it.
What goes along the graph is relevance per magnitude, see :mod:`captum_abslrp.functional`; the graph is
run back in :mod:`captum_abslrp.propagation`.

A call has one of three fates:

1. it has a rule: the rule answers it;
2. it only moves elements (reshape, slice, cat, ...): it runs as it is, and the gradient that autograd
   defines for it moves the relevance with its element;
3. anything else whose result depends on a tensor that carries relevance is an error that names it.

Calls on tensors that carry no relevance (weights, position tables, masks) run untouched.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_abslrp.alignment import check_aligned, check_apart, follow
from captum_abslrp.calls import (
    ARITHMETIC,
    CONSTANT,
    IN_PLACE_PASS_THROUGH,
    JOINING,
    PASS_THROUGH,
    as_differentiable,
    canonical_name,
    cast_constants,
    has_in_place_argument,
    instances_in,
    map_instances,
    out_of_place,
    tensors_in,
    written_tensors,
)
from captum_abslrp.complex_calls import (
    CONJUGATES,
    PREFIX,
    as_complex,
    as_parts,
    call_on_parts,
    has_complex,
    phase,
)
from captum_abslrp.messages import warn
from captum_abslrp.steps import (
    Answer,
    Kept,
    Node,
    Step,
    Tail,
    history,
    hooks_all_modules,
    is_hook,
    is_own,
    storage_of,
)

if TYPE_CHECKING:
    from captum.attr._utils.lrp_rules import PropagationRule

    from captum_abslrp.diagnostics import Watch
    from captum_abslrp.mappings import Mapping
    from captum_abslrp.rules import Rule

__all__ = ["Call", "Interception", "UnsupportedCallError"]


class UnsupportedCallError(NotImplementedError):
    """A call of the model has no rule. The message names the call, where it is and the remedy.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return torch.sinc(x)
        >>> try:
        ...     AbsLRP(Model()).attribute(torch.rand(1, 3), target=0)
        ... except UnsupportedCallError as error:
        ...     print(str(error)[:120])
        Expected every call on the way from the input to the output to have a rule, but got `torch.sinc` in
        the model itself (Mo
    """


@dataclass
class Call:
    """One call of the forward pass.

    Attributes:
        name: canonical name: no module, no dunder, no trailing underscore (``"add"`` for
            ``torch.add``, ``+``, ``+=`` and ``Tensor.add_``).
        func: the function that was called, as ``torch.overrides`` hands it over.
        args: its positional arguments.
        kwargs: its keyword arguments, without ``out`` and ``inplace``.
        module: the innermost module whose forward pass makes the call.
        path: where this module is in the model, for example ``"blocks.0.attn.proj"``.
        local_path: where it is in the part of the model that the mapping was found for.
        interception: the forward pass that the call belongs to.
        reflected: whether the positional arguments are in reverse order.
        result: the output, where it is known already.
        target: the tensor that the call overwrites, if it is an in-place call.
        absolute_func: the function with the magnitude of its own parameters, where it has any (a layer).
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module | None
    path: str
    local_path: str
    interception: Interception
    reflected: bool = False
    result: Any = None
    target: Tensor | None = None
    absolute_func: Callable[..., Any] | None = None

    @property
    def operands(self) -> tuple[Any, ...]:
        """The positional arguments in the order of the operation, 2 and x for ``2 - x``."""
        return self.args[::-1] if self.reflected else self.args

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor for the backward pass."""
        return self.interception.keep(tensor)

    def keep_output(self, output: Tensor, remake: Callable[[], Tensor]) -> Kept:
        """Keep the output of a call for the backward pass by what it is made from.

        It is made again when it is asked for, which costs little for an activation or a norm. In half
        precision the tensor itself is kept: what is kept is used in float32, where it would differ.
        """
        exact = output.dtype in (torch.float32, torch.float64)
        if not exact or (not output.is_meta and torch.is_autocast_enabled(output.device.type)):
            return self.keep(output)
        return Kept(remake=remake)

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """The output of the call: computed, unless it is known already."""
        if self.result is None:
            return compute()
        result: Tensor = map_instances(Tensor, Tensor.detach, self.result)
        return result

    def is_nonnegative(self, *values: Any) -> bool:
        """Whether it is known, without a look at them, that no value is negative: numbers and tensors."""
        return all(
            self.interception.is_nonnegative(v)
            if isinstance(v, Tensor)
            else isinstance(v, (int, float)) and v >= 0
            for v in values
        )

    def __str__(self) -> str:
        name = resolve_name(self.func) or self.name.removeprefix(PREFIX)
        return f"`{name}` in {_place(self.path, self.module)}"


class Interception(TorchFunctionMode):
    """Context in which the calls of one forward pass are answered by their rules.

    Args:
        find_rule: finds the rule of a call; None asks the mapping of the innermost enclosing module
            of a registered architecture.
        inputs: the explained tensors, which require gradients. Only what depends on them carries
            relevance; every other tensor is a constant, whatever history it has.
        batch_size: number of samples B; the leading dimension of the inputs.
        model: the model, for the paths of its modules.
        joint: scale the relevance of the inputs of one call together.
        total: sum of relevance of each sample after a call, where each input is scaled on its own.
        result: answer for the one call of a module whose output is known already.
        watch: looks at every call that is answered.

    Attributes:
        fuses: whether calls that are made of others may be answered at once, if it makes no difference.
        before_change: is given each tensor that a call is about to change in place, if it is set.
    """

    def __init__(
        self,
        find_rule: Callable[[Call], Rule | None] | None,
        *,
        inputs: Sequence[Tensor],
        batch_size: int,
        model: nn.Module | None = None,
        joint: bool = False,
        total: float = 1.0,
        result: Tensor | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.find_rule = find_rule
        self.batch_size = batch_size
        self.joint = joint
        self.fuses = not joint
        self.total = total
        self.result = result
        self.watch = watch
        self.before_change: Callable[[Tensor], None] | None = None
        self._modules = _ModuleStack(self, model)
        self._dependent: dict[Any, bool] = {}
        for tensor in inputs:
            self.add_input(tensor)
        self._detached: dict[Any, str] = {}
        self._kept: dict[int, list[tuple[_Layout | None, Kept]]] = {}
        self._overwritten: dict[int, int] = {}
        self._aliased: dict[int, list[Tensor]] = {}
        self._states: list[tuple[Tensor, str]] = []
        self._fresh: Tensor | None = None

    def __enter__(self) -> Interception:
        self._modules.start()
        try:
            super().__enter__()
        except BaseException:
            self._modules.stop()
            raise
        _running().append(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        _running().pop()
        self._modules.stop()
        self._kept.clear()
        self._aliased.clear()
        self._dependent.clear()
        self._detached.clear()
        self._states.clear()
        self._fresh = None
        self.before_change = None
        super().__exit__(exc_type, exc_val, exc_tb)

    def add_input(self, tensor: Tensor) -> None:
        """Explain one more tensor, which requires gradients: what depends on it carries relevance."""
        self._dependent[torch.autograd.graph.get_gradient_edge(tensor).node] = True

    def depends(self, node: Any) -> bool:
        """Whether a node of the autograd graph comes from one of the explained inputs."""
        known = self._dependent
        stack = [node]
        while stack:
            last = stack[-1]
            before = [n for n, _ in last.next_functions if n is not None]
            unknown = [n for n in before if n not in known]
            if last not in known and not unknown:
                known[last] = any(known[n] for n in before)
            if last in known:
                stack.pop()
            else:
                stack.extend(unknown)
        return known[node]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not any(cls not in _PLAIN for cls in types):
            return self._see(func, args, kwargs)
        # Subclasses of Tensor count as plain tensors: their own handlers would see the calls of rules.
        with torch._C.DisableTorchFunctionSubclass():
            return self._see(func, args, kwargs)

    def _see(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        """Run a call: by its rule, if it has relevance."""
        kwargs = dict(kwargs or {})
        if self.before_change is not None:
            for tensor in written_tensors(func, args, kwargs):
                self.before_change(tensor)
        name, in_place, reflected = canonical_name(func)
        if torch._C._functorch.maybe_current_level() is not None:
            self._check_untransformed((args, kwargs))
        if self._states:
            self._warn_of_state((args, kwargs))
        tensors = tensors_in((args, kwargs))
        path = self._path_of_detached(name, reflected, args, tensors)
        result = self._run_call(name, func, args, kwargs, tensors, in_place, reflected)
        if path is not None and name not in CONSTANT - {"detach"}:
            self._follow_detached(path, args[:1] if in_place else result)
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
            return self._inside_a_whole(name, in_place, func, args, kwargs)
        if in_place or kwargs.get("out") is not None or has_in_place_argument(func, args, kwargs):
            return self._in_place(name, func, args, kwargs)
        # To ask for the history is not to use the tensor: checkpoints of older PyTorch ask for it.
        if func == _GET_HISTORY or not any(map(carries_relevance, tensors)):
            return _untracked(func, args, kwargs)
        self._fresh = None
        kwargs.pop("out", None)
        self.check_visible(tensors)
        return self._answer(name, func, args, kwargs, reflected=reflected)

    def _path_of_detached(
        self, name: str, reflected: bool, args: tuple[Any, ...], tensors: Sequence[Tensor]
    ) -> str | None:
        """Where a value that a call makes, or makes use of, was taken out of the history; or None."""
        if name == "div":  # a divisor is a constant in any case
            tensors = tensors_in(args[1:] if reflected else args[:1])
        for tensor in tensors:
            path = getattr(tensor, _DETACHED, None)
            if path is not None and not carries_relevance(tensor):
                return cast(str, path)
        hidden = name in ("detach", "data") or not torch.is_grad_enabled()
        if hidden and any(map(carries_relevance, tensors)):
            return str(self.innermost)
        return None

    def _follow_detached(self, path: str, result: Any) -> None:
        """Note that a result depends on a value that was taken out of the history at a path."""
        for tensor in tensors_in(result):
            if carries_relevance(tensor):
                self._detached[tensor.grad_fn] = path
            elif tensor.is_floating_point() or tensor.is_complex():
                setattr(tensor, _DETACHED, path)

    def detached_parts(self, output: Tensor) -> list[str]:
        """Where values were taken out of the history that reach the output all the same."""
        found: dict[str, None] = {}
        for node in history(output.grad_fn) if self._detached else ():
            if node in self._detached:
                found[self._detached[node]] = None
        return list(found)

    def check_visible(self, value: Any) -> None:
        """Look for tensors that an autograd function of the model has made."""
        for tensor in tensors_in(value):
            node = tensor.grad_fn
            opaque = isinstance(node, BackwardCFunction) and not (is_own(node) or is_hook(node))
            if node is not None and opaque and self.depends(node):
                self._opaque(node.name().removesuffix("Backward"), self.innermost)
            if hasattr(tensor, _STALE):
                raise UnsupportedCallError(
                    f"Expected a tensor that a call has handed on as it was to be left alone afterwards, "
                    f"but got one in {self.innermost} that was changed in place by that other name "
                    f"and is used again. Replace the in-place call, or clone the tensor before."
                )

    def _check_untransformed(self, value: Any) -> None:
        """Refuse calls on tensors that a transform of ``torch.func`` has wrapped."""
        tensors = tensors_in(value)
        wrapped = [t for t in tensors if torch._C._functorch.is_functorch_wrapped_tensor(t)]
        if not wrapped or not any(map(carries_relevance, [*tensors, *map(_unwrapped, wrapped)])):
            return
        raise UnsupportedCallError(
            f"Expected every call on the way from the input to the output to have a rule, but got calls "
            f"under a transform of `torch.func` (`vmap`, `grad`, ...) in {self.innermost}, "
            f"where one call stands for many. Replace `vmap` "
            f"by a loop. Over the members of an ensemble: `torch.stack([functional_call(base, "
            f"{{name: value[i] for name, value in params.items()}}, (x,)) for i in range(members)])`. "
            f"Over samples: call the function with the whole batch."
        )

    def _inside_a_whole(
        self,
        name: str,
        in_place: bool,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call inside of a layer that is answered as one call: its inside is not looked at."""
        if name in CONSTANT or getattr(func, "__name__", "") == "__get__":
            return _untracked(func, args, kwargs)
        from_outside = [t for t in tensors_in((args, kwargs)) if _comes_from_outside(t)]
        self.innermost.from_outside.extend(from_outside)
        if from_outside and (in_place or has_in_place_argument(func, args, kwargs)):
            target = args[0] if args else kwargs.get("input")
            if any(target is tensor for tensor in from_outside):
                raise UnsupportedCallError(
                    f"Expected a layer with one rule for all of it to leave its keyword arguments "
                    f"alone, but got one in {self.innermost} that is changed in place. Pass it by "
                    f"position, or replace the in-place call."
                )
        return _untracked(func, args, kwargs)

    def _answer(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        reflected: bool = False,
        target: Tensor | None = None,
    ) -> Any:
        is_property = getattr(func, "__name__", "") == "__get__"
        name, func, args, kwargs = as_differentiable(name, func, args, kwargs, self.composite)
        if name in PASS_THROUGH and torch.is_grad_enabled():
            return self._pass_through(name, func, args, kwargs)
        if is_property or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name == "sgn" and has_complex((args, kwargs)):
            return self.composite(phase, *args, **kwargs)
        if name in CONSTANT:
            with torch.no_grad():
                return func(*args, **kwargs)
        if name in ARITHMETIC:
            args, kwargs = self._cast(args, kwargs)
        frame = self.innermost
        call = Call(
            name,
            func,
            args,
            kwargs,
            frame.module,
            frame.path,
            frame.local_path,
            self,
            reflected,
            self.result,
            target,
        )
        rule = self.rule_of(call)
        if rule is None:
            return self._without_rule(call)
        check_apart(name, call.operands, kwargs, self.batch_size, is_source=_is_source)
        return self._answer_by(rule, call)

    def _answer_by(self, rule: Rule, call: Call) -> Any:
        """Answer a call by its rule; one that reads or makes a complex tensor as one on real views."""
        if not is_complex(call) or rule.runs_parts_of(call):
            with torch.no_grad():
                answer = rule.answer(call)
            if not (isinstance(answer, Answer) and answer.output.is_complex()):
                self._check_sources(answer, call)
                return self.attach(answer, call, rule)
            call.result = answer.output
        with torch.no_grad():
            output = call.run(lambda: call.func(*call.args, **call.kwargs))
        on_parts = call_on_parts(call, output, self.move, carries_relevance)
        with torch.no_grad():
            answer = rule.answer(on_parts)
        self._check_sources(answer, on_parts)
        result = self.attach(answer, call, rule)
        if isinstance(output, Tensor) and output.is_complex():
            return self.move("view_as_complex", as_complex, result)
        return result

    def _check_sources(self, answer: Any, call: Call) -> None:
        """Refuse a call that a rule hands relevance to a part of its sources only."""
        answers = instances_in(Answer, answer)
        if answers:
            known = [t for a in answers for t in (*a.sources, *a.constants)]
            for tensor in tensors_in((call.args, call.kwargs)):
                if carries_relevance(tensor) and not any(tensor is t for t in known):
                    raise UnsupportedCallError(
                        f"Expected only the input of {call} to depend on the explained inputs, but got "
                        f"a weight or bias that does, too. Use `TwinRule()` for this call, which "
                        f"hands relevance to all of them."
                    )

    def _cast(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an arithmetic call, with its constants in the dtype that it casts them to."""
        args, kwargs, cast = cast_constants(args, kwargs, carries_relevance)
        for constant, number in cast:
            if self.is_nonnegative(constant) and not number.is_complex():
                self.mark_nonnegative(number)
        return args, kwargs

    def _without_rule(self, call: Call) -> Any:
        """Refuse a call, unless its result does not depend on its arguments by a gradient."""
        if call.name == "__array__":
            raise UnsupportedCallError(
                f"Expected every call on the way from the input to the output to be one of PyTorch, but got "
                f"one of NumPy in {_place(call.path, call.module)}. Make a tensor of what it is "
                f"combined with, `torch.as_tensor(array)`, and use the functions of PyTorch."
            )
        output = call.func(*call.args, **call.kwargs)
        if not any(t.requires_grad for t in instances_in(Tensor, output)):
            return output
        if is_complex(call):
            raise UnsupportedCallError(
                f"Expected every call on the way from the input to the output to have a rule, but got "
                f"{call} of a complex tensor, which has none. Give it one by the mapping, `AbsLRP(model, "
                f'mapping=get_mapping().extended({{"{call.name}": captum_abslrp.rules.TwinRule()}}))`, or by '
                f"the module, `module.rule = captum_abslrp.rules.TwinRule()`; the twin rule suits every "
                f"differentiable call."
            )
        if any(t.layout != torch.strided for t in instances_in(Tensor, output)):
            self._refuse_sparse(call)
        raise UnsupportedCallError(
            f"Expected every call on the way from the input to the output to have a rule, but got "
            f"{call}, which has none. Register one: `captum_abslrp.register_call_rule("
            f'"{call.name}", captum_abslrp.rules.TwinRule())`; the twin rule suits every differentiable '
            f"call. For this model alone, give it to the mapping, `AbsLRP(model, "
            f'mapping=get_mapping().extended({{"{call.name}": rule}}))`, or to the module, '
            f"`module.rule = rule`."
        )

    def note_state(self, layer: nn.Module, frame: _Frame) -> None:
        """Note what a layer that was answered as one call has changed of the tensors that it holds."""
        now = [t for t in _state_of(layer) if t.is_floating_point()]
        self._states = [(t, path) for t, path in self._states if path != frame.path]
        self._states += [
            (t, frame.path)
            for t in now
            if not any(t is held and _version(t) == version for held, version in frame.held)
        ]

    def _warn_of_state(self, value: Any) -> None:
        """Warn where a call uses what a layer that was answered as one call has left in itself."""
        tensors = tensors_in(value)
        paths = {path for state, path in self._states if any(state is t for t in tensors)}
        for path in paths:
            self._states = [(t, p) for t, p in self._states if p != path]
            warn(
                f"Expected `{path}`, which has one rule for the whole layer, to return everything that "
                f"depends on its input, but it keeps a tensor that is used in a later call. If that tensor "
                f"depends on the input, its relevance is lost: let the layer return its state, and take "
                f"it as an argument."
            )

    def _refuse_sparse(self, call: Call | None) -> NoReturn:
        """Refuse a call whose result is a sparse tensor that depends on the explained inputs."""
        frame = self.innermost
        raise UnsupportedCallError(
            f"Expected every call on the way from the input to the output to return a dense tensor, but got "
            f"a sparse or nested one from {call or frame.path}. Compute with dense tensors there, or "
            f"register the layer around it, from dense tensors to dense ones, as one call: "
            f"`captum_abslrp.register_call_rule({type(frame.module).__name__}, "
            f"captum_abslrp.rules.TwinRule())`."
        )

    def _opaque(self, function: str, frame: _Frame) -> None:
        """Refuse an autograd function of the model, whose inside cannot be seen."""
        layer = type(frame.module).__name__
        raise UnsupportedCallError(
            f"Expected every call on the way from the input to the output to have a rule, but got the "
            f"autograd function `{function}` in {frame}, whose inside cannot be seen. "
            f"Register the layer that calls it as one call: `captum_abslrp.register_call_rule({layer}, "
            f"captum_abslrp.rules.TwinRule())`. A layer that does more should be split first."
        )

    def _pass_through(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in CONJUGATES and has_complex((args, kwargs)):
            moved = self.move(name, CONJUGATES[name], *args, **kwargs)
            parts = self.move("view_as_real", as_parts, moved)
            output = as_parts(moved.detach().conj())
            # What is negated passes relevance on, which has no sign; autograd would conjugate it.
            tail = Tail(
                lambda s: [as_parts(as_complex(s).conj())], self.keep(output), [self.keep(parts)]
            )
            answer = Answer(
                output, [parts], lambda s: [s], scaled=False, keeps_sign=True, tail=tail
            )
            return self.move("view_as_complex", as_complex, self.attach(answer))
        return self.move(name, func, *args, **kwargs)

    def move(self, name: str, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a call that moves elements, with the gradient that autograd defines for it."""
        if any(t.is_inference() for t in tensors_in((args, kwargs))):
            # Autograd cannot keep such a tensor, which the caller or the model made in inference mode.
            leaves, spec = tree_flatten((args, kwargs))
            leaves = [
                t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in leaves
            ]
            args, kwargs = tree_unflatten(leaves, spec)
        result = func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        follow(name, func, args, kwargs, result, self.batch_size, tensors)
        # An index is no value: it says nothing about what is moved.
        values = [t for t in tensors if name in JOINING or t.is_floating_point() or t.is_complex()]
        if all(map(self.is_nonnegative, values)) and not (
            name in _FILLING and any(map(_may_be_negative, tree_flatten((args, kwargs))[0]))
        ):
            for tensor in tensors_in(result):
                self.mark_nonnegative(tensor)
        return result

    def rule_of(self, call: Call) -> Rule | None:
        """The rule of a call: of the innermost module that has one of its own, or of the mapping."""
        frame = self.innermost
        if frame.rule is not None:
            rule: Rule | None = frame.rule
        elif self.find_rule is not None:
            rule = self.find_rule(call)
        else:
            rule = frame.mapping.rule_of_call(call)
        if rule is not None and is_complex(call) and not rule.suits_complex(call):
            return None
        return rule

    @property
    def innermost(self) -> _Frame:
        """The innermost running module."""
        return self._modules.innermost

    def composite(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of ours under this mode, so that the calls it is made of are answered."""
        with torch.enable_grad(), _Reentered(self):
            return func(*args, **kwargs)

    def answer_layer(self, rule: PropagationRule, frame: _Frame, output: Any) -> Any:
        """Answer a layer as one call: by the rule of Captum's on it, or the one of its class."""
        from captum_abslrp.rules import Rule, answer_by_captum_rule

        layer, sources = frame.module, frame.sources
        assert layer is not None and sources is not None
        as_it_was = frame.as_it_was
        assert as_it_was is not None
        call = Call(
            type(layer).__name__,
            partial(_from_its_state, as_it_was),
            sources,
            frame.kwargs,
            layer,
            frame.path,
            frame.local_path,
            self,
            result=output,
            absolute_func=partial(_with_magnitudes, as_it_was),
        )
        if not isinstance(rule, Rule):
            _check_simple(rule, frame, output)
            if has_complex((sources, output)):
                raise TypeError(
                    f"Expected `{frame.path}`, which has the rule {type(rule).__name__} of Captum, to work "
                    f"on real tensors, but got complex ones. Set one of captum_abslrp.rules on it, or "
                    f"register the layer with `TwinRule()`."
                )
            kept = self.keep(output)
            answer = answer_by_captum_rule(rule, layer, sources, output, kept)
            return self.attach(answer, call, rule)
        return self._answer_by(rule, call)

    def attach(self, answer: Answer | Any, call: Call | None = None, rule: Any = None) -> Any:
        """Give the output of a call the history that its rule asks for; each of several on its own."""
        if not isinstance(answer, Answer):
            return map_instances(Answer, lambda one: self.attach(one, call, rule), answer)
        for source in answer.sources:
            check_aligned(source, self.batch_size)
        output = answer.output
        if output.layout != torch.strided:
            self._refuse_sparse(call)
        position = None
        if answer.kept_sources is not None:  # one of them may be the output now
            position = next((i for i, s in enumerate(answer.sources) if s is output), None)
        if position is None:
            aliased = [s for s in answer.sources if storage_of(s) == storage_of(output)]
            if aliased:  # handed on as it is: dropout
                self._aliased.setdefault(storage_of(output), []).extend(aliased)
            if aliased or output._is_view():  # of a tensor that nothing else has
                output = output.data

        def kept_sources() -> Sequence[Kept]:
            if answer.kept_sources is not None:
                return answer.kept_sources
            return [self.keep(source) for source in answer.sources]

        def kept_output() -> Kept:
            return self.keep(output) if answer.kept is None else answer.kept

        step = Step(
            answer.propagate,
            answer.keeps_sign,
            [self.is_nonnegative(source) for source in answer.sources],
            kept_sources() if answer.scaled else [],
            # The step must not hold the output, whose history it becomes, itself.
            kept_output() if answer.scaled and self.joint else None,
            [(source.shape, source.dtype) for source in answer.sources],
            self.batch_size,
            self.total,
            kept_output() if answer.vanishing else None,
            answer.together,
            at_once=answer.at_once,
            tail=answer.tail if call is None or self._is_generic(call, rule) else None,
            logits=answer.logits,
        )
        if self.watch is not None and call is not None:
            sources = answer.sources
            if answer.kept_sources is not None:  # as they were before the call
                sources = [kept.as_given() for kept in answer.kept_sources]
            step.watched = self.watch.answered(call, rule, sources, output, self.batch_size)
        result: Tensor = Node.apply(step, position, [output], *answer.sources)
        if answer.nonnegative:
            self.mark_nonnegative(result)
        if answer.kept is not None:
            overwritten = self._overwritten.get(storage_of(result), 0)
            setattr(result, _KEPT, (overwritten, answer.kept))
        self._fresh = result
        return result

    def _is_generic(self, call: Call, rule: Any) -> bool:
        """Whether a rule is the one that the generic mapping has for a call. A rule that the user or an
        architecture has chosen holds on the tail of the score as well."""
        if self.innermost.rule is not None:
            return False
        return rule is not None and rule is generic_rule(call.name)

    def is_fresh(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output of the last call, so that nothing else has made use of it."""
        return tensor is self._fresh

    def is_nonnegative(self, tensor: Tensor) -> bool:
        """Whether it is known that no negative entry of a tensor takes part in the calls on it."""
        if tensor.dtype in (torch.bool, torch.uint8):
            return True
        mark = getattr(tensor, _NONNEGATIVE, None)
        return mark is not None and mark == self._overwritten.get(storage_of(tensor), 0)

    def mark_nonnegative(self, tensor: Tensor) -> None:
        """Make it known that no entry of a tensor is negative, until it is changed in place."""
        setattr(tensor, _NONNEGATIVE, self._overwritten.get(storage_of(tensor), 0))

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor for the backward pass without a copy, unless it is changed in place later."""
        overwritten, kept = getattr(tensor, _KEPT, (None, None))
        if kept is not None and overwritten == self._overwritten.get(storage_of(tensor), 0):
            return cast(Kept, kept)
        tensor = tensor.detach()
        if tensor.layout != torch.strided:  # how it lies in its memory cannot be told
            self._kept.setdefault(storage_of(tensor), []).append((None, kept := Kept(tensor)))
            return kept
        layout = _layout(tensor)
        cells = self._kept.setdefault(storage_of(tensor), [])
        for known, cell in cells:
            if known == layout:
                return cell
        cells.append((layout, Kept(tensor)))
        return cells[-1][1]

    def _in_place(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An in-place call: the out-of-place call, answered as ever, and a copy into the target."""
        target = kwargs.get("out")
        if target is None:
            target = args[0] if args else next(iter(tensors_in(kwargs)), None)
        if not isinstance(target, Tensor):
            return _untracked(func, args, kwargs)
        if not any(map(carries_relevance, tensors_in((args, kwargs)))):
            self.release(target)
            return _untracked(func, args, kwargs)
        if name in IN_PLACE_PASS_THROUGH:
            self.release(target)
            for tensor in tensors_in((args, kwargs)):
                if carries_relevance(tensor):
                    check_aligned(tensor, self.batch_size)
            return func(*args, **kwargs)
        self.check_visible((args, kwargs))
        func, args, kwargs = out_of_place(name, func, args, kwargs)
        result = self._answer(name, func, args, kwargs, target=target)
        if result is target:  # the rule has changed it already
            return target
        self.release(target)
        if not target._is_view() and not target.is_leaf:
            target.detach_()  # what was there has no part in what is there now
        target.copy_(result)
        if isinstance(result, Tensor) and self.is_nonnegative(result):
            self.mark_nonnegative(target)
        return target

    def release(self, target: Tensor) -> None:
        """Get ready for a change of a tensor in place: what is kept of it is cloned."""
        storage = storage_of(target)
        for _, cell in self._kept.pop(storage, []):
            cell.release()
        self._overwritten[storage] = self._overwritten.get(storage, 0) + 1
        for source in self._aliased.pop(storage, []):
            if source is not target:
                setattr(source, _STALE, True)


class _Reentered:
    """Context that turns an interception on again inside the call that it is answering."""

    def __init__(self, mode: Interception) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self._mode)

    def __exit__(self, *exc: Any) -> None:
        TorchFunctionMode.__exit__(self._mode, *exc)


def _place(path: str, module: nn.Module | None) -> str:
    """Where a module is in the model, for messages."""
    where = f"`{path}`" if path else "the model itself"
    return where if module is None else f"{where} ({type(module).__name__})"


class _Frame(NamedTuple):
    """A running module, and what holds for the calls that it makes."""

    module: nn.Module | None
    path: str
    root: str
    """Path of the module that the mapping was found for."""
    mapping: Mapping
    rule: Rule | None
    """The rule that the user has set on this module or one around it."""
    layer_rule: PropagationRule | None = None
    """The rule that answers the module as one call, see :func:`rule_of_layer`."""
    sources: tuple[Any, ...] | None = None
    """The positional arguments of a module that is answered as one call."""
    kwargs: dict[str, Any] = {}
    """Its keyword arguments, once it has run."""
    is_whole: bool = False
    """Whether the module, or one around it, is answered as one call."""
    as_it_was: nn.Module | None = None
    """The module before the call, with what it holds beside its weights."""
    held: Sequence[tuple[Tensor, int]] = ()
    """The tensors that it held before the call, and how often each had been changed by then."""
    from_outside: list[Tensor] = []
    """Tensors with relevance that calls inside of such a module have used: arguments, or what it holds."""

    def __str__(self) -> str:
        return _place(self.path, self.module)

    @property
    def local_path(self) -> str:
        inside = self.path == self.root or self.path.startswith(f"{self.root}.")
        return self.path[len(self.root) :].lstrip(".") if self.root and inside else self.path


class _ModuleStack:
    """Which module of the model is running, in this thread.

    PyTorch's process-wide module hooks report it while the forward pass runs; the model itself gets
    no hook, and calls of other threads are let through. A module with a rule that is not one of
    ours (Captum's ``EpsilonRule``, say), or of a class that a rule is registered for, is answered here
    as one call.
    """

    def __init__(self, interception: Interception, model: nn.Module | None) -> None:
        self._interception = interception
        # A compiled part is called as the module inside of its wrapper.
        self._paths = (
            {m: name.replace("_orig_mod.", "") for name, m in model.named_modules()}
            if model is not None
            else {}
        )
        self._stack: list[_Frame] = []
        self._handles: list[Any] = []
        self._thread = -1

    def start(self) -> None:
        from captum_abslrp.mappings import get_mapping

        self._thread = threading.get_ident()
        self._stack = [_Frame(None, "", "", get_mapping("generic"), None)]
        self._handles = [
            register_module_forward_pre_hook(self._enter),  # type: ignore[arg-type]  # may return
            register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
            # PyTorch forgets to remove this mark of a hook.
            _global_forward_hooks_with_kwargs.pop(handle.id, None)
        self._handles.clear()
        self._stack.clear()
        self._paths.clear()

    @property
    def innermost(self) -> _Frame:
        return self._stack[-1]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != self._thread:
            return None
        from captum_abslrp.mappings import find_mapping

        with torch._C.DisableTorchFunction():  # the hooks run under the mode
            self._check_hooked(module, args)
            around = self._stack[-1]
            path = self._paths.get(module, type(module).__name__)
            found = find_mapping(module)
            root, mapping = (path, found) if found is not None else (around.root, around.mapping)
            alone = rule_of_layer(module)
            frame = _Frame(
                module,
                path,
                root,
                mapping,
                _own_rule(module) or around.rule,
                alone,
                is_whole=around.is_whole or alone is not None,
                from_outside=around.from_outside if around.is_whole else [],
            )
            if alone is None or around.is_whole:
                self._stack.append(frame)
                return None
            held = [(tensor, _version(tensor)) for tensor in _state_of(module)]
            try:
                as_it_was = _with_state(module)
            except (
                Exception
            ):  # a layer may hold what cannot be copied; its rule may not need a copy
                as_it_was = module
            self._stack.append(frame._replace(sources=args, held=held, as_it_was=as_it_was))
            # Clones, because the module may change its input in place.
            result: tuple[Any, ...] = map_instances(
                Tensor, lambda t: t.detach().clone() if carries_relevance(t) else t, args
            )
            return result

    def _check_hooked(self, module: nn.Module, value: Any) -> None:
        """Backward hooks make PyTorch copy the tensors of a module, whose marks are lost: see that there
        is none that matters."""
        if module._backward_hooks or module._backward_pre_hooks or hooks_all_modules():
            for tensor in tensors_in(value):
                if carries_relevance(tensor):
                    check_aligned(tensor, self._interception.batch_size)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        # After an exception PyTorch calls hooks without keyword arguments.
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)
        if threading.get_ident() != self._thread or len(self._stack) < 2:
            return None
        if output is not None:
            with torch._C.DisableTorchFunction():
                self._check_hooked(module, output)
        # Without an output an exception is on its way.
        if output is not None and not self.innermost.is_whole:
            with torch._C.DisableTorchFunction():
                self._interception.check_visible(output)
        frame = self._stack.pop()
        rule = frame.layer_rule
        if rule is None or output is None or frame.sources is None:
            return None
        with torch._C.DisableTorchFunction():
            given = [
                t for t in instances_in(Tensor, (frame.sources, kwargs)) if carries_relevance(t)
            ]
            if any(not any(t is known for known in given) for t in frame.from_outside):
                raise UnsupportedCallError(
                    f"Expected `{frame.path}`, which has the rule {type(rule).__name__} for the whole "
                    f"layer, to depend on the explained inputs by its arguments alone, but got one "
                    f"that uses another tensor that does, too. Pass that tensor to it as an argument."
                )
            if not given:
                return None
            self._interception.note_state(module, frame)
            return self._interception.answer_layer(rule, frame._replace(kwargs=kwargs), output)


def generic_rule(name: str) -> Rule | None:
    """The rule that the generic mapping itself has for a call of a name."""
    from captum_abslrp.mappings import get_mapping

    return get_mapping("generic").rule_of_name(name)


def _own_rule(module: nn.Module) -> Rule | None:
    from captum_abslrp.rules import Rule

    own = getattr(module, "rule", None)
    return own if isinstance(own, Rule) else None


def rule_of_layer(module: nn.Module) -> PropagationRule | None:
    """The rule that answers a module as one call: one that is set on it and is not one of ours, such as
    Captum's ``EpsilonRule``, or the one that is registered for its class. One of ours on a module of a
    class with a registered rule stands in for that rule."""
    from captum.attr._utils.lrp_rules import PropagationRule

    from captum_abslrp.mappings import find_layer_rule
    from captum_abslrp.rules import Rule

    own, registered = getattr(module, "rule", None), find_layer_rule(module)
    if isinstance(own, PropagationRule) and (registered is not None or not isinstance(own, Rule)):
        return own
    return registered


def _with_state(layer: nn.Module, *, own_weights: bool = False) -> nn.Module:
    """A copy of a layer that keeps the state that the layer has now, with the same weights or copies."""
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _state_of(layer)}
    if not own_weights:
        memo |= {id(parameter): parameter for parameter in layer.parameters()}
    return copy.deepcopy(layer, memo)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; PyTorch does not count it in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def _state_of(layer: nn.Module) -> list[Tensor]:
    """The tensors that a layer holds, without its weights: buffers, and what a forward pass has left."""
    return [
        tensor
        for module in layer.modules()
        for tensor in instances_in(Tensor, list(vars(module).values()))
        if not isinstance(tensor, nn.Parameter)
    ]


def _check_simple(rule: PropagationRule, frame: _Frame, output: Any) -> None:
    """Raise where a rule of Captum's cannot answer a layer, because it knows positional tensors only."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"Expected `{frame.path}`, which has the rule {type(rule).__name__}, to return one "
            f"tensor, but got {type(output).__name__}. Set the rule on a layer inside."
        )
    others = [source for source in frame.sources or () if not isinstance(source, Tensor)]
    if any(map(carries_relevance, instances_in(Tensor, (others, frame.kwargs)))):
        raise TypeError(
            f"Expected `{frame.path}`, which has the rule {type(rule).__name__}, to be called "
            f"with positional tensors, but got keyword arguments or containers that hold tensors. Set the "
            f"rule on a layer inside, or register the layer with `captum_abslrp.rules.TwinRule()`."
        )


def _with_magnitudes(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The output of a layer with the magnitude of its parameters."""
    twin = _with_state(layer, own_weights=True)
    for parameter in twin.parameters():
        as_parts(parameter.data).abs_()
    return _forward(twin, args, kwargs)


def _from_its_state(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The output of a layer, whose state stays what it is."""
    return _forward(_with_state(layer), args, kwargs)


def _forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a layer, which may change its arguments in place."""
    args, kwargs = map_instances(Tensor, torch.clone, (args, kwargs))
    return layer.forward(*args, **kwargs)


def _unwrapped(tensor: Tensor) -> Tensor:
    """A tensor as it was before transforms of ``torch.func``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _comes_from_outside(tensor: Tensor) -> bool:
    """Whether a tensor that is used inside of a layer that is answered as one call carries relevance."""
    node = tensor.grad_fn
    of_the_layer = isinstance(node, BackwardCFunction) and not is_own(node)
    return carries_relevance(tensor) and not of_the_layer


def carries_relevance(tensor: Tensor) -> bool:
    """Whether a tensor depends on the inputs that the running :class:`Interception` explains.

    A history alone does not tell: a constant may have one of its own, such as text features that were
    computed with gradients, or a slice of a parameter.
    """
    if not tensor.requires_grad or tensor.is_leaf:
        return False
    running = _running()
    return not running or running[-1].depends(tensor.grad_fn)


def add_input(tensor: Tensor) -> None:
    """Let the running :class:`Interception` explain one more tensor, see :meth:`Interception.add_input`."""
    _running()[-1].add_input(tensor)


_LOCAL = threading.local()


def _running() -> list[Interception]:
    """The interceptions that run in this thread, the innermost one last."""
    try:
        return cast("list[Interception]", _LOCAL.running)
    except AttributeError:
        _LOCAL.running = []
        return cast("list[Interception]", _LOCAL.running)


def is_complex(call: Call) -> bool:
    """Whether there is a complex tensor or number among the arguments of a call."""
    return has_complex((call.args, call.kwargs))


def _may_be_negative(value: Any) -> bool:
    """Whether a number, of which both parts count, is perhaps negative."""
    return isinstance(value, complex) or (isinstance(value, (int, float)) and value < 0)


def _is_source(value: Any) -> bool:
    return isinstance(value, Tensor) and carries_relevance(value)


def _untracked(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call that carries no relevance; parameters leave no history on its result."""
    if not any(t.requires_grad for t in tensors_in((args, kwargs))):
        return func(*args, **kwargs)
    with torch.no_grad():
        return func(*args, **kwargs)


_PLAIN = frozenset([Tensor, nn.Parameter])
_NONNEGATIVE = "_abslrp_nonnegative"
"""Mark of a tensor without negative entries: how often its memory had been overwritten by then."""
_KEPT = "_abslrp_kept"
"""Mark of a tensor that is kept by what it is made from: how often it had been overwritten, and that."""
_DETACHED = "_abslrp_detached"
"""Mark of a tensor that depends on the inputs by value only: where its history was cut off."""
_STALE = "_abslrp_stale"
"""Mark of a tensor whose memory was overwritten by another name, so that its history is wrong."""
_GET_HISTORY = torch.Tensor.grad_fn.__get__  # type: ignore[union-attr]  # of the class: a descriptor
_FILLING = frozenset(
    "__setitem__ index_copy masked_fill masked_scatter pad scatter select_scatter slice_scatter "
    "diagonal_scatter where".split()
)
"""Calls that move elements and may put numbers beside them."""


_Layout = tuple[torch.Size, torch.dtype, tuple[int, ...], int]


def _layout(tensor: Tensor) -> _Layout:
    """How a tensor lies in its memory."""
    return tensor.shape, tensor.dtype, tensor.stride(), int(tensor.storage_offset())
