"""Arguments and results of calls: nested tensors, dtype casts, and overwritten arguments."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_abslrp.engine.names import canonical_name

Kind = TypeVar("Kind")


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (tuple, list, dict)):
        _collect(value.values() if isinstance(value, dict) else value, found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def map_instances(kind: type[Kind], function: Callable[[Kind], Any], value: Any) -> Any:
    """Apply a function to the instances of a class, such as tensors, in arguments or results of a call.

    Containers are copied if any of their instances changes. Other containers are returned themselves,
    because a module may fill them later.

    Args:
        kind: the class.
        function: the function.
        value: an instance, or a nested container of instances: tuples, lists, dicts, dataclasses and
            containers that are registered with PyTorch.

    Example:
        >>> map_instances(int, lambda number: -number, {"a": (1, 2), "b": "c"})
        {'a': (-1, -2), 'b': 'c'}
    """
    if isinstance(value, kind):
        return function(value)
    items, spec = tree_flatten(value, is_leaf=lambda item: item is not value)
    if not (items and items[0] is value):
        mapped = [map_instances(kind, function, item) for item in items]
        same = all(map(operator.is_, mapped, items))
        return value if same else tree_unflatten(mapped, spec)
    copied = value  # an object, possibly a container that is not registered with PyTorch
    if isinstance(value, dict):
        fields, put = value, type(value).__setitem__
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        put = object.__setattr__  # works for frozen dataclasses as well
    else:
        return value
    for key, item in fields.items():
        new = map_instances(kind, function, item)
        if new is not item:
            copied = copy.copy(value) if copied is value else copied
            put(copied, key, new)
    return copied


def instances_in(kind: type[Kind], value: Any) -> list[Kind]:
    """Return the instances of a class in arguments or results, in the order of :func:`map_instances`.

    Example:
        >>> instances_in(int, {"a": (1, 2), "b": "c"})
        [1, 2]
    """
    found: list[Kind] = []

    def note(instance: Kind) -> Kind:
        found.append(instance)
        return instance

    map_instances(kind, note, value)
    return found


def on_host(condition: Tensor) -> bool | None:
    """Return the value of a condition if it is on the CPU, or None, to avoid synchronization."""
    return bool(condition.numpy()) if condition.device.type == "cpu" else None


def is_traced() -> bool:
    """Whether operators are traced, so that values must not affect control flow."""
    return bool(torch._C._len_torch_dispatch_stack() > 0)


def cast_constants(
    args: tuple[Any, ...], kwargs: dict[str, Any], is_source: Callable[[Tensor], bool]
) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """Cast the constants of an arithmetic call to the dtype of the call.

    Args:
        args, kwargs: the arguments.
        is_source: whether a tensor depends on the explained inputs. Such tensors are not cast.

    Returns:
        The arguments, and pairs of a constant and its cast version.

    Example:
        >>> h, mask = torch.ones(2, dtype=torch.float64), torch.tensor([True, False])
        >>> (_, factor), _, _ = cast_constants((h, mask), {}, lambda tensor: tensor is h)
        >>> factor
        tensor([1., 0.], dtype=torch.float64)
    """
    tensors = tensors_in((args, kwargs))
    numbers = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    # As in PyTorch, zero-dimensional tensors do not determine the dtype if there are others.
    deciding = [t.dtype for t in numbers if t.dim()] or [t.dtype for t in numbers]
    dtype = functools.reduce(torch.promote_types, deciding)
    cast: list[tuple[Tensor, Tensor]] = []

    def as_number(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == dtype or is_source(value):
            return value
        wanted = dtype if value.is_complex() or not dtype.is_complex else dtype.to_real()
        if value.layout != torch.strided or torch.promote_types(value.dtype, wanted) != wanted:
            return value
        cast.append((value, value.to(wanted)))
        return cast[-1][1]

    return tuple(map(as_number, args)), {k: as_number(v) for k, v in kwargs.items()}, cast


def as_differentiable(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[..., Any],
) -> tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return the name and the call, replaced by an equivalent differentiable call if necessary.

    A ``scatter`` that adds or multiplies becomes a ``scatter_reduce``. The source of these calls is cut to
    the size of the index.

    Args:
        name: canonical name of the call.
        func, args, kwargs: the call.
        run: runs a function on arguments such that its calls are recorded.
    """
    if name not in ("scatter", "scatter_add", "scatter_reduce"):
        return name, func, args, kwargs
    names = ("input", "dim", "index", "src", "reduce")
    given = {("input" if k == "self" else k): v for k, v in kwargs.items()}
    given = dict(zip(names, args)) | given
    source, index = given.get("src"), given["index"]
    if isinstance(source, Tensor) and source.dim() and source.shape != index.shape:
        given["src"] = run(operator.getitem, source, tuple(map(slice, index.shape)))
    if name == "scatter" and given.get("reduce") is not None:
        value = given.pop("value", given.get("src"))
        if not (isinstance(value, Tensor) and value.dim()):
            value = given["input"].new_full(index.shape, value)
        reduce = {"add": "sum", "multiply": "prod"}[given["reduce"]]
        given |= {"src": value, "reduce": reduce}
        return "scatter_reduce", torch.scatter_reduce, (given.pop("input"),), given
    if given.get("src") is source:
        return name, func, args, kwargs
    return name, func, (given.pop("input"),), given


