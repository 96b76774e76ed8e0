"""Complex calls as calls on real tensors.

A complex tensor is treated as two real tensors, its real and its imaginary part. Rules receive only real
tensors: a call that reads or returns a complex tensor is passed to its rule as the same call on real views
(``torch.view_as_real``), whose last dimension contains the two parts. Relevance per magnitude of a complex
tensor is complex, with one value for each part. Only calls that move elements handle it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.names import PREFIX, TRANSFORMS

ARITHMETIC = frozenset(
    "add sub mul div matmul mm bmm mv dot ger outer inner kron tensordot linalg_matmul einsum addmm "
    "addbmm addmv baddbmm linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d".split()
)
"""Calls in which a real tensor is equivalent to the complex tensor with the same values."""


_BY_FUNCTION = frozenset("mean sum cumsum".split()) | TRANSFORMS


def suits_parts(name: str) -> bool:
    """Whether the form of a call only runs its function, so that it also works on real views.

    Args:
        name: canonical name of the call.

    Example:
        >>> suits_parts("fft_rfft"), suits_parts("mul")
        (True, False)
    """
    return name in _BY_FUNCTION


CONJUGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "H": lambda x: x.mT if x.dim() else x,
    "adjoint": lambda x: x.mT,
    "conj": lambda x: x,
    "conj_physical": lambda x: x,
    "mH": lambda x: x.mT,
}
"""Calls that return a conjugate, and the move of elements that they apply first."""


def has_complex(value: Any) -> bool:
    """Whether there is a complex tensor or number in nested arguments or results.

    Args:
        value: arguments of a call, or its result.

    Example:
        >>> has_complex(([torch.ones(2)], {"alpha": 1j})), has_complex(torch.ones(2))
        (True, False)
    """
    if isinstance(value, Tensor):
        return value.is_complex()
    if isinstance(value, (tuple, list)):
        return any(map(has_complex, value))
    if isinstance(value, dict):
        return any(map(has_complex, value.values()))
    return isinstance(value, complex)


def is_complex(call: Call) -> bool:
    """Whether there is a complex tensor or number among the arguments of a call."""
    return has_complex((call.args, call.kwargs))


def as_parts(x: Tensor) -> Tensor:
    """Return the real view of a complex tensor; return a real tensor unchanged.

    Args:
        x: any shape.

    Returns:
        Shape (..., 2) for a complex tensor of shape (...).

    Example:
        >>> as_parts(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def as_complex(parts: Tensor) -> Tensor:
    """Return the complex tensor of a real view, as a view if the memory layout allows it.

    Args:
        parts: (..., 2).

    Example:
        >>> as_complex(torch.tensor([[1.0, 2.0]]))
        tensor([1.+2.j])
    """
    *strides, last = parts.stride()
    if last != 1 or int(parts.storage_offset()) % 2 or any(stride % 2 for stride in strides):
        parts = parts.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(parts)


def phase(x: Tensor) -> Tensor:
    """Compute ``torch.sgn`` of a complex tensor as a quotient.

    Args:
        x: complex, any shape.

    Example:
        >>> phase(torch.tensor([3 + 4j, 0j]))
        tensor([0.6000+0.8000j, 0.0000+0.0000j])
    """
    size = x.detach().abs()
    return x / size.masked_fill(size == 0, 1)


@dataclass(frozen=True)
class OnParts:
    """A function that takes and returns real views instead of complex tensors."""

    func: Callable[..., Any]
    complex_at: frozenset[int]
    """Indices of the flattened arguments that are real views of complex tensors."""

    @property
    def first_is_complex(self) -> bool:
        """Whether the first argument is a real view."""
        return 0 in self.complex_at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [as_complex(v) if i in self.complex_at else v for i, v in enumerate(leaves)]
        args, kwargs = tree_unflatten(leaves, structure)
        result = self.func(*args, **kwargs)
        return as_parts(result) if isinstance(result, Tensor) else result


def call_on_parts(
    call: Call, output: Any, move: Callable[..., Any], is_source: Callable[[Tensor], bool]
) -> Call:
    """Convert a complex call to a call on real tensors.

    Args:
        call: the call, with complex arguments or a complex result.
        output: its result.
        move: runs a call that moves elements, given its name, function and arguments.
        is_source: whether a tensor depends on the explained inputs.

    Returns:
        The call for the rule. Complex tensors among its arguments are real views. In arithmetic calls, all
        other operands are real views as well, except for a real factor that all elements share.
    """
    args, kwargs = call.args, dict(call.kwargs)
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    if isinstance(kwargs.get("alpha"), complex) or isinstance(kwargs.get("beta"), complex):
        raise TypeError(
            f"Expected the factors `alpha` and `beta` of {call} to be real numbers, but got {kwargs}. "
            f"Write the product explicitly: `x + alpha * y`."
        )
    if call.name in ARITHMETIC:
        numbers = call.name in ("add", "sub")

        def operand(value: Any) -> Any:
            if isinstance(value, (list, tuple)) and call.name == "einsum":
                return [operand(item) for item in value]
            if numbers and isinstance(value, (int, float, complex)):
                return torch.tensor(value, dtype=output.dtype, device=output.device)
            if not isinstance(value, Tensor) or value.is_complex():
                return value
            if call.name in ("mul", "div") and not is_source(value):
                if value.dim() == 0 or (value.numel() == 1 and value.dim() < output.dim()):
                    return value
            return move("to", Tensor.to, value, output.dtype)

        args = tuple(map(operand, args))
        kwargs = {
            key: value if key in ("alpha", "beta") else operand(value)
            for key, value in kwargs.items()
        }
    leaves, structure = tree_flatten((args, kwargs))
    complex_at = frozenset(
        i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_complex()
    )
    for i in complex_at:
        leaves[i] = move("view_as_real", as_parts, leaves[i])
    args, kwargs = tree_unflatten(leaves, structure)
    absolute = call.absolute_func
    return replace(
        call,
        name=call.name if suits_parts(call.name) else PREFIX + call.name,
        func=OnParts(call.func, complex_at),
        args=args,
        kwargs=kwargs,
        result=as_parts(output) if isinstance(output, Tensor) else None,
        target=None,
        absolute_func=None if absolute is None else OnParts(absolute, complex_at),
    )
