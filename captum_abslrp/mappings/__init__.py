"""Mappings from calls to rules: a generic table, and one table per architecture family on top of it.

The tables are registered when this package is imported. To add an architecture, add a module with its table
and import it here.
"""

from captum_abslrp.mappings.composites import composite
from captum_abslrp.mappings.generic import GENERIC
from captum_abslrp.mappings.registry import (
    At,
    Mapping,
    find_mapping,
    get_mapping,
    list_mappings,
    register_call_rule,
    register_mapping,
)
from captum_abslrp.mappings.resnet import RESNET
from captum_abslrp.mappings.scope import MappingScope
from captum_abslrp.mappings.vgg import VGG
from captum_abslrp.mappings.vit import VIT
from captum_abslrp.rules.captum import find_layer_rule

__all__ = [
    "GENERIC",
    "RESNET",
    "VGG",
    "VIT",
    "At",
    "Mapping",
    "MappingScope",
    "composite",
    "find_layer_rule",
    "find_mapping",
    "get_mapping",
    "list_mappings",
    "register_call_rule",
    "register_mapping",
]