@functools.lru_cache(maxsize=4096)
def _signature(func: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except (TypeError, ValueError):  # built-in functions have none
        return None


def has_in_place_argument(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether ``inplace=True`` is passed, by name or position."""
    signature = _signature(func)
    if signature is None or "inplace" not in signature.parameters:
        return False
    return bool(signature.bind(*args, **kwargs).arguments.get("inplace", False))


Writes = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def written_tensors(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Return the arguments that a call modifies, or passes to code that may modify them.

    Example:
        >>> x = torch.zeros(2)
        >>> written_tensors(torch.Tensor.add_, (x, 1), {})[0] is x
        True
        >>> written_tensors(torch.add, (x, 1), {})
        []
    """
    written = [] if kwargs.get("out") is None else tensors_in(kwargs["out"])
    writes = _writes(func)
    return written if writes is None else [*written, *tensors_in(writes(args, kwargs))]


@functools.lru_cache(maxsize=4096)
def _writes(func: Callable[..., Any]) -> Writes | None:
    """The function that selects the arguments that `func` modifies, or None."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        overloads = (
            [func]
            if isinstance(func, torch._ops.OpOverload)
            else [getattr(func, name) for name in func.overloads()]
        )
        places = {
            (i, argument.name)
            for overload in overloads
            for i, argument in enumerate(overload._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        return (lambda args, kwargs: _at(places, args, kwargs)) if places else None
    name = getattr(func, "__name__", "")
    if canonical_name(func)[1] or (name.endswith("_") and not name.endswith("__")):
        return _first
    if name in _HANDED_OUT:
        return _first
    signature = _signature(func)
    if signature is None:  # kernels that are called directly
        statistics = name.endswith(("batch_norm", "instance_norm", "batch_norm_update_stats"))
        return _all if statistics or name.startswith("fused_moving_avg") else None
    names = signature.parameters.keys()
    for switch, arguments in _SWITCHES.items():
        if switch in names and arguments & names:
            return functools.partial(_if_switched, signature, switch, arguments & names)
    return None


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs


def _all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs


def _at(places: set[tuple[int, str]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in places]


def _if_switched(
    signature: inspect.Signature,
    switch: str,
    names: frozenset[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    return [given.arguments[name] for name in names] if given.arguments[switch] else None


_SWITCHES = {
    "inplace": frozenset(("input",)),
    "max_norm": frozenset(("weight",)),
    "training": frozenset(("running_mean", "running_var")),
    "use_input_stats": frozenset(("running_mean", "running_var")),
}
"""Switches of PyTorch functions, and the arguments that the functions modify when they are on."""


_HANDED_OUT = frozenset("numpy __array__ __dlpack__ storage untyped_storage".split())
"""Calls that expose the memory of a tensor to code that cannot be intercepted."""


def out_of_place(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return the out-of-place version of an in-place call."""
    kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    signature = _signature(func)
    if signature is not None and "inplace" in signature.parameters:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["inplace"] = False
        return func, bound.args, bound.kwargs
    for namespace in (torch.Tensor, torch, torch.nn.functional):
        if hasattr(namespace, name):
            return getattr(namespace, name), args, kwargs
    return func, args, kwargs
