"""Constant folding for graphs of ATen operators."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from captum_abslrp.engine.arguments import instances_in
from captum_abslrp.engine.saved import storage_of

__all__ = ["simplify"]

LARGEST = 2**16
"""Maximum number of elements of a folded constant; larger constants are recomputed in every run."""


def simplify(module: GraphModule, live: Collection[int] = ()) -> None:
    """Remove operators without effect and fold constants, in place; equal constants share memory.

    The values that the graph returns stay identical, bit by bit.

    Args:
        module: a graph of ATen operators whose tensors are placeholders and attributes.
        live: memory of attributes that may change, from :func:`~captum_abslrp.engine.saved.storage_of`.
    """
    graph = module.graph
    for node in graph.nodes:
        if node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    changing: set[Node] = set()
    while True:  # a node that depends on overwritten memory is not a constant
        values = _constants(module, live, changing)
        found = _overwritten(graph, values)
        if not found:
            break
        changing |= found
    names: dict[Any, str] = {}
    for node, value in values.items():
        if node.op == "get_attr" or not _is_kept(node, value, values):
            continue
        content = _content(value)
        if content not in names:
            free = (f"constant_{i}" for i in itertools.count(len(names)))
            names[content] = next(name for name in free if not hasattr(module, name))
            module.register_buffer(names[content], value, persistent=True)
        name = names[content]
        with graph.inserting_before(node):
            kept = graph.get_attr(name)
        node.replace_all_uses_with(kept)
    graph.eliminate_dead_code()
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


_NOTHING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""Operators that return their argument unchanged, apart from autograd history."""


def _constants(
    module: GraphModule, live: Collection[int], changing: Collection[Node]
) -> dict[Node, Any]:
    """The values of all constant nodes."""
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(module)
            known = storage_of(value) not in live
        elif known := _is_constant(node, values):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*args, **kwargs)
        if known and node not in changing:
            values[node] = value
    return values


def _is_constant(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a node is constant, given the constant nodes before it."""
    if node.op != "call_function" or any(n not in values for n in node.all_input_nodes):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags or node.target in _UNDEFINED
    is_view = any(argument.alias_info for argument in node.target._schema.arguments)
    made = node.meta.get("val")
    large = isinstance(made, Tensor) and made.numel() > LARGEST and not is_view
    return not (random or large or node.target._schema.is_mutable)


_ATEN = torch.ops.aten
_UNDEFINED = (
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
)
"""Operators with uninitialized results."""


def _is_kept(node: Node, value: Any, values: dict[Node, Any]) -> bool:
    """Whether a constant is used by a node that is not constant."""
    return (
        isinstance(value, Tensor)
        and value.numel() <= LARGEST
        and any(user not in values for user in node.users)
    )


def _content(value: Tensor) -> tuple[Any, ...]:
    """What equal constants have in common."""
    content = value.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
    return value.shape, value.stride(), value.dtype, value.device, content


def _overwritten(graph: Graph, values: dict[Node, Any]) -> set[Node]:
    """The constants whose memory an operator overwrites, directly or through another tensor."""
    written = set()
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            for position, argument in enumerate(node.target._schema.arguments):
                if argument.is_write:
                    of = node.args[position : position + 1] or node.kwargs.get(argument.name)
                    written |= _memory_of([values.get(n) for n in instances_in(Node, of)])
        elif not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
            written |= _memory_of([values.get(n) for n in node.all_input_nodes])  # may write
    return {node for node, value in values.items() if _memory_of(value) & written}


def _memory_of(value: Any) -> set[int]:
    return set(map(storage_of, instances_in(Tensor, value)))
