"""absLRP for Captum: which parts of an input did a model base its decision on?

``AbsLRP(model).attribute(x, target)`` returns the contrastive absLRP relevance (Vukadin et al., ACM TIST
2024) of every input element, for an unmodified PyTorch model.
"""

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.inspection import inspect_rules, stem_stride
from captum_abslrp.layer import LayerAbsLRP
from captum_abslrp.lrp import LRP
from captum_abslrp.mappings import register_call_rule, register_mapping
from captum_abslrp.tokens import token_map
from captum_abslrp.tracing import trace_relevance
from captum_abslrp.words import TextAbsLRP

__all__ = [
    "LRP",
    "AbsLRP",
    "LayerAbsLRP",
    "TextAbsLRP",
    "UnsupportedCallError",
    "inspect_rules",
    "register_call_rule",
    "register_mapping",
    "stem_stride",
    "token_map",
    "trace_relevance",
    "__version__",
]

__version__ = "1.0.0rc1"
