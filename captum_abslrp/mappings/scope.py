"""The scope of a model: the rule of a call by the mapping, the modules and the layer classes of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.protocols import CallRule
from captum_abslrp.mappings.registry import Mapping, find_mapping, get_mapping
from captum_abslrp.rules.captum import rule_of_layer, rule_of_module

__all__ = ["MappingScope"]


class MappingScope:
    """Finds the rule of a call in the mapping of the innermost module of a registered architecture.

    Args:
        mapping: a mapping to use for all calls instead, or None.
    """

    def __init__(self, mapping: Mapping | None = None) -> None:
        self.mapping = mapping

    rule_of_module: Callable[..., Any] = staticmethod(rule_of_module)
    rule_of_layer: Callable[..., Any] = staticmethod(rule_of_layer)

    def table_of(self, module: nn.Module) -> Mapping | None:
        """The mapping that is registered for the class of a module, or None."""
        return find_mapping(module)

    def rule_of_call(self, call: Call, table: Mapping | None) -> CallRule | None:
        """The rule of a call, or None."""
        return (self.mapping or table or get_mapping()).rule_of_call(call)

    def is_default(self, call: Call, rule: Any) -> bool:
        """Whether a rule is the rule of the generic mapping for calls of this name."""
        return rule is not None and rule is get_mapping().rule_of_name(call.name)
