"""Tracking of detached values (``detach()``, ``no_grad()``) that the output depends on."""

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
    """Tracks detached values through one forward pass."""

    def __init__(self) -> None:
        self._paths: dict[Any, str] = {}

    def clear(self) -> None:
        """Remove all entries at the end of the forward pass."""
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
        """Return the place where an argument of a call was detached, or where this call detaches it.

        Args:
            name: canonical name of the call.
            args: its positional arguments.
            tensors: all tensors among its arguments.
            place: the place of the call; ``str(place)`` is its path.
            reflected: whether the positional arguments are in reverse order.
        """
        if name == "div":  # a divisor is always a constant
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
        """Mark the result of a call as dependent on a value that was detached at a place."""
        if name in CONSTANT - {"detach"}:
            return
        for tensor in tensors_in(result):
            if carries_relevance(tensor):
                self._paths[tensor.grad_fn] = path
            elif tensor.is_floating_point() or tensor.is_complex():
                setattr(tensor, _DETACHED, path)

    def reaching(self, output: Tensor) -> list[str]:
        """The places where values that the output depends on were detached."""
        found: dict[str, None] = {}
        for node in history(output.grad_fn) if self._paths else ():
            if node in self._paths:
                found[self._paths[node]] = None
        return list(found)


_DETACHED = "_abslrp_detached"
"""Mark of a detached tensor that depends on the inputs: the place where it was detached."""
