"""VGG: as published, max pooling passes relevance without dividing by its output."""

from captum_abslrp.mappings.generic import GENERIC
from captum_abslrp.mappings.registry import Mapping, register_mapping
from captum_abslrp.rules import MaxPoolRule

__all__ = ["VGG"]

VGG = register_mapping(
    Mapping("vgg", [("max_pool2d", MaxPoolRule(divide=False))], base=GENERIC),
    architectures=["timm.models.vgg.VGG", "torchvision.models.vgg.VGG"],
)
"""VGG, with max pooling as published, without division."""
