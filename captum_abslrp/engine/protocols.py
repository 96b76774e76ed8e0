"""Interfaces of rules and mappings for the engine."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from captum_abslrp.engine.calls import Call


class CallRule(Protocol):
    """A rule: runs a call and records how to propagate relevance through it."""

    def record(self, call: Call) -> Any:
        """Run a call; return a :class:`~captum_abslrp.engine.tape.Record` or a result without relevance."""

    def suits_complex(self, call: Call) -> bool:
        """Whether the rule can record a call on complex tensors, which it receives as real views."""

    def runs_parts_of(self, call: Call) -> bool:
        """Whether the rule decomposes a call into simpler calls, each with its own rule."""


class Scope(Protocol):
    """Finds the rule of a call, a layer or a module."""

    def table_of(self, module: nn.Module) -> Any:
        """The table of rules for a module and its submodules; None to use that of the outer module."""

    def rule_of_call(self, call: Call, table: Any) -> CallRule | None:
        """The rule of a call by the innermost table (None if there is no table), or None."""

    def rule_of_module(self, module: nn.Module) -> CallRule | None:
        """The rule that the user has set for all calls inside a module, or None."""

    def rule_of_layer(self, module: nn.Module) -> CallRule | None:
        """The rule that records a module as one call, or None."""

    def is_default(self, call: Call, rule: Any) -> bool:
        """Whether a rule is the default of all models for calls of this name."""
