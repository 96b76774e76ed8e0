"""The generic mapping: the default rules of all architectures."""

from captum_abslrp.mappings.registry import Mapping, register_mapping
from captum_abslrp.rules import AbsLRPRule, ConstantRule, PassThroughRule, TwinRule
from captum_abslrp.rules.abslrp import CLOSED_FORMS
from captum_abslrp.rules.elementwise import DROPOUTS

__all__ = ["GENERIC"]

DIVISORS = ("reciprocal", "rsqrt")
# In log-softmax, the logarithm of the denominator is an offset that all classes share.
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
            (tuple(CLOSED_FORMS), AbsLRPRule()),
            ((*DROPOUTS, *SHIFTED_OR_SCALED), PassThroughRule()),
            (DIVISORS, ConstantRule()),
            (BY_DEFINITION, TwinRule()),
        ],
    )
)
"""The rules of all calls, for models without a registered mapping."""
