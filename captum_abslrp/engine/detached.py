"""Values that leave the history (``detach()``, ``no_grad()``) and reach the output all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from captum_abslrp.engine.arguments import tensors_in
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.names import CONSTANT
from captum_abslrp.engine.nodes import history


class DetachedParts:
    """Follows detached values through one forward pass."""

    def __init__(self) -> None:
        self._paths: dict[Any, str] = {}

    def clear(self) -> None:
        """Forget everything, at the end of the forward pass."""
        self._paths.clear()

    def path_before(
        self,
        name: str,
        args: tuple[Any, ...],
        tensors: Sequence[Tensor],
        place: object,
        *,
        reflected: bool,
    ) -> str | None:
        """The place where a value left the history that a call reads, or that leaves it by this call.

        Args:
            name: canonical name of the call.
            args: its positional arguments.
            tensors: all tensors among its arguments.
            place: where the call is; ``str(place)`` is its path.
            reflected: whether the positional arguments are in reverse order.
        """
        if name == "div":  # a divisor is a constant in any case
            tensors = tensors_in(args[1:] if reflected else args[:1])
        for tensor in tensors:
            path = getattr(tensor, _DETACHED, None)
            if path is not None and not carries_relevance(tensor):
                return cast(str, path)
        hidden = name in ("detach", "data") or not torch.is_grad_enabled()
        if hidden and any(map(carries_relevance, tensors)):
            return str(place)
        return None

    def follow(self, name: str, path: str, result: Any) -> None:
        """Note that the result of a call depends on a value that left the history at a place."""
        if name in CONSTANT - {"detach"}:
            return
        for tensor in tensors_in(result):
            if carries_relevance(tensor):
                self._paths[tensor.grad_fn] = path
            elif tensor.is_floating_point() or tensor.is_complex():
                setattr(tensor, _DETACHED, path)

    def reaching(self, output: Tensor) -> list[str]:
        """The places where values left the history that reach the output."""
        found: dict[str, None] = {}
        for node in history(output.grad_fn) if self._paths else ():
            if node in self._paths:
                found[self._paths[node]] = None
        return list(found)


_DETACHED = "_abslrp_detached"
"""Mark of a tensor that depends on the inputs by value only: where it left the history."""
