"""What all rules share: the base class, and the rules that only pass relevance or stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn

from captum_abslrp.engine import numerics
from captum_abslrp.engine.arguments import on_host, tensors_in
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import suits_parts
from captum_abslrp.engine.dependence import carries_relevance, is_source
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.engine.numerics import LEAST
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.captum import run_under_captum
from captum_abslrp.rules.tails import passed_on, scaled_tail

Form = Callable[..., Any]


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
        """Run a call and record how relevance goes from its output to its inputs.

        Args:
            call: the call. PyTorch records no history meanwhile.

        Returns:
            A :class:`~captum_abslrp.engine.tape.Record`.

        Raises:
            TypeError: if the rule has no form for this kind of call.
        """
        form = self.form_of(call)
        if form is None:
            raise TypeError(
                f"Expected {type(self).__name__} to be used for one of {sorted(self.closed_forms)}, but "
                f"got {call}. Use `AbsLRPRule()` or `TwinRule()` there."
            )
        return form(call, *call.operands, **call.kwargs)

    def form_of(self, call: Call) -> Form | None:
        """The form that records a call, or None.

        Args:
            call: the call.
        """
        return self.closed_forms.get(call.name)

    def suits_complex(self, call: Call) -> bool:
        """Whether the rule can record a call on complex tensors, which it sees as real views.

        Args:
            call: the call, on complex tensors.
        """
        has_form = suits_parts(call.name) or self.runs_parts_of(call)
        return call.name not in self.closed_forms or has_form

    def runs_parts_of(self, call: Call) -> bool:
        """Whether the rule runs the calls that a call is made of, each by its own rule.

        Args:
            call: the call.
        """
        return getattr(self.closed_forms.get(call.name), "runs_parts", False)

    def forward_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Entry for Captum's ``LRP``: runs the module again under this rule."""
        return run_under_captum(self, module, inputs, outputs)

    def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Captum's place to change weights: these rules need none of it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PassThroughRule(Rule):
    """Relevance moves with its element: reshape, scaling by a constant, dropout in evaluation mode.

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
    """No relevance: the result is a constant of the call that uses it, as a divisor is.

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
    """The result is a constant of the call that uses it: no relevance goes this way."""
    return call.run(lambda: call.func(*call.args, **call.kwargs))


def record_passed(call: Call, *_: Any, **__: Any) -> Any:
    """Relevance moves with its element."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    inputs = [t for t in tensors_in((call.args, call.kwargs)) if carries_relevance(t)]
    if not isinstance(output, Tensor) or any(s.shape != output.shape for s in inputs):
        raise TypeError(
            f"Expected relevance to pass through a call that keeps the shape of its input, but got "
            f"{call}."
        )
    if len(inputs) == 1 and is_alias(output, inputs[0]):  # dropout that does nothing
        return inputs[0]
    z, kept = call.save(output), [call.save(source) for source in inputs]
    dtypes = [source.dtype for source in inputs]

    def propagate(s: Tensor) -> list[Tensor]:
        # Zeros have relevance, too: that of a class whose log-probability is rounded to 0, say.
        relevance = numerics.relevance(z().abs().clamp(min=LEAST), s)
        return [
            numerics.per_magnitude(relevance, x(), dtype)
            for x, dtype in zip(kept, dtypes, strict=True)
        ]

    tail = None
    if len(inputs) == 1:
        sign = (lambda: -1.0) if call.name.removeprefix(PREFIX) == "neg" else None
        tail = passed_on(z, kept[0], sign)
    return Record(output, inputs, propagate, scaled=False, tail=tail)


def passed(
    call: Call,
    output: Tensor,
    inputs: Sequence[Tensor],
    factor: Callable[[], float | Tensor] = lambda: 1.0,
    *,
    nonnegative: bool = False,
) -> Record:
    """Scaling by a constant factor: relevance moves with its element."""

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
    x, w, z = call.save(input), call.save(weight), call.save(output.clone())
    least = numerics.rounding(output.dtype)

    @once
    def noise() -> Tensor:
        sizes = run(numerics.magnitude(x()), numerics.magnitude(w()))
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


def check_batched(call: Call, input: Tensor, dims: int) -> None:
    if input.dim() != dims + 2:
        raise ValueError(
            f"Expected {call} to see a batch, an input of {dims + 2} dimensions, but got shape "
            f"{tuple(input.shape)}. Add the batch dimension to `inputs`: `x.unsqueeze(0)`."
        )
