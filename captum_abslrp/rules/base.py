"""The base class of all rules, rules that pass relevance on or stop it, and helpers of closed forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn

from captum_abslrp.engine import numerics
from captum_abslrp.engine.arguments import on_host, tensors_in
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import suits_parts
from captum_abslrp.engine.dependence import carries_relevance, is_source
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.captum import run_under_captum
from captum_abslrp.rules.tails import passed_on, scaled_tail

Form = Callable[..., Any]
"""Runs and records a call. It receives the call and its arguments and returns a record, or a result without
relevance."""

Function = Callable[[Tensor], Tensor]

Made = TypeVar("Made")


class Rule(PropagationRule):
    """Base class of the absLRP rules.

    A subclass lists its closed forms in ``closed_forms``, by the canonical name of the call, or overrides
    :meth:`record`.

    Example:
        >>> class PlainGradient(Rule):
        ...     def record(self, call):
        ...         x = call.args[0]
        ...         return Record(call.run(lambda: call.func(x)), [x], lambda s: [s])
        >>> layer = nn.Tanh()
        >>> layer.rule = PlainGradient()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, Form]] = {}

    def record(self, call: Call) -> Any:
        """Run a call and record how to propagate relevance from its output to its inputs.

        The method runs without autograd.

        Returns:
            A :class:`~captum_abslrp.engine.tape.Record`. Any other result is a constant for later calls.

        Raises:
            UnsupportedCallError: if the rule has no form for the call.
        """
        form = self.form_of(call)
        if form is None:
            # Not a TypeError, which Python would replace in operators such as `*`.
            raise UnsupportedCallError(
                f"Expected {type(self).__name__} to be used for one of {sorted(self.closed_forms)}, but "
                f"got {call}. Use `AbsLRPRule()` or `TwinRule()` for this call."
            )
        return form(call, *call.operands, **call.kwargs)

    def form_of(self, call: Call) -> Form | None:
        """Return the form that records a call, or None."""
        return self.closed_forms.get(call.name)

    def suits_complex(self, call: Call) -> bool:
        """Whether the rule can record a call on complex tensors, which it receives as real views."""
        known = call.name in self.closed_forms
        return not known or suits_parts(call.name) or self.runs_parts_of(call)

    def runs_parts_of(self, call: Call) -> bool:
        """Whether the rule decomposes a call into simpler calls, each with its own rule."""
        return getattr(self.closed_forms.get(call.name), "runs_parts", False)

    def forward_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Hook for Captum's ``LRP``, which runs the module again under this rule."""
        return run_under_captum(self, module, inputs, outputs)

    def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Hook for Captum to modify weights, which is not needed here."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class DividingRule(Rule):
    """Base class of rules with an optional division by the magnitude of the output."""

    def __init__(self, *, divide: bool = True) -> None:
        self.divide = divide

    def form_of(self, call: Call) -> Form | None:
        form = super().form_of(call)
        return form if form is None or self.divide else partial(form, divides=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.divide else 'divide=False'})"


class PassThroughRule(Rule):
    """Pass the relevance of each element on unchanged: scaling by a constant, dropout in evaluation mode.

    Example:
        >>> layer = nn.Dropout()
        >>> layer.rule = PassThroughRule()
        >>> model = nn.Sequential(nn.Linear(3, 2), layer).eval()
        >>> AbsLRP(model).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def form_of(self, call: Call) -> Form | None:
        return record_passed


class ConstantRule(Rule):
    """Pass on no relevance: the result is a constant for later calls, as for a divisor.

    Example:
        >>> class Gated(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) * x.softmax(1)
        >>> mapping = get_mapping().extended({"softmax": ConstantRule()})
        >>> AbsLRP(Gated(3, 3), mapping).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def form_of(self, call: Call) -> Form | None:
        return record_constant


def record_constant(call: Call, *_: Any, **__: Any) -> Tensor:
    """Run a call without a record, so that its result is a constant for later calls."""
    return call.run(lambda: call.func(*call.args, **call.kwargs))


