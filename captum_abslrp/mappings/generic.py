"""The generic mapping: the rules that every architecture starts from."""

from captum_abslrp import forms
from captum_abslrp.mappings.registry import Mapping, register_mapping
from captum_abslrp.rules import (
    AbsLRPRule,
    ActivationRule,
    AdditionRule,
    BatchNormRule,
    CompositeRule,
    ConstantRule,
    LayerNormRule,
    MatmulRule,
    MaxPoolRule,
    PassThroughRule,
    ProductRule,
    SoftmaxRule,
    TwinRule,
)

__all__ = ["GENERIC"]

DIVISORS = ("reciprocal", "rsqrt")
# The logarithm of softmax's denominator is an offset that all classes share.
SHIFTED_OR_SCALED = ("neg", "log_softmax", "nan_to_num", "rad2deg", "deg2rad")
BY_DEFINITION = (
    "amax", "amin", "bilinear", "cdist", "cumprod", "fmax", "fmin", "index_add", "index_reduce",
    "linalg_norm", "linalg_vector_norm", "logaddexp", "logcumsumexp", "logsumexp", "lp_pool1d",
    "lp_pool2d", "maximum", "minimum", "norm", "pairwise_distance", "pdist", "prod", "scatter_add",
    "scatter_reduce", "segment_reduce", "std", "torchvision::deform_conv2d",
    "torchvision::ps_roi_align", "torchvision::ps_roi_pool", "torchvision::roi_align",
    "torchvision::roi_pool", "var",
)  # fmt: skip

GENERIC = register_mapping(
    Mapping(
        "generic",
        [
            (tuple(forms.AFFINE), AbsLRPRule()),
            (tuple(ActivationRule.closed_forms), ActivationRule()),
            (tuple(MaxPoolRule.closed_forms), MaxPoolRule()),
            (tuple(BatchNormRule.closed_forms), BatchNormRule()),
            (tuple(LayerNormRule.closed_forms), LayerNormRule()),
            (tuple(SoftmaxRule.closed_forms), SoftmaxRule()),
            (tuple(MatmulRule.closed_forms), MatmulRule()),
            (tuple(AdditionRule.closed_forms), AdditionRule()),
            (tuple(ProductRule.closed_forms), ProductRule()),
            (tuple(CompositeRule.closed_forms), CompositeRule()),
            ((*forms.DROPOUTS, *SHIFTED_OR_SCALED), PassThroughRule()),
            (DIVISORS, ConstantRule()),
            (BY_DEFINITION, TwinRule()),
        ],
    )
)
"""The rules of all calls, for every model that has no mapping of its own."""
