"""The generic mapping: the rules that every architecture starts from."""

from captum_abslrp.mappings.registry import Mapping, register_mapping
from captum_abslrp.rules import (
    AbsLRPRule,
    AdditionRule,
    AttentionRule,
    BatchNormRule,
    DropoutRule,
    LayerNormRule,
    MatmulRule,
    MaxPoolRule,
    PassThroughRule,
    ProductRule,
    SoftmaxRule,
)

__all__ = ["GENERIC"]

AFFINE = (
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
POOLING = (
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "mean",
    "sum",
)
ACTIVATIONS = (
    "relu",
    "prelu",
    "relu6",
    "leaky_relu",
    "gelu",
    "silu",
    "mish",
    "elu",
    "celu",
    "selu",
    "sigmoid",
    "tanh",
    "softplus",
    "softsign",
    "logsigmoid",
    "hardtanh",
    "hardsigmoid",
    "hardswish",
)

GENERIC = register_mapping(
    Mapping(
        "generic",
        [
            (AFFINE, AbsLRPRule()),
            (POOLING, AbsLRPRule()),
            (ACTIVATIONS, AbsLRPRule()),
            (tuple(MaxPoolRule.closed_forms), MaxPoolRule()),
            (tuple(BatchNormRule.closed_forms), BatchNormRule()),
            (tuple(LayerNormRule.closed_forms), LayerNormRule()),
            (tuple(SoftmaxRule.closed_forms), SoftmaxRule()),
            (tuple(MatmulRule.closed_forms), MatmulRule()),
            (tuple(AdditionRule.closed_forms), AdditionRule()),
            (tuple(ProductRule.closed_forms), ProductRule()),
            (tuple(AttentionRule.closed_forms), AttentionRule()),
            (tuple(DropoutRule.closed_forms), PassThroughRule()),
            ("neg", PassThroughRule()),
        ],
    )
)
