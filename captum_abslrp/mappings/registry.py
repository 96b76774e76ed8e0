"""Mappings from calls to rules, and the registry of named mappings."""

from __future__ import annotations

import collections.abc
import difflib
import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.names import CONSTANT, PASS_THROUGH, canonical_name
from captum_abslrp.rules import Rule
from captum_abslrp.rules.captum import register_layer_rule

__all__ = [
    "At",
    "Key",
    "Mapping",
    "find_mapping",
    "get_mapping",
    "list_mappings",
    "register_call_rule",
    "register_mapping",
]


@dataclass(frozen=True)
class At:
    """Matches calls by the module that makes them.

    Args:
        pattern: path of the module, with the wildcards of ``fnmatch``; ``*`` also matches dots. The path is
            relative to the module of the registered architecture, whose own path is ``""``.
        call: canonical name of the call (``"add"``); None matches every call in the module.

    Example:
        >>> At("*pos_drop")
        At(pattern='*pos_drop', call=None)
    """

    pattern: str
    call: str | None = None


Key = str | type[nn.Module] | At
"""A call by its canonical name (``"add"`` for ``torch.Tensor.add`` in the table of ``inspect_rules``), the
calls of a layer type (``nn.Dropout``), or the calls of modules by path (:class:`At`)."""


Entries = Sequence[tuple[Key | tuple[Key, ...], Rule]]


@dataclass(frozen=True)
class Mapping:
    """An ordered table from calls to rules; the first entry that matches a call wins.

    Args:
        name: name of the mapping, in messages and in the registry.
        entries: pairs of a :data:`~captum_abslrp.mappings.registry.Key`, or a tuple of keys, and the rule
            for matching calls.
        base: the mapping to use if no entry matches.
        signed: True if relevance starts as the output itself and the rules distribute it by contributions of
            both signs, as in LRP. False if relevance starts as a share of one, as in absLRP.

    Raises:
        TypeError: if a rule is not an instance of :class:`~captum_abslrp.rules.Rule`.

    Calls that only move elements (``captum_abslrp.engine.names.PASS_THROUGH``: reshape, cat, ...) need no
    rule: relevance moves with its element.

    Example:
        >>> from captum_abslrp.rules import PassThroughRule, TwinRule
        >>> mapping = get_mapping("vit").extended({"erf": TwinRule(), nn.Dropout: PassThroughRule()})
        >>> mapping.name
        'vit (extended)'
    """

    name: str
    entries: Entries
    base: Mapping | None = None
    signed: bool = False

    def __post_init__(self) -> None:
        for keys, rule in self.entries:
            if not isinstance(rule, Rule):
                raise TypeError(
                    f"Expected the rule of {keys!r} in mapping {self.name!r} to be an instance of a rule "
                    f"class, such as `captum_abslrp.rules.TwinRule()`, but got {rule!r}."
                )

    def rule_of_call(self, call: Call) -> Rule | None:
        """Return the rule for a call, or None."""
        found = self.find(call)
        return None if found is None else found[0]

    def find(self, call: Call) -> tuple[Rule, str] | None:
        """Return the rule for a call and its origin, or None."""
        registered = _CALL_RULES.get(call.name) if self.base is None else None
        if registered is not None and self is _MAPPINGS.get("generic"):
            return registered, "registered"
        by_place, by_name = self._index
        at, rule = by_name.get(call.name, (len(self.entries), None))
        for i, key, other in by_place:
            if i < at and _matches(key, call):
                rule = other
                break
        if rule is not None:
            return rule, f"mapping {self.name!r}"
        if registered is not None:
            return registered, "registered"
        return None if self.base is None else self.base.find(call)

    def rule_of_name(self, name: str) -> Rule | None:
        """Return the rule of the table itself, without its base, for all calls of a name, or None."""
        found = self._index[1].get(name)
        return None if found is None else found[1]

    @functools.cached_property
    def _index(self) -> tuple[list[tuple[int, Key, Rule]], dict[str, tuple[int, Rule]]]:
        """The keys that match by module, and the keys that are call names, with their positions."""
        by_place: list[tuple[int, Key, Rule]] = []
        by_name: dict[str, tuple[int, Rule]] = {}
        for i, (keys, rule) in enumerate(self.entries):
            for key in keys if isinstance(keys, tuple) else (keys,):
                if isinstance(key, str):
                    by_name.setdefault(key, (i, rule))
                else:
                    by_place.append((i, key, rule))
        return by_place, by_name

    def extended(self, entries: collections.abc.Mapping[Key | tuple[Key, ...], Rule]) -> Mapping:
        """Return a mapping with additional entries, which take precedence over the existing ones.

        Args:
            entries: keys and rules, in order of precedence.
        """
        name, table = f"{self.name} (extended)", tuple(entries.items())
        return Mapping(name, table, base=self, signed=self.signed)


_MAPPINGS: dict[str, Mapping] = {}
_ARCHITECTURES: dict[str, Mapping] = {}
_CALL_RULES: dict[str, Rule] = {}


