"""Tracking of tensors that depend on the explained inputs, and detection of calls that were not recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from captum_abslrp.engine.arguments import tensors_in


class Dependence:
    """Tracks which nodes of the autograd graph depend on the explained inputs, during one forward pass.

    Args:
        inputs: the explained tensors, which require gradients.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._known: dict[Any, bool] = {}
        self._seen: set[Any] = set()
        for tensor in inputs:
            self.add_input(tensor)

    def start(self) -> None:
        """Determine the result of :func:`carries_relevance` in this thread, until :meth:`stop`."""
        _running().append(self)

    def stop(self) -> None:
        """Restore the previous instance in this thread, and release the graph."""
        _running().remove(self)
        self._known.clear()
        self._seen.clear()

    def add_input(self, tensor: Tensor) -> None:
        """Add an explained tensor, which requires gradients."""
        node = torch.autograd.graph.get_gradient_edge(tensor).node
        self._known[node] = True
        self._seen.add(node)

    def mark_seen(self, value: Any) -> None:
        """Mark the nodes in the history of tensors as recorded."""
        for tensor in tensors_in(value):
            self._seen.update(self._unseen_behind(tensor))

    def unseen(self, tensor: Tensor, *, is_overwritten: bool) -> Iterator[Any]:
        """The nodes in the history of a tensor that depend on the inputs, but were not recorded.

        Autograd creates a new node for a view if the memory of the view ``is_overwritten``. PyTorch modes do
        not intercept ``as_subclass`` and ``z.real = x``, which move elements.
        """
        moves = ("AliasBackward0", "CopySlices") if tensor.is_complex() else ("AliasBackward0",)
        nodes = self._unseen_behind(tensor)[is_overwritten and tensor._is_view() :]
        return (node for node in nodes if self(node) and type(node).__name__ not in moves)

    def _unseen_behind(self, tensor: Tensor) -> list[Any]:
        """The nodes in the history of a tensor before the marked nodes, starting with its own node."""
        found = dict.fromkeys([tensor.grad_fn] if tensor.grad_fn not in self._seen else [])
        stack = list(found)
        while stack:
            node = stack.pop()
            for before, _ in () if node is None else node.next_functions:
                if before not in self._seen and before not in found:
                    found[before] = None
                    stack.append(before)
        return [node for node in found if node is not None]

    def __call__(self, node: Any) -> bool:
        """Whether a node depends on one of the explained inputs."""
        known = self._known
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


def carries_relevance(tensor: Tensor) -> bool:
    """Whether a tensor depends on the explained inputs of the running forward pass.

    Autograd history is not sufficient: constants can have history as well, such as text features that were
    computed with gradients, or a slice of a parameter.
    """
    if not tensor.requires_grad or tensor.is_leaf:
        return False
    running = _running()
    return not running or running[-1](tensor.grad_fn)


def is_source(value: Any) -> bool:
    """Whether an argument of a call is a tensor that carries relevance."""
    return isinstance(value, Tensor) and carries_relevance(value)


def untracked(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call that carries no relevance, without autograd history."""
    if not any(t.requires_grad for t in tensors_in((args, kwargs))):
        return func(*args, **kwargs)
    with torch.no_grad():
        return func(*args, **kwargs)


def add_input(tensor: Tensor) -> None:
    """Add an explained tensor to the running forward pass, see :meth:`Dependence.add_input`."""
    _running()[-1].add_input(tensor)


def mark_seen(tensor: Tensor) -> None:
    """Mark the history of a tensor as recorded in the running pass, see :meth:`Dependence.mark_seen`."""
    _running()[-1].mark_seen(tensor)


_LOCAL = threading.local()


def _running() -> list[Dependence]:
    """The active instances in this thread, the innermost last."""
    try:
        return cast("list[Dependence]", _LOCAL.running)
    except AttributeError:
        _LOCAL.running = []
        return cast("list[Dependence]", _LOCAL.running)
