r"""The formulas of absLRP as pure functions of tensors.

The definition (Vukadin et al., *Advancing Attribution-Based Neural Network Explainability through Relative
Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component Evaluation*, ACM TIST 15(3), 2024)
divides the relevance of a call's output by its magnitude, :math:`s = R / |z|`, and multiplies by the input
at its end,

.. math:: R_{in} = x \, \partial/\partial x \, \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle .

Between two calls, the multiplication and the division cancel. Calls therefore exchange the *relevance per
magnitude* of a tensor, :math:`s_t = R_t / |t|`. Every function handles one call ``z = f(x; w, b)``. It takes
``x``, the weight and ``s``, which has the shape of ``z``. It returns the relevance per magnitude of ``x``, or
a factor for ``s``, up to a constant that is the same for all inputs of the call, because relevance is scaled
afterwards (:func:`scale`).
"""

from captum_abslrp.engine.numerics import (
    EPS,
    divide,
    magnitude,
    per_magnitude,
    relevance,
    rounding,
    scale,
    sums,
)
from captum_abslrp.rules.affine import convolution, linear, transposed_convolution
from captum_abslrp.rules.attention import attention
from captum_abslrp.rules.complex import complex_bilinear, complex_diagonal
from captum_abslrp.rules.contributions import (
    SignedParts,
    bilinear,
    diagonal,
    positive_contributions,
)
from captum_abslrp.rules.elementwise import elementwise, gate
from captum_abslrp.rules.linear_maps import linear_map, shares
from captum_abslrp.rules.matmul import matmul
from captum_abslrp.rules.normalization import group_norm, layer_norm, rms_norm
from captum_abslrp.rules.pooling import max_pool
from captum_abslrp.rules.softmax import softmax
from captum_abslrp.rules.twin import twin

__all__ = [
    "EPS",
    "SignedParts",
    "attention",
    "bilinear",
    "complex_bilinear",
    "complex_diagonal",
    "convolution",
    "diagonal",
    "divide",
    "elementwise",
    "gate",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_map",
    "magnitude",
    "matmul",
    "max_pool",
    "per_magnitude",
    "positive_contributions",
    "relevance",
    "rms_norm",
    "rounding",
    "scale",
    "shares",
    "softmax",
    "sums",
    "transposed_convolution",
    "twin",
]
