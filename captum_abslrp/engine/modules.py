"""The stack of running modules, with the rules that apply to their calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from captum_abslrp.engine.arguments import (
    has_in_place_argument,
    instances_in,
    map_instances,
    tensors_in,
)
from captum_abslrp.engine.dependence import carries_relevance, untracked
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.layers import comes_from_outside, state_of, version, with_state
from captum_abslrp.engine.messages import place
from captum_abslrp.engine.names import CONSTANT
from captum_abslrp.engine.nodes import hooks_all_modules
from captum_abslrp.engine.protocols import CallRule, Scope
from captum_abslrp.engine.samples import check_aligned


class Frame(NamedTuple):
    """A running module."""

    module: nn.Module | None
    path: str
    root: str
    """Path of the module that the table of rules belongs to."""
    table: Any
    """The table of rules, see :class:`~captum_abslrp.engine.protocols.Scope`."""
    rule: CallRule | None
    """The rule that the user has set on this module or an outer one."""
    layer_rule: CallRule | None = None
    """The rule that records the module as one call."""
    inputs: tuple[Any, ...] | None = None
    """The positional arguments of a module that is recorded as one call."""
    kwargs: dict[str, Any] = {}
    """Its keyword arguments, once it has run."""
    is_whole: bool = False
    """Whether the module, or an outer one, is recorded as one call."""
    as_it_was: nn.Module | None = None
    """A copy of the module with its state before the call."""
    held: Sequence[tuple[Tensor, int]] = ()
    """The state tensors of the module before the call, and their versions."""
    from_outside: list[Tensor] = []
    """Tensors that carry relevance and that calls inside such a module have used."""

    def __str__(self) -> str:
        return place(self.path, self.module)

    @property
    def local_path(self) -> str:
        """The path relative to the module that the table of rules belongs to."""
        inside = self.path == self.root or self.path.startswith(f"{self.root}.")
        return self.path[len(self.root) :].lstrip(".") if self.root and inside else self.path


class LayerRecorder(Protocol):
    """The interface of the recording for the stack of modules."""

    def check_visible(self, value: Any) -> None: ...
    def record_layer(self, frame: Frame, output: Any) -> Any: ...


class ModuleStack:
    """The running modules in this thread, the innermost last.

    Global module hooks of PyTorch report them during the forward pass. The model itself gets no hook, and
    modules in other threads are ignored. A module with a rule for the whole layer is recorded here as one
    call.

    Args:
        recorder: the recording, which records layers.
        scope: the scope, which finds rules.
        model: the model, for the paths of its modules.
        batch_size: number of samples.
    """

    def __init__(
        self, recorder: LayerRecorder, scope: Scope, model: nn.Module | None, batch_size: int
    ) -> None:
        self._recorder = recorder
        self._scope = scope
        self._batch_size = batch_size
        # A compiled submodule is called as the module inside its wrapper.
        self._paths = (
            {m: name.replace("_orig_mod.", "") for name, m in model.named_modules()}
            if model is not None
            else {}
        )
        self._stack: list[Frame] = []
        self._handles: list[Any] = []
        self._thread = -1

    def start(self) -> None:
        """Register the hooks."""
        self._thread = threading.get_ident()
        self._stack = [Frame(None, "", "", None, None)]
        enter: Callable[..., Any] = self._enter
        self._handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
            # PyTorch does not remove this mark of a hook.
            _global_forward_hooks_with_kwargs.pop(handle.id, None)
        self._handles.clear()
        self._stack.clear()
        self._paths.clear()

    @property
    def innermost(self) -> Frame:
        """The innermost running module."""
        return self._stack[-1]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != self._thread:
            return None
        with torch._C.DisableTorchFunction():  # the hooks run under the mode
            self._check_hooked(module, args)
            around = self._stack[-1]
            path = self._paths.get(module, type(module).__name__)
            found = self._scope.table_of(module)
            root, table = (path, found) if found is not None else (around.root, around.table)
            alone = self._scope.rule_of_layer(module)
            frame = Frame(
                module,
                path,
                root,
                table,
                self._scope.rule_of_module(module) or around.rule,
                alone,
                is_whole=around.is_whole or alone is not None,
                from_outside=around.from_outside if around.is_whole else [],
            )
            if alone is None or around.is_whole:
                self._stack.append(frame)
                return None
            held = [(tensor, version(tensor)) for tensor in state_of(module)]
            try:
                as_it_was = with_state(module)
            except Exception:  # the module cannot be copied; its rule may not need a copy
                as_it_was = module
            self._stack.append(frame._replace(inputs=args, held=held, as_it_was=as_it_was))
            # Clone the inputs, because the module may modify them in place.
            result: tuple[Any, ...] = map_instances(
                Tensor, lambda t: t.detach().clone() if carries_relevance(t) else t, args
            )
            return result

    def _check_hooked(self, module: nn.Module, value: Any) -> None:
        """Check that samples are aligned if the module has backward hooks. PyTorch then copies the tensors,
        and the copies lose their marks."""
        if module._backward_hooks or module._backward_pre_hooks or hooks_all_modules():
            for tensor in tensors_in(value):
                if carries_relevance(tensor):
                    check_aligned(tensor, self._batch_size)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        # After an exception, PyTorch calls hooks without keyword arguments.
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)
        if threading.get_ident() != self._thread or len(self._stack) < 2:
            return None
        # The output is None if an exception was raised.
        if output is not None:
            with torch._C.DisableTorchFunction():
                self._check_hooked(module, output)
                if not self.innermost.is_whole:
                    self._recorder.check_visible(output)
        frame = self._stack.pop()
        if frame.layer_rule is None or output is None or frame.inputs is None:
            return None
        with torch._C.DisableTorchFunction():
            given = [
                t for t in instances_in(Tensor, (frame.inputs, kwargs)) if carries_relevance(t)
            ]
            if any(not any(t is known for known in given) for t in frame.from_outside):
                raise UnsupportedCallError(
                    f"Expected `{frame.path}`, which has the rule {frame.layer_rule} for the "
                    f"whole layer, to depend on the explained inputs only through its arguments, but got a "
                    f"layer that uses another such tensor. Pass that tensor as an argument."
                )
            return (
                self._recorder.record_layer(frame._replace(kwargs=kwargs), output)
                if given
                else None
            )


def run_inside_layer(
    frame: Frame,
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    in_place: bool,
) -> Any:
    """Run a call inside a layer that is recorded as one call."""
    if name in CONSTANT or getattr(func, "__name__", "") == "__get__":
        return untracked(func, args, kwargs)
    from_outside = [t for t in tensors_in((args, kwargs)) if comes_from_outside(t)]
    frame.from_outside.extend(from_outside)
    if from_outside and (in_place or has_in_place_argument(func, args, kwargs)):
        target = args[0] if args else kwargs.get("input")
        if any(target is tensor for tensor in from_outside):
            raise UnsupportedCallError(
                f"Expected a layer with one rule not to modify its keyword arguments, but got one in {frame} "
                f"that is modified in place. Pass it by position, or replace the in-place call."
            )
    return untracked(func, args, kwargs)
