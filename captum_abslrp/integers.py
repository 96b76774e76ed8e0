"""Integer inputs: which tensors of a layer are explained where the inputs are token indices.

Integers have no relevance, so it ends at the tensors of the explained layer: an embedding, or a layer
behind one. A layer gets and returns other floating-point tensors as well (masks, the sines and cosines of
rotary positions, position tables), which are constants of the explanation. What a tensor was made from tells
them apart: it is explained if it depends on the inputs and on parameters of the model.

Axes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_abslrp.alignment import check_aligned, check_apart, copy_order, follow
from captum_abslrp.calls import PASS_THROUGH, canonical_name, tensors_in
from captum_abslrp.interception import carries_relevance

__all__ = ["IntegerInputs"]


class IntegerInputs(TorchFunctionMode):
    """Context that marks what a forward pass makes of integer inputs, until relevance starts.

    It is entered around an :class:`~captum_abslrp.interception.Interception`, which follows what depends on
    floating-point inputs by its history.

    Args:
        inputs: the inputs of the model, (B, ...), integers and others.

    Raises:
        Misaligned: inside of it, if a call needs the samples of the inputs in the leading dimension, and they
            are not there.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.batch_size = len(inputs[0])
        for tensor in inputs:
            if not tensor.is_floating_point():
                setattr(tensor, _FROM_INPUTS, True)

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
        inputs = [t for t in given if _is_from_inputs(t)]
        if not made or name.endswith("_like") or name.startswith("new_"):
            return result
        if inputs and self.batch_size > 1:
            self._check_order(name, func, args, kwargs, result, inputs)
        learned = name.startswith("embedding") or any(map(_is_learned, given))
        for tensor in made:
            if inputs:
                setattr(tensor, _FROM_INPUTS, True)
            if learned:
                setattr(tensor, _LEARNED, True)
        return result

    def _check_order(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        inputs: Sequence[Tensor],
    ) -> None:
        """Follow where samples are, as an interception does for floating-point tensors."""
        if name in PASS_THROUGH:
            given = (_floating(args[0]), *args[1:]) if args else args
            follow(name, func, given, kwargs, result, self.batch_size, inputs)
            return
        for tensor in inputs:
            check_aligned(tensor, self.batch_size)
        check_apart(name, args, kwargs, self.batch_size, is_source=_is_from_inputs)


def starting(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a layer that become inputs of the explanation, because the inputs are integers.

    Args:
        tensors: all that a call of the layer gets or returns.

    Returns:
        Those that depend on the inputs and on parameters, but carry no relevance yet. Where none of its
        tensors does (a table of positions, say), all floating-point ones.
    """
    constant = [t for t in tensors if t.is_floating_point() and not carries_relevance(t)]
    found = [t for t in constant if _is_from_inputs(t) and _is_learned(t)]
    return found if found or any(map(carries_relevance, tensors)) else constant


def new_leaf(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the values of a tensor, and what is handed on instead of the tensor."""
    with torch._C.DisableTorchFunction():  # calls on parameters and leaves are run without history
        leaf = tensor.detach().clone().requires_grad_()
        handed_on = leaf.clone()
    for copied in (leaf, handed_on):
        copy_order(tensor, copied)
    return leaf, handed_on


def _is_from_inputs(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, _FROM_INPUTS)


def _is_learned(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or hasattr(tensor, _LEARNED)


def _floating(value: Any) -> Any:
    """Floating-point tensors in place of those from the inputs, whose integers would count as indices."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_floating, value))
    if not _is_from_inputs(value):
        return value
    stand_in = torch.zeros((), device="cpu").expand(value.shape)
    copy_order(value, stand_in)
    return stand_in


_FROM_INPUTS = "_abslrp_from_inputs"
"""Mark of a tensor that depends on integer inputs."""
_LEARNED = "_abslrp_learned"
"""Mark of a tensor that depends on parameters."""
_SHAPED_AS = frozenset("expand_as reshape_as to type_as view_as".split())
