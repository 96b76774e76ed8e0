"""The twin rule: the definition of absLRP, for any differentiable call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.arguments import instances_in, map_instances
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.engine.numerics import magnitude
from captum_abslrp.engine.tape import Propagate, Record, Tail
from captum_abslrp.rules.base import Form, Rule
from captum_abslrp.rules.contributions import transposed
from captum_abslrp.rules.tails import tail_of


def twin(
    x: Tensor,
    call: Callable[[Tensor], Tensor],
    absolute_call: Callable[[Tensor], Tensor],
    s: Tensor,
) -> Tensor:
    r"""The definition of the rule, for any differentiable call.

    :math:`R_{in} = x \, \partial/\partial x \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle`, per
    magnitude with :math:`\mathrm{sign}(x)` in place of :math:`x`. Infinite values mask an element, which
    takes no part.

    Args:
        x: input, any shape.
        call: ``x -> f(x; w, b)``.
        absolute_call: ``x -> f(x; |w|, |b|)``; it is given ``|x|``.
        s: shaped like the output of the call.

    Returns:
        Relevance per magnitude of ``x``.

    Example:
        >>> w = torch.tensor([[3.0, -4.0]])
        >>> twin(torch.tensor([[1.0, -2.0]]), lambda x: F.linear(x, w),
        ...      lambda x: F.linear(x, w.abs()), torch.ones(1, 1))
        tensor([[6., 8.]])
    """
    gradient = transposed(lambda x: call(x) + absolute_call(magnitude(x)), x, s)
    sign = x.sign()
    return (sign * gradient).masked_fill_((x == 0) | x.isinf(), 0)


class TwinRule(Rule):
    r"""The definition of absLRP, for any differentiable call.

    :math:`R_{in} = x \, \partial/\partial x \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle` with
    :math:`s = R / (|z| + \epsilon)` (the paper's rule, section 1 of the method): the call and
    its *twin*, the same call on absolute input and parameters. It costs two more forward passes of the
    call; the other rules are its closed forms. A call on complex tensors is one on their real and imaginary
    parts: ``x``, ``w`` and ``z`` are real views (``torch.view_as_real``).

    Args:
        divide: whether relevance is divided by the magnitude of the output. Without, :math:`s = R`.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = TwinRule()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def __init__(self, *, divide: bool = True) -> None:
        self.divide = divide

    def form_of(self, call: Call) -> Form | None:
        return record_twin if self.divide else partial(record_twin, divides=False)

    def __repr__(self) -> str:
        return f"TwinRule({'' if self.divide else 'divide=False'})"


def record_twin(call: Call, *_: Any, divides: bool = True, **__: Any) -> Any:
    """The definition, :func:`twin`, for any differentiable call.

    Each floating-point output is a call of its own, with the same inputs.
    """
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    tensors = instances_in(Tensor, (call.args, call.kwargs))
    places = _places(call)
    at = [i for i, t in enumerate(tensors) if is_source(t) and not _is_one_of(t, places)]
    if not at:
        return output
    alone = isinstance(output, Tensor)
    numbers = itertools.count()

    def record(tensor: Tensor) -> Record | Tensor:
        number = next(numbers)
        if not (alone or tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        propagate = _twin(call, tensor, tensors, at, number, divides=divides, alone=alone)
        inputs = [tensors[i] for i in at]
        tail = _tail_of_twin(call, tensor, tensors, at) if divides and alone else None
        return Record(tensor, inputs, propagate, vanishing=divides, constants=places, tail=tail)

    return map_instances(Tensor, record, output)


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
        at: which of them are inputs.
        number: which of the tensors that the call returns `output` is.
        alone: whether it is the only one, which has to depend on the inputs then.
    """
    func, absolute_func, name = call.func, call.absolute_func or call.func, str(call)
    slots = map(_Slot, itertools.count())
    arguments = map_instances(Tensor, lambda tensor: next(slots), (call.args, call.kwargs))
    kept = [call.save(tensor) for tensor in tensors]
    places = _places(call)
    is_place = [_is_one_of(tensor, places) for tensor in tensors]
    z = None if divides else call.save(output)

    def propagate(s: Tensor) -> list[Tensor]:
        given = s if z is None else s * numerics.magnitude(z())
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

            return twin(
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


_BY_GRADIENT = frozenset("amax amin logsumexp maximum minimum torchvision::roi_pool".split())
"""Calls that pick or weight their inputs: the gradient says how much each of them takes part."""


_LINEAR = frozenset(
    "index_add scatter_add torchvision::ps_roi_align torchvision::ps_roi_pool torchvision::roi_align".split()
)
"""Calls that are linear in all of their inputs together, without negative coefficients."""


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
    all_kept = [call.save(tensor) for tensor in tensors]
    z, kept = call.save(output), [all_kept[i] for i in at]

    def run(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The result with changed inputs, and the inputs, for a gradient."""
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
        result, leaves = run(numerics.magnitude)
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
        return [numerics.magnitude(x()) * part for x, part in zip(kept, parts, strict=True)]

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


def _magnitude(value: Any) -> Any:
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    return numerics.magnitude(value) if is_number else value
