"""The tensors that a layer gets or returns in a forward pass, captured by hooks."""

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
    """Capture the tensors of the calls of each layer; arguments as for :func:`_captured_of`."""
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
    """Capture the tensors with relevance that each call of the layer in this thread returns or gets.

    Where relevance goes on behind the layer, a rule that would fold a later call into it raises.

    What is captured is a clone, and the model goes on with another clone, so that nothing changes it in
    place and its gradient is that of this place alone. Where inputs are integers, it is a leaf unless its
    tensor carries relevance already.

    Where the layer has changed a tensor in place, the model goes on with this tensor, with the history of the
    clone: it may hold the tensor elsewhere, or change it again, and so may the hooks of a layer around.
    """
    calls: list[list[Tensor]] = []
    running: list[list[tuple[Tensor, Tensor, int]]] = []
    thread = threading.get_ident()

    def capture(
        value: Any, copied: Callable[[Tensor], Tensor] = torch.clone
    ) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """The value with clones to go on with, and pairs of a tensor and its clone."""
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
                    if not carries_relevance(found):  # a constant, or inside of one call
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

    # While it is being removed, a hook may be called by another thread, without keyword arguments.
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
        for tensor, clone in changed:  # all who read the input see what the layer did to it
            tensor.copy_(clone)
        originals = {id(clone): tensor for tensor, clone in changed}
        return map_instances(Tensor, lambda tensor: originals.get(id(tensor), tensor), output)

    def before_with_keywords(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        if threading.get_ident() != thread:
            return None
        # The calls of the layer itself are not looked at any more.
        kwargs, seen = capture(kwargs, _clone_unseen)
        calls[-2:] = [calls[-2] + calls[-1]]
        running[-1] += [(tensor, clone, clone._version) for tensor, clone in seen]
        return args, kwargs

    def register() -> Iterator[Any]:
        yield layer.register_forward_hook(after)
        if of_input and rule_of_layer(layer) is not None:
            # The hooks of the recording, which come before those of the layer, cut its positional
            # inputs off.
            yield register_module_forward_pre_hook(before)
            yield layer.register_forward_pre_hook(before_with_keywords, with_kwargs=True)
        else:
            yield layer.register_forward_pre_hook(before, with_kwargs=True)

    with own_hooks(register):
        yield calls


def _clone_unseen(tensor: Tensor) -> Tensor:
    """A clone that the recording does not see."""
    with torch._C.DisableTorchFunction():
        clone = tensor.clone()
        mark_seen(clone)
    return copy_samples(tensor, clone)
