"""ResNet: the generic rules, in particular those of residual additions and batch norm."""

from captum_abslrp.mappings.generic import GENERIC
from captum_abslrp.mappings.registry import Mapping, register_mapping

__all__ = ["RESNET"]

RESNET = register_mapping(
    Mapping("resnet", [], base=GENERIC),
    architectures=["timm.models.resnet.ResNet", "torchvision.models.resnet.ResNet"],
)
"""ResNet and its variants, with the generic rules."""
