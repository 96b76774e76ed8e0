"""Inspection of a model by one forward pass: the rule of each call, and the stride of the first convolution.

No relevance is computed. Calls without a rule raise no error; all of them are listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from captum._utils.common import _format_additional_forward_args
from torch import Tensor, nn
from torch.overrides import resolve_name

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.checks import check_initialized
from captum_abslrp.engine.arguments import tensors_in
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.modules import Frame
from captum_abslrp.engine.names import canonical_name
from captum_abslrp.engine.recording import Recording
from captum_abslrp.engine.samples import Misaligned
from captum_abslrp.engine.state import unchanged
from captum_abslrp.engine.tape import Record
from captum_abslrp.mappings import Mapping, MappingScope, find_layer_rule, get_mapping
from captum_abslrp.text import markdown_table

__all__ = ["InspectedCall", "Inspection", "inspect_rules", "stem_stride"]

MOVES = "moves elements"

Run = TypeVar("Run", bound="_Survey")


@dataclass(frozen=True)
class InspectedCall:
    """A call of the forward pass, and its rule.

    Attributes:
        call: the function, for example ``"torch.nn.functional.conv2d"``.
        path: the module that makes the call, for example ``"blocks.0.attn.proj"``.
        layer: the type of this module.
        rule: its rule, or None.
        origin: the source of the rule: ``"mapping 'vit'"``, ``"registered"``, ``"module.rule"``.
    """

    call: str
    path: str
    layer: str
    rule: str | None
    origin: str


@dataclass(frozen=True)
class Inspection:
    """The calls of a model in the order of its forward pass; prints as a table.

    Attributes:
        calls: every call that relevance flows through.
    """

    calls: tuple[InspectedCall, ...]

    @property
    def unsupported(self) -> tuple[InspectedCall, ...]:
        """The calls that have no rule."""
        return tuple(call for call in self.calls if call.rule is None)

    def __str__(self) -> str:
        """One line per pair of call and rule, with the number of calls and the first module."""
        groups: dict[tuple[str, str, str], list[InspectedCall]] = {}
        for call in self.calls:
            rule = "NONE" if call.rule is None else call.rule
            groups.setdefault((call.call, rule, call.origin), []).append(call)
        # Calls without a rule come first.
        ordered = sorted(groups.items(), key=lambda group: group[1][0].rule is not None)
        return markdown_table(
            ["call", "rule", "from", "calls", "first in"],
            [
                [*key, str(len(calls)), f"{calls[0].path or '(model)'} ({calls[0].layer})"]
                for key, calls in ordered
            ],
        )


def inspect_rules(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: Any = None,
    *,
    mapping: Mapping | str | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Inspection:
    """Run a model once and list the rule of each of its calls.

    Args:
        model, mapping, output: as in :class:`~captum_abslrp.AbsLRP`.
        inputs: an example input of shape (B, ...), or a tuple of inputs; one sample is enough. Put the model
            and the input on the ``meta`` device to inspect a large model without computing values.
        additional_forward_args: arguments of the model after the inputs, one argument or a tuple.

    Returns:
        The calls and their rules. A call that is decomposed (attention) is followed by the calls that it
        consists of.

    Raises:
        TypeError, ValueError: as in :class:`~captum_abslrp.AbsLRP` and its ``attribute``.

    Example:
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return torch.erfinv(super().forward(x))
        >>> inspection = inspect_rules(Net(nn.Linear(3, 2), nn.Tanh()), torch.rand(1, 3))
        >>> [call.call for call in inspection.unsupported]
        ['torch.erfinv']
        >>> print(inspection)
        | call                       | rule         | from              | calls | first in      |
        | -------------------------- | ------------ | ----------------- | ----- | ------------- |
        | torch.erfinv               | NONE         |                   | 1     | (model) (Net) |
        | torch.nn.functional.linear | AbsLRPRule() | mapping 'generic' | 1     | 0 (Linear)    |
        | torch.tanh                 | AbsLRPRule() | mapping 'generic' | 1     | 1 (Tanh)      |
    """
    attributor = AbsLRP(model, mapping, output=output)
    survey = _surveyed(attributor, inputs, additional_forward_args, _Survey)
    return Inspection(tuple(survey.calls))


def stem_stride(model: nn.Module, inputs: Tensor, additional_forward_args: Any = None) -> int:
    """Return the stride of a model's first convolution, or its patch size.

    Maps show a grid of this size, which :func:`~captum_abslrp.visualization.smooth_map` removes. The
    function runs the model up to the first convolution that depends on the image, whether a module or a call
    of ``torch.nn.functional``. It does not modify the model.

    Args:
        model: as in :class:`~captum_abslrp.AbsLRP`.
        inputs: an example image, (B, C, H, W); one sample is enough.
        additional_forward_args: arguments of the model after the inputs, one argument or a tuple.

    Returns:
        The stride in pixels of the image: the stride of the convolution (the larger one of height and width)
        times the factor by which the model downsamples the image before. It is 1 if no two-dimensional
        convolution depends on the image, even if a linear layer embeds patches.

    Raises:
        ValueError: if `inputs` do not have shape (B, C, H, W), or if a lazy layer is not initialized.
        TypeError: if `inputs` are not floating-point, or if the model cannot be explained.
        UnsupportedCallError: if the result of a call before the convolution cannot be tracked.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.ReLU(), nn.Flatten())
        >>> stem_stride(model, torch.rand(1, 3, 32, 32))
        2
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"Expected `inputs` to be a floating-point tensor, but got {found}.")
    if inputs.ndim != 4 or inputs.numel() == 0:
        raise ValueError(
            "Expected `inputs` to have shape (B, C, H, W) without empty axes, but got "
            f"{tuple(inputs.shape)}."
        )
    try:
        _surveyed(AbsLRP(model), inputs, additional_forward_args, _StemSearch)
    except _StemFound as found:
        return found.stride
    return 1


