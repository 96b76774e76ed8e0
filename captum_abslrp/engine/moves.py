"""Calls that move elements; autograd moves relevance with its element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_abslrp.engine.arguments import tensors_in
from captum_abslrp.engine.names import JOINING
from captum_abslrp.engine.samples import follow
from captum_abslrp.engine.saved import SavedTensors


def move(
    saved: SavedTensors,
    batch_size: int,
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a call that moves elements; its result is nonnegative if all moved tensors are."""
    if any(t.is_inference() for t in tensors_in((args, kwargs))):
        # Autograd cannot save tensors that the caller or the model created in inference mode.
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
    result = func(*args, **kwargs)
    tensors = tensors_in((args, kwargs))
    follow(name, func, args, kwargs, result, batch_size, tensors)
    # Indices do not count as moved values.
    values = [t for t in tensors if name in JOINING or t.is_floating_point() or t.is_complex()]
    if all(map(saved.is_nonnegative, values)) and not (
        name in _FILLING and any(map(_may_be_negative, tree_flatten((args, kwargs))[0]))
    ):
        for tensor in tensors_in(result):
            saved.mark_nonnegative(tensor)
    return result


def _may_be_negative(value: Any) -> bool:
    """Whether a number may be negative; complex numbers always may."""
    return isinstance(value, complex) or (isinstance(value, (int, float)) and value < 0)


_FILLING = frozenset(
    "__setitem__ index_copy masked_fill masked_scatter pad scatter select_scatter slice_scatter "
    "diagonal_scatter where".split()
)
"""Calls that move elements and may fill in numbers."""
