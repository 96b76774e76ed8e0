"""Rules that select another rule depending on the call."""

from __future__ import annotations

from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.rules.base import Form, PassThroughRule, Rule, record_constant

__all__ = ["AttentionRule", "PowerRule"]


class AttentionRule(Rule):
    """One rule for softmax in attention, and another for softmax that computes class scores.

    Softmax of a tensor with at least three dimensions inside the model counts as attention. Softmax in a
    target function, ``target=lambda out: out.softmax(1)[:, 3]``, does not.

    Args:
        rule: the rule in attention, such as ``ConstantRule()``.
        elsewhere: the rule of all other calls.

    Example:
        >>> from captum_abslrp.rules import ConstantRule
        >>> AttentionRule(ConstantRule(), PassThroughRule())
        AttentionRule(ConstantRule(), PassThroughRule())
    """

    def __init__(self, rule: Rule, elsewhere: Rule) -> None:
        self.rule = rule
        self.elsewhere = elsewhere

    def form_of(self, call: Call) -> Form | None:
        given = call.operands[0] if call.operands else call.kwargs.get("input")
        attends = isinstance(given, Tensor) and given.dim() > 2 and not call.recording.in_score
        return (self.rule if attends else self.elsewhere).form_of(call)

    def __repr__(self) -> str:
        return f"AttentionRule({self.rule!r}, {self.elsewhere!r})"


class PowerRule(PassThroughRule):
    """Pass relevance through powers; powers with a negative exponent are divisors, and thus constants.

    Example:
        >>> LRP(nn.Sequential(nn.Linear(3, 4)).eval(), "epsilon", output=lambda z: z**2).attribute(
        ...     torch.rand(2, 3), 1
        ... ).shape
        torch.Size([2, 3])
    """

    def form_of(self, call: Call) -> Form | None:
        exponent = call.operands[1] if len(call.operands) > 1 else call.kwargs.get("exponent")
        if isinstance(exponent, (int, float)) and exponent < 0:
            return record_constant
        return super().form_of(call)
