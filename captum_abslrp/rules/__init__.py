"""The absLRP rules as Captum ``PropagationRule`` subclasses.

A rule runs a call and records how to propagate relevance from its output to its inputs.
:class:`captum_abslrp.AbsLRP` gets the rule of each call from the mapping of the model. A rule that is set on
a module, ``module.rule = AbsLRPRule()``, takes precedence over the mapping, and also works with
``captum.attr.LRP``.

Each file covers one kind of call: its mathematics, its records, and a table of its closed forms.
"""

from captum_abslrp.engine.tape import Record, Tail
from captum_abslrp.rules.abslrp import AbsLRPRule
from captum_abslrp.rules.base import ConstantRule, PassThroughRule, Rule
from captum_abslrp.rules.choices import AttentionRule, PowerRule
from captum_abslrp.rules.decompositions import DecomposedRule
from captum_abslrp.rules.elementwise import DropoutRule
from captum_abslrp.rules.factor import FactorRule
from captum_abslrp.rules.groups import Group, LayerParts, LayerRule, Term
from captum_abslrp.rules.lrp import (
    AlphaBetaRule,
    FirstLayerRule,
    FlatRule,
    GammaRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from captum_abslrp.rules.pooling import MaxPoolRule
from captum_abslrp.rules.signed import (
    BatchNormRule,
    EpsilonRule,
    NormalizationRule,
    PartsRule,
    SumRule,
    UniformRule,
)
from captum_abslrp.rules.sums import HeadSumRule
from captum_abslrp.rules.twin import TwinRule

__all__ = [
    "AbsLRPRule",
    "AlphaBetaRule",
    "BatchNormRule",
    "ConstantRule",
    "DecomposedRule",
    "DropoutRule",
    "EpsilonRule",
    "FactorRule",
    "FirstLayerRule",
    "FlatRule",
    "GammaRule",
    "Group",
    "HeadSumRule",
    "LayerParts",
    "LayerRule",
    "MaxPoolRule",
    "NormalizationRule",
    "PartsRule",
    "PowerRule",
    "AttentionRule",
    "PassThroughRule",
    "Record",
    "Rule",
    "SumRule",
    "Tail",
    "Term",
    "TwinRule",
    "UniformRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
]
