"""Capture of the inputs or outputs of layers in a forward pass, with hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_abslrp.engine.arguments import instances_in, map_instances, tensors_in
from captum_abslrp.engine.dependence import carries_relevance, mark_seen
from captum_abslrp.engine.samples import copy_samples
from captum_abslrp.engine.saved import hide_layer
from captum_abslrp.engine.state import own_hooks
from captum_abslrp.integers import IntegerInputs, new_leaf
from captum_abslrp.rules.captum import rule_of_layer

__all__ = ["captured"]


@contextmanager
def captured(
    layers: Sequence[nn.Module],
    *,
    of_input: bool,
    integers: IntegerInputs | None,
    goes_on: bool = False,
) -> Iterator[list[list[list[Tensor]]]]:
    """Capture the tensors of the calls of each layer; arguments as in :func:`_captured_of`."""
    with ExitStack() as stack:
        of_layer = {
            layer: stack.enter_context(
                _captured_of(layer, of_input=of_input, integers=integers, goes_on=goes_on)
            )
            for layer in dict.fromkeys(layers)
        }
        yield [of_layer[layer] for layer in layers]


@contextmanager
def _captured_of(
    layer: nn.Module, *, of_input: bool, integers: IntegerInputs | None, goes_on: bool
) -> Iterator[list[list[Tensor]]]:
    """Capture the tensors with relevance that each call of the layer in this thread returns or receives.

    With `goes_on`, relevance continues to the inputs, and a rule that would fold a later call into the layer
    raises an error.

    The captured tensor is a clone, and the model continues with another clone. The captured tensor is thus
    never modified in place, and its gradient is that of this position only. With integer inputs, it is a
    leaf, unless its tensor already carries relevance.

    If the layer has modified a tensor in place, the model continues with this tensor and the history of the
    clone, because the model or the hooks of an outer layer may hold the tensor or modify it again.
    """
    calls: list[list[Tensor]] = []
    running: list[list[tuple[Tensor, Tensor, int]]] = []
    thread = threading.get_ident()

    def capture(
        value: Any, copied: Callable[[Tensor], Tensor] = torch.clone
    ) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """Return the value with clones instead of tensors, and pairs of a tensor and its clone."""
        captured: list[Tensor] = []
        clones: dict[int, tuple[Tensor, Tensor]] = {}
        starts: set[int] = set()
        if integers is not None:
            starts = set(map(id, integers.starting(instances_in(Tensor, value))))

        def clone(tensor: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return tensor
            if id(tensor) not in clones:  # attention compares query and key by identity
                if id(tensor) in starts:
                    found, going_on = new_leaf(tensor)
                else:
                    found = copied(tensor)
                    if not carries_relevance(found):  # a constant, or inside a single call
                        return tensor
                    going_on = copied(found)
                    if goes_on:
                        hide_layer(tensor, going_on)
                captured.append(found)
                clones[id(tensor)] = tensor, going_on
            return clones[id(tensor)][1]

        value = map_instances(Tensor, clone, value)
        calls.append(captured)
        return value, list(clones.values())

    # While a hook is being removed, another thread may call it without keyword arguments.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if module is not layer or threading.get_ident() != thread:
            return None
        given: Any = args if kwargs is None else (args, kwargs)
        if of_input:
            given, seen = capture(given)
        else:
            seen = [(tensor, tensor) for tensor in tensors_in(given) if not tensor.is_inference()]
        running.append([(tensor, clone, clone._version) for tensor, clone in seen])
        return given

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        changed = [(t, clone) for t, clone, version in running.pop() if clone._version != version]
        if not of_input:
            output, clones = capture(output)
            changed = [(t, clone) for t, clone in clones if any(t is own for own, _ in changed)]
        for tensor, clone in changed:  # apply the in-place changes to the original input
            tensor.copy_(clone)
        originals = {id(clone): tensor for tensor, clone in changed}
        return map_instances(Tensor, lambda tensor: originals.get(id(tensor), tensor), output)

    def before_with_keywords(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        if threading.get_ident() != thread:
            return None
        # Calls from here on belong to the layer and are not recorded.
        kwargs, seen = capture(kwargs, _clone_unseen)
        calls[-2:] = [calls[-2] + calls[-1]]
        running[-1] += [(tensor, clone, clone._version) for tensor, clone in seen]
        return args, kwargs

    def register() -> Iterator[Any]:
        yield layer.register_forward_hook(after)
        if of_input and rule_of_layer(layer) is not None:
            # The hooks of the recording, which run before those of the layer, detach its positional
            # inputs.
            yield register_module_forward_pre_hook(before)
            yield layer.register_forward_pre_hook(before_with_keywords, with_kwargs=True)
        else:
            yield layer.register_forward_pre_hook(before, with_kwargs=True)

    with own_hooks(register):
        yield calls


def _clone_unseen(tensor: Tensor) -> Tensor:
    """Clone a tensor without recording the call."""
    with torch._C.DisableTorchFunction():
        clone = tensor.clone()
        mark_seen(clone)
    return copy_samples(tensor, clone)
