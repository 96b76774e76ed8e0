"""The twin rule: the definition of absLRP, for any differentiable call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from captum_abslrp.engine.arguments import instances_in, map_instances
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.engine.numerics import magnitude
from captum_abslrp.engine.saved import SavedTensor
from captum_abslrp.engine.tape import Propagate, Record, Tail
from captum_abslrp.rules.base import DividingRule, Form, Function
from captum_abslrp.rules.contributions import transposed
from captum_abslrp.rules.tails import tail_of


def twin(x: Tensor, call: Function, absolute_call: Function, s: Tensor) -> Tensor:
    r"""Apply the definition of the rule to any differentiable call.

    :math:`R_{in} = x \, \partial/\partial x \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle`; relevance per
    magnitude has :math:`\mathrm{sign}(x)` in place of :math:`x`. Infinite values mask an element and are
    ignored. ``call`` is :math:`f(x; w, b)` as a function of ``x``, ``absolute_call`` is
    :math:`f(x; |w|, |b|)`, which is called with ``|x|``, and ``s`` has the shape of the output.

    Example:
        >>> w = torch.tensor([[3.0, -4.0]])
        >>> twin(torch.tensor([[1.0, -2.0]]), lambda x: F.linear(x, w),
        ...      lambda x: F.linear(x, w.abs()), torch.ones(1, 1))
        tensor([[6., 8.]])
    """
    gradient = transposed(lambda x: call(x) + absolute_call(magnitude(x)), x, s)
    return (x.sign() * gradient).masked_fill_((x == 0) | x.isinf(), 0)


class _Slot(int):
    """A placeholder for a tensor in the arguments of a call; its value is the index of the tensor."""


class Again:
    """A call that can be run again on other tensors.

    Attributes:
        func, absolute_func: the function, and the function with the magnitudes of its parameters.
        name: the name of the call for messages.
        at: indices of the tensors that receive relevance.
        sources: these tensors.
        inputs: these tensors, saved.
        places: the tensors with sampling positions, which are constants of the call.
        is_place: for each tensor of the call, whether it has sampling positions.
    """

    def __init__(self, call: Call) -> None:
        tensors = instances_in(Tensor, (call.args, call.kwargs))
        slots = map(_Slot, itertools.count())
        self._arguments = map_instances(Tensor, lambda _: next(slots), (call.args, call.kwargs))
        self._saved = [call.save(tensor) for tensor in tensors]
        self.func, self.absolute_func = call.func, call.absolute_func or call.func
        self.name = str(call)
        self.places = _places(call)
        self.is_place = [any(tensor is place for place in self.places) for tensor in tensors]
        self.at = [i for i, t in enumerate(tensors) if is_source(t) and not self.is_place[i]]
        self.sources = [tensors[i] for i in self.at]
        self.inputs = [self._saved[i] for i in self.at]

    def values(self) -> list[Tensor]:
        """The saved tensors of the call."""
        return [saved() for saved in self._saved]

    def run(self, func: Callable[..., Any], values: Sequence[Tensor]) -> Any:
        """Run the function on other tensors."""
        args, kwargs = map_instances(_Slot, lambda slot: values[slot], self._arguments)
        return func(*args, **kwargs)


def record_again(call: Call, record_one: Callable[[Again, Tensor, int, bool], Record]) -> Any:
    """Record each floating-point output of a call separately, with the same inputs.

    Args:
        call: the call.
        record_one: records one output, given the call, the output, the index of the output, and whether
            it is the only output.
    """
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    again = Again(call)
    if not again.at:
        return output
    alone = isinstance(output, Tensor)
    numbers = itertools.count()

    def record(tensor: Tensor) -> Record | Tensor:
        number = next(numbers)
        if not (alone or tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return record_one(again, tensor, number, alone)

    return map_instances(Tensor, record, output)


def record_twin(call: Call, *_: Any, divides: bool = True, **__: Any) -> Any:
    """Record any differentiable call by the definition, :func:`twin`."""

    def record_one(again: Again, output: Tensor, number: int, alone: bool) -> Record:
        propagate = _twin(again, number, None if divides else call.save(output), alone=alone)
        tail = _tail_of_twin(call, output, again) if divides and alone else None
        return Record(
            output, again.sources, propagate, vanishing=divides, constants=again.places, tail=tail
        )

    return record_again(call, record_one)


def _twin(again: Again, number: int, z: SavedTensor | None, *, alone: bool) -> Propagate:
    """The backward function of the twin rule for one output of a call.

    With ``z``, the output, relevance is multiplied by its magnitude first. If the call has no other output,
    an output that does not depend on the inputs is an error.
    """

    def propagate(s: Tensor) -> list[Tensor]:
        given = s if z is None else s * magnitude(z())
        plain = again.values()
        absolute = [
            magnitude(v) if v.is_floating_point() and not again.is_place[i] else v
            for i, v in enumerate(plain)
        ]
        depends = False

        def run(func: Callable[..., Any], others: list[Tensor], i: int, x: Tensor) -> Tensor:
            nonlocal depends
            results = again.run(func, [*others[:i], x, *others[i + 1 :]])
            result = instances_in(Tensor, results)[number]
            depends = depends or result.requires_grad
            return result

        shares = []
        for i in again.at:
            call = partial(run, again.func, plain, i)
            absolute_call = partial(run, again.absolute_func, absolute, i)
            shares.append(twin(plain[i], call, absolute_call, given))
        if alone and not depends:
            refuse_without_gradient(again, "twin")
        return shares

    return propagate


def refuse_without_gradient(again: Again, rule: str) -> NoReturn:
    """Raise an error for a call without the gradient that its rule needs."""
    raise UnsupportedCallError(
        f"Expected {again.name} to be differentiable, as the {rule} rule requires, but got a result "
        f"without a gradient with respect to its inputs. Use another rule: "
        f"`captum_abslrp.rules.ConstantRule()` to treat the result as a constant, or "
        f"`PassThroughRule()` to pass relevance on unchanged."
    )


_BY_GRADIENT = frozenset("amax amin logsumexp maximum minimum torchvision::roi_pool".split())
"""Calls that select or weight their inputs; the gradient is the weight of each input."""


_LINEAR = frozenset(
    "index_add scatter_add torchvision::ps_roi_align torchvision::ps_roi_pool torchvision::roi_align".split()
)
"""Calls that are linear in all of their inputs jointly, without negative coefficients."""


_NORMS = frozenset("linalg_norm linalg_vector_norm norm".split())


def _tail_of_twin(call: Call, output: Tensor, again: Again) -> Tail | None:
    """The tail of a call with the twin rule, or None."""
    name = call.name.removeprefix(PREFIX)
    negative = "alpha" in call.kwargs  # of `index_add`
    if negative or name not in _NORMS | _BY_GRADIENT | _LINEAR:
        return None
    z = call.save(output)

    def run(change: Function) -> tuple[Tensor, list[Tensor]]:
        """Run the call on changed inputs with gradients; return the result and these inputs."""
        values = again.values()
        with torch.enable_grad():
            for i in again.at:
                values[i] = change(values[i].detach()).requires_grad_()
            return again.run(again.func, values), [values[i] for i in again.at]

    def by_gradient(s: Tensor) -> list[Tensor]:
        result, leaves = run(lambda x: x)
        return list(torch.autograd.grad(result, leaves, s.to(result.dtype)))

    def by_share(relevance: Tensor) -> list[Tensor]:
        result, leaves = run(magnitude)
        whole = result.detach() - run(torch.zeros_like)[0].detach()  # without constants
        parts = (relevance / whole).masked_fill(whole <= 0, 0)
        found = torch.autograd.grad(result, leaves, parts.to(result.dtype))
        return [x.detach() * part for x, part in zip(leaves, found, strict=True)]

    def by_degree(relevance: Tensor) -> list[Tensor]:
        # A norm is homogeneous of degree one: the terms x_i dz/dx_i are positive and sum to z.
        parts = by_gradient((relevance / z()).masked_fill(z() == 0, 0))
        return [magnitude(x()) * part for x, part in zip(again.inputs, parts, strict=True)]

    if name in _NORMS:
        return tail_of(z, again.inputs, by_degree)
    share = by_share if name in _LINEAR else by_gradient
    return tail_of(z, again.inputs, share, keeps_sign=True)


PLACES: dict[str, tuple[int, str]] = {
    "grid_sample": (1, "grid"),
    "torchvision::deform_conv2d": (2, "offset"),
    "torchvision::ps_roi_align": (1, "rois"),
    "torchvision::ps_roi_pool": (1, "rois"),
    "torchvision::roi_align": (1, "rois"),
    "torchvision::roi_pool": (1, "rois"),
}
"""Calls with an argument of sampling positions, which is a constant of the call: its position and name."""


def _places(call: Call) -> list[Tensor]:
    """The arguments of a call with sampling positions, whose magnitude has no meaning."""
    if call.name not in PLACES:
        return []
    position, name = PLACES[call.name]
    place = call.args[position] if len(call.args) > position else call.kwargs.get(name)
    return [place] if isinstance(place, Tensor) else []


class TwinRule(DividingRule):
    r"""The definition of absLRP, for any differentiable call.

    :math:`R_{in} = x \, \partial/\partial x \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle` with
    :math:`s = R / (|z| + \epsilon)` (the paper's rule, section 1 of the method): the sum of the call and
    its *twin*, the same call on absolute input and parameters. It needs two more forward passes of the
    call; the other absLRP rules are its closed forms. Complex tensors are treated as their real and imaginary
    parts: ``x``, ``w`` and ``z`` are real views (``torch.view_as_real``).

    Args:
        divide: whether to divide relevance by the magnitude of the output. If False, :math:`s = R`.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = TwinRule()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def form_of(self, call: Call) -> Form | None:
        return record_twin if self.divide else partial(record_twin, divides=False)
