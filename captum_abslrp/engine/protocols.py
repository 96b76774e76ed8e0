"""What the engine asks of rules and mappings."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from captum_abslrp.engine.calls import Call


class CallRule(Protocol):
    """A rule: runs a call and records how relevance goes back through it."""

    def record(self, call: Call) -> Any:
        """Run a call; returns a :class:`~captum_abslrp.engine.tape.Record`, or a result without relevance."""

    def suits_complex(self, call: Call) -> bool:
        """Whether the rule can record a call on complex tensors, which it sees as real views."""

    def runs_parts_of(self, call: Call) -> bool:
        """Whether the rule runs the calls that a call is made of, each by its own rule."""


class Scope(Protocol):
    """Finds the rule of a call, a layer or a module."""

    def table_of(self, module: nn.Module) -> Any:
        """The table of rules for a module and all inside of it, or None: that of the module around it."""

    def rule_of_call(self, call: Call, table: Any) -> CallRule | None:
        """The rule of a call by the innermost table (None outside of all), or None."""

    def rule_of_module(self, module: nn.Module) -> CallRule | None:
        """The rule that the user has set for all calls inside of a module, or None."""

    def rule_of_layer(self, module: nn.Module) -> CallRule | None:
        """The rule that records a module as one call, or None."""

    def is_default(self, call: Call, rule: Any) -> bool:
        """Whether nobody has chosen a rule: it is the one of all models for a call of this name."""
