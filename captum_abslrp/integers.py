"""Integer inputs: which tensors of a layer are explained where the inputs are token indices.

Integers have no relevance, so relevance ends at the tensors of the explained layer: an embedding, or a
layer behind one. A layer gets and returns other floating-point tensors as well: masks, the sines and
cosines of rotary positions, tables of positions. Those are constants of the explanation. What a tensor was
made from distinguishes them: it is explained if it depends on the inputs and on parameters of the model.
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
    """Context that marks what a forward pass makes of integer inputs, until relevance starts.

    It is entered around an :class:`~captum_abslrp.engine.recording.Recording`, which follows what depends on
    floating-point inputs by its history.

    Args:
        inputs: the inputs of the model, integers and others.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        # Not attributes of the tensors, some of which are the model's own.
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
        if name in _SHAPED_AS:  # the other argument gives its shape or type alone
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
        """The tensors of a layer that become inputs of the explanation, because the inputs are integers.

        Args:
            tensors: all that a call of the layer gets or returns.

        Returns:
            Those that depend on the inputs and on parameters, but carry no relevance yet. Where none of
            its tensors does (a table of positions, say), all floating-point ones.
        """
        constant = [t for t in tensors if t.is_floating_point() and not carries_relevance(t)]
        found = [t for t in constant if t in self._from_inputs and self._is_learned(t)]
        return found if found or any(map(carries_relevance, tensors)) else constant


def new_leaf(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the values of a tensor, and a clone of it that takes the place of the tensor.

    Its samples count as those of its leading dimension. Where they are elsewhere, the model moves them back
    afterwards, which the recording sees as a move out of order: the samples are run one at a time then.
    """
    with torch._C.DisableTorchFunction():  # calls on parameters and leaves are run without history
        leaf = tensor.detach().clone().requires_grad_()
        add_input(leaf)
        going_on = leaf.clone()
        mark_seen(going_on)
        return leaf, going_on


_SHAPED_AS = frozenset("expand_as reshape_as to type_as view_as".split())
