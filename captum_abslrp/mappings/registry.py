"""What a mapping is, and the register of those that are known by name."""

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
    """Matches calls by where they are made.

    Args:
        pattern: path of the module that makes the call, with the wildcards of ``fnmatch``: ``*`` matches
            dots, too. The path is relative to the module that the mapping was found for; that module itself
            is ``""``.
        call: canonical name of the call (``"add"``); None matches every call that is made there.

    Example:
        >>> At("*pos_drop")
        At(pattern='*pos_drop', call=None)
    """

    pattern: str
    call: str | None = None


Key = str | type[nn.Module] | At
"""A call by its canonical name (``"add"`` for what ``inspect_rules`` prints as ``torch.Tensor.add``), the
calls of a layer type (``nn.Dropout``) or place (:class:`At`)."""


Entries = Sequence[tuple[Key | tuple[Key, ...], Rule]]


@dataclass(frozen=True)
class Mapping:
    """An ordered table from calls to rules; the first entry that matches a call wins.

    Args:
        name: for messages and the register.
        entries: pairs of a :data:`~captum_abslrp.mappings.registry.Key`, or a tuple of keys, and the rule
            for what they match.
        base: the mapping to ask where no entry matches.
        signed: whether relevance starts as the output itself, which its rules share by contributions of both
            signs, as in LRP. Otherwise it starts as a share of one, as in absLRP.

    Raises:
        TypeError: if a rule is not an instance of :class:`~captum_abslrp.rules.Rule`.

    Calls that only move elements (``captum_abslrp.engine.names.PASS_THROUGH``: reshape, cat, ...) are not
    asked for: relevance moves with its element there.

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
                    f"Expected the rule of {keys!r} in mapping {self.name!r} to be an instance of a rule of "
                    f"captum_abslrp.rules, such as `TwinRule()`, but got {rule!r}."
                )

    def rule_of_call(self, call: Call) -> Rule | None:
        """The rule for a call, or None."""
        found = self.find(call)
        return None if found is None else found[0]

    def find(self, call: Call) -> tuple[Rule, str] | None:
        """The rule for a call and where it comes from, or None."""
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
        """The rule that the table itself has for all calls of a name, or None."""
        found = self._index[1].get(name)
        return None if found is None else found[1]

    @functools.cached_property
    def _index(self) -> tuple[list[tuple[int, Key, Rule]], dict[str, tuple[int, Rule]]]:
        """The keys that need a look at the call, and the names of calls, with their place in the table."""
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
        """A mapping whose entries win over those of this one.

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
    """Make a mapping known by its name, and as the mapping of architectures.

    Args:
        mapping: the mapping.
        architectures: classes of the models it is for, or their qualified names, for example
            ``"timm.models.vgg.VGG"``, which are not imported. Subclasses are found, too.
        overwrite: replace what is registered already.

    Returns:
        The mapping.

    Raises:
        TypeError: if an architecture is neither.
        ValueError: if the name or an architecture is taken and ``overwrite`` is not set.

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
            f"Expected a mapping of a new name for new architectures, but got {taken}, which "
            f"are registered already. Pass `overwrite=True` to replace them."
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
        f"Expected `architectures` to hold classes of models, or qualified names such as "
        f"'timm.models.vgg.VGG', but got {architecture!r}."
    )


def register_call_rule(
    call: str | Callable[..., Any] | type[nn.Module], rule: Rule, *, overwrite: bool = False
) -> None:
    """Give a rule to a call that has none, in every model.

    Args:
        call: one of

            - the name of a call as messages have it (``"erfinv"``), or the function itself
              (``torch.erfinv``);
            - an operator of a library, ``torch.ops.mylib.fused``, or its name, ``"mylib::fused"``;
            - a function of your own that PyTorch shows (``torch.overrides.wrap_torch_function``);
            - a class of layers, each of which is one call from its arguments to what it returns (a tensor,
              or a tuple, dict or dataclass of tensors): what is inside (an ``autograd.Function``, a kernel)
              is not looked at. Such a layer takes a state as an argument, and returns it. Subclasses are
              meant, too.
        rule: for example :class:`~captum_abslrp.rules.TwinRule`, which suits whatever PyTorch can
            differentiate, a layer with its own backward pass included.
        overwrite: replace a rule that the generic mapping has, or that is registered already.

    A rule set on a module still wins; where a call is registered, so do the entries of an architecture's
    mapping. A registered layer is one call, and no mapping is asked for what is inside of it.

    Raises:
        TypeError: if the call or the rule is none.
        ValueError: if the call has a rule and ``overwrite`` is not set, or needs none, because it only
            moves elements or its result carries no relevance.

    Example:
        >>> from captum_abslrp.rules import TwinRule
        >>> register_call_rule("erfinv", TwinRule())
        >>> class Inverse(nn.Linear):
        ...     def forward(self, x):
        ...         return torch.erfinv(super().forward(x).tanh())
        >>> AbsLRP(Inverse(3, 2)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
        >>> _ = _CALL_RULES.pop("erfinv")
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"Expected `rule` to be one of captum_abslrp.rules, but got {rule!r}.")
    if isinstance(call, type) and issubclass(call, nn.Module):
        register_layer_rule(call, rule, overwrite=overwrite)
        return
    if not (isinstance(call, str) or callable(call)) or isinstance(call, type):
        raise TypeError(
            f"Expected `call` to be the name of a call, a function or a class of layers, but got "
            f"{call!r}. For an autograd function, register the layer that calls it."
        )
    name = call if isinstance(call, str) else canonical_name(call)[0]
    if name in PASS_THROUGH | CONSTANT:
        raise ValueError(
            f"Expected a call that needs a rule, but got {name!r}, which moves elements or has a result "
            f"without relevance. Set a rule on the module around it, if it should do otherwise."
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
    """The mapping of a name.

    Raises:
        ValueError: if there is none; the message lists near names.

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
    """Names of the registered mappings.

    Example:
        >>> {"generic", "resnet", "vgg", "vit"} <= set(list_mappings())
        True
    """
    return sorted(_MAPPINGS)


def find_mapping(module: nn.Module) -> Mapping | None:
    """The mapping that is registered for the class of a module or a class it derives from.

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
