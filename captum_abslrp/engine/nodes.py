"""Nodes of the autograd graph that run a recorded step, and functions that tell kinds of nodes apart."""

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
    """The node of the autograd graph whose backward is a step."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, position: int | None, output: list[Tensor], *inputs: Tensor
    ) -> Tensor:
        """Args: ``position`` of the source that the call has changed in place, if it has."""
        ctx.step = step
        ctx.set_materialize_grads(False)
        if position is not None:
            ctx.mark_dirty(inputs[position])
            return inputs[position]
        # Handed over in a list: autograd takes a tensor that is an argument and is returned for a
        # view of it, which later in-place calls of the model could then not change.
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """One seed, where autograd runs the graph: under Captum's ``LRP``."""
        (s,) = grad_outputs
        if s is None:
            return None, None, None, *[None] * len(ctx.step.layouts)
        with torch.autocast(s.device.type, enabled=False):
            shares = [share for (share,) in ctx.step([s])[0]]
        return None, None, None, *shares


class ModuleInput(torch.autograd.Function):
    """The input of a module under Captum's ``LRP``, which is given relevance by the rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *s: Tensor) -> Tensor:
        return numerics.relevance(*ctx.saved_tensors, *s)


class ModuleOutput(torch.autograd.Function):
    """The output of a module under Captum's ``LRP``, which gives relevance to the rule."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clone()  # which may be changed in place

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> Tensor:
        return numerics.divide(*relevance, *ctx.saved_tensors)


def is_recorded(node: Any) -> bool:
    """Whether a node of the autograd graph is a call that a rule has recorded."""
    return isinstance(node, _OWN_NODES[0])


# The classes of the nodes themselves are an attribute that the metaclass adds.
_OWN_NODES = tuple(f._backward_cls for f in (Node, ModuleInput, ModuleOutput))  # type: ignore[attr-defined]  # private


def is_own(node: Any) -> bool:
    """Whether a node of the autograd graph is one of this module."""
    return isinstance(node, _OWN_NODES)


def is_hook(node: Any) -> bool:
    """Whether a node is the identity that PyTorch puts around a module with backward hooks."""
    return isinstance(node, BackwardHookFunction._backward_cls)  # type: ignore[attr-defined]  # private


def hooks_all_modules() -> bool:
    """Whether backward hooks are registered for all modules of the process."""
    return bool(_module._global_backward_hooks or _module._global_backward_pre_hooks)


def history(last: Any) -> Iterator[Any]:
    """The nodes of the autograd graph that a node comes from, itself included, in no order."""
    seen = set()
    stack = [last]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(before for before, _ in node.next_functions)
