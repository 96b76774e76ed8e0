"""What all forms share, and the two that suit every call: the twin and pass-through."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.calls import instances_in, map_instances, on_host, tensors_in
from captum_abslrp.complex_calls import PREFIX
from captum_abslrp.functional import EPS, LEAST
from captum_abslrp.interception import Call, UnsupportedCallError, carries_relevance
from captum_abslrp.steps import Answer, Kept, Propagate, Tail

Form = Callable[..., Any]
Made = TypeVar("Made")


def answer_twin(call: Call, *, divides: bool = True) -> Any:
    """The definition, :func:`captum_abslrp.functional.twin`, for any differentiable call.

    Each floating-point output is a call of its own, with the same sources.
    """
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    tensors = instances_in(Tensor, (call.args, call.kwargs))
    places = _places(call)
    at = [i for i, t in enumerate(tensors) if is_source(t) and not _is_one_of(t, places)]
    if not at:
        return output
    alone = isinstance(output, Tensor)
    numbers = itertools.count()

    def answer(tensor: Tensor) -> Answer | Tensor:
        number = next(numbers)
        if not (alone or tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        propagate = _twin(call, tensor, tensors, at, number, divides=divides, alone=alone)
        sources = [tensors[i] for i in at]
        tail = _tail_of_twin(call, tensor, tensors, at) if divides and alone else None
        return Answer(tensor, sources, propagate, vanishing=divides, constants=places, tail=tail)

    return map_instances(Tensor, answer, output)


class _Slot(NamedTuple):
    """Where a tensor was in the arguments of a call."""

    number: int


def _twin(
    call: Call,
    output: Tensor,
    tensors: Sequence[Tensor],
    at: Sequence[int],
    number: int,
    *,
    divides: bool,
    alone: bool,
) -> Propagate:
    """How relevance goes back by the twin rule through one of the tensors that a call returns.

    Args:
        output: the tensor.
        tensors: those among the arguments.
        at: which of them are sources.
        number: which of the tensors that the call returns `output` is.
        alone: whether it is the only one, which has to depend on the sources then.
    """
    func, absolute_func, name = call.func, call.absolute_func or call.func, str(call)
    slots = map(_Slot, itertools.count())
    arguments = map_instances(Tensor, lambda tensor: next(slots), (call.args, call.kwargs))
    kept = [call.keep(tensor) for tensor in tensors]
    places = _places(call)
    is_place = [_is_one_of(tensor, places) for tensor in tensors]
    z = None if divides else call.keep(output)

    def propagate(s: Tensor) -> list[Tensor]:
        given = s if z is None else s * functional.magnitude(z())
        plain = [k() for k in kept]
        absolute = [v if is_place[i] else _magnitude(v) for i, v in enumerate(plain)]
        depends = False

        def of_source(i: int) -> Tensor:
            def call_with(func: Callable[..., Any], others: list[Tensor], x: Tensor) -> Tensor:
                nonlocal depends
                values = [*others[:i], x, *others[i + 1 :]]
                args, kwargs = map_instances(_Slot, lambda slot: values[slot.number], arguments)
                result = instances_in(Tensor, func(*args, **kwargs))[number]
                depends = depends or result.requires_grad
                return result

            return functional.twin(
                plain[i],
                partial(call_with, func, plain),
                partial(call_with, absolute_func, absolute),
                given,
            )

        shares = [of_source(i) for i in at]
        if alone and not depends:
            raise UnsupportedCallError(
                f"Expected {name} to be differentiable, because the twin rule answers it, but got a result "
                f"that does not depend on its inputs by a gradient. Give it another rule: "
                f"`captum_abslrp.rules.ConstantRule()` where it is a constant of what comes after, "
                f"`PassThroughRule()` where relevance moves with its element."
            )
        return shares

    return propagate


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


_BY_GRADIENT = frozenset("amax amin logsumexp maximum minimum torchvision::roi_pool".split())
"""Calls that pick or weight their inputs: the gradient says how much each of them takes part."""
_LINEAR = frozenset(
    "index_add scatter_add torchvision::ps_roi_align torchvision::ps_roi_pool torchvision::roi_align".split()
)
"""Calls that are linear in all of their sources together, without negative coefficients."""
_NORMS = frozenset("linalg_norm linalg_vector_norm norm".split())


def _tail_of_twin(
    call: Call, output: Tensor, tensors: Sequence[Tensor], at: Sequence[int]
) -> Tail | None:
    """The tail of a call of the twin rule, if it can be on one; arguments as for :func:`_twin`."""
    name = call.name.removeprefix(PREFIX)
    negative = "alpha" in call.kwargs  # of `index_add`
    if negative or name not in _NORMS | _BY_GRADIENT | _LINEAR:
        return None
    slots = map(_Slot, itertools.count())
    func = call.func
    arguments = map_instances(Tensor, lambda tensor: next(slots), (call.args, call.kwargs))
    all_kept = [call.keep(tensor) for tensor in tensors]
    z, kept = call.keep(output), [all_kept[i] for i in at]

    def run(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The result with changed sources, and the sources, for a gradient."""
        values = [k() for k in all_kept]
        with torch.enable_grad():
            for i in at:
                values[i] = change(values[i].detach()).requires_grad_()
            args, kwargs = map_instances(_Slot, lambda slot: values[slot.number], arguments)
            return func(*args, **kwargs), [values[i] for i in at]

    def of_sources(s: Tensor) -> list[Tensor]:
        result, leaves = run(lambda x: x)
        return list(torch.autograd.grad(result, leaves, s.to(result.dtype)))

    def by_share(relevance: Tensor) -> list[Tensor]:
        result, leaves = run(functional.magnitude)
        whole = result.detach() - run(torch.zeros_like)[0].detach()  # constants take no part
        parts = (relevance / whole).masked_fill(whole <= 0, 0)
        found = torch.autograd.grad(result, leaves, parts.to(result.dtype))
        return [x.detach() * part for x, part in zip(leaves, found, strict=True)]

    if name in _LINEAR:
        return tail_of(z, kept, by_share, keeps_sign=True)

    if name in _BY_GRADIENT:
        return tail_of(z, kept, of_sources, keeps_sign=True)

    def share(relevance: Tensor) -> list[Tensor]:
        # A norm is of the first degree: the terms x_i dz/dx_i are positive and add up to z.
        parts = of_sources((relevance / z()).masked_fill(z() == 0, 0))
        return [functional.magnitude(x()) * part for x, part in zip(kept, parts, strict=True)]

    return tail_of(z, kept, share)


