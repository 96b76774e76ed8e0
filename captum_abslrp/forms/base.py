"""What all forms share, and the two that suit every call: the twin and pass-through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_abslrp import functional
from captum_abslrp.calls import tensors_in
from captum_abslrp.complex_calls import PREFIX
from captum_abslrp.functional import EPS, LEAST
from captum_abslrp.interception import Call, carries_relevance
from captum_abslrp.steps import Answer, Kept, Tail

Form = Callable[..., Any]
Made = TypeVar("Made")


def answer_twin(call: Call, *, divides: bool = True) -> Answer:
    """The definition, :func:`captum_abslrp.functional.twin`, for any differentiable call."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected the twin rule to see one output tensor, but got {call}.")
    func, absolute_func = call.func, call.absolute_func or call.func
    leaves, structure = tree_flatten((call.args, call.kwargs))
    at = [i for i, leaf in enumerate(leaves) if is_source(leaf)]
    kept = [call.keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    z = None if divides else call.keep(output)

    def propagate(s: Tensor) -> list[Tensor]:
        given = s if z is None else s * functional.magnitude(z())
        plain = [k() if isinstance(k, Kept) else k for k in kept]
        absolute = [_magnitude(value) for value in plain]

        def of_source(i: int) -> Tensor:
            def call_with(func: Callable[..., Tensor], others: list[Any], x: Tensor) -> Tensor:
                args, kwargs = tree_unflatten([*others[:i], x, *others[i + 1 :]], structure)
                return func(*args, **kwargs)

            return functional.twin(
                plain[i],
                partial(call_with, func, plain),
                partial(call_with, absolute_func, absolute),
                given,
            )

        return [of_source(i) for i in at]

    def gradients(s: Tensor) -> list[Tensor]:
        plain = [k() if isinstance(k, Kept) else k for k in kept]
        with torch.enable_grad():
            given = [plain[i].detach().requires_grad_() for i in at]
            for i, x in zip(at, given, strict=True):
                plain[i] = x
            args, kwargs = tree_unflatten(plain, structure)
            result = func(*args, **kwargs)
        return list(torch.autograd.grad(result, given, s.to(result.dtype)))

    sources = [leaves[i] for i in at]
    tail = _tail_of_twin(call, output, gradients, sources) if divides else None
    return Answer(output, sources, propagate, vanishing=divides, tail=tail)


def tail_of(
    output: Kept,
    sources: Sequence[Kept],
    share: Callable[[Tensor], Sequence[Tensor]],
    *,
    keeps_sign: bool = False,
) -> Tail:
    """A tail that says how relevance itself is shared, from that of the output to that of each source."""

    def propagate(s: Tensor) -> list[Tensor]:
        relevance = functional.relevance(_plus_eps(output()), s)
        return [
            r / _plus_eps(x()).clamp(max=torch.finfo(r.dtype).max)
            for r, x in zip(share(relevance), sources, strict=True)
        ]

    return Tail(propagate, output, sources, keeps_sign=keeps_sign)


def scaled_tail(output: Kept, factor: Callable[[], Tensor | float]) -> Tail:
    """The tail of a product with a constant: relevance passes, with the sign of the constant."""

    def propagate(s: Tensor) -> list[Tensor]:
        c = torch.as_tensor(factor(), dtype=s.dtype, device=s.device)
        size = output().abs()
        of_input = size / c.abs().clamp(min=torch.finfo(s.dtype).tiny)
        return [s * c.sign() * ((size + EPS) / (of_input + EPS))]

    return Tail(propagate, output, factor=factor)


def passed_on(output: Kept, source: Kept, sign: Callable[[], Tensor | float] | None = None) -> Tail:
    """The tail of a call that acts on each element alone: relevance passes, with the sign of the slope."""
    if sign is None:
        return tail_of(output, [source], lambda relevance: [relevance], keeps_sign=True)
    return tail_of(output, [source], lambda relevance: [relevance * sign()])


def _plus_eps(values: Tensor) -> Tensor:
    return values.abs() + EPS


_BY_GRADIENT = frozenset("amax amin logsumexp maximum minimum".split())
"""Calls that pick or weight their inputs: the gradient says how much each of them takes part."""
_NORMS = frozenset("linalg_norm linalg_vector_norm norm".split())


def _tail_of_twin(
    call: Call,
    output: Tensor,
    of_sources: Callable[[Tensor], list[Tensor]],
    sources: Sequence[Tensor],
) -> Tail | None:
    name = call.name.removeprefix(PREFIX)
    if name not in _NORMS | _BY_GRADIENT:
        return None
    z, kept = call.keep(output), [call.keep(t) for t in sources]
    if name in _BY_GRADIENT:
        return tail_of(z, kept, of_sources, keeps_sign=True)

    def share(relevance: Tensor) -> list[Tensor]:
        # A norm is of the first degree: the terms x_i dz/dx_i are positive and add up to z.
        parts = of_sources((relevance / z()).masked_fill(z() == 0, 0))
        return [functional.magnitude(x()) * part for x, part in zip(kept, parts, strict=True)]

    return tail_of(z, kept, share)


def answer_constant(call: Call) -> Tensor:
    """The result is a constant of the call that uses it: no relevance goes this way."""
    return call.run(lambda: call.func(*call.args, **call.kwargs))


def answer_passed(call: Call) -> Any:
    """Relevance moves with its element."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    sources = [t for t in tensors_in((call.args, call.kwargs)) if carries_relevance(t)]
    if not isinstance(output, Tensor) or any(s.shape != output.shape for s in sources):
        raise TypeError(
            f"Expected relevance to pass through a call that keeps the shape of its input, but got "
            f"{call}."
        )
    if len(sources) == 1 and is_alias(output, sources[0]):  # dropout that does nothing
        return sources[0]
    z, kept = call.keep(output), [call.keep(source) for source in sources]
    dtypes = [source.dtype for source in sources]

    def propagate(s: Tensor) -> list[Tensor]:
        # Zeros have relevance, too: that of a class whose log-probability is rounded to 0, say.
        relevance = functional.relevance(z().abs().clamp(min=LEAST), s)
        return [
            functional.per_magnitude(relevance, x(), dtype)
            for x, dtype in zip(kept, dtypes, strict=True)
        ]

    tail = None
    if len(sources) == 1:
        sign = (lambda: -1.0) if call.name.removeprefix(PREFIX) == "neg" else None
        tail = passed_on(z, kept[0], sign)
    return Answer(output, sources, propagate, scaled=False, tail=tail)


def passed(
    call: Call,
    output: Tensor,
    sources: Sequence[Tensor],
    factor: Callable[[], float | Tensor] = lambda: 1.0,
    *,
    nonnegative: bool = False,
) -> Answer:
    """Scaling by a constant factor: relevance moves with its element."""

    def propagate(s: Tensor) -> list[Tensor]:
        value = factor()
        size = value.abs() if isinstance(value, Tensor) else abs(value)
        return [s if isinstance(size, float) and size == 1 else s * size] * len(sources)

    tail = scaled_tail(call.keep(output), factor) if len(sources) == 1 else None
    return Answer(
        output,
        sources,
        propagate,
        scaled=False,
        nonnegative=nonnegative,
        keeps_sign=True,
        tail=tail,
    )


def once(compute: Callable[[], Made]) -> Callable[[], Made]:
    """Make what does not depend on the seed with the first seed, and keep it for the others.

    What it was made from is let go.
    """
    steps = [compute]
    result: list[Made] = []

    def get() -> Made:
        if steps:
            result.append(steps.pop()())
        return result[0]

    return get


def is_alias(output: Tensor, source: Tensor) -> bool:
    """Whether the output is the input under another name."""
    layouts = [(t.data_ptr(), t.dtype, t.stride(), t.shape) for t in (output, source)]
    return output.numel() > 0 and not output.is_meta and layouts[0] == layouts[1]


def is_source(value: Any) -> bool:
    """Whether a value is a tensor that relevance goes to."""
    return isinstance(value, Tensor) and carries_relevance(value)


def _magnitude(value: Any) -> Any:
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    return functional.magnitude(value) if is_number else value


def check_batched(call: Call, input: Tensor, dims: int) -> None:
    if input.dim() != dims + 2:
        raise ValueError(
            f"Expected {call} to see a batch, an input of {dims + 2} dimensions, but got shape "
            f"{tuple(input.shape)}. Add the batch dimension to `inputs`: `x.unsqueeze(0)`."
        )
