"""Vision Transformer: as published, dropout has the twin rule of the identity even in evaluation mode,
except for the dropout after the position embedding."""

from captum_abslrp.mappings.generic import GENERIC
from captum_abslrp.mappings.registry import At, Mapping, register_mapping
from captum_abslrp.rules import DropoutRule, PassThroughRule

__all__ = ["TWO_HEADS", "VIT", "VIT_DISTILLED"]

VIT = register_mapping(
    Mapping(
        "vit",
        [
            ((At("*pos_drop"), At("*encoder.dropout")), PassThroughRule()),
            ("dropout", DropoutRule()),
        ],
        base=GENERIC,
    ),
    architectures=[
        "timm.models.vision_transformer.VisionTransformer",
        "torchvision.models.vision_transformer.VisionTransformer",
    ],
)
"""Vision Transformer, with dropout as published."""

VIT_DISTILLED = register_mapping(
    Mapping("vit_distilled", [], base=VIT),
    architectures=["timm.models.deit.VisionTransformerDistilled"],
)

TWO_HEADS = register_mapping(
    Mapping("two_heads", [], base=GENERIC),
    architectures=[
        "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher",
    ],
)