PLACES: dict[str, tuple[int, str]] = {
    "grid_sample": (1, "grid"),
    "torchvision::deform_conv2d": (2, "offset"),
    "torchvision::ps_roi_align": (1, "rois"),
    "torchvision::ps_roi_pool": (1, "rois"),
    "torchvision::roi_align": (1, "rois"),
    "torchvision::roi_pool": (1, "rois"),
}
"""Calls one of whose arguments says where to look, which is a constant of the call: its position and name."""


def _places(call: Call) -> list[Tensor]:
    """The arguments of a call that say where to look; they have no magnitude."""
    if call.name not in PLACES:
        return []
    position, name = PLACES[call.name]
    place = call.args[position] if len(call.args) > position else call.kwargs.get(name)
    return [place] if isinstance(place, Tensor) else []


def _is_one_of(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)


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


def without_noise(
    call: Call,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    run: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    """How to mask relevance of outputs that are rounding errors: a mean, written as a product, of values
    that were centered before.

    Only weights of one sign make means. Their signs are looked at on the host alone, because nothing waits
    for a device.

    Args:
        call: the call, an affine one.
        output: its output.
        input: what it multiplies.
        weight: the constant that it multiplies by.
        run: the product of an input with a weight.

    Returns:
        From relevance per magnitude of the output to the same with zeros at rounding errors.
    """
    if call.is_nonnegative(input) or not _has_one_sign(weight):
        return lambda s: s
    x, w, z = call.keep(input), call.keep(weight), call.keep(output.clone())
    least = functional.rounding(output.dtype)

    @once
    def noise() -> Tensor:
        sizes = run(functional.magnitude(x()), functional.magnitude(w()))
        return z().abs() <= least * sizes

    return lambda s: s.masked_fill(noise(), 0)


def _has_one_sign(weight: Tensor) -> bool:
    """Whether it is known that a constant has no two entries of different signs."""
    if weight.numel() == 0 or weight.is_meta or is_source(weight):
        return False

    def has_one_sign(values: Tensor) -> bool:
        return on_host((values < 0).any() & (values > 0).any()) is False

    weight = weight.detach()
    # The weights of almost every layer differ in sign in their first row already.
    few = weight[0].flatten()[:64] if weight.dim() else weight
    return has_one_sign(few) and has_one_sign(weight)


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
