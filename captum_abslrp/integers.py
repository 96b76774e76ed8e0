"""Integer inputs: selection of the tensors of a layer to explain if the inputs are token indices.

Integers cannot have relevance, so relevance ends at the tensors of the explained layer: an embedding, or a
layer after one. A layer also receives and returns other floating-point tensors, such as masks, the sines
and cosines of rotary positions, or position embeddings, which are constants of the explanation. A tensor is
explained if it depends on both the inputs and parameters of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from captum_abslrp.engine.arguments import tensors_in
from captum_abslrp.engine.dependence import add_input, carries_relevance, mark_seen
from captum_abslrp.engine.names import canonical_name

__all__ = ["IntegerInputs", "new_leaf"]


class IntegerInputs(TorchFunctionMode):
    """Context that tracks the tensors that depend on integer inputs, before relevance starts.

    It is entered around an :class:`~captum_abslrp.engine.recording.Recording`, which tracks dependence on
    floating-point inputs by autograd history.

    Args:
        inputs: the inputs of the model, integers and others.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        # Not attributes of the tensors, because some of them belong to the model.
        self._from_inputs = WeakTensorKeyDictionary()
        self._learned = WeakTensorKeyDictionary()
        for tensor in inputs:
            if not tensor.is_floating_point():
                self._from_inputs[tensor] = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        if not given or any(map(carries_relevance, given)):
            return result
        name, _, _ = canonical_name(func)
        made = [args[0]] if name == "__setitem__" else tensors_in(result)
        if name in _SHAPED_AS:  # only the shape or dtype of the other argument is used
            given = tensors_in(args[:1])
        if name.endswith("_like") or name.startswith("new_"):
            return result
        from_inputs = any(tensor in self._from_inputs for tensor in given)
        learned = name.startswith("embedding") or any(map(self._is_learned, given))
        for tensor in made:
            if from_inputs:
                self._from_inputs[tensor] = True
            if learned:
                self._learned[tensor] = True
        return result

    def _is_learned(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or tensor in self._learned

    def starting(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of a layer at which relevance ends.

        Args:
            tensors: all tensors that a call of the layer receives or returns.

        Returns:
            The tensors that depend on the inputs and on parameters, but do not carry relevance yet. If there
            are none (for example for a position embedding), all floating-point tensors.
        """
        constant = [t for t in tensors if t.is_floating_point() and not carries_relevance(t)]
        found = [t for t in constant if t in self._from_inputs and self._is_learned(t)]
        return found if found or any(map(carries_relevance, tensors)) else constant


def new_leaf(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a leaf with the values of a tensor, and a clone of the leaf that replaces the tensor.

    Samples are assumed to be in the leading dimension. If they are in another dimension, the model moves
    them back later. The recording detects this, and the samples are then run one at a time.
    """
    with torch._C.DisableTorchFunction():  # recorded calls on leaves would have no autograd history
        leaf = tensor.detach().clone().requires_grad_()
        add_input(leaf)
        going_on = leaf.clone()
        mark_seen(going_on)
        return leaf, going_on


_SHAPED_AS = frozenset("expand_as reshape_as to type_as view_as".split())