def _surveyed(
    attributor: AbsLRP,
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: Any,
    start: Callable[[Mapping | None, nn.Module, list[Tensor]], Run],
) -> Run:
    """Record one forward pass of a model without modifying it."""
    check_initialized(attributor.model)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    extra = _format_additional_forward_args(additional_forward_args) or ()

    def survey(rows: slice) -> Run:
        with torch.inference_mode(False), torch.enable_grad(), unchanged(attributor.model):
            leaves = [x[rows].clone().detach().requires_grad_() for x in given]
            recording = start(attributor.mapping, attributor.model, leaves)
            attributor.run(leaves, extra, recording)
        return recording

    try:
        return survey(slice(None))
    except Misaligned:
        return survey(slice(1))


class _Survey(Recording):
    """Records the rule of each call, and continues after calls without a rule."""

    scope: type[MappingScope] = MappingScope

    def __init__(self, mapping: Mapping | None, model: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__(self.scope(mapping), inputs=inputs, batch_size=len(inputs[0]), model=model)
        self.fuses = False  # each part is listed
        self.mapping = mapping
        self.calls: list[InspectedCall] = []

    def _note(self, call: str, rule: str | None, origin: str) -> None:
        frame = self.innermost
        self.calls.append(
            InspectedCall(call, frame.path, type(frame.module).__name__, rule, origin)
        )

    def rule_of(self, call: Call) -> Any:
        rule, frame = super().rule_of(call), self.innermost
        if rule is not None:
            found = (self.mapping or frame.table or get_mapping()).find(call)
            origin = found[1] if frame.rule is None and found else "module.rule"
            self._note(_name_of(call.func), repr(rule), origin)
        return rule

    def record_layer(self, frame: Frame, output: Any) -> Any:
        kind = type(frame.module).__name__
        own = find_layer_rule(frame.module) is not frame.layer_rule  # type: ignore[arg-type]
        origin = "module.rule" if own else "registered"
        self.calls.append(
            InspectedCall(f"{kind}.forward", frame.path, kind, repr(frame.layer_rule), origin)
        )
        return super().record_layer(frame, output)

    def pass_through(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        self._note(_name_of(func), MOVES, "")
        return super().pass_through(name, func, args, kwargs)

    def run_without_rule(self, call: Call) -> Any:
        with torch.no_grad():
            result = call.func(*call.args, **call.kwargs)
        if not tensors_in(result):  # a property of a tensor, not a computation
            return result
        inputs = [t for t in tensors_in((call.args, call.kwargs)) if carries_relevance(t)]
        self._note(_name_of(call.func), None, "")

        def as_dependent(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return tuple(map(as_dependent, value))
            if not (
                isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            ):
                return value
            return self.attach(Record(value, inputs, lambda relevance: []))

        return as_dependent(result)

    def refuse_unseen(self, node: Any) -> None:
        self._note(node.name().removesuffix("Backward"), None, "")


class _StemFound(BaseException):
    """Ends the forward pass at the first convolution; `except Exception` in a model does not catch it."""

    def __init__(self, stride: int) -> None:
        super().__init__(stride)
        self.stride = stride


class _NoRules(MappingScope):
    """A scope without rules, so that layers do not hide their calls."""

    rule_of_module = rule_of_layer = staticmethod(lambda module: None)

    def rule_of_call(self, call: Call, table: Mapping | None) -> None:
        return None


class _StemSearch(_Survey):
    """Finds the first convolution that depends on the image."""

    scope = _NoRules

    def __init__(self, mapping: Mapping | None, model: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__(mapping, model, inputs)
        self.pixels = _pixels(inputs[0])

    def run_without_rule(self, call: Call) -> Any:
        if call.name != "conv2d":
            return super().run_without_rule(call)
        given = dict(zip(("input", "weight", "bias", "stride"), call.operands)) | call.kwargs
        stride = given.get("stride", 1)
        # Tiling an image keeps its number of pixels; resizing it or folding it into channels does not.
        before = max(1, round(math.sqrt(self.pixels / _pixels(given["input"]))))
        raise _StemFound(before * (stride if isinstance(stride, int) else max(stride)))


def _pixels(images: Tensor) -> int:
    return images.numel() // images.shape[-3]


def _name_of(func: Any) -> str:
    return resolve_name(func) or canonical_name(func)[0]
