"""The absLRP rule, which selects the closed form of each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.rules.affine import CONVOLUTIONS, LINEAR
from captum_abslrp.rules.attention import ATTENTION
from captum_abslrp.rules.base import Form, Rule
from captum_abslrp.rules.complex import COMPLEX
from captum_abslrp.rules.decompositions import DECOMPOSITIONS
from captum_abslrp.rules.elementwise import ACTIVATIONS, DROPOUTS
from captum_abslrp.rules.linear_maps import LINEAR_MAPS
from captum_abslrp.rules.matmul import MATMULS
from captum_abslrp.rules.multi_head import MULTI_HEAD
from captum_abslrp.rules.normalization import BATCH_NORM, NORMALIZATIONS
from captum_abslrp.rules.pooling import MAX_POOLS
from captum_abslrp.rules.products import PRODUCTS
from captum_abslrp.rules.recurrent import RECURRENT
from captum_abslrp.rules.softmax import SOFTMAX
from captum_abslrp.rules.sums import SUMS
from captum_abslrp.rules.twin import record_twin

CLOSED_FORMS: dict[str, Form] = {
    **LINEAR,
    **CONVOLUTIONS,
    **LINEAR_MAPS,
    **ACTIVATIONS,
    **MAX_POOLS,
    **BATCH_NORM,
    **NORMALIZATIONS,
    **SOFTMAX,
    **MATMULS,
    **SUMS,
    **PRODUCTS,
    **ATTENTION,
    **MULTI_HEAD,
    **RECURRENT,
    **DECOMPOSITIONS,
}
"""The closed forms by canonical name of the call; the rule of dropout depends on the mapping."""


class AbsLRPRule(Rule):
    """The absLRP rule, which selects the closed form of each call.

    Differentiable calls without a closed form are recorded by the definition, :class:`TwinRule`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> for layer in model:
        ...     layer.rule = AbsLRPRule()
        >>> captum.attr.LRP(model).attribute(torch.rand(5, 3), target=1).shape
        torch.Size([5, 3])
    """

    closed_forms: ClassVar[Mapping[str, Form]] = {**CLOSED_FORMS, **DROPOUTS}

    def form_of(self, call: Call) -> Form | None:
        name = call.name.removeprefix(PREFIX)
        if name != call.name and name in self.closed_forms:
            return COMPLEX.get(name, record_twin)
        return self.closed_forms.get(call.name, record_twin)

    def suits_complex(self, call: Call) -> bool:
        return call.name in COMPLEX or super().suits_complex(call)
