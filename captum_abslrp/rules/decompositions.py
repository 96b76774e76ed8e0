"""Calls that are decomposed into simpler calls with their own rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.numerics import EPS
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, Rule


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    x1, x2 = torch.broadcast_tensors(x1, x2)
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


def _extremum(name: str) -> Callable[..., Any]:
    """``max`` or ``min``: over all elements, over one dimension, or of two tensors."""
    names = (f"a{name}", f"arg{name}", f"{name}imum")
    reduced, at, of_two = (getattr(torch, of) for of in names)
    pair = getattr(torch.return_types, name)

    def extremum(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return reduced(input)
        if (args and isinstance(args[0], Tensor)) or "other" in kwargs:
            return of_two(input, *args, **kwargs)
        return pair((reduced(input, *args, **kwargs), at(input, *args, **kwargs)))

    return extremum


def _statistics(spread: Callable[..., Tensor]) -> Callable[..., Any]:
    """``var_mean`` or ``std_mean``."""

    def statistics(input: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
        keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
        return spread(input, dim, *args, **kwargs), input.mean(dim, keepdim=keepdim)

    return statistics


_PARTS: dict[str, Callable[..., Any]] = {
    "addcdiv": lambda input, first, second, *, value=1: input + value * (first / second),
    "addcmul": lambda input, first, second, *, value=1: input + value * (first * second),
    "cosine_similarity": _cosine_similarity,
    "glu": _glu,
    "lerp": lambda input, end, weight: input * (1 - weight) + end * weight,
    "max": _extremum("max"),
    "min": _extremum("min"),
    "polar": lambda abs, angle: torch.complex(abs * angle.cos(), abs * angle.sin()),
    "softmin": lambda input, dim=None, _stacklevel=3, dtype=None: F.softmax(
        -input, dim, dtype=dtype
    ),
    "std_mean": _statistics(torch.std),
    "var_mean": _statistics(torch.var),
}
"""Decompositions by name of the call; each takes the arguments of the call."""


def _decomposed(parts: Callable[..., Any]) -> Form:
    def record_parts(call: Call, *args: Any, **kwargs: Any) -> Any:
        return call.recording.run_parts(parts, *args, **kwargs)

    record_parts.runs_parts = True  # type: ignore[attr-defined]
    return record_parts


def record_gumbel_softmax(
    call: Call,
    logits: Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Any:
    """Record Gumbel softmax, with noise that is drawn once.

    With ``hard``, relevance moves with the chosen element, like the gradient of the straight-through
    estimator.
    """

    def soft() -> Tensor:
        noise = torch.empty_like(logits.detach()).exponential_().log()
        return ((logits - noise) / tau).softmax(dim)

    share: Tensor = call.recording.run_parts(soft)
    if not hard:
        return share
    chosen = share.detach().argmax(dim, keepdim=True)
    output = torch.zeros_like(share.detach()).scatter_(dim, chosen, 1.0)
    z, p = call.save(output), call.save(share)
    return Record(
        output,
        [share],
        lambda s: [s * z() / p().clamp(min=EPS)],
        scaled=False,
        constants=[logits],
        nonnegative=True,
        keeps_sign=True,
    )


DECOMPOSITIONS: dict[str, Form] = {name: _decomposed(parts) for name, parts in _PARTS.items()}
DECOMPOSITIONS["gumbel_softmax"] = record_gumbel_softmax


class DecomposedRule(Rule):
    """Decompose a call into simpler calls, each with its own rule.

    Args:
        parts: a function that computes the call from simpler calls; it takes the arguments of the call.

    Example:
        >>> from torch.overrides import wrap_torch_function
        >>> from captum_abslrp import register_call_rule
        >>> @wrap_torch_function(lambda x, gate: (x, gate))
        ... def swiglu(x, gate):  # a fused kernel
        ...     return x * F.silu(gate)
        >>> register_call_rule(swiglu, DecomposedRule(lambda x, gate: x * F.silu(gate)))
        >>> class Net(nn.Linear):
        ...     def forward(self, x):
        ...         return swiglu(*super().forward(x).chunk(2, 1))
        >>> AbsLRP(Net(3, 4)).attribute(torch.rand(5, 3), target=0).shape
        torch.Size([5, 3])
    """

    def __init__(self, parts: Callable[..., Any]) -> None:
        self.parts = parts

    def record(self, call: Call) -> Any:
        return call.recording.run_parts(self.parts, *call.operands, **call.kwargs)

    def runs_parts_of(self, call: Call) -> bool:
        return True
