"""Which rule records which call: one table per architecture family over a generic one.

The tables register themselves when this package is imported; to add an architecture, write one more
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