def record_passed(call: Call, *_: Any, **__: Any) -> Any:
    """Record a call that passes the relevance of each element on unchanged."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    inputs = [t for t in tensors_in((call.args, call.kwargs)) if carries_relevance(t)]
    if not isinstance(output, Tensor) or any(s.shape != output.shape for s in inputs):
        raise UnsupportedCallError(
            f"Expected `PassThroughRule` to be used for a call that keeps the shape of its input, but got "
            f"{call}. Use `TwinRule()` for this call."
        )
    if len(inputs) == 1 and is_alias(output, inputs[0]):  # inactive dropout
        return inputs[0]
    z, saved = call.save(output), [(call.save(x), x.dtype) for x in inputs]

    def propagate(s: Tensor) -> list[Tensor]:
        # Zeros can have relevance, for example a class whose log-probability is rounded to 0.
        relevance = numerics.relevance(z().abs().clamp(min=numerics.LEAST), s)
        return [numerics.per_magnitude(relevance, x(), dtype) for x, dtype in saved]

    ratio = once(lambda: (z() / saved[0][0]()).abs_().nan_to_num_(0.0, 0.0, 0.0))

    def without_zeros(s: Tensor) -> list[Tensor]:
        return [s if call.name == "relu" else s.mul_(ratio())]

    tail = None
    if len(inputs) == 1:
        sign = (lambda: -1.0) if call.name.removeprefix(PREFIX) == "neg" else None
        tail = passed_on(z, saved[0][0], sign)
    keeps_zeros = len(inputs) == 1 and _keeps_zeros(call)
    return Record(
        output,
        inputs,
        propagate,
        scaled=False,
        conserves=len(inputs) == 1,
        without_zeros=without_zeros if keeps_zeros else None,
        nonnegative=call.name == "relu",
        tail=tail,
    )


def _keeps_zeros(call: Call) -> bool:
    """Whether a function maps 0 to 0 and is otherwise a bounded multiple of its input."""
    if call.name == "hardtanh":  # ReLU6, for example
        given = dict(zip(("input", "min_val", "max_val"), call.operands)) | call.kwargs
        return bool(given.get("min_val", -1.0) <= 0 <= given.get("max_val", 1.0))
    return call.name in _KEEPING_ZEROS


_KEEPING_ZEROS = frozenset(
    "celu dropout elu gelu hardswish leaky_relu mish prelu relu relu6 selu silu tanh".split()
)


def passed(
    call: Call,
    output: Tensor,
    inputs: Sequence[Tensor],
    factor: Callable[[], float | Tensor] = lambda: 1.0,
    *,
    nonnegative: bool = False,
) -> Record:
    """Record scaling by a constant factor, which passes relevance on unchanged."""

    def propagate(s: Tensor) -> list[Tensor]:
        value = factor()
        size = value.abs() if isinstance(value, Tensor) else abs(value)
        return [s if isinstance(size, float) and size == 1 else s * size] * len(inputs)

    tail = scaled_tail(call.save(output), factor) if len(inputs) == 1 else None
    return Record(
        output,
        inputs,
        propagate,
        scaled=False,
        nonnegative=nonnegative,
        keeps_sign=True,
        conserves=len(inputs) == 1,
        tail=tail,
    )


def multiplied(
    output: Tensor, input: Tensor, factor: Callable[[], Tensor], **options: Any
) -> Record:
    """Record a call with one input whose rule is a factor for each element.

    The options are those of :class:`~captum_abslrp.engine.tape.Record`.
    """
    made = once(factor)
    return Record(output, [input], lambda s: [s.mul_(made())], **options)


def without_noise(
    call: Call,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    run: Callable[[Tensor, Tensor], Tensor],
) -> Function:
    """Return a function that sets relevance to zero where the output of an affine call is a rounding error.

    This happens in the mean of centered values, written as a product. Only weights of one sign can be means.
    The signs are only checked on the CPU, to avoid synchronization with a device. ``run`` is the product of
    an input with a weight.
    """
    if call.is_nonnegative(input) or not _has_one_sign(weight):
        return lambda s: s
    x, w, z = call.save(input), call.save(weight), call.save(output.clone())
    least = numerics.rounding(output.dtype)

    @once
    def noise() -> Tensor:
        sizes = run(numerics.magnitude(x()), numerics.magnitude(w()))
        return z().abs() <= least * sizes

    return lambda s: s.masked_fill(noise(), 0)


def _has_one_sign(weight: Tensor) -> bool:
    """Whether a constant is known to have entries of one sign only."""
    if weight.numel() == 0 or weight.is_meta or is_source(weight):
        return False
    weight = weight.detach()
    # The weights of almost every layer already differ in sign within their first row.
    few = weight[0].flatten()[:64] if weight.dim() else weight
    return all(on_host((w < 0).any() & (w > 0).any()) is False for w in (few, weight))


def once(compute: Callable[[], Made]) -> Callable[[], Made]:
    """Compute a value on first use, cache it for all seeds, and free the tensors that it depends on."""
    steps = [compute]
    result: list[Made] = []

    def made() -> Made:
        if steps:
            result.append(steps.pop()())
        return result[0]

    return made


def is_alias(output: Tensor, source: Tensor) -> bool:
    """Whether the output shares memory and layout with the input."""
    layouts = [(t.data_ptr(), t.dtype, t.stride(), t.shape) for t in (output, source)]
    return output.numel() > 0 and not output.is_meta and layouts[0] == layouts[1]


def check_batched(call: Call, input: Tensor, dims: int) -> None:
    """Raise if an input with so many spatial dimensions has no batch dimension."""
    if input.dim() != dims + 2:
        raise ValueError(
            f"Expected {call} to get a batch, an input with {dims + 2} dimensions, but got shape "
            f"{tuple(input.shape)}. Add the batch dimension to `inputs`: `x.unsqueeze(0)`."
        )
