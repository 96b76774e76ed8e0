"""Graphs of ATen operators: what they compute of constants alone is computed once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from captum_abslrp.engine.saved import storage_of

__all__ = ["simplify"]

LARGEST = 2**16
"""Elements of a constant that is kept, at most; what is larger is made again in every run."""


def simplify(module: GraphModule, live: Collection[int] = ()) -> None:
    """Leave out what does nothing, and compute constants once; in place.

    The values that the graph returns stay what they are, bit by bit.

    Args:
        module: a graph of ATen operators whose tensors are placeholders and attributes.
        live: memory of attributes that may change, by :func:`~captum_abslrp.engine.saved.storage_of`.
    """
    graph = module.graph
    for node in graph.nodes:
        if node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    values: dict[Node, Any] = {}
    changing = _changed(module)
    for node in graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(module)
            if storage_of(value) not in live:
                values[node] = value
        elif _is_constant(node, values) and node not in changing:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    count = 0
    for node, value in values.items():
        if node.op == "get_attr" or not _is_kept(node, value, values):
            continue
        name = f"constant_{count}"
        count += 1
        module.register_buffer(name, value, persistent=True)
        with graph.inserting_before(node):
            kept = graph.get_attr(name)
        node.replace_all_uses_with(kept)
    graph.eliminate_dead_code()
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


_ATEN = torch.ops.aten
_NOTHING = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh_copy.default)
"""Operators that return what they get where there is no history and nothing is overwritten."""


def _is_constant(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a node computes the same in every run, from what is computed already."""
    if node.op != "call_function" or any(n not in values for n in node.all_input_nodes):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    random = torch.Tag.nondeterministic_seeded in tags or "empty" in str(node.target)
    size = node.meta.get("val")
    large = isinstance(size, Tensor) and size.numel() > LARGEST
    return not random and not large and not node.target._schema.is_mutable


def _is_kept(node: Node, value: Any, values: dict[Node, Any]) -> bool:
    """Whether a constant is asked for by what is none."""
    return (
        isinstance(value, Tensor)
        and value.numel() <= LARGEST
        and any(user not in values for user in node.users)
    )


def _changed(module: GraphModule) -> set[Node]:
    """The nodes whose memory an operator overwrites, by whatever name."""
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while node in parent:
            node = parent[node]
        return node

    overwritten = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        for of, changes in _aliases(node):
            if changes:
                overwritten.append(of)
            if root(of) is not root(node):
                parent[root(node)] = root(of)
    roots = set(map(root, overwritten))
    return {node for node in module.graph.nodes if root(node) in roots}


def _aliases(node: Node) -> Iterator[tuple[Node, bool]]:
    """The arguments that the result of a node may share memory with, and whether they are overwritten."""
    if node.target is operator.getitem:
        yield node.args[0], False  # type: ignore[misc]  # of a tuple
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        for input in node.all_input_nodes:
            yield input, True
        return
    for position, argument in enumerate(node.target._schema.arguments):
        info = argument.alias_info
        if info is None:
            continue
        given = node.kwargs.get(argument.name)
        if given is None and position < len(node.args):
            given = node.args[position]
        for one in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(one, Node):
                yield one, info.is_write
