"""Captum's rules in this package, rules of this package under Captum's ``LRP``, and rules of layers."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from captum_abslrp.engine import numerics
from captum_abslrp.engine.arguments import instances_in
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import has_complex
from captum_abslrp.engine.dependence import carries_relevance, is_source
from captum_abslrp.engine.nodes import ModuleInput, ModuleOutput
from captum_abslrp.engine.protocols import CallRule
from captum_abslrp.engine.recording import Recording
from captum_abslrp.engine.tape import Record

_LAYER_RULES: dict[type[nn.Module], CallRule] = {}
"""Registered rules by layer class; each layer is recorded as one call."""


def register_layer_rule(layer: type[nn.Module], rule: CallRule, *, overwrite: bool) -> None:
    """Register a rule that records the layers of a class, including subclasses, as one call."""
    if layer in _LAYER_RULES and not overwrite:
        raise ValueError(
            f"Expected a layer class without a rule, but got {layer.__name__}, which has "
            f"{_LAYER_RULES[layer]}. Pass `overwrite=True` to replace it."
        )
    _LAYER_RULES[layer] = rule


def find_layer_rule(module: nn.Module) -> Any:
    """Return the rule that is registered for the class of a layer or one of its base classes, or None."""
    if not _LAYER_RULES:
        return None
    return next((_LAYER_RULES[c] for c in type(module).__mro__ if c in _LAYER_RULES), None)


def rule_of_module(module: nn.Module) -> Any:
    """Return the rule of this package that is set on a module, for all calls inside it, or None."""
    own = getattr(module, "rule", None)
    return own if _is_ours(own) else None


def rule_of_layer(module: nn.Module) -> CallRule | None:
    """Return the rule that records a module as one call, or None.

    This is a Captum rule (``EpsilonRule``) that is set on the module, or the rule that is registered for its
    class. A rule of this package that is set on the module replaces the registered rule.
    """
    own, registered = getattr(module, "rule", None), find_layer_rule(module)
    if isinstance(own, PropagationRule) and not _is_ours(own):
        return CaptumRule(own)
    ours: Any = rule_of_module(module)
    return registered if registered is None or ours is None else ours


def _is_ours(rule: Any) -> bool:
    return isinstance(rule, PropagationRule) and hasattr(rule, "record")


class CaptumRule:
    """A rule of Captum, or a custom rule for Captum, that records a layer as one call.

    The rule runs as under ``captum.attr.LRP``, on copies of the layer and of the rule, because it modifies
    weights and stores state on both.
    """

    def __init__(self, rule: PropagationRule) -> None:
        self.rule = rule

    def __repr__(self) -> str:
        package = type(self.rule).__module__.partition(".")[0]
        return f"{'captum.' if package == 'captum' else ''}{type(self.rule).__name__}()"

    def suits_complex(self, call: Call) -> bool:
        """Return True; :meth:`record` raises for complex tensors."""
        return True

    def runs_parts_of(self, call: Call) -> bool:
        """Return True, so that the call is not converted to real views."""
        return True

    def record(self, call: Call) -> Record:
        """Record a layer with positional tensors and one output."""
        self._check(call)
        output, layer, inputs = call.result, call.module, call.args
        z = call.save(output)
        saved = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
        at = [i for i, x in enumerate(inputs) if is_source(x)]

        def propagate(s: Tensor) -> list[Tensor]:
            relevances = self._relevance(layer, saved, at, numerics.relevance(z(), s))
            return [
                numerics.per_magnitude(r, saved[i]) for i, r in zip(at, relevances, strict=True)
            ]

        return Record(output.detach(), [inputs[i] for i in at], propagate, scaled=False)

    def _check(self, call: Call) -> None:
        """Raise if the rule cannot record a layer: it only supports positional real tensors."""
        name = type(self.rule).__name__
        if not isinstance(call.result, Tensor):
            raise TypeError(
                f"Expected `{call.path}`, which has the rule {name}, to return one tensor, but got "
                f"{type(call.result).__name__}. Set the rule on a layer inside it."
            )
        others = [x for x in call.args if not isinstance(x, Tensor)]
        if any(map(carries_relevance, instances_in(Tensor, (others, call.kwargs)))):
            raise TypeError(
                f"Expected `{call.path}`, which has the rule {name}, to be called with positional "
                f"tensors, but got keyword arguments or containers of tensors. Set the rule on a layer "
                f"inside it, or register the layer with `captum_abslrp.rules.TwinRule()`."
            )
        if has_complex((call.args, call.result)):
            raise TypeError(
                f"Expected `{call.path}`, which has the rule {name} of Captum, to use real tensors, but got "
                f"complex tensors. Set a rule of captum_abslrp.rules on it, or register the layer with "
                f"`TwinRule()`."
            )

    def _relevance(
        self, module: nn.Module | None, inputs: list[Any], at: list[int], relevance: Tensor
    ) -> list[Tensor]:
        """Compute the relevance of the inputs at some positions."""
        layer: Any = copy.deepcopy(module)
        own = copy.copy(self.rule)
        own.relevance_input = defaultdict(list)
        own.relevance_output = {}
        layer.activations = {}  # Captum stores them on the module
        with torch.no_grad():
            own.forward_hook_weights(layer, tuple(inputs), layer(*map(_copied, inputs)))
        with torch.enable_grad():
            leaves = {i: inputs[i].clone().requires_grad_() for i in at}
            given = tuple(leaves[i].clone() if i in leaves else x for i, x in enumerate(inputs))
            # Clone the inputs, because the layer may modify them in place.
            result = own.forward_hook(layer, given, layer(*map(_copied, given)))
            found = torch.autograd.grad(result, list(leaves.values()), relevance.to(result.dtype))
            return list(found)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class SingleRule:
    """The scope of one module under Captum's ``LRP``: a rule for all calls inside."""

    def __init__(self, rule: CallRule) -> None:
        self._rule = rule

    rule_of_module: Callable[..., Any] = staticmethod(rule_of_module)
    rule_of_layer: Callable[..., Any] = staticmethod(rule_of_layer)

    def table_of(self, module: nn.Module) -> Any:
        """Return None, because no mapping is used."""
        return None

    def rule_of_call(self, call: Call, table: Any) -> CallRule | None:
        """Return the rule."""
        return self._rule

    def is_default(self, call: Call, rule: Any) -> bool:
        """Return False, because the user has set the rule."""
        return False


