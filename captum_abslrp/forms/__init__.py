"""The closed forms: how a call of each kind is run, and how relevance goes back through it.

A form takes the :class:`~captum_abslrp.interception.Call` and the arguments of the call, as the
function that is called declares them, and returns an
:class:`~captum_abslrp.rules.Answer`. The mathematics is in :mod:`captum_abslrp.functional`; what
is said here is what each call computes, what is kept for the backward pass, and which of the arguments
receive relevance. Each module ends with tables from the names of calls to their forms.
"""

from captum_abslrp.forms.affine import AFFINE
from captum_abslrp.forms.attention import ATTENTION
from captum_abslrp.forms.base import Form, answer_constant, answer_passed, answer_twin, is_source
from captum_abslrp.forms.complex import COMPLEX
from captum_abslrp.forms.composites import COMPOSITES
from captum_abslrp.forms.elementwise import (
    ACTIVATIONS,
    DROPOUTS,
    PRODUCTS,
    SUMS,
    answer_head_sum,
)
from captum_abslrp.forms.normalization import NORMALIZATIONS, answer_batch_norm, answer_softmax
from captum_abslrp.forms.pooling import MAX_POOLS, answer_max_pool
from captum_abslrp.forms.products import MATMULS
from captum_abslrp.forms.recurrent import RECURRENT

__all__ = [
    "ACTIVATIONS",
    "AFFINE",
    "ATTENTION",
    "COMPLEX",
    "COMPOSITES",
    "DROPOUTS",
    "MATMULS",
    "MAX_POOLS",
    "NORMALIZATIONS",
    "PRODUCTS",
    "RECURRENT",
    "SUMS",
    "Form",
    "answer_batch_norm",
    "answer_constant",
    "answer_head_sum",
    "answer_max_pool",
    "answer_passed",
    "answer_softmax",
    "answer_twin",
    "is_source",
]
