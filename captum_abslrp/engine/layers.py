"""Layers that are recorded as one call, without their inner calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from captum_abslrp.engine.arguments import instances_in, map_instances, tensors_in
from captum_abslrp.engine.complex import as_parts
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.messages import warn
from captum_abslrp.engine.nodes import is_own


def with_state(layer: nn.Module, *, own_weights: bool = False) -> nn.Module:
    """Copy a layer with its current state, and with the same weights or copies of them."""
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in state_of(layer)}
    if not own_weights:
        memo |= {id(parameter): parameter for parameter in layer.parameters()}
    return copy.deepcopy(layer, memo)


def state_of(layer: nn.Module) -> list[Tensor]:
    """The tensors of a layer other than weights: buffers, and tensors from a forward pass."""
    return [
        tensor
        for module in layer.modules()
        for tensor in instances_in(Tensor, list(vars(module).values()))
        if not isinstance(tensor, nn.Parameter)
    ]


def version(tensor: Tensor) -> int:
    """The number of in-place changes of a tensor; PyTorch does not count them in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def with_magnitudes(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a layer with the magnitudes of its parameters."""
    twin = with_state(layer, own_weights=True)
    for parameter in twin.parameters():
        as_parts(parameter.data).abs_()
    return _forward(twin, args, kwargs)


def from_its_state(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a layer without modifying its state."""
    return _forward(with_state(layer), args, kwargs)


def _forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a layer on clones of its arguments, because it may modify them in place."""
    args, kwargs = map_instances(Tensor, torch.clone, (args, kwargs))
    return layer.forward(*args, **kwargs)


def comes_from_outside(tensor: Tensor) -> bool:
    """Whether a tensor carries relevance into a layer that is recorded as one call."""
    node = tensor.grad_fn
    of_the_layer = isinstance(node, BackwardCFunction) and not is_own(node)
    return carries_relevance(tensor) and not of_the_layer


class LeftStates:
    """State tensors of layers that are recorded as one call; later calls that use them cause a warning."""

    def __init__(self) -> None:
        self._states: list[tuple[Tensor, str]] = []

    def clear(self) -> None:
        """Remove all entries at the end of the forward pass."""
        self._states.clear()

    def note(self, layer: nn.Module, path: str, held: Sequence[tuple[Tensor, int]]) -> None:
        """Add the state tensors that a layer has modified.

        Args:
            layer: the layer, after its call.
            path: path of the layer in the model.
            held: its state tensors before the call, and their versions.
        """
        now = [t for t in state_of(layer) if t.is_floating_point()]
        self._states = [(t, p) for t, p in self._states if p != path]
        self._states += [
            (t, path)
            for t in now
            if not any(t is before and version(t) == count for before, count in held)
        ]

    def check_unused(self, value: Any) -> None:
        """Warn if a call uses such a tensor."""
        if not self._states:
            return
        tensors = tensors_in(value)
        paths = {path for state, path in self._states if any(state is t for t in tensors)}
        for path in paths:
            self._states = [(t, p) for t, p in self._states if p != path]
            warn(
                f"Expected `{path}`, which has one rule for the whole layer, to return all tensors that "
                f"depend on its input, but got a layer whose state is used in a later call. If the state "
                f"depends on the input, its relevance is lost. Make the layer take its state as an argument "
                f"and return it."
            )