_IDEMPOTENT = (nn.ReLU, nn.modules.dropout._DropoutNd)
"""Modules that can run on their own output, because Captum passes an input that was modified in place."""


def run_under_captum(rule: CallRule, module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Run a module again under Captum's ``LRP``, so that its backward pass is a rule of this package.

    The module has one input tensor, (B, ...). If it is a single call, its output is not recomputed.
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if has_complex((inputs, outputs)):
        raise TypeError(
            f"Expected {type(module).__name__} to map real tensors to a real tensor under Captum's `LRP`, "
            f"but got complex tensors. Set the rule on an outer module, or use `AbsLRP`."
        )
    if getattr(module, "inplace", False) and not isinstance(module, _IDEMPOTENT):
        raise ValueError(
            f"Expected {type(module).__name__} not to work in place, as {rule} requires, but got "
            f"`inplace=True`. Set `module.inplace = False`."
        )
    # Leaf modules of torch make a single call, whose result is the output of the module.
    own = type(module).__module__.startswith("torch.nn.") and not list(module.children())
    given = [ModuleInput.apply(x) for x in inputs]
    with Recording(
        SingleRule(rule),
        inputs=[x for x in given if x.requires_grad],
        batch_size=inputs[0].shape[0],
        result=outputs if own and isinstance(outputs, Tensor) else None,
    ):
        output = module.forward(*given)
    return tree_map_only(Tensor, ModuleOutput.apply, output)
