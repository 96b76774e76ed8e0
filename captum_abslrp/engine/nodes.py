"""Nodes of the autograd graph that run a recorded step, and checks of the kind of a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as _module
from torch.nn.modules._functions import BackwardHookFunction

from captum_abslrp.engine import numerics
from captum_abslrp.engine.steps import Step


class Node(torch.autograd.Function):
    """A node of the autograd graph whose backward function is a step."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, position: int | None, output: list[Tensor], *inputs: Tensor
    ) -> Tensor:
        """`position` is the index of the source that the call has modified in place, or None."""
        ctx.step = step
        ctx.set_materialize_grads(False)
        if position is not None:
            ctx.mark_dirty(inputs[position])
            return inputs[position]
        # Passed in a list, because autograd treats an argument that is returned as a view, which later
        # in-place calls of the model could not modify.
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Run a single seed; autograd only calls it under Captum's ``LRP``."""
        (s,) = grad_outputs
        if s is None:
            return None, None, None, *[None] * len(ctx.step.layouts)
        with torch.autocast(s.device.type, enabled=False):
            shares = [share for (share,) in ctx.step([s])[0]]
        return None, None, None, *shares


class ModuleInput(torch.autograd.Function):
    """The input of a module under Captum's ``LRP``; converts relevance per magnitude to relevance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *s: Tensor) -> Tensor:
        return numerics.relevance(*ctx.saved_tensors, *s)


class ModuleOutput(torch.autograd.Function):
    """The output of a module under Captum's ``LRP``; converts relevance to relevance per magnitude."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clone()  # the clone may be modified in place

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> Tensor:
        return numerics.divide(*relevance, *ctx.saved_tensors)


def is_recorded(node: Any) -> bool:
    """Whether a node of the autograd graph belongs to a call that a rule has recorded."""
    return isinstance(node, _OWN_NODES[0])


# The metaclass adds the classes of the nodes as an attribute.
_OWN_NODES = tuple(f._backward_cls for f in (Node, ModuleInput, ModuleOutput))  # type: ignore[attr-defined]  # private


def is_own(node: Any) -> bool:
    """Whether a node of the autograd graph is one of the classes in this module."""
    return isinstance(node, _OWN_NODES)


def is_hook(node: Any) -> bool:
    """Whether a node is the identity that PyTorch adds to a module with backward hooks."""
    return isinstance(node, BackwardHookFunction._backward_cls)  # type: ignore[attr-defined]  # private


def hooks_all_modules() -> bool:
    """Whether backward hooks are registered for all modules of the process."""
    return bool(_module._global_backward_hooks or _module._global_backward_pre_hooks)


def history(last: Any) -> Iterator[Any]:
    """Yield a node of the autograd graph and all nodes that it depends on, in no particular order."""
    seen = set()
    stack = [last]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(before for before, _ in node.next_functions)