def register_mapping(
    mapping: Mapping,
    *,
    architectures: Sequence[str | type[nn.Module]] = (),
    overwrite: bool = False,
) -> Mapping:
    """Register a mapping under its name and for architectures.

    Args:
        mapping: the mapping.
        architectures: model classes that use the mapping by default, or their qualified names, for example
            ``"timm.models.vgg.VGG"``, which are not imported. Subclasses are included.
        overwrite: whether to replace existing entries.

    Returns:
        The mapping.

    Raises:
        TypeError: if an architecture is neither a class nor a qualified name.
        ValueError: if the name or an architecture is already registered and ``overwrite`` is False.

    Example:
        >>> from captum_abslrp.rules import TwinRule
        >>> mine = register_mapping(Mapping("mine", [("erf", TwinRule())], base=get_mapping("vit")))
        >>> get_mapping("mine") is mine
        True
    """
    names = [_qualified_name(architecture) for architecture in architectures]
    taken = [mapping.name] if mapping.name in _MAPPINGS else []
    taken += [name for name in names if name in _ARCHITECTURES]
    if taken and not overwrite:
        raise ValueError(
            f"Expected a new name and new architectures, but got {taken}, which are already registered. "
            f"Pass `overwrite=True` to replace them."
        )
    _MAPPINGS[mapping.name] = mapping
    _ARCHITECTURES.update(dict.fromkeys(names, mapping))
    return mapping


def _qualified_name(architecture: str | type[nn.Module]) -> str:
    if isinstance(architecture, type) and issubclass(architecture, nn.Module):
        return f"{architecture.__module__}.{architecture.__qualname__}"
    if isinstance(architecture, str) and "." in architecture:
        return architecture
    raise TypeError(
        f"Expected `architectures` to be model classes or qualified names such as "
        f"'timm.models.vgg.VGG', but got {architecture!r}."
    )


def register_call_rule(
    call: str | Callable[..., Any] | type[nn.Module], rule: Rule, *, overwrite: bool = False
) -> None:
    """Register a rule for a call, in all models.

    Args:
        call: one of

            - the name of a call as in messages (``"erfinv"``), or the function itself
              (``torch.erfinv``);
            - an operator of a library, ``torch.ops.mylib.fused``, or its name, ``"mylib::fused"``;
            - a custom function that PyTorch can override (``torch.overrides.wrap_torch_function``);
            - a layer class. Each layer is then a single call from its arguments to its outputs (a tensor, or
              a tuple, dict or dataclass of tensors), whatever it runs inside (an ``autograd.Function``, a
              kernel). If it has a state, it must take the state as an argument and return it. Subclasses
              are included.
        rule: the rule, for example :class:`~captum_abslrp.rules.TwinRule`, which works for anything that
            PyTorch can differentiate, including layers with a custom backward pass.
        overwrite: whether to replace a rule of the generic mapping or a registered rule.

    A rule set on a module takes precedence, and so do the entries of an architecture's mapping for a
    registered function. The calls inside a registered layer need no rules.

    Raises:
        TypeError: if the call or the rule has the wrong type.
        ValueError: if the call has a rule and ``overwrite`` is False, or if it needs no rule because it
            only moves elements or its result carries no relevance.

    Example:
        >>> from captum_abslrp.rules import TwinRule
        >>> register_call_rule("erfinv", TwinRule())
        >>> class Inverse(nn.Linear):
        ...     def forward(self, x):
        ...         return torch.erfinv(super().forward(x).tanh())
        >>> AbsLRP(Inverse(3, 2)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """
    if not isinstance(rule, Rule):
        raise TypeError(
            f"Expected `rule` to be an instance of a rule class of captum_abslrp.rules, but got {rule!r}."
        )
    if isinstance(call, type) and issubclass(call, nn.Module):
        register_layer_rule(call, rule, overwrite=overwrite)
        return
    if not (isinstance(call, str) or callable(call)) or isinstance(call, type):
        raise TypeError(
            f"Expected `call` to be the name of a call, a function or a layer class, but got {call!r}. For "
            f"an autograd function, register the layer that calls it."
        )
    name = call if isinstance(call, str) else canonical_name(call)[0]
    if name in PASS_THROUGH | CONSTANT:
        raise ValueError(
            f"Expected a call that needs a rule, but got {name!r}, which only moves elements or has a result "
            f"without relevance. To change this, set a rule on the module that makes the call."
        )
    known = name in _CALL_RULES or any(
        name == key
        for keys, _ in get_mapping().entries
        for key in (keys if isinstance(keys, tuple) else (keys,))
    )
    if known and not overwrite:
        raise ValueError(
            f"Expected a call without a rule, but got {name!r}, which has one. Pass `overwrite=True` to "
            f"replace it."
        )
    _CALL_RULES[name] = rule


def get_mapping(name: str = "generic") -> Mapping:
    """Return the mapping that is registered under a name.

    Raises:
        ValueError: if the name is unknown. The message suggests similar names.

    Example:
        >>> get_mapping("vit").name
        'vit'
    """
    if name not in _MAPPINGS:
        near = difflib.get_close_matches(name, _MAPPINGS, n=3, cutoff=0.5) or list_mappings()
        raise ValueError(
            f"Expected `mapping` to be one of {list_mappings()}, but got {name!r}. Did you mean "
            f"{' or '.join(map(repr, near))}?"
        )
    return _MAPPINGS[name]


def list_mappings() -> list[str]:
    """Return the names of the registered mappings.

    Example:
        >>> {"generic", "resnet", "vgg", "vit"} <= set(list_mappings())
        True
    """
    return sorted(_MAPPINGS)


def find_mapping(module: nn.Module) -> Mapping | None:
    """Return the mapping that is registered for the class of a module or one of its base classes, or None.

    Example:
        >>> import timm
        >>> find_mapping(timm.create_model("test_vit")).name
        'vit'
    """
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return None
        mapping = _ARCHITECTURES.get(f"{cls.__module__}.{cls.__qualname__}")
        if mapping is not None:
            return mapping
    return None


def _matches(key: Key, call: Call) -> bool:
    if isinstance(key, At):
        here = fnmatch.fnmatchcase(call.local_path, key.pattern)
        return here and key.call in (None, call.name)
    return isinstance(key, type) and isinstance(call.module, key)
